"""Checks of arguments, with errors that name the argument, the value and what would be right."""

from numbers import Integral, Real
from typing import Any, TypeGuard

import numpy as np
import torch


def is_integer(value: object) -> TypeGuard[int]:
    """Whether `value` is an integer, of Python or numpy, True and False not among them."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Whether `value` is a real number, of Python or numpy, True and False not among them."""
    return isinstance(value, Real) and not isinstance(value, bool)


def to_python(value: Any) -> Any:
    """A scalar of numpy as Python's, which JSON can hold; anything else as it is."""
    return value.item() if isinstance(value, np.generic) else value


def require_positive_integer(name: str, value: object, or_none: bool = False, or_word: str | None = None) -> None:
    """Raises a ValueError unless `value` is a positive integer, or None or a word where these are allowed."""
    if (value is None and or_none) or (isinstance(value, str) and value == or_word):
        return
    if not is_integer(value) or value < 1:
        others = ["None"] * or_none + [repr(or_word)] * (or_word is not None)
        also = f"{', '.join(others)} or " if others else ""
        raise ValueError(f"`{name}` must be {also}a positive integer, got {value!r}.")


def require_fraction(name: str, value: object, or_none: bool = False) -> None:
    """Raises a ValueError unless `value` is a number in [0, 1], or None where that is allowed."""
    if value is None and or_none:
        return
    if not is_number(value) or not 0 <= value <= 1:
        raise ValueError(f"`{name}` must be {'None or ' * or_none}a number in [0, 1], got {value!r}.")


def require_exactly_one(input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
    """Raises a ValueError unless one of the two is given, and not the other; returns it."""
    given = [tensor for tensor in (input_ids, inputs_embeds) if tensor is not None]
    if len(given) != 1:
        what = "both" if given else "neither"
        raise ValueError(f"Exactly one of `input_ids` and `inputs_embeds` must be given, got {what}.")
    return given[0]


def require_slots(input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> tuple[int, int]:
    """Raises a ValueError unless one of the two is given, with a slot at least; returns its shape (batch, slots)."""
    tokens = require_exactly_one(input_ids, inputs_embeds)
    if input_ids is not None and input_ids.dim() != 2:
        raise ValueError(f"`input_ids` must have the shape (batch, slots), got {tuple(input_ids.shape)}.")
    if tokens.numel() == 0:
        raise ValueError(f"The input must hold at least one slot, got shape {tuple(tokens.shape)}.")
    batch, slots = tokens.shape[:2]
    return batch, slots


def require_shape(name: str, tensor: torch.Tensor | None, shape: tuple[int, ...]) -> None:
    """Raises a ValueError unless `tensor` is None or of the given shape."""
    if tensor is None:
        return
    if not isinstance(tensor, torch.Tensor) or tuple(tensor.shape) != shape:
        given = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise ValueError(f"`{name}` must have the shape {shape}, got {given}.")


def require_token_ids(name: str, token_ids: object, vocab_size: int) -> None:
    """Raises a ValueError unless `token_ids` is a tensor of shape (batch >= 1, tokens), ids of the vocabulary."""
    if not isinstance(token_ids, torch.Tensor) or token_ids.dim() != 2 or len(token_ids) == 0:
        given = tuple(token_ids.shape) if isinstance(token_ids, torch.Tensor) else type(token_ids).__name__
        raise ValueError(f"`{name}` must be a tensor of shape (batch, tokens), of at least one row, got {given}.")
    require_ids_of_vocabulary(name, token_ids, vocab_size)


def require_ids_of_vocabulary(name: str, token_ids: torch.Tensor, vocab_size: int) -> None:
    """Raises a ValueError unless `token_ids`, of any shape, are ids of the vocabulary.

    Compiled code, and tensors without data, are let pass: there is nothing to look at.
    """
    if token_ids.is_floating_point() or token_ids.dtype == torch.bool:
        raise ValueError(f"`{name}` must hold integer ids, got {token_ids.dtype}.")
    if token_ids.numel() == 0 or not _has_values(token_ids):
        return
    low, high = token_ids.aminmax()
    if low < 0 or high >= vocab_size:
        raise ValueError(f"`{name}` must hold ids in [0, {vocab_size - 1}], got ids from {low} to {high}.")


def require_zeros_and_ones(name: str, mask: torch.Tensor) -> None:
    """Raises a ValueError unless `mask` is 1 (real) or 0 (padding) everywhere.

    An additive mask, 0 where a token is real, would mean the opposite.
    """
    if mask.dtype != torch.bool and _has_values(mask) and not ((mask == 0) | (mask == 1)).all():
        other = mask[(mask != 0) & (mask != 1)].flatten()[0]
        raise ValueError(
            f"`{name}` must be 1 at real tokens and 0 elsewhere, got {float(other):g}: an additive mask, or weights, "
            f"mean something else."
        )


def require_attention_mask(mask: torch.Tensor | None) -> None:
    """Raises a ValueError unless `mask` is None, or 1 (real) or 0 (padding), and not an additive one of no padding."""
    if mask is None:
        return
    require_zeros_and_ones("attention_mask", mask)
    if mask.is_floating_point() and mask.numel() > 0 and _has_values(mask) and not mask.any():
        raise ValueError("`attention_mask` must be 1 at real tokens, and is 0 everywhere: is it an additive mask?")


def require_mask(name: str, mask: torch.Tensor | None, shape: tuple[int, ...]) -> None:
    """Raises a ValueError unless `mask` is None, or of the given shape and 0 or 1 everywhere."""
    require_shape(name, mask, shape)
    if mask is not None:
        require_zeros_and_ones(name, mask)


def _has_values(tensor: torch.Tensor) -> bool:
    return tensor.device.type != "meta" and not torch.compiler.is_compiling()
