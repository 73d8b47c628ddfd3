"""The engine under test: a small model made here, requests driven through it, replies compared bit by bit.

A `World` is what a relation is tried on. Its planted variants each break the contract in one way that servers
have broken it; a relation that does not notice is no test.

`python -m tests.engine_harness [FAULT]` answers fixed requests and prints the digest of the replies.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numba
import torch

from isobatch.bits import bits_equal, digest
from isobatch.config import EngineConfig
from isobatch.engine.engine import Engine
from isobatch.engine.llm import LLM
from isobatch.engine.memory import block_bytes
from isobatch.engine.output import Reply, TokenLogProbs
from isobatch.engine.prefix_cache import PrefixCache
from isobatch.engine.sampling_params import SamplingParams
from isobatch.kernels.attention.cache import KVCache
from isobatch.kernels.coding import F32, CodedRows, Coding
from isobatch.kernels.cpu.layout import CPU
from isobatch.kernels.data import floats, integers
from isobatch.kernels.layout import PAGE, Cache, PagedRows
from isobatch.kernels.log_probs.cpu import TopLogProbs
from isobatch.kernels.sampling.cpu import SamplingRows
from isobatch.models.checkpoint import expected_tensors
from isobatch.models.config import ModelConfig, RopeConfig
from isobatch.models.decoder import Decoder
from isobatch.models.inputs import Batch
from isobatch.models.loading import load_decoder
from isobatch.models.locate import demo_weights
from isobatch.ops import Ops, certified_ops, stock_ops
from isobatch.ops.fingerprint import Identity

# Every part that a layer can have, and no size that the kernels' tiles divide, apart from the head's.
TINY = ModelConfig(
    architecture="qwen3",
    vocab_size=101,
    hidden_size=72,
    intermediate_size=90,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_size=16,
    context_length=512,
    rms_norm_eps=1e-5,
    rope=RopeConfig(kind="default", theta=1e4),
    tie_embeddings=False,
    attention_bias=True,
    output_bias=True,
    qk_norm=True,
    bos_token_id=None,
    eos_token_ids=(2,),
)
POISON = 5
IDENTITY = Identity("num-tiny", weights="of their names", tokenizer="none")


class TinyCheckpoint:
    """Weights that are a function of their names.

    Args:
        poisoned: whether the embedding of token POISON is NaN.
        config: which tensors there are.
    """

    path = Path("nowhere")

    def __init__(self, *, poisoned: bool = False, config: ModelConfig = TINY) -> None:
        self.poisoned = poisoned
        self.config = config

    def names(self) -> frozenset[str]:
        return frozenset(expected_tensors(self.config))

    def shape(self, name: str) -> tuple[int, ...]:
        return expected_tensors(self.config)[name]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        weight = floats(name, *self.shape(name), kind="plain") / 2
        if name == "lm_head.weight":
            weight *= 5  # logits as far apart as a real model's
        if self.poisoned and name == "model.embed_tokens.weight":
            weight[POISON] = float("nan")
        return weight[start:stop]

    def coding(self, name: str) -> Coding:
        return F32

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> CodedRows:
        return CodedRows.of(self.read(name, start, stop))

    def close(self) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Ask:
    """A request."""

    prompt: tuple[int, ...]
    params: SamplingParams


@dataclass(frozen=True, eq=False)
class World:
    """What a relation is tried on.

    Args:
        decoder: the model, with its ops.
        cache_type: the prefix cache, which a fault may replace.
        fill: what KV memory holds before anything is written; None to leave it.
        blocks: of the KV cache, unless a relation wants it smaller.
    """

    decoder: Decoder
    cache_type: type[PrefixCache] = PrefixCache
    fill: float | None = float("nan")
    blocks: int = 128

    def engine(self, *, blocks: int | None = None, **settings: Any) -> Engine:
        """A fresh engine without a tokenizer."""
        size = (blocks or self.blocks) * block_bytes(self.decoder.config)
        engine = Engine(self.decoder, None, EngineConfig(kv_cache_bytes=size, **settings), IDENTITY)
        if self.fill is not None:
            for memory in engine._caches:
                assert isinstance(memory, KVCache)
                memory.k.fill_(self.fill)
                memory.v.fill_(self.fill)
        if engine.config.prefix_cache:
            engine.scheduler._cache = self.cache_type(engine.pool)
        return engine


def drive(
    engine: Engine,
    asks: Sequence[Ask],
    *,
    arrivals: Sequence[int] = (),
    aborts: Mapping[int, int] | None = None,
) -> list[Reply | None]:
    """Serves requests to the end, verifying the scheduler after each step.

    Args:
        engine: any, possibly with a warm prefix cache.
        asks: the requests.
        arrivals: the step before which each is added; 0 for all by default.
        aborts: the step before which some, by index, are aborted.

    Returns:
        The reply to each; None for those that were aborted.
    """
    comes, goes = arrivals or [0] * len(asks), aborts or {}
    ids: dict[int, int] = {}
    replies: dict[int, Reply] = {}
    for step in itertools.count():
        for i, ask in enumerate(asks):
            if comes[i] == step:
                ids[i] = engine.add(ask.prompt, ask.params)
        for i, at in goes.items():
            if at == step:
                engine.abort(ids[i])
        if not engine.has_work and step >= max(comes):
            break
        for reply in engine.step():
            replies[reply.request_id] = reply
        if engine.scheduler._cache is None or type(engine.scheduler._cache) is PrefixCache:
            engine.scheduler.check()
    assert engine.pool.num_free == engine.pool.num_blocks, "a reply is over and its blocks are not free"
    return [replies.get(ids[i]) for i in range(len(asks))]


@cache
def alone(world: World, ask: Ask) -> Reply:
    """The reply that all others are held against: nobody else there, the prompt whole, nothing cached."""
    (reply,) = drive(world.engine(prefix_cache=False), [ask])
    assert reply is not None
    return reply


class MovedError(AssertionError):
    """A reply depends on what it must not."""


def content(reply: Reply, index: int = 0) -> tuple[torch.Tensor, ...]:
    """What is promised of a completion: tokens, log-probabilities, end and receipt; or of a failure."""
    if reply.error is not None:
        assert not reply.completions
        return (torch.tensor(list(f"{type(reply.error).__name__}: {reply.error}".encode())),)
    completion = reply.completions[index]
    tensors = [
        torch.tensor(completion.token_ids),
        torch.tensor([*completion.finish_reason.encode(), completion.stop_reason or 0]),
    ]
    if completion.receipt is not None:
        tensors.append(torch.tensor(list(completion.receipt.to_json().encode())))
    for entries in (completion.log_probs, reply.prompt_log_probs):
        tensors += _as_tensors(entries) if entries is not None else []
    return tuple(tensors)


def _as_tensors(entries: Sequence[TokenLogProbs]) -> list[torch.Tensor]:
    top = [pair for entry in entries for pair in entry.top]
    return [
        torch.tensor([(entry.token_id, entry.rank) for entry in entries]),
        torch.tensor([entry.log_prob for entry in entries], dtype=torch.float32),
        torch.tensor([token for token, _ in top]),
        torch.tensor([log_prob for _, log_prob in top], dtype=torch.float32),
    ]


def expect_same(got: Reply | None, want: Reply, why: str, *, index: int = 0) -> None:
    """Compares completion `index` of one reply with the first of another, bit by bit.

    Raises:
        MovedError: they differ.
    """
    assert got is not None
    pairs = list(itertools.zip_longest(content(got, index), content(want)))
    if not all(left is not None and right is not None and bits_equal(left, right) for left, right in pairs):
        raise MovedError(f"{why}: {content(got, index)} instead of {content(want)}")


def forward(decoder: Decoder, *sequences: Sequence[int], fill: float = float("nan")) -> list[torch.Tensor]:
    """Logits of every position of whole sequences, in one pass and without the engine.

    Args:
        decoder: the model.
        sequences: token ids; their blocks are dealt out in turns.
        fill: what KV memory holds before.

    Returns:
        float32 [length, V] for each.
    """
    lengths = [len(tokens) for tokens in sequences]
    return list(torch.split(forward_rows(decoder, sequences, range(sum(lengths)), fill)[0], lengths))


def forward_rows(
    decoder: Decoder, sequences: Sequence[Sequence[int]], wanted: Sequence[int], fill: float = float("nan")
) -> tuple[torch.Tensor, list[Cache]]:
    """The same, of some rows only: float32 [S, V]; and the caches after it."""
    lengths = [len(tokens) for tokens in sequences]
    pages = -(-max(lengths) // PAGE)
    tables = torch.arange(pages * len(sequences)).reshape(pages, -1).T.contiguous()
    slots = [tables[r, p // PAGE] * PAGE + p % PAGE for r, n in enumerate(lengths) for p in range(n)]
    rows = PagedRows(
        torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32),
        torch.tensor(lengths, dtype=torch.int32),
        tables.to(torch.int32),
        torch.stack(slots),
    )
    positions = torch.cat([torch.arange(n) for n in lengths])
    tokens = torch.tensor([token for sequence in sequences for token in sequence])
    caches = decoder.kv_caches(tables.numel())
    for memory in caches:
        if isinstance(memory, KVCache):
            memory.k.fill_(fill)
            memory.v.fill_(fill)
    rows_wanted = torch.tensor(wanted, dtype=torch.int64)
    return decoder(Batch(tokens, positions, rows, rows_wanted), caches), caches


@contextmanager
def captured_logits(decoder: Decoder) -> Iterator[list[torch.Tensor]]:
    """Collects the logits of each step inside the block."""
    steps: list[torch.Tensor] = []

    def observer(op: str, arguments: Mapping[str, Any], result: Any) -> None:
        if op == "logits":
            steps.append(result)

    with decoder.ops.observed(observer):
        yield steps


def stream(number: int) -> tuple[int, ...]:
    """Tokens without end, nearly: what prompts are cut from, so that they share beginnings."""
    drawn = integers(f"stream {number}", 400, TINY.vocab_size).tolist()
    return tuple(token + (token == POISON) for token in drawn)


# Planted faults. Each stands for one that servers have had.

_TABLE = certified_ops()._table


def planted(**functions: Callable[..., Any]) -> Ops:
    """The certified ops, some of them replaced."""
    table = {**_TABLE, **functions}
    return Ops("planted", {**table, "logits": partial(table["linear"], bias=None)}, CPU)


def _split_linear(x: torch.Tensor, weight: Any, bias: torch.Tensor | None, parts: int) -> torch.Tensor:
    """K in parts, summed apart."""
    total = torch.zeros(len(x), weight.outputs)
    for columns in torch.arange(x.shape[1]).chunk(parts):
        masked = torch.zeros_like(x)
        masked[:, columns] = x[:, columns]
        total += _TABLE["linear"](x=masked, weight=weight, bias=None)
    return total if bias is None else total + bias


def linear_by_rows(x: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> torch.Tensor:
    """K is split as soon as there is a second row."""
    return _split_linear(x, weight, bias, 1 if len(x) == 1 else 2)


def linear_by_threads(x: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> torch.Tensor:
    """K is split among the threads."""
    return _split_linear(x, weight, bias, numba.get_num_threads())


def cascade_attention(q: torch.Tensor, cache: KVCache, rows: PagedRows, scale: float) -> torch.Tensor:
    """What was there before is attended apart from the chunk. Exact, but for merging the two."""
    out = torch.empty(q.shape)
    starts = rows.query_starts.tolist()
    for r, length in enumerate(rows.context_lengths.tolist()):
        pages = rows.block_tables[r, : -(-length // PAGE)].long()
        group = q.shape[1] // cache.k.shape[1]
        k = cache.k[pages].permute(1, 2, 0, 3).flatten(2)[..., :length].repeat_interleave(group, 0).double()
        v = cache.v[pages].permute(1, 0, 2, 3).flatten(1, 2)[:, :length].repeat_interleave(group, 0).double()
        before = length - (starts[r + 1] - starts[r])
        scores = q[starts[r] : starts[r + 1]].double().transpose(0, 1) @ k * scale
        scores.masked_fill_(torch.arange(length) > torch.arange(before, length)[:, None], float("-inf"))
        parts = [slice(a, b) for a, b in ((0, before), (before, length)) if a < b]
        sums = torch.stack([scores[..., part].logsumexp(-1).float() for part in parts])
        means = torch.stack([(scores[..., part].softmax(-1) @ v[:, part]).float() for part in parts])
        merged = (sums.softmax(0)[..., None] * means).sum(0)
        out[starts[r] : starts[r + 1]] = merged.transpose(0, 1)
    return out


def attention_to_page_end(q: torch.Tensor, cache: KVCache, rows: PagedRows, scale: float) -> torch.Tensor:
    """A decode step reads its last block to the end, whatever lies there."""
    single = rows.query_starts.diff() == 1
    whole = (rows.context_lengths + PAGE - 1) // PAGE * PAGE
    lengths = torch.where(single, whole, rows.context_lengths).to(torch.int32)
    result: torch.Tensor = _TABLE["attention"](
        q=q, cache=cache, rows=replace(rows, context_lengths=lengths), scale=scale
    )
    return result


def sample_by_row(logits: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """Noise tied to the place in the batch."""
    shifted = replace(rows, position=rows.position + 1000 * torch.arange(len(logits)))
    result: torch.Tensor = _TABLE["sample"](logits=logits, rows=shifted)
    return result


_calls = itertools.count()


def sample_by_time(logits: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """Noise from a generator that all requests share."""
    shifted = replace(rows, position=rows.position + 1000 * next(_calls))
    result: torch.Tensor = _TABLE["sample"](logits=logits, rows=shifted)
    return result


def sample_by_hash(logits: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """Noise keyed by Python's hash of a string, another one in each process."""
    result: torch.Tensor = _TABLE["sample"](
        logits=logits, rows=replace(rows, seed=rows.seed ^ hash("isobatch"))
    )
    return result


def log_probs_by_rows(logits: torch.Tensor, chosen: torch.Tensor, count: int) -> TopLogProbs:
    """Another implementation from four rows on."""
    table = stock_ops()._table if len(logits) >= 4 else _TABLE
    result: TopLogProbs = table["top_log_probs"](logits=logits, chosen=chosen, count=count)
    return result


class CarelessCache(PrefixCache):
    """Takes a block for another that differs in its last token, as one that trusts a hash might."""

    def match(self, tokens: tuple[int, ...]) -> tuple[list[int], Any]:
        blocks, node = [], self.root
        for start in range(0, len(tokens) - PAGE + 1, PAGE):
            wanted = tokens[start : start + PAGE - 1]
            child = next((c for c in node.children.values() if c.tokens[:-1] == wanted), None)
            if child is None:
                break
            node = child
            blocks.append(node.block)
        return blocks, node


FAULTS: dict[str, Callable[[], Ops]] = {
    "none": certified_ops,
    "linear_by_rows": lambda: planted(linear=linear_by_rows),
    "linear_by_threads": lambda: planted(linear=linear_by_threads),
    "cascade_attention": lambda: planted(attention=cascade_attention),
    "attention_to_page_end": lambda: planted(attention=attention_to_page_end),
    "sample_by_row": lambda: planted(sample=sample_by_row),
    "sample_by_time": lambda: planted(sample=sample_by_time),
    "sample_by_hash": lambda: planted(sample=sample_by_hash),
    "log_probs_by_rows": lambda: planted(top_log_probs=log_probs_by_rows),
    "stock": stock_ops,
}


@cache
def tiny_world(fault: str = "none", *, poisoned: bool = False) -> World:
    """A world over the tiny model.

    Args:
        fault: a key of FAULTS, or "careless_cache".
        poisoned: whether the embedding of POISON is NaN.
    """
    ops = FAULTS["none" if fault == "careless_cache" else fault]()
    decoder = load_decoder(TinyCheckpoint(poisoned=poisoned), ops)
    return World(
        decoder,
        CarelessCache if fault == "careless_cache" else PrefixCache,
        # Fresh pages of a real process are zeros. A fault that reads them would drown in NaN from the start.
        {"stock": None, "attention_to_page_end": 0.0}.get(fault, float("nan")),
    )


@cache
def smollm2(kernels: str = "isobatch") -> LLM:
    """The real model."""
    return LLM(demo_weights(), kv_cache_bytes=2**26, kernels=kernels, progress=False)


def fixed_asks() -> tuple[Ask, ...]:
    """A handful of requests, greedy and sampled, that share beginnings and cross every boundary there is."""
    lengths = ((0, 5), (1, 40), (0, 130), (1, 33), (2, 17))
    return tuple(
        Ask(
            stream(number)[:length],
            SamplingParams(
                temperature=(0, 0.8, 1)[i % 3],
                seed=i,
                max_tokens=12,
                ignore_eos=True,
                logprobs=5,
                repetition_penalty=(1, 1.2)[i % 2],
                receipt=True,
            ),
        )
        for i, (number, length) in enumerate(lengths)
    )


def answer(fault: str = "none") -> str:
    """The digest of the replies to `fixed_asks`."""
    replies = drive(tiny_world(fault).engine(), fixed_asks())
    return digest(*(tensor for reply in replies if reply is not None for tensor in content(reply)))


if __name__ == "__main__":
    print(answer(*sys.argv[1:]))
