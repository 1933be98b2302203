"""Rows of different numbers of slots in one forward, none of which pays for the slots of another.

The slots of all rows stand one behind the other, as a single row: norms, projections, the MLP and the head compute the
real ones alone. Only attention tells the rows apart.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

MAX_PADDED_WORK = 3
"""How many times the products of queries and keys may grow by padding before each row attends by itself."""


@dataclass
class PackedRows:
    """How the slots of a forward are shared out among the rows of a cache.

    Args:
        num_slots: Slots of each row; they stand one behind the other.
        num_keys: Keys of each row, cached and fed, those of its slots last.
        rows, slots: Of each packed slot, its row, and which of the slots of that row it is.
    """

    num_slots: list[int]
    num_keys: list[int]
    rows: torch.LongTensor
    slots: torch.LongTensor

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


def attend_packed(
    attend: Callable,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    packed_rows: PackedRows,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention of each row's slots to its own keys.

    Args:
        attend: An attention function of transformers' interface.
        query: (1, heads, slots of all rows, width).
        key, value: (rows, heads, keys, width), of which each row has its own in front.
        attention_mask: (rows, 1, most slots of a row, keys), which of the keys a slot sees.

    Returns:
        (1, slots of all rows, heads, width), None.
    """
    if not packed_rows.attend_apart:
        output, _ = attend(module, packed_rows.pad(query), key, value, attention_mask, **kwargs)
        return output[packed_rows.rows, packed_rows.slots][None], None
    outputs, start = [], 0
    for row, (count, keys) in enumerate(zip(packed_rows.num_slots, packed_rows.num_keys, strict=True)):
        own, slots = slice(row, row + 1), slice(start, start + count)
        if count > 0:
            output, _ = attend(
                module,
                query[:, :, slots],
                key[own, :, :keys],
                value[own, :, :keys],
                attention_mask[own, :, :count, :keys],
                **kwargs,
            )
            outputs.append(output)
        start += count
    return torch.cat(outputs, dim=1), None
