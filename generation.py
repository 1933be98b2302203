"""Generation with an Eso-LM: `model.generate` as a decoding strategy of transformers' own `GenerationMixin`."""

from dataclasses import dataclass

import torch
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import EosTokenCriteria, GenerationMode, MaxLengthCriteria
from transformers.utils import ModelOutput

from .cache import PreallocatedCache
from .configuration_eso import is_integer, is_number
from .generation_order import UNMASKING_ORDERS, plan_generation

# Settings of transformers that presuppose decoding from left to right, or that this decoding loop has no place for,
# with the values that switch them off.
LEFT_TO_RIGHT_SETTINGS = {
    "min_new_tokens": (None, 0),
    "min_length": (None, 0),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "begin_suppress_tokens": (None,),
    "exponential_decay_length_penalty": (None,),
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "sequence_bias": (None,),
    "watermarking_config": (None,),
}
UNSUPPORTED_SETTINGS = {
    "guidance_scale": (None, 1),
    "penalty_alpha": (None, 0),
    "prefill_chunk_size": (None,),
    "output_scores": (None, False),
    "output_logits": (None, False),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
}


class EsoGenerationConfig(GenerationConfig):
    """transformers' [`GenerationConfig`] with the fields of an Eso-LM's two phases.

    Sampling is on, and no filter is, unless asked for: the samples follow the model's own distribution.

    Args:
        alpha_0 (`float`, *optional*): Expected fraction of the new tokens that the diffusion phase decodes in
            parallel; the sequential phase decodes the others one by one, left to right. `None`: the model config's.
        num_diffusion_steps (`int`, *optional*): T, the time steps of the diffusion phase. Steps that reveal nothing
            cost no forward. `None`: as many as there are tokens to generate.
        unmasking_order (`str`, *optional*): Which tokens the diffusion phase takes: "random" (the default; as in
            training), "strided" (far apart from one another) or "left_to_right".
        block_length (`int`, *optional*): Length of blocks that are generated left to right, both phases in each; the
            diffusion steps are shared among them. Generation stops with the block in which every row has ended.
            `None`: one block.
        kwargs: The fields of [`GenerationConfig`]; `do_sample` defaults to `True` and `top_k` to no filter.

    Raises:
        ValueError: when a field is out of its range.
    """

    def __init__(self, **kwargs):
        self.alpha_0 = kwargs.pop("alpha_0", None)
        self.num_diffusion_steps = kwargs.pop("num_diffusion_steps", None)
        self.unmasking_order = kwargs.pop("unmasking_order", None)
        self.block_length = kwargs.pop("block_length", None)
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
        defaults = {"do_sample": True, "top_k": None, "unmasking_order": "random"}
        return GenerationConfig._get_default_generation_params() | defaults

    def validate(self, *args, **kwargs):
        """Checks the fields of the two phases, and those of transformers."""
        for name, low in (("max_length", 0), ("max_new_tokens", 1), ("num_return_sequences", 1)):
            value = getattr(self, name)
            if value is not None and not (is_integer(value) and value >= low):
                raise ValueError(f"`{name}` must be an integer >= {low}, got {value!r}.")
        super().validate(*args, **kwargs)
        alpha_0 = self.alpha_0
        if alpha_0 is not None and not (is_number(alpha_0) and 0 <= alpha_0 <= 1):
            raise ValueError(f"`alpha_0` must be None or a number in [0, 1], got {alpha_0!r}.")
        for name in ("num_diffusion_steps", "block_length"):
            value = getattr(self, name)
            if value is not None and not (is_integer(value) and value >= 1):
                raise ValueError(f"`{name}` must be None or a positive integer, got {value!r}.")
        if self.unmasking_order not in (None, *UNMASKING_ORDERS):
            raise ValueError(f"`unmasking_order` must be one of {UNMASKING_ORDERS}, got {self.unmasking_order!r}.")


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

    def generate(self, inputs=None, generation_config=None, *args, **kwargs):
        """Generates text; see [`EsoGenerationConfig`] and transformers' `generate` for the arguments.

        Args:
            inputs: (batch, tokens), the prompts; also as `input_ids`. None, or (batch, 0): unconditional.
            generation_config: The settings, an [`EsoGenerationConfig`]; or give them one by one.

        Returns:
            (batch x num_return_sequences, length) ids, or an [`EsoGenerateOutput`] with `return_dict_in_generate`.

        Raises:
            ValueError: for prompts and settings that cannot be used.
        """
        name = "inputs" if inputs is not None else "input_ids"
        prompts = inputs if inputs is not None else kwargs.pop("input_ids", None)
        if prompts is None and kwargs.get("attention_mask") is not None:
            raise ValueError("`attention_mask` needs `input_ids`.")
        if prompts is not None:
            prompts = self._check_prompts(name, prompts, kwargs.get("attention_mask"))
            if prompts.shape[1] == 0:
                # transformers looks for padding at the end of each prompt: empty ones become samples of one.
                kwargs.pop("attention_mask", None)
                settings = (kwargs, vars(generation_config or self.generation_config), vars(self.generation_config))
                samples = next((n for n in (s.get("num_return_sequences") for s in settings) if n is not None), 1)
                kwargs["num_return_sequences"] = samples * len(prompts)
                prompts = prompts[:1]
        return super().generate(prompts, generation_config, *args, **kwargs)

    def _check_prompts(self, name: str, prompts, attention_mask) -> torch.LongTensor:
        if not isinstance(prompts, torch.Tensor) or prompts.dim() != 2 or len(prompts) == 0:
            given = tuple(prompts.shape) if isinstance(prompts, torch.Tensor) else type(prompts).__name__
            raise ValueError(f"`{name}` must be a tensor of shape (batch, tokens), got {given}.")
        if prompts.is_floating_point() or prompts.dtype == torch.bool:
            raise ValueError(f"`{name}` must hold integer ids, got {prompts.dtype}.")
        if prompts.numel() > 0 and not 0 <= prompts.min() <= prompts.max() < self.config.vocab_size:
            raise ValueError(
                f"`{name}` must hold ids in [0, {self.config.vocab_size - 1}], got ids from {prompts.min()} to "
                f"{prompts.max()}."
            )
        if attention_mask is not None and attention_mask.shape != prompts.shape:
            raise ValueError(
                f"`attention_mask` must have the shape of `{name}`, {tuple(prompts.shape)}, "
                f"got {tuple(attention_mask.shape)}."
            )
        return prompts.long()

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

    def _validate_model_kwargs(self, model_kwargs):
        super()._validate_model_kwargs(model_kwargs)
        prepared = ("input_ids", "attention_mask", "past_key_values", "output_attentions", "output_hidden_states")
        unused = [name for name, value in model_kwargs.items() if value is not None and name not in prepared]
        if unused:
            raise ValueError(f"`generate` has no use for the arguments {unused}.")

    def _validate_settings(self, generation_config: EsoGenerationConfig, alpha_0: float) -> None:
        self.config.validate_architecture()
        off = UNSUPPORTED_SETTINGS if alpha_0 == 0 else UNSUPPORTED_SETTINGS | LEFT_TO_RIGHT_SETTINGS
        for name, values in off.items():
            value = getattr(generation_config, name, None)
            if value not in values:
                why = "is not supported" if name in UNSUPPORTED_SETTINGS else "presupposes left to right (alpha_0=0)"
                raise ValueError(f"`{name}={value!r}` {why}: leave it unset.")
        if alpha_0 > 0 and any(len(word) > 1 for word in generation_config.bad_words_ids or ()):
            raise ValueError("`bad_words_ids` of several tokens presuppose left to right (alpha_0=0): leave them out.")
        eos_token_ids = generation_config._eos_token_tensor
        for name, ids in (
            ("pad_token_id", [] if generation_config.pad_token_id is None else [generation_config.pad_token_id]),
            ("eos_token_id", [] if eos_token_ids is None else eos_token_ids.tolist()),
        ):
            for token_id in ids:
                if not 0 <= token_id < self.config.vocab_size or token_id == self.config.mask_token_id:
                    raise ValueError(
                        f"`{name}` must be an id of the vocabulary, in [0, {self.config.vocab_size - 1}], and not the "
                        f"mask ({self.config.mask_token_id}), got {token_id}."
                    )
        # PEFT hooks itself into this method: soft prompts would have to be fed as embeddings.
        peft_model = getattr(self.prepare_inputs_for_generation, "__self__", None)
        if getattr(getattr(peft_model, "active_peft_config", None), "is_prompt_learning", False):
            raise ValueError("`generate` does not support PEFT's prompt learning; LoRA and its kin work.")

    def _maybe_initialize_input_ids_for_generation(self, inputs, bos_token_id, model_kwargs):
        if inputs is None:
            return torch.empty(1, 0, dtype=torch.long, device=self.device)
        return inputs

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args):
        if model_kwargs.get("past_key_values") is not None:
            raise ValueError("`past_key_values` cannot be passed to `generate`: it makes its own cache.")
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"`cache_implementation` must be unset (preallocated) or 'dynamic', which can drop slots as every "
                f"decoding step does, got {generation_config.cache_implementation!r}."
            )
        if generation_config.use_cache and generation_config.cache_implementation is None:
            model_kwargs["past_key_values"] = PreallocatedCache(
                self.config.num_hidden_layers, generation_config.max_length
            )
        else:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)

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
        alpha_0 = generation_config.alpha_0 if generation_config.alpha_0 is not None else self.config.alpha_0
        self._validate_settings(generation_config, alpha_0)
        self._refuse_unsupported_prompts(input_ids, model_kwargs.get("attention_mask"), stopping_criteria)
        cache = model_kwargs.get("past_key_values")
        device = self.device
        input_ids = input_ids.to(device)
        batch, prompt_length = input_ids.shape
        length = generation_config.max_length
        num_new = length - prompt_length

        new_slots, counts = plan_generation(
            batch,
            num_new,
            alpha_0,
            generation_config.num_diffusion_steps,
            generation_config.unmasking_order,
            generation_config.block_length,
            device,
        )
        prompt_slots = torch.arange(prompt_length, device=device).expand(batch, prompt_length)
        order = torch.cat([prompt_slots, new_slots + prompt_length], dim=-1)
        first_position_left = order.flip(-1).cummin(dim=-1).values.flip(-1)

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
                scores[..., self.config.mask_token_id] = -torch.inf
            if not scores.amax(dim=-1).isfinite().all():
                raise ValueError(
                    "No token can be drawn: the scores of a slot are NaN, or -inf for every token. Look for an "
                    "overflow in the model (float16?) or for a `logits_processor` that forbids everything."
                )
            drawn = draw_tokens(scores) if generation_config.do_sample else scores.argmax(dim=-1)
            tokens.scatter_(1, positions, drawn)
            unmasking_steps.scatter_(1, positions, num_forwards)
            if generation_config.return_dict_in_generate:
                drawn_log_probs = logits.log_softmax(dim=-1).gather(-1, drawn[..., None])[..., 0]
                log_probs.scatter_(1, positions, drawn_log_probs)
            decided += count
            end_of_text.update(drawn, positions)
            if decided < length and end_of_text.is_before(first_position_left[:, decided]):
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

    def _refuse_unsupported_prompts(self, input_ids, attention_mask, stopping_criteria):
        if attention_mask is not None and not attention_mask.all():
            raise ValueError(
                "`attention_mask` must be all ones: generate for prompts of different lengths one at a time."
            )
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


__all__ = ["EsoGenerateOutput", "EsoGenerationConfig", "EsoGenerationMixin"]
