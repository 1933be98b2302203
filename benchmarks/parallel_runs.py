"""Runs of a benchmark in processes of their own, side by side, one thread each."""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm


def parse_with_run(parser: argparse.ArgumentParser, arguments: list[str] | None = None) -> argparse.Namespace:
    """Parses arguments, `--run NAME` among them; all but that one are noted for `run_in_processes`, as `command`."""
    parser.add_argument("--run", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    args.command = sys.argv[1:] if arguments is None else arguments
    return args


def run_in_processes(
    command: Sequence[str],
    names: Sequence[str],
    is_complete: Callable[[str], bool],
    logs: Path,
    processes: int,
    description: str = "Runs",
) -> None:
    """Starts a script with `--run NAME` added to its arguments, for each name that is not complete.

    Small models gain little from a second thread: so many runs on a core each take less time than one after the
    other on all of them.

    Args:
        command: The script and its arguments.
        names: Of the runs.
        is_complete: Whether the results of a run are there.
        logs: Folder for what the runs print.
        processes: Runs at a time.
        description: Of the progress bar.

    Raises:
        RuntimeError: when a run fails; the others of its time are run to their end.
    """
    logs.mkdir(parents=True, exist_ok=True)

    def run(name: str) -> None:
        if is_complete(name):
            return
        log = logs / f"{name.replace(':', '_')}.log"
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        line = [sys.executable, *command, "--run", name]
        with log.open("w", encoding="utf-8") as file:
            finished = subprocess.run(line, check=False, stdout=file, stderr=subprocess.STDOUT, env=environment)
        if finished.returncode != 0:
            raise RuntimeError(f"The run {name!r} failed: see {log}.")

    with ThreadPoolExecutor(processes) as pool:
        for _ in tqdm(pool.map(run, names), total=len(names), desc=description):
            pass
