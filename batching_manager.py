"""The manager of continuous batching: takes requests, refuses those that cannot be, and knows what there is to watch.

The thread, the queues and the routing of results are those of transformers' `ContinuousBatchingManager`.
"""

import copy
import queue
import threading
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.continuous_api import (
    BackgroundThreadStatus,
    ContinuousBatchingManager,
)

from .batching_budget import Budget, length_of_model, let_worker_threads_go
from .batching_forward import SharedForward, require_packing
from .batching_memory import SlotMemory
from .batching_processor import EsoBatchProcessor
from .batching_results import EsoRequestOutput, ResultQueue
from .generation import EsoGenerationMixin
from .generation_configuration import (
    EsoGenerationConfig,
    as_eso_generation_config,
    require_count,
    require_generation_config,
)
from .generation_session import GenerationSession
from .validation import is_integer, to_python

MEANINGLESS_SETTINGS = frozenset(
    {"attention_mask", "begins_only", "cache_implementation", "generator", "lockstep", "past_key_values"}
)
"""Of `generate`, those that requests of one prompt, without padding and on a shared cache, have no use for."""

COUNTED = (
    "finished",
    "failed",
    "cancelled",
    "forwards",
    "fed_slots",
    "generated_tokens",
    "shared_prompt_tokens",
    "waiting_ms",
    "decoding_ms",
)
"""Metrics that only grow."""

OF_SAMPLE = "__child#"
"""Between the name of a request and the number of one of its further samples, as in transformers."""

SECONDS_BETWEEN_LOOKS = 0.1
"""How often to see whether the thread is still there, while waiting for a result."""


class EsoBatchingManager(ContinuousBatchingManager):
    """transformers' [`ContinuousBatchingManager`], whose requests are calls of `generate`.

    It has its methods: `start`, `stop`, `add_request`, `add_requests`, `get_result`, `request_id_iter`,
    `cancel_request`, `register_result_handler`, `pause`. A request joins at the next forward and leaves with its last
    token; with its `seed` it gets the tokens of `generate(..., generator=[torch.Generator().manual_seed(seed)])`,
    whatever company it is in, up to the rounding of floating-point numbers.

    Args:
        model: An Eso-LM, whose attention takes packed rows (see `takes_packed_rows`).
        generation_config: The settings of requests that bring none of their own.
        continuous_batching_config: Of it count `num_blocks` x `page_size`, the slots of the cache; else
            `max_memory_percent`, the share of memory that it may take, up to what `max_requests_per_batch` texts of
            the model's length need; `max_requests_per_batch` (default 32) and `max_batch_tokens` (default 512), the
            requests, and the tokens of prompts, that join a forward; `allow_block_sharing` (default `True`), whether
            prompts that begin alike share what the cache holds of them; `max_queue_size`; and `seed`, from which those
            of requests without one follow.
        workload_hints: What is to come, if it is known: no more memory is taken than that needs.

    Raises:
        ValueError: for a model whose attention cannot tell requests apart, and for a cache of no slots.
    """

    model: EsoGenerationMixin  # type: ignore[assignment]  # transformers' is a prototype of any
    batch_processor: EsoBatchProcessor | None

    def __init__(
        self,
        model: EsoGenerationMixin,
        generation_config: EsoGenerationConfig,
        continuous_batching_config: ContinuousBatchingConfig,
        workload_hints: Any = None,
    ):
        # What transformers prepares for the settings of all requests alike, sessions prepare for each.
        super().__init__(cast(Any, model), GenerationConfig(), continuous_batching_config, workload_hints)
        require_packing(self.model)
        self.generation_config = generation_config
        self.budget = Budget.of(self.model, continuous_batching_config, workload_hints)
        self.output_router.output_queue = ResultQueue()
        self._use_prefix_sharing = False  # which would have `add_requests` sort them; they wait in order
        self._next_seed = continuous_batching_config.seed
        self._names: set[str] = set()  # of requests under way
        self._processor: EsoBatchProcessor | None = None  # for as long as the thread needs it
        self._while_running = ExitStack()
        self._is_up = threading.Event()  # the thread has its memory, or has failed to get it
        self._let_workers_go()  # of a thread that may be another than the one that starts it

    @property
    def longest_text(self) -> int:
        """Tokens of the longest text that the model, and the memory, have been made for."""
        return min(length_of_model(self.model), self.budget.num_slots)

    def start(self) -> None:
        """Starts the thread that runs the forwards, and waits until it has its memory.

        Raises:
            RuntimeError: when it has not got it.
        """
        if self.is_running():
            super().start()  # which says so
            return
        self._is_up.clear()
        self._let_workers_go()
        super().start()
        self._is_up.wait()
        if (error := self.background_thread_status.fatal_error) is not None:
            raise RuntimeError(f"The thread of continuous batching could not be started: {error}") from error

    def switch_to_cb_friendly_attn(self, *args: Any) -> None:
        """Leaves the attention of the model as it is."""

    def add_request(  # settings of `generate` in place of those of logits processors
        self,
        input_ids: list[int],
        request_id: str | None = None,
        max_new_tokens: int | None = None,
        streaming: bool = False,
        record_timestamps: bool = False,
        eos_token_id: int | list[int] | None = None,
        *,
        seed: int | None = None,
        generation_config: GenerationConfig | None = None,
        **settings: Any,
    ) -> str | None:
        """Adds a request, which joins at the next forward, or waits in order.

        Args:
            input_ids: The prompt; masks in it are filled in.
            request_id: Its name, of no other request that is under way; None: one is made up.
            max_new_tokens: Tokens behind the prompt. None: those of the settings; without any, 20, or none for a
                prompt with holes.
            streaming: Whether there is a result after every forward, of what is known so far.
            record_timestamps: Whether to note when each token was known from the left, in seconds.
            eos_token_id: Tokens that end the text.
            seed: Of all its draws. None: drawn by torch's global generator.
            generation_config, settings: As for `generate`, also `logits_processor`, `stopping_criteria`,
                `stop_strings` with `tokenizer`, and `streamer`; what is about several rows, caches or processes does
                not apply. With `num_return_sequences=n`, there are n - 1 more results, of seeds that follow, as
                "{request_id}__child#{i}".

        Returns:
            The name; None, with a warning, if the manager has stopped, or is about to.

        Raises:
            ValueError: for prompts and settings that `generate` refuses, a name that is taken, and a text that is
                longer than the memory.
        """
        if max_new_tokens is not None:
            settings["max_new_tokens"] = max_new_tokens
        if eos_token_id is not None:
            settings["eos_token_id"] = eos_token_id
        sessions = self._begin(input_ids, request_id, seed, generation_config, settings)
        return self._enqueue(input_ids, sessions, streaming, record_timestamps)

    def add_requests(  # type: ignore[override]  # as `add_request`
        self,
        inputs: list[list[int]],
        max_new_tokens: int | None = None,
        streaming: bool = False,
        record_timestamps: bool = False,
        *,
        seed: int | None = None,
        generation_config: GenerationConfig | None = None,
        **settings: Any,
    ) -> list[str | None]:
        """Adds requests of the same settings, or none, if one of them is refused.

        Args:
            inputs: The prompts.
            seed: Of the first one; those of the others follow.
            max_new_tokens, streaming, record_timestamps, generation_config, settings: As for `add_request`.

        Returns:
            Their names.
        """
        if max_new_tokens is not None:
            settings["max_new_tokens"] = max_new_tokens
        begun: list[dict[str, GenerationSession]] = []
        try:
            for input_ids in inputs:
                next_seed = None if seed is None else seed + sum(len(sessions) for sessions in begun)
                begun.append(self._begin(input_ids, None, next_seed, generation_config, settings))
        except BaseException:
            for sessions in begun:
                self._names.difference_update(sessions)
            raise
        return [
            self._enqueue(input_ids, sessions, streaming, record_timestamps)
            for input_ids, sessions in zip(inputs, begun, strict=True)
        ]

    def _begin(
        self,
        input_ids: list[int],
        request_id: str | None,
        seed: int | None,
        generation_config: GenerationConfig | None,
        settings: dict[str, Any],
    ) -> dict[str, GenerationSession]:
        """The samples of a prompt, by the names of their requests, which are taken from now on."""
        if not isinstance(input_ids, list) or not all(is_integer(token) for token in input_ids):
            raise ValueError(f"`input_ids` must be a list of token ids, of one prompt, got {input_ids!r:.80}.")
        if request_id is not None and not isinstance(request_id, str):
            raise ValueError(f"`request_id` must be a string, got {request_id!r}.")
        if seed is not None and not (is_integer(seed) and 0 <= seed < 2**63):
            raise ValueError(f"`seed` must be an integer in [0, 2^63 - 1], got {seed!r}.")
        refused = MEANINGLESS_SETTINGS & set(settings)
        if refused:
            raise ValueError(
                f"{sorted(refused)} have no meaning for a request: leave them unset (`seed` seeds draws)."
            )
        require_generation_config(generation_config)
        generation_config = generation_config or self.generation_config
        require_count("num_return_sequences", settings.get("num_return_sequences"))
        samples = num_samples(generation_config, settings)
        of_session = as_eso_generation_config(copy.deepcopy(generation_config))
        own = {"num_return_sequences": 1, "use_cache": True, "return_dict_in_generate": False}
        others = of_session.update(**{name: to_python(value) for name, value in settings.items()} | own)
        vocab_size = self.model.config.vocab_size
        outside = [token for token in input_ids if not 0 <= token < vocab_size]
        if outside:
            raise ValueError(f"`input_ids` must be ids of the vocabulary, in [0, {vocab_size - 1}], got {outside[0]}.")
        length = len(input_ids) + (of_session.max_new_tokens or 0)
        self._require_room(max(length, of_session.max_length or 0), len(input_ids))  # before anything is allocated
        prompt = torch.tensor([input_ids], dtype=torch.long, device=self.model.device) if input_ids else None
        is_made_up = False
        with self._request_lock:
            while request_id is None or (is_made_up and request_id in self._names):
                request_id, is_made_up = f"req_{self._request_counter}", True
                self._request_counter += 1
            if seed is None:
                # Of a range that the samples' do not leave.
                seed = int(torch.randint(2**62, ())) if self._next_seed is None else self._next_seed
                self._next_seed = None if self._next_seed is None else self._next_seed + samples
        sessions = [
            self.model.begin_generation(
                prompt,
                of_session,
                attention_mask=None if prompt is None else torch.ones_like(prompt),  # it has no padding
                generator=[torch.Generator().manual_seed(seed + sample)],
                **others,
            )
            for sample in range(samples)
        ]
        self._let_workers_go()
        self._require_room(sessions[0].num_slots, len(input_ids))
        names = names_of_samples(request_id, samples)
        with self._request_lock:
            if not self._names.isdisjoint(names):
                raise ValueError(f"`request_id={request_id!r}` is under way: wait for it, or choose another name.")
            self._names.update(names)
        return dict(zip(names, sessions, strict=True))

    def _require_room(self, needed: int, length: int) -> None:
        """Raises a ValueError for a text that can never fit."""
        num_slots = self.budget.num_slots
        if length > num_slots:
            raise ValueError(f"`input_ids` must be at most as many as the cache has slots, {num_slots}, got {length}.")
        if needed > num_slots:
            raise ValueError(
                f"`max_new_tokens` (or `max_length`) behind the prompt of {length} tokens makes a text of {needed} "
                f"slots (with the masks of lossless decoding), and the cache has {num_slots}: ask for less, or "
                f"give it more memory."
            )

    def _enqueue(
        self, input_ids: list[int], sessions: dict[str, GenerationSession], streaming: bool, record_timestamps: bool
    ) -> str | None:
        """Adds the requests of a prompt, all of them or none; returns the name of the first one."""
        added = []
        try:
            for name, session in sessions.items():
                added_name = super().add_request(
                    input_ids,
                    request_id=name,
                    max_new_tokens=session.canvas.length - len(input_ids),
                    streaming=streaming,
                    record_timestamps=record_timestamps,
                    session=session,
                )
                if added_name is None:
                    break
                added.append(name)
        finally:
            if len(added) < len(sessions):
                for name in added:
                    super().cancel_request(name)
                for name in sessions.keys() - set(added):
                    self._names.discard(name)
                    sessions[name].__exit__(None, None, None)
        if self.background_thread_status.local_status == BackgroundThreadStatus.STOPPED:
            # The thread has ended meanwhile, and would leave them without an answer.
            self._fail_all_remaining_requests(RuntimeError("The manager has stopped."), self._processor)
            self._names.difference_update(sessions)
        return added[0] if len(added) == len(sessions) else None

    def cancel_request(self, request_id: str) -> None:
        """Cancels a request, and the other samples of its prompt, at the next forward; others are not concerned."""
        for name in list(self._names):
            if name == request_id or name.startswith(f"{request_id}{OF_SAMPLE}"):
                super().cancel_request(name)

    def get_result(self, request_id: str | None = None, timeout: float | None = None) -> EsoRequestOutput | None:
        """The next result, of any request or of one; results of others stay where they are.

        Args:
            request_id: Of which request. None: of any.
            timeout: How long to wait for it, in seconds. None: for as long as the thread runs.

        Returns:
            None if there is none in time, or will be none.
        """
        results, ends = cast(ResultQueue, self.output_router.output_queue), time.perf_counter() + (timeout or 0)
        while True:
            was_running = self.is_running()
            left = SECONDS_BETWEEN_LOOKS if timeout is None else min(SECONDS_BETWEEN_LOOKS, ends - time.perf_counter())
            try:
                return results.get_of(request_id, max(left, 0) if was_running else 0)
            except queue.Empty:
                if not was_running or (timeout is not None and time.perf_counter() >= ends):
                    return None

    def request_id_iter(self, request_id: str) -> Generator[EsoRequestOutput]:
        """The results of a request, in order, up to the last one; while others read those of other requests."""
        while (result := self.get_result(request_id)) is not None:
            yield result
            if result.is_finished():
                return

    def wait_for(self, names: Iterable[str]) -> Iterator[EsoRequestOutput]:
        """The last result of each of some requests, in their order.

        Raises:
            RuntimeError: when the thread ends without one.
        """
        for name in names:
            results = list(self.request_id_iter(name))
            if not results or not results[-1].is_finished():
                error = self.background_thread_status.fatal_error
                raise RuntimeError("The forwards of continuous batching have failed.") from error
            yield results[-1]

    def forget_result_handler(self, request_id: str) -> None:
        """Takes back `register_result_handler`, unless the request is under way, and its last result still to come."""
        if request_id not in self._names:
            with self.output_router._lock:
                self.output_router.result_handlers.pop(request_id, None)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Pauses between two forwards, so that the weights may be changed; texts under way go on with the new ones.

        What the cache holds of their tokens stays as it is; prompts that come later are read anew.
        """
        with super().pause():
            self._while_running.close()
            try:
                yield
            finally:
                cast(EsoBatchProcessor, self._processor).memory.forget_prompts()
                self._while_running.enter_context(self.model.ready_to_decode())

    def metrics(self) -> dict[str, int]:
        """What there is to watch, since the start of the thread, until it is stopped.

        `active` and `waiting` requests; `slots_in_use`, `slots_kept` (of prompts that nobody uses at the moment) and
        `slots` of the cache, and its `cache_bytes`; and, counted: requests that have `finished`, `failed` or been
        `cancelled`, `forwards`, `fed_slots` (what they computed), `generated_tokens` (of finished requests), and
        `shared_prompt_tokens`, which needed no computing; and `waiting_ms` and `decoding_ms`, which finished requests
        have taken in all.
        """
        found = dict.fromkeys(("active", "waiting", "slots_in_use", "slots_kept", "cache_bytes", *COUNTED), 0)
        found["slots"] = self.budget.num_slots
        processor = self._processor
        if processor is None:
            return found
        memory = processor.memory
        return found | {
            "active": len(processor.scheduler.active_requests),
            "waiting": len(processor.scheduler.waiting_requests) + self.input_queue.qsize(),
            "slots_in_use": memory.num_in_use,
            "slots_kept": memory.num_slots - memory.num_free - memory.num_in_use,
            "cache_bytes": processor.forward.num_bytes,
            **processor.counts,
        }

    def warmup(self) -> None:
        """Nothing needs to be captured in advance."""
        self.warmed_up = True

    def _let_workers_go(self) -> None:
        if self.model.device.type == "cpu":
            let_worker_threads_go()

    def stop(self, *args: Any, **kwargs: Any) -> None:
        """Stops the thread, as in transformers; the memory of the cache is given back, unless it is to be kept."""
        super().stop(*args, **kwargs)
        if not self.is_running():
            self._processor = self.batch_processor

    def _run_generation_loop(self) -> None:
        with self._while_running:
            super()._run_generation_loop()
        self._is_up.set()
        if self.batch_processor is None:  # `stop` has not waited
            self._processor = None

    def _create_batch_processor(self) -> EsoBatchProcessor:
        self._while_running.enter_context(self.model.ready_to_decode())
        if self.batch_processor is not None:
            self.batch_processor.reset()
            self._is_up.set()
            return self.batch_processor
        self._processor = EsoBatchProcessor(
            SharedForward(self.model, self.budget.num_slots),
            SlotMemory(self.budget.num_slots, self.continuous_batching_config.allow_block_sharing),
            self.budget.max_requests,
            self.budget.max_prompt_slots,
            self.input_queue,
            self.cancel_queue,
            self.output_router,
            self.background_thread_status,
            self.distributed_helper,
            self._names,
        )
        self._is_up.set()
        return self._processor

    def _generation_step(self) -> None:
        # transformers forgets the processor where `stop` does not wait for the thread, which still needs it.
        cast(EsoBatchProcessor, self._processor)._generation_step(self.model)


def num_samples(generation_config: GenerationConfig, settings: dict[str, Any]) -> int:
    """Of each prompt, by the settings of a call, which come first, and its generation config."""
    return settings.get("num_return_sequences") or generation_config.num_return_sequences or 1


def names_of_samples(request_id: str, samples: int) -> list[str]:
    """The requests of the samples of a prompt, named as transformers does."""
    return [request_id, *(f"{request_id}{OF_SAMPLE}{index}" for index in range(samples - 1))]
