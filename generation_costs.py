"""What decoding costs on a device: forwards and draws are measured there once, and rounds are timed as they go by."""

import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate

import torch

from .generation_cache import PreallocatedCache
from .generation_decoding import Decoder, Feed
from .generation_sampling import draw_by_weight, is_drawable
from .modeling_interface import EsoLM

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

    def of_round(self, slots: float, drafts: float, num_turns: float, are_in_step: bool) -> float:
        """The time of a round: a forward, the turns of drawing, and one more in which drafts are judged.

        Args:
            slots: That a row feeds.
            drafts: Of a row, that are judged, and drawn anew, behind a token that is decided.
            num_turns: In which they are drawn.
            are_in_step: Whether rows stand at the same place, if they have no drafts.
        """
        if drafts == 0 and are_in_step:
            return self.in_step + self.draws[0]
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


@dataclass
class Drift:
    """How much longer rounds take than the costs say: those with drafts, and those of a token a row.

    What is decided on the host takes time, too, and most where there are drafts to judge. What has been seen fades.
    """

    ratios: list[float] = field(default_factory=lambda: [0.0, 0.0])
    weights: list[float] = field(default_factory=lambda: [0.0, 0.0])

    discount, slow_discount, doubt, largest = 0.95, 0.99, 2.0, 1.5

    def note(self, has_drafts: bool, ratio: float) -> None:
        """Takes note of how many times as long as expected a round took."""
        for kind in (False, True):
            discount = self.discount if kind == has_drafts else self.slow_discount
            self.ratios[kind] *= discount
            self.weights[kind] *= discount
        self.ratios[has_drafts] += min(ratio, self.largest)
        self.weights[has_drafts] += 1

    def of_drafts(self) -> float:
        """How many times as much longer rounds with drafts take as those without: 1 until both have been seen."""
        if not sum(self.weights):
            return 1.0
        common = sum(self.ratios) / sum(self.weights)
        without, with_drafts = (
            (ratio + self.doubt * common) / (weight + self.doubt)
            for ratio, weight in zip(self.ratios, self.weights, strict=True)
        )
        return with_drafts / without


@dataclass(frozen=True)
class BatchCosts:
    """What decoding costs by the number of rows that take part.

    Args:
        of_one, of_all: What it costs for a single row, and for `rows`.
        drift: What the rounds of such batches have been found to take beyond that. None: rounds are not timed.
    """

    of_one: DecodingCosts
    of_all: DecodingCosts
    rows: int
    drift: Drift | None = field(default=None, compare=False)

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
    known: dict[tuple, BatchCosts] = model.__dict__.setdefault("_decoding_costs", {})
    rows = min(1 << (rows - 1).bit_length(), MAX_ROWS_MEASURED)
    num_cached = min((1 << (length - 1).bit_length()) // 2, MAX_CACHED_MEASURED // rows)
    for number in (1, rows):
        if (*where, number, num_cached) not in known:
            measured = measure_costs(model, number, num_cached)
            of_one = measured if number == 1 else known[*where, 1, num_cached].of_one
            known[*where, number, num_cached] = BatchCosts(of_one, measured, number, Drift())
    return known[*where, rows, num_cached]
