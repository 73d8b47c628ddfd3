"""The decoder: Llama, Qwen2, Qwen3 and Qwen3-MoE differ only in which parts of a layer are there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch

from isobatch.kernels.layout import Cache, Weight
from isobatch.models.config import ModelConfig
from isobatch.models.inputs import Batch
from isobatch.models.layers import Layer, Norm, Rotary
from isobatch.ops import Ops


@dataclass(frozen=True, slots=True)
class Decoder:
    """A model, ready to run.

    Args:
        config: what it is.
        ops: what it computes with.
        embedding: [V, hidden].
        layers: first to last.
        final_norm: before the output projection.
        output: [V, hidden]; the embedding itself where the two are tied.
        rotary: angles of every position.
    """

    config: ModelConfig
    ops: Ops
    embedding: Weight
    layers: tuple[Layer, ...]
    final_norm: Norm
    output: Weight
    rotary: Rotary

    def kv_caches(self, blocks: int) -> list[Cache]:
        """Empty caches, one per layer, of `blocks` blocks of the ops' page."""
        return [
            self.ops.kv_cache(blocks, self.config.num_kv_heads, self.config.head_size) for _ in self.layers
        ]

    def prepare(self, tokens: int, samples: int) -> None:
        """Has the kernels that are certified on each machine certified, before there is anyone who waits.

        Args:
            tokens: the most of a step.
            samples: the most rows of a step whose next tokens are wanted.
        """
        self.ops.prepare(chain.from_iterable(layer.products for layer in self.layers), tokens)
        self.ops.prepare([(self.output, False)], samples, logits=True)

    def __call__(self, batch: Batch, caches: Sequence[Cache]) -> torch.Tensor:
        """Runs one step.

        Args:
            batch: the tokens; their keys and values are stored in the caches.
            caches: one per layer.

        Returns:
            Next-token logits, float32 [S, V], for the rows that were asked for.

        Determinism:
            Each row of logits depends on the weights and on its own request's tokens up to its position.
        """
        return self.logits(self.hidden(batch, caches))

    def hidden(self, batch: Batch, caches: Sequence[Cache]) -> torch.Tensor:
        """All but the output projection: [S, hidden], normed, for the rows that were asked for."""
        ops = self.ops
        x, residual = ops.embedding(batch.token_ids, self.embedding), None
        for layer, cache in zip(self.layers, caches, strict=True):
            # Of the last layer all keys and values are kept, but only rows that sample go further.
            wanted = batch.logit_rows if layer is self.layers[-1] else None
            norm = layer.attention_norm
            x, residual = ops.rms_norm(x, norm.weight, norm.eps, residual)
            x = layer.attention(ops, x, batch, cache, self.rotary, wanted)
            if not len(x):  # the middle of a prompt: nothing samples
                return x
            residual = residual if wanted is None else residual[wanted]
            norm = layer.mlp_norm
            x, residual = ops.rms_norm(x, norm.weight, norm.eps, residual)
            x = layer.mlp(ops, x)
        x, _ = ops.rms_norm(x, self.final_norm.weight, self.final_norm.eps, residual)
        return x

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The output projection of what `hidden` gave: float32 [S, V]."""
        return self.ops.logits(hidden, self.output)
