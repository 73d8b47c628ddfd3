"""Results files: figures with their provenance, so that a number can be traced to the code that made it."""

from __future__ import annotations

import json
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from isobatch.cli import machine


def provenance() -> dict[str, Any]:
    """Commit, whether the tree differed from it, when, on what, with which versions."""

    def git(*words: str) -> str | None:
        root = Path(__file__).resolve().parents[3]
        try:
            ran = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return ran.stdout.strip()

    # Results themselves do not make a tree dirty: the next run would always find the last one's.
    changes = git("status", "--porcelain", "--", ":!benchmarks/results")
    return {
        "commit": git("rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "platform": platform.platform(),
        "hardware": machine.hardware(),
        "threading_layer": machine.threading_layer(),
        "versions": machine.versions(),
    }


def write(path: Path, report: dict[str, Any]) -> None:
    """Writes a report as JSON, with its provenance first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"provenance": provenance(), **report}, indent=2) + "\n")
