"""Triton's interpreter, made to sum dot products as a written order says: k ascending, one accumulator.

NumPy sums them as its library likes, by shape and place. With one order per element, tiles of any shape agree
in the interpreter as they do on a tensor core, and the relations can be tested without a GPU.

It also puts its own functions in the place of Triton's once per kernel, not once more at each call of a
function within it, which takes half of all its time and changes nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_patch_lang = interpreter._patch_lang


def _dot(_builder: Any, a: Any, b: Any, d: Any, _precision: Any, _imprecise: Any) -> Any:
    wide = np.float64 if d.data.dtype == np.float64 else np.float32
    total, left, right = (t.data.astype(wide) for t in (d, a, b))
    with np.errstate(over="ignore", invalid="ignore"):
        for k in range(left.shape[-1]):
            total = total + left[..., :, k, None] * right[..., k, None, :]
    return interpreter.TensorHandle(total, d.dtype.scalar)


class _Nothing:
    """What has been put in place, where all was in place already."""

    def restore(self) -> None:
        pass


def _patch_lang_once(function: Any) -> Any:
    modules = [m for m in function.__globals__.values() if m is tl or m is tl.core]
    if modules and not any(tl.core.is_builtin(module.load) for module in modules):
        return _Nothing()
    return _patch_lang(function)


def install() -> None:
    """Replaces the interpreter's dot product, and how it gets its functions into Triton's modules."""
    interpreter.InterpreterBuilder.create_dot = _dot
    interpreter._patch_lang = _patch_lang_once
