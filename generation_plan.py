"""A plan: in which order, and in which groups, the tokens of each row are generated. A group a forward.

`generate` draws plans, `log_likelihood` scores text under them.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from .generation_canvas import Canvas
from .generation_configuration import EsoGenerationConfig
from .generation_order import order_of_slots, plan_generation
from .generation_sampling import Generators, on_cpu


@dataclass
class GenerationPlan:
    """The plans of the rows of a batch, one each.

    Args:
        order: (rows, length), the column of the token at each slot: given ones first, padding last.
        groups: (rows, length), the number of the group of each slot, ascending from 1; 0 where given, and at padding.
    """

    order: torch.Tensor
    groups: torch.Tensor

    @property
    def group_starts(self) -> torch.Tensor:
        """(rows, length), the first slot of the group of each slot; where given, and at padding, the slot itself."""
        slots = torch.arange(self.groups.shape[1], device=self.groups.device)
        goes_on = torch.zeros_like(self.groups, dtype=torch.bool)
        goes_on[:, 1:] = (self.groups[:, 1:] == self.groups[:, :-1]) & (self.groups[:, 1:] > 0)
        return torch.where(goes_on, 0, slots).cummax(dim=-1).values

    @property
    def group_ends(self) -> list[list[int]]:
        """Of each row, the slots at which its groups end, ascending."""
        is_last = self.groups > 0
        is_last[:, :-1] &= self.groups[:, :-1] != self.groups[:, 1:]
        return [(row.nonzero()[:, 0] + 1).tolist() for row in is_last]

    @property
    def num_groups(self) -> torch.Tensor:
        """(rows,), the forwards that each row takes, unless they choose for themselves which tokens they keep."""
        return F.pad(self.groups, (1, 0)).amax(dim=-1)  # there may be no slots at all

    def __getitem__(self, rows: slice) -> "GenerationPlan":
        return GenerationPlan(self.order[rows], self.groups[rows])

    def one_by_one(self) -> "GenerationPlan":
        """The same order, a token a group."""
        return GenerationPlan(self.order, one_by_one(self.groups > 0))


def one_by_one(is_open: torch.Tensor) -> torch.Tensor:
    """Groups of one token, (rows, length), of the slots that `is_open` says, (rows, length) bool."""
    return is_open.long().cumsum(dim=-1) * is_open


def plan_rows(canvas: Canvas, generator: Generators, alpha_0: float, settings: EsoGenerationConfig) -> GenerationPlan:
    """Plans in which order, and in which groups, the open columns of every row are filled in.

    Args:
        canvas: The text. In generation order stand its given tokens (those that are cached first), then the open ones,
            then padding.
        generator: Source of randomness; None: torch's global one; a list: one for each row.
        alpha_0: Expected fraction of tokens of the diffusion phase, in [0, 1].
        settings: Those of `generate`. In lockstep rows share the numbers of tokens of their groups; otherwise each has
            a plan of its own. The groups of adaptive unmasking are the pools from which it chooses, those of lossless
            decoding have one token.

    Raises:
        ValueError: for rows that cannot advance in lockstep.
    """
    columns = torch.arange(canvas.length, dtype=torch.float64).expand(canvas.batch, -1)
    kind = torch.where(canvas.is_open, 2, torch.where(canvas.is_real, 1, 3))
    rank = columns.clone()
    for row, cached in enumerate(canvas.cached_columns):
        kind[row, cached] = 0
        rank[row, cached] = torch.arange(len(cached), dtype=torch.float64)
    order_of_rows = order_of_slots(kind, rank)
    groups = torch.zeros_like(order_of_rows)
    num_cached, num_open = [len(cached) for cached in canvas.cached_columns], canvas.num_open
    plan: dict[str, Any] = {
        "alpha_0": alpha_0,
        "num_steps": settings.num_diffusion_steps,
        "unmasking_order": settings.order,
        "block_length": settings.block_length,
        "is_adaptive": settings.is_adaptive,
    }
    if settings.lockstep:
        if isinstance(generator, list) or len(set(zip(num_cached, canvas.num_given, num_open, strict=True))) > 1:
            raise ValueError(
                "`lockstep=True` is for rows that are alike: with as many given tokens and holes, and without a "
                "generator for each. Leave it unset."
            )
        orders, counts = plan_generation(canvas.batch, num_open[0], generator=on_cpu(generator), **plan)
        plans = [(order, counts) for order in orders]
    else:
        generators = generator if isinstance(generator, list) else [on_cpu(generator)] * canvas.batch
        rows = zip(num_open, generators, strict=True)
        drawn = (plan_generation(1, count, generator=on_cpu(source), **plan) for count, source in rows)
        plans = [(orders[0], counts) for orders, counts in drawn]
    for row, (order, counts) in enumerate(plans):
        start, stop = canvas.num_given[row], canvas.num_given[row] + num_open[row]
        order_of_rows[row, start:stop] = order_of_rows[row, start:stop][order]
        groups[row, start:stop] = torch.arange(1, len(counts) + 1).repeat_interleave(torch.tensor(counts).long())
    planned = GenerationPlan(order_of_rows, groups)
    return planned.one_by_one() if settings.lossless else planned
