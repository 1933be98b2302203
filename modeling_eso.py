"""Esoteric Language Models (arXiv 2506.01928): backbone and masked-diffusion head.

The backbone is a causal transformer over (token, position) pairs laid out in *generation order*: slot s holds the
token of text position σ(s), carries that position's rotary angle, attends to slots <= s, and predicts its own token
(there is no next-token shift). Keys and values of decoded tokens therefore never change, and a KV cache is exact.
"""

import copy
import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from inspect import signature
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from transformers import AutoModelForCausalLM
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import BlockMask, create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import is_flash_attention_requested
from transformers.utils.output_capturing import capture_outputs

from .attention_mask import make_attention_mask
from .backbone import (
    GROUPED_SDPA,
    NEEDED_ARGUMENTS,
    grouped_attention,
    learned_positions,
    make_backbone,
    prepare_backbone,
    require_full_causal_attention,
    run_backbone,
    verify_backbone,
)
from .configuration_eso import EsoConfig
from .generation import EsoGenerationConfig, EsoGenerationMixin
from .generation_order import order_of_slots, text_positions
from .likelihood import EsoLikelihoodMixin
from .linear import MAX_DECODED_SLOTS, fast_products_of_few_rows
from .model_card import TAGS, write_model_card
from .packed_rows import attend_packed
from .validation import is_integer, require_attention_mask, require_ids_of_vocabulary, require_shape

MAX_QUERIES_TRANSPOSED = 16
"""Queries up to which a decoding step on the CPU computes its attention scores as K q^T rather than q K^T."""

BACKBONE_KEYWORDS = frozenset(TransformersKwargs.__annotations__) | {"packed_rows", "token_type_ids"}
"""What `EsoModel.forward` takes beside its named arguments: transformers' own, rows of a decoding step that stand one
behind the other, and what tokenizers of BERT's kind add to every text."""


class EsoTimestepEmbedding(nn.Module):
    """The conditioning vector c = SiLU(MLP(sinusoid(sigma))), (cond_dim,).

    sigma is always 0 (the model does not depend on time), where the sinusoid is 1 in its cosine half and 0 in its
    sine half: c is a constant of the weights.
    """

    sinusoid_width = 256

    def __init__(self, config: EsoConfig):
        super().__init__()
        self.in_proj = nn.Linear(self.sinusoid_width, config.cond_dim)
        self.out_proj = nn.Linear(config.cond_dim, config.cond_dim)

    def forward(self, like: torch.Tensor) -> torch.Tensor:
        """The vector, of the type of `like`."""
        weight = self.in_proj.weight
        sinusoid = torch.zeros(1, self.sinusoid_width, dtype=weight.dtype, device=weight.device)
        sinusoid[:, : self.sinusoid_width // 2] = 1
        return F.silu(self.out_proj(F.silu(self.in_proj(sinusoid))))[0].to(like.dtype)


class EsoRotaryEmbedding(LlamaRotaryEmbedding):
    """Rotary angles of text positions, whose frequencies stay in float32 when the model is cast.

    In bfloat16 a frequency is off by up to 0.4 %, which at position 10000 is the wrong angle altogether.
    """

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        exact = {name: buffer for name, buffer in self.named_buffers() if not buffer.is_meta}
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            setattr(self, name, buffer.to(getattr(self, name).device))
        return self


class EsoModulation(nn.Linear):
    """adaLN: maps the conditioning vector to `num_vectors` vectors of the hidden size (shifts, scales, gates).

    A linear layer like any other, but for its initialisation at zero. `EsoForMaskedDiffusion.ready_to_decode` keeps
    its output, a constant of the weights, while they do not change.
    """

    def __init__(self, config: EsoConfig, num_vectors: int):
        super().__init__(config.cond_dim, num_vectors * config.hidden_size)
        self.folded: torch.Tensor | None = None

    def forward(self, conditioning: torch.Tensor) -> torch.Tensor:
        return super().forward(conditioning) if self.folded is None else self.folded


class EsoLayerNorm(nn.Module):
    """LayerNorm with a weight and no bias, modulated: LN(x) * (1 + scale) + shift, in float32.

    Scale and shift are constants of the weights, so they join the norm's own weight and bias in one kernel.
    """

    def __init__(self, config: EsoConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.eps = config.layer_norm_eps

    def forward(self, hidden_states: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        weight = self.weight.float() * (1 + scale.float())
        normed = F.layer_norm(hidden_states.float(), weight.shape, weight, shift.float(), self.eps)
        return normed.to(hidden_states.dtype)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention spelled out; the mask is additive or boolean (True = visible).

    A mask narrower than the keys speaks of the last of them, and all before are visible: the keys of a decoding step
    behind the cached ones, for which no mask of the length of the cache need be made.
    """
    query = query * scaling
    if query.shape[-2] <= MAX_QUERIES_TRANSPOSED and query.device.type == "cpu" and not torch.is_grad_enabled():
        # Reads the keys up to half again as fast, like the products of `FewRowLinear`; the layout matters here too.
        scores = torch.matmul(key, query.contiguous().transpose(2, 3)).transpose(2, 3).contiguous()
    else:
        scores = torch.matmul(query.contiguous(), key.transpose(2, 3))
    if attention_mask is not None:
        masked_scores = scores[..., scores.shape[-1] - attention_mask.shape[-1] :]
        if attention_mask.dtype == torch.bool:
            masked_scores.masked_fill_(~attention_mask, torch.finfo(scores.dtype).min)
        else:
            masked_scores.add_(attention_mask)
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


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
        query = self.q_proj(hidden_states).view(head_shape).transpose(1, 2)
        key = self.k_proj(hidden_states).view(head_shape).transpose(1, 2)
        value = self.v_proj(hidden_states).view(head_shape).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)

        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        if kwargs.get("packed_rows") is not None:
            attention_interface: Callable = partial(attend_packed, ALL_ATTENTION_FUNCTIONS["sdpa"])
        else:
            implementation = _implementation_for(self.config, attention_mask, num_keys=key.shape[-2])
            attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        attention_output, attention_weights = attention_interface(
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
        return self.down_proj(F.gelu(self.up_proj(hidden_states), approximate="tanh"))


class EsoDecoderLayer(GradientCheckpointingLayer):
    """A DiT block: attention and MLP, each between a modulated norm and a gate."""

    def __init__(self, config: EsoConfig, layer_idx: int):
        super().__init__()
        self.dropout = config.hidden_dropout
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
        attn_shift, attn_scale, attn_gate, mlp_shift, mlp_scale, mlp_gate = self.modulation(conditioning).chunk(6)

        update, _ = self.self_attn(
            self.input_layernorm(hidden_states, attn_shift, attn_scale),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        hidden_states = hidden_states + attn_gate * F.dropout(update, self.dropout, self.training)

        update = self.mlp(self.post_attention_layernorm(hidden_states, mlp_shift, mlp_scale))
        return hidden_states + mlp_gate * F.dropout(update, self.dropout, self.training)


class EsoPreTrainedModel(PreTrainedModel):
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

    # The Auto classes that a saved folder loads through with `trust_remote_code=True`.
    _auto_classes = ("AutoModel",)

    def __init__(self, config: EsoConfig, *args, **kwargs):
        # The fields may have been changed since the config was made, by from_pretrained(..., alpha_0=2) for example.
        if isinstance(config, EsoConfig):
            config.validate_architecture()
        super().__init__(config, *args, **kwargs)

    def save_pretrained(self, save_directory, **kwargs):
        """Saves weights, configurations and the code, so that the folder loads with `trust_remote_code=True`."""
        if isinstance(getattr(self, "generation_config", None), EsoGenerationConfig):
            self.generation_config.check_loadable()
        # transformers records the one Auto class that a model class is registered for; users come through several.
        self.config.auto_map = {"AutoConfig": _module_and_name(type(self.config))} | {
            auto_class: _module_and_name(type(self)) for auto_class in self._auto_classes
        }
        super().save_pretrained(save_directory, **kwargs)
        write_model_card(Path(save_directory), self.config, title=Path(save_directory).name)

    def _upload_modified_files(self, working_dir, repo_id, *args, **kwargs):
        # For a repository without a card transformers has just written an empty one.
        write_model_card(Path(working_dir), self.config, title=repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, EsoModulation):
            init.zeros_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            # Kaiming uniform with a = sqrt(5), which is torch's default for linears: U(-b, b), b = 1 / sqrt(fan in).
            bound = 1 / math.sqrt(module.weight.shape[1])
            init.uniform_(module.weight, -bound, bound)
            if getattr(module, "bias", None) is not None:
                init.uniform_(module.bias, -bound, bound)
        else:
            super()._init_weights(module)


class EsoModel(EsoPreTrainedModel):
    """The backbone: from tokens in generation order to hidden states after the final, modulated norm."""

    # Nor are these quantised: a constant goes in, and kernels of 4-bit layers take that for an inference without
    # gradients. There is nothing to save either.
    _keep_in_fp32_modules = ["timestep_embedding.in_proj", "timestep_embedding.out_proj"]

    def __init__(self, config: EsoConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.timestep_embedding = EsoTimestepEmbedding(config)
        self.rotary_emb = EsoRotaryEmbedding(config=config)
        self.layers = nn.ModuleList([EsoDecoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.modulation = EsoModulation(config, num_vectors=2)
        self.norm = EsoLayerNorm(config)
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
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
        _require_exactly_one(input_ids, inputs_embeds)
        _require_known(kwargs)
        if _is_padding_mask(attention_mask):
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
            is_visible = torch.ones(num_slots, num_slots, dtype=torch.bool, device=inputs_embeds.device).tril()
            attention_mask = is_visible[None, None]
        else:
            # Positions go to the rotary embedding alone: transformers would read their jumps as borders of packed
            # sequences, here and in the attention interface.
            attention_mask = create_causal_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
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
        hidden_states = self.norm(hidden_states, *self.modulation(conditioning).chunk(2))
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, past_key_values=past_key_values)


class EsoForMaskedDiffusion(EsoPreTrainedModel, EsoGenerationMixin, EsoLikelihoodMixin):
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
            self.model = make_backbone(config.backbone_config)
            config.backbone_config = self.model.config
            self._tied_weights_keys = {"lm_head.weight": f"model.{_name_of_embedding(self.model)}"}
        # The states that a decoder gives are as wide as the embeddings that it takes, if not as those in between.
        self.lm_head = nn.Linear(self.get_input_embeddings().embedding_dim, config.vocab_size)
        self.is_ready_to_decode = False
        self.post_init()

    def __setattr__(self, name: str, value) -> None:
        # TRL's trainers put a forward of their own in place of the model's, which calls the backbone itself.
        if name == "forward" and "fused_lm_head" in signature(value, follow_wrapped=False).parameters:
            raise ValueError(
                "TRL's trainers score the next token, by a forward of their own, and an Eso-LM predicts the token at "
                "each slot: train with transformers' `Trainer` and `DataCollatorForHybridMaskedDiffusion`."
            )
        super().__setattr__(name, value)

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if module is self.lm_head:
            # A fresh model predicts the uniform distribution, unless its head is the embedding.
            init.zeros_(module.bias)
            if not self.config.tie_word_embeddings:
                init.zeros_(module.weight)

    @classmethod
    def from_causal_lm(
        cls,
        model: str | os.PathLike | PreTrainedModel,
        mask_token_id: int | None = None,
        alpha_0: float = 1.0,
        **kwargs,
    ) -> "EsoForMaskedDiffusion":
        """Makes an Eso-LM out of a causal language model, with its weights, body and head.

        A causal model predicts the next token, an Eso-LM the one at the slot, so it has to be trained before it is
        of use; `examples/adapt_causal_lm.py` does it.

        Args:
            model: Name or folder for `AutoModelForCausalLM.from_pretrained`; or a model, which is copied.
            mask_token_id: An id that no text holds; None: the first one behind the vocabulary, which grows to hold
                it. Its embedding begins as the mean of all others; so do those of other new ids, if there are some
                before it, which are tokens like any other.
            alpha_0: That of the config.
            kwargs: For `from_pretrained` (`dtype`, `attn_implementation`, `quantization_config`, `device_map`, ...).

        Returns:
            The model, in evaluation mode, with the special tokens of the causal one.

        Raises:
            ValueError: when the model cannot be the backbone of an Eso-LM; the message says why.
        """
        if not isinstance(model, str | os.PathLike | PreTrainedModel) or isinstance(model, EsoPreTrainedModel):
            raise ValueError(
                f"`model` must be a causal language model, or the name or folder of one, got {type(model).__name__}."
            )
        if mask_token_id is not None and not (is_integer(mask_token_id) and mask_token_id >= 0):
            raise ValueError(f"`mask_token_id` must be an id (an integer >= 0) or None, got {mask_token_id!r}.")
        if not isinstance(model, PreTrainedModel):
            model = AutoModelForCausalLM.from_pretrained(model, **kwargs)
        elif kwargs:
            raise ValueError(f"{sorted(kwargs)} are for loading a model by its name, and `model` is loaded already.")
        else:
            model = copy.deepcopy(model)
        model.eval()
        backbone, head = model.base_model, model.get_output_embeddings()
        if backbone is model or not isinstance(head, nn.Linear):
            raise ValueError(f"`model` must be a causal model with a linear head, got {type(model).__name__}.")
        require_full_causal_attention(backbone.config)
        prepare_backbone(backbone)
        verify_backbone(backbone)
        _require_plain_head(model)

        vocab_size = head.weight.shape[0]
        if mask_token_id is None:
            mask_token_id = vocab_size
        if mask_token_id >= vocab_size:
            model.resize_token_embeddings(mask_token_id + 1, mean_resizing=False)
        special = ("pad_token_id", "bos_token_id", "eos_token_id")
        config = EsoConfig(
            backbone_config=backbone.config,
            mask_token_id=mask_token_id,
            alpha_0=alpha_0,
            tie_word_embeddings=model.config.tie_word_embeddings,
            dtype=model.dtype,
            **{name: getattr(model.config, name, None) for name in special},
        )
        with torch.device("meta"):
            eso = cls(config)
        head = model.get_output_embeddings()
        eso.model, eso.lm_head.weight = backbone, head.weight
        eso.config.backbone_config = backbone.config
        bias = torch.zeros_like(head.weight[:, 0]) if head.bias is None else head.bias
        eso.lm_head.bias = nn.Parameter(bias.detach())
        eso.tie_weights()
        with torch.no_grad():
            for weight in (eso.get_input_embeddings().weight, eso.lm_head.weight):
                mean = weight[:vocab_size].mean(dim=0, dtype=torch.float32)
                weight[vocab_size:] = weight[mask_token_id] = mean.to(weight.dtype)
        for name in ("hf_quantizer", "hf_device_map", "quantization_method"):
            if hasattr(model, name):
                setattr(eso, name, getattr(model, name))
        if hasattr(model.config, "quantization_config"):
            eso.config.quantization_config = model.config.quantization_config
        return eso.eval()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        loss_weights: torch.FloatTensor | None = None,
        sequential_rows: torch.BoolTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
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
            use_cache: Whether to make a `DynamicCache` when none is given (slots then stay as given).
            logits_to_keep: Logits of the last so many slots, 0 for all; or a tensor of slots, (slots kept,) for all
                rows or (batch, slots kept).

        Returns:
            Without labels: `logits` (batch, slots kept, vocab), -inf at the mask id, `past_key_values`, and what was
            asked for of `hidden_states` and `attentions`. With labels: `loss` alone, in nats: the sum of weight x
            cross entropy over `num_items_in_batch` if given, else over the number of labels that count. Logits are
            then computed at the weighted slots only and not returned.

        Raises:
            ValueError: for contradictory arguments.
        """
        _require_exactly_one(input_ids, inputs_embeds)
        if input_ids is not None and input_ids.dim() != 2:
            raise ValueError(f"`input_ids` must have the shape (batch, slots), got {tuple(input_ids.shape)}.")
        tokens = input_ids if input_ids is not None else inputs_embeds
        if tokens.numel() == 0:
            raise ValueError(f"The input must hold at least one slot, got shape {tuple(tokens.shape)}.")
        if input_ids is not None and not self.is_ready_to_decode:
            require_ids_of_vocabulary("input_ids", input_ids, self.config.vocab_size)
        if position_ids is not None:
            if position_ids.shape[-1] != tokens.shape[1]:
                raise ValueError(
                    f"`position_ids` must give a text position for each of the {tokens.shape[1]} slots, "
                    f"got shape {tuple(position_ids.shape)}."
                )
            position_ids = position_ids.expand(tokens.shape[:2])
        if labels is None and (loss_weights is not None or sequential_rows is not None):
            raise ValueError(
                "`loss_weights` and `sequential_rows` describe a loss and need `labels` (which Trainer takes away "
                "when `label_smoothing_factor` is not 0)."
            )
        batch, slots = tokens.shape[:2]
        if inputs_embeds is not None and loss_weights is not None and loss_weights.shape[1] < slots:
            raise ValueError(
                f"`loss_weights` are those of {loss_weights.shape[1]} slots, and `inputs_embeds` has {slots}: PEFT's "
                f"prompt tuning puts slots in front and drops `position_ids`, the generation order. LoRA and its kin "
                f"work."
            )
        require_shape("labels", labels, (batch, slots))
        require_shape("loss_weights", loss_weights, (batch, slots))
        require_shape("sequential_rows", sequential_rows, (batch,))
        if _is_padding_mask(attention_mask):
            if past_key_values is None:
                require_shape("attention_mask", attention_mask, (batch, slots))
            require_attention_mask(attention_mask)

        in_text_order = position_ids is None and past_key_values is None and not use_cache
        in_text_order = in_text_order and (attention_mask is None or _is_padding_mask(attention_mask))
        if labels is not None:
            if past_key_values is not None or use_cache:
                raise ValueError(
                    "`labels` ask for a training loss, which takes no cache: drop `past_key_values`. (PEFT's prefix "
                    "tuning passes one; LoRA and its kin work.)"
                )
            if in_text_order:
                order, position_ids = self._clean_first_order(input_ids, inputs_embeds, attention_mask)
                input_ids, inputs_embeds, labels, loss_weights = (
                    None if tensor is None else _take_slots(tensor, order)
                    for tensor in (input_ids, inputs_embeds, labels, loss_weights)
                )
                attention_mask = None  # padding is last: no slot that counts can see it
            num_items_in_batch = kwargs.pop("num_items_in_batch", None)
            loss = self._hybrid_loss(
                input_ids,
                inputs_embeds,
                position_ids,
                attention_mask,
                labels,
                loss_weights,
                sequential_rows,
                num_items_in_batch,
                **kwargs,
            )
            return CausalLMOutputWithPast(loss=loss)

        if in_text_order:
            position_ids, attention_mask = self._clean_first_mask(input_ids, inputs_embeds, attention_mask)
        outputs = self._run_backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        last_hidden_state = outputs.last_hidden_state
        if isinstance(logits_to_keep, int):
            last_hidden_state = last_hidden_state[:, -logits_to_keep:] if logits_to_keep else last_hidden_state
        elif logits_to_keep.dim() == 2:
            last_hidden_state = _take_slots(last_hidden_state, logits_to_keep)
        else:
            last_hidden_state = last_hidden_state[:, logits_to_keep]
        return CausalLMOutputWithPast(
            logits=self._logits(last_hidden_state),
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @property
    def max_text_length(self) -> int | None:
        """The number of text positions that the backbone has embeddings for; None: any number will do."""
        return None if self.config.backbone_config is None else learned_positions(self.model)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs) -> nn.Embedding:
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
        return embeddings

    def _run_backbone(self, **arguments) -> BaseModelOutputWithPast:
        """The backbone's forward, with the arguments of `EsoModel`'s."""
        if self.config.backbone_config is None:
            return self.model(**arguments)
        _require_known({name: value for name, value in arguments.items() if name not in NEEDED_ARGUMENTS})
        return run_backbone(self.model, **arguments)

    @contextmanager
    def ready_to_decode(self) -> Iterator[None]:
        """Makes forwards of a few slots fast, as `generate` does; the weights must not change inside.

        Every shift, scale and gate is computed once, and products of few rows run at the speed of memory on the CPU.
        """
        if self.is_ready_to_decode:
            yield
            return
        modulations = [module for module in self.modules() if isinstance(module, EsoModulation)]
        for modulation in modulations:
            modulation.folded = modulation(self.model.timestep_embedding(self.model.norm.weight))
        self.is_ready_to_decode = True
        try:
            with fast_products_of_few_rows(self), self._fast_attention():
                yield
        finally:
            self.is_ready_to_decode = False
            for modulation in modulations:
                modulation.folded = None

    def _fast_attention(self) -> AbstractContextManager:
        return nullcontext() if self.config.backbone_config is None else grouped_attention(self.model)

    @property
    def takes_packed_rows(self) -> bool:
        """Whether the attention can tell rows apart that stand one behind the other, while `ready_to_decode`."""
        implementation = self.model.config._attn_implementation
        if self.config.backbone_config is None:
            return implementation != "flex_attention"
        return implementation == GROUPED_SDPA

    def _logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        logits = self.lm_head(hidden_states)
        if logits.requires_grad:
            # What is written into may be a view that autograd has to keep: tensor parallelism gathers such ones.
            vocabulary = torch.arange(logits.shape[-1], device=logits.device)
            return logits.masked_fill(vocabulary == self.config.mask_token_id, -torch.inf)
        logits[..., self.config.mask_token_id] = -torch.inf
        return logits

    def _clean_masked_padding(
        self,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.FloatTensor | None,
        attention_mask: torch.Tensor | None,
    ) -> tuple[torch.LongTensor, torch.BoolTensor]:
        """Of each slot in text order, 0 clean, 1 masked, 2 padding; and whether it is real: (batch, slots) each."""
        tokens = input_ids if input_ids is not None else inputs_embeds
        group = torch.zeros(tokens.shape[:2], dtype=torch.long, device=tokens.device)
        if input_ids is not None:
            group = group.masked_fill(input_ids == self.config.mask_token_id, 1)
        is_real = torch.ones_like(group, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        return group.masked_fill(~is_real, 2), is_real

    def _clean_first_order(self, *tokens_and_mask) -> tuple[torch.LongTensor, torch.LongTensor]:
        """The order clean, masked, padding, each left to right, and the text positions in it: (batch, slots) each."""
        group, is_real = self._clean_masked_padding(*tokens_and_mask)
        rank = torch.arange(group.shape[1], dtype=torch.float64, device=group.device).expand(group.shape)
        order = order_of_slots(group, rank)
        return order, text_positions(is_real).gather(1, order)

    def _clean_first_mask(self, *tokens_and_mask) -> tuple[torch.LongTensor, torch.Tensor | BlockMask]:
        """Text positions, (batch, slots), and a mask that has slots in text order see what they do in that order."""
        group, is_real = self._clean_masked_padding(*tokens_and_mask)

        def sees(batch_index, head_index, query_index, key_index):
            of_query, of_key = group[batch_index, query_index], group[batch_index, key_index]
            return (of_key < of_query) | ((of_key == of_query) & (key_index <= query_index))

        mask = make_attention_mask(
            self.model.config, sees, *group.shape, group.shape[1], self.model.dtype, group.device
        )
        return text_positions(is_real), mask

    # Which slots count is data: to torch.compile this is a frame to leave alone, around a backbone to compile.
    @torch.compiler.disable(recursive=False)
    def _hybrid_loss(
        self,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.FloatTensor | None,
        position_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None,
        labels: torch.LongTensor,
        loss_weights: torch.FloatTensor | None,
        sequential_rows: torch.BoolTensor | None,
        num_items_in_batch: torch.Tensor | int | None,
        **kwargs,
    ) -> torch.Tensor:
        """Weighted cross entropy of a batch whose rows are in the diffusion or in the sequential phase."""
        is_label = labels != -100
        if loss_weights is None:
            if input_ids is None:
                raise ValueError("`loss_weights` must be given with `inputs_embeds`, which do not show the masks.")
            loss_weights = (input_ids == self.config.mask_token_id).float()
            if not loss_weights[is_label].any():
                raise ValueError(
                    "None of the slots with `labels` holds a mask, so that there is nothing to predict: take "
                    "`DataCollatorForHybridMaskedDiffusion`, which masks the tokens and weighs the loss."
                )
        loss_weights = loss_weights.masked_fill(~is_label, 0)
        require_ids_of_vocabulary("labels", labels[is_label], self.config.vocab_size)
        if (labels[is_label] == self.config.mask_token_id).any():
            raise ValueError(
                f"`labels` must be clean tokens, or -100, and hold the mask id {self.config.mask_token_id}, which has "
                f"no probability."
            )
        states, rows, slots = self._states_at(
            loss_weights != 0,
            input_ids,
            inputs_embeds,
            position_ids,
            attention_mask,
            labels,
            sequential_rows,
            **kwargs,
        )
        logits = self._logits(states).float()  # (weighted slots, vocab)
        cross_entropy = F.cross_entropy(logits, labels[rows, slots], reduction="none")
        total = (cross_entropy * loss_weights[rows, slots]).sum()
        if num_items_in_batch is None:
            num_items_in_batch = is_label.sum().clamp(min=1)
        elif isinstance(num_items_in_batch, torch.Tensor):
            num_items_in_batch = num_items_in_batch.to(total.device)
        return total / num_items_in_batch

    @torch.compiler.disable(recursive=False)
    def _states_at(
        self,
        is_wanted: torch.BoolTensor,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.FloatTensor | None,
        position_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None,
        labels: torch.LongTensor,
        sequential_rows: torch.BoolTensor | None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.LongTensor, torch.LongTensor]:
        """Hidden states that predict the slots `is_wanted`, (batch, slots), each row in its own phase.

        Returns:
            The states, (wanted, hidden), and their rows and slots, (wanted,) each.
        """
        if sequential_rows is None:
            sequential_rows = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
        # The phases run one after the other, each at its own width: the second stream costs only its own rows.
        diffusion = (~sequential_rows).nonzero()[:, 0]
        sequential = sequential_rows.nonzero()[:, 0]
        states, idle = [], 0
        if _is_sharded(self):
            # Every call of the backbone gathers weights from all processes: they have to make the same calls.
            has_phase = torch.tensor([len(diffusion), len(sequential)], device=labels.device).clamp(max=1)
            is_anywhere = has_phase.clone()
            torch.distributed.all_reduce(is_anywhere, op=torch.distributed.ReduceOp.MAX)
            for _ in range(int((is_anywhere - has_phase).sum())):
                mask = torch.full((1, 1), self.config.mask_token_id, device=labels.device)
                idle = idle + 0 * self._run_backbone(input_ids=mask).last_hidden_state.sum()
        if len(diffusion) > 0:
            outputs = self._run_backbone(
                input_ids=_take_rows(input_ids, diffusion),
                inputs_embeds=_take_rows(inputs_embeds, diffusion),
                position_ids=_take_rows(position_ids, diffusion),
                attention_mask=_take_rows(attention_mask, diffusion),
                **kwargs,
            )
            states.append(outputs.last_hidden_state[is_wanted[diffusion]])
        if len(sequential) > 0:
            if input_ids is None or not (attention_mask is None or _is_padding_mask(attention_mask)):
                raise ValueError("`sequential_rows` need `input_ids`, and at most a 2D `attention_mask`.")
            states.append(
                self._query_states(
                    input_ids[sequential],
                    labels[sequential],
                    _take_rows(position_ids, sequential),
                    _take_rows(attention_mask, sequential),
                    is_wanted[sequential],
                    **kwargs,
                )
            )
        order = torch.cat([diffusion, sequential])
        rows, slots = is_wanted[order].nonzero().unbind(dim=-1)
        return torch.cat(states) + idle, order[rows], slots

    @torch.compiler.disable(recursive=False)
    def _query_states(
        self,
        input_ids: torch.LongTensor,
        labels: torch.LongTensor,
        position_ids: torch.LongTensor | None,
        attention_mask: torch.Tensor | None,
        is_queried: torch.BoolTensor,
        **kwargs,
    ) -> torch.Tensor:
        """Hidden states of the queries of the sequential phase's two streams.

        Content: the clean tokens in generation order, causal among itself. Query: one mask for each queried slot s,
        which attends to the content slots < s and to itself. Both run in one pass: `horizon` is the number of
        content slots that a slot sees beside itself.

        Returns:
            (queried slots of all rows, hidden), row by row, slots ascending.
        """
        batch, slots = input_ids.shape
        device = input_ids.device
        if position_ids is None:
            position_ids = torch.arange(slots, device=device).expand(batch, slots)
        content = torch.where(labels == -100, input_ids, labels)
        num_queries = is_queried.sum(dim=-1)
        width = int(num_queries.max())
        # Rows with fewer queries fill up with queries of other slots, whose states are dropped at the end.
        query_slots = (~is_queried).long().argsort(dim=-1, stable=True)[:, :width]
        is_query = torch.arange(width, device=device) < num_queries[:, None]

        horizon = torch.cat([torch.arange(slots, device=device).expand(batch, slots), query_slots], dim=-1)
        is_visible = torch.ones(batch, slots + width, dtype=torch.bool, device=device)
        if attention_mask is not None:
            is_visible[:, :slots] = attention_mask.bool()

        def sees(batch_index, head_index, query_index, key_index):
            is_past = (key_index < horizon[batch_index, query_index]) & is_visible[batch_index, key_index]
            return is_past | (key_index == query_index)

        two_stream_mask = make_attention_mask(
            self.model.config, sees, batch, slots + width, slots + width, self.model.dtype, device
        )
        masks = torch.full_like(query_slots, self.config.mask_token_id)
        outputs = self._run_backbone(
            input_ids=torch.cat([content, masks], dim=-1),
            position_ids=torch.cat([position_ids, position_ids.gather(1, query_slots)], dim=-1),
            attention_mask=two_stream_mask,
            **kwargs,
        )
        return outputs.last_hidden_state[:, slots:][is_query]


def _name_of_embedding(backbone: PreTrainedModel) -> str:
    """The name of the weight of the input embeddings."""
    weight = backbone.get_input_embeddings().weight
    return next(name for name, parameter in backbone.named_parameters() if parameter is weight)


@torch.no_grad()
def _require_plain_head(model: PreTrainedModel) -> None:
    """Raises a ValueError if the logits of a causal model are more than its head applied to its last states."""
    config = model.config
    # A cap shows in large logits only, a scale not in small ones: what is declared counts too.
    is_declared = (
        getattr(config, "final_logit_softcapping", None) is not None
        or getattr(config, "logits_scaling", 1) != 1
        or getattr(config, "logit_scale", None) not in (None, 1)
    )
    input_ids = torch.arange(1, 4, device=model.device)[None]
    states = model.base_model(input_ids, use_cache=False).last_hidden_state
    logits = model(input_ids, use_cache=False).logits
    is_plain = torch.allclose(model.get_output_embeddings()(states).float(), logits.float(), rtol=0.02, atol=0.02)
    if is_declared or not is_plain:
        raise ValueError(
            f"The head of {type(model).__name__} does more than a linear map (a soft cap, or a scale), for which an "
            f"Eso-LM has no place."
        )


def _module_and_name(cls: type) -> str:
    """A class as transformers' `auto_map` names it: module.Class, the module without its packages."""
    return f"{cls.__module__.rsplit('.', 1)[-1]}.{cls.__name__}"


def _implementation_for(config: EsoConfig, attention_mask: torch.Tensor | None, num_keys: int) -> str:
    """The attention to use: the configured one, or one that can take the mask."""
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 4:
        return config._attn_implementation
    if attention_mask.shape[-1] < num_keys:
        return "eager"
    takes_tensors = config._attn_implementation != "flex_attention" and not is_flash_attention_requested(config)
    return config._attn_implementation if takes_tensors else "sdpa"


def _is_sharded(model: nn.Module) -> bool:
    """Whether weights are gathered from other processes by each call: FSDP, or DeepSpeed's ZeRO-3."""
    is_fsdp = any(isinstance(module, FSDPModule | FullyShardedDataParallel) for module in model.modules())
    return is_fsdp or any(hasattr(weight, "ds_id") for weight in model.parameters())


def _is_padding_mask(attention_mask: torch.Tensor | BlockMask | None) -> bool:
    """Whether a mask says which tokens are real, (batch, slots), rather than which slot sees which."""
    return isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2


def _require_known(kwargs: dict) -> None:
    unknown = sorted(set(kwargs) - BACKBONE_KEYWORDS)
    if unknown:
        raise ValueError(
            f"The backbone has no use for the arguments {unknown}: the loss of an Eso-LM is that of "
            f"`EsoForMaskedDiffusion.forward`, and what calls the backbone for another trains something else."
        )


def _require_exactly_one(input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None):
    if (input_ids is None) == (inputs_embeds is None):
        given = "neither" if input_ids is None else "both"
        raise ValueError(f"Exactly one of `input_ids` and `inputs_embeds` must be given, got {given}.")


def _take_rows(tensor: torch.Tensor | None, rows: torch.LongTensor) -> torch.Tensor | None:
    """`tensor[rows]`; tensors that are None or broadcast over the batch stay as they are."""
    return tensor if tensor is None or tensor.shape[0] == 1 else tensor[rows]


def _take_slots(tensor: torch.Tensor, slots: torch.LongTensor) -> torch.Tensor:
    """Rearranges dimension 1 of `tensor` (batch, slots, ...) row by row."""
    return tensor[torch.arange(len(slots), device=slots.device)[:, None], slots]


EsoModel.register_for_auto_class("AutoModel")
EsoForMaskedDiffusion.register_for_auto_class("AutoModel")

__all__ = ["EsoForMaskedDiffusion", "EsoModel", "EsoPreTrainedModel"]
