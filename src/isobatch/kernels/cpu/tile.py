"""The panel product: the one inner loop under linear and attention on the CPU.

    C[r, j] = sum over k ascending of A[r, k] * B[k, j]        every step one fused multiply-add

Written order: for each output one accumulator, k ascending, `acc = fma(a, b, acc)`. IEEE 754 defines fma with
a single rounding, so its result is the same on every CPU (one without the instruction calls libm's exact
fmaf, slowly). How many rows and columns are held in registers, and how wide a vector is, changes nothing
but speed: `fma` on each lane is independent of its neighbours.

The loop is written in LLVM IR because that is the only way to be certain what is, and is not, reordered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

from llvmlite import ir
from numba import types
from numba.core import cgutils, codegen, config
from numba.extending import intrinsic

from isobatch.kernels.cpu.jit import device

_F32 = ir.FloatType()
_I64 = ir.IntType(64)
_I32 = ir.IntType(32)
_FLOAT_BYTES = 4


def _has_avx512() -> bool:
    features = config.CPU_FEATURES
    if features is None:
        features = codegen.get_host_cpu_features()
    return "+avx512f" in features.split(",")


# 32 registers of 16 floats, or 16 registers of 8: 12 x 2 or 6 x 2 accumulators, two for B, the rest for A.
LANES = 16 if _has_avx512() else 8
MAX_ROWS = 12 if _has_avx512() else 6
VECTORS = 2
COLUMNS = LANES * VECTORS
PANEL = 32
"""Outputs in a panel of a weight: a multiple of COLUMNS on every CPU."""
LINE = 64
"""Bytes of a cache line."""

Mode = Literal["set", "resume", "add"]


class Columns(Protocol):
    """Emits the loading of B: some vectors of LANES neighbouring columns, for one k after another."""

    @property
    def vectors(self) -> int:
        """How many vectors."""

    def before(self, builder: Any, scales: Any, offsets: Any) -> Any:
        """Emits what is loaded once, before the first k, from addresses that mean nothing without it."""

    def load(self, builder: Any, row: Any, kept: Any) -> list[Any]:
        """Emits the loading of one k, whose columns begin at an address; `kept` is from `before`."""


@dataclass(frozen=True, slots=True)
class _Floats:
    """B as it is multiplied: float32."""

    vectors: int

    def before(self, _builder: Any, _scales: Any, _offsets: Any) -> Any:
        """Nothing."""

    def load(self, builder: Any, row: Any, _kept: Any) -> list[Any]:
        """Loads each vector."""
        vec = ir.VectorType(_F32, LANES)
        starts = [builder.add(row, ir.Constant(_I64, v * LANES * _FLOAT_BYTES)) for v in range(self.vectors)]
        pointers = [builder.inttoptr(start, ir.PointerType(vec)) for start in starts]
        return [builder.load(pointer, align=_FLOAT_BYTES) for pointer in pointers]


def panel_product(rows: int, columns: Columns, mode: Mode) -> Any:
    """Makes the intrinsic for a tile of `rows` by some vectors of LANES.

    Args:
        rows: rows of A and C held in registers.
        columns: how the vectors of B are loaded; C has as many.
        mode: "set" starts from zero and stores; "resume" starts from what C holds and stores, so that the
            chain goes on; "add" starts from zero and adds to what C holds, one rounded addition.

    Returns:
        A numba intrinsic (a, a_stride, b, b_stride, scales, offsets, count, c, c_stride): addresses in bytes
        as intp; strides between rows of A, rows of B (steps of k) and rows of C in floats; scales and offsets
        are for `columns`; count is the length of k.
    """
    lanes, vectors = LANES, columns.vectors
    vec = ir.VectorType(_F32, lanes)

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        a, a_stride, b, b_stride, scales, offsets, count, c, c_stride = arguments
        fma = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(vec, [vec, vec, vec]), f"llvm.fma.v{lanes}f32"
        )

        def at(address: Any, offset: int, kind: Any) -> Any:
            moved = builder.add(address, ir.Constant(_I64, offset))
            return builder.inttoptr(moved, ir.PointerType(kind))

        def row_starts(base: Any, stride: Any) -> list[Any]:
            step = builder.mul(stride, ir.Constant(_I64, _FLOAT_BYTES))
            return [builder.add(base, builder.mul(step, ir.Constant(_I64, r))) for r in range(rows)]

        a_rows, c_rows = row_starts(a, a_stride), row_starts(c, c_stride)
        cells = [(r, v) for r in range(rows) for v in range(vectors)]
        offset = {v: v * lanes * _FLOAT_BYTES for v in range(vectors)}
        zero = ir.Constant(vec, [0.0] * lanes)
        first = {
            (r, v): builder.load(at(c_rows[r], offset[v], vec), align=_FLOAT_BYTES)
            if mode == "resume"
            else zero
            for r, v in cells
        }
        kept = columns.before(builder, scales, offsets)
        entry = builder.block
        check, step, done = (builder.append_basic_block(name) for name in ("k.check", "k.step", "k.done"))
        builder.branch(check)

        builder.position_at_end(check)
        k = builder.phi(_I64)
        k.add_incoming(ir.Constant(_I64, 0), entry)
        acc = {cell: builder.phi(vec) for cell in cells}
        for cell in cells:
            acc[cell].add_incoming(first[cell], entry)
        builder.cbranch(builder.icmp_signed("<", k, count), step, done)

        builder.position_at_end(step)
        k_bytes = builder.mul(k, ir.Constant(_I64, _FLOAT_BYTES))
        b_row = builder.add(b, builder.mul(k_bytes, b_stride))
        b_vectors = columns.load(builder, b_row, kept)
        undefined = ir.Constant(vec, ir.Undefined)
        for r in range(rows):
            scalar = builder.load(at(builder.add(a_rows[r], k_bytes), 0, _F32), align=_FLOAT_BYTES)
            lane0 = builder.insert_element(undefined, scalar, ir.Constant(_I32, 0))
            spread = builder.shuffle_vector(
                lane0, undefined, ir.Constant(ir.VectorType(_I32, lanes), [0] * lanes)
            )
            for v in range(vectors):
                acc[r, v].add_incoming(builder.call(fma, [spread, b_vectors[v], acc[r, v]]), step)
        k.add_incoming(builder.add(k, ir.Constant(_I64, 1)), step)
        builder.branch(check)

        builder.position_at_end(done)
        for r, v in cells:
            target = at(c_rows[r], offset[v], vec)
            result = acc[r, v]
            if mode == "add":
                result = builder.fadd(builder.load(target, align=_FLOAT_BYTES), result)
            builder.store(result, target, align=_FLOAT_BYTES)
        return context.get_dummy_value()

    @intrinsic
    def product(_typing: Any, a, a_stride, b, b_stride, scales, offsets, count, c, c_stride):
        return types.void(*[types.intp] * 9), generate

    return product


def _by_rows(vectors: int, mode: Mode) -> Any:
    """A product for any number of rows, in the largest register tiles that fit.

    Args:
        vectors: vectors of B and C per row.
        mode: as for `panel_product`.

    Returns:
        A compiled helper (rows, a, a_stride, b, b_stride, count, c, c_stride).
    """
    tile_max, tile_8, tile_4, tile_3, tile_2, tile_1 = (
        panel_product(rows, _Floats(vectors), mode) for rows in (MAX_ROWS, min(MAX_ROWS, 8), 4, 3, 2, 1)
    )

    @device
    def product(rows, a, a_stride, b, b_stride, count, c, c_stride):
        r = 0
        while r < rows:
            left = rows - r
            ar, cr = a + 4 * r * a_stride, c + 4 * r * c_stride
            # A step of k takes one row or two as long as four, since each fma waits for the one before. So
            # none is left for the end: where six rows make a tile, eight are four and four.
            if left >= MAX_ROWS and left - MAX_ROWS not in (1, 2):
                tile_max(ar, a_stride, b, b_stride, 0, 0, count, cr, c_stride)
                r += MAX_ROWS
            elif left >= 8 and MAX_ROWS > 8:
                tile_8(ar, a_stride, b, b_stride, 0, 0, count, cr, c_stride)
                r += 8
            elif left >= 4:
                tile_4(ar, a_stride, b, b_stride, 0, 0, count, cr, c_stride)
                r += 4
            elif left == 3:
                tile_3(ar, a_stride, b, b_stride, 0, 0, count, cr, c_stride)
                r += 3
            elif left == 2:
                tile_2(ar, a_stride, b, b_stride, 0, 0, count, cr, c_stride)
                r += 2
            else:
                tile_1(ar, a_stride, b, b_stride, 0, 0, count, cr, c_stride)
                r += 1

    return product


@intrinsic
def _fetch_line(_typing: Any, address: Any) -> Any:
    """Asks for the cache line at an address, which need not be anybody's memory."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        byte = ir.PointerType(ir.IntType(8))
        kind = ir.FunctionType(ir.VoidType(), [byte, _I32, _I32, _I32])
        fetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        to_read, soon_again, data = (ir.Constant(_I32, n) for n in (0, 2, 1))
        builder.call(fetch, [builder.inttoptr(arguments[0], byte), to_read, soon_again, data])
        return context.get_dummy_value()

    return types.void(types.intp), generate


@device
def prefetch(address, count):
    """Asks for `count` bytes that will soon be wanted, so that memory is busy while the products are."""
    for line in range(address, address + count, LINE):
        _fetch_line(line)


_PAGE_VECTORS = 16 // LANES
multiply = _by_rows(VECTORS, "set")  # C = A B, COLUMNS columns
multiply_add = _by_rows(VECTORS, "add")  # C = C + A B: the chain starts from zero and is added when it ends
multiply_page = _by_rows(_PAGE_VECTORS, "set")  # C = A B, 16 columns
multiply_page_resume = _by_rows(_PAGE_VECTORS, "resume")  # the chain goes on from what C holds
