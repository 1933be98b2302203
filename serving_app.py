"""The server: OpenAI's routes in front of a manager of continuous batching."""

import asyncio
import contextlib
import json
import queue
import re
import signal
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable
from itertools import accumulate
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from transformers import PreTrainedTokenizerBase

from .batching_manager import COUNTED, EsoBatchingManager, names_of_samples
from .batching_results import EsoRequestOutput
from .serving_protocol import MAX_CHOICES, ChatRequest, Choice, CompletionRequest, decode, stopping_at, usage

MAX_WAITING = 1024
"""Requests that may wait to join; more are told to come again."""

DEFAULT_CHAT_TOKENS = 1024
"""Tokens of an answer in a chat, unless the body, or the model, says otherwise, as far as the model's length goes."""

IN_WORDS = {
    "prompt": "Input should be text, or ids of tokens, or a list of one of them",
    "stop": "Input should be text of 1 to 256 letters, or a list of at most 16 of them",
}
"""What fields of several types should be."""

BYTES_OF_TOKEN = 32
"""How many bytes of a body may speak of a token that would fit into the cache."""

BYTES_OF_BODY = 2**16
"""How many bytes of a body may be about something else."""

GRACE_SECONDS = 25.0
"""How long requests under way may go on after SIGTERM; then they are answered with an error."""

SECONDS_BETWEEN_LOOKS = 0.2
"""How often to see whether a client that waits for the whole answer is still there."""


class Engine:
    """A model that is being served.

    Args:
        manager: Of its requests, not started yet.
        tokenizer: Of its text.
        name: By which clients ask for it.
    """

    def __init__(self, manager: EsoBatchingManager, tokenizer: PreTrainedTokenizerBase, name: str):
        self.manager, self.tokenizer, self.name = manager, tokenizer, name

    def start(self) -> None:
        """Starts the thread that runs the forwards."""
        self.manager.start()

    def stop(self) -> None:
        """Stops it; what is under way is answered with an error."""
        self.manager.stop(hard_stop=True)

    @property
    def is_alive(self) -> bool:
        """Whether requests are taken."""
        return self.manager.is_running() and self.manager.background_thread_status.can_accept_new_requests() is None


class Answers:
    """The requests that a body asks for: one for each choice of each prompt.

    Args:
        engine: Who answers.
        body: What was asked.
    """

    def __init__(self, engine: Engine, body: CompletionRequest | ChatRequest):
        self.engine, self.body = engine, body
        self.id = f"{'chatcmpl' if isinstance(body, ChatRequest) else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.choices: list[Choice] = []
        self.num_prompts = 0
        self.names: list[str] = []
        self.outputs: asyncio.Queue[EsoRequestOutput] = asyncio.Queue()
        self.under_way: set[str] = set()

    async def ask(self) -> None:
        """Adds the requests, all of them or none.

        Raises:
            ValueError: for a body that cannot be answered.
            HTTPException: when there is no room to wait, or nobody who answers.
        """
        manager, body = self.engine.manager, self.body
        num_slots = manager.budget.num_slots
        for name in ("max_tokens", "max_completion_tokens"):
            if (getattr(body, name, None) or 0) > num_slots:  # before a list of so many holes is made
                raise ValueError(f"`{name}` must be at most {num_slots}, the slots of the cache.")
        if not self.engine.is_alive:
            raise HTTPException(503, "The model is not being served any more.")
        if body.model is not None and body.model != self.engine.name:
            raise HTTPException(
                404, f"`model` must be {self.engine.name!r}, which is served here, got {body.model!r}."
            )
        if body.stream_options is not None and not body.stream:
            raise ValueError("`stream_options` are for streams: set `stream` too.")
        if manager.metrics()["waiting"] >= MAX_WAITING:
            raise HTTPException(429, f"{MAX_WAITING} requests are waiting: come again later.")
        requests = await asyncio.to_thread(self._requests)
        self.num_prompts = len(requests)
        samples = body.n or 1
        self.names = [
            name for index in range(self.num_prompts) for name in names_of_samples(f"{self.id}-{index}", samples)
        ]
        for name in self.names:
            manager.register_result_handler(name, self.outputs.put_nowait)
        try:
            await asyncio.to_thread(self._add, requests)
        except BaseException:
            self.cancel()
            for name in self.names:
                manager.forget_result_handler(name)
            raise

    def _requests(self) -> list[tuple[list[int], dict[str, Any]]]:
        """Of each prompt, its tokens, and the settings of its requests."""
        body, tokenizer, model = self.body, self.engine.tokenizer, self.engine.manager.model
        mask, requests = model.config.mask_token_id, []
        prompts = body.prompts(tokenizer, mask)
        if len(prompts) * (body.n or 1) > MAX_CHOICES:
            times = f"{body.n} x {len(prompts)}" if body.n else f"{len(prompts)}"
            name = "n" if body.n else "prompt"
            raise ValueError(f"`{name}` must make at most {MAX_CHOICES} choices of all prompts, got {times}.")
        for prompt in prompts:
            start = prompt.index(mask) if mask in prompt else len(prompt)
            new_tokens = body.max_new_tokens(start < len(prompt))
            if new_tokens is None:
                new_tokens = model.generation_config.max_new_tokens or DEFAULT_CHAT_TOKENS
                new_tokens = min(new_tokens, self.engine.manager.longest_text - len(prompt))
                if new_tokens < 1:
                    raise ValueError(f"`messages` come to {len(prompt)} tokens, which leaves no room for an answer.")
            settings = body.of_generate() | {"max_new_tokens": new_tokens}
            requests.append((prompt, settings | stopping_at(tokenizer, body.stops, start)))
            before = decode(tokenizer, prompt[:start]) if body.echo else ""
            self.choices += [Choice(tokenizer, body.stops, before) for _ in range(body.n or 1)]
        return requests

    def _add(self, requests: list[tuple[list[int], dict[str, Any]]]) -> None:
        body, samples = self.body, self.body.n or 1
        for index, (prompt, settings) in enumerate(requests):
            first = index * samples
            try:
                added = self.engine.manager.add_request(
                    prompt,
                    self.names[first],
                    streaming=bool(body.stream),
                    seed=None if body.seed is None else body.seed + first,
                    num_return_sequences=samples,
                    **settings,
                )
            except queue.Full:
                raise HTTPException(429, "Too many requests are waiting: come again later.") from None
            if added is None:
                raise HTTPException(503, "The server is about to stop.")
            self.under_way.update(self.names[first : first + samples])

    async def results(self) -> AsyncIterator[tuple[int, EsoRequestOutput]]:
        """What becomes known, and of which choice."""
        while self.under_way:
            output = await self.outputs.get()
            if output.is_finished():
                self.under_way.discard(output.request_id)
            yield self.names.index(output.request_id), output

    async def finished(self) -> list[EsoRequestOutput]:
        """The outputs of all choices, once they are there.

        Raises:
            HTTPException: when one of them has failed.
        """
        found = {place: output async for place, output in self.results() if output.is_finished()}
        outputs = [found[place] for place in range(len(self.names))]
        for output in outputs:
            if output.error is not None:
                raise HTTPException(*failure(self.engine, output))
        return outputs

    def cancel(self) -> None:
        """Nobody waits for what is still under way."""
        for name in self.under_way:
            self.engine.manager.cancel_request(name)

    @property
    def head(self) -> dict[str, Any]:
        """What all objects of an answer begin with."""
        kind = "text_completion"
        if isinstance(self.body, ChatRequest):
            kind = "chat.completion.chunk" if self.body.stream else "chat.completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.engine.name}

    def whole(self, outputs: list[EsoRequestOutput]) -> dict[str, Any]:
        """The answer."""
        choices = []
        for index, (choice, output) in enumerate(zip(self.choices, outputs, strict=True)):
            text = choice.text(output)
            content = (
                {"message": {"role": "assistant", "content": text}}
                if isinstance(self.body, ChatRequest)
                else {"text": text}
            )
            choices.append(
                {
                    "index": index,
                    **content,
                    "logprobs": self._log_probs(output, choice.before),
                    "finish_reason": choice.finish_reason(output),
                    "num_function_evaluations": output.num_function_evaluations,
                }
            )
        return self.head | {"choices": choices, "usage": usage(outputs, self.num_prompts)}

    def _log_probs(self, output: EsoRequestOutput, before: str) -> dict[str, Any] | None:
        """Of each token behind what stands before, in nats, under the model's own distribution; 0: it was given."""
        if self.body.logprobs is None or self.body.logprobs is False:
            return None
        texts = [str(self.engine.tokenizer.decode([token])) for token in output.generated_tokens]
        if isinstance(self.body, ChatRequest):
            rows = zip(texts, output.logprobs, strict=True)
            content = [
                {"token": text, "logprob": value, "bytes": [*text.encode()], "top_logprobs": []}
                for text, value in rows
            ]
            return {"content": content}
        offsets = list(accumulate(map(len, texts), initial=len(before)))[: len(texts)]
        return {"tokens": texts, "token_logprobs": output.logprobs, "top_logprobs": None, "text_offset": offsets}

    async def events(self) -> AsyncIterator[str]:
        """The answer as server-sent events, while it becomes known."""
        try:
            outputs: dict[int, EsoRequestOutput] = {}
            for index, choice in enumerate(self.choices):
                choice.told = choice.before
                if choice.before or isinstance(self.body, ChatRequest):
                    yield self._event(index, choice.before, role="assistant")
            async for index, output in self.results():
                if output.error is not None:
                    status, message = failure(self.engine, output)
                    yield f"data: {json.dumps(error_body(status, message))}\n\n"
                    break
                choice = self.choices[index]
                news = choice.news(output)
                if news:
                    yield self._event(index, news)
                if output.is_finished():
                    outputs[index] = output
                    yield self._event(index, "", output=output)
            else:
                if self.body.stream_options is not None and self.body.stream_options.include_usage:
                    in_order = [outputs[index] for index in range(len(self.names))]
                    last = self.head | {"choices": [], "usage": usage(in_order, self.num_prompts)}
                    yield f"data: {json.dumps(last)}\n\n"
            yield "data: [DONE]\n\n"
        finally:
            self.cancel()

    def _event(self, index: int, text: str, role: str | None = None, output: EsoRequestOutput | None = None) -> str:
        choice: dict[str, Any] = {"index": index, "text": text}
        if isinstance(self.body, ChatRequest):
            delta = {"content": text} if output is None else {}
            choice = {"index": index, "delta": delta | ({"role": role} if role else {})}
        choice |= {"logprobs": None, "finish_reason": None}
        if output is not None:
            choice |= {
                "finish_reason": self.choices[index].finish_reason(output),
                "logprobs": self._log_probs(output, self.choices[index].before),
                "num_function_evaluations": output.num_function_evaluations,
            }
        return f"data: {json.dumps(self.head | {'choices': [choice]})}\n\n"


def failure(engine: Engine, output: EsoRequestOutput) -> tuple[int, str]:
    """The status and the message of a request that has failed while it was under way."""
    error = engine.manager.background_thread_status.fatal_error
    if error is not None:
        return 503, f"The request could not be finished: {error}"
    if not engine.is_alive:
        return 503, "The request could not be finished: the server has stopped."
    return 500, f"The request has failed: {output.error}"


def in_words_of(body: CompletionRequest | ChatRequest, message: str) -> str:
    """A message of `generate`, with the names that its arguments have in a body."""
    prompt = "prompt" if isinstance(body, CompletionRequest) else "messages"
    names = {"`max_new_tokens` (or `max_length`)": "`max_tokens`", "`max_new_tokens`": "`max_tokens`"}
    names |= {"`input_ids`": f"`{prompt}`", "`bad_words_ids` and `sequence_bias`": "`logit_bias`"}
    for ours, theirs in names.items():
        message = message.replace(ours, theirs)
    return message


def error_body(status: int, message: str, parameter: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients read it. Errors of ours begin with the name of what is wrong, in backticks."""
    if parameter is None and status < 500 and (named := re.search(r"`(\w+)", message)) is not None:
        parameter = named[1]
    message = message.encode(errors="backslashreplace").decode()  # it may hold what the body held
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": parameter, "code": None}}


def build_app(make_engine: Callable[[], Engine], allow_all_origins: bool = False) -> FastAPI:
    """Builds the application.

    Args:
        make_engine: Makes what answers, when the application starts.
        allow_all_origins: Whether pages of any origin may ask (CORS).
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine = await asyncio.to_thread(make_engine)
        app.state.engine = engine
        engine.start()
        end_in_time(engine)
        try:
            yield
        finally:
            await asyncio.to_thread(engine.stop)

    app = FastAPI(title="Eso-LM", lifespan=lifespan)
    if allow_all_origins:
        from fastapi.middleware.cors import CORSMiddleware

        app.add_middleware(CORSMiddleware, allow_origins=["*"], allow_methods=["*"], allow_headers=["*"])

    app.add_middleware(LimitedBodies, of_app=app)

    @app.exception_handler(RequestValidationError)
    async def tell_what_is_wrong(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = [str(part) for part in first["loc"] if part != "body"]
        name = place[0] if place and place[0].isidentifier() else None
        what = IN_WORDS.get(name or "", first["msg"])
        message = f"`{name or 'body'}`: {what}" + (f" (at {'.'.join(place)})" if len(place) > 1 else "")
        return JSONResponse(error_body(400, message, name), status_code=400)

    @app.exception_handler(HTTPException)
    async def tell(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(error_body(error.status_code, str(error.detail)), status_code=error.status_code)

    async def answer(request: Request, body: CompletionRequest | ChatRequest) -> Response:
        answers = Answers(app.state.engine, body)
        try:
            await answers.ask()
        except ValueError as error:
            return JSONResponse(error_body(400, in_words_of(body, str(error))), status_code=400)
        if body.stream:
            return StreamingResponse(answers.events(), media_type="text/event-stream")
        waiting = asyncio.ensure_future(answers.finished())
        try:
            while not (await asyncio.wait({waiting}, timeout=SECONDS_BETWEEN_LOOKS))[0]:
                if await request.is_disconnected():
                    return Response(status_code=499)
            return JSONResponse(answers.whole(waiting.result()))
        finally:
            waiting.cancel()
            answers.cancel()

    @app.post("/v1/completions")
    async def completions(request: Request, body: CompletionRequest) -> Response:
        return await answer(request, body)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        return await answer(request, body)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {
            "object": "list",
            "data": [{"id": app.state.engine.name, "object": "model", "created": 0, "owned_by": "eso"}],
        }

    @app.get("/health")
    async def health() -> JSONResponse:
        if app.state.engine.is_alive:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "stopped"}, status_code=503)

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        lines = []
        for name, value in app.state.engine.manager.metrics().items():
            kind = "counter" if name in COUNTED else "gauge"
            lines += [f"# TYPE eso_{name} {kind}", f"eso_{name} {value}"]
        return PlainTextResponse("\n".join([*lines, ""]))

    return app


class LimitedBodies:
    """Refuses bodies that could only be too long for the cache, before they are read.

    Args:
        app: What is asked otherwise.
        of_app: The application, which knows the engine.
    """

    def __init__(self, app: ASGIApp, of_app: FastAPI):
        self.app, self.of_app = app, of_app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI application."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        num_slots = self.of_app.state.engine.manager.budget.num_slots
        most, seen = BYTES_OF_BODY + BYTES_OF_TOKEN * num_slots, 0
        refusal = JSONResponse(error_body(413, f"The body must be at most {most} bytes long."), status_code=413)
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > most:
            await refusal(scope, receive, send)
            return

        async def limited() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > most:
                raise HTTPException(413, f"The body must be at most {most} bytes long.")
            return message

        await self.app(scope, limited, send)


def end_in_time(engine: Engine) -> None:
    """Has SIGTERM, beside what it does already, answer what is under way after a while, finished or not."""
    if threading.current_thread() is not threading.main_thread():
        return
    handler, loop = signal.getsignal(signal.SIGTERM), asyncio.get_running_loop()

    def end(number: int, frame: Any) -> None:
        loop.call_soon_threadsafe(loop.call_later, GRACE_SECONDS, engine.stop)
        if callable(handler):
            handler(number, frame)

    signal.signal(signal.SIGTERM, end)
