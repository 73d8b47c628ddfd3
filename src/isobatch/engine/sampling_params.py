"""How a request wants its tokens chosen, checked on construction and never changed afterwards."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Self, TypeGuard

from isobatch.errors import InvalidSamplingError, UnknownKeyError

# The sampler computes in float32, so a factor must be one of its normal numbers: a smaller temperature would
# be a division by zero there, and a larger one infinity.
_TINY, _HUGE = 2.0**-126, 2.0**127
_MAX_LOGPROBS = 20

# name: (lowest, highest, whether 0 is allowed below the lowest, what to do about a bad value)
_FLOATS: dict[str, tuple[float, float, bool, str]] = {
    "temperature": (_TINY, _HUGE, True, "pass 0 for greedy decoding, 1 for the model's own distribution"),
    "top_p": (_TINY, 1.0, False, "pass 1 to switch it off"),
    "min_p": (_TINY, 1.0, True, "pass 0 to switch it off"),
    "repetition_penalty": (_TINY, _HUGE, False, "pass 1 to switch it off"),
    "presence_penalty": (-2.0, 2.0, True, "pass 0 to switch it off"),
    "frequency_penalty": (-2.0, 2.0, True, "pass 0 to switch it off"),
}
# name: (lowest, highest or None, whether None is allowed, what to do about a bad value)
_INTS: dict[str, tuple[int, int | None, bool, str]] = {
    "top_k": (0, 2**31 - 1, False, "pass 0 to switch it off"),
    "seed": (0, 2**64 - 1, True, "pass None to have one drawn and reported"),
    "n": (1, 1024, False, "ask for at least one; for more than 1024, send more requests"),
    "max_tokens": (1, None, False, "ask for at least one token"),
    "logprobs": (0, _MAX_LOGPROBS, True, "pass None to leave them out"),
    "prompt_logprobs": (0, _MAX_LOGPROBS, True, "pass None to leave them out"),
}
_BOOLS = ("ignore_eos", "include_stop_str_in_output", "receipt")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen, and when to stop.

    Args:
        temperature: divides the logits; 0 is greedy, ties going to the lowest token id.
        top_k: how many of the most likely tokens stay; 0 is off.
        top_p: the probability mass that stays, in (0, 1]; 1 is off.
        min_p: the least probability that stays, as a fraction of the likeliest token's; 0 is off.
        repetition_penalty: divides the positive logits of tokens seen before, multiplies the negative ones.
        presence_penalty: subtracted once from the logit of each token already in the reply.
        frequency_penalty: subtracted once per occurrence in the reply.
        seed: 0 to 2**64 - 1; None lets the engine draw one, which the reply reports.
        n: the number of completions.
        max_tokens: the most tokens per completion; the end of the model's context ends a reply as well.
        stop: a string or several that end the reply; kept as a tuple.
        stop_token_ids: token ids that end the reply; kept as a tuple.
        ignore_eos: whether the model's end-of-sequence token is an ordinary one.
        include_stop_str_in_output: whether the stop string stays in the text.
        logprobs: how many top log-probabilities come with each chosen token's own, 0 to 20; None for none at
            all.
        prompt_logprobs: the same for each prompt token; such a request makes no use of cached prefixes.
        receipt: whether each completion comes with a receipt, by which it can be verified.

    Raises:
        UnknownKeyError: a keyword that is no sampling parameter; the message has the nearest that is.
        InvalidSamplingError: a value of the wrong type or out of its range.

    Determinism: a sampled token is a function of the logits, these values, the seed and the position, and of
        nothing else.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    n: int = 1
    max_tokens: int = 16
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    receipt: bool = False

    def __new__(cls, *positional: Any, **values: Any) -> Self:
        """Refuses unknown keywords by name; Python's own answer would not say which was meant."""
        if positional:
            got = reprlib.repr(positional[0])
            raise InvalidSamplingError("parameters go by name", expected="such as temperature=0.7", got=got)
        _require_known(cls, values)
        return object.__new__(cls)

    def __post_init__(self) -> None:
        for name in _FLOATS:
            self._set(name, _checked_float(name, getattr(self, name)))
        for name in _INTS:
            _check_int(name, getattr(self, name))
        for name in _BOOLS:
            if not isinstance(got := getattr(self, name), bool):
                raise _invalid(name, "True or False", got, "pass a bool")
        self._set("stop", _checked_stop(self.stop))
        self._set("stop_token_ids", _checked_token_ids(self.stop_token_ids))

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Build from a mapping such as parsed JSON; a key left out keeps its default.

        Args:
            values: parameter names and values.

        Returns:
            The checked parameters.

        Raises:
            UnknownKeyError: a key that is no sampling parameter; the message has the nearest that is.
            InvalidSamplingError: a value of the wrong type or out of its range.
        """
        _require_mapping(values)
        _require_known(cls, values)
        return cls(**values)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # frozen for everyone but the constructor


def _require_mapping(values: object) -> None:
    if not isinstance(values, Mapping):
        got = f"{reprlib.repr(values)} ({type(values).__name__})"
        raise InvalidSamplingError("not a mapping of sampling parameters", expected="a dict", got=got)


def _require_known(kind: type[SamplingParams], keys: Iterable[object]) -> None:
    known = [field.name for field in fields(kind)]
    for key in keys:
        if key not in known:
            raise UnknownKeyError("sampling parameter", str(key), known)


def _invalid(name: str, expected: str, got: object, fix: str) -> InvalidSamplingError:
    return InvalidSamplingError(
        f"invalid sampling parameter {name!r}",
        expected=expected,
        got=f"{reprlib.repr(got)} ({type(got).__name__})",
        fix=fix,
    )


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _checked_float(name: str, value: object) -> float:
    low, high, zero, fix = _FLOATS[name]
    # Compared before it is converted: a huge int would overflow float(), and NaN fails every comparison.
    if (isinstance(value, float) or _is_int(value)) and (low <= value <= high or (zero and value == 0)):
        return float(value)
    also_zero = "0 or " if zero and low > 0 else ""
    raise _invalid(name, f"{also_zero}a number from {low:g} to {high:g}", value, fix)


def _check_int(name: str, value: object) -> None:
    low, high, optional, fix = _INTS[name]
    if optional and value is None:
        return
    if _is_int(value) and low <= value and (high is None or value <= high):
        return
    also_none = "None or " if optional else ""
    upper = f"from {low} to {high}" if high is not None else f"of {low} or more"
    raise _invalid(name, f"{also_none}an integer {upper}", value, fix)


def _checked_stop(value: object) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else value
    if not isinstance(strings, list | tuple) or not all(isinstance(text, str) and text for text in strings):
        fix = "leave out what is empty, or not a string"
        raise _invalid("stop", "a string, or a list of them, none empty", value, fix)
    for text in strings:
        try:
            text.encode()
        except UnicodeEncodeError:
            fix = "no reply can contain it, for half of a surrogate pair has no UTF-8"
            raise _invalid("stop", "valid Unicode", text, fix) from None
    return tuple(strings)


def _checked_token_ids(value: object) -> tuple[int, ...]:
    if isinstance(value, list | tuple) and all(_is_int(token) and token >= 0 for token in value):
        return tuple(value)
    raise _invalid("stop_token_ids", "a list of integers of 0 or more", value, "pass token ids, not text")
