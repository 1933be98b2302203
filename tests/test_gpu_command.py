"""`make gpu`: its smallest setting runs here, without anything but torch, transformers and what comes with them."""

import json
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import device_checks
import gpu
import pytest
import torch

ROOT = Path(__file__).parents[1]

# Of site-packages, neither the package itself, which is a path there, nor what else is only for developers.
ON_A_BARE_MACHINE = """
import runpy, sys
site_packages, script, *arguments = sys.argv[1:]
sys.path.append(site_packages)
for name in ("datasets", "evaluate", "matplotlib", "pytest", "hypothesis", "torchao", "bitsandbytes", "lm_eval"):
    sys.modules[name] = None
sys.path.insert(0, script.rsplit("/", 1)[0])
sys.argv = [script, *arguments]
runpy.run_path(script, run_name="__main__")
"""


@pytest.mark.slow
def test_the_smallest_setting_runs_on_a_bare_machine(tmp_path):
    site_packages, script = sysconfig.get_paths()["purelib"], ROOT / "benchmarks" / "gpu.py"
    arguments = ["--device", "cpu", "--smoke", "--output", tmp_path / "out"]
    command = [sys.executable, "-I", "-S", "-c", ON_A_BARE_MACHINE, site_packages, script, *arguments]
    run = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr[-3000:]
    [path] = (tmp_path / "out").glob("gpu_*_bfloat16_smoke.json")
    results, report = json.loads(path.read_text()), path.with_suffix(".md").read_text()
    outcomes = {outcome["part"]: outcome["result"] for outcome in results["parts"]}
    assert outcomes.keys() >= device_checks.CHECKS.keys()
    left_out = {"FlexAttention, forward and backward", "flash attention 2", "static steps, FlexAttention"}
    assert {name for name, result in outcomes.items() if result != "passed"} == left_out
    assert {row["system"] for row in results["generate"]} >= {"Llama, static", "Eso-LM, 4 a step, static"}
    assert {(row["batch"], row["length"]) for row in results["lengths"]} == {(1, 32), (1, 64), (2, 32), (2, 64)}
    for name in ("training", "compiled_training"):
        assert results[name]["hybrid_tokens_per_second"] > 0
    for outcome in results["parts"]:
        assert outcome["part"] in report


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", device_checks.CHECKS)
def test_what_must_hold_on_a_gpu(name):
    try:
        device_checks.CHECKS[name](device_checks.Machine("cuda"))
    except device_checks.NotHereError as reason:
        pytest.skip(str(reason))


def test_a_part_that_fails_is_told_and_the_others_go_on(capsys):
    parts = gpu.Parts(minutes=1)

    def fail():
        raise RuntimeError("no\nkernel")

    def leave_out():
        raise device_checks.NotHereError("no second GPU")

    assert parts.run("first", fail) is None
    assert parts.run("second", leave_out) is None
    assert parts.run("third", lambda: 3) == 3
    assert [outcome["result"] for outcome in parts.outcomes] == [
        "FAILED: RuntimeError: no",
        "left out: no second GPU",
        "passed",
    ]
    assert "kernel" in parts.outcomes[0]["traceback"]
    assert parts.have_failed
    parts.deadline = time.monotonic() - 1
    assert parts.run("fourth", lambda: 4) is None
    assert parts.outcomes[-1]["result"] == "left out: the time was up"
    settings = {"hardware": "a card", "dtype": "bfloat16", "torch": "2", "transformers": "5"}
    report = gpu.report({"settings": settings, "peak_memory_gb": {}, "parts": parts.outcomes})
    assert "| first | FAILED: RuntimeError: no |" in report


@pytest.mark.parametrize(("value", "is_fine"), [(0.5, True), (1.0, True), (1.1, False), (float("nan"), False)])
def test_a_number_beyond_its_bound_fails_a_check(value, is_fine):
    if is_fine:
        assert device_checks.require("error", value, 1.0) == {"error": value}
    else:
        with pytest.raises(AssertionError, match="error is"):
            device_checks.require("error", value, 1.0)


def test_checks_fail_for_a_model_that_is_wrong(monkeypatch):
    """The check of the cache, of a cache that forgets; that of attention, of one whose gradients are off."""
    machine = device_checks.Machine("cpu")
    original = device_checks.random_model

    def wrong_model(machine, dtype=torch.float32, attention="sdpa"):
        model = original(machine, dtype, attention)
        if attention == "sdpa":
            model.model.layers[0].self_attn.scaling *= 1.1
        return model

    monkeypatch.setattr(device_checks, "random_model", wrong_model)
    with pytest.raises(AssertionError, match="error is"):
        device_checks.check_attention(machine, "sdpa")
    monkeypatch.setattr("eso_lm.generation_cache.PreallocatedLayer.get_seq_length", lambda self: 0)
    monkeypatch.setattr("eso_lm.modeling_decoding.DecodingStep.of", lambda backbone: None)
    with pytest.raises(AssertionError, match="error_nats is"):
        device_checks.check_cache(machine)


def test_a_machine_without_a_gpu_is_told_what_runs_there(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--device cpu --smoke"):
        gpu.main(gpu.parse_args(["--output", str(tmp_path)]))
    assert list(tmp_path.iterdir()) == []
