"""What the thread of continuous batching does at every step: who joins, one forward for all, who leaves."""

import queue
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn
from transformers.generation.continuous_batching.continuous_api import (
    BackgroundThreadStatus,
    ContinuousBatchProcessor,
    OutputRouter,
)
from transformers.generation.continuous_batching.requests import RequestState, RequestStatus
from transformers.generation.continuous_batching.scheduler import Scheduler
from transformers.generation.continuous_batching.utils import drain_queue
from transformers.utils import logging

from .batching_forward import SharedForward
from .batching_memory import MIN_SHARED, SlotMemory, num_in_common, prompt_key
from .batching_results import EsoRequestOutput
from .generation_decoding import Feed
from .generation_session import GenerationSession

logger = logging.get_logger(__name__)


class InOrder(Scheduler):
    """transformers' books on who waits, who takes part, and who is to be cancelled."""

    def __init__(self, memory: SlotMemory, max_requests: int):
        # Not transformers' own: the rest of its arguments are about pages and their offloading.
        bookkeeping: Any = SimpleNamespace(free_blocks=memory.free_blocks, num_full_attention_groups=1)
        bookkeeping.max_blocks_per_request = bookkeeping.block_size = 0
        super().__init__(bookkeeping, safety_margin=0.0, max_requests_per_batch=max_requests)

    def schedule_batch(self, *args: Any) -> Any:
        """Is not asked: all who take part have a part in every forward."""
        raise NotImplementedError


class EsoBatchProcessor(ContinuousBatchProcessor):
    """Carries out the steps of transformers' `ContinuousBatchingManager` for an Eso-LM.

    Every request is a session of `generate` of its own, with its own settings and its own source of randomness; all
    that requests share are the forwards and the memory. So none can change what another gets, but for the rounding of
    floating-point numbers.

    Args:
        forward: Runs forwards for all.
        memory: Whose slots are whose.
        max_requests: That take part in a forward.
        max_prompt_slots: Slots of prompts that join a forward; longer prompts are spread over several.
        input_queue, cancel_queue, output_router, status, distributed_helper, names: The manager's.
    """

    def __init__(
        self,
        forward: SharedForward,
        memory: SlotMemory,
        max_requests: int,
        max_prompt_slots: int,
        input_queue: Any,
        cancel_queue: Any,
        output_router: OutputRouter,
        status: BackgroundThreadStatus,
        distributed_helper: Any,
        names: set[str],
    ):
        self.forward, self.memory = forward, memory
        self.max_prompt_slots = max_prompt_slots
        # transformers' own step loses what it finds in its queue when it is told to stop at once: it finds nothing.
        self.incoming, self.input_queue = input_queue, queue.Queue()
        self.cancel_queue, self.output_router = cancel_queue, output_router
        self.background_thread_status, self.distributed_helper = status, distributed_helper
        self.names = names
        self.scheduler: InOrder = InOrder(memory, max_requests)
        # What transformers' loop looks at: forwards are waited for.
        self.use_async_batching = False
        self.inputs_and_outputs = cast(Any, SimpleNamespace(compute_stream=None))
        # Requests that take part in the next forward, what they feed, and whether that is a part of their prompt.
        self.fed: list[tuple[RequestState, Feed, bool]] = []
        self.counts: Counter[str] = Counter()

    def __del__(self) -> None:
        """Has nothing to clean up."""

    def __repr__(self) -> str:
        scheduler = self.scheduler
        return (
            f"{type(self).__name__}(active={list(scheduler.active_requests)}, "
            f"waiting={list(scheduler.waiting_requests)})"
        )

    def reset(self) -> None:
        """Before another session of the same manager: prompts stay."""
        self.scheduler.reset()
        for owner in list(self.memory.leases):
            self.memory.free_blocks(owner)
        self.fed = []

    def prepare_next_batch(self) -> bool:
        """Lets go of cancelled requests, lets others join, and asks all what they feed; whether there is anything."""
        if self._update_tp_group_state():
            return False
        # After the cancellations: whoever is cancelled has been added before.
        for state in drain_queue(self.incoming):
            self.scheduler.add_waiting_request(state)
        for state in self.scheduler.clear_cancelled_requests():
            self._fail(state, RuntimeError("The request was cancelled."), "cancelled")
        self._admit()
        self.fed, prompt_slots = [], self.max_prompt_slots
        for state in list(self.scheduler.active_requests.values()):
            session = session_of(state)
            with self._failing_alone(state):
                unread = session.num_unread
                if unread <= prompt_slots:
                    self.fed.append((state, session.next_feed(), False))
                elif prompt_slots > 0:
                    self.fed.append((state, session.feed_of_prompt(prompt_slots), True))
                prompt_slots -= min(unread, prompt_slots)
        return len(self.fed) > 0

    def _admit(self) -> None:
        """Lets waiting requests join, in order, until one has to wait: for memory, or for others to leave."""
        scheduler = self.scheduler
        while scheduler.waiting_requests_order:
            state = scheduler.waiting_requests[scheduler.waiting_requests_order[0]]
            session = session_of(state)
            if session.is_finished():  # there is nothing to write
                self._leave_queue(state)
                with self._failing_alone(state):
                    session.start()
                    self._finish(state)
                continue
            if len(scheduler.active_requests) >= scheduler.max_requests_per_batch:
                return
            prompt = prompt_of(session)
            if self._is_being_computed(prompt):
                return
            lease = self.memory.take(state.request_id, session.num_slots, prompt)
            if lease is None:
                return
            self._leave_queue(state)
            scheduler.active_requests[state.request_id] = state
            state.status = RequestStatus.DECODING
            session.strategy.cached[0] = lease.num_shared
            self.counts["shared_prompt_tokens"] += lease.num_shared
            with self._failing_alone(state):
                session.start()

    def _is_being_computed(self, prompt: torch.Tensor) -> bool:
        """Whether what a prompt begins with will be there a little later, and is worth waiting for."""
        if not self.memory.shares_prompts:
            return False
        there = self.memory.num_shareable(prompt)
        return any(
            num_in_common(self.memory.leases[state.request_id].prompt, prompt) >= there + MIN_SHARED
            for state in self.scheduler.active_requests.values()
            if session_of(state).num_unread > 0
        )

    @torch.no_grad()
    def _generation_step(self, model: nn.Module) -> None:
        leases = [self.memory.leases[state.request_id] for state, _, _ in self.fed]
        self.outputs = self.forward([feed for _, feed, _ in self.fed], leases)
        self.counts["forwards"] += 1
        self.counts["fed_slots"] += sum(feed.num_fed[0] for _, feed, _ in self.fed)

    def update_batch(self) -> None:
        """Has every session decide, and tells those who listen."""
        for (state, feed, is_prompt), outputs in zip(self.fed, self.outputs, strict=True):
            session = session_of(state)
            was_reading = session.num_unread > 0
            with self._failing_alone(state):
                if is_prompt:
                    session.strategy.cached[0] += feed.num_fed[0]
                else:
                    session.take(outputs)
                    self._note_progress(state, session)
            if was_reading and session.num_unread == 0 and state.request_id in self.memory.leases:
                self.memory.keep_prompt(state.request_id)
            if session.is_finished() and state.status != RequestStatus.FAILED:
                self._finish(state)
        self.fed, self.outputs = [], []

    def has_pending_requests(self) -> bool:
        """Whether anyone takes part, or waits."""
        return self.scheduler.has_pending_requests()

    def fail_all_requests(self, error: Exception) -> None:
        """Ends all requests with an error."""
        for state in [*self.scheduler.active_requests.values(), *self.scheduler.waiting_requests.values()]:
            self._fail(state, error)

    def _handle_request_error(self, error: Exception, state: RequestState) -> None:
        self._fail(state, error)

    def _leave_queue(self, state: RequestState) -> None:
        self.scheduler.waiting_requests_order.remove(state.request_id)
        self.scheduler.waiting_requests.pop(state.request_id)

    def _note_progress(self, state: RequestState, session: GenerationSession) -> None:
        """Keeps what is known from the left, and streams it."""
        num_before = len(state.generated_tokens)
        state.generated_tokens, state.logprobs = session.continuation()
        if state.record_timestamps:
            state._timestamps += [time.perf_counter()] * (len(state.generated_tokens) - num_before)
        if state.streaming and not session.is_finished():
            self._deliver(output_of(state))

    def _finish(self, state: RequestState) -> None:
        """Ends a request that has been answered, and takes its memory back."""
        session = session_of(state)
        state.generated_tokens, state.logprobs = session.continuation()
        state.status = RequestStatus.FINISHED
        self.scheduler.finish_request(state.request_id)
        self.counts["finished"] += 1
        self.counts["waiting_ms"] += round(1e3 * (state.lifespan[0] - state.created_time))
        self.counts["decoding_ms"] += round(1e3 * (state.lifespan[1] - state.lifespan[0]))
        self.counts["generated_tokens"] += int((session.canvas.unmasking_steps > 0).sum())
        session.__exit__(None, None, None)
        self._deliver(output_of(state))

    def _fail(self, state: RequestState, error: BaseException, reason: str = "failed") -> None:
        """Ends a request with an error, and takes its memory back."""
        if state.request_id in self.scheduler.waiting_requests:
            self._leave_queue(state)
        self.scheduler.finish_request(state.request_id)
        self.counts[reason] += 1
        state.status, state.error = RequestStatus.FAILED, str(error) or type(error).__name__
        with suppress(Exception):  # of a streamer, which may be what has failed
            session_of(state).__exit__(type(error), error, None)
        self._deliver(output_of(state))

    @contextmanager
    def _failing_alone(self, state: RequestState) -> Iterator[None]:
        """What goes wrong inside is the end of this request, and of no other."""
        try:
            yield
        except (Exception, SystemExit) as error:
            logger.warning(f"Request {state.request_id} has failed: {error!r}")
            self._fail(state, error)

    def _deliver(self, output: EsoRequestOutput) -> None:
        if output.is_finished():
            self.names.discard(output.request_id)
        try:
            self.output_router.deliver(output)
        except RuntimeError:  # the event loop of who waits for it is closed
            self.output_router.result_handlers.pop(output.request_id, None)
            self.scheduler.set_request_cancellation(output.request_id)


def session_of(state: RequestState) -> GenerationSession:
    """What a request brings."""
    return state.logit_processor_kwargs["session"]


def prompt_of(session: GenerationSession) -> torch.Tensor:
    """What the first slots of a session hold, as from [`prompt_key`]."""
    columns = session.strategy.order[0, : session.canvas.num_given[0]]
    return prompt_key(session.canvas.tokens[0, columns], session.canvas.text_positions[0, columns])


def output_of(state: RequestState) -> EsoRequestOutput:
    """What there is to tell of a request."""
    canvas, session = session_of(state).canvas, session_of(state)
    end = canvas.end[0]
    sequence, steps = canvas.sequences()[0, :end].tolist(), canvas.unmasking_steps[0, :end].tolist()
    has_ended = steps[-1:] > [0] and sequence[-1] in canvas.eos_token_ids
    # What is still open has run out of time.
    is_stopped = has_ended or ((end < canvas.length or canvas.is_stopped[0]) and not canvas.stays_open[0, :end].any())
    return EsoRequestOutput(
        **vars(state.to_generation_output()),
        sequence=sequence,
        num_given=canvas.num_given[0],
        num_function_evaluations=session.num_forwards,
        unmasking_steps=steps,
        log_probs=canvas.log_probs[0, :end].tolist(),
        statistics={name: counts[0] for name, counts in session.strategy.statistics().items()},
        finish_reason=("stop" if is_stopped else "length") if state.status == RequestStatus.FINISHED else None,
    )
