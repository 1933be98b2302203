"""Eso-LMs in EleutherAI's lm-evaluation-harness (an optional dependency), as the model `eso`.

python -m eso_lm.harness run --model eso --model_args pretrained=outputs/quickstart,num_orders=8 --tasks ...

It is the harness's own command line, with `eso` registered, for which the harness itself has no plugin path. From
Python, import this module, then use `lm_eval` as ever.
"""

from typing import Any, Literal

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

from .configuration_eso import EsoConfig
from .generation_configuration import EsoGenerationConfig
from .modeling_eso import EsoForMaskedDiffusion
from .validation import require_fraction, require_positive_integer

AutoModelForCausalLM.register(EsoConfig, EsoForMaskedDiffusion, exist_ok=True)


@register_model("eso")
class EsoHarnessLM(HFLM):  # type: ignore[misc]  # the harness has no types
    """The harness's Hugging Face model, with the likelihoods and the sampler of an Eso-LM.

    Args:
        pretrained: Name, folder, or a model.
        num_orders: Orders, or plans of a sampler, over which each likelihood is averaged. Whether a continuation is
            the greedy one is that of the first.
        alpha_0: Of likelihoods and samples; None: the model's. At 0, likelihoods are left to right, and exact.
        seed: Of the orders: the same for every request, whatever its batch.
        num_diffusion_steps, unmasking_order, block_length, entropy_bound, confidence_threshold: A sampler: that of the
            samples, and likelihoods are those under it (see `log_likelihood`). All unset: samples are the model's
            own, and likelihoods those of one token a forward.
        kwargs: Those of the harness's `hf` model (batch_size, max_length, dtype, device, ...).

    Raises:
        ValueError: for numbers out of range, and for settings that exclude one another.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        num_orders: int = 1,
        alpha_0: float | None = None,
        seed: int = 0,
        num_diffusion_steps: int | Literal["max"] | None = None,
        unmasking_order: str | None = None,
        block_length: int | None = None,
        entropy_bound: float | None = None,
        confidence_threshold: float | None = None,
        **kwargs: Any,
    ):
        super().__init__(pretrained, backend=kwargs.pop("backend", "causal"), **kwargs)
        require_positive_integer("num_orders", num_orders)
        require_fraction("alpha_0", alpha_0, or_none=True)
        self.num_orders, self.alpha_0, self.seed = num_orders, alpha_0, seed
        sampler = {
            "num_diffusion_steps": num_diffusion_steps,
            "unmasking_order": unmasking_order,
            "block_length": block_length,
            "entropy_bound": entropy_bound,
            "confidence_threshold": confidence_threshold,
        }
        self.sampler = {name: value for name, value in sampler.items() if value is not None}
        EsoGenerationConfig(**self.sampler)  # checks them

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy decoding would write it) of each continuation, given its context."""
        batch_size = override_bs or (self.batch_size if isinstance(self.batch_size, int) else 16)
        # Longest first, so that memory runs out at once or never.
        order = sorted(range(len(requests)), key=lambda index: -len(requests[index][1]) - len(requests[index][2]))
        results: list[Any] = [None] * len(requests)
        starts = range(0, len(requests), batch_size)
        for start in tqdm(starts, disable=disable_tqdm or self.rank != 0, desc="Log-likelihoods"):
            batch = order[start : start + batch_size]
            rows = [(context, continuation) for _, context, continuation in (requests[index] for index in batch)]
            # As the harness does: what is too long loses its beginning, but for one token of context.
            rows = [
                (
                    context[max(0, len(context) + len(continuation) - self.max_length - 1) :],
                    continuation[-self.max_length :],
                )
                for context, continuation in rows
            ]
            width = max(len(context) + len(continuation) for context, continuation in rows)
            input_ids = torch.zeros(len(rows), width, dtype=torch.long)
            is_real, is_given = torch.zeros_like(input_ids), torch.zeros_like(input_ids)
            for row, (context, continuation) in enumerate(rows):
                length = len(context) + len(continuation)
                input_ids[row, :length] = torch.tensor(context + continuation)
                is_real[row, :length] = 1
                is_given[row, : len(context)] = 1
            output = self.model.log_likelihood(
                input_ids,
                is_real,
                is_given,
                num_orders=self.num_orders,
                alpha_0=self.alpha_0,
                # One for each request, so that no result depends on its batch.
                generator=[torch.Generator().manual_seed(self.seed) for _ in rows],
                **self.sampler,
            )
            for row, index in enumerate(batch):
                results[index] = (float(output.log_likelihood[row]), bool(output.is_greedy[row, 0].all()))
                if requests[index][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[index][0], results[index])
        return results

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **kwargs: Any) -> torch.Tensor:
        """Continues contexts, (batch, tokens), padded on the left, until one of the strings in `stop`."""
        temperature = kwargs.pop("temperature", None)
        if temperature:
            kwargs = {"do_sample": True, "temperature": temperature} | kwargs
        elif temperature == 0 or "do_sample" not in kwargs:
            kwargs["do_sample"] = False
        if self.alpha_0 is not None:
            kwargs = {"alpha_0": self.alpha_0} | kwargs
        return self.model.generate(
            context,
            max_length=max_length,
            stop_strings=stop,
            tokenizer=self.tokenizer,
            pad_token_id=self.tokenizer.pad_token_id,
            **self.sampler | kwargs,
        )


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
