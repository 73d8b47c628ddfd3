"""`isobatch tune`, with a stopwatch that is made up: what is tried, what is kept, and when."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from isobatch.cli import main
from isobatch.errors import UnsupportedOpError
from isobatch.kernels import plan as plans
from isobatch.kernels.gpu.device import architecture, dtypes
from isobatch.kernels.linear import tune as tuning
from isobatch.kernels.linear.members import Shape, default, tile_named
from isobatch.kernels.linear.nearest import nearest, promising
from isobatch.kernels.linear.tune import THOROUGH, Search, Trial, quick
from isobatch.kernels.plan import BUCKETS, Plan
from isobatch.models.presets import preset

BF16 = torch.bfloat16
SHIPPED = plans.shipped("sm90")


def test_the_nearest_shapes_are_those_of_the_least_factor() -> None:
    keys = ("4096x4096.bfloat16", "8192x4096.bfloat16", "512x4096.bfloat16", "9x4096.float16")
    plan = Plan("sm90", {"linear": dict.fromkeys(keys, ())})
    assert nearest(plan, Shape(5000, 4096, BF16, BF16)) == list(keys[:3])
    # One's own dtype first, then the other's.
    assert nearest(plan, Shape(5000, 4096, torch.float16, torch.float16))[0] == "9x4096.float16"
    assert nearest(plan, Shape(5000, 4096, BF16, torch.float32)) == []
    assert nearest(Plan("sm90"), Shape(5000, 4096, BF16, BF16)) == []


@pytest.mark.parametrize("rows", BUCKETS)
def test_few_are_tried_and_the_neighbours_choice_the_default_and_first_ranks_among_them(rows: int) -> None:
    tuned = Shape(6144, 4096, BF16, BF16)
    tried = promising(SHIPPED, tuned, rows)
    assert set(SHIPPED.names("linear", tuned.key, rows)) <= set(tried)
    assert {default(rows), f"lt{rows}.0", f"lt{rows}.1", f"lt{rows}.2"} <= set(tried)
    assert len(tried) == len(set(tried)) <= 13 < len(tuning.candidates(rows))


def test_every_tried_name_is_one_of_ours_or_the_librarys() -> None:
    for shape in (Shape(131, 7000, BF16, BF16), Shape(128256, 2048, BF16, torch.float32)):
        for name in {name for rows in BUCKETS for name in promising(SHIPPED, shape, rows)}:
            assert name.startswith("lt") or tile_named(name).name == name


def test_two_copies_do_where_a_weight_is_larger_than_the_cache() -> None:
    large, small = Shape(24576, 4096, BF16, BF16), Shape(1024, 4096, BF16, BF16)
    assert [quick(SHIPPED).copies(shape) for shape in (large, small)] == [2, 16]
    assert [THOROUGH.copies(shape) for shape in (large, small)] == [3, 16]


def test_what_is_tried_is_certified_timed_and_the_fastest_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[tuple[int, int]] = []

    def stopwatch(sides: Sequence[Any], copies: int, rounds: int) -> list[float]:
        timed.append((copies, rounds))
        # The small kernel alone, torch's linear behind it, and candidates, of which the last is the fastest.
        return [3.0, *(13.0 - at for at in range(len(sides) - 1))]

    monkeypatch.setattr(tuning, "microseconds", stopwatch)
    monkeypatch.setattr(tuning, "refusal", lambda _shape, name, _rows: "bits" if name == "lt8.0" else None)
    shape = Shape(48, 64, dtypes()[0], dtypes()[0])
    tried = Search(lambda _shape, _rows: ["16x32x32.4.2w", "lt8.0", "lt8.1"], rounds=5, few_copies=True)
    short, long = tuning.tune(shape, (8, 512), search=tried)
    assert short.entry() == (8, ("lt8.1", "16x32x32.4.2w"))
    assert short.refused == {"lt8.0": "bits"}
    assert short.torch_us == 10
    assert dict(short.times) == {"lt8.1": 8, "16x32x32.4.2w": 9}
    assert timed == [(16, 5), (2, 3)]
    assert long.rows == 512


def test_where_no_tile_of_ours_was_tried_the_default_is_kept_to_fall_back_on() -> None:
    assert Trial(8, 1.0, (("lt8.1", 1.0), ("lt8.0", 2.0)), {}).entry() == (8, ("lt8.1", "lt8.0", default(8)))


def fake(tuned: list[tuple[str, Search]], fails_at: int = 99) -> Callable[..., list[Trial]]:
    def tune(
        shape: Shape, buckets: Sequence[int], *, progress: Callable[[int], None], search: Search
    ) -> list[Trial]:
        if len(tuned) == fails_at:
            raise UnsupportedOpError("unplugged")
        tuned.append((shape.key, search))
        for rows in buckets:
            progress(rows)
        return [Trial(rows, 2.0, ((default(rows), 1.0),), {}) for rows in buckets]

    return tune


def test_every_shape_of_every_rank_is_tuned_once_and_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned: list[tuple[str, Search]] = []
    monkeypatch.setattr(tuning, "tune", fake(tuned))
    path = tmp_path / "plan.json"
    Plan(architecture(), {"linear": {"1x1.bfloat16": ((None, (default(1),)),)}}).write(path)
    assert main(["tune", "qwen3-8b", "--ranks", "1", "2", "--quick", "--out", str(path)]) == 0
    keys = [key for key, _ in tuned]
    expected = {n for ranks in (1, 2) for n in preset("qwen3-8b").products(ranks).values()}
    assert len(keys) == len(set(keys)) == len(expected) + 2  # lm_head has two forms at each number of ranks
    assert all(search.few_copies for _, search in tuned)
    assert set(plans.read(path, architecture()).ops["linear"]) == {"1x1.bfloat16", *keys}
    lines = [line for line in capsys.readouterr().err.splitlines() if " of " in line]
    assert lines[0].startswith(f"1 of {len(keys)}: qwen3-8b qkv, {keys[0]}")
    assert len(lines) == len(keys)


def test_without_quick_everything_is_tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tuned: list[tuple[str, Search]] = []
    monkeypatch.setattr(tuning, "tune", fake(tuned))
    assert main(["tune", "qwen3-8b", "--out", str(tmp_path / "plan.json")]) == 0
    assert {search for _, search in tuned} == {THOROUGH}


@pytest.mark.parametrize("known", [True, False], ids=["in the file", "on this machine"])
def test_beyond_the_rows_that_were_asked_for_tables_stay_as_they_are(
    known: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tuning, "tune", fake([]))
    path, key = tmp_path / "plan.json", "6144x4096.bfloat16"
    old: tuple[plans.Entry, ...] = ((1, ("lt1.1",)), (4, ("lt4.1",)), (64, ("lt64.1",)), (None, ("lt512.1",)))
    Plan(architecture(), {"linear": {key: old} if known else {}}).write(path)
    current: plans.Entry = (None, ("lt512.7",))
    monkeypatch.setattr(
        plans, "current", lambda _architecture: Plan(architecture(), {"linear": {key: (current,)}})
    )
    assert main(["tune", "qwen3-8b", "--rows", "20", "--out", str(path)]) == 0
    tables = plans.read(path, architecture()).ops["linear"]
    assert tables[key][:6] == tuple((rows, (default(rows),)) for rows in (1, 2, 4, 8, 16, 32))
    assert tables[key][6:] == (old[2:] if known else (current,))
    assert len(tables["4096x4096.bfloat16"]) == 6  # of which nobody knew anything
    assert main(["tune", "qwen3-8b", "--rows", "0", "--out", str(path)]) == 2
    assert "at least 1" in capsys.readouterr().err


def test_a_damaged_table_of_this_machine_does_not_stop_who_needs_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tuning, "tune", fake([]))
    monkeypatch.setattr(plans, "current", lambda _architecture: pytest.fail("nobody asked for it"))
    assert main(["tune", "qwen3-8b", "--out", str(tmp_path / "plan.json")]) == 0


def test_what_was_tuned_before_an_interruption_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned: list[tuple[str, Search]] = []
    monkeypatch.setattr(tuning, "tune", fake(tuned, fails_at=2))
    path, transcript = tmp_path / "plan.json", tmp_path / "transcript.json"
    assert main(["tune", "qwen3-8b", "--out", str(path), "--transcript", str(transcript)]) != 0
    assert "unplugged" in capsys.readouterr().err
    assert list(plans.read(path, architecture()).ops["linear"]) == sorted(key for key, _ in tuned)
    assert all(key in transcript.read_text() for key, _ in tuned)
    assert [file.name for file in tmp_path.iterdir() if file.suffix == ".unfinished"] == []
