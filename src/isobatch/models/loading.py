"""From a checkpoint to a decoder: each tensor is read once, straight into the layout of the kernels."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from isobatch.errors import UnsupportedModelError
from isobatch.kernels.coding import F32, Coding
from isobatch.kernels.layout import PAGE, Weight
from isobatch.kernels.rotary.table import Llama3Scaling, inverse_frequencies, rotary_table, scale_llama3
from isobatch.models.checkpoint import Checkpoint, expected_tensors
from isobatch.models.config import ModelConfig
from isobatch.models.decoder import Decoder
from isobatch.models.layers import MLP, Attention, Layer, Norm, Rotary
from isobatch.ops import Ops

# Rows of a matrix converted at a time: bounds what loading needs on top of the weights themselves.
_ROWS_AT_A_TIME = 4096
# Tensors that one weight holds, one below the other.
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")

Progress = Callable[[int, int], None]
"""Called with (layers loaded, layers in all)."""


def load_decoder(checkpoint: Checkpoint, ops: Ops, progress: Progress = lambda _done, _all: None) -> Decoder:
    """Builds the decoder that a checkpoint holds.

    Args:
        checkpoint: as `open_checkpoint` gives it, which has checked that every tensor is there.
        ops: decides the layout of the weights.
        progress: told after each layer.

    Returns:
        The decoder. Memory: `coded_bytes`, or with stock kernels that of float32 weights; and a few thousand
        rows of the matrix being read.

    Raises:
        UnsupportedModelError: the head size is no multiple of 16.
    """
    config = checkpoint.config
    if config.head_size % PAGE:
        raise UnsupportedModelError(
            "attention has no kernel for this head size",
            expected=f"a multiple of {PAGE}",
            got=config.head_size,
        )
    embedding = _matrix(checkpoint, ops, "model.embed_tokens.weight")
    layers = []
    for i in range(config.num_layers):
        layers.append(_layer(checkpoint, ops, f"model.layers.{i}."))
        progress(i + 1, config.num_layers)
    output = embedding if config.tie_embeddings else _matrix(checkpoint, ops, "lm_head.weight")
    final_norm = Norm(ops.parameter(checkpoint.read("model.norm.weight")), config.rms_norm_eps)
    angles = rotary_for(config)
    rotary = Rotary(angles.cos.to(ops.device), angles.sin.to(ops.device))
    return Decoder(config, ops, embedding, tuple(layers), final_norm, output, rotary)


def rotary_for(config: ModelConfig) -> Rotary:
    """The angles of a model's rotary embedding, for every position of its context."""
    rope = config.rope
    inv_freq: npt.NDArray[np.float32] = inverse_frequencies(config.head_size, rope.theta)
    if rope.kind == "linear":
        inv_freq = (inv_freq / np.float32(rope.factor)).astype(np.float32)
    elif rope.kind == "llama3":
        scaling = Llama3Scaling(
            rope.factor, rope.low_freq_factor, rope.high_freq_factor, rope.original_context
        )
        inv_freq = scale_llama3(inv_freq, scaling)
    if rope.frequency_divisors is not None:
        inv_freq = (inv_freq / np.array(rope.frequency_divisors, np.float32)).astype(np.float32)
    return Rotary(*rotary_table(inv_freq, config.context_length))


def coded_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of the weights that `load_decoder` loads for our own kernels, as they are coded."""
    total = 0
    for name, shape in expected_tensors(checkpoint.config).items():
        matrix = len(shape) > 1
        total += _coding(checkpoint, *_joined(name)).bytes(*shape) if matrix else F32.bytes(1, *shape)
    return total


def _joined(name: str) -> list[str]:
    """The tensors that make up one weight with this one, itself included."""
    prefix, _, kind = name.rpartition(".")
    for parts in (_QKV, _GATE_UP):
        for part in parts:
            if prefix.endswith(part):
                return [f"{prefix.removesuffix(part)}{other}.{kind}" for other in parts]
    return [name]


def _coding(checkpoint: Checkpoint, *names: str) -> Coding:
    """The coding of a weight made of several tensors: theirs, or float32 where they do not agree.

    A kernel knows one coding for a weight. Quantisers mix them: they may give v_proj more bits than q_proj.
    float32 holds the numbers of all codings exactly, at the price of memory; any other one would round.
    """
    codings = {checkpoint.coding(name) for name in names}
    return codings.pop() if len(codings) == 1 else F32


def _matrix(checkpoint: Checkpoint, ops: Ops, *names: str) -> Weight:
    """One weight from the rows of several tensors, one below the other."""
    heights = [checkpoint.shape(name)[0] for name in names]
    weight = ops.weight(sum(heights), checkpoint.shape(names[0])[1], _coding(checkpoint, *names))
    at = 0
    for name, height in zip(names, heights, strict=True):
        for start in range(0, height, _ROWS_AT_A_TIME):
            stop = min(start + _ROWS_AT_A_TIME, height)
            weight.put(at + start, checkpoint.rows(name, start, stop))
        at += height
    return weight


def _layer(checkpoint: Checkpoint, ops: Ops, prefix: str) -> Layer:
    config = checkpoint.config

    def norm(name: str) -> Norm:
        return Norm(ops.parameter(checkpoint.read(f"{prefix}{name}.weight")), config.rms_norm_eps)

    def matrix(*names: str) -> Weight:
        return _matrix(checkpoint, ops, *(f"{prefix}{name}.weight" for name in names))

    def bias(*names: str) -> torch.Tensor:
        return ops.parameter(torch.cat([checkpoint.read(f"{prefix}{name}.bias") for name in names]))

    attention = Attention(
        qkv=matrix(*_QKV),
        qkv_bias=bias(*_QKV) if config.attention_bias else None,
        out=matrix("self_attn.o_proj"),
        out_bias=bias("self_attn.o_proj") if config.output_bias else None,
        q_norm=norm("self_attn.q_norm") if config.qk_norm else None,
        k_norm=norm("self_attn.k_norm") if config.qk_norm else None,
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        head_size=config.head_size,
    )
    mlp = MLP(matrix(*_GATE_UP), matrix("mlp.down_proj"))
    return Layer(norm("input_layernorm"), attention, norm("post_attention_layernorm"), mlp)
