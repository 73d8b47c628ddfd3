"""cuBLASLt's kernels as candidates for linear's class: algorithms chosen by us, never with K split.

cuBLAS, asked for a product, picks an algorithm by the number of rows, and with it how K is split. cuBLASLt is
the same library with the choice laid open: its heuristic lists algorithms, we rule out every reduction across
programs, keep the list's order as ranks, and certify. Nothing else of the library is used, so a thin ctypes
layer does; it needs no package beyond what torch brings.

Source: https://docs.nvidia.com/cuda/cublas/ (cublasLtMatmul, cublasLtMatmulPreferenceAttributes_t).
"""

from __future__ import annotations

import ctypes
from ctypes import byref, c_float, c_int, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from functools import cache

import torch

from isobatch.errors import UnsupportedOpError
from isobatch.kernels.stock import DenseWeight

_TYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14}
_COMPUTE_FLOAT32 = 68
_TRANSPOSE_A, _EPILOGUE, _BIAS_POINTER, _BIAS_TYPE = 3, 7, 8, 26
_EPILOGUE_BIAS = 4
_WORKSPACE_BYTES, _REDUCTION_SCHEMES = 1, 3
_ONE, _ZERO = c_float(1), c_float(0)


class _Heuristic(ctypes.Structure):
    _fields_ = (
        ("algorithm", c_uint64 * 8),
        ("workspace", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


@cache
def _library() -> ctypes.CDLL:
    """The library that torch has loaded, so that no second version can come in."""
    major = (torch.version.cuda or "").split(".")[0]
    try:
        return ctypes.CDLL(f"libcublasLt.so.{major}")
    except OSError as error:
        raise UnsupportedOpError("cuBLASLt is not to be had", got=error) from error


def version() -> int:
    """The library's version, 0 where there is none."""
    try:
        return int(_library().cublasLtGetVersion())
    except UnsupportedOpError:
        return 0


@cache
def _handle() -> c_void_p:
    handle = c_void_p()
    _check("cublasLtCreate", _library().cublasLtCreate(byref(handle)))
    return handle


def _check(call: str, status: int) -> None:
    if status:
        raise UnsupportedOpError(f"{call} failed", expected="status 0", got=status)


def _set(call: str, thing: c_void_p, attribute: int, value: object) -> None:
    status = getattr(_library(), call)(
        thing,
        c_int(attribute),
        byref(value),  # type: ignore[arg-type]
        c_size_t(ctypes.sizeof(value)),  # type: ignore[arg-type]
    )
    _check(call, status)


@cache
def _matrix(dtype: torch.dtype, rows: int, columns: int, stride: int) -> c_void_p:
    """A column-major matrix, as the library wants them."""
    layout = c_void_p()
    call = _library().cublasLtMatrixLayoutCreate
    _check(
        "cublasLtMatrixLayoutCreate",
        call(byref(layout), _TYPES[dtype], c_uint64(rows), c_uint64(columns), c_int64(stride)),
    )
    return layout


@cache
def _product(bias: int, dtype: torch.dtype) -> c_void_p:
    """W x^T in the library's terms, with the bias at this address, or without one if it is 0."""
    product = c_void_p()
    _check(
        "cublasLtMatmulDescCreate",
        _library().cublasLtMatmulDescCreate(byref(product), _COMPUTE_FLOAT32, _TYPES[torch.float32]),
    )
    _set("cublasLtMatmulDescSetAttribute", product, _TRANSPOSE_A, c_int32(1))
    if bias:
        _set("cublasLtMatmulDescSetAttribute", product, _EPILOGUE, c_uint32(_EPILOGUE_BIAS))
        _set("cublasLtMatmulDescSetAttribute", product, _BIAS_TYPE, c_int32(_TYPES[dtype]))
        _set("cublasLtMatmulDescSetAttribute", product, _BIAS_POINTER, c_uint64(bias))
    return product


@dataclass(frozen=True, slots=True)
class Question:
    """What the library is asked to rank algorithms for.

    Args:
        rows: M, the row count that the ranking is for; the algorithms serve others too.
        outputs: N.
        inputs: K.
        dtype: of x and W.
        out_dtype: of the result.
        biased: whether a bias is added.
    """

    rows: int
    outputs: int
    inputs: int
    dtype: torch.dtype
    out_dtype: torch.dtype
    biased: bool = False


@cache
def algorithms(question: Question, most: int = 8) -> tuple[bytes, ...]:
    """The library's algorithms for a product, best first by its own estimate, none that splits K.

    None needs a workspace either: one would be shared by streams, and a race on it could reach the result.

    Args:
        question: the product.
        most: how many at most.

    Returns:
        Opaque algorithms, for `linear_library`.
    """
    q = question
    preference, got = c_void_p(), c_int()
    create = _library().cublasLtMatmulPreferenceCreate
    _check("cublasLtMatmulPreferenceCreate", create(byref(preference)))
    _set("cublasLtMatmulPreferenceSetAttribute", preference, _WORKSPACE_BYTES, c_uint64(0))
    _set("cublasLtMatmulPreferenceSetAttribute", preference, _REDUCTION_SCHEMES, c_uint32(0))
    # Any address does: the ranking reads that there is a bias, not where.
    product = _product(256 if q.biased else 0, q.dtype)
    d = _matrix(q.out_dtype, q.outputs, q.rows, q.outputs)
    found = (_Heuristic * most)()
    status = _library().cublasLtMatmulAlgoGetHeuristic(
        _handle(),
        product,
        _matrix(q.dtype, q.inputs, q.outputs, q.inputs),
        _matrix(q.dtype, q.inputs, q.rows, q.inputs),
        d,
        d,
        preference,
        most,
        found,
        byref(got),
    )
    _library().cublasLtMatmulPreferenceDestroy(preference)
    if status:  # nothing for this shape is an answer, not a failure
        return ()
    return tuple(bytes(found[i].algorithm) for i in range(got.value) if found[i].state == 0)


def linear_library(
    x: torch.Tensor,
    weight: DenseWeight,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    *,
    algorithm: bytes,
) -> torch.Tensor:
    """The product by one algorithm of the library.

    Args:
        x: bfloat16 or float16 [M, K].
        weight: the same dtype, [N, K].
        bias: the same dtype [N], or None.
        out_dtype: of the result; x's own by default.
        algorithm: one of `algorithms`.

    Returns:
        [M, N], contiguous.

    Raises:
        UnsupportedOpError: the algorithm cannot serve this shape.
    """
    w = weight.dense
    x = x if x.stride(1) == 1 else x.contiguous()
    (M, K), N = x.shape, w.shape[0]
    y = torch.empty(M, N, dtype=out_dtype or x.dtype, device=x.device)
    d, y_at = _matrix(y.dtype, N, M, N), c_void_p(y.data_ptr())
    status = _library().cublasLtMatmul(
        _handle(),
        _product(0 if bias is None else bias.data_ptr(), x.dtype),
        byref(_ONE),
        c_void_p(w.data_ptr()),
        _matrix(w.dtype, K, N, w.stride(0)),
        c_void_p(x.data_ptr()),
        _matrix(x.dtype, K, M, x.stride(0)),
        byref(_ZERO),
        y_at,
        d,
        y_at,
        d,
        algorithm,
        None,
        c_size_t(0),
        c_void_p(torch.cuda.current_stream(x.device).cuda_stream),
    )
    _check("cublasLtMatmul", status)
    return y
