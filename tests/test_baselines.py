"""Each baseline of the benchmarks is what it claims to be."""

from itertools import pairwise, product

import pytest
import torch
from baselines import AutoregressiveSampler, BlockDiffusionSampler, MaskedDiffusionSampler, filled_cache
from objectives import Autoregressive
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


DIFFUSION = {"masked": MaskedDiffusionSampler, "blocks of 2": lambda model: BlockDiffusionSampler(model, 2)}


def plan_of(sampler, text, plan: dict, seed: int) -> list[torch.LongTensor]:
    """The places, (batch, count), that each forward of `log_likelihood` decides with this seed."""
    found = []

    def note(logits, places):
        found.append(places.clone())
        return text.gather(1, places)

    torch.manual_seed(seed)
    for _ in sampler.steps(*text.shape, **plan, choose=note):
        pass
    return found


def test_tokens_that_share_a_forward_stand_where_their_order_says():
    model, text = randomized_model(), torch.zeros(2, 12, dtype=torch.long)
    masked, blocks = MaskedDiffusionSampler(model), BlockDiffusionSampler(model, 4)
    for places in plan_of(masked, text, {"num_steps": 4, "unmasking_order": "strided"}, seed=0):
        assert places.sort().values.diff().tolist() == [[4, 4]] * 2
    left_to_right = {"num_steps": "max", "unmasking_order": "left_to_right"}
    for sampler in (masked, blocks):
        assert torch.cat(plan_of(sampler, text, left_to_right, seed=0), dim=1)[0].tolist()[:4] == [0, 1, 2, 3]
    pairs = plan_of(blocks, text, {"num_steps": 2, "unmasking_order": "strided"}, seed=0)
    assert [sorted((places[0] % 4).tolist()) in ([0, 2], [1, 3]) for places in pairs] == [True] * 6


@pytest.mark.parametrize("unmasking_order", ["random", "strided", "left_to_right"])
@pytest.mark.parametrize("num_steps", [1, 2, 5])
@pytest.mark.parametrize("kind", DIFFUSION)
@torch.no_grad()
def test_the_probabilities_of_all_texts_add_up_to_one_under_a_plan(kind, num_steps, unmasking_order):
    """Of five tokens, in blocks of two, two and one."""
    model = randomized_model(vocab_size=3)
    sampler, log_likelihoods = DIFFUSION[kind](model), []
    plan = {"num_steps": num_steps, "unmasking_order": unmasking_order}
    for text in product(range(2), repeat=5):
        torch.manual_seed(1)  # the same plan for every text
        log_likelihoods.append(sampler.log_likelihood(torch.tensor([text]), **plan)[0])
    probabilities = torch.cat(log_likelihoods).exp()
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-5)
    assert probabilities.max() > 2 * probabilities.min(), "texts are told apart"
    if num_steps == 1 or (num_steps == 2 and kind == "masked"):
        groups = plan_of(sampler, torch.zeros(1, 5, dtype=torch.long), plan, seed=1)
        assert len(groups) < 5, "several tokens a forward"


@pytest.mark.parametrize("num_steps", [1, 2, 3, 1000])
@pytest.mark.parametrize("kind", DIFFUSION)
@torch.no_grad()
def test_a_text_is_scored_by_what_each_forward_sees(kind, num_steps):
    """Against passes over the whole text with a mask written out, where what is not decided yet is masked."""
    model = randomized_model()
    sampler, text = DIFFUSION[kind](model), random_batch(model, 2, 9)
    block = torch.arange(9) // (9 if kind == "masked" else 2)
    known, expected = torch.full_like(text, MASK), torch.zeros(2)
    plan = plan_of(sampler, text, {"num_steps": num_steps}, seed=1)
    for places in plan:
        log_probs = dense_logits(model, known, block[:, None] >= block).log_softmax(dim=-1)
        of_text = log_probs.gather(-1, text[..., None])[..., 0]
        expected += of_text.gather(1, places).sum(dim=1)
        known.scatter_(1, places, text.gather(1, places))
    assert torch.equal(known, text), "every place is decided"

    calls = []
    hook = model.register_forward_pre_hook(lambda *_: calls.append(1))
    torch.manual_seed(1)
    log_likelihood, forwards = sampler.log_likelihood(text, num_steps=num_steps)
    hook.remove()
    torch.testing.assert_close(log_likelihood.float(), expected, atol=1e-3, rtol=0)
    # A pass for each step that reveals something, and one to cache each block but the last.
    assert forwards == len(calls) == len(plan) + (0 if kind == "masked" else 4)


@torch.no_grad()
def test_the_autoregressive_score_is_its_loss():
    model = randomized_model()
    text = random_batch(model, 3, 6)
    log_likelihood, forwards = AutoregressiveSampler(model, 3).log_likelihood(text)
    torch.testing.assert_close(-log_likelihood.float() / 6, Autoregressive(3)(model, text), atol=1e-4, rtol=0)
    assert forwards == 6
