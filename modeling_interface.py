"""What the parts of an Eso-LM take for granted about the whole, told to type checkers alone.

Mixins, and functions that take a model, are parts of `EsoForMaskedDiffusion`, whose module imports theirs: they cannot
import it in turn. At run time there is nothing of this.
"""

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from .configuration_eso import EsoConfig

if TYPE_CHECKING:

    class BackboneOutput(BaseModelOutputWithPast):
        """What every backbone returns: the states are always there."""

        last_hidden_state: torch.FloatTensor

    class EsoNetwork(PreTrainedModel):
        """The backbone, `EsoModel`, or the whole model."""

        config: EsoConfig

    class EsoLM(EsoNetwork):
        """The whole model, `EsoForMaskedDiffusion`."""

        model: PreTrainedModel
        lm_head: nn.Linear
        draft_head: Any  # an `EsoDraftHead`, or None
        # As transformers' generation wants them declared.
        device: torch.device
        dtype: torch.dtype
        hf_device_map: dict[str, Any]

        @property
        def max_text_length(self) -> int | None: ...
        @property
        def takes_packed_rows(self) -> bool: ...
        def get_input_embeddings(self) -> nn.Embedding: ...
        def run_backbone(self, **arguments: Any) -> BackboneOutput: ...
        def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor: ...
        def ready_to_decode(self) -> AbstractContextManager[None]: ...

else:
    BackboneOutput = BaseModelOutputWithPast
    EsoNetwork = EsoLM = object
