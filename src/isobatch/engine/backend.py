"""Which ops the settings ask for, whether the model fits on their device, and what replies will depend on."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import torch

from isobatch.config import EngineConfig
from isobatch.engine.memory import available_bytes, cache_room, require, step_room, weight_bytes
from isobatch.engine.tokenizer import Tokenizer, load_tokenizer
from isobatch.errors import MissingDependencyError, OutOfMemoryError
from isobatch.kernels.cpu.random_weights import random_weights
from isobatch.models.checkpoint import Checkpoint, open_checkpoint
from isobatch.models.config import ModelConfig
from isobatch.models.loading import coded_bytes
from isobatch.models.random_weights import RandomCheckpoint, random_config
from isobatch.models.weights_digest import Witness, weights_digest
from isobatch.ops import Ops, certified_ops, stock_ops
from isobatch.ops.fingerprint import NO_TOKENIZER, Identity, numerics_class


def open_model(model: str | Path, config: EngineConfig) -> Checkpoint:
    """The weights that the settings ask for: those of a checkpoint, or random ones.

    Raises:
        ModelError: the model cannot be used.
        ConfigError: random weights for an unknown model, or for more layers than it has.
        MissingDependencyError, UnsupportedOpError: as `make_ops`.
    """
    if config.load == "checkpoint":
        return open_checkpoint(model)
    numbers = _gpu().random_weights if config.device == "cuda" else random_weights
    return RandomCheckpoint(random_config(model, config.layers), config.weights_seed, numbers, Path(model))


def make_ops(config: EngineConfig, model: ModelConfig) -> Ops:
    """The ops that a model will run on.

    Raises:
        MissingDependencyError: a GPU is asked for, and Triton is not installed.
        UnsupportedOpError: a GPU is asked for, and there is none that will do.
        FloatEnvironmentError: this process computes otherwise than IEEE 754 says.
    """
    if config.device == "cuda":
        heads = (model.num_heads, model.num_kv_heads, model.head_size)
        gpu, dtype = _gpu(), _dtype(config)
        ops: Ops = gpu.StockGpuOps(dtype) if config.kernels == "stock" else gpu.GpuOps(dtype, heads)
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
        require(weight_bytes(model, config.number_bytes), config.cache_bytes, available)
    else:
        weights = coded_bytes(checkpoint) if config.kernels == "isobatch" else weight_bytes(model)
        require(weights, config.cache_bytes, available_bytes())


def sized(config: EngineConfig, model: ModelConfig) -> EngineConfig:
    """The settings, with steps and a KV cache as a GPU has room for them where they do not say how large.

    Raises:
        OutOfMemoryError: the weights and a step leave nothing.
        MissingDependencyError, UnsupportedOpError: as `make_ops`.
    """
    if config.device != "cuda" or None not in (config.kv_cache_bytes, config.max_batch_tokens):
        return config
    device = _gpu().device()
    if device.type != "cuda":  # the interpreter's
        return config
    free = torch.cuda.mem_get_info(device)[0]
    if config.max_batch_tokens is None:
        config = replace(config, max_batch_tokens=step_room(model, config, free))
    if config.kv_cache_bytes is None:
        config = replace(config, kv_cache_bytes=cache_room(model, config, free))
    return config


def fitted(config: EngineConfig, checkpoint: Checkpoint) -> EngineConfig:
    """The settings as `sized` makes them, for a model that fits with them.

    Raises:
        OutOfMemoryError: as `sized` and `require_memory`, with advice on how many layers of a model with
            random weights would fit.
    """

    def fit(weights: Checkpoint) -> EngineConfig:
        found = sized(config, weights.config)
        require_memory(found, weights)
        return found

    try:
        return fit(checkpoint)
    except OutOfMemoryError as error:
        if not isinstance(checkpoint, RandomCheckpoint):
            raise

        def too_large(layers: int) -> bool:
            try:
                fit(checkpoint.first_layers(layers))
            except OutOfMemoryError:
                return True
            return False

        most = bisect_left(range(1, checkpoint.config.num_layers), True, key=too_large)
        if not most:
            raise
        fix = f"layers={most} would fit"
        raise OutOfMemoryError(error.what, expected=error.expected, got=error.got, fix=fix) from error


def open_tokenizer(checkpoint: Checkpoint) -> Tokenizer | None:
    """The model's tokenizer; None for random weights, which have none.

    Raises:
        TokenizerError: as `load_tokenizer`.
    """
    if isinstance(checkpoint, RandomCheckpoint):
        return None
    return load_tokenizer(checkpoint.path, checkpoint.config)


def watched(checkpoint: Checkpoint) -> Witness | RandomCheckpoint:
    """The weights, able to say their digest once they are loaded."""
    return checkpoint if isinstance(checkpoint, RandomCheckpoint) else Witness(checkpoint)


def identity(config: EngineConfig, weights: str, tokenizer: Tokenizer | None) -> Identity | None:
    """What replies will depend on besides their requests; None with stock kernels, which promise nothing.

    Args:
        config: names the numerics class.
        weights: their digest.
        tokenizer: the model's, or None.
    """
    if config.kernels == "stock":
        return None
    name = _gpu().gpu_numerics_class(_dtype(config)) if config.device == "cuda" else numerics_class()
    return Identity(name, weights, NO_TOKENIZER if tokenizer is None else tokenizer.digest)


def identity_of(model: str | Path, config: EngineConfig) -> Identity | None:
    """The identity that `LLM` would have, from the files alone: nothing is loaded or computed with.

    Raises:
        ModelError: the model cannot be used.
    """
    checkpoint = open_model(model, config)
    try:
        weights = (
            checkpoint.digest() if isinstance(checkpoint, RandomCheckpoint) else weights_digest(checkpoint)
        )
        return identity(config, weights, open_tokenizer(checkpoint))
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
