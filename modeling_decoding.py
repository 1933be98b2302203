"""A decoding step on the CPU, without the modules: the operations that the layers need, and no others.

Where products read weights as fast as memory gives them, calling the modules of a backbone is a good part of what is
left of a step. Here all layers are one loop over their weights: those of `EsoModel`, and of Llama and its like.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as every_module
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from .modeling_attention import (
    MAX_DECODED_SLOTS,
    EsoRotaryEmbedding,
    attend_few_queries,
    goes_by_products,
    grouped_sdpa_attention_forward,
    mask_behind_cache,
    rotate,
    sign_of_rotation,
    widen_mask,
)
from .modeling_interface import BackboneOutput
from .modeling_modulation import EsoModulation, split_modulation
from .modeling_products import DecodingLinear, PackedWeight
from .modeling_quantized import QuantizedWeight

ARGUMENTS = frozenset({"input_ids", "attention_mask", "position_ids", "past_key_values", "packed_rows"})
"""Of `EsoModel.forward`, those that a decoding step makes use of; others must be None."""

LIKE_LLAMA = ("LlamaModel", "MistralModel", "Qwen2Model")
"""Backbones of transformers whose layers do what Llama's do, in the same parts."""

MAX_POSITIONS = 2**15
"""Text positions whose angles are kept in a table, as far as they have been met with."""

SLOWER_THAN_FOUR = (2, 3)
"""Rows of which oneDNN's products take longer than of four."""

Operation = Callable[[torch.Tensor], torch.Tensor]


class _Layer(NamedTuple):
    """What a layer does. Gates are vectors, or None: all goes through."""

    attention_norm: Operation
    projections: tuple[DecodingLinear, ...]
    output: DecodingLinear
    attention_gate: torch.Tensor | None
    mlp_norm: Operation
    mlp: Operation
    mlp_gate: torch.Tensor | None


class DecodingStep:
    """The forward of a backbone for a few slots of each row, on top of a cache, without gradients.

    Args:
        backbone: An `EsoModel`, or another whose layers are known, whose weights do not change from here on.
    """

    def __init__(self, backbone: Any):
        self.backbone = backbone
        attention = backbone.layers[0].self_attn
        self.head_width, self.scaling = attention.head_dim, attention.scaling
        self.num_heads = attention.q_proj.out_features // self.head_width
        self.num_key_heads = attention.k_proj.out_features // self.head_width
        self.angles = torch.empty(2, 0)
        with torch.no_grad():
            self.layers, self.norm = _take_apart(backbone)
        packed = [module.packed for module in backbone.modules() if isinstance(module, DecodingLinear)]
        self.is_quantized = any(one is not None and isinstance(one[0], QuantizedWeight) for one in packed)
        # Whoever listens to the modules has to hear them: dictionaries that are empty for as long as nobody does.
        self.hooks = [every_module._global_forward_hooks, every_module._global_forward_pre_hooks]
        self.hooks += [
            hooks for module in backbone.modules() for hooks in (module._forward_hooks, module._forward_pre_hooks)
        ]

    @staticmethod
    def of(backbone: Any) -> "DecodingStep | None":
        """That of a backbone of known parts on the CPU; None for others, and where adapters have changed it."""
        if not _is_known(backbone):
            return None
        modules, config, embeddings = list(backbone.modules()), backbone.config, backbone.embed_tokens
        linear = [module for module in modules if isinstance(module, DecodingLinear)]
        is_plain = (
            embeddings.weight.device.type == "cpu"
            and embeddings.max_norm is None
            and backbone.dtype in (torch.float32, torch.bfloat16)
            and all(module.weight.dtype == backbone.dtype for module in (embeddings, *linear))
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
            0 < num_slots <= MAX_DECODED_SLOTS
            and cache.get_seq_length() > 0
            and arguments.get("position_ids") is not None
            and (mask is None or (isinstance(mask, torch.Tensor) and mask.dim() == 4 and mask.shape[1] == 1))
            and all(value is None for name, value in arguments.items() if name not in ARGUMENTS)
            and not self.backbone.training
            and not self._is_listened_to()
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
        )

    def _is_listened_to(self) -> bool:
        """Whether a module has hooks; those by which transformers records states stay behind, and are idle here."""
        return any(
            getattr(hook, "__module__", None) != "transformers.utils.output_capturing"
            for hooks in self.hooks
            if hooks
            for hook in hooks.values()
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
        batch, num_slots = input_ids.shape
        num_heads, num_key_heads = self.num_heads, self.num_key_heads
        num_turned = num_heads + num_key_heads
        cos, sin = self._angles_of(position_ids, hidden_states)
        if attention_mask is None:
            attention_mask = mask_behind_cache(hidden_states)
        num_keys, _ = past_key_values.get_mask_sizes(num_slots, 0)
        if packed_rows is None and not goes_by_products((batch, num_heads, num_slots), num_keys):
            attention_mask = widen_mask(attention_mask, num_keys)  # once for all layers
        if batch == 1 and num_slots in SLOWER_THAN_FOUR and not self.is_quantized:
            hidden_states = F.pad(hidden_states, (0, 0, 0, 4 - num_slots))
        attended = hidden_states.new_zeros(*hidden_states.shape[:2], num_heads * self.head_width)
        attended_heads = attended[:, :num_slots].view(batch, num_slots, num_heads, -1)

        for index, layer in enumerate(self.layers):
            heads = _side_by_side(layer.attention_norm(hidden_states), layer.projections)
            heads = heads.view(batch, -1, num_turned + num_key_heads, self.head_width).transpose(1, 2)
            turned = rotate(heads[:, :num_turned, :num_slots], cos, sin)
            key, value = turned[:, num_heads:], heads[:, num_turned:, :num_slots]
            key, value = past_key_values.update(key, value, index)
            inputs = (turned[:, :num_heads], key, value, attention_mask)
            if packed_rows is None:
                update = attend_few_queries(*inputs, self.scaling).transpose(1, 2)
            else:
                settings = {"scaling": self.scaling, "packed_rows": packed_rows}
                update, _ = grouped_sdpa_attention_forward(self.backbone, *inputs, **settings)
            attended_heads.copy_(update)
            hidden_states = _add(hidden_states, layer.attention_gate, layer.output.forward(attended))
            hidden_states = _add(hidden_states, layer.mlp_gate, layer.mlp(layer.mlp_norm(hidden_states)))
        states = self.norm(hidden_states)[:, :num_slots]
        return cast(BackboneOutput, BaseModelOutputWithPast(last_hidden_state=states, past_key_values=past_key_values))

    def _angles_of(self, position_ids: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """The factors of `rotate` at some positions, (2, batch, 1, slots, width), looked up in a table that grows."""
        lowest, highest = (int(position) for position in position_ids.aminmax())
        if lowest < 0 or highest >= MAX_POSITIONS:
            return torch.stack(self._factors(states, position_ids))
        angles = self.angles
        if highest >= angles.shape[1]:
            positions = torch.arange(min(2 * highest + 2, MAX_POSITIONS))[None]
            self.angles = angles = torch.stack(self._factors(states, positions))[:, 0, 0]
        return angles[:, position_ids][:, :, None]

    def _factors(self, states: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        embedding = self.backbone.rotary_emb
        factors = embedding(states, position_ids=position_ids)
        return factors if isinstance(embedding, EsoRotaryEmbedding) else sign_of_rotation(*factors)


def _is_known(backbone: Any) -> bool:
    """Whether a backbone consists of the parts that it is made of, and of no others, down to their classes."""
    kind = type(backbone)
    is_eso, is_like_llama = kind.__name__ == "EsoModel", kind.__name__ in LIKE_LLAMA
    if not (is_eso or (is_like_llama and kind.__module__.startswith("transformers.models."))):
        return False
    family = kind.__name__.removesuffix("Model")
    norm = "EsoLayerNorm" if is_eso else f"{family}RMSNorm"
    of_layer = {
        "": f"{family}DecoderLayer",
        "input_layernorm": norm,
        "post_attention_layernorm": norm,
        "self_attn": f"{family}Attention",
        "mlp": f"{family}MLP",
    }
    of_mlp = ("up_proj", "down_proj") if is_eso else ("gate_proj", "up_proj", "down_proj")
    linear = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}" for name in of_mlp]
    of_layer |= dict.fromkeys(linear, DecodingLinear.__name__)
    if is_eso:
        of_layer["modulation"] = EsoModulation.__name__
    own = {kind.__module__, DecodingLinear.__module__, EsoModulation.__module__}

    def parts_of(layer: nn.Module) -> dict[str, str]:
        # Decoding is evaluation, where dropout does nothing.
        parts = {
            name: part for name, part in layer.named_modules() if name != "mlp.act_fn" and type(part) is not nn.Dropout
        }
        return {name: type(part).__name__ if type(part).__module__ in own else "?" for name, part in parts.items()}

    return (
        type(backbone.embed_tokens) is nn.Embedding
        and type(backbone.norm).__name__ == norm
        and len(backbone.layers) > 0
        and all(parts_of(layer) == of_layer for layer in backbone.layers)
    )


def _take_apart(backbone: Any) -> tuple[list[_Layer], Operation]:
    """The layers, and the final norm."""
    if not hasattr(backbone, "timestep_embedding"):
        layers = [
            _layer_of(
                layer,
                norms=(_rms_norm_of(layer.input_layernorm), _rms_norm_of(layer.post_attention_layernorm)),
                mlp=_gated_mlp_of(layer.mlp),
            )
            for layer in backbone.layers
        ]
        return layers, _rms_norm_of(backbone.norm)
    conditioning, layers = backbone.timestep_embedding(backbone.norm.weight), []
    for layer in backbone.layers:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = split_modulation(layer.modulation, conditioning, 6)
        attention_norm = _layer_norm_of(layer.input_layernorm, shift, scale)
        mlp_norm = _layer_norm_of(layer.post_attention_layernorm, mlp_shift, mlp_scale)
        layers.append(_layer_of(layer, (attention_norm, mlp_norm), _mlp_of(layer.mlp), (gate, mlp_gate)))
    return layers, _layer_norm_of(backbone.norm, *split_modulation(backbone.modulation, conditioning, 2))


def _layer_of(
    layer: Any,
    norms: tuple[Operation, Operation],
    mlp: Operation,
    gates: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
) -> _Layer:
    attention = layer.self_attn
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    return _Layer(norms[0], projections, attention.o_proj, gates[0], norms[1], mlp, gates[1])


def _layer_norm_of(norm: Any, shift: torch.Tensor, scale: torch.Tensor) -> Operation:
    weight, bias = norm.fold(shift, scale)
    # Of states in bfloat16, too, it computes in float32.
    return partial(F.layer_norm, normalized_shape=weight.shape, weight=weight, bias=bias, eps=norm.eps)


def _rms_norm_of(norm: Any) -> Operation:
    return partial(F.rms_norm, normalized_shape=norm.weight.shape, weight=norm.weight, eps=norm.variance_epsilon)


def _mlp_of(mlp: Any) -> Operation:
    up, down = mlp.up_proj, mlp.down_proj
    return lambda states: down.forward(up.forward(states, has_gelu=True))


def _gated_mlp_of(mlp: Any) -> Operation:
    projections, activation, down = (mlp.gate_proj, mlp.up_proj), mlp.act_fn, mlp.down_proj

    def run(states: torch.Tensor) -> torch.Tensor:
        gate, update = _side_by_side(states, projections).chunk(2, dim=-1)
        return down.forward(activation(gate) * update)

    return run


def _add(states: torch.Tensor, gate: torch.Tensor | None, update: torch.Tensor) -> torch.Tensor:
    return states + update if gate is None else torch.addcmul(states, gate, update)


def _side_by_side(states: torch.Tensor, layers: tuple[DecodingLinear, ...]) -> torch.Tensor:
    """What linear layers that are fed the same give, one beside the other."""
    packed = layers[0].packed
    if packed is not None and isinstance(packed[0], PackedWeight) and packed[0].layers == layers:
        return packed[0].joint_product(states)
    return torch.cat([layer.forward(states) for layer in layers], dim=-1)
