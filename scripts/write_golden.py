"""Writes the golden digests that the fingerprint is made of: for a new op, or with a new NUMERICS_VERSION."""

from __future__ import annotations

import json
from pathlib import Path

from isobatch.ops import fingerprint

if __name__ == "__main__":
    path = Path(fingerprint.__file__).with_name("golden.json")
    path.write_text(json.dumps(fingerprint.computed_digests(), indent=2) + "\n")
    print(f"wrote {path}")
