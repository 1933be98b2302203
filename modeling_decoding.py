"""A decoding step of an Eso-LM on the CPU, without the modules: the operations that its layers need, and no others.

Where products read weights as fast as memory gives them, calling the modules of `EsoModel` is a good part of what is
left of a step. Here all layers are one loop over their weights.
"""

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as every_module
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from .modeling_attention import (
    MAX_QUERIES_TRANSPOSED,
    MIN_SCORES_BY_PRODUCTS,
    attend_few_queries,
    grouped_sdpa_attention_forward,
    mask_behind_cache,
    rotate,
    widen_mask,
)
from .modeling_interface import BackboneOutput
from .modeling_modulation import EsoModulation, split_modulation
from .modeling_products import DecodingLinear, PackedWeight
from .modeling_quantized import QuantizedWeight

ARGUMENTS = frozenset({"input_ids", "attention_mask", "position_ids", "past_key_values", "packed_rows"})
"""Of `EsoModel.forward`, those that a decoding step makes use of; others must be None."""

SLOWER_THAN_FOUR = (2, 3)
"""Rows of which oneDNN's products take longer than of four."""

Norm = tuple[torch.Tensor, torch.Tensor]
"""Weight and bias, which hold the modulation too."""


class _Layer(NamedTuple):
    attention_norm: Norm
    projections: tuple[DecodingLinear, DecodingLinear, DecodingLinear]
    output: DecodingLinear
    attention_gate: torch.Tensor
    mlp_norm: Norm
    up: DecodingLinear
    down: DecodingLinear
    mlp_gate: torch.Tensor


class DecodingStep:
    """The forward of an `EsoModel` for a few slots of each row, on top of a cache, without gradients.

    Args:
        backbone: An `EsoModel`, whose weights do not change from here on.
    """

    def __init__(self, backbone: Any):
        self.backbone = backbone
        self.num_heads = backbone.config.num_attention_heads
        self.scaling = backbone.layers[0].self_attn.scaling
        self.eps = backbone.norm.eps
        self.angles = torch.empty(2, 0)
        with torch.no_grad():
            conditioning = backbone.timestep_embedding(backbone.norm.weight)
            self.layers = [_take_apart(layer, conditioning) for layer in backbone.layers]
            self.norm = backbone.norm.fold(*split_modulation(backbone.modulation, conditioning, 2))
        packed = [module.packed for module in backbone.modules() if isinstance(module, DecodingLinear)]
        self.is_quantized = any(one is not None and isinstance(one[0], QuantizedWeight) for one in packed)
        # Whoever listens to the modules has to hear them: dictionaries that are empty for as long as nobody does.
        self.hooks = [every_module._global_forward_hooks, every_module._global_forward_pre_hooks]
        self.hooks += [
            hooks for module in backbone.modules() for hooks in (module._forward_hooks, module._forward_pre_hooks)
        ]

    @staticmethod
    def of(backbone: Any) -> "DecodingStep | None":
        """That of an `EsoModel` of plain modules on the CPU; None for one that adapters or others have changed."""
        modules = list(backbone.modules())
        linear = [module for layer in backbone.layers for module in layer.modules() if isinstance(module, nn.Linear)]
        config = backbone.config
        is_plain = (
            backbone.embed_tokens.weight.device.type == "cpu"
            and backbone.dtype in (torch.float32, torch.bfloat16)
            and all(type(module) in (DecodingLinear, EsoModulation) for module in linear)
            and len(linear) == 7 * len(backbone.layers) > 0
            and not any("forward" in module.__dict__ for module in modules)
            and not (config.output_hidden_states or config.output_attentions)
        )
        return DecodingStep(backbone) if is_plain else None

    def can_run(self, arguments: dict[str, Any]) -> bool:
        """Whether it can stand in for `EsoModel.forward` with these arguments."""
        cache, input_ids = arguments.get("past_key_values"), arguments.get("input_ids")
        packed_rows = arguments.get("packed_rows")
        if input_ids is None or not isinstance(cache, Cache) or cache.is_compileable:
            return False
        num_slots = input_ids.shape[1] if packed_rows is None else max(packed_rows.num_slots)
        mask = arguments.get("attention_mask")
        return (
            0 < num_slots <= MAX_QUERIES_TRANSPOSED
            and cache.get_seq_length() > 0
            and arguments.get("position_ids") is not None
            and (mask is None or (isinstance(mask, torch.Tensor) and mask.dim() == 4))
            and all(value is None for name, value in arguments.items() if name not in ARGUMENTS)
            and not any(self.hooks)
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
        )

    def __call__(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        past_key_values: Cache,
        attention_mask: torch.Tensor | None = None,
        packed_rows: Any = None,
        **others: None,
    ) -> BackboneOutput:
        """Runs the slots given, (batch, slots), as `EsoModel.forward` does."""
        hidden_states = F.embedding(input_ids, self.backbone.embed_tokens.weight)
        batch, num_slots, hidden_size = hidden_states.shape
        num_heads, head_width = self.num_heads, hidden_size // self.num_heads
        cos, sin = self._angles_of(position_ids, hidden_states)
        if attention_mask is None:
            attention_mask = mask_behind_cache(hidden_states)
        num_keys, _ = past_key_values.get_mask_sizes(num_slots, 0)
        if packed_rows is None and batch * num_heads * num_keys < MIN_SCORES_BY_PRODUCTS:
            attention_mask = widen_mask(attention_mask, num_keys)  # once for all layers
        if batch == 1 and num_slots in SLOWER_THAN_FOUR and not self.is_quantized:
            hidden_states = F.pad(hidden_states, (0, 0, 0, 4 - num_slots))
        attended = torch.zeros_like(hidden_states)
        attended_heads = attended[:, :num_slots].view(batch, num_slots, num_heads, head_width)

        for index, layer in enumerate(self.layers):
            normed = _normalise(hidden_states, layer.attention_norm, self.eps)
            heads = _project(normed, layer.projections).view(batch, -1, 3 * num_heads, head_width).transpose(1, 2)
            turned = rotate(heads[:, : 2 * num_heads, :num_slots], cos, sin)
            key, value = turned[:, num_heads:], heads[:, 2 * num_heads :, :num_slots]
            key, value = past_key_values.update(key, value, index)
            inputs = (turned[:, :num_heads], key, value, attention_mask)
            if packed_rows is None:
                update = attend_few_queries(*inputs, self.scaling).transpose(1, 2)
            else:
                settings = {"scaling": self.scaling, "packed_rows": packed_rows}
                update, _ = grouped_sdpa_attention_forward(self.backbone, *inputs, **settings)
            attended_heads.copy_(update)
            hidden_states = torch.addcmul(hidden_states, layer.attention_gate, layer.output.forward(attended))

            normed = _normalise(hidden_states, layer.mlp_norm, self.eps)
            update = layer.down.forward(layer.up.forward(normed, has_gelu=True))
            hidden_states = torch.addcmul(hidden_states, layer.mlp_gate, update)
        states = _normalise(hidden_states, self.norm, self.eps)[:, :num_slots]
        return cast(BackboneOutput, BaseModelOutputWithPast(last_hidden_state=states, past_key_values=past_key_values))

    def _angles_of(self, position_ids: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """The factors of `rotate` at some positions, (2, batch, 1, slots, width), looked up in a table that grows."""
        angles = self.angles
        if (most := int(position_ids.max())) >= angles.shape[1]:
            positions = torch.arange(2 * most + 2)[None]
            self.angles = angles = torch.stack(self.backbone.rotary_emb(states, position_ids=positions))[:, 0, 0]
        return angles[:, position_ids][:, :, None]


def _take_apart(layer: Any, conditioning: torch.Tensor) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    attn_shift, attn_scale, attn_gate, mlp_shift, mlp_scale, mlp_gate = split_modulation(
        layer.modulation, conditioning, 6
    )
    return _Layer(
        attention_norm=layer.input_layernorm.fold(attn_shift, attn_scale),
        projections=(attention.q_proj, attention.k_proj, attention.v_proj),
        output=attention.o_proj,
        attention_gate=attn_gate,
        mlp_norm=layer.post_attention_layernorm.fold(mlp_shift, mlp_scale),
        up=mlp.up_proj,
        down=mlp.down_proj,
        mlp_gate=mlp_gate,
    )


def _normalise(states: torch.Tensor, norm: Norm, eps: float) -> torch.Tensor:
    weight, bias = norm
    return F.layer_norm(states, weight.shape, weight, bias, eps)  # of states in bfloat16, too, in float32


def _project(states: torch.Tensor, projections: tuple[DecodingLinear, ...]) -> torch.Tensor:
    """Queries, keys and values side by side."""
    packed = projections[0].packed
    if packed is not None and isinstance(packed[0], PackedWeight) and packed[0].layers == projections:
        return packed[0].joint_product(states)
    return torch.cat([projection.forward(states) for projection in projections], dim=-1)
