"""Seeds of a request's completions."""

from __future__ import annotations

import secrets

from isobatch.engine.sampling_params import SamplingParams

_MASK = (1 << 64) - 1


def seed_for(params: SamplingParams) -> int:
    """The seed of a request: its own, or where it names none one from the operating system.

    At temperature 0 nothing is drawn, and the seed is 0, so that equal requests get equal replies.
    """
    if params.seed is not None:
        return params.seed
    return secrets.randbits(64) if params.temperature > 0 else 0


def seed_of(seed: int, index: int) -> int:
    """The seed of completion `index`; the first one's is the request's own, so n does not change it.

    Source: the finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014), a bijection of 64-bit words.
    """
    if index == 0:
        return seed
    z = (seed + index * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
