"""Pretrain an Eso-LM with the plain Trainer, on any text.

python examples/run_pretraining.py --dataset python --preset tiny --length 128 --alpha_0 0.25 --max_steps 1000 \\
    --per_device_train_batch_size 16 --learning_rate 1e-3 --output_dir outputs/tiny
accelerate launch --config_file examples/accelerate_configs/ddp.yaml examples/run_pretraining.py ...

All arguments of transformers' TrainingArguments work. A run that was killed goes on from its last whole checkpoint
when it is started again, with the same data order, noise, optimiser, averages and random states. docs/scaling-out.md
has the settings of the paper.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from resumable_runs import NoiseByEpoch, Report, checkpoint_to_go_on_from, train_or_go_on
from text_data import (
    LAYOUTS,
    AnyDataset,
    TextArguments,
    load_documents,
    make_rows,
    train_tokenizer,
    vocabulary_of,
    with_special_tokens,
)
from transformers import AutoTokenizer, HfArgumentParser, PreTrainedTokenizerBase, Trainer, TrainingArguments, set_seed

from eso_lm import (
    DataCollatorForHybridMaskedDiffusion,
    EsoConfig,
    EsoForMaskedDiffusion,
    ExponentialMovingAverageCallback,
    HeldOutEvaluationCallback,
)

PRESETS = {  # small: the paper's
    "tiny": {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4},
    "small": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "medium": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
}


@dataclass(kw_only=True)
class Arguments(TextArguments):
    """What to train, and on what."""

    tokenizer: str | None = field(default=None, metadata={"help": "name or folder; unset: train one on the texts"})
    vocab_size: int = field(default=2048, metadata={"help": "of a tokenizer that is trained"})
    preset: str = field(default="small", metadata={"help": f"size: one of {tuple(PRESETS)}"})
    config: str | None = field(default=None, metadata={"help": "folder or file of an EsoConfig, in place of a preset"})
    init_from: str | None = field(default=None, metadata={"help": "Eso-LM to go on from, say at another alpha_0"})
    dropout: float = 0.1
    draft_rank: int | None = field(
        default=None, metadata={"help": "width of a draft head that is trained beside the model; unset: none"}
    )

    alpha_0: float | None = field(
        default=None, metadata={"help": "1: masked diffusion, 0: left to right; unset: 1, or that of `init_from`"}
    )
    diffusion_fraction: float | None = field(
        default=None, metadata={"help": "of the rows; unset: 0.5, or all or none"}
    )
    loss_type: str = field(default="elbo", metadata={"help": "'elbo', or 'low_var' at alpha_0 = 1"})
    ema_decay: float = field(default=0.9999, metadata={"help": "of the averaged weights; 0: none are kept"})
    evaluate_every: int = field(default=1000, metadata={"help": "optimiser steps between held-out evaluations"})
    num_samples: int = field(default=2, metadata={"help": "texts sampled at each of them"})


@dataclass
class PretrainingArguments(TrainingArguments):
    """transformers' TrainingArguments with the defaults of the paper; every one may be set."""

    learning_rate: float = 3e-4
    lr_scheduler_type: str = "constant_with_warmup"
    warmup_steps: float = 2500
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    adam_beta2: float = 0.999
    save_steps: float = 1000
    save_total_limit: int | None = 3
    logging_steps: float = 50


def main(arguments: Arguments, training: PretrainingArguments) -> None:
    check(arguments, training)
    checkpoint = checkpoint_to_go_on_from(training, arguments)
    set_seed(training.seed)
    with training.main_process_first(desc="the tokenizer and the rows"):
        held_out, texts = load_documents(arguments)
        tokenizer = prepare_tokenizer(arguments, texts)
        examples, rows = make_rows(held_out, texts, tokenizer, arguments)
    if held_out is not None and arguments.held_out_rows > 0 and not examples:
        raise ValueError(
            f"The held-out documents are too short for rows of `length={arguments.length}` tokens: hold out more "
            f"documents (`held_out_documents`), or none."
        )

    model = make_model(arguments, tokenizer)
    collator = DataCollatorForHybridMaskedDiffusion(
        tokenizer,
        alpha_0=model.config.alpha_0,
        diffusion_fraction=arguments.diffusion_fraction,
        loss_type=arguments.loss_type,
        draft_length=None if model.draft_head is None else 8,
    )
    trainer = Trainer(model, training, data_collator=collator, train_dataset=rows, processing_class=tokenizer)
    trainer.add_callback(NoiseByEpoch(collator, training.seed))
    average = None
    if arguments.ema_decay > 0:
        average = ExponentialMovingAverageCallback(trainer, arguments.ema_decay, resume_from=checkpoint)
        trainer.add_callback(average)
    if examples:
        trainer.add_callback(
            HeldOutEvaluationCallback(
                trainer,
                examples,
                every=arguments.evaluate_every,
                tokenizer=tokenizer if arguments.num_samples else None,
                num_samples=max(arguments.num_samples, 1),
                generation_settings={"max_new_tokens": min(arguments.length, 128)},
                average=average,
            )
        )
    trainer.add_callback(Report())

    if trainer.is_world_process_zero():
        print(f"{model.num_parameters():,} parameters")
    train_or_go_on(trainer, checkpoint)
    trainer.save_model()
    if average is not None:
        average.save(Path(training.output_dir) / average.folder)


def check(arguments: Arguments, training: TrainingArguments) -> None:
    """Raises a ValueError for settings that would waste a run."""
    if arguments.preset not in PRESETS:
        raise ValueError(f"`preset` must be one of {tuple(PRESETS)}, got {arguments.preset!r}.")
    if arguments.layout not in LAYOUTS:
        raise ValueError(f"`layout` must be one of {LAYOUTS}, got {arguments.layout!r}.")
    if arguments.length < 4:
        raise ValueError(f"`length` must be at least 4 tokens, got {arguments.length}.")
    if arguments.evaluate_every < 1:
        raise ValueError(f"`evaluate_every` must be a number of steps, got {arguments.evaluate_every}.")
    if arguments.config is not None and not Path(arguments.config).exists():
        raise ValueError(f"`config` must be the folder or file of an EsoConfig, there is no {arguments.config}.")
    if arguments.streaming and training.max_steps <= 0:
        raise ValueError("`max_steps` must be set for streamed texts, whose number is not known.")


def prepare_tokenizer(arguments: Arguments, texts: AnyDataset) -> PreTrainedTokenizerBase:
    """Loads the tokenizer, that of the model to go on from if no other is named, or trains one on the texts."""
    name = arguments.tokenizer or arguments.init_from
    if name is not None:
        return with_special_tokens(AutoTokenizer.from_pretrained(name))
    sample = [row["text"] for row in texts.take(20000)]
    return train_tokenizer(sample, arguments.vocab_size, arguments.length)


def make_model(arguments: Arguments, tokenizer: PreTrainedTokenizerBase) -> EsoForMaskedDiffusion:
    """A new model of the size asked for, or one to go on from, with the tokenizer's vocabulary and special tokens."""
    if arguments.init_from is not None:
        settings = {"alpha_0": arguments.alpha_0, "draft_rank": arguments.draft_rank}
        options = {name: value for name, value in settings.items() if value is not None}
        model = EsoForMaskedDiffusion.from_pretrained(arguments.init_from, dtype="float32", **options)
        if model.config.mask_token_id != tokenizer.mask_token_id:
            raise ValueError(
                f"The mask of the model is {model.config.mask_token_id}, that of the tokenizer "
                f"{tokenizer.mask_token_id}: pass the tokenizer that the model was trained with."
            )
        return model
    common = vocabulary_of(tokenizer) | {
        "alpha_0": 1.0 if arguments.alpha_0 is None else arguments.alpha_0,
        "draft_rank": arguments.draft_rank,
    }
    if arguments.config is not None:
        config = EsoConfig.from_pretrained(arguments.config, **common)
        config.max_position_embeddings = max(config.max_position_embeddings, arguments.length)
    else:
        config = EsoConfig(
            **PRESETS[arguments.preset],
            **common,
            max_position_embeddings=arguments.length,
            hidden_dropout=arguments.dropout,
        )
    return EsoForMaskedDiffusion(config)


def parse_args(arguments: list[str] | None = None) -> tuple[Arguments, PretrainingArguments]:
    parser = HfArgumentParser((Arguments, PretrainingArguments), description=__doc__)
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) == 1 and arguments[0].endswith((".json", ".yaml", ".yml")):
        return (parser.parse_json_file if arguments[0].endswith(".json") else parser.parse_yaml_file)(arguments[0])
    return parser.parse_args_into_dataclasses(arguments)


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    main(*parse_args())
