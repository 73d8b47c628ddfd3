"""Rows of the variance ledger that no other file tests: stale kernels, ties, flushed subnormal numbers."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from isobatch.errors import FloatEnvironmentError
from isobatch.kernels import sources
from isobatch.kernels.cpu import jit
from isobatch.kernels.sampling.cpu import SamplingRows
from isobatch.ops import certified_ops

V = 40


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of all kernel sources, which count as those that run."""
    kernels = tmp_path / "kernels"
    shutil.copytree(Path(sources.__file__).parent, kernels, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(sources, "__file__", str(kernels / "sources.py"))
    monkeypatch.setenv("ISOBATCH_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return kernels


def _edit(file: Path) -> None:
    file.write_text(file.read_text() + "\n")


@pytest.mark.parametrize(
    "change",
    [
        lambda kernels: _edit(kernels / "cpu" / "elementary.py"),
        lambda kernels: _edit(kernels / "linear" / "cpu.py"),
        lambda kernels: (kernels / "new.py").touch(),
        lambda kernels: (kernels / "data.py").rename(kernels / "other.py"),
    ],
)
def test_compiled_kernels_are_kept_apart_by_all_sources(copied: Path, change: Callable[[Path], None]) -> None:
    before = jit.cache_path.__wrapped__()
    assert jit.cache_path.__wrapped__() == before
    certificates = sources.digest()  # part of their file's name (`kernels/linear/gpu.py`)
    change(copied)
    assert jit.cache_path.__wrapped__() != before
    assert sources.digest() != certificates


def test_kernels_that_cannot_be_kept_are_compiled_anew(copied: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").touch()  # a file, where a folder would have to be
    paths = [jit.cache_path.__wrapped__() for _ in range(2)]
    assert paths[0] != paths[1]
    assert all(path.is_dir() and not any(path.iterdir()) for path in paths)


def _sampled(logits: torch.Tensor, draws: int, **parameters: float) -> set[int]:
    """The tokens that come up in draws with different seeds."""

    def full(name: str, off: float) -> torch.Tensor:
        return torch.full((draws,), parameters.get(name, off))

    rows = SamplingRows(
        temperature=full("temperature", 1.0),
        top_k=full("top_k", 0),
        top_p=full("top_p", 1.0),
        min_p=full("min_p", 0.0),
        seed=torch.arange(draws),
        position=torch.zeros(draws, dtype=torch.int64),
    )
    return set(certified_ops().sample(logits.expand(draws, -1), rows).tolist())


def test_ties_go_to_the_lowest_token_id() -> None:
    logits = torch.zeros(V)
    logits[[7, 21, 33]] = 2.0
    assert _sampled(logits, 3, temperature=0.0) == {7}
    assert _sampled(logits, 300, top_k=2) == {7, 21}
    assert _sampled(logits, 300, top_p=1e-6) == {7}
    assert _sampled(torch.zeros(V), 2000, top_p=0.5) == set(range(V // 2))
    assert _sampled(torch.zeros(V), 2000) == set(range(V))  # without a filter nobody is left out
    likeliest = certified_ops().top_log_probs(logits.expand(3, -1), torch.tensor([33, 7, 0]), 5)
    assert likeliest.ids.tolist() == [[7, 21, 33, 0, 1]] * 3
    assert likeliest.rank.tolist() == [3, 1, 4]


def test_process_that_flushes_subnormals_is_refused() -> None:
    certified_ops()
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormal numbers")
    try:
        with pytest.raises(FloatEnvironmentError, match="subnormal numbers are taken for zero"):
            certified_ops()
    finally:
        torch.set_flush_denormal(False)
    certified_ops()
