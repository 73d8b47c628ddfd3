"""The workloads of `isobatch bench serve`, which other engines can be measured on too.

Nothing is imported here that loads a GPU's libraries: whoever measures another engine does so in its process.
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass

from isobatch.engine.sampling_params import SamplingParams

MODEL = "qwen3-8b"
"""What they are measured with: these dimensions, and random weights."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests that all come at once.

    Args:
        requests: how many.
        prompt: their prompts' lengths, least and most.
        reply: their replies' lengths, least and most.
        goal: seconds for all, at most; 0 where the goal is a rate.
        rate: new tokens per second, at least; 0 where the goal is a time.
    """

    requests: int
    prompt: tuple[int, int]
    reply: tuple[int, int]
    goal: float = 0.0
    rate: float = 0.0

    @property
    def name(self) -> str:
        """As tables have it."""
        prompt, reply = (str(a) if a == b else f"{a}..{b}" for a, b in (self.prompt, self.reply))
        return f"{self.requests} x {prompt} in, {reply} out"

    def asks(self, vocabulary: int) -> list[tuple[list[int], SamplingParams]]:
        """Prompts and parameters, the same each time."""
        draw = random.Random(self.name)
        return [
            (
                [draw.randrange(vocabulary) for _ in range(draw.randint(*self.prompt))],
                SamplingParams(temperature=0, max_tokens=draw.randint(*self.reply), ignore_eos=True),
            )
            for _ in range(self.requests)
        ]

    def digest(self, vocabulary: int) -> str:
        """Of all prompts and lengths of replies: equal where two engines were asked the same."""
        asks = [(prompt, params.max_tokens) for prompt, params in self.asks(vocabulary)]
        return hashlib.sha256(json.dumps(asks).encode()).hexdigest()


WORKLOADS = (
    Workload(1000, (64, 192), (90, 110), goal=6.2),
    Workload(1, (128, 128), (256, 256), rate=230),
    Workload(8, (128, 128), (256, 256), rate=1700),
    Workload(32, (1024, 1024), (256, 256), rate=3700),
    Workload(128, (1024, 1024), (128, 128), rate=3900),
    Workload(8, (6000, 6000), (64, 64), rate=320),
    Workload(64, (4000, 4000), (16, 16), rate=160),
)
"""What vLLM was measured on."""

BATCHES = tuple(1 << doubling for doubling in range(11))
"""Sequences of a decode step that `--only steps` times, of CONTEXT tokens each."""
CONTEXT = 256
CONTEXTS = (128, 512, 2048, 8192, 32768, 131072)
"""Tokens of each sequence of such a step, for batches of FEW."""
FEW = (1, 8, 32)
