"""Evaluation while training: held-out NELBO, perplexity and samples, the same texts and noise at each evaluation."""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback

from .data_collator import IGNORED_LABEL, DataCollatorForHybridMaskedDiffusion
from .exponential_moving_average import ExponentialMovingAverageCallback
from .validation import is_integer


class HeldOutEvaluationCallback(TrainerCallback):
    """Reports the NELBO and the perplexity of held-out texts, and samples, through the trainer's own `log`.

    Nothing of it depends on the state of the training's random numbers, or changes it: two checkpoints are compared on
    the same texts, with the same noise. Logged are `held_out_nelbo` (nats per token), its standard error over the
    texts, `held_out_perplexity` (exp of the NELBO, an upper bound) and, with a tokenizer, `samples` in
    `trainer.state.log_history`. (They come after the trainer's own metrics, so `metric_for_best_model` cannot name
    them.)

    Args:
        trainer: The trainer; add the callback to it by `trainer.add_callback`.
        dataset: Examples as for the collator: `input_ids`, and `attention_mask` and `labels` (-100 at the prompt) if
            there are any.
        every: Optimiser steps between evaluations; the last step is always evaluated. None: when the trainer
            evaluates, and at the end.
        num_draws: Draws of the noise for each text.
        tokenizer: Decodes the samples; None: no samples.
        num_samples, generation_settings: How many samples, and the arguments of `generate` for them.
        seed: Of the noise.
        average: Keeps averaged weights, which are then the ones to evaluate.

    Raises:
        ValueError: for a dataset without tokens to score, or numbers out of range.
    """

    def __init__(
        self,
        trainer: Trainer,
        dataset: Sequence[Mapping[str, Any]],
        every: int | None = None,
        num_draws: int = 4,
        tokenizer: PreTrainedTokenizerBase | None = None,
        num_samples: int = 2,
        generation_settings: Mapping[str, Any] | None = None,
        seed: int = 0,
        average: ExponentialMovingAverageCallback | None = None,
    ):
        for name, value in (("every", every), ("num_draws", num_draws), ("num_samples", num_samples)):
            if not (is_integer(value) and value >= 1) and not (name == "every" and value is None):
                raise ValueError(f"`{name}` must be a positive integer, got {value!r}.")
        if len(dataset) == 0:
            raise ValueError("`dataset` must hold at least one text.")
        self.trainer, self.every, self.num_draws, self.seed = trainer, every, num_draws, seed
        self.tokenizer, self.num_samples = tokenizer, num_samples
        self.generation_settings = {"max_new_tokens": 64} | dict(generation_settings or {})
        collator = DataCollatorForHybridMaskedDiffusion(mask_token_id=-1, pad_token_id=0, alpha_0=1.0)
        self.input_ids, is_real, labels = collator.stack(list(dataset))
        self.is_real, self.is_given = is_real, labels == IGNORED_LABEL
        self.tokens = (self.is_real & ~self.is_given).sum(dim=-1)
        if not self.tokens.any():
            raise ValueError("`dataset` must hold at least one token that is not part of a prompt.")
        self.average = average
        self.evaluated_step = None

    def evaluate(self, model) -> dict[str, float]:
        """Held-out NELBO in nats per token, its standard error over the texts, and the perplexity."""
        model = self.trainer.accelerator.unwrap_model(model)
        generator = torch.Generator().manual_seed(self.seed)
        device = model.device
        output = model.nelbo(
            self.input_ids.to(device),
            self.is_real.to(device),
            self.is_given.to(device),
            num_draws=self.num_draws,
            generator=generator,
        )
        nelbo = output.nelbo.double().cpu()
        per_token = float(nelbo.sum() / self.tokens.sum())
        deviations, count = nelbo - per_token * self.tokens, len(nelbo)
        error = float(deviations.square().sum().sqrt() / self.tokens.sum()) if count > 1 else math.nan
        return {
            "held_out_nelbo": per_token,
            "held_out_nelbo_standard_error": error * math.sqrt(count / max(count - 1, 1)),
            "held_out_perplexity": math.exp(min(per_token, 700)),
        }

    def sample(self, model) -> list[str]:
        """Texts from the model, from the same random numbers each time."""
        model = self.trainer.accelerator.unwrap_model(model)
        was_training = model.training
        model.eval()
        try:
            generators = [torch.Generator().manual_seed(self.seed + row) for row in range(self.num_samples)]
            empty = torch.empty(self.num_samples, 0, dtype=torch.long, device=model.device)
            sequences = model.generate(empty, generator=generators, **self.generation_settings)
        finally:
            model.train(was_training)
        return self.tokenizer.batch_decode(sequences, skip_special_tokens=True)

    def _report(self, state, control, model) -> None:
        self.evaluated_step = state.global_step
        # To the trainer one log is as good as another: the training loss of this step would go unreported.
        should_log = control.should_log
        with nullcontext() if self.average is None else self.average.applied():
            self.trainer.log(self.evaluate(model))
            if self.tokenizer is not None:
                state.log_history.append({"samples": self.sample(model), "step": state.global_step})
        control.should_log = should_log

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.every is not None and state.global_step % self.every == 0:
            self._report(state, control, model)

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        if self.every is None:
            self._report(state, control, model)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if self.evaluated_step != state.global_step:
            self._report(state, control, model)


__all__ = ["HeldOutEvaluationCallback"]
