"""A KV cache that is allocated once and appended to in place."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


@dataclass
class SlotPlaces:
    """Where in a cache the slots of a forward are written, if not behind one another in all rows alike.

    Args:
        rows, slots: The row of the cache, and the slot in it, of every slot that is fed; they broadcast to the shape
            (batch, fed) of the forward. A place may be named twice, for the same token.
        batch: Rows of the cache.
    """

    rows: torch.Tensor
    slots: torch.Tensor
    batch: int


@dataclass
class CachedText:
    """Which tokens the slots of a cache hold, so that a later call can tell what it need not compute again.

    Args:
        tokens, positions: (batch, slots), the token of each slot and its text position.
        lengths: Of each row, the slots that count.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    lengths: list[int]


class PreallocatedLayer(CacheLayerMixin):
    """Keys and values of one layer, (batch, heads, max_length, head width), of which the first slots are in use.

    `update` writes behind the slots in use and returns views, `crop(-n)` only forgets: a decoding step that keeps
    its clean tokens and drops its masks copies nothing but the new slots.
    """

    is_croppable = True
    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, max_length: int, is_compileable: bool = False):
        super().__init__()
        self.max_length = max_length
        self.is_compileable = is_compileable
        self.length = 0
        self.places: SlotPlaces | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        batch = len(key_states) if self.places is None else self.places.batch
        # Zeros, because a row may look past its own slots: attention gives them no weight, but 0 x NaN is NaN.
        self.keys, self.values = (
            states.new_zeros(batch, states.shape[1], self.max_length, states.shape[-1])
            for states in (key_states, value_states)
        )
        if self.is_compileable:
            # A CUDA graph may then write to them where they are.
            torch._dynamo.mark_static_address(self.keys)
            torch._dynamo.mark_static_address(self.values)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.places is None:
            start, self.length = self.length, self.length + key_states.shape[-2]
            if self.length > self.max_length:
                raise ValueError(
                    f"The cache holds `max_length={self.max_length}` slots, {start} are in use and "
                    f"{key_states.shape[-2]} more do not fit."
                )
            self.keys.narrow(2, start, key_states.shape[2]).copy_(key_states)
            self.values.narrow(2, start, key_states.shape[2]).copy_(value_states)
        else:
            rows, slots = self.places.rows, self.places.slots
            self.keys[rows, :, slots] = key_states.transpose(1, 2)
            self.values[rows, :, slots] = value_states.transpose(1, 2)
        return self.keys.narrow(2, 0, self.length), self.values.narrow(2, 0, self.length)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        # Where places are named, `length` counts those that are to be written already.
        return self.length + (query_length if self.places is None else 0), 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.max_length

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last -`tokens_to_remove` slots; like transformers' caches it takes a number <= 0."""
        if not -self.length <= tokens_to_remove <= 0:
            raise ValueError(
                f"`tokens_to_remove` must be in [-{self.length}, 0], minus the number of slots to drop, "
                f"got {tokens_to_remove}."
            )
        self.length += tokens_to_remove

    def reset(self) -> None:
        self.length, self.places = 0, None


class PreallocatedCache(Cache):
    """A [`Cache`] of [`PreallocatedLayer`]s: exactly 2 x layers x batch x max_length x width x bytes of memory.

    Rows may be of different lengths: `keep` says where every row goes on.

    Args:
        num_layers: Layers of the model.
        max_length: Slots that the cache can hold; going beyond raises a ValueError.
        is_compileable: Whether forwards on top of it may be compiled, or replayed as CUDA graphs: `keep` then has to
            name places before each of them, after a first one that is not compiled and allocates the memory.
    """

    layers: list[PreallocatedLayer]  # type: ignore[assignment]  # transformers' list is of any kind

    def __init__(self, num_layers: int, max_length: int, is_compileable: bool = False):
        super().__init__(layers=[PreallocatedLayer(max_length, is_compileable) for _ in range(num_layers)])
        self.max_length = max_length
        self.text: CachedText | None = None
        self.is_stale = False  # whether slots have been written since `text` was noted

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        self.is_stale = self.text is not None
        return super().update(*args, **kwargs)

    def copy_from(self, cache: Cache, length: int, repeats: int) -> None:
        """Takes over the first `length` slots of a cache, each of its rows `repeats` times; it stays as it is."""
        sources: list[Any] = cache.layers  # with keys and values, as not all of transformers' layers are
        for layer, source in zip(self.layers, sources, strict=True):
            keys, values = (
                states[..., :length, :].repeat_interleave(repeats, dim=0) for states in (source.keys, source.values)
            )
            layer.places = None
            layer.lazy_initialization(keys, values)
            layer.keys[..., :length, :], layer.values[..., :length, :] = keys, values
            layer.length = length

    def keep(self, length: int, places: SlotPlaces | None = None) -> None:
        """Says where the next slots go: whatever stands there or behind is forgotten.

        Args:
            length: Slots that stay in use, in every row; with `places`, the slots that the next `update` returns, of
                which each row may look at its own alone.
            places: Where each of the next slots is written, in slots < `length`. None: all rows go on at `length`.
        """
        for layer in self.layers:
            layer.length, layer.places = length, places
