"""Continuous batching: requests that come and go share the forwards of one model, by transformers' interface."""

from typing import Any, cast

import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.utils import WorkloadHints
from transformers.utils.logging import tqdm

from .batching_manager import EsoBatchingManager, names_of_samples, num_samples
from .batching_results import EsoRequestOutput
from .generation import EsoGenerationMixin
from .generation_configuration import as_eso_generation_config, require_generation_config


class EsoBatchingMixin(EsoGenerationMixin):
    """transformers' continuous batching, for an Eso-LM."""

    def init_continuous_batching(
        self,
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
        workload_hints: Any = None,
    ) -> EsoBatchingManager:
        """Makes a manager of requests that share forwards; `start` it, and `stop` it in the end.

        Args:
            generation_config: The settings of requests that bring none of their own. None: the model's.
            continuous_batching_config, workload_hints: As for [`EsoBatchingManager`].

        Raises:
            ValueError: as [`EsoBatchingManager`].
        """
        require_generation_config(generation_config)
        cached = getattr(self, "_cached_continuous_batching_manager", None)
        if cached is not None:
            return cached
        settings = as_eso_generation_config(generation_config or self.generation_config)
        config = continuous_batching_config or ContinuousBatchingConfig()
        return EsoBatchingManager(self, settings, config, workload_hints)

    @torch.no_grad()
    def generate_batch(  # type: ignore[override]  # settings of `generate`
        self,
        inputs: list[list[int]],
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
        record_timestamps: bool = False,
        progress_bar: bool = False,
        persistent_manager: bool = False,
        warmup: bool = True,
        **settings: Any,
    ) -> dict[str, EsoRequestOutput]:
        """Generates from many prompts of any lengths, as many at a time as there is memory for.

        Args:
            inputs: The prompts; masks in them are filled in.
            generation_config: The settings. None: the model's.
            continuous_batching_config: As for [`EsoBatchingManager`].
            record_timestamps: Whether to note when each token was known from the left.
            progress_bar: Whether to show how many prompts are done.
            persistent_manager: Whether to keep the manager, and its memory, for the next call.
            warmup: Nothing needs warming up.
            settings: As for `add_request`; `seed` is that of the first prompt, and those of the others follow.

        Returns:
            What has become of each, by the names of their requests, in the order of the prompts; with
            `num_return_sequences`, the samples of a prompt one behind the other.

        Raises:
            ValueError: for prompts and settings that `generate` refuses, before anything is generated.
            RuntimeError: when the forwards themselves fail.
        """
        if not isinstance(inputs, list):
            raise ValueError(f"`inputs` must be a list of prompts, each a list of token ids, got {inputs!r:.80}.")
        if not inputs:
            return {}
        lengths = [len(prompt) for prompt in inputs if isinstance(prompt, list)]
        new_tokens = settings.get("max_new_tokens") or getattr(generation_config, "max_new_tokens", None)
        hints = WorkloadHints(max(lengths, default=0), new_tokens or 0, len(inputs))
        manager_of_call = self.continuous_batching_context_manager(
            generation_config=generation_config,
            continuous_batching_config=continuous_batching_config,
            persistent_manager=persistent_manager,
            workload_hints=hints if new_tokens else None,
        )
        with manager_of_call as manager:
            try:
                added = manager.add_requests(inputs, record_timestamps=record_timestamps, **settings)
                samples = num_samples(manager.generation_config, settings)
                names = [name for request_id in added for name in names_of_samples(request_id, samples)]
                waiting = cast(EsoBatchingManager, manager).wait_for(names)
                progress = tqdm(waiting, total=len(names), unit="request", disable=not progress_bar)
                return {result.request_id: result for result in progress}
            except BaseException:
                manager.stop(block=False, hard_stop=True)
                raise


__all__ = ["EsoBatchingMixin"]
