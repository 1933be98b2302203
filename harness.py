"""Eso-LMs in EleutherAI's lm-evaluation-harness (an optional dependency), as the model `eso`.

python -m eso_lm.harness run --model eso --model_args pretrained=outputs/quickstart,num_orders=8 --tasks ...

It is the harness's own command line, with `eso` registered, for which the harness itself has no plugin path. From
Python, import this module, then use `lm_eval` as ever.
"""

from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

from .configuration_eso import EsoConfig
from .generation_order import sample_scoring_orders
from .modeling_eso import EsoForMaskedDiffusion
from .validation import require_fraction, require_positive_integer

AutoModelForCausalLM.register(EsoConfig, EsoForMaskedDiffusion, exist_ok=True)


@register_model("eso")
class EsoHarnessLM(HFLM):  # type: ignore[misc]  # the harness has no types
    """The harness's Hugging Face model, with the likelihoods and the sampler of an Eso-LM.

    Args:
        pretrained: Name, folder, or a model.
        num_orders: Orders over which each likelihood is averaged. Whether a continuation is the greedy one is that of
            the first.
        alpha_0: Of likelihoods and samples; None: the model's. At 0, likelihoods are left to right, and exact.
        seed: Of the orders: the same for every request, whatever its batch.
        num_diffusion_steps, unmasking_order, entropy_bound, confidence_threshold: Of the samples; unset: the model's.
        kwargs: Those of the harness's `hf` model (batch_size, max_length, dtype, device, ...).
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        num_orders: int = 1,
        alpha_0: float | None = None,
        seed: int = 0,
        num_diffusion_steps: int | None = None,
        unmasking_order: str | None = None,
        entropy_bound: float | None = None,
        confidence_threshold: float | None = None,
        **kwargs: Any,
    ):
        super().__init__(pretrained, backend=kwargs.pop("backend", "causal"), **kwargs)
        require_positive_integer("num_orders", num_orders)
        require_fraction("alpha_0", alpha_0, or_none=True)
        self.num_orders, self.alpha_0, self.seed = num_orders, alpha_0, seed
        settings = {
            "alpha_0": alpha_0,
            "num_diffusion_steps": num_diffusion_steps,
            "unmasking_order": unmasking_order,
            "entropy_bound": entropy_bound,
            "confidence_threshold": confidence_threshold,
        }
        self.generation_settings = {name: value for name, value in settings.items() if value is not None}

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy decoding would write it) of each continuation, given its context."""
        batch_size = override_bs or (self.batch_size if isinstance(self.batch_size, int) else 16)
        alpha_0 = self.model.config.alpha_0 if self.alpha_0 is None else self.alpha_0
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
            # Orders of its own for each request, so that no result depends on its batch.
            orders = []
            for row, (context, continuation) in enumerate(rows):
                length = len(context) + len(continuation)
                everything = torch.ones(1, length, dtype=torch.bool)
                drawn = sample_scoring_orders(
                    everything,
                    is_given[row : row + 1, :length].bool(),
                    self.num_orders if alpha_0 > 0 else 1,
                    alpha_0,
                    torch.Generator().manual_seed(self.seed),
                )[0]
                padding = torch.arange(length, width).expand(len(drawn), -1)
                orders.append(torch.cat([drawn, padding], dim=-1))
            output = self.model.log_likelihood(input_ids, is_real, is_given, orders=torch.stack(orders))
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
        return self.model.generate(
            context,
            max_length=max_length,
            stop_strings=stop,
            tokenizer=self.tokenizer,
            pad_token_id=self.tokenizer.pad_token_id,
            **self.generation_settings | kwargs,
        )


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
