"""generate with ragged prompts and holes: every row is what it would have been alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import random_batch, randomized_model

MASK = 23
PAD = 22


def ragged_prompts(model, seed: int = 0) -> tuple[torch.LongTensor, torch.LongTensor]:
    """Padding left, right, on both sides and none; holes inside, at the ends, and none; an empty row."""
    rows = [
        "..gggg..",
        "gggggggg",
        "gghgghhg",
        "hhgg....",
        "...ghg.h",  # padding inside, too
        "........",
        ".ggg.hh.",
    ]
    tokens = random_batch(model, len(rows), len(rows[0]), seed) % PAD
    kinds = torch.tensor([[".gh".index(kind) for kind in row] for row in rows])
    tokens = tokens.masked_fill(kinds == 2, MASK).masked_fill(kinds == 0, PAD)
    return tokens, (kinds != 0).long()


def generators(count: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(1000 * seed + row) for row in range(count)]


SETTINGS = [
    {"alpha_0": 0.0},
    {"alpha_0": 1.0, "num_diffusion_steps": 3, "unmasking_order": "random"},
    {"alpha_0": 0.5, "num_diffusion_steps": 4, "unmasking_order": "strided"},
    {"alpha_0": 0.6, "num_diffusion_steps": 4, "block_length": 3, "unmasking_order": "left_to_right"},
    {"alpha_0": 1.0, "entropy_bound": 3.0, "num_candidates": 4},
    {"alpha_0": 0.7, "confidence_threshold": 0.3, "num_candidates": 5, "unmasking_order": "left_to_right"},
    {"alpha_0": 1.0, "num_diffusion_steps": 3, "top_k": 5, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: ",".join(map(str, settings.values())))
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("max_new_tokens", [0, 6])
def test_every_row_is_what_it_would_have_been_alone(attention, settings, use_cache, max_new_tokens):
    """With a generator for each row: same logits, same tokens, in a batch and alone, without its padding."""
    model = randomized_model(attention=attention)
    prompts, mask = ragged_prompts(model)
    arguments = {
        "max_new_tokens": max_new_tokens,
        "return_dict_in_generate": True,
        "output_logits": True,
        "eos_token_id": 3,
        "pad_token_id": PAD,
        **settings,
    }
    batch = model.generate(
        prompts, attention_mask=mask, generator=generators(len(prompts)), use_cache=use_cache, **arguments
    )
    forwards = []
    for row, source in enumerate(generators(len(prompts))):
        is_real = mask[row].bool()
        alone = model.generate(prompts[row : row + 1, is_real], generator=source, **arguments)
        forwards.append(alone.num_function_evaluations)
        columns = torch.cat([is_real.nonzero()[:, 0], torch.arange(8, 8 + max_new_tokens)])
        assert torch.equal(batch.sequences[row, columns], alone.sequences[0])
        assert torch.equal(batch.unmasking_steps[row, columns], alone.unmasking_steps[0])
        torch.testing.assert_close(batch.log_probs[row, columns], alone.log_probs[0], atol=1e-4, rtol=0)
        torch.testing.assert_close(batch.logits[row, columns], alone.logits[0], atol=1e-4, rtol=0)
        assert torch.equal(batch.sequences[row, :8][~is_real], prompts[row][~is_real])
        is_given = is_real & (prompts[row] != MASK)
        assert torch.equal(batch.sequences[row, :8][is_given], prompts[row][is_given])
    assert (batch.sequences != MASK).all()
    assert batch.num_function_evaluations >= max(forwards)


def test_rows_with_one_generator_are_ragged_too(model):
    prompts, mask = ragged_prompts(model)
    first, second = (
        model.generate(
            prompts, attention_mask=mask, max_new_tokens=5, num_diffusion_steps=3, generator=torch.Generator()
        )
        for _ in range(2)
    )
    assert torch.equal(first, second)
    assert torch.equal(first[:, :8][prompts != MASK], prompts[prompts != MASK])


@torch.no_grad()
def test_holes_are_filled_given_everything_known():
    """The first forward at a hole sees the given tokens on both sides, at their own positions."""
    model = randomized_model()
    prompt = random_batch(model, 1, 9)
    prompt[0, 4] = MASK
    output = model.generate(prompt, return_dict_in_generate=True, output_logits=True)
    assert output.sequences.shape == (1, 9), "without a length, holes are filled and nothing follows"
    assert output.num_function_evaluations == 1
    order = torch.tensor([[0, 1, 2, 3, 5, 6, 7, 8, 4]])
    expected = model(prompt.gather(1, order), position_ids=order).logits[0, -1]
    torch.testing.assert_close(output.logits[0, 4], expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(model(prompt).logits[0, 4], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("length", [{"max_new_tokens": 0}, {"max_length": 6}])
def test_a_fully_specified_prompt_comes_back_unchanged(length):
    model = randomized_model()
    prompt = random_batch(model, 2, 6)
    output = model.generate(prompt, return_dict_in_generate=True, **length)
    assert torch.equal(output.sequences, prompt)
    assert output.num_function_evaluations == 0
    assert not output.unmasking_steps.any()
    assert torch.equal(model.generate(prompt, **length), prompt)


def test_right_padding_is_as_good_as_left(caplog):
    model = randomized_model()
    left = torch.tensor([[PAD, PAD, 5, 6], [1, 2, 3, 4]])
    right = torch.tensor([[5, 6, PAD, PAD], [1, 2, 3, 4]])
    arguments = {"max_new_tokens": 6, "pad_token_id": PAD}
    with caplog.at_level("WARNING", logger="transformers"):
        outputs = [
            model.generate(prompt, attention_mask=(prompt != PAD).long(), generator=generators(2), **arguments)
            for prompt in (left, right)
        ]
    assert torch.equal(outputs[0][:, 4:], outputs[1][:, 4:])
    assert torch.equal(outputs[1][:, :4], right)
    assert "padding" not in caplog.text


@pytest.mark.parametrize("alpha_0", [0.0, 0.5, 1.0])
def test_text_ends_behind_what_was_given_only(alpha_0):
    model = randomized_model()
    model.lm_head.bias.data[7] = 50.0  # every token is the end of text
    prompt = torch.tensor([[1, MASK, 2, MASK, MASK], [MASK, MASK, MASK, MASK, 1]])
    sequences = model.generate(prompt, alpha_0=alpha_0, max_new_tokens=3, eos_token_id=7, pad_token_id=PAD)
    assert sequences.tolist() == [[1, 7, 2, 7, PAD, PAD, PAD, PAD], [7, 7, 7, 7, 1, 7, PAD, PAD]]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_batch_is_filled_completely_and_what_is_given_stays(data):
    model = randomized_model()
    batch, width = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 7))
    cells = st.sampled_from([0, 1, 2])  # padding, given, hole
    kinds = torch.tensor(
        data.draw(st.lists(st.lists(cells, min_size=width, max_size=width), min_size=batch, max_size=batch))
    )
    prompts = torch.where(kinds == 0, PAD, torch.where(kinds == 1, 5, MASK))
    arguments = data.draw(st.sampled_from(SETTINGS))
    new = data.draw(st.integers(0, 5))
    output = model.generate(
        prompts, attention_mask=(kinds != 0).long(), max_new_tokens=new, return_dict_in_generate=True, **arguments
    )
    assert output.sequences.shape == (batch, width + new)
    was_open = torch.cat([kinds == 2, torch.ones(batch, new, dtype=torch.bool)], dim=-1)
    assert torch.equal(output.sequences[~was_open], torch.nn.functional.pad(prompts, (0, new))[~was_open])
    assert (output.sequences[was_open] != MASK).all()
    assert torch.equal(output.unmasking_steps > 0, was_open)
    assert torch.equal(output.log_probs < 0, was_open)
    assert output.unmasking_steps.max() == output.num_function_evaluations


def test_prompts_longer_than_the_text_are_refused():
    model = randomized_model()
    with pytest.raises(ValueError, match="`max_length=4` must be at least the length of the prompt, 6 tokens"):
        model.generate(random_batch(model, 1, 6), max_length=4)


def test_growing_caches_take_rows_in_step_only():
    model = randomized_model()
    prompts = torch.tensor([[1, MASK], [MASK, MASK]])
    with pytest.raises(ValueError, match="needs rows that advance together"):
        model.generate(prompts, cache_implementation="dynamic")
    assert model.generate(prompts[:1], cache_implementation="dynamic").shape == (1, 2)


@pytest.mark.parametrize(
    ("generator", "message"),
    [(7, "must be a torch.Generator, or a list"), ([torch.Generator()], "each of the 2 rows"), ([None, 1], "a list")],
)
def test_generators_are_checked(generator, message):
    model = randomized_model()
    with pytest.raises(ValueError, match=message):
        model.generate(random_batch(model, 2, 3), generator=generator)


def test_a_generator_takes_the_place_of_the_global_seed():
    model = randomized_model()
    prompt = random_batch(model, 2, 3)

    def sample(global_seed, seed):
        torch.manual_seed(global_seed)
        generator = torch.Generator().manual_seed(seed)
        return model.generate(prompt, max_new_tokens=20, num_return_sequences=2, generator=generator)

    assert torch.equal(sample(0, 5), sample(1, 5))
    assert not torch.equal(sample(0, 5), sample(0, 6))
    torch.manual_seed(3)
    before = torch.get_rng_state()
    model.generate(prompt, max_new_tokens=5, unmasking_order="strided", generator=torch.Generator())
    assert torch.equal(torch.get_rng_state(), before), "the global stream is left alone"
