"""The paper's decoding: every forward reveals several tokens of a row, drawn in parallel from their own slots."""

from bisect import bisect_right
from collections.abc import Callable

import torch
import torch.nn.functional as F

from .generation_canvas import Canvas
from .generation_configuration import DEFAULT_NUM_CANDIDATES, EsoGenerationConfig
from .generation_decoding import Decisions, DecodingStrategy, Feed, Outputs
from .generation_drafting import DrawingTurns
from .generation_plan import GenerationPlan
from .generation_sampling import TokenSampler, draw_tokens, is_drawable, require_drawable, select_tokens
from .modeling_drafting import EsoDraftHead

Drawer = Callable[[torch.Tensor, slice | torch.Tensor], torch.Tensor]
"""From scores (slots, vocab) of the given ones of the slots that were fed to tokens (slots,)."""


class UnmaskingSchedule:
    """The generation order of each row and how far it has come. Rows advance independently.

    Args:
        canvas: The text to fill in.
        plan: The orders to begin with, and the groups: a forward each, or the pools of adaptive unmasking.
        num_candidates: Masks a forward of adaptive unmasking; None: not adaptive.
        requeues: Whether candidates that were not kept wait until the others of their group have been tried.
    """

    def __init__(self, canvas: Canvas, plan: GenerationPlan, num_candidates: int | None = None, requeues: bool = True):
        self.num_candidates, self.requeues = num_candidates, requeues
        self.order, self.group_ends = plan.order.clone(), plan.group_ends
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

    Args:
        canvas: The text to fill in.
        plan: The order of each row, and its groups.
        sampler: How tokens are chosen.
        use_cache: Whether what is decided is cached.
        settings: Those of adaptive unmasking.
        head: The draft head, which lets tokens of a forward know their neighbours; None: they do not.
    """

    def __init__(
        self,
        canvas: Canvas,
        plan: GenerationPlan,
        sampler: TokenSampler,
        use_cache: bool,
        settings: EsoGenerationConfig,
        head: EsoDraftHead | None,
    ):
        self.canvas, self.plan, self.sampler, self.use_cache = canvas, plan, sampler, use_cache
        self.head = head
        self.settings = settings
        self.schedule = UnmaskingSchedule(
            canvas,
            plan,
            (settings.num_candidates or DEFAULT_NUM_CANDIDATES) if settings.is_adaptive else None,
            # Text that is to grow in order is tried again at once.
            requeues=settings.order != "left_to_right",
        )
        self.in_lockstep = self.schedule.in_lockstep
        self.order, self.cached = self.schedule.order, self.schedule.cached
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

    def drawer(self, rows: list[int], columns: list[int], device: torch.device) -> Drawer:
        """How tokens come from the scores of the masks that were fed, at (rows, columns), or of some of them."""
        if self.sampler.is_greedy:
            return lambda scores, slots: scores.argmax(dim=-1)
        uniform = self.sampler.uniform(self.widths, device)
        return lambda scores, slots: draw_tokens(scores, uniform[slots])

    def decide(self, outputs: Outputs, step: int) -> Decisions:
        widths, device = self.widths, outputs.logits.device
        rows, columns = self.schedule.columns(widths)
        # By what each mask says by itself: tokens that go back to the pool are nobody's neighbours.
        criteria = (self.settings.confidence_threshold, self.settings.entropy_bound)
        is_kept = select_tokens(outputs.logits, widths, *criteria)
        positions = self.canvas.text_positions[rows, columns]
        turns = DrawingTurns(self.head, outputs, positions, widths, is_kept.cpu() if self.head is not None else None)
        draw, parts = self.drawer(rows, columns, device), []
        places = torch.tensor([rows, columns], device=device)
        for slots in turns:
            parts.append(self.sampler.process(turns.logits[slots], self.canvas, *places[:, slots].tolist()))
            turns.tokens[slots] = draw(parts[-1], slots)
        drawn, logits, scores = turns.tokens, turns.logits, turns.assemble(parts)
        log_probs = -F.cross_entropy(logits, drawn, reduction="none")
        # All that the host needs to know of this forward, in one transfer.
        tokens, values, can_be_drawn, keeps = torch.stack(
            [drawn.double(), log_probs.double(), is_drawable(scores).double(), is_kept.double()]
        ).tolist()
        require_drawable(can_be_drawn)
        kept = [slot for slot, keep in enumerate(keeps) if keep]
        if len(kept) < len(keeps):
            scores, logits = scores[kept], logits[kept]
        decisions = Decisions([rows[slot] for slot in kept], [columns[slot] for slot in kept], scores, logits)
        tokens, values = [int(tokens[slot]) for slot in kept], [values[slot] for slot in kept]
        self.canvas.reveal(decisions.rows, decisions.columns, tokens, values, step)
        self.schedule.advance(widths, [bool(keep) for keep in keeps], self.use_cache)
        return decisions
