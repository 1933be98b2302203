"""The exact likelihood of trajectories, with gradients: what policy gradients and preferences train on.

A trajectory is what `generate` has decided, with the plan by which it was: an order, and its groups. Given the plan,
tokens of a group are independent, so that its likelihood is a product over its tokens, and one pass of two streams
gives all factors (d2-AnyOrder, arXiv 2509.21474).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from inspect import signature
from types import MethodType
from typing import Any, cast

import torch
from torch.utils.checkpoint import checkpoint
from transformers.utils import ModelOutput

from .evaluation_scoring import LOGITS_AT_A_TIME
from .generation_order import text_positions
from .generation_plan import GenerationPlan
from .modeling_interface import EsoLM
from .modeling_objective import states_at
from .validation import require_attention_mask, require_shape, require_token_ids

_SCORES_PLANS: ContextVar[bool] = ContextVar("scores_plans", default=False)


@dataclass
class EsoTrajectoryOutput(ModelOutput):
    """What the model says of the tokens of trajectories, by column; 0 where a token was given, or none was decided.

    Args:
        log_probs: (batch, length), nats: log p of each token, given those before its group.
        entropy: (batch, length), nats, of the distribution that it was drawn from.
        mean_logits: (batch, length), the mean of the logits of the vocabulary (without the mask).
        is_top1: (batch, length) bool, whether no token is more probable.
        log_sum_sq_probs: (batch, length), log of the sum of the squared probabilities of all tokens.

    Gradients run through the first two.
    """

    log_probs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    mean_logits: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None
    log_sum_sq_probs: torch.Tensor | None = None


def trajectory_log_probs(
    model: EsoLM,
    trajectories: torch.Tensor,
    orders: torch.Tensor,
    groups: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    temperature: float = 1.0,
) -> EsoTrajectoryOutput:
    """Log-probabilities of what `generate` has decided, each given what was decided before its group, in one pass.

    They are differentiable, and those of the model in the mode that it is in: in training mode, dropout applies. They
    are those of the model itself, whatever filters (`top_k`, ...) or draft head it was drawn with; and not those of
    adaptive unmasking, which chooses from its groups.

    Args:
        model: An Eso-LM.
        trajectories: (batch, length), `EsoGenerateOutput.trajectories`: also what was decided behind the end of a
            text, which the rest has seen. Masks, where nothing was decided, count nothing.
        orders, groups: (batch, length), the plans, as `generate` returns them: the column of the token at each slot,
            and the number of its group, ascending; 0 where it was given.
        attention_mask: (batch, prompt length) or (batch, length), 1 real and 0 padding, as given to `generate`.
        temperature: By which logits are divided.

    Returns:
        [`EsoTrajectoryOutput`].

    Raises:
        ValueError: for tensors that do not fit together.
    """
    is_real = _check(model, trajectories, orders, groups, attention_mask)
    orders, groups = orders.to(trajectories.device), groups.to(trajectories.device)
    # What was not decided, and padding, moves to the end, where no other slot sees it.
    is_absent = ~is_real | (trajectories == model.config.mask_token_id)
    moved = is_absent.gather(1, orders).long().argsort(dim=-1, stable=True)
    orders, groups = orders.gather(1, moved), groups.gather(1, moved)
    plan = GenerationPlan(orders, groups.masked_fill(is_absent.gather(1, orders), 0))
    tokens = trajectories.gather(1, orders)
    states, rows, slots = states_at(
        model,
        plan.groups > 0,
        tokens,
        None,
        text_positions(is_real).gather(1, orders),
        None,
        tokens,
        torch.ones(len(tokens), dtype=torch.bool, device=tokens.device),
        plan.group_starts,
    )
    judged = _judge_in_parts(model, states, tokens[rows, slots], temperature)
    columns = orders[rows, slots]
    return EsoTrajectoryOutput(
        *(values.new_zeros(tokens.shape).index_put((rows, columns), values) for values in judged)
    )


@contextmanager
def scores_plans() -> Iterator[None]:
    """In here, trainers of TRL may put their forward in place of a model's: it will score trajectories.

    Those of this package make themselves in here, and say by which plans.
    """
    token = _SCORES_PLANS.set(True)
    try:
        yield
    finally:
        _SCORES_PLANS.reset(token)


def forward_in_place_of(model: EsoLM, forward: Callable) -> Callable:
    """What becomes of a function that is to take the place of `model.forward`.

    TRL's trainers ask it for log-probabilities, by `fused_lm_head=True`, and otherwise for what the model's own does.

    Raises:
        ValueError: for a forward of TRL's, outside of `scores_plans`.
    """
    if "fused_lm_head" not in signature(forward, follow_wrapped=False).parameters:
        return forward
    if not _SCORES_PLANS.get():
        raise ValueError(
            "TRL's trainers score the next token, and an Eso-LM predicts the token at each slot: train with "
            "`EsoGRPOTrainer` or `EsoDPOTrainer` in place of TRL's own, or with transformers' `Trainer` and "
            "`DataCollatorForHybridMaskedDiffusion`."
        )
    other = model.__dict__.get("forward")
    if getattr(other, "scores_plans", False):
        return cast(Callable, other)  # another trainer's, which does the same

    @wraps(type(model).forward)  # `generate` and `Trainer` read its signature
    def scoring_forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            # Of this model, which may be a copy.
            return type(self).forward(self, *args, **kwargs) if other is None else other(*args, **kwargs)
        absent = {"input_ids", "orders", "groups"} - kwargs.keys()
        if absent:
            raise ValueError(f"The likelihood of a text depends on its plan: the batch lacks {sorted(absent)}.")
        return trajectory_log_probs(
            self,
            kwargs["input_ids"],
            kwargs["orders"],
            kwargs["groups"],
            kwargs.get("attention_mask"),
            kwargs.get("temperature", 1.0),
        )

    vars(scoring_forward)["scores_plans"] = True
    return MethodType(scoring_forward, model)


def _check(
    model: EsoLM,
    trajectories: torch.Tensor,
    orders: torch.Tensor,
    groups: torch.Tensor,
    attention_mask: torch.Tensor | None,
) -> torch.Tensor:
    """Which columns are real, (batch, length) bool."""
    require_token_ids("trajectories", trajectories, model.config.vocab_size)
    batch, length = trajectories.shape
    for name, plan in (("orders", orders), ("groups", groups)):
        require_shape(name, plan, (batch, length))
    if not torch.equal(orders.sort(dim=-1).values, torch.arange(length, device=orders.device).expand(batch, -1)):
        raise ValueError(f"`orders` must hold permutations of 0 ... {length - 1}, a row for each trajectory.")
    if (groups[:, 1:] < groups[:, :-1].masked_fill(groups[:, 1:] == 0, 0)).any():
        raise ValueError("`groups` must not descend along the slots of an order: a group is decided in one piece.")
    is_real = torch.ones_like(trajectories, dtype=torch.bool)
    if attention_mask is not None:
        if attention_mask.dim() != 2 or attention_mask.shape[1] > length:
            raise ValueError(
                f"`attention_mask` must be that of the prompts or of the trajectories, of at most {length} columns, "
                f"got {attention_mask.shape[-1]}."
            )
        require_shape("attention_mask", attention_mask, (batch, attention_mask.shape[1]))
        require_attention_mask(attention_mask)
        is_real[:, : attention_mask.shape[1]] = attention_mask.bool()
    return is_real


def _judge_in_parts(
    model: EsoLM, states: torch.Tensor, labels: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, ...]:
    """The fields of [`EsoTrajectoryOutput`] of states (scored, hidden), each (scored,).

    Logits of many slots are not kept for the backward pass, but computed again.
    """
    size = max(1, LOGITS_AT_A_TIME // model.config.vocab_size)
    if len(states) <= size:
        return _judge(model, states, labels, temperature)
    parts = [
        checkpoint(_judge, model, *part, temperature, use_reentrant=False)
        for part in zip(states.split(size), labels.split(size), strict=True)
    ]
    return tuple(torch.cat(values) for values in zip(*parts, strict=True))


def _judge(model: EsoLM, states: torch.Tensor, labels: torch.Tensor, temperature: float) -> tuple[torch.Tensor, ...]:
    logits = model.compute_logits(states).float() / temperature
    log_probs = logits.log_softmax(dim=-1)
    chosen = log_probs.gather(1, labels[:, None])[:, 0]
    # The mask has no probability, and -inf times 0 is none either.
    finite = log_probs.masked_fill(log_probs == -torch.inf, 0)
    entropy = -(log_probs.exp() * finite).sum(dim=-1)
    with torch.no_grad():
        possible = logits.masked_fill(logits == -torch.inf, 0)
        mean_logits = possible.sum(dim=-1) / (logits > -torch.inf).sum(dim=-1)
        is_top1 = logits.argmax(dim=-1) == labels
        log_sum_sq_probs = torch.logsumexp(2 * log_probs, dim=-1)
    return chosen, entropy, mean_logits, is_top1, log_sum_sq_probs


__all__ = ["EsoTrajectoryOutput", "trajectory_log_probs"]
