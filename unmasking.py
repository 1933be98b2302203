"""Which masks every row of a batch feeds to the next forward, and which of the tokens drawn there it keeps."""

from bisect import bisect_right
from itertools import accumulate

import torch

from .canvas import Canvas
from .generation_order import order_of_slots, plan_generation
from .sampling import Generators, on_cpu

DEFAULT_NUM_CANDIDATES = 16


class UnmaskingSchedule:
    """The generation order of each row and how far it has come. Rows advance independently.

    Args:
        canvas: The text to fill in. In generation order stand its given tokens, then the open ones, then padding.
        alpha_0, num_steps, unmasking_order, block_length: The plan; see `plan_generation`.
        num_candidates: Masks a forward of adaptive unmasking; None: not adaptive, a forward a group of the plan.
        generator: Source of randomness; None: torch's global one; a list: one for each row.
    """

    def __init__(
        self,
        canvas: Canvas,
        alpha_0: float,
        num_steps: int | None,
        unmasking_order: str,
        block_length: int | None,
        num_candidates: int | None,
        generator: Generators,
    ):
        self.num_candidates = num_candidates
        # What is tried in vain waits until the others of its group have been tried, unless text is to grow in order.
        self.requeues = unmasking_order != "left_to_right"
        columns = torch.arange(canvas.length, dtype=torch.float64).expand(canvas.batch, -1)
        group = torch.where(canvas.is_open, 1, torch.where(canvas.is_real, 0, 2))
        self.order = order_of_slots(group, columns)
        self.decided = list(canvas.num_given)  # slots in front whose tokens are known
        self.cached = [0] * canvas.batch  # slots in front whose keys and values are cached
        self.group_ends = []

        def plan(num_rows: int, num_tokens: int, generator: torch.Generator | None):
            return plan_generation(
                num_rows,
                num_tokens,
                alpha_0,
                num_steps,
                unmasking_order,
                block_length,
                num_candidates,
                on_cpu(generator),
            )

        rows_are_alike = len(set(zip(canvas.num_given, canvas.num_open, strict=True))) == 1
        if rows_are_alike and not isinstance(generator, list):
            orders, counts = plan(canvas.batch, canvas.num_open[0], generator)
            plans = [(order, counts) for order in orders]
        else:
            generators = generator if isinstance(generator, list) else [generator] * canvas.batch
            rows = zip(canvas.num_open, generators, strict=True)
            plans = [(orders[0], counts) for orders, counts in (plan(1, count, source) for count, source in rows)]
        for row, (order, counts) in enumerate(plans):
            start, stop = canvas.num_given[row], canvas.num_given[row] + canvas.num_open[row]
            self.order[row, start:stop] = self.order[row, start:stop][order]
            self.group_ends.append(list(accumulate(counts, initial=start))[1:])
        self.in_lockstep = num_candidates is None and len({(*ends,) for ends in self.group_ends}) == 1

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
