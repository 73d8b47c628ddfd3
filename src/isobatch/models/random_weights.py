"""A model without a checkpoint: any configuration, with random weights made on the device that will use them.

For benches of models whose weights are not at hand, and for models too large to be read quickly.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from isobatch.errors import CheckpointError, ConfigError, ModelNotFoundError, UnknownKeyError
from isobatch.kernels.coding import BF16, CodedRows, Coding
from isobatch.models.checkpoint import expected_tensors
from isobatch.models.config import ModelConfig, config_from_huggingface
from isobatch.models.fields import read_json
from isobatch.models.huggingface import read_config
from isobatch.models.presets import PRESETS, preset
from isobatch.models.rows import checked_stop

Numbers = Callable[[int, int, int, torch.dtype], torch.Tensor]
"""`random_weights` of the kernels of one device."""
_NORM = "norm.weight"
_VERSION = 1
"""Raised when equal seeds give other weights than before."""


def random_config(model: object, layers: int | None = None) -> ModelConfig:
    """The configuration that random weights are wanted for.

    Args:
        model: a name in PRESETS, a folder with a config.json, or such a file itself. A folder that is called
            as a preset is ./name.
        layers: how many of its layers to keep, the first ones; None for all.

    Raises:
        UnknownKeyError: a name that is neither a preset nor on disk.
        ModelNotFoundError: a path where nothing is.
        ConfigError: more layers than the model has.
        UnsupportedModelError, CheckpointError: as `config_from_huggingface`.
    """
    config = _config(model)
    if layers is None:
        return config
    if layers > config.num_layers:
        raise ConfigError(
            "the model has not so many layers", expected=f"at most {config.num_layers}", got=layers
        )
    return replace(config, num_layers=layers)


def _config(model: object) -> ModelConfig:
    if isinstance(model, str) and model in PRESETS:
        return preset(model).config()
    if not isinstance(model, str | os.PathLike) or model == "":
        raise ModelNotFoundError(
            "nothing that names a model", expected="a preset, a folder or a config.json", got=repr(model)[:80]
        )
    path = Path(model).expanduser()
    if path.is_dir():
        return read_config(path)
    if path.is_file() and path.suffix == ".json":
        return config_from_huggingface(read_json(path))
    if path.is_file():
        raise CheckpointError(f"{path} is no configuration", expected="a folder or a config.json")
    if re.fullmatch(r"[\w.-]+", str(model)):
        raise UnknownKeyError("model", str(model), PRESETS)
    raise ModelNotFoundError(f"no model at {path}", expected="a preset, a folder or a config.json")


class RandomCheckpoint:
    """Seeded random weights behind the interface of `Checkpoint`, nearly normal, of standard deviation 0.018.

    Norms have 1 added to each number. They are stored as bfloat16, as models are published.

    Args:
        config: the model.
        seed: from 0 to 2^64 - 1; another seed, other weights.
        numbers: makes them, on the device of the kernels that will read them.
        path: what the model is called.

    Determinism:
        A weight is a function of the seed, its tensor's name, and its place in it: the same on every device,
        in every dtype, and however many layers are kept.
    """

    def __init__(self, config: ModelConfig, seed: int, numbers: Numbers, path: Path) -> None:
        self.config = config
        self.path = path
        self._seed, self._numbers = seed, numbers
        self._shapes = expected_tensors(config)

    def first_layers(self, count: int) -> RandomCheckpoint:
        """The same without the layers after these."""
        return RandomCheckpoint(replace(self.config, num_layers=count), self._seed, self._numbers, self.path)

    def with_context(self, length: int) -> RandomCheckpoint:
        """The same for sequences of up to this many tokens: no weight depends on it."""
        config = replace(self.config, context_length=length)
        return RandomCheckpoint(config, self._seed, self._numbers, self.path)

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
        return BF16

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> CodedRows:
        """Rows [start, stop) of one tensor, on the device of the kernels."""
        height, *widths = self.shape(name)
        stop = checked_stop(name, start, stop, height)
        width = math.prod(widths)
        drawn = hashlib.sha256(f"weights {self._seed} {name}".encode()).digest()
        key = int.from_bytes(drawn[:8], "little") >> 1
        numbers = self._numbers(key, start * width, (stop - start) * width, BF16.dtype)
        if name.endswith(_NORM):
            numbers += 1
        return CodedRows.of(numbers.view(stop - start, *widths))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows [start, stop) of one tensor, as float32."""
        return self.rows(name, start, stop).floats()

    def digest(self) -> str:
        """Of what the weights are a function of, 64 hexadecimal digits: hashing them would take minutes."""
        content = {"config": asdict(self.config), "seed": self._seed, "random weights": _VERSION}
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=sorted).encode()).hexdigest()

    def close(self) -> None:
        """Nothing is open."""
