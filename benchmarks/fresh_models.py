"""Models with fresh weights, whose speed is the point: an Eso-LM of the size asked for, and a Llama like it."""

import argparse

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from eso_lm import EsoConfig, EsoForMaskedDiffusion


def add_sizes(
    parser: argparse.ArgumentParser,
    hidden_size: int = 768,
    num_layers: int = 12,
    num_heads: int = 12,
    vocab_size: int = 50258,
) -> None:
    """Arguments for the size of a model; by default it is the paper's small one."""
    parser.add_argument("--hidden-size", type=int, default=hidden_size)
    parser.add_argument("--num-layers", type=int, default=num_layers)
    parser.add_argument("--num-heads", type=int, default=num_heads)
    parser.add_argument("--vocab-size", type=int, default=vocab_size)


def fresh_eso_lm(args: argparse.Namespace, dtype: str = "float32") -> EsoForMaskedDiffusion:
    """An Eso-LM of the sizes in `args`, on the device there; the same in every run."""
    torch.manual_seed(0)
    config = EsoConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        num_hidden_layers=args.num_layers,
        num_attention_heads=args.num_heads,
    )
    return EsoForMaskedDiffusion(config).to(args.device, getattr(torch, dtype)).eval()


def weights_of_a_step(model: EsoForMaskedDiffusion) -> list[torch.Tensor]:
    """Those of linear layers, all of which a decoding step reads, but for what is folded into constants."""
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    return [module.weight for module in linear if not hasattr(module, "folded")]


def similar_llama(model: EsoForMaskedDiffusion, max_length: int) -> LlamaForCausalLM:
    """A Llama of the same width and depth, device and dtype, for texts of at most `max_length` tokens."""
    config = LlamaConfig(
        vocab_size=model.config.vocab_size,
        hidden_size=model.config.hidden_size,
        # Its gated MLP has three matrices: two thirds of the width give it the same size.
        intermediate_size=model.config.intermediate_size * 2 // 3,
        num_hidden_layers=model.config.num_hidden_layers,
        num_attention_heads=model.config.num_attention_heads,
        max_position_embeddings=max_length,
    )
    return LlamaForCausalLM(config).to(model.device, model.dtype).eval()
