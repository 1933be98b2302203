"""The systems that `reproduce.py` compares: their sizes, their losses, and the settings that they are sampled at."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from baselines import AutoregressiveSampler, BlockDiffusionSampler, MaskedDiffusionSampler
from objectives import Autoregressive, BlockDiffusion, Esoteric, MaskedDiffusion, Objective
from text_data import vocabulary_of
from transformers import PreTrainedTokenizerBase

from eso_lm import EsoConfig, EsoForMaskedDiffusion

ALPHAS = (1.0, 0.5, 0.25, 0.125, 0.0)
BLOCKS = (4, 16)


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


SCALES = {
    "smoke": Scale(32, 1, 16, 300, 8, 6, 6, 2, 16, 8, 2, 4, (4, 16), every=60),
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


def samplers(
    name: str, model: EsoForMaskedDiffusion, start_token_id: int, scale: Scale
) -> Iterator[tuple[dict, Callable[[int], tuple[torch.LongTensor, int]]]]:
    """The settings to sample a system with, and functions of the batch size to tokens and forwards."""
    length = scale.length
    if name == "ar":
        sampler = AutoregressiveSampler(model, start_token_id)
        yield {}, lambda batch: run_to_end(sampler.steps(batch, length))
    elif name == "mdm":
        sampler = MaskedDiffusionSampler(model)
        for steps in scale.diffusion_steps:
            yield {"steps": steps}, lambda batch, steps=steps: run_to_end(sampler.steps(batch, length, steps))
    elif name.startswith("bd"):
        sampler = BlockDiffusionSampler(model, int(name.removeprefix("bd")))
        for steps in (1, 2, 4, 8, 16):
            if steps <= sampler.block_length:
                yield {"steps": steps}, lambda batch, steps=steps: run_to_end(sampler.steps(batch, length, steps))
    else:
        for setting in eso_settings(alpha_of(name), scale):
            yield setting, partial(sample_eso_lm, model, length, setting)


@torch.no_grad()
def run_to_end(steps: Iterator[torch.LongTensor]) -> tuple[torch.LongTensor, int]:
    """The last tokens of a sampler, (batch, length), and the number of its forwards."""
    states = [tokens.clone() for tokens in steps]
    return states[-1], len(states)


def sample_eso_lm(
    model: EsoForMaskedDiffusion, length: int, setting: dict, batch: int
) -> tuple[torch.LongTensor, int]:
    """Samples of `generate`, (batch, length), and the number of its forwards."""
    output = model.generate(
        max_new_tokens=length, num_return_sequences=batch, eos_token_id=None, return_dict_in_generate=True, **setting
    )
    return output.sequences, output.num_function_evaluations


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
