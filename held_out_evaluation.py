"""Evaluation while training: held-out NELBO, perplexity and samples, the same texts and noise at each evaluation."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback

from .validation import is_integer


class HeldOutEvaluationCallback(TrainerCallback):
    """Reports the NELBO and the perplexity of held-out texts, and samples, through the trainer's own `log`.

    Nothing of it depends on the state of the training's random numbers, or changes it: two checkpoints are compared on
    the same texts, with the same noise. Logged are `held_out_nelbo` (nats per token), its standard error over the
    texts, `held_out_perplexity` (exp of the NELBO, an upper bound) and, with a tokenizer, `samples` in
    `trainer.state.log_history`.

    Args:
        trainer: The trainer; add the callback to it by `trainer.add_callback`.
        dataset: Examples with `input_ids` and, for completions, `labels` with -100 at the prompt.
        every: Optimiser steps between evaluations; the last step is always evaluated. None: when the trainer
            evaluates, and at the end.
        num_draws: Draws of the noise for each text.
        tokenizer: Decodes the samples; None: no samples.
        num_samples, generation_settings: How many samples, and the arguments of `generate` for them.
        seed: Of the noise.

    Raises:
        ValueError: for an empty dataset, or numbers out of range.
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
    ):
        for name, value in (("every", every), ("num_draws", num_draws), ("num_samples", num_samples)):
            if not (is_integer(value) and value >= 1) and not (name == "every" and value is None):
                raise ValueError(f"`{name}` must be a positive integer, got {value!r}.")
        if len(dataset) == 0:
            raise ValueError("`dataset` must hold at least one text.")
        self.trainer, self.every, self.num_draws, self.seed = trainer, every, num_draws, seed
        self.tokenizer, self.num_samples = tokenizer, num_samples
        self.generation_settings = {"max_new_tokens": 64} | dict(generation_settings or {})
        rows = [example["input_ids"] for example in dataset]
        width = max(len(row) for row in rows)
        self.input_ids, self.is_real, self.is_given = (torch.zeros(len(rows), width, dtype=torch.long) for _ in "...")
        for index, (example, row) in enumerate(zip(dataset, rows, strict=True)):
            self.input_ids[index, : len(row)] = torch.as_tensor(row)
            self.is_real[index, : len(row)] = 1
            if example.get("labels") is not None:
                self.is_given[index, : len(row)] = (torch.as_tensor(example["labels"]) == -100).long()
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
        tokens = (self.is_real * (1 - self.is_given)).sum()
        nelbo = output.nelbo.double().cpu()
        per_token = float(nelbo.sum() / tokens)
        deviations = nelbo - per_token * (self.is_real * (1 - self.is_given)).sum(dim=-1)
        return {
            "held_out_nelbo": per_token,
            "held_out_nelbo_standard_error": float(deviations.square().sum().sqrt() / tokens),
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

    def _report(self, state, model) -> None:
        if self.evaluated_step == state.global_step:
            return
        self.evaluated_step = state.global_step
        self.trainer.log(self.evaluate(model))
        if self.tokenizer is not None:
            state.log_history.append({"samples": self.sample(model), "step": state.global_step})

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.every is not None and state.global_step % self.every == 0:
            self._report(state, model)

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        if self.every is None:
            self._report(state, model)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self._report(state, model)


__all__ = ["HeldOutEvaluationCallback"]
