"""Make an Eso-LM out of a causal language model of transformers: Llama, Qwen, GPT-2, ...

python examples/adapt_causal_lm.py --model gpt2 --dataset my_texts --length 256 --alpha_0 0.25 --max_steps 2000 \\
    --output_dir outputs/eso-gpt2
python examples/adapt_causal_lm.py --model Qwen/Qwen3-0.6B --dataset my_texts --length 256 --lora_rank 32 ...

A causal model predicts the next token, an Eso-LM the one at the slot: the first steps teach it that. `--anneal` is the
share of the steps in which alpha_0 grows from 0, where the order is the causal model's own, to its target (as order
annealing does in DiffuLLaMA and Dream); 0 trains at the target from the start. All arguments of transformers'
TrainingArguments work, and a run that was killed goes on as in run_pretraining.py.
"""

from dataclasses import dataclass, field, replace

import torch
from resumable_runs import NoiseByEpoch, Report, checkpoint_to_go_on_from, train_or_go_on
from text_data import TextArguments, load_documents, make_rows, with_special_tokens
from transformers import (
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from eso_lm import DataCollatorForHybridMaskedDiffusion, EsoForMaskedDiffusion, HeldOutEvaluationCallback


@dataclass(kw_only=True)
class Arguments(TextArguments):
    """What to adapt, how, and on what."""

    model: str = field(metadata={"help": "name or folder of the causal language model"})
    length: int = field(default=256, metadata={"help": "tokens of a row"})
    held_out_rows: int = field(default=128, metadata={"help": "rows of the held-out documents that are evaluated"})
    evaluate_every: int = field(default=200, metadata={"help": "optimiser steps between held-out evaluations"})

    alpha_0: float = field(default=0.25, metadata={"help": "the target; 1: masked diffusion, 0: left to right"})
    anneal: float = field(default=0.5, metadata={"help": "share of the steps in which alpha_0 grows to it; 0: none"})
    lora_rank: int | None = field(default=None, metadata={"help": "train LoRA adapters of this rank; unset: all"})
    merge: bool = field(default=True, metadata={"help": "save the model with the adapters merged into it"})


@dataclass
class AdaptationArguments(TrainingArguments):
    """transformers' TrainingArguments with usual defaults for going on from trained weights."""

    learning_rate: float = 3e-4
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 50
    save_steps: float = 500
    save_total_limit: int | None = 3
    logging_steps: float = 20


class AnnealedCollator(TrainerCallback):
    """A collator whose alpha_0 grows linearly from 0 to that of `collator` in the first share of the steps.

    Args:
        collator: With the target.
        share: Of the steps, in [0, 1]; 0: none.
    """

    def __init__(self, collator: DataCollatorForHybridMaskedDiffusion, share: float):
        if not 0 <= share <= 1:
            raise ValueError(f"`anneal` must be a share of the steps, in [0, 1], got {share}.")
        self.collator, self.share = collator, share
        self.progress = 0.0 if share > 0 else 1.0

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        alpha_0 = self.collator.alpha_0 * self.progress
        return replace(self.collator, alpha_0=alpha_0, diffusion_fraction=None)(examples)

    def on_step_begin(self, args, state, control, **kwargs):
        if self.share > 0:
            self.progress = min(1.0, state.global_step / (self.share * state.max_steps))


def main(arguments: Arguments, training: AdaptationArguments) -> None:
    if arguments.anneal > 0 and training.dataloader_num_workers > 0:
        raise ValueError(
            "`anneal` changes the noise from step to step, which `dataloader_num_workers` would not see: set it to 0."
        )
    checkpoint = checkpoint_to_go_on_from(training, arguments)
    set_seed(training.seed)
    tokenizer = with_special_tokens(AutoTokenizer.from_pretrained(arguments.model))
    model = load_model(arguments, tokenizer)
    with training.main_process_first(desc="the rows"):
        examples, rows = make_rows(*load_documents(arguments), tokenizer, arguments)
    collator = DataCollatorForHybridMaskedDiffusion(tokenizer, alpha_0=arguments.alpha_0)
    annealed = AnnealedCollator(collator, arguments.anneal)
    trainer = Trainer(model, training, data_collator=annealed, train_dataset=rows, processing_class=tokenizer)
    trainer.add_callback(annealed)
    trainer.add_callback(NoiseByEpoch(collator, training.seed))
    if examples:
        trainer.add_callback(HeldOutEvaluationCallback(trainer, examples, every=arguments.evaluate_every))
    trainer.add_callback(Report())
    train_or_go_on(trainer, checkpoint)
    if arguments.lora_rank is not None and arguments.merge:
        trainer.model = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
    trainer.save_model()


def load_model(arguments: Arguments, tokenizer: PreTrainedTokenizerBase) -> torch.nn.Module:
    """The causal model as an Eso-LM, whose vocabulary holds the tokenizer's mask; with adapters, if asked for.

    Raises:
        ValueError: when the learned positions of the model end before the rows do.
    """
    model = EsoForMaskedDiffusion.from_causal_lm(
        arguments.model, mask_token_id=tokenizer.mask_token_id, alpha_0=arguments.alpha_0, dtype="float32"
    )
    for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
        token_id = getattr(tokenizer, name)
        if getattr(model.config, name) is None and token_id is not None:
            setattr(model.config, name, token_id)
            setattr(model.generation_config, name, token_id)
    model.config.validate_architecture()
    if model.max_text_length is not None and arguments.length > model.max_text_length:
        raise ValueError(f"`length` must be at most {model.max_text_length} for this model, got {arguments.length}.")
    if arguments.lora_rank is None:
        return model
    from peft import LoraConfig, get_peft_model

    # The mask is new to the model: its embedding has to be learned too.
    lora = LoraConfig(
        r=arguments.lora_rank,
        lora_alpha=2 * arguments.lora_rank,
        target_modules="all-linear",
        trainable_token_indices=[model.config.mask_token_id],
    )
    return get_peft_model(model, lora)


def parse_args(arguments: list[str] | None = None) -> tuple[Arguments, AdaptationArguments]:
    parser = HfArgumentParser((Arguments, AdaptationArguments), description=__doc__)
    return parser.parse_args_into_dataclasses(arguments)


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    main(*parse_args())
