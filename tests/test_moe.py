"""Mixtures of experts on the CPU: the engine's relations on a tiny one, planted faults, ties and NaN."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType

from isobatch import LLM, SamplingParams
from isobatch.audit.relations import RELATIONS
from isobatch.bits import bits_equal
from isobatch.errors import CheckpointError, ShapeError
from isobatch.kernels.catalogue import record
from isobatch.kernels.coding import F32
from isobatch.kernels.cpu.layout import CPU
from isobatch.kernels.linear.weight import PackedStack
from isobatch.kernels.moe.cpu import choose, moe_by_expert
from isobatch.kernels.registry import Member
from isobatch.models.checkpoint import open_checkpoint
from isobatch.models.layers import MLP, SparseMLP
from isobatch.models.loading import load_decoder
from isobatch.ops import certified_ops
from tests.checkpoints import (
    gguf_metadata,
    gguf_tensors,
    tiny_model,
    tokenizer_metadata,
    trained_bpe,
    write_gguf,
)
from tests.engine_harness import MovedError, TinyCheckpoint, fixed_asks, forward
from tests.moe_world import MOE_FAULTS, TINY_MOE, moe_world
from tests.test_engine_relations import GENERAL, Relation, batched, chunked, decoded, poisoned

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("relation", [*GENERAL, poisoned])
def test_reply_depends_on_the_request_alone(relation: Relation) -> None:
    for knob in (5, 6):
        relation(moe_world(poisoned=relation is poisoned), fixed_asks(), knob)


@pytest.mark.parametrize("fault", [*MOE_FAULTS, "stock"])
@pytest.mark.parametrize("relation", [batched, chunked, decoded])
def test_control_is_caught(relation: Relation, fault: str) -> None:
    with pytest.raises(MovedError):
        relation(moe_world(fault), fixed_asks(), 5)


@pytest.mark.parametrize("fault", ["combined_by_arrival", "split_by_load"])
def test_relations_of_the_op_catch_it_too(fault: str) -> None:
    faulty = Member(fault, MOE_FAULTS[fault], CPU)
    assert RELATIONS["alone_equals_batched"](record("moe"), faulty) is not None


def test_layers_are_sparse_where_the_configuration_says() -> None:
    assert [type(layer.mlp) for layer in moe_world().decoder.layers] == [SparseMLP, MLP]


def test_ties_go_to_the_lowest_expert() -> None:
    chosen, weights = choose(torch.tensor([[1.0, 2, 2, 1, 2, 0], [0.0] * 6]), 3, renormalise=True)
    assert chosen.tolist() == [[1, 2, 4], [0, 1, 2]]
    assert bits_equal(weights, torch.full((2, 3), 1.0) / 3)
    chosen, _ = choose(torch.tensor([[1.0, 2, 2, 1, 2, 0]]), 2, renormalise=True)
    assert chosen.tolist() == [[1, 2]]


def test_weights_are_shares_of_all_or_of_the_chosen() -> None:
    logits = torch.tensor([[0.5, -1, 3, 2, 0, -0.5]])
    shares = torch.softmax(logits.double(), -1)[:, [2, 3]]
    for renormalise, expected in ((False, shares), (True, shares / shares.sum())):
        chosen, weights = choose(logits, 2, renormalise=renormalise)
        assert chosen.tolist() == [[2, 3]]
        assert float((weights - expected).abs().max()) < 1e-7


@pytest.mark.parametrize("row", [[NAN] * 6, [NAN, 1, NAN, 2, NAN, NAN], [1, INF, 2, NAN, 0, 0], [-INF] * 6])
def test_logits_that_are_no_numbers_choose_each_expert_once(row: list[float]) -> None:
    for renormalise in (True, False):
        chosen, weights = choose(torch.tensor([row, [1.0, 2, 3, 4, 5, 6]]), 3, renormalise=renormalise)
        assert len(set(chosen[0].tolist())) == 3
        assert set(chosen[0].tolist()) <= set(range(6))
        assert bool(weights[0].isnan().any())
        assert chosen[1].tolist() == [3, 4, 5]
        assert not bool(weights[1].isnan().any())


def test_nan_in_an_expert_reaches_its_own_tokens_only() -> None:
    class Checkpoint(TinyCheckpoint):
        def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
            rows = super().read(name).clone()
            if name == "model.layers.0.mlp.experts.4.down_proj.weight":
                rows[3] = NAN
            return rows[start:stop]

    chosen: list[torch.Tensor] = []
    clean = moe_world().decoder

    def watch(op: str, arguments: Any, _result: Any) -> None:
        if op == "moe":
            experts = arguments["experts"]
            logits = certified_ops().linear(arguments["x"], experts.router)
            chosen.append(choose(logits, experts.active, renormalise=True)[0])

    with clean.ops.observed(watch):
        sequences = [[token] for token in range(6, 40)]
        want = forward(clean, *sequences)
    got = forward(load_decoder(Checkpoint(config=TINY_MOE), certified_ops()), *sequences)
    served = (chosen[0] == 4).any(1).tolist()
    assert 0 < sum(served) < len(served)
    for mine, spoilt, fine in zip(served, got, want, strict=True):
        assert bool(spoilt.isnan().all()) if mine else bits_equal(spoilt, fine)


def test_wrong_arguments_are_refused_by_name() -> None:
    ops = certified_ops()
    mlp = moe_world().decoder.layers[0].mlp
    assert isinstance(mlp, SparseMLP)
    with pytest.raises(ShapeError, match=r"moe: wrong shape of x; expected \[any, 128\]"):
        ops.moe(torch.zeros(2, 63), mlp.experts)
    assert ops.moe(torch.zeros(0, 128), mlp.experts).shape == (0, 128)


def test_experts_stay_coded_as_they_are_stored(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe")
    file = write_gguf(
        tmp_path / "m.gguf", gguf_metadata(model.config), gguf_tensors(model, GGMLQuantizationType.Q8_0)
    )
    ours = load_decoder(open_checkpoint(file), certified_ops())
    mlp = ours.layers[0].mlp
    assert isinstance(mlp, SparseMLP)
    for stack in (mlp.experts.gate_up, mlp.experts.down):
        assert isinstance(stack, PackedStack)
        assert {weight.coding.bits for weight in stack.weights} == {8}
    (logits,) = forward(ours, [1, 2, 3])
    assert bool(logits.isfinite().all())


@pytest.mark.parametrize("kernels", ["isobatch", "stock"])
def test_model_in_a_gguf_file_answers(kernels: Any, tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe", vocab_size=448)
    backend = trained_bpe("qwen2", ["the quick brown fox " * 9])
    metadata = gguf_metadata(model.config) | tokenizer_metadata(backend, "qwen2")
    file = write_gguf(tmp_path / "m.gguf", metadata, gguf_tensors(model))
    llm = LLM(file, kv_cache_bytes=1 << 20, kernels=kernels, progress=False)
    (reply,) = llm.generate("the quick", SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))
    assert len(reply.completions[0].token_ids) == 2


def test_dense_layers_of_a_gguf_file_are_missed_by_name(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe", mlp_only_layers=[1])
    with pytest.raises(CheckpointError, match=r"missing: model.layers.1.mlp.gate.weight"):
        LLM(write_gguf(tmp_path / "m.gguf", gguf_metadata(model.config), gguf_tensors(model)))


def test_experts_without_tokens_are_left_alone() -> None:
    """An expert that nobody chose is not run: NaN in it reaches nobody."""
    case: Any = record("moe").draw("moe/one", 1, "shares of the chosen")
    experts = case.shared["experts"].laid_out(CPU)
    x = case.per_row["x"]
    chosen, _ = choose(certified_ops().linear(x, experts.router), experts.active, renormalise=True)
    want = moe_by_expert(x, experts)
    assert all(weight.coding == F32 for weight in experts.down.weights)
    for e, weight in enumerate(experts.down.weights):
        if e not in chosen[0].tolist():
            weight.codes[:] = 255  # NaN, in every float format
    assert bits_equal(moe_by_expert(x, experts), want)
