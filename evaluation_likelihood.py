"""The exact likelihood of text under an Eso-LM, and the NELBO that training minimises."""

import math
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from typing import Literal

import torch
import torch.nn.functional as F
from transformers.utils import ModelOutput
from transformers.utils.logging import tqdm

from .generation_cache import PreallocatedCache
from .generation_decoding import Decoder, Feed
from .generation_order import order_of_slots, order_probability, sample_scoring_orders, text_positions
from .generation_sampling import on_cpu
from .modeling_interface import EsoLM
from .modeling_objective import states_at
from .noise_schedule import keep_probability, nelbo_weight, sample_times
from .validation import (
    is_integer,
    is_number,
    require_fraction,
    require_mask,
    require_positive_integer,
    require_token_ids,
)

MAX_ENUMERATED_TOKENS = 8
"""Free tokens up to which all orders are enumerated: 8! = 40,320."""

LOGITS_AT_A_TIME = 2**26
"""Logits computed at a time: 256 MiB in float32."""


@dataclass
class EsoLikelihoodOutput(ModelOutput):
    """What `log_likelihood` returns, in nats.

    Args:
        log_likelihood: (batch,). Over all orders, the exact log p(x); over K drawn orders, a lower bound of it in
            expectation, which tightens with K.
        log_likelihood_per_order: (batch, K), log p(x | σ) of every order, exact.
        token_log_probs: (batch, K, length), log p of every token given those before it in the order; 0 where given
            (or padding). They add up to `log_likelihood_per_order`.
        is_greedy: (batch, K, length), whether the token is the most probable one there; True where given.
        orders: (batch, K, length), the column of the token at each slot.
    """

    log_likelihood: torch.Tensor
    log_likelihood_per_order: torch.Tensor | None = None
    token_log_probs: torch.Tensor | None = None
    is_greedy: torch.Tensor | None = None
    orders: torch.Tensor | None = None


@dataclass
class EsoNelboOutput(ModelOutput):
    """What `nelbo` returns, in nats per sequence.

    Args:
        nelbo: (batch,), the mean over the draws: an unbiased estimate.
        standard_error: (batch,), of that mean, as if the draws were independent; stratified times make it smaller.
            NaN for a single draw.
        nelbo_per_draw: (batch, draws).
    """

    nelbo: torch.Tensor
    standard_error: torch.Tensor | None = None
    nelbo_per_draw: torch.Tensor | None = None


class EsoLikelihoodMixin(EsoLM):
    """Scores text: `log_likelihood`, exact given an order of generation, and `nelbo`, the training objective."""

    @torch.no_grad()
    def log_likelihood(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        context_mask: torch.Tensor | None = None,
        num_orders: int | Literal["all"] = 1,
        orders: torch.Tensor | None = None,
        alpha_0: float | None = None,
        generator: torch.Generator | None = None,
        *,
        batch_size: int | None = None,
        memory_budget: int = 2**29,
        chunk_length: int | None = None,
    ) -> EsoLikelihoodOutput:
        """Exact log-likelihood given an order, one forward for each order; averaged over orders, a bound of log p(x).

        p(x) = E_σ p(x | σ), with σ as `generate` draws it: n ~ Binomial(L, α_0) tokens in uniform order, then the rest
        from left to right (arXiv 2506.01928, section 4). For orders σ_1 ... σ_K, logsumexp(log p(x | σ_k)) - log K is
        a lower bound in expectation that tightens with K.

        Args:
            input_ids: (batch, length), clean tokens.
            attention_mask: (batch, length), 1 real and 0 padding, on either side; None: no padding.
            context_mask: (batch, length), 1 for tokens that are given and not scored; they come first in the order,
                from left to right. None: no context.
            num_orders: K, orders drawn for each row; "all": every order, weighted by its probability, which gives
                log p(x) itself (up to 8 tokens to score; a row with fewer of them repeats an order, with weight 0).
            orders: (K, length) or (batch, K, length), permutations of the columns to use in place of drawn ones.
                Given tokens are moved to the front of them, and padding to the end.
            alpha_0: In [0, 1]; None: the model config's. At 0 there is one order, and it is used once.
            generator: Source of the orders; None: torch's global one.
            batch_size: Pairs of row and order in a forward; None: what `memory_budget` holds.
            memory_budget: Bytes for a forward, roughly.
            chunk_length: Scores so many tokens a forward, on top of a cache, as lossless decoding judges its drafts:
                the memory then grows with the length of the text and not with its square. None: all at once.

        Returns:
            [`EsoLikelihoodOutput`].

        Raises:
            ValueError: for arguments that do not fit together, and for masks among the tokens to score.
        """
        is_real, is_given = self._check_text(input_ids, attention_mask, context_mask)
        alpha_0 = self._check_alpha_0(alpha_0)
        batch, length = input_ids.shape
        is_free = is_real & ~is_given
        log_weights = None
        require_positive_integer("num_orders", num_orders, or_word="all")
        if orders is not None:
            if num_orders != 1:
                raise ValueError(f"`orders` are given: leave `num_orders` unset, got {num_orders!r}.")
            orders = _check_orders(orders, batch, length)
            group = torch.where(is_free, 1, torch.where(is_real, 0, 2))[:, None].expand_as(orders).gather(-1, orders)
            slots = torch.arange(length, dtype=torch.float64).expand_as(orders)
            # What is given stands from left to right.
            rank = torch.where(group == 0, orders.double(), slots)
            orders = orders.gather(-1, order_of_slots(group, rank))
        elif num_orders == "all":
            orders, log_weights = _all_orders(is_real, is_free, alpha_0)
        else:
            drawn = 1 if alpha_0 == 0 else num_orders
            orders = sample_scoring_orders(is_real, is_given, drawn, alpha_0, _source_on_cpu(generator))

        pairs = orders.shape[1]
        rows = torch.arange(batch).repeat_interleave(pairs)
        order = orders.flatten(0, 1)
        tokens = input_ids.cpu().long()[rows].gather(1, order)
        values, is_greedy = self._score(
            tokens,
            tokens,
            text_positions(is_real)[rows].gather(1, order),
            is_free[rows].gather(1, order),
            torch.ones(len(rows), dtype=torch.bool),
            batch_size,
            memory_budget,
            "Orders",
            chunk_length,
        )
        # From slots back to columns.
        slot_of_column = order.argsort(dim=-1)
        token_log_probs = values.gather(1, slot_of_column).view(batch, pairs, length)
        is_greedy = is_greedy.gather(1, slot_of_column).view(batch, pairs, length)
        per_order = token_log_probs.double().sum(dim=-1)
        log_weights = (
            torch.full((pairs,), -math.log(pairs), dtype=torch.float64) if log_weights is None else log_weights
        )
        log_likelihood = torch.logsumexp(per_order + log_weights, dim=-1)  # weights (K,) or (batch, K)
        if alpha_0 == 0 and is_integer(num_orders):
            per_order, token_log_probs, is_greedy, orders = (
                tensor.repeat_interleave(num_orders, dim=1) if tensor.shape[1] == 1 else tensor
                for tensor in (per_order, token_log_probs, is_greedy, orders)
            )
        device = self.device
        return EsoLikelihoodOutput(
            log_likelihood=log_likelihood.float().to(device),
            log_likelihood_per_order=per_order.float().to(device),
            token_log_probs=token_log_probs.to(device),
            is_greedy=is_greedy.to(device),
            orders=orders.to(device),
        )

    @torch.no_grad()
    def nelbo(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        context_mask: torch.Tensor | None = None,
        num_draws: int = 16,
        alpha_0: float | None = None,
        generator: torch.Generator | None = None,
        *,
        batch_size: int | None = None,
        memory_budget: int = 2**29,
    ) -> EsoNelboOutput:
        """Estimates the NELBO, the sum of the diffusion and the sequential term, in nats per sequence.

        Every draw takes a time t and a masked text for each term. The times are stratified over all rows and draws.

        It bounds -log p(x) from above for the process that it describes, in which the masks of a forward see those
        before them (arXiv 2506.01928, section 3). `log_likelihood` is that of one token a forward, whose mask is
        alone: on trained models the two agree closely, on arbitrary weights either may be the larger one. (At
        alpha_0 = 0 they are the same.)

        Args:
            input_ids, attention_mask, context_mask, alpha_0, generator, batch_size, memory_budget: As for
                `log_likelihood`.
            num_draws: Draws for each row.

        Returns:
            [`EsoNelboOutput`].

        Raises:
            ValueError: for arguments that do not fit together, and for masks among the tokens to score.
        """
        is_real, is_given = self._check_text(input_ids, attention_mask, context_mask)
        alpha_0 = self._check_alpha_0(alpha_0)
        require_positive_integer("num_draws", num_draws)
        generator = _source_on_cpu(generator)
        batch, length = input_ids.shape
        # Neighbouring times go to different rows: those of a row cover [0, 1] evenly, too.
        times = sample_times(batch * num_draws, generator).view(num_draws, batch).T.flatten()
        rows = torch.arange(batch).repeat_interleave(num_draws)
        tokens, positions = input_ids.cpu().long()[rows], text_positions(is_real)[rows]
        is_real, is_free = is_real[rows], (is_real & ~is_given)[rows]

        nelbo = torch.zeros(len(rows), dtype=torch.float64)
        phases = ["diffusion"] * (alpha_0 > 0) + ["sequential"] * (alpha_0 < 1)
        for phase in phases:
            is_sequential = phase == "sequential"
            keep = torch.full_like(times, alpha_0) if is_sequential else keep_probability(times, alpha_0)
            weight = torch.ones_like(times) if is_sequential else nelbo_weight(times, alpha_0)
            noise = torch.rand(tokens.shape, dtype=torch.float64, generator=generator)
            is_masked = is_free & (noise >= keep[:, None])
            # Given, clean, masked, padding; what is given, and the masks of the sequential phase, from left to right.
            group = torch.where(is_masked, 2, torch.where(is_free, 1, torch.where(is_real, 0, 3)))
            rank = torch.rand(tokens.shape, dtype=torch.float64, generator=generator)
            is_ascending = (group == 0) | is_sequential & is_masked
            rank = torch.where(is_ascending, torch.arange(length, dtype=torch.float64), rank)
            order = order_of_slots(group, rank)
            values, _ = self._score(
                tokens.masked_fill(is_masked, self.config.mask_token_id).gather(1, order),
                tokens.gather(1, order),
                positions.gather(1, order),
                is_masked.gather(1, order),
                torch.full((len(rows),), is_sequential),
                batch_size,
                memory_budget,
                f"NELBO, {phase} phase",
            )
            nelbo -= weight * values.double().sum(dim=-1)
        per_draw = nelbo.view(batch, num_draws)
        device = self.device
        return EsoNelboOutput(
            nelbo=per_draw.mean(dim=-1).float().to(device),
            standard_error=(per_draw.std(dim=-1) / num_draws**0.5).float().to(device)
            if num_draws > 1
            else torch.full((batch,), torch.nan, device=device),
            nelbo_per_draw=per_draw.float().to(device),
        )

    def _check_text(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, context_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What is real and what is given of the text, (batch, length) bool each, on the CPU."""
        require_token_ids("input_ids", input_ids, self.config.vocab_size)
        if self.max_text_length is not None and input_ids.shape[1] > self.max_text_length:
            raise ValueError(
                f"`input_ids` must have at most {self.max_text_length} tokens, got {input_ids.shape[1]}: the backbone "
                f"has no embeddings for later positions."
            )
        for name, mask in (("attention_mask", attention_mask), ("context_mask", context_mask)):
            require_mask(name, mask, tuple(input_ids.shape))
        shape = input_ids.shape
        is_real = torch.ones(shape, dtype=torch.bool) if attention_mask is None else attention_mask.cpu().bool()
        is_given = torch.zeros(shape, dtype=torch.bool) if context_mask is None else context_mask.cpu().bool()
        if (is_real & (input_ids.cpu() == self.config.mask_token_id)).any():
            raise ValueError(
                f"`input_ids` holds the mask id {self.config.mask_token_id}: only text without holes has a likelihood "
                f"(or set `attention_mask` to 0 there)."
            )
        return is_real, is_given & is_real

    def _check_alpha_0(self, alpha_0: float | None) -> float:
        require_fraction("alpha_0", alpha_0, or_none=True)
        return self.config.alpha_0 if alpha_0 is None else alpha_0

    def _score(
        self,
        input_ids: torch.Tensor,
        targets: torch.Tensor,
        position_ids: torch.Tensor,
        is_wanted: torch.Tensor,
        sequential_rows: torch.Tensor,
        batch_size: int | None,
        memory_budget: int,
        title: str,
        chunk_length: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities of the targets at the wanted slots, batch by batch, in evaluation mode.

        Args: (pairs, slots) each, in generation order; `sequential_rows` (pairs,).

        Returns:
            (pairs, slots), log p of the target, 0 elsewhere; and whether it is the most probable token.
        """
        require_positive_integer("batch_size", batch_size, or_none=True)
        require_positive_integer("chunk_length", chunk_length, or_none=True)
        if not is_number(memory_budget) or not memory_budget > 0:
            raise ValueError(f"`memory_budget` must be a positive number of bytes, got {memory_budget!r}.")
        pairs, slots = input_ids.shape
        values = torch.zeros(input_ids.shape, dtype=torch.float32)
        is_greedy = torch.ones(input_ids.shape, dtype=torch.bool)
        if batch_size is None:
            batch_size = max(1, int(memory_budget // max(self._bytes_per_pair(slots, chunk_length), 1)))
        score = self._score_batch if chunk_length is None else partial(self._score_chunks, chunk_length=chunk_length)
        training = [module for module in self.modules() if module.training]
        self.eval()
        try:
            for start in tqdm(range(0, pairs, batch_size), desc=title, delay=10):
                batch = slice(start, start + batch_size)
                if is_wanted[batch].any():
                    arguments = (input_ids, targets, position_ids, is_wanted, sequential_rows)
                    rows, wanted, log_probs, hits = score(*(tensor[batch] for tensor in arguments))
                    values[rows + start, wanted], is_greedy[rows + start, wanted] = log_probs, hits
        finally:
            for module in training:
                module.training = True
        return values, is_greedy

    def _bytes_per_pair(self, slots: int, chunk_length: int | None) -> int:
        """Roughly, what a forward needs for a row: hidden states of a layer, a mask or attention scores, a cache."""
        config = self.config
        scores = config.num_attention_heads if config._attn_implementation == "eager" else 1
        fed, cached = (2 * slots, 0) if chunk_length is None else (2 * chunk_length, slots + chunk_length)
        cache = 2 * config.num_hidden_layers * cached * config.hidden_size
        return 4 * (fed * (12 * config.hidden_size + scores * (cached or fed)) + cache)

    def _score_batch(
        self,
        input_ids: torch.Tensor,
        targets: torch.Tensor,
        position_ids: torch.Tensor,
        is_wanted: torch.Tensor,
        sequential_rows: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """In one forward: rows and slots that are wanted, log p of their targets, whether none is more probable."""
        device = self.device
        labels = targets.to(device)
        states, rows, slots = states_at(
            self,
            is_wanted.to(device),
            input_ids.to(device),
            None,
            position_ids.to(device),
            None,  # padding is last
            labels,
            sequential_rows.to(device),
        )
        labels = labels[rows, slots]
        log_probs, hits = [], []
        for part in torch.arange(len(states)).split(max(1, LOGITS_AT_A_TIME // self.config.vocab_size)):
            part = slice(int(part[0]), int(part[-1]) + 1)
            logits = self.compute_logits(states[part]).float()
            log_probs.append(-F.cross_entropy(logits, labels[part], reduction="none"))
            hits.append(logits.argmax(dim=-1) == labels[part])
        return rows.cpu(), slots.cpu(), torch.cat(log_probs).cpu(), torch.cat(hits).cpu()

    def _score_chunks(
        self,
        input_ids: torch.Tensor,
        targets: torch.Tensor,
        position_ids: torch.Tensor,
        is_wanted: torch.Tensor,
        sequential_rows: torch.Tensor,
        chunk_length: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The same for rows of the sequential phase, `chunk_length` slots at a time on top of a cache.

        This is how lossless decoding judges its drafts: a forward takes the tokens, causal, and for each of them a
        mask that sees what is before it.
        """
        batch, length = input_ids.shape
        decoder = Decoder(self, PreallocatedCache(self.config.num_hidden_layers, length + chunk_length))
        scored = []
        for start in range(0, length, chunk_length):
            chunk = slice(start, min(start + chunk_length, length))
            size = chunk.stop - start
            own = torch.arange(2 * size).expand(batch, -1)
            content, positions = targets[:, chunk], position_ids[:, chunk]
            # Given tokens come first, and padding last: what is wanted is in one piece.
            first, count = is_wanted[:, chunk].long().argmax(dim=-1).tolist(), is_wanted[:, chunk].sum(dim=-1).tolist()
            logits = decoder(
                Feed(
                    starts=[start] * batch,
                    input_ids=torch.cat([content, torch.full_like(content, self.config.mask_token_id)], dim=-1),
                    position_ids=torch.cat([positions, positions], dim=-1),
                    num_fed=[2 * size] * batch,
                    kept=[range(size + one, size + one + many) for one, many in zip(first, count, strict=True)],
                    horizon=torch.where(own < size, own + 1, own - size),
                    first_mask=own,
                )
            )
            rows, slots = is_wanted[:, chunk].nonzero().unbind(dim=-1)
            labels = targets[rows, slots + start].to(logits.device)
            log_probs = -F.cross_entropy(logits, labels, reduction="none").cpu()
            scored.append((rows, slots + start, log_probs, (logits.argmax(dim=-1) == labels).cpu()))
        rows, slots, log_probs, hits = (torch.cat(parts) for parts in zip(*scored, strict=True))
        return rows, slots, log_probs, hits


def _check_orders(orders: torch.Tensor, batch: int, length: int) -> torch.Tensor:
    """(batch, K, length), on the CPU."""
    if not isinstance(orders, torch.Tensor) or orders.is_floating_point():
        given = orders.dtype if isinstance(orders, torch.Tensor) else type(orders).__name__
        raise ValueError(f"`orders` must be a tensor of integers, got {given}.")
    orders = orders.cpu().long()
    if orders.dim() == 2:
        orders = orders.expand(batch, *orders.shape)
    if orders.dim() != 3 or orders.shape[0] != batch or orders.shape[2] != length or orders.shape[1] == 0:
        raise ValueError(
            f"`orders` must have the shape (K, {length}) or ({batch}, K, {length}), got {tuple(orders.shape)}."
        )
    if not torch.equal(orders.sort(dim=-1).values, torch.arange(length).expand_as(orders)):
        raise ValueError(f"`orders` must hold permutations of 0 ... {length - 1}.")
    return orders


def _all_orders(is_real: torch.Tensor, is_free: torch.Tensor, alpha_0: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Every order that can be drawn, (batch, K, length), and the logarithms of their probabilities, (batch, K)."""
    counts = is_free.sum(dim=-1).tolist()
    if alpha_0 > 0 and max(counts) > MAX_ENUMERATED_TOKENS:
        raise ValueError(
            f"`num_orders='all'` takes at most {MAX_ENUMERATED_TOKENS} tokens to score, got up to {max(counts)}."
        )
    possible = {}
    for count in set(counts):
        candidates = permutations(range(count)) if alpha_0 > 0 else [tuple(range(count))]
        weighted = [(order, order_probability(list(order), alpha_0)) for order in candidates]
        possible[count] = [(order, probability) for order, probability in weighted if probability > 0]
    num_orders = max(len(weighted) for weighted in possible.values())
    columns = torch.arange(is_real.shape[1], dtype=torch.float64).expand(is_real.shape)
    group = torch.where(is_free, 1, torch.where(is_real, 0, 2))
    orders = order_of_slots(group, columns)[:, None].repeat(1, num_orders, 1)  # given, free, padding
    log_weights = torch.full((len(counts), num_orders), -torch.inf, dtype=torch.float64)
    num_given = (is_real & ~is_free).sum(dim=-1).tolist()
    for row, (count, start) in enumerate(zip(counts, num_given, strict=True)):
        permutation = torch.tensor([order for order, _ in possible[count]], dtype=torch.long).view(
            len(possible[count]), count
        )
        free = orders[row, 0, start : start + count].clone()
        orders[row, : len(permutation), start : start + count] = free[permutation]
        probabilities = [probability for _, probability in possible[count]]
        log_weights[row, : len(permutation)] = torch.tensor(probabilities, dtype=torch.float64).log()
    return orders, log_weights


def _source_on_cpu(generator: torch.Generator | None) -> torch.Generator | None:
    """The source of the orders and the noise, which are drawn on the CPU."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ValueError(f"`generator` must be None or a torch.Generator, got {type(generator).__name__}.")
    return on_cpu(generator)


__all__ = ["EsoLikelihoodMixin", "EsoLikelihoodOutput", "EsoNelboOutput"]
