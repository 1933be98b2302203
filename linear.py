"""Linear layers whose products of a few rows run at the speed of memory on the CPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

MAX_DECODED_SLOTS = 64
"""Slots up to which a forward on top of a cache counts as a decoding step."""


class FewRowLinear(nn.Linear):
    """A linear layer for decoding steps on the CPU.

    A decoding step feeds a few slots. There W x^T reads the weights up to three times as fast as the x W^T of
    `F.linear` does (float32, up to 64 rows). With gradients, elsewhere and in other types it is `nn.Linear`.
    """

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        rows = inputs.numel() // max(inputs.shape[-1], 1)
        weight = self.weight
        is_few_rows = (
            0 < rows <= MAX_DECODED_SLOTS
            and inputs.dtype == weight.dtype == torch.float32
            and weight.device.type == "cpu"
            and type(weight) is nn.Parameter
            and not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
        )
        if not is_few_rows:
            return super().forward(inputs)
        # The layout matters: with rows that are not contiguous the product is three times as slow.
        flat = inputs.reshape(rows, -1).contiguous()
        # A single row is slower than two: it is computed twice.
        columns = (flat if rows > 1 else flat.repeat(2, 1)).t()
        outputs = (weight @ columns).t()[:rows].contiguous()  # as any linear layer gives them
        if self.bias is not None:
            outputs = outputs + self.bias
        return outputs.reshape(*inputs.shape[:-1], -1)


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
