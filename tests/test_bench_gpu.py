"""The GPU's benches, run through on small shapes: that both sides do the same work, and what the goals make
of it. Times are made up; the real ones come from a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend

from isobatch.cli import bench_attention, bench_gpu, bench_rows, main
from isobatch.errors import IntegrityError
from isobatch.kernels.activation.gpu_record import SILU_AND_MUL
from isobatch.kernels.attention.gpu_serve import Attention
from isobatch.kernels.gpu import device
from isobatch.kernels.gpu.device import INTERPRETED
from isobatch.kernels.registry import Member
from isobatch.kernels.stock import STOCK
from isobatch.models.presets import preset

pytestmark = pytest.mark.skipif(
    not INTERPRETED, reason="shapes for the interpreter; `isobatch bench gpu` has others"
)

LIMITS = {"bytes_per_s": 1e9, "flop_per_s": 1e12}
SMALL = replace(preset("qwen3-8b"), hidden=64, inner=96, heads=4, kv_heads=2, head_size=16)
results: list[list[Any]] = []


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    def call_each(sides: Sequence[Any], copies: int, **_rounds: int) -> list[float]:
        results.append([[side(copy) for copy in range(copies)] for side in sides])
        return [10.0 + i for i in range(len(sides))]

    results.clear()
    for module in (bench_attention, bench_rows):
        monkeypatch.setattr(module, "microseconds", call_each)
        monkeypatch.setattr(module, "preset", lambda _name: SMALL)
        monkeypatch.setattr(module, "_COLD_BYTES", 1)
        monkeypatch.setattr(module, "_LARGE_BYTES", 1)
    monkeypatch.setattr(bench_attention, "_BACKENDS", (SDPBackend.MATH, SDPBackend.CUDNN_ATTENTION))
    monkeypatch.setattr(bench_attention, "attention_for", lambda *_heads: Attention())
    monkeypatch.setattr(bench_attention, "_DECODES", ((1, 40), (9, 20)))
    monkeypatch.setattr(bench_attention, "_PREFILLS", (33,))
    monkeypatch.setattr(bench_attention, "_CHUNK", (5, 40))
    monkeypatch.setattr(bench_rows, "_ROWS", (1, 3))


def test_both_sides_attend_to_the_same() -> None:
    points = list(bench_attention.attention_points(LIMITS, lambda _what: None))
    assert [(p["kind"], p["requests"], p["context"]) for p in points] == [
        ("decode", 1, 40),
        ("decode", 9, 20),
        ("prefill", 1, 33),
        ("chunk", 1, 40),
    ]
    for ours, theirs in results:  # cuDNN does not run here, so it has no column
        for own, torchs in zip(ours, theirs, strict=True):
            assert torch.allclose(own.float(), torchs.transpose(1, 2).flatten(0, 1).float(), atol=5e-3)
    goals = bench_attention.attention_summary(points)
    assert len(goals) == 6
    assert all(goal["met"] for goal in goals if "against" in goal["what"])  # 10 against 11
    assert points[0]["kv_bytes"] == 40 * 2 * 16 * 2 * 2


def test_request_that_differs_alone_stops_the_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    def by_load(self: Attention, q: torch.Tensor, *_: Any) -> torch.Tensor:
        return torch.full_like(q, len(q))

    monkeypatch.setattr(Attention, "__call__", by_load)
    with pytest.raises(IntegrityError, match="a request alone differs"):
        list(bench_attention.attention_points(LIMITS, lambda _what: None))


def test_rows_are_counted_in_bytes() -> None:
    points = list(bench_rows.row_points(LIMITS, lambda _what: None))
    angles = 2 * 8 * 4 + 8  # cosines and sines of a head of 16 numbers, and the position
    assert [p["bytes"] for p in points if p["rows"] == 1] == [256, 512, 576, 256 + angles]
    goals = bench_rows.row_summary(points)
    assert [goal["what"].partition(":")[0] for goal in goals] == [
        "rms_norm",
        "rms_norm, residual",
        "silu_and_mul",
        "rotary",
    ]
    # 512 bytes at 1 GB/s are 0.5 of the 10 microseconds that they took.
    assert goals[1]["value"] == pytest.approx(0.0512)


def test_red_gate_prints_no_figure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Member("other", lambda gate_up: SILU_AND_MUL.canonical.function(-gate_up), STOCK)
    record = replace(SILU_AND_MUL, members=(*SILU_AND_MUL.members, other), variants=("wide/bf16",))
    monkeypatch.setattr(bench_gpu, "GPU_RECORDS", {record.name: record})
    part = replace(bench_gpu.SECTIONS["rows"], records=(record.name,))
    monkeypatch.setitem(bench_gpu.SECTIONS, "rows", part)
    monkeypatch.setattr(bench_gpu, "measure", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(device, "INTERPRETED", False)
    monkeypatch.setattr(device, "device", lambda: torch.device("cpu"))
    out = tmp_path / "gpu.json"
    assert main(["bench", "gpu", "--only", "rows", "--json", "--out", str(out)]) == 1
    assert '"gate": ["silu_and_mul/other: not a member' in capsys.readouterr().out
    assert not out.exists()
