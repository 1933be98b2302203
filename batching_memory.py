"""The memory of continuous batching: the slots of one cache, handed out to texts that come and go.

A text takes as many slots as it will ever need when it joins, one behind the other where there is room, in several
pieces where there is not: attention reads them where they are, and nothing is copied. What the cache holds of prompts
is kept for as long as the room is not needed, and prompts that begin with the same tokens share it.
"""

from bisect import bisect_left
from dataclasses import dataclass, field
from itertools import accumulate

import torch

MIN_SHARED = 16
"""Slots below which what a prompt has in common with another is computed again: another piece costs more."""

MAX_COMPARED = 32
"""Kept prompts, of those that begin alike, that a new one is compared with: the ones that came last."""


Piece = tuple["Stretch", int]
"""A stretch, and how many slots at its beginning are meant."""


@dataclass(eq=False)
class Stretch:
    """Neighbouring slots of the cache, which are free again as soon as nobody counts on them.

    Args:
        start, length: Which.
        held: How many slots, at the beginning, each text and each kept prompt counts on.
    """

    start: int
    length: int
    held: list[int] = field(default_factory=list)


@dataclass
class Lease:
    """The slots of a text.

    Args:
        pieces: Where they are, in the order of the text's slots.
        num_shared: Slots in front that hold the keys and values of its prompt already.
        prompt: (given slots,), what its slots hold in the beginning, as from [`prompt_key`].
    """

    pieces: list[Piece]
    num_shared: int
    prompt: torch.Tensor

    @property
    def num_slots(self) -> int:
        return sum(count for _, count in self.pieces)

    def places(self, start: int, stop: int) -> torch.Tensor:
        """(stop - start,), where in the cache these slots of the text are."""
        return torch.cat([torch.arange(piece.start, piece.stop) for piece in self.slices(start, stop)])

    def slices(self, start: int, stop: int) -> list[slice]:
        """The same as neighbouring slots of the cache."""
        found, first = [], 0
        for stretch, count in self.pieces:
            low, high = max(start - first, 0), min(stop - first, count)
            if low < high:
                found.append(slice(stretch.start + low, stretch.start + high))
            first += count
        return found


@dataclass(eq=False)
class _KeptPrompt:
    """A prompt whose keys and values are there, and where."""

    key: torch.Tensor
    pieces: list[Piece]


def prompt_key(tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """What the keys and values of given tokens, (slots,), depend on: two prompts share them as far as these agree."""
    return torch.stack([tokens, positions])


def num_in_common(first: torch.Tensor, second: torch.Tensor) -> int:
    """How many slots in front two prompts agree in."""
    length = min(first.shape[1], second.shape[1])
    differs = (first[:, :length] != second[:, :length]).any(dim=0).nonzero()
    return int(differs[0]) if len(differs) else length


@dataclass
class SlotMemory:
    """Which slots of a cache are whose.

    Args:
        num_slots: Of the cache.
        shares_prompts: Whether prompts share what they begin with.
    """

    num_slots: int
    shares_prompts: bool = True
    leases: dict[str, Lease] = field(default_factory=dict)
    _holes: list[tuple[int, int]] = field(default_factory=list)  # (start, stop), ascending, none next to another
    # All kept prompts, the one that was last of use last; and those that begin alike, in the order in which they came.
    _kept: dict[_KeptPrompt, None] = field(default_factory=dict)
    _by_beginning: dict[bytes, list[_KeptPrompt]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._holes = [(0, self.num_slots)]

    @property
    def num_free(self) -> int:
        """Slots that are nobody's, not counting those of kept prompts that nobody uses."""
        return sum(map(_size, list(self._holes)))

    @property
    def num_in_use(self) -> int:
        """Slots that texts count on."""
        most: dict[Stretch, int] = {}
        for lease in list(self.leases.values()):
            for stretch, count in lease.pieces:
                most[stretch] = max(count, most.get(stretch, 0))
        return sum(most.values())

    def take(self, owner: str, num_slots: int, prompt: torch.Tensor) -> Lease | None:
        """Gives a text its slots; None if there are not enough now.

        Args:
            owner: Its name, which has no slots yet.
            num_slots: That it will ever need.
            prompt: As from [`prompt_key`].
        """
        shared = self._shared_pieces(prompt)
        self._hold(shared)  # so that making room leaves it alone
        num_shared = sum(count for _, count in shared)
        missing = num_slots - num_shared
        while self.num_free < missing and self._kept:
            self._drop(next(iter(self._kept)))
        if self.num_free < missing:
            self._let_go(shared)
            return None
        own = [(stretch, stretch.length) for stretch in self._take_stretches(missing)]
        self._hold(own)
        self.leases[owner] = Lease(shared + own, num_shared, prompt)
        return self.leases[owner]

    def keep_prompt(self, owner: str) -> None:
        """Takes note that the keys and values of a whole prompt are there, for others that begin as it does."""
        lease = self.leases[owner]
        length = lease.prompt.shape[1]
        if not self.shares_prompts or length - lease.num_shared < MIN_SHARED:
            return
        kept = _KeptPrompt(lease.prompt, _first(lease.pieces, length))
        self._hold(kept.pieces)
        self._kept[kept] = None
        self._by_beginning.setdefault(_beginning(kept.key), []).append(kept)

    def num_shareable(self, prompt: torch.Tensor) -> int:
        """Slots of a prompt whose keys and values are there."""
        return sum(count for _, count in self._shared_pieces(prompt))

    def free_blocks(self, owner: str) -> None:
        """Takes the slots of a text back, if it has any. The name is what transformers' scheduler calls."""
        lease = self.leases.pop(owner, None)
        if lease is not None:
            self._let_go(lease.pieces)

    def forget_prompts(self) -> None:
        """Gives up the keys and values of prompts: those of weights that have changed."""
        for kept in list(self._kept):
            self._drop(kept)

    def _shared_pieces(self, prompt: torch.Tensor) -> list[Piece]:
        best, most = None, MIN_SHARED - 1
        for kept in self._by_beginning.get(_beginning(prompt), [])[-MAX_COMPARED:]:
            count = num_in_common(kept.key, prompt)
            if count > most:
                best, most = kept, count
        if best is None:
            return []
        self._kept[best] = self._kept.pop(best)
        return _first(best.pieces, most)

    def _drop(self, kept: _KeptPrompt) -> None:
        """Gives up a prompt."""
        del self._kept[kept]
        alike = self._by_beginning[_beginning(kept.key)]
        alike.remove(kept)
        if not alike:
            del self._by_beginning[_beginning(kept.key)]
        self._let_go(kept.pieces)

    def _hold(self, pieces: list[Piece]) -> None:
        for stretch, count in pieces:
            stretch.held.append(count)

    def _let_go(self, pieces: list[Piece]) -> None:
        """One less who counts on them; slots on which nobody does are free."""
        for stretch, count in pieces:
            stretch.held.remove(count)
            length = max(stretch.held, default=0)
            if length < stretch.length:
                self._give_back(stretch.start + length, stretch.start + stretch.length)
                stretch.length = length

    def _take_stretches(self, num_slots: int) -> list[Stretch]:
        """The smallest hole that is large enough; or several, the largest ones first."""
        stretches: list[Stretch] = []
        while num_slots > 0:
            large_enough = [hole for hole in self._holes if _size(hole) >= num_slots]
            start, stop = min(large_enough, key=_size) if large_enough else max(self._holes, key=_size)
            count = min(stop - start, num_slots)
            place = self._holes.index((start, stop))
            self._holes[place : place + 1] = [(start + count, stop)] if start + count < stop else []
            stretches.append(Stretch(start, count))
            num_slots -= count
        return stretches

    def _give_back(self, start: int, stop: int) -> None:
        place = bisect_left(self._holes, (start, stop))
        if place < len(self._holes) and self._holes[place][0] == stop:
            stop = self._holes.pop(place)[1]
        if place > 0 and self._holes[place - 1][1] == start:
            place -= 1
            start = self._holes.pop(place)[0]
        self._holes.insert(place, (start, stop))


def _beginning(prompt: torch.Tensor) -> bytes:
    """By which prompts are found that may have enough in common."""
    return prompt[:, :MIN_SHARED].contiguous().numpy().tobytes()


def _size(hole: tuple[int, int]) -> int:
    return hole[1] - hole[0]


def _first(pieces: list[Piece], num_slots: int) -> list[Piece]:
    """The first so many slots."""
    starts = accumulate((count for _, count in pieces), initial=0)
    return [
        (stretch, min(count, num_slots - start))
        for (stretch, count), start in zip(pieces, starts, strict=False)
        if start < num_slots
    ]
