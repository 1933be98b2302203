"""What `generate` is told, an `EsoGenerationConfig`, and what it tells, an `EsoGenerateOutput`."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import GenerationConfig, PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from .generation_order import UNMASKING_ORDERS
from .validation import is_integer, is_number, require_fraction, require_positive_integer, to_python

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
"""Masks that adaptive unmasking looks at in a forward, unless told otherwise."""


class EsoGenerationConfig(GenerationConfig):
    """transformers' [`GenerationConfig`] with the fields of an Eso-LM's two phases.

    Sampling is on, and no filter is, unless asked for: the samples follow the model's own distribution.

    Args:
        alpha_0 (`float`, *optional*): Expected fraction of the new tokens that the diffusion phase decodes in
            parallel; the sequential phase decodes the others one by one, left to right. `None`: the model config's.
        num_diffusion_steps (`int` or `str`, *optional*): T, the time steps of the diffusion phase. Steps that reveal
            nothing cost no forward. `None`: as many as there are tokens to generate, of which some share a step;
            "max": so many that no two tokens do, which is one token a forward.
        unmasking_order (`str`, *optional*): Which tokens the diffusion phase takes: "random" (as in training),
            "strided" (far apart from one another, as many a stride as there are steps; without
            `num_diffusion_steps`, strides of about the square root of the length, taken token by token) or
            "left_to_right". `None`: strided where tokens share forwards, by a number of steps or adaptively, since
            that costs them least; otherwise, and with `lossless`, random. The diffusion phase of a strided order has a
            whole number of strides, so that with few of them and a small `alpha_0` single runs are far from the
            expected fraction.
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
            "auto" or `None`: chosen by what drafts have met with and by what forwards cost on the device, which is
            measured at the first call, down to one token a forward where drafts do not pay. The order does not depend
            on it, nor does the distribution; but the text that a seed gives does, so that with "auto" it may differ
            between machines. (Rows with generators of their own depend on nothing else: "auto" takes a nominal cost.)
        use_draft_head (`bool`, *optional*): Whether tokens that a forward draws together know their neighbours
            through the draft head. `None`: if the model has one.
        lockstep (`bool`, *optional*, defaults to `False`): Whether the rows of a batch share the numbers of tokens of
            their forwards. Each sample alone still follows the right distribution, but those of a call are no longer
            independent of one another: a statistic over them has the error of far fewer. For measurements of speed,
            and for `cache_implementation="dynamic"`, whose rows cannot advance apart.
        progress_bar (`bool`, *optional*, defaults to `False`): Whether to show how many tokens have been decoded.
        kwargs: The fields of [`GenerationConfig`]; `do_sample` defaults to `True` and `top_k` to no filter.

    Raises:
        ValueError: when a field is out of its range.
    """

    def __init__(self, **kwargs: Any) -> None:
        kwargs = {name: to_python(value) for name, value in kwargs.items()}
        self.alpha_0: float | None = kwargs.pop("alpha_0", None)
        self.num_diffusion_steps: int | Literal["max"] | None = kwargs.pop("num_diffusion_steps", None)
        self.unmasking_order: str | None = kwargs.pop("unmasking_order", None)
        self.block_length: int | None = kwargs.pop("block_length", None)
        self.confidence_threshold: float | None = kwargs.pop("confidence_threshold", None)
        self.entropy_bound: float | None = kwargs.pop("entropy_bound", None)
        self.num_candidates: int | None = kwargs.pop("num_candidates", None)
        self.lossless: bool | None = kwargs.pop("lossless", None)
        self.draft_length: int | Literal["auto"] | None = kwargs.pop("draft_length", None)
        self.use_draft_head: bool | None = kwargs.pop("use_draft_head", None)
        self.lockstep: bool | None = kwargs.pop("lockstep", None)
        self.progress_bar: bool | None = kwargs.pop("progress_bar", None)
        kwargs.setdefault("do_sample", True)
        super().__init__(**kwargs)

    @classmethod
    def from_model_config(cls, model_config: PreTrainedConfig | dict) -> "EsoGenerationConfig":
        """Takes the special tokens over from a model config, and leaves `alpha_0` to follow the model's."""
        derived = as_eso_generation_config(GenerationConfig.from_model_config(model_config))
        # A saved config that is marked as derived loses our fields when transformers reads it back.
        derived._from_model_config = False
        return derived

    @staticmethod
    def _get_default_generation_params() -> dict:
        defaults = {"do_sample": True, "top_k": None}
        return GenerationConfig._get_default_generation_params() | defaults

    def validate(self, *args: Any, **kwargs: Any) -> None:
        """Checks the fields of the two phases, and those of transformers."""
        for name in ("max_length", "max_new_tokens", "num_return_sequences"):
            require_count(name, getattr(self, name))
        # transformers refuses to generate 0 new tokens; here that fills in the holes of the prompt alone.
        max_new_tokens, self.max_new_tokens = self.max_new_tokens, self.max_new_tokens or None
        try:
            super().validate(*args, **kwargs)
        finally:
            self.max_new_tokens = max_new_tokens
        require_fraction("alpha_0", self.alpha_0, or_none=True)
        require_fraction("confidence_threshold", self.confidence_threshold, or_none=True)
        if self.entropy_bound is not None and not (is_number(self.entropy_bound) and self.entropy_bound >= 0):
            raise ValueError(f"`entropy_bound` must be None or a number in [0, inf], got {self.entropy_bound!r}.")
        require_positive_integer("num_diffusion_steps", self.num_diffusion_steps, or_none=True, or_word="max")
        require_positive_integer("block_length", self.block_length, or_none=True)
        require_positive_integer("num_candidates", self.num_candidates, or_none=True)
        require_positive_integer("draft_length", self.draft_length, or_none=True, or_word="auto")
        if self.unmasking_order not in (None, *UNMASKING_ORDERS):
            raise ValueError(f"`unmasking_order` must be one of {UNMASKING_ORDERS}, got {self.unmasking_order!r}.")
        criteria = [name for name in ("confidence_threshold", "entropy_bound") if getattr(self, name) is not None]
        if len(criteria) > 1:
            raise ValueError(
                "`confidence_threshold` and `entropy_bound` are two ways to choose the number of tokens a forward: "
                "set one of them."
            )
        if criteria and self.num_diffusion_steps is not None:
            raise ValueError(
                f"`num_diffusion_steps={self.num_diffusion_steps}` fixes the number of forwards that "
                f"`{criteria[0]}={getattr(self, criteria[0])}` is to find: set one of them (also in "
                f"`model.generation_config`)."
            )
        for name in ("lossless", "lockstep", "use_draft_head"):
            if not isinstance(getattr(self, name), bool | None):
                raise ValueError(f"`{name}` must be a bool, got {getattr(self, name)!r}.")
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

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
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

    @property
    def order(self) -> str:
        """The unmasking order, also where it is not set."""
        # Not with `lossless`, which must leave the distribution as it is.
        is_approximate = not self.lossless and (is_integer(self.num_diffusion_steps) or self.is_adaptive)
        return self.unmasking_order or ("strided" if is_approximate else "random")


@dataclass
class EsoGenerateOutput(ModelOutput):
    """What `generate` returns with `return_dict_in_generate=True`.

    Args:
        sequences: (batch, length), the prompt's columns as given, holes filled in, and the new tokens; padding after
            the first end of text.
        num_function_evaluations: NFE, the number of forwards of the model.
        unmasking_steps: (batch, length); 0 = given (or padding), i = revealed by forward i.
        orders: (batch, length), the plan's order: the column of the token at each slot, those given first.
        groups: (batch, length), the plan's groups: the number of the group of each slot of `orders`, from 1; 0 where
            given (or padding). A group is what a forward reveals; with `lossless`, what one draw does, a token; with
            adaptive unmasking, the pool from which forwards choose, of which `orders` is the order at the beginning.
            `log_likelihood(sequences, orders=orders[:, None], groups=groups[:, None], ...)` scores the text again,
            with the settings of adaptive unmasking if there are any. (Not a text that has ended early in another order
            than left to right: what was decided behind its end, and seen by the rest, is padding now; see
            `trajectories`.)
        trajectories: (batch, length), `sequences` with all that was decided, also behind the end of the text, and the
            mask where nothing was. With its plan, [`trajectory_log_probs`] scores it, with gradients.
        log_probs: (batch, length), nats; log-probability of each new token when it was drawn, under the model's own
            distribution (with the draft head's correction where it was drawn with one) before any filter; 0 where
            given (or padding).
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

    sequences: torch.Tensor
    num_function_evaluations: int | None = None
    unmasking_steps: torch.Tensor | None = None
    orders: torch.Tensor | None = None
    groups: torch.Tensor | None = None
    trajectories: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    forwards_per_row: torch.Tensor | None = None
    drafts_offered: torch.Tensor | None = None
    drafts_accepted: torch.Tensor | None = None


@dataclass
class EsoGenerationStep:
    """What a streamer that has `put_step` gets of a text, before the first forward and after each of them.

    Where a text ends early, in another order than left to right, tokens that were decided behind its end are padding
    from then on, and forwards may decide more of them that are not seen.

    Args:
        number: Of the forward, from 1; 0 before the first.
        tokens: (length,), the text so far: masks where nothing has been decided, padding behind its end.
        unmasking_steps: (length,); 0 = given, or not decided yet, i = decided by forward i.
        log_probs: (length,), nats, as in [`EsoGenerateOutput`].
        drafts: By column, the tokens that `lossless` decoding has drafted, and the next forward judges.
        refused: By column, the drafts that this forward has refused; others stand in their place.
    """

    number: int
    tokens: torch.Tensor
    unmasking_steps: torch.Tensor
    log_probs: torch.Tensor
    drafts: dict[int, int]
    refused: dict[int, int]


def require_generation_config(generation_config: Any) -> None:
    """Raises a ValueError for what is not a generation config, a dictionary of settings for example."""
    if generation_config is not None and not isinstance(generation_config, GenerationConfig):
        raise ValueError(
            f"`generation_config` must be an EsoGenerationConfig, got {type(generation_config).__name__}: make one "
            f"of the settings, or pass them one by one."
        )


def require_count(name: str, value: int | None) -> None:
    """Raises a ValueError unless `value` is a number of tokens, or of samples, or None."""
    low = int(name == "num_return_sequences")
    if value is not None and not (is_integer(value) and value >= low):
        raise ValueError(f"`{name}` must be an integer >= {low}, got {value!r}.")


def require_supported_settings(generation_config: EsoGenerationConfig, is_left_to_right: bool) -> None:
    """Raises a ValueError for settings of transformers that this decoding cannot honour.

    Args:
        generation_config: The settings.
        is_left_to_right: Whether the text is written from left to right, where a few more have a meaning.
    """
    off = UNSUPPORTED_SETTINGS if is_left_to_right else UNSUPPORTED_SETTINGS | LEFT_TO_RIGHT_SETTINGS
    for name, values in off.items():
        value = getattr(generation_config, name, None)
        if value not in values:
            why = "is not supported"
            if name in LEFT_TO_RIGHT_SETTINGS:
                why = "presupposes left to right (alpha_0=0, no holes, no padding)"
            raise ValueError(f"`{name}={value!r}` {why}: leave it unset.")


def require_special_tokens(generation_config: EsoGenerationConfig, vocab_size: int, mask_token_id: int) -> None:
    """Raises a ValueError unless padding and ends of text are ids of the vocabulary other than the mask."""
    eos_token_ids = generation_config._eos_token_tensor
    for name, ids in (
        ("pad_token_id", [] if generation_config.pad_token_id is None else [generation_config.pad_token_id]),
        ("eos_token_id", [] if eos_token_ids is None else eos_token_ids.tolist()),
    ):
        for token_id in ids:
            if not 0 <= token_id < vocab_size or token_id == mask_token_id:
                raise ValueError(
                    f"`{name}` must be an id of the vocabulary, in [0, {vocab_size - 1}], and not the mask "
                    f"({mask_token_id}), got {token_id}."
                )


def as_eso_generation_config(generation_config: GenerationConfig) -> EsoGenerationConfig:
    """The same settings as an [`EsoGenerationConfig`], validated."""
    if isinstance(generation_config, EsoGenerationConfig):
        generation_config.validate()
        return generation_config
    given = {name: value for name, value in generation_config.to_dict().items() if value is not None}
    return EsoGenerationConfig.from_dict(given)  # type: ignore[return-value]  # it makes one of its own class


__all__ = ["EsoGenerateOutput", "EsoGenerationConfig", "EsoGenerationStep"]
