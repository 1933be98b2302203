"""examples/run_evaluation.py: from files to JSON and a plot, with numbers that the model's own methods give."""

import json
import math

import pytest
import run_evaluation
import torch
from datasets import Dataset
from likelihoods import describe, per_token
from run_evaluation import Arguments, main
from text_data import load_texts
from tiny_models import save_with_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

TEXTS = [f"The quick brown fox number {index} jumps over the lazy dog." for index in range(30)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    tokenizer = save_with_tokenizer(path / "eso", TEXTS, scale=0.2)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(path / "judge")
    tokenizer.save_pretrained(path / "judge")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    (path / "texts.txt").write_text("\n".join(TEXTS))
    (path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    Dataset.from_dict({"body": TEXTS}).to_parquet(path / "texts.parquet")
    return path


def test_texts_come_from_every_kind_of_file(data):
    assert load_texts(str(data / "texts.jsonl")) == TEXTS
    assert load_texts(str(data / "texts.parquet"), column="body") == TEXTS
    assert load_texts(str(data / "texts.txt")) == ["\n".join(TEXTS)]
    assert load_texts(str(data)) == ["\n".join(TEXTS)]
    with pytest.raises(ValueError, match=r"\['body'\], got 'text'"):
        load_texts(str(data / "texts.parquet"))
    (data / "texts.csv").write_text("a,b")
    with pytest.raises(ValueError, match="must end in one of"):
        load_texts(str(data / "texts.csv"))


@pytest.mark.parametrize("per_document", [False, True])
def test_evaluation_reports_what_the_model_says(folder, data, tmp_path, per_document):
    arguments = {"per_document": per_document, "length": 20, "max_sequences": 6, "num_orders": 4, "alpha_0": 0.5}
    model_and_data = {"model": str(folder / "eso"), "data": str(data / "texts.jsonl"), "output": tmp_path}
    results = main(Arguments(**model_and_data, **arguments))
    assert (tmp_path / "bound.png").stat().st_size > 5000
    stored = json.loads((tmp_path / "evaluation.json").read_text())
    assert stored["settings"]["num_orders"] == 4
    likelihood = results["likelihood"]
    assert stored["likelihood"]["nelbo"] == likelihood["nelbo"]
    assert set(likelihood["bound_by_num_orders"]) == {1, 2, 4}
    for bound in likelihood["bound_by_num_orders"].values():
        assert bound["perplexity"] == pytest.approx(math.exp(bound["nats_per_token"]))
        nats = bound["nats_per_token"] * likelihood["tokens"]
        assert bound["bits_per_byte"] == pytest.approx(nats / math.log(2) / likelihood["bytes"])
    bounds = [likelihood["bound_by_num_orders"][count]["nats_per_token"] for count in (1, 2, 4)]
    assert bounds == sorted(bounds, reverse=True), "averages over the same orders tighten for sure"
    again = main(Arguments(**model_and_data, **arguments))
    assert again["likelihood"] == likelihood
    model = run_evaluation.AutoModel.from_pretrained(folder / "eso")
    tokenizer = run_evaluation.AutoTokenizer.from_pretrained(folder / "eso")
    texts = load_texts(str(data / "texts.jsonl"))
    ids, mask, _ = run_evaluation.sequences(texts, tokenizer, 20, Arguments(**model_and_data, **arguments))
    exact = model.log_likelihood(ids, mask, num_orders=400, alpha_0=0.5).log_likelihood.sum() / mask.sum()
    assert -exact < bounds[-1]
    assert -exact == pytest.approx(bounds[-1], abs=0.2)


@pytest.mark.parametrize("per_document", [False, True])
def test_budgets_are_exact_likelihoods_at_their_forwards(folder, data, tmp_path, per_document):
    arguments = Arguments(
        model=str(folder / "eso"),
        data=str(data / "texts.jsonl"),
        output=tmp_path,
        per_document=per_document,
        length=14,
        max_sequences=6,
        num_orders=1,
        budgets=[1, 4],
        budget_alphas=[1.0, 0.0],
        entropy_bounds=[15.0],
        num_plans=2,
    )
    points = main(arguments)["budgets"]
    assert json.loads((tmp_path / "evaluation.json").read_text())["budgets"] == points
    assert (tmp_path / "budgets.png").stat().st_size > 5000
    by_name = {describe(point["setting"]): point for point in points}
    table = (tmp_path / "budgets.md").read_text()
    assert [row.split(" | ")[0] for row in table.splitlines()[2:]] == [f"| {name}" for name in by_name]
    for order in ("random", "strided"):
        at_once, one_by_one, lossless, bounded = (
            by_name[f"α₀ = 1, {how}, {order}"]
            for how in ("1 step", "one token a forward", "lossless", "entropy bound 15")
        )
        assert at_once["forwards"] == 1
        assert 1 < bounded["forwards"] < one_by_one["forwards"]
        assert 1 < lossless["forwards"] < one_by_one["forwards"]
    left_to_right = by_name["α₀ = 0, one token a forward, left to right"]
    model = run_evaluation.AutoModel.from_pretrained(folder / "eso")
    tokenizer = run_evaluation.AutoTokenizer.from_pretrained(folder / "eso")
    texts = load_texts(arguments.data)
    ids, mask, _ = run_evaluation.sequences(texts, tokenizer, 14, arguments)
    nats = 0.0
    for row, length in zip(ids, mask.sum(dim=-1).tolist(), strict=True):
        for slot in range(length):
            seen = torch.cat([row[:slot], torch.tensor([model.config.mask_token_id])])[None]
            with torch.no_grad():
                logits = model(seen, position_ids=torch.arange(slot + 1)[None]).logits[0, -1]
            nats -= float(logits.log_softmax(-1)[row[slot]])
    assert left_to_right["nats_per_token"] == pytest.approx(nats / int(mask.sum()), abs=1e-4)
    assert left_to_right["forwards"] == pytest.approx(mask.sum(dim=-1).double().mean())
    rows = dict(zip(by_name, table.splitlines()[2:], strict=True))
    for name, point in by_name.items():
        of_as_few = [other["nats_per_token"] for other in points if other["forwards"] <= point["forwards"]]
        is_bold = "**" in rows[name]
        assert is_bold <= (point["nats_per_token"] == min(of_as_few)), name
        assert any("**" in rows[other] and by_name[other]["nats_per_token"] == min(of_as_few) for other in rows), name


def test_results_are_valid_json_and_written_as_they_come(folder, data, tmp_path, monkeypatch):
    one = {"model": str(folder / "eso"), "data": str(data / "texts.txt"), "output": tmp_path, "num_orders": 2}
    arguments = Arguments(**one, per_document=True, length=12, num_samples=1, sample_length=4)
    monkeypatch.setattr(run_evaluation, "sample_quality", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(arguments)
    stored = json.loads((tmp_path / "evaluation.json").read_text(), parse_constant=pytest.fail)
    assert stored["likelihood"]["nelbo"]["standard_error"] is None, "one sequence has no spread"
    with pytest.raises(ValueError, match="does not fill a block of 5000 tokens"):
        main(Arguments(**one, length=5000))
    with pytest.raises(OSError, match="typo"):
        main(Arguments(**one, num_samples=1, judge=str(folder / "typo")))
    with pytest.raises(ValueError, match="There is no file"):
        load_texts(str(data / "typo.jsonl"))


def test_bytes_are_those_of_the_text(folder):
    tokenizer = run_evaluation.AutoTokenizer.from_pretrained(folder / "eso")
    texts = ["日本語の文章です。🙂" * 30]
    arguments = Arguments(model="m", data="d", max_sequences=1000)
    ids, _, num_bytes = run_evaluation.sequences(texts, tokenizer, 16, arguments)
    assert num_bytes == pytest.approx(ids.numel(), abs=2), "this tokenizer has a token a byte here"


def test_samples_are_judged(folder, tmp_path):
    results = main(
        Arguments(
            model=str(folder / "eso"),
            output=tmp_path,
            num_samples=5,
            batch_size=2,
            sample_length=12,
            judge=str(folder / "judge"),
            entropy_bound=20.0,
            alpha_0=1.0,
        )
    )
    samples = results["samples"]
    assert 1 <= samples["forwards"] < 12
    assert samples["generative_perplexity"] > 1
    assert {"unigram_entropy", "distinct_4", "mean_generative_perplexity"} <= samples.keys()
    assert len(results["texts"]) == 5


def test_standard_errors_cover_the_truth():
    """Ratios of sums over 40 sequences of different lengths, 400 times: the error is that of the spread."""
    generator = torch.Generator().manual_seed(0)
    means, errors = [], []
    for _ in range(400):
        tokens = torch.randint(5, 50, (40,), generator=generator)
        nats = 3.0 * tokens + tokens.sqrt() * torch.randn(40, generator=generator)
        row = per_token(nats, tokens, 1)
        means.append(row["nats_per_token"])
        errors.append(row["standard_error"])
    assert sum(errors) / 400 == pytest.approx(torch.tensor(means).std().item(), rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "There is nothing to do"),
        ({"data": "a", "num_orders": 0}, "`--num_orders` must be at least 1, got 0"),
        ({"data": "a", "mauve": True}, "`--mauve` compares samples with data"),
        ({"num_samples": -1}, "must not be negative, got -1"),
        ({"data": "a", "judge": "j"}, "`--judge` judges samples"),
        ({"data": "a", "length": 0}, "`--length` must be at least 1, got 0"),
        ({"num_samples": 1, "budgets": [4]}, "`--budgets` scores texts"),
        ({"data": "a", "entropy_bounds": [4.0]}, "add to `--budgets`"),
        ({"data": "a", "budgets": [4, 0]}, r"`--budgets` must be at least 1, got \[4, 0\]"),
        ({"data": "a", "budgets": [4], "budget_orders": ["typo"]}, "`--budget_orders` must be some of"),
        ({"data": "a", "budgets": [4], "budget_alphas": [2.0]}, r"`--budget_alphas` must be in \[0, 1\]"),
        ({"data": "a", "budgets": [4], "entropy_bounds": [-1.0]}, "`--entropy_bounds` must not be negative"),
        ({"data": "a", "num_plans": 0}, "`--num_plans` must be at least 1, got 0"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        Arguments(model="m", **arguments)
