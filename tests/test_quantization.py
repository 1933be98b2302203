"""Weights in 8 and 4 bits (bitsandbytes, which has kernels for the CPU): loading, scoring, sampling, adapters."""

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from tiny_models import backbone_config, random_batch, randomized_model
from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig

from eso_lm import DataCollatorForHybridMaskedDiffusion, EsoForMaskedDiffusion

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
