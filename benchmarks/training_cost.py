"""Memory and arithmetic of a training step: from first principles, and as measured.

python benchmarks/training_cost.py          # a few minutes on 2 cores

Memory is counted tensor by tensor (weights, gradients, optimiser, averages; what autograd keeps for the backward
pass), and arithmetic by torch's own counter, so both hold for any machine. `expected_cost` has the formulas.
"""

import argparse
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from measuring import hardware, timed
from reporting import argument_parser, table, write_results
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from run_pretraining import PRESETS

from eso_lm import DataCollatorForHybridMaskedDiffusion, EsoConfig, EsoForMaskedDiffusion

BYTES_OF_A_PARAMETER = 4 + 4 + 8 + 4  # weight, gradient, two moments of AdamW, moving average; float32
# What autograd keeps of a slot in a layer, in vectors of the hidden size. In float32 the residual stream and its norm,
# twice; queries, keys, values and output of the attention; the inputs of the projections and of the MLP, the branches
# before their gates, with dropout and its masks; and 2 x 4 inside the MLP.
VECTORS_KEPT = {"float32": 20.0, "bfloat16": 13.5}  # of 4 bytes each


@dataclass
class Cost:
    """Of one training step."""

    static_bytes: float
    kept_bytes: float
    flops: float

    def as_dict(self, prefix: str) -> dict[str, float]:
        return {f"{prefix}_{name}": value for name, value in vars(self).items()}


def expected_cost(config: EsoConfig, slots: float, weighted: float, dtype: str, parameters: int) -> Cost:
    """What a step should take, from the sizes alone.

    Args:
        slots: Fed to the backbone: the tokens of rows in the diffusion phase; those of rows in the sequential phase,
            and one query more for each of their weighted tokens.
        weighted: Tokens with a weight in the loss, for which logits are computed.
        dtype: "float32", or "bfloat16" for autocast with float32 weights.
        parameters: Of the model.

    Attention's own products, 6 x hidden size x keys for a slot and layer, are left out: torch does not count them on
    every device, and below 1000 keys they are less than a tenth.
    """
    width, layers = config.hidden_size, config.num_hidden_layers
    matrices = 4 * width**2 + 2 * width * config.intermediate_size  # of a layer
    logits = 4 * config.vocab_size * weighted  # float32 log-probabilities
    copies = 2 * (parameters - config.vocab_size * width) if dtype == "bfloat16" else 0  # autocast's, of the matrices
    return Cost(
        static_bytes=BYTES_OF_A_PARAMETER * parameters,
        kept_bytes=4 * VECTORS_KEPT[dtype] * width * layers * slots + logits + copies,
        flops=6 * (layers * matrices * slots + config.vocab_size * width * weighted),
    )


def measured_cost(model: EsoForMaskedDiffusion, batch: dict, dtype: str) -> tuple[Cost, float]:
    """The same, counted during a step; and the seconds of another step, uncounted."""
    optimizer = torch.optim.AdamW(model.parameters())
    storages = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in storages:
            kept[storage.data_ptr()] = storage
        return tensor

    def step() -> None:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = model(**batch).loss
        loss.backward()

    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept):
        step()
    kept_bytes = sum(storage.nbytes() for storage in kept.values())
    kept.clear()
    optimizer.step()
    weights = list(model.parameters())
    averages = [weight.detach().clone() for weight in weights]
    moments = [moment for state in optimizer.state.values() for moment in state.values()]
    tensors = [*weights, *(weight.grad for weight in weights), *moments, *averages]
    static_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def step_and_update() -> None:
        step()
        optimizer.step()

    milliseconds, _ = timed(step_and_update, model.device.type)
    return Cost(static_bytes, kept_bytes, counter.get_total_flops()), milliseconds / 1e3


def noisy_batch(config: EsoConfig, rows: int, length: int, alpha_0: float) -> tuple[dict, int, int]:
    """A batch of random tokens; its slots and weighted tokens, as `expected_cost` counts them."""
    collator = DataCollatorForHybridMaskedDiffusion(mask_token_id=config.mask_token_id, alpha_0=alpha_0, seed=0)
    tokens = torch.randint(config.vocab_size - 1, (rows, length)).tolist()
    batch = collator([{"input_ids": row} for row in tokens])
    is_weighted = batch["loss_weights"] != 0
    # The queries of all rows are as many as those of the row that has most.
    queries = is_weighted[batch["sequential_rows"]].sum(dim=1)
    slots = rows * length + len(queries) * int(queries.max() if len(queries) else 0)
    return batch, slots, int(is_weighted.sum())


def model_config(preset: str, args: argparse.Namespace) -> EsoConfig:
    return EsoConfig(vocab_size=args.vocab_size, hidden_dropout=0.1, **PRESETS[preset])


def measure(preset: str, length: int, alpha_0: float, dtype: str, args: argparse.Namespace) -> dict:
    """One training step of one model."""
    torch.manual_seed(0)
    config = model_config(preset, args)
    model = EsoForMaskedDiffusion(config).to(args.device).train()
    batch, slots, weighted = noisy_batch(config, args.rows, length, alpha_0)
    batch = {name: value.to(args.device) for name, value in batch.items()}
    measured, seconds = measured_cost(model, batch, dtype)
    expected = expected_cost(config, slots, weighted, dtype, model.num_parameters())
    return (
        {"preset": preset, "parameters": model.num_parameters(), "length": length, "alpha_0": alpha_0, "dtype": dtype}
        | {"rows": args.rows, "slots": slots, "weighted": weighted, "tokens_per_second": args.rows * length / seconds}
        | expected.as_dict("expected")
        | measured.as_dict("measured")
    )


def predict(preset: str, length: int, alpha_0: float, args: argparse.Namespace) -> dict:
    """What a model should take for a row and a token, with bfloat16 autocast; of a size that need not fit here."""
    config = model_config(preset, args)
    with torch.device("meta"):
        parameters = EsoForMaskedDiffusion(config).num_parameters()
    rows = 64
    _, slots, weighted = noisy_batch(config, rows, length, alpha_0)
    step = expected_cost(config, slots, weighted, "bfloat16", parameters)
    nothing = expected_cost(config, 0, 0, "bfloat16", parameters)
    return {
        "preset": preset,
        "parameters": parameters,
        "length": length,
        "alpha_0": alpha_0,
        "static_gb": (step.static_bytes + nothing.kept_bytes) / 1e9,
        "gb_per_row": (step.kept_bytes - nothing.kept_bytes) / rows / 1e9,
        "gflop_per_token": step.flops / rows / length / 1e9,
    }


def report(results: dict) -> str:
    """The results as Markdown."""
    measured = []
    for row in results["rows"]:
        pairs = (
            f"{row[f'measured_{name}'] / unit:.2f} ({row[f'expected_{name}'] / unit:.2f})"
            for name, unit in (("static_bytes", 1e9), ("kept_bytes", 1e9), ("flops", 1e12))
        )
        rate = row["measured_flops"] * row["tokens_per_second"] / (row["rows"] * row["length"]) / 1e12
        measured.append(
            f"{row['preset']} | {row['parameters']:,} | {row['length']} | {row['alpha_0']:g} | {row['dtype']} | "
            f"{' | '.join(pairs)} | {row['tokens_per_second']:.0f} | {rate:.3f}"
        )
    lines = [
        f"{results['settings']['hardware']}; {results['settings']['rows']} rows a step. `benchmarks/training_cost.py`",
        "",
        *table(
            "preset | parameters | L | alpha_0 | dtype | static, GB (expected) | kept for backward, GB (expected) | "
            "TFLOP a step (expected) | tokens a second | TFLOP a second",
            measured,
        ),
        "",
        "Expected by the same formulas, with bfloat16 autocast:",
        "",
        *table(
            "preset | parameters | L | alpha_0 | weights and optimiser, GB | each row, GB | GFLOP a token",
            (
                f"{row['preset']} | {row['parameters']:,} | {row['length']} | {row['alpha_0']:g} | "
                f"{row['static_gb']:.1f} | {row['gb_per_row']:.2f} | {row['gflop_per_token']:.2f}"
                for row in results["predictions"]
            ),
        ),
    ]
    return "\n".join(lines) + "\n"


def main(args: argparse.Namespace) -> None:
    kinds = ((1.0, "float32"), (0.25, "float32"), (1.0, "bfloat16"))
    rows = [
        measure(preset, length, alpha_0, dtype, args)
        for preset, length, (alpha_0, dtype) in tqdm(
            [*product(args.presets, args.lengths, kinds)], desc="Training steps"
        )
    ]
    predictions = [
        predict(preset, length, alpha_0, args)
        for preset, length, alpha_0 in product(PRESETS, args.predicted_lengths, (1.0, 0.25))
    ]
    settings = vars(args) | {"hardware": hardware(args.device)}
    results = {"settings": settings, "rows": rows, "predictions": predictions}
    write_results(args.output, "training_cost", results, report(results))


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(__doc__, output="where JSON and Markdown go")
    parser.add_argument("--presets", nargs="+", default=["tiny", "small"], help="of run_pretraining.py")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--predicted-lengths", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--rows", type=int, default=4, help="of a step")
    parser.add_argument("--vocab-size", type=int, default=50258)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(parse_args())
