"""The pace of lossless decoding: how many tokens to draft, by what drafts have met with and what forwards cost."""

import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

import torch

from .generation_cache import PreallocatedCache
from .generation_sampling import Generators, draw_by_weight
from .modeling_interface import EsoLM

MAX_MASKS = 64
"""Masks of a row and forward that "auto" takes at the most."""

MASKS_BEHIND_DRAFTS = 24
"""With a fixed draft length, the masks of a row that are ready to draft on where a draft may be refused."""

SIZES_MEASURED = (2, 8, 16, 32, 64, 128, 256, 512)
"""Slots of the forwards that are measured, until one takes `SLOWEST_MEASURED` times as long as the first."""

SLOWEST_MEASURED = 8


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


def fixed_rhythm(draft_length: int) -> Rhythm:
    """That of a fixed draft length, which depends on nothing else: a seed gives the same text everywhere."""
    drafts = draft_length - 1
    return Rhythm(draft_length, min(drafts, MASKS_BEHIND_DRAFTS // max(drafts, 1)))


@dataclass(frozen=True)
class DecodingCosts:
    """What decoding costs on a device, in seconds.

    Args:
        slots, forwards: Numbers of slots, ascending, and the time of a forward of as many.
        turn: The time of a turn of drawing, with the draft head.
    """

    slots: tuple[int, ...]
    forwards: tuple[float, ...]
    turn: float

    def of_forward(self, slots: float) -> float:
        """The time of a forward, by a line between the measured ones, or the line through the last two."""
        right = min(max(bisect_left(self.slots, slots), 1), len(self.slots) - 1)
        if right == 0:
            return self.forwards[0]
        (x0, x1), (y0, y1) = self.slots[right - 1 : right + 1], self.forwards[right - 1 : right + 1]
        return max(y0 + (y1 - y0) * (slots - x0) / (x1 - x0), 1e-9)


NOMINAL_COSTS = DecodingCosts(slots=(0, 50), forwards=(1.0, 2.0), turn=0.0)
"""What is taken for the costs where the tokens of a row must not depend on the machine, nor on other rows."""


@torch.no_grad()
def measure_costs(model: EsoLM) -> DecodingCosts:
    """Measures a model that is ready to decode, in some twenty forwards."""
    head, device = model.draft_head, model.device
    sizes: list[int] = []
    forwards: list[float] = []
    for size in SIZES_MEASURED:
        kv_cache = PreallocatedCache(model.config.num_hidden_layers, size)
        tokens = torch.zeros(1, size, dtype=torch.long, device=device)
        positions = torch.arange(size, device=device)[None] % (model.max_text_length or size)

        def forward(
            kv_cache: PreallocatedCache = kv_cache, tokens: torch.Tensor = tokens, positions: torch.Tensor = positions
        ) -> torch.Tensor:
            kv_cache.keep(0)
            return model(input_ids=tokens, position_ids=positions, past_key_values=kv_cache).logits

        sizes.append(size)
        forwards.append(_seconds(forward, device))
        if forwards[-1] > SLOWEST_MEASURED * forwards[0]:
            break
    # A forward of more slots takes longer, whatever the noise says.
    forwards = [max(forwards[: index + 1]) for index in range(len(forwards))]
    logits = torch.zeros(1, model.config.vocab_size, device=device)
    uniform = torch.zeros(1, dtype=torch.float64, device=device)

    def turn() -> torch.Tensor:
        corrected = logits
        if head is not None:
            states = torch.zeros(1, head.state_proj.in_features, dtype=model.dtype, device=device)
            beside = torch.ones(1, 2, dtype=torch.long, device=device)
            corrected = logits + head.correct(head.prepare(states, beside), beside)
        return draw_by_weight(corrected.softmax(dim=-1), uniform)

    return DecodingCosts(tuple(sizes), tuple(forwards), _seconds(turn, device))


def _seconds(function: Callable[[], torch.Tensor], device: torch.device, repeats: int = 3) -> float:
    """The shortest of some calls, after one that warms up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        result = function()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - start)
        del result
    return min(times[1:])


def costs_of(model: EsoLM) -> DecodingCosts:
    """The costs of a model where it is, measured once."""
    key = (model.device, model.dtype, model.model.config._attn_implementation, torch.get_num_threads())
    known = model.__dict__.setdefault("_decoding_costs", {})
    if key not in known:
        known[key] = measure_costs(model)
    return known[key]


@dataclass
class Pace:
    """Chooses the rhythm of a batch, or of a row, fixed or for what its drafts have met with.

    Were every draft accepted with the same probability, a rhythm would bring so many tokens in so much time; "auto"
    takes the one that brings the most, or one token a forward. What has been met with fades: every round weighs 0.95
    of the next one that judges drafts; slowly where none are, so that they are tried again.

    Args:
        draft_length: Tokens of a draft; None: "auto".
        costs: Those of the model, for "auto".
    """

    draft_length: int | None
    costs: DecodingCosts | None = None
    accepted: float = field(default=0.0, init=False)
    judged: float = field(default=0.0, init=False)
    turns: float = field(default=0.0, init=False)
    drafts: float = field(default=0.0, init=False)

    discount, slow_discount = 0.95, 0.98

    def rhythm(self, rows: int) -> Rhythm:
        """That of the next forward, in which so many rows take part."""
        if self.draft_length is not None:
            return fixed_rhythm(self.draft_length)
        assert self.costs is not None
        # What has been seen counts for more the more it is; before, two of three drafts are taken to be accepted, and
        # each to take a turn.
        acceptance = round((self.accepted + 2 / 3) / (self.judged + 1), 2)
        turns = round((self.turns + 1) / (self.drafts + 1), 1)
        return best_rhythm(acceptance, turns, rows, self.costs)

    def note(self, offered: int, accepted: int, drawn: int, turns: int) -> None:
        """Takes note of a round.

        Args:
            offered, accepted: Drafts that were judged, in all rows, up to the first refusal of each, and accepted.
            drawn, turns: New drafts, of the row that has the most, and the turns that it took to draw them.
        """
        discount = self.discount if offered > 0 else self.slow_discount
        self.accepted = discount * self.accepted + accepted
        self.judged = discount * self.judged + offered
        self.turns = discount * self.turns + turns
        self.drafts = discount * self.drafts + drawn


def paces_of(model: EsoLM, draft_length: int | Literal["auto"], rows: int, generator: Generators) -> list[Pace]:
    """One pace for all rows, at the costs of the model where it is; or one for each row with a generator of its own.

    Args:
        model: Ready to decode.
        draft_length: As it is set.
        rows: Of the batch.
        generator: As for `generate`.
    """
    if draft_length != "auto":
        return [Pace(draft_length)]
    if isinstance(generator, list):
        return [Pace(None, NOMINAL_COSTS) for _ in range(rows)]
    return [Pace(None, costs_of(model))]


@cache
def best_rhythm(acceptance: float, turns: float, rows: int, costs: DecodingCosts) -> Rhythm:
    """The rhythm that brings the most tokens a second.

    Args:
        acceptance: The probability that a draft is accepted.
        turns: In which a draft is drawn, on average.
        rows: That take part in a forward.
        costs: Of a forward, and of a turn.
    """

    def tokens_a_second(rhythm: Rhythm) -> float:
        tokens, slots, drafts = rhythm.means(acceptance)
        # To judge takes about as long as to draw.
        num_turns = 1 + drafts * turns + (drafts > 0)
        return tokens / (costs.of_forward(rows * slots) + num_turns * costs.turn)

    return max(RHYTHMS, key=tokens_a_second)
