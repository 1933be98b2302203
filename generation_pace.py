"""The pace of lossless decoding: how many tokens to draft, by what drafts have met with and what forwards cost."""

import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import accumulate
from typing import Literal

import torch

from .generation_cache import PreallocatedCache
from .generation_decoding import Decoder, Feed
from .generation_sampling import Generators, draw_by_weight, is_drawable
from .modeling_interface import EsoLM

MAX_MASKS = 64
"""Masks of a row and forward that "auto" takes at the most."""

MASKS_BEHIND_DRAFTS = 24
"""With a fixed draft length, the masks of a row that are ready to draft on where a draft may be refused."""

NUM_TRIALS = 4
"""Of rows that stand at the same place: the forwards in which drafts are tried before it is clear what they bring."""

SLOTS_MEASURED = (2, 4, 8, 16, 32, 64)
"""Slots of a row in the forwards that are measured: two of them at least, and others up to these limits."""

MAX_SLOTS_MEASURED = 512
"""Slots of all rows."""

SLOWEST_MEASURED = 8
"""Times that a forward takes as long as the first one."""

MAX_CACHED_MEASURED = 2048
"""Slots of all rows that are taken to be cached in these forwards, at the most."""

MAX_ROWS_MEASURED = 64
"""Rows of these forwards at the most; what more cost is on the line through one row and as many."""

DRAWS_MEASURED = (1, 8)
"""Slots of a row whose tokens are drawn in the turns that are measured."""


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


TRIAL = Rhythm(length=2, redraft=0)
"""One draft of each row, which is only compared with what the next forward says of its place."""


def fixed_rhythm(draft_length: int) -> Rhythm:
    """That of a fixed draft length, which depends on nothing else: a seed gives the same text everywhere."""
    drafts = draft_length - 1
    return Rhythm(draft_length, min(drafts, MASKS_BEHIND_DRAFTS // max(drafts, 1)))


@dataclass(frozen=True)
class DecodingCosts:
    """What it costs to decode some rows at once on a device, in seconds.

    Args:
        in_step: The time of a forward of one token and one mask of each row, all of which stand at the same place.
        slots, forwards: Numbers of slots of each row, ascending, and the time of a forward of about as many, of rows
            that stand at different places.
        drawn, draws: Numbers of slots of each row, ascending, and the time of drawing their tokens in one turn.
    """

    in_step: float
    slots: tuple[int, ...]
    forwards: tuple[float, ...]
    drawn: tuple[int, ...]
    draws: tuple[float, ...]

    def of_round(self, rhythm: Rhythm, acceptance: float, turns: float, are_in_step: bool) -> float:
        """The mean time of a round: a forward, the turns of drawing, and one more in which drafts are judged."""
        _, slots, drafts = rhythm.means(acceptance)
        if drafts == 0 and are_in_step:
            return self.in_step + self.draws[0]
        num_turns = 1 + drafts * turns
        time_to_draw = num_turns * _on_lines(self.drawn, self.draws, (1 + drafts) / num_turns)
        time_to_judge = _on_lines(self.drawn, self.draws, drafts) if drafts > 0 else 0.0
        return _on_lines(self.slots, self.forwards, slots) + time_to_draw + time_to_judge


def _on_lines(numbers: tuple[int, ...], times: tuple[float, ...], number: float) -> float:
    """The time for a number, by a line between the measured ones, or the line through the last two."""
    right = min(max(bisect_left(numbers, number), 1), len(numbers) - 1)
    if right == 0:
        return times[0]
    (x0, x1), (y0, y1) = numbers[right - 1 : right + 1], times[right - 1 : right + 1]
    return max(y0 + (y1 - y0) * (number - x0) / (x1 - x0), 1e-9)


@dataclass(frozen=True)
class BatchCosts:
    """What decoding costs by the number of rows that take part.

    Args:
        of_one, of_all: What it costs for a single row, and for `rows`.
    """

    of_one: DecodingCosts
    of_all: DecodingCosts
    rows: int

    def of_rows(self, rows: int) -> DecodingCosts:
        """What it costs for so many, on a line through both."""
        share = (rows - 1) / max(self.rows - 1, 1)
        slots = self.of_all.slots[: len(self.of_one.slots)]

        def mix(name: str) -> tuple[float, ...]:
            pairs = zip(getattr(self.of_one, name), getattr(self.of_all, name), strict=False)
            return tuple(one + (all_ - one) * share for one, all_ in pairs)

        in_step = self.of_one.in_step + (self.of_all.in_step - self.of_one.in_step) * share
        return DecodingCosts(in_step, slots, mix("forwards"), self.of_all.drawn, mix("draws"))


_NOMINAL = DecodingCosts(in_step=1.04, slots=(0, 50), forwards=(1.0, 2.0), drawn=(1,), draws=(0.0,))
NOMINAL_COSTS = BatchCosts(_NOMINAL, _NOMINAL, rows=1)
"""What is taken for the costs where the tokens of a row must not depend on the machine, nor on other rows."""


@torch.no_grad()
def measure_costs(model: EsoLM, rows: int, num_cached: int) -> DecodingCosts:
    """Measures a model that is ready to decode, in some twenty forwards.

    Args:
        model: With its draft head, if it has one.
        rows: As many as are to be decoded.
        num_cached: Slots of each row that are cached.
    """
    device = model.device
    cache = PreallocatedCache(model.config.num_hidden_layers, num_cached + max(SLOTS_MEASURED) + 2)
    decoder, feed = Decoder(model, cache), partial(_feed, model, rows, num_cached)
    # Rows in step come first: they allocate the cache.
    in_step = _seconds(partial(decoder, feed(2, are_in_step=True)), device)
    sizes: list[int] = []
    forwards: list[float] = []
    for size in SLOTS_MEASURED:
        if len(sizes) >= 2 and (rows * size > MAX_SLOTS_MEASURED or forwards[-1] > SLOWEST_MEASURED * forwards[0]):
            break
        sizes.append(size)
        forwards.append(_seconds(partial(decoder, feed(size, are_in_step=rows == 1)), device))
    # More work takes longer, whatever the noise says.
    forwards = list(accumulate([in_step, *forwards], max))[1:]
    draws = [_seconds(partial(_draw, model, rows * number), device) for number in DRAWS_MEASURED]
    return DecodingCosts(in_step, tuple(sizes), tuple(forwards), DRAWS_MEASURED, tuple(draws))


def _feed(model: EsoLM, rows: int, num_cached: int, size: int, are_in_step: bool) -> Feed:
    """What rows feed, `size` slots each: a token and a mask; or more of both, of rows apart give or take one."""
    has_drafts = size > 2
    num_fed = [size + (has_drafts and not are_in_step) * (row % 3 - 1) for row in range(rows)]
    own = torch.arange(max(num_fed)).expand(rows, -1)
    num_tokens = max(size // 4, 1)
    return Feed(
        starts=[num_cached + (not are_in_step) * (row % 2) for row in range(rows)],
        input_ids=torch.zeros_like(own),
        position_ids=(num_cached + own) % (model.max_text_length or num_cached + size + 2),
        num_fed=num_fed,
        kept=[range(num_tokens, fed) for fed in num_fed],
        horizon=(own + 1).clamp(max=num_tokens) if has_drafts else None,
        first_mask=own if has_drafts else None,
    )


def _draw(model: EsoLM, slots: int) -> list[list[float]]:
    """Draws the tokens of so many slots, as in a turn."""
    head, device = model.draft_head, model.device
    logits = torch.zeros(slots, model.config.vocab_size, device=device)
    if head is not None:
        states = torch.zeros(slots, head.state_proj.in_features, dtype=model.dtype, device=device)
        beside = torch.ones(slots, 2, dtype=torch.long, device=device)
        logits = logits + head.correct(head.prepare(states, beside), beside)
    q = logits.softmax(dim=-1)
    tokens = draw_by_weight(q, torch.zeros(slots, dtype=torch.float64, device=device))
    log_probs = logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(dim=-1)
    return torch.stack([tokens, log_probs, is_drawable(logits)]).tolist()


def _seconds(function: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
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


def costs_of(model: EsoLM, rows: int, length: int) -> BatchCosts:
    """The costs of a model where it is, in the midst of a text of so many tokens.

    They are measured once for a row, and for as many rows, up to the next power of two of rows and tokens.
    """
    where = (model.device, model.dtype, model.model.config._attn_implementation, torch.get_num_threads())
    known: dict[tuple, DecodingCosts] = model.__dict__.setdefault("_decoding_costs", {})
    rows = min(1 << (rows - 1).bit_length(), MAX_ROWS_MEASURED)
    num_cached = min((1 << (length - 1).bit_length()) // 2, MAX_CACHED_MEASURED // rows)
    for number in (1, rows):
        if (*where, number, num_cached) not in known:
            known[*where, number, num_cached] = measure_costs(model, number, num_cached)
    return BatchCosts(known[*where, 1, num_cached], known[*where, rows, num_cached], rows)


@dataclass
class Pace:
    """Chooses the rhythm of a batch, or of a row, fixed or for what its drafts have met with.

    Were every draft accepted with the same probability, a rhythm would bring so many tokens in so much time; "auto"
    takes the one that brings the most, or one token a forward. What has been met with fades: every round weighs 0.95
    of the next one that judges drafts; slowly where none are, so that they are tried again. Rows that stand at the
    same place try them without leaving it, on trial.

    Args:
        draft_length: Tokens of a draft; None: "auto".
        costs: Those of the model, for "auto".
    """

    draft_length: int | None
    costs: BatchCosts | None = None
    accepted: float = field(default=0.0, init=False)
    judged: float = field(default=0.0, init=False)
    turns: float = field(default=0.0, init=False)
    drafts: float = field(default=0.0, init=False)
    num_trials: int = field(default=0, init=False)

    hope, discount, slow_discount = 0.85, 0.95, 0.98

    def wants_trial(self, are_in_step: bool) -> bool:
        """Whether drafts of rows at the same place should be tried, but not kept, before it is left for them."""
        return self.draft_length is None and are_in_step and (self.judged < 1 or self.num_trials < NUM_TRIALS)

    def rhythm(self, rows: int, are_in_step: bool = False, can_meet: bool = False) -> Rhythm:
        """That of the next forward.

        Args:
            rows: That take part in it.
            are_in_step: Whether they are several, and stand at the same place.
            can_meet: Whether they are apart, and can meet at a place where they will be in step.
        """
        if self.draft_length is not None:
            return fixed_rhythm(self.draft_length)
        assert self.costs is not None
        # What has been seen counts for more the more it is. Before, most drafts are taken to be accepted, for who does
        # not try them never learns better (which rows in step do on trial); and each to take a turn.
        hopes = 0 if are_in_step and self.judged > 0 else 1
        acceptance = round(32 * (self.accepted + hopes * self.hope) / (self.judged + hopes)) / 32
        turns = round((self.turns + 1) / (self.drafts + 1), 1)
        to_part = gain_to_part(self.num_trials) if are_in_step else 1.0 if can_meet else None
        return best_rhythm(acceptance, turns, to_part, self.costs.of_rows(rows))

    def note(self, offered: int, accepted: float, drawn: int, turns: int, is_trial: bool = False) -> None:
        """Takes note of a round.

        Args:
            offered, accepted: Drafts that were judged, in all rows, up to the first refusal of each, and accepted, or
                that would be, on average.
            drawn, turns: New drafts, of the row that has the most, and the turns that it took to draw them, if any,
                and the token before them.
            is_trial: Whether the drafts were on trial.
        """
        discount = self.discount if offered > 0 else self.slow_discount
        self.accepted = discount * self.accepted + accepted
        self.judged = discount * self.judged + offered
        self.turns = discount * self.turns + max(turns - 1, 0)
        self.drafts = discount * self.drafts + drawn
        self.num_trials += is_trial


def paces_of(
    model: EsoLM, draft_length: int | Literal["auto"], rows: int, length: int, generator: Generators
) -> list[Pace]:
    """One pace for all rows, at the costs of the model where it is; or one for each row with a generator of its own.

    Costs are nominal with generators for each row, and where there are several processes.

    Args:
        model: Ready to decode.
        draft_length: As it is set.
        rows: Of the batch.
        length: Tokens of the longest text.
        generator: As for `generate`.
    """
    if draft_length != "auto":
        return [Pace(draft_length)]
    if isinstance(generator, list):
        return [Pace(None, NOMINAL_COSTS) for _ in range(rows)]
    if _is_one_of_several_processes():
        # Processes that share a model have to feed it alike, and each would measure something else.
        return [Pace(None, NOMINAL_COSTS)]
    return [Pace(None, costs_of(model, rows, length))]


def _is_one_of_several_processes() -> bool:
    return (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    )


def gain_to_part(num_trials: int) -> float:
    """How many times the tokens a second drafts have to bring before rows leave the place where they all stand.

    The way back takes time, and the first trials, at the start of a text, may mislead.
    """
    return 1.1 + 0.4 / max(num_trials, 1)


@cache
def best_rhythm(acceptance: float, turns: float, to_part: float | None, costs: DecodingCosts) -> Rhythm:
    """The rhythm that brings the most tokens a second.

    Args:
        acceptance: The probability that a draft is accepted.
        turns: In which a draft is drawn, on average.
        to_part: Where several rows can be in step, which they are not with drafts: by what factor these have to bring
            more. None: they cannot.
        costs: Of the rows that take part in a forward.
    """

    def tokens_a_second(rhythm: Rhythm) -> float:
        rate = rhythm.means(acceptance)[0] / costs.of_round(rhythm, acceptance, turns, to_part is not None)
        return rate / to_part if to_part is not None and rhythm.length > 1 else rate

    return max(RHYTHMS, key=tokens_a_second)
