"""What a request may say: strict models of OpenAI's fields, and ours beside them.

A field that is unknown, or asks for what we do not have, is refused by name: a client that asked for
`logit_bias` and silently got none would trust a reply that is not what it asked for. Two kinds of fields are
let through. Those of `_Ignored` are sent by many clients and change no reply. Those of `_Neutral` and
`_NeutralChat` change replies, and are accepted where their value asks for nothing, as clients that write out
every default do.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from isobatch.engine.sampling_params import SamplingParams

_MOST_STOPS = 16
_Nothing = Annotated[dict[str, Any], Field(max_length=0)]
_Nobody = Annotated[list[Any], Field(max_length=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class IsobatchOptions(_Strict):
    """What only isobatch has."""

    receipt: bool = Field(False, description="whether each choice comes with a receipt, for isobatch verify")


class StreamOptions(_Strict):
    """How a stream is written."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class _Ignored(_Strict):
    """What clients are known to send, and what changes no reply. Looked at by nobody."""

    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None


class _Neutral(_Strict):
    """What we do not have: accepted where the value asks for nothing."""

    logit_bias: _Nothing | None = None


class _Sampling(_Ignored, _Neutral):
    """What both endpoints know: names and ranges as in SamplingParams, which checks the ranges."""

    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    seed: int | None = None
    stop: str | Annotated[list[str], Field(max_length=_MOST_STOPS)] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Not OpenAI's; the names are those that other servers have for them.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    isobatch: IsobatchOptions | None = None

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise contradiction("stream_options", "stream_options without stream; add stream=true")
        return self

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a chunk that counts tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def sampling(self, **others: Any) -> SamplingParams:
        """The engine's parameters.

        Args:
            others: those that the endpoints name in their own ways; None where nothing is said.

        Raises:
            InvalidSamplingError: a value out of its range.
        """
        given = {name: getattr(self, name) for name in _SAME_NAME} | others
        given["receipt"] = self.isobatch is not None and self.isobatch.receipt
        return SamplingParams(**{name: value for name, value in given.items() if value is not None})


_SAME_NAME = (
    *("temperature", "top_k", "top_p", "min_p"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty"),
    *("seed", "n", "stop", "stop_token_ids", "ignore_eos", "include_stop_str_in_output"),
)


def contradiction(field: str, said: str) -> PydanticCustomError:
    """An error about a field whose value does not go with the others.

    Args:
        field: the one that the error body names.
        said: what is wrong, without braces.
    """
    return PydanticCustomError("contradiction", said, {"field": field})


class CompletionRequest(_Sampling):
    """The body of POST /v1/completions."""

    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: int | None = None
    echo: bool | None = None
    suffix: Literal[""] | None = None
    best_of: Literal[1] | None = None

    @model_validator(mode="after")
    def _what_goes_together(self) -> Self:
        if self.echo and self.stream and self.logprobs is not None:
            raise contradiction("echo", "echo with logprobs cannot be streamed; leave one of the three out")
        if self.max_tokens == 0 and (self.stream or not self.echo):
            raise contradiction("max_tokens", "max_tokens of 0 goes with echo only, and not with stream")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One or several, as a list."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt  # type: ignore[return-value]

    def params(self) -> SamplingParams:
        """As `sampling`. With max_tokens of 0, which only echoes, one token is made and not shown."""
        scored = self.logprobs if self.echo else None
        limit = 1 if self.max_tokens == 0 else self.max_tokens
        return self.sampling(max_tokens=limit, logprobs=self.logprobs, prompt_logprobs=scored)


class TextPart(_Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(_Strict):
    """A message. What an earlier reply had beside its text may come back, as long as it is empty."""

    role: Literal["system", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]
    refusal: None = None
    annotations: _Nobody | None = None
    audio: None = None
    function_call: None = None
    tool_calls: _Nobody | None = None

    def plain(self) -> dict[str, str]:
        """For the chat template: parts are put together, a line each."""
        parts = self.content
        text = parts if isinstance(parts, str) else "\n".join(part.text for part in parts)
        return {"role": self.role, "content": text}


class TextFormat(_Strict):
    """The only response format there is."""

    type: Literal["text"]


class _NeutralChat(_Strict):
    tools: _Nobody | None = None
    tool_choice: Literal["none"] | None = None
    parallel_tool_calls: bool | None = None
    functions: _Nobody | None = None
    function_call: Literal["none"] | None = None
    response_format: TextFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    audio: None = None
    prediction: None = None
    reasoning_effort: Literal["none"] | None = None
    verbosity: None = None
    web_search_options: None = None


class ChatRequest(_Sampling, _NeutralChat):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    @model_validator(mode="after")
    def _what_goes_together(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise contradiction("top_logprobs", "top_logprobs without logprobs; add logprobs=true")
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise contradiction(
                "max_completion_tokens", "max_tokens and max_completion_tokens say different things"
            )
        return self

    def params(self, room: int) -> SamplingParams:
        """As `sampling`.

        Args:
            room: how many tokens a reply may have where the request does not say.
        """
        asked = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        tops = (self.top_logprobs or 0) if self.logprobs else None
        return self.sampling(max_tokens=room if asked is None else asked, logprobs=tops)


class TokenizeRequest(_Strict):
    """The body of POST /tokenize: a text, or a conversation as the chat template writes it."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _one_of_the_two(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise contradiction("prompt", "either prompt or messages, and not both")
        return self


class DetokenizeRequest(_Strict):
    """The body of POST /detokenize."""

    model: str | None = None
    tokens: list[int]


class AskRequest(_Strict):
    """The body of POST /playground: copies of one prompt, among other traffic."""

    model: str
    prompt: Annotated[str, Field(min_length=1, max_length=4000)]
    copies: Annotated[int, Field(ge=1, le=64)] = 32
    others: Annotated[int, Field(ge=0, le=64)] = 16
    temperature: float = 0.0
    seed: int = 0
    max_tokens: Annotated[int, Field(ge=1, le=256)] = 48
