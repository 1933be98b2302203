"""How benchmarks are asked, and what they leave: arguments, Markdown tables, files."""

import argparse
import json
import os
from collections.abc import Iterable
from pathlib import Path


def argument_parser(description: str, output: str) -> argparse.ArgumentParser:
    """A parser that explains a script by its own first lines; `--output` is the folder of its results."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help=output)
    return parser


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
