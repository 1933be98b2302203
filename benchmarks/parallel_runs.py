"""Runs of a benchmark in processes of their own, side by side, which end with the process that started them.

As a script, `parallel_runs.py SCRIPT ARGUMENTS`, it is such a process: it does what `python SCRIPT ARGUMENTS` does.
"""

import argparse
import os
import runpy
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm


def parse_with_run(parser: argparse.ArgumentParser, arguments: list[str] | None = None) -> argparse.Namespace:
    """Parses arguments, `--run NAME` among them; all but that one are noted for `run_in_processes`, as `command`."""
    parser.add_argument("--run", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    args.command = sys.argv[1:] if arguments is None else arguments
    return args


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments that say what is measured: neither where things lie, nor which run this is."""
    return {name: value for name, value in vars(args).items() if name not in ("run", "command", "output", "work")}


def run_in_processes(
    command: Sequence[str],
    names: Sequence[str],
    is_complete: Callable[[str], bool],
    logs: Path,
    processes: int,
    description: str = "Runs",
    threads: int = 1,
) -> None:
    """Starts a script with `--run NAME` added to its arguments, for each name that is not complete.

    Small models gain little from a second thread: so many runs on a core each take less time than one after the
    other on all of them. When this process is killed, in whatever way, its runs end too.

    The caller sees to it that nobody else works in the folder: `alone_in`.

    Args:
        command: The script and its arguments.
        names: Of the runs.
        is_complete: Whether the results of a run are there.
        logs: Folder for what the runs print.
        processes: Runs at a time.
        description: Of the progress bar.
        threads: Of each run.

    Raises:
        RuntimeError: when a run fails; the others of its time are run to their end.
    """
    running: set[subprocess.Popen] = set()

    def run(name: str) -> None:
        if is_complete(name):
            return
        log = logs / f"{name.replace(':', '_')}.log"
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        line = [sys.executable, __file__, *command, "--run", name]
        with log.open("w", encoding="utf-8") as file:
            options = {"stdin": subprocess.PIPE, "stdout": file, "stderr": subprocess.STDOUT, "env": environment}
            # Nothing is written to its standard input, which is closed when this process ends.
            with subprocess.Popen(line, **options) as process:
                running.add(process)
                status = process.wait()
                running.remove(process)
        if status != 0:
            raise RuntimeError(f"The run {name!r} failed: see {log}.")

    with ThreadPoolExecutor(processes) as pool:
        try:
            for _ in tqdm(pool.map(run, names), total=len(names), desc=description):
                pass
        except KeyboardInterrupt:
            for process in tuple(running):
                process.kill()
            raise


@contextmanager
def alone_in(logs: Path) -> Iterator[None]:
    """Holds the lock of a folder of logs, which is made if need be.

    Raises:
        ValueError: when another process holds it.
    """
    logs.mkdir(parents=True, exist_ok=True)
    lock = FileLock(logs / "lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"Another process runs benchmarks in {logs.parent}: wait for it, or choose a folder."
        ) from None
    try:
        yield
    finally:
        lock.release()


def end_with_parent() -> None:
    """Ends this process as soon as the one that started it is gone, and with it the other end of standard input."""

    def wait() -> None:
        os.read(sys.stdin.fileno(), 1)  # not `sys.stdin.read()`, whose lock Python's own end would wait for
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    end_with_parent()
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
