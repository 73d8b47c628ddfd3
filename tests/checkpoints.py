"""Checkpoints for tests: tiny random models of transformers, saved by it or as llama.cpp's converter does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
import torch
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter
from gguf.quants import quantize
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

Stored = tuple[npt.NDArray[Any], GGMLQuantizationType]

_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
}
_MOE: dict[str, object] = {
    "moe_intermediate_size": 32,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "norm_topk_prob": True,
}
_GGUF_TYPES = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING", list: "ARRAY"}


def tiny_model(architecture: str, dtype: torch.dtype = torch.float32, **settings: object) -> Any:
    """A transformers model with random weights everywhere, norms and biases too.

    Args:
        architecture: "llama", "qwen2", "qwen3" or "qwen3_moe".
        dtype: of its weights.
        settings: what to put into its configuration, over the tiny defaults.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    defaults: dict[str, object] = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | (_MOE if architecture == "qwen3_moe" else {})
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(architecture, **(defaults | settings)), dtype=dtype
    )
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    return model


def edit_json(path: Path, **changes: object) -> None:
    """Change entries of a JSON object; an entry changed to ... goes away."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def gguf_metadata(config: Any) -> dict[str, object]:
    """What llama.cpp's converter says about a transformers configuration."""
    own = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": config.rope_parameters["rope_theta"],
    }
    if config.model_type == "qwen3_moe":
        own |= {
            "expert_count": config.num_experts,
            "expert_used_count": config.num_experts_per_tok,
            "expert_feed_forward_length": config.moe_intermediate_size,
        }
    architecture = config.model_type.replace("_", "")
    general: dict[str, object] = {
        "general.architecture": architecture,
        "tokenizer.ggml.bos_token_id": config.bos_token_id,
        "tokenizer.ggml.eos_token_id": config.eos_token_id,
    }
    return general | {f"{architecture}.{key}": value for key, value in own.items()}


def gguf_tensors(
    model: Any, quantisation: GGMLQuantizationType = GGMLQuantizationType.F32
) -> dict[str, Stored]:
    """A transformers model's weights under llama.cpp's names, in its layout; matrices quantised."""
    stored = {}
    for name, tensor in model.state_dict().items():
        stem, _, kind = name.rpartition(".")
        if stem == "lm_head" and model.config.tie_word_embeddings:
            continue
        block = ""
        if stem.startswith("model.layers."):
            _, _, layer, stem = stem.split(".", 3)
            block = f"blk.{layer}."
        weight = tensor.float().numpy()
        if stem == "mlp.experts":
            gate_up = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}[kind]
            for part, matrices in zip(gate_up, np.split(weight, len(gate_up), axis=1), strict=True):
                stored[f"{block}ffn_{part}_exps.weight"] = (quantize(matrices, quantisation), quantisation)
            continue
        if model.config.model_type == "llama" and stem in ("self_attn.q_proj", "self_attn.k_proj"):
            weight = _interleaved(weight, model.config.head_dim)
        wanted = quantisation if weight.ndim == 2 else GGMLQuantizationType.F32
        stored[f"{block}{_GGUF_NAMES[stem]}.{kind}"] = (quantize(weight, wanted), wanted)
    return stored


def _interleaved(weight: npt.NDArray[np.float32], head: int) -> npt.NDArray[np.float32]:
    """Rows 0, 1, 2, ... and head/2, head/2 + 1, ... of every head, taken in turns."""
    order = [
        start + half * (head // 2) + row
        for start in range(0, len(weight), head)
        for row in range(head // 2)
        for half in range(2)
    ]
    return weight[order]


def write_gguf(path: Path, metadata: Mapping[str, object], tensors: Mapping[str, Stored]) -> Path:
    """Write a GGUF file.

    Args:
        path: the file.
        metadata: Python values; int becomes UINT32, float FLOAT32.
        tensors: the bytes or numbers of each, and what they are.
    """
    writer = GGUFWriter(path, str(metadata["general.architecture"]))
    for key, value in metadata.items():
        if key != "general.architecture":  # the writer has written it
            writer.add_key_value(key, value, GGUFValueType[_GGUF_TYPES[type(value)]])
    for name, (data, quantisation) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=quantisation)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _step(kind: str, **settings: object) -> dict[str, object]:
    return {"type": kind} | settings


def _split(pattern: str) -> dict[str, object]:
    return _step("Split", pattern={"Regex": pattern}, behavior="Isolated", invert=False)


def _to_bytes(*, use_regex: bool) -> dict[str, object]:
    return _step("ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=use_regex)


# How the tokenizer.json of a model with this pre-tokenizer describes it.
PRE_TOKENIZERS: dict[str, dict[str, object]] = {
    "gpt-2": {"pre_tokenizer": _to_bytes(use_regex=True)},
    "smollm": {
        "pre_tokenizer": _step(
            "Sequence", pretokenizers=[_step("Digits", individual_digits=True), _to_bytes(use_regex=True)]
        )
    },
    "llama-bpe": {
        "pre_tokenizer": _step(
            "Sequence", pretokenizers=[_split(_WORDS.replace("DIGITS", "{1,3}")), _to_bytes(use_regex=False)]
        )
    },
    "qwen2": {
        "normalizer": _step("NFC"),
        "pre_tokenizer": _step(
            "Sequence", pretokenizers=[_split(_WORDS.replace("DIGITS", "")), _to_bytes(use_regex=False)]
        ),
    },
}


def trained_bpe(pre: str, corpus: list[str]) -> tokenizers.Tokenizer:
    """A small byte-level BPE tokenizer, set up as one of PRE_TOKENIZERS.

    Args:
        pre: the name of the pre-tokenizer.
        corpus: what to learn merges from.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    backend.decoder = decoders.ByteLevel()
    described = json.loads(backend.to_str()) | PRE_TOKENIZERS[pre]
    described["model"]["ignore_merges"] = pre == "llama-bpe"
    backend = tokenizers.Tokenizer.from_str(json.dumps(described))
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=alphabet, special_tokens=specials, show_progress=False
    )
    backend.train_from_iterator(corpus, trainer)
    backend.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("«né»", normalized=False)])
    return backend


def tokenizer_metadata(backend: tokenizers.Tokenizer, pre: str) -> dict[str, object]:
    """What llama.cpp's converter says about a byte-level BPE tokenizer."""
    vocabulary = backend.get_vocab(with_added_tokens=True)
    tokens = [f"[PAD{index}]" for index in range(max(vocabulary.values()) + 1)]
    types = [5] * len(tokens)
    for token, index in vocabulary.items():
        tokens[index], types[index] = token, 1
    for index, added in backend.get_added_tokens_decoder().items():
        types[index] = 3 if added.special else 4
    merges = json.loads(backend.to_str())["model"]["merges"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
    }
