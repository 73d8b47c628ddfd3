"""The digest of a model's weights, taken from what is read of them, so that loading reads nothing twice.

SHA-256 over the configuration and, by tensor name, over shape, coding, codes, scales and offsets as the
checkpoint stores them: one bit of one weight changes it, and so does anything else that changes a number.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import torch

from isobatch.errors import IntegrityError
from isobatch.kernels.coding import CodedRows, Coding
from isobatch.models.checkpoint import Checkpoint, expected_tensors
from isobatch.models.config import ModelConfig

# Bounds the memory that a model needs which is only read.
_ROWS_AT_A_TIME = 4096


class Witness:
    """A checkpoint that takes the digest of whatever is read through it. See Checkpoint for the methods.

    What the digest says was loaded is what was loaded: nothing can be changed between two readings, and there
    is no cache that could be older than the file.

    Args:
        checkpoint: the weights.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._hashes: dict[tuple[str, str], hashlib._Hash] = {}
        self._rows: dict[str, int] = {}

    @property
    def config(self) -> ModelConfig:
        """The model that the weights are for."""
        return self._checkpoint.config

    @property
    def path(self) -> Path:
        """The folder or file that they come from."""
        return self._checkpoint.path

    def names(self) -> frozenset[str]:
        """The names of all tensors."""
        return self._checkpoint.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor."""
        return self._checkpoint.shape(name)

    def coding(self, name: str) -> Coding:
        """How one tensor's numbers are stored."""
        return self._checkpoint.coding(name)

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> CodedRows:
        """Rows [start, stop) of one matrix, as they are stored."""
        rows = self._checkpoint.rows(name, start, stop)
        self._see(name, start, codes=rows.codes, scales=rows.scales, offsets=rows.offsets)
        return rows

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows [start, stop) of one tensor, as float32."""
        numbers = self._checkpoint.read(name, start, stop)
        self._see(name, start, numbers=numbers)
        return numbers

    def close(self) -> None:
        """Let go of the files."""
        self._checkpoint.close()

    def _see(self, name: str, start: int, **parts: torch.Tensor | None) -> None:
        seen = self._rows.get(name, 0)
        if start != seen:
            raise IntegrityError(f"{name} is not read from top to bottom", expected=f"row {seen}", got=start)
        for part, tensor in parts.items():
            if tensor is not None:
                running = self._hashes.setdefault((name, part), hashlib.sha256())
                running.update(tensor.contiguous().view(torch.uint8).numpy().data)
                self._rows[name] = start + len(tensor)

    def digest(self) -> str:
        """The digest of the whole model.

        Returns:
            64 hexadecimal digits.

        Raises:
            IntegrityError: some of the weights have not been read.

        Determinism:
            A function of the weights as they are stored and of the configuration; not of how the rows were
            cut, or of the order in which tensors were read.
        """
        expected = expected_tensors(self.config)
        if unread := [name for name, shape in expected.items() if self._rows.get(name) != shape[0]]:
            raise IntegrityError(f"{len(unread)} tensors were not read, for one {unread[0]}")
        content = {
            "config": asdict(self.config),
            "tensors": {
                f"{name} {part}": [self.shape(name), *map(int, self._coding(name)), running.hexdigest()]
                for (name, part), running in self._hashes.items()
            },
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=sorted).encode()).hexdigest()

    def _coding(self, name: str) -> tuple[int, int]:
        coding = self.coding(name)
        return coding.form, coding.group


def weights_digest(checkpoint: Checkpoint) -> str:
    """The digest of a model that need not be loaded, a few thousand rows at a time.

    Args:
        checkpoint: its weights.

    Returns:
        What `Witness.digest` says once the model is loaded.
    """
    witness = Witness(checkpoint)
    for name, shape in expected_tensors(checkpoint.config).items():
        if len(shape) == 1:
            witness.read(name)
            continue
        for start in range(0, shape[0], _ROWS_AT_A_TIME):
            witness.rows(name, start, min(start + _ROWS_AT_A_TIME, shape[0]))
    return witness.digest()
