"""The bench of whole workloads, run through on a tiny model: its times are not asked for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from isobatch.cli import bench_serve, main
from isobatch.cli.workloads import Workload
from isobatch.engine.engine import Engine
from isobatch.engine.runner import Runner
from isobatch.errors import IntegrityError
from isobatch.kernels.gpu.device import INTERPRETED
from tests.engine_harness import tiny_world

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="`isobatch bench serve` does this on a GPU")

LIMITS = {"bytes_per_s": 1e9, "flop_per_s": 1e12}
SMALL = (Workload(3, (5, 9), (2, 4), goal=1e9), Workload(2, (20, 20), (3, 3), rate=1e12))


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    monkeypatch.setattr(bench_serve, "WORKLOADS", SMALL)
    monkeypatch.setattr(bench_serve, "ceilings", lambda: LIMITS)
    monkeypatch.setattr(bench_serve, "GATE", Workload(4, (5, 40), (2, 4)))
    monkeypatch.setattr(bench_serve, "_GATE_TOKENS", 4)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return replace(tiny_world(), blocks=512).engine(prefix_cache=False)


def test_every_workload_is_served_whole(engine: Engine) -> None:
    assert bench_serve.gate(engine) == []
    report = bench_serve.measure(engine, lambda _what: None)
    asks = SMALL[0].asks(engine.decoder.config.vocab_size)
    assert [len(prompt) for prompt, _ in asks] == [len(p) for p, _ in SMALL[0].asks(50)]
    new = sum(params.max_tokens for _, params in asks)
    point = report["points"][0]
    assert point["tokens_per_s"] * point["seconds"] == pytest.approx(new)
    assert [goal["met"] for goal in report["goals"]] == [True, False]
    assert point["floor_s"] > 0


def test_replies_that_follow_the_load_are_found(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = Runner.launch

    def by_load(self: Any, step: Any, before: Any = None) -> Any:
        flight = launch(self, step, before)
        many = len(step.chunks) > 1

        def results() -> Any:
            found = flight.results()
            return [replace(r, token=(r.token + 1) % 7) if many and r.row.samples else r for r in found]

        return replace(flight, results=results)

    monkeypatch.setattr(Runner, "launch", by_load)
    assert "copies differ" in bench_serve.gate(engine)[0]


def test_runs_that_differ_stop_the_bench(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    serve, calls = bench_serve.serve, []

    def drifting(engine: Engine, asks: Any) -> Any:
        calls.append(len(asks))
        seconds, replies = serve(engine, asks)
        if len(calls) == 2:
            completion = replies[0].completions[0]
            replies[0] = replace(replies[0], completions=(replace(completion, token_ids=(1,)),))
        return seconds, replies

    monkeypatch.setattr(bench_serve, "serve", drifting)
    with pytest.raises(IntegrityError, match="two runs differ"):
        bench_serve.measure(engine, lambda _what: None)


def test_interpreter_is_no_place_for_figures() -> None:
    assert main(["bench", "serve"]) == 3
