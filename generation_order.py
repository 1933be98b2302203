"""Generation orders as pure functions: σ(s) is the text position of the token that stands at slot s.

Clean slots come before masked slots, padding comes last: with causal attention over the slots nothing
else is needed to keep masks out of the clean tokens' states, and padding out of everybody's.
"""

import torch


def sample_generation_order(
    num_rows: int,
    num_tokens: int,
    num_shuffled: int,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Draws an order per row: `num_shuffled` uniform positions in uniform order, then the rest ascending.

    Returns:
        (num_rows, num_tokens), each row a permutation of 0 ... num_tokens - 1. With `num_shuffled` the number of
        tokens that the diffusion phase decodes, this is the σ of generation and of the exact likelihood.
    """
    noise = torch.rand(num_rows, num_tokens, dtype=torch.float64, generator=generator, device=device)
    order = noise.argsort(dim=-1)
    rest = order[:, num_shuffled:].sort(dim=-1).values
    return torch.cat([order[:, :num_shuffled], rest], dim=-1)


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


def text_positions(is_real: torch.Tensor) -> torch.Tensor:
    """Text position of every slot of a padded batch, `is_real` (batch, slots) bool; padding gets a neighbour's."""
    return (is_real.long().cumsum(dim=-1) - 1).clamp(min=0)
