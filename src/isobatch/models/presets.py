"""Dimensions of well-known models, for tables and benches that need shapes and no weights.

Source: each model's config.json on the Hugging Face hub.
"""

from __future__ import annotations

from dataclasses import dataclass

from isobatch.errors import ConfigError, UnknownKeyError
from isobatch.models.config import QK_NORMED, Architecture, ModelConfig, MoeConfig, RopeConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What models of one family have in common, beside the shapes.

    Args:
        architecture: as in `ModelConfig`.
        context: the longest sequence, in tokens.
        eps: of the RMS norms.
        rope: rotary positions.
        bos: the token that begins a text.
        eos: the tokens that end a reply.
    """

    architecture: Architecture
    context: int
    eps: float
    rope: RopeConfig
    bos: int
    eos: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dimensions:
    """What the shapes of a model's products follow from, and what else there is to its configuration.

    Args:
        family: what it shares with its relatives.
        hidden: width of the residual stream.
        inner: width of the MLP, or of one expert.
        heads: query heads.
        kv_heads: key and value heads.
        head_size: width of a head.
        vocabulary: rows of the output projection.
        layers: decoder layers.
        tied: whether the output projection is the embedding.
        experts: experts of each layer, 0 for a dense model.
        active_experts: experts per token.
    """

    family: Family
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    layers: int
    tied: bool
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

    def config(self) -> ModelConfig:
        """The whole configuration."""
        family, moe = self.family, None
        if self.experts:
            moe = MoeConfig(
                experts=self.experts, active=self.active_experts, inner=self.inner, renormalise=True
            )
        return ModelConfig(
            architecture="qwen3_moe" if moe else family.architecture,
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            # Of a mixture no layer has this width, but its config.json names it: that of all active experts.
            intermediate_size=self.inner * max(1, self.active_experts),
            num_layers=self.layers,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_size=self.head_size,
            context_length=family.context,
            rms_norm_eps=family.eps,
            rope=family.rope,
            tie_embeddings=self.tied,
            attention_bias=False,
            output_bias=False,
            qk_norm=family.architecture in QK_NORMED,
            moe=moe,
            bos_token_id=family.bos,
            eos_token_ids=family.eos,
        )


_QWEN3 = Family(
    architecture="qwen3",
    context=40960,
    eps=1e-6,
    rope=RopeConfig(kind="default", theta=1e6),
    bos=151643,
    eos=(151645, 151643),
)
_SMOLLM2 = Family(
    architecture="llama",
    context=8192,
    eps=1e-5,
    rope=RopeConfig(kind="default", theta=1e5),
    bos=1,
    eos=(2,),
)


def _qwen3(
    hidden: int, inner: int, heads: int, kv_heads: int, layers: int, *, tied: bool = False, experts: int = 0
) -> Dimensions:
    return Dimensions(
        family=_QWEN3,
        hidden=hidden,
        inner=inner,
        heads=heads,
        kv_heads=kv_heads,
        head_size=128,
        vocabulary=151936,
        layers=layers,
        tied=tied,
        experts=experts,
        active_experts=8 if experts else 0,
    )


def _llama(
    hidden: int, inner: int, heads: int, head_size: int, layers: int, *, factor: float, tied: bool = False
) -> Dimensions:
    family = Family(
        architecture="llama",
        context=131072,
        eps=1e-5,
        rope=RopeConfig(kind="llama3", theta=5e5, factor=factor),
        bos=128000,
        eos=(128001, 128008, 128009),
    )
    return Dimensions(
        family=family,
        hidden=hidden,
        inner=inner,
        heads=heads,
        kv_heads=8,
        head_size=head_size,
        vocabulary=128256,
        layers=layers,
        tied=tied,
    )


PRESETS: dict[str, Dimensions] = {
    "qwen3-0.6b": _qwen3(1024, 3072, 16, 8, 28, tied=True),
    "qwen3-1.7b": _qwen3(2048, 6144, 16, 8, 28, tied=True),
    "qwen3-4b": _qwen3(2560, 9728, 32, 8, 36, tied=True),
    "qwen3-8b": _qwen3(4096, 12288, 32, 8, 36),
    "qwen3-14b": _qwen3(5120, 17408, 40, 8, 40),
    "qwen3-32b": _qwen3(5120, 25600, 64, 8, 64),
    "qwen3-30b-a3b": _qwen3(2048, 768, 32, 4, 48, experts=128),
    "qwen3-235b-a22b": _qwen3(4096, 1536, 64, 4, 94, experts=128),
    "llama-3-1b": _llama(2048, 8192, 32, 64, 16, factor=32, tied=True),
    "llama-3-8b": _llama(4096, 14336, 32, 128, 32, factor=8),
    "llama-3-70b": _llama(8192, 28672, 64, 128, 80, factor=8),
    "smollm2-135m": Dimensions(
        family=_SMOLLM2,
        hidden=576,
        inner=1536,
        heads=9,
        kv_heads=3,
        head_size=64,
        vocabulary=49152,
        layers=30,
        tied=True,
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
