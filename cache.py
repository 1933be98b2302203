"""A KV cache that is allocated once and appended to in place."""

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


class PreallocatedLayer(CacheLayerMixin):
    """Keys and values of one layer, (batch, heads, max_length, head width), of which the first slots are in use.

    `update` writes behind the slots in use and returns views, `crop(-n)` only forgets: a decoding step that keeps
    its clean tokens and drops its masks copies nothing but the new slots.
    """

    is_croppable = True

    def __init__(self, max_length: int, is_compileable: bool = False):
        super().__init__()
        self.max_length = max_length
        self.is_compileable = is_compileable
        self.length = 0
        self.row_slots: torch.LongTensor | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        # Zeros, because a row may look past its own slots: attention gives them no weight, but 0 x NaN is NaN.
        self.keys = key_states.new_zeros(*key_states.shape[:-2], self.max_length, key_states.shape[-1])
        self.values = value_states.new_zeros(*value_states.shape[:-2], self.max_length, value_states.shape[-1])
        if self.is_compileable:
            # A CUDA graph may then write to them where they are.
            torch._dynamo.mark_static_address(self.keys)
            torch._dynamo.mark_static_address(self.values)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.row_slots is None:
            start, self.length = self.length, self.length + key_states.shape[-2]
            if self.length > self.max_length:
                raise ValueError(
                    f"The cache holds `max_length={self.max_length}` slots, {start} are in use and "
                    f"{key_states.shape[-2]} more do not fit."
                )
            self.keys[..., start : self.length, :] = key_states
            self.values[..., start : self.length, :] = value_states
        else:
            rows = torch.arange(len(self.row_slots), device=self.row_slots.device)[:, None]
            self.keys[rows, :, self.row_slots] = key_states.transpose(1, 2)
            self.values[rows, :, self.row_slots] = value_states.transpose(1, 2)
        return self.keys[..., : self.length, :], self.values[..., : self.length, :]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        # With slots named for each row, `length` counts those that are to be written already.
        return self.length + (query_length if self.row_slots is None else 0), 0

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
        self.length, self.row_slots = 0, None


class PreallocatedCache(Cache):
    """A [`Cache`] of [`PreallocatedLayer`]s: exactly 2 x layers x batch x max_length x width x bytes of memory.

    Rows may be of different lengths: `keep` says where every row goes on.

    Args:
        num_layers: Layers of the model.
        max_length: Slots that the cache can hold; going beyond raises a ValueError.
        is_compileable: Whether forwards on top of it may be compiled, or replayed as CUDA graphs: `keep` then has to
            name `row_slots` before each of them, after a first one that is not compiled and allocates the memory.
    """

    def __init__(self, num_layers: int, max_length: int, is_compileable: bool = False):
        super().__init__(layers=[PreallocatedLayer(max_length, is_compileable) for _ in range(num_layers)])
        self.max_length = max_length

    def keep(self, length: int, row_slots: torch.LongTensor | None = None) -> None:
        """Says where the next slots go: whatever stands there or behind is forgotten.

        Args:
            length: Slots that stay in use, in every row; with `row_slots`, the slots that the next `update` returns,
                of which each row's attention mask has to show its own.
            row_slots: (batch, slots), where in its row each of the next slots is written, < `length`. A slot may be
                named twice, for the same token. None: all rows go on at `length`.
        """
        for layer in self.layers:
            layer.length, layer.row_slots = length, row_slots
