"""The two tasks that come with run_grpo.py: their puzzles, their rewards, and what is in which file."""

import itertools
import json
import random

import pytest
import reasoning_tasks
from holes import fill_in_masks
from hypothesis import given, settings
from hypothesis import strategies as st
from reasoning_tasks import all_grids, countdown_solved, has_one_solution, make_puzzle, sudoku_cells, sudoku_solved
from text_data import train_tokenizer


def write(tmp_path, **changes):
    options = {"task": "sudoku", "num_examples": 30, "num_prompts": 40, "num_held_out": 20} | changes
    reasoning_tasks.main(reasoning_tasks.Arguments(output_dir=str(tmp_path), **options))
    names = ("examples", "train", "held_out")
    return [[json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()] for name in names]


def test_there_are_288_grids_and_they_are_right():
    grids = all_grids()
    assert len(set(grids)) == 288  # known of Sudoku of 4 x 4
    for grid in grids:
        rows = [grid[start : start + 4] for start in range(0, 16, 4)]
        columns = [grid[start::4] for start in range(4)]
        boxes = [grid[start : start + 2] + grid[start + 4 : start + 6] for start in (0, 2, 8, 10)]
        assert all(sorted(part) == list("1234") for part in rows + columns + boxes)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 287), st.integers(1, 16), st.integers(0, 10**6))
def test_a_puzzle_has_one_solution(number, holes, seed):
    grids = all_grids()
    puzzle = make_puzzle(grids[number], holes, random.Random(seed))
    fitting = [grid for grid in grids if all(cell in ("0", right) for cell, right in zip(puzzle, grid, strict=True))]
    assert fitting == [grids[number]]
    assert puzzle.count("0") <= holes
    if puzzle.count("0") < holes:  # every other hole would leave two
        more = [puzzle[:cell] + "0" + puzzle[cell + 1 :] for cell in range(16) if puzzle[cell] != "0"]
        assert not any(has_one_solution(other) for other in more)


def test_no_solution_and_several_are_told_from_one():
    grid = all_grids()[0]
    assert has_one_solution(grid)
    assert not has_one_solution("0" * 16)
    assert not has_one_solution("1" + grid[1:8] + "1" + "0" * 7)  # a column with two of them


def test_files_share_no_grid_and_prompts_have_a_hole_for_every_cell_that_is_missing(tmp_path):
    examples, train, held_out = write(tmp_path)
    parts = [
        {"".join(row["text"].split()) for row in examples},
        *({row["solution"] for row in rows} for rows in (train, held_out)),
    ]
    assert all(one.isdisjoint(other) for one, other in itertools.combinations(parts, 2))
    assert [len(examples), len(train), len(held_out)] == [30, 40, 20]
    tokenizer = train_tokenizer([row["text"] for row in examples], 300, 64)
    for row in train:
        prompt = tokenizer(fill_in_masks(row["prompt"], tokenizer.mask_token))["input_ids"]
        solved = tokenizer(reasoning_tasks.write_grid(row["solution"]))["input_ids"]
        assert len(prompt) == len(solved)
        different = [one for one, other in zip(prompt, solved, strict=True) if one != other]
        assert different == [tokenizer.mask_token_id] * row["puzzle"].count("0")
        assert row["puzzle"].count("0") == 6
    assert write(tmp_path)[1] == train
    assert write(tmp_path, seed=1)[1] != train


def test_rewards_of_a_sudoku():
    solution, puzzle = "1234341221434321", "0034341221434300"
    right = reasoning_tasks.write_grid(solution)
    half = reasoning_tasks.write_grid("2134341221434321")
    texts = [right, half, right + " 1", "", right.replace(" 3", "x", 1), right.replace(" ", "\n")]
    columns = {"puzzle": [puzzle] * 6, "solution": [solution] * 6}
    assert sudoku_cells(texts=texts, **columns) == [1.0, 0.5, 0.0, 0.0, 0.0, 1.0]
    assert sudoku_solved(texts=texts, **columns) == [1.0, 0.0, 0.0, 0.0, 0.0, 1.0]


def test_tasks_of_countdown_can_be_solved(tmp_path):
    examples, train, held_out = write(tmp_path, task="countdown")
    parts = [{tuple(row["numbers"]) for row in rows} for rows in (train, held_out)]
    assert parts[0].isdisjoint(parts[1])
    for row in train + held_out:
        assert row["prompt"].endswith(f" make {row['target']}:")
        assert sorted(map(int, row["prompt"].split()[:3])) == sorted(row["numbers"])
        assert eval(row["way"]) == row["target"]
        assert countdown_solved([row["way"]], [row["numbers"]], [row["target"]]) == [1.0]
    for row in examples:
        task, way = row["text"].split(":")
        assert eval(way) == int(task.split()[-1])
        assert tuple(sorted(map(int, task.split()[:3]))) not in parts[0] | parts[1]


@pytest.mark.parametrize(("completion", "reward"), [
    (" 2 * 3 + 5", 1.0), (" (3 + 5) * 2", 0.1), (" 5 - 3 - 2", 0.1), (" 2 * 3 + 5 + 0", 0.0), (" 2 * 3", 0.0),
    (" 2 * 3 + 5 = 11", 0.0), (" 2 ** 3 + 5", 0.0), ("", 0.0), ("23 - 5", 0.0), (" 5 + 2 * 3 )", 0.0), ("2 3 5", 0.0),
    ("(" * 40 + "2+3*5", 0.0), ("__import__('os')", 0.0), ("2 * 3 - - 5", 0.0), ("05 + 2 * 3", 0.0),
])  # fmt: skip
def test_rewards_of_countdown(completion, reward):
    assert countdown_solved([completion], [[2, 3, 5]], [11]) == [reward]


@pytest.mark.parametrize(("changes", "message"), [
    ({"task": "chess"}, r"`task` must be one of \['countdown', 'sudoku'\], got 'chess'"),
    ({"holes": 17}, r"`holes` must be in \[1, 16\], got 17"),
    ({"num_prompts": 0}, "`num_prompts` must be at least 1, got 0"),
])  # fmt: skip
def test_what_cannot_be_made_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path, **changes)
