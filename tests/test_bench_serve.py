"""The bench of whole workloads, run through on a tiny model: its times are not asked for."""

from __future__ import annotations

import weakref
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from isobatch.cli import bench_serve, main
from isobatch.cli.workloads import Workload
from isobatch.config import EngineConfig
from isobatch.engine.engine import Engine
from isobatch.engine.runner import Runner
from isobatch.errors import IntegrityError, UnknownKeyError
from isobatch.kernels.gpu.device import INTERPRETED, dtypes
from tests.checkpoints import tiny_model
from tests.engine_harness import tiny_world

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="`isobatch bench serve` does this on a GPU")

NAME: Any = str(dtypes()[0]).removeprefix("torch.")
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
    report = bench_serve.measure(engine, 1, lambda _what: None)
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
        bench_serve.measure(engine, 1, lambda _what: None)


def test_ratio_to_stock_is_in_points_and_goals(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    def make(_model: str, kernels: str = "isobatch") -> Engine:
        assert not any(alive() for alive in made), "both engines in memory"
        world = tiny_world("stock" if kernels == "stock" else "none")
        other = replace(world, blocks=512).engine(prefix_cache=False)
        made.append(weakref.ref(other))
        return other

    monkeypatch.setattr(bench_serve, "make_engine", make)
    said: list[str] = []
    kept: list[Any] = []

    def keep(report: Any) -> None:
        assert len(made) == 1, "torch's side had begun"
        kept.append(deepcopy(report))

    report = bench_serve.run("tiny", 3, stock=True, progress=said.append, keep=keep)
    assert len(made) == 2
    assert [len(each["points"]) for each in kept] == [len(report["points"])]
    assert not any("ratio_to_stock" in point for point in kept[0]["points"])
    assert report["gate"] == "green"
    for point in report["points"]:
        assert point["ratio_to_stock"] == point["seconds"] / point["stock_s"] > 0
    named = [goal for goal in report["goals"] if "ratio to stock" in goal["what"]]
    assert [goal["goal"] for goal in named] == [1.0, 1.0]
    assert any(line.startswith("stock: 3 x") for line in said)
    alone = bench_serve.run("tiny", 1, stock=False, progress=said.append)
    assert not any("ratio" in goal["what"] for goal in alone["goals"])


def test_red_gate_measures_neither_side(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def make(*names: str) -> Engine:
        made.extend(names)
        return engine

    monkeypatch.setattr(bench_serve, "make_engine", make)
    monkeypatch.setattr(bench_serve, "gate", lambda _engine: ["1 of 9 copies differ"])
    report = bench_serve.run("tiny", 1, stock=True, progress=lambda _what: None)
    assert report == {"failures": ["1 of 9 copies differ"]}
    assert made == ["tiny"]


def test_engine_on_the_gpus_kernels_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("qwen3", max_position_embeddings=8192).config.save_pretrained(tmp_path)
    monkeypatch.setattr(bench_serve, "_KV_TOKENS", 4096)
    monkeypatch.setattr(bench_serve, "EngineConfig", partial(EngineConfig, dtype=NAME))
    made = bench_serve.make_engine(str(tmp_path), "stock")
    assert made.decoder.ops.name == "stock"
    assert made.pool.num_blocks * made.pool.block_size == 4096
    with pytest.raises(UnknownKeyError, match="qwen3-8b"):
        bench_serve.make_engine("qwen3-8")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("bench gpu --model qwen3-8b", "leave out --model"),
        ("bench gpu --repeats 5", "leave out --repeats"),
        ("bench gpu --only isobatch", "linear or attention or moe or rows; got isobatch"),
        ("bench serve --only linear", "isobatch or steps; got linear"),
        ("bench cpu --only linear", "no --only"),
        ("bench serve --repeats 0", "1 or more; got 0"),
        ("bench serve --model qwen3-0.6b --beside times.json", "expected qwen3-8b; got --model qwen3-0.6b"),
    ],
)
def test_options_that_a_bench_has_no_use_for_are_refused(
    words: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words.split()) == 2
    assert said in capsys.readouterr().err


def test_interpreter_is_no_place_for_figures() -> None:
    assert main(["bench", "serve", "--model", "qwen3-0.6b", "--repeats", "2", "--only", "isobatch"]) == 3
