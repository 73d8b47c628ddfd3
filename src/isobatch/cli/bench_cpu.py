"""The figures of `isobatch bench cpu`: both sides of every ratio take turns in one process."""

from __future__ import annotations

import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from isobatch.bits import bits_equal
from isobatch.cli.checks import check_digests, check_members
from isobatch.engine.llm import LLM
from isobatch.engine.memory import weight_bytes
from isobatch.engine.output import Reply
from isobatch.engine.sampling_params import SamplingParams
from isobatch.errors import IntegrityError, MissingDependencyError
from isobatch.kernels.coding import CodedRows
from isobatch.kernels.data import floats
from isobatch.kernels.linear.weight import PackedWeight
from isobatch.models.checkpoint import open_checkpoint
from isobatch.ops import certified_ops

_TEXT = "The history of physics is long, and the people who made it were often stubborn, curious and brave. "
_KV_BYTES = 256 << 20
# Outputs and inputs of SmolLM2's four products.
_SHAPES = ((960, 576), (576, 576), (3072, 576), (576, 1536))


def _silent(_what: str) -> None:
    """Progress that nobody watches."""


def gate(model: Path) -> list[str]:
    """Checks bits before any number: golden digests, every member, and a batch against its rows alone.

    Returns:
        What is wrong; empty if nothing.
    """
    failures = [*check_digests(_silent).failures, *check_members(_silent).failures]
    llm = load(model, "isobatch")
    params = SamplingParams(temperature=0, max_tokens=8, logprobs=3)
    prompts = [prompt_of(llm, 20 + 7 * i) for i in range(9)]
    together = llm.generate(prompts, params)
    for prompt, batched in zip(prompts, together, strict=True):
        if _said(llm.generate([prompt], params)[0]) != _said(batched):
            failures.append(f"a prompt of {len(prompt)} tokens: alone differs from batched")
    return failures


def measure(model: Path, repeats: int, progress: Callable[[str], None]) -> list[dict[str, Any]]:
    """Measures every figure.

    Args:
        model: a .gguf file, which transformers can load too.
        repeats: runs of each side.
        progress: told what is being measured.

    Returns:
        One entry per figure: what, against, unit, isobatch, other, ratio (above 1 is better), goal.
    """
    progress("linear at 256 rows against torch")
    figures = [_linear(rows, goal, max(repeats, 15)) for rows, goal in ((1, 0.0), (16, 0.0), (256, 0.75))]
    progress("loading both models")
    llm = load(model, "isobatch")
    other = _transformers(model)
    for batch, new, goal in ((1, 64, 1.5), (32, 48, 2.0)):
        progress(f"decode, batch {batch}, against transformers")
        figures.append(_decode(llm, other, batch, new, goal, repeats))
    progress("prefill of 1,000 tokens against transformers")
    figures.append(_prefill(llm, other, 1000, 0.8, repeats))
    del other
    gc.collect()
    progress("batch 64 against stock kernels in the same engine")
    figures.append(_against_stock(llm, load(model, "stock"), repeats))
    del llm
    gc.collect()
    progress("peak memory")
    figures.append(_memory(model))
    return figures


def figure(what: str, against: str, unit: str, ours: float, other: float, goal: float) -> dict[str, Any]:
    """One entry of the results: both sides, their ratio, and what that should be at least, 0 for no goal."""
    return {
        "what": what,
        "against": against,
        "unit": unit,
        "isobatch": ours,
        "other": other,
        "ratio": ours / other,
        "goal": goal,
    }


def seconds(repeats: int, *sides: Callable[[], object]) -> list[float]:
    """The median time of each side; the sides take turns, so that a slow spell of the machine hits all."""
    for side in sides:
        side()
    times: list[list[float]] = [[] for _ in sides]
    for _ in range(repeats):
        for side, spent in zip(sides, times, strict=True):
            started = time.perf_counter()
            side()
            spent.append(time.perf_counter() - started)
    return [statistics.median(spent) for spent in times]


def _linear(rows: int, goal: float, repeats: int) -> dict[str, Any]:
    ops = certified_ops()
    ours_total = torch_total = operations = 0.0
    for outputs, inputs in _SHAPES:
        x, w = floats("bench/x", rows, inputs, kind="plain"), floats("bench/w", outputs, inputs, kind="plain")
        packed = PackedWeight.pack(CodedRows.of(w))
        if not bits_equal(ops.linear(x, packed)[:1], ops.linear(x[:1], packed)):
            raise IntegrityError(f"linear {outputs} x {inputs}: a row alone differs from the row in a batch")
        ours, torchs = seconds(
            repeats,
            lambda x=x, packed=packed: ops.linear(x, packed),  # type: ignore[misc]
            lambda x=x, w=w: torch.nn.functional.linear(x, w),  # type: ignore[misc]
        )
        ours_total += ours
        torch_total += torchs
        operations += 2e-9 * rows * outputs * inputs
    what = f"linear, {rows} rows, SmolLM2's four shapes"
    return figure(what, "torch", "GFLOP/s", operations / ours_total, operations / torch_total, goal)


def load(model: Path, kernels: str) -> LLM:
    """A model whose every run computes everything."""
    # No prefix cache: the same prompts come again and again, and are to be computed each time.
    return LLM(model, kernels=kernels, kv_cache_bytes=_KV_BYTES, prefix_cache=False, progress=False)


def _transformers(model: Path) -> Any:
    try:
        import transformers
    except ImportError:
        raise MissingDependencyError(
            "transformers is not installed", fix="pip install isobatch[bench]"
        ) from None
    # From our reader, not transformers': the same weights to the bit, and 2 seconds instead of 25.
    checkpoint = open_checkpoint(model)
    ours = checkpoint.config
    config = transformers.LlamaConfig(
        vocab_size=ours.vocab_size,
        hidden_size=ours.hidden_size,
        intermediate_size=ours.intermediate_size,
        num_hidden_layers=ours.num_layers,
        num_attention_heads=ours.num_heads,
        num_key_value_heads=ours.num_kv_heads,
        head_dim=ours.head_size,
        max_position_embeddings=ours.context_length,
        rms_norm_eps=ours.rms_norm_eps,
        rope_theta=ours.rope.theta,
        tie_word_embeddings=ours.tie_embeddings,
        dtype=torch.float32,
    )
    other = transformers.LlamaForCausalLM(config).eval()
    weights = {name: checkpoint.read(name) for name in checkpoint.names()}
    missing, unexpected = other.load_state_dict(weights, strict=False)
    checkpoint.close()
    if set(missing) - {"lm_head.weight"} or unexpected:
        raise IntegrityError("transformers wants other tensors", got=f"{missing}, {unexpected}")
    return other


def prompt_of(llm: LLM, length: int) -> list[int]:
    """A prompt of so many tokens."""
    tokens = llm.tokenizer.encode(_TEXT)
    return (tokens * (length // len(tokens) + 1))[:length]


def _said(reply: Reply) -> tuple[object, object]:
    return reply.completions[0].token_ids, reply.completions[0].log_probs


def _theirs(other: Any, prompts: list[list[int]], new: int) -> None:
    ids = torch.tensor(prompts)
    with torch.inference_mode():
        other.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
        )


def _decode(llm: LLM, other: Any, batch: int, new: int, goal: float, repeats: int) -> dict[str, Any]:
    prompts = [prompt_of(llm, 32)] * batch
    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
    ours, theirs = seconds(
        repeats, lambda: llm.generate(prompts, params), lambda: _theirs(other, prompts, new)
    )
    what = f"decode, batch {batch}, 32 tokens in, {new} out"
    tokens = batch * new
    return figure(what, "transformers", "tokens/s", tokens / ours, tokens / theirs, goal)


def _prefill(llm: LLM, other: Any, length: int, goal: float, repeats: int) -> dict[str, Any]:
    prompt = prompt_of(llm, length)
    once = SamplingParams(temperature=0, max_tokens=1)
    ours, theirs = seconds(repeats, lambda: llm.generate([prompt], once), lambda: _theirs(other, [prompt], 1))
    what = f"prefill, {length} tokens"
    return figure(what, "transformers", "tokens/s", length / ours, length / theirs, goal)


def _against_stock(llm: LLM, stock: LLM, repeats: int) -> dict[str, Any]:
    batch, new = 64, 32
    prompts = [prompt_of(llm, 32)] * batch
    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
    ours, theirs = seconds(
        repeats, lambda: llm.generate(prompts, params), lambda: stock.generate(prompts, params)
    )
    what = f"batch {batch}, 32 tokens in, {new} out"
    tokens = batch * new
    return figure(what, "stock kernels, same engine", "tokens/s", tokens / ours, tokens / theirs, 1.0)


_PEAK = """
import sys
from pathlib import Path
from isobatch import LLM, SamplingParams
llm = LLM(sys.argv[1], kv_cache_bytes=int(sys.argv[2]), progress=False)
llm.generate(["Once upon a time"] * 8, SamplingParams(temperature=0, max_tokens=8))
# Not ru_maxrss: that of a child begins with its parent's.
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(int(status["VmHWM"].split()[0]) * 1024)
"""


def _memory(model: Path) -> dict[str, Any]:
    """Peak resident memory of a process of its own, Python and libraries included, over what is allowed."""
    command = [sys.executable, "-c", _PEAK, str(model), str(_KV_BYTES)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    peak = int(ran.stdout)
    checkpoint = open_checkpoint(model)
    allowed = 1.5 * weight_bytes(checkpoint.config) + _KV_BYTES
    checkpoint.close()
    what = "peak memory, allowed (1.5 x weights + KV cache) over used"
    return figure(what, "the allowance", "MB", peak / 1e6, allowed / 1e6, 1.0) | {"ratio": allowed / peak}
