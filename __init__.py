"""Esoteric Language Models (Eso-LMs, arXiv 2506.01928) for Hugging Face transformers.

Importing this package registers `EsoConfig` and `EsoForMaskedDiffusion` with the Auto classes. The callbacks load on
first use: they need the `Trainer`, which takes longer to import than all the rest.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from .configuration_eso import EsoConfig
from .data_collator import DataCollatorForHybridMaskedDiffusion
from .generation import EsoGenerateOutput, EsoGenerationConfig, EsoGenerationMixin
from .likelihood import EsoLikelihoodMixin, EsoLikelihoodOutput, EsoNelboOutput
from .modeling_eso import EsoForMaskedDiffusion, EsoModel

if TYPE_CHECKING:
    from .exponential_moving_average import ExponentialMovingAverageCallback
    from .held_out_evaluation import HeldOutEvaluationCallback

AutoConfig.register(EsoConfig.model_type, EsoConfig)
for auto_class in (AutoModel, AutoModelForMaskedLM, AutoModelForCausalLM):
    auto_class.register(EsoConfig, EsoForMaskedDiffusion)
del auto_class

__all__ = [
    "DataCollatorForHybridMaskedDiffusion",
    "EsoConfig",
    "EsoForMaskedDiffusion",
    "EsoGenerateOutput",
    "EsoGenerationConfig",
    "EsoGenerationMixin",
    "EsoLikelihoodMixin",
    "EsoLikelihoodOutput",
    "EsoModel",
    "EsoNelboOutput",
    "ExponentialMovingAverageCallback",
    "HeldOutEvaluationCallback",
]

MODULES_OF_CALLBACKS = {
    "ExponentialMovingAverageCallback": "exponential_moving_average",
    "HeldOutEvaluationCallback": "held_out_evaluation",
}


def __getattr__(name: str):
    if name not in MODULES_OF_CALLBACKS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{MODULES_OF_CALLBACKS[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(globals().keys() | set(__all__))
