"""The exact likelihood adds up to one and is what generate samples from; the NELBO is what training minimises."""

import itertools
import math

import pytest
import torch
from tiny_models import all_orders, random_batch, random_orders, randomized_model

from eso_lm import DataCollatorForHybridMaskedDiffusion
from eso_lm.generation_order import order_probability, sample_generation_order, sample_scoring_orders

MASK = 23


def tiny_language(**overrides):
    """A model of 3 tokens and a mask, and all texts of 3 tokens."""
    model = randomized_model(vocab_size=4, **{"scale": 0.15} | overrides)
    texts = torch.tensor(list(itertools.product(range(3), repeat=3)))
    return model, texts


@pytest.mark.parametrize("alpha_0", [0.0, 0.5, 1.0])
def test_probabilities_of_all_texts_add_up_to_one(attention, alpha_0):
    model, texts = tiny_language(attention=attention)
    exact = model.log_likelihood(texts, num_orders="all", alpha_0=alpha_0)
    assert exact.log_likelihood.exp().sum() == pytest.approx(1, abs=1e-5)
    # And given each order.
    torch.testing.assert_close(
        exact.log_likelihood_per_order.exp().sum(dim=0), torch.ones(exact.orders.shape[1]), atol=1e-5, rtol=0
    )
    assert exact.orders.shape[1] == (1 if alpha_0 == 0 else 6)


@pytest.mark.parametrize("alpha_0", [0.0, 0.3, 1.0])
def test_probabilities_of_all_completions_add_up_to_one(alpha_0):
    """Given a context on both sides, and padding."""
    model, texts = tiny_language()
    tokens = torch.zeros(27, 7, dtype=torch.long)
    tokens[:, [1, 3, 4]] = texts
    tokens[:, [2, 5]] = torch.tensor([1, 2])
    context = torch.zeros_like(tokens)
    context[:, [2, 5]] = 1
    padding = torch.ones_like(tokens)
    padding[:, [0, 6]] = 0
    output = model.log_likelihood(tokens, padding, context, num_orders="all", alpha_0=alpha_0)
    assert output.log_likelihood.exp().sum() == pytest.approx(1, abs=1e-5)
    assert not output.token_log_probs[..., [0, 2, 5, 6]].any()
    again = model.log_likelihood(tokens[:, 1:6], None, context[:, 1:6], num_orders="all", alpha_0=alpha_0)
    torch.testing.assert_close(again.log_likelihood, output.log_likelihood, atol=1e-5, rtol=0)


@torch.no_grad()
def test_one_token_at_a_time_gives_the_same_number(attention):
    """Against plain forwards, token by token, with one mask at the end."""
    model = randomized_model(attention=attention)
    text, orders = random_batch(model, 2, 6), random_orders(3, 6)
    output = model.log_likelihood(text, orders=orders)
    for row in range(2):
        for index, order in enumerate(orders.tolist()):
            total = 0.0
            for step, column in enumerate(order):
                ids = torch.tensor([[*text[row, order[:step]].tolist(), MASK]])
                logits = model(ids, position_ids=torch.tensor([order[: step + 1]])).logits[0, -1]
                log_prob = logits.log_softmax(dim=-1)[text[row, column]]
                assert output.token_log_probs[row, index, column] == pytest.approx(log_prob.item(), abs=1e-4)
                assert output.is_greedy[row, index, column] == (logits.argmax() == text[row, column])
                total += log_prob.item()
            assert output.log_likelihood_per_order[row, index] == pytest.approx(total, abs=1e-3)
    expected = output.log_likelihood_per_order.logsumexp(dim=-1) - math.log(3)
    torch.testing.assert_close(output.log_likelihood, expected, atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("alpha_0", [0.0, 0.5, 1.0])
def test_samples_follow_the_likelihood(alpha_0):
    """Chi-square of 8100 samples, one token a forward, over all 27 texts."""
    model, texts = tiny_language(alpha_0=alpha_0)
    expected = 8100 * model.log_likelihood(texts, num_orders="all").log_likelihood.exp().double()
    generators = [torch.Generator().manual_seed(seed) for seed in range(8100)]
    samples = model.generate(
        max_new_tokens=3,
        num_return_sequences=8100,
        num_diffusion_steps="max",
        generator=generators,
    )
    counts = torch.bincount((samples * torch.tensor([9, 3, 1])).sum(dim=-1), minlength=27).double()
    assert ((counts - expected) ** 2 / expected).sum() < 54.1  # 26 degrees of freedom, p = 0.001


@pytest.mark.parametrize("alpha_0", [0.0, 0.5, 1.0])
def test_log_probs_of_a_sample_are_its_likelihood(alpha_0):
    model = randomized_model(alpha_0=alpha_0)
    prompt = random_batch(model, 3, 4)
    output = model.generate(prompt, max_new_tokens=9, num_diffusion_steps="max", top_k=4, return_dict_in_generate=True)
    context = torch.zeros_like(output.sequences)
    context[:, :4] = 1
    orders = output.unmasking_steps.argsort(dim=-1, stable=True)[:, None]
    scored = model.log_likelihood(output.sequences, context_mask=context, orders=orders)
    torch.testing.assert_close(scored.token_log_probs[:, 0], output.log_probs, atol=1e-4, rtol=0)
    torch.testing.assert_close(scored.log_likelihood, output.log_probs.sum(dim=-1), atol=1e-3, rtol=0)


def test_a_left_to_right_model_has_one_order():
    model = randomized_model(alpha_0=0.0)
    text = random_batch(model, 2, 7)
    outputs = [
        model.log_likelihood(text, num_orders=count, generator=torch.Generator().manual_seed(count))
        for count in (1, 5)
    ]
    torch.testing.assert_close(outputs[0].log_likelihood, outputs[1].log_likelihood)
    assert outputs[1].log_likelihood_per_order.shape == (2, 5)
    assert torch.equal(outputs[1].orders, torch.arange(7).expand(2, 5, 7))
    exact = model.log_likelihood(text, orders=torch.arange(7)[None])
    torch.testing.assert_close(exact.log_likelihood, outputs[0].log_likelihood)


@pytest.mark.slow
def test_more_orders_tighten_the_bound():
    model, texts = tiny_language(scale=0.6)
    exact = model.log_likelihood(texts, num_orders="all").log_likelihood
    generator = torch.Generator().manual_seed(0)
    bounds = [
        torch.stack(
            [model.log_likelihood(texts, num_orders=count, generator=generator).log_likelihood for _ in range(60)]
        ).mean()
        for count in (1, 4, 16)
    ]
    assert bounds[0] < bounds[1] < bounds[2] < exact.mean() + 0.03


@pytest.mark.parametrize("alpha_0", [0.0, 0.4, 1.0])
def test_padding_batches_and_budgets_change_nothing(alpha_0):
    model = randomized_model()
    rows = [random_batch(model, 1, length, seed=length)[0] for length in (3, 8, 5, 1)]
    orders = random_orders(4, 8)
    for side in ("left", "right"):
        padded, mask = torch.full((4, 8), 22), torch.zeros(4, 8, dtype=torch.long)
        for index, row in enumerate(rows):
            place = slice(8 - len(row), 8) if side == "left" else slice(0, len(row))
            padded[index, place], mask[index, place] = row, 1
        for settings in ({}, {"batch_size": 3}, {"memory_budget": 1}):
            together = model.log_likelihood(padded, mask, orders=orders, alpha_0=alpha_0, **settings)
            for index, row in enumerate(rows):
                offset = 8 - len(row) if side == "left" else 0
                kept = torch.stack(
                    [order[(order >= offset) & (order < offset + len(row))] - offset for order in orders]
                )
                alone = model.log_likelihood(row[None], orders=kept)
                torch.testing.assert_close(
                    together.log_likelihood_per_order[index], alone.log_likelihood_per_order[0], atol=1e-4, rtol=0
                )


def test_scoring_orders_are_those_of_generation():
    """The distribution of orders: drawn as generate draws them, and as `order_probability` says."""
    alpha_0, draws = 0.6, 30_000
    generator = torch.Generator().manual_seed(0)
    ones = torch.ones(1, 3, dtype=torch.bool)
    drawn = sample_scoring_orders(ones, ~ones, draws, alpha_0, generator)[0]
    counts = torch.binomial(torch.full((draws,), 3.0), torch.full((draws,), alpha_0), generator=generator).long()
    planned = torch.cat(
        [sample_generation_order(int((counts == count).sum()), 3, count, generator) for count in range(4)]
    )
    probabilities = {order: order_probability(order, alpha_0) for order in all_orders(3)}
    assert sum(probabilities.values()) == pytest.approx(1)
    for sample in (drawn, planned):
        for order, probability in probabilities.items():
            frequency = (sample == torch.tensor(order)).all(dim=-1).double().mean()
            assert abs(frequency - probability) < 4 * math.sqrt(probability * (1 - probability) / draws)


def test_likelihood_repeats_with_the_generator_and_leaves_the_model_as_it_was():
    model = randomized_model(hidden_dropout=0.5).train()
    text = random_batch(model, 2, 6)
    first, second = (
        model.log_likelihood(text, num_orders=3, generator=torch.Generator().manual_seed(4)) for _ in range(2)
    )
    assert torch.equal(first.log_likelihood, second.log_likelihood), "no dropout"
    assert model.training
    assert len({tuple(order) for order in first.orders.flatten(0, 1).tolist()}) > 3


@pytest.mark.parametrize("alpha_0", [0.0, 0.4, 1.0])
def test_nelbo_is_what_the_collator_and_the_loss_estimate(alpha_0):
    model = randomized_model(alpha_0=alpha_0)
    text = random_batch(model, 4, 6)
    output = model.nelbo(text, num_draws=800, generator=torch.Generator().manual_seed(0))
    collator = DataCollatorForHybridMaskedDiffusion(mask_token_id=MASK, alpha_0=alpha_0)
    rows = [{"input_ids": row} for row in text]
    losses = torch.tensor([model(**collator(rows * 20)).loss.item() for _ in range(30)])
    standard_error = (losses.std() / 30**0.5).hypot(output.standard_error.norm() / 4 / 6)
    assert abs(losses.mean() - output.nelbo.mean() / 6) < 4 * standard_error + 1e-5
    assert output.nelbo_per_draw.shape == (4, 800)


def test_nelbo_ignores_padding_and_context():
    model = randomized_model()
    text = random_batch(model, 1, 5)
    padded = torch.tensor([[22, 22, *text[0].tolist(), 22]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 0]])
    arguments = {"num_draws": 1500, "generator": torch.Generator().manual_seed(0)}
    for context in (None, torch.tensor([[1, 1, 0, 0, 0]])):
        alone = model.nelbo(text, context_mask=context, **arguments)
        padded_context = None if context is None else torch.nn.functional.pad(context, (2, 1))
        together = model.nelbo(padded, mask, padded_context, **arguments)
        difference = abs(alone.nelbo - together.nelbo)
        assert difference < 4 * alone.standard_error.hypot(together.standard_error)


def test_stratified_times_make_the_standard_error_conservative():
    model = randomized_model(alpha_0=1.0)
    text = random_batch(model, 1, 6)
    runs = [model.nelbo(text, num_draws=64) for _ in range(100)]
    actual = torch.stack([run.nelbo for run in runs]).var()
    claimed = torch.stack([run.standard_error for run in runs]).square().mean()
    assert actual < 1.2 * claimed
    assert model.nelbo(text, num_draws=1).standard_error.isnan().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": torch.tensor([[1, MASK]])}, "holds the mask id 23"),
        ({"input_ids": [[1, 2]]}, "got list"),
        ({"input_ids": torch.ones(2, 3)}, "integer ids"),
        ({"attention_mask": torch.ones(1, 2)}, r"`attention_mask` must have the shape \(2, 3\), got \(1, 2\)"),
        ({"context_mask": torch.ones(3)}, r"`context_mask` must have the shape \(2, 3\)"),
        ({"num_orders": 0}, "`num_orders` must be 'all' or a positive integer, got 0"),
        ({"num_orders": "some"}, "'all' or a positive integer, got 'some'"),
        ({"alpha_0": -0.1}, r"`alpha_0` must be None or a number in \[0, 1\], got -0.1"),
        ({"orders": torch.tensor([[0, 1]])}, r"`orders` must have the shape \(K, 3\) or \(2, K, 3\), got"),
        ({"orders": torch.tensor([[0, 1, 1]])}, r"permutations of 0 ... 2"),
        ({"orders": torch.tensor([[0, 1, 2]]), "num_orders": 3}, "leave `num_orders` unset"),
        ({"batch_size": 0}, "`batch_size` must be None or a positive integer, got 0"),
        ({"input_ids": torch.ones(2, 9).long(), "num_orders": "all"}, "at most 8 tokens to score, got up to 9"),
        ({"orders": [[0, 1, 2]]}, "`orders` must be a tensor of integers, got list"),
        ({"orders": torch.tensor([[0.0, 1, 2]])}, "`orders` must be a tensor of integers, got torch.float32"),
        ({"memory_budget": 0}, "`memory_budget` must be a positive number of bytes, got 0"),
        ({"generator": [1]}, r"`generator` must be a torch.Generator, or a list of them, got \[1\]"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message):
    model = randomized_model()
    with pytest.raises(ValueError, match=message):
        model.log_likelihood(**{"input_ids": torch.ones(2, 3).long()} | arguments)


@pytest.mark.parametrize("alpha_0", [0.0, 0.5, 1.0])
def test_all_orders_of_rows_with_different_numbers_of_tokens(alpha_0):
    model = randomized_model()
    rows = [random_batch(model, 1, length, seed=length)[0] for length in (4, 2, 0, 3)]
    padded, mask = torch.full((4, 5), 22), torch.zeros(4, 5)
    for index, row in enumerate(rows):
        padded[index, : len(row)], mask[index, : len(row)] = row, 1
    together = model.log_likelihood(padded, mask, num_orders="all", alpha_0=alpha_0).log_likelihood
    for index, row in enumerate(rows):
        alone = model.log_likelihood(row[None], num_orders="all", alpha_0=alpha_0).log_likelihood
        torch.testing.assert_close(together[index : index + 1], alone, atol=1e-4, rtol=0)


def test_all_orders_of_a_left_to_right_model_are_one():
    model = randomized_model()
    text = random_batch(model, 1, 20)
    output = model.log_likelihood(text, num_orders="all", alpha_0=0.0)
    assert output.orders.shape == (1, 1, 20)
    torch.testing.assert_close(output.log_likelihood, model.log_likelihood(text, alpha_0=0.0).log_likelihood)


def test_modules_keep_their_modes():
    model = randomized_model(hidden_dropout=0.5).train()
    model.model.layers[0].eval()
    model.log_likelihood(random_batch(model, 1, 3))
    assert model.training
    assert not model.model.layers[0].training
    assert model.model.layers[1].training


def test_empty_and_fully_given_texts_have_probability_one():
    model = randomized_model()
    assert model.log_likelihood(torch.ones(2, 0).long()).log_likelihood.tolist() == [0, 0]
    text = random_batch(model, 2, 3)
    assert model.log_likelihood(text, context_mask=torch.ones(2, 3), num_orders=2).log_likelihood.tolist() == [0, 0]
    assert model.nelbo(text, attention_mask=torch.zeros(2, 3)).nelbo.tolist() == [0, 0]


@pytest.mark.parametrize("chunk_length", [1, 3, 8, 20])
def test_text_scored_in_chunks_has_the_same_likelihood(attention, chunk_length):
    """On top of a cache, with padding, contexts of different lengths and several orders."""
    model = randomized_model(attention=attention)
    text = random_batch(model, 3, 10)
    context, padding = torch.zeros_like(text), torch.ones_like(text)
    context[0, [1, 2, 7]] = context[2, :9] = 1
    padding[1, :4] = 0
    arguments = {"num_orders": 3, "alpha_0": 0.6}
    expected = model.log_likelihood(text, padding, context, generator=torch.Generator().manual_seed(0), **arguments)
    output = model.log_likelihood(
        text,
        padding,
        context,
        generator=torch.Generator().manual_seed(0),
        chunk_length=chunk_length,
        batch_size=4,
        **arguments,
    )
    assert torch.equal(output.orders, expected.orders)
    assert torch.equal(output.is_greedy, expected.is_greedy)
    torch.testing.assert_close(output.token_log_probs, expected.token_log_probs, atol=1e-4, rtol=0)
    torch.testing.assert_close(output.log_likelihood, expected.log_likelihood, atol=1e-4, rtol=0)


@pytest.mark.parametrize("chunk_length", [0, 2.5, True])
def test_chunk_lengths_are_checked(chunk_length):
    model = randomized_model()
    with pytest.raises(ValueError, match="`chunk_length` must be None or a positive integer"):
        model.log_likelihood(random_batch(model, 1, 4), chunk_length=chunk_length)
