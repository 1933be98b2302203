"""The decoding step on the CPU: the same numbers as the modules give, by fewer operations."""

import copy
import math
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import IA3Config, LNTuningConfig, LoHaConfig, LoraConfig, TrainableTokensConfig, get_peft_model
from tiny_models import backbone_config, random_batch, random_orders, randomized_model
from transformers.cache_utils import DynamicCache

from eso_lm import generation_sampling, modeling_attention, modeling_decoding, modeling_products
from eso_lm.generation_cache import PreallocatedCache
from eso_lm.modeling_attention import (
    attend_few_queries,
    eager_attention_forward,
    grouped_sdpa_attention_forward,
    rotate,
)
from eso_lm.modeling_products import DecodingLinear, fast_products

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
SIZES = {"num_key_value_heads": 2, "intermediate_size": 48}
KNOWN = {
    None: randomized_model(),
    "llama": randomized_model(backbone_config=backbone_config("llama", head_dim=16, attention_bias=True)),
    "mistral": randomized_model(backbone_config=backbone_config("mistral")),
    "qwen2": randomized_model(backbone_config=backbone_config("qwen2", **SIZES)),
}


@pytest.fixture
def packs_at_once(monkeypatch):
    """Weights of any size are packed when they are used for the second time."""
    for name in ("MIN_PACKED_WEIGHT", "MIN_PACKED_PRODUCT", "ROWS_TO_PACK"):
        monkeypatch.setattr(modeling_products, name, 1)


def run_on_cache(model, cache, ids, positions, num_cached: int, mask=None) -> torch.Tensor:
    """Hidden states of all slots but the first `num_cached`, which are run before them."""
    common = {"past_key_values": cache, "use_cache": True}
    model.run_backbone(input_ids=ids[:, :num_cached], position_ids=positions[:, :num_cached], **common)
    rest = {"input_ids": ids[:, num_cached:], "position_ids": positions[:, num_cached:], "attention_mask": mask}
    return model.run_backbone(**rest, past_key_values=cache).last_hidden_state


@contextmanager
def decoded_three_times(model) -> Iterator[None]:
    """A model that is ready to decode, and has given the states that it gives otherwise, three times."""
    ids, positions = random_batch(model, 2, 8), random_orders(2, 8)
    expected = run_on_cache(model, PreallocatedCache(2, 8), ids, positions, 6)
    with model.ready_to_decode():
        for _ in range(3):
            states = run_on_cache(model, PreallocatedCache(2, 8), ids, positions, 6)
            torch.testing.assert_close(states, expected, atol=1e-4, rtol=1e-5)
        yield


@torch.no_grad()
@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(list(KNOWN)),
    batch=st.integers(1, 3),
    num_cached=st.integers(1, 7),
    num_slots=st.one_of(st.integers(1, 18), st.integers(63, 65)),
    has_mask=st.booleans(),
    by_products=st.booleans(),
    is_preallocated=st.booleans(),
)
@example(kind=None, batch=1, num_cached=3, num_slots=2, has_mask=True, by_products=True, is_preallocated=True)
def test_a_step_is_a_forward_of_the_backbone(
    kind, batch, num_cached, num_slots, has_mask, by_products, is_preallocated
):
    torch.manual_seed(num_slots)
    model = KNOWN[kind]
    length = num_cached + num_slots
    ids, positions = random_batch(model, batch, length), random_orders(batch, length)
    mask = None
    if has_mask:
        mask = torch.rand(batch, 1, num_slots, num_slots) < 0.5
        mask[..., range(num_slots), range(num_slots)] = True

    def new_cache():
        return PreallocatedCache(2, length + 5) if is_preallocated else DynamicCache()

    expected = run_on_cache(model, new_cache(), ids, positions, num_cached, mask)
    run = mock.Mock(side_effect=modeling_decoding.DecodingStep.__call__, autospec=True)
    with (
        mock.patch.object(modeling_attention, "MIN_SCORES_BY_PRODUCTS", 0 if by_products else 2**20),
        mock.patch.object(modeling_decoding.DecodingStep, "__call__", lambda self, **given: run(self, **given)),
        model.ready_to_decode(),
    ):
        states = run_on_cache(model, new_cache(), ids, positions, num_cached, mask)
    torch.testing.assert_close(states, expected, atol=2e-5, rtol=1e-5)
    assert run.call_count == (num_slots <= modeling_attention.MAX_DECODED_SLOTS)


@torch.no_grad()
@pytest.mark.parametrize("kind", [None, "llama"])
def test_the_angles_of_a_step_are_those_of_any_position(kind):
    model = KNOWN[kind]
    positions = torch.tensor([[40, 3, 977, 12]])
    ids = random_batch(model, 1, 4)
    expected = run_on_cache(model, DynamicCache(), ids, positions, 1)
    with model.ready_to_decode():
        for first in (0, 5, 900):  # a table that is too short, and one that is long enough
            run_on_cache(model, DynamicCache(), ids[:, :2], torch.tensor([[first, first + 1]]), 1)
            states = run_on_cache(model, DynamicCache(), ids, positions, 1)
            torch.testing.assert_close(states, expected, atol=2e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", [None, "llama"])
@pytest.mark.parametrize("furthest", [-3, 2**15 - 1, 2**15, 30_000_000])
def test_angles_of_positions_beyond_the_table_are_computed(kind, furthest):
    model = KNOWN[kind]
    ids, positions = random_batch(model, 1, 5), torch.tensor([[3, 1, 0, furthest, 2]])
    expected = run_on_cache(model, DynamicCache(), ids, positions, 2)
    with model.ready_to_decode():
        states = run_on_cache(model, DynamicCache(), ids, positions, 2)
        assert model._decoding_step.angles.shape[1] <= 2**15
    torch.testing.assert_close(states, expected, atol=2e-5, rtol=1e-5)


@needs_onednn
@torch.no_grad()
@pytest.mark.parametrize("backbone", [None, "llama", "qwen2"])
def test_layers_that_are_fed_the_same_share_a_product(backbone, packs_at_once):
    """Queries, keys and values; the gate and what it lets through. Biases and sizes may differ."""
    model = copy.deepcopy(KNOWN[backbone])
    with decoded_three_times(model):
        attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
        shared = attention.q_proj.packed[0]
        assert shared.layers == (attention.q_proj, attention.k_proj, attention.v_proj)
        assert [attention.k_proj.packed, attention.v_proj.packed] == [(shared, 1), (shared, 2)]
        assert attention.o_proj.packed[0].layers == (attention.o_proj,)
        if backbone is not None:
            assert mlp.up_proj.packed[0].layers == (mlp.gate_proj, mlp.up_proj)


@needs_onednn
@torch.no_grad()
@pytest.mark.parametrize("has_gelu", [False, True])
def test_a_shared_product_is_of_the_input_as_it_is(has_gelu, packs_at_once):
    """Not of another tensor, nor of what it was before it was changed in place."""
    torch.manual_seed(0)
    layers = torch.nn.ModuleList([torch.nn.Linear(8, 6), torch.nn.Linear(8, 4, bias=False), torch.nn.Linear(8, 5)])
    plain = copy.deepcopy(layers)

    def expected(index, inputs):
        outputs = plain[index](inputs)
        return F.gelu(outputs, approximate="tanh") if has_gelu else outputs

    with fast_products(layers):
        for _ in range(2):
            inputs = torch.randn(2, 8)
            for layer in layers:
                layer(inputs)
        assert layers[0].packed[0].layers == tuple(layers)
        inputs, others = torch.randn(2, 8), torch.randn(3, 8)
        calls = [(0, inputs), (1, inputs), (2, inputs), (2, others), (1, inputs), (0, others), (0, inputs)]
        for index, given_inputs in calls:
            found = layers[index](given_inputs, has_gelu=has_gelu)
            torch.testing.assert_close(found, expected(index, given_inputs), atol=1e-5, rtol=1e-5)
        layers[0](inputs)
        inputs.mul_(-3)
        torch.testing.assert_close(layers[1](inputs, has_gelu=has_gelu), expected(1, inputs), atol=1e-5, rtol=1e-5)
        with torch.inference_mode():
            inputs = torch.randn(2, 8)
            layers[0](inputs)
            inputs.mul_(-3)  # of which nothing keeps count
            torch.testing.assert_close(layers[1](inputs, has_gelu=has_gelu), expected(1, inputs), atol=1e-5, rtol=1e-5)
        layers[0](inputs), layers[2](inputs)
        assert layers[0].packed[0].kept is None  # the last of them has taken its part


@torch.no_grad()
def test_without_onednn_nothing_is_packed(packs_at_once, monkeypatch):
    monkeypatch.setattr(modeling_products, "_can_be_packed", lambda dtype: False)
    model = KNOWN[None]
    with decoded_three_times(model):
        assert all(getattr(module, "packed", None) is None for module in model.modules())


@torch.no_grad()
@pytest.mark.parametrize(("num_slots", "num_rows"), [(1, 1), (2, 4), (3, 4), (5, 5)])
def test_products_of_two_or_three_rows_are_of_four(num_slots, num_rows):
    """Which oneDNN makes in less time."""
    model, seen = KNOWN[None], []
    ids, positions = random_batch(model, 1, 4 + num_slots), random_orders(1, 4 + num_slots)
    with model.ready_to_decode():
        multiply = DecodingLinear.forward
        with mock.patch.object(DecodingLinear, "forward", autospec=True) as forward:
            forward.side_effect = lambda layer, states, **given: (
                seen.append(states.shape),
                multiply(layer, states, **given),
            )[1]
            run_on_cache(model, DynamicCache(), ids, positions, 4)
    assert {shape[:2] for shape in seen[-12:]} == {(1, num_rows)}


@needs_onednn
@torch.no_grad()
def test_a_shared_product_is_computed_once(packs_at_once):
    layers = torch.nn.ModuleList([torch.nn.Linear(8, 6) for _ in range(3)])
    with fast_products(layers):
        for repeat in range(3):
            inputs = torch.randn(2, 8)
            with mock.patch.object(
                modeling_products.PackedWeight,
                "joint_product",
                autospec=True,
                side_effect=lambda *_: torch.zeros(2, 18),
            ) as product:
                for layer in layers:
                    layer(inputs)
            assert product.call_count == (repeat > 0)


@torch.no_grad()
def test_whoever_listens_to_the_modules_hears_them():
    """A step goes past the modules of the backbone: not where they have hooks."""
    model = randomized_model()
    ids, positions = random_batch(model, 1, 6), random_orders(1, 6)
    heard = []
    with model.ready_to_decode():
        step = model._decoding_step
        given_arguments = {"input_ids": ids, "position_ids": positions, "past_key_values": DynamicCache()}
        assert not step.can_run(given_arguments)  # nothing is cached
        model.run_backbone(**given_arguments)
        assert step.can_run(given_arguments)
        hook = model.model.layers[1].mlp.register_forward_hook(lambda *_: heard.append(1))
        run_on_cache(model, DynamicCache(), ids, positions, 3)
        assert len(heard) == 2
        hook.remove()
        assert step.can_run(given_arguments)
        assert not step.can_run(given_arguments | {"output_attentions": True})
        assert not step.can_run(given_arguments | {"attention_mask": torch.ones(1, 12)})
        assert not step.can_run(given_arguments | {"attention_mask": torch.ones(1, 4, 6, 12, dtype=torch.bool)})
        assert step.can_run(given_arguments | {"attention_mask": torch.ones(1, 1, 6, 12, dtype=torch.bool)})
        with torch.enable_grad():
            assert not step.can_run(given_arguments)
        with torch.autocast("cpu", torch.bfloat16):
            assert not step.can_run(given_arguments)
    assert model._decoding_step is None


@torch.no_grad()
def test_what_records_states_is_no_listener():
    """transformers leaves its hooks behind when it has been asked for hidden states once."""
    model = copy.deepcopy(KNOWN[None])
    ids, positions = random_batch(model, 1, 6), random_orders(1, 6)
    expected = model(ids, position_ids=positions, output_hidden_states=True).hidden_states
    assert any(module._forward_hooks for module in model.modules())
    with model.ready_to_decode():
        cache = DynamicCache()
        model.run_backbone(input_ids=ids[:, :4], position_ids=positions[:, :4], past_key_values=cache)
        given_arguments = {"input_ids": ids[:, 4:], "position_ids": positions[:, 4:], "past_key_values": cache}
        assert model._decoding_step.can_run(given_arguments)
        states = model(**given_arguments, output_hidden_states=True).hidden_states
    torch.testing.assert_close(states[1], expected[1][:, 4:], atol=1e-4, rtol=1e-5)
    assert len(states) == len(expected)


class OtherMLP(torch.nn.Module):
    """An MLP that is like another, and gives twice as much."""

    def __init__(self, mlp):
        super().__init__()
        for name, module in mlp.named_children():
            setattr(self, name, module)
        self.original = [mlp]

    def forward(self, states):
        return 2 * self.original[0](states)


def change_mlp(model):
    layer = model.model.layers[1]
    layer.mlp = OtherMLP(layer.mlp)


def change_class(model):
    attention = model.model.layers[0].self_attn
    kind = type(attention)
    attention.__class__ = type(
        kind.__name__, (kind,), {"forward": lambda self, *args, **kw: (2 * kind.forward(self, *args, **kw)[0], None)}
    )


def change_forward(model):
    mlp = model.model.layers[1].mlp
    forward = mlp.forward
    mlp.forward = lambda states: 2 * forward(states)


def limit_embeddings(model):
    model.model.embed_tokens.max_norm = 0.5


def parametrise(model):
    layer = model.model.layers[0].mlp.down_proj
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", Doubled())


class Doubled(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize("kind", [None, "llama"])
@pytest.mark.parametrize(
    "change",
    [
        change_mlp,
        change_class,
        change_forward,
        limit_embeddings,
        parametrise,
        lambda model: get_peft_model(model, LoHaConfig(target_modules=["up_proj"], r=2)),
        lambda model: get_peft_model(model, IA3Config(target_modules=["up_proj"], feedforward_modules=["up_proj"])),
        lambda model: get_peft_model(model, LNTuningConfig(target_modules=["input_layernorm"])),
        lambda model: get_peft_model(model, LoraConfig(target_modules=["embed_tokens"], r=2)),
        lambda model: get_peft_model(
            model, TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[1, 2])
        ),
    ],
)
def test_a_backbone_of_other_parts_is_run_by_its_modules(kind, change):
    """Adapters that hold no linear layers, subclasses and parametrised weights, too: whatever is not known."""
    model = copy.deepcopy(KNOWN[kind])
    ids = random_batch(model, 2, 9)
    plain = model.generate(
        ids, max_new_tokens=8, generator=torch.Generator().manual_seed(0), return_dict_in_generate=True
    )
    change(model)
    is_adapted = not all(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            if is_adapted and parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    model.eval()
    with model.ready_to_decode():
        assert model._decoding_step is None

    def log_probs(**settings):
        generator = torch.Generator().manual_seed(0)
        output = model.generate(ids, max_new_tokens=8, generator=generator, return_dict_in_generate=True, **settings)
        return output.sequences, output.log_probs

    for found, expected in zip(log_probs(), log_probs(use_cache=False), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(log_probs()[1], plain.log_probs, atol=1e-3)


@torch.no_grad()
def test_dropout_is_not_left_out():
    model = copy.deepcopy(KNOWN[None]).train()
    ids, positions = random_batch(model, 1, 6), random_orders(1, 6)
    with model.ready_to_decode():
        cache = DynamicCache()
        model.run_backbone(input_ids=ids[:, :4], position_ids=positions[:, :4], past_key_values=cache)
        rest = {"input_ids": ids[:, 4:], "position_ids": positions[:, 4:]}
        first, second = (
            model.run_backbone(**rest, past_key_values=copy.deepcopy(cache)).last_hidden_state for _ in range(2)
        )
    assert not torch.equal(first, second)


@pytest.mark.parametrize("kind", [None, "llama"])
def test_embeddings_of_another_type_are_left_to_the_modules(kind):
    model = copy.deepcopy(KNOWN[kind])
    with model.ready_to_decode():
        assert model._decoding_step is not None
    model.model.embed_tokens.to(torch.bfloat16)
    with model.ready_to_decode():
        assert model._decoding_step is None


@pytest.mark.parametrize("kind", [None, "llama"])
def test_generation_under_autocast_is_close_to_that_in_float32(kind):
    model = KNOWN[kind]
    ids = random_batch(model, 2, 9)
    settings = {"max_new_tokens": 8, "return_dict_in_generate": True, "output_logits": True, "num_diffusion_steps": 1}
    settings |= {"alpha_0": 1.0, "lockstep": True}
    torch.manual_seed(0)
    expected = model.generate(ids, **settings).logits
    with (
        mock.patch.object(modeling_attention, "MIN_SCORES_BY_PRODUCTS", 0),
        torch.no_grad(),
        torch.autocast("cpu", torch.bfloat16),
    ):
        torch.manual_seed(0)
        found = model.generate(ids, **settings).logits
        assert model.generate(ids, max_new_tokens=8).shape == (2, 17)
    is_finite = expected.isfinite()
    assert (found - expected)[is_finite].norm() < 0.05 * expected[is_finite].norm()


@needs_onednn
def test_threads_pack_the_weights_of_a_model_together(packs_at_once, monkeypatch):
    """The first products of several threads at once, again and again: nobody packs what another has packed."""
    monkeypatch.setattr(modeling_products, "ROWS_TO_PACK", 9)
    model = copy.deepcopy(KNOWN[None])
    ids = random_batch(model, 2, 5)

    def run(seed: int):
        torch.set_num_threads(1)
        if seed % 5 == 0:
            return model.log_likelihood(
                ids, num_orders=3, generator=torch.Generator().manual_seed(seed)
            ).log_likelihood
        return model.generate(ids, max_new_tokens=6, generator=torch.Generator().manual_seed(seed))

    expected = [run(seed) for seed in range(60)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(max_workers=5) as threads:
            found = list(threads.map(run, range(60)))
    finally:
        sys.setswitchinterval(interval)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_adapters_keep_their_part_in_a_step():
    model = randomized_model()
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "up_proj", "modulation"], r=2))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.1)
    model.eval()
    ids, positions = random_batch(model, 2, 8), random_orders(2, 8)
    expected = run_on_cache(model, DynamicCache(), ids, positions, 6)
    with model.ready_to_decode():
        assert model._decoding_step is None
        states = run_on_cache(model, DynamicCache(), ids, positions, 6)
    torch.testing.assert_close(states, expected, atol=2e-5, rtol=1e-5)
    with adapted.disable_adapter():
        assert not torch.allclose(run_on_cache(model, DynamicCache(), ids, positions, 6), expected, atol=1e-3)


@torch.no_grad()
@settings(max_examples=80, deadline=None)
@given(
    batch=st.integers(1, 3),
    key_heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    queries=st.integers(1, 6),
    keys=st.integers(6, 40),
    room=st.integers(0, 3),
    is_every_other_row=st.booleans(),
    mask_kind=st.sampled_from(["narrow", "wide", "additive"]),
    by_products=st.booleans(),
    copies_row_by_row=st.booleans(),
    keys_of_bag=st.sampled_from([5, 20, 2**11]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_attention_on_a_cache_is_attention(
    batch,
    key_heads,
    groups,
    queries,
    keys,
    room,
    is_every_other_row,
    mask_kind,
    by_products,
    copies_row_by_row,
    keys_of_bag,
    dtype,
):
    """Against softmax(q k + mask) v, spelled out in float64."""
    torch.manual_seed(keys)
    heads, width = key_heads * groups, 8
    query = torch.randn(batch, queries, heads, width, dtype=dtype).transpose(1, 2)
    rows, step = (2 * batch, 2) if is_every_other_row else (batch, 1)
    cached = torch.randn(2, rows, key_heads, keys + room, width, dtype=dtype)
    key, value = cached[:, ::step, :, :keys]
    last = queries if mask_kind == "narrow" else keys
    is_visible = torch.rand(batch, 1, queries, last) < 0.7
    is_visible[..., -1] = True
    mask = is_visible
    if mask_kind == "additive":
        mask = torch.zeros(is_visible.shape, dtype=dtype).masked_fill(~is_visible, torch.finfo(dtype).min)
    of_heads = [tensor.double().repeat_interleave(groups, dim=1) for tensor in (key, value)]
    scores = 0.3 * query.double() @ of_heads[0].mT
    scores = scores.masked_fill(~F.pad(is_visible, (keys - last, 0), value=True), -torch.inf)
    expected = scores.softmax(dim=-1) @ of_heads[1]
    with (
        mock.patch.object(modeling_attention, "MIN_SCORES_BY_PRODUCTS", 0 if by_products else 2**20),
        mock.patch.object(modeling_attention, "MAX_BYTES_COPIED", 0 if copies_row_by_row else 2**20),
        mock.patch.object(modeling_attention, "KEYS_OF_BAG", keys_of_bag),
    ):
        output = attend_few_queries(query, key, value, mask, 0.3)
        tolerance = {torch.bfloat16: 4e-2, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
        torch.testing.assert_close(output.double(), expected, atol=tolerance, rtol=tolerance)
        if groups == 1:
            output, weights = eager_attention_forward(torch.nn.Module(), query, key, value, mask, scaling=0.3)
            torch.testing.assert_close(output.double().transpose(1, 2), expected, atol=tolerance, rtol=tolerance)
            torch.testing.assert_close(weights.double(), scores.softmax(dim=-1), atol=tolerance, rtol=tolerance)


def test_rotation_turns_pairs_of_halves_by_the_angle_of_the_position():
    """Against complex numbers: element i and the one half a head further are real and imaginary part."""
    model = randomized_model()
    states, positions = torch.randn(2, 3, 4, 8), torch.randint(0, 500, (2, 4))
    turned = rotate(states, *model.model.rotary_emb(states, position_ids=positions))
    frequencies = torch.tensor([10000.0 ** (-2 * i / 8) for i in range(4)])
    angles = positions[:, None, :, None] * frequencies
    numbers = torch.complex(states[..., :4], states[..., 4:]) * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(turned, torch.cat([numbers.real, numbers.imag], dim=-1), atol=1e-5, rtol=1e-5)


@settings(max_examples=300, deadline=None)
@given(
    vocab_size=st.integers(9, 70),
    slots=st.integers(1, 4),
    seed=st.integers(0, 2**31),
    share_of_zeros=st.sampled_from([0.0, 0.5, 0.95]),
    edge=st.sampled_from([None, 0.0, 1 - 2.0**-53]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_draws_by_blocks_are_draws(vocab_size, slots, seed, share_of_zeros, edge, dtype):
    """Against the fraction of the total, spelled out in exact arithmetic; tokens of weight 0 are never drawn."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(slots, vocab_size, generator=generator, dtype=dtype)
    weights[torch.rand(slots, vocab_size, generator=generator) < share_of_zeros] = 0
    weights[:, seed % vocab_size] += 1e-6
    uniform = torch.rand(slots, dtype=torch.float64, generator=generator)
    if edge is not None:
        uniform.fill_(edge)
    with (
        mock.patch.object(generation_sampling, "MAX_WEIGHTS_AT_ONCE", 0),
        mock.patch.object(generation_sampling, "TOKENS_OF_BLOCK", 8),
    ):
        tokens = generation_sampling.draw_by_weight(weights, uniform).tolist()
    for row, token in enumerate(tokens):
        exact = weights[row].double().tolist()
        below, total = math.fsum(exact[:token]), math.fsum(exact)
        assert exact[token] > 0
        assert below - 1e-12 <= uniform[row].item() * total <= below + exact[token] + 1e-12


@pytest.mark.parametrize(("vocab_size", "size", "seed"), [(16, 8, 3), (16, 8, 11), (250, 64, 0), (250, 64, 8)])
def test_a_block_that_adds_up_to_less_by_rounding_gives_its_last_token(vocab_size, size, seed, monkeypatch):
    """Sums in another order: by the block as a whole the target is within, token by token it is beyond."""
    monkeypatch.setattr(generation_sampling, "TOKENS_OF_BLOCK", size)
    monkeypatch.setattr(generation_sampling, "MAX_WEIGHTS_AT_ONCE", 0)
    weights = torch.rand(1, vocab_size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    uniform = torch.tensor([1 - 2.0**-53], dtype=torch.float64)
    assert generation_sampling.draw_by_weight(weights, uniform).tolist() == [vocab_size - 1]
    weights = F.pad(weights, (0, 2))  # and not one of no weight behind it
    assert generation_sampling.draw_by_weight(weights, uniform).tolist() == [vocab_size - 1]


@pytest.mark.parametrize(("seed", "uniform"), [(30, 0.7521668167662798), (32, 0.5511544809683881)])
def test_a_target_at_the_start_of_a_block_draws_no_token_of_no_weight(seed, uniform, monkeypatch):
    """What is under a block is the sum of those before, not its end less its own sum, which rounding may move."""
    monkeypatch.setattr(generation_sampling, "TOKENS_OF_BLOCK", 8)
    monkeypatch.setattr(generation_sampling, "MAX_WEIGHTS_AT_ONCE", 0)
    weights = torch.rand(1, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    weights[0, 8] = 0
    assert generation_sampling.draw_by_weight(weights, torch.tensor([uniform], dtype=torch.float64)).tolist() == [9]


def test_large_draws_go_by_blocks_and_are_the_same():
    generator = torch.Generator().manual_seed(0)
    scores = 3 * torch.randn(7, 50_000, generator=generator)
    uniform = torch.rand(7, dtype=torch.float64, generator=generator)
    with mock.patch.object(
        generation_sampling, "_draw_by_blocks", wraps=generation_sampling._draw_by_blocks
    ) as blocks:
        together = generation_sampling.draw_tokens(scores, uniform)
        assert blocks.call_count == 1
        alone = [generation_sampling.draw_tokens(*slot).item() for slot in zip(scores, uniform, strict=True)]
        assert blocks.call_count == 1
    assert together.tolist() == alone


def test_layers_are_counted_by_what_they_are_fed():
    """A layer that is fed twice is one layer; those of another input are none of its partners."""
    layers = torch.nn.ModuleList([torch.nn.Linear(256, 256) for _ in range(3)])
    with fast_products(layers), torch.no_grad():
        first, second = torch.randn(2, 256), torch.randn(2, 256)
        for layer, inputs in [(0, first), (1, first), (0, first), (2, second)]:
            assert type(layers[layer]) is DecodingLinear
            layers[layer](inputs)
        assert layers[0].partners == layers[1].partners == [layers[0], layers[1]]
        assert layers[2].partners == [layers[2]]


@torch.no_grad()
def test_dropout_of_a_backbone_s_attention_is_not_left_out():
    states = torch.randn(1, 2, 3, 8)
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    output, _ = grouped_sdpa_attention_forward(torch.nn.Module(), states, states, states, mask, dropout=1.0)
    assert output.abs().sum() == 0
