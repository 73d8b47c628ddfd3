"""Plans: they may be wrong, old or missing, and then cost time and never a bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from isobatch.errors import ConfigError
from isobatch.kernels import plan as plans
from isobatch.kernels.plan import Plan

TABLE = {"linear": {"64x32.bfloat16": ((16, ("lt16.0", "16x64x128.4.8w")), (None, ("128x128x64.4.5tp1",)))}}


def test_each_row_count_has_the_entry_of_its_bucket() -> None:
    plan = Plan("sm90", TABLE)
    assert plan.names("linear", "64x32.bfloat16", 1) == ("lt16.0", "16x64x128.4.8w")
    assert plan.names("linear", "64x32.bfloat16", 16) == ("lt16.0", "16x64x128.4.8w")
    assert plan.names("linear", "64x32.bfloat16", 17) == ("128x128x64.4.5tp1",)
    assert plan.names("linear", "65x32.bfloat16", 17) == ()
    assert plan.names("attention", "64x32.bfloat16", 17) == ()


@pytest.mark.parametrize(
    ("rows", "bucket"), [(1, 1), (2, 2), (3, 4), (65, 100), (101, 128), (8192, 8192), (65536, 8192)]
)
def test_a_row_count_belongs_to_the_next_tuned_one(rows: int, bucket: int) -> None:
    assert plans.bucket(rows) == bucket


def test_what_is_written_is_read(tmp_path: Path) -> None:
    Plan("sm90", TABLE).write(tmp_path / "plan.json")
    assert plans.read(tmp_path / "plan.json", "sm90") == Plan("sm90", TABLE)


def test_merging_replaces_key_by_key() -> None:
    other = Plan("sm90", {"linear": {"1x1.bfloat16": ((None, ("a",)),)}, "moe": {}})
    merged = Plan("sm90", TABLE).merged(other)
    assert set(merged.ops["linear"]) == {"64x32.bfloat16", "1x1.bfloat16"}
    with pytest.raises(ConfigError, match="two architectures"):
        merged.merged(Plan("sm80"))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "cannot read the plan"),
        ("[]", "not a plan"),
        ('{"architecture": "sm80", "ops": {}}', "another architecture; expected sm90"),
        ('{"architecture": "sm90", "ops": {"linear": []}}', "bad ops"),
        ('{"architecture": "sm90", "ops": {"linear": {"k": 3}}}', "bad table k"),
        ('{"architecture": "sm90", "ops": {"linear": {"k": [[1, []]]}}}', "bad entry"),
        ('{"architecture": "sm90", "ops": {"linear": {"k": [["1", ["a"]]]}}}', "bad entry"),
    ],
)
def test_a_damaged_plan_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=complaint):
        plans.read(path, "sm90")


def test_an_architecture_without_tables_has_an_empty_plan() -> None:
    assert plans.shipped("sm10") == Plan("sm10")


def test_shipped_tables_cover_every_row_count_and_have_a_tile_of_ours() -> None:
    plan = plans.shipped("sm90")
    assert len(plan.ops["linear"]) >= 10
    for entries in plan.ops["linear"].values():
        assert [most for most, _ in entries] == [*plans.BUCKETS[:-1], None]
        assert all(any(not name.startswith("lt") for name in names) for _, names in entries)


def test_tables_made_on_this_machine_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISOBATCH_CACHE_DIR", str(tmp_path))
    own = {"architecture": "sm90", "ops": {"linear": {"4096x4096.bfloat16": [[None, ["own"]]]}}}
    plans.own_path("sm90").write_text(json.dumps(own))
    current = plans.current("sm90")
    assert current.names("linear", "4096x4096.bfloat16", 5) == ("own",)
    assert current.names("linear", "6144x4096.bfloat16", 5)
