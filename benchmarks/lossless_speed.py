"""Lossless parallel decoding: tokens a forward, and time a token against one-token sampling and a Llama's `generate`.

python benchmarks/lossless_speed.py --model outputs/quickstart     # minutes on 2 cores

Systems take turns, text by text, and medians are reported. All lossless rows are samples of the same distribution as
those of one-token sampling in their order.
"""

import argparse
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean, median

import torch
from fresh_models import similar_llama
from matplotlib.figure import Figure
from measuring import hardware, timed
from reporting import argument_parser, table, write_results
from tqdm import tqdm
from transformers import AutoModel, set_seed

import eso_lm


def measure(model: eso_lm.EsoForMaskedDiffusion, length: int, args: argparse.Namespace) -> list[dict]:
    """All orders, values of alpha_0 and draft lengths for texts of one length."""
    common = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": True, "eos_token_id": None}
    generate = partial(model.generate, **common, temperature=args.temperature)
    start = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    llama = similar_llama(model, length)
    of_llama = partial(llama.generate, start, attention_mask=torch.ones_like(start), top_k=0, **common)
    rows = []
    for order, alpha_0 in product(args.orders, args.alphas):
        # A strided order of one token a step is a uniform one.
        one_token = partial(generate, alpha_0=alpha_0, unmasking_order="strided", num_diffusion_steps=length)
        lossless = partial(
            generate, alpha_0=alpha_0, unmasking_order=order, lossless=True, return_dict_in_generate=True
        )
        systems = {"Llama": of_llama, "one token": one_token}
        for draft in args.drafts:
            systems[draft] = partial(lossless, draft_length=draft if draft == "auto" else int(draft))
        times, outputs = ({name: [] for name in systems} for _ in range(2))
        for repeat in tqdm(range(args.repeats + 1), desc=f"L = {length}, {order}, alpha_0 = {alpha_0:g}"):
            set_seed(repeat)
            for name, system in systems.items():
                spent, output = timed(system, args.device)
                if repeat > 0:  # the first one warms up
                    times[name].append(spent / length)
                    outputs[name].append(output)
        one_token_ms, llama_ms = median(times["one token"]), median(times["Llama"])
        for draft in args.drafts:
            offered = sum(output.drafts_offered.item() for output in outputs[draft])
            accepted = sum(output.drafts_accepted.item() for output in outputs[draft])
            draft_ms = median(times[draft])
            rows.append(
                {
                    "length": length,
                    "order": order,
                    "alpha_0": alpha_0,
                    "draft_length": draft,
                    "tokens_per_forward": length / mean(output.num_function_evaluations for output in outputs[draft]),
                    "accepted": accepted / max(offered, 1),
                    "ms_per_token": draft_ms,
                    "one_token_ms": one_token_ms,
                    "llama_ms": llama_ms,
                    "speedup": one_token_ms / draft_ms,
                    "speedup_over_llama": llama_ms / draft_ms,
                }
            )
    return rows


def report(results: dict) -> str:
    """The results as Markdown."""
    settings = results["settings"]
    lines = [
        f"{settings['hardware']}; {settings['parameters']:,} parameters, {settings['dtype']}, batch 1, "
        f"temperature {settings['temperature']}, {settings['repeats']} texts a row. `benchmarks/lossless_speed.py`",
        "",
        *table(
            "L | order | alpha_0 | drafts of | tokens a forward | drafts accepted | ms a token | against one token a "
            "forward | against Llama's `generate`",
            (
                f"{row['length']} | {row['order']} | {row['alpha_0']:g} | {row['draft_length']} | "
                f"{row['tokens_per_forward']:.2f} | {row['accepted']:.0%} | {row['ms_per_token']:.2f} | "
                f"{row['speedup']:.1f}x | {row['speedup_over_llama']:.1f}x"
                for row in results["rows"]
            ),
        ),
    ]
    return "\n".join(lines) + "\n"


def plot(rows: list[dict], path: Path) -> None:
    """Tokens a forward and speed against the draft length."""
    figure = Figure(figsize=(9.5, 3.8))
    panels = figure.subplots(1, 2)
    labels = {"tokens_per_forward": "tokens a forward", "speedup": "times as fast as one token a forward"}
    for panel, (name, label) in zip(panels, labels.items(), strict=True):
        for key in dict.fromkeys((row["length"], row["order"], row["alpha_0"]) for row in rows):
            alike = [row for row in rows if (row["length"], row["order"], row["alpha_0"]) == key]
            curve = [row for row in alike if row["draft_length"] != "auto"]
            title = f"L = {key[0]}, {key[1].replace('_', ' ')}, α₀ = {key[2]:g}"
            drafts = [int(row["draft_length"]) for row in curve]
            panel.plot(drafts, [row[name] for row in curve], marker="o", markersize=4, label=title)
        panel.set_xscale("log", base=2)
        panel.set_xlabel("tokens of a draft")
        panel.set_ylabel(label)
    panels[0].legend(frameon=False, fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main(args: argparse.Namespace) -> None:
    model = AutoModel.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).to(args.device).eval()
    settings = vars(args) | {"hardware": hardware(args.device), "parameters": model.num_parameters()}
    rows = []
    for length in args.lengths or [model.config.max_position_embeddings]:
        rows += measure(model, length, args)
    results = {"settings": settings, "rows": rows}
    write_results(args.output, args.name, results, report(results))
    plot(rows, args.output / f"{args.name}.png")


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(__doc__, output="where JSON, Markdown, PNG go")
    parser.add_argument("--model", default="outputs/quickstart", help="a trained Eso-LM")
    parser.add_argument("--name", default="lossless", help="name of these files")
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens of a text; by default the model's context")
    parser.add_argument("--orders", nargs="+", default=["strided", "random", "left_to_right"])
    parser.add_argument("--alphas", type=float, nargs="+", default=[1.0])
    parser.add_argument("--drafts", nargs="+", default=["2", "4", "8", "16", "32", "auto"], help="draft lengths")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=5, help="texts a row")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(parse_args())
