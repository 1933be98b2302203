"""examples/run_finetuning.py: what is learned of completions and chats, and what is refused."""

import json
from pathlib import Path

import pytest
import run_finetuning
from recipe_runs import losses, options, pretrain
from text_data import train_tokenizer
from tiny_models import save_with_tokenizer
from tokenizers import processors
from transformers import AutoModel, AutoTokenizer, ByT5Tokenizer


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
    run_finetuning.main(*run_finetuning.parse_args(options(settings | changes)))
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


def chat(*turns: str) -> dict[str, list[dict[str, str]]]:
    """Turns of user and assistant, one after the other."""
    roles = ("user", "assistant") * len(turns)
    return {"messages": [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)]}


@pytest.mark.parametrize("trims_offsets", [False, True])
def test_a_token_of_prompt_and_answer_is_learned(trims_offsets):
    """BPE makes one token of the space that ends a generation prompt and the first word of the answer."""
    tokenizer = train_tokenizer(["user: hi;so;assistant: yes no two;" * 20], 400, 64)
    post_processor = processors.ByteLevel(trim_offsets=trims_offsets, add_prefix_space=False)
    tokenizer.backend_tokenizer.post_processor = post_processor
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }};{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    row = chat("hi", "yes  no", "so", "7 two")
    input_ids, is_given = run_finetuning.encode_chat(row, tokenizer)
    assert input_ids == tokenizer(tokenizer.apply_chat_template(row["messages"], tokenize=False))["input_ids"]
    pieces = {True: [], False: []}
    for token, given in zip(input_ids, is_given, strict=True):
        pieces[given].append(tokenizer.decode([token]))
    assert pieces[False] == [" yes", " ", " no", ";", "7", " two", ";"], "nothing joins a space and a 7"
    assert "".join(pieces[True]) == "user: hi;assistant:user: so;assistant: "


def test_a_token_of_an_answer_and_the_next_turn_is_learned():
    tokenizer = train_tokenizer(["];[user]" * 20], 300, 64)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }};{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    input_ids, is_given = run_finetuning.encode_chat(chat("hi", "ok", "so", "no"), tokenizer)
    learned = tokenizer.decode([token for token, given in zip(input_ids, is_given, strict=True) if not given])
    assert learned == "ok;[no;"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] if loop.last else m['content'][:2] }};"
            "{% endfor %}{% if add_generation_prompt %}a:{% endif %}",
            "writes a turn of the assistant differently once the chat goes on: ';u:so;a:no;' in place of 's;'",
        ),
        (
            "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }};{% endfor %}"
            "{% if add_generation_prompt %}a:<think>{% endif %}",
            "writes what leads to an answer differently once the answer is there: 'yes;' in place of '<think>'",
        ),
    ],
)
def test_templates_that_change_what_they_wrote_are_refused(template, message):
    tokenizer = train_tokenizer(["some text"], 270, 64)
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=message):
        run_finetuning.encode_chat(chat("hi", "yes", "so", "no"), tokenizer)


def test_chats_need_a_tokenizer_that_knows_places():
    with pytest.raises(ValueError, match=r"Chats need a fast tokenizer.*: ByT5Tokenizer is a slow one"):
        run_finetuning.encode_chat(chat("hi", "yes"), ByT5Tokenizer())


@pytest.mark.parametrize(
    ("lines", "changes", "message"),
    [
        ([{"text": "a"}], {}, "must have the fields `messages`, or `prompt` and `completion`"),
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


@pytest.mark.slow
def test_finetuning_of_weights_in_4_bits(tmp_path):
    """QLoRA: bitsandbytes has kernels for the CPU."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "cond_dim": 64}  # multiples of 32, for its kernels
    save_with_tokenizer(tmp_path / "model", ["The number 5 is followed by the number 6. " * 20], **sizes)
    (tmp_path / "train.jsonl").write_text('{"prompt": "The number", "completion": " 5."}\n' * 8)
    arguments = {"model": tmp_path / "model", "train_file": tmp_path / "train.jsonl", "output_dir": tmp_path / "tuned"}
    arguments |= {"max_steps": 8, "learning_rate": 1e-2, "use_cpu": True, "report_to": "none", "logging_steps": 1}
    arguments |= {"lora_rank": 4, "load_in_4bit": True, "disable_tqdm": True, "warmup_steps": 0}
    run_finetuning.main(*run_finetuning.parse_args(options(arguments)))
    history = losses(json.loads((tmp_path / "tuned" / "metrics.json").read_text()))
    assert history[-1] < history[0] - 1
    assert (tmp_path / "tuned" / "adapter_model.safetensors").exists()
