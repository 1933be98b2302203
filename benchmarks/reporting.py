"""How benchmarks are asked, and what they leave: arguments, Markdown tables, files."""

import argparse
import json
import os
from collections.abc import Iterable
from pathlib import Path


def argument_parser(description: str, output: str) -> argparse.ArgumentParser:
    """A parser that explains a script by its own first lines; `--output` is the folder of its results."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=folder, default=Path("benchmarks/results"), help=output)
    return parser


def folder(text: str) -> Path:
    """The type of an argument: a folder that is there, or that can be made."""
    path = Path(text)
    there = next(some for some in (path, *path.absolute().parents) if some.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise argparse.ArgumentTypeError(f"must be a folder that can be written to, got {text!r}")
    return path


def positive(text: str) -> int:
    """The type of an argument: 1, 2, ..."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def table(header: str, rows: Iterable[str]) -> list[str]:
    """The lines of a Markdown table, from lines of cells with " | " between them."""
    rule = " | ".join(["---"] * (header.count("|") + 1))
    return [f"| {line} |" for line in (header, rule, *rows)]


def write_results(folder: Path, name: str, results: dict, report: str | None = None) -> None:
    """Writes results, in which paths are the only objects, as JSON; the report as Markdown, and to the terminal."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(results, indent=1, default=os.fspath) + "\n")
    if report is not None:
        (folder / f"{name}.md").write_text(report)
        print(report)
