"""What independence costs: samples of one `generate` call with a plan for each row, against rows in lockstep.

python benchmarks/independent_rows.py
python benchmarks/independent_rows.py --hidden-size 64 --num-layers 2 --num-heads 2 --vocab-size 512 --repeats 1

Both run in turn. Reported are the medians of both and of the ratio of each pair, with its quartiles.
"""

import argparse
import json
from pathlib import Path

import torch
from speed import interleaved, summary

from eso_lm import EsoConfig, EsoForMaskedDiffusion


def measure(model: EsoForMaskedDiffusion, args: argparse.Namespace) -> list[dict]:
    """Milliseconds of `generate` for each number of rows and of steps ("max": one token a forward)."""
    rows = []
    for batch in args.batches:
        for steps in (args.steps, "max"):
            settings = {
                "num_return_sequences": batch,
                "max_new_tokens": args.length,
                "num_diffusion_steps": steps,
                "alpha_0": 1.0,
                "eos_token_id": None,
            }
            pairs = []
            for _ in range(args.repeats):
                pair = interleaved(
                    {
                        "lockstep": lambda settings=settings: model.generate(**settings, lockstep=True),
                        "independent": lambda settings=settings: model.generate(**settings),
                    },
                    1,
                    args.device,
                )
                pairs.append({name: times["median"] for name, times in pair.items()})
            row = {"batch": batch, "steps": steps, "length": args.length}
            row |= {name: summary([pair[name] for pair in pairs])["median"] for name in pairs[0]}
            rows.append(row | {"ratio": summary([pair["independent"] / pair["lockstep"] for pair in pairs])})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    config = EsoConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        num_hidden_layers=args.num_layers,
        num_attention_heads=args.num_heads,
    )
    model = EsoForMaskedDiffusion(config).to(args.device).eval()
    rows = measure(model, args)
    print(f"{model.num_parameters():,} parameters, {args.length} tokens, float32, {args.device}")
    print("| rows | steps | lockstep (s) | independent (s) | ratio (quartiles) |")
    print("| --- | --- | --- | --- | --- |")
    for row in rows:
        ratio = row["ratio"]
        print(
            f"| {row['batch']} | {row['steps']} | {row['lockstep'] / 1e3:.2f} | {row['independent'] / 1e3:.2f} | "
            f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f}) |"
        )
    args.output.mkdir(parents=True, exist_ok=True)
    settings = {name: str(value) for name, value in vars(args).items()} | {"torch": torch.__version__}
    record = {"settings": settings, "results": rows}
    (args.output / "independent_rows.json").write_text(json.dumps(record, indent=1) + "\n")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="where the JSON goes")
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--hidden-size", type=int, default=768)
    parser.add_argument("--num-layers", type=int, default=6)
    parser.add_argument("--num-heads", type=int, default=12)
    parser.add_argument("--vocab-size", type=int, default=50258)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
