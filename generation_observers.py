"""Who follows a text while it is being generated: stopping criteria, streamers, a progress bar, a record of scores."""

from types import TracebackType
from typing import Self

import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation import BaseStreamer, EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria
from transformers.utils.logging import tqdm

from .generation_canvas import Canvas
from .generation_configuration import EsoGenerationStep
from .generation_decoding import Decisions, DecodingStrategy


class StopWatcher:
    """Asks stopping criteria about the text known from the left, as they would see it in left-to-right decoding.

    Before the first forward they get the prompt, its last token masked. Who says stop to that (but for `max_time`)
    would say so to any text: as in transformers, one token follows, and the row ends there. After every forward they
    first get the text that they have let pass, again with its last token masked. Whoever says stop to that, be it a
    clock or a cancel button, stops the row as it is, and what is open stays masked. Then they get the text once for
    each token that has joined it. Who says stop to that has seen something in the text: it ends there, and later
    columns become padding. Rows come one at a time, without scores.

    Args:
        stopping_criteria: Those of `generate`; what the canvas sees to itself (length, end of text) is left out.
        canvas: The text.
        device: Where the criteria get it.
    """

    def __init__(self, stopping_criteria: StoppingCriteriaList, canvas: Canvas, device: torch.device):
        self.stopping_criteria = StoppingCriteriaList(
            criterion for criterion in stopping_criteria if not _is_redundant(criterion, canvas)
        )
        self.canvas, self.device = canvas, device
        known_or_given = zip(canvas.known, canvas.last_given, strict=True)
        self.asked = [max(known, last_given + 1) for known, last_given in known_or_given]
        timeless = StoppingCriteriaList(one for one in self.stopping_criteria if not isinstance(one, MaxTimeCriteria))
        self.is_satisfied = [self._stops_anyway(row, timeless) for row in range(canvas.batch)]
        for row, end in enumerate(self.asked):
            if self.is_satisfied[row]:
                canvas.cut(row, min(end + 1, canvas.length))

    def update(self) -> None:
        """Asks about every row that goes on."""
        if not self.stopping_criteria:
            return
        canvas = self.canvas
        for row in range(canvas.batch):
            if canvas.is_stopped[row] or self.is_satisfied[row]:
                continue
            if self._stops_anyway(row, self.stopping_criteria):
                canvas.stop(row, canvas.end[row])
                continue
            known = min(canvas.known[row], canvas.end[row])
            for end in range(self.asked[row] + 1, known + 1):
                if self._says_stop(row, end):
                    canvas.stop(row, end)
                    break
            self.asked[row] = max(self.asked[row], known)

    def _stops_anyway(self, row: int, criteria: StoppingCriteriaList) -> bool:
        """Whether the text is to stop that has been let pass, whatever its last token is."""
        if not criteria or self.canvas.length == 0:
            return False
        text = self._text(row, max(self.asked[row], 1))
        text[:, -1] = self.canvas.mask_token_id
        return bool(criteria(text, None).all())

    def _says_stop(self, row: int, end: int) -> bool:
        return bool(self.stopping_criteria(self._text(row, end), None).all())

    def _text(self, row: int, end: int) -> torch.Tensor:
        return self.canvas.tokens[row : row + 1, :end].to(self.device, copy=True)


def _is_redundant(criterion: StoppingCriteria, canvas: Canvas) -> bool:
    if isinstance(criterion, MaxLengthCriteria):
        return criterion.max_length >= canvas.length
    return isinstance(criterion, EosTokenCriteria) and set(criterion.eos_token_id.tolist()) <= set(
        canvas.eos_token_ids
    )


class TextFeed(BaseStreamer):
    """Feeds a streamer of transformers: text as soon as all to its left is known, drafts of the rest.

    Args:
        streamer: Gets the prompt first, up to its first hole, then tokens from left to right. If it has `put_draft`
            ([`TextDiffusionStreamer`] has), that gets the rest of the text after every forward, masks included; if it
            has `put_step`, that gets an [`EsoGenerationStep`].
    """

    def __init__(self, streamer: BaseStreamer):
        self.streamer = streamer
        self.drafts: dict[int, int] = {}

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompt from transformers' `generate`, which does not know about holes: `start` passes it on."""

    def start(self, canvas: Canvas) -> None:
        """Sends what is known at the beginning.

        Raises:
            ValueError: when there are several rows.
        """
        if canvas.batch != 1:
            raise ValueError(f"`streamer` takes one text, got a batch of {canvas.batch} (with the samples of each).")
        self.canvas = canvas
        self.sent = min(canvas.known[0], canvas.prompt_length)
        self.streamer.put(canvas.tokens[:, : self.sent])
        self.update(0, {})

    def update(self, number: int, drafts: dict[int, int]) -> None:
        """Sends what has become known by forward `number`, whose drafts stand at these columns."""
        known, end = min(self.canvas.known[0], self.canvas.end[0]), self.canvas.end[0]
        if known > self.sent:
            self.streamer.put(self.canvas.tokens[0, self.sent : known])
            self.sent = known
        if hasattr(self.streamer, "put_draft") and known < end:
            self.streamer.put_draft(self.canvas.tokens[:, known:end])
        if hasattr(self.streamer, "put_step"):
            self.streamer.put_step(self._step(number, drafts))
        self.drafts = drafts

    def _step(self, number: int, drafts: dict[int, int]) -> EsoGenerationStep:
        canvas = self.canvas
        is_decided, is_void = ~canvas.is_open[0], canvas.is_void()
        return EsoGenerationStep(
            number=number,
            tokens=canvas.sequences()[0],
            unmasking_steps=canvas.unmasking_steps.masked_fill(is_void, 0)[0],
            log_probs=canvas.log_probs.masked_fill(is_void, 0)[0],
            drafts={column: token for column, token in drafts.items() if column < canvas.end[0]},
            refused={
                column: token
                for column, token in self.drafts.items()
                if is_decided[column] and int(canvas.tokens[0, column]) != token
            },
        )

    def end(self) -> None:
        self.streamer.end()


class ScoreRecorder:
    """Keeps what the tokens were drawn from.

    Args:
        names: Which of "scores" and "logits" to keep.
        canvas: The text.
        vocab_size: Tokens of the vocabulary.
        device: Where to keep them.
    """

    def __init__(self, names: list[str], canvas: Canvas, vocab_size: int, device: torch.device):
        shape = (canvas.batch, canvas.length, vocab_size)
        self.recorded = {name: torch.zeros(shape, dtype=torch.float32, device=device) for name in names}

    def update(self, decisions: Decisions) -> None:
        for name, values in self.recorded.items():
            values[decisions.rows, decisions.columns] = getattr(decisions, name)

    def outputs(self, is_void: torch.Tensor) -> dict[str, torch.Tensor]:
        """(batch, length, vocab) by name; 0 where `is_void`, (batch, length)."""
        return {
            name: values.masked_fill_(is_void.to(values.device)[..., None], 0)
            for name, values in self.recorded.items()
        }


class Observers:
    """All of them: told of the text at the start and after every forward, and closed in the end, whatever happens.

    Args:
        canvas: The text.
        watcher: Asks the stopping criteria.
        recorder: Keeps the scores.
        streamer: Feeds a streamer, if there is one.
        shows_progress: Whether a bar shows how many tokens have been decided.
    """

    def __init__(
        self,
        canvas: Canvas,
        watcher: StopWatcher,
        recorder: ScoreRecorder,
        streamer: TextFeed | None,
        shows_progress: bool,
    ):
        self.canvas, self.watcher, self.recorder, self.streamer = canvas, watcher, recorder, streamer
        self.progress = tqdm(total=sum(canvas.num_open), unit="token", disable=not shows_progress)

    def __enter__(self) -> Self:
        return self

    def start(self) -> None:
        """Before the first forward."""
        if self.streamer is not None:
            self.streamer.start(self.canvas)

    def update(self, decisions: Decisions, number: int, strategy: DecodingStrategy) -> None:
        """After forward `number`, which has decided tokens."""
        self.recorder.update(decisions)
        self.watcher.update()
        self.progress.update(len(decisions.rows))
        if self.streamer is not None:
            self.streamer.update(number, strategy.drafted(0))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:  # a text that has ended leaves some undecided
            self.progress.update(self.progress.total - self.progress.n)
        self.progress.close()
        if self.streamer is not None:
            self.streamer.end()
