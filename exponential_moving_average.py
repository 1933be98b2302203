"""An exponential moving average of the weights, kept by the Trainer while it trains."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import Trainer, TrainerCallback

from .validation import is_number


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

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        parameters = self._parameters(model)
        sources = parameters
        if self.resume_from is not None:
            unwrapped = self.trainer.accelerator.unwrap_model(model, keep_torch_compile=False)
            saved = type(unwrapped).from_pretrained(Path(self.resume_from) / self.folder, dtype="auto")
            sources = dict(saved.named_parameters())
        with torch.no_grad():
            self.averages = {name: _like(sources[name], weight) for name, weight in parameters.items()}

    @torch.no_grad()
    def on_step_end(self, args, state, control, model=None, **kwargs):
        decay = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        for name, weight in self._parameters(model).items():
            self.averages[name].lerp_(weight.detach().float(), 1 - decay)

    def on_save(self, args, state, control, **kwargs):
        self.save(Path(args.output_dir) / f"checkpoint-{state.global_step}" / self.folder)

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


def _like(source: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A copy of `source` in float32, placed, and sharded, as `weight` is."""
    if isinstance(weight, DTensor) and not isinstance(source, DTensor):
        return distribute_tensor(source.detach().float().to(weight.device), weight.device_mesh, weight.placements)
    return source.detach().float().to(weight.device, copy=True)


__all__ = ["ExponentialMovingAverageCallback"]
