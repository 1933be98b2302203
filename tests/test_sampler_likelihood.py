"""The exact likelihood of a sampler: what `generate` draws, in groups, adaptively or filtered, is what is scored."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import all_orders, backbone_config, random_batch, random_orders, randomized_model

import eso_lm.evaluation_scoring
from eso_lm import EsoForMaskedDiffusion, EsoGenerationConfig
from eso_lm.modeling_objective import states_at

MASK = 23
PARALLEL = {"alpha_0": 1.0, "num_diffusion_steps": 2, "unmasking_order": "random"}
SAMPLERS = {
    "parallel": PARALLEL,
    "strided": {"alpha_0": 0.5, "num_diffusion_steps": 2, "unmasking_order": "strided"},
    "left to right": PARALLEL | {"unmasking_order": "left_to_right"},
    "blocks": PARALLEL | {"alpha_0": 0.6, "block_length": 3},
    "entropy": {"alpha_0": 1.0, "entropy_bound": 2.08},
    "entropy, in blocks": {
        "alpha_0": 0.7,
        "entropy_bound": 2.08,
        "block_length": 2,
        "unmasking_order": "left_to_right",
    },
    "confidence": {"alpha_0": 0.7, "confidence_threshold": 0.6, "num_candidates": 3},
    "temperature": PARALLEL | {"temperature": 0.7},
    "top_k": PARALLEL | {"top_k": 2},
    "greedy": PARALLEL | {"do_sample": False},
    "penalty": PARALLEL | {"repetition_penalty": 1.7},
    "n-grams": PARALLEL | {"alpha_0": 0.5, "no_repeat_ngram_size": 3},
    "entropy and n-grams": {"alpha_0": 1.0, "entropy_bound": 2.08, "no_repeat_ngram_size": 3, "temperature": 0.9},
    "lossless": {"alpha_0": 0.5, "lossless": True, "temperature": 0.8},
}


def tiny_language(length, **overrides):
    """A model of 3 tokens and a mask, whose tokens depend on one another, and all texts of so many tokens."""
    model = randomized_model(vocab_size=4, scale=0.15, **overrides)
    return model, torch.tensor(list(itertools.product(range(3), repeat=length)))


def seeds(rows, seed=0):
    """A generator for each row, all with the same seed: the plans of all rows are the same."""
    return [torch.Generator().manual_seed(seed) for _ in range(rows)]


def generated(model, prompt, attention_mask=None, new_tokens=9, **sampler):
    """A sample with its plan, what of it is real, and what was given."""
    if attention_mask is None:
        attention_mask = torch.ones_like(prompt)
    output = model.generate(
        prompt,
        attention_mask=attention_mask,
        max_new_tokens=new_tokens,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_scores=True,
        **sampler,
    )
    is_real = torch.cat([attention_mask, torch.ones(len(prompt), new_tokens, dtype=torch.long)], dim=1)
    return output, is_real, (output.unmasking_steps == 0).long()


@pytest.fixture
def forwards(monkeypatch):
    """The slots of a row of every forward of the backbone from now on, in a list."""
    widths, run_backbone = [], EsoForMaskedDiffusion.run_backbone

    def noted(model, **arguments):
        widths.append(arguments["input_ids"].shape[1])
        return run_backbone(model, **arguments)

    monkeypatch.setattr(EsoForMaskedDiffusion, "run_backbone", noted)
    return widths


def plan_of(output):
    return {"orders": output.orders[:, None], "groups": output.groups[:, None]}


@torch.no_grad()
def by_plain_forwards(model, text, order, groups, num_given=0):
    """log p of every slot of a text (length,): a forward of its own for each group, without a cache."""
    total = torch.zeros(len(text))
    for group in sorted(set(groups[num_given:])):
        slots = [slot for slot, number in enumerate(groups) if number == group and slot >= num_given]
        before = order[: slots[0]]
        columns = [order[slot] for slot in slots]
        ids = torch.tensor([[*text[before].tolist(), *[model.config.mask_token_id] * len(slots)]])
        logits = model(ids, position_ids=torch.tensor([[*before, *columns]])).logits[0, -len(slots) :]
        total[columns] = logits.log_softmax(dim=-1)[range(len(slots)), text[columns]]
    return total


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.parametrize(("seed", "draft_rank"), [(1, None), (2, None), (1, 4)])
def test_probabilities_of_all_texts_add_up_to_one(sampler, seed, draft_rank):
    """Given one plan, which for adaptive samplers says what they choose from; with a draft head, too."""
    model, texts = tiny_language(5, draft_rank=draft_rank)
    output = model.log_likelihood(texts, generator=seeds(len(texts), seed), **sampler)
    assert (output.orders == output.orders[:1]).all()
    assert (output.groups == output.groups[:1]).all()
    assert output.log_likelihood.double().exp().sum() == pytest.approx(1, abs=1e-5)
    forwards = output.num_function_evaluations
    if "lossless" in sampler:
        assert forwards is None
    elif "entropy_bound" in sampler and "block_length" not in sampler:
        assert len(set(forwards.flatten().tolist())) > 1, "how many forwards it takes depends on the text"
    else:
        assert (forwards < 5).any() or sampler["alpha_0"] < 1


@pytest.mark.parametrize("name", ["parallel", "blocks", "entropy", "n-grams"])
def test_probabilities_of_all_completions_add_up_to_one(name):
    """Given a context on both sides, and padding; over several plans."""
    model, texts = tiny_language(3)
    tokens = torch.zeros(27, 7, dtype=torch.long)
    tokens[:, [1, 3, 4]] = texts
    tokens[:, [2, 5]] = torch.tensor([1, 2])
    context, is_real = torch.zeros_like(tokens), torch.ones_like(tokens)
    context[:, [2, 5]] = 1
    is_real[:, [0, 6]] = 0
    output = model.log_likelihood(tokens, is_real, context, num_orders=4, generator=seeds(27), **SAMPLERS[name])
    assert output.log_likelihood.exp().sum() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(output.log_likelihood_per_order.exp().sum(dim=0), torch.ones(4), atol=1e-5, rtol=0)
    assert not output.token_log_probs[..., [0, 2, 5, 6]].any()


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_plans_are_scored_as_by_plain_forwards(data):
    """Any order, any groups, contexts and padding, at once and in chunks that are shorter than a group or longer."""
    model = randomized_model(attention=data.draw(st.sampled_from(["sdpa", "eager"])))
    lengths = data.draw(st.lists(st.integers(1, 8), min_size=1, max_size=4))
    width = max(lengths) + data.draw(st.integers(0, 2))
    tokens, is_real, is_given = (torch.zeros(len(lengths), width, dtype=torch.long) for _ in range(3))
    orders, groups, expected = [], [], torch.zeros(len(lengths), width)
    for row, length in enumerate(lengths):
        num_given = data.draw(st.integers(0, length))
        start = data.draw(st.integers(0, width - length))
        order = data.draw(st.permutations(range(length)))
        order = sorted(order[:num_given]) + order[num_given:]
        cuts = data.draw(st.lists(st.booleans(), min_size=length, max_size=length))
        numbers = [7 + sum(cuts[: slot + 1]) for slot in range(length)]
        text = random_batch(model, 1, length, seed=row)[0]
        tokens[row, start : start + length], is_real[row, start : start + length] = text, 1
        is_given[row, [start + column for column in order[:num_given]]] = 1
        outside = [column for column in range(width) if not start <= column < start + length]
        # What is given, and padding, may stand anywhere in the orders of the caller.
        slots = [(start + column, number) for column, number in zip(order, numbers, strict=True)]
        for column in outside:
            slots.insert(data.draw(st.integers(0, len(slots))), (column, data.draw(st.integers(-1, 9))))
        orders.append([column for column, _ in slots])
        groups.append([number for _, number in slots])
        expected[row, start : start + length] = by_plain_forwards(model, text, order, numbers, num_given)
    plan = {"orders": torch.tensor(orders)[:, None], "groups": torch.tensor(groups)[:, None]}
    chunk_length = data.draw(st.sampled_from([None, 1, 3, 8, 50]))
    output = model.log_likelihood(tokens, is_real, is_given, chunk_length=chunk_length, **plan)
    torch.testing.assert_close(output.token_log_probs[:, 0], expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_taken_over_backbones_are_scored_as_by_plain_forwards(kind):
    model = randomized_model(backbone_config=backbone_config(kind))
    text, order, groups = random_batch(model, 1, 9), random_orders(1, 9), [1, 1, 1, 2, 3, 3, 4, 4, 4]
    expected = by_plain_forwards(model, text[0], order[0].tolist(), groups)
    for chunk_length in (None, 2):
        output = model.log_likelihood(text, orders=order, groups=torch.tensor([groups]), chunk_length=chunk_length)
        torch.testing.assert_close(output.token_log_probs[0, 0], expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(("chunk_length", "draft_rank"), [(None, None), (2, None), (None, 8), (3, 8)])
def test_a_sample_scored_under_its_plan_has_its_log_probs(name, chunk_length, draft_rank):
    """Prompts of different lengths with holes, whatever the filters: `log_probs` are the model's own."""
    model = randomized_model(scale=0.4, draft_rank=draft_rank)
    prompt = random_batch(model, 3, 5)
    prompt[0, 2] = prompt[2, 4] = MASK
    attention_mask = torch.ones_like(prompt)
    attention_mask[1, :2] = 0
    sampler = SAMPLERS[name] | ({"entropy_bound": 3.0} if "entropy_bound" in SAMPLERS[name] else {})
    output, is_real, is_given = generated(model, prompt, attention_mask, **sampler)
    choices = ("entropy_bound", "confidence_threshold", "num_candidates", "unmasking_order")
    adaptive = {field: value for field, value in sampler.items() if field in choices}
    adaptive = adaptive if {"entropy_bound", "confidence_threshold"} & adaptive.keys() else {}
    scored = model.log_likelihood(
        output.sequences, is_real, is_given, chunk_length=chunk_length, **plan_of(output), **adaptive
    )
    torch.testing.assert_close(scored.token_log_probs[:, 0], output.log_probs, atol=1e-4, rtol=0)
    torch.testing.assert_close(scored.log_likelihood, output.log_probs.sum(dim=-1), atol=1e-3, rtol=0)
    if "lossless" not in sampler:
        assert scored.num_function_evaluations.amax() == output.num_function_evaluations
    assert torch.equal(scored.orders[:, 0], output.orders)
    assert torch.equal(scored.groups[:, 0], output.groups)


@pytest.mark.parametrize("name", ["temperature", "top_k", "greedy", "penalty", "n-grams", "entropy and n-grams"])
def test_filters_are_part_of_the_distribution(name):
    """Against the scores that tokens were drawn from."""
    model = randomized_model(scale=0.4)
    output, is_real, is_given = generated(model, random_batch(model, 3, 4), **SAMPLERS[name])
    sampler = SAMPLERS[name]
    scored = model.log_likelihood(output.sequences, is_real, is_given, **plan_of(output), **sampler)
    expected = output.scores.log_softmax(dim=-1).gather(-1, output.sequences[..., None])[..., 0]
    if name == "greedy":
        expected = torch.zeros_like(expected)
    torch.testing.assert_close(
        scored.token_log_probs[:, 0], expected.masked_fill(is_given.bool(), 0), atol=1e-4, rtol=0
    )
    if name in ("top_k", "greedy"):
        other = (output.sequences + 1 - is_given) % MASK
        scored = model.log_likelihood(other, is_real, is_given, **plan_of(output), **sampler)
        assert scored.log_likelihood.isneginf().any(), "what the filter forbids cannot be drawn"


@pytest.mark.parametrize("name", SAMPLERS)
def test_plans_are_drawn_as_generate_draws_them(name):
    model = randomized_model()
    prompt = random_batch(model, 4, 3)
    output, is_real, is_given = generated(
        model, prompt, generator=[torch.Generator().manual_seed(row) for row in range(4)], **SAMPLERS[name]
    )
    for padding in (0, 2):  # nor does a row's plan depend on its batch
        text, real, context = (
            torch.nn.functional.pad(tensor, (0, padding)) for tensor in (output.sequences, is_real, is_given)
        )
        generators = [torch.Generator().manual_seed(row) for row in range(4)]
        scored = model.log_likelihood(text, real, context, generator=generators, **SAMPLERS[name])
        assert torch.equal(scored.orders[:, 0, :12], output.orders)
        assert torch.equal(scored.groups[:, 0, :12], output.groups)
        generators = [torch.Generator().manual_seed(2)]
        alone = model.log_likelihood(text[2:3], real[2:3], context[2:3], generator=generators, **SAMPLERS[name])
        torch.testing.assert_close(alone.log_likelihood, scored.log_likelihood[2:3], atol=1e-4, rtol=0)


def exact_probabilities(model, texts):
    """p(x) of all texts of 3 tokens in two random steps, over all plans.

    Of two steps at alpha_0 = 1, each token takes either with probability 1/2.
    """
    orders = torch.tensor(all_orders(3))
    probability = 0
    for groups, weight in (([1, 1, 1], 1 / 4), ([1, 2, 2], 3 / 8), ([1, 1, 2], 3 / 8)):
        plans = {"orders": orders, "groups": torch.tensor([groups]).expand(6, -1)}
        probability = probability + weight * model.log_likelihood(texts, **plans).log_likelihood.double().exp()
    return probability


def without_own_groups(group_starts):
    """A horizon that lets masks see the content of their own group."""
    return torch.arange(group_starts.shape[1]).expand_as(group_starts)


def all_in_one_group(group_starts):
    """A horizon that hides the content of earlier groups."""
    return torch.zeros_like(group_starts)


@pytest.mark.slow
def test_samples_follow_the_likelihood(monkeypatch):
    """Chi-square of 8100 samples in two forwards over all 27 texts; with a broken horizon it fails."""
    model, texts = tiny_language(3, alpha_0=1.0)
    samples = model.generate(max_new_tokens=3, num_return_sequences=8100, eos_token_id=None, **PARALLEL)
    counts = torch.bincount((samples * torch.tensor([9, 3, 1])).sum(dim=-1), minlength=27).double()

    def chi_square():
        expected = 8100 * exact_probabilities(model, texts)
        assert expected.sum() == pytest.approx(8100, abs=0.1), "a broken horizon still is a distribution"
        return ((counts - expected) ** 2 / expected).sum()

    assert chi_square() < 54.1  # 26 degrees of freedom, p = 0.001
    for broken in (without_own_groups, all_in_one_group):
        monkeypatch.setattr(
            eso_lm.evaluation_scoring,
            "states_at",
            lambda *arguments, broken=broken: states_at(*arguments[:-1], broken(arguments[-1])),
        )
        assert chi_square() > 200


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "draft_rank"),
    [*((name, None) for name in ("blocks", "entropy", "penalty", "strided")), ("left to right", 4), ("entropy", 4)],
)
def test_samples_of_any_sampler_follow_its_likelihood(name, draft_rank):
    """Chi-square of 4000 samples over the 27 texts, against the mean over 300 plans."""
    model, texts = tiny_language(3, draft_rank=draft_rank)
    samples = model.generate(max_new_tokens=3, num_return_sequences=4000, eos_token_id=None, **SAMPLERS[name])
    counts = torch.bincount((samples * torch.tensor([9, 3, 1])).sum(dim=-1), minlength=27).double()
    scored = model.log_likelihood(texts, num_orders=300, generator=seeds(27), **SAMPLERS[name])
    expected = 4000 * scored.log_likelihood.double().exp()
    # What 300 plans leave uncertain adds to the noise of the samples.
    noise = 4000**2 * scored.log_likelihood_per_order.double().exp().var(dim=1) / 300
    assert ((counts - expected) ** 2 / (expected + noise)).sum() < 54.1


def test_groups_of_one_are_the_likelihood_of_one_token_a_forward(attention):
    model = randomized_model(attention=attention)
    text, orders = random_batch(model, 2, 7), random_orders(3, 7)
    alone = model.log_likelihood(text, orders=orders)
    grouped = model.log_likelihood(text, orders=orders, groups=torch.arange(7).expand(3, -1))
    assert torch.equal(alone.token_log_probs, grouped.token_log_probs)
    assert torch.equal(alone.groups, torch.arange(1, 8).expand(2, 3, -1))
    most = model.log_likelihood(text, num_diffusion_steps="max", alpha_0=1.0, num_orders=2)
    same = model.log_likelihood(text, orders=most.orders)
    torch.testing.assert_close(same.log_likelihood, most.log_likelihood)
    assert (most.num_function_evaluations == 7).all()


@torch.no_grad()
def test_one_group_is_the_diffusion_term_of_training(attention):
    """The loss of a row whose masks are all in one forward, behind its clean tokens."""
    model = randomized_model(attention=attention)
    text, order = random_batch(model, 1, 8), random_orders(1, 8)
    order = torch.cat([order[:, :3].sort().values, order[:, 3:]], dim=1)
    is_given = torch.zeros_like(text).scatter(1, order[:, :3], 1)
    labels = text.gather(1, order)
    noisy = labels.clone()
    noisy[:, 3:] = MASK
    loss = model(noisy, position_ids=order, labels=labels, num_items_in_batch=1).loss
    scored = model.log_likelihood(text, None, is_given, orders=order, groups=torch.ones_like(order))
    assert scored.log_likelihood.item() == pytest.approx(-loss.item(), abs=1e-4)
    assert scored.num_function_evaluations.item() == 1


@pytest.mark.parametrize("name", ["parallel", "blocks", "temperature", "lossless"])
def test_one_forward_is_enough_for_a_plan(name, forwards):
    model = randomized_model()
    output = model.log_likelihood(random_batch(model, 3, 12), num_orders=4, **SAMPLERS[name])
    # All masks, and the content before the last group, of the row that needs most of it.
    is_last_group = output.groups == output.groups.amax(dim=-1, keepdim=True)
    assert forwards == [12 + is_last_group.long().argmax(dim=-1).max()]
    forwards.clear()
    model.log_likelihood(random_batch(model, 3, 12), **PARALLEL | {"num_diffusion_steps": 1})
    assert forwards == [12], "of one group no content is needed at all"


def test_adaptive_unmasking_takes_the_forwards_of_sampling(forwards):
    model = randomized_model()
    output, is_real, is_given = generated(model, random_batch(model, 3, 4), **SAMPLERS["confidence"])
    forwards.clear()
    config = EsoGenerationConfig(**SAMPLERS["confidence"])
    scored = model.log_likelihood(output.sequences, is_real, is_given, generation_config=config, **plan_of(output))
    assert len(forwards) == output.num_function_evaluations == scored.num_function_evaluations.max()


def test_a_generation_config_and_its_fields_are_the_same_sampler():
    model, text = randomized_model(), random_batch(randomized_model(), 2, 8)
    fields = {"alpha_0": 0.5, "num_diffusion_steps": 3, "temperature": 0.7, "top_k": 20}
    config = EsoGenerationConfig(**fields)
    outputs = [
        model.log_likelihood(text, num_orders=3, generator=seeds(2), **arguments)
        for arguments in (fields, {"generation_config": config}, {"generation_config": config, "alpha_0": 1.0})
    ]
    assert torch.equal(outputs[0].token_log_probs, outputs[1].token_log_probs)
    assert not torch.equal(outputs[0].orders, outputs[2].orders), "an argument goes before the config"
    # What the model's own config says holds as in `generate`, but not without a sampler.
    model.generation_config.temperature = 0.7
    model.generation_config.num_diffusion_steps = 3
    again = model.log_likelihood(text, num_orders=3, generator=seeds(2), alpha_0=0.5, top_k=20)
    assert torch.equal(again.token_log_probs, outputs[0].token_log_probs)
    plain = model.log_likelihood(text, orders=torch.arange(8)[None])
    model.generation_config = EsoGenerationConfig()
    assert torch.equal(plain.token_log_probs, model.log_likelihood(text, orders=torch.arange(8)[None]).token_log_probs)


def test_processors_of_the_caller_are_filters_too():
    model, text = randomized_model(), random_batch(randomized_model(), 2, 6)

    def forbid_three(input_ids, scores):
        return scores.index_fill(1, torch.tensor([3]), -torch.inf)

    text[0, 2] = 3
    text[1] = torch.where(text[1] == 3, 4, text[1])
    scored = model.log_likelihood(text, logits_processor=[forbid_three], **PARALLEL)
    assert scored.log_likelihood[0].isneginf()
    assert scored.token_log_probs[0, 0].isneginf().tolist() == (text[0] == 3).tolist()
    assert scored.log_likelihood[1].isfinite()


def test_an_end_of_text_that_is_too_early_is_forbidden():
    model, text = randomized_model(), random_batch(randomized_model(), 1, 8) % 20
    text[0, 5] = 21
    context = (torch.arange(8) < 3).long()[None]
    for least, is_allowed in ((2, True), (3, False)):
        scored = model.log_likelihood(
            text, None, context, min_new_tokens=least, eos_token_id=21, pad_token_id=0, **PARALLEL
        )
        assert scored.log_likelihood.isfinite().item() == is_allowed


def test_a_text_that_ends_early_from_left_to_right_is_scored_again():
    model = randomized_model(scale=0.2)
    sampler = PARALLEL | {"unmasking_order": "left_to_right", "num_diffusion_steps": 4}
    output = model.generate(
        max_new_tokens=16,
        num_return_sequences=40,
        eos_token_id=[3, 4, 5],
        pad_token_id=0,
        return_dict_in_generate=True,
        **sampler,
    )
    is_end = torch.isin(output.sequences, torch.tensor([3, 4, 5]))
    is_real = (is_end.long().cumsum(dim=-1) - is_end.long() == 0).long()
    assert (is_real.sum(dim=-1) < 16).any()
    scored = model.log_likelihood(output.sequences, is_real, **plan_of(output))
    torch.testing.assert_close(scored.token_log_probs[:, 0], output.log_probs, atol=1e-4, rtol=0)


def test_more_plans_of_a_row_are_averaged():
    model, text = randomized_model(), random_batch(randomized_model(), 2, 6)
    scored = model.log_likelihood(text, num_orders=5, generator=torch.Generator().manual_seed(0), **PARALLEL)
    assert len({tuple(groups) for groups in scored.groups.flatten(0, 1).tolist()}) > 1
    assert scored.num_function_evaluations.shape == (2, 5)
    assert torch.equal(scored.num_function_evaluations, scored.groups.amax(dim=-1))
    expected = scored.log_likelihood_per_order.logsumexp(dim=-1) - math.log(5)
    torch.testing.assert_close(scored.log_likelihood, expected)
    left_to_right = model.log_likelihood(text, num_orders=5, **SAMPLERS["strided"] | {"alpha_0": 0.0})
    assert left_to_right.num_function_evaluations.tolist() == [[6] * 5] * 2
    assert torch.equal(left_to_right.log_likelihood, model.log_likelihood(text, alpha_0=0.0).log_likelihood)


@pytest.mark.parametrize("name", ["parallel", "entropy", "penalty"])
def test_batches_and_the_mode_of_the_model_change_nothing(name):
    model, text = randomized_model(hidden_dropout=0.5), random_batch(randomized_model(), 5, 6)
    expected = model.log_likelihood(text, num_orders=2, generator=seeds(5), **SAMPLERS[name])
    model.train()
    for budget in ({"batch_size": 3}, {"memory_budget": 1}):
        scored = model.log_likelihood(text, num_orders=2, generator=seeds(5), **SAMPLERS[name], **budget)
        torch.testing.assert_close(scored.token_log_probs, expected.token_log_probs, atol=1e-4, rtol=0)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"groups": torch.ones(1, 3).long()}, "`groups` are those of the slots of `orders`: give both"),
        ({"orders": torch.tensor([[0, 1, 2]]), "num_diffusion_steps": 2}, "`orders` of a sampler need their `groups`"),
        (
            {"orders": torch.tensor([[0, 1, 2]]), "groups": torch.tensor([[1, 2, 1]])},
            "`groups` must not descend along the slots",
        ),
        (
            {"orders": torch.tensor([[0, 1, 2]]), "groups": torch.ones(2, 3).long()},
            r"`groups` must be those of the slots of `orders`, got the shapes \(2, 2, 3\) and \(2, 1, 3\)",
        ),
        ({"orders": torch.tensor([[0, 1, 2]]), "groups": torch.ones(1, 3)}, "`groups` must be a tensor of integers"),
        ({"orders": torch.tensor([[0, 1, 2]]), "groups": torch.ones(1, 4).long()}, r"`groups` must have the shape"),
        ({"num_orders": "all", "num_diffusion_steps": 2}, "`num_orders='all'` is for one token a forward"),
        ({"num_diffusion_steps": 0}, "`num_diffusion_steps` must be None, 'max' or a positive integer, got 0"),
        ({"num_diffusion_steps": 2, "entropy_bound": 1.0}, "set one of them"),
        ({"num_beams": 3}, "arguments for beam"),
        ({"generation_config": {"alpha_0": 0.5}}, "`generation_config` must be an EsoGenerationConfig, got dict"),
        ({"streamer": None}, r"\['streamer'\] are not settings"),
        ({"unmasking_ordr": "strided"}, r"\['unmasking_ordr'\] are not settings"),
        ({"guidance_scale": 2.0}, "`guidance_scale=2.0` is not supported"),
        ({"generator": [torch.Generator()]}, "one torch.Generator for each of the 2 rows"),
        ({"alpha_0": 1.5, "num_diffusion_steps": 2}, r"`alpha_0` must be None or a number in \[0, 1\], got 1.5"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message):
    model = randomized_model()
    with pytest.raises(ValueError, match=message):
        model.log_likelihood(random_batch(model, 2, 3), **arguments)


def test_orders_of_a_generator_a_row_do_not_depend_on_the_padding():
    model, text = randomized_model(), random_batch(randomized_model(), 2, 7)
    generators = [torch.Generator().manual_seed(row) for row in range(2)]
    expected = model.log_likelihood(text, num_orders=3, alpha_0=0.7, generator=generators)
    padded = torch.nn.functional.pad(text, (2, 1))
    is_real = torch.nn.functional.pad(torch.ones_like(text), (2, 1))
    generators = [torch.Generator().manual_seed(row) for row in range(2)]
    output = model.log_likelihood(padded, is_real, num_orders=3, alpha_0=0.7, generator=generators)
    assert torch.equal(output.orders[..., :7] - 2, expected.orders)
    torch.testing.assert_close(output.log_likelihood, expected.log_likelihood, atol=1e-4, rtol=0)


def test_lockstep_is_no_matter_of_a_row():
    """Rows of different lengths, which could not be generated in lockstep, are scored by their own plans."""
    model, text = randomized_model(), random_batch(randomized_model(), 2, 6)
    is_real = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    plain, lockstep = (
        model.log_likelihood(text, is_real, generator=seeds(2), **PARALLEL, lockstep=value) for value in (None, True)
    )
    assert torch.equal(plain.token_log_probs, lockstep.token_log_probs)


@pytest.mark.parametrize(("chunk_length", "widest"), [(1, 4), (5, 8), (100, 24)])
def test_chunks_hold_as_many_slots_as_asked_for_or_a_group(chunk_length, widest, forwards):
    """Twice as many: the tokens, and a mask for each. Six groups of two tokens."""
    model = randomized_model()
    plan = {"orders": random_orders(1, 12), "groups": torch.arange(12)[None] // 2}
    model.log_likelihood(random_batch(model, 2, 12), chunk_length=chunk_length, **plan)
    assert max(forwards) <= widest
    assert sum(forwards) == 24
