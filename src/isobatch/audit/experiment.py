"""The experiment of He 2025: copies of one prompt under changing load; how many different answers come back?

Source: Horace He, "Defeating Nondeterminism in LLM Inference", Thinking Machines Lab, 2025.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from isobatch.engine.engine import Engine
from isobatch.engine.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class Load:
    """What is sent, and when: a function of the seed, so that two engines meet the same load.

    Args:
        prompt: token ids of the prompt whose copies are counted.
        copies: how many.
        others: token ids of prompts that arrive between them.
        params: how every prompt is continued.
        seed: of the order and the times of arrival.
    """

    prompt: tuple[int, ...]
    copies: int
    others: tuple[tuple[int, ...], ...]
    params: SamplingParams
    seed: int


@dataclass(frozen=True, slots=True)
class Divergence:
    """Where a reply parts from the one given alone.

    Args:
        token: index of the first differing token of the reply.
        common: the tokens before it.
        alone: tokens from there on, of the reply given alone.
        loaded: tokens from there on, of the reply given under load.
        replies: how many replies differ from the one given alone.
    """

    token: int
    common: tuple[int, ...]
    alone: tuple[int, ...]
    loaded: tuple[int, ...]
    replies: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came back.

    Args:
        requests: copies sent.
        distinct: different replies among them.
        equal_to_alone: replies equal to the one given alone.
        first_divergence: of the reply that parts earliest from the one given alone, or None.
        tokens: generated under load, other prompts' included.
        seconds: that it took, the run alone not included.
        preemptions: how often a copy lost its memory and was recomputed.
    """

    requests: int
    distinct: int
    equal_to_alone: int
    first_divergence: Divergence | None
    tokens: int
    seconds: float
    preemptions: int

    @property
    def tokens_per_s(self) -> float:
        """Throughput under load."""
        return self.tokens / self.seconds


def run(
    engine: Engine, load: Load, progress: Callable[[int, int], None] = lambda _done, _all: None
) -> Outcome:
    """Runs the prompt alone, then its copies among the other prompts, arriving at random.

    Args:
        engine: idle; with a chaotic policy the scheduler too decides at random.
        load: what to send.
        progress: told (replies so far, replies in all).

    Returns:
        The outcome; compares token ids.
    """
    alone = _replies(engine, [load.prompt], load, None, lambda _done: None)[0][0]
    rng = random.Random(load.seed)
    arrivals = [load.prompt] * load.copies + list(load.others)
    rng.shuffle(arrivals)
    started = time.perf_counter()
    results = _replies(engine, arrivals, load, rng, lambda done: progress(done, len(arrivals)))
    seconds = time.perf_counter() - started
    copies = [reply for reply, prompt in zip(results, arrivals, strict=True) if prompt == load.prompt]
    replies = [tokens for tokens, _ in copies]
    differing = [tokens for tokens in replies if tokens != alone]
    return Outcome(
        requests=len(replies),
        distinct=len(set(replies)),
        equal_to_alone=len(replies) - len(differing),
        first_divergence=_earliest(alone, differing),
        tokens=sum(len(tokens) for tokens, _ in results),
        seconds=seconds,
        preemptions=sum(count for _, count in copies),
    )


def _replies(
    engine: Engine,
    prompts: Sequence[tuple[int, ...]],
    load: Load,
    rng: random.Random | None,
    progress: Callable[[int], None],
) -> list[tuple[tuple[int, ...], int]]:
    """(token ids, preemptions) for each prompt, which arrive at random, or all at once without `rng`."""
    order: list[int] = []
    done: dict[int, tuple[tuple[int, ...], int]] = {}
    while len(done) < len(prompts):
        if rng is None:
            arriving = len(prompts)
        else:
            arriving = rng.choice((0, 0, 0, 1, 2, 5)) if engine.has_work else 1
        arrived = prompts[len(order) : len(order) + arriving]
        order += [engine.add(prompt, load.params) for prompt in arrived]
        for reply in engine.step():
            completion = reply.completions[0]
            done[reply.request_id] = (completion.token_ids, completion.preemptions)
            progress(len(done))
    return [done[request] for request in order]


def _earliest(alone: tuple[int, ...], differing: list[tuple[int, ...]]) -> Divergence | None:
    if not differing:
        return None

    def common(reply: tuple[int, ...]) -> int:
        pairs = zip(alone, reply, strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(alone), len(reply)))

    reply = min(differing, key=common)
    at = common(reply)
    return Divergence(at, alone[:at], alone[at:], reply[at:], len(differing))
