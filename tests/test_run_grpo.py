"""examples/run_grpo.py and run_dpo.py: prompts, rewards and pairs from files, adapters, and runs that go on."""

import json

import pytest
import reasoning_tasks
import run_dpo
import run_grpo
import torch
from recipe_runs import options
from tiny_models import save_with_tokenizer
from transformers import AutoModel, AutoTokenizer


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A folder of puzzles, and a model with the tokenizer of their solutions."""
    folder = tmp_path_factory.mktemp("task")
    reasoning_tasks.main(
        reasoning_tasks.Arguments("sudoku", str(folder), num_examples=60, num_prompts=20, num_held_out=8)
    )
    texts = [json.loads(line)["text"] for line in (folder / "examples.jsonl").read_text().splitlines()]
    save_with_tokenizer(folder / "start", texts, max_position_embeddings=64)
    return folder


def settings_of(task, output, **changes):
    settings = {
        "model": task / "start",
        "output_dir": output,
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_steps": 2,
        "disable_tqdm": True,
        "use_cpu": True,
        "report_to": "none",
    }
    return options(settings | changes)


def reinforce(task, output, **changes):
    changes = {
        "train_file": task / "train.jsonl",
        "reward": "sudoku_cells,sudoku_solved",
        "begin_of_text": True,
        "max_completion_length": 0,
        "num_generations": 4,
        "alpha_0": 1.0,
        "num_diffusion_steps": 2,
    } | changes
    run_grpo.main(*run_grpo.parse_args(settings_of(task, output, **changes)))
    return json.loads((output / "metrics.json").read_text())


def test_puzzles_are_filled_in_and_learned_from(task, tmp_path):
    (tmp_path / "rewards.py").write_text("def long(texts, **columns):\n    return [len(text) for text in texts]\n")
    history = reinforce(
        task, tmp_path, reward=f"sudoku_cells,sudoku_solved,{tmp_path / 'rewards.py'}:long",
        held_out_file=task / "held_out.jsonl", eval_strategy="steps", eval_steps=2,
        per_device_eval_batch_size=8, num_generations_eval=2,
    )  # fmt: skip
    rows = [row for row in history if "reward" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(row["rollouts/tokens"] == 6 and row["rollouts/forwards"] <= 2 for row in rows)
    assert all({"rewards/sudoku_cells/mean", "rewards/sudoku_solved/mean"} <= row.keys() for row in rows)
    assert sum("eval_reward" in row for row in history) == 2
    assert (tmp_path / "reward.png").stat().st_size > 5000
    before, after = (AutoModel.from_pretrained(folder).state_dict() for folder in (task / "start", tmp_path))
    assert any(not torch.equal(weight, after[name]) for name, weight in before.items())
    assert AutoTokenizer.from_pretrained(tmp_path).mask_token_id is not None


def test_a_run_that_was_killed_goes_on(task, tmp_path):
    whole = reinforce(task, tmp_path / "whole")
    reinforce(task, tmp_path / "killed", max_steps=2)
    resumed = reinforce(task, tmp_path / "killed")
    states = [AutoModel.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "killed")]
    assert all(torch.equal(weight, states[1][name]) for name, weight in states[0].items())
    rewards = [[row["reward"] for row in history if "reward" in row] for history in (whole, resumed)]
    assert rewards[0] == rewards[1]
    with pytest.raises(ValueError, match="`num_diffusion_steps` was 2 and is 3"):
        reinforce(task, tmp_path / "killed", num_diffusion_steps=3)


def test_completions_adapters_and_a_reward_of_a_file(task, tmp_path):
    (tmp_path / "rewards.py").write_text(
        "def short(completion_ids, **columns):\n    return [-len(c) for c in completion_ids]\n"
    )
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "1 2"}\n{"prompt": "3"}\n')
    history = reinforce(
        task, tmp_path / "run", train_file=tmp_path / "prompts.jsonl", reward=f"{tmp_path / 'rewards.py'}:short",
        begin_of_text=False, max_completion_length=5, alpha_0=None, num_diffusion_steps=None, lossless=True,
        lora_rank=2, beta=0.1,
    )  # fmt: skip
    rows = [row for row in history if "reward" in row]
    assert all(-5 <= row["reward"] <= -1 for row in rows)
    assert abs(rows[0]["kl"]) < 1e-5
    assert (tmp_path / "run" / "adapter_config.json").exists()


@pytest.mark.parametrize(("changes", "message"), [
    ({"reward": "kindness"}, r"`reward` must be of \['countdown_solved', .*\], or file.py:function, got 'kindness'"),
    ({"reward": "nowhere.py:kind"}, "There is no file nowhere.py, of `reward=nowhere.py:kind`"),
    ({"reward": f"{run_grpo.__file__}:kind"}, "must hold a function 'kind'"),
    ({"train_file": "nowhere.jsonl"}, "There is no file nowhere.jsonl"),
    ({"generation_kwargs": '{"top_k": 5}'}, r"`generation_kwargs` is made of the arguments \('alpha_0', "),
    ({"save_total_limit": 1}, "`save_total_limit` must be at least 2"),
    ({"alpha_0": 1.5}, "`alpha_0`"),
    ({"steps_per_generation": 2, "num_iterations": 2, "save_steps": 2}, "`save_steps` must be a multiple of 4"),
])  # fmt: skip
def test_settings_that_are_refused(task, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        reinforce(task, tmp_path / "run", **changes)


@pytest.mark.parametrize(("lines", "message"), [
    ("", "must hold examples, and is empty"),
    ('{"text": "a"}\n', r"must have the fields `prompt`: \['text'\]"),
    ('{"prompt": "a"}\n{"prompt": null}\n', r"Example 1 of .* lacks \['prompt'\]"),
    ('{"prompt": []}\n', "has no chat template"),
    ('{"prompt": [{"role": "user", "content": "a"}]}\n', "has no chat template"),
])  # fmt: skip
def test_prompts_that_are_refused(task, tmp_path, lines, message):
    file = tmp_path / "prompts.jsonl"
    file.write_text(lines)
    with pytest.raises(ValueError, match=message):
        reinforce(task, tmp_path / "run", train_file=file)


def prefer(task, output, pairs, **changes):
    output.mkdir(exist_ok=True)
    (output / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    arguments = settings_of(task, output, train_file=output / "pairs.jsonl", **changes)
    run_dpo.main(*run_dpo.parse_args(arguments))
    return json.loads((output / "metrics.json").read_text())


PAIRS = [{"prompt": f"{n} 2", "chosen": " 3 4", "rejected": " 1 1 2", "note": "unused"} for n in range(8)]


def test_preferences_are_learned_and_a_killed_run_goes_on(task, tmp_path):
    whole = prefer(task, tmp_path / "whole", PAIRS, held_out_file=None)
    margins = [row["rewards/margins"] for row in whole if "rewards/margins" in row]
    assert abs(margins[0]) < 1e-5
    assert margins[-1] > 0.05
    prefer(task, tmp_path / "killed", PAIRS, max_steps=2)
    prefer(task, tmp_path / "killed", PAIRS)
    states = [AutoModel.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "killed")]
    assert all(torch.equal(weight, states[1][name]) for name, weight in states[0].items())


def test_adapters_and_a_held_out_file_of_preferences(task, tmp_path):
    history = prefer(
        task, tmp_path, PAIRS, held_out_file=tmp_path / "pairs.jsonl", eval_strategy="steps", eval_steps=2,
        lora_rank=2, alpha_0=0.0,
    )  # fmt: skip
    assert sum("eval_loss" in row for row in history) == 2
    assert (tmp_path / "adapter_config.json").exists()


def test_pairs_that_are_refused(task, tmp_path):
    with pytest.raises(ValueError, match="must have the fields `prompt` and `chosen` and `rejected`"):
        prefer(task, tmp_path, [{"prompt": "a", "chosen": "b"}])
    with pytest.raises(ValueError, match=r"Example 8 of .* lacks \['rejected'\]"):
        prefer(task, tmp_path, [*PAIRS, {"prompt": "a", "chosen": "b"}])


def test_prompts_may_begin_a_document_and_have_holes(task, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(task / "start")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "1<mask:2>"}\n')
    for begin_of_text, begin in ((True, tokenizer.eos_token), (False, "")):
        prompts = run_grpo.load_prompts(str(tmp_path / "prompts.jsonl"), tokenizer, begin_of_text)
        assert prompts["prompt"] == [begin + "1" + 2 * tokenizer.mask_token]


@pytest.mark.parametrize("recipe", [run_grpo, run_dpo])
def test_half_precision_is_for_who_has_a_gpu_or_asks(recipe, tmp_path):
    given = ["--model=m", "--train_file=f", f"--output_dir={tmp_path}"] + ["--reward=r"] * (recipe is run_grpo)
    assert recipe.parse_args(given)[1].bf16 is torch.cuda.is_available()
    assert recipe.parse_args([*given, "--use_cpu=true", "--bf16=true"])[1].bf16 is True
