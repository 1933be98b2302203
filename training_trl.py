"""What the trainers on TRL see to before they train a model."""

from typing import Any

from torch import nn


def require_reference(model: Any, adapters: Any) -> None:
    """Raises a ValueError where TRL would read the reference of a model from where it was loaded, and it was not."""
    is_tuned_apart = adapters is not None or hasattr(model, "peft_config")
    if not isinstance(model, str) and not is_tuned_apart and not model.config._name_or_path:
        raise ValueError(
            "`model` has been made and not loaded, so that TRL finds no reference for it: save it and load it "
            "(`save_pretrained`, `from_pretrained`), train adapters (`peft_config`), or do without (`ref_model` of "
            "DPO, `beta=0` of GRPO)."
        )


def switch_off_dropout(model: nn.Module) -> None:
    """Sets all rates of dropout to 0, also those that layers hold as numbers: what is trained is what writes."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if ("dropout" in name or name == "layerdrop") and isinstance(value, float):
                setattr(module, name, 0.0)
