"""Causal decoders of transformers (Llama, Qwen, GPT-2, ...) in the place of `EsoModel`.

In generation order an Eso-LM is a causal transformer that is told the text position of each token, so every causal
decoder that honours `position_ids` can be one. What it must not do is draw conclusions of its own from the distance of
slots (sliding windows, ALiBi), carry a state from slot to slot (recurrent layers), or look ahead (encoders).
"""

import inspect
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import BlockMask
from transformers.utils import TransformersKwargs
from transformers.utils.generic import is_flash_attention_requested

from .configuration_eso import LENGTH_DEPENDENT_ROPE_TYPES, EsoConfig
from .modeling_attention import GROUPED_SDPA, make_attention_mask, widen_mask
from .modeling_interface import BackboneOutput
from .validation import require_exactly_one

NEEDED_ARGUMENTS = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "use_cache")
OTHER_ARGUMENTS = frozenset(TransformersKwargs.__annotations__) | {"packed_rows", "token_type_ids"}
"""What a backbone takes beside the arguments that it needs: transformers' own, rows of a decoding step that stand one
behind the other, and what tokenizers of BERT's kind add to every text."""


def make_backbone(config: EsoConfig) -> PreTrainedModel:
    """Builds the decoder that a `backbone_config` describes, without weights from anywhere, in place of `EsoModel`.

    Raises:
        ValueError: when it cannot be the backbone of an Eso-LM; the message says why.
    """
    described = cast(PreTrainedConfig, config.backbone_config)
    require_full_causal_attention(described)
    try:
        decoder = AutoModel.from_config(described)
    except (ValueError, KeyError) as error:
        raise ValueError(f"`backbone_config` of type {described.model_type!r} makes no model: {error}") from error
    return prepare_backbone(decoder)


def prepare_backbone(decoder: PreTrainedModel) -> PreTrainedModel:
    """Checks that a decoder can be the backbone of an Eso-LM; returns it.

    Raises:
        ValueError: when it cannot; the message says why.
    """
    kind = decoder.config.model_type
    missing = [name for name in NEEDED_ARGUMENTS if name not in inspect.signature(decoder.forward).parameters]
    if missing:
        raise _unfit(kind, f"its forward does not take {missing}: it cannot be told the positions of shuffled tokens")
    if not decoder._can_set_attn_implementation():
        raise _unfit(kind, "its attention goes past transformers' attention interface, with masks of its own")
    if decoder._is_stateful:
        raise _unfit(kind, "it has recurrent layers, whose state cannot forget a slot again")
    causal = [module.is_causal for module in decoder.modules() if hasattr(module, "is_causal")]
    if not causal or not all(causal) or not getattr(decoder.config, "is_causal", True):
        raise _unfit(kind, "its attention is not causal")
    return decoder


def require_full_causal_attention(config: PreTrainedConfig) -> None:
    """Raises a ValueError for configurations whose attention does not reach all earlier slots alike."""
    kind = config.model_type
    if config.is_encoder_decoder:
        raise _unfit(kind, "it is an encoder with a decoder")
    if config.get_text_config() is not config:
        raise _unfit(kind, "it is made for more than text: pass its `text_config`")
    others = set(getattr(config, "layer_types", None) or []) - {"full_attention"}
    if others - {"sliding_attention", "chunked_attention"}:
        raise _unfit(kind, f"its layers of the types {sorted(others)} carry a state from slot to slot")
    # Where layers have types, these say which of them have a window, whatever `sliding_window` is.
    has_layer_types = hasattr(type(config), "layer_types") and getattr(config, "layer_types", None) is not None
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if others or (window is not None and not has_layer_types):
        what = f"layers of the types {sorted(others)}" if others else f"`sliding_window={window}`"
        remedy = "make every one of `layer_types` 'full_attention'" if has_layer_types else "set `sliding_window=None`"
        raise _unfit(
            kind,
            f"the windows of its attention ({what}) count slots, which here are not the positions. To let every token "
            f"see all before it, {remedy}",
        )
    if getattr(config, "attention_chunk_size", None) is not None:
        raise _unfit(kind, f"`attention_chunk_size={config.attention_chunk_size}` counts slots")
    if getattr(config, "alibi", False):
        raise _unfit(kind, "ALiBi goes by the distance of slots, not of positions")
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in LENGTH_DEPENDENT_ROPE_TYPES:
        raise _unfit(kind, f"its angles (`rope_type={rope['rope_type']!r}`) change with the length: no cache is exact")
    if is_flash_attention_requested(config):
        raise ValueError(
            f"`attn_implementation={config._attn_implementation!r}` reads shuffled positions as packed sequences in a "
            f"backbone of type {kind!r}: use 'sdpa', 'eager' or 'flex_attention'."
        )


def require_known_arguments(kwargs: dict) -> None:
    """Raises a ValueError for arguments of a forward that no backbone has a use for, such as those of a loss."""
    unknown = sorted(set(kwargs) - OTHER_ARGUMENTS)
    if unknown:
        raise ValueError(
            f"The backbone has no use for the arguments {unknown}: the loss of an Eso-LM is that of "
            f"`EsoForMaskedDiffusion.forward`, and what calls the backbone for another trains something else."
        )


def name_of_embedding(backbone: PreTrainedModel) -> str:
    """The name of the weight of the input embeddings."""
    weight = backbone.get_input_embeddings().weight
    return next(name for name, parameter in backbone.named_parameters() if parameter is weight)


def learned_positions(decoder: PreTrainedModel) -> int | None:
    """The number of positions for which a decoder has learned embeddings; None if it computes them for any."""
    embeddings = decoder.get_input_embeddings()
    limit = getattr(decoder.config, "max_position_embeddings", None)
    tables = [module for module in decoder.modules() if isinstance(module, nn.Embedding) and module is not embeddings]
    return limit if limit and any(table.num_embeddings >= limit for table in tables) else None


def run_backbone(
    decoder: PreTrainedModel,
    input_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | BlockMask | None = None,
    position_ids: torch.Tensor | None = None,
    past_key_values: Cache | None = None,
    inputs_embeds: torch.Tensor | None = None,
    use_cache: bool | None = None,
    **kwargs: Any,
) -> BackboneOutput:
    """Runs a decoder with the arguments, and the meaning, of `EsoModel.forward`.

    Left to itself a decoder would read jumps of the positions as borders of packed sequences, so it always gets a
    mask that says otherwise.

    Raises:
        ValueError: for arguments that it has no use for.
    """
    require_known_arguments(kwargs)
    tokens = require_exactly_one(input_ids, inputs_embeds)
    batch, num_slots = tokens.shape[:2]
    if kwargs.get("packed_rows") is None:
        attention_mask = _mask_for(decoder, attention_mask, batch, num_slots, past_key_values, tokens.device)
    num_cached = 0 if past_key_values is None else past_key_values.get_seq_length()
    if position_ids is None:
        position_ids = torch.arange(num_cached, num_cached + num_slots, device=tokens.device)[None]
    if use_cache and past_key_values is None:
        past_key_values = DynamicCache()
    return decoder(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids.expand(batch, num_slots),
        past_key_values=past_key_values,
        inputs_embeds=inputs_embeds,
        use_cache=past_key_values is not None,
        return_dict=True,
        **kwargs,
    )


def _mask_for(
    decoder: PreTrainedModel,
    attention_mask: torch.Tensor | BlockMask | None,
    batch: int,
    num_slots: int,
    past_key_values: Cache | None,
    device: torch.device,
) -> torch.Tensor | BlockMask | None:
    """A mask that the decoder understands and leaves alone."""
    num_keys = num_slots if past_key_values is None else past_key_values.get_mask_sizes(num_slots, 0)[0]
    if attention_mask is None:
        num_cached = num_keys - num_slots
        if num_cached == 0:
            return torch.ones(batch, num_slots, dtype=torch.long, device=device)
        if num_slots == 1:
            return None  # sees everything; no packed sequences are looked for on top of a cache

        def sees(row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            return key <= query + num_cached

        return make_attention_mask(decoder.config, sees, batch, num_slots, num_keys, decoder.dtype, device)
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 4:
        return attention_mask
    if attention_mask.dtype != torch.bool:
        return attention_mask
    # A mask narrower than the keys speaks of the last of them, as in `EsoModel`: all before are visible.
    attention_mask = widen_mask(attention_mask, num_keys)
    if decoder.config._attn_implementation in ("sdpa", GROUPED_SDPA):
        return attention_mask
    lowest = torch.finfo(decoder.dtype).min
    return torch.zeros(attention_mask.shape, dtype=decoder.dtype, device=device).masked_fill(~attention_mask, lowest)


@torch.no_grad()
def verify_backbone(decoder: PreTrainedModel) -> None:
    """Tries out on a few tokens what an Eso-LM relies on: causal slots, honoured positions, an exact cache.

    Raises:
        ValueError: when one of these fails.
    """
    kind, device = decoder.config.model_type, decoder.device
    was_training = decoder.training
    decoder.eval()
    ids = torch.arange(1, 5, device=device)[None] % decoder.config.vocab_size
    positions = torch.tensor([[2, 0, 3, 1]], device=device)
    states = run_backbone(decoder, ids, position_ids=positions).last_hidden_state
    prefix = run_backbone(decoder, ids[:, :3], position_ids=positions[:, :3]).last_hidden_state
    in_order = run_backbone(decoder, ids).last_hidden_state
    cache = run_backbone(decoder, ids[:, :2], position_ids=positions[:, :2], use_cache=True).past_key_values
    rest = run_backbone(decoder, ids[:, 2:], position_ids=positions[:, 2:], past_key_values=cache).last_hidden_state
    decoder.train(was_training)

    tolerance = 0.05 if decoder.dtype in (torch.float16, torch.bfloat16) else 1e-4

    def differ(first: torch.Tensor, second: torch.Tensor) -> bool:
        return ((first - second).norm() > tolerance * first.norm()).item()

    if differ(states[:, :3], prefix):
        raise _unfit(kind, "its slots depend on later ones")
    if torch.equal(states, in_order):
        raise _unfit(kind, "it does not honour `position_ids`")
    if differ(states[:, 2:], rest):
        raise _unfit(kind, "its states on top of a cache differ from those of one forward")


def _unfit(kind: str, reason: str) -> ValueError:
    return ValueError(f"A model of type {kind!r} cannot be the backbone of an Eso-LM: {reason}.")
