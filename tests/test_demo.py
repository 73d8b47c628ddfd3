"""The experiment as a command, on tiny models: what it sends, what it says, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from isobatch.cli import demo, main
from isobatch.cli.demo import ramp
from isobatch.engine.graphs import ladder
from isobatch.kernels.gpu.device import dtypes
from tests.checkpoints import tiny_model

# Stale memory is NaN, and NumPy, which interprets GPU kernels, says so where it is masked.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")

GPU = ("device=cuda", f"dtype={str(dtypes()[0]).removeprefix('torch.')}")
FEW = ("--copies", "3", "--others", "1", "--max-tokens", "3")


@pytest.fixture
def model(tmp_path: Path) -> str:
    tiny_model("qwen3").config.save_pretrained(tmp_path)
    return str(tmp_path)


def report(
    capsys: pytest.CaptureFixture[str], model: str, *words: str, settings: tuple[str, ...] = ()
) -> Any:
    capsys.readouterr()
    given = ("load=random", "layers=1", "kv_cache_bytes=1000000", *settings)
    options = [word for setting in given for word in ("--set", setting)]
    assert main(["demo", "--model", model, *options, *FEW, "--json", *words]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_model_without_a_tokenizer_is_asked_in_token_ids(
    model: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "results" / "demo.json"
    found = report(capsys, model, "--out", str(out))
    assert found["model"] == model
    assert "layers=1" in found["settings"]
    for sides in (found, found["greedy"]):
        assert sides["isobatch"]["distinct"] == 1
        assert sides["isobatch"]["equal_to_alone"] == found["requests"] == 3
        assert sides["stock"]["seconds"] > 0
    assert found["numerics"].startswith("num-")
    kept = json.loads(out.read_text())
    assert {key: kept[key] for key in found} == found
    assert "commit" in kept["provenance"]


def test_runs_and_sides_can_be_left_out(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys, model, "--only", "greedy", "--kernels", "stock")
    assert "isobatch" not in found
    assert found["greedy"].keys() == {"stock"}
    assert found["numerics"] is None


def test_experiment_runs_on_the_gpus_kernels(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "ramp", lambda count: [2] * count)
    found = report(capsys, model, "--only", "greedy", settings=GPU)
    assert found["greedy"]["isobatch"]["equal_to_alone"] == 3
    assert found["greedy"]["stock"]["distinct"] >= 1


def test_replies_without_words_are_told_in_token_ids() -> None:
    assert demo._ids((5, 17)) == "5 17"


@pytest.mark.parametrize("count", [1, 3, 64, 65, 100, 1000])
def test_warm_up_meets_every_recorded_size(count: int) -> None:
    lengths = ramp(count)
    assert len(lengths) == count
    sizes = {sum(length > step for length in lengths) for step in range(1, max(lengths))}
    met = {next(rung for rung in ladder(count) if rung >= size) for size in sizes}
    assert met == set(ladder(count))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--copies 1", "at least 2, and at least 0; got 1 and 16"),
        ("--max-tokens 0", "max_tokens"),
        ("--only sampeld", "did you mean 'sampled'?"),
        ("--set device=cuda --set dtype=float32", "bfloat16 or float16"),
        ("--set layers=1", 'use load="random"'),
        ("--set load=random --model qwen3-8", "did you mean 'qwen3-8b'?"),
    ],
)
def test_bad_usage_is_refused(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", *words.split()]) == 2
    assert said in capsys.readouterr().err
