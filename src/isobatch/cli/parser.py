"""argparse, made strict: what is unknown is an error of ours that names the nearest known thing."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from isobatch.errors import ConfigError, UnknownKeyError


class Parser(argparse.ArgumentParser):
    """A parser whose every complaint is an IsobatchError, and whose subcommands are parsers of this kind.

    Options cannot be abbreviated, since an abbreviation may change its meaning with the next release.

    Args:
        settings: as for argparse.ArgumentParser.

    Raises:
        UnknownKeyError: from parsing: an unknown option, subcommand or choice.
        ConfigError: from parsing: anything else that is wrong.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **settings})
        self._inside_intermixed = False

    # typeshed gives this method three overloads, for namespaces of other types; none is needed here.
    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse's, with options anywhere among the positional arguments, and nothing left over."""
        # Left to itself, argparse takes all positional arguments at the first gap between two options, and
        # calls the prompt in `generate MODEL --seed 1 PROMPT` unknown. Its intermixed mode does not, but
        # knows no subcommands, and is itself made of two calls to this method.
        if self._subparsers is not None or self._inside_intermixed:
            return super().parse_known_args(args, namespace)
        self._inside_intermixed = True
        try:
            parsed, unknown = super().parse_known_intermixed_args(args, namespace)
        finally:
            self._inside_intermixed = False
        for word in unknown:
            if word.startswith("-"):
                options = [name for name in self._option_string_actions if name.startswith("--")]
                raise UnknownKeyError("option", word.split("=")[0], options)
            self.error(f"unexpected argument {word!r}")
        return parsed, []

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            kind = action.option_strings[-1] if action.option_strings else action.dest
            raise UnknownKeyError(kind, str(value), [str(choice) for choice in action.choices])

    def error(self, message: str) -> NoReturn:
        """Raises what argparse would print before it exits.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(message, fix=f"see {self.prog} --help")
