"""The GGUF container: every number format to the bit, rows on demand, values as the gguf package has them."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize, quantize

from isobatch.bits import bits_equal
from isobatch.errors import CheckpointError, UnsupportedModelError
from isobatch.models.gguf_blocks import SUPPORTED, coding_of
from isobatch.models.gguf_format import GgufFile
from tests.checkpoints import Stored, write_gguf

Q = GGMLQuantizationType


def _random(*shape: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(3).standard_normal(shape).astype(np.float32)


def _blocks(kind: GGMLQuantizationType, rows: int, columns: int) -> npt.NDArray[Any]:
    """Rows as a file stores them: any code, with finite scales of either sign; plain formats without them."""
    if kind.name in ("F32", "F16", "BF16"):
        return np.asarray(quantize(_random(rows, columns), kind))
    per_block, size = GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(5)
    blocks = random.integers(0, 256, (rows * columns // per_block, size), dtype=np.uint8)
    scales = random.standard_normal((len(blocks), 2)).astype("<f2")
    scales[::7, 0] = 2.0**-24  # the smallest float16
    scales[::5, 0] = 0
    if kind is Q.Q6_K:
        blocks[:, -2:] = scales.view(np.uint8)[:, :2]
    else:
        has_two = kind in (Q.Q4_1, Q.Q4_K)
        blocks[:, : 4 if has_two else 2] = scales.view(np.uint8)[:, : 4 if has_two else 2]
    return blocks.reshape(rows, -1)


@pytest.mark.parametrize("kind", [Q[name] for name in SUPPORTED])
def test_slices_of_every_format_are_slices_of_the_whole(kind: GGMLQuantizationType, tmp_path: Path) -> None:
    stored = _blocks(kind, 21, 512)
    path = write_gguf(tmp_path / "one.gguf", {"general.architecture": "any"}, {"weight": (stored, kind)})
    file, expected = GgufFile(path), torch.from_numpy(dequantize(stored, kind))
    assert file.tensors["weight"].shape == (21, 512)
    for start, stop in ((0, 21), (0, 1), (20, 21), (3, 17), (4, 4)):
        rows = file.rows("weight", start, stop)
        assert rows.coding == coding_of(kind)
        assert rows.codes.dtype == rows.coding.dtype
        assert bits_equal(rows.floats(), expected[start:stop])


def test_a_q4_1_block_is_what_its_description_says(tmp_path: Path) -> None:
    # A float16 scale, a float16 minimum, 16 bytes: low halves are numbers 0 to 15, high halves 16 to 31.
    nibbles = [(7 * i + 3) % 16 for i in range(32)]
    scale, minimum = 0.25, -1.5
    packed = bytes(nibbles[i] | nibbles[i + 16] << 4 for i in range(16))
    block = np.frombuffer(struct.pack("<ee", scale, minimum) + packed, dtype=np.uint8).reshape(1, 20)
    path = write_gguf(tmp_path / "one.gguf", {"general.architecture": "any"}, {"weight": (block, Q.Q4_1)})
    assert GgufFile(path).rows("weight", 0, 1).floats().tolist() == [[scale * n + minimum for n in nibbles]]


def test_halves_widen_exactly(tmp_path: Path) -> None:
    patterns = np.arange(2**16, dtype=np.uint16).reshape(16, -1)
    tensors: dict[str, Stored] = {
        "half": (patterns.view(np.float16), Q.F16),
        "brain": (patterns.view(np.uint8), Q.BF16),
    }
    file = GgufFile(write_gguf(tmp_path / "two.gguf", {"general.architecture": "any"}, tensors))
    bits = torch.from_numpy(patterns.view(np.int16))
    for name, dtype in (("half", torch.float16), ("brain", torch.bfloat16)):
        expected = bits.view(dtype).float()
        numbers = ~expected.isnan()  # which NaN it becomes is up to the processor
        assert numbers.sum() > 60_000
        assert bits_equal(file.rows(name, 0, 16).floats()[numbers], expected[numbers])


@pytest.mark.parametrize("kind", [Q.F32, Q.Q8_0])
def test_vectors_are_read_whole(kind: GGMLQuantizationType, tmp_path: Path) -> None:
    stored = quantize(_random(64), kind)
    path = write_gguf(tmp_path / "one.gguf", {"general.architecture": "any"}, {"weight": (stored, kind)})
    expected = torch.from_numpy(dequantize(stored, kind))
    assert bits_equal(torch.from_numpy(GgufFile(path).vector("weight")), expected)


def test_reading_a_row_takes_the_memory_of_a_row(tmp_path: Path) -> None:
    stored = quantize(_random(4096, 512), Q.Q8_0)  # 8 MiB as float32
    path = write_gguf(tmp_path / "one.gguf", {"general.architecture": "any"}, {"weight": (stored, Q.Q8_0)})
    tracemalloc.start()
    GgufFile(path).rows("weight", 1000, 1002)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200_000


def test_every_type_of_value_is_what_gguf_reads(tmp_path: Path) -> None:
    path = tmp_path / "values.gguf"
    writer = GGUFWriter(path, "any")
    for kind in GGUFValueType:
        if kind not in (GGUFValueType.STRING, GGUFValueType.ARRAY):
            value = 1.1 if kind in (GGUFValueType.FLOAT32, GGUFValueType.FLOAT64) else 1
            writer.add_key_value(f"one.{kind.name}", value, kind)
    writer.add_string("text", "żółw 🐢")
    for name, values in {
        "words": ["a", "", "ü"],
        "integers": [-1, 2],
        "numbers": [0.5],
        "no": [True],
    }.items():
        writer.add_array(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    theirs = {key: field.contents() for key, field in GGUFReader(path).fields.items() if key[:5] != "GGUF."}
    assert len(theirs) == 17
    assert GgufFile(path).metadata == theirs


@pytest.mark.parametrize("kind", [Q.Q5_0, Q.Q5_1, Q.IQ4_XS, Q.F64])
def test_other_quantisations_are_refused_by_name(kind: GGMLQuantizationType, tmp_path: Path) -> None:
    per_block, size = GGML_QUANT_SIZES[kind]
    data = np.zeros((2, size), np.uint8) if per_block > 1 else np.zeros((2, 8))
    path = write_gguf(tmp_path / "one.gguf", {"general.architecture": "any"}, {"weight": (data, kind)})
    with pytest.raises(UnsupportedModelError, match=rf"F32, F16, .*; got {kind.name}"):
        GgufFile(path)


def test_rows_of_broken_blocks_are_refused(tmp_path: Path) -> None:
    stored = quantize(_random(2, 32), Q.Q8_0)
    path = write_gguf(tmp_path / "one.gguf", {"general.architecture": "any"}, {"weight": (stored, Q.Q8_0)})
    header = b"weight" + struct.pack("<IQ", 2, 32)
    path.write_bytes(path.read_bytes().replace(header, b"weight" + struct.pack("<IQ", 2, 33)))
    with pytest.raises(CheckpointError, match="whole blocks of 32"):
        GgufFile(path)
