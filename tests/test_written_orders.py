"""The written orders, replayed in scalar arithmetic: what a module says is what its kernel does."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from numba import njit

from isobatch.bits import bits_equal
from isobatch.kernels.attention.record import AttentionCase
from isobatch.kernels.catalogue import record
from isobatch.kernels.coding import CodedRows
from isobatch.kernels.cpu import elementary
from isobatch.kernels.data import floats
from isobatch.kernels.linear.weight import PackedStack, PackedWeight
from isobatch.kernels.moe.experts import Experts
from isobatch.kernels.registry import RowCase
from tests.exact import fma32

F = np.float32
Row = npt.NDArray[np.float32]


def run(op: str, case: RowCase | AttentionCase) -> torch.Tensor:
    return case.call(record(op).member(record(op).production))[0]


def chain(a: Row, b: Row) -> np.float32:
    total = F(0)
    for x, y in zip(a, b, strict=True):
        total = fma32(x, y, total)
    return total


def halves(lanes: list[np.float32]) -> np.float32:
    while len(lanes) > 1:
        half = len(lanes) // 2
        lanes = [F(lanes[t] + lanes[t + half]) for t in range(half)]
    return lanes[0]


def exp2(x: np.float32) -> np.float32:
    x = min(max(x, F(-127)), F(128))
    shifted = F(x + F(12582912.0))
    f = F(x - F(shifted - F(12582912.0)))
    coefficients = [F(math.log(2.0) ** n / math.factorial(n)) for n in range(8)]
    p = coefficients[7]
    for c in coefficients[6::-1]:
        p = F(F(p * f) + c)
    n = int(shifted.view(np.int32)) - 0x4B400000 + 127
    return F(p * np.array(n << 23, np.int32).view(np.float32)[()])


def test_linear_is_chains_of_256_fma_added_in_order() -> None:
    x, w, bias = floats("order/x", 2, 600), floats("order/w", 33, 600), floats("order/b", 33)
    got = run("linear", RowCase({"x": x}, {"weight": CodedRows.of(w), "bias": bias}, weights=("weight",)))
    for r in range(2):
        for n in (0, 16, 31, 32):
            a, b = x[r].numpy(), w[n].numpy()
            blocks = [chain(a[k : k + 256], b[k : k + 256]) for k in (0, 256, 512)]
            expected = F(F(F(blocks[0] + blocks[1]) + blocks[2]) + bias[n].numpy())
            assert got[r, n].item() == expected


def test_linear_order_is_not_multiply_then_add() -> None:
    x, w = floats("order/x", 2, 200), floats("order/w", 33, 200)
    got = run("linear", RowCase({"x": x}, {"weight": CodedRows.of(w), "bias": None}, weights=("weight",)))
    two_roundings = np.zeros((2, 33), np.float32)
    for k in range(200):
        two_roundings += x[:, k : k + 1].numpy() * w[:, k].numpy()
    assert not bits_equal(got, torch.from_numpy(two_roundings))


@pytest.mark.parametrize("width", [16, 100])
def test_rms_norm_is_sixteen_lanes_folded_in_halves(width: int) -> None:
    x, w = floats("order/x", 1, width), floats("order/w", width)
    got = run("rms_norm", RowCase({"x": x}, {"weight": w, "eps": 1e-5}))
    row = x[0].numpy()
    lanes = [F(0)] * 16
    for j in range(width):
        lanes[j % 16] = F(lanes[j % 16] + F(row[j] * row[j]))
    scale = F(F(1) / np.sqrt(F(F(halves(lanes) / F(width)) + F(1e-5))))
    expected = torch.from_numpy((row * scale) * w.numpy())
    assert bits_equal(got[0], expected)


def test_attention_is_spans_of_128_with_online_softmax() -> None:
    length, D = 150, 16
    q, k, v = (floats(f"order/{n}", 1, length, 1, D, kind="plain") for n in "qkv")
    position = length - 1
    got = run("attention", AttentionCase(((0, position),), q, k, v))[0, 0]
    c = F(math.log2(math.e) * (1 / math.sqrt(D)))
    query, keys, values = (t[0, :, 0].numpy() for t in (q, k, v))
    m, lanes, acc = F(-np.inf), [F(0)] * 16, [F(0)] * D
    for start in range(0, length, 128):
        span = range(start, min(start + 128, length))
        scores = {j: chain(query[position], keys[j]) for j in span}
        top = max(m, *scores.values())
        p = {j: exp2(F(F(s - top) * c)) for j, s in scores.items()}
        scale = exp2(F(F(m - top) * c))
        lanes = [F(lane * scale) for lane in lanes]
        for j in span:
            lanes[j % 16] = F(lanes[j % 16] + p[j])
        acc = [F(a * scale) for a in acc]
        for j in span:
            acc = [fma32(p[j], values[j, d], acc[d]) for d in range(D)]
        m = top
    total = halves(lanes)
    assert bits_equal(got, torch.tensor([F(a / total) for a in acc]))


def _exp(x: Row | np.float32) -> Row:
    given, out = np.atleast_1d(np.asarray(x, np.float32)), np.empty(np.size(x), np.float32)
    _map_exp(given, out)
    return out


@njit
def _map_exp(x, out):  # type: ignore[no-untyped-def]
    for i in range(len(x)):
        out[i] = elementary.exp(x[i])


@pytest.mark.parametrize("renormalise", [True, False])
def test_experts_are_added_in_ascending_id(renormalise: bool) -> None:
    E, A, K, inner = 5, 3, 40, 6
    x, router = floats("order/x", 4, K, kind="plain"), floats("order/r", E, K, kind="plain")
    gate_up = [floats(f"order/gate_up/{e}", 2 * inner, K, kind="plain") for e in range(E)]
    down = [floats(f"order/down/{e}", K, inner, kind="plain") for e in range(E)]

    def packed(weights: list[torch.Tensor]) -> PackedStack:
        return PackedStack(tuple(PackedWeight.pack(CodedRows.of(weight)) for weight in weights))

    whole = PackedWeight.pack(CodedRows.of(router))
    experts = Experts(whole, packed(gate_up), packed(down), A, renormalise)
    got = run("moe", RowCase({"x": x}, {"experts": experts}))
    for t, row in enumerate(x.numpy()):
        logits = np.array([chain(row, w.numpy()) for w in router], np.float32)
        chosen = sorted(sorted(range(E), key=lambda e: (-logits[e], e))[:A])
        powers = [_exp(F(z - logits.max()))[0] for z in logits]
        total = F(0)
        for e in chosen if renormalise else range(E):
            total = F(total + powers[e])
        acc = np.zeros(K, np.float32)
        for e in chosen:
            half = np.array([chain(row, w.numpy()) for w in gate_up[e]], np.float32)
            gate, up = half[:inner], half[inner:]
            h = gate / (F(1) + _exp(-gate)) * up
            y = np.array([chain(h, w.numpy()) for w in down[e]], np.float32)
            acc = acc + F(powers[e] / total) * y
        assert bits_equal(got[t], torch.from_numpy(acc))


def test_rotary_rounds_each_product() -> None:
    x = floats("order/x", 3, 2, 16)
    cos, sin = floats("order/cos", 8, 8), floats("order/sin", 8, 8)
    positions = torch.tensor([0, 5, 7])
    got = run("rotary", RowCase({"x": x, "positions": positions}, {"cos": cos, "sin": sin}))
    a, b = x.numpy()[..., :8], x.numpy()[..., 8:]
    c, s = cos.numpy()[[0, 5, 7]][:, None], sin.numpy()[[0, 5, 7]][:, None]
    expected = np.concatenate([a * c - b * s, b * c + a * s], -1)
    assert bits_equal(got, torch.from_numpy(expected))


def test_sine_and_cosine_are_right_beyond_float32() -> None:
    angles = np.concatenate([np.linspace(0, 2**20, 100_001), np.linspace(0, 10, 10_001)])
    sin, cos = elementary.sin_cos(angles)
    assert np.abs(sin - np.sin(angles)).max() < 1e-15
    assert np.abs(cos - np.cos(angles)).max() < 1e-15
