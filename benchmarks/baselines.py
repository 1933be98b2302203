"""The systems that the paper compares Eso-LMs with, on the layers of an Eso-LM: a forward and a decoding loop each.

All run the same layers at the same sizes, each with the attention that defines it. Trained or not, they cost the same;
`speed.py` measures that. The loop that draws a text also scores a given one: a plan says which places each forward
decides, and their tokens are independent given what it sees, so that log p(x | plan) is the sum over its forwards.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

from eso_lm import EsoForMaskedDiffusion
from eso_lm.generation_cache import PreallocatedCache
from eso_lm.generation_order import plan_generation
from eso_lm.generation_sampling import draw_tokens, draw_uniform

Chooser = Callable[[torch.Tensor, torch.LongTensor], torch.LongTensor]
"""The tokens of a forward, (batch, count): of their logits, (batch, count, vocab), and their places in the text."""


Steps = int | Literal["max"]
"""Time steps; "max": so many that no two tokens share one."""


def draw(logits: torch.Tensor, places: torch.LongTensor | None = None) -> torch.LongTensor:
    """Draws a token from logits (..., vocab), as `generate` does; it makes no difference where it stands."""
    flat = logits.float().flatten(0, -2)
    uniform = draw_uniform([len(flat)], None, flat.device)
    return draw_tokens(flat, uniform).view(logits.shape[:-1])


def planned_places(
    batch: int, length: int, num_steps: Steps, unmasking_order: str, device: torch.device
) -> Iterator[torch.LongTensor]:
    """The places, (batch, count), that each forward decides, planned as `generate` plans them at α_0 = 1."""
    order, counts = plan_generation(batch, length, 1.0, num_steps, unmasking_order)
    return iter(order.to(device).split(counts, dim=1))


def text_positions(input_ids: torch.LongTensor, first: int = 0) -> torch.LongTensor:
    """Positions of slots that stand in text order, (batch, slots), from `first` on."""
    return torch.arange(first, first + input_ids.shape[1], device=input_ids.device).expand_as(input_ids)


class TextScorer:
    """Chooses the tokens of a text, (batch, length), and adds up what log-probability they have, in nats, (batch,)."""

    def __init__(self, text: torch.LongTensor):
        self.text = text
        self.log_likelihood = torch.zeros(len(text), dtype=torch.float64, device=text.device)

    def __call__(self, logits: torch.Tensor, places: torch.LongTensor) -> torch.LongTensor:
        tokens = self.text.gather(1, places)
        log_probs = logits.float().log_softmax(dim=-1).gather(-1, tokens[..., None])
        self.log_likelihood += log_probs.double().sum(dim=(1, 2))
        return tokens


class Sampler:
    """A decoding loop, which draws or scores.

    Its `steps(batch, length, **plan, choose=draw)` yields the tokens after each forward, (batch, length). `plan`, of
    all but the autoregressive one, says how the places are shared out over the forwards: `num_steps`, and
    `unmasking_order`, an order of `generate` (in MDLM and BD3-LM: "random").
    """

    steps: Callable[..., Iterator[torch.LongTensor]]

    def log_likelihood(self, text: torch.LongTensor, **plan: Any) -> tuple[torch.Tensor, int]:
        """Scores clean texts, (batch, length), under a plan that is drawn as for samples, from the global generator.

        Returns:
            log p(x | plan), (batch,), in nats, exact; and the forwards, as many as a sample with this plan takes. Rows
            share the number of places of each forward, as those of a sample do; each has places of its own.
        """
        scorer = TextScorer(text)
        forwards = sum(1 for _ in self.steps(*text.shape, **plan, choose=scorer))
        return scorer.log_likelihood, forwards


class AutoregressiveSampler(Sampler):
    """Left to right with a KV cache: the output at slot s predicts token s + 1, one slot a step."""

    def __init__(self, model: EsoForMaskedDiffusion, start_token_id: int = 0):
        self.model, self.start_token_id = model, start_token_id

    def forward(self, input_ids: torch.LongTensor, first: int, cache: PreallocatedCache | None) -> torch.Tensor:
        """Logits of the last slot, (batch, vocab), for slots that begin at position `first`."""
        positions = text_positions(input_ids, first)
        return self.model(input_ids, position_ids=positions, past_key_values=cache, logits_to_keep=1).logits[:, -1]

    @torch.no_grad()
    def steps(self, batch: int, length: int, choose: Chooser = draw) -> Iterator[torch.LongTensor]:
        """Yields the tokens after each forward, (batch, length)."""
        cache = filled_cache(self.model, batch, length + 1, context=0)
        tokens = torch.full((batch, length + 1), self.start_token_id, device=self.model.device)
        places = text_positions(tokens)
        for place in range(length):
            here, following = slice(place, place + 1), slice(place + 1, place + 2)
            logits = self.forward(tokens[:, here], place, cache)
            tokens[:, following] = choose(logits[:, None], places[:, here])
            yield tokens[:, 1:]


class MaskedDiffusionSampler(Sampler):
    """Bidirectional attention, no cache: every step is a pass over the whole text (MDLM's ancestral sampler).

    Logits are computed at the places that are revealed only, and a step that reveals nothing costs no pass: more than
    the usual implementations spare.
    """

    def __init__(self, model: EsoForMaskedDiffusion):
        self.model = model

    def forward(self, input_ids: torch.LongTensor, places: torch.LongTensor | int = 0) -> torch.Tensor:
        """Logits of a text (batch, length), at `places` (batch, count) or everywhere."""
        with bidirectional(self.model):
            return self.model(input_ids, position_ids=text_positions(input_ids), logits_to_keep=places).logits

    @torch.no_grad()
    def steps(
        self, batch: int, length: int, num_steps: Steps, unmasking_order: str = "random", choose: Chooser = draw
    ) -> Iterator[torch.LongTensor]:
        """Yields the tokens after each forward, (batch, length)."""
        device = self.model.device
        tokens = torch.full((batch, length), self.model.config.mask_token_id, device=device)
        for places in planned_places(batch, length, num_steps, unmasking_order, device):
            tokens.scatter_(1, places, choose(self.forward(tokens, places), places))
            yield tokens


class BlockDiffusionSampler(Sampler):
    """Bidirectional inside a block, causal over blocks; complete blocks are cached (BD3-LM).

    Each step is a pass over the block on top of the cache; a last pass over the clean block fills the cache.
    """

    def __init__(self, model: EsoForMaskedDiffusion, block_length: int):
        self.model, self.block_length = model, block_length

    def forward(
        self, input_ids: torch.LongTensor, first: int, cache: PreallocatedCache, places: torch.LongTensor | int = 0
    ) -> torch.Tensor:
        """Logits of a block (batch, block length) that begins at position `first`, with `first` tokens cached."""
        length = input_ids.shape[1]
        cache.keep(first)
        return self.model(
            input_ids,
            position_ids=text_positions(input_ids, first),
            # Of the block's own slots; all cached ones are visible.
            attention_mask=torch.ones(1, 1, length, length, dtype=torch.bool, device=input_ids.device),
            past_key_values=cache,
            logits_to_keep=places,
        ).logits

    @torch.no_grad()
    def steps(
        self, batch: int, length: int, num_steps: Steps, unmasking_order: str = "random", choose: Chooser = draw
    ) -> Iterator[torch.LongTensor]:
        """Yields the tokens after each forward, (batch, length); `num_steps` and the order are those of each block."""
        device = self.model.device
        cache = filled_cache(self.model, batch, length, context=0)
        tokens = torch.full((batch, length), self.model.config.mask_token_id, device=device)
        for first in range(0, length, self.block_length):
            block = tokens[:, first : first + self.block_length]
            for places in planned_places(*block.shape, num_steps, unmasking_order, device):
                block.scatter_(1, places, choose(self.forward(block, first, cache, places), first + places))
                yield tokens
            if first + self.block_length < length:
                self.forward(block, first, cache, places=1)
                yield tokens


@contextmanager
def bidirectional(model: EsoForMaskedDiffusion) -> Iterator[None]:
    """Lets every slot see all others, without a mask that would have to be read (with sdpa)."""
    if model.config._attn_implementation != "sdpa":
        raise ValueError(f"The baselines need sdpa attention, got {model.config._attn_implementation!r}.")
    attentions = [layer.self_attn for layer in model.model.layers]
    for attention in attentions:
        attention.is_causal = False
    try:
        yield
    finally:
        for attention in attentions:
            attention.is_causal = True


def filled_cache(model: EsoForMaskedDiffusion, batch: int, max_length: int, context: int) -> PreallocatedCache:
    """A cache whose first `context` slots are in use, with random keys and values: to time what comes after them."""
    config = model.config
    cache = PreallocatedCache(config.num_hidden_layers, max_length)
    if context > 0:
        width = config.hidden_size // config.num_attention_heads
        states = torch.randn(batch, config.num_attention_heads, context, width, device=model.device, dtype=model.dtype)
        for layer in cache.layers:
            layer.update(states, states)
    return cache
