"""Generation with an Eso-LM: `model.generate` as a decoding strategy of transformers' own `GenerationMixin`."""

from typing import Any, cast

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers.cache_utils import Cache, DynamicCache

from .generation_cache import PreallocatedCache
from .generation_canvas import Canvas, take_over_cache
from .generation_configuration import (
    EsoGenerateOutput,
    EsoGenerationConfig,
    require_count,
    require_generation_config,
    require_special_tokens,
    require_supported_settings,
)
from .generation_decoding import Decoder, DecodingStrategy
from .generation_logits_process import for_slots
from .generation_lossless import LosslessUnmasking
from .generation_observers import Observers, ScoreRecorder, StopWatcher, TextFeed
from .generation_pace import paces_of
from .generation_plan import GenerationPlan, plan_rows
from .generation_sampling import Generators, TokenSampler, require_generators
from .generation_session import GenerationSession
from .generation_transformers import (
    FittedGenerationMixin,
    no_advice_on_padding,
    require_no_prompt_learning,
    require_sampling,
)
from .generation_unmasking import ParallelUnmasking
from .modeling_drafting import EsoDraftHead, require_draft_head
from .validation import require_attention_mask, require_shape, require_token_ids, to_python


class EsoGenerationMixin(FittedGenerationMixin):
    """Decodes an Eso-LM: a diffusion phase in parallel, then a sequential phase left to right, with an exact cache.

    `generate` is transformers' own and prepares inputs, length, logits processors and the rest; this class is the
    decoding loop that it calls. The arguments are those of [`EsoGenerationConfig`].
    """

    def generate(  # type: ignore[override]  # transformers' own returns its own outputs
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> EsoGenerateOutput | torch.Tensor:
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
            Ids, (batch x num_return_sequences, length), of the prompts' columns as given, then of the new tokens. Or
            an [`EsoGenerateOutput`] with `return_dict_in_generate`.

        Raises:
            ValueError: for prompts and settings that cannot be used.
        """
        require_generation_config(generation_config)
        kwargs = {name: to_python(value) for name, value in kwargs.items()}
        kwargs.pop("token_type_ids", None)  # which tokenizers of BERT's kind add to every text
        if kwargs.get("cache_implementation") == "paged":
            raise ValueError("`cache_implementation='paged'` is continuous batching: call `generate_batch`.")
        for name in ("max_length", "max_new_tokens", "num_return_sequences"):
            require_count(name, kwargs.get(name))
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
        with no_advice_on_padding():
            return cast(EsoGenerateOutput, super().generate(prompts, generation_config, *args, **kwargs))

    def begin_generation(self, *args: Any, **kwargs: Any) -> GenerationSession:
        """What `generate` does before its first forward, with the same arguments; the forwards are the caller's.

        The text stands in a cache of `session.num_slots` slots a row; the session's own has no memory yet.

        Raises:
            ValueError: as `generate`.
        """
        return cast(GenerationSession, self.generate(*args, begins_only=True, **kwargs))

    def _sample(  # type: ignore[override]  # what `generate` hands over is ours already
        self,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: EsoGenerationConfig,
        synced_gpus: bool = False,
        begins_only: bool = False,
        **begin_kwargs: Any,
    ) -> EsoGenerateOutput | torch.Tensor | GenerationSession:
        """The decoding loop, called by `generate` in place of transformers' left-to-right one.

        Each forward takes, on top of the cache, the tokens decided by the one before and then masks at the next slots
        of the generation order. The keys and values of the tokens are kept, those of the masks dropped, and the
        masks' tokens are drawn in parallel (arXiv 2506.01928, section 4). Rows advance independently.
        """
        arguments = (input_ids, logits_processor, stopping_criteria, generation_config)
        if begins_only:
            return self._begin(*arguments, **begin_kwargs)
        with self.ready_to_decode(), self._begin(*arguments, **begin_kwargs) as session:
            decoder = self._make_decoder(generation_config, session.cache, session.strategy, session.canvas)
            session.start()
            while self._has_unfinished_sequences(is_finished := session.is_finished(), synced_gpus, self.device):
                if is_finished:
                    # Other processes go on, and need this one to take part in gathering the weights.
                    self(input_ids=torch.full((1, 1), self.config.mask_token_id, device=self.device))
                    continue
                session.take(decoder(session.next_feed()))
        if not generation_config.return_dict_in_generate:
            return session.canvas.sequences().to(self.device)
        return session.output(self.device)

    def _begin(
        self,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: EsoGenerationConfig,
        streamer: TextFeed | None = None,
        generator: Generators = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        cache_to_go_on_from: Cache | None = None,
        **model_kwargs: Any,
    ) -> GenerationSession:
        """The texts, how they are to be written, and who follows that."""
        canvas = _make_canvas(input_ids, attention_mask, generation_config, self.config.mask_token_id)
        alpha_0 = self._check_settings(generation_config, canvas)
        require_generators(generator, canvas.batch)
        if cache_to_go_on_from is not None and cache_to_go_on_from.get_seq_length() > 0:
            take_over_cache(cache_to_go_on_from, cast(PreallocatedCache, past_key_values), canvas)
        watcher = StopWatcher(stopping_criteria, canvas, self.device)
        sampler = self._make_sampler(generation_config, logits_processor, generator)
        plan = plan_rows(canvas, generator, alpha_0, generation_config)
        recorded = [name for name in ("scores", "logits") if getattr(generation_config, f"output_{name}")]
        recorder = ScoreRecorder(
            recorded if generation_config.return_dict_in_generate else [], canvas, self.config.vocab_size, self.device
        )
        strategy = self._make_strategy(generation_config, canvas, plan, sampler, past_key_values is not None)
        observers = Observers(canvas, watcher, recorder, streamer, bool(generation_config.progress_bar))
        return GenerationSession(canvas, strategy, observers, generation_config, past_key_values)

    def sampler_for(
        self,
        canvas: Canvas,
        generation_config: GenerationConfig | None,
        logits_processor: list[LogitsProcessor] | None,
        **settings: Any,
    ) -> tuple[EsoGenerationConfig, float, TokenSampler]:
        """With what `generate` would fill in a canvas, if it were given these settings: `log_likelihood` asks.

        Returns:
            All settings, with those that the model's own generation config adds; alpha_0; and how tokens are chosen.

        Raises:
            ValueError: for settings that `generate` would refuse, or that are none.
        """
        require_generation_config(generation_config)
        settings = {name: to_python(value) for name, value in settings.items()}
        prepared, others = self._prepare_generation_config(generation_config, **settings)
        if others:
            raise ValueError(f"{sorted(others)} are not settings of `generate` that text can be scored with.")
        require_sampling(prepared.get_generation_mode())
        prepared.max_length, prepared.max_new_tokens = canvas.length, None
        self._prepare_special_tokens(prepared, device=self.device)
        alpha_0 = self._check_settings(prepared, canvas)
        processors = self._get_logits_processor(
            prepared,
            # What no row has to fill in, at the left, is the prompt.
            input_ids_seq_length=int((canvas.is_open.any(dim=0).long().cumsum(dim=0) == 0).sum()),
            logits_processor=LogitsProcessorList(logits_processor or []),
            device=cast(Any, self.device),  # any device will do
            model_kwargs={},
        )
        return prepared, alpha_0, self._make_sampler(prepared, processors, None)

    def _make_sampler(
        self, generation_config: EsoGenerationConfig, logits_processor: LogitsProcessorList, generator: Generators
    ) -> TokenSampler:
        processors = for_slots(logits_processor, self.config.vocab_size)
        return TokenSampler(processors, not generation_config.do_sample, generator, self.config.mask_token_id)

    def _check_settings(self, generation_config: EsoGenerationConfig, canvas: Canvas) -> float:
        """Raises a ValueError for settings that cannot be used; returns the alpha_0 that they come to."""
        alpha_0 = generation_config.alpha_0 if generation_config.alpha_0 is not None else self.config.alpha_0
        self.config.validate_architecture()
        is_left_to_right = alpha_0 == 0 and canvas.holds_prefixes()
        require_supported_settings(generation_config, is_left_to_right)
        require_special_tokens(generation_config, self.config.vocab_size, self.config.mask_token_id)
        require_no_prompt_learning(self)
        self.draft_head_for(generation_config)
        return alpha_0

    def _make_strategy(
        self,
        generation_config: EsoGenerationConfig,
        canvas: Canvas,
        plan: GenerationPlan,
        sampler: TokenSampler,
        use_cache: bool,
    ) -> DecodingStrategy:
        """How tokens are decided: in parallel as planned, or adaptively, or without loss."""
        head = self.draft_head_for(generation_config)
        if generation_config.lossless:
            draft_length = generation_config.draft_length or "auto"
            paces = paces_of(self, draft_length, canvas.batch, canvas.length, sampler.generator)
            return LosslessUnmasking(canvas, plan, sampler, use_cache, paces, head)
        return ParallelUnmasking(canvas, plan, sampler, use_cache, generation_config, head)

    def draft_head_for(self, generation_config: EsoGenerationConfig | None) -> EsoDraftHead | None:
        """The draft head, if there is one and it is not switched off."""
        wanted = None if generation_config is None else generation_config.use_draft_head
        if wanted:
            reason = "`use_draft_head=True`, given or of the generation config, asks for a draft head (unset it)"
            return require_draft_head(self, reason)
        return None if wanted is False else self.draft_head

    def _make_decoder(
        self,
        generation_config: EsoGenerationConfig,
        cache: Cache | None,
        strategy: DecodingStrategy,
        canvas: Canvas,
    ) -> Decoder:
        """What runs the forwards, compiled where transformers would compile them."""
        if isinstance(cache, DynamicCache) and canvas.batch > 1 and not strategy.in_lockstep:
            raise ValueError(
                "`cache_implementation='dynamic'` needs rows that advance together: leave it unset, or set "
                "`lockstep=True` (and see what it costs). Rows always advance apart with prompts of different lengths "
                "or numbers of holes, adaptive unmasking, `lossless`, or a generator for each."
            )
        compiled_forward = None
        if self._valid_auto_compile_criteria({"past_key_values": cache}, generation_config):
            compiled_forward = self.get_compiled_call(generation_config.compile_config)
        return Decoder(self, cache, compiled_forward)


def _make_canvas(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    generation_config: EsoGenerationConfig,
    mask_token_id: int,
) -> Canvas:
    """The text as it stands before the first forward."""
    eos_tokens, pad_token = generation_config._eos_token_tensor, generation_config._pad_token_tensor
    return Canvas(
        input_ids.cpu(),
        None if attention_mask is None else attention_mask.cpu(),
        generation_config.max_length,
        mask_token_id,
        eos_token_ids=[] if eos_tokens is None else eos_tokens.tolist(),
        pad_token_id=0 if pad_token is None else int(pad_token),
    )


__all__ = ["EsoGenerationMixin"]
