"""Fine-tune an Eso-LM on prompts and completions, or on chats: all of its weights, or LoRA adapters.

python examples/run_finetuning.py --model outputs/quickstart --train_file train.jsonl --output_dir outputs/tuned
python examples/run_finetuning.py --model outputs/quickstart --train_file train.jsonl --output_dir outputs/tuned \\
    --lora_rank 16 --merge true

A line of the file is {"prompt": ..., "completion": ...}, or {"messages": [{"role": ..., "content": ...}, ...]} for a
tokenizer with a chat template, in which every turn of the assistant is learned. Prompts stay clean and come first in
generation order; only completions are masked. All arguments of transformers' TrainingArguments work, and a run that
was killed goes on as in run_pretraining.py.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from adapters import AdapterArguments, lora_config
from datasets import Dataset
from resumable_runs import NoiseByEpoch, Report, checkpoint_to_go_on_from, train_or_go_on
from text_data import load_lines, with_special_tokens
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from eso_lm import DataCollatorForHybridMaskedDiffusion, HeldOutEvaluationCallback

IGNORED_LABEL = -100


@dataclass
class Arguments(AdapterArguments):
    """What to tune, and on what."""

    model: str = field(metadata={"help": "name or folder of the Eso-LM"})
    train_file: str = field(metadata={"help": "JSONL of prompts and completions, or of chats"})
    held_out_file: str | None = field(default=None, metadata={"help": "the same, for evaluation"})
    length: int | None = field(default=None, metadata={"help": "tokens of an example; unset: the model's context"})
    alpha_0: float | None = field(default=None, metadata={"help": "to tune at; unset: the model's own"})
    evaluate_every: int = field(default=200, metadata={"help": "optimiser steps between held-out evaluations"})

    load_in_4bit: bool = field(default=False, metadata={"help": "QLoRA: frozen weights in 4 bits (bitsandbytes)"})
    merge: bool = field(default=False, metadata={"help": "save the model with the adapters merged into it"})


@dataclass
class FinetuningArguments(TrainingArguments):
    """transformers' TrainingArguments with usual defaults for tuning."""

    learning_rate: float = 1e-4
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 20
    save_steps: float = 200
    save_total_limit: int | None = 3
    logging_steps: float = 20


def main(arguments: Arguments, training: FinetuningArguments) -> None:
    if arguments.merge and arguments.lora_rank is None:
        raise ValueError("`merge` is for adapters: set `lora_rank` too.")
    if arguments.load_in_4bit and arguments.lora_rank is None:
        raise ValueError("`load_in_4bit` freezes the weights: set `lora_rank` to train adapters.")
    if (Path(arguments.model) / "adapter_config.json").exists():
        raise ValueError(
            f"`model={arguments.model}` holds adapters: tune the model with them merged (`--merge true`)."
        )
    checkpoint = checkpoint_to_go_on_from(training, arguments)
    set_seed(training.seed)
    tokenizer = with_special_tokens(AutoTokenizer.from_pretrained(arguments.model))
    model = load_model(arguments)
    length = arguments.length or model.config.max_position_embeddings
    data, held_out = (
        None if name is None else load_examples(name, tokenizer, length)
        for name in (arguments.train_file, arguments.held_out_file)
    )
    collator = DataCollatorForHybridMaskedDiffusion(tokenizer, config=model.config)
    trainer = Trainer(model, training, data_collator=collator, train_dataset=data, processing_class=tokenizer)
    trainer.add_callback(NoiseByEpoch(collator, training.seed))
    if held_out is not None:
        trainer.add_callback(HeldOutEvaluationCallback(trainer, list(held_out), every=arguments.evaluate_every))
    trainer.add_callback(Report())
    train_or_go_on(trainer, checkpoint)
    if arguments.merge:
        trainer.model = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
    trainer.save_model()


def load_model(arguments: Arguments) -> PreTrainedModel:
    """The model to train: itself, or with adapters in it."""
    options: dict[str, Any] = {} if arguments.alpha_0 is None else {"alpha_0": arguments.alpha_0}
    if arguments.load_in_4bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    model = AutoModelForMaskedLM.from_pretrained(arguments.model, **options)
    if arguments.lora_rank is None:
        return model
    from peft import get_peft_model, prepare_model_for_kbit_training

    if arguments.load_in_4bit:
        model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    return get_peft_model(model, lora_config(arguments))


def load_examples(name: str, tokenizer: PreTrainedTokenizerBase, length: int) -> Dataset:
    """Reads a JSONL file into `input_ids` and `labels`, -100 at what is given.

    Raises:
        ValueError: for a file that is not there or of another form, and when no example has a completion in `length`.
    """
    data = load_lines(name, ("messages",), ("prompt", "completion"))
    is_chat = "messages" in data.column_names
    if is_chat and tokenizer.chat_template is None:
        raise ValueError(f"{name} holds chats, and the tokenizer has no chat template: set `tokenizer.chat_template`.")
    encode = encode_chat if is_chat else encode_completion

    def to_example(row: dict[str, Any], index: int) -> dict[str, list[int]]:
        input_ids, is_given = encode(row, tokenizer)
        if tokenizer.mask_token_id in input_ids:
            raise ValueError(f"Example {index} of {name} holds the mask {tokenizer.mask_token!r}: take it out.")
        input_ids, is_given = input_ids[:length], is_given[:length]
        labels = [IGNORED_LABEL if given else token for token, given in zip(input_ids, is_given, strict=True)]
        return {"input_ids": input_ids, "labels": labels}

    data = data.map(to_example, with_indices=True, remove_columns=data.column_names, desc="Tokenizing")
    kept = data.filter(lambda row: any(label != IGNORED_LABEL for label in row["labels"]))
    if len(kept) == 0:
        raise ValueError(f"No example of {name} has a completion within `length={length}` tokens.")
    if len(kept) < len(data):
        print(
            f"{name}: left out {len(data) - len(kept)} of {len(data)} examples, with nothing to learn in the context."
        )
    return kept


def encode_completion(row: dict[str, str], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    """Tokens of prompt, completion and end of text, and which of them are given."""
    prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
    completion = [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return prompt + completion, [True] * len(prompt) + [False] * len(completion)


def encode_chat(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    """Tokens of a chat, and which of them are given: all but the turns of the assistant.

    A token that holds the end of a generation prompt and the beginning of an answer, such as BPE makes of a space and
    the word after it, is learned: to give it would give the answer away.

    Raises:
        ValueError: for a tokenizer that does not say where in the text its tokens are, and for a chat template that
            does not write the same text when there is less of the chat.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"Chats need a fast tokenizer, which says where in the text each token is: {type(tokenizer).__name__} is "
            f"a slow one."
        )
    messages = row["messages"]
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        return [], []
    text = tokenizer.apply_chat_template(messages[: turns[-1] + 1], tokenize=False)
    answers = []
    for turn in turns:
        asked = tokenizer.apply_chat_template(messages[:turn], tokenize=False, add_generation_prompt=True)
        answered = tokenizer.apply_chat_template(messages[: turn + 1], tokenize=False)
        _require_beginning(answered, text, "writes a turn of the assistant differently once the chat goes on")
        _require_beginning(asked, answered, "writes what leads to an answer differently once the answer is there")
        answers.append((len(asked), len(answered)))

    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    is_given, last = [], 0
    for start, stop in encoded["offset_mapping"]:
        # Tokenizers that leave blanks out of their offsets leave nothing of a lone one but its end.
        begin = last if start == stop else start
        is_given.append(not any(begin < end and first < stop for first, end in answers))
        last = stop
    return encoded["input_ids"], is_given


def _require_beginning(part: str, whole: str, otherwise: str) -> None:
    if not whole.startswith(part):
        pairs = zip(part, whole, strict=False)
        same = next((index for index, (one, other) in enumerate(pairs) if one != other), len(whole))
        raise ValueError(
            f"The chat template {otherwise}: {whole[same : same + 40]!r} in place of {part[same : same + 40]!r}. Use "
            f"one that only adds to the text as the chat goes on."
        )


def parse_args(arguments: list[str] | None = None) -> tuple[Arguments, FinetuningArguments]:
    parser = HfArgumentParser((Arguments, FinetuningArguments), description=__doc__)
    return parser.parse_args_into_dataclasses(arguments)


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    main(*parse_args())
