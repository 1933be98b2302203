"""Train an Eso-LM by reinforcement: GRPO with the exact likelihood of its trajectories, on TRL's trainer.

python examples/run_grpo.py --model outputs/tuned --train_file prompts.jsonl --reward rewards.py:is_polite \\
    --max_completion_length 64 --num_diffusion_steps 16 --output_dir outputs/polite

A line of the file is {"prompt": ..., ...}, a text or the messages of a chat; what else it holds goes to the reward
functions by name. Prompts may have holes, `<mask:3>`, which are filled in; with `--max_completion_length 0` nothing
else is written. A reward is a function of examples/reasoning_tasks.py, by name, or of any file, `file.py:function`; of
several, `--reward_weights` says what each counts. All arguments of TRL's GRPOConfig work, and a run that was killed
goes on as in run_pretraining.py.
"""

import math
import runpy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from adapters import AdapterArguments, lora_config
from datasets import Dataset
from holes import fill_in_masks
from reasoning_tasks import REWARDS
from resumable_runs import PostTrainingDefaults, Report, checkpoint_to_go_on_from, train_or_go_on
from text_data import load_lines, with_special_tokens
from transformers import AutoModelForMaskedLM, AutoTokenizer, HfArgumentParser, PreTrainedTokenizerBase, set_seed
from trl import GRPOConfig

from eso_lm.training_grpo import EsoGRPOTrainer

ROLLOUT_SETTINGS = ("alpha_0", "num_diffusion_steps", "unmasking_order", "block_length", "lossless")


@dataclass
class Arguments(AdapterArguments):
    """What to train, on what, and for what."""

    model: str = field(metadata={"help": "name or folder of the Eso-LM to begin with"})
    train_file: str = field(metadata={"help": "JSONL of prompts, and what the rewards need to know"})
    reward: str = field(metadata={"help": f"of {sorted(REWARDS)}, or file.py:function; several with commas between"})
    held_out_file: str | None = field(default=None, metadata={"help": "the same as `train_file`, for evaluation"})
    begin_of_text: bool = field(
        default=False, metadata={"help": "prompts begin a document, as the rows of run_pretraining.py do"}
    )

    alpha_0: float | None = field(default=None, metadata={"help": "of the rollouts; unset: the model's own"})
    num_diffusion_steps: int | None = field(default=None, metadata={"help": "of the rollouts; unset: one a token"})
    unmasking_order: str | None = field(default=None, metadata={"help": "random, strided or left_to_right"})
    block_length: int | None = field(default=None, metadata={"help": "of blocks that are written left to right"})
    lossless: bool = field(default=False, metadata={"help": "rollouts as if written one token a forward, in fewer"})


@dataclass
class ReinforcementArguments(PostTrainingDefaults, GRPOConfig):
    """TRL's GRPOConfig with defaults that suit a recipe; every one may be set."""

    max_completion_length: int | None = field(
        default=64, metadata={"help": "tokens after a prompt; 0: only its holes are filled in"}
    )


def main(
    arguments: Arguments, training: ReinforcementArguments, trainer_class: type[EsoGRPOTrainer] = EsoGRPOTrainer
) -> None:
    rewards = [load_reward(name) for name in arguments.reward.split(",")]
    if training.generation_kwargs:
        raise ValueError(f"`generation_kwargs` is made of the arguments {ROLLOUT_SETTINGS}: set those.")
    check_window(training)
    checkpoint = checkpoint_to_go_on_from(training, arguments)
    set_seed(training.seed)
    settings = {name: getattr(arguments, name) for name in ROLLOUT_SETTINGS}
    training.generation_kwargs = {name: value for name, value in settings.items() if value not in (None, False)}
    tokenizer = with_special_tokens(AutoTokenizer.from_pretrained(arguments.model))
    model = AutoModelForMaskedLM.from_pretrained(arguments.model)
    files = (arguments.train_file, arguments.held_out_file)
    data, held_out = (
        None if name is None else load_prompts(name, tokenizer, arguments.begin_of_text) for name in files
    )
    trainer = trainer_class(
        model,
        rewards,
        training,
        train_dataset=data,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=lora_config(arguments),
    )
    trainer.add_callback(Report({"reward": "rollouts", "eval_reward": "held-out"}, "reward", "reward.png"))
    train_or_go_on(trainer, checkpoint)
    trainer.save_model()


def check_window(training: GRPOConfig) -> None:
    """Raises a ValueError where checkpoints fall between two steps on the same rollouts, which are not saved."""
    window = training.steps_per_generation * training.num_iterations
    if training.save_strategy == "steps" and training.save_steps * training.gradient_accumulation_steps % window != 0:
        steps = math.lcm(window, training.gradient_accumulation_steps) // training.gradient_accumulation_steps
        raise ValueError(
            f"`save_steps` must be a multiple of {steps}, the steps on the same rollouts, got {training.save_steps}: "
            f"a killed run would not go on as if nothing had happened."
        )


def load_reward(name: str) -> Callable:
    """A reward function of this folder, or of a file.

    Raises:
        ValueError: when there is none of this name.
    """
    if ":" not in name:
        if name not in REWARDS:
            raise ValueError(f"`reward` must be of {sorted(REWARDS)}, or file.py:function, got {name!r}.")
        return REWARDS[name]
    file, function = name.rsplit(":", 1)
    if not Path(file).is_file():
        raise ValueError(f"There is no file {file}, of `reward={name}`.")
    found = runpy.run_path(file).get(function)
    if not callable(found):
        raise ValueError(f"{file} must hold a function {function!r}, of `reward={name}`.")
    return found


def load_prompts(name: str, tokenizer: PreTrainedTokenizerBase, begin_of_text: bool) -> Dataset:
    """Reads a JSONL file of prompts, with masks at their holes.

    Raises:
        ValueError: for a file that is not there, that holds no prompts, and for chats without a chat template.
    """
    data = load_lines(name, ("prompt",))
    begin = (tokenizer.bos_token or tokenizer.eos_token) if begin_of_text else ""

    def to_prompt(row: dict[str, Any], index: int) -> dict[str, Any]:
        prompt = row["prompt"]
        if isinstance(prompt, list) and tokenizer.chat_template is None:
            raise ValueError(f"{name} holds chats, and the tokenizer has no chat template: set its `chat_template`.")
        if prompt == []:
            raise ValueError(f"Line {index + 1} of {name} has no messages.")
        return {"prompt": begin + fill_in_masks(prompt, tokenizer.mask_token) if isinstance(prompt, str) else prompt}

    return data.map(to_prompt, with_indices=True, desc="Prompts")


def parse_args(arguments: list[str] | None = None) -> tuple[Arguments, ReinforcementArguments]:
    parser = HfArgumentParser((Arguments, ReinforcementArguments), description=__doc__)
    return parser.parse_args_into_dataclasses(arguments)


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    main(*parse_args())
