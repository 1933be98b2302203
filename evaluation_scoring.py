"""Scores text, laid out in generation order: in one pass, in chunks on a cache, or forced through decoding."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils.logging import tqdm

from .evaluation_plans import Texts
from .generation_cache import PreallocatedCache
from .generation_configuration import DEFAULT_NUM_CANDIDATES, EsoGenerationConfig
from .generation_decoding import Decisions, Decoder, Feed, Outputs
from .generation_plan import GenerationPlan
from .generation_sampling import TokenSampler
from .generation_unmasking import Drawer, ParallelUnmasking
from .modeling_drafting import EsoDraftHead, find_neighbours
from .modeling_inference import evaluation_mode
from .modeling_interface import EsoLM
from .modeling_objective import states_at
from .validation import is_number, require_positive_integer

LOGITS_AT_A_TIME = 2**26
"""Logits computed at a time: 256 MiB in float32."""


@dataclass
class Scored:
    """What is found of some slots.

    Args:
        rows, places: (scored,), where they are.
        log_probs: (scored,), log p of their tokens, in nats.
        is_greedy: (scored,), whether no token is more probable.
    """

    rows: torch.Tensor
    places: torch.Tensor
    log_probs: torch.Tensor
    is_greedy: torch.Tensor


@dataclass
class Budget:
    """How much a forward may hold.

    Args:
        batch_size: Rows; None: what the memory holds.
        memory: Bytes, roughly.
        chunk_length: Slots of a row, on top of a cache; None: all at once.

    Raises:
        ValueError: for numbers out of range.
    """

    batch_size: int | None
    memory: int
    chunk_length: int | None = None

    def __post_init__(self) -> None:
        require_positive_integer("batch_size", self.batch_size, or_none=True)
        require_positive_integer("chunk_length", self.chunk_length, or_none=True)
        if not is_number(self.memory) or not self.memory > 0:
            raise ValueError(f"`memory_budget` must be a positive number of bytes, got {self.memory!r}.")

    def batches(self, rows: int, bytes_per_row: int, title: str) -> Iterator[slice]:
        """Cuts so many rows into batches, and shows a progress bar if they take long."""
        size = self.batch_size or max(1, int(self.memory // max(bytes_per_row, 1)))
        for start in tqdm(range(0, rows, size), desc=title, delay=10):
            yield slice(start, min(start + size, rows))


@dataclass
class Layout:
    """Rows to score, in generation order.

    Args:
        input_ids, targets, position_ids, is_wanted: (rows, slots), what the model sees, the clean tokens, their text
            positions, and which are scored. (Rows of two streams see the clean tokens.)
        sequential_rows: (rows,) bool, which rows take two streams.
        group_starts: (rows, slots), of those rows, the first slot of the group of each slot.
    """

    input_ids: torch.Tensor
    targets: torch.Tensor
    position_ids: torch.Tensor
    is_wanted: torch.Tensor
    sequential_rows: torch.Tensor
    group_starts: torch.Tensor

    def __getitem__(self, rows: slice) -> "Layout":
        return Layout(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))


def score(
    model: EsoLM,
    layout: Layout,
    budget: Budget,
    title: str,
    sampler: TokenSampler,
    head: EsoDraftHead | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the targets at the wanted slots, batch by batch, in evaluation mode.

    A batch takes one forward, whatever the groups; or, with the `chunk_length` of the budget, one for each chunk.

    Args:
        model: An Eso-LM.
        layout: The rows.
        budget: How much a forward may hold.
        title: Of the progress bar.
        sampler: With which filters tokens are taken to be drawn; none of them looks at the text.
        head: The draft head, if tokens of a group know their neighbours; of rows of two streams alone.

    Returns:
        (rows, slots), log p of the target, in nats, 0 elsewhere; and whether it is the most probable token.
    """
    rows, slots = layout.targets.shape
    chunk_length = budget.chunk_length
    if chunk_length is not None:
        chunk_length = max(chunk_length, _longest_group(layout.group_starts))
    values = torch.zeros(rows, slots, dtype=torch.float32)
    is_greedy = torch.ones(rows, slots, dtype=torch.bool)
    with evaluation_mode(model), model.ready_to_decode():
        for batch in budget.batches(rows, _bytes_per_row(model, slots, chunk_length), title):
            part = layout[batch]
            if not part.is_wanted.any():
                continue
            if budget.chunk_length is None:
                scored = _score_at_once(model, part, sampler, head)
            else:
                scored = _score_chunks(model, part, sampler, head, budget.chunk_length)
            values[scored.rows + batch.start, scored.places] = scored.log_probs
            is_greedy[scored.rows + batch.start, scored.places] = scored.is_greedy
    return values, is_greedy


def score_by_decoding(
    model: EsoLM,
    texts: Texts,
    plan: GenerationPlan,
    budget: Budget,
    sampler: TokenSampler,
    settings: EsoGenerationConfig,
    head: EsoDraftHead | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same for samplers that look at what they have decided: texts are forced through the decoding loop.

    Args:
        model: An Eso-LM.
        texts: Rows of `length` tokens.
        plan: That of each row.
        budget, sampler: As for `score`.
        settings: Those of adaptive unmasking.
        head: The draft head, if tokens of a forward know their neighbours.

    Returns:
        (rows, length), log p of each token, in nats, 0 where given, by column; whether it is the most probable one;
        and (rows,), the forwards in which each row took part.
    """
    rows, length = texts.tokens.shape
    values = torch.zeros(rows, length, dtype=torch.float32)
    is_greedy = torch.ones(rows, length, dtype=torch.bool)
    num_forwards = torch.zeros(rows, dtype=torch.long)
    widest = _longest_group(plan.group_starts)
    if settings.is_adaptive:
        widest = min(widest, settings.num_candidates or DEFAULT_NUM_CANDIDATES)
    with evaluation_mode(model), model.ready_to_decode():
        for batch in budget.batches(rows, _bytes_per_row(model, length, widest), "Forced decoding"):
            canvas, step = texts[batch].canvas(), 0
            strategy = ForcedUnmasking(texts.tokens[batch], canvas, plan[batch], sampler, True, settings, head)
            decoder = Decoder(model, PreallocatedCache(model.config.num_hidden_layers, length))
            while not canvas.is_finished():
                step += 1
                strategy.decide(decoder(strategy.next_feed()), step)
            values[batch], is_greedy[batch] = strategy.values, strategy.is_greedy
            num_forwards[batch] = torch.tensor(strategy.num_forwards)
    return values, is_greedy, num_forwards


class ForcedUnmasking(ParallelUnmasking):
    """Decoding that decides what a text says, and takes note of how probable that was.

    Args:
        texts: (batch, length), clean tokens.
        arguments: Those of [`ParallelUnmasking`].
    """

    def __init__(self, texts: torch.Tensor, *arguments: Any):
        super().__init__(*arguments)
        self.texts = texts
        self.values = torch.zeros(texts.shape, dtype=torch.float32)
        self.is_greedy = torch.ones(texts.shape, dtype=torch.bool)
        self.num_forwards = [0] * len(texts)

    def drawer(self, rows: list[int], columns: list[int], device: torch.device) -> Drawer:
        texts = self.texts[rows, columns].to(device)
        return lambda scores, slots: texts[slots]

    def decide(self, outputs: Outputs, step: int) -> Decisions:
        decisions = super().decide(outputs, step)
        for row, width in enumerate(self.widths):
            self.num_forwards[row] += width > 0
        places = (decisions.rows, decisions.columns)
        self.values[places], self.is_greedy[places] = _judge(self.sampler, decisions.scores, self.texts[places])
        return decisions


def _judge(sampler: TokenSampler, scores: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """log p of tokens (slots,) under scores (slots, vocab), and whether they are the most probable; on the CPU."""
    tokens = tokens.to(scores.device)
    return sampler.log_probs(scores, tokens).cpu(), (scores.argmax(dim=-1) == tokens).cpu()


def _longest_group(group_starts: torch.Tensor) -> int:
    """The most slots of a group, of (rows, slots) first slots of groups."""
    slots = torch.arange(group_starts.shape[1])
    return int((slots - group_starts).max()) + 1 if group_starts.numel() > 0 else 1


def _bytes_per_row(model: EsoLM, slots: int, chunk_length: int | None) -> int:
    """Roughly, what a forward needs for a row: states of a layer, a mask or attention scores, a cache, logits."""
    config = model.config
    scores = config.num_attention_heads if config._attn_implementation == "eager" else 1
    if chunk_length is None:
        return 4 * 2 * slots * (12 * config.hidden_size + scores * 2 * slots)
    fed, cached = 2 * chunk_length, slots + chunk_length
    cache = 2 * config.num_hidden_layers * cached * config.hidden_size
    return 4 * (fed * (12 * config.hidden_size + scores * cached) + cache + chunk_length * config.vocab_size)


def _score_at_once(model: EsoLM, layout: Layout, sampler: TokenSampler, head: EsoDraftHead | None) -> Scored:
    """In one forward, of two streams where `sequential_rows` says so."""
    device = model.device
    labels = layout.targets.to(device)
    states, rows, slots = states_at(
        model,
        layout.is_wanted.to(device),
        layout.input_ids.to(device),
        None,
        layout.position_ids.to(device),
        None,  # padding is last
        labels,
        layout.sequential_rows.to(device),
        layout.group_starts.to(device),
    )
    teller = _Teller(head, layout, device)
    labels = labels[rows, slots]
    judged = []
    for part in torch.arange(len(states)).split(max(1, LOGITS_AT_A_TIME // model.config.vocab_size)):
        part = slice(int(part[0]), int(part[-1]) + 1)
        outputs = Outputs(model.compute_logits(states[part]).float(), states[part])
        scores = sampler.process(teller.correct(outputs, rows[part], slots[part]), None, [], [])
        judged.append(_judge(sampler, scores, labels[part]))
    log_probs, is_greedy = (torch.cat(parts) for parts in zip(*judged, strict=True))
    return Scored(rows.cpu(), slots.cpu(), log_probs, is_greedy)


def _score_chunks(
    model: EsoLM, layout: Layout, sampler: TokenSampler, head: EsoDraftHead | None, chunk_length: int
) -> Scored:
    """Rows of two streams, about `chunk_length` slots at a time on top of a cache.

    This is how lossless decoding judges its drafts: a forward takes the tokens, causal, and for each of them a mask
    that sees what is before its group, and the masks of its group up to itself. A group is not cut.
    """
    batch, length = layout.targets.shape
    mask_token_id = model.config.mask_token_id
    chunks = [list(_chunks(starts, chunk_length)) for starts in layout.group_starts.tolist()]
    largest = max(stop - start for row in chunks for start, stop in row)
    decoder = Decoder(model, PreallocatedCache(model.config.num_hidden_layers, length + largest))
    teller, scored = _Teller(head, layout, model.device), []
    for number in range(max(len(row) for row in chunks)):
        # Rows that are done feed nothing more.
        bounds = torch.tensor([row[number] if number < len(row) else (length, length) for row in chunks])
        starts, stops = bounds.unbind(dim=-1)
        sizes = stops - starts
        fed = torch.arange(2 * int(sizes.max())).expand(batch, -1)
        is_content = fed < sizes[:, None]
        slots = torch.where(is_content, fed, fed - sizes[:, None]) + starts[:, None]
        slots = slots.minimum(stops[:, None] - 1)
        group = layout.group_starts.gather(1, slots) - starts[:, None]
        is_own = (torch.arange(length) >= starts[:, None]) & (torch.arange(length) < stops[:, None])
        is_wanted = layout.is_wanted & is_own
        # Given tokens come first, and padding last: what is wanted is in one piece.
        first, count = is_wanted.long().argmax(dim=-1) - starts + sizes, is_wanted.sum(dim=-1)
        outputs = decoder(
            Feed(
                starts=starts.tolist(),
                input_ids=torch.where(is_content, layout.targets.gather(1, slots), mask_token_id),
                position_ids=layout.position_ids.gather(1, slots),
                num_fed=(2 * sizes).tolist(),
                kept=[
                    range(one, one + many) if many > 0 else range(0)
                    for one, many in zip(first.tolist(), count.tolist(), strict=True)
                ],
                horizon=torch.where(is_content, fed + 1, group),
                first_mask=torch.where(is_content, fed, sizes[:, None] + group),
            )
        )
        rows, places = is_wanted.nonzero().unbind(dim=-1)
        scores = sampler.process(teller.correct(outputs, rows, places), None, [], [])
        scored.append(Scored(rows, places, *_judge(sampler, scores, layout.targets[rows, places])))
    return Scored(*(torch.cat([getattr(part, name) for part in scored]) for name in Scored.__dataclass_fields__))


class _Teller:
    """Tells slots what the tokens of their group beside them are, as far as those are drawn before.

    Args:
        head: The draft head; None: they are not told.
        layout: The rows.
        device: Of the model.
    """

    def __init__(self, head: EsoDraftHead | None, layout: Layout, device: torch.device):
        self.head = head
        if head is not None:
            neighbours = find_neighbours(layout.position_ids, layout.group_starts, layout.is_wanted)
            self.tokens = layout.targets[:, None].expand(-1, 2, -1).gather(2, neighbours.slots.clamp(min=0).mT).mT
            self.distances, self.device = neighbours.distances, device

    def correct(self, outputs: Outputs, rows: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """The logits (some slots, vocab) of the slots at (rows, slots), each as it was drawn from."""
        if self.head is None or outputs.states is None:
            return outputs.logits
        rows, slots = rows.cpu(), slots.cpu()
        tokens, distances = self.tokens[rows, slots], self.distances[rows, slots]
        index = (distances > 0).any(dim=-1).nonzero()[:, 0]
        told = (tokens[index].to(self.device), distances[index].to(self.device))
        index = index.to(self.device)
        return outputs.logits.index_add(0, index, self.head(outputs.states[index], *told))


def _chunks(group_starts: list[int], chunk_length: int) -> Iterator[tuple[int, int]]:
    """Cuts the slots of a row into pieces of up to `chunk_length`, and longer ones where a group is longer."""
    ends = [*[slot for slot, start in enumerate(group_starts) if start == slot][1:], len(group_starts)]
    start = last = 0
    for end in ends:
        if end - start > chunk_length and last > start:
            yield start, last
            start = last
        last = end
    yield start, last
