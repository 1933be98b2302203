"""examples/run_generation.py: prompts from everywhere, records that do not depend on how the work is shared out."""

import json
from pathlib import Path

import pytest
import torch
from holes import fill_in_masks
from run_generation import Arguments, LiveView, main, read_prompts
from text_data import train_tokenizer
from tiny_models import save_with_tokenizer
from transformers import HfArgumentParser
from two_processes import EXAMPLES, run_on_two_processes


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A saved model with a tokenizer."""
    path = tmp_path_factory.mktemp("model")
    save_with_tokenizer(path)
    return path


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_samples_are_the_same_in_one_process_and_in_two(folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("The quick\n\nover <mask:3> dog\nThe\n")
    arguments = {"model": str(folder), "prompts": tmp_path / "prompts.txt", "max_new_tokens": 6, "num_samples": 2}
    main(Arguments(output=tmp_path / "one.jsonl", batch_size=3, **arguments))
    command = [f"--{name}={value}" for name, value in arguments.items()]
    command += ["--output", tmp_path / "two.jsonl", "--batch_size", "2"]
    finished = run_on_two_processes(EXAMPLES / "run_generation.py", *command)
    assert "Batches: 100%|██████████| 2/2" in finished.stderr, "8 samples in rounds of two batches of 2"
    one, two = records(tmp_path / "one.jsonl"), records(tmp_path / "two.jsonl")
    assert [record["sample"] for record in two] == list(range(8))
    assert [record["text"] for record in two] == [record["text"] for record in one]
    assert [record["log_prob"] for record in two] == pytest.approx([record["log_prob"] for record in one], abs=1e-2)
    assert one[0]["text"] != one[1]["text"], "samples of a prompt differ"
    assert one[0]["text"].startswith("The quick")
    assert one[4]["text"].startswith("over ")
    assert " dog" in one[4]["text"]


def test_resuming_completes_the_file(folder, tmp_path):
    output = tmp_path / "samples.jsonl"
    arguments = {"model": str(folder), "output": output, "num_samples": 5, "batch_size": 2, "max_new_tokens": 4}
    main(Arguments(**arguments))
    complete = records(output)
    lines = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:2]) + lines[2][:20])  # killed while it wrote the third
    with pytest.raises(ValueError, match="exists: name another file"):
        Arguments(**arguments)
    with pytest.raises(ValueError, match="holds samples of other prompts"):
        main(Arguments(resume=True, **arguments | {"prompt": "The"}))
    main(Arguments(resume=True, **arguments))
    assert [record["text"] for record in records(output)] == [record["text"] for record in complete]


def test_prompts_come_from_jsonl_and_texts_go_to_the_terminal(folder, tmp_path, capsys):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "The"}\n{"prompt": "fox <mask:2>"}\n')
    main(Arguments(model=str(folder), prompts=tmp_path / "prompts.jsonl", max_new_tokens=0, confidence_threshold=0.1))
    shown = capsys.readouterr().out
    assert "--- 0 (0 forwards) ---\nThe\n" in shown
    assert "\nfox " in shown
    (tmp_path / "prompts.jsonl").write_text('{"text": "The"}\n')
    with pytest.raises(ValueError, match="in the field `prompt`"):
        main(Arguments(model=str(folder), prompts=tmp_path / "prompts.jsonl"))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "The\u2028quick"}\n', encoding="utf-8")
    assert read_prompts(Arguments(model="m", prompts=tmp_path / "prompts.jsonl")) == ["The\u2028quick"]
    (tmp_path / "prompts.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds no prompts"):
        read_prompts(Arguments(model="m", prompts=tmp_path / "prompts.jsonl"))


@pytest.mark.parametrize("draft_length", ["4", "auto"])
def test_lossless_from_the_command_line(folder, tmp_path, draft_length):
    command = ["--model", str(folder), "--lossless", "true", "--draft_length", draft_length, "--num_samples", "3"]
    command += ["--alpha_0", "1", "--max_new_tokens", "16", "--output", str(tmp_path / "samples.jsonl")]
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses(command))
    written = records(tmp_path / "samples.jsonl")
    assert all(record["num_function_evaluations"] <= 16 and record["log_prob"] < 0 for record in written)
    assert any(record["num_function_evaluations"] < 16 for record in written)


def test_live_view_draws_masks_as_dots(folder, capsys):
    main(Arguments(model=str(folder), prompt="The <mask:2> fox", live=True, max_new_tokens=0))
    drawings = capsys.readouterr().out.split("\033[J")
    assert any(drawing.count("·") == 2 for drawing in drawings)
    assert "·" not in drawings[-1]
    assert drawings[-1].startswith("The ")


def test_live_view_goes_back_over_all_lines(monkeypatch):
    written = []

    class Stream:
        write = written.append

        def flush(self):
            pass

    monkeypatch.setenv("COLUMNS", "20")
    tokenizer = train_tokenizer(["a\nb\nc " * 20], 300, 64)
    view = LiveView(tokenizer, Stream())
    view.put(torch.tensor(tokenizer("a\nb\n")["input_ids"]))
    view.put_draft(torch.tensor(tokenizer("c")["input_ids"]))
    assert written[0].startswith("\r\033[J")
    assert written[1].startswith("\033[2F\033[J")
    view.put_draft(torch.tensor(tokenizer(50 * "c")["input_ids"]))
    view.put_draft(torch.tensor(tokenizer("c")["input_ids"]))
    assert written[3].startswith("\033[4F\033[J"), "50 characters take three rows of 20"


def test_holes_become_masks():
    assert fill_in_masks("a <mask:2> b<mask:1>", "[M]") == "a [M][M] b[M]"
    with pytest.raises(ValueError, match="no mask token"):
        fill_in_masks("a <mask:2>", None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": "a", "prompts": Path("b")}, "exclude each other"),
        ({"num_samples": 0}, "`--num_samples` must be at least 1, got 0"),
        ({"resume": True}, "`--resume` needs `--output`"),
        ({"seed": 2**31}, r"`--seed` must be in \[0, 2147483647\]"),
    ],
)
def test_arguments_that_contradict_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Arguments(model="m", **arguments)
