"""Drawing the tokens of a forward in turns, so that each knows what those beside it have become."""

from collections.abc import Iterator

import torch

from .generation_decoding import Outputs
from .modeling_drafting import MAX_DISTANCE, EsoDraftHead

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
        device = self.logits.device
        # Behind the last slot stands the mask, for neighbours that do not exist.
        filler = 0 if head is None else head.mask_token_id
        self.told = torch.full((len(positions) + 1,), filler, dtype=torch.long, device=device)
        self.tokens = self.told[:-1]
        self.turns: list[list[int]] = []
        if head is None or outputs.states is None or max(widths) < 2:
            return
        neighbours = _neighbours_in_rows(positions.tolist(), widths, None if is_drawn is None else is_drawn.tolist())
        self.turns = _turns([beside for beside, _ in neighbours])
        if len(self.turns) > 1:
            # In the order of the turns, so that each is a slice of them; of all slots too where that is their order.
            order = [slot for turn in self.turns for slot in turn]
            self.are_in_order = order == list(range(len(order)))
            sides = torch.tensor([neighbours[slot] for slot in order], device=device)
            self.beside, distances = sides.unbind(dim=1)
            self.order = torch.tensor(order, device=device)
            states = outputs.states if self.are_in_order else outputs.states[self.order]
            self.prepared = head.prepare(states, distances)
            self.logits = self.logits.clone()

    def __iter__(self) -> Iterator[slice | torch.Tensor]:
        if self.head is None or len(self.turns) <= 1:
            yield ALL
            return
        start = 0
        for number, turn in enumerate(self.turns):
            part = slice(start, start + len(turn))
            slots, start = part if self.are_in_order else self.order[part], part.stop
            if number > 0:
                self.logits[slots] += self.head.correct(self.prepared[part], self.told[self.beside[part]])
            yield slots

    @property
    def num_turns(self) -> int:
        """How many there are."""
        return max(len(self.turns), 1)

    def assemble(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Puts what was computed turn by turn, (slots of a turn, ...) each, in the order of the slots."""
        if len(parts) == 1:
            return parts[0]
        joined = torch.cat(parts)
        return joined if self.are_in_order else joined[self.order.argsort()]


def _neighbours_in_rows(
    positions: list[int], widths: list[int], is_drawn: list[bool] | None
) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Of each slot, its neighbours among those of its row, at the left and the right, and how far they are.

    The rule is that of `find_neighbours`, for a few slots on the host.
    """
    found, start = [], 0
    for width in widths:
        slot_at: dict[int, int] = {}
        for slot in range(start, start + width):
            slots, distances = [-1, -1], [0, 0]
            if is_drawn is None or is_drawn[slot]:
                place = positions[slot]
                for side, direction in enumerate((-1, 1)):
                    for distance in range(1, MAX_DISTANCE + 1):
                        if (other := slot_at.get(place + direction * distance)) is not None:
                            slots[side], distances[side] = other, distance
                            break
                slot_at[place] = slot
            found.append(((slots[0], slots[1]), (distances[0], distances[1])))
        start += width
    return found


def _turns(neighbours: list[tuple[int, int]]) -> list[list[int]]:
    """The slots of each turn: none before its neighbours, which have lower numbers."""
    turn_of = [-1]  # the first one stands for no neighbour
    turns: list[list[int]] = []
    for slot, (left, right) in enumerate(neighbours):
        turn = max(turn_of[left + 1], turn_of[right + 1]) + 1
        turn_of.append(turn)
        if turn == len(turns):
            turns.append([])
        turns[turn].append(slot)
    return turns
