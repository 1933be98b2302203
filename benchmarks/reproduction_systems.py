"""The systems that `reproduce.py` compares: their sizes, their losses, and the settings that they are sampled at.

A setting is that of a sampler: held-out text is scored under it, texts are sampled with it, and it is timed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from baselines import AutoregressiveSampler, BlockDiffusionSampler, MaskedDiffusionSampler, Sampler
from likelihoods import score_sampler
from objectives import Autoregressive, BlockDiffusion, Esoteric, InPieces, MaskedDiffusion, Objective
from text_data import vocabulary_of
from transformers import PreTrainedTokenizerBase

from eso_lm import EsoConfig, EsoForMaskedDiffusion
from eso_lm.generation_order import UNMASKING_ORDERS

ALPHAS = (1.0, 0.5, 0.25, 0.0)
BLOCKS = (4, 16)
ENTROPY_BOUNDS = (4.0, 16.0, 64.0)  # nats
DRAFT_LENGTH = 8  # of lossless decoding: "auto" goes by time, and so by the batch; this is to be the same in all
HEAD = "+head"  # ends the name of an Eso-LM with a draft head, which is trained for the model of the name before it
WITH_HEAD = (0.25, 0.0)  # α_0 of those
ALL_MASKED = ("mdm", "eso_1")  # systems that learn from masks on all sides; trained without any other start too
CARRYING = ("ar", "mdm", "eso_1", "eso_0.25")  # the claims: trained with every seed, the others with the first one


@dataclass(frozen=True)
class Recipe:
    """How a system is trained."""

    learning_rate: float
    first: Literal["left to right", "pieces"] | None = None  # what the first steps learn, see `first_objective`
    loss_type: Literal["elbo", "low_var"] = "elbo"  # of masked diffusion, and of an Eso-LM at α_0 = 1
    fresh: Literal["gates", "embeddings"] | None = None  # what the weights begin with, see `new_model`
    warm_up: float = 0.1  # share of the steps
    parts: int = 1  # that a batch is cut into, each a step of its own


FIRST = 0.3  # share of the steps that are the first ones
RECIPES = {  # each system is trained with the best for it
    "2e-3_left_to_right_first": Recipe(2e-3, first="left to right"),
    "4e-3_left_to_right_first": Recipe(4e-3, first="left to right"),
    "4e-3": Recipe(4e-3),
}
UNAIDED = "4e-3"  # the recipe that begins with the objective itself
PLAIN = "2e-3"  # what each change is made to
PLATEAU = {  # what might take a system off the plateau of the unigrams, where it begins; `plateau.py`
    PLAIN: Recipe(2e-3),
    "2e-3_no_warm_up": Recipe(2e-3, warm_up=0.0),
    "2e-3_half_of_it_warm_up": Recipe(2e-3, warm_up=0.5),
    "2e-3_4_times_the_steps_with_a_quarter_of_the_rows": Recipe(2e-3, parts=4),
    "2e-3_gates_open_and_random_shifts": Recipe(2e-3, fresh="gates"),
    "2e-3_embeddings_of_unit_size": Recipe(2e-3, fresh="embeddings"),
    "2e-3_low_variance": Recipe(2e-3, loss_type="low_var"),
    "2e-3_short_pieces_first": Recipe(2e-3, first="pieces"),
} | RECIPES


@dataclass
class Scale:
    """How much of everything."""

    hidden_size: int
    num_layers: int
    length: int  # tokens of a row, and of a sample
    vocab_size: int
    batch_size: int  # rows of a step
    steps: int
    judge_steps: int
    tune_steps: int  # of each try of a recipe
    head_steps: int  # of a draft head
    held_out_rows: int
    num_draws: int  # of the noise, for a NELBO
    num_orders: int  # for the bound of an exact likelihood
    num_samples: int  # at each setting
    diffusion_steps: tuple[int, ...]  # settings of masked diffusion and Eso-LMs
    num_timed: int  # calls at each setting and batch size, of which the median counts
    num_plans: int = 2  # for the exact likelihood of a sampler, where one pass gives it
    every: int = 1  # one file of so many


SCALES = {
    "smoke": Scale(32, 1, 16, 300, 8, 6, 6, 4, 2, 16, 8, 2, 16, (4,), num_timed=1, every=60),
    "minutes": Scale(64, 2, 64, 512, 16, 100, 120, 30, 30, 32, 4, 4, 32, (4, 16, 64), num_timed=1, every=4),
    "hours": Scale(
        *(96, 3, 128, 1024, 16, 2400, 2400, 300, 1000, 128, 16, 16, 128), (4, 8, 16, 32, 64, 128), num_timed=3
    ),
    "gpu": Scale(
        *(768, 12, 1024, 16384, 64, 50_000, 60_000, 2000, 5000, 512, 16, 16, 512), (8, 16, 64, 256, 1024), num_timed=5
    ),
}


def systems() -> dict[str, str]:
    """Short names of the systems that are trained, and what they are called."""
    blocks = {f"bd{length}": f"block diffusion, {length}" for length in BLOCKS}
    return {"ar": "AR", "mdm": "masked diffusion"} | blocks | {f"eso_{a:g}": f"Eso-LM, α₀ = {a:g}" for a in ALPHAS}


def systems_with_heads() -> dict[str, str]:
    """The same of draft heads on top of some of them."""
    return {f"eso_{a:g}{HEAD}": f"Eso-LM, α₀ = {a:g}, draft head" for a in WITH_HEAD}


def measured_systems() -> dict[str, str]:
    """All systems whose samplers are measured, and what they are called."""
    return systems() | systems_with_heads()


def alpha_of(name: str) -> float | None:
    """α_0 of an Eso-LM; None for the other systems."""
    return float(name.removeprefix("eso_").removesuffix(HEAD)) if name.startswith("eso_") else None


def seeds_of(name: str, count: int) -> range:
    """The seeds of a system; a draft head has those of its model."""
    return range(count if name.removesuffix(HEAD) in CARRYING else 1)


def is_autoregressive(name: str) -> bool:
    """Whether the loss is exact, and not a NELBO: of the AR model, and the judge."""
    return name in ("ar", "judge")


def new_model(
    tokenizer: PreTrainedTokenizerBase, alpha_0: float | None, scale: Scale, fresh: str | None = None
) -> EsoForMaskedDiffusion:
    """The layers that all systems share, with fresh weights; `alpha_0` of an Eso-LM.

    With `fresh="gates"` they begin with all gates at one and random shifts for attention, where they would be zero;
    with "embeddings" the embeddings have a standard deviation of one.
    """
    config = EsoConfig(
        **vocabulary_of(tokenizer),
        hidden_size=scale.hidden_size,
        num_hidden_layers=scale.num_layers,
        num_attention_heads=max(scale.hidden_size // 64, 4),
        max_position_embeddings=scale.length,
        hidden_dropout=0.0,
        alpha_0=1.0 if alpha_0 is None else alpha_0,
    )
    model = EsoForMaskedDiffusion(config)
    with torch.no_grad():
        if fresh == "gates":
            for layer in model.model.layers:
                attn_shift, _, attn_gate, _, _, mlp_gate = layer.modulation.bias.chunk(6)
                attn_shift.normal_()
                attn_gate.fill_(1.0)
                mlp_gate.fill_(1.0)
        elif fresh == "embeddings":
            model.get_input_embeddings().weight.normal_()
    return model


def objective_of(name: str, tokenizer: PreTrainedTokenizerBase, loss_type: str = "elbo") -> Objective:
    if is_autoregressive(name):
        return Autoregressive(tokenizer.eos_token_id)
    if name == "mdm":
        return MaskedDiffusion(loss_type)
    if name.startswith("bd"):
        return BlockDiffusion(int(name.removeprefix("bd")))
    return Esoteric(alpha_of(name), tokenizer.mask_token_id, loss_type)


def first_objective(recipe: Recipe, name: str, tokenizer: PreTrainedTokenizerBase) -> Objective | None:
    """What the first steps learn, if it is something else.

    "left to right": masks that know all to their left, as at α_0 = 0; "pieces": eighths of the rows.
    """
    if recipe.first == "left to right":
        return objective_of("eso_0", tokenizer)
    if recipe.first == "pieces":
        return InPieces(objective_of(name, tokenizer, recipe.loss_type), tokenizer.model_max_length // 8)
    return None


def baseline_of(name: str, model: EsoForMaskedDiffusion, start_token_id: int) -> Sampler:
    """The decoding loop of a baseline."""
    if name == "ar":
        return AutoregressiveSampler(model, start_token_id)
    if name == "mdm":
        return MaskedDiffusionSampler(model)
    return BlockDiffusionSampler(model, int(name.removeprefix("bd")))


def settings_of(name: str, scale: Scale) -> list[dict[str, Any]]:
    """All that a system is sampled and scored with.

    Masked diffusion, block diffusion (in each block) and Eso-LMs, with a draft head or without, take the same steps in
    the same orders, to one token a forward. What only `generate` can do is added: as many strided steps at a model's
    own α_0, entropy bounds, and lossless decoding at 1, the model's α_0 and 0.
    """
    alpha_0 = alpha_of(name)
    if name == "ar":
        return [{}]
    if alpha_0 is None:
        steps = scale.diffusion_steps if name == "mdm" else powers_of_two(int(name.removeprefix("bd")))
        return [
            {"num_steps": count, "unmasking_order": order} for order in UNMASKING_ORDERS for count in (*steps, "max")
        ]
    settings = []
    for order in UNMASKING_ORDERS:
        settings += [in_order(1.0, order, num_diffusion_steps=count) for count in scale.diffusion_steps]
        # From left to right, one token a forward is α_0 = 0.
        settings.append(in_order(0.0 if order == "left_to_right" else 1.0, order, num_diffusion_steps="max"))
    if 0 < alpha_0 < 1:
        own = (*scale.diffusion_steps[::2], "max")
        settings += [in_order(alpha_0, "strided", num_diffusion_steps=count) for count in own]
    settings += [in_order(1.0, "strided", entropy_bound=bound) for bound in ENTROPY_BOUNDS]
    alphas = sorted({1.0, alpha_0, 0.0}, reverse=True)
    return settings + [in_order(alpha, "strided", lossless=True, draft_length=DRAFT_LENGTH) for alpha in alphas]


def powers_of_two(limit: int) -> list[int]:
    """1, 2, 4, ... up to a limit."""
    return [2**exponent for exponent in range(limit.bit_length())]


def in_order(alpha_0: float, order: str, **how: Any) -> dict[str, Any]:
    """A setting of `generate`; α_0 = 0 has one order."""
    return {"alpha_0": alpha_0, "unmasking_order": "left_to_right" if alpha_0 == 0 else order} | how


Sample = Callable[[int], torch.LongTensor]
"""Samples, (batch, length), of a batch size."""

Score = Callable[[torch.LongTensor], tuple[torch.Tensor, torch.Tensor]]
"""Of texts, (batch, length): the mean over plans of -log p(x | plan) in nats, and of the forwards, (batch,) each."""


def samplers(
    name: str, model: EsoForMaskedDiffusion, start_token_id: int, scale: Scale
) -> Iterator[tuple[dict[str, Any], Sample, Score]]:
    """The settings of a system, and how it samples and scores with each."""
    baseline = baseline_of(name, model, start_token_id) if alpha_of(name) is None else None
    for setting in settings_of(name, scale):
        if baseline is not None:
            yield (
                setting,
                partial(sample_baseline, baseline, scale.length, setting),
                partial(score_baseline, baseline, setting),
            )
        else:
            yield (
                setting,
                partial(sample_eso_lm, model, scale.length, setting),
                partial(score_eso_lm, model, setting, scale.num_plans),
            )


@torch.no_grad()
def sample_baseline(sampler: Sampler, length: int, setting: dict[str, Any], batch: int) -> torch.LongTensor:
    """A [`Sample`]: the last tokens of a decoding loop."""
    *_, tokens = sampler.steps(batch, length, **setting)
    return tokens.clone()


def sample_eso_lm(model: EsoForMaskedDiffusion, length: int, setting: dict[str, Any], batch: int) -> torch.LongTensor:
    """A [`Sample`] of `generate`."""
    return model.generate(max_new_tokens=length, num_return_sequences=batch, eos_token_id=None, **setting)


def score_baseline(
    sampler: Sampler, setting: dict[str, Any], text: torch.LongTensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A [`Score`], under one plan a row."""
    log_likelihood, forwards = sampler.log_likelihood(text, **setting)
    return -log_likelihood, torch.full_like(log_likelihood, forwards)


def score_eso_lm(
    model: EsoForMaskedDiffusion, setting: dict[str, Any], num_plans: int, text: torch.LongTensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A [`Score`], under `num_plans` plans a row."""
    return score_sampler(model, text, setting, num_plans)
