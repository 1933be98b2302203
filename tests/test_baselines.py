"""Each baseline of the benchmarks is what it claims to be."""

from itertools import pairwise

import pytest
import torch
from baselines import AutoregressiveSampler, BlockDiffusionSampler, MaskedDiffusionSampler, filled_cache
from tiny_models import random_batch, randomized_model

MASK = 23


@torch.no_grad()
def dense_logits(model, input_ids, is_visible):
    """One pass over the whole text with a mask written out."""
    positions = torch.arange(input_ids.shape[1]).expand_as(input_ids)
    return model(input_ids, position_ids=positions, attention_mask=is_visible[None, None]).logits


@torch.no_grad()
def test_the_autoregressive_one_is_causal_and_its_cache_exact():
    model = randomized_model()
    sampler = AutoregressiveSampler(model)
    text = torch.cat([torch.zeros(2, 1).long(), random_batch(model, 2, 6)], dim=-1)
    dense = dense_logits(model, text, torch.ones(7, 7).tril().bool())
    cache = filled_cache(model, 2, 7, 0)
    for place in range(7):
        logits = sampler.forward(text[:, place : place + 1], place, cache)
        torch.testing.assert_close(logits, dense[:, place], atol=1e-4, rtol=0)
    steps = [tokens.clone() for tokens in sampler.steps(2, 5)]
    assert len(steps) == 5
    for place, tokens in enumerate(steps):
        assert torch.equal(tokens[:, : place + 1], steps[-1][:, : place + 1])


@torch.no_grad()
def test_masked_diffusion_sees_both_sides_and_skips_empty_steps():
    model = randomized_model()
    sampler = MaskedDiffusionSampler(model)
    text = random_batch(model, 1, 6)
    text[0, 2] = MASK
    before = sampler.forward(text)[0, 2]
    dense = dense_logits(model, text, torch.ones(6, 6).bool())
    torch.testing.assert_close(before, dense[0, 2], atol=1e-4, rtol=0)
    for place in (0, 5):
        other = text.clone()
        other[0, place] = (text[0, place] + 1) % MASK
        assert (sampler.forward(other)[0, 2] - before)[:MASK].abs().max() > 1e-3
    places = torch.tensor([[4, 2]])
    torch.testing.assert_close(sampler.forward(text, places)[0, 1], before, atol=1e-5, rtol=0)
    steps = [tokens.clone() for tokens in sampler.steps(3, 6, num_steps=1000)]
    assert len(steps) <= 6, "a step that reveals nothing costs no pass"
    assert (steps[-1] != MASK).all()
    assert all(((a != MASK) <= (b != MASK)).all() for a, b in pairwise(steps))


@pytest.mark.parametrize("block_length", [1, 3, 4])
@torch.no_grad()
def test_block_diffusion_is_block_causal_and_its_cache_exact(block_length):
    model = randomized_model()
    sampler = BlockDiffusionSampler(model, block_length)
    text = random_batch(model, 2, 9)
    blocks = torch.arange(9) // block_length
    cache = filled_cache(model, 2, 9, 0)
    for first in range(0, 9, block_length):
        masked = text.clone()
        masked[:, first : first + block_length : 2] = MASK
        dense = dense_logits(model, masked, blocks[:, None] >= blocks)
        block = slice(first, first + block_length)
        logits = sampler.forward(masked[:, block], first, cache)
        torch.testing.assert_close(logits, dense[:, block], atol=1e-4, rtol=0)
        sampler.forward(text[:, block], first, cache)
    steps = list(sampler.steps(2, 9, num_steps=1000))
    assert (steps[-1] != MASK).all()
    num_blocks = -(-9 // block_length)
    assert len(steps) <= 9 + num_blocks - 1, "a token a pass, and one to cache each block but the last"


@torch.no_grad()
def test_a_filled_cache_stands_for_a_context():
    model = randomized_model()
    cache = filled_cache(model, 2, 8, 5)
    assert cache.get_seq_length() == 5
    assert AutoregressiveSampler(model).forward(torch.zeros(2, 1).long(), 5, cache).shape == (2, 24)
