"""The pace of lossless decoding: how many tokens to draft, by what drafts have met with and what forwards cost."""

from dataclasses import dataclass, field
from functools import cache
from typing import Literal

import torch

from .generation_costs import NOMINAL_COSTS, BatchCosts, DecodingCosts, costs_of
from .generation_sampling import Generators
from .modeling_interface import EsoLM

MAX_MASKS = 64
"""Masks of a row and forward that "auto" takes at the most."""

MASKS_BEHIND_DRAFTS = 24
"""With a fixed draft length, the masks of a row that are ready to draft on where a draft may be refused."""

NUM_TRIALS = 4
"""Of rows that stand at the same place: the forwards in which drafts are tried before it is clear what they bring."""

GAIN_TO_STAY_APART = 1.1
"""How many times the tokens a second drafts have to bring for rows apart not to meet, and be in step again."""

TOKENS_TO_MEET = 16
"""What rows that have parted lose until they are in step again: as much time as so many tokens take."""

HOPED_DRAFTS = 4
"""Drafts that most are taken to have been accepted of, before any have been seen."""

LUCKY_DRAFTS = 4
"""Accepted drafts that are added to those seen, where the question is whether it is worth to try more."""


@dataclass(frozen=True)
class Rhythm:
    """How the masks of a forward are spent.

    Args:
        length: Tokens that are drawn where no draft has been refused: an exact one, and drafts.
        redraft: Drafts that are drawn where one has been refused, behind the token in its place.
    """

    length: int
    redraft: int

    @property
    def most_masks(self) -> int:
        """Masks of a row, when a whole draft is judged."""
        return (self.length - 1) * (1 + self.redraft) + self.length

    def behind_refusal(self, num_drafts: int) -> int:
        """Drafts behind each place where one of so many may be refused: fewer, if another rhythm has left many."""
        room = max(MAX_MASKS, self.most_masks) - self.length
        return max(min(self.redraft, room // max(num_drafts, 1) - 1), 0)

    def means(self, acceptance: float) -> tuple[float, float, float]:
        """Of a round of a row, the mean tokens, slots and drafts, if each draft is accepted with this probability.

        A round judges the drafts of the one before: `length` - 1 of them after a round that has refused none, which
        happens to a share of the rounds that its own outcome depends on, or `redraft`.
        """
        after_all, after_refusal = self.length - 1, self.redraft
        all_again, all_at_last = acceptance**after_all, acceptance**after_refusal
        share = all_at_last / (1 - all_again + all_at_last) if all_again < 1 else 1.0
        tokens = slots = drafts = 0.0
        for drafted, weight in ((after_all, share), (after_refusal, 1 - share)):
            accepted = sum(acceptance**index for index in range(1, drafted + 1))
            tokens += weight * (1 + accepted)
            slots += weight * (1 + drafted + drafted * (1 + self.redraft) + self.length)
            drafts += weight * drafted
        return tokens, slots, drafts


RHYTHMS = [
    rhythm
    for length in (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32)
    for redraft in (0, 1, 2, 3, 4, 5, 6, 8)
    if redraft < length and (rhythm := Rhythm(length, redraft)).most_masks <= MAX_MASKS
]
"""What "auto" chooses from."""


ONE_TOKEN = Rhythm(length=1, redraft=0)
"""No drafts."""

TRIAL = Rhythm(length=2, redraft=0)
"""One draft of each row, which is only compared with what the next forward says of its place."""


def fixed_rhythm(draft_length: int) -> Rhythm:
    """That of a fixed draft length, which depends on nothing else: a seed gives the same text everywhere."""
    drafts = draft_length - 1
    return Rhythm(draft_length, min(drafts, MASKS_BEHIND_DRAFTS // max(drafts, 1)))


@dataclass
class Pace:
    """Chooses the rhythm of a batch, or of a row, fixed or for what its drafts have met with.

    Were every draft accepted with the same probability, a rhythm would bring so many tokens in so much time; "auto"
    takes the one that brings the most, or one token a forward. What has been met with fades: every draft weighs 0.99
    of the next one, of any row; slowly in rounds without drafts, so that they are tried again. Rows that stand at the
    same place try them without leaving it, on trial.

    Args:
        draft_length: Tokens of a draft; None: "auto".
        costs: Those of the model, for "auto".

    Attributes:
        seconds: That a round of the last rhythm takes by the costs.
    """

    draft_length: int | None
    costs: BatchCosts | None = None
    accepted: float = field(default=0.0, init=False)
    judged: float = field(default=0.0, init=False)
    turns: float = field(default=0.0, init=False)
    drafts: float = field(default=0.0, init=False)
    num_trials: int = field(default=0, init=False)
    seconds: float = field(default=0.0, init=False)
    costs_of_rows: dict[int, DecodingCosts] = field(default_factory=dict, init=False, repr=False, compare=False)

    hope, discount, slow_discount = 0.85, 0.99, 0.98

    def may_part(self, rows: int, left: int) -> bool:
        """Whether rows at the same place might leave it, if drafts met with more luck than before."""
        if self.draft_length is not None:
            return True
        lucky = (self.accepted + LUCKY_DRAFTS) / (self.judged + LUCKY_DRAFTS)
        rhythm, self.seconds = self._best(rows, lucky, self._turns_a_draft(0), gain_to_part(NUM_TRIALS, left))
        return rhythm.length > 1

    def wants_trial(self) -> bool:
        """Whether drafts of rows at the same place should be tried, but not kept, before it is left for them."""
        return self.draft_length is None and (self.judged < 1 or self.num_trials < NUM_TRIALS)

    def rhythm(self, rows: int, are_in_step: bool = False, can_meet: bool = False, left: int = 1) -> Rhythm:
        """That of the next forward.

        Args:
            rows: That take part in it.
            are_in_step: Whether they are several, and stand at the same place.
            can_meet: Whether they are apart, and can meet at a place where they will be in step.
            left: Tokens of a row, with this one, for which drafts will do as well as now.
        """
        if self.draft_length is not None:
            return fixed_rhythm(self.draft_length)
        # What has been seen counts for more the more it is. Before, most drafts are taken to be accepted, for who does
        # not try them never learns better (which rows in step do on trial); and each to take a turn.
        hopes = 0 if are_in_step and self.judged > 0 else HOPED_DRAFTS
        acceptance = (self.accepted + hopes * self.hope) / (self.judged + hopes)
        turns = self._turns_a_draft(1)
        to_part = gain_to_part(self.num_trials, left) if are_in_step else GAIN_TO_STAY_APART if can_meet else None
        rhythm, self.seconds = self._best(rows, acceptance, turns, to_part)
        return rhythm

    def _best(self, rows: int, acceptance: float, turns: float, to_part: float | None) -> tuple[Rhythm, float]:
        """The best rhythm, and the time of a round of it."""
        assert self.costs is not None
        if rows not in self.costs_of_rows:
            self.costs_of_rows[rows] = self.costs.of_rows(rows)
        drift = 1.0 if self.costs.drift is None else self.costs.drift.of_drafts()
        # Rounded, because the best of so many rhythms is looked for once.
        rounded = round(32 * acceptance) / 32, round(turns, 1), to_part
        return best_rhythm(*rounded, rows > 1, self.costs_of_rows[rows], round(16 * drift) / 16)

    def _turns_a_draft(self, unknown: int) -> float:
        return (self.turns + unknown) / (self.drafts + 1)

    def note(self, offered: int, accepted: float, drawn: int, turns: int, is_trial: bool = False) -> None:
        """Takes note of a round.

        Args:
            offered, accepted: Drafts that were judged, in all rows, up to the first refusal of each, and accepted, or
                that would be, on average.
            drawn, turns: New drafts, of the row that has the most, and the turns that it took to draw them, if any,
                and the token before them.
            is_trial: Whether the drafts were on trial.
        """
        discount = self.discount**offered if offered > 0 else self.slow_discount
        self.accepted = discount * self.accepted + accepted
        self.judged = discount * self.judged + offered
        self.turns = discount * self.turns + max(turns - 1, 0)
        self.drafts = discount * self.drafts + drawn
        self.num_trials += is_trial


Paces = tuple[Pace, Pace]
"""The pace for slots that are scattered over the text, and that for stretches of it, whose drafts fare otherwise."""


def paces_of(
    model: EsoLM, draft_length: int | Literal["auto"], rows: int, length: int, generator: Generators
) -> list[Paces]:
    """Paces for all rows, at the costs of the model where it is; or for each row with a generator of its own.

    Costs are nominal with generators for each row, and where there are several processes.

    Args:
        model: Ready to decode.
        draft_length: As it is set.
        rows: Of the batch.
        length: Tokens of the longest text.
        generator: As for `generate`.
    """
    if draft_length != "auto":
        fixed = Pace(draft_length)
        return [(fixed, fixed)]
    if isinstance(generator, list):
        return [(Pace(None, NOMINAL_COSTS), Pace(None, NOMINAL_COSTS)) for _ in range(rows)]
    # Processes that share a model have to feed it alike, and each would measure something else.
    costs = NOMINAL_COSTS if _is_one_of_several_processes() else costs_of(model, rows, length)
    return [(Pace(None, costs), Pace(None, costs))]


def _is_one_of_several_processes() -> bool:
    return (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    )


def gain_to_part(num_trials: int, left: int) -> float:
    """How many times the tokens a second drafts have to bring before rows leave the place where they all stand.

    The first trials, at the start of a text, may mislead; and the way back takes as long as some tokens do.
    """
    return GAIN_TO_STAY_APART + 0.2 / max(num_trials, 1) + TOKENS_TO_MEET / left


@cache
def best_rhythm(
    acceptance: float,
    turns: float,
    to_part: float | None,
    are_several: bool,
    costs: DecodingCosts,
    drift: float = 1.0,
) -> tuple[Rhythm, float]:
    """The rhythm that brings the most tokens a second, and the seconds that a round of it takes by the costs.

    Args:
        acceptance: The probability that a draft is accepted.
        turns: In which a draft is drawn, on average.
        to_part: Where several rows can be in step, which they are not with drafts: by what factor these have to bring
            more. None: they cannot.
        are_several: Whether there are other rows, one of which will have a whole draft to draw.
        costs: Of the rows that take part in a forward.
        drift: How many times as long as by the costs rounds with drafts take, against those without.
    """
    found = []
    for rhythm in RHYTHMS:
        tokens, slots, drafts = rhythm.means(acceptance)
        num_turns = 1 + turns * (rhythm.length - 1 if are_several else drafts)
        seconds = costs.of_round(slots, drafts, num_turns, are_in_step=to_part is not None)
        handicap = drift * (to_part or 1.0) if rhythm.length > 1 else 1.0
        found.append((tokens / (seconds * handicap), rhythm, seconds))
    _, rhythm, seconds = max(found, key=lambda one: one[0])
    return rhythm, seconds
