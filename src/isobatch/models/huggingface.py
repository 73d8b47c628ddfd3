"""Read a Hugging Face folder: config.json, and safetensors in one file or in shards."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from isobatch.errors import CheckpointError, UnsupportedModelError
from isobatch.kernels.coding import BF16, F16, F32, CodedRows, Coding
from isobatch.models.config import ModelConfig, config_from_huggingface
from isobatch.models.fields import Fields, read_json
from isobatch.models.rows import checked_stop

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_CODINGS = {"F32": F32, "F16": F16, "BF16": BF16}  # each widens to float32 exactly


class HuggingFaceCheckpoint:
    """A folder as transformers saves it. See Checkpoint for the methods.

    Args:
        path: the folder.

    Raises:
        UnsupportedModelError: a model or dtype that we do not have.
        CheckpointError: a file that is missing, damaged, or at odds with the index.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_config(path)
        with ExitStack() as stack:
            self._owners = _open_shards(path, stack)
            self._shapes = {name: _shape(path, name, file) for name, file in self._owners.items()}
            self._open_files = stack.pop_all()

    def names(self) -> frozenset[str]:
        """The names of all tensors."""
        return frozenset(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor."""
        if name not in self._shapes:
            raise CheckpointError(f"{self.path} has no tensor {name!r}")
        return self._shapes[name]

    def coding(self, name: str) -> Coding:
        """How one tensor's numbers are stored."""
        self.shape(name)
        return _CODINGS[self._owners[name].get_slice(name).get_dtype()]

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> CodedRows:
        """Rows [start, stop) of one tensor, as they are stored."""
        stop = checked_stop(name, start, stop, self.shape(name)[0])
        part: torch.Tensor = self._owners[name].get_slice(name)[start:stop]
        # What safetensors hands out may be a view of the mapped file.
        return CodedRows.of(part.clone(memory_format=torch.contiguous_format))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows [start, stop) of one tensor, as float32."""
        return self.rows(name, start, stop).floats()

    def close(self) -> None:
        """Let go of the files."""
        self._owners.clear()
        self._shapes.clear()
        self._open_files.close()


def read_config(path: Path) -> ModelConfig:
    """The model that a folder describes, with or without weights in it.

    Args:
        path: the folder.

    Raises:
        UnsupportedModelError: a model that we do not have.
        CheckpointError: no config.json, or one that makes no sense.
    """
    return config_from_huggingface(_config_json(path), _generation_config_json(path))


def _config_json(path: Path) -> dict[str, object]:
    if not (path / "config.json").is_file():
        has_gguf = any(path.glob("*.gguf"))
        raise CheckpointError(
            f"{path} has no config.json",
            fix="give the path of one of its .gguf files" if has_gguf else "is this a model's folder?",
        )
    return read_json(path / "config.json")


def _generation_config_json(path: Path) -> dict[str, object] | None:
    file = path / "generation_config.json"
    return read_json(file) if file.is_file() else None


def _open_shards(path: Path, stack: ExitStack) -> dict[str, Any]:
    """Tensor name to the open file that holds it."""
    if (path / _SINGLE).is_file():
        file = _open(path / _SINGLE, stack)
        return dict.fromkeys(file.keys(), file)
    if not (path / _INDEX).is_file():
        pickled = any(path.glob("*.bin")) or any(path.glob("*.pt*"))
        raise CheckpointError(
            f"{path} has neither {_SINGLE} nor {_INDEX}",
            got="pickled weights, which can run any code when loaded" if pickled else None,
            fix="convert them to safetensors" if pickled else "fetch the weights",
        )
    weight_map = Fields(read_json(path / _INDEX), _INDEX).mapping("weight_map")
    shard_of = Fields(weight_map, f"{_INDEX} weight_map")
    wanted = {name: shard_of.get(name, str) for name in weight_map}
    owners: dict[str, Any] = {}
    for shard in sorted(set(wanted.values())):
        if Path(shard).name != shard:
            raise CheckpointError(f"{path / _INDEX} points outside its folder", got=repr(shard))
        file = _open(path / shard, stack)
        listed = {name for name, owner in wanted.items() if owner == shard}
        if odd := sorted(listed ^ set(file.keys())):
            raise CheckpointError(f"{path / shard} and {_INDEX} disagree, for one on {odd[0]!r}")
        owners |= dict.fromkeys(listed, file)
    return owners


def _open(file: Path, stack: ExitStack) -> Any:
    try:
        return stack.enter_context(safe_open(file, framework="pt", device="cpu"))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot read {file}", expected="a whole safetensors file", got=error, fix="fetch it again"
        ) from error


def _shape(path: Path, name: str, file: Any) -> tuple[int, ...]:
    part = file.get_slice(name)
    if part.get_dtype() not in _CODINGS:
        raise UnsupportedModelError(
            f"{name} in {path}", expected=f"dtype {', '.join(_CODINGS)}", got=part.get_dtype()
        )
    return tuple(part.get_shape())
