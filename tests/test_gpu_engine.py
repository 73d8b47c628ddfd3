"""The engine on the GPU's kernels: on a GPU where there is one, else under Triton's interpreter."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from isobatch import LLM, SamplingParams
from isobatch.config import EngineConfig
from isobatch.engine.backend import fitted, open_model, sized
from isobatch.engine.engine import Engine
from isobatch.engine.memory import block_bytes, step_bytes, weight_bytes
from isobatch.engine.output import Reply
from isobatch.engine.verify import verify
from isobatch.errors import ConfigError, OutOfMemoryError, UnknownKeyError
from isobatch.kernels.attention.gpu_rows import GpuKVCache
from isobatch.kernels.gpu.device import dtypes
from isobatch.kernels.linear.gpu import Linear
from isobatch.kernels.linear.members import Shape
from isobatch.kernels.linear.triton import linear_plain
from isobatch.kernels.stock import DenseWeight
from isobatch.models.decoder import Decoder
from isobatch.models.loading import load_decoder
from isobatch.models.presets import preset
from isobatch.ops import cuda, gpu
from isobatch.ops.gpu import GpuOps
from isobatch.ops.queued import QueuedOps
from tests.checkpoints import tiny_model, trained_bpe
from tests.engine_harness import (
    IDENTITY,
    TINY,
    Ask,
    MovedError,
    TinyCheckpoint,
    drive,
    expect_same,
    stream,
    tiny_world,
)

# Stale memory is NaN, and NumPy, which interprets, says so where it is masked.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")

DTYPE = dtypes()[0]
NAME = str(DTYPE).removeprefix("torch.")
# Prompts on both sides of a page's end, one that begins like another; greedy, sampled, filtered, penalised.
ASKS = tuple(
    Ask(
        stream(number)[:length],
        SamplingParams(max_tokens=3, ignore_eos=True, logprobs=3, receipt=True, **how),
    )
    for number, length, how in (
        (0, 5, {"temperature": 0}),
        (1, 33, {"temperature": 1, "seed": 3, "top_p": 0.9}),
        (1, 18, {"temperature": 0.7, "seed": 9, "top_k": 40, "repetition_penalty": 1.2}),
    )
)


@cache
def decoder() -> Decoder:
    return load_decoder(TinyCheckpoint(), GpuOps(DTYPE, (TINY.num_heads, TINY.num_kv_heads, TINY.head_size)))


def engine(*, blocks: int = 32, model: Decoder | None = None, **settings: Any) -> Engine:
    size = blocks * block_bytes(TINY, DTYPE.itemsize)
    config = EngineConfig(device="cuda", dtype=NAME, kv_cache_bytes=size, **settings)  # type: ignore[arg-type]
    made = Engine(model or decoder(), None, config, IDENTITY)
    for cache_ in made._caches:
        assert isinstance(cache_, GpuKVCache)
        cache_.k.fill_(float("nan"))
        cache_.v.fill_(float("nan"))
    return made


@cache
def alone(ask: Ask) -> Reply:
    (reply,) = drive(engine(prefix_cache=False), [ask])
    assert reply is not None
    return reply


def expect_alone(replies: Sequence[Reply | None], where: str) -> None:
    for ask, reply in zip(ASKS, replies, strict=True):
        assert reply is not None
        expect_same(reply, alone(ask), where)


LOADS: dict[str, dict[str, Any]] = {
    "batched": {},
    "chunked": {"max_batch_tokens": 7},
    "chaotic": {"policy": "chaos:5", "max_batch_tokens": 40},
    "short of blocks": {"blocks": 3, "prefix_cache": False},
}


@pytest.mark.parametrize("load", LOADS)
def test_reply_depends_on_the_request_alone(load: str) -> None:
    busy = engine(**LOADS[load])
    expect_alone(drive(busy, ASKS), load)
    if load == "batched":
        again = drive(busy, ASKS)
        expect_alone(again, f"{load}, cached")
        assert any(reply is not None and reply.cached_tokens for reply in again)


def test_decode_is_prefill() -> None:
    """Scored as a prompt, a reply's tokens have the log-probabilities with which they were drawn."""
    reply = alone(ASKS[0])
    (drawn,) = reply.completions
    whole = (*reply.prompt_token_ids, *drawn.token_ids)
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=3, ignore_eos=True)
    (scored,) = drive(engine(), [Ask(whole, params)])
    assert scored is not None
    assert scored.prompt_log_probs is not None
    assert scored.prompt_log_probs[-len(drawn.token_ids) :] == drawn.log_probs


def test_receipt_is_verified_and_its_forgery_refuted() -> None:
    receipt = alone(ASKS[2]).completions[0].receipt
    assert receipt is not None
    assert str(verify(engine(), receipt, chunk=7)) == "verified (3 tokens)"
    forged = replace(receipt, token_ids=(*receipt.token_ids[:2], receipt.token_ids[2] ^ 1))
    verdict = verify(engine(), forged)
    assert (verdict.field, verdict.token) == ("completion.token_ids", 2)


def test_control_a_product_split_by_load_is_caught() -> None:
    ops = decoder().ops

    def split(x: torch.Tensor, weight: DenseWeight, bias: Any = None, out_dtype: Any = None) -> torch.Tensor:
        if len(x) < 8:
            return linear_plain(x, weight, bias, out_dtype)
        half = x.shape[1] // 2 // 8 * 8
        parts = [
            linear_plain(x[:, part].contiguous(), DenseWeight(weight.dense[:, part].contiguous()))
            for part in (slice(0, half), slice(half, None))
        ]
        total = parts[0] + parts[1]
        return (total if bias is None else total + bias).to(out_dtype or x.dtype)

    table = dict(ops._table)
    ops._table["linear"] = split
    try:
        replies = drive(engine(max_batch_tokens=64), ASKS)
    finally:
        ops._table.update(table)
    with pytest.raises(MovedError):
        expect_alone(replies, "split")


def test_log_probabilities_are_nearly_those_of_float32() -> None:
    ask = ASKS[0]
    (want,) = drive(tiny_world().engine(), [ask])
    assert want is not None
    ours, theirs = (r.completions[0].log_probs for r in (alone(ask), want))
    assert ours is not None
    assert theirs is not None
    # The first token's, since later ones are of the tokens chosen before.
    assert abs(ours[0].top[0][1] - theirs[0].top[0][1]) < 0.05


def test_model_loads_and_answers(tmp_path: Path) -> None:
    tiny_model("llama", vocab_size=448).save_pretrained(tmp_path)
    trained_bpe("llama-bpe", ["the quick brown fox " * 9]).save(str(tmp_path / "tokenizer.json"))
    settings: dict[str, Any] = {"device": "cuda", "dtype": NAME, "kv_cache_bytes": 1 << 20, "progress": False}
    ours, other = LLM(tmp_path, **settings), LLM(tmp_path, kv_cache_bytes=1 << 20, progress=False)
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    (reply,) = ours.generate("the quick", params)
    assert len(reply.completions[0].token_ids) == 2
    assert reply.fingerprint is not None
    assert reply.fingerprint.startswith("iso-")
    assert reply.fingerprint != other.fingerprint


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"device": "gpu"}, ConfigError, "cpu or cuda"),
        ({"dtype": "bf16"}, UnknownKeyError, "bfloat16"),
        ({"device": "cuda", "dtype": "float32"}, ConfigError, "bfloat16 or float16"),
        ({"dtype": "bfloat16"}, ConfigError, "expected float32"),
    ],
)
def test_settings_without_kernels_are_refused(settings: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        EngineConfig(**settings)


@pytest.mark.weights
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_machine_without_a_gpu_is_told_so() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    words = ["-m", "isobatch", "generate", "demo", "hi", "--set", "device=cuda"]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment)
    assert done.returncode == 3
    assert "no GPU is to be had" in done.stderr


def test_what_a_recording_reads_lives_as_long_as_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Graph:
        def replay(self) -> None:
            pass

    monkeypatch.setattr(cuda, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda _graph, pool: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _device: None)
    read = torch.zeros(3)
    alive = weakref.ref(read)
    ops = decoder().ops
    assert isinstance(ops, QueuedOps)
    replay, _ = ops.recorded(lambda read=read: read + 1)  # type: ignore[misc]
    del read
    gc.collect()
    assert alive() is not None
    replay()
    del replay
    gc.collect()
    assert alive() is None


def test_cache_is_what_weights_and_a_step_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    free = 80 << 30
    model = preset("qwen3-8b").config()
    monkeypatch.setattr(gpu, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (free, free))
    settings = EngineConfig(device="cuda")
    found = sized(settings, model).cache_bytes
    weights = weight_bytes(model, 2)
    assert weights == 16_381_470_720  # as published: 8.19 billion numbers
    assert 50 << 30 < found < free - weights
    assert sized(EngineConfig(device="cuda", max_batch_tokens=512), model).cache_bytes > found
    assert sized(EngineConfig(device="cuda", kv_cache_bytes=1 << 20), model).cache_bytes == 1 << 20
    assert sized(EngineConfig(), model).cache_bytes == 1 << 30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (weights, weights))
    with pytest.raises(OutOfMemoryError, match="16,381,470,720 bytes of weights"):
        sized(settings, model)
    random = EngineConfig(device="cuda", load="random")
    with pytest.raises(OutOfMemoryError, match=r"layers=\d+ would fit"):
        fitted(random, open_model("qwen3-8b", random))


@pytest.mark.parametrize(
    ("gigabytes", "tokens"), [(140, 8192), (80, 4096), (40, 1024), (24, 512), (17, 512), (8, 512)]
)
def test_a_step_takes_an_eighth_of_what_weights_leave(
    gigabytes: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, free = preset("qwen3-8b").config(), gigabytes * 10**9
    monkeypatch.setattr(gpu, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (free, free))
    given = EngineConfig(device="cuda", kv_cache_bytes=1 << 20)
    found = sized(given, model)
    assert found.step_tokens == tokens
    left = free - weight_bytes(model, 2) - (1 << 20)
    assert tokens == 512 or 8 * step_bytes(model, found) <= left
    assert tokens == 8192 or 8 * step_bytes(model, replace(found, max_batch_tokens=2 * tokens)) > left
    assert sized(replace(given, max_batch_tokens=77), model).step_tokens == 77
    assert EngineConfig(device="cuda").step_tokens == EngineConfig().step_tokens == 512


def test_interrupted_table_is_shown_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the host believes of the device's block tables must never be ahead of what was queued."""
    graphs = engine()._runner._decode
    assert graphs is not None
    tables = graphs.tables
    tables.show([(3, 5), (7,)])
    with monkeypatch.context() as broken:
        broken.setattr(GpuOps, "tensor", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            tables.show([(3, 5, 9), (8,)])
    tables.show([(3, 5, 9), (8,)])
    assert tables.tensor[0, :3].tolist() == [3, 5, 9]
    assert tables.tensor[1, :1].tolist() == [8]


def test_observers_see_every_step_recorded_or_not() -> None:
    seen: list[str] = []
    (ask, *_) = ASKS
    with decoder().ops.observed(lambda op, _arguments, _result: seen.append(op)):
        (reply,) = drive(engine(prefix_cache=False), [ask])
    assert reply is not None
    expect_same(reply, alone(ask), "observed")
    assert ask.params.max_tokens == 3
    assert seen.count("attention") == 3 * TINY.num_layers
    assert seen.count("logits") == 3


def test_products_are_certified_when_the_engine_is_made(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seen: dict[str, Sequence[int]] = {}

    def prepare(_self: Linear, shapes: Sequence[Shape], buckets: Sequence[int]) -> list[str]:
        seen.update((shape.key, buckets) for shape in shapes)
        return ["lt8.0 at a shape"]

    monkeypatch.setattr(Linear, "prepare", prepare)
    engine(max_batch_tokens=300, max_batch_sequences=5)
    hidden, inner = TINY.hidden_size, TINY.intermediate_size
    qkv = (TINY.num_heads + 2 * TINY.num_kv_heads) * TINY.head_size
    products = {
        (qkv, hidden),
        (hidden, TINY.num_heads * TINY.head_size),
        (2 * inner, hidden),
        (hidden, inner),
    }
    expected = {Shape(*sides, DTYPE, DTYPE).key: 512 for sides in products}
    expected[Shape(TINY.vocab_size, hidden, DTYPE, torch.float32).key] = 8
    assert {key: buckets[-1] for key, buckets in seen.items()} == expected
    assert "lt8.0 at a shape" in caplog.text
