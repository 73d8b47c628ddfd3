"""`isobatch demo`: copies of one prompt under changing load, with our kernels and with torch's own."""

from __future__ import annotations

import argparse
import gc
import json
import random
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    from isobatch.audit.experiment import Load, Outcome
    from isobatch.config import Kernels
    from isobatch.engine.llm import LLM

_PROMPT = "Tell me about Richard Feynman"
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


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "demo",
        help="one prompt many times under changing load: how many different answers?",
        description=f"Sends copies of {_PROMPT!r} among other prompts, at random times, to a scheduler that "
        "decides at random: with our kernels and with torch's own. Exit code 0 only if isobatch gave one.",
    )
    parser.add_argument("--model", default="demo", help="SmolLM2-135M-Instruct by default")
    parser.add_argument("--copies", type=int, default=64, help="copies of the prompt (default 64)")
    parser.add_argument("--others", type=int, default=32, help="other prompts between them (default 32)")
    parser.add_argument("--max-tokens", type=int, default=100, help="length of each reply (default 100)")
    parser.add_argument("--seed", type=int, default=0, help="of the arrivals and the scheduler (default 0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")


def run(arguments: argparse.Namespace) -> int:
    """Runs both sides on the same load and prints a table.

    Returns:
        0 if isobatch gave exactly one answer, the one given alone, else 1.
    """
    from isobatch.errors import ConfigError
    from isobatch.models.locate import demo_weights

    if arguments.copies < 2 or arguments.others < 0:
        got = f"{arguments.copies} and {arguments.others}"
        raise ConfigError("demo: bad --copies or --others", expected="at least 2, and at least 0", got=got)
    model = str(demo_weights()) if arguments.model == "demo" else arguments.model
    console = Console(stderr=True)
    sides: dict[str, Outcome] = {}
    for kernels in ("isobatch", "stock"):
        llm = _load(model, kernels, arguments.seed, console)
        load = _load_of(llm, arguments)
        sides[kernels] = _run_side(llm, load, kernels, console)
        tokenizer = llm.tokenizer
        del llm
        gc.collect()  # the two models are not held in memory at the same time
    _print(Console(stderr=arguments.json), sides, tokenizer)
    report = _report(sides, tokenizer, arguments)
    if arguments.json:
        print(json.dumps(report))
    return 0 if _kept(sides["isobatch"]) else _BROKEN_PROMISE


def _load(model: str, kernels: Kernels, seed: int, console: Console) -> LLM:
    from isobatch.engine.llm import LLM

    console.print(
        f"[bold]{kernels}[/]: loading the model and its kernels (compiled on the first run: a minute)"
    )
    llm = LLM(model, kernels=kernels, policy=f"chaos:{seed}", kv_cache_bytes=_EXPERIMENT_CACHE)
    llm.generate("Ready?")  # compiles what is not in the cache yet, so that it is not timed
    return llm


def _load_of(llm: LLM, arguments: argparse.Namespace) -> Load:
    from isobatch.audit.experiment import Load
    from isobatch.engine.sampling_params import SamplingParams

    def tokens(text: str) -> tuple[int, ...]:
        chat = llm.tokenizer.chat([{"role": "user", "content": text}])
        return tuple(llm.tokenizer.encode(chat, add_special_tokens=False))

    rng = random.Random(arguments.seed)
    return Load(
        prompt=tokens(_PROMPT),
        copies=arguments.copies,
        others=tuple(tokens(rng.choice(_OTHERS)) for _ in range(arguments.others)),
        params=SamplingParams(temperature=0, max_tokens=arguments.max_tokens),
        seed=arguments.seed,
    )


def _run_side(llm: LLM, load: Load, kernels: str, console: Console) -> Outcome:
    from isobatch.audit import experiment

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(f"{kernels}: replies", total=load.copies + len(load.others))
        return experiment.run(llm.engine, load, lambda done, _all: bar.update(task, completed=done))


def _kept(outcome: Outcome) -> bool:
    """Whether every reply is the one given alone."""
    return outcome.distinct == 1 and outcome.equal_to_alone == outcome.requests


def _words(tokenizer: Any, sides: dict[str, Outcome]) -> dict[str, Any] | None:
    """Where stock's replies part, with the words on both sides."""
    divergence = sides["stock"].first_divergence
    if divergence is None:
        return None
    return {
        "token": divergence.token,
        "replies": divergence.replies,
        "after": tokenizer.decode(divergence.common)[-60:],
        "alone": tokenizer.decode(divergence.alone[:8]),
        "loaded": tokenizer.decode(divergence.loaded[:8]),
    }


def _report(sides: dict[str, Outcome], tokenizer: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    from isobatch.ops.fingerprint import fingerprint

    def side(outcome: Outcome) -> dict[str, Any]:
        return {
            "distinct": outcome.distinct,
            "equal_to_alone": outcome.equal_to_alone,
            "tokens_per_s": round(outcome.tokens_per_s, 1),
            "seconds": round(outcome.seconds, 2),
            "preemptions": outcome.preemptions,
        }

    stock = {**side(sides["stock"]), "first_divergence": _words(tokenizer, sides)}
    return {
        "requests": arguments.copies,
        "others": arguments.others,
        "max_tokens": arguments.max_tokens,
        "seed": arguments.seed,
        "prompt": _PROMPT,
        "fingerprint": fingerprint(),
        "isobatch": side(sides["isobatch"]),
        "stock": stock,
    }


def _print(console: Console, sides: dict[str, Outcome], tokenizer: Any) -> None:
    table = Table(title=f"{sides['stock'].requests} times {_PROMPT!r} at temperature 0, under changing load")
    for heading in ("", "isobatch", "stock (torch)"):
        table.add_column(heading, justify="left" if not heading else "right")
    ours, stock = sides["isobatch"], sides["stock"]
    table.add_row("different answers", str(ours.distinct), str(stock.distinct))
    requests = ours.requests
    table.add_row(
        "equal to the answer given alone",
        f"{ours.equal_to_alone} of {requests}",
        f"{stock.equal_to_alone} of {requests}",
    )
    table.add_row("tokens per second", f"{ours.tokens_per_s:.0f}", f"{stock.tokens_per_s:.0f}")
    table.add_row("times preempted and recomputed", str(ours.preemptions), str(stock.preemptions))
    console.print(table)
    words = _words(tokenizer, sides)
    if words is None:
        console.print("stock gave one answer this time; try another --seed, more --copies or --max-tokens")
    else:
        console.print(f"stock first parts at token {words['token']}, after “…{words['after']}”:")
        console.print(f"  alone:      “{words['alone']}…”")
        console.print(f"  under load: “{words['loaded']}…”")
    kept = _kept(ours)
    console.print("[green]isobatch: one answer[/]" if kept else "[red]isobatch: the promise was broken[/]")
