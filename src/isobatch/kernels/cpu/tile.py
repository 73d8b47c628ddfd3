"""The panel product: the one inner loop under linear and attention on the CPU.

    C[r, j] = sum over k ascending of A[r, k] * B[k, j]        every step one fused multiply-add

Written order: for each output one accumulator, k ascending, `acc = fma(a, b, acc)`. IEEE 754 defines fma with
a single rounding, so its result is the same on every CPU (one without the instruction calls libm's exact
fmaf, slowly). How many rows and columns are held in registers, and how wide a vector is, changes nothing
but speed: `fma` on each lane is independent of its neighbours.

The loop is written in LLVM IR because that is the only way to be certain what is, and is not, reordered.
"""

from __future__ import annotations

from typing import Any, Literal

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


Mode = Literal["set", "resume", "add"]


def _panel_product(rows: int, vectors: int, lanes: int, mode: Mode) -> Any:
    """Makes the intrinsic for a `rows` x (`vectors` * `lanes`) tile.

    Args:
        rows: rows of A and C held in registers.
        vectors: vectors of B and C per row.
        lanes: floats in a vector.
        mode: "set" starts from zero and stores; "resume" starts from what C holds and stores, so that the
            chain goes on; "add" starts from zero and adds to what C holds, one rounded addition.

    Returns:
        A numba intrinsic (a, a_stride, b, b_stride, count, c, c_stride): addresses in bytes as intp;
        strides between rows of A, rows of B (steps of k) and rows of C in floats; count is the length of k.
    """
    vec = ir.VectorType(_F32, lanes)

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        a, a_stride, b, b_stride, count, c, c_stride = arguments
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
        b_vectors = [builder.load(at(b_row, offset[v], vec), align=_FLOAT_BYTES) for v in range(vectors)]
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
    def panel_product(_typing: Any, a, a_stride, b, b_stride, count, c, c_stride):
        return types.void(*[types.intp] * 7), generate

    return panel_product


# Named at module level, because numba's disk cache cannot see through a closure.
_PAGE_VECTORS = 16 // LANES
_wide_max = _panel_product(MAX_ROWS, VECTORS, LANES, "set")
_wide_4 = _panel_product(4, VECTORS, LANES, "set")
_wide_2 = _panel_product(2, VECTORS, LANES, "set")
_wide_1 = _panel_product(1, VECTORS, LANES, "set")
_wide_add_max = _panel_product(MAX_ROWS, VECTORS, LANES, "add")
_wide_add_4 = _panel_product(4, VECTORS, LANES, "add")
_wide_add_2 = _panel_product(2, VECTORS, LANES, "add")
_wide_add_1 = _panel_product(1, VECTORS, LANES, "add")
_page_max = _panel_product(MAX_ROWS, _PAGE_VECTORS, LANES, "set")
_page_4 = _panel_product(4, _PAGE_VECTORS, LANES, "set")
_page_2 = _panel_product(2, _PAGE_VECTORS, LANES, "set")
_page_1 = _panel_product(1, _PAGE_VECTORS, LANES, "set")
_page_resume_max = _panel_product(MAX_ROWS, _PAGE_VECTORS, LANES, "resume")
_page_resume_4 = _panel_product(4, _PAGE_VECTORS, LANES, "resume")
_page_resume_2 = _panel_product(2, _PAGE_VECTORS, LANES, "resume")
_page_resume_1 = _panel_product(1, _PAGE_VECTORS, LANES, "resume")


@device
def multiply(rows, a, a_stride, b, b_stride, count, c, c_stride):
    """C = A B for COLUMNS columns and any number of rows, in the largest register tiles that fit."""
    r = 0
    while r < rows:
        left = rows - r
        ar, cr = a + 4 * r * a_stride, c + 4 * r * c_stride
        if left >= MAX_ROWS:
            _wide_max(ar, a_stride, b, b_stride, count, cr, c_stride)
            r += MAX_ROWS
        elif left >= 4:
            _wide_4(ar, a_stride, b, b_stride, count, cr, c_stride)
            r += 4
        elif left >= 2:
            _wide_2(ar, a_stride, b, b_stride, count, cr, c_stride)
            r += 2
        else:
            _wide_1(ar, a_stride, b, b_stride, count, cr, c_stride)
            r += 1


@device
def multiply_add(rows, a, a_stride, b, b_stride, count, c, c_stride):
    """C = C + A B likewise: the product's chain starts from zero and is added when it ends."""
    r = 0
    while r < rows:
        left = rows - r
        ar, cr = a + 4 * r * a_stride, c + 4 * r * c_stride
        if left >= MAX_ROWS:
            _wide_add_max(ar, a_stride, b, b_stride, count, cr, c_stride)
            r += MAX_ROWS
        elif left >= 4:
            _wide_add_4(ar, a_stride, b, b_stride, count, cr, c_stride)
            r += 4
        elif left >= 2:
            _wide_add_2(ar, a_stride, b, b_stride, count, cr, c_stride)
            r += 2
        else:
            _wide_add_1(ar, a_stride, b, b_stride, count, cr, c_stride)
            r += 1


@device
def multiply_page(rows, a, a_stride, b, b_stride, count, c, c_stride):
    """C = A B for 16 columns and any number of rows."""
    r = 0
    while r < rows:
        left = rows - r
        ar, cr = a + 4 * r * a_stride, c + 4 * r * c_stride
        if left >= MAX_ROWS:
            _page_max(ar, a_stride, b, b_stride, count, cr, c_stride)
            r += MAX_ROWS
        elif left >= 4:
            _page_4(ar, a_stride, b, b_stride, count, cr, c_stride)
            r += 4
        elif left >= 2:
            _page_2(ar, a_stride, b, b_stride, count, cr, c_stride)
            r += 2
        else:
            _page_1(ar, a_stride, b, b_stride, count, cr, c_stride)
            r += 1


@device
def multiply_page_resume(rows, a, a_stride, b, b_stride, count, c, c_stride):
    """C += A B for 16 columns: the chain goes on from what C holds."""
    r = 0
    while r < rows:
        left = rows - r
        ar, cr = a + 4 * r * a_stride, c + 4 * r * c_stride
        if left >= MAX_ROWS:
            _page_resume_max(ar, a_stride, b, b_stride, count, cr, c_stride)
            r += MAX_ROWS
        elif left >= 4:
            _page_resume_4(ar, a_stride, b, b_stride, count, cr, c_stride)
            r += 4
        elif left >= 2:
            _page_resume_2(ar, a_stride, b, b_stride, count, cr, c_stride)
            r += 2
        else:
            _page_resume_1(ar, a_stride, b, b_stride, count, cr, c_stride)
            r += 1
