"""Attention masks for whichever attention a model is configured with, from a rule that says which slot sees which."""

from collections.abc import Callable

import torch
from transformers import PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, BlockMask
from transformers.utils.generic import is_flash_attention_requested


def make_attention_mask(
    config: PreTrainedConfig,
    sees: Callable,
    batch: int,
    num_queries: int,
    num_keys: int,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor | BlockMask:
    """Makes the mask in which query i of a row sees the keys that `sees(row, head, query, key)` says.

    Args:
        config: Its attention implementation decides the kind of mask. Flash attention takes none at all: the layers
            fall back to sdpa where they get this one.
        sees: A rule on index tensors that broadcast against one another.
        batch, num_queries, num_keys: The shape.
        dtype: Of an additive mask (eager attention).
        device: Where.

    Returns:
        (batch, 1, queries, keys), boolean or additive; or the `BlockMask` of FlexAttention.
    """
    implementation = "sdpa" if is_flash_attention_requested(config) else config._attn_implementation
    return ALL_MASK_ATTENTION_FUNCTIONS[implementation](
        batch_size=batch,
        q_length=num_queries,
        kv_length=num_keys,
        mask_function=sees,
        allow_is_causal_skip=False,
        dtype=dtype,
        device=device,
        config=config,
    )
