"""Generation with an Eso-LM: `model.generate` as a decoding strategy of transformers' own `GenerationMixin`."""

import logging
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, StoppingCriteriaList
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMode
from transformers.utils import ModelOutput
from transformers.utils.logging import tqdm

from .cache import CachedText, PreallocatedCache
from .canvas import Canvas, StopWatcher, TextFeed
from .decoding import KEYS_AT_A_TIME, Decoder, DecodingStrategy, TokenSampler
from .generation_order import UNMASKING_ORDERS
from .logits_process import for_slots
from .lossless import DRAFT_LENGTHS, LosslessUnmasking
from .sampling import Generators
from .unmasking import ParallelUnmasking, UnmaskingSchedule, plan_rows
from .validation import is_integer, is_number, require_attention_mask, require_shape, require_token_ids, to_python

# Settings of transformers that presuppose decoding from left to right, or that this decoding loop has no place for,
# with the values that switch them off.
LEFT_TO_RIGHT_SETTINGS = {
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "begin_suppress_tokens": (None,),
    "exponential_decay_length_penalty": (None,),
    "watermarking_config": (None,),
}
UNSUPPORTED_SETTINGS = {
    "guidance_scale": (None, 1),
    "penalty_alpha": (None, 0),
    "prefill_chunk_size": (None,),
    "num_beam_groups": (None, 1),
    "low_memory": (None, False),
    "encoder_no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
}

DEFAULT_NUM_CANDIDATES = 16


class EsoGenerationConfig(GenerationConfig):
    """transformers' [`GenerationConfig`] with the fields of an Eso-LM's two phases.

    Sampling is on, and no filter is, unless asked for: the samples follow the model's own distribution.

    Args:
        alpha_0 (`float`, *optional*): Expected fraction of the new tokens that the diffusion phase decodes in
            parallel; the sequential phase decodes the others one by one, left to right. `None`: the model config's.
        num_diffusion_steps (`int` or `str`, *optional*): T, the time steps of the diffusion phase. Steps that reveal
            nothing cost no forward. `None`: as many as there are tokens to generate, of which some share a step;
            "max": so many that no two tokens do, which is one token a forward.
        unmasking_order (`str`, *optional*): Which tokens the diffusion phase takes: "random" (the default; as in
            training), "strided" (far apart from one another, as many a stride as there are steps; without
            `num_diffusion_steps`, strides of about the square root of the length, taken token by token) or
            "left_to_right". The diffusion phase of a strided order has a whole number of strides, so that with few of
            them and a small `alpha_0` single runs are far from the expected fraction.
        block_length (`int`, *optional*): Length of blocks that are generated left to right, both phases in each; the
            diffusion steps are shared among them. Generation stops with the block in which every row has ended.
            `None`: one block.
        confidence_threshold (`float`, *optional*): Adaptive unmasking in the diffusion phase: every forward looks at
            a window of candidate masks and keeps those whose most probable token has at least this probability (of
            each row at least the best), under the model's own distribution, before any filter; the others go back to
            the pool. In [0, 1]: 0 keeps all.
        entropy_bound (`float`, *optional*): Adaptive unmasking that keeps the most certain candidates, as long as the
            entropies of those before each one add up to at most this many nats (arXiv 2505.24857).
        num_candidates (`int`, *optional*): Masks that adaptive unmasking looks at in a forward. `None`: 16.
        lossless (`bool`, *optional*, defaults to `False`): Whether tokens are only drafted in parallel, and kept or
            replaced so that the text is distributed exactly as if drawn one token a forward in the same order.
        draft_length (`int` or `str`, *optional*): Tokens of a draft, with `lossless` (unused where that is `False`);
            "auto" or `None`: chosen for each row by what its drafts have met with. The order does not depend on it.
        lockstep (`bool`, *optional*, defaults to `False`): Whether the rows of a batch share the numbers of tokens of
            their forwards. Each sample alone still follows the right distribution, but those of a call are no longer
            independent of one another: a statistic over them has the error of far fewer. For measurements of speed,
            and for `cache_implementation="dynamic"`, whose rows cannot advance apart.
        progress_bar (`bool`, *optional*, defaults to `False`): Whether to show how many tokens have been decoded.
        kwargs: The fields of [`GenerationConfig`]; `do_sample` defaults to `True` and `top_k` to no filter.

    Raises:
        ValueError: when a field is out of its range.
    """

    def __init__(self, **kwargs):
        kwargs = {name: to_python(value) for name, value in kwargs.items()}
        self.alpha_0 = kwargs.pop("alpha_0", None)
        self.num_diffusion_steps = kwargs.pop("num_diffusion_steps", None)
        self.unmasking_order = kwargs.pop("unmasking_order", None)
        self.block_length = kwargs.pop("block_length", None)
        self.confidence_threshold = kwargs.pop("confidence_threshold", None)
        self.entropy_bound = kwargs.pop("entropy_bound", None)
        self.num_candidates = kwargs.pop("num_candidates", None)
        self.lossless = kwargs.pop("lossless", None)
        self.draft_length = kwargs.pop("draft_length", None)
        self.lockstep = kwargs.pop("lockstep", None)
        self.progress_bar = kwargs.pop("progress_bar", None)
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
        for name in ("max_length", "max_new_tokens", "num_return_sequences"):
            _check_count(name, getattr(self, name))
        # transformers refuses to generate 0 new tokens; here that fills in the holes of the prompt alone.
        max_new_tokens, self.max_new_tokens = self.max_new_tokens, self.max_new_tokens or None
        try:
            super().validate(*args, **kwargs)
        finally:
            self.max_new_tokens = max_new_tokens
        for name, low, high in (
            ("alpha_0", 0, 1),
            ("confidence_threshold", 0, 1),
            ("entropy_bound", 0, float("inf")),
        ):
            value = getattr(self, name)
            if value is not None and not (is_number(value) and low <= value <= high):
                raise ValueError(f"`{name}` must be None or a number in [{low}, {high}], got {value!r}.")
        for name in ("num_diffusion_steps", "block_length", "num_candidates"):
            value = getattr(self, name)
            words = (None, "max") if name == "num_diffusion_steps" else (None,)
            if value not in words and not (is_integer(value) and value >= 1):
                also = ", 'max'" if "max" in words else ""
                raise ValueError(f"`{name}` must be None{also} or a positive integer, got {value!r}.")
        if self.unmasking_order not in (None, *UNMASKING_ORDERS):
            raise ValueError(f"`unmasking_order` must be one of {UNMASKING_ORDERS}, got {self.unmasking_order!r}.")
        criteria = [name for name in ("confidence_threshold", "entropy_bound") if getattr(self, name) is not None]
        if len(criteria) > 1:
            raise ValueError(f"{criteria} are two ways to choose the number of tokens a forward: set one of them.")
        if criteria and self.num_diffusion_steps is not None:
            raise ValueError(
                f"`num_diffusion_steps={self.num_diffusion_steps}` fixes the number of forwards that "
                f"`{criteria[0]}={getattr(self, criteria[0])}` is to find: set one of them (also in "
                f"`model.generation_config`)."
            )
        for name in ("lossless", "lockstep"):
            if not isinstance(getattr(self, name), bool | None):
                raise ValueError(f"`{name}` must be a bool, got {getattr(self, name)!r}.")
        if self.draft_length not in (None, "auto") and not (is_integer(self.draft_length) and self.draft_length >= 1):
            raise ValueError(f"`draft_length` must be None, 'auto' or a positive integer, got {self.draft_length!r}.")
        if self.lossless and criteria:
            raise ValueError(
                f"`lossless` decides by itself how many tokens of a forward it keeps: unset `{criteria[0]}` (also in "
                f"`model.generation_config`)."
            )
        if self.lockstep and (self.lossless or criteria):
            other = "lossless" if self.lossless else criteria[0]
            raise ValueError(f"`{other}` lets each row advance by what it meets with: unset `lockstep`.")
        if self.draft_length is not None and self.lossless is None:
            raise ValueError(f"`draft_length={self.draft_length!r}` is for lossless decoding: set `lossless` too.")
        if self.num_candidates is not None and not criteria:
            raise ValueError(
                f"`num_candidates={self.num_candidates}` is for adaptive unmasking: set `confidence_threshold` or "
                f"`entropy_bound` too."
            )

    def save_pretrained(self, *args, **kwargs):
        """Saves the settings, unless transformers could not load the model with them."""
        self.check_loadable()
        super().save_pretrained(*args, **kwargs)

    def check_loadable(self) -> None:
        """Raises a ValueError for settings that transformers refuses to load with a model."""
        if self.max_new_tokens == 0:
            raise ValueError("`max_new_tokens=0` cannot be saved, since transformers would not load it: unset it.")

    @property
    def is_adaptive(self) -> bool:
        """Whether every forward of the diffusion phase decides itself how many tokens it keeps."""
        return self.confidence_threshold is not None or self.entropy_bound is not None


@dataclass
class EsoGenerateOutput(ModelOutput):
    """What `generate` returns with `return_dict_in_generate=True`.

    Args:
        sequences: (batch, length), the prompt's columns as given, holes filled in, and the new tokens; padding after
            the first end of text.
        num_function_evaluations: NFE, the number of forwards of the model.
        unmasking_steps: (batch, length); 0 = given (or padding), i = revealed by forward i.
        orders: (batch, length), the generation order: the column of the token at each slot, those given first. With it
            `log_likelihood(sequences, orders=orders[:, None], ...)` scores a text again that was written one token a
            forward, or with `lossless`. (Not one that has ended early in another order than left to right: what was
            decided behind its end, and seen by the rest, is padding now. Nor are the forwards of adaptive unmasking
            told by the order alone: candidates that were not kept stood in them too.)
        log_probs: (batch, length), nats; log-probability of each new token when it was drawn, under the model's own
            distribution before any filter; 0 where given (or padding).
        scores: (batch, length, vocab), with `output_scores=True`; the processed scores from which each new token was
            drawn, 0 where given (or padding).
        logits: (batch, length, vocab), with `output_logits=True`; the same before any filter.
        forwards_per_row: (batch,), with `lossless`; the forwards in which each row took part.
        past_key_values: The cache, to be passed to a call that goes on with this text: `input_ids` are then the whole
            text, what is cached and what is new. None without a cache, and with a "dynamic" one.
        drafts_offered, drafts_accepted: (batch,), with `lossless`; the drafts that were judged (the first token of a
            draft is exact and needs no judging; the others of a refused draft count as offered), and kept.

    With `lossless`, `log_probs` are those of the exact conditionals: they add up to log p(x | σ), unless the text has
    ended early.
    """

    sequences: torch.LongTensor
    num_function_evaluations: int | None = None
    unmasking_steps: torch.LongTensor | None = None
    orders: torch.LongTensor | None = None
    log_probs: torch.FloatTensor | None = None
    scores: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    forwards_per_row: torch.LongTensor | None = None
    drafts_offered: torch.LongTensor | None = None
    drafts_accepted: torch.LongTensor | None = None


class EsoGenerationMixin(GenerationMixin):
    """Decodes an Eso-LM: a diffusion phase in parallel, then a sequential phase left to right, with an exact cache.

    `generate` is transformers' own and prepares inputs, length, logits processors and the rest; this class is the
    decoding loop that it calls. The arguments are those of [`EsoGenerationConfig`].
    """

    def generate(self, inputs=None, generation_config=None, *args, **kwargs):
        """Generates text, from prompts, into the holes of prompts, or from nothing.

        Args:
            inputs: (batch, tokens), the prompts; also as `input_ids`. Masks in them are filled in, all other tokens
                stay as they are. None, or (batch, 0): unconditional.
            generation_config: The settings, an [`EsoGenerationConfig`]; or give them one by one. Without a length, 20
                tokens follow the prompts; or none, if a prompt has holes to fill in.
            attention_mask: (batch, tokens), 1 real and 0 padding, on either side.
            generator: A `torch.Generator` for all draws in place of torch's global one; or a list with one for each
                row (samples of a prompt follow one another), which then does not depend on its batch, but for the
                rounding of floating-point numbers.
            past_key_values: A cache of earlier turns of a chat: that of an [`EsoGenerateOutput`], or of a forward over
                the first tokens of each row. `input_ids` are still the whole text; what is cached of it is not
                computed again. The cache itself stays as it is.
            streamer: Gets text as soon as all to its left is known, and drafts if it has `put_draft`; one row only.
            logits_processor, stopping_criteria, ...: As in transformers. Processors get each slot as a row, with the
                text known so far in text order. Criteria get the text known from the left, once for each token that
                joins it, and it ends where they say so; see [`StopWatcher`] for those that look at the clock, such as
                `max_time`: what is not decided by then comes back as masks.

        Returns:
            (batch x num_return_sequences, length) ids: the prompts' columns as given, then the new tokens. Or an
            [`EsoGenerateOutput`] with `return_dict_in_generate`.

        Raises:
            ValueError: for prompts and settings that cannot be used.
        """
        kwargs = {name: to_python(value) for name, value in kwargs.items()}
        kwargs.pop("token_type_ids", None)  # which tokenizers of BERT's kind add to every text
        for name in ("max_length", "max_new_tokens", "num_return_sequences"):
            _check_count(name, kwargs.get(name))
        name = "inputs" if inputs is not None else "input_ids"
        prompts = inputs if inputs is not None else kwargs.pop("input_ids", None)
        if prompts is None and kwargs.get("attention_mask") is not None:
            raise ValueError("`attention_mask` needs `input_ids`.")
        if prompts is not None:
            require_token_ids(name, prompts, self.config.vocab_size)
            require_shape("attention_mask", kwargs.get("attention_mask"), tuple(prompts.shape))
            require_attention_mask(kwargs.get("attention_mask"))
            prompts = prompts.long()
            if prompts.shape[1] == 0:
                # transformers looks for padding at the end of each prompt: empty ones become samples of one.
                kwargs.pop("attention_mask", None)
                settings = (kwargs, vars(generation_config or self.generation_config), vars(self.generation_config))
                samples = next((n for n in (s.get("num_return_sequences") for s in settings) if n is not None), 1)
                kwargs["num_return_sequences"] = samples * len(prompts)
                prompts = prompts[:1]
        if kwargs.get("streamer") is not None:
            kwargs["streamer"] = TextFeed(kwargs["streamer"])
        with _no_advice_on_padding():
            return super().generate(prompts, generation_config, *args, **kwargs)

    def adjust_generation_fn(self, *args, **kwargs):
        # transformers reads generation_config.json into the base class: bring our fields and their checks back.
        super().adjust_generation_fn(*args, **kwargs)
        self.generation_config = _as_eso_generation_config(self.generation_config)

    def _prepare_generation_config(self, generation_config: GenerationConfig | None, **kwargs):
        # transformers checks the arguments with its own class, which refuses to generate 0 new tokens.
        fills_holes_only = is_integer(kwargs.get("max_new_tokens")) and kwargs["max_new_tokens"] == 0
        if fills_holes_only:
            del kwargs["max_new_tokens"]
        prepared, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        if fills_holes_only:
            prepared.max_new_tokens = 0
        return _as_eso_generation_config(prepared), model_kwargs

    def _get_deprecated_gen_repo(self, generation_mode, *args, **kwargs):
        # Modes that transformers has moved out would be loaded from the Hub before they are validated.
        self._check_mode(generation_mode)
        return super()._get_deprecated_gen_repo(generation_mode, *args, **kwargs)

    def _check_mode(self, generation_mode: GenerationMode) -> None:
        if generation_mode not in (GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH):
            raise ValueError(
                f"`generate` got arguments for {generation_mode.value.replace('_', ' ')}, which has no meaning for an "
                f"Eso-LM: it decodes in any order. Leave `num_beams` at 1 and `assistant_model`, "
                f"`prompt_lookup_num_tokens` and the like unset."
            )

    def generate_batch(self, *args, **kwargs):
        """Is not supported: transformers' continuous batching samples next tokens, from clean slots."""
        raise _no_continuous_batching("generate_batch")

    def init_continuous_batching(self, *args, **kwargs):
        """Is not supported, as `generate_batch`."""
        raise _no_continuous_batching("init_continuous_batching")

    def continuous_batching_context_manager(self, *args, **kwargs):
        """Is not supported, as `generate_batch`."""
        raise _no_continuous_batching("continuous_batching_context_manager")

    def compute_transition_scores(self, *args, **kwargs):
        """Has no meaning here: the scores are not those of left-to-right steps."""
        raise ValueError(
            "`compute_transition_scores` presupposes left to right: take `log_probs` of the output of `generate`."
        )

    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs):
        self._check_mode(generation_mode)
        super()._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)

    def _validate_model_kwargs(self, model_kwargs):
        model_kwargs.pop("generator", None)
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

    def _prepare_generated_length(self, generation_config, has_default_max_length, inputs_tensor, **kwargs):
        is_infilling = has_default_max_length and bool((inputs_tensor == self.config.mask_token_id).any())
        if is_infilling and generation_config.max_new_tokens is None:
            generation_config.max_new_tokens = 0
        return super()._prepare_generated_length(
            generation_config=generation_config,
            has_default_max_length=has_default_max_length,
            inputs_tensor=inputs_tensor,
            **kwargs,
        )

    def _validate_generated_length(self, generation_config, input_ids_length, has_default_max_length):
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

    def _validate_settings(self, generation_config: EsoGenerationConfig, is_left_to_right: bool) -> None:
        self.config.validate_architecture()
        off = UNSUPPORTED_SETTINGS if is_left_to_right else UNSUPPORTED_SETTINGS | LEFT_TO_RIGHT_SETTINGS
        for name, values in off.items():
            value = getattr(generation_config, name, None)
            if value not in values:
                why = "is not supported"
                if name in LEFT_TO_RIGHT_SETTINGS:
                    why = "presupposes left to right (alpha_0=0, no holes, no padding)"
                raise ValueError(f"`{name}={value!r}` {why}: leave it unset.")
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
        if generation_config.cache_implementation not in (None, "static", "dynamic"):
            raise ValueError(
                f"`cache_implementation` must be unset (preallocated), 'static' (the same, for compiled forwards) or "
                f"'dynamic': those can drop slots as every decoding step does, got "
                f"{generation_config.cache_implementation!r}."
            )
        if generation_config.use_cache and generation_config.cache_implementation != "dynamic":
            # The masks that judge drafts stand behind those of the last slots.
            num_judging = 0
            if generation_config.lossless:
                fixed = generation_config.draft_length not in (None, "auto")
                longest = generation_config.draft_length if fixed else max(DRAFT_LENGTHS)
                num_judging = max(min(longest, generation_config.max_length) - 1, 0)
            max_length = generation_config.max_length + num_judging
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

    def _sample(
        self,
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: EsoGenerationConfig,
        synced_gpus: bool = False,
        streamer: TextFeed | None = None,
        generator: Generators = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        cache_to_go_on_from: Cache | None = None,
        **model_kwargs,
    ) -> EsoGenerateOutput | torch.LongTensor:
        """The decoding loop, called by `generate` in place of transformers' left-to-right one.

        Each forward takes, on top of the cache, the tokens decided by the one before and then masks at the next slots
        of the generation order. The keys and values of the tokens are kept, those of the masks dropped, and the
        masks' tokens are drawn in parallel (arXiv 2506.01928, section 4). Rows advance independently.
        """
        eos_tokens, pad_token = generation_config._eos_token_tensor, generation_config._pad_token_tensor
        canvas = Canvas(
            input_ids.cpu(),
            None if attention_mask is None else attention_mask.cpu(),
            generation_config.max_length,
            self.config.mask_token_id,
            eos_token_ids=[] if eos_tokens is None else eos_tokens.tolist(),
            pad_token_id=0 if pad_token is None else int(pad_token),
        )
        alpha_0 = generation_config.alpha_0 if generation_config.alpha_0 is not None else self.config.alpha_0
        self._validate_settings(generation_config, is_left_to_right=alpha_0 == 0 and canvas.holds_prefixes())
        _check_generator(generator, canvas.batch)
        if cache_to_go_on_from is not None and cache_to_go_on_from.get_seq_length() > 0:
            _go_on_from(cache_to_go_on_from, past_key_values, canvas)
        watcher = StopWatcher(stopping_criteria, canvas, self.device)
        sampler = TokenSampler(
            for_slots(logits_processor, self.config.vocab_size),
            not generation_config.do_sample,
            generator,
            self.config.mask_token_id,
        )
        strategy = _make_strategy(generation_config, canvas, sampler, alpha_0, use_cache=past_key_values is not None)
        if isinstance(past_key_values, DynamicCache) and canvas.batch > 1 and not strategy.in_lockstep:
            raise ValueError(
                "`cache_implementation='dynamic'` needs rows that advance together: set `lockstep=True` (and see what "
                "it costs), or leave `cache_implementation` unset. Prompts of different lengths or numbers of holes, "
                "adaptive unmasking, `lossless` and a generator for each row always advance apart."
            )
        compiled_forward = None
        if self._valid_auto_compile_criteria({"past_key_values": past_key_values}, generation_config):
            compiled_forward = self.get_compiled_call(generation_config.compile_config)
        decoder = Decoder(self, past_key_values, compiled_forward)
        recorded = {
            name: torch.zeros(
                canvas.batch, canvas.length, self.config.vocab_size, dtype=torch.float32, device=self.device
            )
            for name in ("scores", "logits")
            if generation_config.return_dict_in_generate and getattr(generation_config, f"output_{name}")
        }
        num_forwards, num_open = 0, sum(canvas.num_open)
        progress = tqdm(total=num_open, unit="token", disable=not generation_config.progress_bar)
        decoding = ExitStack()
        try:
            decoding.enter_context(self.ready_to_decode())
            if streamer is not None:
                streamer.start(canvas)
            while self._has_unfinished_sequences(is_finished := canvas.is_finished(), synced_gpus, self.device):
                if is_finished:
                    # Other processes go on, and need this one to take part in gathering the weights.
                    self(input_ids=torch.full((1, 1), self.config.mask_token_id, device=self.device))
                    continue
                logits = decoder(strategy.next_feed())  # (kept slots of all rows, vocab)
                num_forwards += 1
                decisions = strategy.decide(logits, num_forwards)
                for name, values in recorded.items():
                    values[decisions.rows, decisions.columns] = getattr(decisions, name)
                watcher.update()
                progress.update(len(decisions.rows))
                if streamer is not None:
                    streamer.update()
            progress.update(num_open - progress.n)  # a text that has ended leaves some undecided
        finally:
            decoding.close()
            progress.close()
            if streamer is not None:
                streamer.end()

        sequences = canvas.sequences().to(self.device)
        if not generation_config.return_dict_in_generate:
            return sequences
        is_void = canvas.is_void()
        return EsoGenerateOutput(
            sequences=sequences,
            num_function_evaluations=num_forwards,
            unmasking_steps=canvas.unmasking_steps.masked_fill(is_void, 0).to(self.device),
            log_probs=canvas.log_probs.masked_fill(is_void, 0).to(self.device),
            orders=strategy.order.to(self.device),
            past_key_values=_with_its_text(past_key_values, strategy, canvas),
            **{name: tensor.masked_fill_(is_void.to(self.device)[..., None], 0) for name, tensor in recorded.items()},
            **{name: torch.tensor(counts, device=self.device) for name, counts in strategy.statistics().items()},
        )


def _make_strategy(
    generation_config: EsoGenerationConfig, canvas: Canvas, sampler: TokenSampler, alpha_0: float, use_cache: bool
) -> DecodingStrategy:
    """How `generate` decides tokens: in parallel as planned, or adaptively, or without loss."""
    plan = {
        "alpha_0": alpha_0,
        "num_steps": generation_config.num_diffusion_steps,
        "unmasking_order": generation_config.unmasking_order,
        "block_length": generation_config.block_length,
    }
    if generation_config.lossless:
        order, _ = plan_rows(canvas, sampler.generator, in_lockstep=False, **plan)
        return LosslessUnmasking(canvas, order, sampler, use_cache, generation_config.draft_length or "auto")
    num_candidates = None
    if generation_config.is_adaptive:
        num_candidates = generation_config.num_candidates or DEFAULT_NUM_CANDIDATES
    schedule = UnmaskingSchedule(canvas, sampler.generator, bool(generation_config.lockstep), num_candidates, **plan)
    return ParallelUnmasking(
        canvas,
        schedule,
        sampler,
        use_cache,
        generation_config.confidence_threshold,
        generation_config.entropy_bound,
    )


def _go_on_from(given: Cache, cache: PreallocatedCache, canvas: Canvas) -> None:
    """Has `cache` begin with what another one holds of the given tokens of the canvas.

    Raises:
        ValueError: when that is anything else.
    """
    if not all(getattr(layer, "keys", None) is not None for layer in given.layers):
        raise ValueError(f"`past_key_values` must be a cache of keys and values, got {type(given).__name__}.")
    if getattr(given, "is_stale", False):
        raise ValueError("`past_key_values` has been written to since `generate` returned it: pass a copy as it was.")
    text = getattr(given, "text", None)
    length = given.get_seq_length() if text is None else min(max(text.lengths), given.get_seq_length())
    rows = len(given.layers[0].keys)
    if canvas.batch % rows != 0 or length > canvas.prompt_length:
        raise ValueError(
            f"`past_key_values` holds {rows} rows of up to {length} tokens, which are not those of `input_ids`: "
            f"{canvas.batch} rows (with the samples of each) of {canvas.prompt_length}. Pass the whole text as "
            f"`input_ids`, what is cached and what is new."
        )
    repeats = canvas.batch // rows
    if text is None:
        # A cache of a plain forward holds the first tokens of each row.
        if not canvas.is_real[:, :length].all():
            raise ValueError("`past_key_values` of a forward must hold no padding, and `attention_mask` has some.")
        positions = torch.arange(length).expand(rows, -1)
        text = CachedText(canvas.tokens[::repeats, :length], positions, [length] * rows)
    canvas.take_cached(
        CachedText(
            text.tokens.repeat_interleave(repeats, dim=0),
            text.positions.repeat_interleave(repeats, dim=0),
            [min(count, length) for count in text.lengths for _ in range(repeats)],
        )
    )
    cache.copy_from(given, length, repeats)


def _with_its_text(cache: Cache | None, strategy: DecodingStrategy, canvas: Canvas) -> PreallocatedCache | None:
    """The cache, of as many slots as a later call can go on from: those before the first that is not in the text."""
    if not isinstance(cache, PreallocatedCache):
        return None
    is_void = canvas.is_void().gather(1, strategy.order)
    before_void = (is_void.long().cumsum(dim=-1) == 0).sum(dim=-1).tolist()
    lengths = [min(cached, count) for cached, count in zip(strategy.cached, before_void, strict=True)]
    slots = strategy.order[:, : max(lengths)]
    cache.text = CachedText(canvas.tokens.gather(1, slots), canvas.text_positions.gather(1, slots), lengths)
    cache.keep(max(lengths))
    return cache


def _check_count(name: str, value: int | None) -> None:
    low = int(name == "num_return_sequences")
    if value is not None and not (is_integer(value) and value >= low):
        raise ValueError(f"`{name}` must be an integer >= {low}, got {value!r}.")


def _check_generator(generator: Generators, batch: int) -> None:
    generators = generator if isinstance(generator, list) else [generator]
    if generator is not None and not all(isinstance(one, torch.Generator) for one in generators):
        raise ValueError(f"`generator` must be a torch.Generator, or a list of them, got {generator!r}.")
    if isinstance(generator, list) and len(generator) != batch:
        raise ValueError(
            f"`generator` must hold one torch.Generator for each of the {batch} rows (with the samples of each "
            f"prompt), got {len(generator)}."
        )


def _no_continuous_batching(name: str) -> ValueError:
    return ValueError(
        f"`{name}` samples next tokens, and an Eso-LM predicts the token at each slot: use `generate`, whose batches "
        f"may be ragged."
    )


@contextmanager
def _no_advice_on_padding() -> Iterator[None]:
    """Keeps transformers from advising left padding: here either side will do."""

    def is_other(record: logging.LogRecord) -> bool:
        return "right-padding was detected" not in record.getMessage()

    logger = logging.getLogger("transformers.generation.utils")
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def _as_eso_generation_config(generation_config: GenerationConfig) -> EsoGenerationConfig:
    """The same settings as an [`EsoGenerationConfig`], validated."""
    if isinstance(generation_config, EsoGenerationConfig):
        generation_config.validate()
        return generation_config
    given = {name: value for name, value in generation_config.to_dict().items() if value is not None}
    return EsoGenerationConfig.from_dict(given)


__all__ = ["EsoGenerateOutput", "EsoGenerationConfig", "EsoGenerationMixin"]
