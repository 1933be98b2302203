"""Property tests of the pure functions: noise schedule, unmasking counts and generation orders."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eso_lm.generation_order import (
    UNMASKING_ORDERS,
    order_of_slots,
    plan_generation,
    sample_generation_order,
    text_positions,
)
from eso_lm.noise_schedule import (
    EPSILON,
    keep_probability,
    nelbo_weight,
    sample_times,
    sample_unmasking_counts,
)

alphas = st.floats(0, 1)
seeds = st.integers(0, 2**32)


@given(alpha_0=alphas)
def test_keep_probability_falls_from_alpha_0_to_almost_nothing(alpha_0):
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    alpha = keep_probability(t, alpha_0)
    assert alpha[0] == pytest.approx(alpha_0)
    assert alpha[-1] == pytest.approx(alpha_0 * EPSILON)
    assert (alpha.diff() <= 0).all()


@given(alpha_0=st.floats(0.01, 0.99), t=st.floats(0.01, 0.99))
def test_nelbo_weight_is_the_derivative_of_the_schedule(alpha_0, t):
    """w(t) = -α'(t) / (1 - α(t)), with the derivative taken numerically."""
    t, h = torch.tensor(t, dtype=torch.float64), 1e-6
    slope = (keep_probability(t + h, alpha_0) - keep_probability(t - h, alpha_0)) / (2 * h)
    expected = -slope / (1 - keep_probability(t, alpha_0))
    torch.testing.assert_close(nelbo_weight(t, alpha_0), expected, rtol=1e-6, atol=1e-9)


def test_nelbo_weight_of_a_masked_diffusion_model_is_one_over_t():
    t = torch.linspace(0.01, 1, 50, dtype=torch.float64)
    torch.testing.assert_close(nelbo_weight(t, 1.0), 1 / t)


@given(num_rows=st.integers(0, 40), seed=seeds)
def test_times_are_stratified(num_rows, seed):
    t = sample_times(num_rows, torch.Generator().manual_seed(seed))
    assert ((t >= EPSILON) & (t <= 1)).all()
    strata = ((t - EPSILON) / (1 - EPSILON) * num_rows).floor().clamp(max=num_rows - 1)
    assert sorted(strata.tolist()) == list(range(num_rows))


@given(num_tokens=st.integers(0, 60), num_steps=st.integers(1, 80), alpha_0=alphas, seed=seeds)
def test_unmasking_counts_are_positive_and_fit(num_tokens, num_steps, alpha_0, seed):
    counts = sample_unmasking_counts(num_tokens, num_steps, alpha_0, torch.Generator().manual_seed(seed))
    assert all(count > 0 for count in counts)
    assert len(counts) <= num_steps
    assert sum(counts) <= num_tokens
    if alpha_0 == 1:
        assert sum(counts) == num_tokens
    if alpha_0 == 0:
        assert counts == []


@pytest.mark.parametrize("alpha_0", [0.25, 0.5, 1.0])
def test_unmasking_counts_follow_the_reverse_process(alpha_0):
    """A token is revealed before time s with probability 1 - (1 - α_s) / (1 - α_1): compare the mean at half time."""
    generator = torch.Generator().manual_seed(0)
    num_tokens, num_draws = 40, 2000
    # With one step to t = 0, all that the diffusion phase decodes comes at once.
    totals = [sum(sample_unmasking_counts(num_tokens, 1, alpha_0, generator)) for _ in range(num_draws)]
    expected = alpha_0 * (1 - EPSILON) / (1 - alpha_0 * EPSILON)
    deviation = math.sqrt(num_tokens * expected * (1 - expected) / num_draws)
    assert abs(sum(totals) / num_draws - num_tokens * expected) <= 4 * deviation
    many = [sum(sample_unmasking_counts(num_tokens, 25, alpha_0, generator)) for _ in range(num_draws)]
    assert abs(sum(many) / num_draws - num_tokens * expected) <= 4 * deviation
    firsts = []
    for _ in range(num_draws):
        counts = sample_unmasking_counts(num_tokens, 2, 1.0, generator)
        firsts.append(counts[0] if len(counts) == 2 else 0)
    half = 0.5  # at α_0 = 1, half of the tokens are revealed at half time
    assert abs(sum(firsts) / num_draws - num_tokens * half) <= 4 * math.sqrt(num_tokens * 0.25 / num_draws)


@given(num_rows=st.integers(1, 5), num_tokens=st.integers(0, 20), data=st.data(), seed=seeds)
def test_generation_orders_are_permutations_that_end_ascending(num_rows, num_tokens, data, seed):
    num_shuffled = data.draw(st.integers(0, num_tokens))
    order = sample_generation_order(num_rows, num_tokens, num_shuffled, torch.Generator().manual_seed(seed))
    assert order.shape == (num_rows, num_tokens)
    for row in order.tolist():
        assert sorted(row) == list(range(num_tokens))
        assert row[num_shuffled:] == sorted(row[num_shuffled:])


def test_generation_orders_are_uniform():
    """3 tokens, 2 of them shuffled: 6 orders, equally likely (chi-square, 5 degrees of freedom)."""
    order = sample_generation_order(6000, 3, 2, torch.Generator().manual_seed(0))
    counts = Counter(map(tuple, order.tolist()))
    assert len(counts) == 6
    assert sum((count - 1000) ** 2 / 1000 for count in counts.values()) < 20.5  # p = 0.001


@settings(max_examples=50)
@given(data=st.data(), batch=st.integers(1, 3), slots=st.integers(1, 15))
def test_order_of_slots_sorts_by_group_then_rank(data, batch, slots):
    group = torch.tensor(
        data.draw(
            st.lists(st.lists(st.integers(0, 3), min_size=slots, max_size=slots), min_size=batch, max_size=batch)
        )
    )
    rank = torch.rand(batch, slots, dtype=torch.float64)
    order = order_of_slots(group, rank)
    for row in range(batch):
        expected = sorted(range(slots), key=lambda slot, row=row: (group[row, slot].item(), rank[row, slot].item()))
        assert order[row].tolist() == expected


def test_text_positions_count_real_tokens():
    is_real = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    assert text_positions(is_real)[is_real].tolist() == [0, 1, 2, 0, 1, 2]


@settings(max_examples=200, deadline=None)
@given(
    num_tokens=st.integers(0, 40),
    alpha_0=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    num_steps=st.none() | st.integers(1, 60),
    unmasking_order=st.sampled_from(UNMASKING_ORDERS),
    block_length=st.none() | st.integers(1, 50),
)
def test_plans_cover_every_token_block_by_block(num_tokens, alpha_0, num_steps, unmasking_order, block_length):
    order, counts = plan_generation(3, num_tokens, alpha_0, num_steps, unmasking_order, block_length)
    assert order.shape == (3, num_tokens)
    assert sum(counts) == num_tokens
    assert all(count > 0 for count in counts)
    if alpha_0 == 0:
        assert counts == [1] * num_tokens
    for row in order.tolist():
        size = block_length or max(num_tokens, 1)
        for start in range(0, num_tokens, size):
            assert sorted(row[start : start + size]) == list(range(start, min(start + size, num_tokens)))
        if unmasking_order == "left_to_right" or alpha_0 == 0:
            assert row == list(range(num_tokens))


@settings(max_examples=100, deadline=None)
@given(num_tokens=st.integers(1, 60), num_steps=st.integers(1, 70))
def test_strided_steps_take_tokens_far_apart(num_tokens, num_steps):
    order, counts = plan_generation(4, num_tokens, 1.0, num_steps, "strided")
    num_steps = min(num_steps, num_tokens)
    assert len(counts) == num_steps
    for row in order:
        steps = row.split(counts)
        assert all(len({position % num_steps for position in step.tolist()}) == 1 for step in steps)
        assert sorted(int(step[0]) % num_steps for step in steps) == list(range(num_steps))


def test_strided_diffusion_phase_has_its_share():
    """α_0 = 0.3 of 5 steps is 1.5 steps: one or two, half of the time each."""
    diffusion = []
    for _ in range(400):
        _, counts = plan_generation(1, 50, 0.3, 5, "strided")
        diffusion.append(sum(count == 10 for count in counts))
    assert set(diffusion) == {1, 2}
    assert abs(sum(diffusion) / 400 - 1.5) < 4 * 0.5 / 20


def test_strided_rows_differ():
    order, _ = plan_generation(6, 24, 1.0, 6, "strided")
    assert len({tuple(row.tolist()) for row in order}) > 1


@pytest.mark.parametrize("num_tokens", [2, 3, 5, 8, 16, 17, 100])
@pytest.mark.parametrize("is_adaptive", [False, True])
def test_a_strided_order_is_strided_at_any_length(num_tokens, is_adaptive):
    orders = torch.cat(
        [plan_generation(1, num_tokens, 1.0, None, "strided", is_adaptive=is_adaptive)[0] for _ in range(40)]
    )
    stride = math.ceil(math.sqrt(num_tokens))
    first_of_each = orders[:, : num_tokens // stride]
    assert (first_of_each.diff(dim=-1) == stride).all()
    assert len({tuple(order) for order in orders.tolist()}) > 1, "never left to right alone"


def test_one_token_a_forward_has_a_spelling():
    for unmasking_order in ("random", "strided", "left_to_right"):
        order, counts = plan_generation(1, 50, 0.5, "max", unmasking_order)
        assert counts == [1] * 50
        assert sorted(order[0].tolist()) == list(range(50))
    shuffled = [int((plan_generation(1, 50, 0.5, "max")[0].diff() < 0).any()) for _ in range(20)]
    assert sum(shuffled) == 20, "the diffusion phase is in random order"
