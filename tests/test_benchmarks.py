"""The benchmarks run, at toy size, and their reports say what they measured."""

import json

import context_growth
import independent_rows
import lossless_speed
import measuring
import pytest
import quantization
import reinforcement
import scoring_cost
import serving
import speed
import step_split
import torch
import training_cost
from tiny_models import random_batch, randomized_model, save_with_tokenizer
from transformers import AutoModel


def test_speed_at_toy_size(tmp_path):
    sizes = ["--hidden-size", "32", "--num-layers", "1", "--num-heads", "2", "--vocab-size", "64"]
    shape = ["--lengths", "16", "32", "--contexts", "8", "--new-tokens", "8", "--tokens", "1", "4", "--repeats", "2"]
    shape += ["--step-length", "16", "--steps", "16", "4"]
    training = ["--train-rows", "4", "--train-length", "8", "--train-repeats", "1"]
    speed.main(speed.parse_args(["--output", str(tmp_path), *sizes, *shape, *training]))
    results = json.loads((tmp_path / "speed_cpu_float32.json").read_text())
    assert results["cache"]["ratio"] == 1
    assert {row["system"] for row in results["lengths"]} == {
        "Eso-LM",
        "AR",
        "masked diffusion",
        "block diffusion, 4",
        "block diffusion, 16",
    }
    assert {row["system"] for row in results["generate"]} == {
        "Llama",
        "Eso-LM, 1 a step",
        "Eso-LM, 4 a step",
        "Llama as Eso-LM, 1 a step",
        "Llama as Eso-LM, 4 a step",
    }
    for row in results["generate"]:
        assert 0 < row["low"] <= row["median"] <= row["high"]
    assert [(row["batch"], row["nfe"]) for row in results["steps"]] == [(1, 16), (1, 4), (8, 16), (8, 4)]
    assert 0 < results["peak_memory_gb"]["generation"] <= results["peak_memory_gb"]["training"]
    report = (tmp_path / "speed_cpu_float32.md").read_text()
    assert f"{results['settings']['parameters']:,} parameters" in report
    assert (tmp_path / "speed_cpu_float32.png").stat().st_size > 5000


@pytest.mark.slow
def test_training_costs_what_the_formulas_say(tmp_path):
    sizes = ["--presets", "tiny", "--lengths", "64", "--rows", "8", "--vocab-size", "512"]
    training_cost.main(training_cost.parse_args(["--output", str(tmp_path), "--predicted-lengths", "64", *sizes]))
    results = json.loads((tmp_path / "training_cost.json").read_text())
    assert [(row["alpha_0"], row["dtype"]) for row in results["rows"]] == [
        (1.0, "float32"),
        (0.25, "float32"),
        (1.0, "bfloat16"),
    ]
    for row in results["rows"]:
        assert row["measured_static_bytes"] == pytest.approx(row["expected_static_bytes"], rel=1e-3)
        assert row["measured_kept_bytes"] == pytest.approx(row["expected_kept_bytes"], rel=0.1)
        assert row["measured_flops"] == pytest.approx(row["expected_flops"], rel=0.02)
    assert [row["preset"] for row in results["predictions"]] == ["tiny", "tiny", "small", "small", "medium", "medium"]
    assert "| medium |" in (tmp_path / "training_cost.md").read_text()


def test_intervals_leave_out_the_prompt():
    """A generation of five forwards: the first holds the prompt, the four after it are timed."""
    model = randomized_model()
    clock = measuring.Intervals(model, "cpu")
    model.generate(random_batch(model, 1, 4), max_new_tokens=5, alpha_0=0.0)
    intervals = clock.close()
    assert len(intervals) == 4
    assert all(interval > 0 for interval in intervals)
    assert not model._forward_pre_hooks


def test_summaries_are_medians_and_quartiles():
    assert measuring.summary([3.0]) == {"median": 3.0, "low": 3.0, "high": 3.0}
    summary = measuring.summary([float(value) for value in range(1, 8)])
    assert summary == {"median": 4.0, "low": pytest.approx(2.5), "high": pytest.approx(5.5)}
    assert measuring.summary([1.0, 9.0]) == {"median": 5.0, "low": 3.0, "high": 7.0}, "within what was seen"


def test_lossless_at_toy_size(tmp_path):
    randomized_model().save_pretrained(tmp_path / "model")
    lossless_speed.main(
        lossless_speed.parse_args(
            f"--model {tmp_path / 'model'} --output {tmp_path} --lengths 12 --repeats 1 "
            "--orders strided random --alphas 1.0 0.5 --drafts 2 auto".split()
        )
    )
    rows = json.loads((tmp_path / "lossless.json").read_text())["rows"]
    assert len(rows) == 8
    for row in rows:
        assert 1 <= row["tokens_per_forward"] <= 12
        assert 0 <= row["accepted"] <= 1
        assert row["speedup"] > 0
    assert any(row["accepted"] > 0 for row in rows)  # "auto" may find that drafts do not pay
    assert (tmp_path / "lossless.md").read_text().count("\n") == 12
    assert (tmp_path / "lossless.png").stat().st_size > 5000


def test_steps_and_rows_at_toy_size(tmp_path):
    sizes = f"--output {tmp_path} --hidden-size 32 --num-layers 1 --num-heads 2 --vocab-size 64 --repeats 3"
    context_growth.main(context_growth.parse_args(f"{sizes} --contexts 8 16 --tokens 2".split()))
    results = json.loads((tmp_path / "context_growth.json").read_text())["results"]
    assert [row["context"] for row in results] == [8, 16]
    assert results[0]["growth_ms"] == results[0]["attention_growth_ms"] == 0
    assert all(row["against_reading"] == row["step_ms"] / row["read_ms"] for row in results)
    independent_rows.main(independent_rows.parse_args(f"{sizes} --batches 2 --length 8 --steps 2 4".split()))
    results = json.loads((tmp_path / "independent_rows.json").read_text())["results"]
    assert [(row["batch"], row["steps"]) for row in results] == [(2, 2), (2, 4)]
    for row in results:
        assert 0 < row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"]


def test_the_split_of_a_step_at_toy_size(tmp_path):
    sizes = f"--output {tmp_path} --hidden-size 32 --num-layers 1 --num-heads 2 --vocab-size 64 --repeats 3"
    step_split.main(step_split.parse_args(f"{sizes} --dtypes float32 --contexts 8 --batches 1 2".split()))
    rows = json.loads((tmp_path / "step_split.json").read_text())["results"]
    assert [row["batch"] for row in rows] == [1, 2]
    for row in rows:
        parts = [value for name, value in row.items() if name not in ("dtype", "batch", "context", "step")]
        assert sum(parts) == pytest.approx(row["step"])
        assert min(row[name] for name in step_split.GROUPS) > 0
    assert step_split.group_of("aten::_scaled_dot_product_flash_attention_for_cpu") == "attention"
    assert step_split.group_of("mkldnn::_linear_pointwise") == "products"
    assert step_split.group_of("aten::addcmul") == "other operators"


def test_quantised_models_at_toy_size(tmp_path):
    texts = [f"Return the size of file {number}." for number in range(20)]
    save_with_tokenizer(tmp_path / "model", texts, hidden_size=64, intermediate_size=128, cond_dim=32)
    model = AutoModel.from_pretrained(tmp_path / "model")
    model.resize_token_embeddings(pad_to_multiple_of=16)
    model.save_pretrained(tmp_path / "model")
    rows = [json.dumps({"text": text}) for text in texts]
    (tmp_path / "model" / "held_out.jsonl").write_text("\n".join(rows) + "\n")
    sizes = "--hidden-size 128 --num-layers 1 --num-heads 2 --vocab-size 64 --repeats 2 --length 16 --texts 4"
    arguments = f"--model {tmp_path / 'model'} --output {tmp_path} --batches 1 {sizes}".split()
    quantization.main(quantization.parse_args(arguments))
    results = json.loads((tmp_path / "quantization.json").read_text())
    assert [(row["bits"], row["batch"]) for row in results["steps"]] == [(16, 1), (8, 1), (4, 1)]
    assert [row["bits"] for row in results["loss"]] == [16, 8, 4]
    assert results["loss"][0]["more"] == 0 < abs(results["loss"][1]["more"]) < abs(results["loss"][2]["more"])
    assert (tmp_path / "quantization.md").read_text().count("\n") == 7


@pytest.mark.slow
def test_serving_at_toy_size(tmp_path):
    sizes = "--hidden-size 32 --num-layers 2 --num-heads 2 --vocab-size 64 --longest 24 --repeats 2 --warm-up 1"
    arguments = f"--output {tmp_path} --at-a-time 1 3 --turns 1 --least-requests 2 {sizes}".split()
    serving.main(serving.parse_args(arguments))
    results = json.loads((tmp_path / "serving.json").read_text())
    systems = ["continuous", "static", "static, own lengths"]
    expected = [("Llama, continuous", 1), *((system, tokens) for tokens in (1, 4) for system in systems)]
    assert [(row["system"], row["tokens_a_forward"]) for row in results["serving"]] == expected * 2
    assert [row["requests"] for row in results["serving"]] == [2] * 7 + [3] * 7
    for row in results["serving"]:
        assert row["tokens_a_second"] > 0
        assert row["p50"] <= row["p95"]
    slots = {row["layout"]: row["slots"] for row in results["layouts"]}
    assert slots["one piece"] <= slots["pages of 16"] < slots["one piece"] + 3 * 16
    assert slots["pages of 256"] == 3 * 256
    assert slots["rows"] >= slots["one piece"]
    assert (tmp_path / "serving.md").read_text().count("\n") == 25


@pytest.mark.slow
def test_scoring_at_toy_size(tmp_path):
    sizes = "--lengths 8 24 --hidden-size 32 --num-layers 1 --num-heads 2 --vocab-size 64"
    scoring_cost.main(scoring_cost.parse_args(f"--output {tmp_path} {sizes}".split()))
    rows = json.loads((tmp_path / "scoring_cost.json").read_text())["results"]
    assert [row["length"] for row in rows] == [8] * 6 + [24] * 6
    for row in rows:
        assert row["seconds"] > 0
        assert row["gigabytes"] >= 0
    sampled_in = {row["way"]: row["sampled_in"] for row in rows if row["length"] == 24}
    assert sampled_in["one token a forward"] == sampled_in["one token a forward, in chunks"] == 24
    assert sampled_in["16 steps"] == sampled_in["16 steps, in chunks"] == 16
    assert sampled_in["entropy bound of 64 nats"] < 16
    assert (tmp_path / "scoring_cost.md").read_text().count("\n") == 16


@pytest.mark.slow
def test_reinforcement_at_toy_size(tmp_path):
    sizes = [
        "--start_steps",
        "3",
        "--steps",
        "2",
        "--batch_size",
        "8",
        "--num_held_out",
        "10",
        "--evaluate_every",
        "1",
    ]
    folders = ["--work", str(tmp_path / "work"), "--output", str(tmp_path)]
    reinforcement.main(reinforcement.parse_args([*folders, *sizes, "--seeds", "1", "--rates", "1e-4"]))
    results = json.loads((tmp_path / "reinforcement.json").read_text())
    for found in results["estimates"].values():
        assert [run.keys() for run in found["solved"]] == [{"0": 0, "1": 0, "2": 0}.keys()]
        assert found["search"].keys() == {"0.0001"}
        assert found["forwards"] <= 3
    starts = [found["solved"][0]["0"] for found in results["estimates"].values()]
    assert starts[0] == starts[1]
    assert "supervised start" in (tmp_path / "reinforcement.md").read_text()
    assert (tmp_path / "reinforcement.png").stat().st_size > 5000
    assert str(tmp_path) not in (tmp_path / "reinforcement.json").read_text()


def test_the_one_step_estimate_sees_a_part_of_the_prompt_and_none_of_the_completion():
    torch.manual_seed(0)
    rows, mask = 400, 9
    orders = torch.rand(rows, 12).argsort(dim=-1)
    # Of the slots 4 are given, 6 decided in groups, and 2 never were; a column of padding is among those given.
    groups = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 3, 4, 5, 6]).expand(rows, -1)
    trajectories = torch.zeros(rows, 12, dtype=torch.long).scatter(1, orders[:, 10:], mask)
    is_real = torch.ones(rows, 12, dtype=torch.long).scatter(1, orders[:, :1], 0)
    exact = reinforcement.Rollouts(trajectories, orders, groups, is_real)
    one = reinforcement.in_one_step(exact, mask)
    assert torch.equal(one.orders.sort(dim=-1).values, torch.arange(12).expand(rows, -1))
    group_of_column = torch.zeros_like(one.groups).scatter(1, one.orders, one.groups)
    assert set(group_of_column.flatten().tolist()) == {0, 1}
    assert (group_of_column.gather(1, orders[:, 4:10]) == 1).all()
    assert (group_of_column.gather(1, orders[:, [0, 10, 11]]) == 0).all()
    assert abs((group_of_column.gather(1, orders[:, 1:4]) == 1).float().mean() - 0.15) < 0.04
    assert (one.groups.diff(dim=-1) >= 0).all()
