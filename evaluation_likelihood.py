"""The exact likelihood of text under an Eso-LM, and the NELBO that training minimises."""

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from transformers import GenerationConfig, LogitsProcessor
from transformers.utils import ModelOutput

from .evaluation_plans import Texts, choose_plans
from .evaluation_scoring import Budget, Layout, score, score_by_decoding
from .generation import EsoGenerationMixin
from .generation_order import order_of_slots, text_positions
from .generation_plan import GenerationPlan
from .generation_sampling import Generators, TokenSampler, on_cpu, require_generators
from .modeling_interface import EsoLM
from .noise_schedule import keep_probability, nelbo_weight, sample_times
from .validation import is_integer, require_fraction, require_mask, require_positive_integer, require_token_ids


@dataclass
class EsoLikelihoodOutput(ModelOutput):
    """What `log_likelihood` returns, in nats.

    Args:
        log_likelihood: (batch,). Over all orders, the exact log p(x); over K drawn orders, or plans of a sampler, a
            lower bound of it in expectation, which tightens with K.
        log_likelihood_per_order: (batch, K), log p(x | σ) of every order, or plan, exact.
        token_log_probs: (batch, K, length), log p of every token given those before it in the order; 0 where given
            (or padding). They add up to `log_likelihood_per_order`.
        is_greedy: (batch, K, length), whether the token is the most probable one there; True where given.
        orders: (batch, K, length), the column of the token at each slot.
        groups: (batch, K, length), the number of the group of each slot of `orders`, from 1; 0 where given (or
            padding). A group is what a forward of `generate` decides; with adaptive unmasking, the pool that it
            chooses from.
        num_function_evaluations: (batch, K), the forwards that `generate` takes for each row and plan. None with
            `lossless`, which it takes chance to tell.
    """

    log_likelihood: torch.Tensor
    log_likelihood_per_order: torch.Tensor | None = None
    token_log_probs: torch.Tensor | None = None
    is_greedy: torch.Tensor | None = None
    orders: torch.Tensor | None = None
    groups: torch.Tensor | None = None
    num_function_evaluations: torch.Tensor | None = None


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
        generator: Generators = None,
        *,
        groups: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: list[LogitsProcessor] | None = None,
        batch_size: int | None = None,
        memory_budget: int = 2**29,
        chunk_length: int | None = None,
        **settings: Any,
    ) -> EsoLikelihoodOutput:
        """Exact log-likelihood given an order, one forward for each order; averaged over orders, a bound of log p(x).

        p(x) = E_σ p(x | σ), with σ as `generate` draws it: n ~ Binomial(L, α_0) tokens in uniform order, then the rest
        from left to right (arXiv 2506.01928, section 4). For orders σ_1 ... σ_K, logsumexp(log p(x | σ_k)) - log K is
        a lower bound in expectation that tightens with K.

        That is the likelihood of one token a forward, under the model's own distribution. With settings of `generate`
        it is that of the sampler which `generate` then is: tokens of a forward are drawn independently, each from what
        stood before its group and the masks of its group up to its own (and, with a draft head, its neighbours among
        the tokens drawn before it), so that the likelihood given a plan, an order
        and its groups, is exact as well, and takes one forward for all groups. (For masked diffusion, which needs a
        forward for each: DUEL, arXiv 2603.01367.) Adaptive unmasking, and logits processors that look at the text,
        depend on what has been decided: the text is forced through decoding, in as many forwards as sampling takes.

        Args:
            input_ids: (batch, length), clean tokens.
            attention_mask: (batch, length), 1 real and 0 padding, on either side; None: no padding.
            context_mask: (batch, length), 1 for tokens that are given and not scored; they come first in the order,
                from left to right. None: no context.
            num_orders: K, orders drawn for each row, or plans of a sampler; "all": every order, weighted by its
                probability, which gives log p(x) itself (up to 8 tokens to score; a row with fewer of them repeats an
                order, with weight 0).
            orders: (K, length) or (batch, K, length), permutations of the columns to use in place of drawn ones.
                Given tokens are moved to the front of them, and padding to the end.
            alpha_0: In [0, 1]; None: that of the generation config, or the model config's. At 0 there is one order,
                and it is used once.
            generator: Source of the orders; None: torch's global one; a list: one for each row, whose orders then do
                not depend on its batch.
            groups: With `orders`, and of their shape: the number of the group of each slot. Slots that follow each
                other with the same number are drawn by one forward; with adaptive unmasking they are the pools from
                which it chooses. `generate` returns both. None: a token a group.
            generation_config, settings: A sampler: an [`EsoGenerationConfig`], or its fields one by one
                (`num_diffusion_steps`, `unmasking_order`, `block_length`, `entropy_bound`, `temperature`, `top_k`,
                `lossless`, ...). What is not set is the model's generation config's, as in `generate`. Every text is
                scored to its end; what ends a text, or a call, has no effect. Tokens that a filter forbids have a
                log-probability of -inf.
            logits_processor: Further filters of the sampler, as for `generate`.
            batch_size: Pairs of row and order in a forward; None: what `memory_budget` holds.
            memory_budget: Bytes for a forward, roughly.
            chunk_length: Scores so many tokens a forward (or a group, if that is longer), on top of a cache, as
                lossless decoding judges its drafts: the memory then grows with the length of the text and not with its
                square. None: all at once. (Texts that are forced through decoding are on a cache anyhow.)

        Returns:
            [`EsoLikelihoodOutput`].

        Raises:
            ValueError: for arguments that do not fit together, and for masks among the tokens to score.
        """
        texts = self._check_text(input_ids, attention_mask, context_mask)
        require_positive_integer("num_orders", num_orders, or_word="all")
        budget = Budget(batch_size, memory_budget, chunk_length)
        batch, length = input_ids.shape
        require_generators(generator, batch)
        sampler, policy = self._plain_sampler(), None
        if generation_config is not None or logits_processor is not None or settings:
            if alpha_0 is not None:
                settings["alpha_0"] = alpha_0
            generating, canvas = cast(EsoGenerationMixin, self), texts.canvas()
            policy, alpha_0, sampler = generating.sampler_for(canvas, generation_config, logits_processor, **settings)
        alpha_0 = self._check_alpha_0(alpha_0)
        head = cast(EsoGenerationMixin, self).draft_head_for(policy)
        orders, groups, log_weights = choose_plans(texts, num_orders, orders, groups, alpha_0, generator, policy)

        pairs = orders.shape[1]
        texts, plan = texts.repeat(pairs), GenerationPlan(orders.flatten(0, 1), groups.flatten(0, 1))
        if policy is not None and (policy.is_adaptive or sampler.looks_at_text):
            token_log_probs, is_greedy, num_forwards = score_by_decoding(
                self, texts, plan, budget, sampler, policy, head
            )
        else:
            tokens = texts.tokens.gather(1, plan.order)
            layout = Layout(
                input_ids=tokens,
                targets=tokens,
                position_ids=text_positions(texts.is_real).gather(1, plan.order),
                is_wanted=plan.groups > 0,
                sequential_rows=torch.ones(len(tokens), dtype=torch.bool),
                group_starts=plan.group_starts,
            )
            values, is_greedy = score(self, layout, budget, "Orders", sampler, head)
            num_forwards = plan.num_groups
            # From slots back to columns.
            slot_of_column = plan.order.argsort(dim=-1)
            token_log_probs, is_greedy = values.gather(1, slot_of_column), is_greedy.gather(1, slot_of_column)
        token_log_probs = token_log_probs.view(batch, pairs, length)
        per_order = token_log_probs.double().sum(dim=-1)
        log_likelihood = torch.logsumexp(per_order + log_weights, dim=-1)
        outputs = {
            "log_likelihood_per_order": per_order.float(),
            "token_log_probs": token_log_probs,
            "is_greedy": is_greedy.view(batch, pairs, length),
            "orders": orders,
            "groups": groups,
            "num_function_evaluations": num_forwards.view(batch, pairs),
        }
        if policy is not None and policy.lossless:
            del outputs["num_function_evaluations"]
        repeats = num_orders if alpha_0 == 0 and is_integer(num_orders) and pairs == 1 else 1
        return EsoLikelihoodOutput(
            log_likelihood=log_likelihood.float().to(self.device),
            **{name: value.repeat_interleave(repeats, dim=1).to(self.device) for name, value in outputs.items()},
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
        texts = self._check_text(input_ids, attention_mask, context_mask)
        alpha_0 = self._check_alpha_0(alpha_0)
        require_positive_integer("num_draws", num_draws)
        budget, sampler = Budget(batch_size, memory_budget), self._plain_sampler()
        generator = _source_on_cpu(generator)
        batch, length = input_ids.shape
        # Neighbouring times go to different rows: those of a row cover [0, 1] evenly, too.
        times = sample_times(batch * num_draws, generator).view(num_draws, batch).T.flatten()
        texts = texts.repeat(num_draws)
        tokens, positions = texts.tokens, text_positions(texts.is_real)

        nelbo = torch.zeros(len(tokens), dtype=torch.float64)
        phases = ["diffusion"] * (alpha_0 > 0) + ["sequential"] * (alpha_0 < 1)
        for phase in phases:
            is_sequential = phase == "sequential"
            keep = torch.full_like(times, alpha_0) if is_sequential else keep_probability(times, alpha_0)
            weight = torch.ones_like(times) if is_sequential else nelbo_weight(times, alpha_0)
            noise = torch.rand(tokens.shape, dtype=torch.float64, generator=generator)
            is_masked = texts.is_free & (noise >= keep[:, None])
            # Given, clean, masked, padding; what is given, and the masks of the sequential phase, from left to right.
            group = texts.kinds(free=1, given=0, padding=3).masked_fill(is_masked, 2)
            rank = torch.rand(tokens.shape, dtype=torch.float64, generator=generator)
            is_ascending = (group == 0) | is_sequential & is_masked
            rank = torch.where(is_ascending, torch.arange(length, dtype=torch.float64), rank)
            order = order_of_slots(group, rank)
            layout = Layout(
                input_ids=tokens.masked_fill(is_masked, self.config.mask_token_id).gather(1, order),
                targets=tokens.gather(1, order),
                position_ids=positions.gather(1, order),
                is_wanted=is_masked.gather(1, order),
                sequential_rows=torch.full((len(tokens),), is_sequential),
                group_starts=torch.arange(length).expand_as(order),
            )
            values, _ = score(self, layout, budget, f"NELBO, {phase} phase", sampler)
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
    ) -> Texts:
        """What is scored, on the CPU."""
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
        return Texts(input_ids.cpu().long(), is_real, is_real & ~is_given, self.config.mask_token_id)

    def _check_alpha_0(self, alpha_0: float | None) -> float:
        require_fraction("alpha_0", alpha_0, or_none=True)
        return self.config.alpha_0 if alpha_0 is None else alpha_0

    def _plain_sampler(self) -> TokenSampler:
        """Draws from the model's own distribution."""
        return TokenSampler([], is_greedy=False, generator=None, mask_token_id=self.config.mask_token_id)


def _source_on_cpu(generator: torch.Generator | None) -> torch.Generator | None:
    """The source of the orders and the noise, which are drawn on the CPU."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ValueError(f"`generator` must be None or a torch.Generator, got {type(generator).__name__}.")
    return on_cpu(generator)


__all__ = ["EsoLikelihoodMixin", "EsoLikelihoodOutput", "EsoNelboOutput"]
