"""What a model is made of, read from a Hugging Face config.json and checked.

Strict on purpose: a setting that would change the numbers and that we do not have is refused by name, since a
model run without it would answer, only wrongly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

from isobatch.errors import CheckpointError, UnsupportedModelError
from isobatch.models.fields import Fields

Architecture = Literal["llama", "qwen2", "qwen3", "qwen3_moe"]

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
QK_NORMED = ("qwen3", "qwen3_moe")
"""Architectures whose queries and keys are normalised."""
_ROPE_KINDS = ("default", "linear", "llama3")
_ROPE_KEYS = {
    "rope_type",
    "type",
    "rope_theta",
    "partial_rotary_factor",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
}
_LARGEST = 2**31 - 1
_MOST_LAYERS, _MOST_EXPERTS = 10_000, 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """How positions turn queries and keys.

    Args:
        kind: "default", "linear" (every frequency divided by factor) or "llama3" (as in Llama 3.1).
        theta: the base; frequency i of a head of size D is theta ** (-2i / D), in radians per token.
        factor: the scaling factor, for "linear" and "llama3".
        low_freq_factor: for "llama3": wavelengths beyond original_context / low_freq_factor are fully scaled.
        high_freq_factor: for "llama3": wavelengths below original_context / high_freq_factor are not scaled.
        original_context: for "llama3": the context length before scaling, in tokens.
        frequency_divisors: D / 2 numbers that divide the frequencies, or None. GGUF files carry Llama 3.1's
            scaling in this form; the kind is then "default", for the divisors say it all.

    Raises:
        CheckpointError: a number out of its range.
    """

    kind: Literal["default", "linear", "llama3"]
    theta: float
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192
    frequency_divisors: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        _require(self.theta > 0, "rope theta", "more than 0", self.theta)
        _require(self.factor > 0, "rope factor", "more than 0", self.factor)
        band = (self.low_freq_factor, self.high_freq_factor)
        _require(0 < band[0] < band[1], "rope (low_freq_factor, high_freq_factor)", "0 < low < high", band)
        _require(self.original_context > 0, "rope original_context", "more than 0", self.original_context)
        for divisor in self.frequency_divisors or ():
            _require(
                0 < divisor < float("inf"), "a rope frequency divisor", "finite and more than 0", divisor
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeConfig:
    """The mixture of experts in place of an MLP.

    Args:
        experts: experts of a layer.
        active: experts per token.
        inner: width of one expert.
        renormalise: whether a token's weights are shares of its chosen experts; otherwise of all.
        dense_layers: the layers that have an MLP instead.

    Raises:
        CheckpointError: a number out of its range.
    """

    experts: int
    active: int
    inner: int
    renormalise: bool
    dense_layers: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        for name, most in (("experts", _MOST_EXPERTS), ("active", self.experts), ("inner", _LARGEST)):
            _require(
                0 < getattr(self, name) <= most,
                f"{name} of a mixture",
                f"from 1 to {most}",
                getattr(self, name),
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder of the Llama family: RMS norm, rotary positions, grouped-query attention, SwiGLU.

    Args:
        architecture: "llama", "qwen2", "qwen3" or "qwen3_moe".
        vocab_size: rows of the embedding.
        hidden_size: width of the residual stream.
        intermediate_size: width of the gated MLP.
        num_layers: decoder layers.
        num_heads: query heads.
        num_kv_heads: key and value heads; divides num_heads.
        head_size: width of one head; even. Not always hidden_size / num_heads.
        context_length: the longest sequence the model was made for, in tokens.
        rms_norm_eps: added to the mean square in every RMS norm.
        rope: rotary positions.
        tie_embeddings: whether the output projection is the embedding matrix.
        attention_bias: whether q_proj, k_proj and v_proj have a bias.
        output_bias: whether o_proj has one.
        qk_norm: whether queries and keys pass an RMS norm per head (Qwen3).
        bos_token_id: the token that begins a text, or None.
        eos_token_ids: the tokens that end a reply; possibly none.
        moe: the mixture of experts that most layers have, or None where all have an MLP.

    Raises:
        CheckpointError: a number out of its range, or two that do not fit each other.
    """

    architecture: Architecture
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    context_length: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_embeddings: bool
    attention_bias: bool
    output_bias: bool
    qk_norm: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    moe: MoeConfig | None = None

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
        for name in (*sizes, "head_size", "context_length"):
            most = _MOST_LAYERS if name == "num_layers" else _LARGEST
            _require(0 < getattr(self, name) <= most, name, f"from 1 to {most}", getattr(self, name))
        _require(
            self.num_heads % self.num_kv_heads == 0,
            "num_kv_heads",
            f"a divisor of num_heads = {self.num_heads}",
            self.num_kv_heads,
        )
        _require(self.head_size % 2 == 0, "head_size", "an even number", self.head_size)
        _require(self.rms_norm_eps > 0, "rms_norm_eps", "more than 0", self.rms_norm_eps)
        divisors = self.rope.frequency_divisors
        _require(
            divisors is None or len(divisors) == self.head_size // 2,
            "rope frequency_divisors",
            f"head_size / 2 = {self.head_size // 2} numbers",
            len(divisors or ()),
        )
        bos = () if self.bos_token_id is None else (self.bos_token_id,)
        for token in (*bos, *self.eos_token_ids):
            _require(
                0 <= token < self.vocab_size, "a bos or eos token id", f"less than {self.vocab_size}", token
            )

    def experts_of(self, layer: int) -> MoeConfig | None:
        """The mixture of experts of a layer, None where it has an MLP."""
        return None if self.moe is None or layer in self.moe.dense_layers else self.moe


def config_from_huggingface(
    config: Mapping[str, object], generation_config: Mapping[str, object] | None = None
) -> ModelConfig:
    """The model that a Hugging Face config.json describes, in the style of transformers 4 or 5.

    Args:
        config: the content of config.json.
        generation_config: the content of generation_config.json, if there is one. Its end-of-text tokens win,
            as they do in transformers.

    Returns:
        The checked configuration.

    Raises:
        UnsupportedModelError: an architecture, rope type, activation, bias, quantisation or attention
            window that we do not have.
        CheckpointError: a value that is missing, of the wrong type, or makes no sense.
    """
    fields = Fields(config, "config.json")
    architecture = _architecture(fields)
    _refuse_what_we_lack(fields, architecture)
    generation = Fields(generation_config or {}, "generation_config.json")
    hidden, heads = fields.get("hidden_size", int), fields.get("num_attention_heads", int)
    head_size = 128 if architecture == "qwen3" else hidden // max(heads, 1)  # what an absent head_dim means
    biased = fields.get("attention_bias", bool, False)
    bos = next((source for source in (fields, generation) if source.has("bos_token_id")), None)
    return ModelConfig(
        architecture=architecture,
        vocab_size=fields.get("vocab_size", int),
        hidden_size=hidden,
        intermediate_size=fields.get("intermediate_size", int),
        num_layers=fields.get("num_hidden_layers", int),
        num_heads=heads,
        num_kv_heads=fields.get("num_key_value_heads", int, heads),
        head_size=fields.get("head_dim", int, head_size),
        context_length=fields.get("max_position_embeddings", int),
        rms_norm_eps=fields.get("rms_norm_eps", float, 1e-6),
        rope=_rope(fields),
        tie_embeddings=fields.get("tie_word_embeddings", bool, False),
        attention_bias=biased or architecture == "qwen2",
        output_bias=biased and architecture != "qwen2",
        qk_norm=architecture in QK_NORMED,
        moe=_moe(fields) if architecture == "qwen3_moe" else None,
        bos_token_id=None if bos is None else bos.get("bos_token_id", int),
        eos_token_ids=_eos_token_ids(generation) or _eos_token_ids(fields),
    )


def check_architecture(name: str, source: str) -> Architecture:
    """A name for an architecture, if it is one we have.

    Args:
        name: the name.
        source: where it stood, for the message.

    Returns:
        The name.

    Raises:
        UnsupportedModelError: any other name.
    """
    if name not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{source}: unknown architecture", expected=f"one of {', '.join(ARCHITECTURES)}", got=repr(name)
        )
    return cast(Architecture, name)


def _require(condition: bool, what: str, expected: str, got: object) -> None:
    if not condition:
        raise CheckpointError(f"the configuration makes no sense: {what}", expected=expected, got=got)


def _architecture(fields: Fields) -> Architecture:
    architecture = check_architecture(fields.get("model_type", str), "config.json model_type")
    if fields.has("architectures"):
        classes = fields.items("architectures", str)
        if classes != [ARCHITECTURES[architecture]]:
            raise UnsupportedModelError(
                "config.json: a model that does not generate text, or not this way",
                expected=f"architectures to be [{ARCHITECTURES[architecture]!r}]",
                got=classes,
            )
    return architecture


def _refuse_what_we_lack(fields: Fields, architecture: Architecture) -> None:
    windowed = fields.get(
        "use_sliding_window", bool, architecture == "llama" and fields.has("sliding_window")
    )
    layer_types = set(fields.items("layer_types", str)) if fields.has("layer_types") else set()
    activation = fields.get("hidden_act", str, "silu")
    refusals = {
        "attention with a sliding window": windowed or bool(layer_types - {"full_attention"}),
        f"hidden_act {activation!r}; only 'silu' is supported": activation != "silu",
        "a bias in the MLP (mlp_bias)": fields.get("mlp_bias", bool, False),
        "weights quantised by quantization_config": fields.has("quantization_config"),
    }
    for what, refused in refusals.items():
        if refused:
            raise UnsupportedModelError(f"config.json asks for {what}", fix="use another checkpoint")


def _moe(fields: Fields) -> MoeConfig:
    # transformers 5 calls them local experts.
    name = "num_local_experts" if fields.has("num_local_experts") else "num_experts"
    count = fields.get(name, int)
    other = fields.get("num_experts", int, count)
    _require(other == count, "num_experts", f"the same as num_local_experts, {count}", other)
    step, layers = fields.get("decoder_sparse_step", int, 1), fields.get("num_hidden_layers", int)
    _require(step > 0, "decoder_sparse_step", "more than 0", step)
    dense = set(fields.items("mlp_only_layers", int)) if fields.has("mlp_only_layers") else set()
    dense |= {layer for layer in range(min(layers, _MOST_LAYERS)) if (layer + 1) % step}
    return MoeConfig(
        experts=count,
        active=fields.get("num_experts_per_tok", int),
        inner=fields.get("moe_intermediate_size", int),
        renormalise=fields.get("norm_topk_prob", bool, False),
        dense_layers=frozenset(dense),
    )


def _rope(fields: Fields) -> RopeConfig:
    # transformers 5 keeps everything in rope_parameters; 4 had rope_theta beside rope_scaling.
    name = "rope_parameters" if fields.has("rope_parameters") else "rope_scaling"
    rope = fields.mapping(name)
    if name == "rope_parameters" and fields.has("rope_scaling"):
        _require(fields.mapping("rope_scaling") == rope, "rope_scaling", f"the same as {name}", "another")
    if surplus := sorted(set(rope) - _ROPE_KEYS):
        raise UnsupportedModelError(f"config.json {name} has keys that we do not know: {', '.join(surplus)}")
    inner = Fields(rope, f"config.json {name}")
    partial = inner.get("partial_rotary_factor", float, fields.get("partial_rotary_factor", float, 1.0))
    if partial != 1.0:
        raise UnsupportedModelError("config.json: partial_rotary_factor", expected=1.0, got=partial)
    kind = inner.get("rope_type", str, inner.get("type", str, "default"))
    if kind not in _ROPE_KINDS:
        raise UnsupportedModelError(
            f"config.json {name}: unknown rope type",
            expected=f"one of {', '.join(_ROPE_KINDS)}",
            got=repr(kind),
        )
    theta = inner.get("rope_theta", float, fields.get("rope_theta", float, 10000.0))
    if kind == "default":
        return RopeConfig(kind="default", theta=theta)
    factor = inner.get("factor", float)
    if kind == "linear":
        return RopeConfig(kind="linear", theta=theta, factor=factor)
    return RopeConfig(
        kind="llama3",
        theta=theta,
        factor=factor,
        low_freq_factor=inner.get("low_freq_factor", float),
        high_freq_factor=inner.get("high_freq_factor", float),
        original_context=inner.get("original_max_position_embeddings", int),
    )


def _eos_token_ids(fields: Fields) -> tuple[int, ...]:
    if fields.is_list("eos_token_id"):
        return tuple(fields.items("eos_token_id", int))
    return (fields.get("eos_token_id", int),) if fields.has("eos_token_id") else ()
