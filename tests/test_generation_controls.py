"""transformers' controls of generate: processors that know neighbours, criteria, streamers, pipelines."""

import io
import threading
from contextlib import redirect_stderr
from itertools import pairwise

import pytest
import torch
from tiny_models import random_batch, randomized_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    EosTokenCriteria,
    MaxLengthCriteria,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    TextDiffusionStreamer,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)
from transformers.generation import BaseStreamer
from transformers.generation import logits_process as standard

from eso_lm import EsoForMaskedDiffusion
from eso_lm.generation_canvas import Canvas
from eso_lm.generation_logits_process import for_slots, process_logits

MASK = 23
ORDERS = ["random", "left_to_right"]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Words a to v; 22 is padding, 23 the mask."""
    vocabulary = {chr(ord("a") + index): index for index in range(22)} | {"<pad>": 22, "<mask>": MASK}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", mask_token="<mask>", clean_up_tokenization_spaces=False
    )


def generate(model, seed=0, **arguments):
    torch.manual_seed(seed)
    return model.generate(**{"max_new_tokens": 16, "alpha_0": 1.0, "return_dict_in_generate": True} | arguments)


def ngrams(text: list[int], size: int) -> list[tuple[int, ...]]:
    return list(zip(*(text[start:] for start in range(size)), strict=False))


@pytest.mark.parametrize("unmasking_order", ORDERS)
@pytest.mark.parametrize("alpha_0", [0.0, 1.0])
def test_no_ngram_is_repeated_in_any_order(unmasking_order, alpha_0):
    """Whichever token of an n-gram comes last is the one that must not complete it."""
    model = randomized_model(scale=0.5)
    prompt = torch.tensor([[1, 2, 1, 3, MASK, 2], [5, 6, MASK, MASK, 5, 6]])
    prompt[1, 4:] = torch.tensor([7, 8])
    arguments = {
        "input_ids": prompt,
        "max_new_tokens": 14,
        "alpha_0": alpha_0,
        "num_diffusion_steps": 5000,
        "unmasking_order": unmasking_order,
        "do_sample": False,
    }
    free = generate(model, **arguments).sequences.tolist()
    assert any(len(set(ngrams(row, 2))) < len(ngrams(row, 2)) for row in free)
    for size in (2, 3):
        for row in generate(model, no_repeat_ngram_size=size, **arguments).sequences.tolist():
            assert len(set(ngrams(row, size))) == len(ngrams(row, size))


@pytest.mark.parametrize("unmasking_order", ORDERS)
def test_bad_phrases_never_arise(unmasking_order):
    model = randomized_model(scale=0.02)
    words = [[3], [4, 5], [4, 6, 7], [8, 8]]
    likely = [4, 5, 6, 7, 8]
    model.lm_head.bias.data[likely] = 5.0
    arguments = {"num_return_sequences": 40, "num_diffusion_steps": 5000, "unmasking_order": unmasking_order}

    def found(sequences):
        return {tuple(word) for word in words for row in sequences.tolist() if tuple(word) in ngrams(row, len(word))}

    assert found(generate(model, **arguments).sequences) >= {(4, 5), (4, 6, 7), (8, 8)}
    assert not found(generate(model, bad_words_ids=words, **arguments).sequences)


def test_left_to_right_processors_are_those_of_transformers():
    """At alpha_0 = 0 the counterparts for slots give the scores that transformers' own processors give."""
    text = torch.tensor([[1, 2, 3, 1, 2, 3, 4, 4, 1, 2]])
    canvas = Canvas(text, None, 14, MASK, [], 0)
    logits = torch.randn(1, 24)
    for processor in (
        standard.NoRepeatNGramLogitsProcessor(3),
        standard.SequenceBiasLogitsProcessor({(7,): 1.5, (1, 2, 9): -2.0, (5, 6): 3.0}),
        standard.NoBadWordsLogitsProcessor([[1, 2, 4], [8]], None),
        standard.MinNewTokensLengthLogitsProcessor(8, 3, [5], device="cpu"),
        standard.MinLengthLogitsProcessor(10, [5], device="cpu"),
        standard.RepetitionPenaltyLogitsProcessor(1.7),
    ):
        expected = processor(text, logits.clone())
        actual = process_logits(for_slots([processor], 24), logits.clone(), canvas, [0], [10])
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("unmasking_order", ORDERS)
def test_the_end_of_text_waits_for_the_minimum(unmasking_order):
    model = randomized_model()
    model.lm_head.bias.data[7] = 8.0
    arguments = {"eos_token_id": 7, "pad_token_id": 9, "num_return_sequences": 8, "unmasking_order": unmasking_order}
    prompt = random_batch(model, 1, 4) % 7
    assert (generate(model, input_ids=prompt, **arguments).sequences[:, 4:9] == 7).any()
    for minimum in ({"min_new_tokens": 5}, {"min_length": 9}):
        assert not (generate(model, input_ids=prompt, **minimum, **arguments).sequences[:, 4:9] == 7).any()


def test_repetition_penalty_covers_all_known_text():
    """A penalty that no repetition survives: given tokens, on both sides of a hole, do not come again."""
    model = randomized_model()
    # The penalty multiplies negative logits and divides positive ones, which it can bring to 0 at the most.
    compute_logits = model.compute_logits
    model.compute_logits = lambda states: compute_logits(states) - 100.0
    prompt = torch.tensor([[0, 1, 2, MASK, 3, 4, 5], [22, 22, 6, MASK, 7, 8, 9]])
    mask = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1]])
    output = generate(
        model,
        input_ids=prompt,
        attention_mask=mask,
        repetition_penalty=1e9,
        num_diffusion_steps=5000,
        max_new_tokens=5,
    )
    for row, is_real in zip(output.sequences, torch.nn.functional.pad(mask, (0, 5), value=1), strict=True):
        text = row[is_real.bool()].tolist()
        assert len(set(text)) == len(text)


@pytest.mark.parametrize("filters", [{"min_p": 0.3}, {"typical_p": 0.3}, {"top_p": 0.3}, {"top_k": 2}])
def test_filters_cut_the_tail(filters):
    model = randomized_model()
    output = generate(model, output_scores=True, output_logits=True, num_diffusion_steps=4, **filters)
    assert output.scores.shape == output.logits.shape == (1, 16, 24)
    possible = output.scores.isfinite()
    assert (possible.sum(dim=-1) < 23).all()
    assert possible.gather(-1, output.sequences[..., None]).all()
    drawn = output.logits.log_softmax(dim=-1).gather(-1, output.sequences[..., None])[..., 0]
    torch.testing.assert_close(drawn, output.log_probs)


def test_a_token_that_completes_the_same_ngram_twice_is_forbidden():
    model = randomized_model()
    arguments = {"input_ids": torch.tensor([[5, MASK, 5]]), "sequence_bias": [[[5], 99.0]], "do_sample": False}
    assert generate(model, max_new_tokens=0, **arguments).sequences.tolist() == [[5, 5, 5]]
    sequences = generate(model, max_new_tokens=0, no_repeat_ngram_size=2, **arguments).sequences
    assert sequences[0, 1] != 5


def test_allowed_tokens_are_those_of_the_row():
    model = randomized_model()
    prompts, mask = torch.tensor([[22, 6], [7, 8]]), torch.tensor([[0, 1], [1, 1]])
    seen = {0: [], 1: []}

    def allowed(row, text):
        seen[row].append(text.tolist())
        return [3] if row == 0 else [4, 5]

    for alpha_0 in (0.0, 1.0):
        output = generate(
            model, input_ids=prompts, attention_mask=mask, prefix_allowed_tokens_fn=allowed, alpha_0=alpha_0
        )
        assert set(output.sequences[0, 2:].tolist()) == {3}
        assert set(output.sequences[1, 2:].tolist()) <= {4, 5}
    assert seen[0][0] == [6]
    assert seen[1][0] == [7, 8]


def test_subclasses_of_processors_run_as_they_are():
    """And may work in place: `logits` and `log_probs` stay those of the model."""

    class Halving(standard.TemperatureLogitsWarper):
        def __call__(self, input_ids, scores):
            return scores.mul_(1 / (1 + input_ids.shape[1]))

    model = randomized_model()
    output = generate(
        model, input_ids=torch.tensor([[4]]), logits_processor=[Halving(1.0)], output_logits=True, output_scores=True
    )
    drawn = output.logits.log_softmax(dim=-1).gather(-1, output.sequences[..., None])[0, 1:, 0]
    torch.testing.assert_close(output.log_probs[0, 1:], drawn)
    step = output.unmasking_steps[0] == 1
    torch.testing.assert_close(output.scores[0, step, :MASK], output.logits[0, step, :MASK] / 2)


def test_scores_are_zero_where_given():
    model = randomized_model()
    prompt = random_batch(model, 2, 3)
    output = generate(model, input_ids=prompt, output_scores=True, temperature=0.5, output_logits=True)
    assert not output.scores[:, :3].any()
    torch.testing.assert_close(output.scores[:, 3:, :MASK], 2 * output.logits[:, 3:, :MASK])


class StopAt(StoppingCriteria):
    def __init__(self, token):
        self.token, self.seen = token, []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(input_ids[0].tolist())
        return torch.full((len(input_ids),), bool(input_ids[0, -1] == self.token))


@pytest.mark.parametrize("unmasking_order", ORDERS)
@pytest.mark.parametrize("batch", [1, 5])
def test_criteria_see_every_prefix_and_end_the_text_there(unmasking_order, batch):
    model = randomized_model(scale=0.05)
    model.lm_head.bias.data[4], model.lm_head.bias.data[22] = 1.0, -50.0
    prompt = torch.tensor([[4, 4]] * batch)
    arguments = {"input_ids": prompt, "max_new_tokens": 40, "unmasking_order": unmasking_order, "pad_token_id": 22}
    free = generate(model, **arguments).sequences
    criterion = StopAt(4)
    stopped = generate(model, stopping_criteria=[criterion], **arguments)
    assert any(4 in row[2:].tolist() for row in stopped.sequences), "a stop inside the prompt is none"
    for row, steps in zip(stopped.sequences.tolist(), stopped.unmasking_steps.tolist(), strict=True):
        if 4 in row[2:]:
            end = row.index(4, 2) + 1
            assert row[end:] == [22] * (42 - end)
            assert steps[end:] == [0] * (42 - end)
        assert MASK not in row
    if batch == 1:
        end = stopped.sequences[0].tolist().index(4, 2) + 1
        assert stopped.sequences[0, :end].tolist() == free[0, :end].tolist()
        prefixes = [text for text in criterion.seen if MASK not in text]
        assert prefixes == [stopped.sequences[0, :length].tolist() for length in range(3, end + 1)]


@pytest.mark.parametrize("unmasking_order", ORDERS)
def test_stop_strings_end_the_text(unmasking_order):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_only = Tokenizer(models.BPE({byte: index for index, byte in enumerate(alphabet)}, []))
    bytes_only.pre_tokenizer, bytes_only.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_only, pad_token="<pad>", mask_token="<mask>")
    model = randomized_model(scale=0.02, vocab_size=len(tokenizer))
    model.lm_head.bias.data[tokenizer("dog", add_special_tokens=False)["input_ids"]] = 8.0
    output = generate(
        model,
        max_new_tokens=60,
        stop_strings=["do"],
        tokenizer=tokenizer,
        num_return_sequences=6,
        pad_token_id=tokenizer.pad_token_id,
        unmasking_order=unmasking_order,
    )
    for row in output.sequences:
        text = tokenizer.decode(row, skip_special_tokens=True)
        assert text.index("do") == len(text) - 2


def test_the_criteria_of_length_and_end_of_text_work_as_the_settings_do():
    model = randomized_model(scale=0.05)
    model.lm_head.bias.data[22] = -50.0
    arguments = {"max_new_tokens": 30, "pad_token_id": 22, "alpha_0": 0.5}
    short = generate(model, stopping_criteria=[MaxLengthCriteria(9)], **arguments).sequences
    assert (short[:, 9:] == 22).all()
    assert (short[:, :9] != 22).all()
    by_setting = generate(model, eos_token_id=5, **arguments).sequences
    by_criterion = generate(model, stopping_criteria=[EosTokenCriteria(5)], **arguments).sequences
    assert torch.equal(by_setting, by_criterion)


@pytest.mark.parametrize("batch", [1, 3])
def test_time_runs_out_and_leaves_masks(batch):
    """What is decided stays, what is not can be filled in later."""
    model = randomized_model()
    prompt = random_batch(model, batch, 4)
    output = generate(model, input_ids=prompt, max_time=0.0)
    assert output.num_function_evaluations == 1
    assert torch.equal(output.sequences[:, :4], prompt)
    assert torch.equal(output.sequences[:, 4:] == MASK, output.unmasking_steps[:, 4:] == 0)
    assert (output.sequences == MASK).any(dim=-1).all()
    completed = generate(model, input_ids=output.sequences, max_new_tokens=0).sequences
    assert (completed != MASK).all()
    assert torch.equal(completed[output.sequences != MASK], output.sequences[output.sequences != MASK])


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "dynamic"}, {"use_cache": False}])
def test_rows_that_stop_keep_step_with_the_others(cache):
    model = randomized_model(scale=0.05)
    prompt = torch.tensor([[1, 9], [2, 9], [3, 9]])

    class StopFirst(StoppingCriteria):
        """A button that stops whatever begins with a 1, pressed after the first forward."""

        is_pressed = False

        def __call__(self, input_ids, scores, **kwargs):
            was_pressed, self.is_pressed = self.is_pressed, self.is_pressed or bool(input_ids[0, 0] == 3)
            return (input_ids[:, 0] == 1) & (input_ids[:, -1] == MASK) & was_pressed

    arguments = {"input_ids": prompt, "num_diffusion_steps": 6, "pad_token_id": 22, "lockstep": True}
    free = generate(model, **arguments)
    output = generate(model, stopping_criteria=[StopFirst()], **cache, **arguments)
    assert torch.equal(output.sequences[1:], free.sequences[1:])
    revealed = free.unmasking_steps[0] <= 1
    assert torch.equal(output.sequences[0, revealed], free.sequences[0, revealed])
    assert (output.sequences[0, ~revealed] == MASK).all()
    assert not output.unmasking_steps[0, ~revealed].any()
    assert not output.log_probs[0, ~revealed].any()


class Recorder(BaseStreamer):
    def __init__(self):
        self.puts, self.drafts, self.ended = [], [], 0

    def put(self, value):
        self.puts.append(value.flatten().tolist())

    def put_draft(self, value, **kwargs):
        # A draft comes with all that has been put before it.
        self.drafts.append([token for put in self.puts for token in put] + value.flatten().tolist())

    def end(self):
        self.ended += 1


class StepRecorder(BaseStreamer):
    def __init__(self):
        self.steps = []

    def put(self, value):
        pass

    def put_step(self, step):
        self.steps.append(step)

    def end(self):
        pass


@pytest.mark.parametrize("settings", [
    {"num_diffusion_steps": 3}, {"alpha_0": 0.4}, {"block_length": 4, "num_diffusion_steps": 4},
    {"entropy_bound": 1.0}, {"lossless": True, "draft_length": 4},
])  # fmt: skip
@pytest.mark.parametrize("prompt", [None, [[1, MASK, 3, MASK, 5]]])
def test_every_step_is_told_as_it_was(settings, prompt):
    model, streamer = randomized_model(), StepRecorder()
    prompt = None if prompt is None else torch.tensor(prompt)
    output = generate(model, input_ids=prompt, streamer=streamer, **settings)
    steps = streamer.steps
    assert [step.number for step in steps] == list(range(output.num_function_evaluations + 1))
    for step in steps:
        is_decided = (output.unmasking_steps[0] > 0) & (output.unmasking_steps[0] <= step.number)
        is_given = output.unmasking_steps[0] == 0
        assert torch.equal(step.unmasking_steps > 0, is_decided)
        assert torch.equal(step.tokens == MASK, ~is_decided & ~is_given)
        assert torch.equal(step.tokens[is_decided], output.sequences[0, is_decided])
        assert torch.equal(step.log_probs[is_decided], output.log_probs[0, is_decided])
        assert not step.log_probs[~is_decided].any()
    assert torch.equal(steps[-1].tokens, output.sequences[0])
    assert not steps[-1].drafts
    if "lossless" not in settings:
        assert not any(step.drafts or step.refused for step in steps)


@pytest.mark.parametrize("settings", [{"num_diffusion_steps": 8}, {"lossless": True, "draft_length": 4}])
def test_behind_the_end_of_a_text_nothing_is_told(settings):
    model, ended = randomized_model(), 0
    for seed in range(12):
        streamer = StepRecorder()
        output = generate(model, seed, streamer=streamer, eos_token_id=[3, 9, 14], pad_token_id=22, **settings)
        for step in streamer.steps:
            tokens = step.tokens.tolist()
            end = min([tokens.index(token) for token in (3, 9, 14) if token in tokens], default=len(tokens)) + 1
            ended += end < len(tokens) and MASK in tokens[:end]
            assert tokens[end:] == [22] * len(tokens[end:])
            assert not step.unmasking_steps[end:].any()
            assert not step.log_probs[end:].any()
            assert all(column < end for column in step.drafts)
        assert torch.equal(streamer.steps[-1].tokens, output.sequences[0])
    assert ended > 5


@pytest.mark.parametrize("draft_length", [4, "auto"])
def test_drafts_and_refusals_are_told_as_they_are_counted(draft_length):
    model, refusals = randomized_model(), 0
    for seed in range(8):
        streamer, accepted, offered = StepRecorder(), 0, 0
        output = generate(model, seed, streamer=streamer, lossless=True, draft_length=draft_length)
        for before, after in pairwise(streamer.steps):
            assert all(before.tokens[column] == MASK for column in before.drafts)
            kept = [column for column, token in before.drafts.items() if after.tokens[column] == token]
            assert after.refused.keys() <= before.drafts.keys() - set(kept)
            assert all(after.refused[column] == before.drafts[column] for column in after.refused)
            assert all(after.tokens[column] not in (MASK, token) for column, token in after.refused.items())
            # One refusal at most, and none where all are kept.
            assert len(after.refused) == (len(kept) < len(before.drafts))
            accepted, offered = accepted + len(kept), offered + len(before.drafts)
            refusals += len(after.refused)
        assert (accepted, offered) == (output.drafts_accepted.item(), output.drafts_offered.item())
    assert draft_length == "auto" or refusals > 4


@pytest.mark.parametrize("unmasking_order", [*ORDERS, "strided"])
@pytest.mark.parametrize("prompt", [None, [[1, 2, 3]], [[1, MASK, 3, MASK, 5]]])
@pytest.mark.parametrize("alpha_0", [0.0, 1.0])
def test_text_is_streamed_as_soon_as_all_to_its_left_is_known(unmasking_order, prompt, alpha_0):
    model = randomized_model()
    streamer = Recorder()
    prompt = None if prompt is None else torch.tensor(prompt)
    output = generate(
        model,
        input_ids=prompt,
        streamer=streamer,
        alpha_0=alpha_0,
        unmasking_order=unmasking_order,
        num_diffusion_steps=6,
    )
    text, steps = output.sequences[0].tolist(), output.unmasking_steps[0].tolist()
    assert [token for put in streamer.puts for token in put] == text
    assert streamer.ended == 1
    given = [] if prompt is None else prompt[0].tolist()
    assert streamer.puts[0] == (given[: given.index(MASK)] if MASK in given else given)
    for forward, draft in enumerate(streamer.drafts):
        assert draft == [token if step <= forward else MASK for token, step in zip(text, steps, strict=True)]
    assert len(streamer.drafts) == output.num_function_evaluations


def test_nothing_is_streamed_behind_the_end_of_text():
    model = randomized_model()
    model.lm_head.bias.data[7] = 3.0
    streamer = Recorder()
    output = generate(model, streamer=streamer, eos_token_id=7, pad_token_id=9, num_diffusion_steps=5)
    streamed = [token for put in streamer.puts for token in put]
    assert streamed[-1] == 7
    assert output.sequences[0].tolist() == streamed + [9] * (16 - len(streamed))


def test_streamers_of_transformers(tokenizer, capsys):
    model = randomized_model()
    prompt = torch.tensor([[1, 2]])
    expected = tokenizer.decode(generate(model, input_ids=prompt).sequences[0, 2:])
    generate(model, input_ids=prompt, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.strip() == expected

    iterator = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=30)
    thread = threading.Thread(target=generate, args=(model,), kwargs={"input_ids": prompt, "streamer": iterator})
    thread.start()
    assert "".join(iterator).strip() == expected
    thread.join()

    generate(model, input_ids=prompt, streamer=TextDiffusionStreamer(tokenizer), num_diffusion_steps=4)
    shown = capsys.readouterr().out
    assert "<mask>" in shown
    assert "\033[33m" in shown


def test_a_streamer_is_told_the_end_even_when_generation_fails():
    streamer = Recorder()
    with pytest.raises(ValueError, match="No token can be drawn"):
        generate(randomized_model(), streamer=streamer, logits_processor=[lambda ids, scores: scores - torch.inf])
    assert streamer.ended == 1


def test_streamers_take_one_text():
    with pytest.raises(ValueError, match="`streamer` takes one text, got a batch of 2"):
        generate(randomized_model(), num_return_sequences=2, streamer=Recorder())


def test_a_progress_bar_counts_tokens_on_request():
    stream = io.StringIO()
    with redirect_stderr(stream):
        generate(randomized_model(), num_return_sequences=2)
        assert stream.getvalue() == ""
        generate(randomized_model(), num_return_sequences=2, progress_bar=True)
    assert "32/32" in stream.getvalue()


def test_generation_settings_are_saved_with_the_model(tmp_path):
    model = randomized_model()
    model.generation_config.update(entropy_bound=1.5, num_candidates=3, unmasking_order="strided", alpha_0=0.75)
    model.save_pretrained(tmp_path)
    loaded = EsoForMaskedDiffusion.from_pretrained(tmp_path)
    for name in ("entropy_bound", "num_candidates", "unmasking_order", "alpha_0"):
        assert getattr(loaded.generation_config, name) == getattr(model.generation_config, name)
    assert torch.equal(generate(loaded).sequences, generate(model).sequences)


def test_settings_that_would_not_load_are_not_saved(tmp_path):
    model = randomized_model()
    model.generation_config.max_new_tokens = 0
    for saves in (model.save_pretrained, model.generation_config.save_pretrained):
        with pytest.raises(ValueError, match="`max_new_tokens=0` cannot be saved"):
            saves(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_transition_scores_are_refused():
    with pytest.raises(ValueError, match="take `log_probs`"):
        randomized_model().compute_transition_scores(None, None)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_text_generation_pipeline_in_batches(tokenizer, padding_side):
    model = randomized_model()
    tokenizer.padding_side = padding_side
    writer = pipeline("text-generation", model=model, tokenizer=tokenizer)
    prompts = ["a b c", "d", "e f g h i", "j k"]
    outputs = writer(prompts, batch_size=4, max_new_tokens=5, do_sample=True)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output[0]["generated_text"].startswith(prompt)
        assert 0 < len(output[0]["generated_text"].removeprefix(prompt).split()) <= 5


def test_fill_mask_pipeline_in_batches(tokenizer):
    model = randomized_model()
    filler = pipeline("fill-mask", model=model, tokenizer=tokenizer)
    texts = ["a b <mask> c", "<mask> d", "e f g h <mask> i j"]
    together = filler(texts, batch_size=3)
    for text, candidates in zip(texts, together, strict=True):
        alone = filler(text)
        assert [candidate["token"] for candidate in candidates] == [candidate["token"] for candidate in alone]
        for candidate, expected in zip(candidates, alone, strict=True):
            assert candidate["score"] == pytest.approx(expected["score"], abs=1e-5)
            assert candidate["sequence"] == text.replace("<mask>", candidate["token_str"])


@pytest.mark.parametrize("alpha_0", [0.0, 1.0])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_criterion_that_the_prompt_fulfils_stops_after_one_token(alpha_0, batch):
    """As transformers does; whoever speaks of the last token alone is asked about new ones."""
    model = randomized_model()
    prompt = random_batch(model, batch, 6)

    class LongEnough(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= 5)

    output = generate(model, input_ids=prompt, stopping_criteria=[LongEnough()], alpha_0=alpha_0, pad_token_id=22)
    assert output.num_function_evaluations == 1
    assert (output.unmasking_steps[:, 6:] > 0).sum(dim=-1).tolist() == [1] * batch
    assert (output.sequences[:, 6] != MASK).all()
    assert (output.sequences[:, 7:] == 22).all()


def test_the_progress_bar_ends_at_its_end(monkeypatch):
    from eso_lm import generation_observers

    bars = []

    class Bar:
        def __init__(self, total, **kwargs):
            self.total, self.n = total, 0
            bars.append(self)

        def update(self, count):
            self.n += count

        def close(self):
            pass

    monkeypatch.setattr(generation_observers, "tqdm", Bar)
    model = randomized_model()
    model.lm_head.bias.data[7] = 50.0  # every token is the end of text
    generate(model, alpha_0=0.0, eos_token_id=7, pad_token_id=9)
    assert bars[0].n == bars[0].total == 16


@pytest.mark.parametrize("num_diffusion_steps", ["max", 10**6])
def test_one_token_a_forward(num_diffusion_steps):
    output = generate(randomized_model(), alpha_0=1.0, num_diffusion_steps=num_diffusion_steps)
    assert sorted(output.unmasking_steps[0].tolist()) == list(range(1, 17))
    assert output.unmasking_steps[0].tolist() != list(range(1, 17))


def test_ngrams_longer_than_the_text_forbid_nothing_and_cost_nothing():
    model = randomized_model()
    prompt, seeds = torch.tensor([[1, 2, 3]]), [torch.Generator().manual_seed(1) for _ in range(2)]
    plain, long = (
        model.generate(prompt, max_new_tokens=8, generator=seed, **settings)
        for seed, settings in zip(seeds, ({}, {"no_repeat_ngram_size": 10**12}), strict=True)
    )
    assert torch.equal(plain, long)
