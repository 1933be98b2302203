"""Drawing tokens, and deciding which of them to keep, as pure functions on tensors."""

import torch

Generators = torch.Generator | list[torch.Generator] | None


def draw_uniform(counts: list[int], generator: Generators, device: torch.device) -> torch.Tensor:
    """Draws `counts[r]` numbers for row r, (sum of counts,) float64 in [0, 1): one stream, or one for each row."""
    if isinstance(generator, list):
        rows = zip(counts, generator, strict=True)
        return torch.cat([draw_uniform([count], row_generator, device) for count, row_generator in rows])
    source = device if generator is None else generator.device
    return torch.rand(sum(counts), dtype=torch.float64, generator=generator, device=source).to(device)


def on_cpu(generator: torch.Generator | None) -> torch.Generator | None:
    """A generator for the CPU that follows from one of any device."""
    if generator is None or generator.device.type == "cpu":
        return generator
    seed = torch.randint(2**62, (), generator=generator, device=generator.device)
    return torch.Generator().manual_seed(int(seed))


def draw_tokens(scores: torch.FloatTensor, uniform: torch.Tensor) -> torch.LongTensor:
    """Draws from softmax(scores), (..., vocab), by inverting the CDF in float64 at `uniform` (...), in [0, 1).

    In float32, neither Gumbel noise nor a running sum over a vocabulary reaches the tail of the distribution, which
    acts like a lower temperature.
    """
    return draw_by_weight(scores.softmax(dim=-1), uniform)


def draw_by_weight(weights: torch.FloatTensor, uniform: torch.Tensor) -> torch.LongTensor:
    """Draws in proportion to `weights`, (..., vocab), not negative: inverts their CDF in float64 at `uniform`."""
    cdf = weights.cumsum(dim=-1, dtype=torch.float64)
    total = cdf[..., -1:]
    # Strictly below the total, so that rounding never selects a token of probability 0 at the end.
    target = torch.minimum(uniform[..., None] * total, torch.nextafter(total, torch.zeros_like(total)))
    # Weights of NaN end up beyond the vocabulary.
    return torch.searchsorted(cdf, target, right=True)[..., 0].clamp(max=weights.shape[-1] - 1)


def select_tokens(
    logits: torch.FloatTensor,
    widths: list[int],
    confidence_threshold: float | None = None,
    entropy_bound: float | None = None,
) -> torch.BoolTensor:
    """Decides which candidates adaptive unmasking keeps, of each row at least the most certain one.

    Args:
        logits: (candidates, vocab), row by row.
        widths: Candidates of each row.
        confidence_threshold: Keeps those whose most probable token has at least this probability.
        entropy_bound: Keeps the most certain ones as long as the entropies of those before each one add up to at most
            this many nats; the product of their distributions is then close to their joint one (EB-Sampler,
            arXiv 2505.24857). Without either all are kept.

    Returns:
        (candidates,) bool.
    """
    if confidence_threshold is None and entropy_bound is None:
        return torch.ones(len(logits), dtype=torch.bool, device=logits.device)
    row_widths = torch.tensor(widths)[:, None]
    rows, candidates = (torch.arange(max(widths)) < row_widths).nonzero().to(logits.device).unbind(dim=-1)
    if confidence_threshold is not None:
        uncertainty = -logits.softmax(dim=-1).amax(dim=-1)
    else:
        log_probs = logits.log_softmax(dim=-1)
        uncertainty = -(log_probs.exp() * log_probs).nansum(dim=-1)
    by_row = uncertainty.new_full((len(widths), max(widths)), torch.inf)
    # Masks that see nothing but masks are equally uncertain, whatever the last digit says: the first ones are kept.
    by_row[rows, candidates] = uncertainty.round(decimals=4)
    ascending, ranked = by_row.sort(dim=-1, stable=True)
    if confidence_threshold is not None:
        is_kept = ascending <= -confidence_threshold
    else:
        is_kept = ascending.cumsum(dim=-1) - ascending <= entropy_bound
    is_kept[:, 0] = True
    return torch.empty_like(is_kept).scatter(-1, ranked, is_kept)[rows, candidates]
