"""Drawing the tokens of a forward in turns, so that each knows what those beside it have become."""

from collections.abc import Iterator
from itertools import accumulate

import torch

from .generation_decoding import Outputs
from .modeling_drafting import EsoDraftHead, Neighbours, find_neighbours

ALL = slice(None)


class DrawingTurns:
    """The turns in which tokens of a forward are drawn: all at once, or neighbours one after the other.

    Iterating gives the slots of each turn, after their logits have been corrected for what was drawn before; the
    caller draws their tokens and puts them into `tokens`.

    Args:
        head: The draft head; None: all in one turn.
        outputs: What the forward says of (slots,), row by row.
        positions: (slots,), their text positions, on the host.
        widths: Slots of each row.
        is_drawn: (slots,) bool, on the host, which may be neighbours of others; None: all.

    Attributes:
        logits: (slots, vocab), corrected up to the turn that was given out last.
        tokens: (slots,).
    """

    def __init__(
        self,
        head: EsoDraftHead | None,
        outputs: Outputs,
        positions: torch.Tensor,
        widths: list[int],
        is_drawn: torch.Tensor | None = None,
    ):
        self.head, self.logits = head, outputs.logits
        self.tokens = torch.zeros(len(positions), dtype=torch.long, device=self.logits.device)
        self.turns: list[list[int]] = []
        if head is None or outputs.states is None or max(widths) < 2:
            return
        neighbours = _neighbours_in_rows(positions, widths, is_drawn)
        self.turns = _turns(neighbours)
        if len(self.turns) > 1:
            self.logits = self.logits.clone()
            self.projected = head.state_proj(outputs.states)
            # In the order of the turns, so that each is a slice.
            self.order = torch.tensor([slot for turn in self.turns for slot in turn])
            self.neighbours = neighbours.take(self.order).to(self.logits.device)
            self.order = self.order.to(self.logits.device)

    def __iter__(self) -> Iterator[slice | torch.Tensor]:
        if self.head is None or len(self.turns) <= 1:
            yield ALL
            return
        start = 0
        for number, turn in enumerate(self.turns):
            part = slice(start, start + len(turn))
            slots, start = self.order[part], part.stop
            if number > 0:
                beside, distances = self.neighbours.slots[part], self.neighbours.distances[part]
                self.logits[slots] += self.head.correct(self.projected[slots], self.tokens[beside], distances)
            yield slots

    @property
    def num_turns(self) -> int:
        """How many there are."""
        return max(len(self.turns), 1)

    def assemble(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Puts what was computed turn by turn, (slots of a turn, ...) each, in the order of the slots."""
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts)[self.order.argsort()]


def _neighbours_in_rows(positions: torch.Tensor, widths: list[int], is_drawn: torch.Tensor | None) -> Neighbours:
    """The neighbours of slots, (slots, 2), among those of their own row."""
    counts = torch.tensor(widths)
    is_slot = torch.arange(max(widths, default=0)) < counts[:, None]
    padded = torch.zeros(is_slot.shape, dtype=torch.long)
    padded[is_slot] = positions
    may_be = is_slot.clone()
    if is_drawn is not None:
        may_be[is_slot] = is_drawn
    neighbours = find_neighbours(padded, torch.zeros_like(padded), may_be)
    first = torch.tensor([0, *accumulate(widths)])[:-1, None, None]
    slots = torch.where(neighbours.slots >= 0, neighbours.slots + first, -1)
    return Neighbours(slots[is_slot], neighbours.distances[is_slot])


def _turns(neighbours: Neighbours) -> list[list[int]]:
    """The slots of each turn: none before its neighbours, which have lower numbers."""
    turn_of = [-1]  # the first one stands for no neighbour
    turns: list[list[int]] = []
    for slot, beside in enumerate(neighbours.slots.tolist()):
        turn = max(turn_of[index + 1] for index in beside) + 1
        turn_of.append(turn)
        if turn == len(turns):
            turns.append([])
        turns[turn].append(slot)
    return turns
