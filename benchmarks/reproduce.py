"""The paper's claims at small scale, from one command: trains the systems it compares, and measures them.

python benchmarks/reproduce.py --scale minutes     # a toy, to see that all works
python benchmarks/reproduce.py --scale hours       # hours on 2 cores: the committed results
python benchmarks/reproduce.py --scale gpu --device cuda

AR, masked diffusion, block diffusion and Eso-LMs, on the same layers, rows and optimiser steps, each with the best of
the same recipes. Runs share the cores, one each, go on where they were killed, and are not repeated when complete:
tries of recipes, trainings, draft heads, then what the samplers write and how they score held-out text. At last,
samples of all systems are timed in turns. docs/claims.md says what came out.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from measuring import hardware
from parallel_runs import parse_with_run
from reporting import positive, write_results
from tqdm import tqdm

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from reproduction_figures import plot_all
from reproduction_report import report
from reproduction_runs import (
    BATCH,
    JUDGE,
    TIMES,
    Corpus,
    alone_with_corpus,
    best_recipe,
    load,
    parser_of_runs,
    result_of,
    run,
    run_all,
    tuning_loss,
)
from reproduction_systems import (
    ALL_MASKED,
    RECIPES,
    SCALES,
    UNAIDED,
    new_model,
    seeds_of,
    systems,
    systems_with_heads,
)


def stages(args: argparse.Namespace) -> list[tuple[str, list[str]]]:
    """The runs that share the cores, in stages that need those before them."""
    names, heads = systems(), systems_with_heads()
    trainings, head_trainings = (
        [f"train:{name}:{seed}" for name in some for seed in seeds_of(name, args.seeds)] for some in (names, heads)
    )
    return [
        ("Recipes", [f"tune:{name}:{recipe}" for name in names for recipe in RECIPES]),
        # Second seeds come last: what is cut short has a model of every system.
        ("Systems", [JUDGE, *sorted(trainings, key=lambda name: int(name.split(":")[-1]))]),
        ("Without another start", [f"control:{name}:{UNAIDED}" for name in ALL_MASKED]),
        ("Draft heads", head_trainings),
        ("Samplers", [name.replace("train", "measure", 1) for name in trainings + head_trainings]),
    ]


def collect(corpus: Corpus, args: argparse.Namespace) -> dict:
    """All that the runs have found out, as the files of results have it."""
    scale, names = SCALES[args.scale], systems()
    parameters = new_model(corpus.tokenizer, 1.0, scale).num_parameters()
    times = {(point["system"], json.dumps(point["setting"])): point for point in result_of(TIMES, args)["points"]}
    _, measured = stages(args)[-1]
    points = [
        point | times[point["system"], json.dumps(point["setting"])]
        for name in measured
        for point in result_of(name, args)["points"]
    ]
    return {
        "settings": {
            "scale": args.scale,
            "hardware": hardware(args.device),
            "parameters": parameters,
            "head_parameters": load(f"train:{next(iter(systems_with_heads()))}:0", args).num_parameters() - parameters,
            "train_tokens": len(corpus.train) * scale.length,
            "sampling_batch": BATCH,
        }
        | vars(scale),
        "tuning": {name: {recipe: tuning_loss(name, recipe, args) for recipe in RECIPES} for name in names},
        "recipes": {name: best_recipe(name, args) for name in names},
        "likelihood": {
            name: [result_of(f"train:{name}:{seed}", args)["likelihood"] for seed in seeds_of(name, args.seeds)]
            for name in names
        },
        "unaided": {name: result_of(f"control:{name}:{UNAIDED}", args) for name in ALL_MASKED},
        "judge": result_of(JUDGE, args)["likelihood"],
        "text": result_of(JUDGE, args)["text"],
        "ngram": {str(order): corpus.ngram_loss(order) for order in tqdm((1, 2, 3, 5), desc="n-grams")},
        "points": points,
        "history": {name: result_of(f"train:{name}:0", args)["history"] for name in names},
    }


def main(args: argparse.Namespace) -> None:
    if args.run is not None:
        return run(args.run, args)
    with alone_with_corpus(args) as corpus:
        for description, names in stages(args):
            run_all(__file__, names, args, description)
        run_all(__file__, [TIMES], args, "Times", processes=1, threads=os.cpu_count() or 1)
        results = collect(corpus, args)
    write_results(args.output, "reproduction", results, report(results))
    plot_all(results, args.output)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = parser_of_runs(__doc__)
    parser.add_argument(
        "--seeds", type=positive, default=2, help="of the systems that carry the claims; the others have one"
    )
    return parse_with_run(parser, arguments)


if __name__ == "__main__":
    main(parse_args())
