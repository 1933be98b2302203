"""Tokens that are drawn together, and what they know of one another: the draft head, and how it is trained.

The masks of a forward do not see which tokens the others become. A draft head tells them, at the price of a few small
products: drawn one after the other, each token is drawn from the logits of its mask and a correction that looks up the
tokens drawn just before, at its left and at its right. What the model says of a single mask stays as it is, so that
the head is no part of its exact conditionals: it proposes drafts, and draws the tokens of parallel steps.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_eso import EsoConfig
from .modeling_inference import evaluation_mode
from .modeling_interface import EsoLM
from .modeling_objective import IGNORED_LABEL, states_at

MAX_DISTANCE = 4
"""Tokens of the text up to which two of those drawn together are neighbours."""


@dataclass
class EsoLMOutput(CausalLMOutputWithPast):
    """What a forward returns: transformers' `CausalLMOutputWithPast`, and what a draft head goes by.

    Args:
        draft_states: (batch, slots kept, hidden), the states behind the logits; None without a draft head.
    """

    draft_states: torch.Tensor | None = None


@dataclass
class Neighbours:
    """Of slots that are drawn together, those drawn before them that stand nearest in the text.

    Args:
        slots: (..., slots, 2), the slot of the neighbour at the left, and of the one at the right; -1: there is none.
        distances: (..., slots, 2), how far from it in the text, 1 to `MAX_DISTANCE`; 0: there is none.
    """

    slots: torch.Tensor
    distances: torch.Tensor

    @property
    def exist(self) -> torch.Tensor:
        """(..., slots) bool, whether there is any."""
        return (self.distances > 0).any(dim=-1)


def find_neighbours(positions: torch.Tensor, group_starts: torch.Tensor, is_drawn: torch.Tensor) -> Neighbours:
    """The neighbours of each slot among those of its group that come before it.

    Args:
        positions: (rows, slots), text positions; those of drawn slots differ.
        group_starts: (rows, slots), the first slot of the group of each one.
        is_drawn: (rows, slots) bool, which are drawn; the others are no neighbours and have none.
    """
    rows, slots = positions.shape
    device = positions.device
    own = torch.arange(slots, device=device)[:, None, None]
    # Which slot holds a position of the text; what is not drawn goes to a place that nobody looks at.
    width = (int(positions.max()) if positions.numel() else 0) + 1 + 2 * MAX_DISTANCE
    places = torch.where(is_drawn, positions + MAX_DISTANCE, width)
    slot_at = torch.full((rows, width + 1), slots, device=device)
    slot_at.scatter_(1, places, own[:, 0, 0].expand(rows, slots))
    distances = torch.arange(1, MAX_DISTANCE + 1, device=device)
    offsets = MAX_DISTANCE + torch.stack([-distances, distances])  # (2, distances), left and right
    slot = slot_at.gather(1, (positions[..., None, None] + offsets).flatten(1)).view(rows, slots, 2, MAX_DISTANCE)
    is_found = (slot < own) & (slot >= group_starts[..., None, None]) & is_drawn[..., None, None]
    exists, nearest = is_found.max(dim=-1)
    slot = slot.gather(-1, nearest[..., None])[..., 0]
    return Neighbours(slot.masked_fill(~exists, -1), (nearest + 1) * exists)


class EsoDraftHead(nn.Module):
    """A correction to the logits of a mask, for the tokens drawn beside it by the same forward.

    It is V silu(S h + U[left] + U'[right] + D), of low rank: h is the state of the mask, D says how far the neighbours
    are. All that depends on the tokens is looked up, so that a turn of drawing costs one product, rank x vocabulary.

    Args:
        config: Whose `draft_rank` is its width.
        state_size: Width of the hidden states that the logits come from.
    """

    def __init__(self, config: EsoConfig, state_size: int):
        super().__init__()
        rank: int = config.draft_rank  # type: ignore[assignment]  # the model makes a head only if there is one
        self.mask_token_id = config.mask_token_id
        self.left_embedding = nn.Embedding(config.vocab_size, rank)
        self.right_embedding = nn.Embedding(config.vocab_size, rank)
        self.distance_embedding = nn.Embedding((MAX_DISTANCE + 1) ** 2, rank)
        self.state_proj = nn.Linear(state_size, rank)
        self.vocab_proj = nn.Linear(rank, config.vocab_size, bias=False)

    def init_weights(self, module: nn.Module) -> None:
        """What tokens say begins large enough to be heard beside the states; and a fresh head changes nothing."""
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=0.5)
        elif module is self.vocab_proj:
            init.zeros_(module.weight)

    def forward(self, states: torch.Tensor, tokens: torch.Tensor, distances: torch.Tensor) -> torch.Tensor:
        """What to add to the logits of slots that have neighbours.

        Args:
            states: (slots, hidden), of their masks.
            tokens: (slots, 2), the neighbours at the left and at the right; anything where there is none.
            distances: (slots, 2), as in [`Neighbours`].

        Returns:
            (slots, vocab), in float32.
        """
        tokens = tokens.masked_fill(distances == 0, self.mask_token_id)
        return self.correct(self.prepare(states, distances), tokens)

    def prepare(self, states: torch.Tensor, distances: torch.Tensor) -> torch.Tensor:
        """(slots, rank), what does not depend on the tokens, for all turns at once."""
        both = distances[..., 0] * (MAX_DISTANCE + 1) + distances[..., 1]
        # The head may be of another type than the body that it is trained for.
        return self.state_proj(states.to(self.state_proj.weight.dtype)) + self.distance_embedding(both)

    def correct(self, prepared: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """(slots, vocab), from what was prepared and the neighbours (slots, 2), the mask where there is none."""
        left, right = tokens.unbind(dim=-1)
        inner = prepared + self.left_embedding(left) + self.right_embedding(right)
        return self.vocab_proj(F.silu(inner)).float()

    @torch.no_grad()
    def resize(self, vocab_size: int) -> None:
        """Cuts the vocabulary off, or lets it grow; new tokens are corrected, and correct, once they are trained."""
        for module in (self.left_embedding, self.right_embedding, self.vocab_proj):
            rows = module.weight[:vocab_size]
            weight = rows.new_zeros(vocab_size, rows.shape[1])
            weight[: len(rows)] = rows
            module.weight = nn.Parameter(weight, requires_grad=module.weight.requires_grad)
        self.left_embedding.num_embeddings = self.right_embedding.num_embeddings = vocab_size
        self.vocab_proj.out_features = vocab_size


@torch.compiler.disable(recursive=False)
def draft_loss(
    model: EsoLM,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    labels: torch.Tensor,
    draft_starts: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """How far the draft head is from the model's own conditionals: KL(p || q) of what it corrects, in nats per label.

    p is what the model says of a token that it knows all before, q what its draft is drawn from, given the clean
    tokens before the draft, and the head's correction for those in it. (An acceptance is 1 - TV(p, q).) The model
    itself gets no gradient from it: it is p's teacher as well as q's body.

    Args:
        model: An `EsoForMaskedDiffusion` with a draft head.
        input_ids: (batch, slots), in generation order; clean where labels are not given.
        position_ids: (batch, slots), text positions.
        labels: (batch, slots), the clean tokens, -100 at prompt and padding.
        draft_starts: (batch, slots), the first slot of the draft of each one.
        num_items_in_batch: What the sum is divided by; None: the number of labels.
        kwargs: For the backbone.

    Returns:
        A scalar.

    Raises:
        ValueError: without a head, and for drafts that begin behind a slot of theirs.
    """
    head = require_draft_head(model, "A batch with `draft_starts` trains a draft head")
    own = torch.arange(labels.shape[1], device=labels.device)
    is_drawn = labels != IGNORED_LABEL
    tokens = torch.where(is_drawn, labels, input_ids)
    starts = torch.where(is_drawn, draft_starts, own)
    if ((starts < 0) | (starts > own)).any():
        raise ValueError("`draft_starts` must be slots from 0 to that of the token itself, the first of its draft.")
    neighbours = find_neighbours(position_ids, starts, is_drawn)
    is_corrected = neighbours.exist
    two_streams = torch.ones(len(labels), dtype=torch.bool, device=labels.device)
    arguments = (tokens, None, position_ids, None, tokens, two_streams)
    with torch.no_grad(), evaluation_mode(model):
        states, rows, slots = states_at(model, is_drawn, *arguments, group_starts=starts, **kwargs)
        exact_states, _, _ = states_at(model, is_corrected, *arguments, **kwargs)
        index = is_corrected[rows, slots].nonzero()[:, 0]
        states, rows, slots = states[index], rows[index], slots[index]
        logits = model.compute_logits(states).float()
        p = model.compute_logits(exact_states).float().log_softmax(dim=-1)
    beside = neighbours.slots[rows, slots].clamp(min=0)
    q = logits + head(states, tokens[rows[:, None], beside], neighbours.distances[rows, slots])
    # The mask is never drawn: both give it nothing, and -inf - -inf is no number.
    divergence = (p.exp() * (p - q.log_softmax(dim=-1)).masked_fill(p == -torch.inf, 0)).sum()
    return divergence / (is_drawn.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)


def require_draft_head(model: EsoLM, reason: str) -> EsoDraftHead:
    """The draft head of a model.

    Args:
        model: An `EsoForMaskedDiffusion`.
        reason: What asks for it, as the error begins.

    Raises:
        ValueError: when it has none.
    """
    if model.draft_head is None:
        raise ValueError(
            f"{reason}, and the model has no draft head: load it with `from_pretrained(..., draft_rank=128)`, and "
            f"train the head (examples/train_draft_head.py)."
        )
    return model.draft_head
