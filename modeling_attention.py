"""Attention: which slot sees which, and the functions that compute it.

Masks come from a rule, for whichever attention a model is configured with.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, TypeGuard, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, BlockMask, sdpa_mask
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils.generic import is_flash_attention_requested

from .generation_order import clean_masked_padding, text_positions
from .modeling_packing import Packing, Pieces
from .validation import require_exactly_one

MAX_DECODED_SLOTS = 64
"""Slots up to which a forward on top of a cache counts as a decoding step."""

MAX_QUERIES_TRANSPOSED = 16
"""Queries up to which a decoding step on the CPU computes its attention scores as K q^T rather than q K^T."""

MAX_QUERIES_GATHERED = 4
"""Queries of a head of keys up to which their values are added up row by row, as those of bags of embeddings are."""

KEYS_OF_BAG = 2**11
"""Keys of a head whose values are added up at a time, for one query after the other: they stay in a core's cache."""

MIN_SCORES_BY_PRODUCTS = 2**12
"""Heads of all rows times keys from which on products and sums read keys and values faster than sdpa does."""

MAX_BYTES_COPIED = 2**24
"""Size of keys beyond which rows are multiplied one by one, where a product copies what is a part of a cache: fresh
pages for a larger copy take longer than all else."""

GROUPED_SDPA = "eso_grouped_sdpa"
"""The name of `grouped_sdpa_attention_forward` among transformers' attention implementations."""


class EsoRotaryEmbedding(LlamaRotaryEmbedding):
    """Rotary angles of text positions, whose frequencies stay in float32 when the model is cast.

    In bfloat16 a frequency is off by up to 0.4 %, which at position 10000 is the wrong angle altogether.
    """

    def forward(self, states: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The two factors of `rotate`, (batch, 1, slots, head width), of the type of `states`."""
        return sign_of_rotation(*super().forward(states, position_ids))

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        exact = {name: buffer for name, buffer in self.named_buffers() if not buffer.is_meta}
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            setattr(self, name, buffer.to(getattr(self, name).device))
        return self


def sign_of_rotation(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """From cosines and sines, (batch, slots, width), to the factors of `rotate`, (batch, 1, slots, width)."""
    first, second = sin.chunk(2, dim=-1)
    return cos[:, None], torch.cat((-first, second), dim=-1)[:, None]


def rotate(states: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor) -> torch.Tensor:
    """Turns each pair of halves of queries or keys, (batch, heads, slots, head width), by its angle.

    (a, b) becomes (a cos - b sin, b cos + a sin): the sign of the first sine is part of the factor, which saves half
    of the operations of turning the halves themselves.
    """
    return torch.addcmul(states * cos, states.roll(states.shape[-1] // 2, dims=-1), signed_sin)


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


def make_clean_first_mask(
    config: PreTrainedConfig, group: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor | BlockMask:
    """The mask in which slots in text order see what they would in the order clean, masked, padding.

    Args:
        config, dtype: As for `make_attention_mask`.
        group: (batch, slots), 0 clean, 1 masked, 2 padding.
    """
    batch, slots = group.shape

    def sees(row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        of_query, of_key = group[row, query], group[row, key]
        return (of_key < of_query) | ((of_key == of_query) & (key <= query))

    return make_attention_mask(config, sees, batch, slots, slots, dtype, group.device)


def read_text_order(
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    mask_token_id: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of slots in text order, whether each is clean (0), masked (1) or padding (2), and its text position."""
    given = require_exactly_one(input_ids, inputs_embeds)
    no_mask = given.new_zeros(given.shape[:2], dtype=torch.bool)
    is_masked = no_mask if input_ids is None else input_ids == mask_token_id
    is_real = torch.ones_like(is_masked) if attention_mask is None else attention_mask.bool()
    return clean_masked_padding(is_masked, is_real), text_positions(is_real)


def mask_behind_cache(states: torch.Tensor) -> torch.Tensor:
    """What slots see of one another on top of a cache, all of which they see: (1, 1, slots, slots), additive."""
    slots = states.shape[1]
    return states.new_full((1, 1, slots, slots), torch.finfo(states.dtype).min).triu(diagonal=1)


def is_padding_mask(attention_mask: torch.Tensor | BlockMask | None) -> TypeGuard[torch.Tensor]:
    """Whether a mask says which tokens are real, (batch, slots), rather than which slot sees which."""
    return isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention spelled out; the mask is additive or boolean (True = visible).

    A mask narrower than the keys speaks of the last of them, and all before are visible: the keys of a decoding step
    behind the cached ones, for which no mask of the length of the cache need be made.
    """
    if _is_decoding_on_cpu(query) and not (dropout and module.training):
        output, weights = _attend_by_products(query, key, value, attention_mask, scaling)
        return output.transpose(1, 2).contiguous(), weights
    scores = torch.matmul(query * scaling, key.transpose(2, 3))
    weights = _weights(scores, attention_mask, value.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def _weights(scores: torch.Tensor, attention_mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Softmax of scores, in float32 at least; those of invisible keys are taken away, in place.

    A narrow mask speaks of the last keys.
    """
    if attention_mask is not None:
        masked_scores = scores[..., scores.shape[-1] - attention_mask.shape[-1] :]
        if attention_mask.dtype == torch.bool:
            masked_scores.masked_fill_(~attention_mask, torch.finfo(scores.dtype).min)
        else:
            masked_scores.add_(attention_mask)
    return F.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(dtype)


def _is_decoding_on_cpu(query: torch.Tensor) -> bool:
    is_plain = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return query.shape[-2] <= MAX_QUERIES_TRANSPOSED and query.device.type == "cpu" and is_plain


def in_one_piece(states: Pieces, dim: int = 2) -> torch.Tensor:
    """Keys or values in one tensor; a copy, if there are several."""
    if isinstance(states, torch.Tensor):
        return states
    return states[0] if len(states) == 1 else torch.cat(states, dim=dim)


def attend_few_queries(
    query: torch.Tensor,
    key: Pieces,
    value: Pieces,
    attention_mask: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """Attention of a decoding step on the CPU, which reads keys and values once, where they are in the cache.

    Args:
        query: (batch, heads, queries, width), few.
        key, value: (batch, heads or fewer, keys, width), in one piece or in several.
        attention_mask: (batch or 1, 1, queries, keys or the last of them), additive or boolean (True = visible).
        scaling: Of the scores.

    Returns:
        (batch, heads, queries, width).
    """
    if isinstance(key, list) and len(key) == 1 and key[0].dtype != torch.bfloat16:
        # One of many texts: sdpa takes fewer operations, which then count. (In bfloat16 it is slow for many keys.)
        return _sdpa_of_groups(query, key[0], value[0], widen_mask(attention_mask, key[0].shape[2]), scale=scaling)
    num_keys = key.shape[2] if isinstance(key, torch.Tensor) else sum(piece.shape[2] for piece in key)
    if goes_by_products(query.shape, num_keys):
        return _attend_by_products(query, key, value, attention_mask, scaling)[0]
    mask = widen_mask(attention_mask, num_keys)
    return _sdpa_of_groups(query, in_one_piece(key), in_one_piece(value), mask, scale=scaling)


def goes_by_products(shape: tuple[int, ...], num_keys: int) -> bool:
    """Whether `attend_few_queries` attends by products to so many keys; sdpa needs a mask of all of them.

    Args:
        shape: Of the queries, (batch, heads, queries, ...).
        num_keys: Cached and new.
    """
    batch, num_heads, num_queries = shape[:3]
    return batch * num_heads * num_keys >= MIN_SCORES_BY_PRODUCTS and num_queries <= MAX_QUERIES_TRANSPOSED


def _sdpa_of_groups(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor, **kwargs: Any
) -> torch.Tensor:
    """sdpa in which the heads of a group are further queries of the same keys, of which it needs no copies."""
    batch, num_heads, slots, width = query.shape
    if (groups := num_heads // key.shape[1]) > 1:
        query = query.reshape(batch, key.shape[1], groups * slots, width)
        attention_mask = attention_mask.repeat(1, 1, groups, 1)
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, **kwargs)
    return output.reshape(batch, num_heads, slots, -1)


def widen_mask(attention_mask: torch.Tensor, num_keys: int) -> torch.Tensor:
    """A mask of all keys, from one of the last of them: those before are visible."""
    if (missing := num_keys - attention_mask.shape[-1]) == 0:
        return attention_mask
    return F.pad(attention_mask, (missing, 0), value=attention_mask.dtype == torch.bool)


def _attend_by_products(
    query: torch.Tensor,
    key: Pieces,
    value: Pieces,
    attention_mask: torch.Tensor | None,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, and the weights (batch, heads, queries, keys)."""
    keys, values = ([states] if isinstance(states, torch.Tensor) else states for states in (key, value))
    batch, num_heads, slots, width = query.shape
    num_key_heads = keys[0].shape[1]
    grouped = (query * scaling).reshape(batch, num_key_heads, -1, width).contiguous()
    scores = in_one_piece([_scores(grouped, piece) for piece in keys], dim=-1).view(batch, num_heads, slots, -1)
    weights = _weights(scores, attention_mask, values[0].dtype)
    parts = weights.view(*grouped.shape[:3], -1).split([piece.shape[2] for piece in values], dim=-1)
    mixed = [_mix(*part) for part in zip(parts, values, strict=True)]
    total = mixed[0] if len(mixed) == 1 else torch.stack(mixed).sum(dim=0)
    return total.view(batch, num_heads, slots, -1), weights


def _scores(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """q K^T, (batch, heads, queries, keys), as K q^T.

    In float32 that reads keys up to half again as fast; the layout matters too. In other types keys are copied unless
    they are all that their tensor holds.
    """
    if key.nbytes > MAX_BYTES_COPIED and key.dtype != torch.float32 and len(key) > 1:
        return torch.cat([_scores(*row) for row in zip(query.split(1), key.split(1), strict=True)])
    return torch.matmul(key, query.transpose(2, 3)).transpose(2, 3).contiguous()


def _mix(weights: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Weights (batch, heads, queries, keys) times values (batch, heads, keys, width).

    Weighted sums of rows are what bags of embeddings are, and that code reads values a good deal faster than a product
    does, for few queries. The table holds the values of all heads: it is the tensor of which they are a part.
    """
    batch, num_heads, num_queries, num_keys = weights.shape
    width = value.shape[-1]
    head_stride = value.stride(1)
    is_table = value.stride()[2:] == (width, 1) and head_stride % width == 0
    is_table = is_table and (batch == 1 or value.stride(0) == num_heads * head_stride)
    if num_queries > MAX_QUERIES_GATHERED or not is_table or value.dtype not in (torch.float32, torch.bfloat16):
        return torch.matmul(weights, value)
    if num_queries > 1 and num_keys > KEYS_OF_BAG:
        parts = zip(weights.split(KEYS_OF_BAG, dim=-1), value.split(KEYS_OF_BAG, dim=2), strict=True)
        return torch.stack([_mix(*part) for part in parts]).sum(dim=0)
    num_bags, rows_between = batch * num_heads, head_stride // width
    table = value.as_strided(((num_bags - 1) * rows_between + num_keys, width), (width, 1))
    rows = _rows_of_bags(num_bags, num_queries, rows_between, num_keys)
    per_sample_weights = weights.reshape(-1, num_keys)
    mixed = F.embedding_bag(rows, table, mode="sum", per_sample_weights=per_sample_weights)
    return mixed.view(batch, num_heads, num_queries, width)


@lru_cache(maxsize=64)  # as many as there are texts that attend apart
def _rows_of_bags(num_bags: int, num_queries: int, rows_between: int, num_keys: int) -> torch.Tensor:
    """(bags x queries, keys): where in the table each value is. The layers of a model ask for the same."""
    first = torch.arange(num_bags, dtype=torch.int32).repeat_interleave(num_queries) * rows_between
    return first[:, None] + torch.arange(num_keys, dtype=torch.int32)


def grouped_sdpa_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packed_rows: Packing | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' sdpa attention, with a mask and grouped heads, without copies of the keys and values.

    There it repeats them for every head of a group: in a decoding step the whole cache. Rows may be packed; keys and
    values may come in pieces, and a mask may be narrower than the keys.
    """
    if packed_rows is not None:
        kwargs |= {"dropout": dropout, "scaling": scaling}
        mask = cast(torch.Tensor, attention_mask)  # packed rows never come without
        return packed_rows.attend(grouped_sdpa_attention_forward, module, query, key, value, mask, **kwargs)
    has_bias = kwargs.get("position_bias") is not None
    if has_bias or attention_mask is None or attention_mask.shape[1] != 1:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if dropout == 0 and _is_decoding_on_cpu(query):
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        output = attend_few_queries(query, key, value, attention_mask, scaling)
    else:
        key, value = in_one_piece(key), in_one_piece(value)
        mask = widen_mask(attention_mask, key.shape[2])
        output = _sdpa_of_groups(query, key, value, mask, dropout_p=dropout, scale=scaling)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(GROUPED_SDPA, grouped_sdpa_attention_forward)
AttentionMaskInterface.register(GROUPED_SDPA, sdpa_mask)


@contextmanager
def grouped_attention(decoder: PreTrainedModel) -> Iterator[None]:
    """Lets a decoder with sdpa attention use `grouped_sdpa_attention_forward`, for as long as the context lasts."""
    implementation = decoder.config._attn_implementation
    if implementation == "sdpa":
        decoder.config._attn_implementation = GROUPED_SDPA
    try:
        yield
    finally:
        decoder.config._attn_implementation = implementation


def implementation_for(
    config: PreTrainedConfig, attention_mask: torch.Tensor | BlockMask | None, num_keys: int, are_packed: bool
) -> str:
    """The attention that `EsoAttention` uses: the configured one, or one that can take the mask, or packed rows."""
    if are_packed:
        return GROUPED_SDPA
    implementation = config._attn_implementation
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 4:
        return implementation
    if attention_mask.shape[-1] < num_keys:
        return "eager"
    takes_tensors = implementation != "flex_attention" and not is_flash_attention_requested(config)
    return implementation if takes_tensors else "sdpa"
