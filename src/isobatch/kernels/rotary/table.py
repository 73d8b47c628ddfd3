"""The angles of rotary embedding, the same bits on every CPU.

As Hugging Face defines them: inv_freq_i = 1 / theta^(2i/D) and angle = position * inv_freq, both in
float32. The power, the sine and the cosine come from our own arithmetic (kernels.cpu.elementary), because
libm's last bit is a matter of the machine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from isobatch.kernels.cpu.elementary import power, sin_cos
from isobatch.kernels.cpu.jit import empty

_POSITIONS_AT_A_TIME = 4096


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Llama 3's stretching of low frequencies. Source: Meta's Llama 3.1 reference, `apply_scaling`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


def inverse_frequencies(head_size: int, theta: float) -> npt.NDArray[np.float32]:
    """1 / theta^(2i/D) for i in [0, D/2), float32."""
    powers = [np.float32(power(theta, 2 * i, head_size)) for i in range(head_size // 2)]
    return np.float32(1) / np.array(powers, np.float32)


def scale_llama3(inv_freq: npt.NDArray[np.float32], by: Llama3Scaling) -> npt.NDArray[np.float32]:
    """Divides low frequencies by the factor, keeps high ones, and blends between."""
    low, high = by.original_context / by.low_freq_factor, by.original_context / by.high_freq_factor
    scaled = []
    for f in inv_freq.tolist():
        wavelength = 2 * math.pi / f
        if wavelength < high:
            scaled.append(f)
        elif wavelength > low:
            scaled.append(f / by.factor)
        else:
            blend = (by.original_context / wavelength - by.low_freq_factor) / (
                by.high_freq_factor - by.low_freq_factor
            )
            scaled.append((1 - blend) * f / by.factor + blend * f)
    return np.array(scaled, np.float32)


def rotary_table(inv_freq: npt.NDArray[np.float32], context: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines for every position.

    Args:
        inv_freq: float32 [D/2], radians per position.
        context: number of positions, below 2^20.

    Returns:
        (cos, sin), float32 [context, D/2].

    Determinism:
        A function of the arguments alone; the same bits on every CPU.
    """
    (cos, _), (sin, _) = empty(context, len(inv_freq)), empty(context, len(inv_freq))
    for start in range(0, context, _POSITIONS_AT_A_TIME):  # sin_cos makes a dozen arrays on its way
        stop = min(start + _POSITIONS_AT_A_TIME, context)
        angles = np.arange(start, stop, dtype=np.float32)[:, None] * inv_freq[None, :]
        s, c = sin_cos(angles.astype(np.float64))
        sin[start:stop], cos[start:stop] = torch.from_numpy(s), torch.from_numpy(c)
    return cos, sin
