"""What has become of requests, and where that waits for who asked."""

import queue
import time
from dataclasses import dataclass, field

from transformers.generation.continuous_batching.requests import GenerationOutput


@dataclass
class EsoRequestOutput(GenerationOutput):
    """What has become of a request so far: transformers' [`GenerationOutput`], and what only an Eso-LM has to tell.

    `generated_tokens` are those behind what was given at the beginning of the prompt: its first hole, if there is one,
    and all that follows. While a request streams, they are those known from the left.

    Args:
        sequence: The whole text, prompt included; what is open holds the mask.
        num_given: Tokens of it that were given.
        num_function_evaluations: Forwards in which it had a part.
        unmasking_steps, log_probs: Of each token of `sequence`, as in [`EsoGenerateOutput`].
        statistics: Those of lossless decoding, as in [`EsoGenerateOutput`].
        finish_reason: "length", or "stop": at an end of text, or where a stopping criterion said so. None: not yet.
    """

    sequence: list[int] = field(default_factory=list)
    num_given: int = 0
    num_function_evaluations: int = 0
    unmasking_steps: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    statistics: dict[str, int] = field(default_factory=dict)
    finish_reason: str | None = None


class ResultQueue(queue.Queue):
    """Results in the order in which they came; whoever waits for those of one request leaves the others there."""

    def _put(self, item: GenerationOutput) -> None:
        super()._put(item)
        self.not_empty.notify_all()  # who is woken first may wait for another

    def get_of(self, request_id: str | None, timeout: float) -> EsoRequestOutput:
        """The next result of a request, or of any.

        Raises:
            queue.Empty: if there is none within so many seconds.
        """
        ends = time.perf_counter() + timeout
        with self.not_empty:
            while True:
                for place, item in enumerate(self.queue):
                    if request_id in (None, item.request_id):
                        del self.queue[place]
                        self.not_full.notify()
                        return item
                left = ends - time.perf_counter()
                if left <= 0:
                    raise queue.Empty
                self.not_empty.wait(left)
