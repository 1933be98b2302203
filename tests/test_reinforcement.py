"""GRPO on the exact likelihood of trajectories: the gradient is that of the expected reward, and TRL does the rest."""

import copy
import functools
import itertools
import json
import math

import pytest
import torch
from datasets import Dataset
from holes import fill_in_masks
from peft import LoraConfig
from recipe_runs import QUICK_POST_TRAINING
from tiny_models import backbone_config, random_batch, randomized_model, save_with_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl import GRPOConfig, GRPOTrainer

import eso_lm.evaluation_trajectories
from eso_lm import trajectory_log_probs
from eso_lm.training_grpo import EsoGRPOTrainer, Rollouts, checked_reward

MASK = 23
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model, with dropout, and its tokenizer."""
    folder = tmp_path_factory.mktemp("policy")
    save_with_tokenizer(folder, hidden_dropout=0.3)
    return folder


@pytest.fixture
def policy(folder):
    """The model, its tokenizer from the folder, and prompts: with holes, without, of different lengths."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = ["The quick", "jumps <mask:3> the dog", "lazy", "<mask:2>fox<mask:1> the quick brown"]
    data = Dataset.from_dict({"prompt": [fill_in_masks(prompt, tokenizer.mask_token) for prompt in prompts]})
    return AutoModel.from_pretrained(folder), tokenizer, data


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


# The gradient of the expected reward, by enumeration.


def plans_of_three(alpha_0, epsilon=1e-3):
    """Orders and sizes of groups of 3 tokens in 2 time steps, with their probabilities, from the schedule alone."""

    def keep(time):
        return alpha_0 * (1 - (1 - epsilon) * time)

    def revealed(count, total, later, earlier):
        share = (keep(earlier) - keep(later)) / (1 - keep(later)) if alpha_0 < 1 or earlier > 0 else 1.0
        return math.comb(total, count) * share**count * (1 - share) ** (total - count)

    for first in range(4):
        for second in range(4 - first):
            probability = revealed(first, 3, 1.0, 0.5) * revealed(second, 3 - first, 0.5, 0.0)
            if probability == 0:
                continue
            sizes = [size for size in (first, second) if size] + [1] * (3 - first - second)
            chosen = list(itertools.permutations(range(3), first + second))
            for diffused in chosen:
                rest = [place for place in range(3) if place not in diffused]
                yield [*diffused, *rest], sizes, probability / len(chosen)


def log_probs_by_hand(model, texts, order, sizes):
    """log p of every text (texts, 3) behind a given token 0, under a plan: a forward for each group, in one stream."""
    total, decided = torch.zeros(len(texts)), []
    for size in sizes:
        group = order[len(decided) : len(decided) + size]
        given = torch.cat([torch.zeros(len(texts), 1, dtype=torch.long), texts[:, decided]], dim=1)
        ids = torch.cat([given, torch.full((len(texts), size), 3)], dim=1)
        positions = torch.tensor([0, *[place + 1 for place in [*decided, *group]]])
        logits = model(input_ids=ids, position_ids=positions.expand(len(texts), -1)).logits[:, -size:]
        total = total + logits.log_softmax(dim=-1).gather(-1, texts[:, group, None])[..., 0].sum(dim=-1)
        decided += group
    return total


def gradient_by_enumeration(model, alpha_0):
    """Of the expected reward of all texts, under all plans."""
    texts = torch.tensor(list(itertools.product(range(3), repeat=3)))
    rewards = torch.tensor([reward_of_text(text) for text in texts.tolist()])
    plans = list(plans_of_three(alpha_0))
    assert sum(probability for *_, probability in plans) == pytest.approx(1)
    expected = torch.zeros(())
    for order, sizes, probability in plans:
        likelihood = log_probs_by_hand(model, texts, order, sizes).exp()
        assert likelihood.sum().item() == pytest.approx(1, abs=1e-5)
        expected = expected + probability * (likelihood * rewards).sum()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(expected, weights)])


class GradientCollector(TrainerCallback):
    def __init__(self):
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append(torch.cat([weight.grad.flatten().clone() for weight in model.parameters()]))


def standard_errors_off(folder, alpha_0, trainer_class=EsoGRPOTrainer, steps=30):
    """How far the trainer's gradient is from the enumerated one, in random directions, in standard errors."""
    model, tokenizer = tiny_language(alpha_0=alpha_0)
    exact = gradient_by_enumeration(model, alpha_0)
    generations, collector = 64, GradientCollector()
    trainer = trainer_class(
        model,
        table_reward,
        arguments(
            folder,
            per_device_train_batch_size=512,
            num_generations=generations,
            max_completion_length=3,
            max_steps=steps,
            loss_type="dr_grpo",
            scale_rewards="none",
            max_grad_norm=0.0,
            learning_rate=0.0,
            logging_strategy="no",
            generation_kwargs={"num_diffusion_steps": 2, "unmasking_order": "random"},
        ),
        train_dataset=Dataset.from_dict({"prompt": ["a"] * 8}),
        processing_class=tokenizer,
        callbacks=[collector],
    )
    trainer.train()
    # The mean reward of a group holds each rollout's own; and the loss is divided by the number of tokens.
    drawn = torch.stack(collector.gradients).double() * -3 * generations / (generations - 1)
    directions = torch.randn(exact.numel(), 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found, right = drawn @ directions, exact.double() @ directions
    assert right.abs().mean() > 3 * found.std(dim=0).mean() / steps**0.5  # there is something to be seen
    return (found.mean(dim=0) - right) / (found.std(dim=0) / steps**0.5)


@pytest.mark.slow
@pytest.mark.parametrize("alpha_0", [1.0, 0.5, 0.0])
def test_the_gradient_is_that_of_the_expected_reward(tmp_path, alpha_0):
    deviations = standard_errors_off(tmp_path, alpha_0)
    assert deviations.abs().max() < 5
    assert deviations.pow(2).mean() < 2.5


@pytest.mark.slow
def test_with_a_broken_group_horizon_it_is_not(tmp_path, monkeypatch):
    states_at = eso_lm.evaluation_trajectories.states_at

    def without_groups(*inputs):
        return states_at(*inputs[:8], None)

    monkeypatch.setattr(eso_lm.evaluation_trajectories, "states_at", without_groups)
    assert standard_errors_off(tmp_path, 1.0).pow(2).mean() > 5


@pytest.mark.parametrize("alpha_0", [1.0, 0.5])
def test_trajectories_are_scored_as_group_by_group(alpha_0):
    model, _ = tiny_language(alpha_0=alpha_0)
    texts = torch.tensor(list(itertools.product(range(3), repeat=3)))
    trajectories = torch.cat([torch.zeros(27, 1, dtype=torch.long), texts], dim=1)
    for order, sizes, _ in plans_of_three(alpha_0):
        orders = torch.tensor([0, *[place + 1 for place in order]]).expand(27, -1)
        groups = [0, *[number for number, size in enumerate(sizes, 1) for _ in range(size)]]
        scored = trajectory_log_probs(model, trajectories, orders, torch.tensor(groups).expand(27, -1))
        expected = log_probs_by_hand(model, texts, order, sizes)
        torch.testing.assert_close(scored.log_probs.sum(dim=-1), expected, atol=1e-5, rtol=0)
        gradients = [
            torch.autograd.grad(total[5], list(model.model.parameters()), retain_graph=False)
            for total in (scored.log_probs.sum(dim=-1), expected)
        ]
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


# What `generate` has decided is what is scored.


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backbone", [None, "llama", "opt"])  # OPT has learned positions
def test_trajectories_have_the_log_probabilities_that_they_were_drawn_with(mode, backbone):
    model = randomized_model(**({} if backbone is None else {"backbone_config": backbone_config(backbone)}))
    prompts, mask = random_batch(model, 32, 4), torch.ones(32, 4, dtype=torch.long)
    prompts[3, 2] = prompts[9, 1] = MASK
    mask[:4, 0] = 0
    torch.manual_seed(0)
    output = model.generate(
        prompts, attention_mask=mask, max_new_tokens=9, eos_token_id=[5, 6], pad_token_id=0,
        return_dict_in_generate=True, **MODES[mode],
    )  # fmt: skip
    scored = trajectory_log_probs(model, output.trajectories, output.orders, output.groups, mask)
    is_written = output.unmasking_steps > 0
    torch.testing.assert_close(scored.log_probs[is_written], output.log_probs[is_written], atol=2e-5, rtol=1e-5)
    # Behind the end of a text stands what was decided there before: it is seen by the rest, and scored.
    is_decided = scored.log_probs != 0
    assert backbone == "opt" or (is_decided & ~is_written).any() == (mode != "left to right")
    assert not is_decided[output.trajectories == MASK].any()
    ended = (output.sequences != output.trajectories).any(dim=1)
    assert backbone == "opt" or ended.any()
    assert not ended.all()


def test_a_trajectory_that_has_not_ended_has_the_likelihood_of_the_sampler():
    model = randomized_model()
    output = model.generate(
        random_batch(model, 3, 2), max_new_tokens=8, num_diffusion_steps=3, eos_token_id=None,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert torch.equal(output.trajectories, output.sequences)
    plan = {"orders": output.orders[:, None], "groups": output.groups[:, None]}
    for temperature in (1.0, 0.7):
        expected = model.log_likelihood(
            output.sequences,
            context_mask=(output.unmasking_steps == 0).long(),
            temperature=temperature,
            num_diffusion_steps=3,
            **plan,
        )
        scored = trajectory_log_probs(
            model, output.trajectories, output.orders, output.groups, temperature=temperature
        )
        torch.testing.assert_close(scored.log_probs, expected.token_log_probs[:, 0], atol=1e-5, rtol=1e-5)
        is_drawn = output.unmasking_steps > 0
        assert torch.equal(scored.is_top1[is_drawn], expected.is_greedy[:, 0][is_drawn])


def test_entropies_and_the_rest_are_those_of_the_distributions():
    model = randomized_model()
    ids = random_batch(model, 2, 6)
    orders, groups = torch.arange(6).expand(2, -1), torch.tensor([0, 0, 1, 1, 1, 1]).expand(2, -1)
    scored = trajectory_log_probs(model, ids, orders, groups, temperature=0.6)
    masked = ids.clone()
    masked[:, 2:] = MASK
    logits = model(input_ids=masked, position_ids=orders).logits[:, 2:, :MASK] / 0.6
    probabilities = logits.softmax(dim=-1)
    expected = {
        "log_probs": probabilities.gather(-1, ids[:, 2:, None])[..., 0].log(),
        "entropy": torch.distributions.Categorical(probabilities).entropy(),
        "mean_logits": logits.mean(dim=-1),
        "log_sum_sq_probs": probabilities.square().sum(dim=-1).log(),
    }
    for name, values in expected.items():
        torch.testing.assert_close(scored[name][:, 2:], values, atol=1e-5, rtol=1e-5)
        assert (scored[name][:, :2] == 0).all()
    assert torch.isfinite(torch.autograd.grad(scored.entropy.sum(), model.lm_head.weight)[0]).all()


def test_logits_in_parts_change_nothing(monkeypatch):
    model = randomized_model()
    ids = random_batch(model, 3, 7)
    orders, groups = torch.rand(3, 7).argsort(dim=-1), torch.tensor([1, 1, 1, 2, 2, 3, 4]).expand(3, -1)
    found = []
    for size in (eso_lm.evaluation_trajectories.LOGITS_AT_A_TIME, 5 * 24):
        monkeypatch.setattr(eso_lm.evaluation_trajectories, "LOGITS_AT_A_TIME", size)
        scored = trajectory_log_probs(model, ids, orders, groups)
        gradients = torch.autograd.grad((scored.log_probs - scored.entropy).sum(), list(model.parameters()))
        found.append([scored.log_probs, scored.entropy, *gradients])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_plans_that_do_not_fit_are_refused():
    model = randomized_model()
    ids, orders = random_batch(model, 2, 5), torch.arange(5).expand(2, -1)
    with pytest.raises(ValueError, match=r"`groups`.*\(2, 5\)"):
        trajectory_log_probs(model, ids, orders, torch.ones(2, 4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"`orders` must hold permutations of 0 \.\.\. 4"):
        trajectory_log_probs(model, ids, orders.clamp(max=3), torch.ones(2, 5, dtype=torch.long))
    with pytest.raises(ValueError, match=r"`attention_mask` must be .* at most 5 columns, got 6"):
        trajectory_log_probs(model, ids, orders, orders, torch.ones(2, 6))
    with pytest.raises(ValueError, match="`groups` must not descend"):
        trajectory_log_probs(model, ids, orders, torch.tensor([2, 1, 3, 3, 4]).expand(2, -1))


# The trainer.


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("adapters", [False, True])
def test_at_first_the_ratio_is_one_and_the_divergence_zero(policy, tmp_path, mode, adapters):
    lora = LoraConfig(target_modules=["q_proj", "o_proj", "down_proj"], lora_dropout=0.5) if adapters else None
    trainer = make_trainer(
        policy, tmp_path, peft_config=lora, beta=0.1, num_iterations=2, generation_kwargs=MODES[mode]
    )
    recorded = []
    note = trainer._note
    trainer._note = lambda output: (recorded.append(output), note(output))
    batch, log_probs, _ = rolled_out(trainer)
    mask = batch["completion_mask"].bool()
    assert mask.any(dim=1).all()
    assert log_probs.requires_grad
    ratio = (log_probs - batch["old_per_token_logps"])[mask].exp()
    torch.testing.assert_close(ratio, torch.ones_like(ratio), atol=1e-5, rtol=0)
    difference = (batch["ref_per_token_logps"] - log_probs)[mask]
    assert (difference.exp() - difference - 1).abs().max() <= 1e-5
    # And so it is against what `generate` itself says of its draws.
    is_written = recorded[0].unmasking_steps > 0
    assert is_written[~mask].sum() == 0
    torch.testing.assert_close(log_probs[is_written], recorded[0].log_probs[is_written], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("adapters", [False, True])
def test_after_training_rollouts_are_still_those_of_the_policy(policy, tmp_path, adapters):
    """What decoding keeps of the weights, for speed, is that of the weights as they are now."""
    lora = LoraConfig(target_modules="all-linear") if adapters else None
    trainer = make_trainer(
        policy, tmp_path, peft_config=lora, learning_rate=3e-2, max_steps=3, generation_kwargs=MODES["parallel"]
    )
    recorded, note = [], trainer._note
    trainer._note = lambda output: (recorded.append(output), note(output))
    _, before, _ = rolled_out(trainer)
    trainer.train()
    _, log_probs, _ = rolled_out(trainer)
    is_written = recorded[-1].unmasking_steps > 0
    torch.testing.assert_close(log_probs[is_written], recorded[-1].log_probs[is_written], atol=2e-5, rtol=1e-4)
    rollouts = trainer._rollouts
    trainer._rollouts = Rollouts(recorded[0].trajectories, recorded[0].orders, recorded[0].groups, rollouts.is_real)
    moved, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, None, None, None)
    assert (moved - before).abs().max() > 0.1


def test_half_precision_trains(policy, tmp_path):
    trainer = make_trainer(policy, tmp_path, bf16=True, num_iterations=2, generation_kwargs=MODES["parallel"])
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == 2
    assert all(math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]) for row in rows)


def test_the_temperature_is_that_of_the_rollouts(policy, tmp_path):
    model, tokenizer, data = policy
    trainer = make_trainer(
        (model, tokenizer, data.select([0, 2])), tmp_path, temperature=0.5, max_completion_length=4,
        generation_kwargs=MODES["parallel"],
    )  # fmt: skip
    assert trainer.generation_config.temperature == 0.5
    batch, log_probs, entropies = rolled_out(trainer)
    rollouts = trainer._rollouts
    scored = model.log_likelihood(
        rollouts.trajectories,
        attention_mask=rollouts.is_real,
        context_mask=1 - batch["completion_mask"],
        orders=rollouts.orders[:, None],
        groups=rollouts.groups[:, None],
        temperature=0.5,
        num_diffusion_steps=3,
    )
    torch.testing.assert_close(log_probs, scored.token_log_probs[:, 0], atol=2e-5, rtol=1e-4)
    assert (entropies[batch["completion_mask"] == 1] > 0).all()


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt_neox"])
def test_dropout_that_layers_hold_as_a_number_is_off_too(policy, tmp_path, kind):
    _, tokenizer, data = policy
    dropout = {"dropout": 0.3} if kind == "opt" else {"attention_dropout": 0.3}
    vocabulary = {"vocab_size": policy[0].config.vocab_size, "mask_token_id": policy[0].config.mask_token_id}
    config = backbone_config(kind, **dropout, vocab_size=vocabulary["vocab_size"])
    randomized_model(backbone_config=config, **vocabulary).save_pretrained(tmp_path / "model")
    model = AutoModel.from_pretrained(tmp_path / "model")
    trainer = make_trainer((model, tokenizer, data), tmp_path, beta=0.1, num_iterations=2)
    batch, log_probs, _ = rolled_out(trainer)
    mask = batch["completion_mask"].bool()
    torch.testing.assert_close(log_probs[mask], batch["old_per_token_logps"][mask], atol=1e-5, rtol=0)
    torch.testing.assert_close(log_probs[mask], batch["ref_per_token_logps"][mask], atol=1e-5, rtol=0)


def test_a_copy_of_a_trained_policy_is_a_model_of_its_own(policy, tmp_path):
    trainer = make_trainer(policy, tmp_path)
    make_trainer(policy, tmp_path)  # a second trainer of the same model
    copied = copy.deepcopy(trainer.policy)
    ids = random_batch(copied, 2, 5)
    torch.testing.assert_close(copied(ids).logits, trainer.policy(ids).logits, atol=1e-4, rtol=0)
    with torch.no_grad():
        copied.lm_head.bias.add_(torch.arange(len(copied.lm_head.bias)))
    assert (copied(ids).logits - trainer.policy(ids).logits)[..., 7].min() > 6
    copied(ids, labels=ids, loss_weights=torch.ones(2, 5)).loss.backward()
    assert copied.lm_head.bias.grad is not None
    assert trainer.policy.lm_head.bias.grad is None


def test_a_reference_needs_a_model_that_was_loaded(policy, tmp_path):
    _, tokenizer, data = policy
    vocabulary = {"vocab_size": policy[0].config.vocab_size, "mask_token_id": policy[0].config.mask_token_id}
    made = (randomized_model(**vocabulary), tokenizer, data)
    with pytest.raises(ValueError, match="has been made and not loaded, so that TRL finds no reference"):
        make_trainer(made, tmp_path, beta=0.1)
    make_trainer(made, tmp_path)
    make_trainer(made, tmp_path, beta=0.1, peft_config=LoraConfig(target_modules=["q_proj"]))


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


def test_dropout_is_off_in_the_policy_and_in_its_reference(policy, tmp_path):
    assert policy[0].config.hidden_dropout == 0.3
    trainer = make_trainer(policy, tmp_path, beta=0.1)
    rates = [
        module.p for model in (trainer.model, trainer.ref_model) for module in model.modules() if hasattr(module, "p")
    ]
    assert rates
    assert set(rates) == {0.0}


def test_a_broken_group_horizon_is_seen(policy, tmp_path, monkeypatch):
    trainer = make_trainer(policy, tmp_path, generation_kwargs=MODES["parallel"])
    batch, right, _ = rolled_out(trainer)
    states_at = eso_lm.evaluation_trajectories.states_at
    monkeypatch.setattr(eso_lm.evaluation_trajectories, "states_at", lambda *inputs: states_at(*inputs[:8], None))
    broken, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, None, None, None)
    assert (broken - right)[batch["completion_mask"].bool()].abs().max() > 1e-2


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


@pytest.mark.parametrize("length", [None, 0])
def test_holes_alone_are_filled_in(policy, tmp_path, length):
    model, tokenizer, data = policy
    trainer = make_trainer((model, tokenizer, data.select([1, 3])), tmp_path, max_completion_length=length)
    batch, log_probs, _ = rolled_out(trainer)
    assert batch["completion_mask"].sum(dim=1).tolist() == [3] * 8
    assert (log_probs[batch["completion_mask"] == 0] == 0).all()
    plain = make_trainer(policy, tmp_path, max_completion_length=length)
    for rows in ([1, 0], [0]):
        with pytest.raises(ValueError, match="nothing to write for a prompt without holes"):
            rolled_out(plain, [policy[2][row] for row in rows])


def test_forwards_are_counted(policy, tmp_path):
    model, tokenizer, data = policy
    trainer = make_trainer(
        (model, tokenizer, data.select([0, 2])), tmp_path, max_completion_length=12,
        generation_kwargs={"alpha_0": 1.0, "num_diffusion_steps": 3, "unmasking_order": "strided"},
    )  # fmt: skip
    trainer.train()
    row = trainer.state.log_history[0]
    assert row["rollouts/forwards"] == 3
    assert row["rollouts/tokens"] == 12
    assert row["rollouts/tokens_per_forward"] == pytest.approx(4)


def test_forwards_of_lossless_rollouts_are_counted(tmp_path):
    model, tokenizer = tiny_language(alpha_0=1.0)
    trainer = EsoGRPOTrainer(
        model, table_reward,
        arguments(tmp_path, max_completion_length=12, generation_kwargs={"lossless": True, "draft_length": 4}),
        train_dataset=Dataset.from_dict({"prompt": ["a"]}), processing_class=tokenizer,
    )  # fmt: skip
    recorded, note = [], trainer._note
    trainer._note = lambda output: (recorded.append(output), note(output))
    rolled_out(trainer)
    assert trainer._metrics["train"]["rollouts/forwards"] == [recorded[0].forwards_per_row.float().mean().item()]
    assert trainer._metrics["train"]["rollouts/tokens_per_forward"][0] > 1


def test_tokens_behind_the_end_count_and_texts_end_there(tmp_path):
    model, tokenizer = tiny_language(alpha_0=1.0)
    trainer = EsoGRPOTrainer(
        model, table_reward, arguments(tmp_path, max_completion_length=6, num_generations=2),
        train_dataset=Dataset.from_dict({"prompt": ["a", "b a"]}), processing_class=tokenizer,
    )  # fmt: skip
    seen = []
    trainer.reward_funcs = [
        lambda completion_ids, **columns: seen.extend(completion_ids) or [0.0] * len(completion_ids)
    ]
    batch, *_ = rolled_out(trainer, [row for row in trainer.train_dataset for _ in range(8)])
    assert all(ids.index(END) == len(ids) - 1 for ids in seen if END in ids)
    lengths = torch.tensor([len(ids) for ids in seen])
    counted = batch["completion_mask"].sum(dim=1)
    assert (counted >= lengths).all()
    assert (counted > lengths).any()
    assert batch["num_items_in_batch"] == counted.sum()
    # What was never decided, since the text had ended, counts nothing.
    is_open = batch["completion_ids"] == 3
    assert is_open.any()
    assert not batch["completion_mask"][is_open].any()


def test_texts_end_where_the_tokenizer_says_if_the_model_says_nothing(tmp_path):
    model, tokenizer = tiny_language(alpha_0=1.0, eos_token_id=None)
    trainer = EsoGRPOTrainer(
        model, table_reward, arguments(tmp_path, max_completion_length=6, num_generations=2),
        train_dataset=Dataset.from_dict({"prompt": ["a"]}), processing_class=tokenizer,
    )  # fmt: skip
    batch, *_ = rolled_out(trainer, [trainer.train_dataset[0]] * 16)
    assert (batch["completion_ids"] == 3).any()


def test_an_end_in_a_hole_before_what_is_given_ends_nothing(tmp_path):
    model, tokenizer = tiny_language(alpha_0=1.0)
    seen = []

    def reward(completion_ids, **columns):
        seen.extend(completion_ids)
        return [0.0] * len(completion_ids)

    trainer = EsoGRPOTrainer(
        model, reward, arguments(tmp_path, max_completion_length=None, num_generations=2),
        train_dataset=Dataset.from_dict({"prompt": ["b m a m"]}), processing_class=tokenizer,
    )  # fmt: skip
    rolled_out(trainer, [trainer.train_dataset[0]] * 32)
    assert {len(ids) for ids in seen} == {3}
    assert any(ids[0] == END for ids in seen)
    assert all(ids[1] == 0 for ids in seen)


def test_padding_of_prompts_is_told_to_a_model_with_learned_positions(tmp_path):
    model = randomized_model(backbone_config=backbone_config("opt", vocab_size=4), vocab_size=4)
    _, tokenizer = tiny_language()
    trainer = EsoGRPOTrainer(
        model, table_reward, arguments(tmp_path, max_completion_length=4, num_generations=2, num_iterations=2),
        train_dataset=Dataset.from_dict({"prompt": ["a", "b a a b"]}), processing_class=tokenizer,
    )  # fmt: skip
    recorded, note = [], trainer._note
    trainer._note = lambda output: (recorded.append(output), note(output))
    _, log_probs, _ = rolled_out(trainer)
    is_written = recorded[0].unmasking_steps > 0
    torch.testing.assert_close(log_probs[is_written], recorded[0].log_probs[is_written], atol=2e-5, rtol=1e-4)


def test_completions_that_were_cut_off_are_left_out_if_asked(tmp_path):
    model, tokenizer = tiny_language(alpha_0=1.0)
    trainer = EsoGRPOTrainer(
        model, table_reward,
        arguments(tmp_path, max_completion_length=2, num_generations=2, mask_truncated_completions=True),
        train_dataset=Dataset.from_dict({"prompt": ["a"]}), processing_class=tokenizer,
    )  # fmt: skip
    batch, *_ = rolled_out(trainer, [trainer.train_dataset[0]] * 32)
    has_end = (batch["completion_ids"][:, 1:] == END).any(dim=1)
    assert has_end.any()
    assert not has_end.all()
    assert torch.equal(batch["completion_mask"].any(dim=1), has_end)


@pytest.mark.parametrize("settings", [
    {"loss_type": "grpo", "num_iterations": 2, "beta": 0.05},
    {"loss_type": "bnpo", "steps_per_generation": 2, "importance_sampling_level": "sequence"},
    {"loss_type": "dapo", "gradient_accumulation_steps": 2, "top_entropy_quantile": 0.5},
    {"loss_type": "cispo", "entropy_coef": 0.01, "epsilon_high": 5.0},
    {"loss_type": "grpo", "gradient_checkpointing": True},
])  # fmt: skip
def test_settings_of_trl_train(policy, tmp_path, settings):
    trainer = make_trainer(policy, tmp_path, generation_kwargs=MODES["parallel"], max_steps=3, **settings)
    before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    logged = [row for row in trainer.state.log_history if "loss" in row]
    assert len(logged) == 3
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in logged)
    assert any((weight != before[name]).any() for name, weight in trainer.model.named_parameters())


def test_a_reward_is_learned(tmp_path):
    model, tokenizer = tiny_language(alpha_0=0.5)

    def likes_b(completion_ids, **columns):
        return [ids.count(1) / 4 for ids in completion_ids]

    trainer = EsoGRPOTrainer(
        model, likes_b,
        arguments(tmp_path, per_device_train_batch_size=32, num_generations=16, max_completion_length=4, max_steps=30,
                  learning_rate=1e-3, generation_kwargs={"num_diffusion_steps": 2}),
        train_dataset=Dataset.from_dict({"prompt": ["a", "b"]}), processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    assert rewards[0] < 0.5
    assert sum(rewards[-3:]) / 3 > 0.9


def test_evaluation_has_rollouts_of_its_own(policy, tmp_path):
    model, tokenizer, data = policy
    trainer = EsoGRPOTrainer(
        model, length_reward, arguments(tmp_path, per_device_eval_batch_size=4, num_generations_eval=2),
        train_dataset=data, eval_dataset=data, processing_class=tokenizer,
    )  # fmt: skip
    metrics = trainer.evaluate()
    assert metrics["eval_reward"] > 0
    assert math.isfinite(metrics["eval_loss"])
    assert "eval_rollouts/forwards" in metrics


@pytest.mark.parametrize("adapters", [False, True])
def test_a_resumed_run_goes_on_as_if_nothing_had_happened(folder, policy, tmp_path, adapters):
    def run(where, **settings):
        lora = LoraConfig(target_modules=["q_proj", "o_proj"]) if adapters else None
        fresh = (AutoModel.from_pretrained(folder), *policy[1:])
        return make_trainer(
            fresh, where, peft_config=lora, max_steps=4, save_strategy="steps", save_steps=2, beta=0.05,
            generation_kwargs=MODES["parallel"], **settings,
        )  # fmt: skip

    whole, resumed = run(tmp_path / "run"), run(tmp_path / "run")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    others = dict(resumed.model.named_parameters())
    assert all(torch.equal(weight, others[name]) for name, weight in whole.model.named_parameters())
    rewards = [[row["reward"] for row in run.state.log_history if "reward" in row] for run in (whole, resumed)]
    assert rewards[0] == rewards[1]
    assert len(rewards[0]) == 4


def test_a_trained_policy_is_saved_and_loaded_by_name(folder, policy, tmp_path):
    trainer = EsoGRPOTrainer(
        str(folder), length_reward, arguments(tmp_path), train_dataset=policy[2], processing_class=policy[1]
    )
    trainer.train()
    trainer.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = random_batch(loaded, 2, 5)
    torch.testing.assert_close(loaded(ids).logits, trainer.model.eval()(ids).logits)


# Errors.


def raises(completions, **columns):
    raise KeyError("answer")


def returns_nan(completions, **columns):
    return [1.0] * (len(completions) - 1) + [math.nan]


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
    with pytest.raises(ValueError, match="'late_and_wrong' returned nan"):
        make_trainer(policy, tmp_path, late_and_wrong).train()


def test_a_checked_reward_keeps_its_name():
    class Judge:
        def __call__(self, completions, **columns):
            return [0.0] * len(completions)

    assert checked_reward(length_reward).__name__ == "length_reward"
    assert checked_reward(Judge()).__name__ == "Judge"
    assert checked_reward("some/model") == "some/model"


@pytest.mark.parametrize(("settings", "message"), [
    ({"generation_kwargs": {"entropy_bound": 0.5}}, "Adaptive unmasking .* has no likelihood in one pass"),
    ({"generation_kwargs": {"do_sample": False}}, "`do_sample=False` writes the same rollout"),
    ({"generation_kwargs": {"alpha_0": 1.5}}, "`alpha_0`"),
    ({"use_vllm": True}, "`use_vllm` makes rollouts whose plan is not known"),
    ({"use_transformers_continuous_batching": True}, "`use_transformers_continuous_batching` makes rollouts"),
    ({"max_completion_length": None, "loss_type": "dr_grpo"}, "`loss_type='dr_grpo'` needs `max_completion_length`"),
    ({"max_completion_length": 0, "mask_truncated_completions": True}, "`mask_truncated_completions=True` needs"),
    ({"generation_kwargs": {"num_difusion_steps": 3}}, r"\['num_difusion_steps'\] are none"),
    ({"generation_kwargs": {"temperature": 0.3}}, "must not hold `temperature`, which is set by `temperature`"),
    ({"generation_kwargs": {"max_new_tokens": 3}}, "which is set by `max_completion_length`"),
    ({"generation_kwargs": {"num_return_sequences": 2}}, "which is set by `num_generations`"),
    ({"reward_weights": [math.nan]}, "`reward_weights` must be finite numbers"),
])  # fmt: skip
def test_rollouts_without_a_plan_are_refused(policy, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(policy, tmp_path, **settings)


def test_more_that_is_refused(policy, tmp_path):
    model, tokenizer, data = policy
    with pytest.raises(ValueError, match="`rollout_func` makes rollouts whose plan is not known"):
        EsoGRPOTrainer(
            model, length_reward, arguments(tmp_path), train_dataset=data, processing_class=tokenizer,
            rollout_func=lambda prompts, trainer: {},
        )  # fmt: skip
    with pytest.raises(ValueError, match="call the column of the dataset otherwise"):
        make_trainer((model, tokenizer, data.add_column("texts", [""] * 4)), tmp_path).train()
    model.generation_config.confidence_threshold = 0.5
    with pytest.raises(ValueError, match="Adaptive unmasking"):
        make_trainer(policy, tmp_path)
    llama = AutoModelForCausalLM.from_config(backbone_config("llama", vocab_size=300))
    with pytest.raises(ValueError, match="`model` must be an Eso-LM, got LlamaForCausalLM"):
        make_trainer((llama, tokenizer, data), tmp_path)


def test_trls_own_trainer_is_refused_before_it_trains(policy, tmp_path):
    model, tokenizer, data = policy
    with pytest.raises(ValueError, match="train with `EsoGRPOTrainer` or `EsoDPOTrainer` in place of TRL's own"):
        GRPOTrainer(model, length_reward, arguments(tmp_path), train_dataset=data, processing_class=tokenizer)
    make_trainer(policy, tmp_path)  # and ours may follow
    with pytest.raises(ValueError, match="in place of TRL's own"):
        GRPOTrainer(model, length_reward, arguments(tmp_path), train_dataset=data, processing_class=tokenizer)


def test_draft_heads_write_rollouts_only_where_they_do_not_change_what_is_drawn(policy, tmp_path):
    model, tokenizer, data = policy
    headed = randomized_model(
        draft_rank=4, **{"vocab_size": model.config.vocab_size, "mask_token_id": model.config.mask_token_id}
    )
    policy = (headed, tokenizer, data)
    with pytest.raises(ValueError, match="`use_draft_head=True` is for `lossless` rollouts"):
        make_trainer(policy, tmp_path, generation_kwargs={"use_draft_head": True, "num_diffusion_steps": 2})
    for settings, uses in (({"num_diffusion_steps": 2}, False), ({"lossless": True}, None)):
        trainer = make_trainer(policy, tmp_path, generation_kwargs=settings, num_iterations=2)
        assert trainer.generation_config.use_draft_head is uses
        batch, log_probs, _ = rolled_out(trainer)
        mask = batch["completion_mask"].bool()
        torch.testing.assert_close(log_probs[mask], batch["old_per_token_logps"][mask], atol=1e-5, rtol=0)


def test_chats_are_rolled_out(policy, tmp_path):
    model, tokenizer, _ = policy
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    chats = Dataset.from_dict({"prompt": [[{"role": "user", "content": "The quick?"}]] * 4})
    seen = []

    def reward(prompts, completions, texts, **columns):
        seen.extend(zip(prompts, completions, texts, strict=True))
        return [float(len(text)) for text in texts]

    make_trainer((model, tokenizer, chats), tmp_path, reward, max_steps=1).train()
    prompt, completion, text = seen[0]
    assert prompt[0]["content"] == "The quick?"
    assert completion[0]["role"] == "assistant"
    assert text == "user: The quick?\nassistant:" + completion[0]["content"]


def test_logs_are_json(policy, tmp_path):
    trainer = make_trainer(policy, tmp_path, beta=0.1)
    trainer.train()
    row = json.loads(json.dumps(trainer.state.log_history))[0]
    assert abs(row["kl"]) <= 1e-5
