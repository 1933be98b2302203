"""What independence costs: samples of one `generate` call with a plan for each row, against rows in lockstep.

python benchmarks/independent_rows.py
python benchmarks/independent_rows.py --hidden-size 64 --num-layers 2 --num-heads 2 --vocab-size 512 --repeats 1

Both run in turn. Reported are the medians of both and of the ratio of each pair, with its quartiles. (At one token a
forward both do the same.)
"""

import argparse
import json
from functools import partial
from itertools import product
from statistics import median

import torch
from fresh_models import add_sizes, fresh_eso_lm
from measuring import interleaved, summary
from reporting import argument_parser, table, write_results

from eso_lm import EsoForMaskedDiffusion


def measure(model: EsoForMaskedDiffusion, args: argparse.Namespace) -> list[dict]:
    """Milliseconds of `generate` for each number of rows and of steps."""
    rows = []
    for batch, steps in product(args.batches, args.steps):
        generate = partial(
            model.generate,
            num_return_sequences=batch,
            max_new_tokens=args.length,
            num_diffusion_steps=steps,
            unmasking_order="random",
            alpha_0=1.0,
            eos_token_id=None,
        )
        functions = {"lockstep": partial(generate, lockstep=True), "independent": generate}
        times = interleaved(functions, args.repeats, args.device)
        pairs = zip(times["independent"], times["lockstep"], strict=True)
        row = {"batch": batch, "steps": steps, "length": args.length}
        row |= {name: median(values) for name, values in times.items()}
        rows.append(row | {"ratio": summary([independent / lockstep for independent, lockstep in pairs])})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main(args: argparse.Namespace) -> None:
    model = fresh_eso_lm(args)
    rows = measure(model, args)
    print(f"{model.num_parameters():,} parameters, {args.length} tokens, float32, {args.device}")
    lines = (
        f"{row['batch']} | {row['steps']} | {row['lockstep'] / 1e3:.2f} | {row['independent'] / 1e3:.2f} | "
        f"{row['ratio']['median']:.2f} ({row['ratio']['low']:.2f} to {row['ratio']['high']:.2f})"
        for row in rows
    )
    print("\n".join(table("rows | steps | lockstep (s) | independent (s) | ratio (quartiles)", lines)))
    settings = {name: str(value) for name, value in vars(args).items()} | {"torch": torch.__version__}
    write_results(args.output, "independent_rows", {"settings": settings, "results": rows})


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(__doc__, output="where the JSON goes")
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, nargs="+", default=[32])
    add_sizes(parser, num_layers=6)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(parse_args())
