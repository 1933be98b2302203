"""Two small tasks to be learned by reinforcement, with all they need: puzzles, solved examples and rewards.

python examples/reasoning_tasks.py --task sudoku --output_dir outputs/sudoku

Sudoku of 4 x 4 cells, as holes in a prompt: every puzzle has one solution, and no cell has to be filled in before
another. Countdown, as completions: an expression that uses the numbers given once each and comes to the target.

It writes `examples.jsonl` (a column `text`: solved, to begin with), `train.jsonl` and `held_out.jsonl` (prompts, and
what the rewards need to know). No grid, and no set of numbers, is in two of them.
"""

import ast
import json
import operator
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import permutations, product
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

SIDE = 4
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
LARGEST_TARGET = 50


@dataclass
class Arguments:
    """Which task, and how much of it."""

    task: str = field(metadata={"help": "sudoku or countdown"})
    output_dir: str = field(metadata={"help": "folder for the three files"})
    num_examples: int = field(default=2000, metadata={"help": "solved ones, to begin with"})
    num_prompts: int = field(default=2000, metadata={"help": "to train on"})
    num_held_out: int = field(default=200, metadata={"help": "prompts for evaluation"})
    holes: int = field(default=6, metadata={"help": "of a Sudoku, at most: fewer where one more has two solutions"})
    seed: int = 0


def main(arguments: Arguments) -> None:
    if arguments.task not in TASKS:
        raise ValueError(f"`task` must be one of {sorted(TASKS)}, got {arguments.task!r}.")
    for name in ("num_examples", "num_prompts", "num_held_out"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"`{name}` must be at least 1, got {getattr(arguments, name)}.")
    if not 1 <= arguments.holes <= SIDE**2:
        raise ValueError(f"`holes` must be in [1, {SIDE**2}], got {arguments.holes}.")
    examples, train, held_out = TASKS[arguments.task](arguments, random.Random(arguments.seed))
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("examples", examples), ("train", train), ("held_out", held_out)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        print(f"{folder / name}.jsonl: {len(rows)} rows")


def all_grids() -> list[str]:
    """The 288 Sudoku grids of 4 x 4 cells, row by row, as strings of 16 digits."""
    return sorted(solutions("0" * SIDE**2))


def solutions(puzzle: str) -> Iterator[str]:
    """All ways to fill in the zeros of a puzzle, by trying every digit that its row, column and box allow."""
    if "0" not in puzzle:
        yield puzzle
        return
    cell = puzzle.index("0")
    taken = {puzzle[other] for other in PEERS[cell]}
    for digit in "1234":
        if digit not in taken:
            yield from solutions(puzzle[:cell] + digit + puzzle[cell + 1 :])


def has_one_solution(puzzle: str) -> bool:
    found = solutions(puzzle)
    return next(found, None) is not None and next(found, None) is None


def make_puzzle(grid: str, holes: int, source: random.Random) -> str:
    """Takes out cells in random order, up to so many, as long as the grid is the only solution."""
    puzzle = grid
    for cell in source.sample(range(SIDE**2), SIDE**2):
        taken = puzzle[:cell] + "0" + puzzle[cell + 1 :]
        if puzzle.count("0") < holes and has_one_solution(taken):
            puzzle = taken
    return puzzle


def write_grid(cells: str) -> str:
    """A grid as text: a line a row, a space before each digit; a zero is a hole, of a token."""
    written = ["<mask:1>" if cell == "0" else f" {cell}" for cell in cells]
    return "\n".join("".join(written[start : start + SIDE]) for start in range(0, SIDE**2, SIDE)) + "\n"


def sudoku(arguments: Arguments, source: random.Random) -> tuple[list[dict], list[dict], list[dict]]:
    """Solved grids; puzzles to train on; puzzles for evaluation. Each of a third of the grids."""
    grids = all_grids()
    source.shuffle(grids)
    third = len(grids) // 3

    def puzzles(grids: list[str], count: int) -> list[dict]:
        pairs = [(make_puzzle(grid, arguments.holes, source), grid) for grid in source.choices(grids, k=count)]
        return [{"prompt": write_grid(puzzle), "puzzle": puzzle, "solution": grid} for puzzle, grid in pairs]

    examples = [{"text": write_grid(grid)} for grid in source.choices(grids[:third], k=arguments.num_examples)]
    train = puzzles(grids[third : 2 * third], arguments.num_prompts)
    return examples, train, puzzles(grids[2 * third :], arguments.num_held_out)


def sudoku_cells(texts: list[str], puzzle: list[str], solution: list[str], **columns: Any) -> list[float]:
    """The share of the holes that are filled in right; 0 for what is no grid any more."""
    rewards = []
    for text, given, right in zip(texts, puzzle, solution, strict=True):
        cells = text.split()
        holes = [cell for cell in range(SIDE**2) if given[cell] == "0"]
        hits = sum(cells[cell] == right[cell] for cell in holes) if len(cells) == SIDE**2 else 0
        rewards.append(hits / len(holes))
    return rewards


def sudoku_solved(texts: list[str], solution: list[str], **columns: Any) -> list[float]:
    """1 for the solution, 0 otherwise."""
    return [float("".join(text.split()) == right) for text, right in zip(texts, solution, strict=True)]


def countdown(arguments: Arguments, source: random.Random) -> tuple[list[dict], list[dict], list[dict]]:
    """Solved tasks; tasks to train on; tasks for evaluation. Each of a third of the sets of three numbers."""
    sets = [(a, b, c) for a, b, c in product(range(1, 10), repeat=3) if a < b < c]
    source.shuffle(sets)
    third = len(sets) // 3

    def tasks(sets: list[tuple[int, ...]], count: int) -> list[dict]:
        rows = []
        for numbers in source.choices(sets, k=count):
            value, expression = source.choice(targets(numbers))
            given = " ".join(map(str, source.sample(numbers, len(numbers))))
            rows.append(
                {"prompt": f"{given} make {value}:", "numbers": numbers, "target": value} | {"way": expression}
            )
        return rows

    examples = [{"text": f"{row['prompt']} {row['way']}"} for row in tasks(sets[:third], arguments.num_examples)]
    train, held_out = (
        tasks(sets[third : 2 * third], arguments.num_prompts),
        tasks(sets[2 * third :], arguments.num_held_out),
    )
    return examples, train, held_out


def targets(numbers: tuple[int, ...]) -> list[tuple[int, str]]:
    """Every number that the given ones can make, once each, with one of the ways to make it."""
    ways = {}
    for order in permutations(numbers):
        for signs in product(OPERATORS, repeat=len(numbers) - 1):
            expression = str(order[0]) + "".join(f" {sign} {n}" for sign, n in zip(signs, order[1:], strict=True))
            ways.setdefault(value_of(expression, list(numbers)), expression)
    return sorted((value, way) for value, way in ways.items() if value is not None and 0 < value <= LARGEST_TARGET)


def value_of(expression: str, numbers: list[int]) -> int | None:
    """What an expression comes to; None unless it is one that uses each of the numbers once."""
    used = re.findall(r"\d+", expression)
    if not re.fullmatch(r"[\d+\-*() ]{1,60}", expression) or sorted(used) != sorted(map(str, numbers)):
        return None
    try:
        return _evaluate(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ValueError):
        return None


def _evaluate(node: ast.AST) -> int:
    symbols = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*"}
    if isinstance(node, ast.BinOp) and type(node.op) in symbols:
        return OPERATORS[symbols[type(node.op)]](_evaluate(node.left), _evaluate(node.right))
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    raise ValueError("It holds something else than sums, differences and products.")


def countdown_solved(
    completions: list[str], numbers: list[list[int]], target: list[int], **columns: Any
) -> list[float]:
    """1 for an expression that comes to the target, 0.1 for one that uses the numbers once each, 0 otherwise."""
    values = [value_of(text, given) for text, given in zip(completions, numbers, strict=True)]
    return [
        0.0 if value is None else 1.0 if value == goal else 0.1 for value, goal in zip(values, target, strict=True)
    ]


def _peers(cell: int) -> list[int]:
    """The other cells of its row, column and box."""
    row, column = divmod(cell, SIDE)

    def box(row: int, column: int) -> tuple[int, int]:
        return row // 2, column // 2

    return [
        other
        for other in range(SIDE**2)
        if other != cell
        and (row == other // SIDE or column == other % SIDE or box(row, column) == box(*divmod(other, SIDE)))
    ]


PEERS = [_peers(cell) for cell in range(SIDE**2)]
TASKS = {"sudoku": sudoku, "countdown": countdown}
REWARDS = {function.__name__: function for function in (sudoku_cells, sudoku_solved, countdown_solved)}

if __name__ == "__main__":
    main(*HfArgumentParser(Arguments, description=__doc__).parse_args_into_dataclasses())
