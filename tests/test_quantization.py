"""Weights in 8 and 4 bits (bitsandbytes and torchao, which run on the CPU): loading, scoring, sampling, adapters."""

from unittest import mock

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from tiny_models import backbone_config, random_batch, randomized_model
from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, PerGroup, quantize_
from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from eso_lm import DataCollatorForHybridMaskedDiffusion, EsoForMaskedDiffusion, modeling_products, modeling_quantized

WIDTH = {"hidden_size": 64, "intermediate_size": 128}  # the kernels want multiples of 32


def quantization(bits: int) -> BitsAndBytesConfig:
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", [None, "llama"])
def test_quantised_models_score_sample_and_carry_adapters(tmp_path, kind, bits):
    sizes = WIDTH | {"cond_dim": 64} if kind is None else {"backbone_config": backbone_config(kind, **WIDTH)}
    original = randomized_model(scale=0.1, **sizes)
    original.save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path, quantization_config=quantization(bits))
    expected = {8: "Linear8bitLt", 4: "Linear4bit"}[bits]
    attention = model.model.layers[0].self_attn
    assert type(attention.q_proj).__name__ == type(attention.o_proj).__name__ == expected
    assert type(model.lm_head) is torch.nn.Linear

    text = random_batch(model, 2, 8)
    scores = [
        one.log_likelihood(text, generator=torch.Generator().manual_seed(0)).log_likelihood
        for one in (original, model)
    ]
    assert (scores[1] - scores[0]).abs().max() < {8: 0.5, 4: 4.0}[bits]
    assert not torch.equal(*scores)
    assert model.generate(max_new_tokens=5, lossless=True).shape == (1, 5)

    model = AutoModel.from_pretrained(tmp_path, quantization_config=quantization(bits))
    adapted = get_peft_model(prepare_model_for_kbit_training(model), LoraConfig(target_modules="all-linear"))
    collator = DataCollatorForHybridMaskedDiffusion(mask_token_id=23, alpha_0=0.5, seed=0)
    adapted(**collator([{"input_ids": row} for row in text.tolist()])).loss.backward()
    gradients = [weight.grad for name, weight in adapted.named_parameters() if "lora_B" in name]
    assert sum(gradient.abs().sum() > 0 for gradient in gradients) > 0.8 * len(gradients)


def test_a_causal_model_is_taken_over_in_4_bits(tmp_path):
    AutoModelForCausalLM.from_config(backbone_config("llama", **WIDTH)).save_pretrained(tmp_path)
    model = EsoForMaskedDiffusion.from_causal_lm(tmp_path, quantization_config=quantization(4))
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    assert model.generate(max_new_tokens=5).shape == (1, 5)


def test_what_a_constant_goes_into_is_not_quantised(tmp_path):
    """Kernels of 4-bit layers take inputs without gradients for an inference, and write into what autograd keeps."""
    original = randomized_model(scale=0.1, cond_dim=64, **WIDTH)
    original.save_pretrained(tmp_path)
    for bits in (4, 8):
        model = AutoModel.from_pretrained(tmp_path, quantization_config=quantization(bits))
        embedding = model.model.timestep_embedding
        assert type(embedding.in_proj) is type(embedding.out_proj) is torch.nn.Linear
        assert model(random_batch(model, 2, 6)).logits.requires_grad


WHAT_TO_KEEP = [".*modulation.*", ".*timestep_embedding.*"]  # constants while decoding: nothing is gained


def torchao_config(bits: int, **settings) -> TorchAoConfig:
    if bits == 8:
        return TorchAoConfig(Int8WeightOnlyConfig(), **settings)
    return TorchAoConfig(PrototypeInt4WeightOnlyConfig(group_size=32), **settings)


@torch.no_grad()
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", [None, "llama"])
def test_weights_of_torchao_decode_by_kernels_of_their_own(tmp_path, kind, bits):
    """The same numbers as torchao's own products give, up to a rounding of bfloat16; no copy of any weight is made."""
    sizes = {"vocab_size": 48} | WIDTH | ({"cond_dim": 64} if kind is None else {})
    if kind is not None:
        sizes["backbone_config"] = backbone_config(kind, **WIDTH | {"vocab_size": 48})
    original = randomized_model(scale=0.1, dtype=torch.bfloat16, **sizes)
    original.save_pretrained(tmp_path / "plain")
    settings = {
        "dtype": torch.bfloat16,
        "quantization_config": torchao_config(bits, modules_to_not_convert=WHAT_TO_KEEP),
    }
    model = AutoModel.from_pretrained(tmp_path / "plain", **settings)
    attention = model.model.layers[0].self_attn
    kinds = {type(layer.weight).__name__ for layer in (attention.q_proj, attention.o_proj, model.lm_head)}
    assert kinds == {{8: "Int8Tensor", 4: "Int4OpaqueTensor"}[bits]}
    if kind is None:
        assert type(model.model.modulation.weight) is torch.nn.Parameter

    text = random_batch(model, 2, 8)
    orders = torch.arange(8)[None]
    exact, quantised = (one.log_likelihood(text, orders=orders).log_likelihood for one in (original, model))
    assert (quantised - exact).abs().max() < {8: 0.5, 4: 4.0}[bits]
    assert not torch.equal(quantised, exact)

    def logits() -> torch.Tensor:
        positions = torch.arange(8).expand(2, -1)
        cache = model(text[:, :6], position_ids=positions[:, :6], use_cache=True).past_key_values
        return model(text[:, 6:], position_ids=positions[:, 6:], past_key_values=cache).logits

    expected = logits()
    by_kernel = modeling_quantized.QuantizedWeight.product
    with (
        mock.patch.object(
            modeling_quantized.QuantizedWeight, "product", autospec=True, side_effect=by_kernel
        ) as product,
        model.ready_to_decode(),
    ):
        torch.testing.assert_close(logits(), expected, atol=0.05, rtol=0.05)
        assert product.call_count >= 2 * 6 + 1  # layers x products, and the head, at least in the second forward
        assert model._decoding_step is not None
    assert type(model.lm_head) is torch.nn.Linear
    assert model.generate(max_new_tokens=5, lossless=True).shape == (1, 5)

    if bits == 4:
        return  # torchao cannot save these
    model.save_pretrained(tmp_path / "quantised")
    loaded = AutoModel.from_pretrained(tmp_path / "quantised", dtype=torch.bfloat16)
    assert type(loaded.lm_head.weight) is type(model.lm_head.weight)
    assert torch.equal(loaded.log_likelihood(text, orders=orders).log_likelihood, quantised)


def test_adapters_train_on_weights_of_torchao(tmp_path):
    randomized_model(scale=0.1, dtype=torch.bfloat16, cond_dim=64, **WIDTH).save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16, quantization_config=torchao_config(8))
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj", "up_proj", "down_proj"]))
    collator = DataCollatorForHybridMaskedDiffusion(mask_token_id=23, alpha_0=0.5, seed=0)
    text = random_batch(model, 2, 8)
    adapted(**collator([{"input_ids": row} for row in text.tolist()])).loss.backward()
    gradients = [weight.grad for name, weight in adapted.named_parameters() if "lora_B" in name]
    assert len(gradients) == 8
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    assert model.generate(max_new_tokens=5).shape == (1, 5)


@torch.no_grad()
@pytest.mark.parametrize("bits", [8, 4])
def test_inputs_of_other_types_go_the_way_of_torchao(bits):
    """Of which the kernels make slow work."""
    layers = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False).to(torch.bfloat16))
    quantize_(layers, torchao_config(bits).quant_type)
    with modeling_products.fast_products(layers):
        weight, _ = layers[0].packed
        assert weight.fits(torch.ones(2, 64, dtype=torch.bfloat16))
        assert not weight.fits(torch.ones(2, 64))
        assert not weight.fits(torch.ones(0, 64, dtype=torch.bfloat16))


@torch.no_grad()
@pytest.mark.parametrize(
    ("in_features", "out_features", "offset"), [(64, 50, 8), (96, 7, 24), (64, 64, 0), (72, 40, 0)]
)
def test_no_kernel_gets_what_it_crashes_on(in_features, out_features, offset):
    """The kernel of 8 bits wants aligned tensors, as those mapped from a file are not, and 32 inputs at a time."""
    layers = torch.nn.Sequential(torch.nn.Linear(in_features, out_features).to(torch.bfloat16))
    quantize_(layers, Int8WeightOnlyConfig())
    weight, storage = layers[0].weight, torch.zeros(in_features * out_features + 64, dtype=torch.int8)
    start = offset + -storage.data_ptr() % 64
    moved = storage[start : start + weight.qdata.numel()].view_as(weight.qdata)
    weight.qdata = moved.copy_(weight.qdata)
    assert weight.qdata.data_ptr() % 64 == offset % 64
    inputs = torch.randn(5, 3, in_features).to(torch.bfloat16)
    expected = layers(inputs)
    with modeling_products.fast_products(layers):
        assert (type(layers[0]) is modeling_products.DecodingLinear) == (in_features % 32 == 0)
        for rows in (slice(0, 1), slice(1, 3), slice(2, 5)):
            torch.testing.assert_close(layers(inputs[rows]), expected[rows], atol=0.05, rtol=0.05)
            odd = torch.cat([inputs.new_zeros(1), inputs[rows].flatten()])[1:].view_as(inputs[rows])
            torch.testing.assert_close(layers(odd), expected[rows], atol=0.05, rtol=0.05)


@torch.no_grad()
def test_without_a_kernel_torchao_multiplies(monkeypatch):
    monkeypatch.setitem(modeling_quantized.KERNELS, "Int8Tensor", (torch, "_a_kernel_that_is_no_more"))
    layers = torch.nn.Sequential(torch.nn.Linear(64, 64).to(torch.bfloat16))
    quantize_(layers, Int8WeightOnlyConfig())
    with modeling_products.fast_products(layers):
        assert type(layers[0]) is torch.nn.Linear
        assert layers(torch.ones(2, 64, dtype=torch.bfloat16)).isfinite().all()


def test_other_weights_of_torchao_go_their_own_way():
    """In float32 the kernels are slow, and products of quantised activations are something else."""
    for config, dtype in [
        (Int8WeightOnlyConfig(), torch.float32),
        (Int8DynamicActivationInt8WeightConfig(), torch.bfloat16),
        (Int8WeightOnlyConfig(granularity=PerGroup(32)), torch.bfloat16),
    ]:
        layers = torch.nn.Sequential(torch.nn.Linear(64, 64).to(dtype))
        quantize_(layers, config)
        assert modeling_quantized.quantized_weight(layers[0]) is None
        expected = layers(torch.ones(2, 64, dtype=dtype))
        with torch.no_grad(), modeling_products.fast_products(layers):
            assert torch.equal(layers(torch.ones(2, 64, dtype=dtype)), expected)


@pytest.mark.parametrize("rows", [1, modeling_quantized.MAX_QUANTIZED_ROWS, modeling_quantized.MAX_QUANTIZED_ROWS + 1])
@pytest.mark.parametrize("bits", [8, 4])
@torch.no_grad()
def test_the_kernels_compute_what_the_weights_say(bits, rows):
    """Against a product in float64 by the weight that torchao says it is."""
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(64, 48).to(torch.bfloat16))
    original = layers[0].weight.double()
    quantize_(layers, torchao_config(bits).quant_type)
    weight = layers[0].weight
    inputs = torch.randn(rows, 3, 64).to(torch.bfloat16)[:, 1:2]  # not contiguous
    with modeling_products.fast_products(layers):
        found = layers(inputs)
    if bits == 8:
        original = weight.dequantize().double()
    expected = inputs.double() @ original.T + layers[0].bias.double()
    assert found.shape == (rows, 1, 48)
    assert (found.double() - expected).norm() < {8: 0.01, 4: 0.12}[bits] * expected.norm()
