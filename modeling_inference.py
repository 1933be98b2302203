"""A model that is ready to decode: what forwards of a few slots gain from weights that do not change meanwhile."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

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

MIN_PACKED_PRODUCT = 2**19
"""Rows times elements of the weight from which on a product by a packed weight makes up for being looked up."""

MIN_PACKED_WEIGHT = 2**16
"""Elements from which on a weight is packed at all: a small one takes longer to pack than it saves in a text."""

ROWS_TO_PACK = 128
"""Rows of such products, all together, after which a weight has been used enough to be packed."""

MAX_PACKED_BYTES = 8 * 2**30
"""Memory for packed weights of a model, which are copies: layers beyond it keep to their weights alone."""


_CHANGING_MODELS = threading.Lock()
"""Held while a model is made ready to decode, or is put back as it was."""


class DecodingLinear(nn.Linear):
    """A linear layer for decoding steps on the CPU.

    A decoding step feeds a few slots. Once it has seen `ROWS_TO_PACK` of them, the layer keeps a copy of its weight in
    the layout that oneDNN likes best, by which products take half to a fifth of the time. Before, W x^T reads large
    weights in float32 up to three times as fast as the x W^T of `F.linear` does. For small products, with gradients,
    elsewhere and in other types it is `nn.Linear`.
    """

    rows_to_pack: int | None = None
    """Rows that are still to come before the weight is packed; None: it never is."""

    packed: tuple[torch.Tensor, torch.Tensor | None] | None = None
    """The packed weight, and the bias."""

    def forward(self, inputs: torch.Tensor, has_gelu: bool = False) -> torch.Tensor:
        if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
            outputs = super().forward(inputs)
        else:
            rows = inputs.numel() // max(inputs.shape[-1], 1)
            is_worth_it = inputs.numel() * self.out_features >= MIN_PACKED_PRODUCT
            if self.rows_to_pack is not None and is_worth_it:
                self._count(rows)
            if self.packed is not None and is_worth_it and inputs.dtype == self.packed[0].dtype:
                activation, algorithm = ("gelu", "tanh") if has_gelu else ("none", "")
                return torch.ops.mkldnn._linear_pointwise(inputs, *self.packed, activation, [], algorithm)
            is_few_rows = self.packed is None and 0 < rows <= MAX_FEW_ROWS and self._is_large(inputs)
            outputs = self._transposed(inputs, rows) if is_few_rows else super().forward(inputs)
        return F.gelu(outputs, approximate="tanh") if has_gelu else outputs

    def _count(self, rows: int) -> None:
        assert self.rows_to_pack is not None
        self.rows_to_pack -= rows
        if self.rows_to_pack <= 0:
            self.rows_to_pack = None
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), None), self.bias

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """A copy is a linear layer like any other: nobody would tell it when the weights begin to change."""
        own = ("packed", "rows_to_pack")
        state = {name: value for name, value in self.__getstate__().items() if name not in own}
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
    layers = [
        module
        for module in model.modules()
        if type(module) is nn.Linear and module.weight.device.type == "cpu" and type(module.weight) is nn.Parameter
    ]
    room = MAX_PACKED_BYTES
    for layer in layers:
        layer.__class__ = DecodingLinear
        room -= layer.weight.nbytes
        if room >= 0 and layer.weight.numel() >= MIN_PACKED_WEIGHT and _can_be_packed(layer.weight.dtype):
            layer.__dict__["rows_to_pack"] = ROWS_TO_PACK
    try:
        yield
    finally:
        for layer in layers:
            layer.__class__ = nn.Linear
            for name in ("packed", "rows_to_pack"):
                layer.__dict__.pop(name, None)


def _can_be_packed(dtype: torch.dtype) -> bool:
    """Whether oneDNN is there, and has fast products of this type."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


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
    _num_decoding = 0
    """Calls, of any thread, that count on it."""

    @contextmanager
    def ready_to_decode(self) -> Iterator[None]:
        """Makes forwards of a few slots fast, as `generate` does; the weights must not change inside.

        Every shift, scale and gate is computed once, and on the CPU products run at the speed of memory, by a copy of
        the weights (of up to 8 GiB) that is made after some forwards and given back at the end. Around many calls of
        `generate` or `log_likelihood`, one after the other or in several threads, all this is done once. Forwards with
        gradients are as ever, and so are copies of the model.
        """
        with _CHANGING_MODELS:
            if self._num_decoding == 0:
                with ExitStack() as stack:
                    is_own = self.config.backbone_config is None
                    stack.enter_context(folded_modulations(self.model) if is_own else grouped_attention(self.model))
                    stack.enter_context(fast_products(self))
                    self._ends_decoding = stack.pop_all()
                self.is_ready_to_decode = True
            self._num_decoding += 1
        try:
            yield
        finally:
            with _CHANGING_MODELS:
                self._num_decoding -= 1
                if self._num_decoding == 0:
                    self.is_ready_to_decode = False
                    self._ends_decoding.close()

    def __getstate__(self) -> dict[str, Any]:
        """A copy is not ready to decode."""
        own = ("is_ready_to_decode", "_num_decoding", "_ends_decoding")
        return {name: value for name, value in super().__getstate__().items() if name not in own}

    @property
    def takes_packed_rows(self) -> bool:
        """Whether the attention can tell rows apart that stand one behind the other, while `ready_to_decode`."""
        implementation = self.model.config._attn_implementation
        if self.config.backbone_config is None:
            return implementation != "flex_attention"
        return implementation == GROUPED_SDPA
