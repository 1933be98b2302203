"""Lossless parallel decoding: many tokens a forward, distributed exactly as one at a time in the same order.

Speculative sampling (arXiv 2302.01318, 2211.17192; for any-order models 2504.20456) in which the model drafts for
itself: it draws the next tokens in parallel, and its next forward, which drafts on, also gives their exact
conditionals.
"""

import time
from dataclasses import dataclass
from itertools import accumulate

import torch

from .generation_canvas import Canvas
from .generation_convoy import convoys_of
from .generation_decoding import Decisions, DecodingStrategy, Feed, Outputs
from .generation_drafting import DrawingTurns
from .generation_pace import Paces
from .generation_plan import GenerationPlan
from .generation_sampling import TokenSampler, draw_by_weight, is_drawable, require_drawable
from .modeling_drafting import EsoDraftHead

NO_PROPOSALS = torch.empty(0)


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

    A forward holds, on top of the cache: tokens decided but not cached yet, and the drafts (causal); and a group of
    masks for each place where the draft may turn out to end. The first mask of a group sees what stands before that
    place, which gives the exact conditional p of its token; the others draft on, as if the draft ended there. Draft by
    draft, a token drawn from q is kept with probability min(1, p / q); at the first refusal, the token is drawn from
    the normalised positive part of p - q, and where all are kept, from p. The next draft comes from the masks behind.

    Args:
        canvas: The text to fill in.
        plan: The order of each row; a group is a token.
        sampler: How tokens are chosen, in drafting and in judging alike.
        use_cache: Whether what is decided is cached.
        paces: How many tokens are drafted, and how many masks are ready where a draft may be refused: those of all
            rows, or of each one.
        head: The draft head, which lets the tokens of a draft know one another; None: they do not.
    """

    def __init__(
        self,
        canvas: Canvas,
        plan: GenerationPlan,
        sampler: TokenSampler,
        use_cache: bool,
        paces: list[Paces],
        head: EsoDraftHead | None,
    ):
        self.canvas, self.plan, self.sampler, self.use_cache = canvas, plan, sampler, use_cache
        self.head, self.order = head, plan.order
        ends = [given + open_ for given, open_ in zip(canvas.num_given, canvas.num_open, strict=True)]
        self.convoys = convoys_of(paces, canvas.text_positions.gather(1, plan.order), ends)
        self.convoy_of_row = [convoy for convoy in self.convoys for _ in convoy.rows]
        # Of each row, the slots in front whose tokens are known, and those whose keys and values are cached.
        self.decided = list(canvas.num_given)
        self.cached = [len(columns) for columns in canvas.cached_columns]
        # Of each row, the drafted tokens of the slots behind the decided ones, and q, (drafts, vocab), of each.
        self.drafts: list[list[int]] = [[] for _ in range(canvas.batch)]
        self.proposals = [NO_PROPOSALS] * canvas.batch
        # Whether the drafts are on trial; and if those of the forward before were, the q of each row.
        self.is_trial = False
        self.tried: list[torch.Tensor] = []
        # Of each row, the masks of each group; and where in the logits of a forward the groups begin.
        self.widths: list[list[int]] = [[] for _ in range(canvas.batch)]
        self.first_masks: list[list[int]] = [[] for _ in range(canvas.batch)]
        self.started = 0.0  # when the round has begun, in seconds
        self.num_forwards, self.num_offered, self.num_accepted = ([0] * canvas.batch for _ in range(3))

    def next_feed(self) -> Feed:
        self.started = time.perf_counter()
        canvas, fed = self.canvas, []
        is_idle = canvas.idle_rows(in_lockstep=False)
        if self.is_trial:
            self.tried, self.drafts = [*self.proposals], [[] for _ in range(canvas.batch)]
        active = [row for row in range(canvas.batch) if not is_idle[row]]
        for convoy in self.convoys:
            convoy.choose(active, self.decided, self.drafts, may_try=not self.tried)
        self.is_trial = any(convoy.is_trial for convoy in self.convoys)
        has_drafts, num_masks = any(self.drafts), 0
        for row, convoy in enumerate(self.convoy_of_row):
            self.widths[row] = []
            if row not in convoy.rhythms:
                self.drafts[row] = []
                fed.append(_Fed([], [], [], 0))
                continue
            rhythm = convoy.rhythms[row]
            num_drafts, decided, cached = len(self.drafts[row]), self.decided[row], self.cached[row]
            self.num_forwards[row] += 1
            self.num_offered[row] += num_drafts
            if not has_drafts:
                width = min(rhythm.length, convoy.room(row, decided))
                fed.append(_Fed([*range(cached, decided + width)], [], [], decided - cached))
                self.widths[row], self.first_masks[row] = [width], [num_masks]
                num_masks += width
                continue
            content = range(cached, decided + num_drafts)
            slots, horizon, first = [*content], [*range(1, len(content) + 1)], [*range(len(content))]
            longest_before = 1 + rhythm.behind_refusal(num_drafts)
            for end in range(num_drafts + 1):
                longest = rhythm.length if end == num_drafts else longest_before
                start = decided + end
                width = min(longest, convoy.room(row, start))
                first += [len(slots)] * width
                horizon += [start - cached] * width
                slots += range(start, start + width)
                self.widths[row].append(width)
            fed.append(_Fed(slots, horizon, first, len(content)))
            self.first_masks[row] = list(accumulate(self.widths[row], initial=num_masks))
            num_masks += sum(self.widths[row])
        most = max(len(row.slots) for row in fed)
        # Where a row has to be filled up, it writes its last slot once more, as it was.
        padded = []
        for of_row, cached in zip(fed, self.cached, strict=True):
            last_slot = of_row.slots[-1] if of_row.slots else max(cached - 1, 0)
            padded.append(of_row.slots + [last_slot] * (most - len(of_row.slots)))
        columns = self.order.gather(1, torch.tensor(padded))
        input_ids = canvas.tokens.gather(1, columns)
        for row, drafts in enumerate(self.drafts):
            if drafts:
                stop = fed[row].num_content
                input_ids[row, stop - len(drafts) : stop] = torch.tensor(drafts)
        visibility: tuple[torch.Tensor | None, ...] = (None, None)
        if any(self.drafts):
            # Behind the slots of a row, any will do.
            visibility = tuple(
                torch.tensor([getattr(row, name) + [0] * (most - len(row.slots)) for row in fed])
                for name in ("horizon", "first_mask")
            )
        return Feed(
            starts=list(self.cached),
            input_ids=input_ids,
            position_ids=canvas.text_positions.gather(1, columns),
            num_fed=[len(row.slots) for row in fed],
            kept=[range(row.num_content, len(row.slots)) for row in fed],
            horizon=visibility[0],
            first_mask=visibility[1],
        )

    def drafted(self, row: int) -> dict[int, int]:
        drafts, start = self.drafts[row], self.decided[row]
        columns = self.order[row, start : start + len(drafts)].tolist()
        return {} if self.is_trial else dict(zip(columns, drafts, strict=True))

    def statistics(self) -> dict[str, list[int]]:
        return {
            "forwards_per_row": self.num_forwards,
            "drafts_offered": self.num_offered,
            "drafts_accepted": self.num_accepted,
        }

    def decide(self, outputs: Outputs, step: int) -> Decisions:
        decisions, accepted, is_refused = self._judge(outputs.logits, step)
        # The group of masks behind the last decided token: the number of its first one, and how many there are.
        first_masks, widths = [0] * self.canvas.batch, [0] * self.canvas.batch
        for row, count in enumerate(accepted):
            if self.widths[row]:
                first_masks[row], widths[row] = self.first_masks[row][count], self.widths[row][count]
                self.cached[row] = self.decided[row] + count if self.use_cache else 0
                self.decided[row] += count
                self.num_accepted[row] += count
            self.drafts[row] = []
        drawn, turns, expected = self._draft(outputs, first_masks, widths, is_refused, step)
        seconds = time.perf_counter() - self.started
        for convoy in self.convoys:
            convoy.note(accepted, is_refused, expected, self.drafts, turns, seconds)
        decisions += drawn
        if len(decisions) == 1:
            return decisions[0]
        return Decisions(
            rows=[row for decision in decisions for row in decision.rows],
            columns=[column for decision in decisions for column in decision.columns],
            scores=torch.cat([decision.scores for decision in decisions]),
            logits=torch.cat([decision.logits for decision in decisions]),
        )

    def _judge(self, logits: torch.Tensor, step: int) -> tuple[list[Decisions], list[int], list[bool]]:
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
            judged_logits = logits[[self.first_masks[row][draft] for row, draft in judged]]
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

    def _draft(
        self,
        outputs: Outputs,
        first_masks: list[int],
        widths: list[int],
        is_refused: list[bool],
        step: int,
    ) -> tuple[list[Decisions], int, dict[int, float]]:
        """Draws the next tokens of each row; the first one, unless it took the place of a refused one, is decided.

        Returns:
            What was decided, the turns that it took, and of rows with a draft on trial with which probability it would
            have been accepted.
        """
        # With the place of a refused one nothing is left to be drawn, if there is no mask behind.
        widths = [0 if refused and width == 1 else width for width, refused in zip(widths, is_refused, strict=True)]
        drafting = [(row, slot) for row, width in enumerate(widths) for slot in range(width)]
        for row, refused in enumerate(is_refused):
            self.decided[row] += refused
        if not drafting:
            return [], 0, {}
        rows = [row for row, _ in drafting]
        # The first slot of a row that has had a refusal is decided.
        places = [self.decided[row] - is_refused[row] + slot for row, slot in drafting]
        columns = self.order[rows, places]
        index = [first_masks[row] + slot for row, slot in drafting]
        states = None if outputs.states is None else _at(outputs.states, index)
        positions = self.canvas.text_positions[rows, columns]
        turns = DrawingTurns(self.head, Outputs(_at(outputs.logits, index), states), positions, widths)
        device = turns.logits.device
        uniform = self.sampler.uniform(widths, device)
        firsts = list(accumulate(widths, initial=0))[:-1]
        known = [firsts[row] for row in range(self.canvas.batch) if is_refused[row] and widths[row] > 0]
        if known:
            known_tokens = self.canvas.tokens[[rows[slot] for slot in known], columns[known]].to(device)
        where, parts_of_scores, parts_of_q = torch.stack([torch.tensor(rows), columns]).to(device), [], []
        for turn, slots in enumerate(turns):
            scores = self.sampler.process(turns.logits[slots], self.canvas, *where[:, slots].tolist())
            q = self.sampler.probabilities(scores)
            turns.tokens[slots] = draw_by_weight(q, uniform[slots])
            if turn == 0 and known:
                turns.tokens[known] = known_tokens
            parts_of_scores.append(scores)
            parts_of_q.append(q)
        scores, q = turns.assemble(parts_of_scores), turns.assemble(parts_of_q)
        tokens, can_be_drawn = torch.stack([turns.tokens, is_drawable(scores).long()]).tolist()
        require_drawable(can_be_drawn)
        exact, overlaps = [], {}
        for row, (first, width) in enumerate(zip(firsts, widths, strict=True)):
            if width > 0:
                self.drafts[row] = tokens[first + 1 : first + width]
                self.proposals[row] = q[first + 1 : first + width] if width > 1 else NO_PROPOSALS
                if not is_refused[row]:
                    exact.append(first)
                    self.decided[row] += 1
                if self.tried and len(self.tried[row]) > 0:
                    overlaps[row] = torch.minimum(self.tried[row][0], q[first]).sum()
        expected = dict(zip(overlaps, torch.stack([*overlaps.values()]).tolist(), strict=True)) if overlaps else {}
        self.tried = []
        if not exact:
            return [], turns.num_turns, expected
        decided = self._reveal(
            [rows[slot] for slot in exact],
            columns[exact].tolist(),
            _at(turns.tokens, exact),
            _at(scores, exact),
            _at(turns.logits, exact),
            step,
        )
        return [decided], turns.num_turns, expected

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


def _at(tensor: torch.Tensor, index: list[int]) -> torch.Tensor:
    """`tensor[index]`, without a copy where that is all of it."""
    return tensor if index == list(range(len(tensor))) else tensor[index]


@dataclass
class _Fed:
    """What a row feeds: its slots, content in front, and of each one `horizon` and `first_mask` of [`Feed`]."""

    slots: list[int]
    horizon: list[int]
    first_mask: list[int]
    num_content: int
