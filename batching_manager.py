"""The manager of continuous batching: takes requests, refuses those that cannot be, and knows what there is to watch.

The thread, the queues and the routing of results are those of transformers' `ContinuousBatchingManager`.
"""

import copy
import ctypes
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.continuous_api import (
    BackgroundThreadStatus,
    ContinuousBatchingManager,
)
from transformers.generation.continuous_batching.utils import WorkloadHints

from .batching_forward import SharedForward, bytes_of_slot, require_packing
from .batching_memory import SlotMemory
from .batching_processor import EsoBatchProcessor
from .generation import EsoGenerationMixin
from .generation_configuration import EsoGenerationConfig, as_eso_generation_config, require_generation_config
from .generation_pace import MAX_MASKS
from .generation_session import GenerationSession
from .validation import is_integer, to_python

DEFAULT_MAX_REQUESTS = 32
"""Requests that take part in a forward, unless told otherwise."""

DEFAULT_MAX_PROMPT_SLOTS = 512
"""Slots of prompts that join a forward, unless told otherwise: more would keep the others waiting."""

MEANINGLESS_SETTINGS = frozenset(
    {"attention_mask", "begins_only", "cache_implementation", "generator", "lockstep", "past_key_values"}
)
"""Of `generate`, those that requests of one prompt, without padding and on a shared cache, have no use for."""

OMP_PAUSE_SOFT = 1
"""OpenMP's name for letting go of threads, and of nothing else."""

DEFAULT_LENGTH = 1024
"""Tokens that a text is taken to have at the most, where the model does not say."""

DEFAULT_MEMORY_SHARE = {"cpu": 0.6, "mps": 0.6}
"""Of the free memory of an accelerator, or all memory of the host, what the cache may take; 0.9 elsewhere."""


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
        config = continuous_batching_config
        self.max_requests = config.max_requests_per_batch or DEFAULT_MAX_REQUESTS
        self.max_prompt_slots = config.max_batch_tokens or DEFAULT_MAX_PROMPT_SLOTS
        self.num_slots = _num_slots(self.model, config, self.max_requests, workload_hints)
        self._use_prefix_sharing = False  # which would have `add_requests` sort them; they wait in order
        self._next_seed = config.seed
        self._names: set[str] = set()  # of requests under way
        self._processor: EsoBatchProcessor | None = None  # for as long as the thread needs it
        self._while_running = ExitStack()

    @property
    def longest_text(self) -> int:
        """Tokens of the longest text that the model, and the memory, have been made for."""
        return min(length_of_model(self.model), self.num_slots)

    def start(self) -> None:
        """Starts the thread that runs the forwards."""
        self._let_workers_go()
        super().start()

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
        with self._request_lock:
            if request_id is None:
                request_id = f"req_{self._request_counter}"
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
        if needed > self.num_slots:
            raise ValueError(
                f"`max_new_tokens` (or `max_length`) behind the prompt of {length} tokens makes a text of {needed} "
                f"slots (with the masks of lossless decoding), and the cache has {self.num_slots}: ask for less, or "
                f"give it more memory."
            )

    def _enqueue(
        self, input_ids: list[int], sessions: dict[str, GenerationSession], streaming: bool, record_timestamps: bool
    ) -> str | None:
        added = []
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
                self._names.discard(name)
                session.__exit__(None, None, None)
            added.append(added_name)
        if self.background_thread_status.local_status == BackgroundThreadStatus.STOPPED:
            # The thread has ended meanwhile, and would leave them without an answer.
            self._fail_all_remaining_requests(RuntimeError("The manager has stopped."), self._processor)
            self._names.difference_update(sessions)
        return added[0]

    def forget_result_handler(self, request_id: str) -> None:
        """Takes back `register_result_handler`, for a request that has not been added after all."""
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
        counted = ("finished", "failed", "cancelled", "forwards", "fed_slots", "generated_tokens", "waiting_ms")
        found = dict.fromkeys(("active", "waiting", "slots_in_use", "slots_kept", "cache_bytes"), 0)
        found |= {"slots": self.num_slots} | dict.fromkeys((*counted, "decoding_ms", "shared_prompt_tokens"), 0)
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
        if self.batch_processor is None:  # `stop` has not waited
            self._processor = None

    def _create_batch_processor(self) -> EsoBatchProcessor:
        self._while_running.enter_context(self.model.ready_to_decode())
        if self.batch_processor is not None:
            self.batch_processor.reset()
            return self.batch_processor
        self._processor = EsoBatchProcessor(
            SharedForward(self.model, self.num_slots),
            SlotMemory(self.num_slots, self.continuous_batching_config.allow_block_sharing),
            self.max_requests,
            self.max_prompt_slots,
            self.input_queue,
            self.cancel_queue,
            self.output_router,
            self.background_thread_status,
            self.distributed_helper,
            self._names,
        )
        return self._processor

    def _generation_step(self) -> None:
        # transformers forgets the processor where `stop` does not wait for the thread, which still needs it.
        cast(EsoBatchProcessor, self._processor)._generation_step(self.model)


def _num_slots(
    model: EsoGenerationMixin, config: ContinuousBatchingConfig, max_requests: int, hints: WorkloadHints | None
) -> int:
    """Slots of the cache: as many as are asked for, or as the requests need, as far as there is memory."""
    if config.num_blocks is not None:
        # Before transformers 5.18 a page was called a block.
        page_size: Any = getattr(config, "page_size", None) or config.block_size
        if config.num_blocks * page_size < 1:
            raise ValueError(f"`num_blocks` must be at least 1, got {config.num_blocks}.")
        return config.num_blocks * page_size
    longest = length_of_model(model)
    if hints is not None and hints.num_requests > 0:
        longest = hints.max_prompt_length + hints.max_generated_length
        max_requests = min(hints.num_requests, max_requests)
    wanted = max_requests * (longest + MAX_MASKS)
    share = config.max_memory_percent or DEFAULT_MEMORY_SHARE.get(model.device.type, 0.9)
    if model.device.type == "cuda":
        available = torch.cuda.mem_get_info(model.device)[0]
    elif hasattr(os, "sysconf"):
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        return wanted
    affordable = int(share * available / bytes_of_slot(model))
    if affordable < 1:
        raise ValueError(
            f"`max_memory_percent={share}` of {available} bytes is not enough for a slot of the cache: ask for more."
        )
    return min(wanted, affordable)


def length_of_model(model: EsoGenerationMixin) -> int:
    """Tokens that its texts have at the most."""
    return int(getattr(model.model.config, "max_position_embeddings", DEFAULT_LENGTH))


def let_worker_threads_go() -> None:
    """Ends the worker threads of torch's operators that wait for the calling thread, until it needs some again.

    Each thread that runs operators has workers of its own. Where there are more of them than cores, GNU's OpenMP has
    them all fall asleep after every operator, and to wake them takes longer than a small operator: a decoding step
    of one text takes a third more.
    """
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    with suppress(OSError, AttributeError):  # other systems, and other kinds of OpenMP
        ctypes.CDLL(str(library)).omp_pause_resource_all(OMP_PAUSE_SOFT)


def num_samples(generation_config: GenerationConfig, settings: dict[str, Any]) -> int:
    """Of each prompt, by the settings of a call, which come first, and its generation config."""
    return settings.get("num_return_sequences") or generation_config.num_return_sequences or 1


def names_of_samples(request_id: str, samples: int) -> list[str]:
    """The requests of the samples of a prompt, named as transformers does."""
    return [request_id, *(f"{request_id}__child#{index}" for index in range(samples - 1))]
