"""One forward in which many texts, each of a session of its own, have a part."""

from itertools import accumulate

import torch

from .batching_memory import Lease
from .generation_cache import PreallocatedCache, SlotPlaces
from .generation_decoding import Feed, Outputs, narrow_mask
from .modeling_attention import widen_mask
from .modeling_interface import EsoLM
from .modeling_packing import TextsInPieces


class SharedForward:
    """Runs forwards for texts that all stand in one row of a cache, each in slots of its own.

    Args:
        model: An Eso-LM, which takes packed rows.
        num_slots: Of the cache, whose memory is there from now on.
    """

    def __init__(self, model: EsoLM, num_slots: int):
        self.model = model
        self.cache = PreallocatedCache(model.config.num_hidden_layers, num_slots)
        _write_one_slot(model, self.cache)

    @property
    def num_bytes(self) -> int:
        """Memory of the cache."""
        return _num_bytes(self.cache)

    @torch.no_grad()
    def __call__(self, feeds: list[Feed], leases: list[Lease]) -> list[Outputs]:
        """Runs a forward.

        Args:
            feeds: Of each text, as from a session of one row.
            leases: Of each text, its slots.

        Returns:
            What the forward says of the kept slots of each text.
        """
        counts = [feed.num_fed[0] for feed in feeds]
        stops = [feed.starts[0] + count for feed, count in zip(feeds, counts, strict=True)]
        places, pieces, masks = [], [], []
        for feed, lease, count, stop in zip(feeds, leases, counts, stops, strict=True):
            places.append(lease.places(stop - count, stop))
            pieces.append(lease.slices(0, stop))
            mask = narrow_mask(feed)
            if mask is None:
                mask = torch.ones(1, 1, count, count, dtype=torch.bool).tril()
            masks.append(widen_mask(mask, stop))  # once for all layers
        device = self.model.device
        input_ids, position_ids, cache_index = torch.stack(
            [
                torch.cat([feed.input_ids[0, :count] for feed, count in zip(feeds, counts, strict=True)]),
                torch.cat([feed.position_ids[0, :count] for feed, count in zip(feeds, counts, strict=True)]),
                torch.cat(places),
            ]
        ).to(device)
        first = accumulate(counts, initial=0)
        kept = [start + slot for start, feed in zip(first, feeds, strict=False) for slot in feed.kept[0]]
        last = max(piece.stop for of_text in pieces for piece in of_text)
        self.cache.keep(last, SlotPlaces(torch.zeros_like(cache_index)[None], cache_index[None], batch=1))
        output = self.model(
            input_ids=input_ids[None],
            position_ids=position_ids[None],
            # Each text has a mask of its own; this one keeps others from being made.
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),
            past_key_values=self.cache,
            logits_to_keep=torch.tensor(kept, dtype=torch.long, device=device)[None],
            packed_rows=TextsInPieces(counts, pieces, [mask.to(device) for mask in masks]),
        )
        widths = [len(feed.kept[0]) for feed in feeds]
        logits = output.logits[0].float().split(widths)
        states = [None] * len(feeds) if output.draft_states is None else output.draft_states[0].split(widths)
        return [Outputs(*outputs) for outputs in zip(logits, states, strict=True)]


def bytes_of_slot(model: EsoLM) -> int:
    """What the keys and values of a slot take, in bytes."""
    cache = PreallocatedCache(model.config.num_hidden_layers, max_length=1)
    _write_one_slot(model, cache)
    return _num_bytes(cache)


@torch.no_grad()
def _write_one_slot(model: EsoLM, cache: PreallocatedCache) -> None:
    nothing = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    model(input_ids=nothing, position_ids=nothing, past_key_values=cache)


def _num_bytes(cache: PreallocatedCache) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def require_packing(model: EsoLM) -> None:
    """Raises a ValueError if the attention of a model cannot tell texts apart that share a forward."""
    with model.ready_to_decode():
        takes_packed_rows = model.takes_packed_rows
    if not takes_packed_rows:
        raise ValueError(
            f"Continuous batching needs attention that tells the texts of a forward apart: load the model with "
            f'`attn_implementation="sdpa"`, got {model.model.config._attn_implementation!r}.'
        )
