"""Esoteric Language Models (Eso-LMs, arXiv 2506.01928) for Hugging Face transformers.

Importing this package registers `EsoConfig` and `EsoForMaskedDiffusion` with the Auto classes. The callbacks load on
first use: they need the `Trainer`, which takes longer to import than all the rest.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from .batching import EsoBatchingMixin
from .batching_manager import EsoBatchingManager
from .batching_results import EsoRequestOutput
from .configuration_eso import EsoConfig
from .evaluation_likelihood import EsoLikelihoodMixin, EsoLikelihoodOutput, EsoNelboOutput
from .evaluation_trajectories import EsoTrajectoryOutput, trajectory_log_probs
from .generation import EsoGenerationMixin
from .generation_configuration import EsoGenerateOutput, EsoGenerationConfig, EsoGenerationStep
from .modeling_eso import EsoForMaskedDiffusion, EsoModel
from .training_collator import DataCollatorForDraftHead, DataCollatorForHybridMaskedDiffusion

if TYPE_CHECKING:
    from .training_callbacks import ExponentialMovingAverageCallback, HeldOutEvaluationCallback

AutoConfig.register(EsoConfig.model_type, EsoConfig)
for auto_class in (AutoModel, AutoModelForMaskedLM, AutoModelForCausalLM):
    auto_class.register(EsoConfig, EsoForMaskedDiffusion)
del auto_class

__all__ = [
    "DataCollatorForDraftHead",
    "DataCollatorForHybridMaskedDiffusion",
    "EsoBatchingManager",
    "EsoBatchingMixin",
    "EsoConfig",
    "EsoForMaskedDiffusion",
    "EsoGenerateOutput",
    "EsoGenerationConfig",
    "EsoGenerationMixin",
    "EsoGenerationStep",
    "EsoLikelihoodMixin",
    "EsoLikelihoodOutput",
    "EsoModel",
    "EsoNelboOutput",
    "EsoRequestOutput",
    "EsoTrajectoryOutput",
    "ExponentialMovingAverageCallback",
    "HeldOutEvaluationCallback",
    "trajectory_log_probs",
]

CALLBACKS = ("ExponentialMovingAverageCallback", "HeldOutEvaluationCallback")


if not TYPE_CHECKING:  # to a type checker every name would be there

    def __getattr__(name: str):
        if name not in CALLBACKS:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(".training_callbacks", __name__), name)


def __dir__() -> list[str]:
    return sorted(globals().keys() | set(__all__))
