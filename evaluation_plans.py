"""Plans to score text under: given ones, drawn ones, or all of one token a group."""

import math
from copy import copy
from dataclasses import dataclass
from itertools import permutations
from typing import Any, Literal

import torch

from .generation_canvas import Canvas
from .generation_configuration import EsoGenerationConfig
from .generation_order import order_of_slots, order_probability, sample_scoring_orders
from .generation_plan import one_by_one, plan_rows
from .generation_sampling import Generators, on_cpu

MAX_ENUMERATED_TOKENS = 8
"""Free tokens up to which all orders are enumerated: 8! = 40,320."""


@dataclass
class Texts:
    """Texts to score.

    Args:
        tokens: (rows, length), clean.
        is_real: (rows, length) bool, which are not padding.
        is_free: (rows, length) bool, which are scored; the others that are real are given.
        mask_token_id: The mask.
    """

    tokens: torch.Tensor
    is_real: torch.Tensor
    is_free: torch.Tensor
    mask_token_id: int

    def __getitem__(self, rows: slice | torch.Tensor) -> "Texts":
        return Texts(self.tokens[rows], self.is_real[rows], self.is_free[rows], self.mask_token_id)

    def repeat(self, times: int) -> "Texts":
        """Each row so many times, one behind the other."""
        rows = torch.arange(len(self.tokens)).repeat_interleave(times)
        return self[rows]

    def canvas(self) -> Canvas:
        """The texts with what is free still to be filled in, and no end."""
        masked = self.tokens.masked_fill(self.is_free, self.mask_token_id)
        return Canvas(masked, self.is_real, masked.shape[1], self.mask_token_id, eos_token_ids=[], pad_token_id=0)

    def kinds(self, free: int, given: int, padding: int) -> torch.Tensor:
        """(rows, length), of each column the number of its kind."""
        return torch.where(self.is_free, free, torch.where(self.is_real, given, padding))


def choose_plans(
    texts: Texts,
    num_orders: int | Literal["all"],
    orders: torch.Tensor | None,
    groups: torch.Tensor | None,
    alpha_0: float,
    generator: Generators,
    settings: EsoGenerationConfig | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The plans that `log_likelihood` is asked for.

    Args:
        texts: What is scored, in `batch` rows of `length`.
        num_orders, orders, groups, alpha_0, generator: As for `log_likelihood`.
        settings: The sampler's; None: one token a forward.

    Returns:
        Orders and groups, as in [`GenerationPlan`], (batch, K, length); the logarithms of the weights of the plans,
        (K,) or (batch, K).

    Raises:
        ValueError: for arguments that do not fit together.
    """
    log_weights = None
    if groups is not None and orders is None:
        raise ValueError("`groups` are those of the slots of `orders`: give both.")
    if orders is not None:
        if num_orders != 1:
            raise ValueError(f"`orders` are given: leave `num_orders` unset, got {num_orders!r}.")
        if groups is None and settings is not None and not settings.lossless:
            raise ValueError("`orders` of a sampler need their `groups` (`generate` returns both): give both.")
        orders, groups = _given_plans(texts, orders, groups)
    elif num_orders == "all":
        if settings is not None:
            raise ValueError("`num_orders='all'` is for one token a forward: leave the settings of a sampler unset.")
        orders, log_weights = _all_orders(texts, alpha_0)
    else:
        num_plans = 1 if alpha_0 == 0 else num_orders
        if settings is None:
            orders = _draw_orders(texts, num_plans, alpha_0, generator)
        else:
            orders, groups = _draw_plans(texts, num_plans, alpha_0, generator, settings)
    if groups is None:
        groups = one_by_one(texts.is_free[:, None].expand_as(orders).gather(-1, orders))
    if log_weights is None:
        log_weights = torch.full(orders.shape[1:2], -math.log(orders.shape[1]), dtype=torch.float64)
    return orders, groups, log_weights


def _given_plans(
    texts: Texts, orders: torch.Tensor, groups: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The orders and groups of the caller, in which given tokens move to the front, and padding to the end."""
    batch, length = texts.tokens.shape
    orders = _require_integers("orders", orders, batch, length)
    if not torch.equal(orders.sort(dim=-1).values, torch.arange(length).expand_as(orders)):
        raise ValueError(f"`orders` must hold permutations of 0 ... {length - 1}.")
    if groups is not None:
        groups = _require_integers("groups", groups, batch, length)
        if groups.shape != orders.shape:
            raise ValueError(
                f"`groups` must be those of the slots of `orders`, got the shapes {tuple(groups.shape)} and "
                f"{tuple(orders.shape)}."
            )
    kind = texts.kinds(free=1, given=0, padding=2)[:, None].expand_as(orders).gather(-1, orders)
    slots = torch.arange(length, dtype=torch.float64).expand_as(orders)
    # What is given stands from left to right.
    moved = order_of_slots(kind, torch.where(kind == 0, orders.double(), slots))
    orders, kind = orders.gather(-1, moved), kind.gather(-1, moved)
    if groups is None:
        return orders, None
    is_scored, groups = kind == 1, groups.gather(-1, moved)
    both = is_scored[..., 1:] & is_scored[..., :-1]
    if (both & (groups[..., 1:] < groups[..., :-1])).any():
        raise ValueError("`groups` must not descend along the slots of an order: a group is decided in one piece.")
    begins = is_scored.clone()
    begins[..., 1:] &= ~both | (groups[..., 1:] != groups[..., :-1])
    return orders, begins.long().cumsum(dim=-1) * is_scored


def _all_orders(texts: Texts, alpha_0: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Every order that can be drawn, (batch, K, length), and the logarithms of their probabilities, (batch, K)."""
    counts = texts.is_free.sum(dim=-1).tolist()
    if alpha_0 > 0 and max(counts) > MAX_ENUMERATED_TOKENS:
        raise ValueError(
            f"`num_orders='all'` takes at most {MAX_ENUMERATED_TOKENS} tokens to score, got up to {max(counts)}."
        )
    possible = {}
    for count in set(counts):
        candidates = permutations(range(count)) if alpha_0 > 0 else [tuple(range(count))]
        weighted = [(order, order_probability(list(order), alpha_0)) for order in candidates]
        possible[count] = [(order, probability) for order, probability in weighted if probability > 0]
    num_orders = max(len(weighted) for weighted in possible.values())
    columns = torch.arange(texts.tokens.shape[1], dtype=torch.float64).expand(texts.tokens.shape)
    orders = order_of_slots(texts.kinds(free=1, given=0, padding=2), columns)[:, None].repeat(
        1, num_orders, 1
    )  # given, free, padding
    log_weights = torch.full((len(counts), num_orders), -torch.inf, dtype=torch.float64)
    num_given = (texts.is_real & ~texts.is_free).sum(dim=-1).tolist()
    for row, (count, start) in enumerate(zip(counts, num_given, strict=True)):
        permutation = torch.tensor([order for order, _ in possible[count]], dtype=torch.long).view(
            len(possible[count]), count
        )
        free = orders[row, 0, start : start + count].clone()
        orders[row, : len(permutation), start : start + count] = free[permutation]
        probabilities = [probability for _, probability in possible[count]]
        log_weights[row, : len(permutation)] = torch.tensor(probabilities, dtype=torch.float64).log()
    return orders, log_weights


def _draw_orders(texts: Texts, num_orders: int, alpha_0: float, generator: Generators) -> torch.Tensor:
    """Draws orders of one token a forward, (batch, K, length)."""
    is_real, is_given = texts.is_real, texts.is_real & ~texts.is_free
    if not isinstance(generator, list):
        return sample_scoring_orders(is_real, is_given, num_orders, alpha_0, on_cpu(generator))
    orders = []
    for row, source in enumerate(generator):
        # Of the real tokens alone: what is drawn must not depend on the padding.
        columns, padding = is_real[row].nonzero()[:, 0], (~is_real[row]).nonzero()[:, 0]
        given = is_given[row : row + 1, columns]
        drawn = sample_scoring_orders(torch.ones_like(given), given, num_orders, alpha_0, on_cpu(source))
        orders.append(torch.cat([columns[drawn[0]], padding.expand(num_orders, -1)], dim=-1))
    return torch.stack(orders)


def _draw_plans(
    texts: Texts, num_plans: int, alpha_0: float, generator: Generators, settings: EsoGenerationConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws plans as `generate` would, to fill in what is free: orders and groups, (batch, K, length)."""
    settings = copy(settings)
    settings.lockstep = False  # each row alone follows the same distribution
    if isinstance(generator, list):
        generator = [source for source in generator for _ in range(num_plans)]
    plan = plan_rows(texts.repeat(num_plans).canvas(), generator, alpha_0, settings)
    shape = (len(texts.tokens), num_plans, -1)
    return plan.order.view(shape), plan.groups.view(shape)


def _require_integers(name: str, tensor: Any, batch: int, length: int) -> torch.Tensor:
    """(batch, K, length), on the CPU."""
    if not isinstance(tensor, torch.Tensor) or tensor.is_floating_point() or tensor.dtype == torch.bool:
        given = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise ValueError(f"`{name}` must be a tensor of integers, got {given}.")
    tensor = tensor.cpu().long()
    if tensor.dim() == 2:
        tensor = tensor.expand(batch, *tensor.shape)
    if tensor.dim() != 3 or tensor.shape[0] != batch or tensor.shape[2] != length or tensor.shape[1] == 0:
        raise ValueError(
            f"`{name}` must have the shape (K, {length}) or ({batch}, K, {length}), got {tuple(tensor.shape)}."
        )
    return tensor
