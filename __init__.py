"""Esoteric Language Models (Eso-LMs, arXiv 2506.01928) for Hugging Face transformers.

Importing this package registers `EsoConfig` and `EsoForMaskedDiffusion` with the Auto classes.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from .configuration_eso import EsoConfig
from .data_collator import DataCollatorForHybridMaskedDiffusion
from .exponential_moving_average import ExponentialMovingAverageCallback
from .generation import EsoGenerateOutput, EsoGenerationConfig, EsoGenerationMixin
from .held_out_evaluation import HeldOutEvaluationCallback
from .likelihood import EsoLikelihoodMixin, EsoLikelihoodOutput, EsoNelboOutput
from .modeling_eso import EsoForMaskedDiffusion, EsoModel

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
