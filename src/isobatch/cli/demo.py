"""`isobatch demo`: copies of one prompt under changing load, with our kernels and with torch's own."""

from __future__ import annotations

import argparse
import gc
import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from isobatch.audit.experiment import Load, Outcome
    from isobatch.config import Kernels
    from isobatch.engine.llm import LLM
    from isobatch.engine.sampling_params import SamplingParams
    from isobatch.engine.tokenizer import Tokenizer

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


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "demo",
        help="one prompt many times under changing load: how many different answers?",
        description=f"Sends copies of {PROMPT!r} among other prompts, at random times, to a scheduler that "
        "decides at random: at temperature 0, then sampled with a seed; with our kernels, then with torch's "
        "own. Exit code 0 only if isobatch gave one answer each time.",
    )
    parser.add_argument("--model", default="demo", help="SmolLM2-135M-Instruct by default")
    parser.add_argument("--copies", type=int, default=64, help="copies of the prompt (default 64)")
    parser.add_argument("--others", type=int, default=16, help="other prompts between them (default 16)")
    parser.add_argument("--max-tokens", type=int, default=100, help="length of each reply (default 100)")
    said = f"of the sampled replies (default {_SAMPLED_SEED}, a close call)"
    parser.add_argument("--seed", type=int, default=_SAMPLED_SEED, help=said)
    parser.add_argument("--chaos", type=int, default=0, help="seed of arrivals and scheduler (default 0)")
    parser.add_argument("--out", type=Path, help="keep the outcome, with its provenance, in this file")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")


def run(arguments: argparse.Namespace) -> int:
    """Runs both sides on the same loads and prints a table.

    Returns:
        0 if isobatch gave exactly one answer, the one given alone, to each; else 1.

    Raises:
        ConfigError: too few copies or others.
        InvalidSamplingError: max_tokens or seed out of range.
    """
    from isobatch.cli import results
    from isobatch.engine.sampling_params import SamplingParams
    from isobatch.errors import ConfigError

    if arguments.copies < 2 or arguments.others < 0:
        got = f"{arguments.copies} and {arguments.others}"
        raise ConfigError("demo: bad --copies or --others", expected="at least 2, and at least 0", got=got)
    length = arguments.max_tokens
    workloads = {
        "greedy": SamplingParams(temperature=0, max_tokens=length),
        "sampled": SamplingParams(temperature=1, max_tokens=length, seed=arguments.seed),
    }
    console = Console(stderr=True)
    outcomes: dict[str, dict[str, Outcome]] = {name: {} for name in workloads}
    for kernels in _KERNELS:
        llm = _load(arguments.model, kernels, arguments.chaos, console)
        for name, params in workloads.items():
            outcomes[name][kernels] = _run_side(
                llm, _load_of(llm, arguments, params), f"{kernels}, {name}", console
            )
        tokenizer = llm.tokenizer
        del llm
        gc.collect()  # the two models are not held in memory at the same time
    _print(Console(stderr=arguments.json), outcomes, tokenizer, arguments.seed)
    report = _report(outcomes, tokenizer, arguments)
    if arguments.out is not None:
        results.write(arguments.out, report)
    if arguments.json:
        print(json.dumps(report))
    return 0 if all(_kept(sides["isobatch"]) for sides in outcomes.values()) else _BROKEN_PROMISE


def _load(model: str, kernels: Kernels, chaos: int, console: Console) -> LLM:
    from isobatch.engine.llm import LLM

    console.print(f"[bold]{kernels}[/]: loading the model and its kernels (the first run compiles: a minute)")
    llm = LLM(model, kernels=kernels, policy=f"chaos:{chaos}", kv_cache_bytes=_EXPERIMENT_CACHE)
    llm.generate("Ready?")  # compiles what is not in the cache yet, so that it is not timed
    return llm


def _load_of(llm: LLM, arguments: argparse.Namespace, params: SamplingParams) -> Load:
    from isobatch.audit.experiment import Load

    def tokens(text: str) -> tuple[int, ...]:
        return tuple(llm.tokenizer.encode_chat([{"role": "user", "content": text}]))

    rng = random.Random(arguments.chaos)
    return Load(
        prompt=tokens(PROMPT),
        copies=arguments.copies,
        others=tuple(tokens(rng.choice(_OTHERS)) for _ in range(arguments.others)),
        params=params,
        seed=arguments.chaos,
    )


def _run_side(llm: LLM, load: Load, what: str, console: Console) -> Outcome:
    from isobatch.audit import experiment
    from isobatch.engine.progress import Bar

    with Bar(console, what, "replies") as bar:
        return experiment.run(llm.engine, load, bar)


def _kept(outcome: Outcome) -> bool:
    """Whether every reply is the one given alone."""
    return outcome.distinct == 1 and outcome.equal_to_alone == outcome.requests


def _parting(outcome: Outcome, tokenizer: Tokenizer) -> dict[str, Any] | None:
    """Where replies first part from the one given alone, with the words on both sides."""
    divergence = outcome.first_divergence
    if divergence is None:
        return None
    return {
        "token": divergence.token,
        "replies": divergence.replies,
        "after": tokenizer.decode(divergence.common)[-60:],
        "alone": tokenizer.decode(divergence.alone[:8]),
        "loaded": tokenizer.decode(divergence.loaded[:8]),
    }


def _side(outcome: Outcome, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "distinct": outcome.distinct,
        "equal_to_alone": outcome.equal_to_alone,
        "first_divergence": _parting(outcome, tokenizer),
        "tokens_per_s": round(outcome.tokens_per_s, 1),
        "seconds": round(outcome.seconds, 2),
        "preemptions": outcome.preemptions,
    }


def _report(
    outcomes: dict[str, dict[str, Outcome]], tokenizer: Tokenizer, arguments: argparse.Namespace
) -> dict[str, Any]:
    """The sampled workload at the top, where torch's answers differ; the greedy one under its name."""
    from isobatch.ops.fingerprint import numerics_class

    sides = {
        name: {kernels: _side(outcome, tokenizer) for kernels, outcome in both.items()}
        for name, both in outcomes.items()
    }
    return {
        "prompt": PROMPT,
        "requests": arguments.copies,
        "others": arguments.others,
        "max_tokens": arguments.max_tokens,
        "seed": arguments.seed,
        "chaos": arguments.chaos,
        "numerics": numerics_class(),
        **sides["sampled"],
        "greedy": sides["greedy"],
    }


def _print(
    console: Console, outcomes: dict[str, dict[str, Outcome]], tokenizer: Tokenizer, seed: int
) -> None:
    titles = {"greedy": "temperature 0", "sampled": "temperature 1"}
    columns = [(name, kernels) for name in outcomes for kernels in _KERNELS]
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
        table.add_row(kernels, titles[name], str(o.distinct), same, speed, f"{o.preemptions} times")
    console.print(table)
    for name, kernels in columns:
        parting = _parting(outcomes[name][kernels], tokenizer)
        if parting is not None:
            after = f", after “…{parting['after']}”" if parting["after"] else ""
            for line in (
                f"{kernels}, {titles[name]}: first parts at token {parting['token']}{after},",
                f"  alone:      “{parting['alone']}…”",
                f"  under load: “{parting['loaded']}…”",
            ):
                console.print(line, markup=False, highlight=False)
    kept = all(_kept(sides["isobatch"]) for sides in outcomes.values())
    console.print("[green]isobatch: one answer[/]" if kept else "[red]isobatch: the promise was broken[/]")
