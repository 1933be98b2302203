"""The reproduction: objectives that are what they claim, a sane yardstick, and the whole of it at toy scale."""

import itertools
import json
import math
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import adaptation
import parallel_runs
import plateau
import pytest
import reproduce
import reproduction_runs
import torch
import torch.nn.functional as F
from baselines import AutoregressiveSampler, BlockDiffusionSampler, MaskedDiffusionSampler, filled_cache
from filelock import FileLock, Timeout
from hypothesis import given, settings
from hypothesis import strategies as st
from likelihoods import frontier
from ngram import KneserNey
from objectives import Autoregressive, BlockDiffusion, Esoteric, MaskedDiffusion, add_noise
from parallel_runs import alone_in, run_in_processes
from reproduction_figures import COLORS, looks_of, plot_budgets
from reproduction_report import averaged, budgets_table, samplers_table
from reproduction_systems import ALL_MASKED, CARRYING, PLATEAU, RECIPES, SCALES, WITH_HEAD, samplers, settings_of
from text_data import without_overlap
from tiny_models import random_batch, randomized_model

from eso_lm import DataCollatorForHybridMaskedDiffusion, EsoForMaskedDiffusion
from eso_lm.generation_order import UNMASKING_ORDERS

MASK = 23


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def test_the_autoregressive_loss_is_that_of_its_sampler():
    model, text = randomized_model(), random_batch(randomized_model(), 2, 6)
    sampler, cache = AutoregressiveSampler(model, start_token_id=3), filled_cache(model, 2, 7, 0)
    expected = torch.zeros(2)
    previous = torch.full((2, 1), 3)
    for place in range(6):
        log_probs = sampler.forward(previous, place, cache).log_softmax(dim=-1)
        previous = text[:, place : place + 1]
        expected -= log_probs.gather(1, previous)[:, 0] / 6
    torch.testing.assert_close(Autoregressive(3)(model, text), expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_the_masked_loss_is_that_of_its_sampler():
    model, text = randomized_model(), random_batch(randomized_model(), 4, 6)
    losses = MaskedDiffusion()(model, text, seeded())
    offset = torch.rand((), dtype=torch.float64, generator=(generator := seeded()))
    times = 1e-3 + (1 - 1e-3) * ((offset + torch.arange(4)) / 4 % 1)
    masked = torch.rand(4, 6, dtype=torch.float64, generator=generator) >= 1 - (1 - 1e-3) * times[:, None]
    logits = MaskedDiffusionSampler(model).forward(text.masked_fill(masked, MASK))
    cross_entropy = F.cross_entropy(logits.transpose(1, 2), text, reduction="none")
    expected = (cross_entropy * masked).sum(dim=1) / times / 6
    torch.testing.assert_close(losses, expected.float(), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_masked_diffusion_from_left_to_right_by_hand():
    """Of each token: a pass over what stands to its left, and masks."""
    model, text = randomized_model(), random_batch(randomized_model(), 2, 6)
    expected = torch.zeros(2)
    for place in range(6):
        known = torch.cat([text[:, :place], torch.full((2, 6 - place), MASK)], dim=1)
        log_probs = MaskedDiffusionSampler(model).forward(known)[:, place].log_softmax(dim=-1)
        expected -= log_probs[range(2), text[:, place]] / 6
    plan = {"num_steps": "max", "unmasking_order": "left_to_right"}
    log_likelihood, forwards = MaskedDiffusionSampler(model).log_likelihood(text, **plan)
    torch.testing.assert_close(-log_likelihood.float() / 6, expected, atol=1e-5, rtol=0)
    assert forwards == 6


@torch.no_grad()
@pytest.mark.parametrize("block_length", [1, 2, 3, 6])
def test_block_diffusion_sees_what_its_sampler_sees(block_length):
    """Both streams side by side equal the passes of the sampler, block by block on a cache."""
    model, text = randomized_model(), random_batch(randomized_model(), 3, 6)
    noisy, _ = add_noise(text, torch.full((3, 6), 0.5), MASK, seeded())
    logits = model.compute_logits(BlockDiffusion(block_length).states(model, text, noisy))
    sampler, cache = BlockDiffusionSampler(model, block_length), filled_cache(model, 3, 6, 0)
    for first in range(0, 6, block_length):
        block = slice(first, first + block_length)
        expected = sampler.forward(noisy[:, block], first, cache)
        torch.testing.assert_close(logits[:, block], expected, atol=1e-4, rtol=0)
        sampler.forward(text[:, block], first, cache, places=1)


@torch.no_grad()
def test_blocks_of_one_token_average_to_the_exact_loss():
    model, text = randomized_model(), random_batch(randomized_model(), 1, 4)
    generator = seeded()
    mean = BlockDiffusion(1)(model, text.expand(4000, 4), generator).mean()
    logits = model.compute_logits(BlockDiffusion(1).states(model, text, torch.full_like(text, MASK)))
    assert mean == pytest.approx(F.cross_entropy(logits[0], text[0]).item(), rel=0.02)
    with pytest.raises(ValueError, match="multiple of 3"):
        BlockDiffusion(3)(model, text)


def test_the_esoteric_loss_is_that_of_the_collator():
    model, text = randomized_model(), random_batch(randomized_model(), 4, 6)
    torch.manual_seed(5)
    loss = Esoteric(0.25, MASK)(model, text)
    torch.manual_seed(5)
    collator = DataCollatorForHybridMaskedDiffusion(mask_token_id=MASK, alpha_0=0.25)
    expected = model(**collator([{"input_ids": row} for row in text.tolist()])).loss
    assert loss.mean().item() == pytest.approx(expected.item(), rel=1e-5)


@settings(deadline=None, max_examples=30)
@given(
    texts=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=8), min_size=1, max_size=5),
    order=st.integers(1, 4),
    context=st.lists(st.integers(0, 4), max_size=5),
)
def test_ngram_probabilities_add_up_to_one(texts, order, context):
    model = KneserNey(texts, order, vocab_size=5)
    probabilities = [model.probability(token, tuple(context)) for token in range(5)]
    assert sum(probabilities) == pytest.approx(1)
    assert min(probabilities) > 0


def test_ngrams_by_hand():
    """Texts 0 1 and 0 2: after 0 there are two tokens, once each; below, 1 and 2 each follow one token, 0 begins."""
    model = KneserNey([[0, 1], [0, 2]], order=2, vocab_size=4, discount=0.5)
    unigram = (1 - 0.5) / 4 + 0.5 * 3 / 4 / 4  # counts 2 (0 at the beginnings), 1, 1
    assert model.probability(1, ()) == pytest.approx(unigram)
    assert model.probability(1, (0,)) == pytest.approx((1 - 0.5) / 2 + 0.5 * 2 / 2 * unigram)
    assert model.loss([[0, 1]])[0] == pytest.approx(
        -(math.log(model.probability(0, ())) + math.log(model.probability(1, (0,)))) / 2
    )
    with pytest.raises(ValueError, match="`order`"):
        KneserNey([[0]], 0, 4)


@given(
    held_out=st.lists(st.lists(st.sampled_from("abc"), max_size=6).map(" ".join), max_size=3),
    documents=st.lists(st.lists(st.lists(st.sampled_from("abcd"), max_size=6).map(" ".join), max_size=3), max_size=3),
)
def test_nothing_that_is_trained_on_is_held_out(held_out, documents):
    def is_clean(paragraph: str) -> bool:
        words = paragraph.split()
        return not any(
            f" {' '.join(words[i : i + 3])} " in f" {text} " for text in held_out for i in range(len(words) - 2)
        )

    expected = ["\n".join(filter(is_clean, paragraphs)) for paragraphs in documents]
    found = without_overlap(["\n".join(paragraphs) for paragraphs in documents], held_out, num_words=3)
    assert found == [document for document in expected if document]


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 5)), min_size=1, max_size=8))
def test_the_best_by_budget_falls_and_nothing_beats_it(pairs):
    points = [{"forwards": forwards, "nats_per_token": loss} for forwards, loss in pairs]
    best = [(point["forwards"], point["nats_per_token"]) for point in frontier(points)]
    for (fewer, worse), (more, better) in itertools.pairwise(best):
        assert fewer < more
        assert worse > better
    for forwards, loss in pairs:
        assert min(other for cost, other in best if cost <= forwards) <= loss


def scored(name: str, model: EsoForMaskedDiffusion, text: torch.LongTensor) -> list[tuple[dict, float, float]]:
    """Every setting of a system at the smoke scale, exact nats per token of a text, and the mean of its forwards."""
    found = []
    for setting, _, score in samplers(name, model, 3, SCALES["smoke"]):
        torch.manual_seed(0)
        nats, forwards = score(text)
        found.append((setting, nats.mean().item() / text.shape[1], forwards.mean().item()))
    return found


def test_samplers_of_the_baselines_are_scored_exactly():
    model = randomized_model(scale=0.2)
    text = random_batch(model, 16, 16)
    ((_, nats, forwards),) = scored("ar", model, text)
    with torch.no_grad():
        assert nats == pytest.approx(Autoregressive(3)(model, text).mean().item(), abs=1e-4)
    assert forwards == 16
    masked, blocks = (
        {
            (setting["num_steps"], setting["unmasking_order"]): forwards
            for setting, _, forwards in scored(name, model, text)
        }
        for name in ("mdm", "bd4")
    )
    assert masked.keys() == set(itertools.product([4, "max"], UNMASKING_ORDERS))
    assert 1 <= masked[4, "random"] <= 4 < masked["max", "random"] == 16
    assert masked[4, "strided"] == 4
    assert blocks.keys() == set(itertools.product([1, 2, 4, "max"], UNMASKING_ORDERS))
    assert blocks[1, "random"] == 4 + 3, "a forward a block, and one to cache each but the last"
    assert blocks["max", "left_to_right"] == 16 + 3


@pytest.mark.parametrize("name", ["mdm", "eso_1", "eso_0", "eso_0.25+head"])
def test_systems_take_the_same_steps_in_the_same_orders(name):
    """So that what differs is what they know, and not how they are asked."""
    found = [
        (setting.get("num_steps", setting.get("num_diffusion_steps")), setting["unmasking_order"])
        for setting in settings_of(name, SCALES["hours"])
        if {"lossless", "entropy_bound"}.isdisjoint(setting) and setting.get("alpha_0") in (None, 0.0, 1.0)
    ]
    assert sorted(found, key=str) == sorted(
        itertools.product([4, 8, 16, 32, 64, 128, "max"], UNMASKING_ORDERS), key=str
    )


@pytest.mark.parametrize("name", reproduce.systems())
def test_every_sampler_writes_what_it_scores(name):
    model = randomized_model(scale=0.2)
    for setting, sample, _ in samplers(name, model, 3, SCALES["smoke"]):
        texts = sample(3)
        assert texts.shape == (3, 16), setting
        assert not (texts == MASK).any(), setting


def point(system: str, setting: dict, forwards: float, nats: float, **others: Any) -> dict:
    """A point of results, of one seed unless told."""
    values = {"standard_error": 0.01, "ms_at_1": forwards, "ms_at_16": forwards / 2, "judge_nats": nats + 1}
    values |= {"judge_standard_error": 0.1, "entropy": 4.0, "mauve": 0.5, "seed": 0}
    return {"system": system, "setting": setting, "forwards": forwards, "nats_per_token": nats} | values | others


STRIDED = {"alpha_0": 1.0, "unmasking_order": "strided"}
POINTS = [
    point("ar", {}, 16.0, 3.0),
    point("ar", {}, 16.0, 3.2, seed=1),
    point("mdm", {"num_steps": 4, "unmasking_order": "random"}, 3.5, 6.0),
    point("mdm", {"num_steps": 16, "unmasking_order": "random"}, 10.5, 5.0),
    point("mdm", {"num_steps": "max", "unmasking_order": "left_to_right"}, 16.0, 4.8),
    point("eso_1", STRIDED | {"num_diffusion_steps": 4}, 4.0, 5.5),
    point("eso_1", STRIDED | {"lossless": True}, 8.0, 4.5),
    point("eso_0+head", STRIDED | {"entropy_bound": 4.0}, 6.0, 5.25),
]
SETTINGS = {
    "settings": {"diffusion_steps": (4, 8), "length": 16},
    "points": POINTS,
    "ngram": {"1": 6.5},
}


def test_seeds_are_one_point_and_what_they_differ_by():
    (both, *others) = averaged(POINTS)
    assert (both["nats_per_token"], both["spread"]) == (pytest.approx(3.1), pytest.approx(0.2))
    assert len(others) == 6
    assert {point["spread"] for point in others} == {0}
    lines = "\n".join(samplers_table(SETTINGS))
    assert "AR | left to right | 16.0 | 16.0 | 8.0 | 3.100 ± 0.100" in lines
    assert "masked diffusion | 4 steps, random | 3.5" in lines
    assert "masked diffusion | one token a forward, left to right | 16.0" in lines


def test_the_table_of_budgets_tells_the_best_of_each():
    for line in (
        "| exact nats per token, forwards | ≤ 4 | ≤ 8 | ≤ 16 | any |",
        "| AR |  |  | **3.10** | **3.10** |",
        "| masked diffusion | 6.00 | 6.00 | 4.80 | 4.80 |",
        "| Eso-LM, α₀ = 1 | **5.50** | **4.50** | 4.50 | 4.50 |",
        "| Eso-LM, α₀ = 0, draft head |  | 5.25 | 5.25 | 5.25 |",
    ):
        assert line in budgets_table(SETTINGS)


def test_every_system_has_a_colour_of_its_own_in_every_picture():
    assert len(set(COLORS.values())) == len(reproduce.systems())
    for name, color in COLORS.items():
        assert looks_of(f"{name}+head")["color"] == looks_of(name)["color"] == color
    assert looks_of("eso_0+head")["linestyle"] != looks_of("eso_0")["linestyle"]


def test_a_legend_covers_no_point():
    figure = plot_budgets(SETTINGS)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    for panel in figure.axes:
        assert panel.get_window_extent().x1 < box.x0
        assert [line.get_label() for line in panel.lines] == [
            "AR",
            "masked diffusion",
            "Eso-LM, α₀ = 1",
            "Eso-LM, α₀ = 0, draft head",
        ]


@pytest.fixture
def in_this_process(monkeypatch):
    """Runs of a benchmark, which `module` starts, follow one another in this process; they are listed."""
    started = []

    def patch(module, benchmark):
        def run_all(command, names, is_complete, *args, **kwargs):
            for name in names:
                if not is_complete(name):
                    started.append(name)
                    benchmark.main(benchmark.parse_args([*command[1:], "--run", name]))

        monkeypatch.setattr(module, "run_in_processes", run_all)
        return started

    return patch


@pytest.mark.slow
def test_the_reproduction_runs_and_is_not_repeated(in_this_process, tmp_path):
    started = in_this_process(reproduction_runs, reproduce)
    arguments = ["--scale", "smoke", "--output", str(tmp_path / "results"), "--work", str(tmp_path / "work")]
    reproduce.main(reproduce.parse_args(arguments))
    names = reproduce.systems()
    kinds = Counter(name.split(":")[0] for name in started)
    seeds = len(names) + len(CARRYING) + len(WITH_HEAD) + 1  # the head of 0.25, which carries claims, has two, too
    assert kinds == {
        "tune": len(names) * len(RECIPES),
        "control": len(ALL_MASKED),
        "train": seeds + 1,
        "measure": seeds,
        "time": 1,
    }
    results = json.loads((tmp_path / "results" / "reproduction.json").read_text())
    assert results["likelihood"].keys() == names.keys()
    uniform = math.log(300)
    for name, records in results["likelihood"].items():
        assert len(records) == (2 if name in CARRYING else 1)
        values = [value["mean"] for record in records for value in record.values()]
        assert all(abs(value - uniform) < 1.2 for value in values), (name, records)
    assert results["ngram"]["5"] < results["ngram"]["1"] < uniform
    points = results["points"]
    assert {point["system"] for point in points} == {*names, "eso_0.25+head", "eso_0+head"}
    for point in points:
        assert 1 <= point["forwards"] <= 16 + 3 * (point["system"] == "bd4")
        assert abs(point["nats_per_token"] - uniform) < 1.2
        assert all(0 < point[f"ms_at_{n}_low"] <= point[f"ms_at_{n}"] <= point[f"ms_at_{n}_high"] for n in (1, 16))
        assert 0 < point["mauve"] <= 1
    for name in ("ar", "eso_0"):  # one order: the likelihood that there is
        exact = results["likelihood"][name][0]["exact"]["mean"]
        mine = [p for p in points if p["system"] == name and p["setting"].get("alpha_0", 0) == 0]
        assert mine[0]["nats_per_token"] == pytest.approx(exact, abs=1e-3)
    report = (tmp_path / "results" / "reproduction.md").read_text()
    assert all(label in report for label in names.values())
    for picture in ("likelihood", "training", "budgets", "steps", "heads", "judge"):
        assert (tmp_path / "results" / f"reproduction_{picture}.png").stat().st_size > 10_000

    started.clear()
    (tmp_path / "work" / "train_mdm_0" / "train.json").unlink()
    (tmp_path / "work" / "train_bd4_0" / "measure.json").unlink()
    reproduce.main(reproduce.parse_args(arguments))
    assert started == ["train:mdm:0", "measure:bd4:0"], "what is complete is not run again"
    again = json.loads((tmp_path / "results" / "reproduction.json").read_text())
    for kind in ("points", "likelihood", "tuning", "recipes", "text"):
        assert again[kind] == results[kind]
    file = tmp_path / "work" / "settings.json"
    file.write_text(file.read_text().replace('"length": 16', '"length": 17'))
    with pytest.raises(ValueError, match=r"other settings \(before, now\): length \(17, 16\)\. Choose another"):
        reproduce.main(reproduce.parse_args(arguments))


def test_a_measurement_that_was_interrupted_goes_on_with_the_next_sampler(monkeypatch, tmp_path):
    asked = []

    def three_samplers(*args):
        def score(number, rows):
            asked.append(number)
            if asked == [0, 1, 2]:
                raise KeyboardInterrupt
            return torch.ones(len(rows)), torch.ones(len(rows))

        for number in range(3):
            yield {"number": number}, lambda batch: torch.zeros(batch, 16), partial(score, number)

    monkeypatch.setattr(reproduction_runs, "samplers", three_samplers)
    monkeypatch.setattr(reproduction_runs, "load", lambda *args: None)
    monkeypatch.setattr(reproduction_runs, "Judge", lambda *args: lambda texts: {"mauve": len(texts)})
    args = reproduce.parse_args(["--scale", "smoke", "--work", str(tmp_path)])
    corpus = SimpleNamespace(tokenizer=SimpleNamespace(eos_token_id=0), held_out=torch.zeros(16, 16))
    (tmp_path / "train_mdm_0").mkdir()
    with pytest.raises(KeyboardInterrupt):
        reproduction_runs.measure("mdm", 0, corpus, args)
    points = reproduction_runs.measure("mdm", 0, corpus, args)
    assert asked == [0, 1, 2, 2]
    assert [point["setting"]["number"] for point in points] == [0, 1, 2]


@pytest.mark.slow
def test_changes_are_tried_against_the_plateau(in_this_process, tmp_path):
    started = in_this_process(reproduction_runs, plateau)
    arguments = ["--scale", "smoke", "--output", str(tmp_path / "results"), "--work", str(tmp_path / "work")]
    plateau.main(plateau.parse_args(arguments))
    assert len(started) == 1 + len(plateau.SYSTEMS) * len(PLATEAU)
    losses = json.loads((tmp_path / "results" / "plateau.json").read_text())["losses"]
    for name in plateau.SYSTEMS:
        assert len(set(losses[name].values())) == len(PLATEAU), "every change changes something"
    assert "| 2e-3 low variance | " in (tmp_path / "results" / "plateau.md").read_text()


@pytest.mark.slow
def test_the_ways_of_adapting_are_compared(in_this_process, tmp_path):
    started = in_this_process(adaptation, adaptation)
    sizes = ["--hidden-size", "32", "--num-layers", "1", "--length", "32", "--vocab-size", "300", "--every", "60"]
    steps = ["--causal-steps", "4", "--steps", "4", "--evaluate-every", "2", "--held-out-rows", "4"]
    steps += ["--alphas", "0.25"]
    arguments = ["--output", str(tmp_path / "results"), "--work", str(tmp_path / "work"), *sizes, *steps]
    adaptation.main(adaptation.parse_args(arguments))
    assert len(started) == 1 + len(adaptation.WAYS)
    rows = json.loads((tmp_path / "results" / "adaptation.json").read_text())["rows"]
    assert [row["way"] for row in rows] == list(adaptation.WAYS)
    assert all(list(row["nelbo"]) == ["2", "4"] and row["final"] < 6.5 for row in rows)
    assert rows[0]["final"] != rows[1]["final"], "from scratch is not from the causal model"
    assert "| annealed over 50% |" in (tmp_path / "results" / "adaptation.md").read_text()
    assert (tmp_path / "results" / "adaptation.png").stat().st_size > 5000


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_runs_end_with_the_process_that_started_them(tmp_path, how):
    """Killed so that it can do nothing about it, or interrupted; and nobody starts runs beside those of another one.

    A run holds a lock for as long as it lives.
    """
    held, started = tmp_path / "held", tmp_path / "started"
    worker, parent = tmp_path / "worker.py", tmp_path / "parent.py"
    worker.write_text(
        "import sys, time\nfrom pathlib import Path\nfrom filelock import FileLock\n"
        f"with FileLock({str(held)!r}):\n    Path({str(started)!r}).touch()\n    time.sleep(120)\n"
    )
    folder = str(Path(parallel_runs.__file__).parent)
    parent.write_text(
        f"import sys\nfrom pathlib import Path\nsys.path.append({folder!r})\n"
        f"from parallel_runs import alone_in, run_in_processes\nlogs = Path({str(tmp_path / 'logs')!r})\n"
        f"with alone_in(logs):\n    run_in_processes([{str(worker)!r}], ['x', 'z'], lambda name: False, logs, 1)\n"
    )
    process = subprocess.Popen([sys.executable, str(parent)], stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 60
        while not started.exists():
            assert time.monotonic() < end, "no run was started"
            time.sleep(0.05)
        with pytest.raises(Timeout):
            FileLock(held, timeout=0).acquire()
        with pytest.raises(ValueError, match="Another process runs benchmarks in"), alone_in(tmp_path / "logs"):
            pass
        process.send_signal(how)
        assert process.wait(timeout=30) != 0
    finally:
        process.kill()
        process.wait()
    with FileLock(held, timeout=30), alone_in(tmp_path / "logs"):  # the run is gone
        assert not (tmp_path / "logs" / "z.log").exists(), "and no other one was started"


def test_nothing_is_written_beside_another_command(tmp_path):
    arguments = ["--scale", "smoke", "--work", str(tmp_path)]
    for module in (reproduce, plateau):
        with alone_in(tmp_path / "logs"), pytest.raises(ValueError, match="Another process runs benchmarks"):
            module.main(module.parse_args(arguments))
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--seeds", "0"], "--seeds: must be a whole number of at least 1, got '0'"),
        (["--processes", "x"], "--processes: must be a whole number"),
        (["--output", __file__], "--output: must be a folder that can be written to"),
    ],
)
def test_bad_arguments_are_told_before_hours_of_work(arguments, told, capsys):
    with pytest.raises(SystemExit):
        reproduce.parse_args(arguments)
    assert told in capsys.readouterr().err


def test_runs_have_processes_of_their_own(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        "name = sys.argv[sys.argv.index('--run') + 1]\n"
        "assert name != 'bad', 'this one fails'\n"
        f"open({str(tmp_path)!r} + '/' + name, 'w').write(os.environ['OMP_NUM_THREADS'] + ' '.join(sys.argv[1:]))\n"
    )

    def is_complete(name: str) -> bool:
        return (tmp_path / name).exists()

    (tmp_path / "done").write_text("before")
    (tmp_path / "logs").mkdir()
    run_in_processes([str(script), "--x"], ["one", "done", "two"], is_complete, tmp_path / "logs", processes=2)
    assert (tmp_path / "one").read_text() == "1--x --run one"
    assert (tmp_path / "two").exists()
    assert (tmp_path / "done").read_text() == "before"
    with pytest.raises(RuntimeError, match="'bad' failed"):
        run_in_processes([str(script)], ["bad"], is_complete, tmp_path / "logs", processes=1)
    assert "this one fails" in (tmp_path / "logs" / "bad.log").read_text()
