"""Dimensions of well-known models, for tables and benches that need shapes and no weights.

Source: each model's config.json on the Hugging Face hub.
"""

from __future__ import annotations

from dataclasses import dataclass

from isobatch.errors import ConfigError, UnknownKeyError


@dataclass(frozen=True, slots=True, kw_only=True)
class Dimensions:
    """What the shapes of a model's products follow from.

    Args:
        hidden: width of the residual stream.
        inner: width of the MLP, or of one expert.
        heads: query heads.
        kv_heads: key and value heads.
        head_size: width of a head.
        vocabulary: rows of the output projection.
        layers: decoder layers.
        experts: experts of each layer, 0 for a dense model.
        active_experts: experts per token.
    """

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    layers: int
    experts: int = 0
    active_experts: int = 0

    def products(self, ranks: int = 1) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of each linear of a layer and of the output projection.

        Args:
            ranks: how many ways tensor parallelism cuts the model.

        Raises:
            ConfigError: it cannot be cut so.
        """
        for name in ("heads", "inner", "vocabulary"):
            if getattr(self, name) % ranks:
                raise ConfigError(
                    "the model cannot be cut so", expected=f"a divisor of its {name}", got=f"{ranks} ranks"
                )
        kv_heads = max(1, self.kv_heads // ranks)  # fewer heads than ranks: each rank keeps a copy
        heads = self.heads // ranks
        shapes = {
            "qkv": ((heads + 2 * kv_heads) * self.head_size, self.hidden),
            "o": (self.hidden, heads * self.head_size),
            "lm_head": (self.vocabulary // ranks, self.hidden),
        }
        if not self.experts:
            shapes["gate_up"] = (2 * self.inner // ranks, self.hidden)
            shapes["down"] = (self.hidden, self.inner // ranks)
        return shapes


def _qwen3(hidden: int, inner: int, heads: int, kv_heads: int, layers: int, experts: int = 0) -> Dimensions:
    return Dimensions(
        hidden=hidden,
        inner=inner,
        heads=heads,
        kv_heads=kv_heads,
        head_size=128,
        vocabulary=151936,
        layers=layers,
        experts=experts,
        active_experts=8 if experts else 0,
    )


def _llama(hidden: int, inner: int, heads: int, head_size: int, layers: int) -> Dimensions:
    return Dimensions(
        hidden=hidden,
        inner=inner,
        heads=heads,
        kv_heads=8,
        head_size=head_size,
        vocabulary=128256,
        layers=layers,
    )


PRESETS: dict[str, Dimensions] = {
    "qwen3-0.6b": _qwen3(1024, 3072, 16, 8, 28),
    "qwen3-1.7b": _qwen3(2048, 6144, 16, 8, 28),
    "qwen3-4b": _qwen3(2560, 9728, 32, 8, 36),
    "qwen3-8b": _qwen3(4096, 12288, 32, 8, 36),
    "qwen3-14b": _qwen3(5120, 17408, 40, 8, 40),
    "qwen3-32b": _qwen3(5120, 25600, 64, 8, 64),
    "qwen3-30b-a3b": _qwen3(2048, 768, 32, 4, 48, experts=128),
    "qwen3-235b-a22b": _qwen3(4096, 1536, 64, 4, 94, experts=128),
    "llama-3-1b": _llama(2048, 8192, 32, 64, 16),
    "llama-3-8b": _llama(4096, 14336, 32, 128, 32),
    "llama-3-70b": _llama(8192, 28672, 64, 128, 80),
    "smollm2-135m": Dimensions(
        hidden=576, inner=1536, heads=9, kv_heads=3, head_size=64, vocabulary=49152, layers=30
    ),
}


def preset(name: str) -> Dimensions:
    """The dimensions of a well-known model.

    Raises:
        UnknownKeyError: not one of PRESETS.
    """
    if name not in PRESETS:
        raise UnknownKeyError("model", name, PRESETS)
    return PRESETS[name]
