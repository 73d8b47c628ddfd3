"""`isobatch serve` on the command line: what is refused before a model is loaded, and what is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from isobatch.cli import main, serve
from isobatch.config import EngineConfig
from isobatch.server.run import Server, allow_many_connections
from tests.server_harness import tiny_folder, tiny_llm


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("serve", "required: MODEL"),
        ("serve demo --prot 1", "did you mean '--port'?"),
        ("serve demo --port 99999", "cannot listen"),
        ("serve demo --host no.such.host.invalid", "cannot listen"),
        ("serve demo --max-queue -1", "bad server settings"),
        ("serve demo --request-timeout 0", "bad server settings"),
        ("serve demo --max-body-bytes 0", "bad server settings"),
        ("serve demo --grace -1", "bad --grace"),
        ("serve demo --api-key-file /no/such/file", "cannot read"),
        ("serve demo --kernels stock --compare-stock", "leave out --kernels stock"),
        ("serve demo --set device=cuda --compare-stock", "which each of the two gets"),
        ("serve qwen3-8b --set load=random", "no tokenizer"),
        ("serve demo --set kv_cash_bytes=1", "did you mean 'kv_cache_bytes'?"),
    ],
)
def test_bad_usage_is_refused_before_a_model_is_loaded(
    words: str, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "load", lambda *_: pytest.fail("a model was loaded"))
    assert main(words.split()) == 2
    assert said in capsys.readouterr().err


def test_file_of_keys_without_a_key_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "keys").write_text("\n  \n")
    assert main(["serve", "demo", "--api-key-file", str(tmp_path / "keys")]) == 2
    assert "no key in" in capsys.readouterr().err


def test_server_is_started_as_it_was_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two kinds of kernels, keys from both places; and no path among the names."""
    folder = tiny_folder(tmp_path / "secret-place")
    configs: list[EngineConfig] = []
    asked: list[Any] = []

    def load(_model: str, config: EngineConfig) -> Any:
        configs.append(config)
        return tiny_llm(folder, kernels=config.kernels)

    class Probed(Server):
        async def startup(self, *arguments: Any, **named: Any) -> None:
            await super().startup(*arguments, **named)
            asked.append(self)
            self.should_exit = True

    monkeypatch.setattr(serve, "load", load)
    monkeypatch.setattr("isobatch.server.run.Server", Probed)
    monkeypatch.setattr("isobatch.server.logs.configure", lambda: None)
    (tmp_path / "keys").write_text("one\n\n two \n")
    keys = ["--api-key", "three", "--api-key-file", str(tmp_path / "keys")]
    assert main(["serve", str(folder), *keys, "--compare-stock", "--port", "0"]) == 0
    assert [(one.kernels, one.prefix_cache) for one in configs] == [("isobatch", True), ("stock", False)]
    (server,) = asked
    assert list(server.workers) == ["secret-place", "secret-place-stock"]
    assert server.config.app._keys == [b"three", b"one", b"two"]
    assert "serving 'secret-place' and 'secret-place-stock' at http://127.0.0.1:" in capsys.readouterr().err


def test_limit_of_open_files_is_raised() -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    allow_many_connections()
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    resource.setrlimit(resource.RLIMIT_NOFILE, before)
