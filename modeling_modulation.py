"""Modulation (adaLN): the shifts, scales and gates of every layer, out of one conditioning vector.

They do not depend on the tokens: given the weights they are constants.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_eso import EsoConfig


class _Folding(nn.Module):
    """Keeps what it gives, a constant of the weights, while these do not change and no gradients are asked for."""

    folded: Any = None

    def kept(self) -> Any:
        """What is folded, if it may be used."""
        return None if torch.is_grad_enabled() else self.folded

    def __getstate__(self) -> dict[str, Any]:
        """A copy has nothing folded: nobody would tell it when the weights begin to change."""
        return {name: value for name, value in super().__getstate__().items() if name not in ("folded", "is_folding")}


class EsoTimestepEmbedding(_Folding):
    """The conditioning vector c = SiLU(MLP(sinusoid(sigma))), (cond_dim,).

    sigma is always 0 (the model does not depend on time), where the sinusoid is 1 in its cosine half and 0 in its
    sine half: c is a constant of the weights.
    """

    sinusoid_width = 256

    def __init__(self, config: EsoConfig):
        super().__init__()
        self.in_proj = nn.Linear(self.sinusoid_width, config.cond_dim)
        self.out_proj = nn.Linear(config.cond_dim, config.cond_dim)

    def forward(self, like: torch.Tensor) -> torch.Tensor:
        """The vector, of the type of `like`."""
        if (kept := self.kept()) is not None:
            return kept
        weight = self.in_proj.weight
        sinusoid = torch.zeros(1, self.sinusoid_width, dtype=weight.dtype, device=weight.device)
        sinusoid[:, : self.sinusoid_width // 2] = 1
        return F.silu(self.out_proj(F.silu(self.in_proj(sinusoid))))[0].to(like.dtype)


class EsoModulation(_Folding, nn.Linear):
    """adaLN: maps the conditioning vector to `num_vectors` vectors of the hidden size (shifts, scales, gates).

    A linear layer like any other, but for its initialisation at zero. `folded_modulations` keeps the vectors that
    `split_modulation` makes of it, constants of the weights, while they do not change.
    """

    def __init__(self, config: EsoConfig, num_vectors: int):
        super().__init__(config.cond_dim, num_vectors * config.hidden_size)


def split_modulation(modulation: nn.Module, conditioning: torch.Tensor, num_vectors: int) -> tuple[torch.Tensor, ...]:
    """The vectors that a modulation gives, or one that adapters have been added to; (hidden,) each."""
    if isinstance(modulation, EsoModulation) and (kept := modulation.kept()) is not None:
        return kept
    return modulation(conditioning).chunk(num_vectors)


class EsoLayerNorm(_Folding):
    """LayerNorm with a weight and no bias, modulated: LN(x) * (1 + scale) + shift, in float32.

    Scale and shift are constants of the weights, so they join the norm's own weight and bias in one kernel.
    """

    is_folding = False

    def __init__(self, config: EsoConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.eps = config.layer_norm_eps

    def fold(self, shift: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias of the norm, with the modulation in them, in float32."""
        return self.weight.float() * (1 + scale.float()), shift.float()

    def forward(self, hidden_states: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        folded = self.kept()
        if folded is None:
            folded = self.fold(shift, scale)
            if self.is_folding and not torch.is_grad_enabled():
                self.folded = folded
        weight, bias = folded
        if hidden_states.dtype == torch.bfloat16 and hidden_states.device.type == "cpu":
            return F.layer_norm(hidden_states, weight.shape, weight, bias, self.eps)  # in float32 within
        return F.layer_norm(hidden_states.float(), weight.shape, weight, bias, self.eps).to(hidden_states.dtype)


@contextmanager
def folded_modulations(backbone: Any) -> Iterator[None]:
    """Computes what an `EsoModel` does with its modulations once, for as long as the context lasts.

    The weights must not change inside.
    """
    embedding = backbone.timestep_embedding
    modulations = [module for module in backbone.modules() if isinstance(module, EsoModulation)]
    norms = [module for module in backbone.modules() if isinstance(module, EsoLayerNorm)]
    try:
        with torch.no_grad():
            embedding.folded = embedding(backbone.norm.weight)
            for modulation in modulations:
                num_vectors = modulation.out_features // len(backbone.norm.weight)
                modulation.folded = split_modulation(modulation, embedding.folded, num_vectors)
        for norm in norms:
            norm.is_folding = True
        yield
    finally:
        for norm in norms:
            norm.is_folding = False
        for module in (embedding, *modulations, *norms):
            module.folded = None
