"""What the exact likelihood of a long text takes, in time and memory: at once, in chunks, and forced through decoding.

python benchmarks/scoring_cost.py          # a few minutes on 2 cores

One text, under one plan, with fresh weights (which cost what others do, but for adaptive unmasking: it is as uncertain
as can be, and so as slow). Each measurement has a process of its own, whose memory is what it holds at most beyond the
model.
"""

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from fresh_models import add_sizes, fresh_eso_lm
from measuring import hardware, peak_memory, timed
from reporting import argument_parser, table, write_results
from tqdm import tqdm

PARALLEL = {"alpha_0": 1.0, "num_diffusion_steps": 16, "unmasking_order": "strided"}
WAYS: dict[str, dict[str, Any]] = {
    "one token a forward": {},
    "one token a forward, in chunks": {"chunk_length": 256},
    "16 steps": PARALLEL,
    "16 steps, in chunks": PARALLEL | {"chunk_length": 256},
    "entropy bound of 64 nats": {"alpha_0": 1.0, "entropy_bound": 64.0, "unmasking_order": "strided"},
}
PLAIN = "a plain forward"


@torch.no_grad()
def measure(way: str, length: int, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds, and gigabytes beyond the model, of scoring one text in one way; called in a fresh process."""
    model = fresh_eso_lm(args)
    text = torch.randint(args.vocab_size - 1, (1, length), device=args.device)

    def score(ids: torch.Tensor) -> torch.Tensor:
        if way == PLAIN:
            return model(ids, logits_to_keep=1).logits[:, 0]
        return model.log_likelihood(ids, **WAYS[way]).num_function_evaluations[:, 0]

    score(text[:, :16])
    before = peak_memory(args.device)
    milliseconds, result = timed(lambda: score(text), args.device)
    forwards = 1 if way == PLAIN else int(result[0])
    gigabytes = peak_memory(args.device) - (before if args.device == "cpu" else 0)
    return {
        "way": way,
        "length": length,
        "sampled_in": forwards,
        "seconds": milliseconds / 1e3,
        "gigabytes": gigabytes,
    }


def main(args: argparse.Namespace) -> None:
    rows = []
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["eso_lm.modeling_eso"])  # imported once for all of them
    pairs = [(way, length) for length in args.lengths for way in (PLAIN, *WAYS)]
    for way, length in tqdm(pairs, desc="Ways to score"):
        with ProcessPoolExecutor(1, mp_context=processes) as fresh:
            rows.append(fresh.submit(measure, way, length, args).result())
    settings = {name: str(value) for name, value in vars(args).items()} | {"hardware": hardware(args.device)}
    header = "tokens | likelihood of | forwards of sampling | seconds | GB beyond the model"
    lines = (
        f"{row['length']} | {row['way']} | {row['sampled_in']} | {row['seconds']:.1f} | {row['gigabytes']:.2f}"
        for row in rows
    )
    report = "\n".join([settings["hardware"], "", *table(header, lines)]) + "\n"
    write_results(args.output, "scoring_cost", {"settings": settings, "results": rows}, report)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(__doc__, output="where JSON and Markdown go")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048])
    add_sizes(parser)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(parse_args())
