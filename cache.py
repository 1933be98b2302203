"""A KV cache that is allocated once and appended to in place."""

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


class PreallocatedLayer(CacheLayerMixin):
    """Keys and values of one layer, (batch, heads, max_length, head width), of which the first slots are in use.

    `update` writes behind the slots in use and returns views, `crop(-n)` only forgets: a decoding step that keeps
    its clean tokens and drops its masks copies nothing but the new slots.
    """

    is_croppable = True

    def __init__(self, max_length: int):
        super().__init__()
        self.max_length = max_length
        self.length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states.new_empty(*key_states.shape[:-2], self.max_length, key_states.shape[-1])
        self.values = value_states.new_empty(*value_states.shape[:-2], self.max_length, value_states.shape[-1])
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[-2]
        if end > self.max_length:
            raise ValueError(
                f"The cache holds `max_length={self.max_length}` slots, {self.length} are in use and "
                f"{key_states.shape[-2]} more do not fit."
            )
        self.keys[..., self.length : end, :] = key_states
        self.values[..., self.length : end, :] = value_states
        self.length = end
        return self.keys[..., :end, :], self.values[..., :end, :]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

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
        self.length = 0


class PreallocatedCache(Cache):
    """A [`Cache`] of [`PreallocatedLayer`]s: exactly 2 x layers x batch x max_length x width x bytes of memory.

    Args:
        num_layers: Layers of the model.
        max_length: Slots that the cache can hold; going beyond raises a ValueError.
    """

    def __init__(self, num_layers: int, max_length: int):
        super().__init__(layers=[PreallocatedLayer(max_length) for _ in range(num_layers)])
