"""Train a draft head for an Eso-LM that is trained already, so that more of what it drafts in parallel survives.

python examples/train_draft_head.py --model outputs/quickstart --dataset outputs/quickstart/train.jsonl \\
    --output_dir outputs/quickstart_draft

The model itself stays as it is, to the last digit: the head learns, of what the model says of text that it knows all
before, what it can tell from the masks of a draft and from the tokens beside each. A folder of PEFT's adapters is
merged first. All arguments of transformers' TrainingArguments work, and a run that was killed goes on from its last
whole checkpoint when it is started again. (To train a head from the start, beside the model:
`run_pretraining.py --draft_rank 128`.)
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from resumable_runs import NoiseByEpoch, Report, checkpoint_to_go_on_from, train_or_go_on
from text_data import TextArguments, load_documents, make_rows, with_special_tokens
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

from eso_lm import DataCollatorForDraftHead


@dataclass(kw_only=True)
class Arguments(TextArguments):
    """Which model, and on what text."""

    model: str = field(metadata={"help": "name or folder of an Eso-LM, or of adapters for one"})
    length: int | None = field(  # type: ignore[assignment]  # which the model's context fills in
        default=None, metadata={"help": "tokens of a row; unset: the model's context"}
    )
    held_out_rows: int = field(default=128, metadata={"help": "rows of the held-out documents that are evaluated"})
    draft_rank: int | None = field(
        default=None, metadata={"help": "width of the head; unset: 128, or that of the head which is there already"}
    )
    draft_length: int = field(default=8, metadata={"help": "tokens of a draft in training"})


@dataclass
class DraftHeadArguments(TrainingArguments):
    """transformers' TrainingArguments with usual defaults for a few small matrices."""

    max_steps: int = 500
    per_device_train_batch_size: int = 16
    learning_rate: float = 1e-2
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 20
    weight_decay: float = 0.01
    save_steps: float = 100
    save_total_limit: int | None = 2
    logging_steps: float = 20


def main(arguments: Arguments, training: DraftHeadArguments) -> None:
    checkpoint = checkpoint_to_go_on_from(training, arguments)
    set_seed(training.seed)
    tokenizer = with_special_tokens(AutoTokenizer.from_pretrained(arguments.model))
    model = load_model(arguments)
    if arguments.length is None:
        arguments = replace(arguments, length=model.config.max_position_embeddings)
    with training.main_process_first(desc="the rows"):
        examples, rows = make_rows(*load_documents(arguments), tokenizer, arguments)
    collator = DataCollatorForDraftHead(tokenizer, config=model.config, draft_length=arguments.draft_length)
    trainer = Trainer(model, training, data_collator=collator, train_dataset=rows, processing_class=tokenizer)
    trainer.add_callback(NoiseByEpoch(collator, training.seed))
    trainer.add_callback(Report())
    # With a seed the drafts depend on the batch alone: both evaluations see the same ones.
    evaluator = Trainer(model, training, data_collator=replace(collator, seed=0), eval_dataset=examples)
    before = evaluator.evaluate()["eval_loss"] if examples else None
    train_or_go_on(trainer, checkpoint)
    after = evaluator.evaluate()["eval_loss"] if examples else None
    trainer.save_model()
    if examples and trainer.is_world_process_zero():
        print(
            f"Held-out drafts differ from what the model says by {before:.3f} nats per token before training, "
            f"{after:.3f} after."
        )


def load_model(arguments: Arguments) -> PreTrainedModel:
    """The model with a draft head, which alone is to be trained; adapters are merged into it."""
    adapters = (Path(arguments.model) / "adapter_config.json").exists()
    name = arguments.model
    if adapters:
        from peft import PeftConfig, PeftModel

        name = PeftConfig.from_pretrained(arguments.model).base_model_name_or_path
    # Without a rank that is asked for, a head that is there keeps its own.
    options = {} if arguments.draft_rank is None else {"draft_rank": arguments.draft_rank}
    model = AutoModelForMaskedLM.from_pretrained(name, dtype="float32", **options)
    if model.draft_head is None:
        model = AutoModelForMaskedLM.from_pretrained(name, dtype="float32", draft_rank=128)
    if adapters:
        model = PeftModel.from_pretrained(model, arguments.model).merge_and_unload()
    model.requires_grad_(False)
    model.draft_head.requires_grad_(True)
    return model


def parse_args(arguments: list[str] | None = None) -> tuple[Arguments, DraftHeadArguments]:
    parser = HfArgumentParser((Arguments, DraftHeadArguments), description=__doc__)
    return parser.parse_args_into_dataclasses(arguments)


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    main(*parse_args())
