"""The figures of `isobatch bench verify`: what receipts cost, and what it costs to verify them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from isobatch.cli.bench_cpu import figure, load, prompt_of, seconds
from isobatch.engine.llm import LLM
from isobatch.engine.receipt import Receipt
from isobatch.engine.sampling_params import SamplingParams
from isobatch.engine.verify import Outcome
from isobatch.errors import IntegrityError

_TOKENS, _PROMPT = 1000, 32
_GREEDY: dict[str, Any] = {"temperature": 0}
_KINDS: dict[str, dict[str, Any]] = {
    "greedy": _GREEDY,
    "temperature 0.8, top-p 0.95": {"temperature": 0.8, "top_p": 0.95, "seed": 1},
}


def gate(model: Path) -> list[str]:
    """Checks that a true receipt is verified, and the same with another token refuted at that token.

    Returns:
        What is wrong; empty if nothing.
    """
    llm = load(model, "isobatch")
    failures = []
    for kind, how in _KINDS.items():
        receipt = _receipt(llm, 40, how)
        if (verdict := llm.verify(receipt)).outcome is not Outcome.VERIFIED:
            failures.append(f"{kind}: a true receipt is {verdict}")
        forged = (*receipt.token_ids[:30], receipt.token_ids[30] ^ 1, *receipt.token_ids[31:])
        if (verdict := llm.verify(replace(receipt, token_ids=forged))).token != 30:
            failures.append(f"{kind}: a receipt forged at token 30 is {verdict}")
    return failures


def measure(model: Path, repeats: int, progress: Callable[[str], None]) -> list[dict[str, Any]]:
    """Measures every figure.

    Args:
        model: as for `bench_cpu.measure`.
        repeats: runs of each side.
        progress: told what is being measured.

    Returns:
        Entries as `bench_cpu.measure` gives them.
    """
    llm = load(model, "isobatch")
    figures = []
    for kind, how in _KINDS.items():
        progress(f"verifying {_TOKENS} tokens, {kind}")
        figures.append(_verifying(llm, kind, how, repeats))
    for batch, new in ((1, 64), (64, 32)):
        progress(f"receipts, batch {batch}")
        figures.append(_asking(llm, batch, new, repeats))
    return figures


def _receipt(llm: LLM, tokens: int, how: dict[str, Any]) -> Receipt:
    params = SamplingParams(max_tokens=tokens, ignore_eos=True, receipt=True, **how)
    receipt = llm.generate([prompt_of(llm, _PROMPT)], params)[0].completions[0].receipt
    if receipt is None:
        raise IntegrityError("a receipt was asked for and did not come")
    return receipt


def _verifying(llm: LLM, kind: str, how: dict[str, Any], repeats: int) -> dict[str, Any]:
    receipt = _receipt(llm, _TOKENS, how)
    ours, theirs = seconds(repeats, lambda: llm.verify(receipt), lambda: _receipt(llm, _TOKENS, how))
    what = f"verify {_TOKENS} tokens, {kind}"
    return figure(what, "generating them alone", "s", ours, theirs, 10.0) | {"ratio": theirs / ours}


def _asking(llm: LLM, batch: int, new: int, repeats: int) -> dict[str, Any]:
    prompts = [prompt_of(llm, _PROMPT)] * batch
    without = SamplingParams(max_tokens=new, ignore_eos=True, **_GREEDY)
    with_ = replace(without, receipt=True)
    ours, theirs = seconds(
        repeats, lambda: llm.generate(prompts, with_), lambda: llm.generate(prompts, without)
    )
    tokens = batch * new
    what = f"generate with receipts, batch {batch}, {new} tokens out"
    return figure(what, "without", "tokens/s", tokens / ours, tokens / theirs, 0.95)
