"""Adaptive unmasking: each forward keeps what it is sure of, and the cache stays exact."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import random_batch, randomized_model
from torch.distributions import Categorical

from eso_lm.generation_sampling import select_tokens

MASK = 23

probabilities = st.lists(st.floats(0.01, 1), min_size=4, max_size=4).map(torch.tensor)


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(st.lists(probabilities, max_size=5), min_size=1, max_size=4).filter(any),
    threshold=st.floats(0, 1),
    bound=st.floats(0, 8),
)
def test_selection_follows_the_definition(rows, threshold, bound):
    """Against plain loops over the candidates of each row."""
    logits = torch.stack([candidate.log() for row in rows for candidate in row])
    widths = [len(row) for row in rows]
    confident = select_tokens(logits, widths, confidence_threshold=threshold).split(widths)
    bounded = select_tokens(logits, widths, entropy_bound=bound).split(widths)
    for row, is_confident, is_bounded in zip(rows, confident, bounded, strict=True):
        distributions = [Categorical(candidate) for candidate in row]
        tops = [float(distribution.probs.max()) for distribution in distributions]
        for top, is_kept in zip(tops, is_confident.tolist(), strict=True):
            if abs(top - threshold) > 1e-3:
                assert is_kept or top < threshold or top < max(tops)
                assert not is_kept or top > threshold or top > max(tops) - 1e-3
        entropies = [float(distribution.entropy()) for distribution in distributions]
        kept = [entropy for entropy, is_kept in zip(entropies, is_bounded.tolist(), strict=True) if is_kept]
        left = [entropy for entropy, is_kept in zip(entropies, is_bounded.tolist(), strict=True) if not is_kept]
        if row:
            assert is_confident.any()
            assert kept
            assert sum(kept) - max(kept) <= bound + 1e-2, "a set that is kept respects the bound"
        if left:
            assert max(kept) <= min(left) + 1e-3, "the most certain ones are kept"
            assert sum(kept) > bound - 1e-2, "no further one would have fitted"


@pytest.mark.parametrize("unmasking_order", ["random", "strided", "left_to_right"])
@pytest.mark.parametrize("criterion", [{"confidence_threshold": 0.25}, {"entropy_bound": 2.0}])
@pytest.mark.parametrize("alpha_0", [0.5, 1.0])
def test_adaptive_unmasking_is_exact_with_the_cache(attention, unmasking_order, criterion, alpha_0):
    model = randomized_model(attention=attention)
    arguments = {
        "max_new_tokens": 18,
        "alpha_0": alpha_0,
        "unmasking_order": unmasking_order,
        "num_candidates": 5,
        "return_dict_in_generate": True,
        **criterion,
    }
    outputs = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        outputs.append(model.generate(random_batch(model, 3, 3), use_cache=use_cache, **arguments))
    cached, uncached = outputs
    assert torch.equal(cached.sequences, uncached.sequences)
    assert torch.equal(cached.unmasking_steps, uncached.unmasking_steps)
    torch.testing.assert_close(cached.log_probs, uncached.log_probs, atol=1e-4, rtol=0)
    kept = torch.stack(
        [(cached.unmasking_steps == step).sum(dim=-1) for step in range(1, cached.unmasking_steps.max() + 1)]
    )
    assert kept.max() <= 5
    assert 1 < cached.num_function_evaluations < 18, "some forwards keep several"


@torch.no_grad()
def test_what_is_kept_is_what_the_model_is_sure_of():
    """Every forward is repeated by hand: its window, its logits, and its choice."""
    model = randomized_model()
    output = model.generate(
        torch.tensor([[3, 9]]),
        max_new_tokens=12,
        alpha_0=1.0,
        unmasking_order="left_to_right",
        confidence_threshold=0.25,
        num_candidates=4,
        return_dict_in_generate=True,
    )
    tokens, steps = output.sequences[0], output.unmasking_steps[0]
    decided = [0, 1]
    for step in range(1, output.num_function_evaluations + 1):
        window = [position for position in range(14) if steps[position] >= step][:4]
        order = torch.tensor([decided + window])
        ids = torch.cat([tokens[decided], torch.full((len(window),), MASK)])[None]
        confidence = model(ids, position_ids=order).logits[0, len(decided) :].softmax(dim=-1).amax(dim=-1)
        expected = {position for position, top in zip(window, confidence, strict=True) if top >= 0.25}
        expected = expected or {window[int(confidence.argmax())]}
        kept = [position for position in window if steps[position] == step]
        assert set(kept) == expected
        decided += kept


def test_extremes_are_all_at_once_and_one_at_a_time():
    model = randomized_model()
    arguments = {"max_new_tokens": 12, "alpha_0": 1.0, "num_candidates": 4, "return_dict_in_generate": True}
    for criterion in ({"confidence_threshold": 0.0}, {"entropy_bound": 1e6}, {"entropy_bound": math.inf}):
        assert model.generate(**arguments, **criterion).num_function_evaluations == 3
    for criterion in ({"confidence_threshold": 1.0}, {"entropy_bound": 0.0}):
        assert model.generate(**arguments, **criterion).num_function_evaluations == 12
    everything = model.generate(**arguments | {"num_candidates": 50}, confidence_threshold=0.0)
    assert everything.num_function_evaluations == 1


def test_the_sequential_phase_keeps_to_one_token_a_forward():
    model = randomized_model()
    output = model.generate(max_new_tokens=12, alpha_0=0.0, confidence_threshold=0.0, return_dict_in_generate=True)
    assert output.unmasking_steps.tolist() == [list(range(1, 13))]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"confidence_threshold": 1.2}, r"`confidence_threshold` must be None or a number in \[0, 1\], got 1.2"),
        ({"entropy_bound": -1}, r"`entropy_bound` must be None or a number in \[0, inf\], got -1"),
        ({"entropy_bound": float("nan")}, "`entropy_bound` must be"),
        ({"confidence_threshold": 0.5, "entropy_bound": 1.0}, "set one of them"),
        ({"confidence_threshold": 0.5, "num_diffusion_steps": 4}, "`num_diffusion_steps=4` fixes the number"),
        ({"num_candidates": 4}, "`num_candidates=4` is for adaptive unmasking"),
        ({"num_candidates": 0, "entropy_bound": 1.0}, "`num_candidates` must be None or a positive integer, got 0"),
    ],
)
def test_contradictory_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        randomized_model().generate(max_new_tokens=4, **arguments)
