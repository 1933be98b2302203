"""The server, asked by the client that everybody uses."""

import gc
import json
import queue
import random
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving_helpers import TinyServer

from eso_lm.serving_protocol import Choice, decode

MASK = "<|mask|>"
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def server():
    with TinyServer().running() as server:
        yield server


@pytest.fixture
def client(server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=60, max_retries=0)


def tokens_of(server: TinyServer, text: str) -> list[int]:
    return server.tokenizer(text)["input_ids"]


def text_behind(server: TinyServer, ids: list[int], prompt: list[int]) -> str:
    """The text that is written for a prompt: from its first hole, or its end, to the first end of text behind it."""
    mask, end = server.model.config.mask_token_id, server.tokenizer.eos_token_id
    start = prompt.index(mask) if mask in prompt else len(prompt)
    ends = [place for place, token in enumerate(ids) if token == end and place >= len(prompt)]
    return decode(server.tokenizer, ids[start : min(ends, default=len(ids))])


MODES = (
    {"alpha_0": 1.0, "num_diffusion_steps": 6},
    {"alpha_0": 0.0},
    {"lossless": True, "alpha_0": 0.5},
    {"alpha_0": 1.0, "unmasking_order": "strided", "num_diffusion_steps": "max"},
    {"block_length": 8, "num_diffusion_steps": 4},
    {"entropy_bound": 1.0},
    {"top_k": 5},
)


def test_many_at_once_get_what_each_would_get_alone(server):
    """64 requests in random arrival over 8 connections, in float64, where rounding changes no token."""
    rng = random.Random(0)
    words = ["The quick", "brown fox", "jumps over", "the lazy dog", f"a {MASK}{MASK} b", "lazy lazy " * 8]
    jobs = [
        {
            "prompt": " ".join(rng.choices(words, k=rng.randrange(1, 3))),
            "seed": index,
            "max_tokens": rng.randrange(1, 40),
            "stream": index % 2 == 0,
            # Every other one is fond of ending.
            "logit_bias": {f"{server.tokenizer.eos_token_id}": 4.0 * (index % 2)},
            "extra_body": MODES[index % len(MODES)],
        }
        for index in range(64)
    ]
    pauses = [rng.random() * 0.02 for _ in jobs]

    def ask(index: int) -> tuple[str, str]:
        time.sleep(pauses[index])
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=60, max_retries=0) as client:
            answer = client.completions.create(model="tiny", **jobs[index])
            if not jobs[index]["stream"]:
                return answer.choices[0].text, answer.choices[0].finish_reason
            chunks = [chunk.choices[0] for chunk in answer]
            return "".join(chunk.text for chunk in chunks), chunks[-1].finish_reason

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(len(jobs))))
    reasons = set()
    for job, (text, reason) in zip(jobs, answers, strict=True):
        prompt = tokens_of(server, job["prompt"])
        own = {"max_new_tokens": job["max_tokens"], **job["extra_body"]}
        bias = {(int(token),): bias for token, bias in job["logit_bias"].items()}
        expected = server.alone(prompt, job["seed"], sequence_bias=bias, **own)
        assert text == text_behind(server, expected, prompt)
        has_ended = server.tokenizer.eos_token_id in expected[len(prompt) :]
        assert reason == ("stop" if has_ended else "length")
        reasons.add(reason)
    assert reasons == {"stop", "length"}
    server.wait_until(slots_in_use=0, active=0, waiting=0)


def test_a_chat_goes_by_its_template(server, client):
    messages = [{"role": "user", "content": "The quick brown fox"}]
    answer = client.chat.completions.create(
        model="tiny", messages=messages, seed=5, max_completion_tokens=9, logprobs=True, extra_body={"alpha_0": 0.0}
    )
    prompt = tokens_of(server, "<user> The quick brown fox <assistant>")
    expected = server.alone(prompt, 5, max_new_tokens=9, alpha_0=0.0)
    (choice,) = answer.choices
    assert choice.message.content == text_behind(server, expected, prompt)
    assert len(choice.logprobs.content) == answer.usage.completion_tokens
    assert answer.usage.prompt_tokens == len(prompt)
    assert choice.num_function_evaluations == answer.usage.completion_tokens
    stream = client.chat.completions.create(
        model="tiny",
        messages=[
            {
                "role": "user",
                "content": [{"type": "text", "text": "The quick "}, {"type": "text", "text": "brown fox"}],
            }
        ],
        seed=5,
        max_tokens=9,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"alpha_0": 0.0},
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == choice.message.content
    assert chunks[-1].usage == answer.usage


def test_an_answer_of_a_chat_may_be_as_long_as_the_model_goes(server, client):
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "fox"}], seed=1, logit_bias={"0": -100}
    )
    assert answer.usage.total_tokens == 128


def test_text_stands_between_a_prompt_and_a_suffix(server, client):
    answer = client.completions.create(
        model="tiny", prompt="The quick", suffix=" lazy dog", max_tokens=6, seed=3, echo=True, logprobs=0
    )
    before, behind = tokens_of(server, "The quick"), tokens_of(server, " lazy dog")
    mask = server.model.config.mask_token_id
    expected = server.alone([*before, *[mask] * 6, *behind], 3, max_new_tokens=0)
    assert answer.choices[0].text == "The quick" + decode(server.tokenizer, expected[len(before) :])
    assert answer.choices[0].text.endswith(" lazy dog")
    assert answer.usage.completion_tokens == 6
    assert answer.usage.prompt_tokens == len(before) + len(behind)
    log_probs = answer.choices[0].logprobs
    assert all(value < 0 for value in log_probs.token_logprobs[:6])
    assert log_probs.token_logprobs[6:] == [0.0] * len(behind)
    assert log_probs.text_offset[:2] == [len("The quick"), len("The quick") + len(log_probs.tokens[0])]


def test_several_prompts_and_choices_of_each(server, client):
    answer = client.completions.create(model="tiny", prompt=["The quick", "lazy"], n=2, max_tokens=5, seed=7)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    prompts = [tokens_of(server, text) for text in ("The quick", "The quick", "lazy", "lazy")]
    for choice, prompt, seed in zip(answer.choices, prompts, range(7, 11), strict=True):
        expected = server.alone(prompt, seed, max_new_tokens=5)
        assert choice.text == text_behind(server, expected, prompt)
    assert answer.usage.prompt_tokens == len(prompts[0]) + len(prompts[2])
    # Token ids are a prompt too, and so is nothing.
    for prompt in (prompts[0], [prompts[0]]):
        again = client.completions.create(model="tiny", prompt=prompt, max_tokens=5, seed=7)
        assert again.choices[0].text == answer.choices[0].text
    assert client.completions.create(model="tiny", prompt="", max_tokens=5).usage.prompt_tokens == 0


def test_text_stops_where_it_is_told_to(server, client):
    settings = {"model": "tiny", "prompt": "The quick", "max_tokens": 40, "seed": 2, "extra_body": {"alpha_0": 0.0}}
    whole = client.completions.create(**settings).choices[0].text
    stop = whole[7:10]
    expected = whole[: whole.index(stop)]
    answer = client.completions.create(stop=["never this", stop], **settings)
    assert answer.choices[0].text == expected
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens < 40
    chunks = list(client.completions.create(stop=stop, stream=True, **settings))
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected


def test_a_stream_holds_back_what_may_still_become_something_else():
    class Letters:
        def decode(self, tokens, **kwargs):
            return bytes(tokens).decode(errors="replace")

    class Output:
        def __init__(self, text: bytes, is_finished: bool = False):
            self.generated_tokens, self.is_finished = [*text], lambda: is_finished

    choice = Choice(Letters(), ["END", "NOW!"])
    told = [choice.news(Output(text)) for text in (b"ab", b"abE", b"abEN", b"abENx", b"abENx\xc3", b"abENx\xc3\xa4NO")]
    assert told == ["ab", "", "", "ENx", "", "ä"]
    assert choice.news(Output(b"abENx\xc3\xa4NOW!more")) == ""
    assert choice.is_stopped
    unfinished = Choice(Letters(), ["END"])
    assert unfinished.news(Output(b"abEN", is_finished=True)) == "abEN"
    assert not unfinished.is_stopped


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ({"prompt": 5}, "prompt"),
        ({"prompt": [1, 2.5]}, "prompt"),
        ({"prompt": [300]}, "prompt"),
        ({"prompt": ["a"] * 200}, "prompt"),
        ({"prompt": "a" * 4000}, "prompt"),
        ({"prompt": "a", "suffix": "b", "max_tokens": 10**11}, "max_tokens"),
        ({"prompt": "\ud83d"}, "prompt"),
        ({"prompt": "a", "suffix": "\ud83d"}, "suffix"),
        ({"prompt": "a", "model": "\ud83d\ude00", "n": "\ud83d"}, "n"),
        ({"prompt": "a", "no_repeat_ngram_size": 10**9}, "no_repeat_ngram_size"),
        ({"prompt": "a", "repetition_penalty": 1e-300}, "repetition_penalty"),
        ({"prompt": "a", "stop": "x" * 10**4}, "stop"),
        ({"prompt": "a", "stop": ["x"] * 1000}, "stop"),
        ({"prompt": "a", "confidence_threshold": 0.5, "entropy_bound": 1.0}, "confidence_threshold"),
        ({"prompt": ["a"] * 20, "n": 20}, "n"),
        ({"prompt": "a", "temperature": "hot"}, "temperature"),
        ({"prompt": "a", "temperature": -1}, "temperature"),
        ({"prompt": "a", "top_p": 0}, "top_p"),
        ({"prompt": "a", "max_tokens": 5000}, "max_tokens"),
        ({"prompt": "a", "max_tokens": 10**30}, "max_tokens"),
        ({"prompt": "a", "seed": 2**70}, "seed"),
        ({"prompt": "a", "n": 0}, "n"),
        ({"prompt": "a", "n": 10**9}, "n"),
        ({"prompt": "a", "alpha_0": 1.5}, "alpha_0"),
        ({"prompt": "a", "lossless": True, "entropy_bound": 1}, "lossless"),
        ({"prompt": "a", "lossless": "yes"}, "lossless"),
        ({"prompt": "a", "unmasking_order": "any"}, "unmasking_order"),
        ({"prompt": "a", "num_diffusion_steps": 4, "entropy_bound": 1.0}, "num_diffusion_steps"),
        ({"prompt": "a", "use_draft_head": True}, "use_draft_head"),
        ({"prompt": "a", "presence_penalty": 0.5}, "presence_penalty"),
        ({"prompt": "a", "logprobs": 5}, "logprobs"),
        ({"prompt": "a", "stop": ""}, "stop"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias"),
        ({"prompt": "a", "logit_bias": {"999": 1}}, "logit_bias"),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options"),
        ({"prompt": "a", "unheard_of": 1}, "unheard_of"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "\ud83d"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "a", "\ud83d": 1}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "a"}], "tools": []}, "tools"),
        ({"messages": [{"role": "user", "content": "a"}], "max_tokens": 10**6}, "max_tokens"),
        (
            {"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"tokenize": 1}},
            "chat_template_kwargs",
        ),
        ({"messages": [{"role": "user", "content": "a " * 300}]}, "messages"),
    ],
)
def test_what_is_wrong_with_a_body_is_told_by_name(server, body, name):
    route = "chat/completions" if "messages" in body else "completions"
    # As ASCII: halves of letters stay what they are.
    answer = httpx.post(f"{server.url}/v1/{route}", content=json.dumps(body), headers=JSON, timeout=2)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == name or name is None
    assert name is None or f"`{name}" in error["message"]


def test_numbers_that_would_overflow_mean_the_most_probable_token(server):
    url, answers = f"{server.url}/v1/completions", []
    for temperature in (0, 1e-300, 1e-6):
        body = {"prompt": "The quick", "max_tokens": 9, "temperature": temperature, "alpha_0": 0.0}
        answers.append(httpx.post(url, json=body).json()["choices"][0]["text"])
    prompt = tokens_of(server, "The quick")
    expected = text_behind(server, server.alone(prompt, 0, max_new_tokens=9, do_sample=False, alpha_0=0.0), prompt)
    assert answers == [expected] * 3


def test_bodies_that_are_far_too_long_are_not_read(server):
    url = f"{server.url}/v1/completions"
    body = json.dumps({"prompt": "a " * 10**6}).encode()
    answer = httpx.post(url, content=body, headers=JSON)
    assert answer.status_code == 413
    assert "must be at most" in answer.json()["error"]["message"]

    def in_parts():
        for start in range(0, len(body), 10**5):
            yield body[start : start + 10**5]

    assert httpx.post(url, content=in_parts(), headers=JSON).status_code in (400, 413)  # of a length that nobody knows


def test_clients_read_the_errors(client):
    with pytest.raises(openai.BadRequestError, match=r"`alpha_0`: Input should be less than or equal to 1"):
        client.completions.create(model="tiny", prompt="a", extra_body={"alpha_0": 3})
    with pytest.raises(openai.NotFoundError, match=r"`model` must be 'tiny'"):
        client.completions.create(model="large", prompt="a")
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_bodies_that_are_no_json_and_routes_that_are_not(server):
    url = f"{server.url}/v1/completions"
    assert httpx.post(url, content=b"{", headers=JSON).status_code == 400
    assert httpx.post(url, json=[1]).status_code == 400
    assert httpx.post(url, content=b'{"prompt": "a", "temperature": NaN}', headers=JSON).status_code == 400
    assert httpx.post(url).status_code == 400
    assert httpx.get(url).status_code == 405
    assert httpx.get(f"{server.url}/v1/nothing").json()["error"]["message"] == "Not Found"
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    described = httpx.get(f"{server.url}/metrics").text
    assert "# TYPE eso_slots_in_use gauge\neso_slots_in_use 0\n" in described
    assert "# TYPE eso_finished counter\neso_finished " in described


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def fitting(schema: dict, definitions: dict) -> st.SearchStrategy:
    """Values that a schema of OpenAPI allows, more or less, and now and then others."""
    if "$ref" in schema:
        return fitting(definitions[schema["$ref"].rsplit("/", 1)[1]], definitions)
    for union in ("anyOf", "oneOf"):
        if union in schema:
            return st.one_of([fitting(option, definitions) for option in schema[union]])
    if "enum" in schema or "const" in schema:
        return st.sampled_from(schema.get("enum") or [schema["const"]])
    kinds = {
        "string": st.text(max_size=20) | st.just(f"a {MASK} b"),
        "integer": st.integers(0, 9) | st.integers(),
        "number": st.floats(0, 1) | st.integers(),
        "boolean": st.booleans(),
        "null": st.none(),
        "object": bodies(schema, definitions),
    }
    if schema.get("type") == "array":
        return st.lists(fitting(schema["items"], definitions), max_size=4)
    return kinds.get(schema.get("type"), ANYTHING)


def bodies(schema: dict, definitions: dict) -> st.SearchStrategy:
    """Objects of a schema, of which some fields are left out and some are anything."""
    fields = {name: fitting(field, definitions) | ANYTHING for name, field in schema.get("properties", {}).items()}
    likely = {name: fitting(field, definitions) for name, field in schema.get("properties", {}).items()}
    required = {name: likely.pop(name) for name in schema.get("required", ())}
    # Of many fields one would always be wrong.
    few = st.sets(st.sampled_from(sorted(likely)), max_size=2) if likely else st.just(set())
    some = few.flatmap(lambda names: st.fixed_dictionaries(required | {name: likely[name] for name in names}))
    whole = st.fixed_dictionaries(required, optional=likely)
    return st.one_of(st.fixed_dictionaries({}, optional=fields), whole, some, some)


@pytest.mark.parametrize("route", ["completions", "chat/completions"])
def test_whatever_is_sent_comes_back_with_an_answer_or_a_reason(server, route):
    described = httpx.get(f"{server.url}/openapi.json").json()
    schema = described["paths"][f"/v1/{route}"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    seen = set()

    @settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(body=fitting(schema, described["components"]["schemas"]))
    def send(body):
        answer = httpx.post(f"{server.url}/v1/{route}", content=json.dumps(body), headers=JSON, timeout=60)
        seen.add(answer.status_code)
        assert answer.status_code in (200, 400, 404), (body, answer.text)
        if answer.status_code != 200:
            assert answer.json()["error"]["message"]
        elif "data: " in answer.text[:6]:
            assert answer.text.endswith("data: [DONE]\n\n")
            assert '"error"' not in answer.text

    send()
    assert {200, 400} <= seen
    server.wait_until(slots_in_use=0, active=0, waiting=0)
    assert server.manager.output_router.output_queue.empty()
    assert not server.manager.output_router.result_handlers
    assert not server.manager._names
    assert httpx.get(f"{server.url}/health").status_code == 200


@pytest.fixture
def slow_server():
    """Texts of 3000 tokens, one a forward, take some seconds."""
    with TinyServer(length=3072, max_requests=2).running() as server:
        yield server


LONG = {"prompt": "The quick", "max_tokens": 3000, "num_diffusion_steps": "max", "logit_bias": {"0": -100}}


def test_clients_that_vanish_free_their_memory(slow_server):
    server, url = slow_server, f"{slow_server.url}/v1/completions"
    with httpx.stream("POST", url, json=LONG | {"stream": True, "alpha_0": 0.0}, timeout=60) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        server.wait_until(active=1)
        assert server.metrics()["slots_in_use"] > 3000
    server.wait_until(active=0, cancelled=1, slots_in_use=0)
    for wanted in (2, 4):  # who waits for the whole answer may go too, and who has not yet had a turn
        with pytest.raises(httpx.TimeoutException):
            httpx.post(url, json=LONG | {"n": wanted}, timeout=0.5)
        server.wait_until(active=0, waiting=0, slots_in_use=0)
    assert server.metrics()["cancelled"] == 7
    assert server.metrics()["finished"] == 0
    assert not server.manager.output_router.result_handlers
    assert httpx.post(url, json={"prompt": "a", "max_tokens": 3}).status_code == 200


def test_who_comes_when_too_many_wait_is_told_to_come_again(slow_server, monkeypatch):
    monkeypatch.setattr("eso_lm.serving_app.MAX_WAITING", 1)
    url = f"{slow_server.url}/v1/completions"
    with httpx.stream("POST", url, json=LONG | {"stream": True, "n": 3}, timeout=60) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        slow_server.wait_until(waiting=1)
        assert httpx.post(url, json={"prompt": "a"}).status_code == 429
    slow_server.wait_until(active=0, waiting=0)
    assert httpx.post(url, json={"prompt": "a"}).status_code == 200


def test_a_full_queue_leaves_nothing_behind(slow_server, monkeypatch):
    server, room = slow_server, iter([True, True, False])
    put = server.manager.input_queue.put

    def put_while_there_is_room(state, **kwargs):
        if not next(room, True):
            raise queue.Full
        put(state)

    monkeypatch.setattr(server.manager.input_queue, "put", put_while_there_is_room)
    assert httpx.post(f"{server.url}/v1/completions", json=LONG | {"n": 3}).status_code == 429
    server.wait_until(active=0, waiting=0, cancelled=2, slots_in_use=0)
    assert not server.manager._names
    assert not server.manager.output_router.result_handlers
    assert server.manager.output_router.output_queue.empty()


def test_forwards_that_fail_are_an_error_of_the_server(monkeypatch):
    with TinyServer().running() as server:
        url = f"{server.url}/v1/completions"
        body = {"prompt": "The quick", "max_tokens": 8, "alpha_0": 0.0}
        assert httpx.post(url, json=body).status_code == 200

        def breaks(*args, **kwargs):
            raise RuntimeError("out of memory")

        monkeypatch.setattr(server.model, "run_backbone", breaks)
        for request in (body, body | {"stream": True}):
            answer = httpx.post(url, json=request)
            assert "The request could not be finished: out of memory" in answer.text or answer.status_code == 503
        assert answer.status_code == 503
        assert httpx.get(f"{server.url}/health").status_code == 503


def test_memory_returns_to_where_it_was(server):
    url = f"{server.url}/v1/completions"

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    def some() -> None:
        for seed in range(20):
            assert httpx.post(url, json={"prompt": "The quick", "max_tokens": 9, "seed": seed}).status_code == 200

    some()
    before = tensors()
    some()
    assert tensors() <= before + 10
