"""A GPU in one command: what must hold there, and how fast it is. A folder of results, in less than nine minutes.

make gpu
python benchmarks/gpu.py                        # the same; torch, transformers, accelerate and peft are enough
python benchmarks/gpu.py --device cpu --smoke   # all of it in its smallest setting, on any machine

First the checks of `device_checks.py`; then the paper's small model in bfloat16 against the usual systems, as in
`speed.py`: `generate` against Llama's with a static, compiled cache; steps at growing length and batch; training; peak
memory. A part that fails is told in the results, and the others go on; when the time is up, so is what is left.
"""

import argparse
import re
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import checkout  # noqa: F401  # before all that needs the package
import speed
import torch
import transformers
from device_checks import CHECKS, Machine, NotHereError
from fresh_models import fresh_eso_lm, similar_llama
from measuring import hardware, peak_memory
from reporting import argument_parser, table, write_results

SMOKE = {  # arguments of `speed.py`
    "hidden-size": "64",
    "num-layers": "2",
    "num-heads": "2",
    "vocab-size": "512",
    "lengths": "32 64",
    "batches": "1 2",
    "contexts": "16",
    "new-tokens": "8",
    "tokens": "1 4",
    "blocks": "4",
    "step-length": "16",
    "steps": "16 4",
    "train-rows": "4",
    "train-length": "16",
    "train-repeats": "1",
    "repeats": "2",
}
FULL = {
    "lengths": "1024 2048 8192",
    "batches": "1 8 32",
    "contexts": "128 1024",
    "new-tokens": "32",
    "tokens": "1 4",
    "blocks": "16",
    "step-length": "256",
    "steps": "256 64 16",
    "train-rows": "16",
    "train-length": "1024",
    "train-repeats": "5",
    "repeats": "5",
}


class Parts:
    """Runs one part after the other, as long as there is time, and notes what came of each."""

    def __init__(self, minutes: float):
        self.deadline = time.monotonic() + 60 * minutes
        self.outcomes: list[dict[str, Any]] = []

    def run(self, name: str, part: Callable[[], Any]) -> Any:
        """What a part returns; None if it is left out, or fails."""
        outcome: dict[str, Any] = {"part": name, "result": "passed"}
        self.outcomes.append(outcome)
        start, value = time.monotonic(), None
        if start > self.deadline:
            outcome["result"] = "left out: the time was up"
            return None
        try:
            value = part()
        except NotHereError as reason:
            outcome["result"] = f"left out: {reason}"
        except Exception as error:  # whatever it is, the other parts are worth having
            outcome["result"] = f"FAILED: {type(error).__name__}: {error}".splitlines()[0][:300]
            outcome["traceback"] = traceback.format_exc()
            print(outcome["traceback"], file=sys.stderr)
        outcome["seconds"] = time.monotonic() - start
        print(f"{name}: {outcome['result']} ({outcome['seconds']:.0f} s)", file=sys.stderr, flush=True)
        return value

    @property
    def have_failed(self) -> bool:
        return any(outcome["result"].startswith("FAILED") for outcome in self.outcomes)


def measure(args: argparse.Namespace, parts: Parts) -> dict[str, Any]:
    """The measurements of `speed.py` that fit a GPU, with the most memory that each took, in GB."""
    results: dict[str, Any] = {"peak_memory_gb": {}}
    model = parts.run("a model", lambda: fresh_eso_lm(args, args.dtype))
    if model is None:
        return results
    llama = similar_llama(model, max_length=4096)
    results |= {"parameters": model.num_parameters(), "llama_parameters": llama.num_parameters()}
    measured = {
        "memory_bound": lambda: speed.measure_memory_bound(model, args),
        "lengths": lambda: speed.measure_lengths(model, args),
        "training": lambda: speed.measure_training(model, args),
        "generate": lambda: speed.measure_generate(model, llama, args),
        "steps": lambda: speed.measure_steps(model, args),
        "compiled_training": lambda: speed.measure_training(model, args, compiles=True),
    }
    for name, part in measured.items():
        peak_memory(args.device)
        results[name] = parts.run(f"speed: {name.replace('_', ' ')}", part)
        results["peak_memory_gb"][name] = peak_memory(args.device)
    return results


def report(results: dict[str, Any]) -> str:
    """The results as Markdown, of the parts that there are."""
    settings = results["settings"]
    lines = [
        f"{settings['hardware']}; {results.get('parameters', 0):,} parameters, {settings['dtype']}; "
        f"torch {settings['torch']}, transformers {settings['transformers']}. `benchmarks/gpu.py`",
        "",
    ]
    for name, write in speed.REPORTS.items():
        if results.get(name):
            written = write(results[name])
            lines += written if written[0].startswith("- ") else [*written, ""]
    if results.get("compiled_training"):
        compiled = results["compiled_training"]
        lines.append(f"- Compiled, {compiled['hybrid_tokens_per_second']:.0f} tokens a second.")
    lines.append("")
    memory = (f"{name.replace('_', ' ')} | {value:.2f}" for name, value in results["peak_memory_gb"].items())
    lines += [*table("part | peak memory (GB)", memory), ""]
    outcomes = (
        f"{outcome['part']} | {outcome['result'].replace('|', '/')} | "
        + ", ".join(f"{name} {value:.2g}" for name, value in outcome.get("numbers", {}).items())
        for outcome in results["parts"]
    )
    lines += table("part | result | numbers", outcomes)
    return "\n".join(lines) + "\n"


def main(args: argparse.Namespace) -> bool:
    """Checks and measures; returns whether no part has failed."""
    if args.device != "cpu" and not torch.accelerator.is_available():
        raise SystemExit(
            f"--device {args.device}: torch sees no accelerator here. --device cpu --smoke runs anywhere."
        )
    machine = Machine(args.device, backend="aot_eager" if args.smoke else None)
    parts = Parts(args.minutes)
    for name, check in CHECKS.items():
        numbers = parts.run(name, partial(check, machine))
        parts.outcomes[-1]["numbers"] = numbers or {}
    settings = {name: value for name, value in vars(args).items() if name != "output"}
    settings |= {"torch": torch.__version__, "transformers": transformers.__version__}
    settings["hardware"] = hardware(args.device)
    results = {"settings": settings} | measure(args, parts) | {"parts": parts.outcomes}
    card = re.sub(r"[^A-Za-z0-9]+", "-", settings["hardware"]).strip("-")
    write_results(args.output, f"gpu_{card}_{args.dtype}" + ("_smoke" if args.smoke else ""), results, report(results))
    return not parts.have_failed


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(__doc__, output="the folder of JSON and Markdown, which are named after the card")
    parser.add_argument("--smoke", action="store_true", help="everything in its smallest setting")
    parser.add_argument("--minutes", type=float, default=7.5, help="after which no further part is begun")
    own, others = parser.parse_known_args(arguments)
    sizes = [f"--{name} {value}" for name, value in (SMOKE if own.smoke else FULL).items()]
    defaults = " ".join(["--device cuda --dtype bfloat16 --static", *sizes]).split()
    args = speed.parse_args([*defaults, *others])
    return argparse.Namespace(**vars(args) | vars(own))


if __name__ == "__main__":
    sys.exit(0 if main(parse_args()) else 1)
