"""Speed side by side, in the same run: Eso-LM, AR, masked and block diffusion on the same layers, and a Llama.

make bench                                                          # the paper's small model on the CPU
python benchmarks/speed.py --device cuda --dtype bfloat16
python benchmarks/speed.py --hidden-size 64 --num-layers 2 --num-heads 2 --vocab-size 512 --lengths 64 128   # seconds

Runs are interleaved and medians reported, with the spread between the quartiles. Where a whole generation would take
hours, steps of the same cost are timed at several contexts and added up; the tables say so.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean, median

import torch
import transformers
from baselines import (
    AutoregressiveSampler,
    BlockDiffusionSampler,
    MaskedDiffusionSampler,
    draw,
    filled_cache,
    text_positions,
)
from fresh_models import add_sizes, fresh_eso_lm, similar_llama, weights_of_a_step
from measuring import Intervals, hardware, interleaved, peak_memory, repeated, replayable, summary, warm_up
from reporting import argument_parser, table, write_results
from tqdm import tqdm
from transformers import LlamaForCausalLM

from eso_lm import DataCollatorForHybridMaskedDiffusion, EsoForMaskedDiffusion
from eso_lm.generation_cache import PreallocatedCache


def eso_step(model: EsoForMaskedDiffusion, cache: PreallocatedCache, context: int, batch: int = 1) -> None:
    """A decoding step of one token on top of `context` cached ones: the last token and a mask."""
    cache.keep(context)
    ids = torch.full((batch, 2), model.config.mask_token_id, device=model.device)
    draw(model(ids, position_ids=text_positions(ids, context), past_key_values=cache, logits_to_keep=1).logits)


def autoregressive_step(model: EsoForMaskedDiffusion, cache: PreallocatedCache, context: int, batch: int) -> None:
    """The same of the AR sampler: the last token."""
    cache.keep(context)
    ids = torch.zeros(batch, 1, dtype=torch.long, device=model.device)
    draw(AutoregressiveSampler(model).forward(ids, context, cache))


def block_step(
    model: EsoForMaskedDiffusion, cache: PreallocatedCache, context: int, batch: int, block_length: int
) -> None:
    """A pass over a block, of which one token is drawn."""
    ids = torch.full((batch, block_length), model.config.mask_token_id, device=model.device)
    draw(BlockDiffusionSampler(model, block_length).forward(ids, context, cache, places=1))


@contextmanager
def warm(model: EsoForMaskedDiffusion) -> Iterator[None]:
    """A model that is ready to decode, as a server keeps it, and has packed its weights if it does that."""
    settings = {"num_diffusion_steps": 2, "unmasking_order": "strided", "eos_token_id": None}
    with model.ready_to_decode():
        warm_up(partial(model.generate, max_new_tokens=2, **settings))
        yield


def full_step(model: EsoForMaskedDiffusion, length: int) -> None:
    """A pass over the whole text, of which one token is drawn."""
    text = torch.full((1, length), model.config.mask_token_id, device=model.device)
    draw(MaskedDiffusionSampler(model).forward(text, torch.zeros(1, 1, dtype=torch.long, device=model.device)))


def measure_generate(model: EsoForMaskedDiffusion, llama: LlamaForCausalLM, args: argparse.Namespace) -> list[dict]:
    """`generate` itself, after prompts of several lengths: milliseconds a token, against Llama's own.

    Of the Eso-LM, and of the Llama as the backbone of one. With static caches, which transformers compiles on a GPU,
    the yardstick is the faster of Llama's two.
    """
    taken_over = EsoForMaskedDiffusion.from_causal_lm(llama, mask_token_id=args.vocab_size - 1)
    with warm(model), warm(taken_over):
        rows = []
        for context in args.contexts:
            prompt = torch.randint(0, args.vocab_size - 1, (1, context), device=args.device)
            of_llama = {"do_sample": True, "top_k": 0, "eos_token_id": None}
            systems = {"Llama": (llama, of_llama, 1)}
            static = {"cache_implementation": "static"}
            if args.static:
                systems["Llama, static"] = (llama, of_llama | static, 1)
            for tokens in args.tokens:
                settings = {"alpha_0": 1.0, "unmasking_order": "strided", "eos_token_id": None}
                settings["num_diffusion_steps"] = args.new_tokens // tokens
                systems[f"Eso-LM, {tokens} a step"] = (model, settings, tokens)
                systems[f"Llama as Eso-LM, {tokens} a step"] = (taken_over, settings, tokens)
                if args.static:
                    systems[f"Eso-LM, {tokens} a step, static"] = (model, settings | static, tokens)
            times = {name: [] for name in systems}
            for repeat in range(args.repeats + 1):  # the first one warms up, and compiles
                for name, (system, settings, tokens) in systems.items():
                    clock = Intervals(system, args.device)
                    system.generate(
                        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=args.new_tokens, **settings
                    )
                    intervals = clock.close()
                    if repeat > 0:
                        times[name] += [interval / tokens for interval in intervals]
            yardstick = min(median(values) for name, values in times.items() if name in ("Llama", "Llama, static"))
            for name, values in times.items():
                rows.append(
                    {"system": name, "context": context, **summary(values), "ratio": median(values) / yardstick}
                )
        return rows


@torch.no_grad()
def measure_steps(model: EsoForMaskedDiffusion, args: argparse.Namespace) -> list[dict]:
    """Whole runs of `generate`: seconds for L tokens in each row against NFE, and masked diffusion's for the same."""
    with warm(model):
        rows, length = [], args.step_length
        full = median(repeated(partial(full_step, model, length), 2, args.device))
        for batch, steps in tqdm([*product(args.batches, args.steps)], desc="NFE"):
            generate = partial(
                model.generate,
                num_return_sequences=batch,
                max_new_tokens=length,
                alpha_0=1.0,
                unmasking_order="strided",  # each of its steps reveals something: NFE is their number
                num_diffusion_steps=steps,
                eos_token_id=None,
            )
            spent = median(repeated(generate, 2, args.device))
            row = {"batch": batch, "length": length, "nfe": steps, "seconds": spent / 1e3}
            if batch == 1:
                row["ratio"] = steps * full / spent
            rows.append(row)
        return rows


@torch.no_grad()
def measure_lengths(model: EsoForMaskedDiffusion, args: argparse.Namespace) -> list[dict]:
    """Time to generate L tokens in each row with L forwards, from steps sampled at several contexts.

    On a GPU steps are replayed as CUDA graphs, those of all systems alike: what they cost there is not the host's.
    """
    with warm(model):
        rows = []
        for batch, length in tqdm([*product(args.batches, args.lengths)], desc="Lengths"):
            steps = {}
            for eighth in (1, 3, 5, 7):
                context = length * eighth // 8
                cache = filled_cache(model, batch, length + max(args.blocks, default=0) + 2, context)
                functions = {
                    "Eso-LM": partial(eso_step, model, cache, context, batch),
                    "AR": partial(autoregressive_step, model, cache, context, batch),
                }
                for block in args.blocks:
                    functions[f"block diffusion, {block}"] = partial(block_step, model, cache, context, batch, block)
                functions = {name: replayable(function, args.device) for name, function in functions.items()}
                for name, times in interleaved(functions, args.repeats, args.device).items():
                    steps.setdefault(name, []).append(median(times))
            for block in args.blocks:
                # A token a pass, and one more pass to cache each block.
                name = f"block diffusion, {block}"
                steps[name] = [(block + 1) / block * step for step in steps[name]]
            if batch == 1:  # a pass over the whole text is limited by arithmetic: rows would only multiply it
                repeats = args.repeats if length <= 2048 else 1
                full = replayable(partial(full_step, model, length), args.device)
                steps["masked diffusion"] = [median(repeated(full, repeats, args.device))]
            seconds = {name: fmean(values) * length / 1e3 for name, values in steps.items()}
            for name, total in seconds.items():
                ratio = total / seconds["Eso-LM"]
                rows.append({"system": name, "batch": batch, "length": length, "seconds": total, "ratio": ratio})
        return rows


@torch.no_grad()
def measure_memory_bound(model: EsoForMaskedDiffusion, args: argparse.Namespace) -> dict:
    """A decoding step of one token at a short context, against reading its weights once."""
    weights = weights_of_a_step(model)
    cache = filled_cache(model, 1, 130, 128)

    def read_weights():
        for weight in weights:
            weight.sum()

    with warm(model):
        functions = {"step": partial(eso_step, model, cache, 128), "read": read_weights}
        functions = {name: replayable(function, args.device) for name, function in functions.items()}
        times = interleaved(functions, 2 * args.repeats, args.device)
    step, read = summary(times["step"]), summary(times["read"])
    return {
        "step_ms": step,
        "read_ms": read,
        "bandwidth_gb_s": sum(weight.nbytes for weight in weights) / 1e6 / read["median"],
        "ratio": step["median"] / read["median"],
    }


def measure_training(model: EsoForMaskedDiffusion, args: argparse.Namespace, compiles: bool = False) -> dict:
    """Forward and backward of the hybrid objective at alpha_0 = 0.25, against those of an AR loss on the same rows."""
    call = torch.compile(model, backend="aot_eager" if args.device == "cpu" else "inductor") if compiles else model
    torch.manual_seed(0)
    collator = DataCollatorForHybridMaskedDiffusion(mask_token_id=model.config.mask_token_id, alpha_0=0.25)
    text = torch.randint(0, args.vocab_size - 1, (args.train_rows, args.train_length))
    hybrid = {name: value.to(args.device) for name, value in collator([{"input_ids": row} for row in text]).items()}
    text = text.to(args.device)
    autoregressive = {
        "input_ids": text,
        "position_ids": text_positions(text),
        "labels": text,
        "loss_weights": torch.ones(text.shape, device=args.device),
    }

    def run(batch):
        model.zero_grad(set_to_none=True)
        call(**batch).loss.backward()

    model.train()
    try:
        functions = {"hybrid": partial(run, hybrid), "AR": partial(run, autoregressive)}
        times = interleaved(functions, args.train_repeats, args.device)
    finally:
        model.zero_grad(set_to_none=True)
        model.eval()
    hybrid_ms, ar_ms = summary(times["hybrid"]), summary(times["AR"])
    return {
        "rows": args.train_rows,
        "length": args.train_length,
        "hybrid_ms": hybrid_ms,
        "ar_ms": ar_ms,
        "hybrid_tokens_per_second": 1e3 * text.numel() / hybrid_ms["median"],
        "ratio": hybrid_ms["median"] / ar_ms["median"],
    }


def measure_cache(model: EsoForMaskedDiffusion, length: int = 1024) -> dict:
    """Bytes of the cache that `generate` makes, against 2 x layers x batch x length x width x bytes."""
    cache = filled_cache(model, 2, length, 1)
    used = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    config = model.config
    expected = 2 * config.num_hidden_layers * 2 * length * config.hidden_size * model.dtype.itemsize
    return {"bytes": used, "expected": expected, "ratio": used / expected}


def report_generate(rows: list[dict]) -> list[str]:
    return table(
        "`generate`, time a token | context | ms (quartiles) | against Llama's `generate`",
        (
            f"{row['system']} | {row['context']} | {row['median']:.1f} ({row['low']:.1f} to {row['high']:.1f}) | "
            f"{row['ratio']:.2f}"
            for row in rows
        ),
    )


def report_lengths(rows: list[dict]) -> list[str]:
    lengths, by_length = list(dict.fromkeys(row["length"] for row in rows)), []
    for batch, system in dict.fromkeys((row["batch"], row["system"]) for row in rows):
        cells = [row for row in rows if (row["batch"], row["system"]) == (batch, system)]
        numbers = [f"{row['seconds']:.{0 if row['seconds'] >= 1 else 2}f} ({row['ratio']:.1f})" for row in cells]
        by_length.append(" | ".join([system, str(batch), *numbers]))
    return [
        "Seconds for L tokens in each row at NFE = L, from sampled steps (in brackets: against the Eso-LM):",
        "",
        *table("| batch | " + " | ".join(f"L = {length}" for length in lengths), by_length),
    ]


def report_steps(rows: list[dict]) -> list[str]:
    forwards, by_forwards = list(dict.fromkeys(row["nfe"] for row in rows)), []
    for batch in dict.fromkeys(row["batch"] for row in rows):
        cells = [row for row in rows if row["batch"] == batch]
        numbers = [f"{row['seconds']:.2f}" + (f" ({row['ratio']:.1f})" if "ratio" in row else "") for row in cells]
        by_forwards.append(" | ".join([str(batch), *numbers]))
    return [
        f"Seconds of `generate` for {rows[0]['length']} tokens in each row against NFE (in brackets: masked "
        f"diffusion at the same NFE takes so many times as long):",
        "",
        *table("batch | " + " | ".join(f"NFE {nfe}" for nfe in forwards), by_forwards),
    ]


def report_memory_bound(bound: dict) -> list[str]:
    return [
        f"- A step of one token takes {bound['step_ms']['median']:.1f} ms, reading the weights of its linear "
        f"layers once {bound['read_ms']['median']:.1f} ms "
        f"({bound['bandwidth_gb_s']:.1f} GB/s): {bound['ratio']:.2f} times."
    ]


def report_training(training: dict) -> list[str]:
    return [
        f"- A training step of the hybrid objective (alpha_0 = 0.25, {training['rows']} rows of "
        f"{training['length']} tokens) takes {training['ratio']:.2f} times an AR step, "
        f"{training['hybrid_tokens_per_second']:.0f} tokens a second."
    ]


REPORTS = {
    "generate": report_generate,
    "lengths": report_lengths,
    "steps": report_steps,
    "memory_bound": report_memory_bound,
    "training": report_training,
}
"""Of each measurement, its lines of Markdown."""


def report(results: dict) -> str:
    """The results as Markdown."""
    settings, memory = results["settings"], results["peak_memory_gb"]
    written = {name: write(results[name]) for name, write in REPORTS.items()}
    lines = [
        f"{settings['hardware']}; {settings['parameters']:,} parameters, {settings['dtype']}; "
        f"torch {settings['torch']}, transformers {settings['transformers']}. `benchmarks/speed.py`",
        "",
        *[line for name in ("generate", "lengths", "steps") for line in [*written[name], ""]],
        *written["memory_bound"],
        *written["training"],
        f"- Peak memory: {memory['generation']:.2f} GB with both models and their caches while generating, "
        f"{memory['training']:.2f} GB when training too.",
        f"- The cache takes {results['cache']['ratio']:.3f} times 2 x layers x batch x length x width x bytes.",
    ]
    return "\n".join(lines) + "\n"


def plot(rows: list[dict], path: Path) -> None:
    """Generation time against length."""
    from matplotlib.figure import Figure  # which machines that only measure may not have

    figure = Figure(figsize=(5.5, 4))
    axes = figure.subplots()
    for batch, system in dict.fromkeys((row["batch"], row["system"]) for row in rows):
        points = [row for row in rows if (row["batch"], row["system"]) == (batch, system)]
        label = system if batch == 1 else f"{system} (batch {batch})"
        style = "-" if batch == 1 else "--"
        axes.loglog([p["length"] for p in points], [p["seconds"] for p in points], style, marker="o", label=label)
    axes.set_xlabel("tokens L (NFE = L)")
    axes.set_ylabel("seconds")
    axes.legend(frameon=False, fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main(args: argparse.Namespace) -> None:
    model = fresh_eso_lm(args, args.dtype)
    llama = similar_llama(model, max_length=16384)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    sizes = {"parameters": model.num_parameters(), "llama_parameters": llama.num_parameters()}
    results = {"settings": vars(args) | versions | sizes | {"hardware": hardware(args.device)}}
    results["memory_bound"] = measure_memory_bound(model, args)
    results["generate"] = measure_generate(model, llama, args)
    results["cache"] = measure_cache(model)
    results["peak_memory_gb"] = {"generation": peak_memory(args.device)}
    results["training"] = measure_training(model, args)
    results["peak_memory_gb"]["training"] = peak_memory(args.device)
    del llama
    results["steps"] = measure_steps(model, args)
    results["lengths"] = measure_lengths(model, args)

    name = f"speed_{args.device}_{args.dtype}"
    write_results(args.output, name, results, report(results))
    plot(results["lengths"], args.output / f"{name}.png")


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(__doc__, output="where JSON, Markdown, PNG go")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="rows, for the lengths")
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 1024], help="prompts of `generate`")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8], help="tokens a step of `generate`")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens a run of `generate`")
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 16], help="blocks of block diffusion")
    parser.add_argument("--step-length", type=int, default=256, help="tokens of the runs at several NFE")
    parser.add_argument("--steps", type=int, nargs="+", default=[256, 128, 64, 32, 16], help="NFE of these runs")
    parser.add_argument("--train-rows", type=int, default=4)
    parser.add_argument("--train-length", type=int, default=256)
    parser.add_argument("--train-repeats", type=int, default=3)
    add_sizes(parser)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--static", action="store_true", help="`generate` with static caches too, compiled on a GPU")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(parse_args())
