"""Rows of different numbers of slots in one forward, in which none pays for the slots of another.

The slots of all rows stand one behind the other, as a single row, so that norms, projections, the MLP and the head
compute the real ones alone. Only attention tells the rows apart.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import nn

MAX_PADDED_WORK = 3
"""How many times the products of queries and keys may grow by padding before each packed row attends by itself."""


class Packing(Protocol):
    """How the slots of a forward are shared out among its rows."""

    num_slots: list[int]

    def attend(
        self,
        attend: Callable,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """Attention of each row's slots to its own keys.

        Args:
            attend: An attention function of transformers' interface.
            module: The layer.
            query: (1, heads, slots of all rows, width).
            key, value: What the cache holds.
            attention_mask: As the forward got it.

        Returns:
            (1, slots of all rows, heads, width), None.
        """


@dataclass
class PackedRows(Packing):
    """Rows of a batch, each of which has a row of the cache, (rows, heads, keys, width), its own keys in front.

    The mask is (rows, 1, most slots of a row, keys): which of the keys a slot sees.

    Args:
        num_slots: Slots of each row; they stand one behind the other.
        num_keys: Keys of each row, cached and fed, those of its slots last.
        rows, slots: Of each packed slot, its row, and which of the slots of that row it is.
    """

    num_slots: list[int]
    num_keys: list[int]
    rows: torch.Tensor
    slots: torch.Tensor

    @cached_property
    def attend_apart(self) -> bool:
        """Whether each row attends by itself. Rows that are much alike are padded, and attend in a single call."""
        needed = sum(count * keys for count, keys in zip(self.num_slots, self.num_keys, strict=True))
        padded = len(self.num_slots) * max(self.num_slots) * max(self.num_keys)
        return padded > MAX_PADDED_WORK * needed

    def pad(self, states: torch.Tensor) -> torch.Tensor:
        """From packed states (1, heads, slots, width) to (rows, heads, most slots of a row, width)."""
        padded = states.new_zeros(len(self.num_slots), max(self.num_slots), *states.shape[1::2])
        padded[self.rows, self.slots] = states[0].transpose(0, 1)
        return padded.transpose(1, 2)

    def attend(self, attend, module, query, key, value, attention_mask, **kwargs):  # type: ignore[no-untyped-def]
        if not self.attend_apart:
            output, _ = attend(module, self.pad(query), key, value, attention_mask, **kwargs)
            return output[self.rows, self.slots][None], None
        outputs, start = [], 0
        for row, (count, keys) in enumerate(zip(self.num_slots, self.num_keys, strict=True)):
            own, slots = slice(row, row + 1), slice(start, start + count)
            if count > 0:
                states = (query[:, :, slots], key[own, :, :keys], value[own, :, :keys])
                output, _ = attend(module, *states, attention_mask[own, :, :count, :keys], **kwargs)
                outputs.append(output)
            start += count
        return torch.cat(outputs, dim=1), None


@dataclass
class TextsInPieces(Packing):
    """Texts whose keys and values lie in pieces of the one row of a cache, (1, heads, keys, width).

    Args:
        num_slots: Slots of each text, not 0; they stand one behind the other.
        pieces: Of each text, where its keys are, those of its slots last.
        masks: Of each text, (1, 1, slots, slots), which of its own slots each one sees; all see those before.
    """

    num_slots: list[int]
    pieces: list[list[slice]]
    masks: list[torch.Tensor]

    def attend(self, attend, module, query, key, value, attention_mask, **kwargs):  # type: ignore[no-untyped-def]
        outputs, start = [], 0
        for count, pieces, mask in zip(self.num_slots, self.pieces, self.masks, strict=True):
            keys, values = ([states[:, :, piece] for piece in pieces] for states in (key, value))
            output, _ = attend(module, query[:, :, start : start + count], keys, values, mask, **kwargs)
            outputs.append(output)
            start += count
        return torch.cat(outputs, dim=1), None
