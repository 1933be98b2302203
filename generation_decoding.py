"""A decoding step: slots fed on top of the cache, a forward, and the tokens that are decided with its logits."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, cast

import torch
from transformers.cache_utils import Cache
from transformers.masking_utils import BlockMask

from .generation_cache import PreallocatedCache, SlotPlaces
from .generation_plan import GenerationPlan
from .modeling_attention import make_attention_mask
from .modeling_drafting import EsoLMOutput
from .modeling_interface import EsoLM
from .modeling_packing import PackedRows

MAX_COMPILED_SLOTS = 128
"""Slots of a row up to which a step on a static cache is rounded up to a power of two of them and may be compiled."""

KEYS_AT_A_TIME = 256
"""Cached slots by which the keys of such steps grow."""


@dataclass
class Feed:
    """What the rows of a batch feed to a forward. Rows that feed less than others repeat their last slot.

    Args:
        starts: Of each row, the slots in front that are cached; the fed ones are written behind them.
        input_ids, position_ids: (batch, fed), on the host.
        num_fed: Of each row, the slots that count.
        kept: Of each row, the indices of the slots whose logits are wanted, ascending.
        horizon: (batch, fed), the number of fed slots, from the first, that each one sees; None: up to its own.
        first_mask: (batch, fed), with `horizon`: each slot also sees those from this one to its own.
    """

    starts: list[int]
    input_ids: torch.Tensor
    position_ids: torch.Tensor
    num_fed: list[int]
    kept: list[range]
    horizon: torch.Tensor | None = None
    first_mask: torch.Tensor | None = None


@dataclass
class Outputs:
    """What a forward says of the kept slots of all rows, row by row.

    Args:
        logits: (kept, vocab), in float32.
        states: (kept, hidden), behind the logits; None without a draft head.
    """

    logits: torch.Tensor
    states: torch.Tensor | None


@dataclass
class Decisions:
    """Tokens that a forward has decided; the canvas knows them already.

    Args:
        rows, columns: Where they stand.
        scores, logits: (decided, vocab), from which each was drawn: after and before the logits processors.
    """

    rows: list[int]
    columns: list[int]
    scores: torch.Tensor
    logits: torch.Tensor


class DecodingStrategy(ABC):
    """Says what is fed to each forward, and decides with its logits."""

    in_lockstep = False
    """Whether all rows stand at the same place in every step."""

    plan: GenerationPlan
    """What each row began with."""

    order: torch.Tensor
    """(batch, length), the column of the token at each slot; those of decided slots change no more."""

    cached: list[int]
    """Of each row, the slots in front whose keys and values are cached."""

    @abstractmethod
    def next_feed(self) -> Feed:
        """What the next forward gets."""

    @abstractmethod
    def decide(self, outputs: Outputs, step: int) -> Decisions:
        """Decides tokens with what forward number `step` says of the kept slots of all rows."""

    def drafted(self, row: int) -> dict[int, int]:
        """The tokens that the next forward judges, by column."""
        return {}

    def statistics(self) -> dict[str, list[int]]:
        """What else `generate` reports of each row, by the names of [`EsoGenerateOutput`]."""
        return {}


class Decoder:
    """Runs forwards on top of a cache, in the cheapest way that the rows of a batch allow.

    Rows that stand at the same place and feed as many slots need no mask, or one of their own slots alone. Others are
    packed, one behind the other, so that none pays for the slots of another. Steps of static shape, and attention that
    does not know packed rows, take padded ones, with a mask of the length of the cache.

    Args:
        model: An Eso-LM.
        cache: A [`PreallocatedCache`]; another cache, if all rows stand at the same place in every step; or None.
        compiled_forward: Runs the steps that have a static shape, if the cache is compileable. The first forward,
            which may hold a prompt, and those of more than `MAX_COMPILED_SLOTS` a row are run as they are.
    """

    def __init__(self, model: EsoLM, cache: Cache | None, compiled_forward: Callable | None = None):
        self.model, self.cache = model, cache
        self.compiled_forward = compiled_forward or model

    @torch.no_grad()
    def __call__(self, feed: Feed) -> Outputs:
        """Runs a forward."""
        is_static = self._has_static_shape(feed.input_ids.shape[1])
        is_uniform = len(set(feed.starts)) == 1 and len(set(feed.num_fed)) == 1
        if not is_static and (self.cache is None or is_uniform):
            return self._run_uniform(feed)
        if not is_static and self.model.takes_packed_rows:
            return self._run_packed(feed)
        return self._run_padded(feed, is_static)

    def _run_uniform(self, feed: Feed) -> Outputs:
        """Rows that stand at the same place; without a cache, what some of them feed less is padding behind."""
        _rewind(self.cache, feed.starts[0])
        slots_to_keep = _slots_to_keep(feed, feed.input_ids.shape[1])
        mask = narrow_mask(feed)
        mask = None if mask is None else mask.to(self.model.device)
        output = self._forward(self.model, feed.input_ids, feed.position_ids, mask, slots_to_keep)
        return _of_kept_slots(cast(torch.Tensor, output.logits), output.draft_states, feed)

    def _run_packed(self, feed: Feed) -> Outputs:
        """Rows that advance apart: their slots one behind the other."""
        padded, starts = torch.arange(feed.input_ids.shape[1]).expand(feed.input_ids.shape), torch.tensor(feed.starts)
        rows, own = (padded < torch.tensor(feed.num_fed)[:, None]).nonzero().unbind(dim=-1)
        first = list(accumulate(feed.num_fed, initial=0))
        kept = [first[row] + slot for row, slots in enumerate(feed.kept) for slot in slots]
        num_keys = [start + count for start, count in zip(feed.starts, feed.num_fed, strict=True)]
        row_index, slot_index, cache_index = torch.stack([rows, own, own + starts[rows]]).to(self.model.device)
        cast(PreallocatedCache, self.cache).keep(
            max(num_keys), SlotPlaces(row_index[None], cache_index[None], batch=len(feed.num_fed))
        )
        output = self._forward(
            self.model,
            feed.input_ids[rows, own][None],
            feed.position_ids[rows, own][None],
            self._wide_mask(feed, padded, starts[:, None], max(num_keys)),
            torch.tensor(kept, dtype=torch.long)[None],
            packed_rows=PackedRows(feed.num_fed, num_keys, row_index, slot_index),
        )
        logits, states = cast(torch.Tensor, output.logits), output.draft_states
        return Outputs(logits[0].float(), None if states is None else states[0])

    def _run_padded(self, feed: Feed, is_static: bool) -> Outputs:
        """Rows that are filled up to the same number of slots, with the last that counts once more."""
        cache = cast(PreallocatedCache, self.cache)
        batch, num_slots = feed.input_ids.shape
        if is_static:
            num_slots = max(_next_power_of_two(num_slots), 2 * _next_power_of_two(_most_kept(feed)))
        own = torch.arange(num_slots).expand(batch, num_slots)
        own = own.minimum(torch.tensor(feed.num_fed)[:, None] - 1).clamp(min=0)
        # Rows that feed nothing write their last cached slot once more, as it was.
        starts = torch.tensor(feed.starts)[:, None] - (torch.tensor(feed.num_fed)[:, None] == 0).long()
        starts = starts.clamp(min=0)
        num_keys = max(start + fed for start, fed in zip(feed.starts, feed.num_fed, strict=True))
        if is_static:
            num_keys = min(cache.max_length, math.ceil(num_keys / KEYS_AT_A_TIME) * KEYS_AT_A_TIME)
        device = self.model.device
        rows = torch.arange(batch, device=device)[:, None]
        cache.keep(num_keys, SlotPlaces(rows, (starts + own).to(device), batch))
        output = self._forward(
            self.compiled_forward if is_static else self.model,
            feed.input_ids.gather(1, own),
            feed.position_ids.gather(1, own),
            self._wide_mask(feed, own, starts, num_keys),
            _slots_to_keep(feed, num_slots, is_static),
        )
        logits, states = cast(torch.Tensor, output.logits), output.draft_states
        if is_static:
            # A CUDA graph will write its next outputs to the same place.
            logits, states = logits.clone(), None if states is None else states.clone()
        return _of_kept_slots(logits, states, feed)

    def _forward(
        self,
        forward: Callable,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | BlockMask | None,
        slots_to_keep: torch.Tensor,
        **kwargs: Any,
    ) -> EsoLMOutput:
        """A forward, from tensors of the host."""
        device = self.model.device
        input_ids, position_ids = torch.stack([input_ids, position_ids]).to(device)
        return forward(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
            past_key_values=self.cache,
            logits_to_keep=slots_to_keep.to(device),
            **kwargs,
        )

    def _has_static_shape(self, num_slots: int) -> bool:
        cache = self.cache
        is_compileable = isinstance(cache, PreallocatedCache) and cache.is_compileable and cache.is_initialized
        return is_compileable and num_slots <= MAX_COMPILED_SLOTS

    def _wide_mask(
        self, feed: Feed, own: torch.Tensor, starts: torch.Tensor, num_keys: int
    ) -> torch.Tensor | BlockMask:
        """What each fed slot sees of the cached ones (all of its row) and of the fed ones."""
        device, last = self.model.device, own + starts
        if feed.horizon is None or feed.first_mask is None:
            last = last.to(device)

            def sees(row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
                return key <= last[row, query]

        else:
            horizon, first = feed.horizon.gather(1, own) + starts, feed.first_mask.gather(1, own) + starts
            horizon, first, last = torch.stack([horizon, first, last]).to(device)

            def sees(row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
                return (key < horizon[row, query]) | ((first[row, query] <= key) & (key <= last[row, query]))

        batch, fed = own.shape
        return make_attention_mask(self.model.model.config, sees, batch, fed, num_keys, self.model.dtype, device)


def narrow_mask(feed: Feed) -> torch.Tensor | None:
    """What each fed slot sees of the fed ones, (batch, 1, fed, fed), on the host; all of them see what is cached.

    None: those up to itself.
    """
    if feed.horizon is None or feed.first_mask is None:
        return None
    key = torch.arange(feed.horizon.shape[1])
    is_earlier_mask = (feed.first_mask[..., None] <= key) & (key <= key[:, None])
    return ((key < feed.horizon[..., None]) | is_earlier_mask)[:, None]


def _most_kept(feed: Feed) -> int:
    return max(len(kept) for kept in feed.kept)


def _slots_to_keep(feed: Feed, num_slots: int, is_static: bool = False) -> torch.Tensor:
    """(batch, kept), the slots whose logits are wanted; rows that want fewer have further ones behind."""
    num_kept = _next_power_of_two(_most_kept(feed)) if is_static else _most_kept(feed)
    first = torch.tensor([kept.start for kept in feed.kept])[:, None]
    return (first + torch.arange(num_kept)).clamp(max=num_slots - 1)


def _of_kept_slots(logits: torch.Tensor, states: torch.Tensor | None, feed: Feed) -> Outputs:
    """From (batch, kept, ...) to (kept slots of all rows, ...)."""
    num_kept = torch.tensor([len(kept) for kept in feed.kept])[:, None]
    is_kept = (torch.arange(logits.shape[1]) < num_kept).flatten()
    logits, states = logits.float().flatten(0, 1), None if states is None else states.flatten(0, 1)
    if is_kept.all():
        return Outputs(logits, states)
    index = is_kept.nonzero()[:, 0].to(logits.device)
    return Outputs(logits[index], None if states is None else states[index])


def _rewind(cache: Cache | None, length: int) -> None:
    """Forgets all slots of a cache but the first `length`."""
    if isinstance(cache, PreallocatedCache):
        cache.keep(length)
    elif cache is not None and cache.get_seq_length() > length:
        cache.crop(length - cache.get_seq_length())


def _next_power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
