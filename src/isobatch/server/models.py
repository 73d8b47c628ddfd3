"""The models that a server offers, each with its engine's thread."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from isobatch.engine.llm import LLM
from isobatch.engine.sampling_params import SamplingParams
from isobatch.engine.seeds import seed_for
from isobatch.errors import ConfigError, TokenizerError
from isobatch.server.errors import ApiError, bad_request
from isobatch.server.replies import Words
from isobatch.server.worker import Worker


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """How a server treats its clients. No bit of a reply depends on any of it.

    Args:
        keys: API keys, any of which lets a request through; none for an open server.
        max_queue: how many completions may wait beside those that can run at once.
        timeout_s: how long a request may take, waiting included.
        max_body_bytes: the largest request.

    Raises:
        ConfigError: a value out of range.
    """

    keys: tuple[str, ...] = ()
    max_queue: int = 2048
    timeout_s: float = 600.0
    max_body_bytes: int = 4 << 20

    def __post_init__(self) -> None:
        if not all(self.keys):
            raise ConfigError("an empty API key would let everyone in")
        if self.max_queue < 0 or self.max_body_bytes < 1 or not 0 < self.timeout_s < float("inf"):
            got = f"{self.max_queue}, {self.max_body_bytes} and {self.timeout_s}"
            expected = "max_queue of 0 or more, max_body_bytes of 1 or more, timeout_s above 0"
            raise ConfigError("bad server settings", expected=expected, got=got)


@dataclass(frozen=True, slots=True)
class Served:
    """A model that is offered.

    Args:
        name: in requests.
        llm: the model; its engine is the worker's alone.
        worker: runs it.
    """

    name: str
    llm: LLM
    worker: Worker
    words: Words = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "words", Words(self.llm.tokenizer))

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """A text's tokens; in another thread, since a long one would keep the event loop."""
        encode = self.llm.tokenizer.encode
        return await asyncio.to_thread(encode, text, add_special_tokens=add_special_tokens)

    async def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """A conversation's tokens.

        Raises:
            PromptError: the template refuses the messages.
            ApiError: the model has no template.
        """
        try:
            return await asyncio.to_thread(self.llm.tokenizer.encode_chat, messages)
        except TokenizerError as error:
            raise bad_request(str(error), "messages") from error

    def room(self, prompt: int) -> int:
        """How many tokens a reply to a prompt of this length may have; at least 1."""
        engine = self.llm.engine
        cache = engine.pool.num_blocks * engine.pool.block_size
        return max(1, min(engine.max_context, cache) - prompt)


def seeded(params: SamplingParams) -> SamplingParams:
    """With the seed drawn where none is given, so that the reply can say with which it is repeated."""
    return replace(params, seed=seed_for(params))


def pick(models: Mapping[str, Served], name: str | None) -> Served:
    """The model of this name; the first where none is named.

    Raises:
        ApiError: no such model.
    """
    if name is None:
        return next(iter(models.values()))
    if name not in models:
        said = f"there is no model {name!r:.200} here; GET /v1/models lists what there is"
        raise ApiError(404, "invalid_request_error", said, "model", "model_not_found")
    return models[name]
