"""Attention: which slot sees which, and the functions that compute it.

Masks come from a rule, for whichever attention a model is configured with. Rows of different numbers of slots may
share a forward, and none pays for the slots of another: the slots of all rows stand one behind the other, as a single
row, so that norms, projections, the MLP and the head compute the real ones alone. Only attention tells the rows apart.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
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

MAX_PADDED_WORK = 3
"""How many times the products of queries and keys may grow by padding before each packed row attends by itself."""

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


def attend_few_queries(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """Attention of a decoding step on the CPU, which reads keys and values once, where they are in the cache.

    Args:
        query: (batch, heads, queries, width), few.
        key, value: (batch, heads or fewer, keys, width).
        attention_mask: (batch or 1, 1, queries, keys or the last of them), additive or boolean (True = visible).
        scaling: Of the scores.

    Returns:
        (batch, heads, queries, width).
    """
    if goes_by_products(query.shape, key.shape[2]):
        return _attend_by_products(query, key, value, attention_mask, scaling)[0]
    return _sdpa_of_groups(query, key, value, widen_mask(attention_mask, key.shape[2]), scale=scaling)


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
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, and the weights (batch, heads, queries, keys)."""
    batch, num_heads, slots, width = query.shape
    num_key_heads, num_keys = key.shape[1:3]
    grouped = (query * scaling).reshape(batch, num_key_heads, -1, width).contiguous()
    scores = _scores(grouped, key).view(batch, num_heads, slots, num_keys)
    weights = _weights(scores, attention_mask, value.dtype)
    mixed = _mix(weights.view(batch, num_key_heads, -1, num_keys), value)
    return mixed.view(batch, num_heads, slots, -1), weights


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


@lru_cache(maxsize=2)  # as many as there are sizes of bags at a time
def _rows_of_bags(num_bags: int, num_queries: int, rows_between: int, num_keys: int) -> torch.Tensor:
    """(bags x queries, keys): where in the table each value is. The layers of a model ask for the same."""
    first = torch.arange(num_bags, dtype=torch.int32).repeat_interleave(num_queries) * rows_between
    return first[:, None] + torch.arange(num_keys, dtype=torch.int32)


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


def attend_packed(
    attend: Callable,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    packed_rows: PackedRows,
    **kwargs: Any,
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


def grouped_sdpa_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packed_rows: PackedRows | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' sdpa attention, with a mask and grouped heads, without copies of the keys and values.

    There it repeats them for every head of a group: in a decoding step the whole cache. Rows may be packed.
    """
    if packed_rows is not None:
        kwargs |= {"dropout": dropout, "scaling": scaling}
        attend = grouped_sdpa_attention_forward
        mask = cast(torch.Tensor, attention_mask)  # packed rows never come without
        return attend_packed(attend, module, query, key, value, mask, packed_rows, **kwargs)
    has_bias = kwargs.get("position_bias") is not None
    if has_bias or attention_mask is None or attention_mask.shape[1] != 1:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if dropout == 0 and _is_decoding_on_cpu(query):
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        output = attend_few_queries(query, key, value, attention_mask, scaling)
    else:
        output = _sdpa_of_groups(query, key, value, attention_mask, dropout_p=dropout, scale=scaling)
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
