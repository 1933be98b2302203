"""Where the time of a decoding step goes on the CPU: products, attention, norms, drawing, the rest of torch, Python.

python benchmarks/step_split.py          # half a minute on 2 cores

Operators are timed by torch's profiler, and the step without it: what is left is Python and the way to the operators.
"""

import argparse
from functools import partial
from itertools import product
from statistics import median

import torch
from baselines import filled_cache
from fresh_models import add_sizes, fresh_eso_lm
from measuring import hardware, repeated, warm_up
from reporting import argument_parser, table, write_results
from speed import eso_step
from torch.profiler import ProfilerActivity, profile

GROUPS = {
    "products": ("_linear_pointwise", "linear", "addmm", "aten::mm"),
    "attention": ("attention", "aten::bmm", "embedding_bag"),
    "norms": ("layer_norm", "rms_norm"),
    "drawing": ("cumsum", "searchsorted", "aten::rand", "aten::uniform_"),
}
"""Parts of the names of operators; softmax belongs to attention, where nearly all of it is spent."""


def group_of(operator: str) -> str:
    name = "attention" if "softmax" in operator else operator
    return next((group for group, parts in GROUPS.items() if any(part in name for part in parts)), "other operators")


@torch.no_grad()
def split(args: argparse.Namespace, dtype: str) -> list[dict]:
    """Milliseconds of each group, for every batch and context."""
    model, rows = fresh_eso_lm(args, dtype), []
    with model.ready_to_decode():
        for batch, context in product(args.batches, args.contexts):
            cache = filled_cache(model, batch, context + 2, context)
            step = partial(eso_step, model, cache, context, batch)
            warm_up(step)
            total = median(repeated(step, args.repeats, "cpu"))
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                for _ in range(args.repeats):
                    step()
            spent = dict.fromkeys([*GROUPS, "other operators"], 0.0)
            for event in profiler.key_averages():
                spent[group_of(event.key)] += event.self_cpu_time_total / 1e3 / args.repeats
            spent["Python and the rest"] = total - sum(spent.values())
            rows.append({"dtype": dtype, "batch": batch, "context": context, "step": total, **spent})
    return rows


def main(args: argparse.Namespace) -> None:
    rows = [row for dtype in args.dtypes for row in split(args, dtype)]
    header = " | ".join(name if name in ("dtype", "batch", "context") else f"{name} (ms)" for name in rows[0])
    cells = (
        " | ".join(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values())
        for row in rows
    )
    settings = {name: value for name, value in vars(args).items() if name != "output"}
    settings |= {"hardware": hardware("cpu"), "torch": torch.__version__}
    report = "\n".join(
        [f"{settings['hardware']}; torch {torch.__version__}. `benchmarks/step_split.py`", "", *table(header, cells)]
    )
    write_results(args.output, "step_split", {"settings": settings, "results": rows}, report + "\n")


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(__doc__, output="where JSON and Markdown go")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 4096])
    parser.add_argument("--repeats", type=int, default=15)
    parser.set_defaults(device="cpu")
    add_sizes(parser)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(parse_args())
