"""Coded weights give the bits of the weights that they stand for: in kernels, in panels, in models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import quantize

from isobatch.bits import bits_equal
from isobatch.engine.memory import weight_bytes
from isobatch.errors import IntegrityError
from isobatch.kernels.bitclass import certify
from isobatch.kernels.catalogue import record
from isobatch.kernels.coding import BF16, CODINGS, F16, F32, Q4, Q4_OFFSET, Q8, CodedRows, Coding
from isobatch.kernels.cpu.layout import CPU
from isobatch.kernels.data import coded, floats
from isobatch.kernels.layout import Layout, Weight
from isobatch.kernels.linear.weight import PackedWeight
from isobatch.kernels.registry import Member
from isobatch.models.checkpoint import Checkpoint, open_checkpoint
from isobatch.models.decoder import Decoder
from isobatch.models.huggingface import HuggingFaceCheckpoint
from isobatch.models.layers import MLP
from isobatch.models.loading import coded_bytes, load_decoder
from isobatch.ops import certified_ops
from tests.checkpoints import Stored, gguf_metadata, gguf_tensors, tiny_model, write_gguf
from tests.engine_harness import TinyCheckpoint, forward, stream

Q = GGMLQuantizationType
by_coding = pytest.mark.parametrize("coding", CODINGS.values(), ids=CODINGS)


# --- kernels ---


@by_coding
def test_coded_weight_gives_the_bits_of_the_widened_one(coding: Coding) -> None:
    # Blocks of k that end early, panels that end early, tiles of every height, and more than one work item.
    ops = certified_ops()
    for outputs, inputs in ((70, 288), (32, 32), (5, 544)):
        rows = coded(f"coded {outputs}", coding, outputs, inputs)
        weight, widened = PackedWeight.pack(rows), PackedWeight.pack(CodedRows.of(rows.floats()))
        x, bias = floats("coded/x", 250, inputs), floats("coded/b", outputs)
        for count in (1, 2, 3, 4, 5, 6, 7, 12, 13, 250):
            got, want = (ops.linear(x[:count], w, bias) for w in (weight, widened))
            assert bits_equal(got, want), f"{outputs} x {inputs}, {count} rows"
        ids = torch.arange(outputs).flip(0)
        assert bits_equal(ops.embedding(ids, weight), rows.floats()[ids])


@pytest.mark.parametrize("coding", [F16, BF16], ids=["f16", "bf16"])
@pytest.mark.parametrize("count", [1, 5])
def test_every_half_widens_exactly(coding: Coding, count: int) -> None:
    halves = torch.arange(-(2**15), 2**15).to(torch.int16).view(coding.dtype).reshape(-1, 1)
    (row, *_) = certified_ops().linear(torch.ones(count, 1), PackedWeight.pack(CodedRows.of(halves)))
    want = halves.double().flatten().to(torch.float32) + 0  # + 0, since a sum that begins at +0 has no -0
    numbers = ~want.isnan()
    assert bits_equal(row.isnan(), want.isnan())
    assert bits_equal(row[numbers], want[numbers])
    assert int(row.isinf().sum()) == 2
    assert bool(((row != 0) & (row.abs() < 2.0**-14)).any())


def test_floats_are_scaled_and_shifted_in_two_roundings() -> None:
    scale, offset = np.float32(1 + 2**-23), np.float32(-(2.0**-22))
    rows = CodedRows(
        Q4_OFFSET,
        torch.arange(32, dtype=torch.uint8).reshape(1, 32) % 16,
        torch.tensor([[float(scale)]]),
        torch.tensor([[float(offset)]]),
    )
    expected = [np.float32(np.float32(scale * np.float32(code % 16)) + offset) for code in range(32)]
    assert rows.floats().tolist() == [[float(value) for value in expected]]


def test_a_negative_scale_keeps_the_sign_of_zero() -> None:
    for coding, zero, negative in ((Q8, 0, True), (Q4, 8, True), (Q4_OFFSET, 0, False)):
        codes = torch.full((1, 32), zero, dtype=coding.dtype)
        scales = torch.full((1, 1), -2.0)
        rows = CodedRows(coding, codes, scales, torch.zeros(1, 1) if coding.has_offsets else None)
        assert bool(rows.floats().signbit().all()) is negative
        assert bits_equal(PackedWeight.pack(rows).rows(torch.tensor([0])).floats(), rows.floats())


class FusedWeight:
    """A planted fault: scale * code + offset rounded once, as a fused multiply-add would."""

    def __init__(self, outputs: int, inputs: int) -> None:
        self.packed = PackedWeight.empty(outputs, inputs, F32)

    @classmethod
    def empty(cls, outputs: int, inputs: int, _coding: Coding) -> Weight:
        return cls(outputs, inputs)

    @property
    def outputs(self) -> int:
        return self.packed.outputs

    @property
    def inputs(self) -> int:
        return self.packed.inputs

    def put(self, start: int, rows: CodedRows) -> None:
        widened = rows.floats()
        if rows.scales is not None and rows.offsets is not None:
            scales, offsets = (
                part.double().repeat_interleave(rows.coding.group, -1) for part in (rows.scales, rows.offsets)
            )
            widened = (scales * rows.codes.double() + offsets).float()
        self.packed.put(start, CodedRows.of(widened))


def test_control_with_a_fused_widening_is_refused() -> None:
    op = record("linear")
    function = op.member("tiles").function

    def linear(x: torch.Tensor, weight: FusedWeight, bias: torch.Tensor | None) -> Any:
        return function(x, weight.packed, bias)

    verdict = certify(op, Member("fused", linear, Layout(FusedWeight, CPU.cache, CPU.stack)), (2, 7))
    assert not verdict.member
    assert verdict.refuted_by == "q4 with offset, 2 rows"


# --- panels ---


@by_coding
@pytest.mark.parametrize(
    ("outputs", "cuts"), [(64, (64,)), (100, (1, 33, 66)), (70, (31, 1, 38)), (5, (2, 3))]
)
def test_packing_in_pieces_loses_nothing(coding: Coding, outputs: int, cuts: tuple[int, ...]) -> None:
    rows = coded("pieces", coding, outputs, 64)
    packed, whole = PackedWeight.empty(outputs, 64, coding), PackedWeight.pack(rows)
    start = 0
    for count in cuts:
        packed.put(start, rows[start : start + count])
        start += count
    for name in ("codes", "scales", "offsets"):
        assert np.array_equal(getattr(packed, name), getattr(whole, name))
    again = packed.rows(torch.arange(outputs))
    assert again.coding == coding
    assert torch.equal(again.codes, rows.codes)
    assert bits_equal(again.floats(), rows.floats())
    packed.put(3, rows[:1])  # a row that is stored twice is the one that came last
    assert bits_equal(packed.rows(torch.tensor([3])).floats(), rows[:1].floats())


@by_coding
def test_memory_is_what_the_coding_says(coding: Coding) -> None:
    weight = PackedWeight.empty(64, 96, coding)
    assert sum(part.nbytes for part in (weight.codes, weight.scales, weight.offsets)) == coding.bytes(64, 96)


def test_rows_in_another_coding_are_refused() -> None:
    weight = PackedWeight.empty(32, 32, Q8)
    with pytest.raises(IntegrityError, match="another coding"):
        weight.put(0, coded("other", Q4, 32, 32))


# --- models ---


class Widened:
    """A checkpoint that gives every weight as float32."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.config, self.path = checkpoint.config, checkpoint.path
        self.names, self.shape, self.read = checkpoint.names, checkpoint.shape, checkpoint.read
        self.close = checkpoint.close

    def coding(self, _name: str) -> Coding:
        return F32

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> CodedRows:
        return CodedRows.of(self.read(name, start, stop))


def _decoders(path: Path) -> tuple[Decoder, Decoder]:
    """The model as it is stored, and widened when loaded."""
    checkpoint = open_checkpoint(path)
    return load_decoder(checkpoint, certified_ops()), load_decoder(Widened(checkpoint), certified_ops())


def _same_logits(one: Decoder, other: Decoder) -> bool:
    sequences = [[token % 96 for token in stream(n)[:length]] for n, length in enumerate((1, 2, 40))]
    pairs = zip(forward(one, *sequences), forward(other, *sequences), strict=True)
    alone = zip(forward(one, sequences[0]), forward(other, sequences[0]), strict=True)
    return all(bits_equal(a, b) for a, b in (*pairs, *alone))


def _codings(decoder: Decoder) -> list[Coding]:
    layer = decoder.layers[0]
    assert isinstance(layer.mlp, MLP)
    weights = (decoder.embedding, layer.attention.qkv, layer.attention.out, layer.mlp.gate_up, layer.mlp.down)
    return [weight.coding for weight in weights if isinstance(weight, PackedWeight)]


@pytest.mark.parametrize(("dtype", "coding"), [(torch.float16, F16), (torch.bfloat16, BF16)])
def test_halves_give_the_logits_of_the_same_numbers_in_float32(
    dtype: torch.dtype, coding: Coding, tmp_path: Path
) -> None:
    model = tiny_model("qwen3", dtype)
    model.save_pretrained(tmp_path / "half")
    model.float().save_pretrained(tmp_path / "float")
    assert isinstance(open_checkpoint(tmp_path / "half"), HuggingFaceCheckpoint)
    half, whole = (load_decoder(open_checkpoint(tmp_path / d), certified_ops()) for d in ("half", "float"))
    assert _codings(half) == [coding] * 5
    assert _codings(whole) == [F32] * 5
    assert _same_logits(half, whole)


@pytest.mark.parametrize(
    ("kind", "coding"),
    [(Q.F16, F16), (Q.BF16, BF16), (Q.Q4_0, Q4), (Q.Q4_1, Q4_OFFSET), (Q.Q8_0, Q8)],
    ids=lambda value: value.name if isinstance(value, Q) else "",
)
def test_gguf_models_keep_their_coding_and_give_the_widened_logits(
    kind: GGMLQuantizationType, coding: Coding, tmp_path: Path
) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    path = write_gguf(tmp_path / "m.gguf", gguf_metadata(model.config), gguf_tensors(model, kind))
    coded_one, widened = _decoders(path)
    assert _codings(coded_one) == [coding] * 5
    assert _codings(widened) == [F32] * 5
    assert _same_logits(coded_one, widened)


def test_tensors_of_one_weight_in_two_codings_are_widened(tmp_path: Path) -> None:
    model = tiny_model("llama")
    tensors: dict[str, Stored] = gguf_tensors(model, Q.Q4_1)
    plain = gguf_tensors(model)
    for name in ("blk.0.attn_v.weight", "blk.0.ffn_down.weight", "blk.1.ffn_up.weight"):
        tensors[name] = (quantize(plain[name][0], Q.Q8_0), Q.Q8_0)
    path = write_gguf(tmp_path / "mixed.gguf", gguf_metadata(model.config), tensors)
    mixed, widened = _decoders(path)
    assert _codings(mixed) == [Q4_OFFSET, F32, Q4_OFFSET, Q4_OFFSET, Q8]
    assert _same_logits(mixed, widened)
    gate_up, qkv, norms = 2 * 96 * 64, 128 * 64, 5 * 64
    down, others = 96 * 64, 2 * 96 * 64 + 2 * 64 * 64 + gate_up + qkv + 96 * 64
    bits = 32 * (qkv + gate_up + norms) + 9 * down + 6 * others  # a scale of 32 is a bit, and so is an offset
    assert coded_bytes(open_checkpoint(path)) == bits // 8


def test_float32_models_need_as_much_as_ever() -> None:
    checkpoint = TinyCheckpoint()
    assert coded_bytes(checkpoint) == weight_bytes(checkpoint.config)
