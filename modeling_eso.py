"""Esoteric Language Models (arXiv 2506.01928): backbone and masked-diffusion head.

The backbone is a causal transformer over (token, position) pairs laid out in *generation order*: slot s holds the
token of text position σ(s), carries that position's rotary angle, attends to slots <= s, and predicts its own token
(there is no next-token shift). Keys and values of decoded tokens therefore never change, and a KV cache is exact.
"""

import math
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import BlockMask, create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import is_flash_attention_requested
from transformers.utils.output_capturing import capture_outputs

from .batching import EsoBatchingMixin
from .configuration_eso import EsoConfig
from .evaluation_likelihood import EsoLikelihoodMixin
from .evaluation_trajectories import forward_in_place_of
from .generation import EsoGenerationMixin
from .generation_configuration import EsoGenerationConfig
from .generation_order import clean_first_order
from .hub import TAGS, EsoHubMixin
from .modeling_adaptation import EsoAdaptationMixin
from .modeling_attention import (
    MAX_DECODED_SLOTS,
    EsoRotaryEmbedding,
    eager_attention_forward,
    implementation_for,
    is_padding_mask,
    make_clean_first_mask,
    mask_behind_cache,
    read_text_order,
    rotate,
)
from .modeling_backbone import (
    learned_positions,
    make_backbone,
    name_of_embedding,
    require_known_arguments,
)
from .modeling_drafting import EsoDraftHead, EsoLMOutput, draft_loss
from .modeling_inference import EsoInferenceMixin
from .modeling_modulation import EsoLayerNorm, EsoModulation, EsoTimestepEmbedding, split_modulation
from .modeling_objective import hybrid_loss, require_loss_arguments
from .modeling_products import linear_gelu
from .validation import (
    require_attention_mask,
    require_exactly_one,
    require_ids_of_vocabulary,
    require_shape,
    require_slots,
)


class EsoAttention(nn.Module):
    """Multi-head attention with rotary positions, causal over slots."""

    def __init__(self, config: EsoConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = hidden_states.shape[:-1]
        head_shape = (*input_shape, -1, self.head_dim)
        query = rotate(self.q_proj(hidden_states).view(head_shape).transpose(1, 2), *position_embeddings)
        key = rotate(self.k_proj(hidden_states).view(head_shape).transpose(1, 2), *position_embeddings)
        value = self.v_proj(hidden_states).view(head_shape).transpose(1, 2)

        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        are_packed = kwargs.get("packed_rows") is not None
        implementation = implementation_for(self.config, attention_mask, key.shape[-2], are_packed)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        attention_output, attention_weights = attend(
            self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs
        )
        attention_output = attention_output.reshape(*input_shape, -1).contiguous()
        return self.o_proj(attention_output), attention_weights


class EsoMLP(nn.Module):
    """Linear, GELU (tanh approximation), Linear, with biases."""

    def __init__(self, config: EsoConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(linear_gelu(self.up_proj, hidden_states))


class EsoDecoderLayer(GradientCheckpointingLayer):
    """A DiT block: attention and MLP, each between a modulated norm and a gate."""

    def __init__(self, config: EsoConfig, layer_idx: int):
        super().__init__()
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.modulation = EsoModulation(config, num_vectors=6)
        self.input_layernorm = EsoLayerNorm(config)
        self.self_attn = EsoAttention(config, layer_idx)
        self.post_attention_layernorm = EsoLayerNorm(config)
        self.mlp = EsoMLP(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        conditioning: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        attn_shift, attn_scale, attn_gate, mlp_shift, mlp_scale, mlp_gate = split_modulation(
            self.modulation, conditioning, 6
        )

        update, _ = self.self_attn(
            self.input_layernorm(hidden_states, attn_shift, attn_scale),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        hidden_states = torch.addcmul(hidden_states, attn_gate, self.dropout(update))

        update = self.mlp(self.post_attention_layernorm(hidden_states, mlp_shift, mlp_scale))
        return torch.addcmul(hidden_states, mlp_gate, self.dropout(update))


class EsoPreTrainedModel(EsoHubMixin, PreTrainedModel):
    """Initialisation and capabilities shared by the backbone and the model with a head."""

    config: EsoConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    model_tags = TAGS
    _no_split_modules = ["EsoDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": EsoDecoderLayer, "attentions": EsoAttention}

    def __init__(self, config: EsoConfig, *args: Any, **kwargs: Any):
        # The fields may have been changed since the config was made, by from_pretrained(..., alpha_0=2) for example.
        if isinstance(config, EsoConfig):
            config.validate_architecture()
        super().__init__(config, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, EsoModulation):
            init.zeros_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            # Kaiming uniform with a = sqrt(5), which is torch's default for linears: U(-b, b), b = 1 / sqrt(fan in).
            bound = 1 / math.sqrt(module.weight.shape[1])
            init.uniform_(module.weight, -bound, bound)
            if (bias := getattr(module, "bias", None)) is not None:
                init.uniform_(bias, -bound, bound)
        else:
            super()._init_weights(module)


class EsoModel(EsoPreTrainedModel):
    """The backbone: from tokens in generation order to hidden states after the final, modulated norm."""

    # Nor are these quantised: a constant goes in, and kernels of 4-bit layers take that for an inference without
    # gradients. There is nothing to save either.
    _keep_in_fp32_modules = [".*timestep_embedding.in_proj", ".*timestep_embedding.out_proj"]

    def __init__(self, config: EsoConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.timestep_embedding = EsoTimestepEmbedding(config)
        self.rotary_emb = EsoRotaryEmbedding(config)  # type: ignore[arg-type]  # it takes any with rotary parameters
        self.layers = nn.ModuleList([EsoDecoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.modulation = EsoModulation(config, num_vectors=2)
        self.norm = EsoLayerNorm(config)
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    def forward(  # type: ignore[misc]  # transformers' kwargs name `position_ids` too
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | BlockMask | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """Runs the slots given, on top of the cached ones.

        Args:
            input_ids: (batch, slots), in generation order. Exactly one of it and `inputs_embeds`.
            attention_mask: (batch, cached + slots), 1 real and 0 padding; or a 4D mask, used as it is; None: no
                padding, or padding last.
            position_ids: (batch, slots), text position of each slot; None: consecutive, after the cached slots.
            past_key_values: Keys and values of earlier slots; extended in place.
            inputs_embeds: (batch, slots, hidden), in place of `input_ids`.
            use_cache: Whether to make a `DynamicCache` when no cache is given.

        Returns:
            `last_hidden_state` (batch, slots, hidden) after the final norm, `past_key_values`; `hidden_states` and
            `attentions` with `output_hidden_states=True` and `output_attentions=True` (eager attention).

        Raises:
            ValueError: for arguments that it has no use for, such as those of a loss.
        """
        require_exactly_one(input_ids, inputs_embeds)
        require_known_arguments(kwargs)
        if is_padding_mask(attention_mask):
            require_attention_mask(attention_mask)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None] + past_length

        num_slots = inputs_embeds.shape[1]
        is_cached = past_key_values is not None and past_key_values.get_seq_length() > 0
        is_decoding = is_cached and attention_mask is None and num_slots <= MAX_DECODED_SLOTS
        if is_decoding and not is_flash_attention_requested(self.config):
            attention_mask = mask_behind_cache(inputs_embeds)
        else:
            # Positions go to the rotary embedding alone: transformers would read their jumps as borders of packed
            # sequences, here and in the attention interface.
            attention_mask = create_causal_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,  # type: ignore[arg-type]  # it lets other masks through
                past_key_values=past_key_values,
            )
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids=position_ids)
        conditioning = self.timestep_embedding(self.norm.weight)

        hidden_states = inputs_embeds
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                conditioning,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        hidden_states = self.norm(hidden_states, *split_modulation(self.modulation, conditioning, 2))
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, past_key_values=past_key_values)


class EsoForMaskedDiffusion(
    EsoInferenceMixin,
    EsoPreTrainedModel,
    EsoBatchingMixin,
    EsoGenerationMixin,  # by whose name transformers knows that it generates
    EsoLikelihoodMixin,
    EsoAdaptationMixin,
):
    """An Eso-LM: the backbone with a head that predicts every slot's own token.

    It trains with the plain `Trainer` on the batches of `DataCollatorForHybridMaskedDiffusion`, and generates with
    `generate` (see `EsoGenerationMixin`).
    """

    generation_config_class = EsoGenerationConfig
    _auto_classes = ("AutoModel", "AutoModelForMaskedLM", "AutoModelForCausalLM")
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: EsoConfig):
        super().__init__(config)
        if config.backbone_config is None:
            self.model = EsoModel(config)
        else:
            self.model = make_backbone(config)
            config.backbone_config = self.model.config
            self._tied_weights_keys = {"lm_head.weight": f"model.{name_of_embedding(self.model)}"}
        # The states that a decoder gives are as wide as the embeddings that it takes, if not as those in between.
        state_size = self.get_input_embeddings().embedding_dim
        self.lm_head = nn.Linear(state_size, config.vocab_size)
        self.draft_head = None if config.draft_rank is None else EsoDraftHead(config, state_size)
        self.post_init()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "forward":
            # TRL's trainers put one of their own in place of the model's, which scores the next token.
            value = forward_in_place_of(self, value)
        super().__setattr__(name, value)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self.lm_head:
            # A fresh model predicts the uniform distribution, unless its head is the embedding.
            init.zeros_(module.bias)
            if not self.config.tie_word_embeddings:
                init.zeros_(module.weight)
        elif self.draft_head is not None and module in self.draft_head.children():
            self.draft_head.init_weights(module)

    @can_return_tuple
    def forward(  # type: ignore[misc]  # transformers' kwargs name `position_ids` too
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | BlockMask | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        loss_weights: torch.Tensor | None = None,
        sequential_rows: torch.Tensor | None = None,
        draft_starts: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> EsoLMOutput:
        """Predicts the token of every slot, or, with labels, the loss of a training batch.

        The layout is *generation order* when `position_ids` is given. Without it, and without a cache, it is *text
        order*: the model itself puts clean tokens first, masks after them, each left to right, and padding last;
        logits, hidden states and attentions come back in text order.

        Args:
            input_ids: (batch, slots), with the mask id at the slots to predict.
            attention_mask: (batch, slots) or (batch, cached + slots), 1 real and 0 padding, in the layout of
                `input_ids`; or a 4D mask over the slots as given, which passes through.
            position_ids: (batch, slots), text position of each slot.
            past_key_values: Any croppable transformers cache; extended in place. The caller may `crop(-n)` the masks
                away, and keeps the keys and values of the clean tokens.
            inputs_embeds: (batch, slots, hidden), in place of `input_ids`. In text order they all count as clean.
            labels: (batch, slots), the clean token of each slot that counts; -100 at prompt and padding.
            loss_weights: (batch, slots), weight of each slot's cross entropy; None: 1 at the masked slots, 0
                elsewhere.
            sequential_rows: (batch,) bool, the rows that use the sequential phase's two streams: content in
                generation order (from `labels`, or `input_ids` where the label is -100), and one mask for each
                weighted slot s that sees the content slots < s and itself. None: no row.
            draft_starts: (batch, slots), the first slot of the draft of each slot, by which a draft head is trained:
                the divergence of what it draws from what the model says (see `draft_loss`) joins the loss; or is all
                of it, without `loss_weights`. It needs `position_ids`.
            use_cache: Whether to make a `DynamicCache` when none is given (slots then stay as given).
            logits_to_keep: Logits of the last so many slots, 0 for all; or a tensor of slots, (slots kept,) for all
                rows or (batch, slots kept).

        Returns:
            `logits` (batch, slots kept, vocab), -inf at the mask id, `past_key_values`, and what was asked for of
            `hidden_states` and `attentions`; with a draft head, `draft_states` (batch, slots kept, hidden). With
            labels, `loss` alone, in nats, the sum of weight x cross entropy over `num_items_in_batch` if given, else
            over the number of labels that count; logits are then computed at the weighted slots only and not returned.

        Raises:
            ValueError: for contradictory arguments.
        """
        batch, slots = require_slots(input_ids, inputs_embeds)
        if input_ids is not None and not self.is_ready_to_decode:
            require_ids_of_vocabulary("input_ids", input_ids, self.config.vocab_size)
        if position_ids is not None:
            if position_ids.shape[-1] != slots:
                raise ValueError(
                    f"`position_ids` must give a text position for each of the {slots} slots, got shape "
                    f"{tuple(position_ids.shape)}."
                )
            position_ids = position_ids.expand(batch, slots)
        require_loss_arguments(
            labels, loss_weights, sequential_rows, draft_starts, batch, slots, inputs_embeds is not None
        )
        if draft_starts is not None and (input_ids is None or position_ids is None):
            raise ValueError("`draft_starts` need `input_ids` and `position_ids`, in generation order.")
        if is_padding_mask(attention_mask):
            if past_key_values is None:
                require_shape("attention_mask", attention_mask, (batch, slots))
            require_attention_mask(attention_mask)
        if labels is not None and (past_key_values is not None or use_cache):
            raise ValueError(
                "`labels` ask for a training loss, which takes no cache: drop `past_key_values`. (PEFT's prefix "
                "tuning passes one; LoRA and its kin work.)"
            )

        in_text_order = position_ids is None and past_key_values is None and not use_cache
        if in_text_order and (attention_mask is None or is_padding_mask(attention_mask)):
            group, position_ids = read_text_order(input_ids, inputs_embeds, attention_mask, self.config.mask_token_id)
            if labels is None:
                attention_mask = make_clean_first_mask(self.model.config, group, self.model.dtype)
            else:
                order = clean_first_order(group)
                input_ids, inputs_embeds, position_ids, labels, loss_weights = (
                    None if tensor is None else _take_slots(tensor, order)
                    for tensor in (input_ids, inputs_embeds, position_ids, labels, loss_weights)
                )
                attention_mask = None  # padding is last: no slot that counts can see it

        if labels is not None:
            loss: torch.Tensor | None = None
            if draft_starts is None or loss_weights is not None:
                batch_of_loss = (input_ids, inputs_embeds, position_ids, attention_mask, labels)
                loss = hybrid_loss(self, *batch_of_loss, loss_weights, sequential_rows, **kwargs)
            if draft_starts is not None:
                loss_of_drafts = draft_loss(self, input_ids, position_ids, labels, draft_starts, **kwargs)
                loss = loss_of_drafts if loss is None else loss + loss_of_drafts
            return EsoLMOutput(loss=loss)
        outputs = self.run_backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        states: torch.Tensor = outputs.last_hidden_state
        if isinstance(logits_to_keep, int):
            states = states[:, -logits_to_keep:] if logits_to_keep else states
        elif logits_to_keep.dim() == 2:
            states = _take_slots(states, logits_to_keep)
        else:
            states = states[:, logits_to_keep]
        return EsoLMOutput(
            logits=self.compute_logits(states),
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            draft_states=None if self.draft_head is None else states,
        )

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """From states (..., hidden) to logits (..., vocab), -inf at the mask."""
        logits = self.lm_head(hidden_states)
        if logits.requires_grad:
            # What is written into may be a view that autograd has to keep: tensor parallelism gathers such ones.
            vocabulary = torch.arange(logits.shape[-1], device=logits.device)
            return logits.masked_fill(vocabulary == self.config.mask_token_id, -torch.inf)
        logits[..., self.config.mask_token_id] = -torch.inf
        return logits

    @property
    def max_text_length(self) -> int | None:
        """The number of text positions that the backbone has embeddings for; None: any number will do."""
        return None if self.config.backbone_config is None else learned_positions(self.model)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As on every model of transformers; the mask keeps its id.

        Raises:
            ValueError: for a size that would cut the mask off.
        """
        if new_num_tokens is not None and new_num_tokens <= self.config.mask_token_id:
            raise ValueError(
                f"`new_num_tokens={new_num_tokens}` would cut off the mask, whose id is {self.config.mask_token_id}: "
                f"it must be larger than that."
            )
        embeddings = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        self.model.config.vocab_size = self.config.vocab_size
        if self.draft_head is not None:
            self.draft_head.resize(self.config.vocab_size)
        return embeddings


def _take_slots(tensor: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Rearranges dimension 1 of `tensor` (batch, slots, ...) row by row."""
    return tensor[torch.arange(len(slots), device=slots.device)[:, None], slots]


EsoModel.register_for_auto_class("AutoModel")
EsoForMaskedDiffusion.register_for_auto_class("AutoModel")

__all__ = ["EsoForMaskedDiffusion", "EsoModel", "EsoPreTrainedModel"]
