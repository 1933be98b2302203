"""The hybrid objective against enumeration: the stochastic loss averages to the NELBO, and the NELBO is a bound."""

import itertools
import math

import pytest
import torch
from tiny_models import all_orders, randomized_model

from eso_lm import DataCollatorForHybridMaskedDiffusion
from eso_lm.noise_schedule import keep_probability, nelbo_weight

VOCAB, LENGTH, MASK = 3, 3, 3  # three tokens and the mask
TEXT = torch.tensor([2, 0, 1])


@pytest.fixture(scope="module")
def model():
    return randomized_model(vocab_size=VOCAB + 1, hidden_size=16, num_attention_heads=2, scale=0.5)


@torch.no_grad()
def conditional_nll(model, order: tuple[int, ...], num_clean: int, num_masks: int) -> torch.Tensor:
    """-log p of the tokens at the masks behind `num_clean` clean slots of `order`, (num_masks,), in one pass."""
    positions = torch.tensor(order)[None, : num_clean + num_masks]
    fed = TEXT[positions].clone()
    fed[:, num_clean:] = MASK
    log_probs = model(fed, position_ids=positions).logits[0, num_clean:].double().log_softmax(-1)
    return -log_probs.gather(-1, TEXT[positions[0, num_clean:], None])[:, 0]


def diffusion_weights(alpha_0: float) -> list[float]:
    """∫ w(t) P(n clean | t) dt for n = 0 ... L, by the midpoint rule."""
    t = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    alpha = keep_probability(t, alpha_0)
    return [
        float((nelbo_weight(t, alpha_0) * math.comb(LENGTH, n) * alpha**n * (1 - alpha) ** (LENGTH - n)).mean())
        for n in range(LENGTH + 1)
    ]


def mean_over_orders(function, num_shuffled: int) -> float:
    """Mean over uniform orders whose slots from `num_shuffled` on ascend."""
    values = [
        function(order) for order in all_orders(LENGTH) if list(order[num_shuffled:]) == sorted(order[num_shuffled:])
    ]
    return sum(values) / len(values)


def exact_terms(model, alpha_0: float) -> tuple[float, float]:
    """The diffusion and the sequential term of the NELBO, nats per sequence."""
    diffusion = sum(
        weight * mean_over_orders(lambda order, n=n: float(conditional_nll(model, order, n, LENGTH - n).sum()), LENGTH)
        for n, weight in enumerate(diffusion_weights(alpha_0))
        if n < LENGTH
    )
    sequential = sum(
        math.comb(LENGTH, n)
        * alpha_0**n
        * (1 - alpha_0) ** (LENGTH - n)
        * mean_over_orders(
            lambda order, n=n: sum(float(conditional_nll(model, order, slot, 1)) for slot in range(n, LENGTH)), n
        )
        for n in range(LENGTH)
    )
    return diffusion, sequential


# One row is too small a batch to split over the two phases: each row then draws its own.
@pytest.mark.slow
@pytest.mark.parametrize(("alpha_0", "rows"), [(0.0, 64), (0.5, 64), (1.0, 64), (0.5, 1)])
@torch.no_grad()
def test_stochastic_loss_averages_to_the_nelbo(model, alpha_0, rows):
    collator = DataCollatorForHybridMaskedDiffusion(mask_token_id=MASK, alpha_0=alpha_0)
    num_batches = 100
    losses = []
    for _ in range(num_batches):
        # The loss of several batches in one forward is their mean: all have as many tokens.
        batches = [collator([{"input_ids": TEXT.tolist()}] * rows) for _ in range(16 if rows == 1 else 1)]
        joined = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
        losses.append(model(**joined).loss.double())
    losses = torch.stack(losses)
    expected = sum(exact_terms(model, alpha_0)) / LENGTH
    error = losses.std() / math.sqrt(num_batches)
    assert abs(losses.mean() - expected) < 4 * error + 2e-3 * expected  # t stops at 1e-3, not at 0
    assert error < 0.05 * expected, "too noisy to tell"


@pytest.mark.parametrize("alpha_0", [0.5, 1.0])
def test_nelbo_bounds_the_likelihood_of_its_process(model, alpha_0):
    """-log p(text) of the process that the NELBO describes, summed over every way to reveal the text.

    Diffusion phase: a uniformly chosen mask is revealed at a time, its logits drawn at a uniform order. After
    n ~ Binomial(L, α_0) tokens, the rest follows left to right.
    """

    def probability_of(subset: frozenset[int], chosen: int) -> float:
        """p(token at `chosen` | clean tokens in `subset`), averaged over the order of clean tokens and masks."""
        values = []
        for clean in itertools.permutations(sorted(subset)):
            for masks in itertools.permutations(sorted(set(range(LENGTH)) - subset)):
                nll = conditional_nll(model, clean + masks, len(clean), len(masks))
                values.append(math.exp(-float(nll[masks.index(chosen)])))
        return sum(values) / len(values)

    # Probability that exactly these positions come first, with the text's tokens.
    revealed = {frozenset(): 1.0}
    for size in range(1, LENGTH + 1):
        for subset in map(frozenset, itertools.combinations(range(LENGTH), size)):
            revealed[subset] = sum(
                revealed[subset - {chosen}] / (LENGTH - size + 1) * probability_of(subset - {chosen}, chosen)
                for chosen in subset
            )
    total = 0.0
    for subset, probability in revealed.items():
        n = len(subset)
        rest = tuple(sorted(set(range(LENGTH)) - subset))
        finish = [
            math.exp(-sum(float(conditional_nll(model, clean + rest, slot, 1)) for slot in range(n, LENGTH)))
            for clean in itertools.permutations(sorted(subset))
        ]
        binomial = math.comb(LENGTH, n) * alpha_0**n * (1 - alpha_0) ** (LENGTH - n)
        total += binomial * probability * sum(finish) / len(finish)
    gap = sum(exact_terms(model, alpha_0)) + math.log(total)
    assert gap > 0.01, "NELBO - (-log p)"
