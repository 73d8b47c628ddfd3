"""Decoders against transformers on the same weights: first the right numbers, then the same bits."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from isobatch.bits import bits_equal
from isobatch.engine.sampling_params import SamplingParams
from isobatch.errors import ShapeError, UnsupportedModelError
from isobatch.kernels.attention.cache import KVCache
from isobatch.kernels.data import integers
from isobatch.models.checkpoint import open_checkpoint
from isobatch.models.config import RopeConfig
from isobatch.models.decoder import Decoder
from isobatch.models.loading import load_decoder, rotary_for
from isobatch.models.locate import demo_weights
from isobatch.ops import certified_ops
from tests.checkpoints import tiny_model
from tests.engine_harness import (
    POISON,
    TINY,
    TinyCheckpoint,
    captured_logits,
    forward,
    forward_rows,
    smollm2,
    stream,
    tiny_world,
)

# Of logits whose standard deviation is about 1, and about 6 on the real weights.
LARGEST_ERROR, LARGEST_REAL_ERROR = 1e-4, 1e-3

LLAMA3_ROPE: dict[str, object] = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR_ROPE: dict[str, object] = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, linear rope": ("llama", {"rope_parameters": LINEAR_ROPE}),
    "llama, llama3 rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama, biases": ("llama", {"attention_bias": True}),
    "llama, as many kv heads": ("llama", {"num_key_value_heads": 4}),
    "llama, wide heads": ("llama", {"head_dim": 32}),
    "qwen2": ("qwen2", {}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "qwen3, wide heads": ("qwen3", {"head_dim": 32, "num_key_value_heads": 1}),
    "qwen3, biases": ("qwen3", {"attention_bias": True}),
    "qwen3 moe": ("qwen3_moe", {}),
    "qwen3 moe, shares of all": ("qwen3_moe", {"norm_topk_prob": False}),
    "qwen3 moe, some layers dense": ("qwen3_moe", {"mlp_only_layers": [0], "num_hidden_layers": 3}),
    "qwen3 moe, each second layer": ("qwen3_moe", {"decoder_sparse_step": 2, "num_hidden_layers": 4}),
    "qwen3 moe, odd widths": ("qwen3_moe", {"moe_intermediate_size": 36, "num_experts": 5}),
}
# Together they cross the edges of blocks and, with 200 tokens, of an attention span.
LENGTHS = (1, 16, 33, 200)


def _saved(name: str, folder: Path) -> Any:
    architecture, changes = MODELS[name]
    model = tiny_model(architecture, max_position_embeddings=256, **changes)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:
                parameter.mul_(8)  # to about 1, so that attention and logits are as sharp as a real model's
    model.save_pretrained(folder)
    return model.eval()


def _loaded(folder: Path) -> Decoder:
    checkpoint = open_checkpoint(folder)
    try:
        return load_decoder(checkpoint, certified_ops())
    finally:
        checkpoint.close()


def _reference(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([list(tokens)])).logits[0]
    return logits


def _largest_error(decoder: Decoder, model: Any) -> float:
    sequences = [integers(f"length {n}", n, 96).tolist() for n in LENGTHS]
    pairs = zip(sequences, forward(decoder, *sequences), strict=True)
    return max(float((logits - _reference(model, tokens)).abs().max()) for tokens, logits in pairs)


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    model = _saved(name, tmp_path)
    decoder = _loaded(tmp_path)
    assert decoder.config.head_size % 16 == 0
    assert _largest_error(decoder, model) < LARGEST_ERROR


@pytest.mark.parametrize("name", ["llama, linear rope", "llama, llama3 rope"])
def test_control_with_unscaled_rope_is_caught(name: str, tmp_path: Path) -> None:
    model = _saved(name, tmp_path)
    decoder = _loaded(tmp_path)
    plain = replace(decoder.config, rope=RopeConfig(kind="default", theta=decoder.config.rope.theta))
    assert _largest_error(replace(decoder, rotary=rotary_for(plain)), model) > 1000 * LARGEST_ERROR


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("llama, biases", "qkv_bias"),
        ("llama, biases", "out_bias"),
        ("qwen2", "qkv_bias"),
        ("qwen3", "q_norm"),
        ("qwen3", "k_norm"),
    ],
)
def test_control_with_a_part_left_out_is_caught(name: str, part: str, tmp_path: Path) -> None:
    model = _saved(name, tmp_path)
    decoder = _loaded(tmp_path)
    first, *others = decoder.layers
    assert getattr(first.attention, part) is not None
    left_out: dict[str, Any] = {part: None}
    maimed = replace(first, attention=replace(first.attention, **left_out))
    assert _largest_error(replace(decoder, layers=(maimed, *others)), model) > 1000 * LARGEST_ERROR


def test_tied_output_is_the_embedding(tmp_path: Path) -> None:
    _saved("llama, tied", tmp_path)
    decoder = _loaded(tmp_path)
    assert decoder.output is decoder.embedding


TEXTS = (
    "The capital of France is Paris, the capital of Italy is Rome, and the capital of Japan is",
    "def quicksort(items):\n    if len(items) <= 1:\n        return items\n    pivot = items[0]\n"
    "    smaller = [x for x in items[1:] if x < pivot]\n    larger = [x for x in items[1:] if x >= pivot]\n"
    "    return quicksort(smaller) + [pivot] + quicksort(larger)\n\n\nprint(quicksort([3, 1, 2]))",
    "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft und Gewissen "
    "begabt und sollen einander im Geist der Brüderlichkeit begegnen. 人人生而自由。",
    "Floating-point addition is not associative: (a + b) + c and a + (b + c) may differ in the last bit, "
    "because each intermediate result is rounded. " * 5,
)


@cache
def _transformers_smollm2() -> Any:
    """The model as transformers reads the file; from_pretrained would do as much, but asks for accelerate."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    path = demo_weights()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    problems = model.load_state_dict(tensors, strict=False)
    assert (problems.missing_keys, problems.unexpected_keys) == (["lm_head.weight"], [])  # it is tied
    return model.eval()


@pytest.mark.weights
@pytest.mark.parametrize("text", TEXTS, ids=["english", "code", "multilingual", "long"])
def test_real_logits_are_those_of_transformers(text: str) -> None:
    tokens = smollm2().tokenizer.encode(text)
    assert 15 < len(tokens) < 220
    (logits,) = forward(smollm2().engine.decoder, tokens)
    reference = _reference(_transformers_smollm2(), tokens)
    assert float((logits - reference).abs().max()) < LARGEST_REAL_ERROR


def test_sequences_in_one_pass_do_not_meet() -> None:
    decoder = tiny_world().decoder
    sequences = [stream(n)[:length] for n, length in enumerate((40, 1, 130))]
    together = forward(decoder, *sequences)
    for tokens, logits in zip(sequences, together, strict=True):
        assert bits_equal(logits, forward(decoder, tokens)[0])


@pytest.mark.parametrize("name", ["llama", "qwen3 moe"])
@pytest.mark.parametrize("wanted", [(), (39,), (5, 39, 40, 169), tuple(range(170))])
def test_rows_that_nobody_asks_for_change_nothing(name: str, wanted: tuple[int, ...], tmp_path: Path) -> None:
    """They end in the last layer, whose keys and values are kept all the same."""
    _saved(name, tmp_path)
    decoder = _loaded(tmp_path)
    sequences = [[token % 90 for token in stream(n)[:length]] for n, length in enumerate((40, 130))]
    full, caches = forward_rows(decoder, sequences, range(170), fill=0.0)
    some, caches_of_some = forward_rows(decoder, sequences, wanted, fill=0.0)
    assert some.shape == (len(wanted), full.shape[1])
    assert bits_equal(some, full[list(wanted)])
    for one, other in zip(caches, caches_of_some, strict=True):
        assert isinstance(one, KVCache)
        assert isinstance(other, KVCache)
        assert bits_equal(one.k, other.k)
        assert bits_equal(one.v, other.v)


def test_nan_in_an_output_row_reaches_that_token_only() -> None:
    class Checkpoint(TinyCheckpoint):
        def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
            rows = super().read(name).clone()
            if name == "lm_head.weight":
                rows[7, 3] = float("nan")
            return rows[start:stop]

    (spoilt,) = forward(load_decoder(Checkpoint(), certified_ops()), stream(0)[:40])
    (clean,) = forward(tiny_world().decoder, stream(0)[:40])
    others = torch.arange(TINY.vocab_size) != 7
    assert bool(spoilt[:, 7].isnan().all())
    assert bits_equal(spoilt[:, others], clean[:, others])


def test_nan_in_an_embedding_row_reaches_what_follows_that_token_only() -> None:
    at = 21
    sequences = [stream(0)[:40], (*stream(1)[:at], POISON, *stream(1)[at:40]), stream(2)[:40]]
    assert POISON not in sequences[0] + sequences[2]
    clean = forward(tiny_world().decoder, *sequences)
    spoilt = forward(tiny_world(poisoned=True).decoder, *sequences)
    assert bits_equal(spoilt[0], clean[0])
    assert bits_equal(spoilt[1][:at], clean[1][:at])
    assert bool(spoilt[1][at:].isnan().all())
    assert bits_equal(spoilt[2], clean[2])


def test_nan_in_a_norm_reaches_everything() -> None:
    class Checkpoint(TinyCheckpoint):
        def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
            return super().read(name, start, stop) * (float("nan") if name == "model.norm.weight" else 1)

    (logits,) = forward(load_decoder(Checkpoint(), certified_ops()), stream(0)[:3])
    assert bool(logits.isnan().all())


def test_chunk_that_does_not_reach_the_end_of_a_prompt_asks_for_no_logits() -> None:
    engine = tiny_world().engine(max_batch_tokens=8)
    engine.add(stream(0)[:20], SamplingParams())
    with captured_logits(engine.decoder) as steps:
        engine.step()
    assert [logits.shape for logits in steps] == [(0, TINY.vocab_size)]


@pytest.mark.parametrize("head_size", [8, 24, 40])
def test_head_size_that_no_kernel_has_is_refused(head_size: int) -> None:
    config = replace(TINY, head_size=head_size)
    message = f"a multiple of 16; got {head_size}"
    with pytest.raises(UnsupportedModelError, match=message):
        load_decoder(TinyCheckpoint(config=config), certified_ops())
    with pytest.raises(ShapeError, match=message):
        replace(tiny_world().decoder, config=config).kv_caches(4)


def test_token_that_the_model_does_not_have_is_refused() -> None:
    for strange in (-1, TINY.vocab_size):
        with pytest.raises(ShapeError, match=r"token_ids out of range; expected 0\.\.100"):
            forward(tiny_world().decoder, [1, strange])


@pytest.mark.parametrize("kernels", ["none", "stock"])
def test_loading_reports_each_layer(kernels: str) -> None:
    seen: list[tuple[int, int]] = []
    load_decoder(TinyCheckpoint(), tiny_world(kernels).decoder.ops, lambda *done: seen.append(done))
    assert seen == [(1, 2), (2, 2)]


def test_stock_kernels_compute_the_same_model() -> None:
    tokens = stream(0)[:150]
    (ours,), (stock,) = (forward(tiny_world(fault).decoder, tokens) for fault in ("none", "stock"))
    assert not bits_equal(ours, stock)
    assert float((ours - stock).abs().max()) < LARGEST_ERROR
