"""What callers pass in, understood or refused: prompts, parameters, conversations, settings.

Python lets a list stand for nearly anything. Whatever could be meant in two ways, or would lose a part on the
way, is refused with what to write instead.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping, Sequence, Set
from numbers import Integral
from typing import Any

from isobatch.config import EngineConfig
from isobatch.engine.sampling_params import SamplingParams
from isobatch.errors import ConfigError, InvalidSamplingError, PromptError

Prompt = str | Sequence[int]
Message = Mapping[str, str]


def require_tokens(
    prompt_ids: Sequence[int], params: SamplingParams, vocabulary: int, *, has_text: bool
) -> None:
    """Refuses a request for what the model does not have.

    Args:
        prompt_ids: of the prompt.
        params: how to continue it.
        vocabulary: how many tokens there are.
        has_text: whether there is a tokenizer, without which no text can be searched.

    Raises:
        PromptError: token ids that the model does not have.
        InvalidSamplingError: stop tokens that it does not have, or stop strings without a tokenizer.
    """
    strange = [t for t in prompt_ids if type(t) is not int or not 0 <= t < vocabulary]
    if strange:
        raise PromptError(
            "a prompt with tokens that the model does not have",
            expected=f"integers from 0 to {vocabulary - 1}",
            got=reprlib.repr(strange[0]),
            fix="tokenize with this model's own tokenizer",
        )
    if params.stop and not has_text:
        raise InvalidSamplingError(
            "stop strings for a model without a tokenizer", fix="use stop_token_ids instead"
        )
    beyond = [token for token in params.stop_token_ids if token >= vocabulary]
    if beyond:
        raise InvalidSamplingError(
            "a stop token that the model does not have",
            expected=f"ids from 0 to {vocabulary - 1}",
            got=reprlib.repr(beyond[0]),
            fix="take it from this model's own tokenizer",
        )


def as_config(config: object, settings: Mapping[str, Any]) -> EngineConfig:
    """The engine's settings, given as a whole or one by one.

    Raises:
        ConfigError: both, or something else than an `EngineConfig`, or a bad setting.
    """
    if config is None:
        return EngineConfig.from_mapping(settings)
    if not isinstance(config, EngineConfig):
        fix = "pass the settings as keywords, or EngineConfig(...)"
        raise ConfigError("bad config", expected="an EngineConfig", got=_described(config), fix=fix)
    if settings:
        raise ConfigError("either a config or settings", got=f"both, with {', '.join(settings)}")
    return config


def as_prompts(prompts: object) -> list[str | list[Any]]:
    """One prompt or several as a list: texts, and lists of what should be token ids.

    Args:
        prompts: a text or token ids, or an iterable of such; integers of NumPy's are integers.

    Raises:
        PromptError: neither, or bytes, sets, mappings, arrays or tensors.
    """
    if isinstance(prompts, str):
        return [prompts]
    given = _listed(prompts)
    if given and all(map(_is_integer, given)):
        return [[int(token) for token in given]]
    return [_as_prompt(prompt) for prompt in given]


def as_params(params: object, count: int) -> list[SamplingParams]:
    """Parameters for each of `count` prompts.

    Args:
        params: for all of them, or an iterable with one for each; None for the defaults.

    Raises:
        InvalidSamplingError: neither.
        PromptError: not as many as prompts.
    """
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    several = isinstance(params, Iterable) and not isinstance(params, str | bytes | Mapping | Set)
    each: list[Any] = list(params) if several else [params]  # type: ignore[call-overload]
    for one in each:
        if not isinstance(one, SamplingParams):
            raise InvalidSamplingError(
                "parameters of another kind",
                expected="SamplingParams, for all prompts or one for each",
                got=_described(one),
                fix="SamplingParams.from_mapping makes them of a dict" if isinstance(one, Mapping) else None,
            )
    if len(each) != count:
        raise PromptError("as many parameters as prompts", expected=count, got=len(each))
    return each


def as_conversations(conversations: object) -> list[list[Message]]:
    """One conversation or several as a list of lists of messages.

    Raises:
        PromptError: neither.
    """
    given = _messages(conversations)
    alone = [isinstance(one, Mapping) for one in given]
    if any(alone) and all(alone):
        return [given]
    each = [_messages(one) for one in given]
    if not all(each):
        raise PromptError("a conversation without messages", expected="at least one message in each")
    return each


def _messages(given: object) -> list[Any]:
    if isinstance(given, str | bytes | Mapping | Set) or not isinstance(given, Iterable):
        raise PromptError(
            "not a conversation",
            expected='a list of messages, {"role": ..., "content": ...} each, or a list of such lists',
            got=_described(given),
        )
    return list(given)


def _as_prompt(prompt: object) -> str | list[Any]:
    if isinstance(prompt, str):
        return prompt
    # What is no integer here, the engine refuses by name.
    return [int(token) if _is_integer(token) else token for token in _listed(prompt)]


def _listed(given: Any) -> list[Any]:
    """The elements of what may stand for prompts, or for a prompt's tokens.

    A bytes object would be token ids from 0 to 255, a dict its keys, a set would come in any order.
    """
    array = hasattr(given, "__array__")
    if array or isinstance(given, bytes | bytearray | memoryview | Mapping | Set):
        fix = "call its tolist()" if array else None
    elif isinstance(given, Iterable):
        return list(given)
    else:
        fix = None
    expected = "a text, a list of token ids, or a list of such"
    raise PromptError("a prompt of another kind", expected=expected, got=_described(given), fix=fix)


def _is_integer(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _described(value: object) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__} itself"
    # An array's repr is long, and a tensor's on no device an error.
    said = "" if hasattr(value, "__array__") else f" {reprlib.repr(value)}"
    return f"{type(value).__name__}{said}"
