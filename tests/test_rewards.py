"""Rewards: what their functions get, and what becomes of those that fail."""

import functools
import math

import pytest
import torch
from policies import (
    arguments,
    length_reward,
    make_trainer,
    rolled_out,
)
from tiny_models import backbone_config
from transformers import (
    LlamaForSequenceClassification,
)

from eso_lm.training_grpo import EsoGRPOTrainer
from eso_lm.training_rewards import checked_reward


def raises(completions, **columns):
    raise KeyError("answer")


def returns_nan(completions, **columns):
    return [1.0] * (len(completions) - 1) + [math.nan]


def test_what_a_reward_gets(policy, tmp_path):
    model, tokenizer, data = policy
    calls = []

    def reward(prompts, completions, completion_ids, texts, number, **columns):
        calls.append((prompts, completions, completion_ids, texts, number))
        return [1.0] * len(prompts)

    data = data.add_column("number", [10, 11, 12, 13])
    trainer = make_trainer((model, tokenizer, data), tmp_path, reward, max_completion_length=5)
    rolled_out(trainer)
    for prompt, completion, ids, text, number in zip(*calls[0], strict=True):
        first = prompt.index(tokenizer.mask_token) if tokenizer.mask_token in prompt else len(prompt)
        assert text == prompt[:first] + completion
        assert completion == tokenizer.decode(ids, skip_special_tokens=True)
        holes = prompt.count(tokenizer.mask_token)
        behind = tokenizer(prompt[first:])["input_ids"]
        assert len(ids) <= 5 + len(behind)
        assert holes == 0 or len(ids) >= len(behind)
        if holes:  # what is given behind a hole stays
            assert completion.startswith(prompt[first:].rsplit(tokenizer.mask_token, 1)[1], completion.find(" the"))
        assert prompt == data["prompt"][number - 10]


@pytest.mark.parametrize(("reward", "message"), [
    (raises, r"reward function 'raises' failed with KeyError: 'answer'; on 4 completions, the first of the prompt"),
    (returns_nan, r"'returns_nan' returned nan, which is no finite number \(nor None\), for the completion '.*' of"),
    (lambda completions, **columns: [math.inf] * len(completions), r"'<lambda>' returned inf"),
    (lambda completions, **columns: ["good"] * len(completions), r"returned 'good', which is no finite number"),
    (lambda completions, **columns: [1.0], r"returned 1 rewards of 4 completions"),
    (lambda completions, **columns: 1.0, r"must return a list of numbers, or None, got 1.0"),
    (lambda completions, **columns: {"a": 1.0}, r"must return a list of numbers, or None, got {'a': 1.0}"),
    (lambda completions, **columns: [1e300] * len(completions), r"returned 1e\+300, which is no finite number"),
    (functools.partial(raises, threshold=1), r"reward function 'raises' failed"),
])  # fmt: skip
def test_rewards_that_fail_say_where(policy, tmp_path, reward, message):
    trainer = make_trainer(policy, tmp_path, reward)
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_rewards_may_be_none_tensors_or_asynchronous(policy, tmp_path):
    async def later(completions, **columns):
        return [2.0] * len(completions)

    async def late_and_wrong(completions, **columns):
        return [math.nan] * len(completions)

    def sometimes(completions, **columns):
        return [None, *torch.ones(len(completions) - 1)]

    trainer = make_trainer(policy, tmp_path, [later, sometimes])
    trainer.train()
    assert trainer.state.log_history[0]["rewards/later/mean"] == 2
    assert trainer.state.log_history[0]["rewards/sometimes/mean"] == 1

    async def late_and_broken(completions, **columns):
        raise KeyError("answer")

    with pytest.raises(ValueError, match="The reward function 'late_and_broken' failed with KeyError: 'answer'"):
        make_trainer(policy, tmp_path, late_and_broken).train()
    with pytest.raises(ValueError, match="'late_and_wrong' returned nan"):
        make_trainer(policy, tmp_path, late_and_wrong).train()


def test_reward_models_judge_completions_and_their_failures_are_told(policy, tmp_path):
    model, tokenizer, data = policy
    config = backbone_config("llama", vocab_size=len(tokenizer), num_labels=1, pad_token_id=tokenizer.pad_token_id)
    judge = LlamaForSequenceClassification(config)
    judge.config._name_or_path = "tests/judge"

    def trainer_of(data):
        return EsoGRPOTrainer(
            model, judge, arguments(tmp_path), train_dataset=data, processing_class=tokenizer,
            reward_processing_classes=tokenizer,
        )  # fmt: skip

    trainer_of(data.select([0, 2])).train()
    with pytest.raises(ValueError, match="no text where the prompt has holes"):
        trainer_of(data.select([1])).train()
    torch.nn.init.constant_(judge.score.weight, math.nan)
    with pytest.raises(ValueError, match="The reward 'judge' is nan, which is no finite number"):
        trainer_of(data.select([0, 2])).train()


def test_a_checked_reward_keeps_its_name():
    class Judge:
        def __call__(self, completions, **columns):
            return [0.0] * len(completions)

    assert checked_reward(length_reward).__name__ == "length_reward"
    assert checked_reward(Judge()).__name__ == "Judge"
    assert checked_reward("some/model") == "some/model"
