"""Read a GGUF file as llama.cpp writes it, under Hugging Face's names and in Hugging Face's layout."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch

from isobatch.errors import CheckpointError, UnsupportedModelError
from isobatch.kernels.coding import CodedRows, Coding
from isobatch.models.config import QK_NORMED, ModelConfig, MoeConfig, RopeConfig, check_architecture
from isobatch.models.fields import Fields
from isobatch.models.gguf_blocks import coding_of
from isobatch.models.gguf_format import GgufFile
from isobatch.models.rows import checked_stop

_EMBEDDING, _OUTPUT, _DIVISORS = "token_embd", "output", "rope_freqs.weight"
_OUTSIDE = {_EMBEDDING: "model.embed_tokens", "output_norm": "model.norm", _OUTPUT: "lm_head"}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
}
# All experts of a layer in one tensor.
_STACKED = re.compile(r"blk\.(0|[1-9]\d*)\.ffn_(gate|up|down)_exps\.weight")
# Where llama.cpp has another name than Hugging Face.
_ARCHITECTURES = {"qwen3moe": "qwen3_moe"}
_PERMUTED = re.compile(r"self_attn\.[qk]_proj\.")
# Every key under the architecture's name that we honour, or that changes no number. Any other one is refused.
_KEYS = {
    "vocab_size",
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
}
_EXPERT_KEYS = {"expert_count", "expert_used_count", "expert_feed_forward_length", "expert_weights_norm"}
_STACK_DIMENSIONS = 3
_END_TOKENS = tuple(f"tokenizer.ggml.{end}_token_id" for end in ("eos", "eot", "eom"))


class GgufCheckpoint:
    """One .gguf file. See Checkpoint for the methods.

    Args:
        path: the file.

    Raises:
        UnsupportedModelError: a model or quantisation that we do not have.
        CheckpointError: damaged, truncated, or without metadata that the model needs.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = GgufFile(path)
        self.config = _config(self._file)
        self._stored = _stored(self._file)

    def names(self) -> frozenset[str]:
        """The names of all tensors."""
        return frozenset(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor."""
        if name not in self._stored:
            raise CheckpointError(f"{self.path} has no tensor {name!r}")
        return self._file.tensors[self._stored[name]].shape

    def coding(self, name: str) -> Coding:
        """How one tensor's numbers are stored."""
        self.shape(name)
        return coding_of(self._file.tensors[self._stored[name]].quantisation)

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> CodedRows:
        """Rows [start, stop) of one matrix, as they are stored."""
        stop = checked_stop(name, start, stop, self.shape(name)[0])
        stored = self._stored[name]
        if not self._permuted(name):
            return self._file.rows(stored, start, stop)
        head = self.config.head_size
        first, last = start // head * head, -(-stop // head) * head
        return self._file.rows(stored, first, last)[_order(start, stop, head) - first]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows [start, stop) of one tensor, as float32."""
        if len(self.shape(name)) > 1:
            return self.rows(name, start, stop).floats()
        stop = checked_stop(name, start, stop, self.shape(name)[0])
        vector = torch.from_numpy(self._file.vector(self._stored[name]))
        if not self._permuted(name):
            return vector[start:stop].clone()
        return vector[_order(start, stop, self.config.head_size)]

    def _permuted(self, name: str) -> bool:
        return self.config.architecture == "llama" and _PERMUTED.search(name) is not None

    def close(self) -> None:
        """Let go of the file."""
        self._stored.clear()
        self._file.close()


def _order(start: int, stop: int, head: int) -> torch.Tensor:
    """Where the file has rows [start, stop) of Llama's queries and keys.

    llama.cpp turns neighbouring numbers where Hugging Face turns the halves of a head. For Llama its
    converter moves the rows of queries and keys to match: row i of half j lies at 2i + j of its head.
    """
    row = torch.arange(start, stop)
    place = row % head
    return row - place + place % (head // 2) * 2 + place // (head // 2)


def _stored(file: GgufFile) -> dict[str, str]:
    """Hugging Face's name for each tensor, with the file's own; experts one by one."""
    stored = {}
    for name in list(file.tensors):
        stacked = _STACKED.fullmatch(name)
        if stacked is not None and len(file.tensors[name].shape) == _STACK_DIMENSIONS:
            prefix = f"model.layers.{stacked[1]}.mlp.experts"
            for expert, each in enumerate(file.unstack(name)):
                stored[f"{prefix}.{expert}.{stacked[2]}_proj.weight"] = each
        elif name != _DIVISORS:
            stored[_canonical(name)] = name
    return stored


def _canonical(name: str) -> str:
    """Hugging Face's name for a tensor. An unknown one keeps its own, for check_tensors to report."""
    stem, _, kind = name.rpartition(".")
    if stem in _OUTSIDE:
        return f"{_OUTSIDE[stem]}.{kind}"
    layer = re.fullmatch(r"blk\.(0|[1-9]\d*)\.(\w+)", stem)
    if layer is None or layer[2] not in _IN_LAYER:
        return name
    return f"model.layers.{layer[1]}.{_IN_LAYER[layer[2]]}.{kind}"


def _config(file: GgufFile) -> ModelConfig:
    source = str(file.path)
    everything = Fields(file.metadata, source)
    family = everything.get("general.architecture", str)
    architecture = check_architecture(_ARCHITECTURES.get(family, family), source)
    prefix = f"{family}."
    own = {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}
    moe = architecture == "qwen3_moe"
    if surplus := sorted(set(own) - _KEYS - (_EXPERT_KEYS if moe else set())):
        raise UnsupportedModelError(f"{source} has settings that we do not know: {', '.join(surplus)}")
    fields = Fields(own, f"{source} {architecture}")
    if f"{_EMBEDDING}.weight" not in file.tensors:
        raise CheckpointError(f"{source} has no tensor '{_EMBEDDING}.weight'")
    hidden, heads = fields.get("embedding_length", int), fields.get("attention.head_count", int)
    head_size = fields.get("attention.key_length", int, hidden // max(heads, 1))
    for key in ("attention.value_length", "rope.dimension_count"):
        if fields.get(key, int, head_size) != head_size:
            raise UnsupportedModelError(
                f"{source}: {key}", expected=f"the head size, {head_size}", got=fields.get(key, int)
            )
    bos = "tokenizer.ggml.bos_token_id"
    ends = (everything.get(key, int) for key in _END_TOKENS if everything.has(key))
    return ModelConfig(
        architecture=architecture,
        vocab_size=fields.get("vocab_size", int, file.tensors[f"{_EMBEDDING}.weight"].shape[0]),
        hidden_size=hidden,
        intermediate_size=fields.get("feed_forward_length", int),
        num_layers=fields.get("block_count", int),
        num_heads=heads,
        num_kv_heads=fields.get("attention.head_count_kv", int, heads),
        head_size=head_size,
        context_length=fields.get("context_length", int),
        rms_norm_eps=_decimal(fields.get("attention.layer_norm_rms_epsilon", float)),
        rope=_rope(file, fields, source),
        tie_embeddings=f"{_OUTPUT}.weight" not in file.tensors,
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        output_bias="blk.0.attn_output.bias" in file.tensors,
        qk_norm=architecture in QK_NORMED,
        moe=_moe(fields) if moe else None,
        bos_token_id=everything.get(bos, int) if everything.has(bos) else None,
        eos_token_ids=tuple(dict.fromkeys(ends)),
    )


def _moe(fields: Fields) -> MoeConfig:
    return MoeConfig(
        experts=fields.get("expert_count", int),
        active=fields.get("expert_used_count", int),
        inner=fields.get("expert_feed_forward_length", int),
        # llama.cpp renormalises Qwen3's weights whether or not the file says so.
        renormalise=fields.get("expert_weights_norm", bool, True),
    )


def _rope(file: GgufFile, fields: Fields, source: str) -> RopeConfig:
    theta = _decimal(fields.get("rope.freq_base", float, 10000.0))
    scaling = fields.get("rope.scaling.type", str, "none")
    if scaling not in ("none", "linear"):
        raise UnsupportedModelError(
            f"{source}: rope.scaling.type", expected="none or linear", got=repr(scaling)
        )
    if scaling == "linear" and _DIVISORS in file.tensors:
        raise UnsupportedModelError(f"{source} scales positions twice, by a factor and by {_DIVISORS}")
    if scaling == "linear":
        return RopeConfig(
            kind="linear", theta=theta, factor=_decimal(fields.get("rope.scaling.factor", float))
        )
    if _DIVISORS not in file.tensors:
        return RopeConfig(kind="default", theta=theta)
    if len(file.tensors[_DIVISORS].shape) != 1:
        raise CheckpointError(
            f"{source}: {_DIVISORS}", expected="a vector", got=file.tensors[_DIVISORS].shape
        )
    divisors = tuple(file.vector(_DIVISORS).tolist())
    return RopeConfig(kind="default", theta=theta, frequency_divisors=divisors)


def _decimal(value: float) -> float:
    """The shortest decimal with this float32 value: 1e-05 for what the file's float32 makes 9.99999974e-06.

    It is what the model's own config.json said, so that both formats of one model have one configuration.
    """
    return float(str(np.float32(value)))
