"""A model that is ready to decode: what forwards of a few slots gain from weights that do not change meanwhile."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from .modeling_attention import GROUPED_SDPA, grouped_attention
from .modeling_interface import EsoLM
from .modeling_modulation import folded_modulations

MAX_DECODED_SLOTS = 64
"""Slots up to which a forward on top of a cache counts as a decoding step."""

MIN_LARGE_WEIGHT = 2**18
"""Elements from which on a weight is taken to be read from memory, rather than from a core's cache."""

MAX_FEW_ROWS = 128
"""Rows up to which a product is one of few rows: those of the slots of all rows of a batch, or of their masks."""


class FewRowLinear(nn.Linear):
    """A linear layer for decoding steps on the CPU.

    A decoding step feeds a few slots. There W x^T reads large weights up to three times as fast as the x W^T of
    `F.linear` does, in float32. With small ones, with gradients, elsewhere and in other types it is `nn.Linear`.
    """

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        rows = inputs.numel() // max(inputs.shape[-1], 1)
        weight = self.weight
        is_few_rows = (
            0 < rows <= MAX_FEW_ROWS
            and weight.numel() >= MIN_LARGE_WEIGHT
            and inputs.dtype == weight.dtype == torch.float32
            and weight.device.type == "cpu"
            and type(weight) is nn.Parameter
            and not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
        )
        if not is_few_rows:
            return super().forward(inputs)
        # The layout matters: with rows that are not contiguous the product is three times as slow. So does their
        # number: 63 take half again as long as 64.
        flat = inputs.reshape(rows, -1).contiguous()
        if (missing := _number_of_rows_that_is_fast(rows) - rows) > 0:
            flat = F.pad(flat, (0, 0, 0, missing))
        outputs = (weight @ flat.t()).t()[:rows].contiguous()  # as any linear layer gives them
        if self.bias is not None:
            outputs = outputs + self.bias
        return outputs.reshape(*inputs.shape[:-1], -1)


def _number_of_rows_that_is_fast(rows: int) -> int:
    """2, 4, 5, or a multiple of 8: what is left over goes through slower code."""
    return next((number for number in (2, 4, 5) if rows <= number), -(-rows // 8) * 8)


@contextmanager
def fast_products_of_few_rows(model: nn.Module) -> Iterator[None]:
    """Makes a [`FewRowLinear`] of every plain `nn.Linear` of a model on the CPU, for as long as the context lasts.

    Before and after they are what quantisation, adapters and all others expect.
    """
    layers = [module for module in model.modules() if type(module) is nn.Linear and module.weight.device.type == "cpu"]
    for layer in layers:
        layer.__class__ = FewRowLinear
    try:
        yield
    finally:
        for layer in layers:
            layer.__class__ = nn.Linear


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Puts a model into evaluation mode for as long as the context lasts, and then each module as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class EsoInferenceMixin(EsoLM):
    """Lets an Eso-LM be made ready to decode, for as long as a context lasts."""

    is_ready_to_decode = False

    @contextmanager
    def ready_to_decode(self) -> Iterator[None]:
        """Makes forwards of a few slots fast, as `generate` does; the weights must not change inside.

        Every shift, scale and gate is computed once, and products of few rows run at the speed of memory on the CPU.
        """
        if self.is_ready_to_decode:
            yield
            return
        is_own = self.config.backbone_config is None
        fast_network = folded_modulations(self.model) if is_own else grouped_attention(self.model)
        self.is_ready_to_decode = True
        try:
            with fast_network, fast_products_of_few_rows(self):
                yield
        finally:
            self.is_ready_to_decode = False

    @property
    def takes_packed_rows(self) -> bool:
        """Whether the attention can tell rows apart that stand one behind the other, while `ready_to_decode`."""
        implementation = self.model.config._attn_implementation
        if self.config.backbone_config is None:
            return implementation != "flex_attention"
        return implementation == GROUPED_SDPA
