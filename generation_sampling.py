"""Drawing tokens, and deciding which of them to keep."""

import torch
import torch.nn.functional as F
from transformers import LogitsProcessor

from .generation_canvas import Canvas
from .generation_logits_process import TEXT_FREE_PROCESSORS, SlotProcessor, process_logits

MAX_WEIGHTS_AT_ONCE = 2**18
"""Weights of all slots up to which their CDF is made as a whole. A longer one takes a while; a shorter one takes less
than the operations it would spare."""

TOKENS_OF_BLOCK = 256
"""Tokens whose weights are added up, beyond that, before the one that is drawn is looked for among them."""

Generators = torch.Generator | list[torch.Generator] | None


def require_generators(generator: Generators, batch: int) -> None:
    """Raises a ValueError unless `generator` is None, a torch.Generator, or a list with one for each row."""
    generators = generator if isinstance(generator, list) else [generator]
    if generator is not None and not all(isinstance(one, torch.Generator) for one in generators):
        raise ValueError(f"`generator` must be a torch.Generator, or a list of them, got {generator!r}.")
    if isinstance(generator, list) and len(generator) != batch:
        raise ValueError(
            f"`generator` must hold one torch.Generator for each of the {batch} rows (with the samples of each "
            f"prompt), got {len(generator)}."
        )


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


def draw_tokens(scores: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Draws from softmax(scores), (..., vocab), by inverting the CDF in float64 at `uniform` (...), in [0, 1).

    In float32, neither Gumbel noise nor a running sum over a vocabulary reaches the tail of the distribution, which
    acts like a lower temperature.
    """
    return draw_by_weight(scores.softmax(dim=-1), uniform)


def draw_by_weight(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Draws in proportion to `weights`, (..., vocab), not negative: inverts their CDF in float64 at `uniform`."""
    if weights.numel() > MAX_WEIGHTS_AT_ONCE and weights.shape[-1] > TOKENS_OF_BLOCK:
        return _draw_by_blocks(weights, uniform)
    cdf = weights.cumsum(dim=-1, dtype=torch.float64)
    token = torch.searchsorted(cdf, _target(uniform, cdf), right=True)
    return token[..., 0].clamp(max=weights.shape[-1] - 1)  # weights of NaN end up beyond the vocabulary


def _target(uniform: torch.Tensor, cdf: torch.Tensor) -> torch.Tensor:
    """Where the CDF is inverted: below the total, so that no token of weight 0 at the end is ever drawn.

    What is under 1 is so by 2^-53 at least, and the product rounds to a number under the total.
    """
    return uniform[..., None] * cdf[..., -1:]


def _draw_by_blocks(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The same by the CDF of blocks of tokens, then that within a block: only sums pass over the whole vocabulary."""
    vocab_size, size = weights.shape[-1], TOKENS_OF_BLOCK
    rest = vocab_size % size
    blocks = weights[..., : vocab_size - rest].unflatten(-1, (-1, size)).sum(dim=-1, dtype=torch.float64)
    if rest:
        blocks = torch.cat([blocks, weights[..., -rest:].sum(dim=-1, keepdim=True, dtype=torch.float64)], dim=-1)
    ends = blocks.cumsum(dim=-1)
    target = _target(uniform, ends)
    block = torch.searchsorted(ends, target, right=True).clamp(max=ends.shape[-1] - 1)
    tokens = block * size + torch.arange(size, device=weights.device)
    within = weights.gather(-1, tokens.clamp(max=vocab_size - 1)).double().masked_fill(tokens >= vocab_size, 0)
    cdf = within.cumsum(dim=-1) + F.pad(ends[..., :-1], (1, 0)).gather(-1, block)
    # Added up in another order, the weights of a block may come to less: the target is then in the last of them.
    last = (within > 0).long().cumsum(dim=-1).argmax(dim=-1, keepdim=True)
    return (block * size + torch.searchsorted(cdf, target, right=True).minimum(last))[..., 0]


def select_tokens(
    logits: torch.Tensor,
    widths: list[int],
    confidence_threshold: float | None = None,
    entropy_bound: float | None = None,
) -> torch.Tensor:
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
    if confidence_threshold is not None:
        uncertainty, bound = -logits.softmax(dim=-1).amax(dim=-1), -confidence_threshold
    elif entropy_bound is not None:
        log_probs = logits.log_softmax(dim=-1)
        uncertainty, bound = -(log_probs.exp() * log_probs).nansum(dim=-1), entropy_bound
    else:
        return torch.ones(len(logits), dtype=torch.bool, device=logits.device)
    row_widths = torch.tensor(widths)[:, None]
    rows, candidates = (torch.arange(max(widths)) < row_widths).nonzero().to(logits.device).unbind(dim=-1)
    by_row = uncertainty.new_full((len(widths), max(widths)), torch.inf)
    # Masks that see nothing but masks are equally uncertain, whatever the last digit says: the first ones are kept.
    by_row[rows, candidates] = uncertainty.round(decimals=4)
    ascending, ranked = by_row.sort(dim=-1, stable=True)
    is_kept = (ascending if confidence_threshold is not None else ascending.cumsum(dim=-1) - ascending) <= bound
    is_kept[:, 0] = True
    return torch.empty_like(is_kept).scatter(-1, ranked, is_kept)[rows, candidates]


class TokenSampler:
    """How a token is chosen: logits processors, then a draw, or the most probable one.

    Args:
        processors: From `for_slots`.
        is_greedy: Whether the most probable token is taken.
        generator: Source of randomness; None: torch's global one; a list: one for each row.
        mask_token_id: Which is never chosen.
    """

    def __init__(
        self,
        processors: list[LogitsProcessor | SlotProcessor],
        is_greedy: bool,
        generator: Generators,
        mask_token_id: int,
    ):
        self.processors, self.is_greedy = processors, is_greedy
        self.generator, self.mask_token_id = generator, mask_token_id
        self.looks_at_text = not all(type(processor) in TEXT_FREE_PROCESSORS for processor in processors)

    def process(
        self, logits: torch.Tensor, canvas: Canvas | None, rows: list[int], columns: list[int]
    ) -> torch.Tensor:
        """The scores (slots, vocab) to choose from, at (rows, columns) of the canvas; the logits stay as they are.

        No canvas is needed where no processor `looks_at_text`.
        """
        if not self.processors:
            return logits
        scores = process_logits(self.processors, logits.clone(), canvas, rows, columns)  # they may work in place
        scores[:, self.mask_token_id] = -torch.inf
        return scores

    def probabilities(self, scores: torch.Tensor) -> torch.Tensor:
        """The distribution (slots, vocab) of the token: softmax of the scores, or all on the largest one."""
        if not self.is_greedy:
            return scores.softmax(dim=-1)
        return F.one_hot(scores.argmax(dim=-1), scores.shape[-1]).to(scores.dtype)

    def log_probs(self, scores: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """(slots,), the log-probability, in nats, with which each of `tokens` (slots,) is taken; -inf: never."""
        if self.is_greedy:
            return torch.where(scores.argmax(dim=-1) == tokens, 0, -torch.inf).to(scores.dtype)
        return -F.cross_entropy(scores, tokens, reduction="none")

    def uniform(self, counts: list[int], device: torch.device) -> torch.Tensor:
        """`counts[r]` uniform numbers for row r."""
        return draw_uniform(counts, self.generator, device)


def is_drawable(scores: torch.Tensor) -> torch.Tensor:
    """(slots,): whether there is a token to draw."""
    return scores.amax(dim=-1).isfinite()


def require_drawable(is_drawable: list[float]) -> None:
    """Raises a ValueError if some slot has no token to draw."""
    if not all(is_drawable):
        raise ValueError(
            "No token can be drawn: the scores of a slot are NaN, or -inf for every token. Look for an overflow in "
            "the model (float16?) or for a `logits_processor` that forbids everything."
        )
