"""MAUVE of features: how much of what one set of texts is like, another one is like, too."""

import datasets
import evaluate
import numpy as np
from sklearn.cluster import KMeans
from sklearn.preprocessing import normalize

DESCRIPTION = """\
MAUVE (Pillutla et al., 2021, arXiv 2102.01454), of texts that are given by features, such as the hidden states of any
language model: both sets are quantized together, and the area is measured under the curve of what a mixture of the two
histograms is missing of either. 1: both are the same; towards 0: they have nothing in common. A set is compared with
another one of its own size; values of different sizes, buckets or features are not comparable.
"""
CITATION = """\
@inproceedings{pillutla2021mauve,
  title = {{MAUVE}: Measuring the Gap Between Neural Text and Human Text using Divergence Frontiers},
  author = {Pillutla, Krishna and Swayamdipta, Swabha and Zellers, Rowan and Thickstun, John and Welleck, Sean and
            Choi, Yejin and Harchaoui, Zaid},
  booktitle = {NeurIPS},
  year = {2021},
}
"""
INPUTS_DESCRIPTION = """\
Args:
    predictions, references: Features of a text each, lists of numbers.
    num_buckets: Of the quantization; by default a tenth of the texts of the smaller set, and 2 at least.
    scaling: Of the divergences in the exponent, 5 by default, as in the paper.
    seed: Of the quantization, 0 by default.
Returns:
    mauve: in (0, 1].
"""


@evaluate.utils.file_utils.add_start_docstrings(DESCRIPTION, INPUTS_DESCRIPTION)
class MauveOfFeatures(evaluate.Metric):
    """MAUVE as an evaluate module: `evaluate.load("metrics/mauve_of_features")`."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Sequence(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS_DESCRIPTION,
            features=datasets.Features({"predictions": features, "references": features}),
        )

    def _compute(
        self,
        predictions: list,
        references: list,
        num_buckets: int | None = None,
        scaling: float = 5.0,
        seed: int = 0,
    ) -> dict[str, float]:
        count = len(predictions)
        if num_buckets is None:
            num_buckets = max(2, round(min(count, len(references)) / 10))
        if not 2 <= num_buckets <= count + len(references):
            raise ValueError(f"`num_buckets` must be 2 to the number of all texts, got {num_buckets}.")
        points = normalize(np.concatenate([predictions, references]))
        buckets = KMeans(num_buckets, n_init=5, random_state=seed).fit_predict(points)
        ours, theirs = (np.bincount(part, minlength=num_buckets) for part in (buckets[:count], buckets[count:]))
        return {"mauve": area_of_frontier(ours / ours.sum(), theirs / theirs.sum(), scaling)}


def area_of_frontier(p: np.ndarray, q: np.ndarray, scaling: float) -> float:
    """The area under (exp(-c KL(q | r)), exp(-c KL(p | r))) over all mixtures r of p and q, as in the paper."""

    def divergence(of: np.ndarray, mixture: np.ndarray) -> float:
        occurs = of > 0
        return float((of[occurs] * np.log(of[occurs] / mixture[occurs])).sum())

    shares = np.linspace(1e-6, 1 - 1e-6, 101)
    mixtures = [share * p + (1 - share) * q for share in shares]
    # Its ends: all of p, which says nothing of q, and the other way round.
    across = [0.0, *(np.exp(-scaling * divergence(q, mixture)) for mixture in mixtures[::-1]), 1.0]
    along = [1.0, *(np.exp(-scaling * divergence(p, mixture)) for mixture in mixtures[::-1]), 0.0]
    return float(np.trapezoid(along, across))
