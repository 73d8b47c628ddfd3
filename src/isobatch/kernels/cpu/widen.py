"""Coded weights inside a kernel: from the bytes of a panel to float32 vectors, as `kernels/coding.py` has it.

A code is widened just before it is multiplied, and every step has the result that `CodedRows.floats` has: an
exact conversion, one rounded product, one rounded sum, never a fused one. So none of it shows in the bits of
a product, which is certified against the same product on weights that were widened beforehand.

The loops are written in LLVM IR for the reason given in `kernels/cpu/tile.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from isobatch.kernels.coding import Q4_ZERO, Form
from isobatch.kernels.cpu.jit import device
from isobatch.kernels.cpu.tile import LANES, PANEL, panel_product, prefetch

_F32 = ir.FloatType()
_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_FLOAT_BYTES = 4
NIBBLES = PANEL // 2
"""Byte i of a row of 4-bit codes holds output i (low) and output NIBBLES + i (high)."""
FEW = 3
"""Rows for which each code is widened in registers as it is multiplied.

Measured with AVX2 on Q4_OFFSET, against widening a block of k into memory first: 1.7 times as fast for one
row, 1.5 for two, 1.2 for three, and no faster for four.
"""


class Panel(NamedTuple):
    """Where one panel lies, for kernels: integers all.

    Args:
        form: a Form.
        group: how many k share a scale; 0 without scales.
        codes: address of the first code.
        stride: bytes from one k to the next.
        scales: address of the first group's PANEL scales.
        offsets: address of the first group's PANEL offsets.
    """

    form: int
    group: int
    codes: int
    stride: int
    scales: int
    offsets: int


def _splat(kind: Any, value: float, lanes: int) -> Any:
    return ir.Constant(ir.VectorType(kind, lanes), [value] * lanes)


def _load(builder: Any, address: Any, offset: int, kind: Any, align: int) -> Any:
    moved = builder.add(address, ir.Constant(_I64, offset))
    return builder.load(builder.inttoptr(moved, ir.PointerType(kind)), align=align)


def _half_to_float(builder: Any, halves: Any, lanes: int) -> Any:
    """float16 patterns, zero-extended, to float32: exact, and without the instruction that older CPUs lack.

    Shifted into place, exponent and fraction are those of the number times 2^-112. Multiplying that away is
    exact, subnormal numbers included. Infinity and NaN keep their fraction and get the exponent of theirs.
    """
    ints, floats = ir.VectorType(_I32, lanes), ir.VectorType(_F32, lanes)
    magnitude = builder.shl(builder.and_(halves, _splat(_I32, 0x7FFF, lanes)), _splat(_I32, 13, lanes))
    scaled = builder.fmul(builder.bitcast(magnitude, floats), _splat(_F32, 2.0**112, lanes))
    special = builder.icmp_unsigned(">=", magnitude, _splat(_I32, 0x7C00 << 13, lanes))
    exponent = builder.select(special, _splat(_I32, 0x7F800000, lanes), _splat(_I32, 0, lanes))
    sign = builder.shl(builder.and_(halves, _splat(_I32, 0x8000, lanes)), _splat(_I32, 16, lanes))
    bits = builder.or_(builder.or_(builder.bitcast(scaled, ints), exponent), sign)
    return builder.bitcast(bits, floats)


class _Columns:
    """Emits the widening of a panel's outputs, for one k after another."""

    vectors = PANEL // LANES

    def __init__(self, form: Form) -> None:
        self.form = form

    def before(self, builder: Any, scales: Any, offsets: Any) -> Any:
        """What stays in registers while k runs through a group: its scales, and its offsets."""
        wanted = (self.form >= Form.Q8) + (self.form == Form.Q4_OFFSET)
        vec, step = ir.VectorType(_F32, LANES), LANES * _FLOAT_BYTES
        return [
            [_load(builder, address, v * step, vec, _FLOAT_BYTES) for v in range(self.vectors)]
            for address in (scales, offsets)[:wanted]
        ]

    def load(self, builder: Any, codes: Any, kept: Any) -> list[Any]:
        """The float vectors of one k, whose codes begin at an address."""
        return [self._vector(builder, codes, kept, v) for v in range(self.vectors)]

    def _vector(self, builder: Any, codes: Any, kept: Any, v: int) -> Any:
        ints, floats = ir.VectorType(_I32, LANES), ir.VectorType(_F32, LANES)
        if self.form in (Form.F16, Form.BF16):
            halves = _load(builder, codes, 2 * v * LANES, ir.VectorType(_I16, LANES), 2)
            halves = builder.zext(halves, ints)
            if self.form == Form.F16:
                return _half_to_float(builder, halves, LANES)
            return builder.bitcast(builder.shl(halves, _splat(_I32, 16, LANES)), floats)
        if self.form == Form.Q8:
            stored = _load(builder, codes, v * LANES, ir.VectorType(_I8, LANES), 1)
            numbers = builder.sext(stored, ints)
        else:
            numbers = self._nibbles(builder, codes, v)
            if self.form == Form.Q4:
                numbers = builder.sub(numbers, _splat(_I32, Q4_ZERO, LANES))
        scaled = builder.fmul(builder.sitofp(numbers, floats), kept[0][v])
        return builder.fadd(scaled, kept[1][v]) if self.form == Form.Q4_OFFSET else scaled

    def _nibbles(self, builder: Any, codes: Any, v: int) -> Any:
        """The codes of the v-th vector as 32-bit integers."""
        half, first = divmod(v * LANES, NIBBLES)
        stored = builder.zext(
            _load(builder, codes, first, ir.VectorType(_I8, LANES), 1), ir.VectorType(_I32, LANES)
        )
        return (
            builder.lshr(stored, _splat(_I32, 4, LANES))
            if half
            else builder.and_(stored, _splat(_I32, 15, LANES))
        )


def _widening(form: Form) -> Any:
    """Makes the intrinsic that widens a panel over some k with one scale.

    Returns:
        A numba intrinsic (codes, stride, scales, offsets, count, out): addresses as intp; stride between k in
        bytes; out is float32 [count, PANEL].
    """
    columns = _Columns(form)

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        codes, stride, scales, offsets, count, out = arguments
        kept = columns.before(builder, scales, offsets)
        entry = builder.block
        check, step, done = (builder.append_basic_block(name) for name in ("k.check", "k.step", "k.done"))
        builder.branch(check)

        builder.position_at_end(check)
        k = builder.phi(_I64)
        k.add_incoming(ir.Constant(_I64, 0), entry)
        builder.cbranch(builder.icmp_signed("<", k, count), step, done)

        builder.position_at_end(step)
        row = builder.add(out, builder.mul(k, ir.Constant(_I64, PANEL * _FLOAT_BYTES)))
        for v, vector in enumerate(columns.load(builder, builder.add(codes, builder.mul(k, stride)), kept)):
            target = builder.add(row, ir.Constant(_I64, v * LANES * _FLOAT_BYTES))
            pointer = builder.inttoptr(target, ir.PointerType(vector.type))
            builder.store(vector, pointer, align=_FLOAT_BYTES)
        k.add_incoming(builder.add(k, ir.Constant(_I64, 1)), step)
        builder.branch(check)

        builder.position_at_end(done)
        return context.get_dummy_value()

    @intrinsic
    def widening(_typing: Any, codes, stride, scales, offsets, count, out):
        return types.void(*[types.intp] * 6), generate

    return widening


def _fused(form: Form) -> Any:
    """A product of up to FEW rows with the PANEL outputs of a panel, over some k with one scale.

    Returns:
        A compiled helper with the arguments of `panel_product`, after the number of rows; the chain goes on.
    """
    columns = _Columns(form)
    tile_2, tile_1 = (panel_product(rows, columns, "resume") for rows in (2, 1))

    @device
    def product(rows, a, a_stride, b, b_stride, scales, offsets, count, c, c_stride):
        r = 0
        while r < rows:
            ar, cr = a + 4 * r * a_stride, c + 4 * r * c_stride
            if rows - r >= 2:
                tile_2(ar, a_stride, b, b_stride, scales, offsets, count, cr, c_stride)
                r += 2
            else:
                tile_1(ar, a_stride, b, b_stride, scales, offsets, count, cr, c_stride)
                r += 1

    return product


_CODED = (Form.F16, Form.BF16, Form.Q8, Form.Q4, Form.Q4_OFFSET)
_widen_f16, _widen_bf16, _widen_q8, _widen_q4, _widen_q4_offset = map(_widening, _CODED)
_times_f16, _times_bf16, _times_q8, _times_q4, _times_q4_offset = map(_fused, _CODED)


@device
def widen(panel, k, count, out):
    """Widens k .. k + count of a panel, k at the start of a group; out: address of float32 [count, PANEL]."""
    step = panel.group if panel.group else count
    for first in range(k, k + count, step):
        codes = panel.codes + first * panel.stride
        place = 4 * (first // step * PANEL)
        scales, offsets = panel.scales + place, panel.offsets + place
        into = out + 4 * (first - k) * PANEL
        if panel.form == Form.F16:
            _widen_f16(codes, panel.stride, scales, offsets, step, into)
        elif panel.form == Form.BF16:
            _widen_bf16(codes, panel.stride, scales, offsets, step, into)
        elif panel.form == Form.Q8:
            _widen_q8(codes, panel.stride, scales, offsets, step, into)
        elif panel.form == Form.Q4:
            _widen_q4(codes, panel.stride, scales, offsets, step, into)
        else:
            _widen_q4_offset(codes, panel.stride, scales, offsets, step, into)


@device
def fetch(panel, k, count):
    """Asks for what `widen` will read for k .. k + count of a panel; beyond its end, of the one after it."""
    prefetch(panel.codes + k * panel.stride, count * panel.stride)
    if panel.group:
        place, size = 4 * PANEL * (k // panel.group), 4 * PANEL * (count // panel.group)
        prefetch(panel.scales + place, size)
        if panel.form == Form.Q4_OFFSET:
            prefetch(panel.offsets + place, size)


@device
def multiply_few(rows, a, a_stride, panel, k, count, c):
    """The chain over k .. k + count of a panel, going on from what C holds: float32 [rows, PANEL].

    a is the address of the first row's number k, which starts a group.
    """
    step = panel.group if panel.group else count
    stride = panel.stride // 4
    for first in range(k, k + count, step):
        left = a + 4 * (first - k)
        codes = panel.codes + first * panel.stride
        place = 4 * (first // step * PANEL)
        scales, offsets = panel.scales + place, panel.offsets + place
        if panel.form == Form.F16:
            _times_f16(rows, left, a_stride, codes, stride, scales, offsets, step, c, PANEL)
        elif panel.form == Form.BF16:
            _times_bf16(rows, left, a_stride, codes, stride, scales, offsets, step, c, PANEL)
        elif panel.form == Form.Q8:
            _times_q8(rows, left, a_stride, codes, stride, scales, offsets, step, c, PANEL)
        elif panel.form == Form.Q4:
            _times_q4(rows, left, a_stride, codes, stride, scales, offsets, step, c, PANEL)
        else:
            _times_q4_offset(rows, left, a_stride, codes, stride, scales, offsets, step, c, PANEL)
