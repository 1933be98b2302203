"""The paper's decoding: every forward reveals several tokens of a row, drawn in parallel from their own slots."""

from bisect import bisect_right
from itertools import accumulate
from typing import Any

import torch

from .generation_canvas import Canvas
from .generation_decoding import Decisions, DecodingStrategy, Feed
from .generation_order import order_of_slots, plan_generation
from .generation_sampling import (
    Generators,
    TokenSampler,
    is_drawable,
    on_cpu,
    require_drawable,
    select_tokens,
)


def plan_rows(
    canvas: Canvas, generator: Generators, in_lockstep: bool, **plan: Any
) -> tuple[torch.Tensor, list[list[int]]]:
    """Plans in which order, and in which groups, the open columns of every row are filled in.

    Args:
        canvas: The text. In generation order stand its given tokens (those that are cached first), then the open ones,
            then padding.
        generator: Source of randomness; None: torch's global one; a list: one for each row.
        in_lockstep: Whether rows share the numbers of tokens of their groups; otherwise each has a plan of its own.
        plan: The arguments of `plan_generation`.

    Returns:
        The order, (batch, length), the column of the token at each slot; and of each row the slots at which its groups
        end, ascending.

    Raises:
        ValueError: for rows that cannot advance in lockstep.
    """
    columns = torch.arange(canvas.length, dtype=torch.float64).expand(canvas.batch, -1)
    group = torch.where(canvas.is_open, 2, torch.where(canvas.is_real, 1, 3))
    rank = columns.clone()
    for row, cached in enumerate(canvas.cached_columns):
        group[row, cached] = 0
        rank[row, cached] = torch.arange(len(cached), dtype=torch.float64)
    order_of_rows = order_of_slots(group, rank)
    num_cached, num_open = [len(cached) for cached in canvas.cached_columns], canvas.num_open
    if in_lockstep:
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
        planned = (plan_generation(1, count, generator=on_cpu(source), **plan) for count, source in rows)
        plans = [(orders[0], counts) for orders, counts in planned]
    group_ends = []
    for row, (order, counts) in enumerate(plans):
        start, stop = canvas.num_given[row], canvas.num_given[row] + num_open[row]
        order_of_rows[row, start:stop] = order_of_rows[row, start:stop][order]
        group_ends.append(list(accumulate(counts, initial=start))[1:])
    return order_of_rows, group_ends


class UnmaskingSchedule:
    """The generation order of each row and how far it has come. Rows advance independently.

    Args:
        canvas: The text to fill in.
        generator, in_lockstep: As for `plan_rows`.
        num_candidates: Masks a forward of adaptive unmasking; None: not adaptive, a forward a group of the plan.
        unmasking_order, plan: The arguments of `plan_generation`.
    """

    def __init__(
        self,
        canvas: Canvas,
        generator: Generators,
        in_lockstep: bool,
        num_candidates: int | None,
        unmasking_order: str,
        **plan: Any,
    ):
        self.num_candidates = num_candidates
        # What is tried in vain waits until the others of its group have been tried, unless text is to grow in order.
        self.requeues = unmasking_order != "left_to_right"
        self.order, self.group_ends = plan_rows(
            canvas,
            generator,
            in_lockstep,
            is_adaptive=num_candidates is not None,
            unmasking_order=unmasking_order,
            **plan,
        )
        # Of each row, the slots in front whose tokens are known, and those whose keys and values are cached.
        self.decided = list(canvas.num_given)
        self.cached = [len(columns) for columns in canvas.cached_columns]
        # Of rows that are alike the plans may agree by themselves: one token a forward, or a single row.
        rows = zip(self.cached, canvas.num_given, self.group_ends, strict=True)
        plans = {(cached, given, *ends) for cached, given, ends in rows}
        self.in_lockstep = num_candidates is None and len(plans) == 1

    def next_widths(self, is_idle: list[bool]) -> list[int]:
        """The number of masks that each row feeds to the next forward; none if it is idle."""
        widths = []
        for ends, decided, idle in zip(self.group_ends, self.decided, is_idle, strict=True):
            group = bisect_right(ends, decided)
            width = 0 if idle or group == len(ends) else ends[group] - decided
            widths.append(width if self.num_candidates is None else min(width, self.num_candidates))
        return widths

    def columns(self, widths: list[int]) -> tuple[list[int], list[int]]:
        """Rows and columns of the masks that are fed next, row by row."""
        rows = [row for row, width in enumerate(widths) for _ in range(width)]
        slots = [
            slot
            for width, decided in zip(widths, self.decided, strict=True)
            for slot in range(decided, decided + width)
        ]
        return rows, self.order[rows, slots].tolist()

    def advance(self, widths: list[int], is_kept: list[bool], use_cache: bool) -> None:
        """Moves on: of the masks that were fed, `is_kept` says row by row which tokens are now decided.

        The others go back to the pool of their group.
        """
        first = 0
        for row, width in enumerate(widths):
            kept, first = is_kept[first : first + width], first + width
            decided = self.decided[row]
            if not all(kept):
                group_end = self.group_ends[row][bisect_right(self.group_ends[row], decided)]
                window, pool = self.order[row, decided : decided + width], self.order[row, decided + width : group_end]
                is_kept_here = torch.tensor(kept)
                chosen, returned = window[is_kept_here], window[~is_kept_here]
                rest = (pool, returned) if self.requeues else (returned, pool)
                self.order[row, decided:group_end] = torch.cat([chosen, *rest])
            if use_cache:
                self.cached[row] = decided
            self.decided[row] += sum(kept)


class ParallelUnmasking(DecodingStrategy):
    """Each forward takes the tokens decided by the one before and then masks, whose tokens are drawn in parallel.

    Source: arXiv 2506.01928, section 4; adaptive unmasking: [`EsoGenerationConfig`].
    """

    def __init__(
        self,
        canvas: Canvas,
        schedule: UnmaskingSchedule,
        sampler: TokenSampler,
        use_cache: bool,
        confidence_threshold: float | None,
        entropy_bound: float | None,
    ):
        self.canvas, self.schedule, self.sampler, self.use_cache = canvas, schedule, sampler, use_cache
        self.confidence_threshold, self.entropy_bound = confidence_threshold, entropy_bound
        self.in_lockstep = schedule.in_lockstep
        self.order, self.cached = schedule.order, schedule.cached
        self.widths: list[int] = []

    def next_feed(self) -> Feed:
        canvas, schedule = self.canvas, self.schedule
        self.widths = schedule.next_widths(canvas.idle_rows(in_lockstep=self.in_lockstep))
        starts = schedule.cached
        stops = [decided + width for decided, width in zip(schedule.decided, self.widths, strict=True)]
        num_fed = [stop - start for start, stop in zip(starts, stops, strict=True)]
        slots = torch.tensor(starts)[:, None] + torch.arange(max(num_fed))
        columns = schedule.order.gather(1, slots.minimum(torch.tensor(stops)[:, None] - 1).clamp(min=0))
        return Feed(
            starts=list(starts),
            input_ids=canvas.tokens.gather(1, columns),
            position_ids=canvas.text_positions.gather(1, columns),
            num_fed=num_fed,
            kept=[range(fed - width, fed) for fed, width in zip(num_fed, self.widths, strict=True)],
        )

    def decide(self, logits: torch.Tensor, step: int) -> Decisions:
        widths = self.widths
        rows, columns = self.schedule.columns(widths)
        scores = self.sampler.process(logits, self.canvas, rows, columns)
        drawn = self.sampler.draw(scores, widths)
        is_kept = select_tokens(logits, widths, self.confidence_threshold, self.entropy_bound)
        log_probs = logits.gather(-1, drawn[:, None])[:, 0] - logits.logsumexp(dim=-1)
        # All that the host needs to know of this forward, in one transfer.
        tokens, values, can_be_drawn, keeps = torch.stack(
            [drawn.double(), log_probs.double(), is_drawable(scores).double(), is_kept.double()]
        ).tolist()
        require_drawable(can_be_drawn)
        kept = [slot for slot, keep in enumerate(keeps) if keep]
        decisions = Decisions(
            rows=[rows[slot] for slot in kept],
            columns=[columns[slot] for slot in kept],
            scores=scores[kept],
            logits=logits[kept],
        )
        tokens, values = [int(tokens[slot]) for slot in kept], [values[slot] for slot in kept]
        self.canvas.reveal(decisions.rows, decisions.columns, tokens, values, step)
        self.schedule.advance(widths, [bool(keep) for keep in keeps], self.use_cache)
        return decisions
