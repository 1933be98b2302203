"""Lossless parallel decoding: tokens a forward, and time a token against one-token sampling and a Llama's `generate`.

python benchmarks/lossless_speed.py --model outputs/quickstart_draft --drafts auto --batches 1 4 16 \\
    --alphas 0 0.25 0.5 1 --orders strided random

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


def measure(
    model: eso_lm.EsoForMaskedDiffusion, length: int, batch: int, order: str, alpha_0: float, args: argparse.Namespace
) -> list[dict]:
    """All draft lengths, with the draft head and without, for texts of one length, order, alpha_0 and batch."""
    common = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": True, "eos_token_id": None}
    generate = partial(
        model.generate,
        **common,
        num_return_sequences=batch,
        alpha_0=alpha_0,
        unmasking_order=order,
        temperature=args.temperature,
        return_dict_in_generate=True,
    )
    start = torch.zeros(batch, 1, dtype=torch.long, device=model.device)
    llama = similar_llama(model, length)
    of_llama = partial(llama.generate, start, attention_mask=torch.ones_like(start), top_k=0, **common)
    systems = {"Llama": of_llama, "one token": partial(generate, num_diffusion_steps="max")}
    if batch == 1:  # transformers speculates for one row
        systems["Llama, prompt lookup"] = partial(of_llama, prompt_lookup_num_tokens=args.prompt_lookup)
    lossless = {}
    for draft, has_head in product(args.drafts, [False] if model.draft_head is None else [False, True]):
        draft_length = draft if draft == "auto" else int(draft)
        lossless[draft, has_head] = partial(
            generate, lossless=True, draft_length=draft_length, use_draft_head=has_head
        )
    systems |= lossless
    times, outputs = ({name: [] for name in systems} for _ in range(2))
    title = f"L = {length}, batch {batch}, {order}, alpha_0 = {alpha_0:g}"
    for repeat in tqdm(range(args.repeats + 1), desc=title):
        set_seed(repeat)
        for name, system in systems.items():
            spent, output = timed(system, args.device)
            if repeat > 0:  # the first one warms up
                times[name].append(spent / length)
                outputs[name].append(output)
    rows = []
    for name in lossless:
        found = outputs[name]
        offered = sum(int(output.drafts_offered.sum()) for output in found)
        accepted = sum(int(output.drafts_accepted.sum()) for output in found)
        ms = median(times[name])
        rows.append(
            {
                "length": length,
                "batch": batch,
                "order": order,
                "alpha_0": alpha_0,
                "draft_length": name[0],
                "draft_head": name[1],
                "tokens_per_forward": length / mean(output.forwards_per_row.float().mean().item() for output in found),
                "accepted": accepted / max(offered, 1),
                "ms_per_token": ms,
                "speedup": median(one / own for one, own in zip(times["one token"], times[name], strict=True)),
                "speedup_over_llama": median(times["Llama"]) / ms,
                "speedup_over_prompt_lookup": median(times["Llama, prompt lookup"]) / ms if batch == 1 else None,
            }
        )
    return rows


def report(results: dict) -> str:
    """The results as Markdown."""
    settings = results["settings"]
    lines = [
        f"{settings['hardware']}; {settings['parameters']:,} parameters, {settings['dtype']}, temperature "
        f"{settings['temperature']}, {settings['repeats']} calls a row; ms for a token of each row of the batch. "
        f"`benchmarks/lossless_speed.py`",
        "",
        *table(
            "L | batch | order | alpha_0 | drafts of | draft head | tokens a forward | drafts accepted | ms | against "
            "one token a forward | against Llama's `generate` | against the same with prompt lookup",
            (
                f"{row['length']} | {row['batch']} | {row['order']} | {row['alpha_0']:g} | {row['draft_length']} | "
                f"{'yes' if row['draft_head'] else 'no'} | {row['tokens_per_forward']:.2f} | {row['accepted']:.0%} | "
                f"{row['ms_per_token']:.2f} | {row['speedup']:.2f}x | {row['speedup_over_llama']:.2f}x | "
                + ("" if row["speedup_over_prompt_lookup"] is None else f"{row['speedup_over_prompt_lookup']:.2f}x")
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
        names = ("batch", "order", "alpha_0", "draft_head")
        for key in dict.fromkeys(tuple(row[name] for name in names) for row in rows):
            alike = [row for row in rows if tuple(row[name] for name in names) == key]
            curve = [row for row in alike if row["draft_length"] != "auto"]
            batch, order, alpha_0, has_head = key
            title = f"batch {batch}, {order.replace('_', ' ')}, α₀ = {alpha_0:g}{', draft head' * has_head}"
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
    plans = [(order, alpha_0) for order, alpha_0 in product(args.orders, args.alphas)]
    if 0.0 in args.alphas:  # there every order is from left to right
        plans = [plan for plan in plans if plan[1] > 0] + [("left_to_right", 0.0)]
    for length in args.lengths or [model.config.max_position_embeddings]:
        for batch, (order, alpha_0) in product(args.batches, plans):
            rows += measure(model, length, batch, order, alpha_0, args)
    results = {"settings": settings, "rows": rows}
    write_results(args.output, args.name, results, report(results))
    if args.drafts != ["auto"]:
        plot(rows, args.output / f"{args.name}.png")


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(__doc__, output="where JSON, Markdown, PNG go")
    parser.add_argument("--model", default="outputs/quickstart", help="a trained Eso-LM")
    parser.add_argument("--name", default="lossless", help="name of these files")
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens of a text; by default the model's context")
    parser.add_argument("--batches", type=int, nargs="+", default=[1], help="texts at a time")
    parser.add_argument("--orders", nargs="+", default=["strided", "random", "left_to_right"])
    parser.add_argument("--alphas", type=float, nargs="+", default=[1.0])
    parser.add_argument("--drafts", nargs="+", default=["2", "4", "8", "16", "32", "auto"], help="draft lengths")
    parser.add_argument("--prompt-lookup", type=int, default=4, help="tokens that a Llama speculates at a time")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=5, help="texts a row")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(parse_args())
