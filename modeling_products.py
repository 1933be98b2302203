"""Linear layers of a decoding step: products of few rows on the CPU, at the speed at which memory gives weights."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .modeling_quantized import QuantizedWeight, quantized_weight

MIN_LARGE_WEIGHT = 2**18
"""Elements from which on a weight is taken to be read from memory, rather than from a core's cache."""

MAX_FEW_ROWS = 128
"""Rows up to which a product is one of few rows: those of the slots of all rows of a batch, or of their masks."""

MIN_PACKED_PRODUCT = 2**18
"""Rows times elements of the weight from which on a product by a packed weight makes up for being looked up."""

MIN_PACKED_WEIGHT = 2**16
"""Elements from which on a weight is packed at all: a small one takes longer to pack than it saves in a text."""

ROWS_TO_PACK = 128
"""Rows of such products, all together, after which a weight has been used enough to be packed."""

MIN_ROWS = 2
"""Rows that a product counts for at least: by one row it takes as long as by two."""

MAX_PACKED_BYTES = 8 * 2**30
"""Memory for packed weights of a model, which are copies: layers beyond it keep to their weights alone."""


class _SharedInput:
    """The tensor that a model's linear layers were fed last, and those that got it: queries, keys and values, say."""

    inputs: torch.Tensor | None = None
    layers: list["DecodingLinear"]

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def note(self, inputs: torch.Tensor, layer: "DecodingLinear") -> list["DecodingLinear"]:
        """The layers that get these inputs: a list that grows until the next ones come."""
        if self.inputs is not inputs:
            self.inputs, self.layers = inputs, []
        layers = self.layers
        if layer not in layers:
            layers.append(layer)
        return layers


class PackedWeight:
    """Weights in the layout that oneDNN likes best, of layers that are fed the same input, as one.

    Their product is made when the first of them asks for it, and kept for the others. Where another thread or another
    input comes between, it is made again.
    """

    def __init__(self, layers: list["DecodingLinear"]):
        self.layers = tuple(layers)
        self.sizes = [layer.out_features for layer in layers]
        self.out_features = sum(self.sizes)
        self.dtype = layers[0].weight.dtype
        weights = [layer.weight.detach() for layer in layers]
        biases = [layer.bias for layer in layers]
        self.bias: torch.Tensor | None = None
        if any(bias is not None for bias in biases):
            given = zip(biases, self.sizes, strict=True)
            self.bias = torch.cat([weights[0].new_zeros(size) if bias is None else bias for bias, size in given])
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self.kept: tuple[torch.Tensor, int | None, tuple[torch.Tensor, ...]] | None = None

    def fits(self, inputs: torch.Tensor) -> bool:
        """Whether a product is large enough to make up for being looked up, and of the type of the weight."""
        return inputs.numel() * self.out_features >= MIN_PACKED_PRODUCT and inputs.dtype == self.dtype

    def product(self, inputs: torch.Tensor, index: int, has_gelu: bool) -> torch.Tensor:
        """What layer number `index` gives."""
        if len(self.sizes) == 1:
            activation, algorithm = ("gelu", "tanh") if has_gelu else ("none", "")
            return torch.ops.mkldnn._linear_pointwise(inputs, self.weight, self.bias, activation, [], algorithm)
        # Tensors of the inference mode have no version by which a change could be told.
        version = None if inputs.is_inference() else inputs._version
        kept = self.kept
        if kept is None or version is None or kept[0] is not inputs or kept[1] != version:
            kept = (inputs, version, self.joint_product(inputs).split(self.sizes, dim=-1))
        self.kept = None if index == len(self.sizes) - 1 else kept
        return F.gelu(kept[2][index], approximate="tanh") if has_gelu else kept[2][index]

    def joint_product(self, inputs: torch.Tensor) -> torch.Tensor:
        """What the layers give, side by side."""
        return torch.ops.mkldnn._linear_pointwise(inputs, self.weight, self.bias, "none", [], "")


class DecodingLinear(nn.Linear):
    """A linear layer for decoding steps on the CPU.

    A decoding step feeds a few slots. Once it has seen `ROWS_TO_PACK` of them, the layer keeps a copy of its weight in
    the layout that oneDNN likes best, by which products take half to a fifth of the time; layers that are fed the same
    input share one copy, and one product. Before, W x^T reads large weights in float32 up to three times as fast as
    the x W^T of `F.linear` does. For small products, with gradients, elsewhere and in other types it is `nn.Linear`.
    """

    rows_to_pack: int | None = None
    """Rows that are still to come before the weight is packed; None: it never is."""

    shared_input: _SharedInput
    """That of the model."""

    partners: list["DecodingLinear"]
    """The layers that got the same input the last time, this one included; none if there was no such time."""

    packed: tuple[PackedWeight | QuantizedWeight, int] | None = None
    """The packed weight, or one in few bits, and the number of this layer in it."""

    def forward(self, inputs: torch.Tensor, has_gelu: bool = False) -> torch.Tensor:
        if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
            outputs = super().forward(inputs)
        else:
            if self.rows_to_pack is not None:
                self._count(inputs)
            if self.packed is not None:
                weight, index = self.packed
                if weight.fits(inputs):
                    return weight.product(inputs, index, has_gelu)
            rows = inputs.numel() // max(inputs.shape[-1], 1)
            is_few_rows = self.packed is None and 0 < rows <= MAX_FEW_ROWS and self._is_large(inputs)
            outputs = self._transposed(inputs, rows) if is_few_rows else super().forward(inputs)
        return F.gelu(outputs, approximate="tanh") if has_gelu else outputs

    def _count(self, inputs: torch.Tensor) -> None:
        """Takes note of a product, and packs the weight after enough of them."""
        with self.shared_input.lock:
            if self.rows_to_pack is None:
                return  # another thread was faster
            partners, self.partners = self.partners, self.shared_input.note(inputs, self)
            if inputs.numel() * self.out_features < MIN_PACKED_PRODUCT:
                return
            self.rows_to_pack -= max(inputs.numel() // inputs.shape[-1], MIN_ROWS)
            if self.rows_to_pack <= 0 and partners:
                waiting = [layer for layer in partners if layer.rows_to_pack is not None]
                weight = PackedWeight(waiting)
                for index, layer in enumerate(waiting):
                    layer.packed, layer.rows_to_pack = (weight, index), None

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """A copy is a linear layer like any other: nobody would tell it when the weights begin to change."""
        state = {name: value for name, value in self.__getstate__().items() if name not in _OWN}
        return _linear_without_state, (), state

    def _is_large(self, inputs: torch.Tensor) -> bool:
        weight = self.weight
        return weight.numel() >= MIN_LARGE_WEIGHT and inputs.dtype == weight.dtype == torch.float32

    def _transposed(self, inputs: torch.Tensor, rows: int) -> torch.Tensor:
        # The layout matters: with rows that are not contiguous the product is three times as slow. So does their
        # number: 63 take half again as long as 64.
        flat = inputs.reshape(rows, -1).contiguous()
        if (missing := _number_of_rows_that_is_fast(rows) - rows) > 0:
            flat = F.pad(flat, (0, 0, 0, missing))
        outputs = (self.weight @ flat.t()).t()[:rows].contiguous()  # as any linear layer gives them
        if self.bias is not None:
            outputs = outputs + self.bias
        return outputs.reshape(*inputs.shape[:-1], -1)


_OWN = ("packed", "rows_to_pack", "partners", "shared_input")
"""What a `DecodingLinear` has beside the fields of a linear layer."""


def linear_gelu(layer: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """GELU (tanh approximation) of what a linear layer gives, of which it is a part while decoding."""
    if type(layer) is DecodingLinear and not layer._forward_hooks:
        return layer(inputs, has_gelu=True)
    return F.gelu(layer(inputs), approximate="tanh")


def _linear_without_state() -> nn.Linear:
    return nn.Linear.__new__(nn.Linear)


def _number_of_rows_that_is_fast(rows: int) -> int:
    """2, 4, 5, or a multiple of 8: what is left over goes through slower code."""
    return next((number for number in (2, 4, 5) if rows <= number), -(-rows // 8) * 8)


@contextmanager
def fast_products(model: nn.Module) -> Iterator[None]:
    """Makes a [`DecodingLinear`] of every plain `nn.Linear` of a model on the CPU, for as long as the context lasts.

    Before and after they are what quantisation, adapters and all others expect.
    """
    on_cpu = [module for module in model.modules() if type(module) is nn.Linear and module.weight.device.type == "cpu"]
    quantized = {layer: weight for layer in on_cpu if (weight := quantized_weight(layer)) is not None}
    layers = [layer for layer in on_cpu if layer in quantized or type(layer.weight) is nn.Parameter]
    room, shared_input = MAX_PACKED_BYTES, _SharedInput()
    for layer in layers:
        layer.__class__ = DecodingLinear
        if layer in quantized:
            layer.__dict__["packed"] = quantized[layer], 0
            continue
        room -= layer.weight.nbytes
        if room >= 0 and layer.weight.numel() >= MIN_PACKED_WEIGHT and _can_be_packed(layer.weight.dtype):
            own = {"rows_to_pack": ROWS_TO_PACK, "partners": [], "shared_input": shared_input}
            layer.__dict__.update(own)
    try:
        yield
    finally:
        for layer in layers:
            layer.__class__ = nn.Linear
            for name in _OWN:
                layer.__dict__.pop(name, None)


def _can_be_packed(dtype: torch.dtype) -> bool:
    """Whether oneDNN is there, and has fast products of this type."""
    operators = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")  # torch's own: may go
    if not torch.backends.mkldnn.is_available() or not all(hasattr(torch.ops.mkldnn, name) for name in operators):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
