"""What makes decoding fast must not change what is decoded."""

import contextlib
import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from device_checks import Machine
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import backbone_config, random_batch, randomized_model
from torch._dynamo.utils import counters

from eso_lm import DataCollatorForHybridMaskedDiffusion, modeling_products
from eso_lm.modeling_attention import MAX_QUERIES_TRANSPOSED, eager_attention_forward
from eso_lm.modeling_eso import EsoModulation
from eso_lm.modeling_products import (
    MAX_FEW_ROWS,
    MIN_LARGE_WEIGHT,
    MIN_PACKED_PRODUCT,
    MIN_PACKED_WEIGHT,
    ROWS_TO_PACK,
    DecodingLinear,
    fast_products,
    linear_gelu,
)

HAS_ONEDNN = torch.backends.mkldnn.is_available()
HAS_FAST_BFLOAT16 = HAS_ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()  # not on a processor without AVX-512


def model_of(backbone: str | None):
    return randomized_model(backbone_config=None if backbone is None else backbone_config(backbone))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, MAX_FEW_ROWS + 2),
    batch=st.integers(1, 3),
    bias=st.booleans(),
    with_gradients=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    size=st.sampled_from([(24, 40), (MIN_LARGE_WEIGHT // 512, 512)]),
    is_packed=st.booleans(),
)
def test_products_of_a_decoding_step_are_those_of_a_linear_layer(
    rows, batch, bias, with_gradients, dtype, size, is_packed
):
    torch.manual_seed(rows)
    holder = torch.nn.ModuleList([torch.nn.Linear(*size, bias=bias).to(dtype)])
    inputs = torch.randn(batch, rows, size[0], dtype=dtype)
    with fast_products(holder), torch.set_grad_enabled(with_gradients):
        layer = holder[0]
        assert type(layer) is DecodingLinear
        layer.rows_to_pack = 1 if is_packed and layer.rows_to_pack else None
        outputs, activated = layer(inputs), linear_gelu(layer, inputs)
        is_large_product = batch * rows * layer.weight.numel() >= MIN_PACKED_PRODUCT
        has_products = {torch.float32: HAS_ONEDNN, torch.bfloat16: HAS_FAST_BFLOAT16, torch.float64: False}[dtype]
        can_be_packed = has_products and layer.weight.numel() >= MIN_PACKED_WEIGHT
        assert (layer.packed is not None) == (is_packed and can_be_packed and is_large_product and not with_gradients)
    expected = F.linear(inputs, layer.weight, layer.bias)
    assert outputs.shape == expected.shape
    assert outputs.requires_grad == with_gradients
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(outputs, expected, atol=tolerance, rtol=tolerance)
    with torch.set_grad_enabled(with_gradients):
        torch.testing.assert_close(
            activated, F.gelu(expected.double(), approximate="tanh").to(dtype), atol=tolerance, rtol=tolerance
        )


@pytest.mark.skipif(not HAS_ONEDNN, reason="needs oneDNN")
@torch.no_grad()
def test_weights_are_packed_once_they_have_been_used_enough(monkeypatch):
    layers = torch.nn.ModuleList([torch.nn.Linear(256, 512), torch.nn.Linear(512, 256), torch.nn.Linear(8, 8)])
    one_row = torch.randn(1, 256), torch.randn(1, 512), torch.randn(1, 8)
    few_rows = [inputs.repeat(MIN_PACKED_PRODUCT // 2**17, 1) for inputs in one_row]
    monkeypatch.setattr(modeling_products, "MAX_PACKED_BYTES", layers[0].weight.nbytes)
    with fast_products(layers):
        for _ in range(ROWS_TO_PACK):
            for layer, inputs in zip(layers, one_row, strict=True):
                layer(inputs)  # too small a product to count
        assert [layer.packed for layer in layers] == [None, None, None]
        for _ in range(ROWS_TO_PACK // len(few_rows[0])):
            assert layers[0].packed is None
            for layer, inputs in zip(layers, few_rows, strict=True):
                layer(inputs)
        # There is room for one of them, and the last is too small.
        assert [layer.packed is not None for layer in layers] == [True, False, False]
        layers[0].weight.mul_(2)
    assert all(set(layer.__dict__) == set(torch.nn.Linear(1, 1).__dict__) for layer in layers)
    torch.testing.assert_close(layers[0](few_rows[0]), F.linear(few_rows[0], layers[0].weight, layers[0].bias))


@settings(max_examples=40, deadline=None)
@given(
    queries=st.integers(1, MAX_QUERIES_TRANSPOSED + 2),
    cached=st.integers(0, 5),
    batch=st.integers(1, 3),
    is_boolean=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_attention_of_few_queries_is_attention(queries, cached, batch, is_boolean, dtype):
    """Keys in a part of a larger cache, a mask of the last keys alone; against transformers' sdpa in float64."""
    torch.manual_seed(queries)
    query = torch.randn(batch, queries, 2, 8, dtype=dtype).transpose(1, 2)  # as the projections leave it
    key, value = (torch.randn(batch, 2, 40, 8, dtype=dtype)[:, :, : cached + queries] for _ in range(2))
    is_visible = torch.rand(1, 1, queries, queries) < 0.5
    is_visible[..., range(queries), range(queries)] = True
    mask = is_visible if is_boolean else torch.zeros(is_visible.shape, dtype=dtype).masked_fill(~is_visible, -1e9)
    expected = F.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), attn_mask=F.pad(is_visible, (cached, 0), value=True), scale=0.3
    )
    with torch.no_grad():
        output, weights = eager_attention_forward(torch.nn.Module(), query, key, value, mask, scaling=0.3)
    tolerance = 4e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(output.transpose(1, 2).double(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(weights.sum(dim=-1).float(), torch.ones(batch, 2, queries), atol=tolerance, rtol=0)


def test_layers_are_plain_ones_again_afterwards():
    """Quantisation, adapters and others look for `nn.Linear` itself."""
    model = randomized_model()
    before = [type(module) for module in model.modules()]
    assert type(model.lm_head) is type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    with fast_products(model):
        assert type(model.lm_head) is DecodingLinear
        assert type(model.model.modulation) is EsoModulation
    model.generate(max_new_tokens=3)
    assert [type(module) for module in model.modules()] == before


@torch.no_grad()
def test_folded_modulations_change_nothing_and_are_forgotten():
    model = randomized_model()
    text = random_batch(model, 2, 6)
    expected = model(text).logits
    with model.ready_to_decode():
        with model.ready_to_decode():
            torch.testing.assert_close(model(text).logits, expected, atol=1e-4, rtol=0)
        assert model.is_ready_to_decode
        folded = [module.folded for module in model.modules() if hasattr(module, "folded")]
        assert len(folded) == 1 + 3 + 5  # the conditioning vector, modulations and norms
        assert all(vectors is not None for vectors in folded)
        torch.testing.assert_close(model(text).logits, expected, atol=1e-4, rtol=0)
    for module in model.modules():
        assert getattr(module, "folded", None) is None
    for parameter in model.parameters():
        parameter.mul_(0.5)
    assert not torch.equal(model(text).logits, expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("backbone", [None, "llama"])
def test_copies_made_meanwhile_follow_their_weights(copied, backbone, monkeypatch):
    """Modulations, norms and packed weights of a copy are no longer constants."""
    monkeypatch.setattr(modeling_products, "MIN_PACKED_WEIGHT", 1)
    monkeypatch.setattr(modeling_products, "MIN_PACKED_PRODUCT", 1)
    model = model_of(backbone)
    text = torch.randint(3, 20, (8, 20))
    with model.ready_to_decode():
        with torch.no_grad():
            model(text), model(text)
        assert not HAS_ONEDNN or model.lm_head.packed is not None
        other = copied(model)
    assert not other.is_ready_to_decode
    assert type(other.lm_head) is torch.nn.Linear
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
        fresh = copy.deepcopy(model)
        fresh.load_state_dict(other.state_dict())
        torch.testing.assert_close(other(text).logits, fresh(text).logits)


def test_forwards_with_gradients_are_as_ever_meanwhile():
    model = randomized_model()
    text = torch.randint(3, 20, (2, 6))
    gradients = []
    for is_ready in (False, True):
        with model.ready_to_decode() if is_ready else contextlib.nullcontext():
            for _ in range(2):
                model.zero_grad()
                model(text).logits.logsumexp(dim=-1).sum().backward()
                gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0])
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0])


@pytest.mark.parametrize("backbone", [None, "llama"])
def test_threads_share_a_model_that_is_ready_to_decode(backbone):
    """Whoever comes first makes it ready, whoever goes last puts it back; no one waits for another."""
    model = model_of(backbone)
    before = [type(module) for module in model.modules()]
    implementation = model.model.config._attn_implementation
    prompts, attention_mask = random_batch(model, 3, 6), torch.ones(3, 6, dtype=torch.long)
    attention_mask[0, :4] = attention_mask[1, :2] = 0

    def generate(seed: int) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(3 * seed + row) for row in range(3)]
        settings = {"max_new_tokens": 3 + seed % 9, "num_diffusion_steps": 4, "generator": generators}
        return model.generate(prompts, attention_mask=attention_mask, **settings)

    expected = [generate(seed) for seed in range(40)]
    with ThreadPoolExecutor(max_workers=5) as threads:
        found = list(threads.map(generate, range(40)))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert [type(module) for module in model.modules()] == before
    assert model.model.config._attn_implementation == implementation
    assert not model.is_ready_to_decode


@pytest.mark.parametrize("backbone", [None, "llama"])
def test_a_thread_goes_on_after_the_one_that_came_first(backbone):
    model = model_of(backbone)
    prompts, attention_mask = random_batch(model, 3, 6), torch.ones(3, 6, dtype=torch.long)
    attention_mask[0, :4] = attention_mask[1, :2] = 0
    has_begun, may_go_on = threading.Event(), threading.Event()

    def wait(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        has_begun.set()
        assert may_go_on.wait(60)
        return scores

    def generate() -> torch.Tensor:
        generators = [torch.Generator().manual_seed(row) for row in range(3)]
        arguments = {"generator": generators, "logits_processor": [wait], "max_new_tokens": 9}
        return model.generate(prompts, attention_mask=attention_mask, **arguments)

    with ThreadPoolExecutor(max_workers=1) as threads:
        with model.ready_to_decode():
            found = threads.submit(generate)
            assert has_begun.wait(60)
        assert model.is_ready_to_decode
        may_go_on.set()
        text = found.result()
    assert not model.is_ready_to_decode
    assert torch.equal(text, generate())


@pytest.mark.skipif(not HAS_ONEDNN, reason="needs oneDNN")
@torch.no_grad()
def test_autocast_has_its_way():
    layers = torch.nn.ModuleList([torch.nn.Linear(512, 512)])
    inputs = torch.randn(ROWS_TO_PACK, 512)
    with fast_products(layers):
        layers[0](inputs), layers[0](inputs)
        assert layers[0].packed is not None
        with torch.autocast("cpu", torch.bfloat16):
            assert layers[0](inputs).dtype == torch.bfloat16


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


def ragged_arguments(model) -> dict:
    """Three rows that advance on their own, with padding and holes."""
    prompt = random_batch(model, 3, 9)
    attention_mask = torch.ones_like(prompt)
    prompt[:, 3] = model.config.mask_token_id
    attention_mask[1, :4] = attention_mask[2, 5:] = 0
    generators = [torch.Generator().manual_seed(row) for row in range(3)]
    return {"inputs": prompt, "attention_mask": attention_mask, "generator": generators}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("is_ragged", [False, True])
@pytest.mark.parametrize(
    "schedule",
    [
        {"num_diffusion_steps": 9, "unmasking_order": "random"},
        {"alpha_0": 0.4},
        {"entropy_bound": 9.0},
        {"block_length": 8},
    ],
)
def test_steps_of_static_shape_generate_the_same(attention, is_ragged, schedule):
    model = randomized_model(attention)

    def generate(**settings):
        torch.manual_seed(0)
        arguments = ragged_arguments(model) if is_ragged else {"num_return_sequences": 2}
        return model.generate(
            **arguments, max_new_tokens=30, return_dict_in_generate=True, output_logits=True, **schedule, **settings
        )

    expected, static = generate(), generate(cache_implementation="static")
    assert torch.equal(static.sequences, expected.sequences)
    assert torch.equal(static.unmasking_steps, expected.unmasking_steps)
    torch.testing.assert_close(static.logits, expected.logits, atol=1e-4, rtol=0)


def test_few_shapes_serve_all_steps():
    model = randomized_model()
    shapes = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    settings = {"max_new_tokens": 60, "num_diffusion_steps": 12, "unmasking_order": "random", "alpha_0": 0.9}
    for seed in range(5):
        torch.manual_seed(seed)
        model.generate(random_batch(model, 2, 35), cache_implementation="static", **settings)
    hook.remove()
    widths = {width for batch, width in shapes if width < 35}  # the first of each holds the prompt
    assert widths <= {2, 4, 8, 16, 32, 64}
    assert len(shapes) > 50


@pytest.mark.slow
def test_a_step_compiles_as_one_graph():
    model = randomized_model()
    torch._dynamo.reset()
    expected = model.generate(
        **ragged_arguments(model), max_new_tokens=20, num_diffusion_steps=6, unmasking_order="random"
    )
    counters.clear()
    for _ in range(2):
        sequences = model.generate(
            **ragged_arguments(model),
            max_new_tokens=20,
            num_diffusion_steps=6,
            unmasking_order="random",
            **Machine("cpu", backend="aot_eager").compiled_steps(),
        )
        assert torch.equal(sequences, expected)
    assert not counters["graph_break"]
    # One or two of fixed shape, then one of any: not one for each width.
    assert 0 < counters["stats"]["unique_graphs"] <= 4


@pytest.mark.slow
def test_the_backbone_of_a_training_step_compiles_once():
    """Rows, masks and queries differ from batch to batch: that must not compile anything anew."""
    model = randomized_model().train()
    for layer in model.model.layers:
        layer.dropout.p = 0.0
    collator = DataCollatorForHybridMaskedDiffusion(mask_token_id=model.config.mask_token_id, alpha_0=0.4, seed=0)
    batches = [collator([{"input_ids": row} for row in random_batch(model, 8, 16)]) for _ in range(6)]

    def losses_and_gradients(call):
        for batch in batches:
            model.zero_grad()
            loss = call(**batch).loss
            loss.backward()
            yield loss.item(), model.model.layers[0].mlp.up_proj.weight.grad.clone()

    torch._dynamo.reset()
    expected = list(losses_and_gradients(model))
    compiled_model = torch.compile(model, backend="aot_eager")
    graphs = []
    for (loss, gradient), (expected_loss, expected_gradient) in zip(
        losses_and_gradients(compiled_model), expected, strict=True
    ):
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        torch.testing.assert_close(gradient, expected_gradient, atol=1e-5, rtol=1e-4)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[-1] == graphs[2]


@pytest.mark.parametrize("max_new_tokens", [5, 30, 255])
def test_keys_of_static_steps_have_the_same_shape_for_short_texts(max_new_tokens):
    model = randomized_model()
    settings = {"cache_implementation": "static", "disable_compile": True, "num_diffusion_steps": 2, "alpha_0": 1.0}
    output = model.generate(max_new_tokens=max_new_tokens, return_dict_in_generate=True, **settings)
    assert output.past_key_values.layers[0].keys.shape[-2] == 256
