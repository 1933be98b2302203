"""Weights in 8 and 4 bits (torchao) on the CPU: the time of a decoding step, and what it costs in nats.

python benchmarks/quantization.py --model outputs/quickstart          # a minute on 2 cores

Time: the paper's small model with fresh weights, or any size, in bfloat16, its head quantised too. Nats: exact
log-likelihoods of a trained model on the held-out texts in its folder, under the same orders of generation.
"""

import argparse
import json
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from baselines import filled_cache
from fresh_models import add_sizes, fresh_eso_lm
from measuring import hardware, interleaved, summary, warm_up
from reporting import argument_parser, table, write_results
from speed import eso_step
from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModel, AutoTokenizer, TorchAoConfig

from eso_lm import EsoForMaskedDiffusion

CONSTANT = [".*modulation.*", ".*timestep_embedding.*"]
"""Modules that are constants while decoding: there is nothing to gain."""


def load(folder: Path, bits: int, group_size: int) -> EsoForMaskedDiffusion:
    """A model in bfloat16, with weights of 16, 8 or 4 bits."""
    if bits == 16:
        return AutoModel.from_pretrained(folder, dtype=torch.bfloat16)
    kinds = {8: Int8WeightOnlyConfig(), 4: PrototypeInt4WeightOnlyConfig(group_size=group_size)}
    config = TorchAoConfig(kinds[bits], modules_to_not_convert=CONSTANT)
    return AutoModel.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config)


@torch.no_grad()
def measure_steps(args: argparse.Namespace) -> list[dict]:
    """Milliseconds of a step of one token, of each number of bits, interleaved."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as contexts:
        fresh_eso_lm(args, "bfloat16").save_pretrained(folder)
        models = {bits: load(Path(folder), bits, group_size=128) for bits in (16, 8, 4)}
        steps = {
            (bits, batch): partial(
                eso_step, model, filled_cache(model, batch, args.context + 2, args.context), args.context, batch
            )
            for bits, model in models.items()
            for batch in args.batches
        }
        for model in models.values():
            contexts.enter_context(model.ready_to_decode())
        warm_up(steps[16, args.batches[0]])
        times = {key: summary(values) for key, values in interleaved(steps, args.repeats, "cpu").items()}
    return [
        {"bits": bits, "batch": batch, **spent, "ratio": spent["median"] / times[16, batch]["median"]}
        for (bits, batch), spent in times.items()
    ]


@torch.no_grad()
def measure_loss(args: argparse.Namespace) -> list[dict]:
    """Nats per token of each number of bits."""
    tokenizer, lines = (
        AutoTokenizer.from_pretrained(args.model),
        (args.model / "held_out.jsonl").read_text().splitlines(),
    )
    ids = tokenizer([json.loads(line)["text"] for line in lines])["input_ids"]
    stream = torch.tensor([token for text in ids for token in text])
    rows = stream[: len(stream) // args.length * args.length].view(-1, args.length)[: args.texts]
    orders = torch.stack(
        [torch.randperm(args.length, generator=torch.Generator().manual_seed(seed)) for seed in range(args.orders)]
    )
    losses = {}
    for bits in (16, 8, 4):
        scores = load(args.model, bits, group_size=32).log_likelihood(rows, orders=orders).log_likelihood_per_order
        losses[bits] = -scores.double().mean().item() / args.length
    return [{"bits": bits, "nats_per_token": loss, "more": loss - losses[16]} for bits, loss in losses.items()]


def main(args: argparse.Namespace) -> None:
    results = {"steps": measure_steps(args), "loss": measure_loss(args)}
    results["settings"] = {name: value for name, value in vars(args).items() if name != "output"}
    results["settings"] |= {"hardware": hardware("cpu"), "torch": torch.__version__}
    loss = {row["bits"]: row for row in results["loss"]}
    header = "bits | " + " | ".join(f"a step at batch {batch} (ms) | against 16 bits" for batch in args.batches)
    lines = []
    for bits in (16, 8, 4):
        of_batch = [row for row in results["steps"] if row["bits"] == bits]
        numbers = [
            f"{row['median']:.1f} ({row['low']:.1f} to {row['high']:.1f}) | {row['ratio']:.2f}" for row in of_batch
        ]
        lines.append(
            " | ".join([str(bits), *numbers, f"{loss[bits]['nats_per_token']:.4f}", f"{loss[bits]['more']:+.4f}"])
        )
    report = [f"{results['settings']['hardware']}; torch {torch.__version__}. `benchmarks/quantization.py`", ""]
    report += table(f"{header} | nats per token | more", lines)
    write_results(args.output, "quantization", results, "\n".join(report) + "\n")


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(__doc__, output="where JSON and Markdown go")
    parser.add_argument("--model", type=Path, default=Path("outputs/quickstart"), help="a trained model's folder")
    parser.add_argument("--texts", type=int, default=128, help="rows of held-out text")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--orders", type=int, default=2)
    parser.add_argument("--context", type=int, default=128, help="cached tokens of a step")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--repeats", type=int, default=25)
    add_sizes(parser, vocab_size=50272)  # the kernel of 4 bits wants a multiple of 16
    parser.set_defaults(device="cpu")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(parse_args())
