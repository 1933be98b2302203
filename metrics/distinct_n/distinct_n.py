"""Distinct-n: the fraction of n-grams that are different, for texts or token ids."""

import datasets
import evaluate

DESCRIPTION = """\
Distinct-n (Li et al., 2016, arXiv 1510.03055): different n-grams over all n-grams, for n = 1 ... max_n.
"""
CITATION = """\
@inproceedings{li2016diversity,
  title = {A Diversity-Promoting Objective Function for Neural Conversation Models},
  author = {Li, Jiwei and Galley, Michel and Brockett, Chris and Gao, Jianfeng and Dolan, Bill},
  booktitle = {NAACL-HLT},
  year = {2016},
}
"""
INPUTS_DESCRIPTION = """\
Args:
    predictions: Texts, which are split at white space, or lists of token ids.
    max_n: Largest n, 3 by default.
Returns:
    distinct_1 ... distinct_n, in [0, 1], over the n-grams of all predictions together.
"""


@evaluate.utils.file_utils.add_start_docstrings(DESCRIPTION, INPUTS_DESCRIPTION)
class DistinctN(evaluate.Metric):
    """Distinct-n as an evaluate module: `evaluate.load("metrics/distinct_n")`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS_DESCRIPTION,
            features=[
                datasets.Features({"predictions": datasets.Value("string")}),
                datasets.Features({"predictions": datasets.Sequence(datasets.Value("int64"))}),
            ],
        )

    def _compute(self, predictions: list, max_n: int = 3) -> dict[str, float]:
        if max_n < 1:
            raise ValueError(f"`max_n` must be at least 1, got {max_n}.")
        if len(predictions) == 0:
            raise ValueError("`predictions` must hold at least one text.")
        texts = [text.split() if isinstance(text, str) else list(text) for text in predictions]
        scores = {}
        for n in range(1, max_n + 1):
            ngrams = [ngram for text in texts for ngram in zip(*(text[start:] for start in range(n)), strict=False)]
            scores[f"distinct_{n}"] = len(set(ngrams)) / max(len(ngrams), 1)
        return scores
