"""Generation with an Eso-LM: `model.generate` as a decoding strategy of transformers' own `GenerationMixin`."""

from dataclasses import dataclass

import torch
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import EosTokenCriteria, GenerationMode, MaxLengthCriteria
from transformers.utils import ModelOutput

from .cache import PreallocatedCache
from .generation_order import sample_generation_order
from .noise_schedule import sample_unmasking_counts


class EsoGenerationConfig(GenerationConfig):
    """transformers' [`GenerationConfig`] with the fields of an Eso-LM's two phases.

    Sampling is on, and no filter is, unless asked for: the samples follow the model's own distribution.

    Args:
        alpha_0 (`float`, *optional*): Expected fraction of the new tokens that the diffusion phase decodes in
            parallel; the sequential phase decodes the others one by one, left to right. `None`: the model config's.
        num_diffusion_steps (`int`, *optional*): T, the time steps of the diffusion phase. Steps that reveal nothing
            cost no forward. `None`: as many as there are tokens to generate.
        kwargs: The fields of [`GenerationConfig`]; `do_sample` defaults to `True` and `top_k` to no filter.

    Raises:
        ValueError: when a field is out of its range.
    """

    def __init__(self, **kwargs):
        self.alpha_0 = kwargs.pop("alpha_0", None)
        self.num_diffusion_steps = kwargs.pop("num_diffusion_steps", None)
        kwargs.setdefault("do_sample", True)
        super().__init__(**kwargs)

    @classmethod
    def from_model_config(cls, model_config) -> "EsoGenerationConfig":
        """Takes the special tokens over from a model config, and leaves `alpha_0` to follow the model's."""
        derived = _as_eso_generation_config(GenerationConfig.from_model_config(model_config))
        # A saved config that is marked as derived loses our fields when transformers reads it back.
        derived._from_model_config = False
        return derived

    @staticmethod
    def _get_default_generation_params() -> dict:
        return GenerationConfig._get_default_generation_params() | {"do_sample": True, "top_k": None}

    def validate(self, *args, **kwargs):
        """Checks the fields of the two phases, then those of transformers."""
        super().validate(*args, **kwargs)
        alpha_0, steps = self.alpha_0, self.num_diffusion_steps
        if alpha_0 is not None and not (_is_number(alpha_0) and 0 <= alpha_0 <= 1):
            raise ValueError(f"`alpha_0` must be None or a number in [0, 1], got {alpha_0!r}.")
        if steps is not None and not (isinstance(steps, int) and not isinstance(steps, bool) and steps >= 1):
            raise ValueError(f"`num_diffusion_steps` must be None or a positive integer, got {steps!r}.")


@dataclass
class EsoGenerateOutput(ModelOutput):
    """What `generate` returns with `return_dict_in_generate=True`.

    Args:
        sequences: (batch, length), prompt and new tokens in text order; padding after the first end of text.
        num_function_evaluations: NFE, the number of forwards of the model.
        unmasking_steps: (batch, length); 0 = given (or padding), i = revealed by forward i.
        log_probs: (batch, length), nats; log-probability of each new token when it was drawn, under the model's own
            distribution before any filter; 0 where given (or padding).
    """

    sequences: torch.LongTensor
    num_function_evaluations: int | None = None
    unmasking_steps: torch.LongTensor | None = None
    log_probs: torch.FloatTensor | None = None


class EsoGenerationMixin(GenerationMixin):
    """Decodes an Eso-LM: a diffusion phase in parallel, then a sequential phase left to right, with an exact cache.

    `generate` is transformers' own and prepares inputs, length, logits processors and the rest; this class is the
    decoding loop that it calls. The arguments are those of [`EsoGenerationConfig`]. Without `input_ids` it generates
    unconditionally, from an empty prompt.
    """

    def adjust_generation_fn(self, *args, **kwargs):
        # transformers reads generation_config.json into the base class: bring our fields and their checks back.
        super().adjust_generation_fn(*args, **kwargs)
        self.generation_config = _as_eso_generation_config(self.generation_config)

    def _prepare_generation_config(self, generation_config: GenerationConfig | None, **kwargs):
        prepared, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        return _as_eso_generation_config(prepared), model_kwargs

    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs):
        if generation_mode not in (GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH):
            raise ValueError(
                f"`generate` got arguments for {generation_mode.value.replace('_', ' ')}, which has no meaning for an "
                f"Eso-LM: it decodes in any order. Leave `num_beams` at 1 and `assistant_model`, "
                f"`prompt_lookup_num_tokens` and the like unset."
            )
        if "streamer" in generation_mode_kwargs:
            raise ValueError("`streamer` is not supported: tokens are not decoded left to right.")
        super()._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)

    def _maybe_initialize_input_ids_for_generation(self, inputs, bos_token_id, model_kwargs):
        if inputs is None:
            return torch.empty(1, 0, dtype=torch.long, device=self.device)
        return inputs

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args):
        if model_kwargs.get("past_key_values") is not None:
            raise ValueError("`past_key_values` cannot be passed to `generate`: it makes its own cache.")
        if generation_config.use_cache and generation_config.cache_implementation is None:
            model_kwargs["past_key_values"] = PreallocatedCache(
                self.config.num_hidden_layers, generation_config.max_length
            )
            return
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        cache = model_kwargs.get("past_key_values")
        if cache is not None and not all(layer.is_croppable for layer in cache.layers):
            raise ValueError(
                f"`cache_implementation={generation_config.cache_implementation!r}` cannot drop slots, as every "
                f"decoding step does. Leave it unset, or use 'dynamic'."
            )

    def _sample(
        self,
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: EsoGenerationConfig,
        **model_kwargs,
    ) -> EsoGenerateOutput | torch.LongTensor:
        """The decoding loop, called by `generate` in place of transformers' left-to-right one.

        Each step feeds, on top of the cache, the tokens decided by the step before and then masks at the next slots
        of the generation order. The keys and values of the tokens are kept, those of the masks dropped, and the
        masks' tokens are drawn in parallel (arXiv 2506.01928, section 4).
        """
        self._check_prompt(input_ids, model_kwargs.get("attention_mask"), stopping_criteria)
        cache = model_kwargs.get("past_key_values")
        device = self.device
        input_ids = input_ids.to(device)
        batch, prompt_length = input_ids.shape
        length = generation_config.max_length
        num_new = length - prompt_length

        alpha_0 = generation_config.alpha_0 if generation_config.alpha_0 is not None else self.config.alpha_0
        num_steps = generation_config.num_diffusion_steps or num_new
        # All rows share the counts, each has its own order: every row alone follows the right distribution.
        counts = sample_unmasking_counts(num_new, num_steps, alpha_0)
        num_diffusion = sum(counts)
        counts += [1] * (num_new - num_diffusion)
        new_slots = sample_generation_order(batch, num_new, num_diffusion, device=device) + prompt_length
        prompt_slots = torch.arange(prompt_length, device=device).expand(batch, prompt_length)
        order = torch.cat([prompt_slots, new_slots], dim=-1)

        tokens = input_ids.new_full((batch, length), self.config.mask_token_id)
        tokens[:, :prompt_length] = input_ids
        log_probs = torch.zeros(batch, length, device=device)
        unmasking_steps = torch.zeros_like(tokens)
        end_of_text = EndOfText(generation_config, batch, length, device)

        num_forwards = cached = 0
        decided = prompt_length
        for count in counts:
            positions = order[:, cached : decided + count]
            logits = self(
                input_ids=tokens.gather(1, positions),
                position_ids=positions,
                past_key_values=cache,
                logits_to_keep=count,
            ).logits.float()
            num_forwards += 1
            if cache is not None:
                cache.crop(-count)
                cached = decided

            positions = order[:, decided : decided + count]
            scores = logits
            if len(logits_processor) > 0:
                known = order[:, :decided].sort(dim=-1).values
                scores = _process_logits(logits_processor, tokens.gather(1, known), logits)
            drawn = draw_tokens(scores) if generation_config.do_sample else scores.argmax(dim=-1)
            tokens.scatter_(1, positions, drawn)
            unmasking_steps.scatter_(1, positions, num_forwards)
            if generation_config.return_dict_in_generate:
                drawn_log_probs = logits.log_softmax(dim=-1).gather(-1, drawn[..., None])[..., 0]
                log_probs.scatter_(1, positions, drawn_log_probs)
            decided += count
            end_of_text.update(drawn, positions)
            # From the sequential phase on, everything still to come lies behind the next position.
            if num_diffusion <= decided - prompt_length < num_new and end_of_text.is_before(order[:, decided]):
                break

        is_padding = end_of_text.padding()
        sequences = tokens.masked_fill(is_padding, end_of_text.pad_token_id)
        if not generation_config.return_dict_in_generate:
            return sequences
        return EsoGenerateOutput(
            sequences=sequences,
            num_function_evaluations=num_forwards,
            unmasking_steps=unmasking_steps.masked_fill(is_padding, 0),
            log_probs=log_probs.masked_fill(is_padding, 0),
        )

    def _check_prompt(self, input_ids, attention_mask, stopping_criteria):
        if attention_mask is not None and not attention_mask.all():
            raise ValueError("`attention_mask` must be all ones: prompts of different lengths are not supported.")
        if (input_ids == self.config.mask_token_id).any():
            raise ValueError(
                f"`input_ids` holds the mask id {self.config.mask_token_id}: filling in holes is not supported."
            )
        for criterion in stopping_criteria:
            if not isinstance(criterion, (MaxLengthCriteria, EosTokenCriteria)):
                raise ValueError(
                    f"`stopping_criteria`, `max_time` and `stop_strings` are not supported, "
                    f"got {type(criterion).__name__}."
                )


class EndOfText:
    """Keeps track of the first end-of-text token that was drawn in each row.

    Args:
        generation_config: Prepared by `generate`; without an `eos_token_id` no row ever ends.
        batch, length, device: Shape and device of the sequences.
    """

    def __init__(self, generation_config: GenerationConfig, batch: int, length: int, device: torch.device):
        eos_tokens = generation_config._eos_token_tensor
        self.eos_token_ids = None if eos_tokens is None else eos_tokens.to(device)
        pad_token = generation_config._pad_token_tensor
        self.pad_token_id = 0 if pad_token is None else int(pad_token)
        self.length = length
        self.position = torch.full((batch,), length, device=device)

    def update(self, tokens: torch.LongTensor, positions: torch.LongTensor) -> None:
        """Takes the tokens (batch, count) just drawn at their text positions (batch, count) into account."""
        if self.eos_token_ids is not None:
            ends = positions.masked_fill(~torch.isin(tokens, self.eos_token_ids), self.length)
            self.position = torch.minimum(self.position, ends.amin(dim=-1))

    def is_before(self, positions: torch.LongTensor) -> bool:
        """Whether every row has ended before its text position in `positions` (batch,)."""
        return self.eos_token_ids is not None and bool((self.position < positions).all())

    def padding(self) -> torch.BoolTensor:
        """(batch, length): what follows the end of the text."""
        return torch.arange(self.length, device=self.position.device) > self.position[:, None]


def draw_tokens(scores: torch.FloatTensor, generator: torch.Generator | None = None) -> torch.LongTensor:
    """Draws from softmax(scores) (..., vocab), one uniform number a token, by inverting the CDF in float64.

    In float32, neither Gumbel noise nor a running sum over a vocabulary reaches the tail of the distribution, which
    acts like a lower temperature.
    """
    cdf = scores.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    total = cdf[..., -1:]
    uniform = torch.rand(total.shape, dtype=torch.float64, device=scores.device, generator=generator)
    # Strictly below the total, so that rounding never selects a token of probability 0 at the end.
    target = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cdf, target, right=True)[..., 0]


def _process_logits(
    logits_processor: LogitsProcessorList, known_tokens: torch.LongTensor, logits: torch.FloatTensor
) -> torch.FloatTensor:
    """Applies transformers' processors to logits (batch, count, vocab): each slot is a row of its own, whose
    context is the text known so far, (batch, known), in text order."""
    batch, count, vocab = logits.shape
    context = known_tokens.repeat_interleave(count, dim=0)
    return logits_processor(context, logits.reshape(batch * count, vocab)).view(batch, count, vocab)


def _as_eso_generation_config(generation_config: GenerationConfig) -> EsoGenerationConfig:
    """The same settings as an [`EsoGenerationConfig`], validated."""
    if isinstance(generation_config, EsoGenerationConfig):
        generation_config.validate()
        return generation_config
    given = {name: value for name, value in generation_config.to_dict().items() if value is not None}
    return EsoGenerationConfig.from_dict(given)


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


__all__ = ["EsoGenerateOutput", "EsoGenerationConfig", "EsoGenerationMixin"]
