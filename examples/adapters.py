"""LoRA adapters, for the recipes that tune a model."""

from dataclasses import dataclass, field

from peft import LoraConfig


@dataclass(kw_only=True)
class AdapterArguments:
    """Arguments of a recipe: whether adapters are trained in place of all weights, and which."""

    lora_rank: int | None = field(default=None, metadata={"help": "train LoRA adapters of this rank; unset: all"})
    lora_alpha: int | None = field(default=None, metadata={"help": "their scale; unset: twice the rank"})
    lora_modules: str = field(default="all-linear", metadata={"help": "'all-linear', or names with commas between"})


def lora_config(arguments: AdapterArguments) -> LoraConfig | None:
    """The adapters to train; None: all weights."""
    if arguments.lora_rank is None:
        return None
    modules = arguments.lora_modules
    return LoraConfig(
        r=arguments.lora_rank,
        lora_alpha=arguments.lora_alpha or 2 * arguments.lora_rank,
        target_modules=modules if modules == "all-linear" else modules.split(","),
    )
