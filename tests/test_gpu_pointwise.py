"""The GPU's row-wise kernels: on a GPU where there is one, else their logic under Triton's interpreter."""

from __future__ import annotations

import os
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from numba import njit

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import triton
import triton.language as tl

from isobatch.bits import bits_equal
from isobatch.errors import UnsupportedOpError
from isobatch.kernels import bitclass
from isobatch.kernels.activation.gpu_record import SILU_AND_MUL
from isobatch.kernels.cpu import elementary
from isobatch.kernels.data import floats, integers
from isobatch.kernels.embedding.gpu_record import EMBEDDING
from isobatch.kernels.gpu.data import to_device
from isobatch.kernels.gpu.device import device, dtypes
from isobatch.kernels.gpu.elementary import UNFUSED, exp2, log
from isobatch.kernels.gpu.tokens import fill_in
from isobatch.kernels.layout import PagedRows
from isobatch.kernels.log_probs import cpu as log_probs_cpu
from isobatch.kernels.log_probs import triton as log_probs
from isobatch.kernels.log_probs.gpu_record import LOG_SOFTMAX, TOP_LOG_PROBS
from isobatch.kernels.qkv.gpu_record import QK_NORM_ROTARY_WRITE, Pages, QkvCase
from isobatch.kernels.registry import Member, OpRecord
from isobatch.kernels.rms_norm import triton as rms_norm
from isobatch.kernels.rms_norm.gpu_record import RMS_NORM
from isobatch.kernels.rotary.gpu_record import ROTARY
from isobatch.kernels.sampling import cpu, philox
from isobatch.kernels.sampling import triton as sampling
from isobatch.kernels.sampling.cpu import SamplingRows
from isobatch.kernels.sampling.gpu_record import PENALIZE, SAMPLE
from isobatch.kernels.sampling.triton import Cut
from isobatch.kernels.sampling.triton_noise import words_of, words_of_span
from isobatch.kernels.stock import STOCK

# NumPy warns where the interpreter rounds to float16 what the GPU rounds to infinity in silence.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")

RECORDS = (
    EMBEDDING,
    RMS_NORM,
    ROTARY,
    QK_NORM_ROTARY_WRITE,
    SILU_AND_MUL,
    LOG_SOFTMAX,
    TOP_LOG_PROBS,
    PENALIZE,
    SAMPLE,
)
V = 131
SMALL = Cut(64, 1, 64)


@pytest.mark.parametrize("op", RECORDS, ids=lambda r: r.name)
def test_members_agree(op: OpRecord) -> None:
    # So fused equals unfused, and GPU equals CPU: the canonical member of qk_norm_rotary_write is the chain
    # of separate ops, and those of sample and penalize are the CPU's kernels.
    for variant in op.variants:
        rows = 2 if op is SAMPLE else 3  # the interpreter is slow
        case = op.draw(f"pointwise/{op.name}/{variant}", rows, variant)
        expected = case.call(op.canonical)
        for member in op.members[1:]:
            for left, right in zip(expected, case.call(member), strict=True):
                assert bits_equal(left, right), f"{variant}: {member.name}"


def test_no_rows_before_attention_are_no_rows() -> None:
    case = QK_NORM_ROTARY_WRITE.draw("none", 3, QK_NORM_ROTARY_WRITE.variants[0]).take([])
    q, k, v, *_ = case.call(QK_NORM_ROTARY_WRITE.member(QK_NORM_ROTARY_WRITE.production))
    assert (q.shape, k.shape, v.shape) == ((0, 6, 64), (0, 2, 64), (0, 2, 64))


@pytest.mark.parametrize("op", [r for r in RECORDS if r is not SAMPLE], ids=lambda r: r.name)
def test_row_alone_poisoned_and_moved_keeps_its_bits(op: OpRecord) -> None:
    member = op.member(op.production)
    for variant in op.variants:
        case = op.draw(f"pointwise/{op.name}/{variant}", 4, variant)
        together = case.call(member)
        moved = case.relayout().call(member)
        assert all(bits_equal(a, b) for a, b in zip(together, moved, strict=True))
        for value in (float("nan"), 3e4):
            alone = case.poison([2], value).take([2, 0]).call(member)
            assert all(bits_equal(a[2], b[0]) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("op", [RMS_NORM, QK_NORM_ROTARY_WRITE], ids=lambda r: r.name)
def test_data_tells_one_order_from_another(op: OpRecord) -> None:
    # One variant each: the interpreter is slow. The relations try them all.
    assert bitclass.discriminates(op, op.variants[0])


def test_rms_norm_is_halves_down_to_1024_and_then_neighbours() -> None:
    K, dtype = 2500, dtypes()[0]
    x, weight = to_device(floats("tree", 3, K), dtype), to_device(floats("w", K, kind="plain"), dtype)
    s = torch.zeros(3, 4096)
    s[:, :K] = x.float().cpu() ** 2
    while s.shape[1] > 1024:
        s = s[:, : s.shape[1] // 2] + s[:, s.shape[1] // 2 :]
    while s.shape[1] > 1:
        s = s[:, 0::2] + s[:, 1::2]
    mean = s / torch.tensor(float(K)) + torch.tensor(1e-5)
    unit = (x.float().cpu() * (1 / mean.sqrt())).to(dtype)
    expected = (unit.float() * weight.float().cpu()).to(dtype)
    assert bits_equal(rms_norm.rms_norm(x, weight, 1e-5)[0].cpu(), expected)


@triton.jit  # type: ignore[untyped-decorator]
def _elementary_kernel(x, powers, logs, N: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, N)
    tl.store(powers + at, exp2(tl.load(x + at)))
    tl.store(logs + at, log(tl.abs(tl.load(x + at)).to(tl.float64)))


@njit
def _cpu_elementary(x, powers, logs):  # type: ignore[no-untyped-def]
    for i in range(len(x)):
        powers[i] = elementary.exp2(x[i])
        logs[i] = elementary.log(abs(float(x[i])))


def test_exponential_and_logarithm_are_the_cpus() -> None:
    x = floats("elementary", 4096)
    x[:3] = torch.tensor([-126.4, 127.4, -0.5])
    powers, logs = torch.empty(4096), torch.empty(4096, dtype=torch.float64)
    _cpu_elementary(x.numpy(), powers.numpy(), logs.numpy())
    got, got_logs = torch.empty_like(to_device(powers)), torch.empty_like(to_device(logs))
    _elementary_kernel[(1,)](to_device(x), got, got_logs, N=4096, **UNFUSED)
    assert bits_equal(got.cpu(), powers)
    assert bits_equal(got_logs.cpu(), logs)


@triton.jit  # type: ignore[untyped-decorator]
def _words_kernel(seed, position, by_span, by_id, N: tl.constexpr):  # type: ignore[no-untyped-def]
    s, p, at = tl.load(seed), tl.load(position), tl.arange(0, N)
    tl.store(by_span + at, words_of_span(s, p, 64, N).to(tl.int64))
    tl.store(by_id + at, words_of(s, p, 64 + at).to(tl.int64))


@njit
def _cpu_words(seed, position, out):  # type: ignore[no-untyped-def]
    for i in range(len(out)):
        out[i] = philox.noise_words(seed, position, (64 + i) // 4)[i % 4]


@pytest.mark.parametrize(("seed", "position"), [(0, 0), (-3 * 2**40 + 17, 4095), (2**63 - 1, 2**31 - 1)])
def test_random_words_are_the_cpus(seed: int, position: int) -> None:
    expected = torch.empty(64, dtype=torch.int64)
    _cpu_words(seed, position, expected.numpy())
    by_span, by_id = torch.empty_like(to_device(expected)), torch.empty_like(to_device(expected))
    at = (to_device(torch.tensor([number])) for number in (seed, position))
    _words_kernel[(1,)](*at, by_span, by_id, N=64)
    assert torch.equal(by_span.cpu(), expected)
    assert torch.equal(by_id.cpu(), expected)


def _rows(count: int, temperature: float, top_p: float = 1.0) -> SamplingRows:
    return SamplingRows(
        torch.full((count,), temperature),
        torch.zeros(count, dtype=torch.int64),
        torch.full((count,), top_p),
        torch.zeros(count),
        torch.arange(count) * 977 - 1,
        torch.arange(count) * 31,
    )


def _on_device(rows: SamplingRows) -> SamplingRows:
    columns: dict[str, Any] = {field.name: getattr(rows, field.name) for field in fields(rows)}
    columns |= {k: to_device(v) for k, v in columns.items() if isinstance(v, torch.Tensor)}
    return SamplingRows(**columns)


def _same_as_cpu(logits: torch.Tensor, rows: SamplingRows, cut: Cut = SMALL) -> list[int]:
    got = sampling.sample_cut(to_device(logits), _on_device(rows), cut=cut).cpu()
    assert torch.equal(got, cpu.sample(logits, rows))
    return [int(token) for token in got]


# temperature, top_k, top_p, min_p
PARAMETERS = (
    (0.0, 0, 1.0, 0.0),
    (1.0, 0, 1.0, 0.0),
    (0.5, 3, 1.0, 0.0),
    (1.5, 0, 0.6, 0.0),
    (1.0, 0, 1.0, 0.1),
    (2.0, 9, 0.7, 0.2),
)


@pytest.mark.parametrize("kind", ["drawn", "few values"])
def test_choices_are_the_cpus(kind: str) -> None:
    x = floats("choices", len(PARAMETERS), V, kind="plain") * 4
    temperature, top_k, top_p, min_p = torch.tensor(PARAMETERS).unbind(1)
    others = _rows(len(PARAMETERS), 1.0)
    rows = SamplingRows(temperature, top_k.long(), top_p, min_p, others.seed, others.position)
    _same_as_cpu(x.round() if kind == "few values" else x, rows)


def test_launches_that_are_spared_change_no_token() -> None:
    x = to_device(floats("spared", 2, V, kind="plain"))
    greedy, noisy = _on_device(_rows(2, 0.0)), _on_device(_rows(2, 1.0))
    whole = [sampling.sample_cut(x, rows, cut=SMALL) for rows in (greedy, noisy)]
    assert torch.equal(whole[0], sampling.sample_cut(x, replace(greedy, greedy=True), cut=SMALL))
    assert torch.equal(whole[1], sampling.sample_cut(x, replace(noisy, unfiltered=True), cut=SMALL))


def test_list_that_overflows_is_searched_whole() -> None:
    x = floats("overflow", 1, V, kind="plain").round()
    _same_as_cpu(x, _rows(1, 1.0, top_p=0.9), Cut(128, 1, 8))


def test_row_that_is_not_finite_is_refused_alone() -> None:
    x = floats("refused", 4, V, kind="plain")
    x[1, 5], x[2, 130] = float("nan"), float("-inf")
    tokens = _same_as_cpu(x, _rows(4, 0.0))
    assert [token < 0 for token in tokens] == [False, True, True, False]
    tokens = _same_as_cpu(x, _rows(4, 1.0))
    assert [token < 0 for token in tokens] == [False, True, True, False]


def test_top_log_probs_order_ties_and_ranks_as_on_the_cpu() -> None:
    x = floats("top", 3, 700, kind="plain").round()
    x[1] = 0
    x[2, ::2] = -0.0
    chosen = integers("chosen", 3, 700)
    for count in (0, 1, 20):
        ours = log_probs.top_log_probs(to_device(x), to_device(chosen), count)
        cpus = log_probs_cpu.top_log_probs(x, chosen, count)
        assert torch.equal(ours.ids.cpu(), cpus.ids)
        assert torch.equal(ours.rank.cpu(), cpus.rank)
        assert torch.allclose(ours.log_probs.cpu(), cpus.log_probs, rtol=1e-6)


def test_top_log_probs_is_log_softmax_at_its_tokens() -> None:
    x = to_device(floats("both", 2, 700, kind="plain"))
    top = log_probs.top_log_probs(x, to_device(torch.tensor([3, 699])), 9)
    whole = log_probs.log_softmax(x)
    assert bits_equal(whole.gather(1, top.ids), top.log_probs)


def test_too_many_log_probs_are_refused() -> None:
    x = to_device(torch.zeros(1, 500))
    with pytest.raises(UnsupportedOpError, match="at most 128"):
        log_probs.top_log_probs(x, to_device(torch.zeros(1, dtype=torch.int64)), 129)


def test_row_without_a_slot_is_written_nowhere() -> None:
    case = QK_NORM_ROTARY_WRITE.draw("slots", 3, QK_NORM_ROTARY_WRITE.variants[0])
    member = QK_NORM_ROTARY_WRITE.member("rule")
    assert isinstance(case, QkvCase)
    inner = case.inner
    qkv = inner.per_row["qkv"]
    cache = Pages(*(torch.full((2, 2, 16, 64), 7.0, dtype=qkv.dtype, device=qkv.device) for _ in "kv"))
    slots = to_device(torch.tensor([3, -1, 17]))
    member.function(**inner.per_row, **inner.shared, cache=cache, rows=PagedRows(slots, slots, slots, slots))
    for side in (cache.k, cache.v):
        written = (side != 7).any(1).any(-1).nonzero().tolist()
        assert written == [[0, 3], [1, 1]]


# Negative controls: what the tests above rest on must be able to fail.


def _order_changed(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    total = x if residual is None else (x.float() + residual.float()).to(x.dtype)
    turned = rms_norm.rms_norm(total.roll(1, 1), weight.roll(1, 0), eps)[0]
    return turned.roll(-1, 1), total


def test_a_norm_that_adds_in_another_order_is_caught() -> None:
    verdict = bitclass.certify(RMS_NORM, Member("another order", _order_changed, STOCK), (8,))
    assert not verdict.member


@pytest.mark.parametrize("count", [1, 16, 1023, 2500])
def test_tokens_just_sampled_are_filled_in_and_refused_ones_become_any_token(count: int) -> None:
    known, sampled = (
        integers(f"tokens/{name}", count, below=150_000).to(device()) for name in ("known", "sampled")
    )
    sampled[::3] = -1
    places = (integers("tokens/places", count, below=2 * count) - count).clamp(min=-1).int().to(device())
    to = torch.full((count + 1,), 7, dtype=torch.int64, device=device())
    fill_in(known, places, sampled, to[:count])
    expected = [int(k) if p < 0 else max(0, int(sampled[p])) for k, p in zip(known, places, strict=True)]
    assert to.tolist() == [*expected, 7]
