"""The authors' own numbers: forward, losses and cached sampling within 1e-4."""

import json
from pathlib import Path

import pytest
import torch
from convert_original_checkpoint import convert, convert_back
from safetensors.torch import load_file
from transformers import AutoModel, DynamicCache

from eso_lm.generation_cache import PreallocatedCache
from eso_lm.noise_schedule import nelbo_weight

REFERENCE = Path(__file__).parent / "reference"
MASK = 36
TOLERANCE = {"atol": 1e-4, "rtol": 0}


@pytest.fixture(scope="module")
def expected():
    return load_file(REFERENCE / "expected.safetensors")


LAYOUTS = {
    "hub": (REFERENCE / "original_hub", {"alpha_0": 0.5}),
    "lightning": (REFERENCE / "original.ckpt", {"mask_token_id": MASK}),
}


@pytest.fixture(scope="module", params=LAYOUTS)
def folder(request, tmp_path_factory) -> Path:
    checkpoint, missing = LAYOUTS[request.param]
    output = tmp_path_factory.mktemp("converted") / "model"
    convert(checkpoint, output, **missing)
    return output


@pytest.fixture(params=["sdpa", "eager"])
def model(request, folder):
    return AutoModel.from_pretrained(folder, attn_implementation=request.param)


def test_conversion_back_is_bit_exact(folder, tmp_path):
    convert_back(folder, tmp_path / "original")
    original = load_file(REFERENCE / "original_hub" / "model.safetensors")
    returned = load_file(tmp_path / "original" / "model.safetensors")
    assert returned.keys() == original.keys()
    for name, tensor in original.items():
        assert torch.equal(returned[name], tensor), name
    stored, expected = (
        json.loads((path / "config.json").read_text()) for path in (tmp_path / "original", REFERENCE / "original_hub")
    )
    for name in expected.keys() - {"transformers_version"}:
        assert stored[name] == expected[name]


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


def test_log_likelihood_given_an_order(model, expected):
    scores = model.log_likelihood(expected["x0"], orders=expected["likelihood.orders"])
    torch.testing.assert_close(scores.log_likelihood_per_order, expected["likelihood.log_p_given_order"], **TOLERANCE)


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
