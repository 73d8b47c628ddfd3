"""What a decode step costs and where its time goes, run through on a tiny model: times are made up."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from isobatch.cli import bench_serve, bench_steps, main, step_cost, step_profile
from isobatch.cli.floors import prompts_floor, step_floor
from isobatch.cli.step_profile import IDLE, KERNELS, LINEAR, OTHER, OUTPUT, SAMPLING, Launch, attributed
from isobatch.cli.workloads import Workload
from isobatch.config import EngineConfig
from isobatch.engine.engine import Engine
from isobatch.engine.memory import block_bytes
from isobatch.errors import UnsupportedOpError
from isobatch.kernels.attention.gpu_rows import GpuKVCache
from isobatch.kernels.gpu.device import INTERPRETED, dtypes
from isobatch.models.loading import load_decoder
from isobatch.models.presets import preset
from isobatch.ops.gpu import GpuOps
from tests.architecture_rules import SOURCE
from tests.engine_harness import IDENTITY, TINY, TinyCheckpoint

pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="`isobatch bench serve --only steps` does this on a GPU"),
    pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning"),
]

DTYPE = dtypes()[0]
LIMITS = {"bytes_per_s": 1e9, "flop_per_s": 1e12}
LAYER = ("_rms_norm_kernel", "_linear_tma_kernel", "_qk_norm_rotary_write_kernel", "_decode_kernel")


def make_engine(blocks: int) -> Engine:
    name: Any = str(DTYPE).removeprefix("torch.")
    ops = GpuOps(DTYPE, (TINY.num_heads, TINY.num_kv_heads, TINY.head_size))
    size = blocks * block_bytes(TINY, DTYPE.itemsize)
    config = EngineConfig(device="cuda", dtype=name, kv_cache_bytes=size, prefix_cache=False)
    return Engine(load_decoder(TinyCheckpoint(), ops), None, config, IDENTITY)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    monkeypatch.setattr(step_cost, "BATCHES", (1, 4))
    monkeypatch.setattr(step_cost, "CONTEXT", 16)
    monkeypatch.setattr(step_cost, "FEW", (1, 3))
    monkeypatch.setattr(step_cost, "CONTEXTS", (7, 33))
    monkeypatch.setattr(step_profile, "_PROMPT", 5)
    monkeypatch.setattr(step_profile, "_MOST", 27)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return make_engine(blocks=8)


def test_every_step_that_fits_is_timed_over_blocks_of_its_own(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []

    def once(work: Any, rounds: int) -> float:
        assert rounds > 10
        tables: list[Any] = []

        def look(op: str, arguments: Any, _result: Any) -> None:
            if op == "attention":
                tables.append(arguments["rows"])

        with engine.decoder.ops.observed(look):
            tokens = work()
        assert torch.equal(tokens, work()), "a step that is queued again does the same"
        assert (tokens >= 0).all(), "logits are finite, so what the caches hold is"
        rows, batch = tables[0], len(tokens)
        (context,) = set(rows.context_lengths[:batch].tolist())
        used = rows.block_tables[:batch, : -(-context // 16)].flatten().tolist()
        assert len(set(used)) == len(used)
        assert len(set((rows.slots[:batch] // 16).tolist())) == batch
        seen.append((batch, context))
        return 2e3

    monkeypatch.setattr(step_cost, "queued_microseconds", once)
    points, left_out = step_cost.growth(engine, 20, LIMITS, lambda _what: None)
    assert seen == [(1, 16), (4, 16), (1, 7), (1, 33), (3, 7)]
    assert [(point["batch"], point["context"]) for point in points] == seen
    assert [one["what"] for one in left_out] == ["batch 3, context 33"]
    assert "the cache has" in left_out[0]["why"]
    assert [p["beyond_the_models_context"] for p in points] == [False, False, False, True, False]
    for point in points:
        assert point["above_floor"] == pytest.approx(2e3 / point["floor_us"])


def test_floor_is_of_what_a_step_reads_and_computes() -> None:
    model = preset("qwen3-8b").config()
    embedding = model.vocab_size * model.hidden_size
    read = 8_190_735_360 - embedding  # as published, without the table of which a step reads rows
    limits = {"bytes_per_s": 1.0, "flop_per_s": 1.0}
    moved, computed = step_floor(model, 1, 0, limits)
    assert (moved, computed) == (2 * read, 2 * read)
    key = 2 * 36 * 8 * 128 * 2
    assert step_floor(model, 8, 800, limits)[0] == 2 * read + 800 * key
    assert step_floor(model, 8, 800, limits)[1] == 16 * read + 800 * 4 * 36 * 32 * 128
    tied = preset("qwen3-0.6b").config()
    assert (
        step_floor(tied, 1, 0, limits)[0] == step_floor(replace(tied, tie_embeddings=False), 1, 0, limits)[0]
    )
    # Of a prompt of two tokens the last is projected and sees two keys. Of the last layer the first token
    # needs a key and a value, and nothing else.
    layers = read - embedding
    stored = 2 * 8 * 128 * 4096
    attended = (35 * 3 + 2) * 4 * 32 * 128
    computed = 2 * (2 * layers + embedding - (layers / 36 - stored)) + attended
    assert prompts_floor(model, [2], limits) == pytest.approx(computed, rel=1e-12)
    assert prompts_floor(model, [2], limits | {"bytes_per_s": 1e-3}) == 2e3 * read
    mixture = preset("qwen3-30b-a3b").config()
    assert 3.0e9 < step_floor(mixture, 1, 0, limits)[0] / 2 < 3.3e9  # 3.3 billion active, a table included


def a_step(begin: float) -> list[Launch]:
    """A step of 100 microseconds. Its kernels start 3 before the one before has ended."""
    names = (
        "_embedding_kernel",
        *LAYER,
        "_silu_and_mul_kernel",
        "nvjet_tst",
        "_rms_norm_kernel",
        "nvjet_tst",
    )
    found = [Launch(name, begin + 8 * i - 3, begin + 8 * (i + 1)) for i, name in enumerate(names)]
    tail = (("Memcpy HtoD", 74, 76), ("_scan_kernel", 78, 82), ("_choose_kernel", 82, 85))
    return [*found, *(Launch(name, begin + start, begin + end) for name, start, end in tail)]


def test_time_between_ends_adds_up_to_the_step() -> None:
    traced = [launch for step in range(5) for launch in a_step(100.0 * step)]
    kinds = {kind["kind"]: kind for kind in attributed(reversed(traced), 3)}
    assert sum(kind["us"] for kind in kinds.values()) == pytest.approx(100)
    assert sum(kind["share"] for kind in kinds.values()) == pytest.approx(1)
    assert list(kinds) == [kind for kind in KERNELS if kind in kinds]
    # No matter when it started: what comes after the end of the one before.
    assert (kinds["attention"]["us"], kinds["attention"]["launches"]) == (pytest.approx(8), 1)
    assert (kinds["norms"]["us"], kinds["norms"]["launches"]) == (pytest.approx(16), 2)
    assert (kinds[LINEAR]["us"], kinds[LINEAR]["launches"]) == (pytest.approx(16), 2)
    assert kinds[LINEAR]["kernels"] == {"_linear_tma_kernel": pytest.approx(8), "nvjet_tst": pytest.approx(8)}
    assert kinds[OUTPUT]["us"] == pytest.approx(8)
    assert kinds[SAMPLING]["us"] == pytest.approx(7)
    # The copy, and the embedding, which starts 3 before the step's begin when nothing else runs.
    assert kinds[OTHER]["us"] == pytest.approx(2 + 11)
    assert kinds[IDLE]["us"] == pytest.approx(2 + 2 + 12)


def test_what_runs_beside_a_longer_one_is_not_idle() -> None:
    marks = [Launch("_embedding_kernel", at, at + 1) for at in (0.0, 100.0)]
    long, short = Launch("_decode_kernel", 1, 90), Launch("Memcpy DtoH", 50, 60)
    kinds = {kind["kind"]: kind["us"] for kind in attributed([*marks, long, short], 1)}
    assert kinds == {"attention": 30, OTHER: 60, IDLE: 10}
    assert list(kinds)[-1] == IDLE


def test_choice_of_experts_is_none_of_tokens() -> None:
    names = ("_embedding_kernel", "_router_kernel", "_choose_kernel", "_bound_kernel", "_choose_kernel")
    traced = [Launch(names[i % 5], i, i + 1) for i in range(11)]
    kinds = {kind["kind"]: kind["launches"] for kind in attributed(traced, 2)}
    assert (kinds["experts"], kinds[SAMPLING]) == (2, 2)


def test_trace_without_steps_is_refused() -> None:
    with pytest.raises(UnsupportedOpError, match="more than 3 of _embedding_kernel; got 3 among 36 kernels"):
        attributed([launch for step in range(3) for launch in a_step(100.0 * step)], 3)


def test_kernels_have_the_names_that_the_source_gives_them() -> None:
    named = [name for names in KERNELS.values() for name in names if name.startswith("_")]
    text = "\n".join(SOURCE.values())
    for name in [*named, "_embedding_kernel", "_choose_kernel"]:
        assert re.search(rf"^def {name}\w*\(", text, re.MULTILINE), name


def test_engines_own_steps_are_profiled(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def launches(work: Any, times: int) -> list[Launch]:
        for _ in range(times):
            with engine.decoder.ops.observed(
                lambda op, _arguments, result: sizes.append(len(result)) if op == "logits" else None
            ):
                work()
        return [launch for step in range(times) for launch in a_step(100.0 * step)]

    monkeypatch.setattr(step_profile, "launches", launches)
    found = step_profile.profile(engine, 2)
    assert sizes == [2] * (found["steps"] + 3)
    assert not engine.has_work
    assert engine.pool.num_free == engine.pool.num_blocks
    low, high = found["contexts"]
    assert 5 + found["steps"] < low < high < 5 + 27
    assert found["us"] == pytest.approx(100)
    with pytest.raises(UnsupportedOpError, match="expected 10; got 8"):
        step_profile.profile(engine, 5)


def test_report_has_every_part_and_says_what_is_left_out(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_steps, "ceilings", lambda: LIMITS)
    monkeypatch.setattr(bench_steps, "make_engine", lambda _model: (engine, 20))
    monkeypatch.setattr(bench_steps, "PROFILED", (1, 5))
    monkeypatch.setattr(bench_serve, "GATE", Workload(3, (5, 20), (2, 3)))
    monkeypatch.setattr(bench_serve, "_GATE_TOKENS", 3)
    monkeypatch.setattr(step_cost, "queued_microseconds", lambda work, rounds: 1e3 + 0 * len(work()))
    monkeypatch.setattr(
        step_profile, "launches", lambda *_: [launch for step in range(11) for launch in a_step(100.0 * step)]
    )
    report = bench_steps.run("tiny", lambda _what: None)
    assert report["gate"] == "green"
    assert [one["batch"] for one in report["profiles"]] == [1]
    left_out = [one["what"] for one in report["left_out"]]
    assert left_out == ["the profile of batch 5", "batch 3, context 33"]
    costs, shares = bench_steps.tables(report)
    assert costs.row_count == len(report["points"]) == 5
    assert "beyond the context" in str(costs.caption)
    assert "left out: the profile of batch 5: the KV cache is too small" in str(costs.caption)
    assert shares.row_count == len(report["profiles"][0]["kinds"]) + 2
    monkeypatch.setattr(bench_serve, "gate", lambda _engine: ["1 of 9 copies differ"])
    assert bench_steps.run("tiny", lambda _what: None) == {"failures": ["1 of 9 copies differ"]}


def test_model_takes_longer_contexts_than_it_was_configured_for(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(bench_serve, "loaded", lambda *given: made.append(given))
    _, native = bench_steps.make_engine("qwen3-8b")
    ((checkpoint, config),) = made
    assert native == 40960
    assert checkpoint.config == replace(preset("qwen3-8b").config(), context_length=131072)
    assert config.max_context == 131072
    assert config.cache_bytes <= 60e9
    bench_steps.make_engine("llama-3-8b")
    assert made[1][0].config == preset("llama-3-8b").config()


@pytest.mark.parametrize(
    "words", ["--only isobatch steps", "--only steps --repeats 2", "--only steps --beside x"]
)
def test_options_that_steps_have_no_use_for_are_refused(
    words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "serve", *words.split()]) == 2
    assert "steps are measured by themselves" in capsys.readouterr().err


def test_interpreter_is_no_place_for_figures() -> None:
    assert main(["bench", "serve", "--only", "steps"]) == 3


def test_caches_are_filled_with_numbers_that_tell_nothing(engine: Engine) -> None:
    step_cost.fill_caches(engine)
    for cache in engine.caches:
        assert isinstance(cache, GpuKVCache)
        for tensor in (cache.k, cache.v):
            assert 0.9 < tensor.float().std() < 1.1
