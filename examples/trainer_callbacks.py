"""What the training recipes add to a Trainer: checkpoints that are known to be whole, noise by epoch, a report."""

import json
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from eso_lm import DataCollatorForHybridMaskedDiffusion

WHOLE = "complete"
SETTINGS_OF_A_RUN = "arguments.json"
HARMLESS_SETTINGS = {"evaluate_every", "num_samples", "held_out_rows", "merge"}  # a run may go on with others


def check_resumable(training: TrainingArguments) -> None:
    """Raises a ValueError for settings with which a killed run could not go on as if nothing had happened."""
    if training.save_total_limit == 1:
        raise ValueError(
            "`save_total_limit` must be at least 2: the last checkpoint is deleted before the next one is whole."
        )
    if training.save_only_model:
        raise ValueError("`save_only_model` leaves no optimiser to go on with: use `save_strategy=no`, or unset it.")
    if training.dataloader_persistent_workers:
        raise ValueError("`dataloader_persistent_workers` would keep the noise of the first epoch: unset it.")


def require_same_run(folder: Path, checkpoint: Path | None, settings: Any) -> None:
    """Notes the settings (a dataclass) of a run in its folder; says whether it is new, or where it goes on.

    Raises:
        ValueError: when the run that is there was started with others.
    """
    file, now = folder / SETTINGS_OF_A_RUN, json.loads(json.dumps(asdict(settings)))
    if checkpoint is not None and file.exists():
        before = json.loads(file.read_text(encoding="utf-8"))
        changed = {
            name: (before.get(name), value)
            for name, value in now.items()
            if name not in HARMLESS_SETTINGS and before.get(name) != value
        }
        if changed:
            changes = ", ".join(f"`{name}` was {old!r} and is {new!r}" for name, (old, new) in changed.items())
            raise ValueError(f"The run in `output_dir={folder}` was started with other settings: {changes}.")
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
    print("A new run." if checkpoint is None else f"Going on from {checkpoint}.")


def checkpoint_to_go_on_from(training: TrainingArguments, settings: Any) -> Path | None:
    """The checkpoint from which a run with these settings (a dataclass) goes on; None: it is a new one.

    Raises:
        ValueError: for settings that cannot be resumed, and when the run that is there was started with others.
    """
    check_resumable(training)
    folder = Path(training.output_dir)
    checkpoint = last_whole_checkpoint(folder)
    if training.process_index == 0:
        require_same_run(folder, checkpoint, settings)
    return checkpoint


class WholeCheckpoints(TrainerCallback):
    """Marks every checkpoint once all of it is written, by this and all other callbacks: add it last.

    A process may be killed while it writes; `last_whole_checkpoint` finds the last one that was finished.
    """

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / WHOLE).touch()


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of most steps that was written to its end, or None."""
    whole = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if (path / WHOLE).exists()]
    return max(whole, key=lambda path: int(path.name.split("-")[-1]), default=None)


class RunIsCompleteError(Exception):
    """A checkpoint to go on from is that of the last step."""


class NoStepTooMany(TrainerCallback):
    """Raises `RunIsCompleteError` where the Trainer, resumed at its last step, would begin with one more."""

    def on_epoch_begin(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            raise RunIsCompleteError


def train_or_go_on(trainer: Trainer, checkpoint: Path | None) -> None:
    """Trains to the end, from a checkpoint of `last_whole_checkpoint` if there is one; call it after all callbacks.

    A run that was at its end already has its weights, and averages, back, and is trained no more.
    """
    trainer.add_callback(NoStepTooMany())
    trainer.add_callback(WholeCheckpoints())
    with suppress(RunIsCompleteError):
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))


class NoiseByEpoch(TrainerCallback):
    """Gives every epoch its own noise, a function of the seed, the epoch and the batch: a resumed run has the same."""

    def __init__(self, collator: DataCollatorForHybridMaskedDiffusion, seed: int):
        self.collator, self.seed = collator, seed

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.collator.seed = self.seed * 1_000_003 + int(state.epoch or 0)


class Report(TrainerCallback):
    """Leaves the metrics as JSON and the losses as a plot beside the checkpoints, at each of them and at the end."""

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            folder = Path(args.output_dir)
            (folder / "metrics.json").write_text(json.dumps(state.log_history, indent=1) + "\n", encoding="utf-8")
            plot_losses(state.log_history, folder / "loss.png")

    def on_train_end(self, args, state, control, **kwargs):
        self.on_save(args, state, control)


def plot_losses(history: list[dict], path: Path) -> None:
    """Training loss and held-out NELBO against the optimiser step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(5.5, 3.6))
    for name, label in (("loss", "training loss"), ("held_out_nelbo", "held-out NELBO"), ("eval_loss", "eval loss")):
        points = [(row["step"], row[name]) for row in history if name in row]
        if points:
            panel.plot(*zip(*points, strict=True), marker="." if len(points) < 40 else None, label=label)
    panel.set_xlabel("optimiser steps")
    panel.set_ylabel("nats per token")
    if panel.lines:
        panel.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
