"""The noise process of an Eso-LM as pure functions: how much is masked when, and what that weighs.

q_t keeps each token with probability α_t = α_0 (1 - (1 - ε) t), t in [0, 1], and else writes the mask,
independently (arXiv 2506.01928, section 3).
"""

from typing import Literal

import torch

EPSILON = 1e-3
"""ε of the schedule, and the smallest t drawn in training."""


def keep_probability(t: torch.Tensor, alpha_0: float) -> torch.Tensor:
    """α_t: the probability that a token is still clean at time `t` (any shape, in [0, 1])."""
    return alpha_0 * (1 - (1 - EPSILON) * t)


def nelbo_weight(t: torch.Tensor, alpha_0: float) -> torch.Tensor:
    """w(t) = α_0 (1 - ε) / (1 - α_t): the weight of a masked token's cross entropy in the diffusion term."""
    return alpha_0 * (1 - EPSILON) / (1 - keep_probability(t, alpha_0))


def sample_times(num_rows: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """Draws one t per row, stratified over the rows: (num_rows,), float64, in [ε, 1].

    Row i draws from [i/n, (i+1)/n) with one shared offset, so the batch covers the whole of [0, 1] and the
    loss varies less from batch to batch, while each single t stays uniform over its stratum.
    """
    offset = torch.rand((), dtype=torch.float64, generator=generator)
    strata = torch.arange(num_rows, dtype=torch.float64)
    t = (offset + strata) / max(num_rows, 1) % 1
    return EPSILON + (1 - EPSILON) * t


def sample_unmasking_counts(
    num_tokens: int, num_steps: int | Literal["max"], alpha_0: float, generator: torch.Generator | None = None
) -> list[int]:
    """Draws how many tokens each step of the ancestral diffusion phase reveals.

    Of the tokens still masked at time t, step t -> s = t - 1/num_steps reveals each with probability
    (α_s - α_t) / (1 - α_t), so a token survives until α exceeds a level that is uniform in [α_1, 1]. Only the number
    of tokens is drawn here: in a uniform generation order, the next ones of the order are a uniform choice.

    Args:
        num_tokens: Tokens to generate.
        num_steps: T, the number of time steps from t = 1 to t = 0; "max": so many that no two tokens share one.
        alpha_0: Expected fraction of tokens revealed in this phase, in [0, 1].
        generator: Source of randomness on the CPU; None: torch's global one.

    Returns:
        The numbers revealed, in order, without the steps that reveal nothing. What they leave of
        `num_tokens` belongs to the sequential phase; at α_0 = 1 nothing is left.
    """
    if alpha_0 == 0:
        return []
    alpha_1 = alpha_0 * EPSILON
    level = alpha_1 + (1 - alpha_1) * torch.rand(num_tokens, dtype=torch.float64, generator=generator)
    if num_steps == "max":
        return [1] * int((level < alpha_0).sum())
    elapsed = (level[level < alpha_0] / alpha_0 - EPSILON) / (1 - EPSILON)  # 1 - t, in [0, 1)
    steps = (elapsed * num_steps).floor().clamp(0, num_steps - 1)
    return steps.unique(return_counts=True)[1].tolist()
