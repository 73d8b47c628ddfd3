"""Another engine's times beside ours: asked the same, read strictly, set against the right figures."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from isobatch.cli import beside, main
from isobatch.cli.workloads import MODEL, WORKLOADS, Workload
from isobatch.errors import ConfigError
from isobatch.models.config import config_from_huggingface
from isobatch.models.presets import preset
from tests.architecture_rules import ROOT

VOCABULARY = preset(MODEL).vocabulary
NAMES = [workload.name for workload in WORKLOADS]
# Stands in for vLLM: answers at once, and writes down what it was asked.
STAND_IN = """
import json, os, sys
from types import SimpleNamespace
assert "torch" not in sys.modules, "our kernels' settings would be vLLM's"
kept = {"environment": dict(os.environ), "asked": []}

class SamplingParams(SimpleNamespace):
    pass

class LLM:
    def __init__(self, model, **settings):
        kept.update(config=json.load(open(os.path.join(model, "config.json"))), settings=settings)

    def generate(self, prompts, params, use_tqdm):
        assert not use_tqdm
        kept["asked"].append([[p["prompt_token_ids"], vars(s)] for p, s in zip(prompts, params, strict=True)])
        with open(os.environ["STAND_IN_KEEPS"], "w") as file:
            json.dump(kept, file)
        short = int(os.environ.get("STAND_IN_SHORT", "0"))
        outputs = [SimpleNamespace(token_ids=range(s.max_tokens - short)) for s in params]
        return [SimpleNamespace(outputs=[output]) for output in outputs]
"""


def run_script(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    (folder / "vllm").mkdir(exist_ok=True)
    (folder / "vllm" / "__init__.py").write_text(STAND_IN)
    (folder / "vllm-0.25.1.dist-info").mkdir(exist_ok=True)
    (folder / "vllm-0.25.1.dist-info" / "METADATA").write_text("Name: vllm\nVersion: 0.25.1\n")
    script = ROOT / "scripts/serve_vllm.py"
    given = {"PYTHONPATH": str(folder), "STAND_IN_KEEPS": str(folder / "kept.json"), **environment}
    # A caller's setting of the mode must not survive.
    given |= {"VLLM_BATCH_INVARIANT": "7"}
    return subprocess.run(
        [sys.executable, str(script), *words], env={**os.environ, **given}, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("mode", "flag", "workloads"), [("default", "0", WORKLOADS), ("batch-invariant", "1", WORKLOADS[1:3])]
)
def test_vllm_is_asked_what_we_are_asked(
    tmp_path: Path, mode: str, flag: str, workloads: tuple[Workload, ...]
) -> None:
    out, names = tmp_path / "vllm.json", [workload.name for workload in workloads]
    ran = run_script(tmp_path, "--mode", mode, "--out", str(out), "--workloads", *names)
    assert ran.returncode == 0, ran.stderr
    kept = json.loads((tmp_path / "kept.json").read_text())
    assert kept["environment"]["VLLM_BATCH_INVARIANT"] == flag
    assert config_from_huggingface(kept["config"]) == preset(MODEL).config()
    assert kept["settings"]["load_format"] == "dummy"
    assert kept["settings"]["enable_prefix_caching"] is False
    assert len(kept["asked"]) == 2 * len(workloads)
    for number, workload in enumerate(workloads):
        ours = [
            [
                prompt,
                {"temperature": 0, "max_tokens": params.max_tokens, "ignore_eos": True, "detokenize": False},
            ]
            for prompt, params in workload.asks(VOCABULARY)
        ]
        assert kept["asked"][2 * number] == kept["asked"][2 * number + 1] == ours
    file = json.loads(out.read_text())
    assert next(iter(file)) == "provenance"
    assert {"commit", "dirty", "hardware", "versions"} < file["provenance"].keys()
    assert all(name in ran.stdout for name in names)
    (side,) = beside.read([out], file["provenance"]["hardware"].get("gpu"))
    assert side.name == f"vllm {mode}"
    assert list(side.seconds) == names
    assert side.report["version"] == "0.25.1"


def test_short_replies_and_unknown_workloads_leave_no_file(tmp_path: Path) -> None:
    out = tmp_path / "vllm.json"
    words = ("--mode", "default", "--out", str(out), "--workloads")
    ran = run_script(tmp_path, *words, NAMES[1], STAND_IN_SHORT="1")
    assert ran.returncode != 0
    assert "other lengths" in ran.stderr
    ran = run_script(tmp_path, *words, "1 x 128 in, 255 out")
    assert ran.returncode != 0
    assert f"did you mean '{NAMES[1]}'?" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert not out.exists()


# Small ones: their requests are drawn again at each reading.
A, B = NAMES[1:3]


def file_of(mode: str, seconds: dict[str, float]) -> dict[str, Any]:
    digests = {workload.name: workload.digest(VOCABULARY) for workload in WORKLOADS[1:3]}
    return {
        "provenance": {"commit": "c", "hardware": {"gpu": "H"}},
        "engine": "vllm",
        "mode": mode,
        "model": MODEL,
        "points": [{"workload": n, "asks": digests[n], "seconds": s} for n, s in seconds.items()],
    }


def saved(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_ratios_are_theirs_over_ours(tmp_path: Path) -> None:
    report = {"points": [{"workload": A, "seconds": 2.0}, {"workload": B, "seconds": 1.0}]}
    files = [
        saved(tmp_path / "a", file_of("default", {A: 1.0, B: 2.0})),
        saved(tmp_path / "b", file_of("batch-invariant", {A: 8.0})),
    ]
    found = beside.merged(report, beside.read(files, "H"))
    assert [point["beside"]["vllm default"]["ratio"] for point in found["points"]] == [0.5, 2.0]
    assert found["points"][0]["beside"]["vllm batch-invariant"] == {"seconds": 8.0, "ratio": 4.0}
    assert "vllm batch-invariant" not in found["points"][1]["beside"]
    assert [side["geometric_mean"] for side in found["beside"].values()] == pytest.approx([1.0, 4.0])
    assert found["beside"]["vllm default"]["provenance"]["commit"] == "c"
    assert "beside" not in report["points"][0]
    console = Console(width=150)
    with console.capture() as said:
        console.print(beside.table(found))
    row = next(line for line in said.get().splitlines() if A in line)
    assert re.findall(r"\d+\.\d\d", row) == ["2.00", "1.00", "0.50", "8.00", "4.00"]


def test_side_that_shares_no_workload_has_no_mean(tmp_path: Path) -> None:
    side = beside.read([saved(tmp_path / "a", file_of("default", {A: 1.0}))], "H")
    found = beside.merged({"points": [{"workload": "another", "seconds": 2.0}]}, side)
    assert found["beside"]["vllm default"]["geometric_mean"] is None


def _first(file: dict[str, Any], **changes: object) -> dict[str, Any]:
    return {**file, "points": [{**file["points"][0], **changes}, *file["points"][1:]]}


BAD: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda file: [], "not such a file"),
    (lambda file: "text", "not such a file"),
    (lambda file: {k: v for k, v in file.items() if k != "mode"}, "not such a file.*mode"),
    (lambda file: {**file, "provenance": None}, "not such a file"),
    (lambda file: {**file, "points": None}, "not such a file"),
    (lambda file: _first(file, seconds="long"), "not such a file"),
    (lambda file: {**file, "model": "qwen3-4b"}, f"another model; expected {MODEL}; got qwen3-4b; run"),
    (lambda file: {**file, "provenance": {"hardware": {}}}, "another GPU; expected H; got none; run"),
    (lambda file: {**file, "points": []}, "nothing was measured"),
    (lambda file: _first(file, workload="9 x 1 in, 1 out"), "a workload that we do not have; .*got 9 x 1"),
    (lambda file: _first(file, workload=["9"]), "not such a file"),
    (lambda file: _first(file, asks="0"), f"{A}: other requests than ours; .*got 0; run"),
    (lambda file: _first(file, seconds=0), "no time; expected more than 0"),
    (lambda file: _first(file, seconds=float("nan")), "no time"),
]


@pytest.mark.parametrize(("spoil", "said"), BAD)
def test_bad_file_is_refused(tmp_path: Path, spoil: Callable[[dict[str, Any]], object], said: str) -> None:
    path = saved(tmp_path / "a", spoil(file_of("default", {A: 1.0, B: 2.0})))
    with pytest.raises(ConfigError, match=f"--beside {re.escape(str(path))}: .*{said}"):
        beside.read([path], "H")


def test_one_side_twice_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a", file_of("default", {A: 1.0}))
    with pytest.raises(ConfigError, match="2 files of vllm default"):
        beside.read([path, path], "H")


def test_bad_files_stop_the_bench_before_it_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "serve", "--beside", str(tmp_path / "nothing")]) == 2
    assert "cannot be read; expected a file of scripts/serve_vllm.py" in capsys.readouterr().err
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    assert main(["bench", "serve", "--beside", str(tmp_path / "binary")]) == 2
    assert main(["bench", "cpu", "--beside", str(tmp_path / "nothing")]) == 2
    assert "expected bench serve; got bench cpu" in capsys.readouterr().err
