"""torch's own kernels in the GPU's engine: on a GPU where there is one, else under Triton's interpreter."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from isobatch import LLM, SamplingParams
from isobatch.config import EngineConfig
from isobatch.engine.engine import Engine
from isobatch.engine.memory import block_bytes, page_tokens
from isobatch.engine.output import Reply
from isobatch.errors import InvalidSamplingError, UnsupportedOpError
from isobatch.kernels.attention import stock
from isobatch.kernels.attention.gpu_rows import GpuPagedRows
from isobatch.kernels.attention.stock_gpu import attention, block_mask, filled, gathered
from isobatch.kernels.gpu.device import device, dtypes
from isobatch.kernels.qkv.stock import qk_norm_rotary_write
from isobatch.kernels.rms_norm.stock import rms_norm
from isobatch.kernels.rotary.stock import rotary_in_dtype
from isobatch.kernels.sampling.cpu import exponential_noise
from isobatch.kernels.sampling.triton_exponential import exponential_noise as exponential_noise_gpu
from isobatch.kernels.stock import GPU_PAGE, DenseCache
from isobatch.models.decoder import Decoder
from isobatch.models.loading import load_decoder
from isobatch.ops.gpu import GpuOps, StockGpuOps
from tests.checkpoints import tiny_model
from tests.engine_harness import TINY, Ask, TinyCheckpoint, drive, stream
from tests.moe_world import TINY_MOE

# Stale memory is NaN, and NumPy, which interprets, says so where it is masked.
pytestmark = [
    pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning"),
    # torch's compiler calls what torch itself has deprecated.
    pytest.mark.filterwarnings("ignore:.torch.jit.:DeprecationWarning"),
]

DTYPE = dtypes()[0]
NAME = str(DTYPE).removeprefix("torch.")
ASKS = tuple(
    Ask(stream(number)[:length], SamplingParams(max_tokens=4, ignore_eos=True, logprobs=3, **how))
    for number, length, how in (
        (0, 5, {"temperature": 0}),
        (1, 70, {"temperature": 1, "seed": 3, "top_p": 0.9}),
        (2, 64, {"temperature": 0.7, "seed": 9, "top_k": 40, "repetition_penalty": 1.2}),
    )
)


@cache
def decoder(kernels: str) -> Decoder:
    heads = (TINY.num_heads, TINY.num_kv_heads, TINY.head_size)
    return load_decoder(TinyCheckpoint(), StockGpuOps(DTYPE) if kernels == "stock" else GpuOps(DTYPE, heads))


def engine(kernels: Any = "stock", *, tokens: int = 1024, **settings: Any) -> Engine:
    size = block_bytes(TINY, DTYPE.itemsize, tokens)
    config = EngineConfig(kernels=kernels, device="cuda", dtype=NAME, kv_cache_bytes=size, **settings)  # type: ignore[arg-type]
    return Engine(decoder(kernels), None, config)


def replies(*engine_of: Any, **settings: Any) -> list[Reply]:
    found = drive(engine(*engine_of, **settings), ASKS)
    assert all(reply is not None and reply.error is None for reply in found)
    return [reply for reply in found if reply is not None]


def expect_near(some: Reply, other: Reply) -> None:
    """The likeliest tokens' log-probabilities, up to where the replies part: bits are not promised."""
    (a,), (b,) = some.completions, other.completions
    assert a.log_probs is not None
    assert b.log_probs is not None
    for mine, its in zip(a.log_probs, b.log_probs, strict=True):
        assert abs(mine.top[0][1] - its.top[0][1]) < 0.1
        if mine.token_id != its.token_id:
            return


def test_replies_are_nearly_ours() -> None:
    for theirs, ours in zip(replies(), replies("isobatch"), strict=True):
        expect_near(theirs, ours)
        assert theirs.fingerprint is None


@pytest.mark.parametrize(
    "load",
    [
        {"max_batch_tokens": 7},
        {"policy": "chaos:5", "max_batch_tokens": 40},
        {"tokens": 3 * GPU_PAGE, "prefix_cache": False},
    ],
)
def test_replies_are_near_under_every_load(load: Any) -> None:
    for loaded, whole in zip(replies(**load), replies(), strict=True):
        expect_near(loaded, whole)


def test_recorded_decode_is_eager_decode() -> None:
    """An observer keeps steps from being replayed."""
    recorded = replies(prefix_cache=False)
    seen: list[str] = []
    with decoder("stock").ops.observed(lambda op, _arguments, _result: seen.append(op)):
        eager = replies(prefix_cache=False)
    assert "attention" in seen
    for a, b in zip(recorded, eager, strict=True):
        expect_near(a, b)


def test_cache_is_cut_into_pages_of_torchs_tile() -> None:
    made = engine(tokens=5 * GPU_PAGE)
    assert (made.pool.num_blocks, made.pool.block_size) == (5, GPU_PAGE)
    assert page_tokens(made.config) == made.decoder.ops.page == GPU_PAGE
    cache_ = made._caches[0]
    assert isinstance(cache_, DenseCache)
    assert cache_.k.shape == (5 + 1, GPU_PAGE, TINY.num_kv_heads, TINY.head_size)
    assert cache_.k.dtype == DTYPE


def test_mixture_of_experts_answers() -> None:
    model = load_decoder(TinyCheckpoint(config=TINY_MOE), StockGpuOps(DTYPE))
    config = EngineConfig(kernels="stock", device="cuda", dtype=NAME, kv_cache_bytes=1 << 20)  # type: ignore[arg-type]
    (reply,) = drive(Engine(model, None, config), ASKS[:1])
    assert reply is not None
    assert len(reply.completions[0].token_ids) == 4


def test_receipt_from_stock_kernels_is_refused() -> None:
    with pytest.raises(InvalidSamplingError, match="cannot be verified"):
        engine().add([1, 2], SamplingParams(receipt=True))


def test_dtype_without_kernels_is_refused() -> None:
    with pytest.raises(UnsupportedOpError, match="no GPU kernels for this dtype"):
        StockGpuOps(torch.float32)


def test_llm_loads_random_weights_with_torchs_kernels(tmp_path: Path) -> None:
    tiny_model("qwen3").config.save_pretrained(tmp_path)
    settings: dict[str, Any] = {"device": "cuda", "dtype": NAME, "kv_cache_bytes": 1 << 20, "progress": False}
    made = LLM(tmp_path, kernels="stock", load="random", layers=1, **settings)
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    (reply,) = made.generate([[1, 2, 3]], params)
    assert len(reply.completions[0].token_ids) == 3
    assert made.fingerprint is None


def paged(lengths: list[int], queries: list[int]) -> tuple[DenseCache, GpuPagedRows]:
    """A cache of random numbers, and requests whose pages lie in it in no order."""
    draw = torch.Generator().manual_seed(1)
    total = sum(-(-n // GPU_PAGE) for n in lengths) + 3
    shape = (total, GPU_PAGE, 2, 16)
    kv = DenseCache(*(torch.randn(shape, generator=draw).to(device(), DTYPE) for _ in "kv"))
    free = torch.randperm(total, generator=draw).tolist()
    width = max(-(-n // GPU_PAGE) for n in lengths)
    tables = [[free.pop() if i < -(-n // GPU_PAGE) else 0 for i in range(width)] for n in lengths]
    starts = [sum(queries[:r]) for r in range(len(queries) + 1)]
    rows = GpuPagedRows(
        GpuPagedRows.upload(starts),
        GpuPagedRows.upload(lengths),
        GpuPagedRows.upload(tables),
        GpuPagedRows.upload([]),
        tuple(queries),
        tuple(lengths),
    )
    return kv, rows


@pytest.mark.parametrize("queries", [[1, 1, 1, 1], [1, 9, 1, 1]])
def test_block_mask_shows_each_query_its_own_tokens(queries: list[int]) -> None:
    lengths = [70, 64, 1, 129]
    kv, rows = paged(lengths, queries)
    chosen = rows.decodes
    mask = block_mask(kv, rows)
    blocks = mask.kv_num_blocks.flatten().tolist()
    assert len(blocks) == filled(len(chosen))
    for b, count in enumerate(blocks):
        seen = []
        for i in range(count):
            keys = torch.arange(GPU_PAGE, device=device()) + int(mask.kv_indices[b, 0, 0, i]) * GPU_PAGE
            nothing = torch.zeros((), dtype=torch.int64, device=device())
            seen += keys[mask.mask_mod(nothing + b, nothing, nothing, keys)].tolist()
        own = range(lengths[chosen[b]]) if b < len(chosen) else ()
        tables = rows.block_tables.tolist()
        assert seen == [tables[chosen[b]][n // GPU_PAGE] * GPU_PAGE + n % GPU_PAGE for n in own]


def test_keys_are_gathered_in_order() -> None:
    kv, rows = paged([70, 64, 1, 129], [3, 1, 1, 9])
    k, v = gathered(kv, rows, (3, 0))
    tables = rows.block_tables.long()
    for mine, pages in ((k, kv.k), (v, kv.v)):
        want = [pages[tables[r]].flatten(0, 1)[:n] for r, n in ((3, 129), (0, 70))]
        assert torch.equal(mine, torch.cat(want))


@pytest.mark.parametrize(
    ("lengths", "queries"),
    [([70, 64, 1, 129, 5], [1] * 5), ([700, 600, 9, 130, 1], [700, 100, 1, 129, 1]), ([520], [520])],
)
def test_attention_is_that_over_each_request_alone(lengths: list[int], queries: list[int]) -> None:
    kv, rows = paged(lengths, queries)
    draw = torch.Generator().manual_seed(2)
    q = torch.randn(sum(queries), 8, 16, generator=draw).to(device(), DTYPE)
    want = stock.attention_ref(q, kv, rows, 0.25)
    assert torch.allclose(attention(q, kv, rows, 0.25).double(), want, atol=2e-2)


def test_what_comes_before_attention_is_the_chain_of_ops() -> None:
    draw = torch.Generator().manual_seed(3)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw).to(device(), DTYPE)

    kv, _ = paged([100], [1])
    qkv, weight = some(3, 6 * 16), some(16)
    cos, sin = (torch.rand(9, 8, generator=draw).to(device()) for _ in "cs")
    positions, slots = torch.tensor([0, 5, 8]).to(device()), torch.tensor([3, 64, -1]).to(device())
    rows = GpuPagedRows(slots, slots, slots, slots, (1, 1, 1), (1, 6, 0))
    q, _ = qk_norm_rotary_write(qkv, positions, cos, sin, kv, rows, weight, weight, 1e-6)
    heads = qkv.view(3, 6, 16)
    turned = rotary_in_dtype(rms_norm(heads[:, :2], weight, 1e-6)[0], positions, cos, sin)
    keys = kv.k.flatten(0, 1)
    assert torch.allclose(q, turned, atol=5e-2)
    assert torch.equal(kv.v.flatten(0, 1)[slots], heads[:, 4:])
    want = rotary_in_dtype(rms_norm(heads[:, 2:4], weight, 1e-6)[0], positions, cos, sin)
    assert torch.allclose(keys[slots], want, atol=5e-2)
    # A row without a slot writes where nobody reads: to the last place of the page that is spare.
    assert torch.equal(keys[-1], keys[slots[2]])


def test_noise_is_that_of_the_cpu() -> None:
    seeds, positions = torch.tensor([1, -7, 1 << 40]), torch.tensor([0, 9, 4096])
    want = exponential_noise(seeds, positions, 1500)
    got = exponential_noise_gpu(seeds.to(device()), positions.to(device()), 1500)
    assert torch.allclose(got.cpu(), want, rtol=1e-4, atol=0)
