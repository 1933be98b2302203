"""Runs of the training recipes in this process."""

import json
from pathlib import Path

import run_pretraining

QUICK_POST_TRAINING = {  # of TRL's trainers
    "max_steps": 2,
    "report_to": "none",
    "logging_steps": 1,
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "disable_tqdm": True,
    "gradient_checkpointing": False,
}


def options(settings: dict) -> list[str]:
    """Settings as arguments of a script; None: not given."""
    return [f"--{name}={value}" for name, value in settings.items() if value is not None]


def pretraining_arguments(texts: Path, config: Path, output: Path, /, **changes) -> list[str]:
    settings = {
        "dataset": texts,
        "text_column": "body",
        "config": config,
        "vocab_size": 300,
        "length": 24,
        "held_out_documents": 10,
        "held_out_rows": 8,
        "alpha_0": 0.4,
        "output_dir": output,
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "warmup_steps": 2,
        "save_steps": 4,
        "evaluate_every": 4,
        "logging_steps": 1,
        "num_samples": 1,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return options(settings | changes)


def pretrain(*arguments, **changes) -> list[dict]:
    """Runs the script in this process; returns what it logged."""
    settings, training = run_pretraining.parse_args(pretraining_arguments(*arguments, **changes))
    run_pretraining.main(settings, training)
    return json.loads((Path(training.output_dir) / "metrics.json").read_text())


def losses(history: list[dict]) -> list[float]:
    return [row["loss"] for row in history if "loss" in row]
