"""The mixture of experts, router to combination, against the same block on torch's grouped product."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from isobatch.bits import bits_equal
from isobatch.cli.drawn import drawn
from isobatch.cli.goals import Goal, Point, at_most, geometric_mean
from isobatch.errors import IntegrityError
from isobatch.kernels.gpu.timing import microseconds
from isobatch.kernels.moe import stock
from isobatch.kernels.moe.experts import Experts
from isobatch.kernels.moe.routing import router_logits
from isobatch.kernels.moe.triton import GpuExperts, moe
from isobatch.kernels.stock import DenseStack, DenseWeight
from isobatch.models.presets import preset

_MODELS = ("qwen3-30b-a3b", "qwen3-235b-a22b")
_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_COPIES = 3  # a layer's experts are gigabytes: three layers are as cold as a model


_drawn = partial(drawn, scale=1 / 8)


def _layer(model: str, copy: int) -> GpuExperts:
    d = preset(model)
    return Experts(
        DenseWeight(_drawn(f"router/{copy}", d.experts, d.hidden)),
        DenseStack(_drawn(f"gate_up/{copy}", d.experts, 2 * d.inner, d.hidden)),
        DenseStack(_drawn(f"down/{copy}", d.experts, d.hidden, d.inner)),
        d.active_experts,
    )


def moe_points(limits: dict[str, float], progress: Callable[[str], None]) -> Iterator[Point]:
    """Both models at every number of tokens.

    Args:
        limits: bytes_per_s and flop_per_s of the device.
        progress: told each model.

    Raises:
        IntegrityError: a token alone differs from the token in the batch.
    """
    for model in _MODELS:
        progress(f"mixture of experts, {model}")
        yield from _model_points(model, limits)


def _model_points(model: str, limits: dict[str, float]) -> Iterator[Point]:
    d = preset(model)
    layers = [_layer(model, copy) for copy in range(_COPIES)]
    batches = [_drawn(f"x/{copy}", _TOKENS[-1], d.hidden) for copy in range(_COPIES)]
    alone = moe(batches[0][:1], layers[0])
    for tokens in _TOKENS:
        if not bits_equal(moe(batches[0][:tokens], layers[0])[:1], alone):
            raise IntegrityError(f"{model}: a token alone differs from the token among {tokens}")
        ours, theirs = microseconds(
            [
                lambda i, n=tokens: moe(batches[i][:n], layers[i]),  # type: ignore[misc]
                lambda i, n=tokens: stock.moe(batches[i][:n], layers[i]),  # type: ignore[misc]
            ],
            _COPIES,
        )
        logits = router_logits(batches[0][:tokens], layers[0].router.dense)
        used = len(torch.unique(torch.topk(logits, d.active_experts).indices))
        moved = used * 3 * d.hidden * d.inner * 2
        operations = 6 * tokens * d.active_experts * d.hidden * d.inner
        yield {
            "op": "moe",
            "shape": model,
            "rows": tokens,
            "isobatch_us": ours,
            "torch_us": theirs,
            "ratio": ours / theirs,
            "floor_us": max(moved / limits["bytes_per_s"], operations / limits["flop_per_s"]) * 1e6,
        }


def moe_summary(points: list[Point]) -> list[Goal]:
    """The goals, and whether they are met."""
    ratios = [point["ratio"] for point in points]
    return [
        at_most("mixture of experts: geometric mean of time against torch", geometric_mean(ratios), 0.85),
        at_most("mixture of experts: worst point against torch", max(ratios), 1.0),
    ]
