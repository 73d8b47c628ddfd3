"""Float32 on the GPU is IEEE's, never TF32: no flag of torch's reaches our bits, and ours touch no flag."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch

from isobatch.bits import bits_equal
from isobatch.errors import UnsupportedOpError
from isobatch.kernels.data import floats
from isobatch.kernels.gpu.catalogue import GPU_RECORDS
from isobatch.kernels.gpu.data import to_device
from isobatch.kernels.gpu.device import INTERPRETED, dtypes
from isobatch.kernels.linear.gpu import Linear
from isobatch.kernels.linear.stock import linear as torchs_linear
from isobatch.kernels.moe.routing import router_logits
from isobatch.kernels.registry import Outputs, as_outputs
from isobatch.kernels.stock import DenseWeight
from isobatch.ops.gpu import GpuOps

pytestmark = [
    pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning"),
    pytest.mark.filterwarnings(
        "ignore:Please use the new API:UserWarning"
    ),  # some versions of torch, of flags
]

Flags = tuple[str, bool, bool, bool, bool]


def _flags() -> Flags:
    blas = torch.backends.cuda.matmul
    return (
        torch.get_float32_matmul_precision(),
        blas.allow_tf32,
        torch.backends.cudnn.allow_tf32,
        blas.allow_bf16_reduced_precision_reduction,
        blas.allow_fp16_reduced_precision_reduction,
    )


def _set(flags: Flags) -> None:
    precision, blas, cudnn, bf16, fp16 = flags
    torch.set_float32_matmul_precision(precision)
    torch.backends.cuda.matmul.allow_tf32 = blas
    torch.backends.cudnn.allow_tf32 = cudnn
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = bf16
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = fp16


@contextmanager
def _under(flags: Flags) -> Iterator[None]:
    before = _flags()
    _set(flags)
    try:
        yield
        assert _flags() == flags, "a flag was touched"
    finally:
        _set(before)


STRICT: Flags = ("highest", False, False, False, False)
LOOSE: Flags = ("high", True, True, True, True)


def reached_by_flags(run: Callable[[], Outputs]) -> bool:
    """Whether a call gives other bits once torch may round float32 products to TF32."""
    with _under(STRICT):
        strict = tuple(output.clone() for output in run())
    with _under(LOOSE):
        loose = run()
    return not all(bits_equal(a, b) for a, b in zip(strict, loose, strict=True))


@pytest.mark.parametrize("name", GPU_RECORDS)
def test_no_flag_reaches_a_bit_of_an_op(name: str) -> None:
    record = GPU_RECORDS[name]
    for variant in record.variants[:1] if INTERPRETED else record.variants:
        case = record.draw(f"flags/{name}", 2 if INTERPRETED else 41, variant)
        for member in [record.member(record.production)] if INTERPRETED else record.members:
            assert not reached_by_flags(partial(case.call, member)), f"{member.name}, {variant}"


@pytest.mark.parametrize("tokens", [1, 33])
def test_no_flag_reaches_a_bit_of_the_router(tokens: int) -> None:
    x, router = (to_device(floats(f"flags/{n}", n, 256), dtypes()[0]) for n in (tokens, 16))
    assert not reached_by_flags(lambda: as_outputs(router_logits(x, router)))


def test_control_a_product_that_heeds_a_flag_is_caught() -> None:
    x, weight = floats("flags/x", 3, 512), DenseWeight(floats("flags/w", 8, 512))

    def rounded(tensor: torch.Tensor) -> torch.Tensor:
        """As TF32 keeps it: ten bits after the leading one."""
        kept = tensor.view(torch.int32) & ~((1 << 13) - 1)
        return kept.view(torch.float32) if torch.backends.cuda.matmul.allow_tf32 else tensor

    assert reached_by_flags(lambda: as_outputs(torchs_linear(rounded(x), DenseWeight(rounded(weight.dense)))))


@pytest.mark.skipif(INTERPRETED, reason="no GPU: the CPU has no TF32")
def test_control_torchs_own_float32_product_is_caught() -> None:
    x, weight = to_device(floats("flags/x", 256, 4096)), to_device(floats("flags/w", 256, 4096))
    assert reached_by_flags(lambda: as_outputs(torchs_linear(x, DenseWeight(weight))))


def test_control_a_member_that_sets_a_flag_is_caught() -> None:
    def sets() -> Outputs:
        torch.set_float32_matmul_precision("medium")
        return ()

    with pytest.raises(AssertionError, match="a flag was touched"):
        reached_by_flags(sets)


def test_float32_models_are_refused_on_a_gpu() -> None:
    with pytest.raises(UnsupportedOpError, match=r"no GPU kernels for this dtype; .*got torch\.float32"):
        GpuOps(torch.float32, (2, 1, 16))


def test_float32_rows_meet_no_16_bit_weights() -> None:
    x, weight = to_device(floats("refused/x", 3, 64)), to_device(floats("refused/w", 8, 64))
    ops = GpuOps(dtypes()[0], (2, 1, 16))
    with pytest.raises(UnsupportedOpError, match="linear: no certified kernel for x"):
        ops.linear(x, DenseWeight(weight.to(dtypes()[0])))


@pytest.mark.parametrize("rows", [1, 16, 33])
def test_float32_linear_keeps_all_24_bits(rows: int) -> None:
    """Factors that TF32 would round, whose products and sums are exact in float32, and so have one result."""
    x = to_device(1 + 2.0**-11 * floats("exact/x", rows, 64).sign())
    weight = to_device(floats("exact/w", 40, 64).sign())
    exact = torch.nn.functional.linear(x.double(), weight.double())
    got = Linear()(x, DenseWeight(weight))
    assert bits_equal(got, exact.float())
    rounded = (x.view(torch.int32) & ~((1 << 13) - 1)).view(torch.float32)  # as TF32 keeps it
    assert not bits_equal(got, torch.nn.functional.linear(rounded.double(), weight.double()).float())
