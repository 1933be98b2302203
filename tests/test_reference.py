"""The authors' own numbers, where the tensors are at hand: forward, losses and cached sampling within 1e-4."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import DynamicCache

from eso_lm import EsoConfig, EsoForMaskedDiffusion
from eso_lm.cache import PreallocatedCache
from eso_lm.noise_schedule import nelbo_weight

REFERENCE = Path(__file__).parents[2] / "shared" / "reference"
MASK = 36
TOLERANCE = {"atol": 1e-4, "rtol": 0}

pytestmark = pytest.mark.skipif(not REFERENCE.exists(), reason="the reference tensors are not at hand")


@pytest.fixture(scope="module")
def expected():
    return load_file(REFERENCE / "expected.safetensors")


@pytest.fixture(params=["sdpa", "eager"])
def model(request):
    model = EsoForMaskedDiffusion(
        EsoConfig(
            vocab_size=37,
            mask_token_id=MASK,
            hidden_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            cond_dim=32,
            max_position_embeddings=24,
            alpha_0=0.5,
        )
    )
    model.load_state_dict(our_weights(load_file(REFERENCE / "original_hub" / "model.safetensors")))
    model.set_attn_implementation(request.param)
    return model.eval()


def our_weights(original: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    renamed = {
        "vocab_embed.embedding": "model.embed_tokens.weight",
        "sigma_map.mlp.0": "model.timestep_embedding.in_proj",
        "sigma_map.mlp.2": "model.timestep_embedding.out_proj",
        "output_layer.norm_final": "model.norm",
        "output_layer.linear": "lm_head",
        "output_layer.adaLN_modulation": "model.modulation",
        "blocks.": "model.layers.",
        "norm1": "input_layernorm",
        "norm2": "post_attention_layernorm",
        "attn_out": "self_attn.o_proj",
        "mlp.0": "mlp.up_proj",
        "mlp.2": "mlp.down_proj",
        "adaLN_modulation": "modulation",
    }
    weights = {}
    for name, tensor in original.items():
        name = name.removeprefix("backbone.")
        for theirs, ours in renamed.items():
            name = name.replace(theirs, ours)
        if name.endswith("attn_qkv.weight"):
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                weights[name.replace("attn_qkv", f"self_attn.{part}_proj")] = rows
        elif "rotary_emb" not in name:
            weights[name] = tensor
    return weights


def per_slot_losses(model, batch: dict[str, torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    """The loss of one weighted slot at a time, through the public loss."""
    losses = torch.zeros(weights.shape)
    for row, slot in weights.nonzero().tolist():
        only = torch.zeros_like(weights)
        only[row, slot] = weights[row, slot]
        losses[row, slot] = model(**batch, loss_weights=only, num_items_in_batch=1).loss
    return losses


@torch.no_grad()
def test_diffusion_phase(model, expected):
    batch = {name: expected[f"diffusion.{name}"] for name in ("input_ids", "position_ids")}
    logits = model(**batch).logits
    torch.testing.assert_close(logits[..., :MASK], expected["diffusion.logits"][..., :MASK], **TOLERANCE)
    weights = nelbo_weight(expected["diffusion.t"], 0.5)[:, None] * (batch["input_ids"] == MASK)
    losses = per_slot_losses(model, batch | {"labels": expected["diffusion.targets"]}, weights)
    torch.testing.assert_close(losses, expected["diffusion.nelbo_per_token"], **TOLERANCE)


@torch.no_grad()
def test_sequential_phase(model, expected):
    batch = {name: expected[f"sequential.{name}"] for name in ("input_ids", "position_ids")}
    batch |= {"labels": expected["sequential.targets"], "sequential_rows": torch.ones(3, dtype=torch.bool)}
    weights = (batch["input_ids"] == MASK).float()
    losses = per_slot_losses(model, batch, weights)
    torch.testing.assert_close(losses, expected["sequential.nll_per_token"], **TOLERANCE)


@pytest.mark.parametrize("preallocated", [True, False])
@torch.no_grad()
def test_cached_sampling(model, expected, preallocated):
    tokens, order = expected["sampling.tokens"], expected["sampling.position_ids"]
    cache = PreallocatedCache(3, 24) if preallocated else DynamicCache()
    cached = decided = 0
    for count in expected["sampling.tokens_per_step"].tolist():
        fed = torch.cat([tokens[:, cached:decided], torch.full((3, count), MASK)], dim=-1)
        logits = model(
            fed, position_ids=order[:, cached : decided + count], past_key_values=cache, logits_to_keep=count
        ).logits
        cache.crop(-count)
        wanted = expected["sampling.logits"][:, decided : decided + count]
        torch.testing.assert_close(logits[..., :MASK], wanted[..., :MASK], **TOLERANCE)
        cached, decided = decided, decided + count
    assert decided == 24
