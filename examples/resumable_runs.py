"""What the training recipes add to a Trainer: checkpoints that are known to be whole, noise by epoch, a report."""

import json
import os
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, has_length

from eso_lm import DataCollatorForHybridMaskedDiffusion

WHOLE = "complete"
SETTINGS_OF_A_RUN = "arguments.json"
HARMLESS_SETTINGS = {  # a run may go on with others: the weights do not depend on them
    # evaluation, and what is left at the end
    *("evaluate_every", "num_samples", "held_out_rows", "held_out_file", "merge"),
    *("do_train", "do_eval", "do_predict", "eval_strategy", "eval_steps", "eval_delay", "eval_on_start"),
    *("per_device_eval_batch_size", "eval_accumulation_steps", "eval_do_concat_batches", "eval_use_gather_object"),
    *("bf16_full_eval", "fp16_full_eval", "prediction_loss_only", "include_for_metrics", "batch_eval_metrics"),
    # logs and reports
    *("logging_strategy", "logging_steps", "logging_first_step", "logging_nan_inf_filter", "log_on_each_node"),
    *("log_level", "log_level_replica", "disable_tqdm", "report_to", "run_name", "project", "trackio_space_id"),
    *("trackio_bucket_id", "trackio_static_space_id", "include_num_input_tokens_seen", "skip_memory_metrics", "debug"),
    # checkpoints and the Hub
    *("output_dir", "save_strategy", "save_steps", "save_total_limit", "save_on_each_node", "save_only_model"),
    *("enable_jit_checkpoint", "resume_from_checkpoint", "push_to_hub", "hub_token", "hub_private_repo"),
    *("hub_model_id", "hub_strategy", "hub_always_push", "hub_revision"),
    # how batches are fetched, which are the same
    *("dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_pin_memory"),
    *("dataloader_persistent_workers", "dataloader_multiprocessing_context"),
    # this machine's own
    *("local_rank", "ddp_timeout", "torch_empty_cache_steps"),
}
LENGTH_OF_A_RUN = {"max_steps", "num_train_epochs"}
LOSSES = {"loss": "training loss", "held_out_nelbo": "held-out NELBO", "eval_loss": "eval loss"}
ENDLESS_SCHEDULES = {"constant", "constant_with_warmup", "inverse_sqrt"}


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
    if training.ignore_data_skip:
        raise ValueError("`ignore_data_skip` would have a run that goes on learn its first rows again: unset it.")


def checkpoint_to_go_on_from(training: TrainingArguments, settings: Any) -> Path | None:
    """The checkpoint from which a run with these settings (a dataclass) goes on; None: it is a new one.

    The main process looks, and notes the settings; every other one hears from it where the run goes on, or why not.

    Raises:
        ValueError: for settings that cannot be resumed, when the run that is there was started with others, and when
            none of its checkpoints is whole.
    """
    check_resumable(training)
    found: list[Path | ValueError | None] = [None]
    if training.process_index == 0:
        try:
            found[0] = last_whole_checkpoint(Path(training.output_dir))
            require_same_run(found[0], training, settings)
        except ValueError as error:
            found[0] = error
    broadcast_object_list(found)
    if isinstance(found[0], ValueError):
        raise found[0]
    return found[0]


def require_same_run(checkpoint: Path | None, training: TrainingArguments, settings: Any) -> None:
    """Notes the settings of a run in its folder; says whether it is new, or where it goes on.

    Raises:
        ValueError: when the run that is there was started with others, or by no recipe.
    """
    folder, now = Path(training.output_dir), settings_of_run(training, settings)
    file = folder / SETTINGS_OF_A_RUN
    before = {}
    if checkpoint is not None and file.exists():
        before = read_settings(file)
        changes = changed_settings(before, now)
        if changes:
            raise ValueError(
                f"The run in `output_dir={folder}` was started with other settings: {', '.join(changes)}. Go on with "
                f"those, or begin a run in another folder."
            )
    if checkpoint is None and not file.exists() and checkpoints_in(folder):
        raise ValueError(f"`output_dir={folder}` holds checkpoints that are not of a recipe: choose another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(file, before | now)
    print("A new run." if checkpoint is None else f"Going on from {checkpoint}.")


def settings_of_run(training: TrainingArguments, settings: Any) -> dict[str, Any]:
    """All that is set for a run, by its command and by how it was launched, by name, as JSON has it."""
    noted = asdict(settings) | training.to_dict()
    noted["mixed_precision"] = training.mixed_precision
    noted["world_size"], noted["n_gpu"] = training.world_size, max(1, training.n_gpu)
    return json.loads(json.dumps(noted, default=str))


def read_settings(file: Path) -> dict[str, Any]:
    """The settings noted in a file; a ValueError when it is damaged."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"The settings of the run, {file}, cannot be read: delete the file to go on without comparing them."
        ) from error


def changed_settings(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Says of every setting that differs, and matters, what it was and what it is.

    What only one of them has is no change: the other was noted by another version of transformers, or of the recipe.
    """
    harmless = set(HARMLESS_SETTINGS)
    if now.get("streaming"):
        harmless.remove("dataloader_num_workers")  # each reads, and packs, files of its own
    if may_be_longer(now):
        harmless |= {name for name in LENGTH_OF_A_RUN if 0 < before.get(name, 0) <= now[name]}
    return [
        f"`{name}` was {before[name]!r} and is {now[name]!r}"
        for name in now
        if name in before and name not in harmless and before[name] != now[name]
    ]


def may_be_longer(settings: dict[str, Any]) -> bool:
    """Whether the first steps of a run are the same however many follow: nothing is a share of all of them."""
    warmup = settings["warmup_steps"]
    return (
        settings["lr_scheduler_type"] in ENDLESS_SCHEDULES
        and (warmup == 0 or warmup >= 1)
        and settings.get("anneal", 0) == 0
    )


def write_atomically(path: Path, content: Any) -> None:
    """Writes JSON; whenever this is killed, the file is as it was before, or as it is after."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


@dataclass
class PostTrainingDefaults:
    """Defaults for recipes on TRL's trainers, to stand before one of its configurations; every one may be set."""

    gradient_checkpointing: bool = False
    save_steps: float = 100
    save_total_limit: int | None = 3
    logging_steps: float = 10

    def __post_init__(self):
        if self.bf16 is None and not torch.cuda.is_available():
            self.bf16 = False  # TRL's own default stops where there is no GPU
        super().__post_init__()


class WholeCheckpoints(TrainerCallback):
    """Marks every checkpoint once all of it is written, by all processes and all other callbacks: add it last.

    The mark holds the size of every file. A process may be killed while it writes, and a file be cut off later;
    `last_whole_checkpoint` finds the last checkpoint that was finished and is as it was then.
    """

    def on_save(self, args, state, control, **kwargs):
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            checkpoint = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.stem != WHOLE)
            sizes = {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in files}
            write_atomically(checkpoint / WHOLE, sizes)


def checkpoints_in(folder: Path) -> list[Path]:
    """All checkpoints of a run, whole or not, that of most steps first."""
    prefix = f"{PREFIX_CHECKPOINT_DIR}-"
    steps = {path: path.name.removeprefix(prefix) for path in folder.glob(f"{prefix}*")}
    return sorted((path for path in steps if steps[path].isdigit()), key=lambda path: int(steps[path]), reverse=True)


def damage_of(checkpoint: Path) -> str | None:
    """What keeps a checkpoint from being whole, in words; None: nothing."""
    mark = checkpoint / WHOLE
    if not mark.exists():
        return "it was not written to its end"
    try:
        # Earlier versions of this file left the mark empty.
        sizes = json.loads(mark.read_text(encoding="utf-8") or "{}")
    except ValueError:
        return f"its mark, {WHOLE}, cannot be read"
    for name, size in sizes.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} of {size} bytes"
    return None


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of most steps that is whole; None: the run was not there yet, or ended within its first save.

    Later ones, which are not, are passed over; a printed line says so.

    Raises:
        ValueError: when there are checkpoints, of which none is whole.
    """
    checkpoints = checkpoints_in(folder)
    damages = {checkpoint: damage_of(checkpoint) for checkpoint in checkpoints}
    whole = next((checkpoint for checkpoint in checkpoints if damages[checkpoint] is None), None)
    is_first_save = len(checkpoints) == 1 and not (checkpoints[0] / WHOLE).exists()
    if whole is None and checkpoints and not is_first_save:
        told = ", ".join(f"{path.name} ({damage})" for path, damage in damages.items())
        raise ValueError(
            f"No checkpoint in {folder} is whole: {told}. Put a whole one back, or delete them all to begin anew."
        )
    for checkpoint in checkpoints if whole is None else checkpoints[: checkpoints.index(whole)]:
        last = "there is none before it" if whole is None else f"the last whole one is {whole.name}"
        print(f"Passed over {checkpoint} ({damages[checkpoint]}): {last}.")
    return whole


def remove_passed_over(folder: Path, checkpoint: Path | None) -> None:
    """Deletes the checkpoints after the one to go on from, which are not whole, and whose steps are done again.

    Left there, they would be among the `save_total_limit` that are kept, in place of whole ones.
    """
    for path in checkpoints_in(folder):
        if path == checkpoint:
            break
        if damage_of(path) is not None:
            shutil.rmtree(path)


class RunIsCompleteError(Exception):
    """A checkpoint to go on from is that of the last step."""


class NoStepTooMany(TrainerCallback):
    """Raises `RunIsCompleteError` where the Trainer, resumed at its last step, would begin with one more."""

    def on_epoch_begin(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            raise RunIsCompleteError


class AsSetNow(TrainerCallback):
    """Has a resumed run log, evaluate, save and end as is set now, where the Trainer would as its checkpoint says."""

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        state.compute_steps(args, state.max_steps)
        if state.epoch == 1 and not has_length(train_dataloader):
            # To the Trainer, streamed rows are an epoch of all steps: one that was at its end has more of them now.
            state.epoch = state.global_step / state.max_steps


def train_or_go_on(trainer: Trainer, checkpoint: Path | None) -> None:
    """Trains to the end, from a checkpoint of `last_whole_checkpoint` if there is one; call it after all callbacks.

    A run that was at its end already has its weights, and averages, back, and is trained no more.
    """
    if trainer.is_world_process_zero():
        remove_passed_over(Path(trainer.args.output_dir), checkpoint)
    trainer.add_callback(NoStepTooMany())
    trainer.add_callback(AsSetNow())
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
    """Leaves the metrics as JSON and a plot of some of them beside the checkpoints, at each of them and at the end.

    Args:
        curves: Names of metrics, and what the plot calls them; None: the losses.
        quantity: What they are, the label of the axis.
        file: The name of the plot.
    """

    def __init__(self, curves: dict[str, str] | None = None, quantity: str = "nats per token", file: str = "loss.png"):
        self.curves, self.quantity, self.file = curves or LOSSES, quantity, file

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            folder = Path(args.output_dir)
            (folder / "metrics.json").write_text(json.dumps(state.log_history, indent=1) + "\n", encoding="utf-8")
            plot_history(state.log_history, self.curves, self.quantity, folder / self.file)

    def on_train_end(self, args, state, control, **kwargs):
        self.on_save(args, state, control)


def plot_history(history: list[dict], curves: dict[str, str], quantity: str, path: Path) -> None:
    """Metrics of a run against the optimiser step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 3.6))
    panel = figure.subplots()
    for name, label in curves.items():
        points = [(row["step"], row[name]) for row in history if row.get(name) is not None]
        if points:
            panel.plot(*zip(*points, strict=True), marker="." if len(points) < 40 else None, label=label)
    panel.set_xlabel("optimiser steps")
    panel.set_ylabel(quantity)
    if panel.lines:
        panel.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
