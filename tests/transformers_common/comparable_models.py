"""Eso-LMs that comparisons tell something of: with random weights, and with a loss that needs no collator.

The latter are a model type of their own, so that the processes which tests start find them by it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers import initialization as init

from eso_lm import EsoConfig, EsoForMaskedDiffusion
from eso_lm.modeling_eso import EsoModulation, EsoPreTrainedModel

initialize, initialize_with_head = EsoPreTrainedModel._init_weights, EsoForMaskedDiffusion._init_weights


@contextmanager
def random_initialization() -> Iterator[None]:
    """Fresh Eso-LMs have random gates and heads, not zeros, of which most comparisons hold whatever is compared."""
    with (
        mock.patch.object(EsoPreTrainedModel, "_init_weights", _randomize),
        mock.patch.object(EsoForMaskedDiffusion, "_init_weights", _randomize_with_head),
    ):
        yield


@torch.no_grad()
def _randomize(model: EsoPreTrainedModel, module: torch.nn.Module) -> None:
    initialize(model, module)
    if isinstance(module, EsoModulation):
        init.normal_(module.weight, std=0.2)
        init.normal_(module.bias, std=0.2)


@torch.no_grad()
def _randomize_with_head(model: EsoForMaskedDiffusion, module: torch.nn.Module) -> None:
    initialize_with_head(model, module)
    if module is model.lm_head and not model.config.tie_word_embeddings:
        init.normal_(module.weight, std=0.2)


class PlainLossConfig(EsoConfig):
    model_type = "eso_plain_loss"


class EsoWithPlainLoss(EsoForMaskedDiffusion):
    """Takes labels alone for rows of the sequential phase in which every token counts."""

    config_class = PlainLossConfig

    def __init__(self, config: EsoConfig):
        with random_initialization():
            super().__init__(config)

    def forward(
        self, input_ids: torch.LongTensor | None = None, labels: torch.LongTensor | None = None, **kwargs
    ) -> object:
        if labels is not None:
            mask = self.config.mask_token_id
            labels = labels.masked_fill(labels == mask, (mask + 1) % self.config.vocab_size)
            kwargs["sequential_rows"] = torch.ones(len(labels), dtype=torch.bool, device=labels.device)
            kwargs["loss_weights"] = torch.ones(labels.shape, device=labels.device)
        return super().forward(input_ids=input_ids, labels=labels, **kwargs)


AutoConfig.register(PlainLossConfig.model_type, PlainLossConfig)
AutoModelForCausalLM.register(PlainLossConfig, EsoWithPlainLoss)
