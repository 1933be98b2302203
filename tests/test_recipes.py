"""The training recipes run end to end, go on after being killed, and refuse what would waste a run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

import adapt_causal_lm
import pytest
import run_finetuning
import run_pretraining
import torch
from datasets import Dataset
from safetensors.torch import load_file
from text_data import load_text_dataset, tokenize, train_tokenizer
from tiny_models import randomized_model
from tokenizers import Tokenizer, models, pre_tokenizers
from trainer_callbacks import last_whole_checkpoint
from transformers import (
    AutoModel,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)

from eso_lm import DataCollatorForHybridMaskedDiffusion, EsoForMaskedDiffusion, ExponentialMovingAverageCallback

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """Real text, two hundred paragraphs of Python's language reference, as JSONL."""
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    paragraphs = [text for name in sorted(topics) for text in topics[name].split("\n\n") if len(text) > 100]
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in paragraphs[:200]), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def small_config(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config")
    (path / "config.json").write_text(
        json.dumps(
            {"model_type": "eso", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "cond_dim": 16}
        )
    )
    return path


def pretraining_arguments(texts: Path, config: Path, output: Path, /, **changes) -> list[str]:
    settings = {
        "dataset": texts,
        "text_column": "body",
        "config": config,
        "vocab_size": 300,
        "length": 24,
        "held_out_documents": 10,
        "held_out_rows": 8,
        "alpha_0": 0.4,
        "output_dir": output,
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "warmup_steps": 2,
        "save_steps": 4,
        "evaluate_every": 4,
        "logging_steps": 1,
        "num_samples": 1,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return [f"--{name}={value}" for name, value in (settings | changes).items() if value is not None]


def pretrain(*arguments, **changes) -> list[dict]:
    """Runs the script in this process; returns what it logged."""
    settings, training = run_pretraining.parse_args(pretraining_arguments(*arguments, **changes))
    run_pretraining.main(settings, training)
    return json.loads((Path(training.output_dir) / "metrics.json").read_text())


def losses(history: list[dict]) -> list[float]:
    return [row["loss"] for row in history if "loss" in row]


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
    with pytest.raises(ValueError, match=r"`length` was 24 and is 16, `alpha_0` was 0.4 and is 0.5"):
        pretrain(texts, small_config, tmp_path, max_steps=8, alpha_0=0.5, length=16)
    history = pretrain(texts, small_config, tmp_path, max_steps=8, evaluate_every=2)
    assert len(losses(history)) == 8, "a longer run of the same, evaluated more often"


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
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
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
    for name in ("model.safetensors", "ema/model.safetensors"):
        resumed, uninterrupted = load_file(output / name), load_file(tmp_path / "expected" / name)
        assert all(torch.equal(resumed[key], value) for key, value in uninterrupted.items())
    states = [
        torch.load(folder / "checkpoint-40" / "optimizer.pt", weights_only=True)["state"]
        for folder in (output, tmp_path / "expected")
    ]
    for index, moments in states[1].items():
        assert all(torch.equal(states[0][index][name], value) for name, value in moments.items())


def test_half_written_checkpoints_are_passed_over(tmp_path):
    for step, is_whole in ((5, True), (10, True), (15, False)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if is_whole:
            (folder / "complete").touch()
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert last_whole_checkpoint(tmp_path / "nowhere") is None


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
        ({"dataloader_num_workers": 1, "dataloader_persistent_workers": True}, "noise of the first epoch"),
    ],
)
def test_misfits_fail_before_training(texts, small_config, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        pretrain(texts, small_config, tmp_path, **changes)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_mask_that_means_something_else_is_refused(tmp_path):
    tokenizer = train_tokenizer(["some text to learn from"], 300, 16)
    tokenizer.mask_token = tokenizer.eos_token
    with pytest.raises(ValueError, match="must be a token of its own"):
        run_pretraining.with_special_tokens(tokenizer)
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "</s>": 2}, unk_token="a"))
    plain = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
    assert run_pretraining.with_special_tokens(plain).mask_token_id == 3
    assert plain.pad_token_id == plain.eos_token_id == 2
    assert len(plain) == 4


def test_beginnings_and_ends_of_other_names():
    """BERT's tokenizer, which the paper's LM1B needs, has [CLS] and [SEP]."""
    words = Tokenizer(models.WordLevel({"a": 0, "[CLS]": 1, "[SEP]": 2, "[MASK]": 3, "[PAD]": 4}, unk_token="a"))
    special = {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]", "pad_token": "[PAD]"}
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = run_pretraining.with_special_tokens(PreTrainedTokenizerFast(tokenizer_object=words, **special))
    rows = tokenize(Dataset.from_dict({"text": ["a", "[MASK]"]}), tokenizer, 8, "documents")["input_ids"]
    assert [(row[0], row[-1]) for row in rows] == [(1, 2), (1, 2)]
    assert 3 not in rows[1], "what looks like a mask is text"


def test_a_few_documents_are_held_out():
    few, many = (Dataset.from_dict({"text": ["a"] * count}) for count in (40, 5000))
    assert [len(part) for part in run_pretraining.split(few, None)] == [2, 38]
    assert [len(part) for part in run_pretraining.split(many, None)] == [100, 4900]
    assert run_pretraining.split(few.take(1), None)[0] is None


def test_rows_of_each_layout():
    tokenizer = train_tokenizer(["abc " * 20], 270, 8)
    end = tokenizer.eos_token_id
    documents = ["abcdefghij", "k", "lmnopqrstuvw"]
    stream = [t for d in documents for t in [*tokenizer(d)["input_ids"], end]]
    for streaming in (False, True):
        data = Dataset.from_dict({"text": documents})
        data = data.to_iterable_dataset() if streaming else data
        rows = {
            layout: [r["input_ids"] for r in tokenize(data, tokenizer, 8, layout)]
            for layout in run_pretraining.LAYOUTS
        }
        assert rows["packed"] == [stream[i : i + 8] for i in range(0, len(stream) - 7, 8)]
        assert [row[1:-1] for row in rows["wrapped"]] == [stream[i : i + 6] for i in range(0, len(stream) - 5, 6)]
        assert all(row[0] == row[-1] == end for row in rows["wrapped"] + rows["documents"])
        assert [row[1:-1] for row in rows["documents"]] == [tokenizer(d)["input_ids"][:6] for d in documents]


class RecordWeights(TrainerCallback):
    def __init__(self):
        self.weights = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.on_step_end(args, state, control, model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights.append(model.lm_head.weight.detach().clone())


def test_averages_are_what_they_say(tmp_path):
    model = randomized_model().train()
    rows = [{"input_ids": torch.randint(0, 23, (12,))} for _ in range(16)]
    arguments = TrainingArguments(str(tmp_path), max_steps=12, learning_rate=1e-2, use_cpu=True, report_to="none")
    collator = DataCollatorForHybridMaskedDiffusion(mask_token_id=23, alpha_0=0.5)
    trainer = Trainer(model, arguments, data_collator=collator, train_dataset=rows)
    record, average = RecordWeights(), ExponentialMovingAverageCallback(trainer, decay=0.6)
    trainer.add_callback(average)
    trainer.add_callback(record)
    trainer.train()
    expected = record.weights[0].double()
    for step, weight in enumerate(record.weights[1:], 1):
        decay = min(0.6, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight.double()
    trained = model.lm_head.weight.detach().clone()
    with average.applied():
        torch.testing.assert_close(model.lm_head.weight.double(), expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(model.lm_head.weight, trained)
    average.save(tmp_path / "average")
    saved = EsoForMaskedDiffusion.from_pretrained(tmp_path / "average").lm_head.weight
    torch.testing.assert_close(saved.double(), expected, atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="`resume_from` must be a checkpoint with averaged weights"):
        ExponentialMovingAverageCallback(trainer, resume_from=tmp_path)


@pytest.fixture(scope="module")
def pretrained(texts, small_config, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pretrained")
    pretrain(texts, small_config, path, alpha_0=1.0, max_steps=60, learning_rate=1e-2, save_strategy="no")
    return path


def finetune(model: Path, lines: list[dict], output: Path, **changes) -> list[dict]:
    output.mkdir(exist_ok=True)
    file = output / "train.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    settings = {
        "model": model,
        "train_file": file,
        "output_dir": output,
        "max_steps": 40,
        "evaluate_every": 10,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    arguments = [f"--{name}={value}" for name, value in (settings | changes).items()]
    run_finetuning.main(*run_finetuning.parse_args(arguments))
    return json.loads((output / "metrics.json").read_text())


def completions() -> list[dict]:
    return [{"prompt": f"{word} says: ", "completion": word * 2} for word in ("ab", "cde", "f", "ghij")] * 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{}, {"lora_rank": 4, "merge": True}, {"lora_rank": 4, "lora_modules": "q_proj,up_proj"}]
)
def test_finetuning_on_completions(pretrained, tmp_path, changes):
    """From alpha_0 = 1 to another one; only completions are learned."""
    history = finetune(
        pretrained, completions(), tmp_path, alpha_0=0.5, held_out_file=tmp_path / "train.jsonl", **changes
    )
    nelbos = [row["held_out_nelbo"] for row in history if "held_out_nelbo" in row]
    assert len(nelbos) == 4
    assert nelbos[-1] < nelbos[0] - 0.02
    assert len(losses(history)) == 40
    is_adapter = "lora_rank" in changes and "merge" not in changes
    assert (tmp_path / "adapter_config.json").exists() == is_adapter
    if not is_adapter:
        model = AutoModel.from_pretrained(tmp_path)
        assert model.config.alpha_0 == 0.5
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        prompt = tokenizer("ab says: ", return_tensors="pt")
        assert model.generate(**prompt, max_new_tokens=4).shape[1] == prompt.input_ids.shape[1] + 4


def test_prompts_are_given_and_completions_are_learned(pretrained, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(pretrained)
    file = tmp_path / "data.jsonl"
    file.write_text('{"prompt": "abc", "completion": "de"}\n{"prompt": "' + "x " * 60 + '", "completion": "y"}\n')
    examples = run_finetuning.load_examples(str(file), tokenizer, length=20)
    assert len(examples) == 1  # the other one's prompt fills the context
    prompt, completion = (tokenizer(text)["input_ids"] for text in ("abc", "de"))
    completion = [*completion, tokenizer.eos_token_id]
    assert examples[0] == {"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion}

    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }};{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    turns = [("user", "hi"), ("assistant", "yes"), ("user", "so"), ("assistant", "no")]
    messages = [{"role": role, "content": content} for role, content in turns]
    input_ids, is_given = run_finetuning.encode_chat({"messages": messages}, tokenizer)
    assert tokenizer.decode(input_ids) == "[user]hi;[assistant]yes;[user]so;[assistant]no;"
    learned = tokenizer.decode([token for token, given in zip(input_ids, is_given, strict=True) if not given])
    assert learned == "yes;no;"


@pytest.mark.parametrize(
    ("lines", "changes", "message"),
    [
        ([{"text": "a"}], {}, "must have the fields `prompt` and `completion`"),
        ([{"messages": [{"role": "user", "content": "a"}]}], {}, "set `tokenizer.chat_template`"),
        (completions(), {"length": 2}, "has a completion within `length=2`"),
        (completions(), {"merge": True}, "set `lora_rank` too"),
        (completions(), {"load_in_4bit": True}, "set `lora_rank` to train adapters"),
        ([], {}, "is empty"),
        ([*completions(), {"prompt": "a"}], {}, r"Example 12 of .* lacks \['completion'\]"),
        ([*completions(), {"prompt": "a", "completion": "<|mask|>"}], {}, "Example 12 of .* holds the mask"),
    ],
)
def test_misfits_fail_before_tuning(pretrained, tmp_path, lines, changes, message):
    with pytest.raises(ValueError, match=message):
        finetune(pretrained, lines, tmp_path, **changes)


def test_adapters_are_not_tuned_again(pretrained, tmp_path):
    finetune(pretrained, completions(), tmp_path / "first", lora_rank=2, max_steps=1)
    with pytest.raises(ValueError, match="holds adapters"):
        finetune(tmp_path / "first", completions(), tmp_path / "second", lora_rank=2, max_steps=1)


def launch(arguments: list[str]) -> None:
    """Runs the pretraining script on two CPU processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    run = subprocess.run(
        [*command, str(EXAMPLES / "run_pretraining.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr[-3000:]


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
    launch(arguments)
    assert len([*(tmp_path / "two" / "checkpoint-6").glob("rng_state_*.pth")]) == 2, "of two processes"
    together = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert losses(together) == pytest.approx(losses(alone), rel=1e-4)
    held_out = [[row["held_out_nelbo"] for row in history if "held_out_nelbo" in row] for history in (alone, together)]
    assert held_out[1] == pytest.approx(held_out[0], rel=1e-4)
    for name in ("model.safetensors", "ema/model.safetensors"):
        one, two = load_file(tmp_path / "alone" / name), load_file(tmp_path / "two" / name)
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, atol=1e-5, rtol=1e-3)


@pytest.mark.slow
def test_finetuning_of_weights_in_4_bits(tmp_path):
    """QLoRA: bitsandbytes has kernels for the CPU."""
    tokenizer = train_tokenizer(["The number 5 is followed by the number 6. " * 20], 300, 32)
    tokens = {"vocab_size": len(tokenizer), "mask_token_id": tokenizer.mask_token_id, "eos_token_id": 0}
    sizes = {"hidden_size": 64, "intermediate_size": 128, "cond_dim": 64}  # multiples of 32, for its kernels
    randomized_model(**tokens, **sizes).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "train.jsonl").write_text('{"prompt": "The number", "completion": " 5."}\n' * 8)
    arguments = {"model": tmp_path / "model", "train_file": tmp_path / "train.jsonl", "output_dir": tmp_path / "tuned"}
    arguments |= {"max_steps": 8, "learning_rate": 1e-2, "use_cpu": True, "report_to": "none", "logging_steps": 1}
    arguments |= {"lora_rank": 4, "load_in_4bit": True, "disable_tqdm": True, "warmup_steps": 0}
    run_finetuning.main(*run_finetuning.parse_args([f"--{name}={value}" for name, value in arguments.items()]))
    history = losses(json.loads((tmp_path / "tuned" / "metrics.json").read_text()))
    assert history[-1] < history[0] - 1
    assert (tmp_path / "tuned" / "adapter_model.safetensors").exists()


@pytest.fixture
def causal_folder(tmp_path) -> Path:
    """A tiny Llama with a tokenizer that knows no mask and no padding."""
    trained = train_tokenizer(["The quick brown fox jumps over the lazy dog. " * 5], 300, 64)
    backend = Tokenizer.from_str(trained.backend_tokenizer.to_str().replace(trained.mask_token, "<|other|>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=trained.eos_token)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, bos_token_id=None, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "causal")
    tokenizer.save_pretrained(tmp_path / "causal")
    return tmp_path / "causal"


def adapt(model: Path, texts: Path, output: Path, **changes) -> None:
    settings = {"model": model, "dataset": texts, "text_column": "body", "output_dir": output, "length": 24}
    settings |= {"held_out_documents": 5, "held_out_rows": 4, "evaluate_every": 2, "max_steps": 4, "save_steps": 2}
    settings |= {"report_to": "none", "disable_tqdm": True, "use_cpu": True}
    arguments = [f"--{name}={value}" for name, value in (settings | changes).items()]
    adapt_causal_lm.main(*adapt_causal_lm.parse_args(arguments))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"anneal": 0, "alpha_0": 1.0}, {"lora_rank": 4}])
def test_a_causal_model_becomes_an_eso_lm(texts, causal_folder, tmp_path, changes):
    adapt(causal_folder, texts, tmp_path / "eso", **changes)
    model, tokenizer = AutoModel.from_pretrained(tmp_path / "eso"), AutoTokenizer.from_pretrained(tmp_path / "eso")
    assert model.config.backbone_config.model_type == "llama"
    assert model.config.alpha_0 == changes.get("alpha_0", 0.25)
    assert model.config.mask_token_id == tokenizer.mask_token_id == len(tokenizer) - 1
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    history = json.loads((tmp_path / "eso" / "metrics.json").read_text())
    assert [row["step"] for row in history if "held_out_nelbo" in row] == [2, 4]


def test_alpha_0_grows_with_the_steps():
    collator = DataCollatorForHybridMaskedDiffusion(mask_token_id=9, alpha_0=0.5)
    annealed = adapt_causal_lm.AnnealedCollator(collator, 0.5)
    rows = [{"input_ids": list(range(8))} for _ in range(8)]
    in_diffusion = []
    for step in (0, 1, 25, 50, 100):
        annealed.on_step_begin(None, TrainerState(global_step=step, max_steps=100), None)
        assert annealed.progress == min(1, step / 50)
        in_diffusion.append(int((~annealed(rows)["sequential_rows"]).sum()))
    assert in_diffusion == [0, 4, 4, 4, 4]
    assert adapt_causal_lm.AnnealedCollator(collator, 0).progress == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"anneal": 1.5}, "`anneal` must be a share"),
        ({"dataloader_num_workers": 1}, "set it to 0"),
        ({"alpha_0": -1}, "`alpha_0` must be"),
        ({"length": 10**6}, "too short for rows"),
    ],
)
def test_misfits_of_adaptation_are_refused(texts, causal_folder, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        adapt(causal_folder, texts, tmp_path / "eso", **changes)
    assert not (tmp_path / "eso" / "model.safetensors").exists()
