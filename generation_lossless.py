"""Lossless parallel decoding: many tokens a forward, distributed exactly as one at a time in the same order.

Speculative sampling (arXiv 2302.01318, 2211.17192; for any-order models 2504.20456) in which the model drafts for
itself: it draws the next tokens in parallel, and its next forward, which drafts on, also gives their exact
conditionals.
"""

from itertools import accumulate

import torch

from .generation_canvas import Canvas
from .generation_decoding import Decisions, DecodingStrategy, Feed
from .generation_plan import GenerationPlan
from .generation_sampling import TokenSampler, draw_by_weight, is_drawable, require_drawable

DRAFT_LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
"""What `draft_length="auto"` chooses from."""

COST_OF_A_SLOT = 0.02
"""What one more slot adds to the time of a forward, of which the rest takes 1."""


class DraftLength:
    """The draft length of a row, fixed or chosen for what its drafts have met with so far.

    Were every draft accepted with the same probability a, independently, a draft of k tokens (of which the first is
    exact) would bring a + ... + a^(k-1) accepted ones, then one in place of a refused one, and the next first one; a
    refusal costs a forward that only drafts. "auto" takes the length that brings the most tokens for the time. Of its
    estimate of a, every round weighs 0.9 of the one after it.

    Args:
        draft_length: Tokens of a draft, or "auto".
    """

    discount = 0.9

    def __init__(self, draft_length: int | str):
        self.is_fixed = draft_length != "auto"
        self.value = draft_length if self.is_fixed else 4
        self.accepted, self.judged = 0.0, 0.0

    def update(self, offered: int, accepted: int) -> None:
        """Takes note of a round that offered so many drafts and accepted so many of them, up to the first refusal."""
        self.accepted = self.discount * self.accepted + accepted
        self.judged = self.discount * self.judged + min(accepted + 1, offered)
        if not self.is_fixed:
            # What has been seen counts for more the more it is; before, four of five are taken to be accepted.
            rate = (self.accepted + 0.8) / (self.judged + 1)
            self.value = max(DRAFT_LENGTHS, key=lambda length: tokens_for_time(rate, length))


def tokens_for_time(acceptance: float, draft_length: int) -> float:
    """Expected tokens for the time of a forward of no slots, with drafts of this length; see [`DraftLength`]."""

    def cost(slots: int) -> float:
        return 1 + COST_OF_A_SLOT * slots

    if draft_length == 1:
        return 1 / cost(2)
    accepted = sum(acceptance**index for index in range(1, draft_length))
    refused = 1 - acceptance ** (draft_length - 1)
    return (accepted + refused + 1) / (cost(3 * draft_length - 1) + refused * cost(draft_length + 1))


def accepts(p: torch.Tensor, q: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Whether to keep tokens that were drawn with probability q and are exactly p: with probability min(1, p / q)."""
    return uniform * q < p


def what_drafts_leave(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """The weights (..., vocab) of a token in place of a refused one, where it was drawn from q and p is exact."""
    rest = (p.double() - q.double()).clamp(min=0)
    # Of distributions that differ by rounding alone nothing may be left.
    return torch.where(rest.sum(dim=-1, keepdim=True) > 0, rest, p.double())


class LosslessUnmasking(DecodingStrategy):
    """Drafts tokens in parallel and keeps those that one-token sampling might have drawn, with its probabilities.

    The first token of a draft is drawn from its exact conditional and decided at once. The others wait for the next
    forward, which holds, on top of the cache: tokens decided but not cached yet, and the drafts (causal); for each
    draft a mask that sees what stands before it, which gives its exact conditional p; and masks at the next slots,
    which draft on. Draft by draft, a token drawn from q is kept with probability min(1, p / q). At the first refusal,
    the token is drawn from the normalised positive part of p - q, and the rest of the draft is void.

    Args:
        canvas: The text to fill in.
        plan: The order of each row; a group is a token.
        sampler: How tokens are chosen, in drafting and in judging alike.
        use_cache: Whether what is decided is cached.
        draft_length: Tokens of a draft, or "auto".
    """

    def __init__(
        self,
        canvas: Canvas,
        plan: GenerationPlan,
        sampler: TokenSampler,
        use_cache: bool,
        draft_length: int | str,
    ):
        self.canvas, self.plan, self.sampler, self.use_cache = canvas, plan, sampler, use_cache
        self.order = plan.order
        self.ends = [given + open_ for given, open_ in zip(canvas.num_given, canvas.num_open, strict=True)]
        # Of each row, the slots in front whose tokens are known, and those whose keys and values are cached.
        self.decided = list(canvas.num_given)
        self.cached = [len(columns) for columns in canvas.cached_columns]
        self.draft_lengths = [DraftLength(draft_length) for _ in range(canvas.batch)]
        # Of each row, the drafted tokens of the slots behind the decided ones, and q, (drafts, vocab), of each.
        self.drafts: list[list[int]] = [[] for _ in range(canvas.batch)]
        self.proposals = [torch.empty(0)] * canvas.batch
        self.widths = [0] * canvas.batch  # masks that draft on
        self.num_forwards, self.num_offered, self.num_accepted = ([0] * canvas.batch for _ in range(3))

    def next_feed(self) -> Feed:
        canvas = self.canvas
        slots, num_content, is_idle = [], [], canvas.idle_rows(in_lockstep=False)
        for row in range(canvas.batch):
            if is_idle[row]:
                self.drafts[row] = []
            num_drafts, decided = len(self.drafts[row]), self.decided[row]
            drafted = decided + num_drafts
            self.widths[row] = 0 if is_idle[row] else min(self.draft_lengths[row].value, self.ends[row] - drafted)
            content = [] if is_idle[row] else [*range(self.cached[row], drafted)]
            masks = [*range(decided, drafted + self.widths[row])]
            slots.append(content + masks)
            num_content.append(len(content))
            self.num_forwards[row] += not is_idle[row]
            self.num_offered[row] += num_drafts
        num_fed = [len(row_slots) for row_slots in slots]
        # Where a row that is done has to be filled up, it writes its last cached slot once more, as it was.
        last = [max(fed[-1] if fed else cached - 1, 0) for fed, cached in zip(slots, self.cached, strict=True)]
        padded = [fed + [end] * (max(num_fed) - len(fed)) for fed, end in zip(slots, last, strict=True)]
        columns = self.order.gather(1, torch.tensor(padded))
        input_ids = canvas.tokens.gather(1, columns)
        for row, drafts in enumerate(self.drafts):
            input_ids[row, num_content[row] - len(drafts) : num_content[row]] = torch.tensor(drafts, dtype=torch.long)
        horizon = first_mask = None
        if any(self.drafts):
            horizon, first_mask = self._visibility(num_content, max(num_fed))
        return Feed(
            starts=list(self.cached),
            input_ids=input_ids,
            position_ids=canvas.text_positions.gather(1, columns),
            num_fed=num_fed,
            kept=[range(content, fed) for content, fed in zip(num_content, num_fed, strict=True)],
            horizon=horizon,
            first_mask=first_mask,
        )

    def statistics(self) -> dict[str, list[int]]:
        return {
            "forwards_per_row": self.num_forwards,
            "drafts_offered": self.num_offered,
            "drafts_accepted": self.num_accepted,
        }

    def _visibility(self, num_content: list[int], num_fed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`horizon` and `first_mask` of [`Feed`]: content is causal, judging masks see what is before their draft."""
        own = torch.arange(num_fed)
        content = torch.tensor(num_content)[:, None]
        num_drafts = torch.tensor([len(drafts) for drafts in self.drafts])[:, None]
        drafting = content + num_drafts  # where the masks begin that draft on
        horizon = torch.where(own < content, own + 1, torch.where(own < drafting, own - num_drafts, content))
        return horizon, torch.where(own < drafting, own, drafting)

    def decide(self, logits: torch.Tensor, step: int) -> Decisions:
        num_drafts = [len(drafts) for drafts in self.drafts]
        kept = [drafts + width for drafts, width in zip(num_drafts, self.widths, strict=True)]
        first_index = list(accumulate(kept, initial=0))  # of the logits of each row
        decisions, accepted, is_refused = self._judge(logits, first_index, step)
        for row in range(self.canvas.batch):
            if kept[row] > 0:
                self.cached[row] = self.decided[row] + accepted[row] if self.use_cache else 0
                self.decided[row] += accepted[row] + is_refused[row]
                self.draft_lengths[row].update(num_drafts[row], accepted[row])
                self.num_accepted[row] += accepted[row]
            self.drafts[row] = []
            if is_refused[row]:
                self.widths[row] = 0  # the masks that were to draft on have seen the refused draft
            first_index[row] += num_drafts[row]
        decisions += self._draft(logits, first_index, step)
        return Decisions(
            rows=[row for decision in decisions for row in decision.rows],
            columns=[column for decision in decisions for column in decision.columns],
            scores=torch.cat([decision.scores for decision in decisions]),
            logits=torch.cat([decision.logits for decision in decisions]),
        )

    def _judge(
        self, logits: torch.Tensor, first_index: list[int], step: int
    ) -> tuple[list[Decisions], list[int], list[bool]]:
        """Decides the drafts up to the first refusal of each row, and the token in place of that one.

        Returns:
            What was decided; and of each row, the number of accepted drafts, and whether one was refused.
        """
        batch, device = self.canvas.batch, logits.device
        num_drafts = [len(drafts) for drafts in self.drafts]
        accepted, is_refused = [0] * batch, [False] * batch
        decisions: list[Decisions] = []
        if not any(num_drafts):
            return decisions, accepted, is_refused
        uniform = self.sampler.uniform(num_drafts, device)
        uniform_of_refusal = self.sampler.uniform([int(count > 0) for count in num_drafts], device)
        first_draft = list(accumulate(num_drafts, initial=0))
        judged_rows = list(accumulate((count > 0 for count in num_drafts), initial=0))
        # Processors that look at the text have to see the drafts before each one, once they are accepted.
        chunk = 1 if self.sampler.looks_at_text else max(num_drafts)
        for start in range(0, max(num_drafts), chunk):
            judged = [
                (row, draft)
                for row in range(batch)
                for draft in range(start, min(start + chunk, num_drafts[row]))
                if not is_refused[row]
            ]
            if not judged:
                break
            rows = [row for row, _ in judged]
            columns = self.order[rows, [self.decided[row] + draft for row, draft in judged]].tolist()
            judged_logits = logits[[first_index[row] + draft for row, draft in judged]]
            scores = self.sampler.process(judged_logits, self.canvas, rows, columns)
            p = self.sampler.probabilities(scores)
            q = torch.cat([self.proposals[row][start : start + chunk] for row in dict.fromkeys(rows)])
            drafts = torch.tensor([self.drafts[row][draft] for row, draft in judged], device=device)[:, None]
            index = [first_draft[row] + draft for row, draft in judged]
            is_accepted = accepts(p.gather(1, drafts), q.gather(1, drafts), uniform[index, None])
            can_be_drawn, is_accepted = torch.stack([is_drawable(scores), is_accepted[:, 0]]).tolist()
            kept, refused = [], []
            for slot, row in enumerate(rows):
                if not is_refused[row]:
                    kept.append(slot)
                    require_drawable([can_be_drawn[slot]])
                    if is_accepted[slot]:
                        accepted[row] += 1
                    else:
                        refused.append(slot)
                        is_refused[row] = True
            if refused:
                rest = what_drafts_leave(p[refused], q[refused])
                source = [judged_rows[rows[slot]] for slot in refused]
                drafts[refused, 0] = draw_by_weight(rest, uniform_of_refusal[source])
            decisions.append(
                self._reveal(
                    [rows[slot] for slot in kept],
                    [columns[slot] for slot in kept],
                    drafts[kept, 0],
                    scores[kept],
                    judged_logits[kept],
                    step,
                )
            )
        return decisions, accepted, is_refused

    def _draft(self, logits: torch.Tensor, first_index: list[int], step: int) -> list[Decisions]:
        """Draws the next tokens of each row in parallel; the first one, from its exact conditional, is decided."""
        drafting = [(row, slot) for row, width in enumerate(self.widths) for slot in range(width)]
        if not drafting:
            return []
        rows = [row for row, _ in drafting]
        columns = self.order[rows, [self.decided[row] + slot for row, slot in drafting]].tolist()
        draft_logits = logits[[first_index[row] + slot for row, slot in drafting]]
        scores = self.sampler.process(draft_logits, self.canvas, rows, columns)
        q = self.sampler.probabilities(scores)
        drawn = draw_by_weight(q, self.sampler.uniform(self.widths, logits.device))
        tokens, can_be_drawn = torch.stack([drawn, is_drawable(scores).long()]).tolist()
        require_drawable(can_be_drawn)
        first = 0
        firsts = []
        for row, width in enumerate(self.widths):
            if width > 0:
                firsts.append(first)
                self.drafts[row] = tokens[first + 1 : first + width]
                self.proposals[row] = q[first + 1 : first + width]
                self.decided[row] += 1
            first += width
        return [
            self._reveal(
                [rows[slot] for slot in firsts],
                [columns[slot] for slot in firsts],
                drawn[firsts],
                scores[firsts],
                draft_logits[firsts],
                step,
            )
        ]

    def _reveal(
        self,
        rows: list[int],
        columns: list[int],
        tokens: torch.Tensor,
        scores: torch.Tensor,
        logits: torch.Tensor,
        step: int,
    ) -> Decisions:
        log_probs = logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(dim=-1)
        self.canvas.reveal(rows, columns, tokens.tolist(), log_probs.tolist(), step)
        return Decisions(rows, columns, scores, logits)
