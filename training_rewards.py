"""Reward functions whose failures say where they come from."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import nn
from trl.trainer.utils import get_callable_name, is_async_callable

LARGEST_REWARD = torch.finfo(torch.float32).max


def checked_reward(function: Any) -> Any:
    """A reward function that raises a ValueError, which names it, where it fails or returns what is no number.

    Reward models, and their names, stay as they are.
    """
    if not callable(function) or isinstance(function, nn.Module):
        return function
    name = get_callable_name(function)
    reward: Callable
    if is_async_callable(function):

        @wraps(function, updated=())
        async def reward(prompts: list, completions: list, **columns: Any) -> list[float | None]:
            with _telling(name, prompts):
                rewards = await function(prompts=prompts, completions=completions, **columns)
            return _require_numbers(name, rewards, prompts, completions)

    else:

        @wraps(function, updated=())
        def reward(prompts: list, completions: list, **columns: Any) -> list[float | None]:
            with _telling(name, prompts):
                rewards = function(prompts=prompts, completions=completions, **columns)
            return _require_numbers(name, rewards, prompts, completions)

    reward.__name__ = name
    return reward


@contextmanager
def _telling(name: str, prompts: list) -> Iterator[None]:
    """Says of an error in here which reward function it comes from."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"The reward function {name!r} failed with {type(error).__name__}: {error}; on {len(prompts)} "
            f"completions, the first of the prompt {prompts[0]!r}."
        ) from error


def _require_numbers(name: str, rewards: Any, prompts: list, completions: list) -> list[float | None]:
    """The rewards, a number or None each."""
    if rewards is None or isinstance(rewards, int | float | str | dict):
        raise ValueError(f"The reward function {name!r} must return a list of numbers, or None, got {rewards!r}.")
    rewards, values = list(rewards), []
    if len(rewards) != len(prompts):
        raise ValueError(
            f"The reward function {name!r} returned {len(rewards)} rewards of {len(prompts)} completions."
        )
    for reward, prompt, completion in zip(rewards, prompts, completions, strict=True):
        try:
            value = None if reward is None else float(reward)
        except (TypeError, ValueError):
            value = math.nan
        if value is not None and not abs(value) <= LARGEST_REWARD:
            raise ValueError(
                f"The reward function {name!r} returned {reward!r}, which is no finite number (nor None), for the "
                f"completion {completion!r} of the prompt {prompt!r}."
            )
        values.append(value)
    return values
