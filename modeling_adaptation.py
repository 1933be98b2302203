"""Adaptation: an Eso-LM out of a causal language model that exists, with its weights, body and head."""

import copy
import os
from typing import Any, Self, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from .configuration_eso import EsoConfig
from .modeling_backbone import prepare_backbone, require_full_causal_attention, verify_backbone
from .modeling_interface import EsoLM
from .validation import is_integer


class EsoAdaptationMixin(EsoLM):
    """Adds `from_causal_lm` to an Eso-LM."""

    @classmethod
    def from_causal_lm(
        cls,
        model: str | os.PathLike | PreTrainedModel,
        mask_token_id: int | None = None,
        alpha_0: float = 1.0,
        draft_rank: int | None = None,
        **kwargs: Any,
    ) -> Self:
        """Makes an Eso-LM out of a causal language model, with its weights, body and head.

        A causal model predicts the next token, an Eso-LM the one at the slot, so it has to be trained before it is
        of use; `examples/adapt_causal_lm.py` does it.

        Args:
            model: Name or folder for `AutoModelForCausalLM.from_pretrained`; or a model, which is copied.
            mask_token_id: An id that no text holds; None: the first one behind the vocabulary, which grows to hold
                it. Its embedding begins as the mean of all others; so do those of other new ids, if there are some
                before it, which are tokens like any other.
            alpha_0: That of the config.
            draft_rank: Rank of a fresh draft head; None: without one.
            kwargs: For `from_pretrained` (`dtype`, `attn_implementation`, `quantization_config`, `device_map`, ...).

        Returns:
            The model, in evaluation mode, with the special tokens of the causal one.

        Raises:
            ValueError: when the model cannot be the backbone of an Eso-LM; the message says why.
        """
        if mask_token_id is not None and not (is_integer(mask_token_id) and mask_token_id >= 0):
            raise ValueError(f"`mask_token_id` must be an id (an integer >= 0) or None, got {mask_token_id!r}.")
        causal = _load_or_copy(model, kwargs)
        causal.eval()
        _require_adaptable(causal)

        vocab_size = causal.get_output_embeddings().weight.shape[0]
        if mask_token_id is None:
            mask_token_id = vocab_size
        if mask_token_id >= vocab_size:
            causal.resize_token_embeddings(mask_token_id + 1, mean_resizing=False)
        names = ("pad_token_id", "bos_token_id", "eos_token_id")
        special: dict[str, Any] = {name: getattr(causal.config, name, None) for name in names}
        config = EsoConfig(
            backbone_config=_body(causal).config,
            mask_token_id=mask_token_id,
            alpha_0=alpha_0,
            draft_rank=draft_rank,
            tie_word_embeddings=causal.config.tie_word_embeddings,
            dtype=causal.dtype,
            **special,
        )
        with torch.device("meta"):
            eso = cls(config)
        _hand_over(causal, eso)
        with torch.no_grad():
            for weight in (eso.get_input_embeddings().weight, eso.lm_head.weight):
                mean = weight[:vocab_size].mean(dim=0, dtype=torch.float32)
                weight[vocab_size:] = weight[mask_token_id] = mean.to(weight.dtype)
        return eso.eval()


def _load_or_copy(model: str | os.PathLike | PreTrainedModel, kwargs: dict[str, Any]) -> PreTrainedModel:
    """A causal model of one's own to take apart."""
    if isinstance(model, str | os.PathLike):
        return AutoModelForCausalLM.from_pretrained(model, **kwargs)
    if not isinstance(model, PreTrainedModel) or isinstance(model.config, EsoConfig):
        raise ValueError(
            f"`model` must be a causal language model, or the name or folder of one, got {type(model).__name__}."
        )
    if kwargs:
        raise ValueError(f"{sorted(kwargs)} are for loading a model by its name, and `model` is loaded already.")
    return copy.deepcopy(model)


def _body(model: PreTrainedModel) -> PreTrainedModel:
    return cast(PreTrainedModel, model.base_model)  # to transformers any module


def _require_adaptable(model: PreTrainedModel) -> None:
    """Raises a ValueError, which says why, for a model whose body or head an Eso-LM cannot take over."""
    backbone = _body(model)
    if backbone is model or not isinstance(model.get_output_embeddings(), nn.Linear):
        raise ValueError(f"`model` must be a causal model with a linear head, got {type(model).__name__}.")
    require_full_causal_attention(backbone.config)
    prepare_backbone(backbone)
    verify_backbone(backbone)
    _require_plain_head(model)


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


def _hand_over(model: PreTrainedModel, eso: EsoLM) -> None:
    """Puts the body and the head of a causal model in the place of those of an Eso-LM without weights."""
    head = model.get_output_embeddings()
    eso.model, eso.lm_head.weight = _body(model), head.weight
    eso.config.backbone_config = eso.model.config
    bias = torch.zeros_like(head.weight[:, 0]) if head.bias is None else head.bias
    eso.lm_head.bias = nn.Parameter(bias.detach())
    eso.tie_weights()
    if eso.draft_head is not None:
        eso.draft_head.to(model.dtype).to_empty(device=head.weight.device)
        for module in eso.draft_head.children():
            eso._init_weights(module)
    for name in ("hf_quantizer", "hf_device_map", "quantization_method"):
        if hasattr(model, name):
            setattr(eso, name, getattr(model, name))
    if hasattr(model.config, "quantization_config"):
        eso.config.quantization_config = model.config.quantization_config
