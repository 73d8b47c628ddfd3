"""The command line: what it prints, what it refuses and how, and what its exit codes mean."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from rich.console import Console

from isobatch import LLM, Reply, SamplingParams, __version__, errors
from isobatch.audit.experiment import Outcome
from isobatch.cli import bench, checks, demo, doctor, generate, main
from isobatch.config import EngineConfig
from isobatch.kernels.catalogue import RECORDS
from isobatch.models.locate import demo_weights
from isobatch.ops.fingerprint import golden_digests, numerics_class

FEW_TOKENS = ["--max-tokens", "3", "--seed", "7"]


@pytest.fixture(scope="module")
def loaded() -> LLM:
    return LLM(demo_weights(), kv_cache_bytes=1 << 26, progress=False)


@pytest.fixture
def llm(loaded: LLM, monkeypatch: pytest.MonkeyPatch) -> LLM:
    """The demo model, loaded once for all tests."""
    monkeypatch.setattr(generate, "load", lambda _model, _config: loaded)
    return loaded


def json_lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def run_doctor(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, dict[str, Any]]:
    code = main(["doctor", "--json", *options])
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


# Usage, errors and exit codes


@pytest.mark.parametrize(("option", "said"), [("--version", __version__), ("--help", "130  interrupted")])
def test_help_and_version_end_well(option: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main([option])
    assert exit_info.value.code == 0
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "required: COMMAND"),
        ("genrate demo hi", "unknown command 'genrate'; did you mean 'generate'?"),
        ("generate", "required: MODEL;"),
        ("generate demo hi --temprature=0", "unknown option '--temprature'; did you mean '--temperature'?"),
        ("generate demo --temp 0 hi", "unknown option '--temp'"),
        ("generate demo hi --kernels stok", "unknown --kernels 'stok'; did you mean 'stock'?"),
        ("generate demo hi --set device=gpu", "unknown device; expected cpu or cuda; got gpu"),
        ("generate demo hi --set kv_cash_bytes=1", "did you mean 'kv_cache_bytes'?"),
        ("generate demo hi --set kv_cache_bytes", "KEY=VALUE"),
        ("generate demo hi --set kv_cache_bytes=1.5", "an integer of 1 or more; got '1.5'"),
        ("generate demo hi --set prefix_cache=maybe", "bad prefix_cache"),
        ("generate demo hi --top-k many", "invalid int value: 'many'"),
        ("generate demo hi --seed 18446744073709551616", "'seed'"),
        ("generate demo hi --temperature nan", "'temperature'"),
        ("generate demo hi --logprobs 1", "add --json"),
        ("generate demo hi --system x --no-chat", "leave out --no-chat"),
        ("generate demo hi --kernels isobatch --set kernels=stock", "two kinds of kernels"),
        ("generate demo --file /no/such/file", "No such file"),
        ("bench tpu", "unknown target 'tpu'"),
        ("doctor extra", "unexpected argument 'extra'; see isobatch doctor --help"),
    ],
)
def test_bad_usage_is_refused_before_a_model_is_loaded(
    words: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("isobatch: ")
    assert said in captured.err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.UnknownKeyError("engine setting", "x", ["y"]), 2),
        (errors.NonFiniteLogitsError("not a number"), 2),
        (errors.UnsupportedModelError("strange"), 3),
        (errors.OutOfMemoryError("too large"), 3),
        (errors.StepMemoryError("not even one token"), 3),
        (errors.DeviceError("it has failed"), 3),
        (errors.MissingDependencyError("not there"), 3),
        (errors.IntegrityError("a bug"), 4),
        (errors.ShapeError("wrong"), 4),
        (ZeroDivisionError("a bug"), 4),
        (KeyboardInterrupt(), 130),
    ],
)
def test_each_kind_of_error_has_its_exit_code(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_arguments: object) -> int:
        raise error

    monkeypatch.setattr(doctor, "run", fail)
    assert main(["doctor"]) == code
    assert ("Traceback" in capsys.readouterr().err) == isinstance(error, ZeroDivisionError)


def test_json_error_is_the_last_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(tmp_path / "nothing"), "hi", "--json"]) == 3
    captured = capsys.readouterr()
    error = json_lines(captured.out)[-1]["error"]
    assert error["type"] == "ModelNotFoundError"
    assert captured.err.endswith(f"isobatch: {error['message']}\n")


def test_reader_that_goes_away_is_no_error() -> None:
    command = [sys.executable, "-m", "isobatch", "doctor", "extra", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert "Traceback" not in process.stderr.read()
    assert process.returncode == 141


def test_help_speaks_of_options_not_of_python(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "--seed INT 0 to 2**64 - 1; without one it is drawn, and reported." in said
    assert "--stop STR a string that ends the reply. One per option, which may be repeated." in said
    for word in ("None", "tuple", "the engine"):
        assert word not in said


# Tables


def test_outcome_of_the_demo_fits_80_columns() -> None:
    outcome = Outcome(
        requests=64, distinct=64, equal_to_alone=64, first_divergence=None, tokens=80_000, seconds=10.0,
        preemptions=1234,
    )  # fmt: skip
    outcomes = {name: {"isobatch": outcome, "stock": outcome} for name in ("greedy", "sampled")}
    console = Console(width=80, file=io.StringIO())
    demo._print(console, outcomes, cast(Any, None), 2**64 - 1)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    for cells in (
        ("kernels", "answers", "alone", "tokens/s", "recomputed"),
        ("isobatch", "temperature 0", "64 of 64", "8000", "1234 times"),
        (f"seed {2**64 - 1}",),
    ):
        assert any(all(cell in line for cell in cells) for line in lines), cells
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)


def test_figure_without_a_goal_has_none_in_the_table() -> None:
    figure = {"what": "linear", "against": "torch", "unit": "x", "isobatch": 1, "other": 2, "ratio": 0.5}
    for goal, said in ((0.0, "none"), (0.75, "0.75")):
        console = Console(width=100, file=io.StringIO())
        bench._print_cpu(console, {"figures": [figure | {"goal": goal}]})
        line = console.file.getvalue().splitlines()[-2]  # type: ignore[attr-defined]
        assert line.split()[-2] == said


# generate


@pytest.mark.weights
def test_module_generates_from_the_demo_weights() -> None:
    command = [sys.executable, "-m", "isobatch", "generate", "demo", *FEW_TOKENS, "--json", "Hello"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json_lines(done.stdout)[-1]["fingerprint"].startswith("iso-")


@pytest.mark.weights
def test_json_has_a_line_per_reply(llm: LLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_text("Two\n\n  \nThree\n")
    # Options between the positional arguments, and after them.
    options = ["--n", "2", "--logprobs", "1", "--prompt-logprobs", "0", "--json"]
    words = ["generate", "demo", *FEW_TOKENS, "One", *options, "--file", str(tmp_path / "prompts.txt")]
    assert main(words) == 0
    lines = json_lines(capsys.readouterr().out)
    assert [line["prompt"] for line in lines] == ["One", "Two", "Three"]
    for line in lines:
        assert line["fingerprint"] == llm.fingerprint
        assert line["error"] is None
        assert line["cached_tokens"] == 0
        assert line["prompt_log_probs"] is not None
        assert [c["index"] for c in line["completions"]] == [0, 1]
        first = line["completions"][0]
        assert first["seed"] == 7
        assert first["finish_reason"] == "length"
        assert first["stop_reason"] is None
        assert first["text"] == llm.tokenizer.decode(first["token_ids"])
        entry = first["log_probs"][0]
        assert entry["token_id"] == first["token_ids"][0]
        assert len(entry["top"]) == 1


@pytest.mark.weights
def test_single_prompt_streams_the_text_of_its_reply(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", "demo", "--temperature", "0", *FEW_TOKENS]
    assert main([*words, "Once upon a time"]) == 0
    streamed = capsys.readouterr()
    assert "seed 7" in streamed.err
    assert main([*words, "Once upon a time", "--json"]) == 0
    [reply] = json_lines(capsys.readouterr().out)
    assert streamed.out == reply["completions"][0]["text"] + "\n"
    assert main([*words, "Once upon a time", "Hello"]) == 0
    assert capsys.readouterr().out.startswith(f"--- prompt 1, completion 1, seed 7\n{streamed.out}---")


@pytest.mark.weights
def test_prompt_comes_from_stdin(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
    assert main(["generate", "demo", "--json", *FEW_TOKENS]) == 0
    assert json_lines(capsys.readouterr().out)[0]["prompt"] == "one\ntwo"
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert main(["generate", "demo"]) == 2
    assert "no prompt" in capsys.readouterr().err


@pytest.mark.weights
def test_system_message_makes_a_chat(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "demo", "Hi", "--system", "Be brief.", "--json", *FEW_TOKENS]) == 0
    [said] = json_lines(capsys.readouterr().out)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    params = SamplingParams(max_tokens=3, seed=7)
    assert said["completions"][0]["text"] == llm.chat(messages, params)[0].text


@pytest.mark.weights
@pytest.mark.parametrize(
    ("prompt", "got"), [("", "got 0 tokens"), ("a " * 9000, "expected 1 to 8191 tokens")]
)
def test_prompt_that_cannot_be_continued_is_refused(
    prompt: str, got: str, llm: LLM, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "demo", prompt]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert got in captured.err


@pytest.mark.weights
def test_cache_without_a_block_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "demo", "hi", "--set", "kv_cache_bytes=1_000"]) == 2
    assert "raise kv_cache_bytes" in capsys.readouterr().err


@pytest.mark.weights
def test_failed_request_leaves_the_others(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = Reply(0, (1,), (), None, 0, None, errors.NonFiniteLogitsError("NaN in the logits"))
    good = llm.generate("Hello", SamplingParams(max_tokens=3, seed=7))[0]
    monkeypatch.setattr(llm, "generate", lambda *_: [failed, good])
    assert main(["generate", "demo", "bad", "good", "--json"]) == 2
    captured = capsys.readouterr()
    first, last = json_lines(captured.out)
    assert first["error"] == {"type": "NonFiniteLogitsError", "message": "NaN in the logits"}
    assert last["completions"][0]["text"] == good.text
    assert captured.err == "isobatch: prompt 1: NaN in the logits\n"
    assert main(["generate", "demo", "bad", "good"]) == 2
    assert capsys.readouterr().out == f"--- prompt 2, completion 1, seed 7\n{good.text}\n"


def test_settings_reach_the_engine_and_stock_kernels_warn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[EngineConfig] = []

    def stop(_model: str, config: EngineConfig) -> LLM:
        seen.append(config)
        raise errors.ModelNotFoundError("none here")

    monkeypatch.setattr("isobatch.engine.llm.LLM", stop)
    words = "generate m hi --set policy=chaos:7 --set max_context=none --set prefix_cache=False"
    assert main(words.split()) == 3
    assert "warning" not in capsys.readouterr().err
    assert main([*words.split(), "--kernels", "stock"]) == 3
    assert "bits of a reply depend on the load" in capsys.readouterr().err
    assert seen[0] == EngineConfig(policy="chaos:7", prefix_cache=False)
    assert seen[1] == EngineConfig(policy="chaos:7", prefix_cache=False, kernels="stock")


# doctor


def test_doctor_passes_here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "RECORDS", {name: RECORDS[name] for name in ("embedding", "attention")})
    code, report = run_doctor(capsys)
    assert code == 0, report["checks"]
    assert report["ok"]
    assert report["numerics"] == numerics_class()
    assert [op["name"] for op in report["ops"]] == list(RECORDS)
    assert report["versions"]["torch"] == torch.__version__
    assert {"os", "cpu", "threads"} <= report["hardware"].keys()
    assert [check["name"] for check in report["checks"]] == [
        "IEEE arithmetic",
        "golden digests",
        "bit classes",
    ]


def test_doctor_prints_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--quick"]) == 0
    said = capsys.readouterr().out
    for word in ("numba", "threading layer", "silu_and_mul", "golden digests", numerics_class()):
        assert word in said
    assert "bit classes" not in said


def test_doctor_names_the_digest_that_differs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    golden = golden_digests() | {"linear/wide": "0" * 64}
    monkeypatch.setattr(checks, "golden_digests", lambda: golden)
    monkeypatch.setattr(checks, "computed_digests", lambda _progress: golden_digests())
    code, report = run_doctor(capsys, "--quick")
    assert code == 1
    assert not report["ok"]
    found = golden_digests()["linear/wide"]
    assert report["checks"][1]["failures"] == [f"linear/wide: expected {'0' * 64}, got {found}"]
    assert main(["doctor", "--quick"]) == 1
    said = capsys.readouterr().out
    assert "linear/wide: expected" in said
    assert "not of the class" in said


def test_doctor_names_the_member_that_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    record = RECORDS["silu_and_mul"]

    def off_by_one_bit(gate_up: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = record.canonical.function(gate_up=gate_up)
        out.view(torch.int32)[-1, -1] ^= 1
        return out

    impostor = replace(record.canonical, name="impostor", function=off_by_one_bit)
    tampered = replace(record, members=(record.canonical, impostor))
    monkeypatch.setattr(checks, "RECORDS", {record.name: tampered})
    [failure] = checks.check_members(lambda _what: None).failures
    assert failure.startswith("silu_and_mul/impostor: not a member: wide, 1 rows: 1 differ, first at")
    assert failure.endswith("1 ulp apart")


def test_flushed_subnormals_are_found() -> None:
    assert checks.check_arithmetic().ok
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormal numbers")
    try:
        check = checks.check_arithmetic()
    finally:
        torch.set_flush_denormal(False)
    assert [failure.partition(";")[0] for failure in check.failures][:2] == [
        "the Python thread: subnormal numbers are taken for zero when read",
        "the Python thread: subnormal numbers are taken for zero when written",
    ]
    assert checks.check_arithmetic().ok


@pytest.mark.weights
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_full_disk_is_said_in_a_line() -> None:
    words = [
        sys.executable,
        "-m",
        "isobatch",
        "generate",
        "demo",
        "hi",
        "--temperature",
        "0",
        "--max-tokens",
        "2",
    ]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 3
    assert "the output cannot be written: No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
