"""What makes decoding fast must not change what is decoded."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import random_batch, randomized_model

from eso_lm.modeling_eso import MAX_DECODED_SLOTS, EsoLinear, EsoModulation


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, MAX_DECODED_SLOTS + 2),
    batch=st.integers(1, 3),
    bias=st.booleans(),
    with_gradients=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_products_of_few_rows_are_those_of_a_linear_layer(rows, batch, bias, with_gradients, dtype):
    torch.manual_seed(rows)
    layer = EsoLinear(24, 40, bias=bias).to(dtype)
    inputs = torch.randn(batch, rows, 24, dtype=dtype)
    with torch.set_grad_enabled(with_gradients):
        outputs = layer(inputs)
    expected = F.linear(inputs, layer.weight, layer.bias)
    assert outputs.requires_grad == with_gradients
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(outputs, expected, atol=tolerance, rtol=tolerance)


@torch.no_grad()
def test_folded_modulations_change_nothing_and_are_forgotten():
    model = randomized_model()
    text = random_batch(model, 2, 6)
    expected = model(text).logits
    with model.modulations_folded():
        assert torch.equal(model(text).logits, expected)
        folded = [module.folded for module in model.modules() if isinstance(module, EsoModulation)]
        assert len(folded) == 3
        assert all(vectors is not None for vectors in folded)
    for module in model.modules():
        assert getattr(module, "folded", None) is None
    for parameter in model.parameters():
        parameter.mul_(0.5)
    assert not torch.equal(model(text).logits, expected)


def test_a_generation_that_fails_forgets_them_too():
    model = randomized_model()
    with pytest.raises(ValueError, match="No token can be drawn"):
        model.generate(max_new_tokens=4, logits_processor=[lambda ids, scores: scores - torch.inf])
    assert model.model.modulation.folded is None


@torch.no_grad()
def test_generation_follows_the_weights():
    """Between two calls the weights may be trained, merged or loaded."""
    model = randomized_model()
    arguments = {"max_new_tokens": 12, "do_sample": False, "alpha_0": 0.0}
    first = model.generate(**arguments)
    for layer in model.model.layers:
        layer.modulation.weight.neg_()
    second = model.generate(**arguments)
    fresh = randomized_model()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(second, fresh.generate(**arguments))
    assert not torch.equal(first, second)
