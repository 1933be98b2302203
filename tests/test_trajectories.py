"""The likelihood of what `generate` has decided, with gradients: exact, and that of the expected reward."""

import itertools
import math

import pytest
import torch
from datasets import Dataset
from policies import MODES, arguments, reward_of_text, table_reward, tiny_language
from tiny_models import backbone_config, random_batch, randomized_model
from transformers import TrainerCallback

import eso_lm.evaluation_trajectories
from eso_lm import trajectory_log_probs
from eso_lm.training_grpo import EsoGRPOTrainer

MASK = 23


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
