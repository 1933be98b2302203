"""Train an Eso-LM on preferences, without rollouts: DPO with exact likelihoods, on TRL's trainer.

python examples/run_dpo.py --model outputs/tuned --train_file pairs.jsonl --output_dir outputs/preferred

A line of the file is {"prompt": ..., "chosen": ..., "rejected": ...}: texts, or the messages of a chat. Both answers
of a pair are scored under the same order of generation, of `--alpha_0` if it is given. All arguments of TRL's
DPOConfig work, and a run that was killed goes on as in run_pretraining.py.
"""

from dataclasses import dataclass, field

import torch
from adapters import AdapterArguments, lora_config
from resumable_runs import PostTrainingDefaults, Report, checkpoint_to_go_on_from, train_or_go_on
from text_data import load_lines, with_special_tokens
from transformers import AutoModelForMaskedLM, AutoTokenizer, HfArgumentParser, set_seed
from trl import DPOConfig

from eso_lm.training_dpo import EsoDPOTrainer

FIELDS = ("prompt", "chosen", "rejected")


@dataclass
class Arguments(AdapterArguments):
    """What to train, and on what."""

    model: str = field(metadata={"help": "name or folder of the Eso-LM to begin with"})
    train_file: str = field(metadata={"help": "JSONL of prompts, each with a preferred and another answer"})
    held_out_file: str | None = field(default=None, metadata={"help": "the same, for evaluation (`eval_strategy`)"})
    alpha_0: float | None = field(default=None, metadata={"help": "of the orders; unset: the model's own"})


@dataclass
class PreferenceArguments(PostTrainingDefaults, DPOConfig):
    """TRL's DPOConfig with defaults that suit a recipe; every one may be set."""


def main(arguments: Arguments, training: PreferenceArguments) -> None:
    checkpoint = checkpoint_to_go_on_from(training, arguments)
    set_seed(training.seed)
    files = (arguments.train_file, arguments.held_out_file)
    data, held_out = (None if name is None else load_lines(name, FIELDS).select_columns(FIELDS) for name in files)
    trainer = EsoDPOTrainer(
        AutoModelForMaskedLM.from_pretrained(arguments.model),
        None,
        training,
        train_dataset=data,
        eval_dataset=held_out,
        processing_class=with_special_tokens(AutoTokenizer.from_pretrained(arguments.model)),
        peft_config=lora_config(arguments),
        alpha_0=arguments.alpha_0,
    )
    trainer.add_callback(Report({"loss": "training loss", "eval_loss": "held-out loss"}, "loss of a pair (nats)"))
    train_or_go_on(trainer, checkpoint)
    trainer.save_model()


def parse_args(arguments: list[str] | None = None) -> tuple[Arguments, PreferenceArguments]:
    parser = HfArgumentParser((Arguments, PreferenceArguments), description=__doc__)
    return parser.parse_args_into_dataclasses(arguments)


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    main(*parse_args())
