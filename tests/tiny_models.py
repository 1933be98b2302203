"""Models small enough to enumerate, with weights that make every path count."""

import itertools
from pathlib import Path

import torch
from text_data import train_tokenizer, vocabulary_of
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerFast

from eso_lm import EsoConfig, EsoForMaskedDiffusion

SIZES = {
    "vocab_size": 24,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}


def tiny_config(**overrides) -> EsoConfig:
    return EsoConfig(**SIZES | {"cond_dim": 16, "alpha_0": 0.5} | overrides)


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
            if "norm" in name or "ln_" in name:
                parameter.add_(1)
    model.set_attn_implementation(attention)
    return model.to(dtype).eval()


def tiny_tokenizer(texts: list[str] | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer of at most 300 tokens, trained on `texts`, or on a pangram."""
    return train_tokenizer(texts or ["The quick brown fox jumps over the lazy dog. " * 5], 300, 64)


def save_with_tokenizer(folder: Path, texts: list[str] | None = None, **settings) -> PreTrainedTokenizerFast:
    """Saves a `randomized_model` with a `tiny_tokenizer`, and returns the latter."""
    tokenizer = tiny_tokenizer(texts)
    randomized_model(**vocabulary_of(tokenizer), **settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def backbone_config(kind: str, **overrides) -> PreTrainedConfig:
    """A tiny causal decoder of transformers, by its model type."""
    no_tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    gated = {"num_key_value_heads": 2, "intermediate_size": 48}
    latent = {
        "num_key_value_heads": 4,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "n_group": 2,
        "topk_group": 1,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "intermediate_size": 16,
        "first_k_dense_replace": 1,
    }
    special = {
        "llama": gated,
        "qwen3": gated | {"head_dim": 16},
        "qwen3_moe": gated | {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        "mixtral": gated | {"num_local_experts": 4},
        "mistral": gated | {"sliding_window": None},
        "gemma2": gated | {"head_dim": 16},
        "gpt_oss": gated | {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
        "deepseek_v2": latent | {"head_dim": 4},
        "deepseek_v3": latent,
        "phi": {"intermediate_size": 48},
        "gpt_neox": {"intermediate_size": 48},
        "opt": {"ffn_dim": 32, "word_embed_proj_dim": 32},
    }
    return AutoConfig.for_model(kind, **SIZES | no_tokens | special.get(kind, {}) | overrides)


def random_batch(model: EsoForMaskedDiffusion, batch: int, slots: int, seed: int = 0) -> torch.LongTensor:
    """Clean tokens, (batch, slots), without the mask (the last id)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.config.vocab_size - 1, (batch, slots), generator=generator)


def random_orders(batch: int, slots: int, seed: int = 0) -> torch.LongTensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, slots, generator=generator).argsort(dim=-1)


def all_orders(length: int) -> list[tuple[int, ...]]:
    return list(itertools.permutations(range(length)))
