"""The least time that work can take: bytes at the bandwidth of a copy, operations at the peak rate."""

from __future__ import annotations

import math
from collections.abc import Sequence

from isobatch.engine.memory import block_bytes
from isobatch.kernels.layout import PAGE
from isobatch.models.checkpoint import EMBEDDING, expected_tensors
from isobatch.models.config import ModelConfig


def step_floor(config: ModelConfig, rows: int, keys: int, limits: dict[str, float]) -> tuple[float, float]:
    """Seconds that a decode step's bytes take at least, and its operations.

    Args:
        config: the model, its numbers two bytes each.
        rows: tokens computed, each of which samples.
        keys: that all of them see together.
        limits: bytes_per_s and flop_per_s of the device.
    """
    numbers = weights_of_a_token(config)
    moved = 2 * numbers + keys * (block_bytes(config, 2) // PAGE)
    computed = 2 * rows * numbers + keys * _operations_per_key(config)
    return moved / limits["bytes_per_s"], computed / limits["flop_per_s"]


def prompts_floor(config: ModelConfig, prompts: Sequence[int], limits: dict[str, float]) -> float:
    """Seconds that prompts take at least, all together: weights are read once, and of the last layer a token
    that does not sample needs only keys and values.

    Args:
        config: as of `step_floor`.
        prompts: their lengths.
        limits: as of `step_floor`.
    """
    numbers, tokens = weights_of_a_token(config), sum(prompts)
    projection = config.vocab_size * config.hidden_size
    in_layers, layers = numbers - projection, config.num_layers
    stored = 2 * config.num_kv_heads * config.head_size * config.hidden_size
    skipped = (tokens - len(prompts)) * (in_layers / layers - stored)
    computed = 2 * (tokens * in_layers + len(prompts) * projection - skipped)
    pairs = sum(n * (n + 1) // 2 for n in prompts) * (layers - 1) / layers + tokens / layers
    computed += pairs * _operations_per_key(config)
    return max(2 * numbers / limits["bytes_per_s"], computed / limits["flop_per_s"])


def weights_of_a_token(config: ModelConfig) -> float:
    """How many weights a token is multiplied with: not the embedding's, and of experts the active ones."""
    total = 0.0
    for name, shape in expected_tensors(config).items():
        if name == EMBEDDING and not config.tie_embeddings:
            continue
        of_one_token = config.moe.active / config.moe.experts if config.moe and ".experts." in name else 1
        total += math.prod(shape) * of_one_token
    return total


def _operations_per_key(config: ModelConfig) -> int:
    """A score and a weighted value, over all layers and heads."""
    return 4 * config.num_layers * config.num_heads * config.head_size
