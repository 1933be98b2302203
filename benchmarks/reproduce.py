"""The paper's claims at small scale, from one command: trains the systems it compares, and measures them.

python benchmarks/reproduce.py --scale minutes     # a toy, to see that all works
python benchmarks/reproduce.py --scale hours       # hours on 2 cores: the committed results
python benchmarks/reproduce.py --scale gpu --device cuda

AR, masked diffusion, block diffusion and Eso-LMs, on the same layers, rows and optimiser steps, each with the best of
the same recipes. Runs share the cores, one each, go on where they were killed, and are not repeated when complete:
tries of recipes, trainings, draft heads, then what the samplers write and how they score held-out text. At last,
samples are timed one system after the other. docs/claims.md says what came out.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from statistics import fmean

from measuring import hardware
from ngram import KneserNey
from parallel_runs import parse_with_run, run_in_processes
from reporting import argument_parser, write_results
from tqdm import tqdm

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from reproduction_figures import plot_all
from reproduction_report import report
from reproduction_runs import BATCH, JUDGE, Corpus, best_recipe, result_file, result_of, run, tuning_loss
from reproduction_systems import (
    RECIPES,
    SCALES,
    new_model,
    seeds_of,
    systems,
    systems_with_heads,
)


def stages(args: argparse.Namespace) -> list[tuple[str, list[str]]]:
    """The runs that share the cores, in stages that need those before them."""
    names, heads = systems(), systems_with_heads()
    trainings = [f"train:{name}:{seed}" for name in names for seed in seeds_of(name, args.seeds)]
    return [
        ("Recipes", [f"tune:{name}:{recipe}" for name in names for recipe in RECIPES]),
        # The systems of one seed come last: what is killed has the others to compare.
        ("Systems", [JUDGE, *sorted(trainings, key=lambda name: int(name.split(":")[-1]))]),
        ("Draft heads", [f"train:{name}:0" for name in heads]),
        ("Samplers", [name.replace("train", "measure", 1) for name in trainings] + [f"measure:{h}:0" for h in heads]),
    ]


def collect(corpus: Corpus, args: argparse.Namespace) -> dict:
    """All that the runs have found out, as the files of results have it."""
    scale, names = SCALES[args.scale], systems()
    times = {
        (point["system"], json.dumps(point["setting"])): point
        for name in (*names, *systems_with_heads())
        for point in result_of(f"time:{name}:0", args)["points"]
    }
    (*_, (_, measured)) = stages(args)
    points = [
        point | times[point["system"], json.dumps(point["setting"])]
        for name in measured
        for point in result_of(name, args)["points"]
    ]
    rows, held_out = corpus.train["input_ids"][:], corpus.held_out.tolist()
    return {
        "settings": {
            "scale": args.scale,
            "hardware": hardware(args.device),
            "parameters": new_model(corpus.tokenizer, 1.0, scale).num_parameters(),
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
        "judge": result_of(JUDGE, args)["likelihood"],
        "text": result_of(JUDGE, args)["text"],
        "ngram": {
            order: fmean(KneserNey(rows, order, len(corpus.tokenizer)).loss(held_out))
            for order in tqdm((1, 3, 5), desc="n-grams")
        },
        "points": points,
        "history": {name: result_of(f"train:{name}:0", args)["history"] for name in names},
    }


def require_same_settings(args: argparse.Namespace) -> None:
    """Notes what the runs of a folder have in common; raises a ValueError when those there were other ones."""
    file, now = args.work / "settings.json", json.loads(json.dumps({"scale": args.scale} | vars(SCALES[args.scale])))
    before = json.loads(file.read_text()) if file.exists() else now
    if before != now:
        changed = {name: (before.get(name), now[name]) for name in now if before.get(name) != now[name]}
        raise ValueError(f"`--work {args.work}` holds runs with other settings (before, now): {changed}.")
    file.write_text(json.dumps(now) + "\n")


def main(args: argparse.Namespace) -> None:
    if args.run is not None:
        return run(args.run, args)
    args.work = args.work or Path("outputs") / f"reproduction_{args.scale}"
    args.work.mkdir(parents=True, exist_ok=True)
    require_same_settings(args)
    corpus = Corpus(args)

    def in_processes(description: str, names: list[str], processes: int, threads: int) -> None:
        run_in_processes(
            [__file__, *args.command, "--work", str(args.work)],
            names,
            lambda name: result_file(name, args).exists(),
            args.work / "logs",
            processes,
            description,
            threads,
        )

    for description, names in stages(args):
        in_processes(description, names, args.processes, threads=1)
    timings = [f"time:{name}:0" for name in (*systems(), *systems_with_heads())]
    in_processes("Times", timings, processes=1, threads=os.cpu_count() or 1)

    results = collect(corpus, args)
    write_results(args.output, "reproduction", results, report(results))
    plot_all(results, args.output)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(__doc__, output="where JSON, Markdown, PNG go")
    parser.add_argument("--scale", choices=SCALES, default="minutes")
    parser.add_argument("--work", type=Path, help="where the models go; by default outputs/reproduction_<scale>")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time; 1 on a GPU")
    parser.add_argument(
        "--seeds", type=int, default=2, help="of the systems that carry the claims; the others have one"
    )
    parser.add_argument("--device", default="cpu")
    return parse_with_run(parser, arguments)


if __name__ == "__main__":
    main(parse_args())
