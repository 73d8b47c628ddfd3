"""GGUF's block formats: from the bytes of a tensor to coded rows.

Nothing is rounded here but the scales of the K formats, which the file has as a product: one float32
multiplication each, as in the gguf package's `dequantize`, whose numbers `CodedRows.floats` gives to the bit.

Source: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h, and the gguf package's quants.py.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from isobatch.kernels.coding import BF16, F16, F32, Q4, Q4_OFFSET, Q8, Q8_SHORT, CodedRows, Coding

Bytes = npt.NDArray[np.uint8]
_Floats = npt.NDArray[np.float32]
# Codes, scales and offsets of some blocks, a block to a row.
_Parts = tuple[npt.NDArray[np.uint8] | npt.NDArray[np.int8], _Floats, _Floats | None]


def _halves(blocks: Bytes, first: int) -> _Floats:
    """The float16 number at a byte of each block, [blocks, 1]."""
    return blocks[:, first : first + 2].copy().view("<f2").astype(np.float32)


def _nibbles(packed: Bytes, width: int) -> Bytes:
    """4-bit codes: of each `width` bytes first the low halves, then the high ones."""
    count, size = packed.shape
    pieces = packed.reshape(count, size // width, width)
    return np.stack((pieces & 15, pieces >> 4), 2).reshape(count, 2 * size)


def _q8_0(blocks: Bytes) -> _Parts:
    return blocks[:, 2:].view(np.int8), _halves(blocks, 0), None


def _q4_0(blocks: Bytes) -> _Parts:
    return _nibbles(blocks[:, 2:], 16), _halves(blocks, 0), None


def _q4_1(blocks: Bytes) -> _Parts:
    return _nibbles(blocks[:, 4:], 16), _halves(blocks, 0), _halves(blocks, 2)


def _q4_k(blocks: Bytes) -> _Parts:
    # 8 scales and 8 minima of 6 bits: four of each have a byte, whose two top bits belong to the other four.
    low, middle, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate((low & 63, (high & 15) | (low >> 6) << 4), 1)
    minima = np.concatenate((middle & 63, (high >> 4) | (middle >> 6) << 4), 1)
    # The format subtracts its minima; adding their negative is the same operation.
    offsets = -(_halves(blocks, 2) * minima.astype(np.float32))
    return _nibbles(blocks[:, 16:], 32), _halves(blocks, 0) * scales.astype(np.float32), offsets


def _q6_k(blocks: Bytes) -> _Parts:
    low = _nibbles(blocks[:, :128], 64)
    pairs = blocks[:, 128:192].reshape(len(blocks), 2, 1, 32) >> np.array([[0], [2], [4], [6]], np.uint8)
    codes = (low | (pairs & 3).reshape(low.shape) << 4).view(np.int8) - np.int8(32)
    return codes, _halves(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32), None


_FORMATS: dict[str, tuple[Coding, Callable[[Bytes], _Parts]]] = {
    "Q4_0": (Q4, _q4_0),
    "Q4_1": (Q4_OFFSET, _q4_1),
    "Q4_K": (Q4_OFFSET, _q4_k),
    "Q6_K": (Q8_SHORT, _q6_k),
    "Q8_0": (Q8, _q8_0),
}
_PLAIN = {"F32": F32, "F16": F16, "BF16": BF16}
SUPPORTED = ("F32", "F16", "BF16", *_FORMATS)
"""Names of the formats that there are."""


def coding_of(quantisation: GGMLQuantizationType) -> Coding:
    """The coding of a supported format."""
    name = quantisation.name
    return _PLAIN[name] if name in _PLAIN else _FORMATS[name][0]


def coded_rows(stored: Bytes, quantisation: GGMLQuantizationType, shape: tuple[int, ...]) -> CodedRows:
    """Numbers as the file stores them, in the coding of the kernels.

    Args:
        stored: their bytes, end to end, of whole blocks.
        quantisation: a supported format.
        shape: of the numbers, the last axis a whole number of blocks.

    Returns:
        Coded rows of this shape, with memory of their own unless the format is plain.

    Determinism:
        Integer operations, and the products above, each rounded once: the same on every machine.
    """
    coding = coding_of(quantisation)
    if quantisation.name in _PLAIN:
        patterns = torch.from_numpy(stored.view(f"<i{coding.bits // 8}"))
        return CodedRows(coding, patterns.view(coding.dtype).reshape(shape))
    _, block_bytes = GGML_QUANT_SIZES[quantisation]
    codes, scales, offsets = _FORMATS[quantisation.name][1](stored.reshape(-1, block_bytes))
    by_group = (*shape[:-1], coding.groups(shape[-1]))
    return CodedRows(
        coding,
        torch.from_numpy(np.ascontiguousarray(codes)).reshape(shape),
        torch.from_numpy(scales).reshape(by_group),
        None if offsets is None else torch.from_numpy(offsets).reshape(by_group),
    )
