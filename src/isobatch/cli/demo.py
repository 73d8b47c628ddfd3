"""`isobatch demo`: copies of one prompt under changing load, with our kernels and with torch's own."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from isobatch.cli.model import MODEL_HELP, add_setting_options, release, settings_from

if TYPE_CHECKING:
    from isobatch.audit.experiment import Load, Outcome
    from isobatch.config import EngineConfig, Kernels
    from isobatch.engine.llm import LLM
    from isobatch.engine.sampling_params import SamplingParams

    Says = Callable[[Sequence[int]], str]

PROMPT = "Tell me about Richard Feynman"
_BROKEN_PROMISE = 1
# Short on purpose: they are there to change the batch from step to step.
_OTHERS = (
    "Why is the sky blue?",
    "Name three rivers in Europe.",
    "What does a compiler do?",
    "Write a sentence about the sea.",
    "How do bees find flowers?",
    "What is the capital of Japan?",
    "Explain photosynthesis to a child in a few simple sentences, without difficult words.",
    "Give me a recipe for pancakes with the ingredients first and then every step in order.",
)
_EXPERIMENT_CACHE = 512 << 20
# In float32 torch's logits move by about 1e-5 with the load: too little for one of this text's 100 greedy
# tokens to change, whose two best are further apart. So the prompt is sampled as well, with a seed from
# scripts/find_close_call.py: the two likeliest first tokens are 2e-8 apart, so that the load decides.
_SAMPLED_SEED = 1_097_590
_KERNELS: tuple[Kernels, ...] = ("isobatch", "stock")
_TITLES = {"greedy": "temperature 0", "sampled": "temperature 1"}
# As many as a chat template adds, so that a prompt without words is no shorter than one with.
_TOKENS_OF_A_CHAT = 20


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "demo",
        help="one prompt many times under changing load: how many different answers?",
        description=f"Sends copies of {PROMPT!r} among other prompts, at random times: at temperature 0, "
        "then sampled with a seed; with our kernels, then with torch's own. On the CPU the scheduler decides "
        "at random too, unless --set policy says otherwise. Exit code 0 only if isobatch gave one "
        "answer each time.",
    )
    parser.add_argument("--model", default="demo", help=f"{MODEL_HELP} (default demo)")
    add_setting_options(parser)
    parser.add_argument("--only", choices=tuple(_TITLES), help="this run alone: at temperature 0, or sampled")
    parser.add_argument("--copies", type=int, default=64, help="copies of the prompt (default 64)")
    parser.add_argument("--others", type=int, default=16, help="other prompts between them (default 16)")
    parser.add_argument("--max-tokens", type=int, default=100, help="length of each reply (default 100)")
    said = f"of the sampled replies (default {_SAMPLED_SEED}, a close call)"
    parser.add_argument("--seed", type=int, default=_SAMPLED_SEED, help=said)
    parser.add_argument("--chaos", type=int, default=0, help="seed of arrivals and scheduler (default 0)")
    parser.add_argument("--out", type=Path, help="keep the outcome, with its provenance, in this file")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")


def run(arguments: argparse.Namespace) -> int:
    """Runs both sides on the same loads, or the one that --kernels names, and prints a table.

    Returns:
        0 if isobatch gave exactly one answer, the one given alone, to each; else 1.

    Raises:
        ConfigError: too few copies or others, or a bad setting.
        InvalidSamplingError: max_tokens or seed out of range.
        ModelError, OutOfMemoryError: as `LLM`.
    """
    from isobatch.cli import results
    from isobatch.errors import ConfigError

    if arguments.copies < 2 or arguments.others < 0:
        got = f"{arguments.copies} and {arguments.others}"
        raise ConfigError("demo: bad --copies or --others", expected="at least 2, and at least 0", got=got)
    # All that can be wrong without a model is found before one is loaded.
    configs = _configs(arguments)
    workloads = _workloads(arguments, any(config.load == "random" for config in configs.values()))
    console = Console(stderr=True)
    outcomes: dict[str, dict[str, Outcome]] = {name: {} for name in workloads}
    numerics: str | None = None
    for kernels, config in configs.items():
        llm = _load(arguments, config, console)
        for name, params in workloads.items():
            outcomes[name][kernels] = _run_side(
                llm, _load_of(llm, arguments, params), f"{kernels}, {name}", console
            )
        numerics = llm.identity.numerics if llm.identity else numerics
        says: Says = _ids if config.load == "random" else llm.tokenizer.decode
        del llm
        release()  # the two models are not held in memory at the same time
    _print(Console(stderr=arguments.json), outcomes, says, arguments.seed)
    report = _report(outcomes, says, arguments, numerics)
    if arguments.out is not None:
        results.write(arguments.out, report)
    if arguments.json:
        print(json.dumps(report))
    ours = [sides["isobatch"] for sides in outcomes.values() if "isobatch" in sides]
    return 0 if all(map(_kept, ours)) else _BROKEN_PROMISE


def _configs(arguments: argparse.Namespace) -> dict[str, EngineConfig]:
    """The settings of each side."""
    from isobatch.config import EngineConfig

    settings = settings_from(arguments)
    sides: Iterable[Any] = (settings.pop("kernels"),) if "kernels" in settings else _KERNELS
    if settings.get("device", "cpu") == "cpu":
        settings = {"policy": f"chaos:{arguments.chaos}", "kv_cache_bytes": _EXPERIMENT_CACHE, **settings}
    return {side: EngineConfig.from_mapping({**settings, "kernels": side}) for side in sides}


def _workloads(arguments: argparse.Namespace, random_weights: bool) -> dict[str, SamplingParams]:
    from isobatch.engine.sampling_params import SamplingParams

    # Random weights end a reply by chance, and the experiment is about long ones.
    how: Any = {"max_tokens": arguments.max_tokens, "ignore_eos": random_weights}
    workloads = {
        "greedy": SamplingParams(temperature=0, **how),
        "sampled": SamplingParams(temperature=1, seed=arguments.seed, **how),
    }
    return {name: params for name, params in workloads.items() if arguments.only in (None, name)}


def _load(arguments: argparse.Namespace, config: EngineConfig, console: Console) -> LLM:
    from isobatch.engine.llm import LLM
    from isobatch.engine.sampling_params import SamplingParams

    said = "loading the model and its kernels (the first run compiles: a minute)"
    console.print(f"[bold]{config.kernels}[/]: {said}")
    llm = LLM(arguments.model, config)
    # Compiles and records what will be needed, so that it is not timed.
    lengths = [2]
    if config.device == "cuda":
        lengths = ramp(min(arguments.copies + arguments.others, config.max_batch_sequences))
    llm.generate([[0]] * len(lengths), [SamplingParams(max_tokens=n, ignore_eos=True) for n in lengths])
    return llm


def ramp(count: int) -> list[int]:
    """Lengths of replies with which a batch of `count` shrinks through every size that is recorded.

    Sixteen rows leave at a time, and the last 64 one by one.
    """
    slow = min(count, 64)
    fast = count - slow
    return [2 + i // 16 for i in range(fast)] + [2 + -(-fast // 16) + i for i in range(slow)]


def _load_of(llm: LLM, arguments: argparse.Namespace, params: SamplingParams) -> Load:
    from isobatch.audit.experiment import Load

    vocabulary = llm.engine.decoder.config.vocab_size

    def tokens(text: str) -> tuple[int, ...]:
        if llm.config.load == "random":  # without a tokenizer a text stands for numbers that it is a seed of
            draw = random.Random(text)
            return tuple(draw.randrange(vocabulary) for _ in range(_TOKENS_OF_A_CHAT + len(text.split())))
        return tuple(llm.tokenizer.encode_chat([{"role": "user", "content": text}]))

    rng = random.Random(arguments.chaos)
    return Load(
        prompt=tokens(PROMPT),
        copies=arguments.copies,
        others=tuple(tokens(rng.choice(_OTHERS)) for _ in range(arguments.others)),
        params=params,
        seed=arguments.chaos,
    )


def _ids(tokens: Sequence[int]) -> str:
    return " ".join(map(str, tokens))


def _run_side(llm: LLM, load: Load, what: str, console: Console) -> Outcome:
    from isobatch.audit import experiment
    from isobatch.engine.progress import Bar

    with Bar(console, what, "replies") as bar:
        return experiment.run(llm.engine, load, bar)


def _kept(outcome: Outcome) -> bool:
    """Whether every reply is the one given alone."""
    return outcome.distinct == 1 and outcome.equal_to_alone == outcome.requests


def _parting(outcome: Outcome, says: Says) -> dict[str, Any] | None:
    """Where replies first part from the one given alone, with the words on both sides."""
    divergence = outcome.first_divergence
    if divergence is None:
        return None
    return {
        "token": divergence.token,
        "replies": divergence.replies,
        "after": says(divergence.common)[-60:],
        "alone": says(divergence.alone[:8]),
        "loaded": says(divergence.loaded[:8]),
    }


def _side(outcome: Outcome, says: Says) -> dict[str, Any]:
    return {
        "distinct": outcome.distinct,
        "equal_to_alone": outcome.equal_to_alone,
        "first_divergence": _parting(outcome, says),
        "tokens_per_s": round(outcome.tokens_per_s, 1),
        "seconds": round(outcome.seconds, 2),
        "preemptions": outcome.preemptions,
    }


def _report(
    outcomes: dict[str, dict[str, Outcome]], says: Says, arguments: argparse.Namespace, numerics: str | None
) -> dict[str, Any]:
    """The sampled workload at the top, where torch's answers differ; the greedy one under its name."""
    sides = {
        name: {kernels: _side(outcome, says) for kernels, outcome in both.items()}
        for name, both in outcomes.items()
    }
    return {
        "prompt": PROMPT,
        "model": arguments.model,
        "settings": arguments.settings,
        "requests": arguments.copies,
        "others": arguments.others,
        "max_tokens": arguments.max_tokens,
        "seed": arguments.seed,
        "chaos": arguments.chaos,
        "numerics": numerics,
        **sides.pop("sampled", {}),
        **sides,
    }


def _print(console: Console, outcomes: dict[str, dict[str, Outcome]], says: Says, seed: int) -> None:
    columns = [(name, kernels) for name in outcomes for kernels in outcomes[name]]
    # A row per run, and headings in two lines: four columns of runs would not fit a terminal of 80.
    table = Table(
        title=f"{PROMPT!r}, many times under changing load", caption=f"temperature 1: with seed {seed}"
    )
    for heading in ("kernels", "", "different\nanswers", "as given\nalone", "tokens/s", "recomputed"):
        table.add_column(heading, justify="left" if heading in ("kernels", "") else "right")
    for name, kernels in columns:
        o = outcomes[name][kernels]
        same = f"{o.equal_to_alone} of {o.requests}"
        speed = f"{o.tokens_per_s:.0f}"
        table.add_row(kernels, _TITLES[name], str(o.distinct), same, speed, f"{o.preemptions} times")
    console.print(table)
    for name, kernels in columns:
        parting = _parting(outcomes[name][kernels], says)
        if parting is not None:
            after = f", after “…{parting['after']}”" if parting["after"] else ""
            for line in (
                f"{kernels}, {_TITLES[name]}: first parts at token {parting['token']}{after},",
                f"  alone:      “{parting['alone']}…”",
                f"  under load: “{parting['loaded']}…”",
            ):
                console.print(line, markup=False, highlight=False)
    ours = [sides["isobatch"] for sides in outcomes.values() if "isobatch" in sides]
    if ours:
        kept = all(map(_kept, ours))
        console.print(
            "[green]isobatch: one answer[/]" if kept else "[red]isobatch: the promise was broken[/]"
        )
