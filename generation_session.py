"""Texts that are being written: what their next forward is fed, and what becomes of its logits.

Whose forwards these are is left open. `generate` runs them for one session at a time; continuous batching lets many
share each of them.
"""

from types import TracebackType
from typing import Self, cast

import torch
from transformers.cache_utils import Cache

from .generation_cache import PreallocatedCache
from .generation_canvas import Canvas, note_text
from .generation_configuration import EsoGenerateOutput, EsoGenerationConfig
from .generation_decoding import DecodingStrategy, Feed, Outputs
from .generation_observers import Observers


class GenerationSession:
    """A call of `generate`, without the forwards. As a context it closes its observers, whatever happens.

    Args:
        canvas: The texts.
        strategy: Says what is fed, and decides.
        observers: Those who follow the texts.
        settings: Of the call.
        cache: The one that it has been prepared for; None: it goes without.
    """

    def __init__(
        self,
        canvas: Canvas,
        strategy: DecodingStrategy,
        observers: Observers,
        settings: EsoGenerationConfig,
        cache: Cache | None,
    ):
        self.canvas, self.strategy, self.observers = canvas, strategy, observers
        self.settings, self.cache = settings, cache
        self.num_forwards = 0
        self.first_open = canvas.known[0] if canvas.batch == 1 else 0

    def __enter__(self) -> Self:
        self.observers.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.observers.__exit__(kind, error, traceback)

    def start(self) -> None:
        """Before the first forward."""
        self.observers.start()

    def is_finished(self) -> bool:
        """Whether no text needs another forward."""
        return self.canvas.is_finished()

    def next_feed(self) -> Feed:
        """What the next forward gets."""
        return self.strategy.next_feed()

    def take(self, outputs: Outputs) -> None:
        """Decides tokens with what the forward says of them."""
        self.num_forwards += 1
        self.observers.update(self.strategy.decide(outputs, self.num_forwards), self.num_forwards, self.strategy)

    @property
    def num_slots(self) -> int:
        """Of a row of the cache, those that the texts will ever need."""
        return cast(PreallocatedCache, self.cache).max_length

    @property
    def num_unread(self) -> int:
        """Given tokens, of a session of one text, whose keys and values are not there yet."""
        return max(self.canvas.num_given[0] - self.strategy.cached[0], 0)

    def feed_of_prompt(self, num_slots: int) -> Feed:
        """In place of the next feed: some of the given tokens of a text, of which nothing is asked.

        Once they are cached, `strategy.cached` is to be moved on.
        """
        start = self.strategy.cached[0]
        columns = self.strategy.order[:, start : start + num_slots]
        return Feed(
            starts=[start],
            input_ids=self.canvas.tokens.gather(1, columns),
            position_ids=self.canvas.text_positions.gather(1, columns),
            num_fed=[columns.shape[1]],
            kept=[range(0)],
        )

    def continuation(self) -> tuple[list[int], list[float]]:
        """Of a text, the tokens behind what was given at its beginning, as far as they are known from the left.

        All of them once it is finished, masks where a stop has left some open; and their log-probabilities, in nats.
        """
        canvas = self.canvas
        end = canvas.end[0] if self.is_finished() else min(canvas.known[0], canvas.end[0])
        columns = slice(self.first_open, end)
        return canvas.sequences()[0, columns].tolist(), canvas.log_probs[0, columns].tolist()

    def output(self, device: torch.device) -> EsoGenerateOutput:
        """What `generate` returns, on a device."""
        canvas, strategy = self.canvas, self.strategy
        is_void = canvas.is_void()
        return EsoGenerateOutput(
            sequences=canvas.sequences().to(device),
            num_function_evaluations=self.num_forwards,
            unmasking_steps=canvas.unmasking_steps.masked_fill(is_void, 0).to(device),
            log_probs=canvas.log_probs.masked_fill(is_void, 0).to(device),
            orders=strategy.plan.order.to(device),
            groups=strategy.plan.groups.to(device),
            trajectories=canvas.tokens.to(device),
            past_key_values=note_text(self.cache, canvas, strategy.order, strategy.cached),
            **self.observers.recorder.outputs(is_void),
            **{name: torch.tensor(counts, device=device) for name, counts in strategy.statistics().items()},
        )
