"""From a checkpoint to a decoder: each tensor is read once, straight into the layout of the kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from isobatch.errors import UnsupportedModelError
from isobatch.kernels.coding import F32, Coding
from isobatch.kernels.layout import PAGE, Stack, Weight
from isobatch.kernels.moe.experts import Experts
from isobatch.kernels.rotary.table import Llama3Scaling, inverse_frequencies, rotary_table, scale_llama3
from isobatch.models.checkpoint import Checkpoint, expected_tensors
from isobatch.models.config import ModelConfig, MoeConfig
from isobatch.models.decoder import Decoder
from isobatch.models.layers import MLP, Attention, Layer, Norm, Rotary, SparseMLP
from isobatch.ops import Ops

# Rows of a matrix converted at a time: bounds what loading needs on top of the weights themselves.
_ROWS_AT_A_TIME = 4096
# Tensors that one weight holds, one below the other.
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("gate_proj", "up_proj")  # of an MLP or of an expert

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
        layers.append(_layer(checkpoint, ops, f"model.layers.{i}.", config.experts_of(i)))
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
    return _filled(ops.weight, checkpoint, *names)


def _filled(empty: Callable[[int, int, Coding], Weight], checkpoint: Checkpoint, *names: str) -> Weight:
    weight = empty(*_size(checkpoint, names), _coding(checkpoint, *names))
    _fill(weight, checkpoint, names)
    return weight


def _stack(checkpoint: Checkpoint, ops: Ops, matrices: Sequence[Sequence[str]]) -> Stack:
    """Experts' weights, each from the rows of several tensors."""
    codings = [_coding(checkpoint, *names) for names in matrices]
    stack = ops.stack(*_size(checkpoint, matrices[0]), codings)
    for weight, names in zip(stack.weights, matrices, strict=True):
        _fill(weight, checkpoint, names)
    return stack


def _size(checkpoint: Checkpoint, names: Sequence[str]) -> tuple[int, int]:
    shapes = [checkpoint.shape(name) for name in names]
    return sum(rows for rows, _ in shapes), shapes[0][1]


def _fill(weight: Weight, checkpoint: Checkpoint, names: Sequence[str]) -> None:
    heights = [checkpoint.shape(name)[0] for name in names]
    at = 0
    for name, height in zip(names, heights, strict=True):
        for start in range(0, height, _ROWS_AT_A_TIME):
            stop = min(start + _ROWS_AT_A_TIME, height)
            weight.put(at + start, checkpoint.rows(name, start, stop))
        at += height


def _layer(checkpoint: Checkpoint, ops: Ops, prefix: str, moe: MoeConfig | None) -> Layer:
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
    if moe is None:
        halves = (f"{prefix}mlp.{part}.weight" for part in _GATE_UP)
        gate_up = _filled(ops.gate_up, checkpoint, *halves)
        mlp: MLP | SparseMLP = MLP(gate_up, matrix("mlp.down_proj"))
    else:
        mlp = SparseMLP(_experts(checkpoint, ops, f"{prefix}mlp", moe))
    return Layer(norm("input_layernorm"), attention, norm("post_attention_layernorm"), mlp)


def _experts(checkpoint: Checkpoint, ops: Ops, prefix: str, moe: MoeConfig) -> Experts[Weight, Stack]:
    def stack(*parts: str) -> Stack:
        experts = [f"{prefix}.experts.{expert}" for expert in range(moe.experts)]
        return _stack(checkpoint, ops, [[f"{one}.{part}.weight" for part in parts] for one in experts])

    router = _matrix(checkpoint, ops, f"{prefix}.gate.weight")
    return Experts(router, stack(*_GATE_UP), stack("down_proj"), moe.active, moe.renormalise)
