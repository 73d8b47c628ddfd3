"""The files that `isobatch generate --receipt` writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from isobatch.errors import ConfigError

if TYPE_CHECKING:
    from isobatch.engine.output import Reply


def require_writable(path: Path) -> None:
    """Refuses a file that could not be written, before a model is loaded for it.

    Raises:
        ConfigError: its folder is not there, or it is a folder itself.
    """
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError("bad --receipt", expected="a file in a folder that exists", got=repr(str(path)))


def write_receipts(path: Path, replies: Sequence[Reply], completions: int) -> list[Path]:
    """Writes a file for each receipt.

    Args:
        path: the file, if there is one completion of one prompt; of several, number k, counted over all
            prompts from 1, goes to PATH with -k before its suffix.
        replies: to all prompts; those that failed have no receipts, and leave their numbers out.
        completions: per reply.

    Returns:
        The files.

    Raises:
        ConfigError: one cannot be written.
    """
    written = []
    for index, reply in enumerate(replies):
        for completion in reply.completions:
            number = index * completions + completion.index + 1
            single = len(replies) == completions == 1
            file = path if single else path.with_stem(f"{path.stem}-{number}")
            if completion.receipt is not None:
                try:
                    file.write_text(completion.receipt.to_json(), encoding="utf-8")
                except OSError as error:
                    raise ConfigError(f"cannot write {file}", got=error) from error
                written.append(file)
    return written
