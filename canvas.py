"""The text while it is being generated, kept on the host: what is known, where it ends, what may be shown.

The device runs the model and draws; the tokens that it has drawn come over once a forward, and everything that depends
on which text is known (end of text, stopping criteria, streamers, the context of logits processors) is decided here.
"""

import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation import BaseStreamer, EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria

from .cache import CachedText
from .generation_order import text_positions


class Canvas:
    """A batch of texts with open columns to fill in.

    A column is a place in the returned tensor: prompts as they were given, padding included, then the new tokens. A
    text position counts the real tokens of a row only, whatever its padding.

    Args:
        input_ids: (batch, prompt length), the prompts; masks in them are open.
        attention_mask: (batch, prompt length), 1 real and 0 padding; None: no padding.
        length: Columns in all; those behind the prompts are open.
        mask_token_id: The mask.
        eos_token_ids: Tokens that end a text, if drawn behind everything that was given.
        pad_token_id: What is returned behind the end of a text.
    """

    def __init__(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None,
        length: int,
        mask_token_id: int,
        eos_token_ids: list[int],
        pad_token_id: int,
    ):
        self.batch, self.prompt_length = input_ids.shape
        self.length = length
        self.mask_token_id = mask_token_id
        self.eos_token_ids, self.pad_token_id = eos_token_ids, pad_token_id
        self.tokens = torch.full((self.batch, length), mask_token_id)
        self.tokens[:, : self.prompt_length] = input_ids
        self.is_real = torch.ones_like(self.tokens, dtype=torch.bool)
        if attention_mask is not None:
            self.is_real[:, : self.prompt_length] = attention_mask.bool()
        self.is_open = self.is_real & (self.tokens == mask_token_id)
        self.text_positions = text_positions(self.is_real)
        self.num_given = (self.is_real & ~self.is_open).sum(dim=-1).tolist()
        given_columns = torch.where(self.is_real & ~self.is_open, torch.arange(length), -1)
        self.last_given = torch.cat([given_columns, torch.full((self.batch, 1), -1)], dim=-1).amax(dim=-1).tolist()

        # Of each row, the columns of given tokens that a cache holds already, in the order of its slots.
        self.cached_columns: list[list[int]] = [[] for _ in range(self.batch)]
        self.unmasking_steps = torch.zeros_like(self.tokens)
        self.log_probs = torch.zeros(self.batch, length, dtype=torch.float32)
        # Columns from the left up to the first open one, and those that count: the others are padding in the end.
        self.known = [0] * self.batch
        self.end = [length] * self.batch
        self.is_stopped = [False] * self.batch
        # What was open when its row was stopped: it stays masked, even if the row keeps step with the others.
        self.stays_open = torch.zeros_like(self.is_open)
        for row in range(self.batch):
            self._extend_known(row)

    @property
    def num_open(self) -> list[int]:
        """(batch,), the columns of each row that are still open."""
        return self.is_open.sum(dim=-1).tolist()

    def cut(self, row: int, end: int) -> None:
        """Ends a row after `end` columns before anything is decided: what was to follow is padding."""
        self.end[row] = end
        self.is_open[row, end:] = False
        self.is_real[row, end:] = False

    def take_cached(self, text: CachedText) -> None:
        """Takes note of what a cache holds: given tokens, whose keys and values need not be computed again.

        Raises:
            ValueError: when it holds anything else.
        """
        for row, length in enumerate(text.lengths):
            column_of_position = self.is_real[row].nonzero()[:, 0]
            positions, tokens = text.positions[row, :length], text.tokens[row, :length]
            if length and positions.max() >= len(column_of_position):
                raise ValueError(
                    f"`past_key_values` holds {int(positions.max()) + 1} tokens of row {row}, which has fewer: pass "
                    f"the whole text as `input_ids`, what is cached and what is new."
                )
            columns = column_of_position[positions]
            differs = self.is_open[row, columns] | (self.tokens[row, columns] != tokens)
            if differs.any():
                place = int(positions[differs].min())
                raise ValueError(
                    f"`past_key_values` holds another text than `input_ids`: row {row} differs at token {place}."
                )
            self.cached_columns[row] = columns.tolist()

    def reveal(
        self, rows: list[int], columns: list[int], tokens: list[int], log_probs: list[float], step: int
    ) -> None:
        """Fills in the tokens of forward number `step`, which stand at (rows, columns)."""
        self.tokens[rows, columns] = torch.tensor(tokens, dtype=torch.long)
        self.log_probs[rows, columns] = torch.tensor(log_probs, dtype=torch.float32)
        self.unmasking_steps[rows, columns] = step
        self.is_open[rows, columns] = False
        for row, column, token in zip(rows, columns, tokens, strict=True):
            if token in self.eos_token_ids and column > self.last_given[row] and not self.is_stopped[row]:
                self.end[row] = min(self.end[row], column + 1)
        for row in set(rows):
            self._extend_known(row)

    def _extend_known(self, row: int) -> None:
        # In pieces, so that the work is proportional to the columns that become known.
        piece = 64
        while self.known[row] < self.length:
            is_open = self.is_open[row, self.known[row] : self.known[row] + piece].tolist()
            if True in is_open:
                self.known[row] += is_open.index(True)
                return
            self.known[row] += len(is_open)

    def stop(self, row: int, end: int) -> None:
        """Stops a row. Its text ends after `end` columns, but not before what was given; open ones stay masked."""
        self.is_stopped[row] = True
        self.stays_open[row] = self.is_open[row]
        self.end[row] = min(self.end[row], max(end, self.last_given[row] + 1))

    def is_finished(self) -> bool:
        """Whether every row has been stopped, or is known up to its end."""
        rows = zip(self.is_stopped, self.known, self.end, strict=True)
        return all(is_stopped or known >= end for is_stopped, known, end in rows)

    def idle_rows(self, in_lockstep: bool) -> list[bool]:
        """(batch,): rows that need no further tokens, unless they keep step with the others."""
        rows = zip(self.is_stopped, self.known, self.end, strict=True)
        return [not in_lockstep and (is_stopped or known >= end) for is_stopped, known, end in rows]

    def holds_prefixes(self) -> bool:
        """Whether every row is plain text, without padding, with all that is open behind all that was given."""
        rows = zip(self.known, self.last_given, strict=True)
        return bool(self.is_real.all()) and all(known > last_given for known, last_given in rows)

    def known_text(self, row: int) -> torch.LongTensor:
        """(known tokens,), what is known of a row so far, in text order."""
        return self.tokens[row, self.is_real[row] & ~self.is_open[row]]

    def text_with_gaps(self, row: int) -> list[int]:
        """The tokens of a row by text position, -1 where they are open."""
        return self.tokens[row].masked_fill(self.is_open[row], -1)[self.is_real[row]].tolist()

    def is_behind_end(self) -> torch.BoolTensor:
        """(batch, length): what lies behind the end of the text."""
        return torch.arange(self.length) >= torch.tensor(self.end)[:, None]

    def is_void(self) -> torch.BoolTensor:
        """(batch, length): what lies behind the end of the text, and what a stop has left open."""
        return self.is_behind_end() | self.stays_open

    def sequences(self) -> torch.LongTensor:
        """(batch, length), padded behind the end of the text; what is open before it holds the mask."""
        tokens = self.tokens.masked_fill(self.stays_open, self.mask_token_id)
        return tokens.masked_fill(self.is_behind_end(), self.pad_token_id)


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

    def _text(self, row: int, end: int) -> torch.LongTensor:
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
            ([`TextDiffusionStreamer`] has), that gets the rest of the text after every forward, masks included.
    """

    def __init__(self, streamer: BaseStreamer):
        self.streamer = streamer

    def put(self, value: torch.LongTensor) -> None:
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
        self.update()

    def update(self) -> None:
        """Sends what has become known since the last call."""
        known, end = min(self.canvas.known[0], self.canvas.end[0]), self.canvas.end[0]
        if known > self.sent:
            self.streamer.put(self.canvas.tokens[0, self.sent : known])
            self.sent = known
        if hasattr(self.streamer, "put_draft") and known < end:
            self.streamer.put_draft(self.canvas.tokens[:, known:end])

    def end(self) -> None:
        self.streamer.end()
