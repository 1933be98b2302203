"""transformers' `GenerationMixin`, fitted to decoding in any order.

Its `generate` prepares inputs, lengths, logits processors and caches for a loop that appends one token a step, then
calls `_sample`. What it does otherwise than an Eso-LM needs is overridden here, each with the reason; the rest is used
as it is.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Never

import torch
from transformers import GenerationConfig, GenerationMixin
from transformers.generation import GenerationMode

from .generation_cache import PreallocatedCache
from .generation_configuration import EsoGenerationConfig, as_eso_generation_config
from .generation_decoding import KEYS_AT_A_TIME
from .generation_pace import MAX_MASKS, fixed_rhythm
from .modeling_interface import EsoLM
from .validation import is_integer


class FittedGenerationMixin(GenerationMixin, EsoLM):
    """What of transformers' generation an Eso-LM overrides."""

    generation_config: EsoGenerationConfig

    def adjust_generation_fn(self, *args, **kwargs):
        """transformers reads generation_config.json into the base class: brings our fields and their checks back."""
        super().adjust_generation_fn(*args, **kwargs)
        self.generation_config = as_eso_generation_config(self.generation_config)

    def _prepare_generation_config(self, generation_config: GenerationConfig | None, **kwargs):
        """transformers checks the arguments with its own class, which refuses to generate 0 new tokens."""
        fills_holes_only = is_integer(kwargs.get("max_new_tokens")) and kwargs["max_new_tokens"] == 0
        if fills_holes_only:
            del kwargs["max_new_tokens"]
        prepared, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        if fills_holes_only:
            prepared.max_new_tokens = 0
        return as_eso_generation_config(prepared), model_kwargs

    def _get_deprecated_gen_repo(self, generation_mode, *args, **kwargs):
        """Modes that transformers has moved out would be loaded from the Hub before they are validated."""
        require_sampling(generation_mode)
        return super()._get_deprecated_gen_repo(generation_mode, *args, **kwargs)

    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs):
        """Beams, assistants and the like presuppose left to right."""
        require_sampling(generation_mode)
        super()._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)

    def _validate_model_kwargs(self, model_kwargs):
        """Some are ours. What nobody reads is refused, also where transformers would let it pass."""
        for ours in ("generator", "begins_only"):
            model_kwargs.pop(ours, None)
        super()._validate_model_kwargs(model_kwargs)
        if model_kwargs.get("inputs_embeds") is not None:
            raise ValueError(
                "`generate` takes `input_ids`: holes, ends of text, logits processors and streamers go by the tokens, "
                "which `inputs_embeds` do not show. `forward` takes embeddings."
            )
        prepared = ("input_ids", "attention_mask", "past_key_values", "output_attentions", "output_hidden_states")
        unused = [name for name, value in model_kwargs.items() if value is not None and name not in prepared]
        if unused:
            raise ValueError(f"`generate` has no use for the arguments {unused}.")

    def _maybe_initialize_input_ids_for_generation(self, inputs, bos_token_id, model_kwargs):
        """Without a prompt transformers begins with a `bos_token_id`; here text may begin with nothing."""
        if inputs is None:
            return torch.empty(1, 0, dtype=torch.long, device=self.device)
        return inputs

    def _prepare_generated_length(self, generation_config, has_default_max_length, *args, **kwargs):
        """Left to itself transformers adds 20 tokens, also to a prompt whose holes are to be filled in."""
        is_infilling = has_default_max_length and bool((kwargs["inputs_tensor"] == self.config.mask_token_id).any())
        if is_infilling and generation_config.max_new_tokens is None:
            generation_config.max_new_tokens = 0
        return super()._prepare_generated_length(generation_config, has_default_max_length, *args, **kwargs)

    def _validate_generated_length(self, generation_config, input_ids_length, has_default_max_length):
        """To transformers a prompt that is as long as the text leaves nothing to do; here it may have holes."""
        if input_ids_length > generation_config.max_length:
            raise ValueError(
                f"`max_length={generation_config.max_length}` must be at least the length of the prompt, "
                f"{input_ids_length} tokens; or set `max_new_tokens`."
            )
        if self.max_text_length is not None and generation_config.max_length > self.max_text_length:
            raise ValueError(
                f"`max_length={generation_config.max_length}` (or the prompt with `max_new_tokens`) must be at most "
                f"{self.max_text_length}: the backbone has no embeddings for later positions."
            )
        if input_ids_length < generation_config.max_length:
            super()._validate_generated_length(generation_config, input_ids_length, has_default_max_length)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args):
        """The caches of transformers cannot all forget slots, nor can their rows stand at different places."""
        if generation_config.cache_implementation not in (None, "static", "dynamic"):
            raise ValueError(
                f"`cache_implementation` must be unset (preallocated), 'static' (the same, for compiled forwards) or "
                f"'dynamic': those can drop slots as every decoding step does, got "
                f"{generation_config.cache_implementation!r}."
            )
        if generation_config.use_cache and generation_config.cache_implementation != "dynamic":
            max_length = generation_config.max_length + _num_further_masks(generation_config)
            is_static = generation_config.cache_implementation == "static"
            if is_static:
                # The keys of a step are a whole number of these, also of the last: their shapes are those of any text.
                max_length = math.ceil(max_length / KEYS_AT_A_TIME) * KEYS_AT_A_TIME
            model_kwargs["cache_to_go_on_from"] = model_kwargs.get("past_key_values")
            model_kwargs["past_key_values"] = PreallocatedCache(self.config.num_hidden_layers, max_length, is_static)
        elif model_kwargs.get("past_key_values") is not None:
            raise ValueError(
                "`past_key_values` can be gone on from with `use_cache` and without `cache_implementation='dynamic'` "
                "only."
            )
        else:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)

    def compute_transition_scores(self, *args: Any, **kwargs: Any) -> Never:
        """Has no meaning here: the scores are not those of left-to-right steps."""
        raise ValueError(
            "`compute_transition_scores` presupposes left to right: take `log_probs` of the output of `generate`."
        )


def require_sampling(generation_mode: GenerationMode) -> None:
    """Raises a ValueError for the modes of transformers that presuppose left to right."""
    if generation_mode not in (GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH):
        raise ValueError(
            f"`generate` got arguments for {generation_mode.value.replace('_', ' ')}, which has no meaning for an "
            f"Eso-LM: it decodes in any order. Leave `num_beams` at 1 and `assistant_model`, "
            f"`prompt_lookup_num_tokens` and the like unset."
        )


def _num_further_masks(generation_config: EsoGenerationConfig) -> int:
    """The masks of a forward of lossless decoding that stand behind those of the last slots."""
    if not generation_config.lossless:
        return 0
    draft_length = generation_config.draft_length
    if not is_integer(draft_length):
        return MAX_MASKS
    rhythm = fixed_rhythm(draft_length)
    # No draft is longer than the text.
    return replace(rhythm, length=min(rhythm.length, max(generation_config.max_length, 1))).most_masks


def require_no_prompt_learning(model: FittedGenerationMixin) -> None:
    """Raises a ValueError if PEFT's soft prompts, which would have to be fed as embeddings, are on a model."""
    # PEFT hooks itself into this method.
    peft_model = getattr(model.prepare_inputs_for_generation, "__self__", None)
    if getattr(getattr(peft_model, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError("`generate` does not support PEFT's prompt learning; LoRA and its kin work.")


@contextmanager
def no_advice_on_padding() -> Iterator[None]:
    """Keeps transformers from advising left padding: here either side will do."""

    def is_other(record: logging.LogRecord) -> bool:
        return "right-padding was detected" not in record.getMessage()

    logger = logging.getLogger("transformers.generation.utils")
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)
