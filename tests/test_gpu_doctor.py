"""`isobatch doctor --device cuda`: on a GPU where there is one, else under Triton's interpreter."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from isobatch.cli import gpu_checks, main
from isobatch.kernels import plan as plans
from isobatch.kernels.bitclass import Verdict
from isobatch.kernels.gpu.catalogue import GPU_RECORDS
from isobatch.kernels.linear.members import Shape
from isobatch.ops import gpu


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    records = {"embedding": GPU_RECORDS["embedding"]}
    for module in (gpu_checks, gpu):
        monkeypatch.setattr(module, "GPU_RECORDS", records)
    monkeypatch.setattr(gpu_checks, "_LIBRARIES", False)


def run_doctor(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, dict[str, Any]]:
    code = main(["doctor", "--device", "cuda", "--json", *options])
    return code, json.loads(capsys.readouterr().out)


def test_every_member_is_certified_and_the_report_is_kept(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    kept = tmp_path / "report.json"
    code, report = run_doctor(capsys, "--out", str(kept))
    assert code == 0
    [check] = report["checks"]
    assert check["details"] == [
        f"embedding/{member.name}: member, equal on {GPU_CASES} inputs"
        for member in GPU_RECORDS["embedding"].members
    ]
    assert report["numerics"].startswith("num-")
    written = json.loads(kept.read_text())
    assert written["checks"] == report["checks"]
    assert {"commit", "dirty", "versions"} <= written["provenance"].keys()
    # What is passed on names no folder of this machine.
    assert report["kernel_cache"]["folder"] not in kept.read_text()


GPU_CASES = len(GPU_RECORDS["embedding"].variants) * len(GPU_RECORDS["embedding"].row_counts())


def test_member_that_differs_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = GPU_RECORDS["embedding"]

    def off(token_ids: torch.Tensor, weight: Any) -> torch.Tensor:
        out: torch.Tensor = record.canonical.function(token_ids=token_ids, weight=weight)
        out.view(torch.int16)[-1, -1] ^= 1
        return out

    impostor = replace(record.canonical, name="impostor", function=off)
    tampered = {"embedding": replace(record, members=(*record.members, impostor))}
    monkeypatch.setattr(gpu_checks, "GPU_RECORDS", tampered)
    code, report = run_doctor(capsys)
    assert code == 1
    [failure] = report["checks"][0]["failures"]
    assert failure.startswith("embedding/impostor: not a member")


def test_library_that_is_refused_is_told_and_no_failure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = {"64x32.float16.float32": ((8, ("16x64x256.4.4wt", "lt8.0")), (None, ("lt8192.1",)))}
    asked: list[tuple[Shape, str, int]] = []

    def refusal(shape: Shape, name: str, rows: int) -> str | None:
        asked.append((shape, name, rows))
        return "1 differ" if rows > 2048 else None

    def certify_library(heads: int, _kv_heads: int, head_size: int, _dtype: torch.dtype) -> Verdict:
        assert heads == 32
        return Verdict("attention", "library", head_size < 200, 5)

    monkeypatch.setattr(gpu_checks, "_LIBRARIES", True)
    monkeypatch.setattr(gpu_checks, "certify_library", certify_library)
    monkeypatch.setattr(gpu_checks, "refusal", refusal)
    monkeypatch.setattr(plans, "shipped", lambda architecture: plans.Plan(architecture, {"linear": tables}))
    code, report = run_doctor(capsys)
    assert code == 0
    _, attention, products = report["checks"]
    sizes = len(attention["details"])
    assert attention["summary"] == f"{sizes * 3 // 4} of {sizes} are members"
    few = [rows for rows in plans.BUCKETS if rows <= 8]
    assert [(name, rows) for _, name, rows in asked] == [
        *(("lt8.0", rows) for rows in few),
        *(("lt8192.1", rows) for rows in plans.BUCKETS if rows > 8),
    ]
    assert asked[0][0] == Shape(64, 32, torch.float16, torch.float32)
    refused = [line for line in products["details"] if line.endswith("1 differ")]
    assert refused == [f"64x32.float16.float32, {rows} rows, lt8192.1: 1 differ" for rows in (4096, 8192)]


def test_quick_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--device", "cuda", "--quick"]) == 2
    assert "nothing but certification" in capsys.readouterr().err


def test_shape_is_read_as_plans_write_it() -> None:
    for shape in (
        Shape(6144, 4096, torch.bfloat16, torch.bfloat16),
        Shape(9, 16, torch.float16, torch.float32),
    ):
        assert Shape.of(shape.key) == shape
