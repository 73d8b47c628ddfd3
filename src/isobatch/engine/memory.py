"""Whether something fits in memory, asked before it is allocated: Linux would say yes and kill later."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from isobatch.config import EngineConfig
from isobatch.errors import ConfigError, OutOfMemoryError
from isobatch.kernels.layout import PAGE
from isobatch.kernels.stock import GPU_PAGE
from isobatch.models.checkpoint import expected_tensors
from isobatch.models.config import ModelConfig

_FLOAT_BYTES = 4
_MOST_STEP_TOKENS = 8192


def available_bytes(
    meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")
) -> int | None:
    """Memory that can still be had, in bytes.

    Returns:
        The least of what the kernel calls available and what a control group leaves; None if neither says.
    """
    found = []
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        if "MemAvailable" in fields:
            found.append(int(fields["MemAvailable"].split()[0]) * 1024)
    limit, used = cgroup / "memory.max", cgroup / "memory.current"
    if limit.exists() and used.exists() and (most := limit.read_text().strip()) != "max":
        found.append(max(0, int(most) - int(used.read_text())))
    return min(found, default=None)


def weight_bytes(config: ModelConfig, number_bytes: int = _FLOAT_BYTES) -> int:
    """Bytes of a model's weights as plain numbers of a size, however they are stored."""
    return sum(math.prod(shape) for shape in expected_tensors(config).values()) * number_bytes


def page_tokens(config: EngineConfig) -> int:
    """Tokens in a KV block: of torch's attention on a GPU as many as its tile has, else ours."""
    return GPU_PAGE if config.kernels == "stock" and config.device == "cuda" else PAGE


def block_bytes(config: ModelConfig, number_bytes: int = _FLOAT_BYTES, page: int = PAGE) -> int:
    """Bytes of one KV block of `page` tokens, over all layers, keys and values."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_size * page * number_bytes


def kv_blocks(
    config: ModelConfig, kv_cache_bytes: int, number_bytes: int = _FLOAT_BYTES, page: int = PAGE
) -> int:
    """How many KV blocks an amount of memory holds.

    Raises:
        ConfigError: not even one.
    """
    each = block_bytes(config, number_bytes, page)
    blocks = kv_cache_bytes // each
    if blocks < 1:
        raise ConfigError(
            "the KV cache is too small for a single block",
            expected=f"at least {each} bytes: 2 (k and v) x "
            f"{config.num_layers} layers x {config.num_kv_heads} heads x {config.head_size} x {page} tokens "
            f"x {number_bytes} bytes",
            got=f"kv_cache_bytes={kv_cache_bytes}",
            fix="raise kv_cache_bytes",
        )
    return blocks


def step_bytes(model: ModelConfig, config: EngineConfig) -> int:
    """Bytes of the largest step's own tensors: activations of a layer, and logits with what sampling makes.

    An estimate from above: a tensor that is freed before the next is made is counted all the same. Prompts
    that attention pads to a common length (`kernels/attention/padded.py`) take up to 2.25 times their room.
    """
    heads = (model.num_heads + 2 * model.num_kv_heads) * model.head_size
    inner, copies = model.intermediate_size, 1
    if model.moe is not None:
        inner, copies = model.moe.inner, model.moe.active
    row = 4 * model.hidden_size + 9 * heads + copies * (3 * inner + 2 * model.hidden_size)
    logits = 2 * max(config.step_tokens, config.max_batch_sequences) * model.vocab_size * _FLOAT_BYTES
    return config.step_tokens * row * config.number_bytes + logits


def step_room(model: ModelConfig, config: EngineConfig, free: int) -> int:
    """The most tokens of a step that a device has room for, where the settings do not say how many.

    Args:
        model: whose weights are not loaded yet.
        config: with the size of the KV cache, or None for what is left.
        free: bytes of the device.

    Returns:
        8,192, with which `isobatch bench serve` measures, halved until a step takes an eighth of what is left
        at most; but not fewer than without a look at the device.
    """
    left = free - weight_bytes(model, config.number_bytes) - (config.kv_cache_bytes or 0)
    tokens = _MOST_STEP_TOKENS
    while (
        tokens > config.step_tokens and 8 * step_bytes(model, replace(config, max_batch_tokens=tokens)) > left
    ):
        tokens = max(tokens // 2, config.step_tokens)
    return tokens


def cache_room(model: ModelConfig, config: EngineConfig, free: int) -> int:
    """Bytes that a KV cache may have on a device.

    Args:
        model: whose weights are not loaded yet.
        config: how large steps may be.
        free: bytes of the device.

    Returns:
        What is left, less a twentieth and 1 GiB for recorded graphs and for what allocators cut off.

    Raises:
        OutOfMemoryError: not even one block.
    """
    weights, step = weight_bytes(model, config.number_bytes), step_bytes(model, config)
    kept = free // 20 + (1 << 30)
    left = free - weights - step - kept
    if left < block_bytes(model, config.number_bytes, page_tokens(config)):
        raise OutOfMemoryError(
            "not enough memory for the model",
            expected=f"{weights:,} bytes of weights + {step:,} of a step + {kept:,} kept, and a KV cache",
            got=f"{free:,} free",
            fix="lower max_batch_tokens or max_batch_sequences, free memory, or use a smaller model",
        )
    return left


def require(weights: int, kv_cache_bytes: int, available: int | None) -> None:
    """Checks that weights and KV cache fit.

    Args:
        weights: bytes of the weights as they will lie in memory.
        kv_cache_bytes: of the KV cache.
        available: as `available_bytes` says.

    Raises:
        OutOfMemoryError: they do not; says by how much.
    """
    if available is not None and weights + kv_cache_bytes > available:
        raise OutOfMemoryError(
            "not enough memory for the model",
            expected=f"{weights:,} bytes of weights + {kv_cache_bytes:,} of KV cache "
            f"= {weights + kv_cache_bytes:,}",
            got=f"{available:,} available",
            fix="lower kv_cache_bytes, free memory, or use a smaller model",
        )
