"""The text while it is being generated, kept on the host: what is known, where it ends, what of it a cache holds.

The device runs the model and draws; the tokens that it has drawn come over once a forward, and everything that depends
on which text is known (end of text, stopping criteria, streamers, the context of logits processors) is decided here.
"""

from typing import Any

import torch
from transformers.cache_utils import Cache

from .generation_cache import CachedText, PreallocatedCache
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
        input_ids: torch.Tensor,
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

    def known_text(self, row: int) -> torch.Tensor:
        """(known tokens,), what is known of a row so far, in text order."""
        return self.tokens[row, self.is_real[row] & ~self.is_open[row]]

    def text_with_gaps(self, row: int) -> list[int]:
        """The tokens of a row by text position, -1 where they are open."""
        return self.tokens[row].masked_fill(self.is_open[row], -1)[self.is_real[row]].tolist()

    def is_behind_end(self) -> torch.Tensor:
        """(batch, length): what lies behind the end of the text."""
        return torch.arange(self.length) >= torch.tensor(self.end)[:, None]

    def is_void(self) -> torch.Tensor:
        """(batch, length): what lies behind the end of the text, and what a stop has left open."""
        return self.is_behind_end() | self.stays_open

    def sequences(self) -> torch.Tensor:
        """(batch, length), padded behind the end of the text; what is open before it holds the mask."""
        tokens = self.tokens.masked_fill(self.stays_open, self.mask_token_id)
        return tokens.masked_fill(self.is_behind_end(), self.pad_token_id)


def take_over_cache(given: Cache, cache: PreallocatedCache, canvas: Canvas) -> None:
    """Has `cache` begin with what another one holds of the given tokens of the canvas.

    Raises:
        ValueError: when that is anything else.
    """
    layers: list[Any] = given.layers
    if not all(getattr(layer, "keys", None) is not None for layer in layers):
        raise ValueError(f"`past_key_values` must be a cache of keys and values, got {type(given).__name__}.")
    if getattr(given, "is_stale", False):
        raise ValueError("`past_key_values` has been written to since `generate` returned it: pass a copy as it was.")
    text = getattr(given, "text", None)
    length = given.get_seq_length() if text is None else min(max(text.lengths), given.get_seq_length())
    rows = len(layers[0].keys)
    if canvas.batch % rows != 0 or length > canvas.prompt_length:
        raise ValueError(
            f"`past_key_values` holds {rows} rows of up to {length} tokens, which are not those of `input_ids`: "
            f"{canvas.batch} rows (with the samples of each) of {canvas.prompt_length}. Pass the whole text as "
            f"`input_ids`, what is cached and what is new."
        )
    repeats = canvas.batch // rows
    if text is None:
        # A cache of a plain forward holds the first tokens of each row.
        if not canvas.is_real[:, :length].all():
            raise ValueError("`past_key_values` of a forward must hold no padding, and `attention_mask` has some.")
        positions = torch.arange(length).expand(rows, -1)
        text = CachedText(canvas.tokens[::repeats, :length], positions, [length] * rows)
    canvas.take_cached(
        CachedText(
            text.tokens.repeat_interleave(repeats, dim=0),
            text.positions.repeat_interleave(repeats, dim=0),
            [min(count, length) for count in text.lengths for _ in range(repeats)],
        )
    )
    cache.copy_from(given, length, repeats)


def note_text(
    cache: Cache | None, canvas: Canvas, order: torch.Tensor, num_cached: list[int]
) -> PreallocatedCache | None:
    """The cache, of as many slots as a later call can go on from: those before the first that is not in the text.

    Args:
        cache: That of `generate`; only a [`PreallocatedCache`] can be gone on from.
        canvas: The text.
        order: (batch, length), the column of the token at each slot.
        num_cached: Of each row, the slots in front that are cached.
    """
    if not isinstance(cache, PreallocatedCache):
        return None
    is_void = canvas.is_void().gather(1, order)
    before_void = (is_void.long().cumsum(dim=-1) == 0).sum(dim=-1).tolist()
    lengths = [min(cached, count) for cached, count in zip(num_cached, before_void, strict=True)]
    slots = order[:, : max(lengths)]
    cache.text = CachedText(canvas.tokens.gather(1, slots), canvas.text_positions.gather(1, slots), lengths)
    cache.keep(max(lengths))
    return cache
