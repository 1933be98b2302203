"""A generation that goes on from the cache of an earlier one, and the order that an output tells."""

import copy

import pytest
import torch
from tiny_models import backbone_config, random_batch, randomized_model
from transformers import DynamicCache

SETTINGS = {"max_new_tokens": 9, "alpha_0": 0.6, "return_dict_in_generate": True, "output_logits": True}
DECODING = [{}, {"num_diffusion_steps": 4, "unmasking_order": "strided"}, {"lossless": True}, {"entropy_bound": 4.0}]


def conditionals(model, sequences, orders, num_given, unmasking_steps) -> torch.Tensor:
    """Log-probabilities of all tokens, (batch, length), by plain forwards with masks for what a forward draws."""
    values = torch.zeros(sequences.shape)
    for row, (text, order, steps) in enumerate(zip(sequences, orders, unmasking_steps, strict=True)):
        for slot in range(num_given, len(order)):
            group = int((steps[order[:slot]] < steps[order[slot]]).sum())
            ids = text[order[: slot + 1]].clone()
            ids[group:] = model.config.mask_token_id
            logits = model(ids[None], position_ids=order[None, : slot + 1]).logits[0, -1]
            values[row, order[slot]] = logits.log_softmax(dim=-1)[text[order[slot]]]
    return values


@torch.no_grad()
@pytest.mark.parametrize("backbone", [None, "llama"])
@pytest.mark.parametrize("decoding", DECODING[:3], ids=str)
def test_the_next_turn_is_conditioned_on_all_before_it(backbone, decoding):
    """Its tokens are drawn from what plain forwards say, in the order that the outputs tell."""
    model = randomized_model(**({} if backbone is None else {"backbone_config": backbone_config(backbone)}))
    first = model.generate(random_batch(model, 2, 4), **SETTINGS, **decoding)
    text = torch.cat([first.sequences, random_batch(model, 2, 5, seed=1)], dim=-1)
    if "lossless" in decoding:
        model.generate(text, **SETTINGS, **decoding)  # what forwards cost is measured once for texts of a length
    seen = []
    embeddings = model.get_input_embeddings()
    hook = embeddings.register_forward_pre_hook(lambda _, args: seen.append(args[0].numel()))
    second = model.generate(text, past_key_values=first.past_key_values, **SETTINGS, **decoding)
    hook.remove()
    num_new = text.numel() - sum(first.past_key_values.text.lengths)
    assert num_new < seen[0] <= num_new + 2 * 9, "what is cached is not computed again"
    assert torch.equal(second.sequences[:, :18], text)
    steps = second.unmasking_steps
    if "lossless" in decoding:  # each token is as if drawn alone
        steps = torch.empty_like(steps).scatter(1, second.orders, torch.arange(27).expand(2, -1))
    expected = conditionals(model, second.sequences, second.orders, 18, steps)
    torch.testing.assert_close(second.log_probs, expected, atol=1e-4, rtol=0)
    cached = first.past_key_values.text.lengths[0]
    assert torch.equal(second.orders[:, :cached], first.orders[:, :cached])


@pytest.mark.parametrize("decoding", DECODING, ids=str)
@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static", "disable_compile": True}], ids=str)
def test_ragged_chats_go_on_over_several_turns(decoding, cache):
    """Three turns with ends of text and padding on the way: each cache holds its text alone."""
    model = randomized_model(scale=0.15)
    settings = {"eos_token_id": 5, "pad_token_id": 0, "return_dict_in_generate": True, "max_new_tokens": 7}
    prompts = torch.tensor([[0, 0, 3, 4], [6, 7, 8, 9], [0, 2, 2, 2]])
    is_real = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])
    past = None
    for turn in range(3):
        torch.manual_seed(turn)
        output = model.generate(prompts, attention_mask=is_real, past_key_values=past, **settings, **cache, **decoding)
        new = torch.ones(3, 7, dtype=torch.long)
        for row in range(3):
            ends = (output.sequences[row, prompts.shape[1] :] == 5).nonzero()[:, 0]
            if len(ends):
                new[row, int(ends[0]) + 1 :] = 0
        past = output.past_key_values
        prompts = torch.cat([output.sequences, random_batch(model, 3, 2, seed=turn).clamp(min=6)], dim=-1)
        is_real = torch.cat([is_real, new, torch.ones(3, 2, dtype=torch.long)], dim=-1)
        for row, length in enumerate(past.text.lengths):
            known = output.sequences[row][is_real[row, : output.sequences.shape[1]].bool()]
            assert 0 < length <= len(known)
            assert torch.equal(past.text.tokens[row, :length], known[past.text.positions[row, :length]])


def test_the_cache_of_a_forward_is_gone_on_from_by_several_samples():
    model = randomized_model()
    prompt = random_batch(model, 2, 6)
    cache = model(prompt[:, :5], past_key_values=DynamicCache(), use_cache=True).past_key_values
    keys = cache.layers[0].keys.clone()
    outputs = []
    for past in (cache, None):
        torch.manual_seed(0)
        outputs.append(model.generate(prompt, past_key_values=past, num_return_sequences=3, **SETTINGS))
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, atol=1e-4, rtol=0)
    assert torch.equal(cache.layers[0].keys, keys), "the cache given stays as it is"


@torch.no_grad()
@pytest.mark.parametrize("backbone", [None, "llama"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static", "disable_compile": True}], ids=str)
@pytest.mark.parametrize("decoding", DECODING, ids=str)
def test_a_cache_handed_out_holds_what_a_forward_over_its_text_computes(backbone, attention, cache, decoding):
    """Also of rows that were done before others, and had to be filled up."""
    model = randomized_model(
        attention, scale=0.2, **({} if backbone is None else {"backbone_config": backbone_config(backbone)})
    )
    torch.manual_seed(0)
    past = model.generate(random_batch(model, 3, 4), **SETTINGS, **cache, **decoding).past_key_values
    for row, length in enumerate(past.text.lengths):
        tokens, positions = past.text.tokens[row, None, :length], past.text.positions[row, None, :length]
        fresh = model(tokens, position_ids=positions, use_cache=True).past_key_values
        for layer, expected in zip(past.layers, fresh.layers, strict=True):
            torch.testing.assert_close(layer.keys[row, :, :length], expected.keys[0], atol=1e-4, rtol=0)


def test_a_cache_of_another_text_is_refused():
    model = randomized_model()
    prompt = random_batch(model, 2, 4)
    past = model.generate(prompt, **SETTINGS).past_key_values
    with pytest.raises(ValueError, match=r"`past_key_values` holds 2 rows of up to .* tokens, which are not those"):
        model.generate(prompt, past_key_values=past, **SETTINGS)
    other = torch.cat([prompt, random_batch(model, 2, 12, seed=3)], dim=-1)
    with pytest.raises(ValueError, match="holds another text than `input_ids`: row 0 differs at token"):
        model.generate(other, past_key_values=past, **SETTINGS)
    cropped = copy.deepcopy(past)
    cropped.crop(-2)
    text = torch.cat([model.generate(prompt, **SETTINGS).sequences, prompt], dim=-1)
    model(prompt[:, :2], past_key_values=cropped)
    with pytest.raises(ValueError, match="has been written to since"):
        model.generate(text, past_key_values=cropped, **SETTINGS)
    with pytest.raises(ValueError, match="with `use_cache`"):
        model.generate(other, past_key_values=past, use_cache=False, **SETTINGS)


@pytest.mark.parametrize(
    "decoding", [{"num_diffusion_steps": "max"}, {"lossless": True}, {"entropy_bound": 0, "num_candidates": 1}]
)
def test_the_order_of_an_output_scores_its_text_again(decoding):
    model = randomized_model()
    prompts = random_batch(model, 3, 4)
    prompts[:, 2] = model.config.mask_token_id
    output = model.generate(prompts, **SETTINGS, **decoding)
    context = torch.arange(13) < 4
    context[2] = False
    scores = model.log_likelihood(output.sequences, context_mask=context.expand(3, -1), orders=output.orders[:, None])
    torch.testing.assert_close(scores.log_likelihood, output.log_probs.sum(dim=-1), atol=1e-3, rtol=0)
