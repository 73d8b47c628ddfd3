"""Every exception isobatch raises on purpose.

::

    IsobatchError
    ├── ConfigError(ValueError)            a setting that cannot be honoured
    │   └── UnknownKeyError                a misspelt one: names the nearest
    ├── RequestError(ValueError)           this request cannot be served; the others go on
    │   ├── InvalidSamplingError           a sampling parameter out of its range
    │   ├── PromptError                    empty, too long, or with tokens the model does not have
    │   ├── CapacityError                  could never fit in the KV cache
    │   ├── NonFiniteLogitsError           the model produced NaN or infinity for this request
    │   ├── StepMemoryError(MemoryError)   not even one token of it can be computed in the memory there is
    │   └── UnknownRequestError(KeyError)  no such request
    ├── ModelError                         a checkpoint that cannot be used
    │   ├── ModelNotFoundError(FileNotFoundError)
    │   ├── CheckpointError                damaged, incomplete, or with surplus tensors
    │   ├── UnsupportedModelError          an architecture, rope type or quantisation we do not have
    │   └── TokenizerError
    ├── KernelError
    │   ├── UnsupportedOpError(NotImplementedError)   no certified member for this input: refused, not guessed
    │   ├── ShapeError(ValueError)         an argument of the wrong shape, dtype or device
    │   ├── FloatEnvironmentError          the process computes otherwise than IEEE 754 says
    │   └── ForkedProcessError             a child of fork(), where kernels have no threads
    ├── ReceiptError(ValueError)           a receipt that is damaged, edited, or of another schema
    ├── IntegrityError(AssertionError)     an internal invariant broke; a bug in isobatch
    ├── OutOfMemoryError(MemoryError)      with the arithmetic
    ├── DeviceError                        the GPU has failed: nothing more can be computed in this process
    ├── ServerError                        the server cannot answer now; the request may be fine
    │   ├── QueueFullError                 too many are waiting
    │   ├── DeadlineError(TimeoutError)    not done in time
    │   └── EngineDownError                it is shutting down, or its engine has failed
    └── MissingDependencyError(ImportError)  names the extra to install

Each message says what was expected, what came, and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class IsobatchError(Exception):
    """Root of the tree: catch this to catch everything isobatch raises on purpose.

    Args:
        what: the thing that is wrong, in a few words.
        expected: what would have been right.
        got: what came instead.
        fix: what the reader can do about it.
    """

    def __init__(
        self, what: str, *, expected: object = None, got: object = None, fix: str | None = None
    ) -> None:
        self.what, self.expected, self.got, self.fix = what, expected, got, fix
        parts = [what]
        if expected is not None:
            parts.append(f"expected {expected}")
        if got is not None:
            parts.append(f"got {got}")
        if fix is not None:
            parts.append(fix)
        super().__init__("; ".join(parts))

    def __str__(self) -> str:
        return str(self.args[0])


class ConfigError(IsobatchError, ValueError):
    """A setting that cannot be honoured."""


class UnknownKeyError(ConfigError):
    """A key nobody knows; the message names the nearest that exists.

    Args:
        kind: what the key was meant for, such as "sampling parameter".
        key: the key that came.
        known: the keys that exist.
    """

    def __init__(self, kind: str, key: str, known: Iterable[str]) -> None:
        names = sorted(known)
        self._words = kind, key, names
        near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
        fix = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"
        super().__init__(f"unknown {kind} {key!r}", fix=fix)

    def __reduce__(self) -> tuple[type[UnknownKeyError], tuple[str, str, list[str]]]:
        """From its own three words: a worker process hands its errors back pickled."""
        return type(self), self._words


class RequestError(IsobatchError, ValueError):
    """This request cannot be served; every other request is untouched."""


class InvalidSamplingError(RequestError):
    """A sampling parameter out of its range."""


class PromptError(RequestError):
    """A prompt that is empty, too long, or holds tokens the model does not have."""


class CapacityError(RequestError):
    """A request that could never fit in the KV cache."""


class NonFiniteLogitsError(RequestError):
    """The model produced NaN or infinity for this request."""


class StepMemoryError(RequestError, MemoryError):
    """Not even one token of the request can be computed in the memory there is; the others go on."""


class UnknownRequestError(RequestError, KeyError):
    """No request with this id."""


class ModelError(IsobatchError):
    """A checkpoint that cannot be used."""


class ModelNotFoundError(ModelError, FileNotFoundError):
    """Nothing at this path, and no such repository in the local Hugging Face cache."""


class CheckpointError(ModelError):
    """A checkpoint that is damaged, incomplete, or holds tensors that nothing uses."""


class UnsupportedModelError(ModelError):
    """An architecture, rope type, activation or quantisation that isobatch does not have."""


class TokenizerError(ModelError):
    """A tokenizer or chat template that is missing or of an unknown kind."""


class KernelError(IsobatchError):
    """A call that no kernel can serve."""


class UnsupportedOpError(KernelError, NotImplementedError):
    """No certified member covers this input. Refused, because a guess would carry weaker bits."""


class ShapeError(KernelError, ValueError):
    """An argument of the wrong shape, dtype, device or layout."""


class FloatEnvironmentError(KernelError):
    """The process computes otherwise than IEEE 754 says, so its bits would not be the promised ones."""


class ForkedProcessError(KernelError):
    """A process made by fork() after kernels had run: the threads they need are not in it."""


class ReceiptError(IsobatchError, ValueError):
    """A receipt that cannot be read: damaged, edited, or of another schema."""


class IntegrityError(IsobatchError, AssertionError):
    """An internal invariant broke: a bug in isobatch, worth a report."""


class OutOfMemoryError(IsobatchError, MemoryError):
    """Not enough memory; the message carries the arithmetic."""


class DeviceError(IsobatchError):
    """The GPU has failed. What it was computing is lost, and so is the process's use of it: start another."""


class ServerError(IsobatchError):
    """The server cannot answer now. The request may be fine, and can be sent again."""


class QueueFullError(ServerError):
    """More requests are waiting than the server was told to keep."""


class DeadlineError(ServerError, TimeoutError):
    """The reply was not done in time, and was given up."""


class EngineDownError(ServerError):
    """The engine behind the server is shutting down, or has failed."""


class MissingDependencyError(IsobatchError, ImportError):
    """An optional package is not installed; the message names the extra that brings it."""
