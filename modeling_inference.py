"""A model that is ready to decode: what forwards of a few slots gain from weights that do not change meanwhile."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from .modeling_attention import GROUPED_SDPA, grouped_attention
from .modeling_backbone import run_backbone
from .modeling_decoding import DecodingStep
from .modeling_interface import BackboneOutput, EsoLM
from .modeling_modulation import folded_modulations
from .modeling_products import fast_products

_CHANGING_MODELS = threading.Lock()
"""Held while a model is made ready to decode, or is put back as it was."""


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
    _decoding_step: DecodingStep | None = None
    """What runs forwards of a few slots meanwhile, where it can."""

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
                    self._decoding_step = DecodingStep.of(self.model)
                    self._ends_decoding = stack.pop_all()
                self.is_ready_to_decode = True
            self._num_decoding += 1
        try:
            yield
        finally:
            with _CHANGING_MODELS:
                self._num_decoding -= 1
                if self._num_decoding == 0:
                    self.is_ready_to_decode, self._decoding_step = False, None
                    self._ends_decoding.close()

    def run_backbone(self, **arguments: Any) -> BackboneOutput:
        """The forward of the backbone, whichever it is, with the arguments of `EsoModel.forward`."""
        step = self._decoding_step
        if step is not None and step.can_run(arguments):
            return step(**arguments)
        if self.config.backbone_config is not None:
            return run_backbone(self.model, **arguments)
        return self.model(**arguments)

    def __getstate__(self) -> dict[str, Any]:
        """A copy is not ready to decode."""
        own = ("is_ready_to_decode", "_num_decoding", "_decoding_step", "_ends_decoding")
        return {name: value for name, value in super().__getstate__().items() if name not in own}

    @property
    def takes_packed_rows(self) -> bool:
        """Whether the attention can tell rows apart that stand one behind the other, while `ready_to_decode`."""
        implementation = self.model.config._attn_implementation
        if self.config.backbone_config is None:
            return implementation != "flex_attention"
        return implementation == GROUPED_SDPA
