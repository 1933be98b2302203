"""Rows that are decoded at a common pace: what each drafts, and which of them wait for the others."""

import torch
import torch.nn.functional as F

from .generation_pace import ONE_TOKEN, TRIAL, Pace, Paces, Rhythm
from .modeling_drafting import MAX_DISTANCE

ROUNDS_TO_REST = 8
"""Forwards of one token for which rows in step do not ask again whether to part."""


class Convoy:
    """Chooses what some rows feed to the next forward of lossless decoding.

    Rows in step, which all stand at the same place, are faster than rows apart. They part for drafts that are clearly
    worth it. Where one token a forward is best again, those ahead wait, if there is a place where all can meet, while
    those behind draft what pays for a few.

    Args:
        rows: Of the batch.
        paces: What is known of their drafts.
        is_stretch, stays_until: Of each row of the batch, as from [`find_stretches`].
        ends: Of each row of the batch, the slot behind its last one.

    Attributes:
        rhythms: Of each row that takes part in the next forward.
        is_trial: Whether its drafts are only to be compared with what the forward after it says.
    """

    def __init__(
        self,
        rows: range,
        paces: Paces,
        is_stretch: list[list[bool]],
        stays_until: list[list[int]],
        ends: list[int],
    ):
        self.rows, self.paces, self.ends = rows, paces, ends
        self.is_stretch, self.stays_until = is_stretch, stays_until
        self.rhythms: dict[int, Rhythm] = {}
        self.is_trial = False
        # Where those meet that catch up.
        self.meeting_place: int | None = None
        # Of rows that take part, whether the next drafts are of a stretch, and whether those are that are judged now.
        self.of_stretch: dict[int, bool] = {}
        self.judged_of_stretch: dict[int, bool] = {}
        # Forwards for which rows in step stay there.
        self.num_rests = 0
        # Whether the round has drafts, and how long it takes by the costs; 0: nobody knows.
        self.expected = (False, 0.0)

    def room(self, row: int, start: int) -> int:
        """The masks that a row may feed from a slot on, where the text or what is like it ends, or others wait."""
        end = min(self.ends[row], self.stays_until[row][start])
        return (end if self.meeting_place is None else min(end, self.meeting_place)) - start

    def choose(self, active: list[int], decided: list[int], drafts: list[list[int]], may_try: bool) -> None:
        """Chooses the rhythms of the next forward.

        Args:
            active: Rows of the batch that are not done.
            decided: Of each row of the batch, the slots in front that are decided.
            drafts: Of each row of the batch, the tokens that this forward judges.
            may_try: Whether drafts may be put on trial.
        """
        rows = [row for row in active if row in self.rows]
        self.judged_of_stretch = self.of_stretch
        self.of_stretch = {row: self.is_stretch[row][decided[row]] for row in rows}
        self.rhythms, self.is_trial, self.meeting_place, self.expected = {}, False, None, (False, 0.0)
        if not rows:
            return
        # What concerns all of them is decided for most of them.
        most = sum(self.of_stretch.values()) * 2 > len(rows)
        pace, other = self.paces[most], self.paces[not most]
        # With drafts waiting they are as good as apart.
        are_in_step = len(rows) > 1 and len({decided[row] for row in rows}) == 1
        are_in_step = are_in_step and not any(drafts[row] for row in rows)
        self.num_rests = self.num_rests - 1 if are_in_step and self.num_rests > 0 else 0
        if are_in_step:
            rhythm = ONE_TOKEN
            if self.num_rests == 0:
                left = self._usually_left(rows, decided, other)
                may_part = pace.may_part(len(rows), left)
                if may_part and may_try and pace.wants_trial():
                    self.is_trial = True
                    self.rhythms = dict.fromkeys(rows, TRIAL)
                    return
                if may_part:
                    rhythm = pace.rhythm(len(rows), are_in_step=True, left=left)
                # After a trial there is something to be learned at once.
                self.num_rests = ROUNDS_TO_REST if rhythm == ONE_TOKEN and may_try else 0
            self._follow(rows, rhythm, pace, other, are_in_step=True)
        else:
            # A fixed length of drafts makes no row wait: what it is meant for does not depend on costs.
            place = None if pace.draft_length is not None else meeting_place(rows, decided, self.ends)
            rhythm = pace.rhythm(len(rows), can_meet=place is not None)
            # Who has drafted beyond that place goes on to have them judged.
            reach = max(decided[row] + len(drafts[row]) for row in rows)
            if rhythm.length == 1 and place is not None and reach <= place:
                self.meeting_place, rows = place, [row for row in rows if decided[row] < place]
                rhythm = pace.rhythm(len(rows))
            self._follow(rows, rhythm, pace, other, are_in_step=False)

    def _follow(self, rows: list[int], rhythm: Rhythm, pace: Pace, other: Pace, are_in_step: bool) -> None:
        """Gives rows the rhythm of a pace, or of the other one, unless they stay in step."""
        self.rhythms = dict.fromkeys(rows, rhythm)
        others = [row for row in rows if self.paces[self.of_stretch[row]] is not pace]
        if not others or (are_in_step and rhythm.length == 1):
            # What rows apart take without drafts says nothing of those with drafts, nor of rows in step.
            is_known = rhythm.length > 1 or are_in_step or len(rows) == 1
            self.expected = rhythm.length > 1, pace.seconds * is_known
            return
        self.rhythms |= dict.fromkeys(others, other.rhythm(len(rows)))
        share = len(others) / len(rows)
        self.expected = True, (1 - share) * pace.seconds + share * other.seconds

    def _usually_left(self, rows: list[int], decided: list[int], other: Pace) -> int:
        """How many tokens of most rows drafts will do as well for as now, or, as has been seen, well enough."""
        goes_on = other.judged > 1 and other.rhythm(len(rows), can_meet=True).length > 1
        left = [self.ends[row] - decided[row] if goes_on else self.room(row, decided[row]) for row in rows]
        return sorted(left)[len(left) // 2]

    def note(
        self,
        accepted: list[int],
        is_refused: list[bool],
        tried: dict[int, float],
        drafts: list[list[int]],
        turns: int,
        seconds: float,
    ) -> None:
        """Tells the paces what has become of a round, and what it took.

        Args:
            accepted, is_refused: Of each row of the batch, the drafts that were accepted, and whether one was refused.
            tried: Of rows whose drafts were on trial, with which probability one would have been accepted.
            drafts: Of each row of the batch, the new ones.
            turns: In which they were drawn.
            seconds: That the round took.
        """
        has_drafts, expected = self.expected
        drift = None if self.paces[0].costs is None else self.paces[0].costs.drift
        if drift is not None and expected > 0 and (has_drafts or not (any(accepted) or any(is_refused))):
            drift.note(has_drafts, seconds / expected)
        longest = max((len(drafts[row]) for row in self.rhythms), default=0)
        for kind, pace in enumerate(self.paces):
            judged = [row for row, of_stretch in self.judged_of_stretch.items() if of_stretch == kind]
            judged = [row for row in judged if accepted[row] > 0 or is_refused[row] or row in tried]
            drawn = [row for row in self.rhythms if self.of_stretch[row] == kind]
            if not judged and not drawn:
                continue
            hopes = [tried[row] for row in judged if row in tried]
            kept = sum(accepted[row] for row in judged)
            drafted = max((len(drafts[row]) for row in drawn), default=0)
            pace.note(
                offered=kept + sum(is_refused[row] for row in judged) + len(hopes),
                accepted=kept + sum(hopes),
                # In how many turns a draft is drawn is seen where the longest one is.
                drawn=drafted if drafted == longest else 0,
                turns=turns if drafted == longest else 0,
                is_trial=len(hopes) > 0,
            )


def convoys_of(paces: list[Paces], positions: torch.Tensor, ends: list[int]) -> list[Convoy]:
    """One convoy of all rows, or one for each.

    Args:
        paces: As from [`paces_of`].
        positions: (batch, length), of the tokens in generation order.
        ends: Of each row, the slot behind its last one.
    """
    if paces[0][0].draft_length is not None:
        positions = torch.zeros_like(positions)  # for drafts of a fixed length all places are alike
    stretches = find_stretches(positions, ends)
    rows = range(len(ends))
    parts = [rows] if len(paces) == 1 else [range(row, row + 1) for row in rows]
    return [Convoy(part, of_part, *stretches, ends) for part, of_part in zip(parts, paces, strict=True)]


def meeting_place(rows: list[int], decided: list[int], ends: list[int]) -> int | None:
    """The slot at which rows apart can stand in step: where those ahead are.

    None where to wait for the others would take more forwards, of a token each, than to go on apart.
    """
    if len({decided[row] for row in rows}) < 2:
        return None
    place = max(decided[row] for row in rows)
    left_apart = max(ends[row] - decided[row] for row in rows)
    left_behind = max(min(place, ends[row]) - decided[row] for row in rows)
    left_in_step = max(ends[row] - place for row in rows)
    return place if left_behind + left_in_step <= left_apart else None


def find_stretches(positions: torch.Tensor, ends: list[int]) -> tuple[list[list[bool]], list[list[int]]]:
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
