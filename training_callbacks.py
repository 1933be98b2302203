"""Callbacks of the Trainer: averaged weights, and evaluation while training."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import (
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from .generation_configuration import EsoGenerationConfig
from .generation_transformers import require_sampling
from .modeling_objective import IGNORED_LABEL
from .training_collator import DataCollatorForHybridMaskedDiffusion
from .validation import is_number, require_positive_integer


class ExponentialMovingAverageCallback(TrainerCallback):
    """Averages the trained weights over the steps; diffusion language models are usually evaluated with these.

    After step n each average moves by 1 - min(decay, (1 + n) / (10 + n)) of the way to its weight, so that the first
    steps are soon forgotten. The averages are saved as a model of its own in a folder of every checkpoint, which
    `from_pretrained` loads, and from which training resumes.

    Args:
        trainer: The trainer; add the callback to it by `trainer.add_callback`.
        decay: In [0, 1), per optimiser step; 0.9999 in the literature.
        folder: Name of the folder of averaged weights in each checkpoint.
        resume_from: The checkpoint that `trainer.train` resumes from; None: training starts anew.

    Raises:
        ValueError: for a decay out of range, and for a checkpoint without averages.
    """

    def __init__(
        self, trainer: Trainer, decay: float = 0.9999, folder: str = "ema", resume_from: str | Path | None = None
    ):
        if not is_number(decay) or not 0 <= decay < 1:
            raise ValueError(f"`decay` must be a number in [0, 1), got {decay!r}.")
        if resume_from is not None and not (Path(resume_from) / folder).is_dir():
            raise ValueError(f"`resume_from` must be a checkpoint with averaged weights in {folder!r}: {resume_from}.")
        self.trainer, self.decay, self.folder, self.resume_from = trainer, decay, folder, resume_from
        self.averages: dict[str, torch.Tensor] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        parameters = self._parameters(model)
        sources = parameters
        if self.resume_from is not None:
            unwrapped = self.trainer.accelerator.unwrap_model(model, keep_torch_compile=False)
            saved = type(unwrapped).from_pretrained(Path(self.resume_from) / self.folder, dtype="auto")
            sources = dict(saved.named_parameters())
        with torch.no_grad():
            self.averages = {name: _like(sources[name], weight) for name, weight in parameters.items()}

    @torch.no_grad()
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        decay = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        for name, weight in self._parameters(model).items():
            self.averages[name].lerp_(weight.detach().float(), 1 - decay)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.save(f"{args.output_dir}/checkpoint-{state.global_step}/{self.folder}")

    def save(self, folder: str | Path) -> None:
        """Saves the averaged model as a folder for `from_pretrained`; every process has to take part."""
        with self.applied():
            self.trainer.save_model(str(folder))

    @contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """Puts the averages in place of the weights, for an evaluation or a sample."""
        parameters = self._parameters(self.trainer.model_wrapped)
        trained = {name: weight.detach().clone() for name, weight in parameters.items()}
        for name, weight in parameters.items():
            weight.copy_(self.averages[name])
        try:
            yield
        finally:
            for name, weight in parameters.items():
                weight.copy_(trained[name])

    def _parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        unwrapped = self.trainer.accelerator.unwrap_model(model, keep_torch_compile=False)
        return {name: weight for name, weight in unwrapped.named_parameters() if weight.requires_grad}


class HeldOutEvaluationCallback(TrainerCallback):
    """Logs the NELBO of held-out texts, how well samplers do on them, and samples, through the trainer's own `log`.

    Nothing of it depends on the state of the training's random numbers, or changes it: two checkpoints are compared on
    the same texts, with the same noise. Logged are `held_out_nelbo` (nats per token), its standard error over the
    texts, `held_out_perplexity` (exp of the NELBO, an upper bound); for each sampler `held_out_<name>`, exact nats per
    token under it, its standard error, and `held_out_<name>_forwards`, those that such a text takes (`lossless` ones
    depend on chance and are not told); and, with a tokenizer, `samples` in `trainer.state.log_history`. (They come
    after the trainer's own metrics, so `metric_for_best_model` cannot name them.)

    Args:
        trainer: The trainer; add the callback to it by `trainer.add_callback`.
        dataset: Examples as for the collator: `input_ids`, and `attention_mask` and `labels` (-100 at the prompt) if
            there are any.
        every: Optimiser steps between evaluations; the last step is always evaluated. None: when the trainer
            evaluates, and at the end.
        num_draws: Draws of the noise for each text, and of plans for each sampler.
        samplers: Settings of `generate` by name, for `log_likelihood`: `{"16_steps": {"num_diffusion_steps": 16}}`,
            say. A mean of -log p(text | plan) over plans, the same ones each time.
        tokenizer: Decodes the samples; None: no samples.
        num_samples, generation_settings: How many samples, and the arguments of `generate` for them.
        seed: Of the noise, and of the plans.
        average: Keeps averaged weights, which are then the ones to evaluate.

    Raises:
        ValueError: for a dataset without tokens to score, numbers out of range, or settings that make no sampler.
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
        samplers: Mapping[str, Mapping[str, Any]] | None = None,
    ):
        if every is not None:
            require_positive_integer("every", every)
        require_positive_integer("num_draws", num_draws)
        require_positive_integer("num_samples", num_samples)
        _require_samplers(samplers)
        self.samplers = dict(samplers or {})
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
        self.evaluated_step: int | None = None

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """What is logged, but for samples: the NELBO in nats per token, the perplexity, and the samplers'."""
        eso = self.trainer.accelerator.unwrap_model(model)
        texts = tuple(tensor.to(eso.device) for tensor in (self.input_ids, self.is_real, self.is_given))
        generator = torch.Generator().manual_seed(self.seed)
        nelbo = eso.nelbo(*texts, num_draws=self.num_draws, generator=generator).nelbo
        report = self._per_token("held_out_nelbo", nelbo)
        report["held_out_perplexity"] = math.exp(min(report["held_out_nelbo"], 700))
        for name, settings in self.samplers.items():
            # One for each text, so that all samplers of the same order have the same plans, as far as they go.
            generators = [torch.Generator().manual_seed(self.seed + row) for row in range(len(self.input_ids))]
            output = eso.log_likelihood(*texts, num_orders=self.num_draws, generator=generators, **settings)
            report |= self._per_token(f"held_out_{name}", -output.log_likelihood_per_order.double().mean(dim=1))
            if (forwards := output.num_function_evaluations) is not None:
                report[f"held_out_{name}_forwards"] = float(forwards.double().mean())
        return report

    def _per_token(self, name: str, nats: torch.Tensor) -> dict[str, float]:
        """Of nats (texts,) those per token, and the standard error over the texts."""
        nats, count = nats.double().cpu(), len(nats)
        mean = float(nats.sum() / self.tokens.sum())
        deviations = nats - mean * self.tokens
        error = float(deviations.square().sum().sqrt() / self.tokens.sum()) if count > 1 else math.nan
        return {name: mean, f"{name}_standard_error": error * math.sqrt(count / max(count - 1, 1))}

    def sample(self, model: nn.Module) -> list[str]:
        """Texts from the model, from the same random numbers each time."""
        eso = self.trainer.accelerator.unwrap_model(model)
        was_training = eso.training
        eso.eval()
        try:
            generators = [torch.Generator().manual_seed(self.seed + row) for row in range(self.num_samples)]
            empty = torch.empty(self.num_samples, 0, dtype=torch.long, device=eso.device)
            sequences = eso.generate(empty, generator=generators, **self.generation_settings)
        finally:
            eso.train(was_training)
        return cast(PreTrainedTokenizerBase, self.tokenizer).batch_decode(sequences, skip_special_tokens=True)

    def _report(self, state: TrainerState, control: TrainerControl, model: nn.Module) -> None:
        self.evaluated_step = state.global_step
        # To the trainer one log is as good as another: the training loss of this step would go unreported.
        should_log = control.should_log
        with nullcontext() if self.average is None else self.average.applied():
            self.trainer.log(self.evaluate(model))
            if self.tokenizer is not None:
                samples: dict[str, Any] = {"samples": self.sample(model), "step": state.global_step}
                state.log_history.append(samples)
        control.should_log = should_log

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if self.every is not None and state.global_step % self.every == 0:
            self._report(state, control, model)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if self.every is None:
            self._report(state, control, model)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if self.evaluated_step != state.global_step:
            self._report(state, control, model)


def _require_samplers(samplers: Any) -> None:
    """Raises a ValueError for what are no settings of samplers by name."""
    if samplers is not None and not isinstance(samplers, Mapping):
        raise ValueError(f"`samplers` must be a mapping of names to settings, got {type(samplers).__name__}.")
    for name, settings in (samplers or {}).items():
        if not isinstance(name, str) or name in ("", "nelbo", "perplexity"):
            raise ValueError(f"`samplers` must have names, and those of no other number, got {name!r}.")
        if not isinstance(settings, Mapping):
            raise ValueError(f"`samplers[{name!r}]` must be a mapping of settings, got {type(settings).__name__}.")
        config = EsoGenerationConfig()
        try:
            unknown = config.update(**settings)
            require_sampling(config.get_generation_mode())
        except ValueError as error:
            raise ValueError(f"`samplers[{name!r}]`: {error}") from error
        if unknown:
            raise ValueError(f"`samplers[{name!r}]`: {sorted(unknown)} are not settings of `generate`.")


def _like(source: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A copy of `source` in float32, placed, and sharded, as `weight` is."""
    if isinstance(weight, DTensor) and not isinstance(source, DTensor):
        return distribute_tensor(source.detach().float().to(weight.device), weight.device_mesh, weight.placements)
    return source.detach().float().to(weight.device, copy=True)


__all__ = ["ExponentialMovingAverageCallback", "HeldOutEvaluationCallback"]
