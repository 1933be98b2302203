"""Lossless parallel decoding: many tokens a forward, distributed exactly as one at a time in the same order.

Speculative sampling (arXiv 2302.01318, 2211.17192; for any-order models 2504.20456) in which the model drafts for
itself: it draws the next tokens in parallel, and its next forward, which drafts on, also gives their exact
conditionals.
"""

import time
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F

from .generation_canvas import Canvas
from .generation_decoding import Decisions, DecodingStrategy, Feed, Outputs
from .generation_drafting import DrawingTurns
from .generation_pace import ONE_TOKEN, TRIAL, Pace, Rhythm
from .generation_plan import GenerationPlan
from .generation_sampling import TokenSampler, draw_by_weight, is_drawable, require_drawable
from .modeling_drafting import MAX_DISTANCE, EsoDraftHead

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
        paces: How many tokens are drafted, and how many masks are ready where a draft may be refused: for all rows, or
            for each. Of each pair the first is for slots that are scattered over the text, the second for stretches
            of it, whose drafts meet with another fate.
        head: The draft head, which lets the tokens of a draft know one another; None: they do not.
    """

    def __init__(
        self,
        canvas: Canvas,
        plan: GenerationPlan,
        sampler: TokenSampler,
        use_cache: bool,
        paces: list[tuple[Pace, Pace]],
        head: EsoDraftHead | None,
    ):
        self.canvas, self.plan, self.sampler, self.use_cache = canvas, plan, sampler, use_cache
        self.paces, self.head = paces, head
        rows = range(canvas.batch)
        self.rows_of_paces = [range(row, row + 1) for row in rows] if len(paces) == canvas.batch else [rows]
        self.order = plan.order
        self.ends = [given + open_ for given, open_ in zip(canvas.num_given, canvas.num_open, strict=True)]
        # Whether the drafts behind each slot are of a stretch of the text, and how far that stays so, which no draft
        # goes beyond; drafts of a fixed length do not care.
        positions = canvas.text_positions.gather(1, plan.order)
        is_fixed = paces[0][0].draft_length is not None
        self.is_stretch, self.stays_until = _stretches(
            torch.zeros_like(positions) if is_fixed else positions, self.ends
        )
        # Of each row, the slots in front whose tokens are known, and those whose keys and values are cached.
        self.decided = list(canvas.num_given)
        self.cached = [len(columns) for columns in canvas.cached_columns]
        # Of each row, the drafted tokens of the slots behind the decided ones, and q, (drafts, vocab), of each.
        self.drafts: list[list[int]] = [[] for _ in range(canvas.batch)]
        self.proposals = [NO_PROPOSALS] * canvas.batch
        # Whether the drafts are on trial; and if those of the forward before were, the q of each row.
        self.is_trial = False
        self.tried: list[torch.Tensor] = []
        # Of each row, whether its next drafts are of a stretch of the text, and whether those are that are judged now.
        self.of_stretch, self.judged_of_stretch = ([False] * canvas.batch for _ in range(2))
        # Of each row, the masks of each group; and where in the logits of a forward the groups begin.
        self.widths: list[list[int]] = [[] for _ in range(canvas.batch)]
        self.first_masks: list[list[int]] = [[] for _ in range(canvas.batch)]
        # When the round has begun; and whether it has drafts, and how long it takes by the costs, if that is known.
        self.started, self.expected = 0.0, (False, 0.0)
        self.num_forwards, self.num_offered, self.num_accepted = ([0] * canvas.batch for _ in range(3))

    def next_feed(self) -> Feed:
        self.started = time.perf_counter()
        canvas, fed = self.canvas, []
        is_idle = canvas.idle_rows(in_lockstep=False)
        if self.is_trial:
            self.tried, self.drafts = [*self.proposals], [[] for _ in range(canvas.batch)]
        rhythms, limits = self._choose_rhythms([row for row in range(canvas.batch) if not is_idle[row]])
        has_drafts, num_masks = any(self.drafts), 0
        for row in range(canvas.batch):
            self.widths[row] = []
            if row not in rhythms:
                self.drafts[row] = []
                fed.append(_Fed([], [], [], 0))
                continue
            num_drafts, decided, cached = len(self.drafts[row]), self.decided[row], self.cached[row]
            self.num_forwards[row] += 1
            self.num_offered[row] += num_drafts
            if not has_drafts:
                width = min(rhythms[row].length, limits[row] - decided, self.stays_until[row][decided] - decided)
                fed.append(_Fed([*range(cached, decided + width)], [], [], decided - cached))
                self.widths[row], self.first_masks[row] = [width], [num_masks]
                num_masks += width
                continue
            content = range(cached, decided + num_drafts)
            slots, horizon, first = [*content], [*range(1, len(content) + 1)], [*range(len(content))]
            rhythm = rhythms[row]
            longest_before = 1 + rhythm.behind_refusal(num_drafts)
            for end in range(num_drafts + 1):
                longest = rhythm.length if end == num_drafts else longest_before
                start = decided + end
                width = min(longest, limits[row] - start, self.stays_until[row][start] - start)
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

    def _choose_rhythms(self, active: list[int]) -> tuple[dict[int, Rhythm], list[int]]:
        """Of each row that takes part in the next forward; and up to which slot each may draft.

        Rows in step are faster than rows apart. So where one token a forward is best, those ahead wait, if there is a
        place where all can meet, while those behind draft what pays for a few.
        """
        rhythms: dict[int, Rhythm] = {}
        limits = list(self.ends)
        self.judged_of_stretch = [*self.of_stretch]
        for row in active:
            self.of_stretch[row] = self.is_stretch[row][self.decided[row]]
        for paces, rows in zip(self.paces, self.rows_of_paces, strict=True):
            taking_part = [row for row in active if row in rows]
            if not taking_part:
                continue
            # With drafts waiting they are as good as apart.
            are_in_step = len(taking_part) > 1 and len({self.decided[row] for row in taking_part}) == 1
            are_in_step = are_in_step and not any(self.drafts[row] for row in taking_part)
            # What concerns all of them is decided for most of them.
            most = sum(self.of_stretch[row] for row in taking_part) * 2 > len(taking_part)
            pace, other = paces[most], paces[not most]
            # Rows with a pace each are never in step.
            self.is_trial = False
            if are_in_step and not pace.may_part(len(taking_part)):
                rhythms |= dict.fromkeys(taking_part, ONE_TOKEN)
                self.expected = False, pace.seconds
                continue
            self.is_trial = not self.tried and pace.wants_trial(are_in_step)
            if self.is_trial:
                rhythms |= dict.fromkeys(taking_part, TRIAL)
                self.expected = True, 0.0
                continue
            usually_left = self._usually_left(taking_part, other) if are_in_step else 1
            # A fixed length of drafts makes no row wait: what it is meant for does not depend on costs.
            meeting_place = self._meeting_place(taking_part) if pace.draft_length is None else None
            rhythm = pace.rhythm(len(taking_part), are_in_step, meeting_place is not None, usually_left)
            if rhythm.length == 1 and meeting_place is not None and not self._has_drafts_behind(meeting_place):
                taking_part = [row for row in taking_part if self.decided[row] < meeting_place]
                rhythm = pace.rhythm(len(taking_part))
                for row in taking_part:
                    limits[row] = min(limits[row], meeting_place)
            rhythms |= dict.fromkeys(taking_part, rhythm)
            others = [row for row in taking_part if self.of_stretch[row] != most]
            if not others or (are_in_step and rhythm.length == 1):
                # What rows apart take without drafts says nothing of those with drafts, nor of rows in step.
                is_known = rhythm.length > 1 or are_in_step or len(taking_part) == 1
                self.expected = rhythm.length > 1, pace.seconds * is_known
                continue
            rhythms |= dict.fromkeys(others, other.rhythm(len(taking_part)))
            share = len(others) / len(taking_part)
            self.expected = True, (1 - share) * pace.seconds + share * other.seconds
        return rhythms, limits

    def _usually_left(self, rows: list[int], other: Pace) -> int:
        """How many tokens of most rows drafts will do as well for as now, or by the other pace well enough."""
        goes_on = other.draft_length is None and other.rhythm(len(rows), can_meet=True).length > 1
        until = [self.ends[row] if goes_on else self.stays_until[row][self.decided[row]] for row in rows]
        left = sorted(until[index] - self.decided[row] for index, row in enumerate(rows))
        return left[len(left) // 2]

    def _meeting_place(self, rows: list[int]) -> int | None:
        """The slot at which rows apart can stand in step: where those ahead are.

        None where to wait for the others would take more forwards, of a token each, than to go on apart.
        """
        if len({self.decided[row] for row in rows}) < 2:
            return None
        place = max(self.decided[row] for row in rows)
        left_apart = max(self.ends[row] - self.decided[row] for row in rows)
        left_behind = max(min(place, self.ends[row]) - self.decided[row] for row in rows)
        left_in_step = max(self.ends[row] - place for row in rows)
        return place if left_behind + left_in_step <= left_apart else None

    def _has_drafts_behind(self, place: int) -> bool:
        return any(
            decided + len(drafts) > place for decided, drafts in zip(self.decided, self.drafts, strict=True) if drafts
        )

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
        self._tell_paces(accepted, is_refused, expected, turns)
        decisions += drawn
        if len(decisions) == 1:
            return decisions[0]
        return Decisions(
            rows=[row for decision in decisions for row in decision.rows],
            columns=[column for decision in decisions for column in decision.columns],
            scores=torch.cat([decision.scores for decision in decisions]),
            logits=torch.cat([decision.logits for decision in decisions]),
        )

    def _tell_paces(
        self,
        accepted: list[int],
        is_refused: list[bool],
        expected: dict[int, float],
        turns: int,
    ) -> None:
        """What each pace learns of a round, by the rows that go by it; and what it took, against the costs."""
        drift = None if self.paces[0][0].costs is None else self.paces[0][0].costs.drift
        has_drafts, expected_seconds = self.expected
        if drift is not None and expected_seconds > 0 and (has_drafts or (not any(is_refused) and not any(accepted))):
            drift.note(has_drafts, (time.perf_counter() - self.started) / expected_seconds)
        was_judged = [kept > 0 or refused for kept, refused in zip(accepted, is_refused, strict=True)]
        for row in expected:
            was_judged[row] = True
        for paces, rows in zip(self.paces, self.rows_of_paces, strict=True):
            longest = max(len(self.drafts[row]) for row in rows)
            for kind, pace in enumerate(paces):
                judged = [row for row in rows if self.judged_of_stretch[row] == kind and was_judged[row]]
                drawn = [row for row in rows if self.widths[row] and self.of_stretch[row] == kind]
                if not judged and not drawn:
                    continue
                tried = [expected[row] for row in judged if row in expected]
                kept = sum(accepted[row] for row in judged)
                drafted = max((len(self.drafts[row]) for row in drawn), default=0)
                pace.note(
                    offered=kept + sum(is_refused[row] for row in judged) + len(tried),
                    accepted=kept + sum(tried),
                    # In how many turns a draft is drawn is seen where the longest one is.
                    drawn=drafted if drafted == longest else 0,
                    turns=turns if drafted == longest else 0,
                    is_trial=len(tried) > 0,
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


def _stretches(positions: torch.Tensor, ends: list[int]) -> tuple[list[list[bool]], list[list[int]]]:
    """Where a text is written from left to right.

    Args:
        positions: (batch, length), of the tokens in generation order.
        ends: Of each row, how many of them there are.

    Returns:
        Of each row and slot, whether each of the two slots behind it stands a little to the right of the one before,
        as in the sequential phase, which passes over what is known (the last two are as the one before); and the slot
        up to which that stays as it is, the end of the text counted as a slot.
    """
    length = positions.shape[1]
    slots, last = torch.arange(length), torch.tensor(ends)[:, None]
    steps = F.pad(positions, (0, 2), value=-1).diff(dim=-1)
    goes_on = (steps > 0) & (steps <= MAX_DISTANCE)
    is_stretch = goes_on[:, :-1] & goes_on[:, 1:] & (slots < last - 2)
    is_stretch = is_stretch.gather(1, slots.minimum((last - 3).clamp(min=0)))
    changes = F.pad(is_stretch.diff(dim=-1), (0, 1))
    until = torch.where(changes & (slots < last - 1), slots + 1, length)
    return is_stretch.tolist(), F.pad(until.flip(-1).cummin(dim=-1).values.flip(-1), (0, 1), value=length).tolist()


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
