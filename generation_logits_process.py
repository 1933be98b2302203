"""transformers' logits processors on slots that are drawn in any order.

Most processors of transformers look at each row of scores alone, or at the set of tokens so far: they run as they are,
with every slot as a row and the text known so far as its `input_ids`. Those that speak of neighbours or places in the
text are replaced by the ones here, which know where in the text a slot stands; left to right, both do the same.
"""

import itertools
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable
from typing import cast

import torch
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import logits_process as standard

from .generation_canvas import Canvas

# These look at the scores only, so that the text need not be gathered for them.
TEXT_FREE_PROCESSORS = (
    standard.TemperatureLogitsWarper,
    standard.TopHLogitsWarper,
    standard.TopKLogitsWarper,
    standard.TopPLogitsWarper,
    standard.MinPLogitsWarper,
    standard.TypicalLogitsWarper,
    standard.EpsilonLogitsWarper,
    standard.EtaLogitsWarper,
    standard.SuppressTokensLogitsProcessor,
    standard.InfNanRemoveLogitsProcessor,
    standard.LogitNormalization,
)


class SlotProcessor(ABC):
    """A processor that knows where in the text each slot stands."""

    @abstractmethod
    def __call__(self, canvas: Canvas, rows: list[int], columns: list[int], scores: torch.Tensor) -> torch.Tensor:
        """Processes scores (slots, vocab) of the slots at (rows, columns) of the canvas."""


class MinimumLength(SlotProcessor):
    """No end of text before a column: `min_length` and `min_new_tokens`."""

    def __init__(self, first_column: int, eos_token_ids: torch.Tensor):
        self.first_column, self.eos_token_ids = first_column, eos_token_ids

    def __call__(self, canvas: Canvas, rows: list[int], columns: list[int], scores: torch.Tensor) -> torch.Tensor:
        early = [index for index, column in enumerate(columns) if column < self.first_column]
        scores = scores.clone()
        scores[torch.tensor(early, dtype=torch.long)[:, None], self.eos_token_ids.cpu()] = -torch.inf
        return scores


class PhraseBias(SlotProcessor):
    """Adds to the score of a token that would complete a phrase: `bad_words_ids` and `sequence_bias`.

    In left-to-right decoding the token that completes a phrase is its last one; here it is the one that is missing.
    """

    def __init__(self, biases: dict[tuple[int, ...], float]):
        tokens = {phrase[0]: bias for phrase, bias in biases.items() if len(phrase) == 1}
        self.tokens, self.token_biases = torch.tensor(list(tokens), dtype=torch.long), torch.tensor([*tokens.values()])
        self.biases = {phrase: bias for phrase, bias in biases.items() if len(phrase) > 1}

    def __call__(self, canvas: Canvas, rows: list[int], columns: list[int], scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, self.tokens] += self.token_biases.to(scores)
        if not self.biases:
            return scores
        texts = {row: canvas.text_with_gaps(row) for row in set(rows)}
        for slot, (row, column) in enumerate(zip(rows, columns, strict=True)):
            place = int(canvas.text_positions[row, column])
            for phrase, bias in self.biases.items():
                for offset, token in enumerate(phrase):
                    if _others(texts[row], place, offset, len(phrase)) == phrase[:offset] + phrase[offset + 1 :]:
                        scores[slot, token] += bias
        return scores


class NoRepeatedNGram(SlotProcessor):
    """Forbids tokens that would complete an n-gram that the known text already has: `no_repeat_ngram_size`.

    Tokens that are drawn by the same forward do not see each other: among them a repetition may still arise.
    """

    def __init__(self, size: int):
        self.size = size
        # Of each row, the text seen last, and the completions of its n-grams: an offset and the other tokens of an
        # n-gram, mapped to the tokens that have stood at the offset between them.
        self.texts: dict[int, list[int]] = {}
        self.completions: dict[int, dict[tuple[int, tuple[int, ...]], set[int]]] = {}

    def __call__(self, canvas: Canvas, rows: list[int], columns: list[int], scores: torch.Tensor) -> torch.Tensor:
        if self.size > canvas.length:
            return scores  # there is no such n-gram
        for row in set(rows):
            self._learn(row, canvas.text_with_gaps(row))
        scores = scores.clone()
        for slot, (row, column) in enumerate(zip(rows, columns, strict=True)):
            forbidden = self._forbidden(row, int(canvas.text_positions[row, column]))
            scores[slot, sorted(forbidden)] = -torch.inf
        return scores

    def _learn(self, row: int, text: list[int]) -> None:
        """Adds the n-grams that have become known since the last call."""
        known_before = self.texts.get(row, [-1] * len(text))
        completions = self.completions.setdefault(row, defaultdict(set))
        new = [place for place, (old, token) in enumerate(zip(known_before, text, strict=True)) if old != token]
        starts = {place - offset for place in new for offset in range(self.size)}
        for start in starts:
            ngram = text[max(start, 0) : start + self.size]
            if start >= 0 and len(ngram) == self.size and -1 not in ngram:
                for offset, token in enumerate(ngram):
                    completions[offset, (*ngram[:offset], *ngram[offset + 1 :])].add(token)
        self.texts[row] = text

    def _forbidden(self, row: int, place: int) -> set[int]:
        text, completions = self.texts[row], self.completions[row]
        windows = [
            (offset, others)
            for offset in range(self.size)
            if (others := _others(text, place, offset, self.size)) is not None and -1 not in others
        ]
        forbidden = set().union(*(completions.get(window, ()) for window in windows))
        # A token may also complete two n-grams at once that are the same; it then equals one of its neighbours.
        for token in {token for _, others in windows for token in others}:
            ngrams = {(*others[:offset], token, *others[offset:]) for offset, others in windows}
            if len(ngrams) < len(windows):
                forbidden.add(token)
        return forbidden


class AllowedTokens(SlotProcessor):
    """Allows the tokens that a function of the row and its known text names: `prefix_allowed_tokens_fn`."""

    def __init__(self, allowed_tokens: Callable[[int, torch.Tensor], list[int]]):
        self.allowed_tokens = allowed_tokens

    def __call__(self, canvas: Canvas, rows: list[int], columns: list[int], scores: torch.Tensor) -> torch.Tensor:
        allowed = {row: list(self.allowed_tokens(row, canvas.known_text(row))) for row in set(rows)}
        mask = torch.full_like(scores, -torch.inf)
        for slot, row in enumerate(rows):
            mask[slot, allowed[row]] = 0
        return scores + mask


def _others(text: list[int], place: int, offset: int, size: int) -> tuple[int, ...] | None:
    """The tokens around `place` in the window of `size` tokens that has it at `offset`; None if it leaves the text."""
    start = place - offset
    if start < 0 or start + size > len(text):
        return None
    return (*text[start:place], *text[place + 1 : start + size])


def for_slots(logits_processor: LogitsProcessorList, vocab_size: int) -> list[LogitsProcessor | SlotProcessor]:
    """Replaces the processors that speak of neighbours or places in the text by their counterparts for slots.

    Raises:
        ValueError: for ids that are not in the vocabulary.
    """
    return [_for_slots(processor, vocab_size) for processor in logits_processor]


def _for_slots(processor: LogitsProcessor, vocab_size: int) -> LogitsProcessor | SlotProcessor:
    # Exactly these classes: what others have made of them is theirs.
    if type(processor) is standard.RepetitionPenaltyLogitsProcessor:
        # transformers has it skip each prompt's padding, which the text known so far does not have.
        skips_padding = isinstance(processor.prompt_ignore_length, torch.Tensor)
        return standard.RepetitionPenaltyLogitsProcessor(processor.penalty) if skips_padding else processor
    if type(processor) is standard.NoRepeatNGramLogitsProcessor:
        return NoRepeatedNGram(processor.ngram_size)
    if (
        type(processor) is standard.SequenceBiasLogitsProcessor
        or type(processor) is standard.NoBadWordsLogitsProcessor
    ):
        phrases = dict(processor.sequence_bias)
        for token_id in itertools.chain(*phrases):
            if not 0 <= token_id < vocab_size:
                raise ValueError(
                    f"`bad_words_ids` and `sequence_bias` must hold ids in [0, {vocab_size - 1}], got {token_id}."
                )
        return PhraseBias(phrases)
    if type(processor) is standard.MinLengthLogitsProcessor:
        return MinimumLength(processor.min_length, processor.eos_token_id)
    if type(processor) is standard.MinNewTokensLengthLogitsProcessor:
        first_column = processor.prompt_length_to_skip + processor.min_new_tokens
        return MinimumLength(first_column, processor.eos_token_id)
    if type(processor) is standard.PrefixConstrainedLogitsProcessor:
        return AllowedTokens(processor._prefix_allowed_tokens_fn)
    return processor


def process_logits(
    processors: list[LogitsProcessor | SlotProcessor],
    logits: torch.Tensor,
    canvas: Canvas | None,
    rows: list[int],
    columns: list[int],
) -> torch.Tensor:
    """Applies the processors to logits (slots, vocab) of the slots at (rows, columns) of the canvas.

    Those of `TEXT_FREE_PROCESSORS` need no canvas.
    """
    scores = logits
    contexts = None
    for processor in processors:
        if isinstance(processor, SlotProcessor):
            scores = processor(cast(Canvas, canvas), rows, columns, scores)
        elif type(processor) in TEXT_FREE_PROCESSORS:
            scores = processor(None, scores)
        else:
            contexts = contexts or _contexts(cast(Canvas, canvas), rows, scores.device)
            processed = torch.empty_like(scores)
            for slots, text in contexts:
                processed[slots] = processor(text, scores[slots])
            scores = processed
    return scores


def _contexts(canvas: Canvas, rows: list[int], device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The text known so far as `input_ids` of a processor, once for each length: pairs of slots and their texts."""
    texts = {row: canvas.known_text(row) for row in set(rows)}
    slots_of_length = defaultdict(list)
    for slot, row in enumerate(rows):
        slots_of_length[len(texts[row])].append(slot)
    return [
        (torch.tensor(slots, device=device), torch.stack([texts[rows[slot]] for slot in slots]).to(device))
        for slots in slots_of_length.values()
    ]
