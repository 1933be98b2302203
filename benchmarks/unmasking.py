"""Fixed against adaptive unmasking: the number of forwards against the quality of what they write.

Samples from one model at several settings of each way to unmask and scores the samples by

- the model's own exact log-likelihood given uniform orders (negative, nats per token: lower is more likely text),
- the fraction of 4-grams that occur before in the same sample (degenerate text repeats itself),
- the entropy of the tokens of all samples (degenerate text has few different ones).

python benchmarks/unmasking.py --model outputs/quickstart     # a few minutes on 2 cores
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from reporting import argument_parser, write_results
from tqdm import tqdm
from transformers import AutoModel, set_seed

import eso_lm

STEPS = [{"num_diffusion_steps": steps} for steps in (4, 8, 16, 32, 64, 128)]
BOUNDS = [{"entropy_bound": bound} for bound in (2.0, 4.0, 8.0, 16.0, 32.0, 64.0)]
STRIDED = {"unmasking_order": "strided"}
FAMILIES = {
    "fixed, random": STEPS,
    "fixed, strided": [setting | STRIDED for setting in STEPS],
    "confidence": [{"confidence_threshold": threshold} for threshold in (0.03, 0.04, 0.05, 0.07, 0.1, 0.2)],
    "entropy bound": BOUNDS,
    "entropy bound, strided": [setting | STRIDED for setting in BOUNDS],
}


def score(model: eso_lm.EsoForMaskedDiffusion, sequences: torch.LongTensor, num_orders: int) -> dict[str, float]:
    """The quality of samples, (batch, tokens): see the top of this file."""
    batch, length = sequences.shape
    scores = model.log_likelihood(sequences, num_orders=num_orders, alpha_0=1.0)
    repeated = 0
    for row in sequences.tolist():
        ngrams = list(zip(*(row[start:] for start in range(4)), strict=False))
        repeated += 1 - len(set(ngrams)) / len(ngrams)
    frequencies = sequences.flatten().bincount().double() / sequences.numel()
    frequencies = frequencies[frequencies > 0]
    return {
        "nll": -scores.log_likelihood_per_order.mean().item() / length,
        "repetition": repeated / batch,
        "entropy": float(-(frequencies * frequencies.log()).sum()),
    }


def main(args: argparse.Namespace) -> None:
    model = AutoModel.from_pretrained(args.model).eval()
    results = []
    pairs = [(family, setting) for family, settings in FAMILIES.items() for setting in settings]
    for family, setting in tqdm(pairs, desc="Settings"):
        set_seed(args.seed)
        forwards, samples = 0, []
        for _ in range(args.num_samples):
            # One at a time: adaptive unmasking finds a number of forwards for each sample.
            output = model.generate(
                max_new_tokens=args.length,
                alpha_0=1.0,
                temperature=args.temperature,
                eos_token_id=None,
                return_dict_in_generate=True,
                **setting,
            )
            forwards += output.num_function_evaluations
            samples.append(output.sequences)
        scores = score(model, torch.cat(samples), args.num_orders)
        results.append({"family": family, **setting, "nfe": forwards / args.num_samples, **scores})

    settings = {name: str(value) for name, value in vars(args).items()}
    write_results(args.output, "unmasking", {"settings": settings, "results": results})
    plot(results, args.length, args.output / "unmasking.png")
    for row in results:
        print("  ".join(f"{value:8.3f}" if isinstance(value, float) else str(value) for value in row.values()))


def plot(results: list[dict], length: int, path: Path) -> None:
    """Each number of `score` against the number of forwards, a line for each family."""
    labels = {
        "nll": "own negative log-likelihood (nats per token)",
        "repetition": "repeated 4-grams",
        "entropy": "entropy of the tokens (nats)",
    }
    figure = Figure(figsize=(4.4 * len(labels), 3.8))
    panels = figure.subplots(1, len(labels))
    for panel, (name, label) in zip(panels, labels.items(), strict=True):
        for family in FAMILIES:
            rows = sorted((row for row in results if row["family"] == family), key=lambda row: row["nfe"])
            forwards, values = [row["nfe"] for row in rows], [row[name] for row in rows]
            panel.plot(forwards, values, marker="o", markersize=4, label=family)
        panel.set_xscale("log", base=2)
        panel.set_xlabel(f"NFE for {length} tokens")
        panel.set_title(label, fontsize=10)
    panels[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(__doc__, output="where JSON and PNG go")
    parser.add_argument("--model", type=Path, default=Path("outputs/quickstart"), help="a folder of save_pretrained")
    parser.add_argument("--length", type=int, default=128, help="tokens a sample")
    parser.add_argument("--num-samples", type=int, default=48)
    parser.add_argument("--num-orders", type=int, default=4, help="orders that the likelihood is averaged over")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(parse_args())
