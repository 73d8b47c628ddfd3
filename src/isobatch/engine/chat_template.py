"""Render a checkpoint's own chat template: a Jinja program that turns messages into the text of a prompt.

A template comes with the weights and is not ours, so it runs in Jinja's sandbox. A prompt has to be a
function of the request, so it gets no clock and no random numbers: the strftime_now() that transformers
gives to templates is left undefined. Llama 3.2's then falls back on a fixed date of its own; one that cannot
do without is refused.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import NoReturn

from jinja2 import TemplateError, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from isobatch.errors import PromptError, TokenizerError

# How Python writes what has no text of its own.
_ADDRESS = re.compile(r" at 0x[0-9a-f]+", re.IGNORECASE)


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: the template's text.
        special_tokens: the variables it may use for special tokens, such as bos_token.

    Raises:
        TokenizerError: not a valid template, or one that uses Jinja's random filter.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols"],
            finalize=_plain_only,
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        del environment.filters["random"], environment.globals["lipsum"]
        self._special_tokens = dict(special_tokens)
        self._source = source
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise TokenizerError("the chat template does not compile", got=error) from error

    def render(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool) -> str:
        """The text of a conversation.

        Args:
            messages: each with a "role" and its "content".
            add_generation_prompt: whether to end with what begins the assistant's turn.

        Returns:
            The text, special tokens included.

        Raises:
            PromptError: the template refuses these messages.
            TokenizerError: the template asks for the time.

        Determinism:
            A function of the template and the arguments.
        """
        for message in messages:
            _require_message(message)
        try:
            text = self._template.render(
                **self._special_tokens,
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
            )
        # The template is a program, and there is no telling how it fails on a message without content.
        except Exception as error:
            if isinstance(error, TemplateError) and "'strftime_now' is undefined" in str(error):
                raise TokenizerError(
                    "the chat template puts the time into the prompt, so that replies would depend on it",
                    fix="render the prompt yourself, with the date that you mean",
                ) from error
            raise PromptError("the chat template refuses these messages", got=error) from error
        # _plain_only sees what is written out, not what became text before, as by x ~ "" or x | string.
        given = repr((self._source, self._special_tokens, [dict(message) for message in messages])).lower()
        strange = [found for found in _ADDRESS.findall(text) if found.lower() not in given]
        if strange:
            raise PromptError(
                "the chat template writes out an address, which is another in each process", got=strange[0]
            )
        return text


def _require_message(message: object) -> None:
    """Refuses what is no message, and values that could hold an address."""
    fits = isinstance(message, Mapping) and all(isinstance(message.get(k), str) for k in ("role", "content"))
    if not fits or not _is_plain(dict(message)):  # type: ignore[call-overload]
        raise PromptError(
            "a message that is not one",
            expected='"role" and "content", both strings, and otherwise what JSON can hold',
            got=reprlib.repr(message),
        )


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(_is_plain(part) for pair in value.items() for part in pair)
    return value is None or isinstance(value, str | int | float | Undefined)


def _plain_only(value: object) -> object:
    """Refuses to write out functions and objects: their addresses are others in each process."""
    if not _is_plain(value):
        raise TemplateError(f"the template writes out something without a text: {type(value).__name__}")
    return value


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own escapes for HTML, which the models have never seen.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
