"""The systems that `reproduce.py` compares: their sizes, their losses, and the settings that they are sampled at.

Under the same settings text is scored: the exact likelihood of a sampler, of any number of forwards.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from baselines import AutoregressiveSampler, BlockDiffusionSampler, MaskedDiffusionSampler, Sampler
from likelihoods import score_sampler
from objectives import Autoregressive, BlockDiffusion, Esoteric, MaskedDiffusion, Objective
from text_data import vocabulary_of
from transformers import PreTrainedTokenizerBase

from eso_lm import EsoConfig, EsoForMaskedDiffusion

ALPHAS = (1.0, 0.5, 0.25, 0.125, 0.0)
BLOCKS = (4, 16)
ENTROPY_BOUNDS = (4.0, 16.0, 64.0)  # nats


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
    tune_steps: int  # of each try of a learning rate
    held_out_rows: int
    num_draws: int  # of the noise, for a NELBO
    num_orders: int  # for the bound of an exact likelihood
    num_samples: int  # at each setting
    diffusion_steps: tuple[int, ...]  # settings of masked diffusion and Eso-LMs
    every: int = 1  # one document of so many
    num_plans: int = 3  # for the exact likelihood of a sampler, where one pass gives it


SCALES = {
    "smoke": Scale(32, 1, 16, 300, 8, 6, 6, 2, 16, 8, 2, 4, (4, 16), every=60, num_plans=2),
    "minutes": Scale(128, 3, 128, 2048, 16, 400, 500, 100, 64, 8, 8, 32, (8, 32, 128)),
    "hours": Scale(128, 4, 128, 2048, 16, 2400, 3000, 300, 128, 16, 16, 64, (4, 8, 16, 32, 64, 128)),
    "gpu": Scale(768, 12, 1024, 16384, 64, 50_000, 60_000, 2000, 512, 16, 16, 64, (8, 16, 64, 256, 1024)),
}


def systems() -> dict[str, str]:
    """Short names of the systems and what they are called."""
    blocks = {f"bd{length}": f"block diffusion, {length}" for length in BLOCKS}
    eso = {f"eso_{alpha_0:g}": f"Eso-LM, α₀ = {alpha_0:g}" for alpha_0 in ALPHAS}
    return {"ar": "AR", "mdm": "masked diffusion"} | blocks | eso


def alpha_of(name: str) -> float | None:
    """α_0 of an Eso-LM; None for the other systems."""
    return float(name.removeprefix("eso_")) if name.startswith("eso_") else None


def new_model(tokenizer: PreTrainedTokenizerBase, alpha_0: float, scale: Scale) -> EsoForMaskedDiffusion:
    """The layers that all systems share, with fresh weights."""
    return EsoForMaskedDiffusion(
        EsoConfig(
            **vocabulary_of(tokenizer),
            hidden_size=scale.hidden_size,
            num_hidden_layers=scale.num_layers,
            num_attention_heads=max(scale.hidden_size // 64, 4),
            max_position_embeddings=scale.length,
            hidden_dropout=0.0,
            alpha_0=alpha_0,
        )
    )


def objective_of(name: str, tokenizer: PreTrainedTokenizerBase) -> Objective:
    if name in ("ar", "judge"):
        return Autoregressive(tokenizer.eos_token_id)
    if name == "mdm":
        return MaskedDiffusion()
    if name.startswith("bd"):
        return BlockDiffusion(int(name.removeprefix("bd")))
    return Esoteric(alpha_of(name), tokenizer.mask_token_id)


def sampler_of(name: str, model: EsoForMaskedDiffusion, start_token_id: int) -> Sampler:
    """The decoding loop of a baseline."""
    if name == "ar":
        return AutoregressiveSampler(model, start_token_id)
    if name == "mdm":
        return MaskedDiffusionSampler(model)
    return BlockDiffusionSampler(model, int(name.removeprefix("bd")))


def baseline_settings(name: str, scale: Scale) -> list[dict]:
    """Of a baseline: its steps, of the text in masked diffusion, and of each block in block diffusion."""
    if name == "ar":
        return [{}]
    if name == "mdm":
        return [{"steps": steps} for steps in scale.diffusion_steps]
    return [{"steps": steps} for steps in (1, 2, 4, 8, 16) if steps <= int(name.removeprefix("bd"))]


def baseline_scoring_settings(name: str, scale: Scale) -> list[dict]:
    """Of a baseline, what text is scored under: also, at last, one token a forward."""
    return baseline_settings(name, scale) + ([] if name == "ar" else [{"steps": "max"}])


def eso_settings(alpha_0: float, scale: Scale) -> list[dict]:
    """Grids of α_0 at sampling and steps, in random and strided order; and lossless decoding."""
    if alpha_0 == 0:
        return [{"alpha_0": 0.0}]
    alphas = sorted({1.0, 0.5, alpha_0}, reverse=True)
    fixed = [
        {"alpha_0": alpha, "num_diffusion_steps": steps, "unmasking_order": order}
        for alpha in alphas
        for order in ("random", "strided")
        for steps in scale.diffusion_steps
    ]
    return fixed + [{"alpha_0": alpha, "lossless": True, "unmasking_order": "strided"} for alpha in alphas]


def eso_scoring_settings(alpha_0: float, scale: Scale) -> list[dict]:
    """Of an Eso-LM, what text is scored under: an α_0 at sampling of 1, and that of training; entropy bounds at 1.

    At a smaller α_0 most forwards are those of the sequential phase: every other number of steps tells enough.
    """
    if alpha_0 == 0:
        return [{"alpha_0": 0.0}]
    settings = []
    for alpha in dict.fromkeys((1.0, alpha_0)):
        for order in ("random", "strided"):
            common = {"alpha_0": alpha, "unmasking_order": order}
            steps = scale.diffusion_steps if alpha == 1 else scale.diffusion_steps[::2]
            settings += [common | {"num_diffusion_steps": count} for count in steps]
            settings.append(common | {"lossless": True})
    bounded = {"alpha_0": 1.0, "unmasking_order": "strided"}
    return settings + [bounded | {"entropy_bound": bound} for bound in ENTROPY_BOUNDS]


Sample = Callable[[int], tuple[torch.LongTensor, int]]
"""Samples, (batch, length), of a batch size, and the number of forwards."""

Score = Callable[[torch.LongTensor], tuple[torch.Tensor, torch.Tensor]]
"""Of texts, (batch, length): the mean over plans of -log p(x | plan) in nats, and of the forwards, (batch,) each."""


def samplers(
    name: str, model: EsoForMaskedDiffusion, start_token_id: int, scale: Scale
) -> Iterator[tuple[dict, Sample]]:
    """The settings to sample a system with, and how."""
    if alpha_of(name) is None:
        sampler = sampler_of(name, model, start_token_id)
        for setting in baseline_settings(name, scale):
            yield setting, partial(sample_baseline, sampler, scale.length, setting)
    else:
        for setting in eso_settings(alpha_of(name), scale):
            yield setting, partial(sample_eso_lm, model, scale.length, setting)


def scorers(
    name: str, model: EsoForMaskedDiffusion, start_token_id: int, scale: Scale
) -> Iterator[tuple[dict, Score]]:
    """The settings to score text under a system with, and how."""
    if alpha_of(name) is None:
        sampler = sampler_of(name, model, start_token_id)
        for setting in baseline_scoring_settings(name, scale):
            yield setting, partial(score_baseline, sampler, setting)
    else:
        for setting in eso_scoring_settings(alpha_of(name), scale):
            yield setting, partial(score_eso_lm, model, setting, scale.num_plans)


@torch.no_grad()
def sample_baseline(sampler: Sampler, length: int, setting: dict, batch: int) -> tuple[torch.LongTensor, int]:
    """The last tokens of a decoding loop, (batch, length), and the number of its forwards."""
    states = [tokens.clone() for tokens in sampler.steps(batch, length, *setting.values())]
    return states[-1], len(states)


def sample_eso_lm(
    model: EsoForMaskedDiffusion, length: int, setting: dict, batch: int
) -> tuple[torch.LongTensor, int]:
    """Samples of `generate`, (batch, length), and the number of its forwards."""
    output = model.generate(
        max_new_tokens=length, num_return_sequences=batch, eos_token_id=None, return_dict_in_generate=True, **setting
    )
    return output.sequences, output.num_function_evaluations


def score_baseline(sampler: Sampler, setting: dict, text: torch.LongTensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A [`Score`], under one plan a row."""
    log_likelihood, forwards = sampler.log_likelihood(text, *setting.values())
    return -log_likelihood, torch.full_like(log_likelihood, forwards)


def score_eso_lm(
    model: EsoForMaskedDiffusion, setting: dict, num_plans: int, text: torch.LongTensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A [`Score`], under `num_plans` plans a row."""
    return score_sampler(model, text, setting, num_plans)
