"""The reproduction: objectives that are what they claim, a sane yardstick, and the whole of it at toy scale."""

import itertools
import json
import math
from types import SimpleNamespace

import adaptation
import pytest
import reproduce
import torch
import torch.nn.functional as F
from baselines import AutoregressiveSampler, BlockDiffusionSampler, MaskedDiffusionSampler, filled_cache
from hypothesis import given, settings
from hypothesis import strategies as st
from likelihoods import frontier, per_token
from ngram import KneserNey
from objectives import Autoregressive, BlockDiffusion, Esoteric, MaskedDiffusion, add_noise
from parallel_runs import run_in_processes
from reproduction_report import budgets_report, is_on_frontier, plot_budgets
from text_data import without_overlap
from tiny_models import random_batch, randomized_model

from eso_lm import DataCollatorForHybridMaskedDiffusion

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
@pytest.mark.parametrize("block_length", [1, 2, 3, 6])
def test_block_diffusion_sees_what_its_sampler_sees(block_length):
    """Both streams side by side equal the passes of the sampler, block by block on a cache."""
    model, text = randomized_model(), random_batch(randomized_model(), 3, 6)
    noisy, _ = add_noise(text, torch.full((3, 6), 0.5), MASK, seeded())
    logits = BlockDiffusion(block_length).logits(model, text, noisy)
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
    logits = BlockDiffusion(1).logits(model, text, torch.full_like(text, MASK))
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


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=8, unique=True))
def test_the_frontier_is_what_nothing_beats(pairs):
    points = [{"nfe": cost, "judge_nats": loss} for cost, loss in pairs]
    on_frontier = {(p["nfe"], p["judge_nats"]) for p in points if is_on_frontier(p, points, "nfe")}
    cheapest = min(cost for cost, _ in pairs)
    assert min(loss for _, loss in pairs) in {loss for _, loss in on_frontier}
    assert min(loss for cost, loss in pairs if cost == cheapest) in {loss for _, loss in on_frontier}
    for first, second in itertools.permutations(on_frontier, 2):
        assert not (first[0] <= second[0] and first[1] < second[1])


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 5)), min_size=1, max_size=8))
def test_the_best_by_budget_falls_and_nothing_beats_it(pairs):
    points = [{"forwards": forwards, "nats_per_token": loss} for forwards, loss in pairs]
    best = [(point["forwards"], point["nats_per_token"]) for point in frontier(points)]
    for (fewer, worse), (more, better) in itertools.pairwise(best):
        assert fewer < more
        assert worse > better
    for forwards, loss in pairs:
        assert min(other for cost, other in best if cost <= forwards) <= loss


def budgets_of(name: str) -> list[dict]:
    """The exact likelihoods of a system with random weights, at the smoke scale."""
    model = randomized_model(scale=0.2)
    corpus = SimpleNamespace(tokenizer=SimpleNamespace(eos_token_id=3), held_out=random_batch(model, 16, 16))
    return reproduce.budgets(name, model, corpus, reproduce.parse_args(["--scale", "smoke", "--sampling-batch", "8"]))


def test_the_budgets_of_the_baselines_are_exact_likelihoods():
    (causal,) = budgets_of("ar")
    model = randomized_model(scale=0.2)
    with torch.no_grad():
        losses = Autoregressive(3)(model, random_batch(model, 16, 16))
    assert causal["forwards"] == 16
    assert causal["nats_per_token"] == pytest.approx(losses.mean().item(), abs=1e-4)
    assert causal["standard_error"] == pytest.approx(losses.std().item() / 4, abs=1e-4)
    few, many, one_by_one = budgets_of("mdm")
    assert [point["setting"]["steps"] for point in (few, many, one_by_one)] == [4, 16, "max"]
    assert 1 <= few["forwards"] <= 4 < many["forwards"] < one_by_one["forwards"] == 16
    blocks = budgets_of("bd4")
    assert [point["setting"]["steps"] for point in blocks] == [1, 2, 4, "max"]
    assert blocks[0]["forwards"] == 4 + 3, "a forward a block, and one to cache each but the last"
    assert blocks[-1]["forwards"] == 16 + 3
    assert blocks[0]["standard_error"] > 0
    assert blocks == budgets_of("bd4"), "of the seed"


def test_the_table_of_budgets_tells_the_best_of_each(tmp_path):
    tokens = torch.full((5,), 16)
    points = [
        {"system": system, "setting": setting, "forwards": forwards} | per_token(torch.full((5,), 16 * nats), tokens)
        for system, setting, forwards, nats in (
            ("ar", {}, 16, 3.0),
            ("mdm", {"steps": 4}, 3.5, 6.0),
            ("mdm", {"steps": 16}, 10.5, 5.0),
            ("mdm", {"steps": "max"}, 17, 4.8),
            ("eso_1", {"alpha_0": 1.0, "unmasking_order": "strided", "num_diffusion_steps": 4}, 4, 5.5),
            ("eso_1", {"alpha_0": 1.0, "unmasking_order": "strided", "lossless": True}, 8, 4.5),
            ("eso_1", {"alpha_0": 1.0, "unmasking_order": "strided", "entropy_bound": 4.0}, 6, 5.25),
        )
    ]
    sizes = {"hardware": "a machine", "scale": "smoke", "parameters": 1, "train_tokens": 1}
    losses = {"ar": {"exact": {"mean": 3.0}}, "mdm": {"nelbo": {"mean": 4.75}}, "eso_1": {"nelbo": {"mean": 4.4}}}
    results = {"settings": sizes | vars(reproduce.SCALES["smoke"]), "likelihood": losses, "points": points}
    report = budgets_report(results)
    for line in (
        "| system | NELBO |  | ≤ 4 | ≤ 16 | any |",
        "| AR |  |  |  | **3.00** | **3.00** |",
        "| masked diffusion | 4.75 |  | 6.00 | 5.00 | 4.80 |",
        "| Eso-LM, α₀ = 1 | 4.40 | strided | **5.50** | 5.50 | 5.50 |",
        "| Eso-LM, α₀ = 1 | 4.40 | lossless, strided |  | 4.50 | 4.50 |",
        "| Eso-LM, α₀ = 1 | α₀ = 1, entropy bound 4, strided | 6.0 | 5.250 ± 0.000 (190.6) |",
    ):
        assert line in report
    plot_budgets(results, tmp_path / "budgets.png")
    assert (tmp_path / "budgets.png").stat().st_size > 10_000


def test_budgets_alone_need_trained_systems(tmp_path):
    arguments = ["--scale", "smoke", "--budgets-only", "--work", str(tmp_path / "work")]
    with pytest.raises(ValueError, match=r"lacks \['ar', .*'corpus'\]: run without it first"):
        reproduce.main(reproduce.parse_args(arguments))
    assert not (tmp_path / "work").exists()


@pytest.fixture
def in_this_process(monkeypatch):
    """Runs follow one another in this process; those that were started are listed."""
    started = []

    def patch(module):
        def run_all(command, names, is_complete, logs, processes, **kwargs):
            for name in names:
                if not is_complete(name):
                    started.append(name)
                    module.run(name, module.parse_args([*command[1:], "--run", name]))

        monkeypatch.setattr(module, "run_in_processes", run_all)
        return started

    return patch


@pytest.mark.slow
def test_the_reproduction_runs_and_is_not_repeated(in_this_process, tmp_path):
    started = in_this_process(reproduce)
    arguments = ["--scale", "smoke", "--output", str(tmp_path / "results"), "--work", str(tmp_path / "work")]
    reproduce.main(reproduce.parse_args(arguments))
    assert len(started) == 6 + 9 + 1 + 9
    results = json.loads((tmp_path / "results" / "reproduction.json").read_text())
    assert results["likelihood"].keys() == reproduce.systems().keys()
    for name, record in results["likelihood"].items():
        uniform = math.log(300)
        assert all(abs(value["mean"] - uniform) < 1.2 for value in record.values()), (name, record)
    assert results["ngram"]["5"] < results["ngram"]["1"] < math.log(300)
    assert {point["system"] for point in results["points"]} == {"text", *reproduce.systems()}
    for point in results["points"][1:]:
        assert point["nfe"] <= 16
        assert point["seconds"] > 0
    report = (tmp_path / "results" / "reproduction.md").read_text()
    assert all(label in report for label in reproduce.systems().values())
    for picture in ("likelihood", "quality", "steps", "budgets"):
        assert (tmp_path / "results" / f"reproduction_{picture}.png").stat().st_size > 10_000
    budgets = json.loads((tmp_path / "results" / "reproduction_budgets.json").read_text())["points"]
    assert {point["system"] for point in budgets} == set(reproduce.systems())
    nats = {}
    for point in budgets:
        assert 1 <= point["forwards"] <= 16 + 3 * (point["setting"].get("steps") == "max")
        assert abs(point["nats_per_token"] - math.log(300)) < 1.2
        nats.setdefault(point["system"], []).append(point["nats_per_token"])
    for name in ("ar", "eso_0"):  # one order: the likelihood that there is
        exact = results["likelihood"][name]["exact"]["mean"]
        assert nats[name] == [pytest.approx(exact, abs=1e-3)]
    ways = ({"lossless"}, {"entropy_bound"}, {"num_diffusion_steps"})
    for name in ("eso_1", "eso_0.5", "eso_0.25", "eso_0.125"):
        mine = [point for point in budgets if point["system"] == name]
        assert all(any(way <= point["setting"].keys() for point in mine) for way in ways)
        assert {point["setting"]["alpha_0"] for point in mine} == {1.0, reproduce.alpha_of(name)}

    started.clear()
    (tmp_path / "work" / "mdm" / "result.json").unlink()
    (tmp_path / "work" / "bd4" / "budgets.json").unlink()
    reproduce.main(reproduce.parse_args(arguments))
    assert started == ["mdm", "budgets:bd4"], "what is complete is not run again"

    started.clear()
    (tmp_path / "work" / "mdm" / "budgets.json").unlink()
    reproduce.main(reproduce.parse_args([*arguments, "--budgets-only", "--output", str(tmp_path / "alone")]))
    assert started == ["budgets:mdm"]
    written = sorted(path.name for path in (tmp_path / "alone").iterdir())
    assert written == [f"reproduction_budgets.{kind}" for kind in ("json", "md", "png")]
    assert json.loads((tmp_path / "alone" / "reproduction_budgets.json").read_text())["points"] == budgets
    with pytest.raises(ValueError, match=r"holds runs with .*'seed': 0"):
        reproduce.main(reproduce.parse_args([*arguments, "--seed", "7"]))


@pytest.mark.slow
def test_the_ways_of_adapting_are_compared(in_this_process, tmp_path):
    started = in_this_process(adaptation)
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
    run_in_processes([str(script), "--x"], ["one", "done", "two"], is_complete, tmp_path / "logs", processes=2)
    assert (tmp_path / "one").read_text() == "1--x --run one"
    assert (tmp_path / "two").exists()
    assert (tmp_path / "done").read_text() == "before"
    with pytest.raises(RuntimeError, match="'bad' failed"):
        run_in_processes([str(script)], ["bad"], is_complete, tmp_path / "logs", processes=1)
    assert "this one fails" in (tmp_path / "logs" / "bad.log").read_text()
