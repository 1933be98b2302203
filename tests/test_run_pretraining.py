"""Pretraining runs end to end, goes on after being killed, and refuses what would waste a run."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import run_pretraining
import torch
from recipe_runs import losses, pretrain, pretraining_arguments
from resumable_runs import WholeCheckpoints, changed_settings, checkpoints_in, last_whole_checkpoint
from safetensors.torch import load_file
from text_data import load_text_dataset, tokenize
from transformers import AutoModel, AutoTokenizer, TrainerState, TrainingArguments
from two_processes import EXAMPLES, run_on_two_processes


def test_pretraining_leaves_models_averages_and_a_report(texts, small_config, tmp_path):
    history = pretrain(texts, small_config, tmp_path)
    assert len(losses(history)) == 8
    held_out = {row["step"]: row["held_out_nelbo"] for row in history if "held_out_nelbo" in row}
    assert sorted(held_out) == [4, 8]
    assert [row["step"] for row in history if "samples" in row] == [4, 8]
    assert (tmp_path / "loss.png").stat().st_size > 5000
    model, average = AutoModel.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path / "ema")
    assert model.config.alpha_0 == 0.4
    assert model.config.mask_token_id == AutoTokenizer.from_pretrained(tmp_path).mask_token_id
    assert not torch.equal(model.lm_head.weight, average.lm_head.weight)
    assert load_file(tmp_path / "checkpoint-8" / "ema" / "model.safetensors").keys() == average.state_dict().keys()
    # The held-out numbers are those of the averages.
    nelbos = []
    rows = held_out_rows(texts, tmp_path)
    for one in (model, average):
        output = one.nelbo(torch.tensor(rows), num_draws=4, generator=torch.Generator().manual_seed(0))
        nelbos.append(output.nelbo.sum().item() / torch.tensor(rows).numel())
    assert nelbos[1] == pytest.approx(held_out[8], rel=1e-4)
    assert nelbos[0] != pytest.approx(held_out[8], rel=1e-4)


def held_out_rows(texts: Path, output: Path) -> list[list[int]]:
    data = load_text_dataset(str(texts), column="body").take(10)
    return tokenize(data, AutoTokenizer.from_pretrained(output), 24)["input_ids"][:8]


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"streaming": True, "layout": "documents"},
        {"layout": "wrapped", "alpha_0": 1.0, "loss_type": "low_var", "lr_scheduler_type": "cosine"},
        {"alpha_0": 0.0, "gradient_checkpointing": True, "ema_decay": 0.0, "held_out_documents": 0},
        {"bf16": True, "gradient_accumulation_steps": 2, "dataloader_num_workers": 2},
        {"torch_compile": True, "torch_compile_backend": "eager", "save_steps": 2, "evaluate_every": 2},
    ],
)
def test_other_ways_to_pretrain(texts, small_config, tmp_path, changes):
    history = pretrain(texts, small_config, tmp_path, max_steps=4, **changes)
    assert len(losses(history)) == 4
    assert all(1 < loss < 8 for loss in losses(history))
    assert (tmp_path / "ema").is_dir() == (changes.get("ema_decay") != 0.0)


@pytest.mark.slow
def test_a_complete_run_is_not_trained_any_further(texts, small_config, tmp_path):
    """Even where its end is in the midst of an epoch, and its last files were lost."""
    pretrain(texts, small_config, tmp_path, max_steps=5)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("", "ema")]
    names = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    for name in ("", "ema"):
        (tmp_path / name / "model.safetensors").unlink()
    pretrain(texts, small_config, tmp_path, max_steps=5)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == names
    for name, expected in zip(("", "ema"), weights, strict=True):
        again = load_file(tmp_path / name / "model.safetensors")
        assert all(torch.equal(again[key], weight) for key, weight in expected.items())


@pytest.mark.slow
def test_going_on_from_a_model_at_another_alpha_0(texts, small_config, tmp_path):
    pretrain(texts, small_config, tmp_path / "first", alpha_0=1.0)
    first = AutoModel.from_pretrained(tmp_path / "first")
    history = pretrain(
        texts, small_config, tmp_path / "second", init_from=tmp_path / "first", alpha_0=0.25, max_steps=2
    )
    second = AutoModel.from_pretrained(tmp_path / "second")
    assert second.config.alpha_0 == 0.25
    assert second.config.vocab_size == first.config.vocab_size
    assert losses(history)[0] < 6
    pretrain(texts, small_config, tmp_path / "third", init_from=tmp_path / "second", alpha_0=None, max_steps=1)
    assert AutoModel.from_pretrained(tmp_path / "third").config.alpha_0 == 0.25, "its own, unless told otherwise"


@pytest.mark.slow
def test_another_run_does_not_go_on_with_this_one(texts, small_config, tmp_path):
    pretrain(texts, small_config, tmp_path, max_steps=4)
    noted = (tmp_path / "arguments.json").read_text()
    changes = {"alpha_0": (0.4, 0.5), "length": (24, 16), "learning_rate": (0.003, 0.01), "weight_decay": (0.0, 0.1)}
    changes |= {"adam_beta1": (0.9, 0.8), "per_device_train_batch_size": (4, 2), "gradient_accumulation_steps": (1, 2)}
    changes |= {"seed": (42, 1), "lr_scheduler_type": ("constant_with_warmup", "cosine"), "warmup_steps": (2.0, 3.0)}
    changes |= {"bf16": (False, True), "max_grad_norm": (1.0, 0.5), "optim": ("adamw_torch_fused", "adamw_torch")}
    with pytest.raises(ValueError, match="was started with other settings") as refusal:
        pretrain(texts, small_config, tmp_path, max_steps=4, **{name: now for name, (_, now) in changes.items()})
    for name, (before, now) in changes.items():
        assert f"`{name}` was {before!r} and is {now!r}" in str(refusal.value)
    assert str(refusal.value).count(" was ") == len(changes) + 2, "the run itself, and accelerate's name of bf16"
    assert (tmp_path / "arguments.json").read_text() == noted


def copy_of_first_half(run: Path, copy: Path) -> Path:
    """A folder like that of a run of 8 steps that was killed after its first save, at 4."""
    shutil.copytree(run / "checkpoint-4", copy / "checkpoint-4")
    shutil.copy(run / "arguments.json", copy)
    return copy


def assert_same_weights(one: Path, other: Path) -> None:
    for name in ("model.safetensors", "ema/model.safetensors"):
        expected, found = load_file(one / name), load_file(other / name)
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.fixture(scope="module")
def eight_steps(texts, small_config, tmp_path_factory) -> Path:
    """An uninterrupted run, with dropout, saved at steps 4 and 8."""
    path = tmp_path_factory.mktemp("eight_steps")
    pretrain(texts, small_config, path)
    return path


def test_settings_that_do_not_touch_the_weights_may_change(eight_steps, texts, small_config, tmp_path):
    """They are heeded, and the run ends bit for bit like the other one."""
    output = copy_of_first_half(eight_steps, tmp_path / "moved")
    changes = {"save_steps": 3, "save_total_limit": 5, "logging_steps": 2, "evaluate_every": 5, "held_out_rows": 3}
    changes |= {"num_samples": 0, "dataloader_num_workers": 2, "run_name": "again", "logging_first_step": True}
    history = pretrain(texts, small_config, output, **changes)
    assert sorted(path.name for path in output.glob("checkpoint-*")) == [f"checkpoint-{step}" for step in (4, 6, 8)]
    assert [row["step"] for row in history if "loss" in row] == [1, 2, 3, 4, 6, 8]
    assert [row["step"] for row in history if "held_out_nelbo" in row] == [4, 5, 8]
    assert_same_weights(eight_steps, output)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_run_made_longer_ends_like_one_of_that_length(texts, small_config, tmp_path, streaming):
    for name, steps in (("whole", 8), ("parts", 4), ("parts", 8)):
        pretrain(texts, small_config, tmp_path / name, max_steps=steps, streaming=streaming)
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize(
    ("before", "now", "changes"),
    [
        ({"max_steps": 4}, {"max_steps": 8}, []),
        ({"max_steps": 8}, {"max_steps": 4}, ["`max_steps` was 8 and is 4"]),
        ({"max_steps": -1}, {"max_steps": 8}, ["`max_steps` was -1 and is 8"]),
        ({"num_train_epochs": 1.0}, {"num_train_epochs": 2.0}, []),
        ({"max_steps": 4, "lr_scheduler_type": "cosine"}, {"max_steps": 8}, ["`max_steps` was 4 and is 8"]),
        ({"max_steps": 4, "warmup_steps": 0.1}, {"max_steps": 8}, ["`max_steps` was 4 and is 8"]),
        ({"max_steps": 4, "anneal": 0.5}, {"max_steps": 8}, ["`max_steps` was 4 and is 8"]),
        ({"max_steps": 4, "anneal": 0.0}, {"max_steps": 8}, []),
        ({"dataloader_num_workers": 0}, {"dataloader_num_workers": 2}, []),
        (
            {"dataloader_num_workers": 0, "streaming": True},
            {"dataloader_num_workers": 2},
            ["`dataloader_num_workers` was 0 and is 2"],
        ),
        ({"of_an_older_version": 1}, {"of_a_newer_version": 2}, []),
        ({"world_size": 1, "output_dir": "a"}, {"world_size": 2, "output_dir": "b"}, ["`world_size` was 1 and is 2"]),
    ],
)
def test_what_is_a_change_of_settings(before, now, changes):
    same = {"lr_scheduler_type": "constant", "warmup_steps": 0.0, "max_steps": -1, "num_train_epochs": 3.0}
    before = same | before
    now = {name: value for name, value in before.items() if not name.startswith("of_an_older")} | now
    assert changed_settings(before, now) == changes


def test_settings_noted_by_other_versions(eight_steps, texts, small_config, tmp_path):
    output = copy_of_first_half(eight_steps, tmp_path)
    noted = json.loads((output / "arguments.json").read_text())
    of_the_recipe = {field.name for field in dataclasses.fields(run_pretraining.Arguments)}
    older = {name: value for name, value in noted.items() if name in of_the_recipe}
    (output / "arguments.json").write_text(json.dumps(older))
    pretrain(texts, small_config, output)
    assert_same_weights(eight_steps, output)
    again = json.loads((output / "arguments.json").read_text())
    assert again | {"output_dir": None} == noted | {"output_dir": None}, "from now on they are compared"
    (output / "arguments.json").write_text("{")
    with pytest.raises(ValueError, match=r"arguments.json, cannot be read: delete the file"):
        pretrain(texts, small_config, output)


@pytest.mark.slow
def test_a_killed_run_ends_like_an_uninterrupted_one(texts, small_config, tmp_path):
    """Killed at no particular moment; with dropout, averages, and more than an epoch of shuffled rows."""
    changes = {
        "max_steps": 40,
        "save_steps": 5,
        "evaluate_every": 20,
        "per_device_train_batch_size": 32,
        "dropout": 0.1,
    }
    expected = pretrain(texts, small_config, tmp_path / "expected", **changes)
    output = tmp_path / "killed"
    command = [sys.executable, str(EXAMPLES / "run_pretraining.py")]
    process = subprocess.Popen(
        command + pretraining_arguments(texts, small_config, output, **changes),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 240
    while not (output / "checkpoint-10" / "complete").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    resumed_from = last_whole_checkpoint(output)
    assert resumed_from is not None
    assert not (output / "model.safetensors").exists()
    history = pretrain(texts, small_config, output, **changes)
    assert losses(history) == losses(expected)
    assert_same_weights(tmp_path / "expected", output)
    states = [
        torch.load(folder / "checkpoint-40" / "optimizer.pt", weights_only=True)["state"]
        for folder in (output, tmp_path / "expected")
    ]
    for index, moments in states[1].items():
        assert all(torch.equal(states[0][index][name], value) for name, value in moments.items())


def checkpoint(folder: Path, step: int, is_finished: bool = True) -> Path:
    """Two files of ten bytes, one of them in a folder, marked if all was written."""
    path = folder / f"checkpoint-{step}"
    (path / "ema").mkdir(parents=True)
    for name in ("trainer_state.json", "ema/model.safetensors"):
        (path / name).write_bytes(b"0123456789")
    if is_finished:
        WholeCheckpoints().on_save(TrainingArguments(str(folder)), TrainerState(global_step=step), None)
    return path


def cut_off(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def test_half_written_checkpoints_are_passed_over(tmp_path, capsys):
    for step in (5, 10, 15):
        checkpoint(tmp_path, step, is_finished=step != 15)
    (tmp_path / "checkpoint-best").mkdir()
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    told = "checkpoint-15 (it was not written to its end): the last whole one is checkpoint-10."
    assert told in capsys.readouterr().out
    (tmp_path / "checkpoint-10" / "complete").write_text("")
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-10", "as marked by an earlier version"
    assert last_whole_checkpoint(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda path: cut_off(path / "ema" / "model.safetensors"), "ema/model.safetensors has 5 of 10 bytes"),
        (lambda path: (path / "trainer_state.json").write_text(""), "trainer_state.json has 0 of 10 bytes"),
        (lambda path: (path / "trainer_state.json").unlink(), "trainer_state.json is missing"),
        (lambda path: cut_off(path / "complete"), "its mark, complete, cannot be read"),
    ],
)
def test_damaged_checkpoints_are_passed_over(tmp_path, capsys, damage, told):
    for step in (5, 10):
        checkpoint(tmp_path, step)
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert capsys.readouterr().out == ""
    damage(tmp_path / "checkpoint-10")
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-5"
    assert f"checkpoint-10 ({told}): the last whole one is checkpoint-5." in capsys.readouterr().out
    damage(tmp_path / "checkpoint-5")
    with pytest.raises(
        ValueError, match=r"No checkpoint in .* is whole: checkpoint-10 .*, checkpoint-5 .* begin anew"
    ):
        last_whole_checkpoint(tmp_path)


def test_a_damaged_checkpoint_is_made_again(eight_steps, texts, small_config, tmp_path, capsys):
    output = shutil.copytree(eight_steps, tmp_path / "copy")
    cut_off(output / "checkpoint-8" / "optimizer.pt")
    (output / "model.safetensors").unlink()
    pretrain(texts, small_config, output, save_steps=5)
    told = capsys.readouterr().out
    assert "checkpoint-8 (optimizer.pt has " in told
    assert f"Going on from {output / 'checkpoint-4'}." in told
    assert_same_weights(eight_steps, output)
    assert [path.name for path in checkpoints_in(output)] == ["checkpoint-8", "checkpoint-5", "checkpoint-4"]
    assert last_whole_checkpoint(output) == output / "checkpoint-8"


def test_a_run_killed_in_its_first_save_begins_anew(eight_steps, texts, small_config, tmp_path, capsys):
    output = copy_of_first_half(eight_steps, tmp_path)
    (output / "checkpoint-4" / "complete").unlink()
    cut_off(output / "checkpoint-4" / "model.safetensors")
    pretrain(texts, small_config, output)
    assert "A new run." in capsys.readouterr().out
    assert_same_weights(eight_steps, output)


def test_checkpoints_are_not_begun_over(eight_steps, texts, small_config, tmp_path):
    """Neither those of a run, when none is whole, nor those of something else."""
    damaged = copy_of_first_half(eight_steps, tmp_path / "damaged")
    cut_off(damaged / "checkpoint-4" / "model.safetensors")
    with pytest.raises(ValueError, match=r"No checkpoint in .* is whole: checkpoint-4 \(model.safetensors has"):
        pretrain(texts, small_config, damaged)
    checkpoint(tmp_path / "other", 500, is_finished=False)
    with pytest.raises(ValueError, match="holds checkpoints that are not of a recipe"):
        pretrain(texts, small_config, tmp_path / "other")
    assert (tmp_path / "other" / "checkpoint-500" / "trainer_state.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 100_000}, "too short for rows of `length=100000`"),
        ({"length": 2}, "`length` must be at least 4"),
        ({"preset": "huge"}, "`preset` must be one of"),
        ({"layout": "heap"}, "`layout` must be one of"),
        ({"text_column": "text"}, "must be in a column"),
        ({"dataset": "nothing.jsonl"}, "There is no file nothing.jsonl"),
        ({"save_total_limit": 1}, "`save_total_limit` must be at least 2"),
        ({"streaming": True, "max_steps": -1}, "`max_steps` must be set"),
        ({"held_out_documents": 200}, "`held_out_documents=200` must be less"),
        ({"loss_type": "low_var"}, "loss_type"),
        ({"ema_decay": 1.0}, "`decay` must be a number in"),
        ({"evaluate_every": 0}, "`evaluate_every` must be a number of steps"),
        ({"config": "nowhere"}, "there is no nowhere"),
        ({"save_only_model": True}, "`save_only_model` leaves no optimiser"),
        ({"ignore_data_skip": True}, "learn its first rows again"),
        ({"dataloader_num_workers": 1, "dataloader_persistent_workers": True}, "noise of the first epoch"),
    ],
)
def test_misfits_fail_before_training(texts, small_config, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        pretrain(texts, small_config, tmp_path, **changes)
    assert not list(tmp_path.glob("checkpoint-*"))


TWO_PROCESSES_GO_ON = """
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from resumable_runs import WholeCheckpoints, checkpoint_to_go_on_from
from transformers import TrainerState, TrainingArguments

@dataclass
class Settings:
    length: int = 8

def go_on(**changes):
    # The second process has a disk of its own, with nothing on it.
    folder = Path(sys.argv[1]) if rank == 0 else Path(sys.argv[1]) / "nothing"
    return checkpoint_to_go_on_from(TrainingArguments(str(folder), use_cpu=True, **changes), Settings())

training = TrainingArguments(sys.argv[1], use_cpu=True)
rank = training.process_index
assert training.world_size == 2 and go_on() is None

checkpoint = Path(sys.argv[1]) / "checkpoint-3"
checkpoint.mkdir(parents=True, exist_ok=True)
time.sleep(rank)
(checkpoint / f"rng_state_{rank}.pth").write_text("random")
WholeCheckpoints().on_save(training, TrainerState(global_step=3, is_world_process_zero=rank == 0), None)
assert go_on() == checkpoint
try:
    go_on(learning_rate=1.0)
except ValueError as error:
    assert "`learning_rate` was 5e-05 and is 1.0" in str(error)
    print("refused", flush=True)
"""


@pytest.mark.slow
def test_two_processes_go_on_as_one(tmp_path):
    """What the main process sees holds for both, and a checkpoint is whole when both have written theirs."""
    script = tmp_path / "script.py"
    script.write_text(TWO_PROCESSES_GO_ON, encoding="utf-8")
    assert run_on_two_processes(script, tmp_path / "run").stdout.count("refused") == 2
    sizes = json.loads((tmp_path / "run" / "checkpoint-3" / "complete").read_text())
    assert sizes == {"rng_state_0.pth": 6, "rng_state_1.pth": 6}


@pytest.mark.slow
def test_two_processes_learn_like_one(texts, small_config, tmp_path):
    """Data parallel: the loss of every step, and the weights, of the same global batch, whose noise spans both."""
    # Not with Adam, which makes whole steps of the rounding of gradients close to zero.
    changes = {"dropout": 0.0, "max_steps": 6, "save_steps": 3, "per_device_train_batch_size": 8}
    changes |= {"optim": "sgd", "learning_rate": 0.1}
    alone = pretrain(texts, small_config, tmp_path / "alone", **changes)
    whole_batches = '{"split_batches": true, "dispatch_batches": true}'
    arguments = pretraining_arguments(
        texts, small_config, tmp_path / "two", **changes, accelerator_config=whole_batches
    )
    run_on_two_processes(EXAMPLES / "run_pretraining.py", *arguments)
    assert len([*(tmp_path / "two" / "checkpoint-6").glob("rng_state_*.pth")]) == 2, "of two processes"
    together = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert losses(together) == pytest.approx(losses(alone), rel=1e-4)
    held_out = [[row["held_out_nelbo"] for row in history if "held_out_nelbo" in row] for history in (alone, together)]
    assert held_out[1] == pytest.approx(held_out[0], rel=1e-4)
    for name in ("model.safetensors", "ema/model.safetensors"):
        one, two = load_file(tmp_path / "alone" / name), load_file(tmp_path / "two" / name)
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, atol=1e-5, rtol=1e-3)
    with pytest.raises(ValueError, match="`world_size` was 2 and is 1"):
        pretrain(texts, small_config, tmp_path / "two", **changes, accelerator_config=whole_batches)
    uninterrupted = shutil.copytree(tmp_path / "two", tmp_path / "uninterrupted")
    cut_off(tmp_path / "two" / "checkpoint-6" / "rng_state_1.pth")
    told = run_on_two_processes(EXAMPLES / "run_pretraining.py", *arguments).stdout
    assert f"Going on from {tmp_path / 'two' / 'checkpoint-3'}." in told
    assert_same_weights(uninterrupted, tmp_path / "two")
