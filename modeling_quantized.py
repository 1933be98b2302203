"""Weights in 8 and 4 bits while decoding on the CPU: torchao's, by the kernels that torch has for few rows.

`from_pretrained(..., quantization_config=TorchAoConfig(...))` makes them. Their own products go through torchao, and
in 8 bits by a copy of the weight in the type of the inputs: more bytes than without quantisation.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

ALIGNMENT = 64
"""Bytes at whose multiples the kernel of 8 bits wants its tensors to begin; and it wants 32 inputs at a time. It
crashes on others, such as what safetensors maps from a file."""

MAX_QUANTIZED_ROWS = 16
"""Rows up to which the kernels are faster than a product by a copy of the weight in the type of the inputs."""

KERNELS: dict[str, tuple[Any, str]] = {
    "Int8Tensor": (torch, "_weight_int8pack_mm"),
    "Int4OpaqueTensor": (torch.ops.aten, "_weight_int4pack_mm_for_cpu"),
}
"""Of each kind of weight, where its kernel is, if this torch has it: these are torch's own, and may go."""


class QuantizedWeight(ABC):
    """The weight of a layer, in few bits, and its bias."""

    def __init__(self, layer: nn.Linear):
        self.bias, self.out_features = layer.bias, layer.out_features

    @abstractmethod
    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        """From (rows, in features) to (rows, out features or more)."""

    def fits(self, inputs: torch.Tensor) -> bool:
        """Whether the kernels are made for such inputs: bfloat16, a few rows."""
        rows = inputs.numel() // max(inputs.shape[-1], 1)
        return inputs.dtype == torch.bfloat16 and 0 < rows <= MAX_QUANTIZED_ROWS

    def product(self, inputs: torch.Tensor, index: int, has_gelu: bool) -> torch.Tensor:
        """What the layer gives, number 0 and the only one."""
        rows = inputs.reshape(-1, inputs.shape[-1]).contiguous()
        outputs = self.multiply(rows)[:, : self.out_features]
        if self.bias is not None:
            outputs = outputs + self.bias
        outputs = outputs.reshape(*inputs.shape[:-1], self.out_features)
        return F.gelu(outputs, approximate="tanh") if has_gelu else outputs


class _Int8Weight(QuantizedWeight):
    """One scale for each output."""

    def __init__(self, layer: nn.Linear, weight: Any):
        super().__init__(layer)
        self.values, self.scales = _aligned(weight.qdata), _aligned(weight.scale.flatten().to(weight.dtype))

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        return torch._weight_int8pack_mm(_aligned(rows), self.values, self.scales)


class _Int4Weight(QuantizedWeight):
    """A scale and a zero for each group of inputs, in the layout of the kernel."""

    def __init__(self, layer: nn.Linear, weight: Any):
        super().__init__(layer)
        self.values, self.scales, self.group_size = weight.qdata, weight.scale_and_zero, weight.block_size[-1]

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.values, self.group_size, self.scales)


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor, or a copy of it, that begins where the kernel of 8 bits wants it to."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def quantized_weight(layer: nn.Linear) -> QuantizedWeight | None:
    """The weight of a layer, if it is one of torchao's, in bfloat16, that torch has a kernel for."""
    weight: Any = layer.weight
    kind = type(weight).__name__
    if kind not in KERNELS or not hasattr(*KERNELS[kind]):
        return None
    if weight.dtype != torch.bfloat16 or weight.act_pre_scale is not None:
        return None
    if kind == "Int4OpaqueTensor":
        return None if weight.act_mapping_type is not None else _Int4Weight(layer, weight)
    has_scale_of_each_output = weight.scale.numel() == layer.out_features
    is_symmetric = weight.zero_point is None or not weight.zero_point.any()
    if not has_scale_of_each_output or not is_symmetric or weight.act_quant_kwargs is not None:
        return None
    if layer.in_features % 32 != 0:
        return None
    return _Int8Weight(layer, weight)
