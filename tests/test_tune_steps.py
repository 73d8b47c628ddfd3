"""`isobatch tune --steps`, run through on a tiny model with a stopwatch that is made up."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from isobatch.cli import bench_serve, main, tune_steps
from isobatch.cli import model as model_options
from isobatch.engine import backend
from isobatch.engine.memory import block_bytes
from isobatch.errors import ConfigError, OutOfMemoryError
from isobatch.kernels import plan as plans
from isobatch.kernels.gpu.device import INTERPRETED, architecture
from isobatch.kernels.linear import tune as tuning
from isobatch.kernels.linear.members import Shape, default
from isobatch.kernels.linear.tune import Trial
from isobatch.ops.gpu import GpuOps
from tests.engine_harness import TINY
from tests.test_bench_steps import DTYPE, make_engine
from tests.test_tune import fake

pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="`isobatch tune --steps` does this on a GPU"),
    pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning"),
]

HEADS = (TINY.num_heads + 2 * TINY.num_kv_heads) * TINY.head_size
QKV = Shape(HEADS, TINY.hidden_size, DTYPE, DTYPE)
DOWN = Shape(TINY.hidden_size, TINY.intermediate_size, DTYPE, DTYPE)
NAMES = ("16x32x32.4.2w", "16x16x64.4.2wt", "32x32x32.4.2tp1")


def trials(*counts: int) -> list[Trial]:
    return [Trial(rows, 2.0, tuple((name, 1.0) for name in NAMES), {}) for rows in counts]


def test_what_makes_steps_shortest_goes_first_and_serves_in_what_is_timed_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tune_steps, "CONTEXT", 16)
    engine = make_engine(blocks=8)
    products = cast(GpuOps, engine.decoder.ops).products
    timed: list[tuple[int, int]] = []
    told: list[int] = []
    chosen: dict[tuple[str, int], str] = {}
    found: dict[Shape, Sequence[Trial]] = {}
    choose = products.choose

    def seen(shape: Shape, rows: int, name: str) -> None:
        chosen[shape.key, rows] = name
        choose(shape, rows, name)

    def stopwatch(steps: Sequence[Callable[[], torch.Tensor]], rounds: int) -> list[float]:
        tokens = [step() for step in steps]
        assert all(torch.equal(tokens[0], other) for other in tokens[1:]), "members of one class"
        timed.append((len(tokens[0]), len(steps)))
        if len(timed) % 2 == 0:
            assert chosen[QKV.key, len(tokens[0])] == NAMES[1], "the first one's best serves already"
        return [5.0, 1.0, 2.0]  # the second is the fastest

    monkeypatch.setattr(products, "choose", seen)
    monkeypatch.setattr(tune_steps, "queued_in_turns", stopwatch)
    counts = (1, 4, 1000)
    tried = {QKV: trials(*counts), DOWN: trials(*counts)}
    tune_steps.by_steps(engine, [QKV, DOWN], tried, found.__setitem__, told.append)
    assert told == [1, 4]  # of a thousand rows products are all there is
    assert timed == [(1, 3), (1, 3), (4, 3), (4, 3)]
    for shape in (QKV, DOWN):
        assert [trial.entry()[1][0] for trial in found[shape]] == [NAMES[1], NAMES[1], NAMES[0]]
        assert found[shape][0].steps == ((NAMES[1], 1.0), (NAMES[2], 2.0), (NAMES[0], 5.0))
        assert found[shape][2].steps == ()
        assert chosen[shape.key, 4] == NAMES[1]


def test_a_bucket_is_timed_at_the_smallest_and_the_largest_step_that_it_serves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    serves, made = [""], []
    products: Any = type("Products", (), {"choose": lambda _self, _shape, _rows, name: serves.append(name)})()

    def step(_engine: Any, batch: int) -> tuple[str, int]:
        made.append((serves[-1], batch))
        return made[-1]

    times = {"one": 1.0, "two": 20.0}
    monkeypatch.setattr(tune_steps, "_step", step)
    monkeypatch.setattr(tune_steps, "queued_in_turns", lambda steps, _: [times[name] for name, _ in steps])
    engine: Any = None
    for rows, sizes in ((1, [1]), (8, [8]), (32, [24, 32]), (100, [80, 96]), (512, [288, 512])):
        made.clear()
        taken = tune_steps._times(engine, products, QKV, rows, ["one", "two"])
        assert made == [(name, size) for size in sizes for name in ("one", "two")]
        assert taken == {"one": 1.0 * len(sizes), "two": 20.0 * len(sizes)}


def test_the_librarys_fastest_and_ours_are_among_the_few() -> None:
    times = [(f"16x{16 << n}x64.4.2w", 1.0 + n) for n in range(6)]
    few = tune_steps._fastest(Trial(1, 2.0, (*times, ("lt1.0", 9.0), ("lt1.1", 10.0)), {}))
    assert few == [*(name for name, _ in times[:4]), "lt1.0"]
    slow = [(f"lt1.{n}", 1.0 + n) for n in range(6)]
    assert tune_steps._fastest(Trial(1, 2.0, (*slow, times[5], times[0]), {}))[4:] == [times[5][0]]


def test_a_single_candidate_needs_no_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_steps, "queued_in_turns", lambda *_: pytest.fail("nothing to choose"))
    alone = [Trial(1, 2.0, ((NAMES[0], 1.0),), {})]
    tune_steps.by_steps(make_engine(blocks=8), [QKV], {QKV: alone}, lambda *_: pytest.fail("nothing new"))


def test_a_shape_that_was_not_tried_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected trials; got none of"):
        tune_steps.by_steps(make_engine(blocks=8), [QKV, DOWN], {QKV: trials(1)}, lambda *_: None)


def test_shapes_are_a_models_products_those_first_that_take_most_of_a_step() -> None:
    dense = [shape.key for shape in tune_steps.shapes_of_steps("qwen3-8b", torch.bfloat16)]
    layer = [f"{sides}.bfloat16" for sides in ("24576x4096", "4096x12288", "6144x4096")]
    assert dense == [*layer, "151936x4096.bfloat16.float32", "4096x4096.bfloat16"]
    mixture = [shape.key for shape in tune_steps.shapes_of_steps("qwen3-30b-a3b", torch.float16)]
    assert mixture == ["5120x2048.float16", "2048x4096.float16", "151936x2048.float16.float32"]


def test_of_those_that_steps_do_not_tell_apart_the_fastest_alone_goes_first() -> None:
    assert tune_steps._order({"a": 1001.0, "b": 1010.0, "c": 1000.0, "d": 1005.0}) == ["a", "c", "d", "b"]


def test_of_many_rows_the_output_projection_is_in_no_recorded_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_steps, "_times", lambda *_: {NAMES[0]: 2.0, NAMES[1]: 1.0})
    head = Shape(TINY.vocab_size, TINY.hidden_size, DTYPE, torch.float32)
    found: dict[Shape, Sequence[Trial]] = {}
    tune_steps.by_steps(make_engine(blocks=8), [head], {head: trials(128, 200)}, found.__setitem__)
    assert [bool(trial.steps) for trial in found[head]] == [True, False]


def test_engine_has_room_for_the_largest_step_and_for_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    name: Any = str(DTYPE).removeprefix("torch.")
    for rows, batch in ((1, 1), (100, 112), (8192, 512)):
        checkpoint, config = tune_steps.settings("smollm2-135m", name, 2, rows)
        assert checkpoint.config.num_layers == 2
        assert config.max_batch_sequences == config.max_batch_tokens == batch
        assert config.cache_bytes == batch * 256 // 16 * block_bytes(checkpoint.config, DTYPE.itemsize)
    monkeypatch.setattr(backend, "available_bytes", lambda: 200_000_000)
    with pytest.raises(OutOfMemoryError, match="fewer layers"):
        tune_steps.settings("smollm2-135m", name, None, 100)
    with pytest.raises(ConfigError, match="layers"):
        tune_steps.settings("smollm2-135m", name, 99, 100)


def test_command_keeps_what_steps_say(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[Any] = []
    tune = fake([])

    def tuned(*given: Any, **named: Any) -> list[Trial]:
        done.append("tuned")
        return tune(*given, **named)

    def by_steps(
        engine: Any, shapes: Sequence[Shape], trials: Any, keep: Any, progress: Callable[[int], None]
    ) -> None:
        done.append(engine)
        progress(1)
        for shape in shapes:
            keep(shape, [replace(trial, steps=(("lt1.1", 4000.04),)) for trial in trials[shape]])

    monkeypatch.setattr(tuning, "tune", tuned)

    def settings(*given: Any) -> tuple[str, Any]:
        done.append(given)
        return "weights", given

    monkeypatch.setattr(tune_steps, "settings", settings)
    monkeypatch.setattr(bench_serve, "loaded", lambda *given: ("an engine of", *given))
    monkeypatch.setattr(model_options, "release", lambda: done.append("released"))
    monkeypatch.setattr(tune_steps, "by_steps", by_steps)
    path, transcript = tmp_path / "plan.json", tmp_path / "transcript.json"
    words = ["tune", "qwen3-8b", "--rows", "1", "--steps", "--layers", "2", "--out", str(path)]
    assert main([*words, "--transcript", str(transcript)]) == 0
    asked = ("qwen3-8b", "bfloat16", 2, 1)
    assert done == [asked, *["tuned"] * 6, "released", ("an engine of", "weights", asked)]
    tables = plans.read(path, architecture()).ops["linear"]
    assert tables["24576x4096.bfloat16"][0] == (1, ("lt1.1", default(1)))
    assert tables["151936x4096.bfloat16"][0] == (1, (default(1),))
    assert '"lt1.1": 4000.0' in transcript.read_text()
    assert "1 of 1: steps of qwen3-8b" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["qwen3-8b", "--steps", "--ranks", "2"], "expected --ranks 1"),
        (["qwen3-8b", "--layers", "2"], "expected --steps beside it"),
        (["qwen3-8b", "--rows", "0"], "at least 1"),
        (["qwen3-9b"], "qwen3-8b"),
    ],
)
def test_what_needs_no_gpu_to_be_found_wrong_is_refused_before_one_is_looked_for(
    words: list[str], why: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "isobatch.kernels.gpu.device", None)
    assert main(["tune", *words]) == 2
    assert why in capsys.readouterr().err
