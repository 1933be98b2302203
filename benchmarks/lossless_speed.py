"""Lossless parallel decoding: tokens a forward, and time a token against one-token sampling and a Llama's `generate`.

python benchmarks/lossless_speed.py --model outputs/quickstart     # minutes on 2 cores

Systems take turns, text by text, and medians are reported. All lossless rows are samples of the same distribution as
those of one-token sampling in their order.
"""

import argparse
import json
import time
from itertools import product
from pathlib import Path
from statistics import mean, median

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from speed import hardware, synchronize
from tqdm import tqdm
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM, set_seed

import eso_lm


def similar_llama(model: eso_lm.EsoForMaskedDiffusion, length: int) -> LlamaForCausalLM:
    """A Llama of the same width and depth, whose gated MLP has as many weights; untrained: its speed is the point."""
    config = model.config
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size * 2 // 3,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            max_position_embeddings=length,
        )
    ).to(model.device, model.dtype)


def run(model: torch.nn.Module, length: int, **settings) -> tuple[float, object]:
    """Milliseconds a token of one text, and the output."""
    device = str(model.device)
    synchronize(device)
    start = time.perf_counter()
    output = model.generate(
        max_new_tokens=length, min_new_tokens=length, do_sample=True, eos_token_id=None, **settings
    )
    synchronize(device)
    return 1e3 * (time.perf_counter() - start) / length, output


def measure(model: eso_lm.EsoForMaskedDiffusion, length: int, args: argparse.Namespace) -> list[dict]:
    """All orders, values of alpha_0 and draft lengths for texts of one length."""
    llama = similar_llama(model, length).eval()
    start = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    rows = []
    for order, alpha_0 in product(args.orders, args.alphas):
        plan = {"alpha_0": alpha_0, "unmasking_order": order}
        # A strided order of one token a step is a uniform one.
        one_token = {"alpha_0": alpha_0, "unmasking_order": "strided", "num_diffusion_steps": length}
        times = {name: [] for name in ("Llama", "one token", *args.drafts)}
        outputs = {draft: [] for draft in args.drafts}
        for repeat in tqdm(range(args.repeats + 1), desc=f"L = {length}, {order}, alpha_0 = {alpha_0:g}"):
            set_seed(repeat)
            for name in times:
                if name == "Llama":
                    attention_mask = torch.ones_like(start)
                    spent, _ = run(llama, length, input_ids=start, attention_mask=attention_mask, top_k=0)
                elif name == "one token":
                    spent, _ = run(model, length, temperature=args.temperature, **one_token)
                else:
                    draft = name if name == "auto" else int(name)
                    settings = {"lossless": True, "draft_length": draft, "temperature": args.temperature}
                    spent, output = run(model, length, return_dict_in_generate=True, **settings, **plan)
                    if repeat > 0:
                        outputs[name].append(output)
                if repeat > 0:  # the first one warms up
                    times[name].append(spent)
        for draft in args.drafts:
            offered = sum(output.drafts_offered.item() for output in outputs[draft])
            accepted = sum(output.drafts_accepted.item() for output in outputs[draft])
            rows.append(
                {
                    "length": length,
                    "order": order,
                    "alpha_0": alpha_0,
                    "draft_length": draft,
                    "tokens_per_forward": length / mean(output.num_function_evaluations for output in outputs[draft]),
                    "accepted": accepted / max(offered, 1),
                    "ms_per_token": median(times[draft]),
                    "one_token_ms": median(times["one token"]),
                    "llama_ms": median(times["Llama"]),
                    "speedup": median(times["one token"]) / median(times[draft]),
                    "speedup_over_llama": median(times["Llama"]) / median(times[draft]),
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
        "| L | order | alpha_0 | drafts of | tokens a forward | drafts accepted | ms a token | against one token a "
        "forward | against Llama's `generate` |",
        "| --- " * 9 + "|",
    ]
    for row in results["rows"]:
        lines.append(
            f"| {row['length']} | {row['order']} | {row['alpha_0']:g} | {row['draft_length']} | "
            f"{row['tokens_per_forward']:.2f} | {row['accepted']:.0%} | {row['ms_per_token']:.2f} | "
            f"{row['speedup']:.1f}x | {row['speedup_over_llama']:.1f}x |"
        )
    return "\n".join(lines) + "\n"


def plot(rows: list[dict], path: Path) -> None:
    """Tokens a forward and speed against the draft length."""
    figure, panels = plt.subplots(1, 2, figsize=(9.5, 3.8))
    labels = {"tokens_per_forward": "tokens a forward", "speedup": "times as fast as one token a forward"}
    for panel, (name, label) in zip(panels, labels.items(), strict=True):
        for key in dict.fromkeys((row["length"], row["order"], row["alpha_0"]) for row in rows):
            curve = [
                row
                for row in rows
                if (row["length"], row["order"], row["alpha_0"]) == key and row["draft_length"] != "auto"
            ]
            title = f"L = {key[0]}, {key[1].replace('_', ' ')}, α₀ = {key[2]:g}"
            drafts = [int(row["draft_length"]) for row in curve]
            panel.plot(drafts, [row[name] for row in curve], marker="o", markersize=4, label=title)
        panel.set_xscale("log", base=2)
        panel.set_xlabel("tokens of a draft")
        panel.set_ylabel(label)
    panels[0].legend(frameon=False, fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(args: argparse.Namespace) -> None:
    model = AutoModel.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).to(args.device).eval()
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    settings |= {"hardware": hardware(args.device), "parameters": model.num_parameters()}
    rows = []
    for length in args.lengths or [model.config.max_position_embeddings]:
        rows += measure(model, length, args)
    results = {"settings": settings, "rows": rows}
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / f"{args.name}.json").write_text(json.dumps(results, indent=1) + "\n")
    (args.output / f"{args.name}.md").write_text(report(results))
    plot(rows, args.output / f"{args.name}.png")
    print(report(results))


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="outputs/quickstart", help="a trained Eso-LM")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="where JSON, Markdown, PNG go")
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
