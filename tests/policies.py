"""Policies to train by reinforcement, and what tests ask of a trainer."""

import math

from recipe_runs import QUICK_POST_TRAINING
from tiny_models import randomized_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import GRPOConfig

from eso_lm.training_grpo import EsoGRPOTrainer, Rollouts

END = 2  # the third token of the tiny language ends a text
MODES = {
    "parallel": {"alpha_0": 1.0, "num_diffusion_steps": 3},
    "one a forward": {"alpha_0": 0.5, "num_diffusion_steps": "max"},
    "blocks": {"alpha_0": 0.6, "num_diffusion_steps": 4, "block_length": 4},
    "left to right": {"alpha_0": 0.0},
    "lossless": {"alpha_0": 0.5, "lossless": True, "draft_length": 4},
}


def tiny_language(**settings):
    """A model of 3 tokens and a mask, and its tokenizer."""
    vocabulary = {"a": 0, "b": 1, "c": END, "m": 3}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    settings = {"vocab_size": 4, "scale": 0.15, "eos_token_id": END, "pad_token_id": END} | settings
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="c", pad_token="c", mask_token="m")
    return randomized_model(**settings), wrapped


def reward_of_text(ids):
    """An arbitrary reward of a text up to its end."""
    text = ids[: ids.index(END) + 1] if END in ids else ids
    return math.sin(5 * sum((token + 1) * 4**place for place, token in enumerate(text))) + (text[0] == 1)


def table_reward(completion_ids, **columns):
    return [reward_of_text(ids) for ids in completion_ids]


def arguments(folder, **settings):
    rollouts = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 8}
    return GRPOConfig(str(folder), **QUICK_POST_TRAINING | rollouts | {"learning_rate": 1e-3} | settings)


def length_reward(completions, **columns):
    return [float(len(completion)) for completion in completions]


def make_trainer(policy, folder, reward=length_reward, peft_config=None, **settings):
    model, tokenizer, data = policy
    return EsoGRPOTrainer(
        model,
        reward,
        arguments(folder, **settings),
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def rolled_out(trainer, rows=None):
    """A batch of rollouts, as a training step gets it, and the log-probabilities that the policy gives it now."""
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    rows = rows or [row for row in trainer.train_dataset for _ in range(4)]
    batch = trainer._generate_and_score_completions(rows)
    trainer._rollouts = Rollouts(batch["completion_ids"], batch["orders"], batch["groups"], batch["is_real"])
    log_probs, entropies, _ = trainer._get_per_token_logps_and_entropies(
        trainer.model, None, None, None, compute_entropy=True
    )
    return batch, log_probs, entropies
