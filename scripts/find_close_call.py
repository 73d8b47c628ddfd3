"""Finds the seed of `isobatch demo`: one at which the two likeliest first tokens nearly tie.

In float32 torch's logits move by about 1e-5 with the load, which decides few tokens. At such a seed it can
decide the first one, on any CPU. All that is searched has the bits of the written orders, so every machine
finds the same seed.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from numba import prange

from isobatch import LLM, SamplingParams
from isobatch.cli.demo import PROMPT
from isobatch.kernels.cpu.jit import kernel
from isobatch.kernels.sampling.cpu import _gumbel, _uniform
from isobatch.kernels.sampling.philox import noise_words

_CANDIDATES = 64  # the likeliest tokens; the others together weigh next to nothing
_AT_A_TIME = 1 << 20


@kernel
def _margins(logits, ids, position, first, margins, winners):
    for s in prange(len(margins)):
        best, second, winner = -np.inf, -np.inf, 0
        for i in range(len(ids)):
            words = noise_words(first + s, position, ids[i] // 4)
            score = logits[i] + _gumbel(_uniform(words[ids[i] % 4]))
            if score > best:
                best, second, winner = score, best, i
            elif score > second:
                second = score
        margins[s], winners[s] = best - second, winner


def main() -> None:
    """Searches and prints the closest calls, best last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1 << 24, help="how many to try, from 0")
    arguments = parser.parse_args()
    llm = LLM("demo")
    seen: list[torch.Tensor] = []
    with llm.engine.decoder.ops.observed(
        lambda op, given, _: seen.append(given["logits"]) if op == "sample" else None
    ):
        (reply,) = llm.chat(
            [{"role": "user", "content": PROMPT}], SamplingParams(temperature=1, max_tokens=1)
        )
    logits, ids = seen[0][0].topk(_CANDIDATES)
    position = len(reply.prompt_token_ids)
    closest = np.inf
    margins, winners = np.empty(_AT_A_TIME), np.empty(_AT_A_TIME, np.int64)
    for first in range(0, arguments.seeds, _AT_A_TIME):
        _margins(logits.double().numpy(), ids.numpy(), position, first, margins, winners)
        at = int(margins.argmin())
        if margins[at] < closest:
            closest = margins[at]
            word = llm.tokenizer.decode([int(ids[winners[at]])])
            print(f"seed {first + at}: {word!r} by {closest:.1e}", flush=True)


if __name__ == "__main__":
    main()
