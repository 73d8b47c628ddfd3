"""The name of exactly these kernel sources: what is kept on disk for them must not outlive a change."""

from __future__ import annotations

import hashlib
from pathlib import Path


def digest() -> str:
    """SHA-256 of all sources of kernels and their paths, in hexadecimal digits."""
    sha, root = hashlib.sha256(), Path(__file__).resolve().parent
    for source in sorted(root.rglob("*.py")):
        sha.update(source.relative_to(root).as_posix().encode())
        sha.update(source.read_bytes())
    return sha.hexdigest()
