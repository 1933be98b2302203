"""What the server is asked and what it answers: OpenAI's completions and chat, and the settings of an Eso-LM.

Bodies are checked here, so that what is wrong with one comes back with its name; what they ask for becomes prompts of
token ids and settings of `generate`.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from jinja2 import TemplateError
from pydantic import BaseModel, ConfigDict, Field
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from .batching_results import EsoRequestOutput

MAX_CHOICES = 128
"""Choices of a prompt, and prompts of a body, that may be asked for at once."""

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's."""

GREEDY_TEMPERATURE = 1e-5
"""Below which the most probable token is as good as certain, and numbers overflow."""

MAX_NGRAM = 64
"""Of `no_repeat_ngram_size`: longer ones cost more than they are worth."""

Stop = Annotated[str, Field(min_length=1, max_length=256)]
Count = Annotated[int, Field(ge=1, le=MAX_CHOICES)]
TokenIds = list[Annotated[int, Field(ge=0, lt=2**31)]]


class StreamOptions(BaseModel):
    """What a stream has besides the text."""

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False


class GenerateSettings(BaseModel):
    """Those that are settings of `generate` by the same name."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    alpha_0: Annotated[float, Field(ge=0, le=1)] | None = None
    num_diffusion_steps: Annotated[int, Field(ge=1)] | Literal["max"] | None = None
    unmasking_order: Literal["random", "strided", "left_to_right"] | None = None
    block_length: Annotated[int, Field(ge=1)] | None = None
    confidence_threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    entropy_bound: Annotated[float, Field(ge=0)] | None = None
    num_candidates: Annotated[int, Field(ge=1)] | None = None
    lossless: bool | None = None
    draft_length: Annotated[int, Field(ge=1)] | Literal["auto"] | None = None
    use_draft_head: bool | None = None

    top_k: Annotated[int, Field(ge=1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    no_repeat_ngram_size: Annotated[int, Field(ge=0, le=MAX_NGRAM)] | None = None
    max_time: Annotated[float, Field(gt=0)] | None = None


class Settings(GenerateSettings):
    """What both kinds of requests have in common."""

    model: str | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    n: Count | None = None
    seed: Annotated[int, Field(ge=0, lt=2**62)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    user: str | None = None
    # Those of OpenAI's that would change what is drawn, and are not offered: only their neutral values are taken.
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None

    @property
    def stops(self) -> list[str]:
        """Where the text is to stop."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def of_generate(self) -> dict[str, Any]:
        """The settings of `generate` that the body speaks of; what it does not is the model's."""
        settings = self.model_dump(include=set(GenerateSettings.model_fields), exclude_none=True)
        if self.temperature is not None and self.temperature < GREEDY_TEMPERATURE:
            settings["do_sample"] = False
        elif self.temperature is not None:
            settings |= {"do_sample": True, "temperature": self.temperature}
        if self.logit_bias:
            try:
                settings["sequence_bias"] = {(int(token),): bias for token, bias in self.logit_bias.items()}
            except ValueError as error:
                raise ValueError("`logit_bias` must map ids of tokens to numbers.") from error
        return settings


class CompletionRequest(Settings):
    """The body of /v1/completions.

    Holes in a prompt, the mask's text or id, are filled in; with a `suffix`, `max_tokens` of them stand between the
    two. The text of the answer begins at the first hole, or behind the prompt; or with it, if `echo` is set.
    """

    prompt: str | TokenIds | list[str] | list[TokenIds] = ""
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    suffix: str | None = None
    echo: bool | None = None
    logprobs: Literal[0] | None = Field(None, description="0: those of the tokens themselves; no others are kept.")
    best_of: Literal[1] | None = None

    def prompts(self, tokenizer: PreTrainedTokenizerBase, mask_token_id: int) -> list[list[int]]:
        """The token ids of each prompt."""
        given: Any = self.prompt
        is_one = isinstance(given, str) or not given or isinstance(given[0], int)
        many = [given] if is_one else given
        prompts = [tokens_of(tokenizer, one, "prompt") if isinstance(one, str) else one for one in many]
        if self.suffix is None:
            return prompts
        behind = tokens_of(tokenizer, self.suffix, "suffix", add_special_tokens=False)
        num_between = DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens
        return [prompt + [mask_token_id] * num_between + behind for prompt in prompts]

    def max_new_tokens(self, has_holes: bool) -> int:
        """Tokens behind the prompt: OpenAI's default of 16, or none where there are holes to fill in."""
        if self.suffix is not None:
            return 0
        default = 0 if has_holes else DEFAULT_COMPLETION_TOKENS
        return default if self.max_tokens is None else self.max_tokens


class TextPart(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A message of a chat."""

    model_config = ConfigDict(extra="forbid", strict=True)
    role: Annotated[str, Field(min_length=1)]
    content: str | list[TextPart]
    name: str | None = None


class ResponseFormat(BaseModel):
    """Plain text, which is all there is."""

    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text"]


class ChatRequest(Settings):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: bool | None = None
    top_logprobs: Literal[0] | None = Field(None, description="No others than those of the tokens are kept.")
    response_format: ResponseFormat | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    echo: Literal[False] | None = None

    def prompts(self, tokenizer: PreTrainedTokenizerBase, mask_token_id: int) -> list[list[int]]:
        """The token ids of the chat, by the template of the tokenizer."""
        if tokenizer.chat_template is None:
            raise ValueError(
                "`messages` need a tokenizer with a chat template, which this one has not: send a `prompt`."
            )
        messages = [message.model_dump(exclude_none=True) for message in self.messages]
        for message in messages:
            if not isinstance(message["content"], str):
                message["content"] = "".join(part["text"] for part in message["content"])
        own = self.chat_template_kwargs or {}
        taken = {"tokenize", "return_dict", "return_tensors", "conversation", "chat_template"} & set(own)
        if taken:
            raise ValueError(f"`chat_template_kwargs` must be variables of the template, got {sorted(taken)}.")
        try:
            settings = {"add_generation_prompt": True} | own
            text = str(tokenizer.apply_chat_template(messages, tokenize=False, **settings))
        except (TemplateError, TypeError) as error:
            raise ValueError(f"`messages` do not fit the chat template: {error}") from error
        return [tokens_of(tokenizer, text, "messages", add_special_tokens=False)]

    def max_new_tokens(self, has_holes: bool) -> int | None:
        """Tokens of the answer; None: as many as there is room for."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


def tokens_of(tokenizer: PreTrainedTokenizerBase, text: str, name: str, **settings: Any) -> list[int]:
    """The token ids of a text.

    Raises:
        ValueError: for half of a pair of surrogates, which JSON may hold, and text may not.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"`{name}` must be text, got half of a letter at character {error.start}.") from error
    tokens: Any = tokenizer(text, **settings)["input_ids"]
    return list(tokens)


class StopTexts(StoppingCriteria):
    """Says stop where the text behind what was given contains one of some strings.

    Args:
        tokenizer: By which tokens become text.
        stops: The strings.
        start: Where the new text begins, in tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: list[str], start: int):
        self.tokenizer, self.stops, self.start = tokenizer, stops, start

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        texts = [decode(self.tokenizer, row[self.start :].tolist()) for row in input_ids]
        return torch.tensor([any(stop in text for stop in self.stops) for text in texts], device=input_ids.device)


def stopping_at(tokenizer: PreTrainedTokenizerBase, stops: list[str], start: int) -> dict[str, Any]:
    """The setting of `generate` that has it stop at some strings."""
    return {"stopping_criteria": StoppingCriteriaList([StopTexts(tokenizer, stops, start)])} if stops else {}


def decode(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    """The text of tokens, without special ones."""
    text = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(text)


@dataclass
class Choice:
    """How the text of a request is told: what is known of it, up to where it is to stop.

    Args:
        tokenizer: By which tokens become text.
        stops: Where the text is to stop; it is told up to there.
        before: What stands before the first token that was drawn, if it is to be told too.
    """

    tokenizer: PreTrainedTokenizerBase
    stops: list[str]
    before: str = ""
    told: str = ""
    num_known: int = 0
    is_stopped: bool = False

    def text(self, output: EsoRequestOutput) -> str:
        """What can be told by now, and will not change."""
        text = decode(self.tokenizer, output.generated_tokens)
        ends = [place for place in map(text.find, self.stops) if place >= 0]
        if ends:
            self.is_stopped = True
            return self.before + text[: min(ends)]
        if output.is_finished():
            return self.before + text
        # The beginning of a letter of several bytes, and what may become a stop, have to wait.
        text = text.rstrip("\N{REPLACEMENT CHARACTER}")
        held = max(
            (length for stop in self.stops for length in range(1, len(stop)) if text.endswith(stop[:length])),
            default=0,
        )
        return self.before + text[: len(text) - held]

    def news(self, output: EsoRequestOutput) -> str:
        """What there is to tell since the last time."""
        num_known = len(output.generated_tokens)
        if num_known == self.num_known and not output.is_finished():
            return ""
        self.num_known, text = num_known, self.text(output)
        if not text.startswith(self.told):
            return ""  # a tokenizer that writes a token otherwise, now that another follows it
        new, self.told = text[len(self.told) :], text
        return new

    def finish_reason(self, output: EsoRequestOutput) -> str | None:
        """ "stop" or "length"."""
        return "stop" if self.is_stopped else output.finish_reason


def usage(outputs: list[EsoRequestOutput], num_prompts: int) -> dict[str, int]:
    """Tokens that were given, those of each prompt once, and tokens that were drawn."""
    given = sum(output.num_given for output in outputs[:: len(outputs) // num_prompts])
    drawn = sum(sum(step > 0 for step in output.unmasking_steps) for output in outputs)
    return {"prompt_tokens": given, "completion_tokens": drawn, "total_tokens": given + drawn}
