"""Generate text with an Eso-LM: from a prompt, from a file of prompts, from nothing, or into holes.

model=outputs/quickstart
python examples/run_generation.py --model $model --num_samples 4
python examples/run_generation.py --model $model --prompt "Return the <mask:6> of the file." --live
python examples/run_generation.py --model $model --prompts prompts.txt --num_samples 8 --output samples.jsonl
torchrun --standalone --nproc_per_node 2 examples/run_generation.py --model $model --output samples.jsonl

In prompts, <mask:6> stands for a hole of six tokens, as does the tokenizer's own mask token for one. Each sample draws
from a stream of random numbers of its own, so it does not depend on the batch size or the number of processes (but for
the rounding of floating-point numbers).
"""

import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from shutil import get_terminal_size
from typing import TextIO

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from holes import fill_in_masks
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer, HfArgumentParser, PreTrainedTokenizerBase
from transformers.generation import BaseStreamer

from eso_lm import EsoForMaskedDiffusion, EsoGenerationConfig


@dataclass
class Arguments:
    """What to generate, and where it goes. The settings are those of `EsoGenerationConfig`; unset: the model's."""

    model: str = field(metadata={"help": "name or folder of the model"})
    prompt: str | None = field(default=None, metadata={"help": "one prompt"})
    prompts: Path | None = field(
        default=None, metadata={"help": "file of prompts: .jsonl with a field `prompt`, or a prompt a line"}
    )
    output: Path | None = field(default=None, metadata={"help": "JSONL file to write; unset: print the texts"})
    resume: bool = field(default=False, metadata={"help": "go on with the samples that `output` does not hold yet"})
    live: bool = field(default=False, metadata={"help": "show how each text fills up, in the terminal"})
    num_samples: int = field(default=1, metadata={"help": "samples of each prompt"})
    batch_size: int = field(default=16, metadata={"help": "samples a process generates at a time"})
    seed: int = 0
    dtype: str = field(default="auto", metadata={"help": "float32, bfloat16, ...; auto: as saved"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run the code that comes with the model"})

    max_new_tokens: int = field(default=64, metadata={"help": "tokens after each prompt; 0: fill holes only"})
    alpha_0: float | None = None
    num_diffusion_steps: int | None = None
    unmasking_order: str | None = None
    block_length: int | None = None
    confidence_threshold: float | None = None
    entropy_bound: float | None = None
    num_candidates: int | None = None
    lossless: bool | None = None
    draft_length: str | None = field(default=None, metadata={"help": "with `lossless`: a number, or auto"})
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    do_sample: bool | None = None

    def __post_init__(self):
        if self.prompt is not None and self.prompts is not None:
            raise ValueError("`--prompt` and `--prompts` exclude each other: give one of them, or neither.")
        for name in ("num_samples", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`--{name}` must be at least 1, got {getattr(self, name)}.")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"`--seed` must be in [0, {2**31 - 1}], got {self.seed}.")
        if self.output is not None and self.output.exists() and not self.resume:
            raise ValueError(f"`--output {self.output}` exists: name another file, or go on with it by `--resume`.")
        if self.resume and self.output is None:
            raise ValueError("`--resume` needs `--output`.")
        if self.draft_length is not None and self.draft_length.isdigit():
            self.draft_length = int(self.draft_length)

    def generation_settings(self) -> dict:
        """The settings for `generate` that have been given."""
        names = vars(EsoGenerationConfig()).keys() & vars(self).keys()
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


class LiveView(BaseStreamer):
    """Shows a text in the terminal while it fills up: masks as dots, drawn over again after every forward."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stream: TextIO | None = None):
        self.tokenizer, self.stream = tokenizer, stream or sys.stdout
        self.known: list[int] = []
        self.num_lines = 0

    def put(self, value: torch.LongTensor) -> None:
        self.known += value.flatten().tolist()
        self._draw([])

    def put_draft(self, value: torch.LongTensor, **kwargs) -> None:
        self._draw(value.flatten().tolist())

    def end(self) -> None:
        self.known, self.num_lines = [], 0
        self.stream.write("\n")

    def _draw(self, draft: list[int]) -> None:
        mask = self.tokenizer.mask_token
        text, rest = (self.tokenizer.decode(ids).replace(mask, " ·") for ids in (self.known, draft))
        # Up to where the last drawing began, and clear from there.
        columns = get_terminal_size().columns
        up = f"\033[{self.num_lines}F" if self.num_lines else "\r"
        self.stream.write(f"{up}\033[J{text}\033[33m{rest}\033[0m")
        self.stream.flush()
        # Long lines wrap, and each of their rows counts.
        lines = (text + rest).split("\n")
        self.num_lines = sum(max(1, math.ceil(len(line) / columns)) for line in lines) - 1


def read_prompts(args: Arguments) -> list[str]:
    """The prompts asked for; one empty prompt if there are none."""
    if args.prompts is None:
        return [args.prompt or ""]
    # Not splitlines, which also splits at characters that may stand inside a text.
    lines = args.prompts.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    if lines == [""]:
        raise ValueError(f"`--prompts {args.prompts}` holds no prompts.")
    if args.prompts.suffix != ".jsonl":
        return lines
    prompts = [json.loads(line).get("prompt") for line in lines if line.strip()]
    if not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"Every line of `--prompts {args.prompts}` must have a text in the field `prompt`.")
    return prompts


def count_records(path: Path, prompts: list[str]) -> int:
    """The number of records in a JSONL file, after dropping a last one that was not written to its end.

    Raises:
        ValueError: when they are not samples of the first `prompts`.
    """
    content = path.read_bytes()
    complete = content[: content.rfind(b"\n") + 1]
    records = [json.loads(line) for line in complete.split(b"\n")[:-1]]
    if [record.get("prompt") for record in records] != prompts[: len(records)]:
        raise ValueError(f"`--output {path}` holds samples of other prompts, or another number of them for each.")
    if complete != content:
        path.write_bytes(complete)
    return len(records)


def encode(prompts: list[str], tokenizer: PreTrainedTokenizerBase) -> tuple[torch.LongTensor, torch.LongTensor]:
    """Ids and attention mask, (batch, tokens) each, with padding on the left; holes hold masks."""
    rows = [tokenizer(fill_in_masks(prompt, tokenizer.mask_token))["input_ids"] for prompt in prompts]
    width = max(len(row) for row in rows)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    input_ids = torch.tensor([[padding] * (width - len(row)) + row for row in rows], dtype=torch.long)
    attention_mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], dtype=torch.long)
    return input_ids.view(len(rows), width), attention_mask.view(len(rows), width)


def generate(
    model: EsoForMaskedDiffusion,
    tokenizer: PreTrainedTokenizerBase,
    work: list[tuple[int, str]],
    args: Arguments,
) -> list[dict]:
    """Generates one sample for each (number, prompt) of `work`, as records for the output."""
    if not work:
        return []
    numbers, prompts = zip(*work, strict=True)
    input_ids, attention_mask = encode(list(prompts), tokenizer)
    output = model.generate(
        input_ids.to(model.device),
        attention_mask=attention_mask.to(model.device),
        generator=[torch.Generator().manual_seed((args.seed << 32) + number) for number in numbers],
        streamer=LiveView(tokenizer) if args.live else None,
        return_dict_in_generate=True,
        **args.generation_settings(),
    )
    texts = tokenizer.batch_decode(output.sequences, skip_special_tokens=True)
    return [
        {
            "sample": number,
            "prompt": prompt,
            "text": text,
            "log_prob": round(log_probs.sum().item(), 4),
            "num_function_evaluations": max(steps.tolist(), default=0),
        }
        for number, prompt, text, log_probs, steps in zip(
            numbers, prompts, texts, output.log_probs, output.unmasking_steps, strict=True
        )
    ]


def main(args: Arguments) -> None:
    state = PartialState(cpu=not torch.accelerator.is_available())
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=args.trust_remote_code)
    model = AutoModel.from_pretrained(args.model, dtype=args.dtype, trust_remote_code=args.trust_remote_code)
    model = model.to(state.device).eval()
    prompts = [prompt for prompt in read_prompts(args) for _ in range(args.num_samples)]
    work = list(enumerate(prompts))
    if args.resume and args.output.exists():
        with state.main_process_first():
            work = work[count_records(args.output, prompts) :]

    # Round by round: what has been generated is on disk before the next batch begins.
    batch_size = 1 if args.live else args.batch_size
    round_size = batch_size * state.num_processes
    rounds = range(0, len(work), round_size)
    for start in tqdm(rounds, desc="Batches", disable=args.live or not state.is_main_process):
        with state.split_between_processes(work[start : start + round_size]) as share:
            records = gather_object(generate(model, tokenizer, share, args))
        if state.is_main_process:
            write(sorted(records, key=lambda record: record["sample"]), args)
    state.wait_for_everyone()
    state.destroy_process_group()


def write(records: list[dict], args: Arguments) -> None:
    """Appends records to the output, or prints their texts."""
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        with args.output.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    elif not args.live:
        for record in records:
            print(f"--- {record['sample']} ({record['num_function_evaluations']} forwards) ---\n{record['text']}")


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
