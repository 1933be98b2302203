"""Generation orders as pure functions: σ(s) is the text position of the token that stands at slot s.

Clean slots come before masked slots, padding comes last: with causal attention over the slots nothing
else is needed to keep masks out of the clean tokens' states, and padding out of everybody's.
"""

import math
from typing import Literal

import torch

from .noise_schedule import sample_unmasking_counts
from .validation import is_integer

UNMASKING_ORDERS = ("random", "strided", "left_to_right")


def plan_generation(
    num_rows: int,
    num_tokens: int,
    alpha_0: float,
    num_steps: int | Literal["max"] | None = None,
    unmasking_order: str = "random",
    block_length: int | None = None,
    is_adaptive: bool = False,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, list[int]]:
    """Plans in which order the tokens are generated, and in which groups.

    Every block runs both phases before the next begins: a diffusion phase that reveals about α_0 of its tokens in
    parallel, then a sequential phase that reveals the others one by one, left to right.

    Args:
        num_rows, num_tokens: Rows of the batch, and tokens to generate in each.
        alpha_0: Expected fraction of tokens of the diffusion phase, in [0, 1].
        num_steps: Time steps of the diffusion phase, shared among the blocks in proportion; None: one a token; "max":
            so many that no two tokens share one.
        unmasking_order: Which tokens the diffusion phase takes. "random": uniform ones, as in training.
            "strided": in step i those congruent to π(i) modulo the number of steps, π random, so that tokens drawn in
            parallel stand far apart; with no number of steps, they are as many as stand apart, and taken one by one.
            "left_to_right": the next ones.
        block_length: Tokens of a block; None: one block.
        is_adaptive: Whether each forward decides how many tokens it keeps: the diffusion phase of a block becomes one
            group. Otherwise a group a forward.
        generator: Source of randomness on the CPU; None: torch's global one.

    Returns:
        The order, (num_rows, num_tokens), each row a permutation; and the number of tokens of each group, shared by
        the rows. Every row alone follows the right distribution, but rows that share these numbers are not independent
        of one another: for samples that are, plan each row by itself.
    """
    block_length = block_length or num_tokens
    orders, counts = [torch.empty(num_rows, 0, dtype=torch.long)], []
    for start in range(0, num_tokens, max(block_length, 1)):
        size = min(block_length, num_tokens - start)
        steps = max(1, round(num_steps * size / num_tokens)) if is_integer(num_steps) else num_steps
        if unmasking_order == "strided":
            order, diffusion_counts = _sample_strided_order(num_rows, size, steps, alpha_0, generator)
        else:
            diffusion_counts = sample_unmasking_counts(size, size if steps is None else steps, alpha_0, generator)
            num_shuffled = 0 if unmasking_order == "left_to_right" else sum(diffusion_counts)
            order = sample_generation_order(num_rows, size, num_shuffled, generator)
        orders.append(order + start)
        num_sequential = size - sum(diffusion_counts)
        if is_adaptive and diffusion_counts:
            diffusion_counts = [sum(diffusion_counts)]
        counts += diffusion_counts + [1] * num_sequential
    return torch.cat(orders, dim=-1), counts


def _sample_strided_order(
    num_rows: int,
    num_tokens: int,
    num_steps: int | Literal["max"] | None,
    alpha_0: float,
    generator: torch.Generator | None,
) -> tuple[torch.Tensor, list[int]]:
    """The strided order, (num_rows, num_tokens), and the number of tokens of each group of the diffusion phase.

    The positions are taken class by class, modulo the number of classes. With a number of steps, each of them takes a
    class. Without one, or with "max", a class has as many tokens as stand apart, and each token is a group: how many
    are drawn in parallel, if not one, is then up to the way of decoding, and the order does not depend on it.

    The classes differ in size by one at the most. All rows take a large class in the same steps, so that they share
    the counts, and each draws which one.
    """
    in_parallel = is_integer(num_steps)
    num_classes = min(num_steps, num_tokens) if is_integer(num_steps) else math.ceil(math.sqrt(num_tokens))
    # Rounded at random, so that the expected fraction of diffusion steps is α_0 whatever their number.
    num_diffusion_classes = math.floor(alpha_0 * num_classes + float(torch.rand((), generator=generator)))
    size, num_large = divmod(num_tokens, num_classes)
    takes_large = torch.randperm(num_classes, generator=generator) < num_large
    classes = torch.empty(num_rows, num_classes, dtype=torch.long)
    classes[:, takes_large] = torch.rand(num_rows, num_large, generator=generator).argsort(dim=-1)
    small = torch.rand(num_rows, num_classes - num_large, generator=generator).argsort(dim=-1) + num_large
    classes[:, ~takes_large] = small
    turn_of_position = classes.argsort(dim=-1)[:, torch.arange(num_tokens) % num_classes]
    # The classes of the other turns are left to the sequential phase together, left to right.
    order = turn_of_position.clamp(max=num_diffusion_classes).argsort(dim=-1, stable=True)
    counts = [size + int(large) for large in takes_large[:num_diffusion_classes]]
    return order, counts if in_parallel else [1] * sum(counts)


def sample_generation_order(
    num_rows: int,
    num_tokens: int,
    num_shuffled: int,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Draws an order per row: `num_shuffled` uniform positions in uniform order, then the rest ascending.

    Returns:
        (num_rows, num_tokens), each row a permutation of 0 ... num_tokens - 1. With `num_shuffled` the number of
        tokens that the diffusion phase decodes, this is the σ of generation and of the exact likelihood.
    """
    noise = torch.rand(num_rows, num_tokens, dtype=torch.float64, generator=generator)
    order = noise.argsort(dim=-1)
    rest = order[:, num_shuffled:].sort(dim=-1).values
    return torch.cat([order[:, :num_shuffled], rest], dim=-1)


def sample_scoring_orders(
    is_real: torch.Tensor,
    is_given: torch.Tensor,
    num_orders: int,
    alpha_0: float,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Draws orders in which `generate` might have written the free tokens of a text, after the given ones.

    n ~ Binomial(free tokens, α_0) of the free tokens are shuffled, the others follow from left to right (arXiv
    2506.01928, section 4).

    Args:
        is_real, is_given: (batch, length) bool; given tokens come first, from left to right, padding last.
        num_orders: K.
        alpha_0: In [0, 1].
        generator: Source of randomness on the CPU; None: torch's global one.

    Returns:
        (batch, K, length): the column of the token at each slot.
    """
    batch, length = is_real.shape
    is_free = (is_real & ~is_given)[:, None]
    noise = torch.rand(batch, num_orders, length, dtype=torch.float64, generator=generator)
    num_free = is_free.sum(dim=-1).expand(batch, num_orders).double()
    num_shuffled = torch.binomial(num_free, torch.full_like(num_free, alpha_0), generator=generator)
    rank = noise.masked_fill(~is_free, torch.inf).argsort(dim=-1).argsort(dim=-1)
    is_shuffled = is_free & (rank < num_shuffled[..., None])
    group = torch.where(is_shuffled, 1, torch.where(is_free, 2, torch.where(is_real[:, None], 0, 3)))
    columns = torch.arange(length, dtype=torch.float64)
    return order_of_slots(group, torch.where(is_shuffled, noise, columns))


def order_probability(order: list[int], alpha_0: float) -> float:
    """The probability that an order of free tokens, a permutation of 0 ... n - 1, is the one drawn.

    It arises from every number of shuffled tokens that leaves an ascending rest.
    """
    num_tokens = len(order)
    rest = min(num_tokens, 1)
    while rest < num_tokens and order[-rest - 1] < order[-rest]:
        rest += 1
    return sum(
        math.comb(num_tokens, shuffled)
        * alpha_0**shuffled
        * (1 - alpha_0) ** (num_tokens - shuffled)
        / math.perm(num_tokens, shuffled)
        for shuffled in range(num_tokens - rest, num_tokens + 1)
    )


def order_of_slots(group: torch.Tensor, rank: torch.Tensor) -> torch.Tensor:
    """Sorts slots by group, and by rank within a group.

    Args:
        group: (batch, slots), small integers, for example 0 = clean, 1 = masked, 2 = padding.
        rank: (batch, slots), float64, the key inside a group: noise for a uniform order, the position for a
            left-to-right one.

    Returns:
        (batch, slots), the index into the given layout of the token for each slot of the new one.
    """
    by_rank = rank.argsort(dim=-1, stable=True)
    by_group = group.gather(-1, by_rank).argsort(dim=-1, stable=True)
    return by_rank.gather(-1, by_group)


def clean_masked_padding(is_masked: torch.Tensor, is_real: torch.Tensor) -> torch.Tensor:
    """The group of every slot in text order, (batch, slots): 0 clean, 1 masked, 2 padding, from two masks of bool."""
    return is_masked.long().masked_fill(~is_real, 2)


def clean_first_order(group: torch.Tensor) -> torch.Tensor:
    """The order clean, masked, padding, each left to right, given the `group` of every slot, (batch, slots)."""
    rank = torch.arange(group.shape[1], dtype=torch.float64, device=group.device).expand(group.shape)
    return order_of_slots(group, rank)


def text_positions(is_real: torch.Tensor) -> torch.Tensor:
    """Text position of every slot of a padded batch, `is_real` (batch, slots) bool; padding gets a neighbour's."""
    return (is_real.long().cumsum(dim=-1) - 1).clamp(min=0)
