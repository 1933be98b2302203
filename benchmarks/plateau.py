"""What takes masked diffusion, and an Eso-LM at alpha_0 = 1, off the plateau of the unigrams: one change at a time.

python benchmarks/plateau.py --scale hours   # about twenty minutes on 2 cores

In the first steps such a model learns how frequent tokens are, and for long no more. Each change is trained for as
many steps as recipes are tried for in `reproduce.py`, with the same text, beside the AR model; tries that it has made
in the same folder are not repeated.
"""

import argparse
import sys
from pathlib import Path

from measuring import hardware
from parallel_runs import parse_with_run
from reporting import table, write_results

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from reproduction_runs import alone_with_corpus, parser_of_runs, run, run_all, tuning_loss
from reproduction_systems import PLAIN, PLATEAU, SCALES, systems

SYSTEMS = ("mdm", "eso_1")


def name_of(recipe: str) -> str:
    return recipe.replace("_", " ")


def report(results: dict) -> str:
    """Held-out losses, as Markdown."""
    settings, losses = results["settings"], results["losses"]
    rows = (" | ".join([name_of(recipe), *(f"{losses[name][recipe]:.3f}" for name in SYSTEMS)]) for recipe in PLATEAU)
    lines = [
        f"{settings['hardware']}; scale `{settings['scale']}`, {settings['tune_steps']} steps. AR after as many: "
        f"{results['ar']:.3f}; unigrams: {results['unigrams']:.3f}. `benchmarks/plateau.py`.",
        "",
        *table(" | ".join(["held-out NELBO, nats per token", *(systems()[name] for name in SYSTEMS)]), rows),
    ]
    return "\n".join(lines) + "\n"


def main(args: argparse.Namespace) -> None:
    if args.run is not None:
        return run(args.run, args)
    names = [f"tune:ar:{PLAIN}", *(f"tune:{name}:{recipe}" for recipe in PLATEAU for name in SYSTEMS)]
    with alone_with_corpus(args) as corpus:
        run_all(__file__, names, args, "Changes")
        results = {
            "settings": {"hardware": hardware(args.device), "scale": args.scale} | vars(SCALES[args.scale]),
            "losses": {name: {recipe: tuning_loss(name, recipe, args) for recipe in PLATEAU} for name in SYSTEMS},
            "ar": tuning_loss("ar", PLAIN, args),
            "unigrams": corpus.ngram_loss(1),
        }
    write_results(args.output, "plateau", results, report(results))


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    return parse_with_run(parser_of_runs(__doc__), arguments)


if __name__ == "__main__":
    main(parse_args())
