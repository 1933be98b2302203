"""Lossless decoding draws what one-token sampling would draw: counted, against probabilities worked out one by one."""

import itertools

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import random_batch, randomized_model
from transformers import LogitsProcessor

from eso_lm import generation_costs, generation_lossless, generation_pace
from eso_lm.generation_convoy import convoys_of, find_stretches, meeting_place
from eso_lm.generation_costs import (
    MAX_SLOTS_MEASURED,
    NOMINAL_COSTS,
    BatchCosts,
    DecodingCosts,
    Drift,
    measure_costs,
)
from eso_lm.generation_lossless import LosslessUnmasking
from eso_lm.generation_order import plan_generation
from eso_lm.generation_pace import (
    GAIN_TO_STAY_APART,
    MAX_MASKS,
    RHYTHMS,
    Pace,
    Rhythm,
    best_rhythm,
    gain_to_part,
    paces_of,
)

VOCAB, LENGTH, SAMPLES = 3, 4, 2500


@torch.no_grad()
def one_token_probabilities(model, order: list[int], temperature: float = 1.0) -> torch.Tensor:
    """p(x | σ) of all texts of `LENGTH` tokens, (3,) * LENGTH, by plain forwards with one mask at the end."""
    texts = torch.tensor(list(itertools.product(range(VOCAB), repeat=LENGTH)))
    joint = torch.ones(len(texts), dtype=torch.float64)
    for slot, place in enumerate(order):
        ids = torch.cat([texts[:, order[:slot]], torch.full((len(texts), 1), VOCAB)], dim=-1)
        logits = model(ids, position_ids=torch.tensor([order[: slot + 1]])).logits[:, -1].double()
        joint *= (logits / temperature).softmax(dim=-1).gather(1, texts[:, place, None])[:, 0]
    return joint.view((VOCAB,) * LENGTH)


def chi_square(sequences: torch.Tensor, probabilities: torch.Tensor) -> float:
    """In standard deviations from its expectation; texts that are expected less than 5 times count as one."""
    expected, counts = len(sequences) * probabilities.flatten(), count(sequences)
    is_rare = expected < 5
    expected = torch.cat([expected[~is_rare], expected[is_rare].sum(dim=0, keepdim=True)])
    counts = torch.cat([counts[~is_rare], counts[is_rare].sum(dim=0, keepdim=True)])
    statistic = ((counts - expected) ** 2 / expected.clamp(min=1e-9)).sum().item()
    degrees = len(expected) - 1 - int(not is_rare.any())
    return (statistic - degrees) / (2 * degrees) ** 0.5


def count(sequences: torch.Tensor) -> torch.Tensor:
    """How often each text of `LENGTH` tokens is there."""
    strides = torch.tensor([VOCAB**place for place in reversed(range(LENGTH))])
    return torch.bincount((sequences * strides).sum(dim=-1), minlength=VOCAB**LENGTH).double()


def draw(model, draft_length, seed: int = 0, **settings) -> torch.Tensor:
    torch.manual_seed(seed)
    settings = {"alpha_0": 1.0, "num_return_sequences": SAMPLES, "max_new_tokens": LENGTH} | settings
    return model.generate(lossless=True, draft_length=draft_length, **settings)


@pytest.fixture(scope="module", params=[None, 4], ids=["no_head", "draft_head"])
def language(request):
    """A model of 3 tokens and a mask, in which tokens drawn together differ from tokens drawn one by one."""
    return randomized_model(vocab_size=VOCAB + 1, scale=0.15, seed=0, draft_rank=request.param)


@pytest.mark.slow
@pytest.mark.parametrize("draft_length", [1, 2, 4, "auto"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_samples_follow_the_exact_distribution_left_to_right(language, draft_length, temperature):
    exact = one_token_probabilities(language, [0, 1, 2, 3], temperature)
    assert exact.sum() == pytest.approx(1)
    for plan in ({"alpha_0": 1.0, "unmasking_order": "left_to_right"}, {"alpha_0": 0.0}):
        samples = draw(language, draft_length, temperature=temperature, **plan)
        assert abs(chi_square(samples, exact)) < 4
    if temperature == 1.0:
        texts = torch.tensor(list(itertools.product(range(VOCAB), repeat=LENGTH)))
        scored = language.log_likelihood(texts, orders=torch.arange(LENGTH)[None]).log_likelihood.exp()
        torch.testing.assert_close(scored.double(), exact.flatten(), atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "plan",
    [
        {"unmasking_order": "random", "alpha_0": 1.0},
        {"unmasking_order": "random", "alpha_0": 0.5},
        {"unmasking_order": "strided", "alpha_0": 1.0},
        {"unmasking_order": "random", "alpha_0": 1.0, "block_length": 2},
    ],
)
def test_samples_follow_the_exact_distribution_in_any_order(language, plan):
    draft_length = 3
    exact = torch.zeros((VOCAB,) * LENGTH, dtype=torch.float64)
    # One plan a call fixes what its rows share: the mixture of many.
    frequencies = {}
    for seed in range(300):
        orders, _ = plan_generation(30, LENGTH, generator=torch.Generator().manual_seed(seed), **plan)
        for order in map(tuple, orders.tolist()):
            frequencies[order] = frequencies.get(order, 0) + 1 / 9000
    for order, frequency in frequencies.items():
        exact += frequency * one_token_probabilities(language, list(order))
    generators = [torch.Generator().manual_seed(10**6 + row) for row in range(SAMPLES)]
    assert abs(chi_square(draw(language, draft_length, generator=generators, **plan), exact)) < 4


def test_tokens_drawn_in_parallel_do_not(language):
    """What the tests above can see: the paper's sampler at the same number of forwards."""
    exact = one_token_probabilities(language, [0, 1, 2, 3])
    torch.manual_seed(0)
    samples = language.generate(
        max_new_tokens=LENGTH,
        num_return_sequences=SAMPLES,
        alpha_0=1.0,
        unmasking_order="left_to_right",
        num_diffusion_steps=1,
    )
    assert chi_square(samples, exact) > 20


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("accepts", lambda p, q, uniform: torch.ones_like(p, dtype=torch.bool)),
        ("accepts", lambda p, q, uniform: uniform < p),
        ("what_drafts_leave", lambda p, q: p.double()),
    ],
)
def test_broken_rules_are_noticed(language, monkeypatch, name, broken):
    exact = one_token_probabilities(language, [0, 1, 2, 3])
    monkeypatch.setattr(generation_lossless, name, broken)
    assert chi_square(draw(language, 4, unmasking_order="left_to_right"), exact) > 8


@pytest.mark.parametrize("cache", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("order", ["random", "strided", "left_to_right"])
@pytest.mark.parametrize("alpha_0", [0.0, 0.5, 1.0])
def test_drafts_of_one_token_are_one_token_sampling(attention, cache, order, alpha_0):
    model = randomized_model(attention)
    plan = {"alpha_0": alpha_0, "unmasking_order": order, "max_new_tokens": 10, "num_return_sequences": 2}
    torch.manual_seed(0)
    expected = model.generate(entropy_bound=0.0, num_candidates=1, return_dict_in_generate=True, **plan)
    torch.manual_seed(0)
    output = model.generate(lossless=True, draft_length=1, return_dict_in_generate=True, **plan, **cache)
    assert torch.equal(output.sequences, expected.sequences)
    assert torch.equal(output.unmasking_steps, expected.unmasking_steps)
    torch.testing.assert_close(output.log_probs, expected.log_probs, atol=1e-4, rtol=0)
    assert output.drafts_offered.tolist() == [0, 0]
    assert output.forwards_per_row.tolist() == [10, 10]


def test_perfect_drafts_are_all_accepted():
    """Of a model whose tokens do not look at one another."""
    model = randomized_model()
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    output = model.generate(max_new_tokens=24, lossless=True, draft_length=4, return_dict_in_generate=True)
    assert output.drafts_accepted.tolist() == output.drafts_offered.tolist() == [18]
    # Six drafts of four; the last of them is judged by a forward of its own.
    assert output.num_function_evaluations == 7


def test_the_most_probable_tokens_do_not_depend_on_the_drafts():
    model = randomized_model()
    settings = {"max_new_tokens": 24, "do_sample": False, "alpha_0": 0.0, "return_dict_in_generate": True}
    expected = model.generate(**settings)
    for draft_length in (1, 2, 5, 24, "auto"):
        output = model.generate(lossless=True, draft_length=draft_length, **settings)
        assert torch.equal(output.sequences, expected.sequences)
        torch.testing.assert_close(output.log_probs, expected.log_probs, atol=1e-4, rtol=0)


def ragged_prompts(model) -> tuple[torch.Tensor, torch.Tensor]:
    """Left and right padding, holes, and a row with nothing to do but at its end."""
    prompts = random_batch(model, 4, 9)
    attention_mask = torch.ones_like(prompts)
    attention_mask[0, :4] = attention_mask[1, 6:] = 0
    prompts[2, [1, 5, 6]] = prompts[1, 2] = model.config.mask_token_id
    return prompts, attention_mask


@pytest.mark.parametrize("draft_length", [3, 8, "auto"])
@pytest.mark.parametrize("draft_rank", [None, 8])
@pytest.mark.parametrize(
    "schedule", [{"alpha_0": 0.5}, {"alpha_0": 1.0, "unmasking_order": "strided"}, {"alpha_0": 1.0, "block_length": 5}]
)
def test_every_row_is_decoded_as_if_alone(attention, schedule, draft_length, draft_rank):
    """Padding, holes, other rows and the kind of cache change nothing: the same draws give the same tokens."""
    model = randomized_model(attention, draft_rank=draft_rank)
    prompts, attention_mask = ragged_prompts(model)

    def generate(rows: list[int], **settings):
        ids, mask = prompts[rows], attention_mask[rows]
        if len(rows) == 1:
            ids, mask = ids[:, mask[0].bool()], None
        return model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=10,
            lossless=True,
            draft_length=draft_length,
            generator=[torch.Generator().manual_seed(row) for row in rows],
            return_dict_in_generate=True,
            output_logits=True,
            **schedule,
            **settings,
        )

    together = generate([0, 1, 2, 3])
    for cache in ({"use_cache": False}, {"cache_implementation": "static"}):
        other = generate([0, 1, 2, 3], **cache)
        assert torch.equal(other.sequences, together.sequences)
        torch.testing.assert_close(other.logits, together.logits, atol=1e-4, rtol=0)
    for row in range(4):
        alone = generate([row])
        is_real = torch.cat([attention_mask[row], torch.ones(10)]).bool()
        assert torch.equal(alone.sequences[0], together.sequences[row, is_real])
        torch.testing.assert_close(alone.log_probs[0], together.log_probs[row, is_real], atol=1e-4, rtol=0)
        assert alone.drafts_accepted[0] == together.drafts_accepted[row]
        assert alone.forwards_per_row[0] == together.forwards_per_row[row] == alone.num_function_evaluations
        assert 0 < alone.drafts_accepted[0] <= alone.drafts_offered[0]


@pytest.mark.parametrize("draft_length", [2, 5])
def test_log_probs_add_up_to_the_exact_likelihood(draft_length):
    """With holes in the prompt and a temperature, which the model's own distribution does not know."""
    model = randomized_model()
    prompt = random_batch(model, 2, 8)
    context = torch.ones(2, 18, dtype=torch.long)
    prompt[:, [2, 5]] = model.config.mask_token_id
    context[:, [2, 5]] = context[:, 8:] = 0
    torch.manual_seed(0)
    output = model.generate(
        prompt,
        max_new_tokens=10,
        alpha_0=0.0,
        lossless=True,
        draft_length=draft_length,
        temperature=1.5,
        return_dict_in_generate=True,
    )
    exact = model.log_likelihood(output.sequences, context_mask=context, alpha_0=0.0)
    torch.testing.assert_close(output.log_probs.sum(dim=-1), exact.log_likelihood, atol=1e-4, rtol=0)
    torch.testing.assert_close(output.log_probs, exact.token_log_probs[:, 0], atol=1e-4, rtol=0)


def test_a_forward_takes_a_group_of_masks_for_each_end_of_the_draft():
    model, widths, starts = randomized_model(), [], []

    def note(module, args, kwargs):
        widths.append(kwargs["input_ids"].shape[1])
        starts.append(kwargs["past_key_values"].get_seq_length())

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    output = model.generate(max_new_tokens=32, lossless=True, draft_length=4, return_dict_in_generate=True)
    hook.remove()
    assert max(widths) == 4 + 4 * 4  # the token decided last and three drafts; and where each of these may end
    assert len(widths) == output.num_function_evaluations < 32
    assert starts == sorted(starts)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["repetition_penalty", "own"])
def test_processors_that_look_at_the_text_see_the_drafts_before(language, name):
    """Against one-token sampling with the same processors, which is counted too."""

    class NotTheSameAgain(LogitsProcessor):
        def __call__(self, input_ids, scores):
            if input_ids.shape[1]:
                scores = scores.scatter_add(1, input_ids[:, -1:], torch.full((len(scores), 1), -3.0))
            return scores

    controls = {"repetition_penalty": {"repetition_penalty": 3.0}, "own": {"logits_processor": [NotTheSameAgain()]}}
    control = controls[name]
    plan = {"alpha_0": 1.0, "unmasking_order": "left_to_right"}
    torch.manual_seed(1)
    reference = language.generate(max_new_tokens=LENGTH, num_return_sequences=4 * SAMPLES, alpha_0=0.0, **control)
    frequencies = count(reference) / len(reference)
    # The reference has noise of its own, a quarter of the samples': the statistic is expected at 1.25 times its own.
    spread = 0.25 * (VOCAB**LENGTH / 2) ** 0.5
    assert abs(chi_square(draw(language, 3, **plan, **control), frequencies) - spread) < 5
    assert chi_square(draw(language, 3, **plan), frequencies) > 20


def test_no_repeated_ngrams_at_all():
    """In parallel drawing, tokens of one forward may repeat; drafts are judged one after the other."""
    model = randomized_model(vocab_size=12)
    torch.manual_seed(0)
    texts = model.generate(
        num_return_sequences=20, max_new_tokens=14, lossless=True, draft_length=6, no_repeat_ngram_size=2, alpha_0=1.0
    )
    for text in texts.tolist():
        bigrams = list(itertools.pairwise(text))
        assert len(set(bigrams)) == len(bigrams)


def test_ends_of_text_streamers_and_criteria(language):
    """The end of the text is distributed as in one-token sampling; what is streamed is what is returned."""

    class Collector:
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.tokens.append("end")

    exact = one_token_probabilities(language, [0, 1, 2, 3])
    torch.manual_seed(0)
    texts = draw(language, 3, alpha_0=0.0, eos_token_id=2, pad_token_id=1)
    for end in range(LENGTH):
        is_ended = (texts == 2).int().argmax(dim=-1).eq(end) & (texts == 2).any(dim=-1)
        assert (texts[is_ended, end + 1 :] == 1).all()
        expected = exact[(slice(0, 2),) * end + (2,)].sum().item()
        error = (expected * (1 - expected) / SAMPLES) ** 0.5
        assert is_ended.double().mean().item() == pytest.approx(expected, abs=4 * error)

    model, collector = randomized_model(), Collector()
    text = model.generate(max_new_tokens=20, lossless=True, draft_length=4, streamer=collector)
    assert collector.tokens == [*text[0].tolist(), "end"]

    stopped = model.generate(
        max_new_tokens=20,
        lossless=True,
        draft_length=4,
        alpha_0=0.0,
        stopping_criteria=[lambda ids, scores: torch.tensor([ids.shape[1] == 7])],
    )
    assert stopped.shape == (1, 20)
    assert (stopped[0, :7] != 0).any()
    assert not stopped[0, 7:].any()


@settings(max_examples=30, deadline=None)
@given(rate=st.floats(0, 1), rhythm=st.sampled_from(RHYTHMS))
def test_what_a_rhythm_brings(rate, rhythm):
    """Against many rounds, followed one by one through what may become of the drafts of each."""
    chances = {rhythm.length - 1: 1.0}  # how many drafts are waiting to be judged
    tokens = slots = drafts = 0.0
    rounds, skipped = 600, 300
    for number in range(rounds):
        after = {}
        for waiting, chance in chances.items():
            for accepted in range(waiting + 1):
                all_kept = accepted == waiting
                probability = chance * rate**accepted * (1 if all_kept else 1 - rate)
                next_one = rhythm.length - 1 if all_kept else rhythm.redraft
                after[next_one] = after.get(next_one, 0) + probability
                if number >= skipped:
                    tokens += probability * (accepted + 1)
                    content, masks = 1 + waiting, waiting * (1 + rhythm.redraft) + rhythm.length
                    slots += probability * (content + masks)
                    drafts += probability * waiting
        chances = after
    means = rhythm.means(rate)
    # Nearly certain drafts keep their first rhythm for long.
    if rate < 0.98 or rhythm.redraft in (0, rhythm.length - 1):
        assert means == pytest.approx([total / (rounds - skipped) for total in (tokens, slots, drafts)], rel=0.02)


def costs(of_a_slot: float, rows: int = 64) -> BatchCosts:
    """A forward takes a second, and so much longer for each slot of all rows; to draw takes nothing."""
    sizes = (0, 64)

    def of_rows(rows: int) -> DecodingCosts:
        forwards = tuple(1 + of_a_slot * rows * size for size in sizes)
        return DecodingCosts(1 + of_a_slot * rows * 2, sizes, forwards, drawn=(1, 8), draws=(0.01, 0.01))

    return BatchCosts(of_rows(1), of_rows(rows), rows)


def test_the_pace_follows_what_is_accepted_and_what_forwards_cost():
    always, never, fixed = Pace(None, costs(0.02)), Pace(None, costs(0.02)), Pace(5)
    for _ in range(40):
        drafts = always.rhythm(1, are_in_step=False).length - 1
        always.note(drafts, drafts, drafts, 1)
        never.note(2, 0, 1, 1)
        fixed.note(4, 0, 4, 1)
    assert always.rhythm(1, are_in_step=False).length >= 16
    assert never.rhythm(1, are_in_step=False) == Rhythm(1, 0)
    assert fixed.rhythm(1, are_in_step=False) == Rhythm(5, 4)
    # Half of the drafts: worth it for a row, and not where a forward of many rows takes as long as its slots say.
    half = Pace(None, costs(0.02))
    for _ in range(40):
        half.note(2, 1, 2, 2)
    assert half.rhythm(1, are_in_step=False).length > 1
    assert half.rhythm(64, are_in_step=False) == Rhythm(1, 0)
    # To draw in a turn each is worth it for no one where a turn takes as long as a forward.
    dear = DecodingCosts(1.0, (0, 64), (1.0, 1.1), drawn=(1, 8), draws=(1.0, 1.0))
    assert best_rhythm(0.75, 0.0, None, False, dear)[0].length > 4
    assert best_rhythm(0.75, 1.0, None, False, dear)[0] == Rhythm(1, 0)
    # Nor where rounds with drafts are found to take three times as long as the costs say.
    assert best_rhythm(0.75, 0.0, None, False, dear, drift=3.0)[0] == Rhythm(1, 0)


def test_among_several_rows_one_has_a_whole_draft_to_draw():
    measured = DecodingCosts(1.0, (0, 64), (1.0, 3.0), drawn=(1, 8), draws=(0.02, 0.02))
    rhythm, alone = best_rhythm(0.9, 1.0, None, False, measured)
    _, slots, drafts = rhythm.means(0.9)
    assert 0 < drafts < rhythm.length - 1
    assert alone == pytest.approx(1 + slots / 32 + (1 + drafts) * 0.02 + 0.02)
    rhythm, together = best_rhythm(0.9, 1.0, None, True, measured)
    _, slots, drafts = rhythm.means(0.9)
    assert together == pytest.approx(1 + slots / 32 + rhythm.length * 0.02 + 0.02)


def test_rows_part_for_a_clear_gain_only():
    slow_apart = DecodingCosts(1.0, (0, 64), (1.3, 1.4), drawn=(1,), draws=(0.01,))
    for rate in (0.25, 0.3, 0.35, 0.4, 0.5, 0.75, 0.9):
        chosen = [best_rhythm(rate, 1.0, to_part, True, slow_apart) for to_part in (None, 1.0, 1.2)]
        (apart, seconds), (can_meet, _), (in_step, _) = chosen
        gain = apart.means(rate)[0] / (seconds / 1.01)
        assert apart.length > 1
        assert in_step == (apart if gain > 1.2 else Rhythm(1, 0))
        assert can_meet == (apart if gain > 1 else Rhythm(1, 0))
    assert in_step.length > 1
    # What the first trial promises has to be more than what several do; and more for what is nearly over.
    pace = Pace(None, costs(0.02))
    lengths = []
    for _ in range(4):
        pace.note(10, 8.2, 1, 1, is_trial=True)
        lengths.append([pace.rhythm(8, are_in_step=True, left=left).length for left in (10, 200)])
    assert lengths[0] == [1, 1]
    assert lengths[-1][0] == 1 < lengths[-1][1]
    assert not pace.wants_trial()
    assert gain_to_part(4, 10) > gain_to_part(4, 200) > GAIN_TO_STAY_APART


def test_rows_do_not_try_what_could_not_pay():
    pace = Pace(None, costs(1.0, rows=8))
    assert not pace.may_part(8, left=200)  # three slots of each row for two, at the best
    pace = Pace(None, costs(0.02, rows=8))
    assert pace.may_part(8, left=200)
    assert not pace.may_part(8, left=2)
    pace.note(100, 5, 1, 1, is_trial=True)
    assert not pace.may_part(8, left=200)


@given(slower=st.floats(0.8, 1.25), noise=st.integers(0, 2**16))
def test_drift_follows_what_rounds_take(slower, noise):
    """Drafts against rounds without; unknown until both have been seen, and hardly moved by a hiccup."""
    drift, generator = Drift(), numpy.random.default_rng(noise)
    for _ in range(50):
        drift.note(True, slower)
    assert drift.of_drafts() == pytest.approx(1, abs=0.02)
    for number in range(200):
        drift.note(False, generator.uniform(0.95, 1.05))
        drift.note(True, 100.0 if number == 150 else slower * generator.uniform(0.95, 1.05))
    assert drift.of_drafts() == pytest.approx(slower, rel=0.06)


@given(ends=st.lists(st.integers(1, 12), min_size=1, max_size=3), seed=st.integers(0, 2**16))
def test_stretches_of_a_text(ends, seed):
    generator = torch.Generator().manual_seed(seed)
    positions = torch.stack([torch.randperm(max(ends), generator=generator) for _ in ends])
    positions[:, max(ends) // 3 :] = positions[:, max(ends) // 3 :].sort(dim=-1).values
    is_stretch, stays_until = find_stretches(positions, ends)
    for row, (places, end) in enumerate(zip(positions.tolist(), ends, strict=True)):
        for slot in range(end):
            at = min(slot, end - 3)  # the last two go by the one before
            steps = [places[at + number] - places[at + number - 1] for number in (1, 2)] if end > 2 else [0]
            assert is_stretch[row][slot] == all(0 < step <= 4 for step in steps)
            stays = [other for other in range(slot, end) if is_stretch[row][other] != is_stretch[row][slot]]
            assert stays_until[row][slot] == (stays[0] if stays else max(ends))
        assert stays_until[row][end] == max(ends)


def test_stretches_have_a_pace_of_their_own(monkeypatch):
    """In the sequential phase drafts of this model are all refused, in the diffusion phase none: seen at once."""
    model, lengths = randomized_model(), []
    monkeypatch.setattr(generation_pace, "costs_of", lambda model, rows, length: costs(0.02))
    judge, rhythm = LosslessUnmasking._judge, Pace.rhythm

    def accepts(p, q, uniform):
        return torch.full_like(uniform, not judged[0].convoys[0].judged_of_stretch.get(0)).bool()

    judged = []

    def watched(self, logits, step):
        judged[:] = [self]
        return judge(self, logits, step)

    def chosen(self, *args, **kwargs):
        found = rhythm(self, *args, **kwargs)
        lengths.append(found.length)
        return found

    monkeypatch.setattr(generation_lossless, "accepts", accepts)
    monkeypatch.setattr(LosslessUnmasking, "_judge", watched)
    monkeypatch.setattr(Pace, "rhythm", chosen)
    torch.manual_seed(0)
    model.generate(max_new_tokens=200, lossless=True, alpha_0=0.3, unmasking_order="random", eos_token_id=None)
    assert max(lengths) >= 16
    # From the longest drafts to hardly any, with what the diffusion phase has taught of no account.
    last_long = max(index for index, length in enumerate(lengths) if length >= 16)
    assert max(lengths[last_long + 12 :]) <= 2


@pytest.mark.parametrize("settings", [{}, {"draft_rank": 8}])
def test_the_rhythm_may_change_from_any_to_any(settings, monkeypatch):
    """A cache has room for `MAX_MASKS`, however many drafts the rhythm before has left."""
    model = randomized_model(**settings)
    rhythms = itertools.cycle([Rhythm(32, 0), max(RHYTHMS, key=lambda rhythm: rhythm.redraft), Rhythm(6, 5)])
    monkeypatch.setattr(Pace, "rhythm", lambda self, *args, **kwargs: next(rhythms))
    feeds, decide = [], LosslessUnmasking.decide

    def watched(self, outputs, step):
        feeds.append(max(sum(widths) for widths in self.widths))
        return decide(self, outputs, step)

    monkeypatch.setattr(LosslessUnmasking, "decide", watched)
    monkeypatch.setattr(generation_lossless, "accepts", lambda p, q, uniform: torch.ones_like(uniform).bool())
    text = model.generate(max_new_tokens=120, lossless=True, eos_token_id=None)
    assert text.shape == (1, 120)
    assert 32 < max(feeds) <= MAX_MASKS


@given(before=st.sampled_from(RHYTHMS), rhythm=st.sampled_from(RHYTHMS))
def test_no_more_masks_than_there_is_room_for(before, rhythm):
    for num_drafts in range(before.length):
        behind = rhythm.behind_refusal(num_drafts)
        assert num_drafts * (1 + behind) + rhythm.length <= MAX_MASKS
        if num_drafts < rhythm.length:
            assert behind == rhythm.redraft


@torch.no_grad()
def test_rows_in_step_try_drafts_without_leaving_it(language, monkeypatch):
    """What a trial expects to be accepted, against the sum of min(p, q) by plain forwards."""
    noted, rows = [], 40
    monkeypatch.setattr(generation_pace, "costs_of", lambda model, rows, length: costs(1.0))
    monkeypatch.setattr(Pace, "may_part", lambda self, rows, left: True)
    monkeypatch.setattr(Pace, "note", lambda self, **round_: noted.append(round_))
    monkeypatch.setattr(Pace, "wants_trial", lambda self: True)
    settings = {"num_return_sequences": rows, "max_new_tokens": LENGTH, "return_dict_in_generate": True}
    output = language.generate(lossless=True, alpha_0=0.0, **settings)
    assert output.num_function_evaluations == LENGTH
    assert output.drafts_offered.sum() == output.drafts_accepted.sum() == 0

    first = output.sequences[:, :1]
    exact = language(torch.cat([first, torch.full_like(first, VOCAB)], dim=-1), position_ids=torch.tensor([[0, 1]]))
    p = exact.logits[:, -1].softmax(dim=-1)
    drafted = language(torch.tensor([[VOCAB, VOCAB]]), position_ids=torch.tensor([[0, 1]]))
    logits = drafted.logits[0, 1].repeat(rows, 1)
    if language.draft_head is not None:
        neighbours = torch.cat([first, torch.zeros_like(first)], dim=-1)
        states = drafted.draft_states[:, 1].repeat(rows, 1)
        logits += language.draft_head(states, neighbours, torch.tensor([[1, 0]]).repeat(rows, 1))
    assert [round_["offered"] for round_ in noted] == [0, rows, 0, rows]
    accepted = noted[1]["accepted"]
    assert accepted == pytest.approx(torch.minimum(p, logits.softmax(dim=-1)).sum().item(), rel=1e-4)
    assert 0.1 < accepted / rows < 0.999


@pytest.fixture
def drafts_at_first(monkeypatch):
    """Drafts in the first two rounds, so that rows part; then none, but of fewer rows than were asked first."""
    all_rows = []

    def rhythm(self, rows, are_in_step=False, can_meet=False, left=1):
        all_rows.append(rows)
        return Rhythm(3, 1) if len(all_rows) <= 2 or rows < all_rows[0] else Rhythm(1, 0)

    monkeypatch.setattr(Pace, "wants_trial", lambda self: False)
    monkeypatch.setattr(Pace, "rhythm", rhythm)
    monkeypatch.setattr(generation_pace, "costs_of", lambda model, rows, length: NOMINAL_COSTS)


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("draft_rank", [None, 8])
def test_rows_ahead_wait_for_those_behind(attention, cache, draft_rank, monkeypatch, drafts_at_first):
    model, rows, length, feeds = randomized_model(attention, draft_rank=draft_rank), 6, 24, []
    next_feed = LosslessUnmasking.next_feed

    def watched(self):
        before = list(self.decided), [len(drafts) for drafts in self.drafts]
        feed = next_feed(self)
        feeds.append((*before, feed.num_fed))
        return feed

    monkeypatch.setattr(LosslessUnmasking, "next_feed", watched)
    torch.manual_seed(0)
    settings = {"num_return_sequences": rows, "max_new_tokens": length, "eos_token_id": None, "alpha_0": 0.5}
    output = model.generate(lossless=True, draft_length="auto", return_dict_in_generate=True, **settings, **cache)
    meeting = next(number for number, (_, drafts, _) in enumerate(feeds) if number > 1 and not any(drafts))
    place = max(feeds[meeting][0])
    assert len(set(feeds[meeting][0])) > 1
    num_met = 0
    for decided, drafts, num_fed in feeds[meeting:]:
        if len(set(decided)) > 1:
            assert num_met == 0
            for row in range(rows):
                assert (num_fed[row] == 0) == (decided[row] == place)
                assert decided[row] + drafts[row] <= place
        else:
            assert not any(drafts)
            # Of a draft that ended at the place and was kept, all is cached already.
            assert num_fed == [2] * rows or num_met == 0
            num_met += 1
    assert num_met > 1
    assert len(feeds) == output.num_function_evaluations <= length
    exact = model.log_likelihood(output.sequences, orders=output.orders[:, None]).log_likelihood
    torch.testing.assert_close(output.log_probs.sum(dim=-1), exact, atol=1e-3, rtol=0)


def test_a_convoy_knows_what_its_drafts_were_of():
    """Two rows that stand where a stretch begins; drafts are judged a forward after they have been drawn."""
    positions = torch.tensor([[220, 103, 230, 109, *range(100)]]).repeat(2, 1)
    scattered, stretch = paces = Pace(None, costs(0.02)), Pace(None, costs(0.02))
    (convoy,) = convoys_of([paces], positions, ends=[104, 104])
    assert [convoy.room(0, start) for start in range(104)] == [4, 3, 2, 1, *range(100, 0, -1)]
    for pace in paces:
        pace.note(4, 3, 0, 0, is_trial=True)
    # In step for all to see, but for the drafts that wait to be judged: nothing is put on trial.
    convoy.choose([0, 1], [2, 2], [[5], [5]], may_try=True)
    assert not convoy.is_trial
    convoy.choose([0, 1], [4, 4], [[7], [7]], may_try=True)
    assert not convoy.is_trial
    before = scattered.judged, stretch.judged
    convoy.note([1, 0], [False, True], {}, [[], []], turns=1, seconds=1.0)
    assert scattered.judged > before[0]
    assert stretch.judged <= before[1]
    convoy.choose([0, 1], [5, 5], [[], []], may_try=True)
    assert convoy.is_trial


def test_what_drafts_have_met_with_fades():
    pace = Pace(None, costs(0.02))
    for _ in range(100):
        pace.note(4, 4, 4, 4)
    longest = pace.rhythm(1).length
    for _ in range(60):
        pace.note(4, 0, 1, 1)
    assert longest >= 16 > 2 >= pace.rhythm(1).length


def test_rows_that_wait_are_of_the_exact_distribution(language, drafts_at_first):
    exact = one_token_probabilities(language, [0, 1, 2, 3])
    assert abs(chi_square(draw(language, "auto", unmasking_order="left_to_right"), exact)) < 4


@given(rows=st.lists(st.tuples(st.integers(0, 12), st.integers(1, 12)), min_size=2, max_size=5))
def test_rows_meet_where_that_takes_no_more_forwards(rows):
    """Against both ways, followed forward by forward."""
    decided = [start for start, _ in rows]
    ends = [start + left for start, left in rows]
    place = meeting_place(list(range(len(rows))), decided, ends)
    ahead = max(decided)

    def num_forwards(waits: bool) -> int:
        at, number = list(decided), 0
        while any(slot < end for slot, end in zip(at, ends, strict=True)):
            number += 1
            taking_part = [row for row, end in enumerate(ends) if at[row] < end]
            behind = [row for row in taking_part if at[row] < ahead]
            for row in behind if waits and behind else taking_part:
                at[row] += 1
        return number

    if len(set(decided)) == 1:
        assert place is None
    else:
        assert place == (ahead if num_forwards(waits=True) <= num_forwards(waits=False) else None)


@pytest.mark.parametrize("rhythm", [Rhythm(1, 0), Rhythm(3, 1), Rhythm(4, 0), Rhythm(6, 3)])
def test_costs_between_the_measured_ones(rhythm):
    measured = DecodingCosts(0.9, (2, 8, 40), (1.0, 1.6, 4.0), drawn=(1, 8), draws=(0.25, 0.5))
    _, slots, drafts = rhythm.means(0.5)
    num_turns = 1 + drafts
    seconds = numpy.interp(slots, (2, 8, 40), (1.0, 1.6, 4.0)) + num_turns * 0.25
    if drafts > 0:
        seconds += 0.25 + (drafts - 1) * 0.25 / 7
    assert measured.of_round(slots, drafts, num_turns, False) == pytest.approx(seconds)
    if rhythm.length == 1:
        assert measured.of_round(slots, drafts, num_turns, True) == pytest.approx(0.9 + 0.25)


def test_costs_of_fewer_rows_lie_between():
    found = costs(0.02, rows=16)
    for rows in (1, 5, 16):
        assert found.of_rows(rows).forwards == pytest.approx((1, 1 + 0.02 * rows * 64))
        assert found.of_rows(rows).in_step == pytest.approx(1 + 0.02 * rows * 2)


def test_costs_are_measured_once(monkeypatch):
    model, calls = randomized_model(draft_rank=8), []

    def measured(model, rows, num_cached):
        calls.append((model, rows, num_cached))
        return costs(0.02).of_rows(rows)

    monkeypatch.setattr(generation_costs, "measure_costs", measured)
    for rows in (1, 3, 4):
        model.generate(max_new_tokens=8, lossless=True, num_return_sequences=rows)
        model.generate(max_new_tokens=8, lossless=True, num_return_sequences=rows, draft_length=3)
    assert calls == [(model, 1, 4), (model, 4, 4)]
    model.generate(max_new_tokens=9, lossless=True, num_return_sequences=4)
    assert calls[2:] == [(model, 1, 8), (model, 4, 8)]


def test_several_processes_measure_nothing(monkeypatch):
    """Each would find something else, and they have to feed a model that they share alike."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    assert paces_of(randomized_model(), "auto", 3, 9, None) == [(Pace(None, NOMINAL_COSTS), Pace(None, NOMINAL_COSTS))]
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    assert paces_of(randomized_model(), "auto", 3, 9, None) != [(Pace(None, NOMINAL_COSTS), Pace(None, NOMINAL_COSTS))]


@pytest.mark.parametrize("rows", [1, 5, 300])
@pytest.mark.parametrize("settings", [{}, {"draft_rank": 8}])
def test_measured_costs_grow_with_the_slots(settings, rows):
    model = randomized_model(**settings)
    with model.ready_to_decode():
        found = measure_costs(model, rows, 6)
    assert found.slots[:2] == (2, 4)
    assert all(rows * size <= MAX_SLOTS_MEASURED for size in found.slots[2:])
    assert list(found.forwards) == sorted(found.forwards)
    assert 0 < found.in_step <= found.forwards[0]
    assert all(0 < seconds < 1 for seconds in found.draws)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lossless": 1}, "`lossless` must be a bool, got 1"),
        ({"lossless": True, "draft_length": 0}, "`draft_length` must be None, 'auto' or a positive integer, got 0"),
        ({"lossless": True, "draft_length": "long"}, "`draft_length` must be"),
        ({"lossless": True, "entropy_bound": 0.1}, "unset `entropy_bound`"),
        ({"draft_length": 4}, "set `lossless` too"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        randomized_model().generate(max_new_tokens=4, **settings)


def test_it_can_be_the_default_of_a_saved_model(tmp_path):
    model = randomized_model()
    model.generation_config.lossless = True
    model.generation_config.draft_length = 3
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    output = loaded.generate(max_new_tokens=12, return_dict_in_generate=True)
    assert output.drafts_offered.item() > 0
    plain = loaded.generate(max_new_tokens=12, lossless=False, return_dict_in_generate=True)
    assert plain.drafts_offered is None


def test_drafts_may_be_longer_than_the_text():
    model = randomized_model()
    outputs = []
    for draft_length in (30, 10**9):  # which would not fit any memory
        torch.manual_seed(0)
        outputs.append(model.generate(max_new_tokens=10, lossless=True, draft_length=draft_length))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("alpha_0", [1.0, 0.5])
def test_a_strided_order_does_not_depend_on_the_draft_length(alpha_0):
    model = randomized_model()
    settings = {"unmasking_order": "strided", "alpha_0": alpha_0, "max_new_tokens": 14, "num_return_sequences": 8}
    orders = []
    for decoding in ({}, *({"lossless": True, "draft_length": length} for length in (1, 4, 16))):
        torch.manual_seed(0)
        orders.append(model.generate(**settings, **decoding, return_dict_in_generate=True).orders)
    assert all(torch.equal(order, orders[0]) for order in orders)


def test_strided_samples_are_of_one_distribution_whatever_the_draft_length(language):
    counts = torch.stack(
        [count(draw(language, length, seed=length, unmasking_order="strided", alpha_0=0.7)) for length in (1, 4)]
    )
    counts = counts[:, counts.sum(dim=0) >= 10]
    expected = counts.sum(dim=0) / 2
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    degrees = counts.shape[1] - 1
    assert abs(statistic - degrees) < 4 * (2 * degrees) ** 0.5
