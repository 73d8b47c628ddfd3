"""The GGUF container: metadata, a table of tensors, and rows of them as they are stored.

The gguf package has a reader too, but it makes an array of every token, which takes two seconds on a small
model, and it does not notice a string that the end of the file cuts off. What we use of the package are the
names and sizes of its blocks.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from isobatch.errors import CheckpointError, UnsupportedModelError
from isobatch.kernels.coding import CodedRows
from isobatch.models.gguf_blocks import SUPPORTED, coded_rows

# The value types, by their number in the file: struct's codes for the scalars.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where one tensor lies.

    Args:
        quantisation: how its numbers are stored.
        shape: its dimensions, slowest first as in PyTorch (the file has them the other way round).
        offset: its first byte in the file.
        size: in bytes.
    """

    quantisation: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    size: int


class GgufFile:
    """An open GGUF file, checked from the first byte to the last.

    Args:
        path: the file.

    Raises:
        CheckpointError: not a GGUF file, damaged, or truncated.
        UnsupportedModelError: a version, byte order or quantisation that we do not have, or a file in parts.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            mapped: npt.NDArray[np.uint8] = np.memmap(path, dtype=np.uint8, mode="r")
        except (OSError, ValueError) as error:  # ValueError: an empty file
            raise CheckpointError(f"cannot read {path}", expected="a GGUF file", got=error) from error
        try:
            self.metadata, self.tensors = _parse(_Cursor(mapped.data, path))
        except (struct.error, UnicodeDecodeError) as error:
            raise CheckpointError(
                f"{path} is damaged or cut short",
                expected="a whole GGUF file",
                got=error,
                fix="fetch it again",
            ) from error

    def rows(self, name: str, start: int, stop: int) -> CodedRows:
        """Rows of one tensor, as they are stored.

        Args:
            name: the tensor, by its name in the file, of at least two dimensions.
            start: the first row.
            stop: the one after the last.

        Returns:
            Coded rows (stop - start, ...), the caller's own.

        Determinism:
            A function of the file's bytes; the same on every machine.
        """
        tensor = self.tensors[name]
        row = tensor.size // tensor.shape[0]
        shape = (stop - start, *tensor.shape[1:])
        return self._read(tensor, tensor.offset + start * row, (stop - start) * row, shape)

    def vector(self, name: str) -> npt.NDArray[np.float32]:
        """A tensor of one dimension, whole, as float32.

        Blocks are pieces of a row, so that a vector's numbers cannot be had one by one.
        """
        tensor = self.tensors[name]
        return self._read(tensor, tensor.offset, tensor.size, tensor.shape).floats().numpy()

    def unstack(self, name: str) -> list[str]:
        """Adds the matrices of a stack to the tensors, each under a name of its own.

        Args:
            name: a tensor of three dimensions.

        Returns:
            Those names, in order.
        """
        stack = self.tensors[name]
        count, *shape = stack.shape
        size = stack.size // count  # a row is whole blocks, so a matrix is as well
        names = [f"{name}[{index}]" for index in range(count)]
        for index, each in enumerate(names):
            self.tensors[each] = GgufTensor(
                stack.quantisation, tuple(shape), stack.offset + index * size, size
            )
        return names

    def close(self) -> None:
        """Forget the tensors. No file is held open: each read opens it anew."""
        self.tensors = {}

    def _read(self, tensor: GgufTensor, offset: int, size: int, shape: tuple[int, ...]) -> CodedRows:
        # Read, not mapped: pages of a mapped file would count as memory in use beside the weights.
        stored = np.empty(size, np.uint8)
        with self.path.open("rb") as stream:
            stream.seek(offset)
            stream.readinto(stored.data)
        return coded_rows(stored, tensor.quantisation, shape)


class _Cursor:
    """Reads forward through the file; running off its end is a struct.error."""

    def __init__(self, buffer: memoryview, path: Path) -> None:
        self.buffer, self.path, self.offset = buffer, path, 0

    def scalars(self, code: str, count: int) -> tuple[int | float | bool, ...]:
        size = struct.calcsize(f"<{code}") * count
        if size > len(self.buffer) - self.offset:  # before struct builds a format for 2**60 numbers
            raise struct.error(f"{size} bytes wanted at {self.offset} of {len(self.buffer)}")
        values = struct.unpack_from(f"<{count}{code}", self.buffer, self.offset)
        self.offset += size
        return values

    def integer(self, code: str) -> int:
        return int(self.scalars(code, 1)[0])

    def text(self) -> str:
        (size,) = struct.unpack_from("<Q", self.buffer, self.offset)
        start = self.offset + 8
        self.offset = start + size
        if self.offset > len(self.buffer):
            raise struct.error(f"{size} characters wanted at {start} of {len(self.buffer)}")
        return str(self.buffer[start : self.offset], "utf-8")

    def value(self, kind: int) -> object:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            item, count = self.integer("I"), self.integer("Q")
            if item == _STRING:
                if count > len(self.buffer):
                    raise struct.error(f"{count} strings in {len(self.buffer)} bytes")
                return [self.text() for _ in range(count)]
            return list(self.scalars(self._code(item), count))
        return self.scalars(self._code(kind), 1)[0]

    def _code(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise struct.error(f"value type {kind} at {self.offset}")
        return _SCALARS[kind]


def _parse(cursor: _Cursor) -> tuple[dict[str, object], dict[str, GgufTensor]]:
    if bytes(cursor.buffer[:4]) != b"GGUF":
        raise CheckpointError(
            f"{cursor.path} is not a GGUF file",
            expected="it to begin with 'GGUF'",
            got=bytes(cursor.buffer[:4]),
        )
    cursor.offset = 4
    version = cursor.integer("I")
    if version not in (2, 3):
        raise UnsupportedModelError(
            f"{cursor.path}: GGUF version", expected="2 or 3, little-endian", got=version
        )
    tensor_count, entry_count = cursor.integer("Q"), cursor.integer("Q")
    metadata: dict[str, object] = {}
    for _ in range(entry_count):
        key, kind = cursor.text(), cursor.integer("I")
        if key in metadata:
            raise CheckpointError(f"{cursor.path} has {key!r} twice")
        metadata[key] = cursor.value(kind)
    if metadata.get("split.count", 1) != 1:
        raise UnsupportedModelError(
            f"{cursor.path} is one part of several", fix="merge them with llama-gguf-split --merge"
        )
    table: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(tensor_count):
        name, dimensions = cursor.text(), cursor.integer("I")
        if name in table or not 0 < dimensions <= _MOST_DIMENSIONS:
            raise CheckpointError(
                f"{cursor.path}: tensor {name!r} is there twice, or has {dimensions} dimensions"
            )
        shape = tuple(int(size) for size in reversed(cursor.scalars("Q", dimensions)))
        table[name] = (shape, cursor.integer("I"), cursor.integer("Q"))
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment <= 0:
        raise CheckpointError(f"{cursor.path}: general.alignment", expected="more than 0", got=alignment)
    begin = end = _aligned(cursor.offset, alignment)
    tensors = {}
    for name, (shape, kind, offset) in table.items():
        if begin + offset != _aligned(end, alignment):
            raise CheckpointError(
                f"{cursor.path}: tensor {name!r} is not where the one before it ends",
                expected=f"offset {_aligned(end, alignment) - begin}",
                got=offset,
            )
        tensors[name] = _tensor(cursor.path, name, shape, kind, begin + offset)
        end = begin + offset + tensors[name].size
    # Files may leave out the padding at their very end.
    if not end <= len(cursor.buffer) <= max(_aligned(end, alignment), begin):
        raise CheckpointError(
            f"{cursor.path} is cut short, or has bytes that belong to nothing",
            expected=f"{end} bytes, or a little padding more",
            got=len(cursor.buffer),
            fix="fetch it again",
        )
    return metadata, tensors


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


def _tensor(path: Path, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GgufTensor:
    known = {int(quantisation): quantisation for quantisation in GGMLQuantizationType}
    if kind not in known or known[kind].name not in SUPPORTED:
        raise UnsupportedModelError(
            f"{path}: the quantisation of tensor {name!r}",
            expected=f"one of {', '.join(SUPPORTED)}",
            got=known[kind].name if kind in known else f"type {kind}",
        )
    quantisation = known[kind]
    per_block, block_bytes = GGML_QUANT_SIZES[quantisation]
    if min(shape) < 1 or shape[-1] % per_block:
        raise CheckpointError(
            f"{path}: tensor {name!r}", expected=f"rows of whole blocks of {per_block}", got=shape
        )
    return GgufTensor(quantisation, shape, offset, math.prod(shape) // per_block * block_bytes)
