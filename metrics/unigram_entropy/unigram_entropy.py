"""Unigram entropy: how varied the tokens of generated texts are, in nats."""

import math
from collections import Counter

import datasets
import evaluate

DESCRIPTION = """\
The entropy of the frequencies of tokens, in nats: inside each text, averaged over the texts, as papers on discrete
diffusion report it next to generative perplexity (which degenerate, repetitive text would win); and over all texts.
"""
INPUTS_DESCRIPTION = """\
Args:
    predictions: Texts, which are split at white space, or lists of token ids.
Returns:
    unigram_entropy: mean over the texts; corpus_entropy: of all texts together.
"""


def entropy(tokens: list) -> float:
    """The entropy of the frequencies of `tokens`, in nats; 0 for none."""
    counts = Counter(tokens).values()
    return -sum(count / len(tokens) * math.log(count / len(tokens)) for count in counts)


@evaluate.utils.file_utils.add_start_docstrings(DESCRIPTION, INPUTS_DESCRIPTION)
class UnigramEntropy(evaluate.Metric):
    """Unigram entropy as an evaluate module: `evaluate.load("metrics/unigram_entropy")`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS_DESCRIPTION,
            features=[
                datasets.Features({"predictions": datasets.Value("string")}),
                datasets.Features({"predictions": datasets.Sequence(datasets.Value("int64"))}),
            ],
        )

    def _compute(self, predictions: list) -> dict[str, float]:
        if len(predictions) == 0:
            raise ValueError("`predictions` must hold at least one text.")
        texts = [text.split() if isinstance(text, str) else list(text) for text in predictions]
        return {
            "unigram_entropy": sum(entropy(text) for text in texts) / len(texts),
            "corpus_entropy": entropy([token for text in texts for token in text]),
        }
