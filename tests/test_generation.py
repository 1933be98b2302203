"""generate: the cache is exact, both phases do what they should, and transformers' controls apply."""

import pytest
import torch
from tiny_models import random_batch, randomized_model
from transformers import GenerationConfig, LogitsProcessor

from eso_lm import EsoGenerationConfig
from eso_lm.generation_sampling import draw_tokens

MASK = 23


class RecordLogits(LogitsProcessor):
    """Passes scores on, and keeps what it was given."""

    def __init__(self):
        self.contexts, self.scores = [], []

    def __call__(self, input_ids, scores):
        self.contexts.append(input_ids)
        self.scores.append(scores)
        return scores


def generate(model, seed=0, **arguments):
    torch.manual_seed(seed)
    defaults = {"max_new_tokens": 16, "return_dict_in_generate": True}
    return model.generate(**defaults | arguments)


@pytest.mark.parametrize("alpha_0", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "dynamic"}], ids=["preallocated", "dynamic"])
def test_cached_and_uncached_generation_agree(model, tolerance, alpha_0, cache):
    prompt = random_batch(model, 2, 4)
    arguments = {
        "input_ids": prompt,
        "alpha_0": alpha_0,
        "num_diffusion_steps": 5,
        "unmasking_order": "random",
        "num_return_sequences": 2,
    }
    arguments["lockstep"] = bool(cache)  # rows of a growing cache cannot advance apart
    recorded = {}
    outputs = {}
    for name, settings in (("cached", cache), ("uncached", {"use_cache": False})):
        recorded[name] = RecordLogits()
        outputs[name] = generate(model, logits_processor=[recorded[name]], **arguments, **settings)
    cached, uncached = outputs["cached"], outputs["uncached"]
    assert cached.num_function_evaluations == uncached.num_function_evaluations
    assert torch.equal(cached.unmasking_steps, uncached.unmasking_steps)
    if tolerance < 1e-3:  # in bfloat16 a rounding may tip a draw, and the two runs part
        assert torch.equal(cached.sequences, uncached.sequences)
        torch.testing.assert_close(cached.log_probs, uncached.log_probs, atol=tolerance, rtol=0)
        steps = zip(recorded["cached"].scores, recorded["uncached"].scores, strict=True)
    else:
        steps = [(recorded["cached"].scores[0], recorded["uncached"].scores[0])]
    for scores, expected in steps:
        torch.testing.assert_close(scores[:, :MASK], expected[:, :MASK], atol=tolerance, rtol=0)


@pytest.mark.parametrize("alpha_0", [0.0, 0.3, 1.0])
def test_output_tells_how_the_sequence_was_filled(alpha_0):
    model = randomized_model()
    prompt = random_batch(model, 3, 5)
    output = generate(model, input_ids=prompt, alpha_0=alpha_0, num_diffusion_steps=4, unmasking_order="random")
    assert output.sequences.shape == output.unmasking_steps.shape == output.log_probs.shape == (3, 21)
    assert torch.equal(output.sequences[:, :5], prompt)
    assert (output.sequences != MASK).all()
    assert not output.unmasking_steps[:, :5].any()
    assert not output.log_probs[:, :5].any()
    assert (output.log_probs[:, 5:] < 0).all()
    for row in output.unmasking_steps[:, 5:]:
        assert sorted(set(row.tolist())) == list(range(1, int(row.max()) + 1))
    assert output.unmasking_steps.max() == output.num_function_evaluations
    if alpha_0 == 1:
        assert output.num_function_evaluations <= 4
    if alpha_0 == 0:
        assert torch.equal(output.unmasking_steps[:, 5:], torch.arange(1, 17).expand(3, 16))


def test_sequential_phase_runs_left_to_right_after_the_diffusion_phase():
    output = generate(
        randomized_model(), alpha_0=0.5, num_diffusion_steps=2, unmasking_order="random", num_return_sequences=4
    )
    for row in output.unmasking_steps:
        one_by_one = row[row > 2]
        assert len(one_by_one) > 0
        assert one_by_one.tolist() == sorted(set(one_by_one.tolist()))


@torch.no_grad()
def test_log_probs_of_one_token_a_step_sum_to_the_likelihood_given_the_order():
    """The two-stream pass scores the whole sequence in the order in which it was generated."""
    model = randomized_model()
    prompt = random_batch(model, 2, 3)
    filters = {"temperature": 0.7, "top_k": 5}  # log_probs are taken before any filter
    # So many time steps that no two tokens fall into one of them.
    output = generate(model, input_ids=prompt, num_diffusion_steps=5000, alpha_0=0.6, **filters)
    assert output.num_function_evaluations == 16
    order = output.unmasking_steps.argsort(dim=-1, stable=True)
    tokens = output.sequences.gather(1, order)
    labels = tokens.masked_fill(torch.arange(19) < 3, -100)
    loss = model(
        tokens.masked_fill(labels != -100, MASK),
        position_ids=order,
        labels=labels,
        sequential_rows=torch.ones(2, dtype=torch.bool),
        num_items_in_batch=1,
    ).loss
    torch.testing.assert_close(output.log_probs.sum(), -loss, atol=1e-3, rtol=0)


def test_processors_see_the_text_known_so_far():
    model = randomized_model()
    recorder = RecordLogits()
    output = generate(
        model,
        input_ids=random_batch(model, 2, 3),
        num_diffusion_steps=4,
        alpha_0=0.6,
        logits_processor=[recorder],
        lockstep=True,
    )
    assert len(recorder.contexts) == output.num_function_evaluations
    for step, (context, scores) in enumerate(zip(recorder.contexts, recorder.scores, strict=True), start=1):
        slots_a_row = len(scores) // 2
        assert slots_a_row == (output.unmasking_steps[0] == step).sum()
        for row in range(2):
            known = output.sequences[row, output.unmasking_steps[row] < step]
            for slot in range(slots_a_row):
                assert torch.equal(context[row * slots_a_row + slot], known)


def test_rows_have_orders_of_their_own_and_repeat_with_the_seed():
    model = randomized_model()
    first = generate(model, num_return_sequences=4, alpha_0=1.0)
    again = generate(model, num_return_sequences=4, alpha_0=1.0)
    other = generate(model, seed=1, num_return_sequences=4, alpha_0=1.0)
    assert torch.equal(first.sequences, again.sequences)
    assert not torch.equal(first.sequences, other.sequences)
    assert len({tuple(row.tolist()) for row in first.unmasking_steps}) == 4


@pytest.mark.parametrize("unmasking_order", ["random", "strided", "left_to_right"])
@pytest.mark.parametrize("block_length", [None, 5])
@pytest.mark.parametrize("alpha_0", [0.5, 1.0])
def test_every_order_is_exact_with_the_cache(unmasking_order, block_length, alpha_0):
    model = randomized_model()
    settings = {"unmasking_order": unmasking_order, "block_length": block_length, "alpha_0": alpha_0}
    arguments = {
        "input_ids": random_batch(model, 2, 3),
        "num_diffusion_steps": 6,
        "unmasking_order": "random",
        **settings,
    }
    cached, uncached = (generate(model, use_cache=use_cache, **arguments) for use_cache in (True, False))
    assert torch.equal(cached.sequences, uncached.sequences)
    assert torch.equal(cached.unmasking_steps, uncached.unmasking_steps)
    torch.testing.assert_close(cached.log_probs, uncached.log_probs, atol=1e-4, rtol=0)
    steps = cached.unmasking_steps[:, 3:]
    if unmasking_order == "left_to_right":
        assert (steps.diff(dim=-1) >= 0).all()
    for start in range(0, 16, block_length or 16):
        block = steps[:, start : start + (block_length or 16)]
        begins = block.amin(dim=-1, keepdim=True)
        assert (steps[:, :start] < begins).all(), "a block begins when the one before it is done"


@pytest.mark.parametrize(
    ("settings", "order"),
    [
        ({}, "random"),
        ({"num_diffusion_steps": "max"}, "random"),
        ({"num_diffusion_steps": 4}, "strided"),
        ({"lossless": True}, "random"),
        ({"lossless": True, "num_diffusion_steps": 4}, "random"),
        ({"entropy_bound": 9.0}, "strided"),
        ({"confidence_threshold": 0.5}, "strided"),
    ],
)
def test_tokens_that_share_forwards_stand_apart_unless_told_otherwise(settings, order):
    model = randomized_model()
    samples = {
        choice: generate(model, seed=3, alpha_0=1.0, unmasking_order=choice, **settings).orders
        for choice in (None, "random", "strided")
    }
    assert torch.equal(samples[None], samples[order])
    assert not torch.equal(samples["random"], samples["strided"])


def test_a_strided_step_reveals_every_nth_token():
    output = generate(randomized_model(), alpha_0=1.0, num_diffusion_steps=4, unmasking_order="strided")
    for step in range(1, 5):
        assert (output.unmasking_steps[0] == step).nonzero()[:, 0].diff().tolist() == [4, 4, 4]


def test_blocks_stop_when_every_row_has_ended():
    model = randomized_model()
    model.lm_head.bias.data[7] = 50.0  # every token is the end of text
    arguments = {"eos_token_id": 7, "pad_token_id": 9, "num_return_sequences": 3, "alpha_0": 1.0}
    output = generate(model, block_length=4, num_diffusion_steps=4, **arguments)
    assert output.num_function_evaluations == 1, "one step a block, and the first block ends all rows"
    assert output.sequences.tolist() == [[7] + [9] * 15] * 3


def test_defaults_come_from_the_model():
    model = randomized_model(alpha_0=0.0)
    assert generate(model).num_function_evaluations == 16
    model.generation_config.alpha_0 = 1.0
    model.generation_config.num_diffusion_steps = 1
    assert generate(model).num_function_evaluations == 1
    assert model.generate(generation_config=GenerationConfig(max_new_tokens=7)).shape == (1, 7)
    config = EsoGenerationConfig(max_new_tokens=7, alpha_0=0.0, return_dict_in_generate=True)
    assert model.generate(generation_config=config).num_function_evaluations == 7
    assert model.generate(max_length=9).shape == (1, 9)
    assert isinstance(model.generate(max_length=9), torch.Tensor)


def test_empty_prompts_are_unconditional_samples():
    model = randomized_model()
    empty = torch.empty(3, 0, dtype=torch.long)
    assert generate(model, input_ids=empty, pad_token_id=1).sequences.shape == (3, 16)
    assert generate(model, input_ids=empty, num_return_sequences=2, pad_token_id=1).sequences.shape == (6, 16)
    assert generate(model, input_ids=empty[:1]).sequences.shape == (1, 16)


def test_a_processor_cannot_bring_the_mask_back():
    model = randomized_model()

    def favour_the_mask(input_ids, scores):
        return scores.index_fill(-1, torch.tensor([MASK]), 100.0)

    assert (generate(model, logits_processor=[favour_the_mask]).sequences != MASK).all()


def test_settings_that_count_from_the_left_hold_at_alpha_0_of_zero():
    model = randomized_model()
    model.lm_head.bias.data[7] = 8.0
    arguments = {"alpha_0": 0.0, "eos_token_id": 7, "pad_token_id": 9, "num_return_sequences": 8}
    ended = generate(model, **arguments).sequences
    assert (ended[:, :5] == 7).any()
    assert not (generate(model, min_new_tokens=5, **arguments).sequences[:, :5] == 7).any()


def test_filters_of_transformers_apply():
    model = randomized_model()
    recorder = RecordLogits()
    greedy = generate(model, do_sample=False, logits_processor=[recorder], alpha_0=0.0)
    assert greedy.sequences[0].tolist() == [int(scores.argmax()) for scores in recorder.scores]
    top_1 = generate(model, top_k=1, alpha_0=0.0)
    assert torch.equal(top_1.sequences, greedy.sequences)
    banned = [token for token in range(24) if token not in (3, 4)]
    assert set(generate(model, suppress_tokens=banned).sequences.unique().tolist()) <= {3, 4}


def test_no_filter_is_on_by_default():
    """transformers' own default is top_k = 50, which would cut the tail of every vocabulary but a toy's."""
    model = randomized_model(vocab_size=120, scale=0.01)
    tokens = generate(model, num_return_sequences=50, alpha_0=1.0, num_diffusion_steps=1).sequences
    assert len(tokens.unique()) > 100


@pytest.mark.parametrize("alpha_0", [0.0, 0.5, 1.0])
def test_what_follows_the_end_of_text_is_padding(alpha_0):
    model = randomized_model()
    output = generate(
        model,
        input_ids=torch.tensor([[7, 2, 7]]),
        alpha_0=alpha_0,
        num_return_sequences=16,
        eos_token_id=7,
        pad_token_id=9,
        temperature=5.0,
        max_new_tokens=24,
    )
    ended = 0
    for row, steps, log_probs in zip(output.sequences, output.unmasking_steps, output.log_probs, strict=True):
        new = row[3:].tolist()
        assert row[:3].tolist() == [7, 2, 7], "an end of text inside the prompt ends nothing"
        if 7 in new:
            ended += 1
            end = 3 + new.index(7)
            assert (row[end + 1 :] == 9).all()
            assert not steps[end + 1 :].any()
            assert not log_probs[end + 1 :].any()
            assert steps[end] > 0
    assert ended > 0


def test_sequential_phase_stops_when_every_row_has_ended():
    model = randomized_model()
    model.lm_head.bias.data[7] = 50.0  # every token is the end of text
    output = generate(model, alpha_0=0.0, eos_token_id=7, pad_token_id=9, num_return_sequences=3)
    assert output.num_function_evaluations == 1
    assert output.sequences.tolist() == [[7] + [9] * 15] * 3


def test_draws_follow_the_distribution():
    """Chi-square over 6 tokens of very different probability, and no draw of an impossible one."""
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.04, 0.0, 0.01])
    scores = probabilities.log().expand(100_000, 6)
    uniform = torch.rand(100_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(draw_tokens(scores, uniform), minlength=6).double()
    expected = 100_000 * probabilities.double()
    possible = expected > 0
    assert counts[~possible].sum() == 0
    assert ((counts - expected)[possible] ** 2 / expected[possible]).sum() < 18.5  # 4 degrees of freedom, p = 0.001


@pytest.mark.parametrize(("uniform", "token"), [(0.0, 1), (1 - 5e-10, 2), (1 - 2.0**-53, 2)])
def test_draws_reach_the_tail_and_nothing_beyond(uniform, token):
    """Token 2 has probability 1e-9, which a running sum in float32 would lose; tokens 0 and 3 are impossible."""
    scores = torch.log(torch.tensor([[0.0, 1.0, 1e-9, 0.0]]))
    assert draw_tokens(scores, torch.tensor([uniform], dtype=torch.float64)).tolist() == [token]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_beams": 3}, "has no meaning for an Eso-LM"),
        ({"assistant_model": "self"}, "has no meaning for an Eso-LM"),
        ({"force_words_ids": [[1]], "num_beams": 2}, "has no meaning for an Eso-LM"),
        ({"low_memory": True}, "`low_memory=True` is not supported"),
        ({"max_new_tokens": "5"}, "`max_new_tokens` must be an integer >= 0, got '5'"),
        ({"alpha_0": 0.5, "forced_eos_token_id": 3}, "presupposes left to right"),
        (
            {
                "input_ids": torch.ones(2, 2).long(),
                "attention_mask": torch.tensor([[0, 1], [1, 1]]),
                "alpha_0": 0.0,
                "begin_suppress_tokens": [3],
            },
            "no holes, no padding",
        ),
        ({"input_ids": torch.ones(1, 2).long(), "attention_mask": [[1, 1]]}, r"shape \(1, 2\), got list"),
        ({"generation_config": {"alpha_0": 0.5}}, "`generation_config` must be an EsoGenerationConfig, got dict"),
        ({"alpha_0": 1.5}, r"`alpha_0` must be None or a number in \[0, 1\], got 1.5"),
        ({"num_diffusion_steps": 0}, "`num_diffusion_steps` must be None, 'max' or a positive integer, got 0"),
        ({"block_length": 0}, "`block_length` must be None or a positive integer, got 0"),
        ({"unmasking_order": "spiral"}, r"`unmasking_order` must be one of \('random', 'strided'"),
        ({"cache_implementation": "quantized"}, "`cache_implementation` must be unset"),
        ({"input_ids": torch.ones(0, 3).long()}, r"shape \(batch, tokens\), of at least one row, got \(0, 3\)"),
        ({"input_ids": torch.ones(3).long()}, r"shape \(batch, tokens\), of at least one row, got \(3,\)"),
        ({"input_ids": [[1, 2]]}, "got list"),
        ({"input_ids": torch.ones(1, 3)}, "integer ids, got torch.float32"),
        ({"input_ids": torch.tensor([[1, 24]])}, r"ids in \[0, 23\], got ids from 1 to 24"),
        (
            {"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.ones(1, 3)},
            r"shape \(2, 3\), got \(1, 3\)",
        ),
        ({"attention_mask": torch.ones(1, 3)}, "`attention_mask` needs `input_ids`"),
        (
            {"inputs_embeds": torch.ones(1, 3, 32)},
            "`generate` takes `input_ids`: holes, .* go by the tokens",
        ),
        ({"num_return_sequences": 0}, "`num_return_sequences` must be an integer >= 1, got 0"),
        ({"max_new_tokens": 2.5}, "`max_new_tokens` must be an integer >= 0, got 2.5"),
        ({"eos_token_id": 99}, r"`eos_token_id` must be an id of the vocabulary, in \[0, 23\]"),
        ({"pad_token_id": MASK}, r"`pad_token_id` must be .* not the mask \(23\), got 23"),
        ({"logits_processor": [lambda ids, scores: scores - torch.inf]}, "No token can be drawn"),
        ({"num_difusion_steps": 3}, "num_difusion_steps"),
    ],
)
def test_arguments_without_meaning_are_refused(arguments, message):
    model = randomized_model()
    if "assistant_model" in arguments:
        arguments = {"assistant_model": model}
    with pytest.raises(ValueError, match=message):
        generate(model, **arguments)


@pytest.mark.parametrize(
    "settings", [{"num_diffusion_steps": 4, "unmasking_order": "random"}, {"entropy_bound": 2.0, "num_candidates": 3}]
)
def test_a_forward_costs_its_own_slots(settings):
    """No mask beyond the slots of the step, logits at its masks alone, each token cached once."""
    model = randomized_model()
    slots, masks, logits = [], [], []

    def record_attention(module, args, kwargs):
        slots.append(args[0].shape[1])
        masks.append(kwargs["attention_mask"])

    def record_head(module, args):
        logits.append(args[0].shape[1])

    model.model.layers[0].self_attn.register_forward_pre_hook(record_attention, with_kwargs=True)
    model.lm_head.register_forward_pre_hook(record_head)
    output = generate(model, input_ids=random_batch(model, 1, 10), alpha_0=0.7, max_new_tokens=20, **settings)
    revealed = output.unmasking_steps[0].bincount()[1:].tolist()
    assert output.num_function_evaluations == len(logits) == len(slots) == len(revealed)
    if "num_diffusion_steps" in settings:
        assert logits == revealed
    assert slots == [fed + new for fed, new in zip([10, *revealed[:-1]], logits, strict=True)]
    for width, mask in zip(slots, masks, strict=True):
        assert mask is None or mask.shape == (1, 1, width, width)
