"""Is a causal language model worth adapting, and how? A small Llama, trained left to right, becomes an Eso-LM.

python benchmarks/adaptation.py          # about half an hour on 2 cores

Trains the Llama on the text of the quickstart. Then, at equal steps on the same rows, trains an Eso-LM of the same
size from scratch, and adapts the Llama in several ways, all through examples/adapt_causal_lm.py. Runs share the cores,
one each, and go on where they were killed; those that are complete are not repeated.
"""

import argparse
import json
import sys
from itertools import product
from pathlib import Path

from fresh_models import add_sizes
from matplotlib.figure import Figure
from measuring import hardware
from parallel_runs import alone_in, parse_with_run, run_in_processes, settings_of
from reporting import argument_parser, table, write_results
from transformers import (
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    set_seed,
)

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import adapt_causal_lm
from text_data import hold_out_twentieth, load_documents, make_rows, python_documents, train_tokenizer, write_texts

WAYS = {  # arguments of adapt_causal_lm.py
    "from scratch": ["--anneal", "0"],
    "direct": ["--anneal", "0"],
    "annealed over 25%": ["--anneal", "0.25"],
    "annealed over 50%": ["--anneal", "0.5"],
    "annealed over 100%": ["--anneal", "1"],
    "LoRA of rank 16, direct": ["--anneal", "0", "--lora_rank", "16"],
}


def prepare(args: argparse.Namespace) -> None:
    """Writes the texts, held-out ones first, and a Llama with fresh weights."""
    set_seed(args.seed)
    held_out, rest = hold_out_twentieth(python_documents(every=args.every))
    args.work.mkdir(parents=True, exist_ok=True)
    write_texts(args.work / "texts.jsonl", held_out + rest)
    tokenizer = train_tokenizer(rest, args.vocab_size, args.length)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        intermediate_size=args.hidden_size * 8 // 3,
        num_hidden_layers=args.num_layers,
        num_attention_heads=args.num_heads,
        num_key_value_heads=args.num_heads // 2,
        max_position_embeddings=args.length,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(args.work / "fresh")
    tokenizer.save_pretrained(args.work / "fresh")


def training_options(folder: Path, steps: int, args: argparse.Namespace) -> list[str]:
    """What all runs have in common, as arguments of adapt_causal_lm.py."""
    options = {
        "dataset": args.work / "texts.jsonl",
        "length": args.length,
        "held_out_documents": count_held_out(args),
        "held_out_rows": args.held_out_rows,
        "evaluate_every": args.evaluate_every,
        "output_dir": folder,
        "max_steps": steps,
        "per_device_train_batch_size": args.batch_size,
        "learning_rate": args.learning_rate,
        "warmup_steps": min(50, steps // 10),
        "save_steps": max(steps // 4, 1),
        "logging_steps": max(steps // 40, 1),
        "report_to": "none",
        "seed": args.seed,
        "disable_tqdm": True,
    }
    return [f"--{name}={value}" for name, value in options.items()]


def count_held_out(args: argparse.Namespace) -> int:
    """A twentieth of the texts, rounded up: the first ones of the file."""
    with (args.work / "texts.jsonl").open(encoding="utf-8") as file:
        return -(-sum(1 for _ in file) // 20)


def train_causal(args: argparse.Namespace) -> None:
    """The Llama, left to right, with transformers' own collator."""
    folder = args.work / "causal"
    options = training_options(folder, args.causal_steps, args)
    arguments, training = adapt_causal_lm.parse_args(["--model=-", *options])
    set_seed(args.seed)
    model = LlamaForCausalLM.from_pretrained(args.work / "fresh")
    tokenizer = AutoTokenizer.from_pretrained(args.work / "fresh")
    _, rows = make_rows(*load_documents(arguments), tokenizer, arguments)
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = Trainer(model, training, data_collator=collator, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    (folder / "metrics.json").write_text(json.dumps(trainer.state.log_history))


def run(name: str, args: argparse.Namespace) -> None:
    """One of the runs, in this process: "causal", or a way and its target, "direct:0.25"."""
    if name == "causal":
        return train_causal(args)
    way, alpha_0 = name.split(":")
    source = args.work / ("fresh" if way == "from scratch" else "causal")
    options = training_options(folder_of(name, args), args.steps, args)
    adapt_causal_lm.main(
        *adapt_causal_lm.parse_args([f"--model={source}", f"--alpha_0={alpha_0}", *WAYS[way], *options])
    )


def folder_of(name: str, args: argparse.Namespace) -> Path:
    """Where the model of a run goes."""
    return args.work / "".join(character if character.isalnum() or character == "." else "_" for character in name)


def collect(args: argparse.Namespace) -> list[dict]:
    """The held-out NELBO of every run, by step."""
    rows = []
    for alpha_0, way in product(args.alphas, WAYS):
        history = json.loads((folder_of(f"{way}:{alpha_0:g}", args) / "metrics.json").read_text())
        curve = {row["step"]: row["held_out_nelbo"] for row in history if "held_out_nelbo" in row}
        rows.append({"alpha_0": alpha_0, "way": way, "nelbo": curve, "final": list(curve.values())[-1]})
    return rows


def report(results: dict) -> str:
    """The results as Markdown."""
    settings, rows = results["settings"], results["rows"]
    alphas = list(dict.fromkeys(row["alpha_0"] for row in rows))
    final = {(row["way"], row["alpha_0"]): f"{row['final']:.3f}" for row in rows}
    lines = [
        f"{settings['hardware']}; {settings['parameters']:,} parameters, {settings['causal_steps']} steps left to "
        f"right, then {settings['steps']} steps of {settings['batch_size']} x {settings['length']} tokens. "
        f"`benchmarks/adaptation.py`",
        "",
        *table(
            "held-out NELBO, nats per token | " + " | ".join(f"alpha_0 = {alpha_0:g}" for alpha_0 in alphas),
            (f"{way} | " + " | ".join(final[way, alpha_0] for alpha_0 in alphas) for way in WAYS),
        ),
    ]
    return "\n".join(lines) + "\n"


def plot(rows: list[dict], path: Path) -> None:
    """NELBO against the step, a panel for each alpha_0."""
    alphas = list(dict.fromkeys(row["alpha_0"] for row in rows))
    figure = Figure(figsize=(4.8 * len(alphas), 3.8))
    panels = figure.subplots(1, len(alphas), squeeze=False)
    for alpha_0, panel in zip(alphas, panels[0], strict=True):
        for row in rows:
            if row["alpha_0"] == alpha_0:
                panel.plot(row["nelbo"].keys(), row["nelbo"].values(), marker="o", markersize=3, label=row["way"])
        panel.set_title(f"α₀ = {alpha_0:g}", fontsize=10)
        panel.set_xlabel("optimiser steps")
    panels[0][0].set_ylabel("held-out NELBO, nats per token")
    panels[0][0].legend(frameon=False, fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main(args: argparse.Namespace) -> None:
    if args.run is not None:
        return run(args.run, args)
    with alone_in(args.work / "logs"):
        if not (args.work / "fresh" / "tokenizer.json").exists():  # the last that is written
            prepare(args)
        ways = [f"{way}:{alpha_0:g}" for alpha_0, way in product(args.alphas, WAYS)]
        for names in (["causal"], ways):
            run_in_processes(
                [__file__, *args.command],
                names,
                lambda name: (folder_of(name, args) / "model.safetensors").exists(),
                args.work / "logs",
                args.processes,
            )
    parameters = LlamaForCausalLM.from_pretrained(args.work / "fresh").num_parameters()
    settings = settings_of(args) | {"hardware": hardware("cpu"), "parameters": parameters}
    results = {"settings": settings, "rows": collect(args)}
    write_results(args.output, "adaptation", results, report(results))
    plot(results["rows"], args.output / "adaptation.png")


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(__doc__, output="where JSON, Markdown, PNG go")
    parser.add_argument("--work", type=Path, default=Path("outputs/adaptation"), help="where the models go")
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.25, 1.0], help="targets")
    parser.add_argument("--causal-steps", type=int, default=1400)
    parser.add_argument("--steps", type=int, default=400, help="of adaptation, and of training from scratch")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    add_sizes(parser, hidden_size=192, num_layers=4, num_heads=4, vocab_size=2048)
    parser.add_argument("--held-out-rows", type=int, default=128)
    parser.add_argument("--evaluate-every", type=int, default=50)
    parser.add_argument("--every", type=int, default=1, help="read one file of so many")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time")
    parser.add_argument("--seed", type=int, default=0)
    return parse_with_run(parser, arguments)


if __name__ == "__main__":
    main(parse_args())
