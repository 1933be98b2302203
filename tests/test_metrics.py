"""The evaluate modules: loaded offline from their folders, checked against numbers worked out by hand."""

import math
from pathlib import Path

import evaluate
import pytest
import torch
from tiny_models import tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

METRICS = Path(__file__).parents[1] / "metrics"


def load(name: str) -> evaluate.Metric:
    return evaluate.load(str(METRICS / name))


def test_distinct_n():
    metric = load("distinct_n")
    assert metric.compute(predictions=["a b a b", "a b c"], max_n=2) == {"distinct_1": 3 / 7, "distinct_2": 3 / 5}
    ids = metric.compute(predictions=[[1, 2, 1, 2], [1, 2, 3]])
    assert ids == {"distinct_1": 3 / 7, "distinct_2": 3 / 5, "distinct_3": 1.0}
    with pytest.raises(ValueError, match="`max_n` must be at least 1, got 0"):
        metric.compute(predictions=["a"], max_n=0)


def test_unigram_entropy():
    scores = load("unigram_entropy").compute(predictions=["a a a a", "a b c d"])
    assert scores["unigram_entropy"] == pytest.approx(math.log(4) / 2)
    expected = -(5 / 8 * math.log(5 / 8) + 3 / 8 * math.log(1 / 8))
    assert scores["corpus_entropy"] == pytest.approx(expected)
    assert load("unigram_entropy").compute(predictions=[[3, 3, 5, 5]])["corpus_entropy"] == pytest.approx(math.log(2))


def test_generative_perplexity(tmp_path):
    """Against the judge's own loss, text by text."""
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    judge = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=32, **sizes)).eval()
    judge.save_pretrained(tmp_path)
    texts = ["The quick fox", "dog", "The lazy brown dog jumps over the fox."]
    scores = load("generative_perplexity").compute(predictions=texts, model_id=str(tmp_path), batch_size=2)
    losses, counts = [], []
    for text in texts:
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]])
        losses.append(judge(ids, labels=ids).loss.item())
        counts.append(ids.shape[1] - 1)
    expected = [math.exp(loss) for loss in losses]
    assert scores["perplexities"] == pytest.approx(expected, rel=1e-4)
    assert scores["mean_perplexity"] == pytest.approx(sum(expected) / 3, rel=1e-4)
    total = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    assert scores["perplexity"] == pytest.approx(math.exp(total), rel=1e-4)


def test_mauve_of_features():
    """Against the integral, where the two sets share nothing, and the half of what they are."""
    metric = load("mauve_of_features")
    here, there = [[1.0, 0.01 * i] for i in range(10)], [[0.01 * i, 1.0] for i in range(10)]
    assert metric.compute(predictions=here, references=here[::-1])["mauve"] == pytest.approx(1)
    # Of p = (1, 0) and q = (0, 1), mixed by a share s: the curve is ((1 - s)^5, s^5), the area 5 B(6, 5).
    beta = math.factorial(5) * math.factorial(4) / math.factorial(10)
    apart = metric.compute(predictions=here, references=there, num_buckets=2)["mauve"]
    assert apart == pytest.approx(5 * beta, rel=1e-2)
    # Of p = (1, 0) and q = (1/2, 1/2), where r = ((1 + s) / 2, (1 - s) / 2): the same integral, added up finely.
    shares = torch.linspace(0, 1, 100_001, dtype=torch.float64)[:-1]
    r = (1 + shares) / 2
    across = (-5 * (0.5 * (0.5 / r).log() + 0.5 * (0.5 / (1 - r)).log())).exp().flip(0)
    area = torch.trapezoid(r.pow(5).flip(0), across).item()
    half = metric.compute(predictions=here, references=here[:5] + there[:5], num_buckets=2)["mauve"]
    assert half == pytest.approx(area, rel=1e-2)
    with pytest.raises(ValueError, match="`num_buckets` must be 2 to the number of all texts, got 1"):
        metric.compute(predictions=here, references=there, num_buckets=1)
