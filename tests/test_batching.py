"""Continuous batching: whatever company a request is in, it gets what `generate` alone would give it."""

import gc
import itertools
import os
import queue
import random
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
from tiny_models import backbone_config, randomized_model
from transformers import LogitsProcessorList
from transformers.generation import BaseStreamer
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager

from eso_lm import EsoForMaskedDiffusion, EsoGenerationConfig
from eso_lm.batching_budget import let_worker_threads_go
from eso_lm.batching_manager import EsoBatchingManager
from eso_lm.modeling_attention import grouped_sdpa_attention_forward
from eso_lm.modeling_packing import TextsInPieces

MASK = 23
MODES = (
    {"alpha_0": 1.0},
    {"alpha_0": 0.0},
    {"alpha_0": 0.5, "num_diffusion_steps": 4},
    {"alpha_0": 1.0, "num_diffusion_steps": 5, "block_length": 8},
    {"alpha_0": 1.0, "unmasking_order": "strided"},
    {"alpha_0": 1.0, "entropy_bound": 1.5},
    {"alpha_0": 0.7, "confidence_threshold": 0.2, "num_candidates": 5},
    {"lossless": True, "alpha_0": 0.5},
    {"lossless": True, "draft_length": 4, "alpha_0": 1.0, "unmasking_order": "left_to_right"},
    {"temperature": 0.7, "top_k": 5},
    {"do_sample": False},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
    {"eos_token_id": 3, "pad_token_id": 0},
)


PAGE_SIZE = "page_size" if "page_size" in ContinuousBatchingConfig.__dataclass_fields__ else "block_size"
"""As transformers calls it, from 5.18 on and before."""


def roomy(**settings) -> ContinuousBatchingConfig:
    return ContinuousBatchingConfig(**{PAGE_SIZE: 8, "num_blocks": 128} | settings)


@pytest.fixture
def model() -> EsoForMaskedDiffusion:
    return randomized_model(dtype=torch.float64, max_position_embeddings=128)


@pytest.fixture
def manager(model):
    with model.continuous_batching_context_manager(continuous_batching_config=roomy()) as manager:
        yield manager
        manager.stop(hard_stop=True)


def alone(model: EsoForMaskedDiffusion, prompt: list[int], seed: int, **settings):
    inputs = torch.tensor([prompt]) if prompt else None
    given = {"attention_mask": torch.ones_like(inputs)} if prompt else {}  # token 0 is padding in one of the modes
    generator = [torch.Generator().manual_seed(seed)]
    return model.generate(inputs, generator=generator, return_dict_in_generate=True, **given, **settings)


def results_of(manager: EsoBatchingManager, count: int) -> dict:
    """The results of so many requests, by name."""
    results = {}
    for _ in range(10000):
        if len(results) == count:
            break
        result = manager.get_result(timeout=10)
        assert result is not None, "nothing happens any more"
        if result.is_finished():
            results[result.request_id] = result
    return results


def requests_of_all_modes(count: int, seed: int) -> list[tuple[list[int], dict]]:
    """Prompts, some with holes, some of which begin alike, each with the settings of some mode."""
    rng = random.Random(seed)
    beginning = [rng.randrange(MASK) for _ in range(40)]
    requests = []
    for index in range(count):
        prompt = [rng.randrange(MASK) for _ in range(rng.randrange(0, 30))]
        if index % 3 == 0:
            prompt = beginning[: rng.randrange(20, 40)] + prompt[:5]
        if index % 4 == 0 and prompt:
            for _ in range(4):
                prompt[rng.randrange(len(prompt))] = MASK
        requests.append((prompt, MODES[index % len(MODES)] | {"max_new_tokens": rng.randrange(1, 40)}))
    return requests


@pytest.mark.parametrize(
    ("kind", "attention", "limits"),
    [
        ("eso", "sdpa", {"max_requests_per_batch": 6, "max_batch_tokens": 10, "num_blocks": 40}),
        ("eso", "eager", {"max_requests_per_batch": 3}),
        ("with a draft head", "sdpa", {"max_batch_tokens": 1}),
        ("llama", "sdpa", {"allow_block_sharing": False}),
    ],
)
def test_every_request_gets_what_it_would_get_alone(kind, attention, limits):
    own = {"eso": {}, "with a draft head": {"draft_rank": 4}, "llama": {"backbone_config": backbone_config("llama")}}
    model = randomized_model(attention, torch.float64, max_position_embeddings=128, **own[kind])
    requests = requests_of_all_modes(39, seed=len(kind))
    with model.continuous_batching_context_manager(continuous_batching_config=roomy(**limits)) as manager:
        for index, (prompt, settings) in enumerate(requests):
            manager.add_request(prompt, f"{index}", seed=index, streaming=index % 2 == 0, **settings)
            if index % 5 == 0:
                time.sleep(0.01)  # so that some join while others are under way
        results = results_of(manager, len(requests))
        metrics = manager.metrics()
    assert metrics["finished"] == len(requests)
    assert metrics["active"] == metrics["slots_in_use"] == 0
    assert (metrics["shared_prompt_tokens"] > 0) == (kind != "llama")
    for index, (prompt, settings) in enumerate(requests):
        result, expected = results[f"{index}"], alone(model, prompt, index, **settings)
        length = len(result.sequence)
        assert result.error is None
        assert result.sequence == expected.sequences[0, :length].tolist()
        assert (expected.sequences[0, length:] == 0).all()  # padding behind an end of text
        torch.testing.assert_close(torch.tensor(result.log_probs), expected.log_probs[0, :length])
        assert result.unmasking_steps == expected.unmasking_steps[0, :length].tolist()
        assert result.num_function_evaluations == expected.num_function_evaluations
        first_open = prompt.index(MASK) if MASK in prompt else len(prompt)
        assert result.generated_tokens == result.sequence[first_open:]
        assert result.num_given == len(prompt) - prompt.count(MASK)


def test_attention_in_pieces_is_attention(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, slots, 8, generator=generator) for heads, slots in ((4, 9), (2, 600), (2, 600))
    )
    texts = [([slice(10, 30)], 2), ([slice(40, 45), slice(100, 460)], 3), ([slice(5, 10), slice(500, 504)], 4)]
    masks = [torch.ones(1, 1, count, count, dtype=torch.bool).tril() for _, count in texts]
    packing = TextsInPieces([count for _, count in texts], [pieces for pieces, _ in texts], masks)
    for smallest in (1, 10**9):  # products, and sdpa
        monkeypatch.setattr("eso_lm.modeling_attention.MIN_SCORES_BY_PRODUCTS", smallest)
        with torch.no_grad():
            found, _ = grouped_sdpa_attention_forward(None, query, key, value, None, scaling=0.3, packed_rows=packing)
        start = 0
        for pieces, count in texts:
            keys, values = (
                torch.cat([states[0, :, piece] for piece in pieces], dim=1).repeat_interleave(2, dim=0)
                for states in (key, value)
            )
            scores = 0.3 * query[0, :, start : start + count] @ keys.transpose(1, 2)
            own = torch.arange(count)
            scores[:, :, -count:][:, own[:, None] < own] = -torch.inf
            expected = (scores.softmax(dim=-1) @ values).transpose(0, 1)
            torch.testing.assert_close(found[0, start : start + count], expected)
            start += count


def test_a_stream_is_what_is_known_from_the_left(model, manager):
    manager.add_request([1, 2, MASK, 4], "r", max_new_tokens=20, seed=3, streaming=True, record_timestamps=True)
    streamed = list(manager.request_id_iter("r"))
    final = streamed[-1]
    assert [output.is_finished() for output in streamed] == [False] * (len(streamed) - 1) + [True]
    assert len(streamed) == final.num_function_evaluations
    for earlier, later in itertools.pairwise(streamed):
        known = len(earlier.generated_tokens)
        assert later.generated_tokens[:known] == earlier.generated_tokens
        assert MASK not in earlier.generated_tokens
        assert earlier.sequence.count(MASK) > later.sequence.count(MASK)
        assert len(earlier.timestamps) == known
    assert final.sequence == alone(model, [1, 2, MASK, 4], 3, max_new_tokens=20).sequences[0].tolist()
    assert final.generated_tokens == final.sequence[2:]
    assert len(final.logprobs) == 22


def test_who_is_cancelled_leaves_at_once_and_changes_nobody_else(model, manager):
    manager.add_request([1] * 30, "long", max_new_tokens=90, seed=0)
    manager.add_request([2, 3], "other", max_new_tokens=60, seed=1)
    while manager.metrics()["forwards"] < 3:
        time.sleep(0.001)
    manager.cancel_request("long")
    results = results_of(manager, 2)
    assert results["long"].error == "The request was cancelled."
    assert results["long"].num_function_evaluations < 60  # it has left before the other one
    assert results["other"].sequence == alone(model, [2, 3], 1, max_new_tokens=60).sequences[0].tolist()
    assert manager.metrics()["cancelled"] == 1
    assert manager.metrics()["slots_in_use"] == 0
    manager.cancel_request("nobody")


def test_what_goes_wrong_with_a_request_is_its_own_affair(model, manager):
    def fails(input_ids, scores):
        if input_ids.shape[1] > 5:
            raise RuntimeError("a processor of one request")
        return scores

    def forbids_all(input_ids, scores):
        return torch.full_like(scores, -torch.inf)

    for name, processor in (("fails", fails), ("forbids", forbids_all), ("fine", lambda input_ids, scores: scores)):
        processors = LogitsProcessorList([processor])
        manager.add_request([1, 2, 3], name, max_new_tokens=12, seed=2, logits_processor=processors)
    results = results_of(manager, 3)
    assert results["fails"].error == "a processor of one request"
    assert len(results["fails"].sequence) - results["fails"].sequence.count(MASK) == 6
    assert "No token can be drawn" in results["forbids"].error
    assert results["fine"].sequence == alone(model, [1, 2, 3], 2, max_new_tokens=12).sequences[0].tolist()
    assert manager.metrics()["failed"] == 2
    assert manager.metrics()["slots_in_use"] == 0


def test_what_never_fits_is_refused_and_what_does_not_fit_now_waits_in_order(model):
    config = roomy(num_blocks=5, allow_block_sharing=False)  # 40 slots
    with model.continuous_batching_context_manager(continuous_batching_config=config) as manager:
        for settings in ({"max_new_tokens": 38}, {"max_new_tokens": 10**12}, {"max_length": 41}):
            with pytest.raises(
                ValueError, match=r"slots .* and the cache has 40: ask for less, or give it more memory"
            ):
                manager.add_request([1, 2, 3], "never", **settings)
        with pytest.raises(ValueError, match="makes a text of 41 slots"):
            manager.add_request([1, 2, 3], max_new_tokens=22, lossless=True, draft_length=4)
        for name, new_tokens in (("a", 25), ("b", 20), ("c", 5), ("d", 5)):
            manager.add_request([1, 2, 3], name, max_new_tokens=new_tokens, seed=0)
        results = results_of(manager, 4)
    began = {name: result.lifespan[0] for name, result in results.items()}
    ended = {name: result.lifespan[1] for name, result in results.items()}
    assert ended["a"] < began["b"] <= began["c"]
    assert began["c"] <= began["d"]
    assert "never" not in results


def test_prompts_that_begin_alike_are_computed_and_kept_once(model):
    beginning, settings = [i % MASK for i in range(50)], {"max_new_tokens": 10, "num_diffusion_steps": "max"}
    to_write = 10 + 9  # slots: a mask for each token, and each token but the last
    with model.continuous_batching_context_manager(continuous_batching_config=roomy()) as manager:
        # All at once: the others wait for the first one to have read what they have in common.
        for index in range(4):
            manager.add_request([*beginning, index, 5], f"{index}", seed=index, **settings)
        peak = 0
        while manager.metrics()["finished"] < 4:
            peak = max(peak, manager.metrics()["slots_in_use"])
            time.sleep(0.001)
        results = results_of(manager, 4)
        assert manager.metrics()["shared_prompt_tokens"] == 3 * 50
        assert manager.metrics()["fed_slots"] == 52 + 3 * 2 + 4 * to_write
        assert peak <= 62 + 3 * 12
        # And later too; nobody uses them now.
        assert manager.metrics()["slots_in_use"] == 0
        assert manager.metrics()["slots_kept"] >= 52
        manager.add_request(beginning, "all of it", seed=9, **settings)
        results |= results_of(manager, 1)
        assert manager.metrics()["shared_prompt_tokens"] == 4 * 50
        assert manager.metrics()["fed_slots"] == 52 + 3 * 2 + 5 * to_write
    for index in range(4):
        expected = alone(model, [*beginning, index, 5], index, **settings)
        assert results[f"{index}"].sequence == expected.sequences[0].tolist()
    assert results["all of it"].sequence == alone(model, beginning, 9, **settings).sequences[0].tolist()


def test_a_long_prompt_does_not_keep_the_others_waiting(model):
    config = roomy(max_batch_tokens=10)
    with model.continuous_batching_context_manager(continuous_batching_config=config) as manager:
        manager.add_request([1, 2], "short", max_new_tokens=30, seed=0, num_diffusion_steps="max")
        while manager.metrics()["forwards"] < 2:
            time.sleep(0.001)
        manager.add_request([3] * 60, "long", max_new_tokens=5, seed=0, num_diffusion_steps="max")
        results = results_of(manager, 2)
        # One more slot for the mask of each new token, and one for each new token but the last.
        assert manager.metrics()["fed_slots"] == 2 + 30 + 29 + 60 + 5 + 4
        assert manager.metrics()["forwards"] <= 30 + 11  # the parts of the long prompt ride along
    expected = alone(model, [3] * 60, 0, max_new_tokens=5, num_diffusion_steps="max")
    assert results["long"].sequence == expected.sequences[0].tolist()


def test_prompts_together_are_no_longer_than_one_may_be(model):
    config = roomy(max_batch_tokens=10, allow_block_sharing=False)
    with model.continuous_batching_context_manager(continuous_batching_config=config) as manager:
        for index in range(3):
            manager.add_request([index] * 40, f"{index}", max_new_tokens=1, seed=0)
        results_of(manager, 3)
        # Twelve parts of ten tokens; where they all have come before the first forward, or just after it.
        assert 12 <= manager.metrics()["forwards"] <= 13


def test_stopping_finishes_what_is_there_or_fails_it_with_an_answer(model):
    manager = model.init_continuous_batching(continuous_batching_config=roomy(max_requests_per_batch=2))
    for hard in (False, True):
        manager.start()
        for index in range(6):
            manager.add_request([index], f"{index}", max_new_tokens=40, seed=index)
        manager.stop(hard_stop=hard)
        results = {}
        while not manager.output_router.output_queue.empty():
            result = manager.output_router.output_queue.get()
            results[result.request_id] = result
        assert len(results) == 6
        assert all(result.is_finished() for result in results.values())
        assert all(result.error is None for result in results.values()) or hard
        assert any(result.error is not None for result in results.values()) == hard
        assert not manager._names
        assert not model.is_ready_to_decode
    assert manager.add_request([1], max_new_tokens=2) is None  # it has stopped


@pytest.mark.parametrize("waits", [True, False])
def test_a_manager_that_has_stopped_holds_no_memory(model, waits):
    manager = model.init_continuous_batching(continuous_batching_config=roomy())
    manager.start()
    keys = weakref.ref(manager._processor.forward.cache.layers[0].keys)
    thread = manager._generation_thread
    manager.stop(block=waits)
    thread.join()
    gc.collect()
    assert keys() is None


def test_of_several_prompts_all_are_added_or_none(manager):
    with pytest.raises(ValueError, match="ids of the vocabulary"):
        manager.add_requests([[1], [99]], max_new_tokens=3)
    assert not manager._names
    assert manager.input_queue.empty()
    names = manager.add_requests([[1], [2]], max_new_tokens=3, seed=5, num_return_sequences=2)
    results = results_of(manager, 4)
    assert set(results) == {*names, *(f"{name}__child#0" for name in names)}


def test_it_stops_without_being_waited_for(model):
    manager = model.init_continuous_batching(continuous_batching_config=roomy())
    manager.start()
    manager.add_request([1], "r", max_new_tokens=60, seed=0)
    while manager.metrics()["forwards"] < 2:
        time.sleep(0.001)
    manager.stop(block=False)
    manager._generation_thread.join()
    assert manager.output_router.output_queue.get(timeout=10).error is None


@pytest.mark.skipif(
    not hasattr(ContinuousBatchingManager, "pause"), reason="this release of transformers has no pauses yet"
)
def test_weights_may_change_in_a_pause(model, manager):
    prompt = [i % MASK for i in range(40)]
    before = alone(model, prompt, 0, max_new_tokens=12).sequences[0].tolist()
    manager.add_request(prompt, "before", max_new_tokens=12, seed=0)
    assert results_of(manager, 1)["before"].sequence == before
    with manager.pause(), torch.no_grad():
        assert not model.is_ready_to_decode
        for parameter in model.parameters():
            parameter.mul_(1.1)
    manager.add_request(prompt, "after", max_new_tokens=12, seed=0)
    after = results_of(manager, 1)["after"].sequence
    assert after == alone(model, prompt, 0, max_new_tokens=12).sequences[0].tolist()
    assert after != before
    assert manager.metrics()["shared_prompt_tokens"] == 0  # nothing of the old prompt was taken over


def test_generate_batch_returns_what_it_was_given_in_order(model):
    prompts = [[1, 2, 3], [], [4, MASK, 5], [6] * 20]
    settings = {"max_new_tokens": 7, "alpha_0": 1.0, "num_diffusion_steps": 3}
    results = model.generate_batch(prompts, seed=10, num_return_sequences=2, **settings)
    names = [name for index in range(4) for name in (f"req_{index}", f"req_{index}__child#0")]
    assert list(results) == names
    for index, result in enumerate(results.values()):
        assert result.prompt_ids == prompts[index // 2]
        assert result.sequence == alone(model, prompts[index // 2], 10 + index, **settings).sequences[0].tolist()
    assert model.generate_batch([]) == {}
    with pytest.raises(ValueError, match="`inputs` must be a list of prompts"):
        model.generate_batch(torch.tensor([[1, 2]]))


def test_settings_come_from_the_model_unless_given(model):
    model.generation_config = EsoGenerationConfig(max_new_tokens=3, alpha_0=0.0)
    (result,) = model.generate_batch([[1, 2]]).values()
    assert len(result.sequence) == 5
    assert result.finish_reason == "length"
    config = EsoGenerationConfig(max_new_tokens=6, eos_token_id=[*range(MASK)], pad_token_id=0, alpha_0=0.0)
    (result,) = model.generate_batch([[1, 2]], config).values()
    assert len(result.sequence) == 3
    assert result.finish_reason == "stop"
    # Whoever fills in holes and says no length asks for no more.
    (result,) = EsoForMaskedDiffusion.generate_batch(randomized_model(), [[1, MASK, 2]]).values()
    assert len(result.sequence) == 3
    assert MASK not in result.sequence


def test_a_seed_of_the_manager_seeds_requests_that_have_none(model):
    found = [
        [
            result.sequence
            for result in model.generate_batch([[1], [2]], None, roomy(seed=seed), max_new_tokens=9).values()
        ]
        for seed in (4, 4, 5)
    ]
    assert found[0] == found[1] != found[2]
    assert found[0][1] == alone(model, [2], 5, max_new_tokens=9).sequences[0].tolist()


def test_a_manager_may_be_kept(model):
    first = model.generate_batch([[1, 2]], persistent_manager=True, max_new_tokens=4, seed=0)
    kept = model._cached_continuous_batching_manager
    second = model.generate_batch([[1, 2]], persistent_manager=True, max_new_tokens=4, seed=0)
    assert [r.sequence for r in first.values()] == [r.sequence for r in second.values()]
    assert model.init_continuous_batching() is kept
    model.destroy_cached_continuous_batching_manager()
    assert model.init_continuous_batching() is not kept


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ([1, 24], {}, r"`input_ids` must be ids of the vocabulary, in \[0, 23\], got 24"),
        ([1.5], {}, "`input_ids` must be a list of token ids"),
        (torch.tensor([1]), {}, "`input_ids` must be a list of token ids"),
        ("text", {}, "`input_ids` must be a list of token ids"),
        ([1], {"seed": -1}, "`seed` must be an integer in"),
        ([1], {"request_id": 5}, "`request_id` must be a string"),
        ([1], {"num_return_sequences": 0}, "`num_return_sequences` must be an integer >= 1"),
        ([1], {"num_return_sequences": "a"}, "`num_return_sequences` must be an integer >= 1"),
        ([1], {"alpha_0": 2}, r"`alpha_0` must be None or a number in \[0, 1\]"),
        ([1], {"num_beams": 2}, "beam"),
        ([1], {"attention_mask": [[1]]}, "have no meaning for a request"),
        ([1], {"generator": torch.Generator()}, "have no meaning for a request"),
        ([1], {"temprature": 0.5}, "temprature"),
        ([1], {"generation_config": {"alpha_0": 1.0}}, "`generation_config`"),
        ([1], {"cache_implementation": "dynamic"}, "have no meaning for a request"),
    ],
)
def test_what_generate_refuses_is_refused_before_anything_runs(model, manager, prompt, settings, message):
    with pytest.raises(ValueError, match=message):
        manager.add_request(prompt, **{"max_new_tokens": 3} | settings)
    assert manager.metrics()["waiting"] == manager.metrics()["forwards"] == 0
    assert not manager._names
    settings.pop("request_id", None)
    if not isinstance(prompt, list) or settings:
        with pytest.raises(ValueError, match=message):
            model.generate_batch([[1], prompt], max_new_tokens=3, **settings)


def test_a_name_is_taken_for_as_long_as_its_request_is_under_way(manager):
    manager.add_request([1], "r", max_new_tokens=50)
    with pytest.raises(ValueError, match="`request_id='r'` is under way"):
        manager.add_request([1], "r", max_new_tokens=50)
    results_of(manager, 1)
    manager.add_request([1], "r", max_new_tokens=2)
    assert len(results_of(manager, 1)["r"].sequence) == 3


def test_names_that_are_made_up_are_free_ones(manager):
    manager.add_request([1], "req_0", max_new_tokens=100)
    assert manager.add_request([1], max_new_tokens=2) == "req_1"
    results_of(manager, 2)


def test_who_finds_the_queue_full_leaves_nothing_behind(model, monkeypatch):
    manager = model.init_continuous_batching(continuous_batching_config=roomy(max_queue_size=2))
    put = manager.input_queue.put
    monkeypatch.setattr(manager.input_queue, "put", lambda state, **kwargs: put(state, block=False))
    manager.add_request([1], "a", max_new_tokens=2)
    with pytest.raises(queue.Full):
        manager.add_request([1], "b", max_new_tokens=2, num_return_sequences=3)
    manager.start()
    assert results_of(manager, 2)["b"].error == "The request was cancelled."  # the sample for which there was room
    for name in ("b", "b__child#0", "b__child#1"):  # free again, all of them
        manager.add_request([1], name, max_new_tokens=2)
        assert results_of(manager, 1)[name].error is None
    manager.stop()


def test_all_samples_of_a_prompt_are_cancelled(manager):
    manager.add_request([1] * 30, "r", max_new_tokens=90, num_return_sequences=3)
    manager.add_request([1] * 30, "rest", max_new_tokens=9)
    manager.cancel_request("r")
    results = results_of(manager, 4)
    assert [name for name, result in results.items() if result.error is None] == ["rest"]


def test_whoever_reads_the_results_of_one_request_leaves_those_of_others(manager):
    names = [f"{index}" for index in range(4)]
    streams = {}

    def read(name: str) -> None:
        streams[name] = [len(result.generated_tokens) for result in manager.request_id_iter(name)]

    for name in names:
        manager.add_request([1], name, max_new_tokens=40, alpha_0=0.0, streaming=True)
    threads = [threading.Thread(target=read, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert streams == {name: list(range(1, 41)) for name in names}
    # One after the other, too; and after the thread has ended.
    for name in names:
        manager.add_request([1], name, max_new_tokens=5, alpha_0=0.0, streaming=True)
    manager.stop()
    for name in names:
        read(name)
    assert streams == {name: list(range(1, 6)) for name in names}
    assert manager.get_result() is None
    assert manager.get_result("nobody", timeout=0.1) is None


def test_results_that_will_not_come_are_not_waited_for(manager):
    names = [manager.add_request([token], max_new_tokens=4, streaming=True) for token in (1, 2)]
    results = list(manager.wait_for(reversed(names)))
    assert [result.request_id for result in results] == names[::-1]
    assert all(len(result.sequence) == 5 for result in results)
    manager.stop()
    with pytest.raises(RuntimeError, match="The forwards of continuous batching have failed"):
        list(manager.wait_for(["nobody"]))


def test_a_streamer_that_leaves_the_program_ends_its_own_request_alone(model, manager):
    class Leaving(BaseStreamer):
        def put(self, value):
            raise SystemExit("enough")

        def end(self):
            raise RuntimeError("nor does it end well")

    manager.add_request([1, 2], "bad", max_new_tokens=9, streamer=Leaving())
    manager.add_request([1, 2], "good", max_new_tokens=9, seed=4)
    results = results_of(manager, 2)
    assert results["bad"].error == "enough"
    assert results["good"].sequence == alone(model, [1, 2], 4, max_new_tokens=9).sequences[0].tolist()


def test_time_that_has_run_out_is_no_end_of_text(manager):
    manager.add_request([1, 2], "late", max_new_tokens=9, max_time=1e-9)
    manager.add_request([1, 2], "nothing to write", max_new_tokens=0)
    results = results_of(manager, 2)
    assert results["late"].finish_reason == results["nothing to write"].finish_reason == "length"
    assert MASK in results["late"].sequence
    assert results["nothing to write"].sequence == [1, 2]
    assert results["nothing to write"].num_function_evaluations == 0


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"max_batch_tokens": -5}, "`max_batch_tokens` must be"),
        ({"max_requests_per_batch": 0}, "`max_requests_per_batch` must be"),
        ({"num_blocks": 2.5}, "`num_blocks` must be"),
        ({"num_blocks": 0}, "`num_blocks` must be"),
        ({"num_blocks": None, "max_memory_percent": 5.0}, "`max_memory_percent` must be"),
    ],
)
def test_a_budget_that_is_none_is_refused(model, setting, message):
    with pytest.raises(ValueError, match=message):
        model.init_continuous_batching(continuous_batching_config=roomy(**setting))


def test_a_thread_without_memory_does_not_start(model, monkeypatch):
    def no_memory(*args):
        raise MemoryError("not so much")

    monkeypatch.setattr("eso_lm.batching_manager.SharedForward", no_memory)
    manager = model.init_continuous_batching(continuous_batching_config=roomy())
    with pytest.raises(RuntimeError, match="could not be started: not so much"):
        manager.start()
    assert manager.add_request([1], max_new_tokens=2) is None
    assert not manager._names


def test_attention_that_cannot_tell_texts_apart_is_refused():
    with pytest.raises(ValueError, match="load the model with `attn_implementation=\"sdpa\"`, got 'flex_attention'"):
        randomized_model("flex_attention").init_continuous_batching()


def test_memory_is_a_fixed_budget(model):
    by_length = model.init_continuous_batching(
        continuous_batching_config=ContinuousBatchingConfig(max_requests_per_batch=3)
    )
    assert by_length.budget.num_slots == 3 * (128 + 64)
    bytes_of_slot = 2 * 2 * 32 * 8
    share = 100.5 * bytes_of_slot / (os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    config = ContinuousBatchingConfig(max_memory_percent=share)
    with model.continuous_batching_context_manager(continuous_batching_config=config) as manager:
        assert manager.budget.num_slots == 100
        assert manager.metrics()["cache_bytes"] == 100 * bytes_of_slot
    with pytest.raises(ValueError, match="is not enough for a slot of the cache"):
        model.init_continuous_batching(continuous_batching_config=ContinuousBatchingConfig(max_memory_percent=1e-12))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted as Linux tells them")
def test_worker_threads_that_wait_are_let_go(monkeypatch):
    def number_of_threads() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    counts = []

    def run() -> None:
        counts.append(number_of_threads())
        torch.randn(10**6).exp()
        counts.append(number_of_threads())
        let_worker_threads_go()
        counts.append(number_of_threads())

    try:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    finally:
        torch.set_num_threads(before)
    assert counts[1] == counts[0] + 2
    assert counts[2] == counts[0]
