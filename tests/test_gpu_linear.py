"""Linear on the GPU: what the plan chooses, what is refused, and how accurate the written order is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from isobatch.bits import bits_equal
from isobatch.errors import ConfigError
from isobatch.kernels import plan as plans
from isobatch.kernels import sources
from isobatch.kernels.bitclass import certify
from isobatch.kernels.gpu.device import INTERPRETED, dtypes
from isobatch.kernels.linear import gpu as serving
from isobatch.kernels.linear import members
from isobatch.kernels.linear.gpu import Certificates, Linear
from isobatch.kernels.linear.gpu_record import case, record_for
from isobatch.kernels.linear.members import Shape, tile_named
from isobatch.kernels.linear.triton import linear_plain
from isobatch.kernels.plan import Plan
from isobatch.kernels.registry import Member
from isobatch.kernels.stock import STOCK, DenseWeight
from tests.gpu_faults import split_by_load

DTYPE = dtypes()[0]
SMALL = Shape(48, 64, DTYPE, DTYPE) if INTERPRETED else Shape(1024, 4096, DTYPE, DTYPE)
OWN, LIBRARY = "16x32x32.4.2w", "lt16.0"
needs_gpu = pytest.mark.skipif(INTERPRETED, reason="no GPU: the library has no interpreter")


def test_a_split_chosen_from_load_is_refused() -> None:
    verdict = certify(record_for(SMALL), Member("split", split_by_load, STOCK), (4, 20))
    assert not verdict.member
    assert verdict.refuted_by == "residue, 4 rows"


@pytest.mark.parametrize("tile", ["16x64x256.4.4wtp1", "16x64x128.4.8w"], ids=["bulk copies", "pointers"])
def test_no_rows_give_no_rows(tile: str, tmp_path: Path) -> None:
    """A step in the middle of a long prompt asks for no logits at all."""
    linear = Linear(
        Plan("sm90", {"linear": {SMALL.key: ((None, (tile,)),)}}), Certificates(tmp_path / "none.json")
    )
    arguments = case(SMALL, "plain", 4)
    none = linear(arguments.per_row["x"][:0], arguments.shared["weight"], None, torch.float32)
    assert none.shape == (0, SMALL.outputs)
    assert none.dtype == torch.float32


@needs_gpu
def test_torchs_own_linear_is_not_a_member() -> None:
    def linear(x: torch.Tensor, weight: DenseWeight, bias: Any, out_dtype: Any) -> torch.Tensor:
        return torch.nn.functional.linear(x, weight.dense, bias).to(out_dtype)

    assert not certify(record_for(SMALL), Member("torch", linear, STOCK), (1, 16, 64, 300)).member


@needs_gpu
@pytest.mark.parametrize("biased", [False, True])
def test_library_algorithms_that_do_not_split_are_members(biased: bool) -> None:
    shape = Shape(SMALL.outputs, SMALL.inputs, DTYPE, DTYPE, biased)
    admitted = [
        rows
        for rows in (16, 256, 8192)
        for rank in range(members.RANKS)
        if serving.refusal(shape, f"lt{rows}.{rank}", rows) is None
    ]
    assert {16, 256, 8192} == set(admitted)


def planned(tmp_path: Path, *names: str) -> Linear:
    plan = Plan("sm90", {"linear": {SMALL.key: ((None, names),)}})
    return Linear(plan, Certificates(tmp_path / "certificates.json"))


@pytest.fixture
def _no_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "_machine", lambda: ["a machine"])


@pytest.mark.usefixtures("_no_machine")
def test_a_library_member_that_fails_certification_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "refusal", lambda _shape, _name, _rows: "other bits")
    linear = planned(tmp_path, LIBRARY, OWN)
    drawn = case(SMALL, "wide", 5)
    got = linear(drawn.per_row["x"], drawn.shared["weight"])
    assert linear.name(SMALL, 8) == OWN
    assert linear.refused[0] == f"{LIBRARY} at {SMALL.key}, up to 8 rows"
    assert bits_equal(got, linear_plain(drawn.per_row["x"], drawn.shared["weight"]))


@pytest.mark.usefixtures("_no_machine")
def test_no_library_serves_more_rows_than_it_is_certified_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "refusal", lambda *_: pytest.fail("certified for the last bucket alone"))
    monkeypatch.setattr(plans, "BUCKETS", (1, 2))
    linear = planned(tmp_path, LIBRARY, OWN)
    drawn = case(SMALL, "wide", 5)
    got = linear(drawn.per_row["x"], drawn.shared["weight"])
    assert bits_equal(got, linear_plain(drawn.per_row["x"], drawn.shared["weight"]))
    assert linear.refused == []


@pytest.mark.usefixtures("_no_machine")
def test_preparing_certifies_once_says_what_is_refused_and_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def refusal(_shape: Shape, _name: str, rows: int) -> str | None:
        asked.append(rows)
        if rows == 4:
            raise torch.OutOfMemoryError
        return "other bits" if rows == 2 else None

    monkeypatch.setattr(serving, "refusal", refusal)
    linear = planned(tmp_path, LIBRARY, OWN)
    assert linear.prepare([SMALL], [1, 2, 4, 8]) == [
        f"{LIBRARY} at {SMALL.key}, up to 2 rows",
        f"{LIBRARY} at {SMALL.key}, up to 4 rows, which there is no memory to certify",
    ]
    drawn = case(SMALL, "wide", 4)
    got = linear(drawn.per_row["x"], drawn.shared["weight"])
    assert bits_equal(got, linear_plain(drawn.per_row["x"], drawn.shared["weight"]))
    planned(tmp_path, LIBRARY, OWN).prepare([SMALL], [1, 2, 8])
    assert asked == [1, 2, 4, 8]


@pytest.mark.usefixtures("_no_machine")
def test_certificates_are_kept_and_a_damaged_file_counts_as_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def refusal(_shape: Shape, name: str, _rows: int) -> None:
        asked.append(name)

    monkeypatch.setattr(serving, "refusal", refusal)
    path = tmp_path / "certificates.json"
    for _ in range(2):
        certificates = Certificates(path)
        assert certificates.verdict(SMALL, LIBRARY, 16)
        certificates.keep()
    assert asked == [LIBRARY]
    path.write_text("[1")
    assert Certificates(path).verdict(SMALL, LIBRARY, 16)
    assert asked == [LIBRARY, LIBRARY]


def test_certificates_are_kept_apart_by_all_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else another version's verdicts, against another canonical kernel, would be believed."""
    monkeypatch.setenv("ISOBATCH_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(serving, "INTERPRETED", False)
    monkeypatch.setattr(serving, "device", lambda: None)
    monkeypatch.setattr(serving, "version", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "a GPU")
    kept = Certificates().path
    assert Certificates().path == kept
    monkeypatch.setattr(sources, "digest", lambda: "of other sources")
    assert Certificates().path != kept


@pytest.mark.usefixtures("_no_machine")
def test_a_plan_that_names_nothing_we_have_is_refused(tmp_path: Path) -> None:
    drawn = case(SMALL, "wide", 5)
    with pytest.raises(ConfigError, match="unknown member of linear"):
        planned(tmp_path, "fastest")(drawn.per_row["x"], drawn.shared["weight"])


@pytest.mark.parametrize("name", ["16x64x256.4.4wt", "128x128x64.4.5tp1", "16x32x64.1.1"])
def test_a_tiles_name_says_all_there_is_to_it(name: str) -> None:
    assert tile_named(name).name == name
