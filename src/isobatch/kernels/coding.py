"""How weights are stored: the form that a checkpoint gives them, and the one float32 number each stands for.

Weights stay in this form in memory and are widened inside the kernels, by the arithmetic stated here: so a
kernel on coded weights gives the bits of one on the widened weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch

_FLOAT_BYTES = 4


class Form(IntEnum):
    """How a code becomes a float32 number. Every step is one IEEE operation, rounded once.

    F32, F16, BF16: it is the number, or widens to it exactly.
    Q8: scale * code, the code signed.
    Q4: scale * (code - 8), the code from 0 to 15.
    Q4_OFFSET: scale * code, rounded; then + offset, rounded again: never fused.
    """

    F32 = 0
    F16 = 1
    BF16 = 2
    Q8 = 3
    Q4 = 4
    Q4_OFFSET = 5


_DTYPES = {
    Form.F32: torch.float32,
    Form.F16: torch.float16,
    Form.BF16: torch.bfloat16,
    Form.Q8: torch.int8,
    Form.Q4: torch.uint8,
    Form.Q4_OFFSET: torch.uint8,
}
_BITS = {Form.F32: 32, Form.F16: 16, Form.BF16: 16, Form.Q8: 8, Form.Q4: 4, Form.Q4_OFFSET: 4}
Q4_ZERO = 8
"""The code that stands for zero in Form.Q4."""


@dataclass(frozen=True, slots=True)
class Coding:
    """The form of a whole weight.

    Args:
        form: how a code becomes a number.
        group: how many neighbours along k share a scale, and an offset if the form has one; 0 without scales.
    """

    form: Form
    group: int = 0

    @property
    def dtype(self) -> torch.dtype:
        """Of the codes in `CodedRows`, where each has an element of its own."""
        return _DTYPES[self.form]

    @property
    def bits(self) -> int:
        """Of one code in the memory of a kernel."""
        return _BITS[self.form]

    @property
    def has_offsets(self) -> bool:
        """Whether a group has an offset."""
        return self.form is Form.Q4_OFFSET

    def groups(self, inputs: int) -> int:
        """How many scales a row of `inputs` numbers has."""
        return inputs // self.group if self.group else 0

    def bytes(self, outputs: int, inputs: int) -> int:
        """Of a matrix in the memory of a kernel, with its scales and offsets."""
        per_group = _FLOAT_BYTES * (1 + self.has_offsets)
        return outputs * (inputs * self.bits // 8 + self.groups(inputs) * per_group)


F32, F16, BF16 = Coding(Form.F32), Coding(Form.F16), Coding(Form.BF16)
Q8, Q8_SHORT = Coding(Form.Q8, 32), Coding(Form.Q8, 16)
Q4, Q4_OFFSET = Coding(Form.Q4, 32), Coding(Form.Q4_OFFSET, 32)
CODINGS = {
    "f32": F32,
    "f16": F16,
    "bf16": BF16,
    "q8": Q8,
    "q8, short groups": Q8_SHORT,
    "q4": Q4,
    "q4 with offset": Q4_OFFSET,
}
"""Every coding that the kernels have, by a name to print."""


@dataclass(frozen=True, slots=True)
class CodedRows:
    """Rows of a weight as they are stored.

    Args:
        coding: what the codes mean.
        codes: coding.dtype [..., K], CPU, one element per number (the nibbles of Q4 unpacked).
        scales: float32 [..., K / group], or None without scales.
        offsets: float32 [..., K / group], or None without offsets.
    """

    coding: Coding
    codes: torch.Tensor
    scales: torch.Tensor | None = None
    offsets: torch.Tensor | None = None

    @classmethod
    def of(cls, numbers: torch.Tensor) -> CodedRows:
        """Floats as they are.

        Args:
            numbers: float32, float16 or bfloat16 [..., K], CPU, any strides.
        """
        (coding,) = (c for c in (F32, F16, BF16) if c.dtype == numbers.dtype)
        return cls(coding, numbers)

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, rows: slice | torch.Tensor) -> CodedRows:
        """Some of the rows: a slice, or row numbers in any order."""
        scales, offsets = (part if part is None else part[rows] for part in (self.scales, self.offsets))
        return CodedRows(self.coding, self.codes[rows], scales, offsets)

    def numbers(self) -> torch.Tensor:
        """What `floats` gives; where codes are numbers already, as they are, perhaps in half the bytes."""
        return self.codes if self.scales is None else self.floats()

    def floats(self) -> torch.Tensor:
        """The numbers that the codes stand for.

        Returns:
            float32 [..., K]; the codes themselves where they are float32 already.

        Determinism:
            Elementwise, as `Form` says: the same on every machine.
        """
        codes = self.codes
        if self.scales is None:
            return codes.to(torch.float32)
        if self.coding.form is Form.Q4:
            codes = codes.to(torch.int8) - Q4_ZERO
        numbers = codes.to(torch.float32, memory_format=torch.contiguous_format)
        grouped = numbers.view(*self.scales.shape, self.coding.group)
        grouped.mul_(self.scales.unsqueeze(-1))
        if self.offsets is not None:
            grouped.add_(self.offsets.unsqueeze(-1))
        return numbers
