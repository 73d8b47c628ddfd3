"""Which ops the settings ask for, whether the model fits on their device, and what replies will depend on."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import torch

from isobatch.config import EngineConfig
from isobatch.engine.memory import available_bytes, require, weight_bytes
from isobatch.engine.tokenizer import load_tokenizer
from isobatch.errors import MissingDependencyError
from isobatch.models.checkpoint import Checkpoint, open_checkpoint
from isobatch.models.config import ModelConfig
from isobatch.models.loading import coded_bytes
from isobatch.models.weights_digest import weights_digest
from isobatch.ops import Ops, certified_ops, stock_ops
from isobatch.ops.fingerprint import Identity, numerics_class


def make_ops(config: EngineConfig, model: ModelConfig) -> Ops:
    """The ops that a model will run on.

    Raises:
        MissingDependencyError: a GPU is asked for, and Triton is not installed.
        UnsupportedOpError: a GPU is asked for, and there is none that will do.
        FloatEnvironmentError: this process computes otherwise than IEEE 754 says.
    """
    if config.device == "cuda":
        heads = (model.num_heads, model.num_kv_heads, model.head_size)
        ops: Ops = _gpu().GpuOps(_dtype(config), heads)
        return ops
    return certified_ops() if config.kernels == "isobatch" else stock_ops()


def require_memory(config: EngineConfig, checkpoint: Checkpoint) -> None:
    """Asks whether weights and KV cache fit, before either is allocated.

    Raises:
        OutOfMemoryError: they do not.
    """
    model = checkpoint.config
    if config.device == "cuda":
        device = _gpu().device()
        available = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_bytes()
        require(weight_bytes(model, config.number_bytes), config.kv_cache_bytes, available)
    else:
        weights = coded_bytes(checkpoint) if config.kernels == "isobatch" else weight_bytes(model)
        require(weights, config.kv_cache_bytes, available_bytes())


def identity(config: EngineConfig, weights: str, tokenizer: str) -> Identity | None:
    """What replies will depend on besides their requests; None with stock kernels, which promise nothing.

    Args:
        config: names the numerics class.
        weights: their digest.
        tokenizer: its digest.
    """
    if config.kernels == "stock":
        return None
    name = _gpu().gpu_numerics_class(_dtype(config)) if config.device == "cuda" else numerics_class()
    return Identity(name, weights, tokenizer)


def identity_of(model: str | Path, config: EngineConfig) -> Identity | None:
    """The identity that `LLM` would have, from the files alone: nothing is loaded or computed with.

    Raises:
        ModelError: the model cannot be used.
    """
    checkpoint = open_checkpoint(model)
    try:
        tokenizer = load_tokenizer(checkpoint.path, checkpoint.config)
        return identity(config, weights_digest(checkpoint), tokenizer.digest)
    finally:
        checkpoint.close()


def _dtype(config: EngineConfig) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, config.number_format)
    return dtype


def _gpu() -> ModuleType:
    try:
        from isobatch.ops import gpu
    except ImportError as error:
        raise MissingDependencyError("Triton is not installed", fix="pip install isobatch[gpu]") from error
    return gpu
