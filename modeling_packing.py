"""Rows of different numbers of slots in one forward, in which none pays for the slots of another.

The slots of all rows stand one behind the other, as a single row, so that norms, projections, the MLP and the head
compute the real ones alone. Only attention tells the rows apart.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

Pieces = torch.Tensor | list[torch.Tensor]
"""Keys or values, (batch, heads, keys, width), of which some may be in one tensor and some in another."""

MAX_PADDED_WORK = 3
"""How many times the products of queries and keys may grow by padding before each packed row attends by itself."""


class Packing(ABC):
    """How the slots of a forward are shared out among its rows, which each attend by themselves."""

    num_slots: list[int]
    """Of each row; they stand one behind the other."""

    @abstractmethod
    def of_row(
        self, row: int, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[Pieces, Pieces, torch.Tensor]:
        """Its keys, its values and its mask, of what `attend` got."""

    def attend(
        self,
        attend: Callable,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor,
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
        outputs, start = [], 0
        for row, count in enumerate(self.num_slots):
            if count > 0:
                own = self.of_row(row, key, value, attention_mask)
                outputs.append(attend(module, query[:, :, start : start + count], *own, **kwargs)[0])
            start += count
        return torch.cat(outputs, dim=1), None


@dataclass
class PackedRows(Packing):
    """Rows of a batch, each of which has a row of the cache, (rows, heads, keys, width), its own keys in front.

    The mask is (rows, 1, most slots of a row, keys): which of the keys a slot sees.

    Args:
        num_slots: Slots of each row.
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

    def of_row(
        self, row: int, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[Pieces, Pieces, torch.Tensor]:
        own, count, keys = slice(row, row + 1), self.num_slots[row], self.num_keys[row]
        return key[own, :, :keys], value[own, :, :keys], attention_mask[own, :, :count, :keys]

    def attend(
        self, attend: Callable, module: nn.Module, query: torch.Tensor, *states: torch.Tensor, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        if self.attend_apart:
            return super().attend(attend, module, query, *states, **kwargs)
        output, _ = attend(module, self.pad(query), *states, **kwargs)
        return output[self.rows, self.slots][None], None


@dataclass
class TextsInPieces(Packing):
    """Texts whose keys and values lie in pieces of the one row of a cache, (1, heads, keys, width).

    Args:
        num_slots: Slots of each text.
        pieces: Of each text, where its keys are, those of its slots last.
        masks: Of each text, (1, 1, slots, keys), or of the last keys alone: which of them a slot sees.
    """

    num_slots: list[int]
    pieces: list[list[slice]]
    masks: list[torch.Tensor]

    def of_row(
        self, row: int, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[Pieces, Pieces, torch.Tensor]:
        pieces = self.pieces[row]
        return [key[:, :, piece] for piece in pieces], [value[:, :, piece] for piece in pieces], self.masks[row]
