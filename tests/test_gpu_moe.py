"""Mixtures of experts on the GPU's kernels: on a GPU where there is one, else under Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from isobatch import SamplingParams
from isobatch.audit.gpu_relations import GPU_RELATIONS
from isobatch.bits import bits_equal
from isobatch.engine.output import Reply
from isobatch.errors import UnsupportedOpError
from isobatch.kernels.gpu.catalogue import GPU_RECORDS
from isobatch.kernels.gpu.data import SHORT
from isobatch.kernels.gpu.device import device
from isobatch.kernels.moe.gpu_record import case
from isobatch.kernels.moe.routing import Routing, route, router_logits
from isobatch.kernels.moe.triton import CANONICAL, GpuExperts, combine, grouped
from isobatch.kernels.stock import DenseStack, DenseWeight
from isobatch.models.decoder import Decoder
from isobatch.models.layers import SparseMLP
from isobatch.models.loading import load_decoder
from isobatch.ops.gpu import GpuOps
from tests.engine_harness import Ask, TinyCheckpoint, drive, expect_same, stream
from tests.moe_world import TINY_MOE, moe_world
from tests.test_gpu_engine import DTYPE, engine

# Stale memory is NaN, and NumPy, which interprets, says so where it is masked.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")

_PROMPTS: tuple[tuple[int, int, dict[str, Any]], ...] = (
    (0, 5, {"temperature": 0}),
    (1, 18, {"temperature": 1, "seed": 3}),
)
ASKS = tuple(
    Ask(stream(number)[:length], SamplingParams(max_tokens=2, ignore_eos=True, logprobs=3, **how))
    for number, length, how in _PROMPTS
)
LOADS: dict[str, dict[str, Any]] = {
    "batched": {},
    "chunked": {"max_batch_tokens": 7},
    "chaotic": {"policy": "chaos:5", "max_batch_tokens": 16},
}


@cache
def decoder() -> Decoder:
    heads = (TINY_MOE.num_heads, TINY_MOE.num_kv_heads, TINY_MOE.head_size)
    return load_decoder(TinyCheckpoint(config=TINY_MOE), GpuOps(DTYPE, heads))


@cache
def alone(ask: Ask) -> Reply:
    (reply,) = drive(engine(model=decoder(), prefix_cache=False), [ask])
    assert reply is not None
    return reply


@pytest.mark.parametrize("load", LOADS)
def test_reply_depends_on_the_request_alone(load: str) -> None:
    for ask, reply in zip(ASKS, drive(engine(model=decoder(), **LOADS[load]), ASKS), strict=True):
        expect_same(reply, alone(ask), load)


def combined_by_arrival(x: torch.Tensor, experts: GpuExperts) -> torch.Tensor:
    """Experts with few tokens are done first, and what is done first is added first."""
    routing = route(router_logits(x, experts.router.dense), experts.active, CANONICAL.rows)
    ends = routing.ends[: experts.router.outputs].long()
    expert = torch.searchsorted(ends, routing.rows.long(), right=True)
    order = (ends.diff(prepend=ends.new_zeros(1))[expert] * len(ends) + expert).argsort(1)
    y = grouped(x, experts, routing, CANONICAL, CANONICAL)
    moved = replace(routing, weights=routing.weights.gather(1, order), rows=routing.rows.gather(1, order))
    return combine(y, moved)


def test_control_experts_added_by_arrival_are_caught() -> None:
    """On results that cancel, all but a little: elsewhere 16 bits hide most orders of three."""
    drawn = case("arrival", 40, "plain", DTYPE)
    experts: GpuExperts = drawn.shared["experts"]
    first, gate_up = experts.down.dense[:1] * 8, experts.gate_up.dense[:1] * 16
    signs = torch.tensor([1, -1, 2.0**-10], device=device()).repeat(len(experts.down.dense) // 3)
    cancelling = replace(
        experts,
        router=DenseWeight(experts.router.dense / 2**6),
        gate_up=DenseStack(gate_up.expand_as(experts.gate_up.dense).contiguous()),
        down=DenseStack((first * signs[:, None, None]).to(DTYPE)),
    )
    x, serve = drawn.per_row["x"], GPU_RECORDS["moe"].member(GPU_RECORDS["moe"].production).function
    assert bits_equal(combined_by_arrival(x[:1], cancelling), serve(x[:1], cancelling))
    assert not bits_equal(combined_by_arrival(x, cancelling), serve(x, cancelling))


def test_log_probabilities_are_nearly_those_of_float32() -> None:
    ask = ASKS[0]
    (want,) = drive(moe_world().engine(), [ask])
    assert want is not None
    ours, theirs = (r.completions[0].log_probs for r in (alone(ask), want))
    assert ours is not None
    assert theirs is not None
    assert abs(ours[0].top[0][1] - theirs[0].top[0][1]) < 0.05


def test_experts_lie_side_by_side_as_they_were_stored() -> None:
    mlp = decoder().layers[0].mlp
    assert isinstance(mlp, SparseMLP)
    stacks = {"gate_up": mlp.experts.gate_up, "down": mlp.experts.down}
    checkpoint = TinyCheckpoint(config=TINY_MOE)
    for expert in range(6):
        gate, up, down = (
            checkpoint.read(f"model.layers.0.mlp.experts.{expert}.{part}_proj.weight")
            for part in ("gate", "up", "down")
        )
        for name, matrix in (("gate_up", torch.cat((gate, up))), ("down", down)):
            stack = stacks[name]
            assert isinstance(stack, DenseStack)
            assert bits_equal(stack.dense[expert].cpu(), matrix.to(DTYPE))


def test_width_without_a_kernel_is_refused() -> None:
    config = replace(TINY_MOE, hidden_size=72)
    with pytest.raises(UnsupportedOpError, match="experts of this width; expected a multiple of"):
        load_decoder(TinyCheckpoint(config=config), GpuOps(DTYPE, (6, 2, 16)))


def _experts_of(routing: Routing, experts: int) -> list[list[int]]:
    ends = routing.ends[:experts].long()
    return torch.searchsorted(ends, routing.rows.long(), right=True).tolist()


@pytest.mark.parametrize("renormalise", [True, False])
def test_ties_go_to_the_lowest_expert_and_weights_are_shares(renormalise: bool) -> None:
    rows = [[1.0, 2, 2, 1, 2, 0], [0.0] * 6, [0.5, -1, 3, 2, 0, 1], [float("nan"), 1, 2, float("nan"), 0, 0]]
    logits = torch.tensor(rows, device=device())
    routing = route(logits, 3, 16, renormalise=renormalise)
    chosen = _experts_of(routing, 6)
    assert chosen == [[1, 2, 4], [0, 1, 2], [2, 3, 5], [0, 2, 3]]
    shares = torch.softmax(logits[:3].double(), -1).gather(1, torch.tensor(chosen[:3], device=device()))
    if renormalise:
        shares = shares / shares.sum(1, keepdim=True)
    assert float((routing.weights[:3] - shares).abs().max()) < 1e-6
    assert bool(routing.weights[3].isnan().any())
    alone_ = route(logits[2:3], 3, 16, renormalise=renormalise)
    assert bits_equal(alone_.weights[0], routing.weights[2])


def test_shares_of_all_experts_keep_the_relations() -> None:
    record, short = GPU_RECORDS["moe"], SHORT[DTYPE]
    shares = replace(
        record,
        variants=(f"shares of all/{short}",),
        thresholds=(4,),
        draw=lambda name, rows, _variant: case(name, rows, "mirrored", DTYPE, renormalise=False),
    )
    for relation in ("alone_equals_batched", "position_is_free"):
        violation = GPU_RELATIONS[relation](shares, record.member(record.production))
        assert violation is None, str(violation)
