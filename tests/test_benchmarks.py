"""The benchmarks run, at toy size, and their reports say what they measured."""

import json

import pytest
import speed
from tiny_models import random_batch, randomized_model


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
    for row in results["generate"]:
        assert 0 < row["low"] <= row["median"] <= row["high"]
    assert [(row["batch"], row["nfe"]) for row in results["steps"]] == [(1, 16), (1, 4), (8, 16), (8, 4)]
    assert 0 < results["peak_memory_gb"]["generation"] <= results["peak_memory_gb"]["training"]
    report = (tmp_path / "speed_cpu_float32.md").read_text()
    assert f"{results['settings']['parameters']:,} parameters" in report
    assert (tmp_path / "speed_cpu_float32.png").stat().st_size > 5000


def test_intervals_leave_out_the_prompt():
    """A generation of five forwards: the first holds the prompt, the four after it are timed."""
    model = randomized_model()
    clock = speed.Intervals(model, "cpu")
    model.generate(random_batch(model, 1, 4), max_new_tokens=5, alpha_0=0.0)
    intervals = clock.close()
    assert len(intervals) == 4
    assert all(interval > 0 for interval in intervals)
    assert not model._forward_pre_hooks


def test_summaries_are_medians_and_quartiles():
    assert speed.summary([3.0]) == {"median": 3.0, "low": 3.0, "high": 3.0}
    summary = speed.summary([float(value) for value in range(1, 8)])
    assert summary == {"median": 4.0, "low": pytest.approx(2.0), "high": pytest.approx(6.0)}
