"""Models small enough to enumerate, with weights that make every path count."""

import itertools

import torch

from eso_lm import EsoConfig, EsoForMaskedDiffusion


def tiny_config(**overrides) -> EsoConfig:
    sizes = {
        "vocab_size": 24,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "cond_dim": 16,
        "max_position_embeddings": 32,
        "alpha_0": 0.5,
    }
    return EsoConfig(**sizes | overrides)


def randomized_model(
    attention: str = "sdpa", dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 0.3, **overrides
) -> EsoForMaskedDiffusion:
    """An Eso-LM in evaluation mode with random weights everywhere: a fresh one has a zero head and zero gates."""
    model = EsoForMaskedDiffusion(tiny_config(**overrides))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(1)
    model.set_attn_implementation(attention)
    return model.to(dtype).eval()


def random_batch(model: EsoForMaskedDiffusion, batch: int, slots: int, seed: int = 0) -> torch.LongTensor:
    """Clean tokens, (batch, slots), without the mask (the last id)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.config.vocab_size - 1, (batch, slots), generator=generator)


def random_orders(batch: int, slots: int, seed: int = 0) -> torch.LongTensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, slots, generator=generator).argsort(dim=-1)


def all_orders(length: int) -> list[tuple[int, ...]]:
    return list(itertools.permutations(range(length)))
