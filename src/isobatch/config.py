"""Settings of the engine: frozen, checked, able to explain themselves.

Given the model, which `load`, `layers` and `weights_seed` have a part in, none can change a bit of a logit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from isobatch.errors import ConfigError, UnknownKeyError

Kernels = Literal["isobatch", "stock"]
Device = Literal["cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Load = Literal["checkpoint", "random"]
_DTYPES: dict[str, tuple[str, ...]] = {"cpu": ("float32",), "cuda": ("bfloat16", "float16")}
_CACHE_BYTES = 1 << 30
_STEP_TOKENS = 512
_NUMBER_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How the engine uses the machine. A reply is the same whatever stands here, except that `kernels`,
    `device` and `dtype` name the numerics class, `load`, `layers` and `weights_seed` the model, and
    `max_context` ends it.

    Args:
        kernels: "isobatch" for certified kernels; "stock" for torch's own, whose bits depend on the load.
        device: "cpu", or "cuda" for an NVIDIA GPU.
        dtype: of weights and activations: "float32" on the CPU, "bfloat16" or "float16" on a GPU; "auto" for
            the first of these.
        kv_cache_bytes: memory for keys and values, in bytes; None for 1 GiB, touched only as it fills, and in
            `LLM` on a GPU for all that the weights and a step's own tensors leave.
        max_batch_tokens: the most tokens in one step. Longer prompts are cut into chunks. None for 512, and
            in `LLM` on a GPU for up to 8,192: as many as need an eighth of what weights and cache leave.
        max_batch_sequences: the most sequences running at once.
        max_context: the longest prompt and reply together, in tokens; None for the model's own limit.
        prefix_cache: whether prompts with a common beginning share its keys and values.
        draft_tokens: the most tokens that are guessed ahead for a completion, from what followed when it last
            said the same, and verified in one step. Text that repeats itself or its prompt takes fewer steps.
        policy: "fcfs", or "chaos:SEED" for a scheduler that decides at random, as a test of the promise.
        load: "checkpoint" for stored weights; "random" for seeded random ones of a configuration: a name in
            models/presets.py, a folder with a config.json, or such a file. A model with random weights has no
            tokenizer: prompts are token ids, and replies have no text.
        layers: how many of its layers a model with random weights gets, the first ones; None for all.
        weights_seed: of random weights; the same seed, the same weights, on every device.

    Raises:
        ConfigError: a value of the wrong type or out of range.
    """

    kernels: Kernels = "isobatch"
    device: Device = "cpu"
    dtype: Dtype = "auto"
    kv_cache_bytes: int | None = None
    max_batch_tokens: int | None = None
    max_batch_sequences: int = 256
    max_context: int | None = None
    prefix_cache: bool = True
    draft_tokens: int = 0
    policy: str = "fcfs"
    load: Load = "checkpoint"
    layers: int | None = None
    weights_seed: int = 0

    def __post_init__(self) -> None:
        if self.kernels not in get_args(Kernels):
            raise UnknownKeyError("kernels", str(self.kernels), get_args(Kernels))
        if self.device not in get_args(Device):
            raise ConfigError("unknown device", expected=" or ".join(get_args(Device)), got=self.device)
        if self.dtype not in get_args(Dtype):
            raise UnknownKeyError("dtype", str(self.dtype), get_args(Dtype))
        if self.dtype not in ("auto", *_DTYPES[self.device]):
            expected = " or ".join(_DTYPES[self.device])
            raise ConfigError(
                f"no kernels for this dtype on {self.device}", expected=expected, got=self.dtype
            )
        for name in ("kv_cache_bytes", "max_batch_tokens", "max_batch_sequences", "max_context", "layers"):
            value = getattr(self, name)
            if value is None and name != "max_batch_sequences":
                continue
            if type(value) is not int or value < 1:
                raise ConfigError(f"bad {name}", expected="an integer of 1 or more", got=repr(value))
        if type(self.draft_tokens) is not int or self.draft_tokens < 0:
            got = repr(self.draft_tokens)
            raise ConfigError("bad draft_tokens", expected="an integer of 0 or more", got=got)
        if type(self.prefix_cache) is not bool:
            raise ConfigError("bad prefix_cache", expected="True or False", got=repr(self.prefix_cache))
        if not isinstance(self.policy, str):
            raise ConfigError("bad policy", expected='"fcfs" or "chaos:SEED"', got=repr(self.policy))
        self._check_load()

    def _check_load(self) -> None:
        if self.load not in get_args(Load):
            raise UnknownKeyError("load", str(self.load), get_args(Load))
        if type(self.weights_seed) is not int or not 0 <= self.weights_seed < 1 << 64:
            got = repr(self.weights_seed)
            raise ConfigError("bad weights_seed", expected="an integer from 0 to 2**64 - 1", got=got)
        if self.load == "checkpoint" and (self.layers is not None or self.weights_seed):
            raise ConfigError("layers and weights_seed are for random weights", fix='use load="random"')

    @property
    def number_format(self) -> str:
        """The dtype, with "auto" resolved."""
        return _DTYPES[self.device][0] if self.dtype == "auto" else self.dtype

    @property
    def cache_bytes(self) -> int:
        """For keys and values, with None resolved as far as it can be without a look at the device."""
        return _CACHE_BYTES if self.kv_cache_bytes is None else self.kv_cache_bytes

    @property
    def step_tokens(self) -> int:
        """Of one step at most, with None resolved as far as it can be without a look at the device."""
        return _STEP_TOKENS if self.max_batch_tokens is None else self.max_batch_tokens

    @property
    def number_bytes(self) -> int:
        """Of one number of that format: a weight that is not coded, a key, a value."""
        return _NUMBER_BYTES[self.number_format]

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any]) -> EngineConfig:
        """A configuration from keys and values.

        Args:
            settings: some or all of the fields.

        Raises:
            UnknownKeyError: a key that is no field; names the nearest.
            ConfigError: a bad value.
        """
        known = [field.name for field in fields(cls)]
        for key in settings:
            if key not in known:
                raise UnknownKeyError("engine setting", key, known)
        return cls(**settings)

    def explain(self) -> str:
        """Every setting, its value, and whether it is the default; a line each."""
        lines = []
        for field in fields(self):
            value = getattr(self, field.name)
            origin = "default" if value == field.default else f"set, default {field.default!r}"
            lines.append(f"{field.name} = {value!r}  ({origin})")
        return "\n".join(lines)
