"""isobatch: the same prompt gives the same bits, whatever else the machine is doing.

The public door. Names are imported when first used, so that `import isobatch` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from isobatch import env, errors
from isobatch._version import __version__

if TYPE_CHECKING:
    from isobatch.config import EngineConfig
    from isobatch.engine.llm import LLM
    from isobatch.engine.output import Completion, Reply, TokenLogProbs
    from isobatch.engine.receipt import Receipt
    from isobatch.engine.receipt_json import receipt_from_json
    from isobatch.engine.sampling_params import SamplingParams
    from isobatch.engine.verify import Verdict

# Here, because the library reads it once, when torch brings it in.
env.shorten_spin()

_HOMES = {
    "LLM": "isobatch.engine.llm",
    "Completion": "isobatch.engine.output",
    "EngineConfig": "isobatch.config",
    "Receipt": "isobatch.engine.receipt",
    "Reply": "isobatch.engine.output",
    "SamplingParams": "isobatch.engine.sampling_params",
    "TokenLogProbs": "isobatch.engine.output",
    "Verdict": "isobatch.engine.verify",
    "receipt_from_json": "isobatch.engine.receipt_json",
}

__all__ = [
    "LLM",
    "Completion",
    "EngineConfig",
    "Receipt",
    "Reply",
    "SamplingParams",
    "TokenLogProbs",
    "Verdict",
    "__version__",
    "errors",
    "receipt_from_json",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'isobatch' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__
