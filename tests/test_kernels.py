"""Accuracy of every op against float64, certification, and the pieces that kernels are made of."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from numba import njit

from isobatch.bits import bits_equal
from isobatch.errors import IntegrityError, ShapeError, UnknownKeyError, UnsupportedOpError
from isobatch.kernels import bitclass
from isobatch.kernels.catalogue import RECORDS, record
from isobatch.kernels.coding import F32
from isobatch.kernels.cpu import elementary, jit
from isobatch.kernels.registry import Member, OpRecord
from isobatch.kernels.sampling.philox import philox
from isobatch.kernels.stock import STOCK
from isobatch.ops import certified_ops

REFERENCED = [r for r in RECORDS.values() if r.reference is not None]
SUMMING = [r for r in RECORDS.values() if r.reorder is not None]


@pytest.mark.parametrize("op", REFERENCED, ids=lambda r: r.name)
def test_error_is_at_most_twice_torchs_own(op: OpRecord) -> None:
    assert op.reference is not None
    reference = Member("reference", op.reference, STOCK)
    for variant in op.variants:
        case = op.draw(f"accuracy/{op.name}/{variant}", 64, variant)
        exact = case.call(reference)
        ours, torchs = case.call(op.member(op.production)), case.call(op.stock)
        for e, o, t in zip(exact, ours, torchs, strict=True):
            # The median row's worst error: one row's luck, or torch's, does not decide.
            error = (o.double() - e).abs().flatten(1).amax(1).median()
            allowed = (t.double() - e).abs().flatten(1).amax(1).median()
            assert error <= 2 * allowed, f"{variant}: {error:.3e} against torch's {allowed:.3e}"


@pytest.mark.parametrize(
    "op", [record("linear"), record("attention"), record("rms_norm")], ids=lambda r: r.name
)
def test_torchs_own_kernel_is_not_a_member(op: OpRecord) -> None:
    verdict = bitclass.certify(op, op.stock)
    assert not verdict.member
    assert verdict.difference is not None
    assert str(verdict.refuted_by) in str(verdict)


@pytest.mark.parametrize("op", SUMMING, ids=lambda r: r.name)
def test_data_tells_one_order_from_another(op: OpRecord) -> None:
    assert all(bitclass.discriminates(op, variant) for variant in op.variants)


def test_no_certificate_on_data_that_cannot_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    op = record("linear")
    monkeypatch.setattr(bitclass, "discriminates", lambda _record, _variant: False)
    with pytest.raises(IntegrityError, match="cannot tell one order from another"):
        bitclass.certify(op, op.canonical)


def test_no_certificate_on_no_data() -> None:
    op = replace(record("linear"), variants=())
    with pytest.raises(IntegrityError, match="linear has no inputs to certify"):
        bitclass.certify(op, op.canonical)


def test_unknown_names_name_the_nearest() -> None:
    with pytest.raises(UnknownKeyError, match="rms_norm"):
        record("rms_nrom")
    with pytest.raises(UnknownKeyError, match="tiles"):
        record("linear").member("tile")


@pytest.mark.parametrize(
    ("counter_and_key", "expected"),
    [
        ((0,) * 6, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 6, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_words(
    counter_and_key: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    # Known answers: kat_vectors of the Random123 distribution, philox4x32 10 rounds.
    words = philox(*(np.uint32(w) for w in counter_and_key))
    assert tuple(int(w) for w in words) == expected


@njit
def _map(function, x, out):  # type: ignore[no-untyped-def]
    for i in range(len(x)):
        out[i] = function(x[i])


@pytest.mark.parametrize(
    ("function", "exact", "low", "high", "dtype", "ulps"),
    [
        (elementary.exp2, np.exp2, -126.0, 127.0, np.float32, 2),
        (elementary.exp, np.exp, -87.0, 88.0, np.float32, 2),
        (elementary.log, np.log, 1e-300, 1e300, np.float64, 4),
        (elementary.log, np.log, 0.5, 2.0, np.float64, 4),
    ],
    ids=["exp2", "exp", "log", "log near 1"],
)
def test_elementary_function_is_accurate(function, exact, low, high, dtype, ulps) -> None:  # type: ignore[no-untyped-def]
    x = np.linspace(low, high, 200_001).astype(dtype)
    out = np.empty_like(x)
    _map(function, x, out)
    true = exact(x.astype(np.float64))
    assert (np.abs(out - true) <= ulps * np.spacing(np.abs(true).astype(dtype))).all()


@pytest.mark.parametrize("function", [elementary.exp2, elementary.exp], ids=["exp2", "exp"])
def test_exponential_of_the_extremes(function) -> None:  # type: ignore[no-untyped-def]
    x = np.array([-np.inf, -200, 200, np.inf, np.nan, 0.0, -0.0], np.float32)
    out = np.empty_like(x)
    _map(function, x, out)
    np.testing.assert_array_equal(out, np.array([0, 0, np.inf, np.inf, np.nan, 1, 1], np.float32))


def test_thread_count_is_put_back() -> None:
    before = jit.max_threads()
    with jit.threads(1):
        pass
    with pytest.raises(RuntimeError), jit.threads(2):
        raise RuntimeError
    import numba

    assert numba.get_num_threads() == before


def test_one_thread_alone_gives_the_bits_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("rms_norm", "rotary", "silu_and_mul"):
        op = record(name)
        for variant in op.variants:
            case, results = op.draw(f"alone/{name}", 9, variant), []
            for small in (0, 10**9):
                monkeypatch.setattr(jit, "SMALL", small)
                results.append(case.call(op.canonical))
            assert all(bits_equal(a, b) for a, b in zip(*results, strict=True)), f"{name}/{variant}"


def test_wrong_arguments_are_refused_by_name() -> None:
    ops = certified_ops()
    weight = ops.weight(8, 16, F32)
    with pytest.raises(ShapeError, match=r"linear: wrong shape of x; expected \[any, 16\]; got \[2, 15\]"):
        ops.linear(torch.zeros(2, 15), weight)
    with pytest.raises(UnsupportedOpError, match="bfloat16"):
        ops.linear(torch.zeros(2, 16, dtype=torch.bfloat16), weight)
    with pytest.raises(ShapeError, match="token_ids out of range"):
        ops.embedding(torch.tensor([8]), weight)
    with pytest.raises(ShapeError, match="multiple of 16"):
        ops.kv_cache(4, 2, 40)


def test_observers_see_calls_and_leave() -> None:
    ops = certified_ops()
    seen: list[str] = []
    x = torch.zeros(2, 16)
    with ops.observed(lambda op, arguments, result: seen.append(f"{op} {list(result.shape)}")):
        ops.silu_and_mul(x)
    ops.silu_and_mul(x)
    assert seen == ["silu_and_mul [2, 8]"]
