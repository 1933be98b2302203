"""Checks of arguments, with errors that name the argument, the value and what would be right."""

import torch


def is_integer(value) -> bool:
    """Whether `value` is an integer, True and False not among them."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value) -> bool:
    """Whether `value` is a real number, True and False not among them."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def require_shape(name: str, tensor: torch.Tensor | None, shape: tuple[int, ...]) -> None:
    """Raises a ValueError unless `tensor` is None or of the given shape."""
    if tensor is None:
        return
    if not isinstance(tensor, torch.Tensor) or tuple(tensor.shape) != shape:
        given = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise ValueError(f"`{name}` must have the shape {shape}, got {given}.")


def require_token_ids(name: str, token_ids, vocab_size: int) -> None:
    """Raises a ValueError unless `token_ids` is a tensor of shape (batch, tokens) with ids of the vocabulary."""
    if not isinstance(token_ids, torch.Tensor) or token_ids.dim() != 2 or len(token_ids) == 0:
        given = tuple(token_ids.shape) if isinstance(token_ids, torch.Tensor) else type(token_ids).__name__
        raise ValueError(f"`{name}` must be a tensor of shape (batch, tokens), got {given}.")
    if token_ids.is_floating_point() or token_ids.dtype == torch.bool:
        raise ValueError(f"`{name}` must hold integer ids, got {token_ids.dtype}.")
    if token_ids.numel() > 0 and not 0 <= token_ids.min() <= token_ids.max() < vocab_size:
        raise ValueError(
            f"`{name}` must hold ids in [0, {vocab_size - 1}], got ids from {token_ids.min()} to {token_ids.max()}."
        )
