"""Does the exact likelihood of a trajectory pay in reinforcement? Against the one-step estimate of diffu-GRPO.

python benchmarks/reinforcement.py          # about half an hour on 2 cores

A small Eso-LM learns 4 x 4 Sudoku from solved grids, for a while: the supervised start. From there GRPO goes on, on
puzzles of other grids, with rollouts of a few parallel forwards. Two ways to say how probable a rollout was, on the
same trainer, with as many forwards and the same search for a learning rate: the likelihood of its trajectory, and the
estimate of diffu-GRPO (d1, arXiv 2504.12216), for which the prompt is masked in part, all of the completion is, and
each token is scored by itself. Runs share the cores, one each, and go on where they were killed.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import mean, stdev

import torch
from matplotlib.figure import Figure
from measuring import hardware
from parallel_runs import alone_in, parse_with_run, run_in_processes, settings_of
from reporting import argument_parser, table, write_results

from eso_lm.training_grpo import EsoGRPOTrainer, Rollouts

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import reasoning_tasks
import run_grpo
import run_pretraining

ESTIMATES = {"exact": "exact likelihood of the trajectory", "one_step": "one-step estimate of diffu-GRPO"}
MASKED_OF_PROMPT = 0.15
HELD_OUT = {"solved": "eval_rewards/sudoku_solved/mean", "cells": "eval_rewards/sudoku_cells/mean"}


class OneStepTrainer(EsoGRPOTrainer):
    """Scores a rollout as diffu-GRPO does: all of it from one forward that sees a part of the prompt."""

    def _get_per_token_logps_and_entropies(self, *arguments, **options):
        exact = self._rollouts
        self._rollouts = in_one_step(exact, self.policy.config.mask_token_id)
        try:
            return super()._get_per_token_logps_and_entropies(*arguments, **options)
        finally:
            self._rollouts = exact


def in_one_step(rollouts: Rollouts, mask_token_id: int) -> Rollouts:
    """The same rollouts with one group each, which a random part of the prompt has joined."""
    is_free = rollouts.decided(mask_token_id)
    is_given = rollouts.is_real.bool() & ~is_free & (rollouts.trajectories != mask_token_id)
    noise = torch.rand(is_given.shape, device=is_given.device)
    is_masked = (is_free | (is_given & (noise < MASKED_OF_PROMPT))).gather(1, rollouts.orders).long()
    moved = is_masked.argsort(dim=-1, stable=True)
    orders, groups = rollouts.orders.gather(1, moved), is_masked.gather(1, moved)
    return Rollouts(rollouts.trajectories, orders, groups, rollouts.is_real)


TRAINERS = {"exact": EsoGRPOTrainer, "one_step": OneStepTrainer}


def prepare(args: argparse.Namespace) -> None:
    """Writes the puzzles, and trains the supervised start."""
    task = reasoning_tasks.Arguments(
        "sudoku", str(args.work), holes=args.holes, num_held_out=args.num_held_out, seed=args.seed
    )
    reasoning_tasks.main(task)
    options = {
        "dataset": args.work / "examples.jsonl",
        "layout": "documents",
        "length": 24,
        "held_out_documents": 0,
        "preset": "tiny",
        "dropout": 0,
        "alpha_0": 1,
        "ema_decay": 0,
        "output_dir": args.work / "start",
        "max_steps": args.start_steps,
        "per_device_train_batch_size": 64,
        "learning_rate": 1e-3,
        "warmup_steps": 50,
        "save_steps": 500,
        "report_to": "none",
        "disable_tqdm": True,
    }
    run_pretraining.main(*run_pretraining.parse_args([f"--{name}={value}" for name, value in options.items()]))


def run(name: str, args: argparse.Namespace) -> None:
    """One of the runs, in this process: the start, or "exact:0.0001:2", an estimate, a learning rate and a seed."""
    if name == "start":
        return prepare(args)
    estimate, rate, seed = name.split(":")
    options = {
        "model": args.work / "start",
        "train_file": args.work / "train.jsonl",
        "held_out_file": args.work / "held_out.jsonl",
        "reward": "sudoku_cells,sudoku_solved",
        "begin_of_text": True,
        "max_completion_length": 0,
        "alpha_0": 1,
        "num_diffusion_steps": args.forwards,
        "output_dir": folder_of(name, args),
        "max_steps": args.steps,
        "learning_rate": rate,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": args.batch_size,
        "num_generations": args.num_generations,
        "eval_on_start": True,
        "eval_strategy": "steps",
        "eval_steps": args.evaluate_every,
        "per_device_eval_batch_size": args.num_held_out,
        "num_generations_eval": 1,
        "logging_steps": args.evaluate_every,
        "save_steps": 100,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": seed,
    }
    arguments = run_grpo.parse_args([f"--{name}={value}" for name, value in options.items()])
    run_grpo.main(*arguments, TRAINERS[estimate])


def folder_of(name: str, args: argparse.Namespace) -> Path:
    """Where the model of a run goes."""
    return args.work / name.replace(":", "_")


def history_of(name: str, args: argparse.Namespace) -> list[dict]:
    return json.loads((folder_of(name, args) / "metrics.json").read_text())


def curve(name: str, metric: str, args: argparse.Namespace) -> dict[int, float]:
    """A held-out metric of a run, by step."""
    return {row["step"]: row[HELD_OUT[metric]] for row in history_of(name, args) if HELD_OUT[metric] in row}


def collect(args: argparse.Namespace) -> dict:
    """Of each estimate: what the search found, and the curves of its best learning rate, of every seed."""
    found = {}
    for estimate in ESTIMATES:
        search = {f"{rate:g}": last(curve(f"{estimate}:{rate:g}:0", "solved", args)) for rate in args.rates}
        rate = best_rate(estimate, args)
        names = [f"{estimate}:{rate:g}:{seed}" for seed in range(1, args.seeds + 1)]
        rows = [row for name in names for row in history_of(name, args) if "step_time" in row]
        found[estimate] = {
            "search": search,
            "rate": rate,
            "seconds": mean(row["step_time"] for row in rows),
            "forwards": mean(row["rollouts/forwards"] for row in rows),
            **{metric: [curve(name, metric, args) for name in names] for metric in HELD_OUT},
        }
    return found


def last(values: dict[int, float]) -> float:
    """The value after the most steps."""
    return values[max(values)]


def best_rate(estimate: str, args: argparse.Namespace) -> float:
    """The learning rate that solved most puzzles at the end of its search."""
    return max(args.rates, key=lambda rate: last(curve(f"{estimate}:{rate:g}:0", "solved", args)))


def spread(values: list[float]) -> str:
    """Mean and standard deviation, in percent."""
    return f"{100 * mean(values):.1f}" + (f" ± {100 * stdev(values):.1f}" if len(values) > 1 else "")


def report(results: dict) -> str:
    """The results as Markdown."""
    settings, found = results["settings"], results["estimates"]
    starts = [spread([run["0"] for run in found["exact"][metric]]) for metric in HELD_OUT]
    rows = [f"supervised start | | {' | '.join(starts)} | "]
    for estimate, title in ESTIMATES.items():
        one = found[estimate]
        ends = [spread([last({int(step): value for step, value in run.items()}) for run in one[m]]) for m in HELD_OUT]
        rows.append(f"{title} | {one['rate']:g} | {' | '.join(ends)} | {one['seconds']:.2f}")
    searches = [
        f"{title} | " + " | ".join(f"{100 * value:.1f}" for value in found[estimate]["search"].values())
        for estimate, title in ESTIMATES.items()
    ]
    lines = [
        f"{settings['hardware']}; Sudoku of 4 x 4 with {settings['holes']} holes, rollouts of {settings['forwards']} "
        f"forwards, {settings['steps']} steps of {settings['batch_size']} rollouts, {settings['num_generations']} a "
        f"puzzle; {settings['num_held_out']} held-out puzzles; mean and standard deviation of {settings['seeds']} "
        f"seeds. `benchmarks/reinforcement.py`",
        "",
        *table("| learning rate | solved, % | holes right, % | seconds a step", rows),
        "",
        "The search for a learning rate, on another seed: held-out puzzles solved at its end, in percent.",
        "",
        *table("| " + " | ".join(found["exact"]["search"]), searches),
    ]
    return "\n".join(lines) + "\n"


def plot(results: dict, path: Path) -> None:
    """Held-out puzzles solved against steps: every seed thin, the mean thick, the start as a line."""
    figure = Figure(figsize=(6, 4.2))
    panel = figure.subplots()
    for color, (estimate, title) in zip(("C0", "C3"), ESTIMATES.items(), strict=True):
        runs = results["estimates"][estimate]["solved"]
        steps = sorted(map(int, runs[0]))
        values = [[100 * run[str(step)] for step in steps] for run in runs]
        for one in values:
            panel.plot(steps, one, color=color, alpha=0.3, linewidth=0.8)
        panel.plot(steps, [mean(column) for column in zip(*values, strict=True)], color=color, label=title)
    start = mean(run["0"] for run in results["estimates"]["exact"]["solved"])
    panel.axhline(100 * start, color="0.5", linestyle=":", label="supervised start")
    panel.set_xlabel(f"optimiser steps ({results['settings']['forwards'] + 1} forwards each)")
    panel.set_ylabel("held-out puzzles solved, %")
    panel.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, -0.18), ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(__doc__, "folder for reinforcement.json, .md and .png")
    parser.add_argument("--work", type=Path, default=Path("outputs/reinforcement"), help="folder of the runs")
    parser.add_argument("--holes", type=int, default=6)
    parser.add_argument("--forwards", type=int, default=3, help="of a rollout")
    parser.add_argument("--start_steps", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch_size", type=int, default=128, help="rollouts of a step")
    parser.add_argument("--num_generations", type=int, default=8, help="rollouts of a puzzle")
    parser.add_argument("--num_held_out", type=int, default=500)
    parser.add_argument("--evaluate_every", type=int, default=50)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 2e-4])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of the puzzles")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time")
    return parse_with_run(parser, arguments)


def main(args: argparse.Namespace) -> None:
    if args.run is not None:
        return run(args.run, args)
    command = [__file__, *args.command]

    def run_all(names: list[str], description: str) -> None:
        run_in_processes(command, names, is_complete, args.work / "logs", args.processes, description)

    def is_complete(name: str) -> bool:
        folder = folder_of(name, args)
        if not (folder / "model.safetensors").exists():
            return False
        return name == "start" or max(curve(name, "solved", args)) == args.steps

    with alone_in(args.work / "logs"):
        run_all(["start"], "The supervised start")
        run_all([f"{estimate}:{rate:g}:0" for rate in args.rates for estimate in ESTIMATES], "Learning rates")
        seeds = range(1, args.seeds + 1)
        run_all([f"{estimate}:{best_rate(estimate, args):g}:{s}" for s in seeds for estimate in ESTIMATES], "Seeds")
    results = {"settings": settings_of(args) | {"hardware": hardware("cpu")}, "estimates": collect(args)}
    results = json.loads(json.dumps(results))  # steps are names, as in the file
    write_results(args.output, "reinforcement", results, report(results))
    plot(results, args.output / "reinforcement.png")


if __name__ == "__main__":
    main(parse_args())
