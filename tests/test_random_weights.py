"""Models of random weights: what the numbers are, where they are made, and what has no meaning for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from isobatch import LLM, EngineConfig, SamplingParams
from isobatch.bits import bits_equal
from isobatch.cli import main
from isobatch.engine import backend
from isobatch.errors import (
    CheckpointError,
    ConfigError,
    InvalidSamplingError,
    IsobatchError,
    ModelNotFoundError,
    OutOfMemoryError,
    PromptError,
    TokenizerError,
    UnknownKeyError,
)
from isobatch.kernels.cpu.random_weights import random_weights
from isobatch.kernels.gpu import random_weights as gpu
from isobatch.kernels.gpu.device import dtypes
from isobatch.kernels.linear.weight import PackedWeight
from isobatch.kernels.stock import DenseWeight
from isobatch.models.config import ModelConfig
from isobatch.models.layers import SparseMLP
from isobatch.models.loading import coded_bytes, load_decoder
from isobatch.models.presets import PRESETS, preset
from isobatch.models.random_weights import RandomCheckpoint, random_config
from isobatch.ops import certified_ops
from isobatch.ops.gpu import GpuOps
from tests.checkpoints import tiny_model

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SPANS = [(0, 5), (3, 1), (5, 4096), (2**33 + 2, 77)]
PARAMS = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
SMALL: dict[str, Any] = {"load": "random", "kv_cache_bytes": 1 << 20, "progress": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration, and nothing else."""
    path = tmp_path_factory.mktemp("tiny")
    tiny_model("qwen3").config.save_pretrained(path)
    return path


def test_numbers_are_near_normal_and_exact_in_every_dtype() -> None:
    numbers = random_weights(7, 0, 200_000, torch.float32)
    assert abs(float(numbers.mean())) < 2e-4
    assert abs(float(numbers.std()) - 0.018) < 2e-4
    assert (
        2.9 < float((numbers / numbers.std()).pow(4).mean()) + 0.3 < 3.3
    )  # a sum of four: 0.3 below normal's
    for dtype in DTYPES:
        assert bits_equal(random_weights(7, 0, 200_000, dtype).float(), numbers)


@pytest.mark.parametrize(("start", "count"), SPANS)
def test_every_device_makes_the_same_numbers(start: int, count: int) -> None:
    for dtype in (torch.float32, *dtypes()):
        made = gpu.random_weights(11, start, count, dtype)
        assert bits_equal(made.cpu(), random_weights(11, start, count, dtype))


def test_a_span_is_part_of_the_whole_and_keys_differ() -> None:
    whole = random_weights(5, 0, 500, torch.float32)
    assert bits_equal(random_weights(5, 123, 300, torch.float32), whole[123:423])
    for other in (random_weights(6, 0, 500, torch.float32), random_weights(5, 1, 500, torch.float32)):
        assert float((other == whole).float().mean()) < 0.1


def checkpoint(config: ModelConfig, seed: int = 0) -> RandomCheckpoint:
    return RandomCheckpoint(config, seed, random_weights, Path("tiny"))


def test_weights_follow_from_seed_name_and_place(folder: Path) -> None:
    config = random_config(folder)
    one, other = checkpoint(config), checkpoint(config, seed=1)
    query, norm = (f"model.layers.1.{name}.weight" for name in ("self_attn.q_proj", "input_layernorm"))
    assert bits_equal(one.read(query), checkpoint(config).read(query))
    assert bits_equal(one.read(query, 3, 9), one.read(query)[3:9])
    assert not bits_equal(one.read(query), other.read(query))
    assert not bits_equal(one.read(query), one.read(query.replace("layers.1", "layers.0")))
    assert float((one.read(norm) - 1).abs().max()) < 0.1
    fewer = checkpoint(random_config(folder, layers=1))
    assert bits_equal(fewer.read("lm_head.weight"), one.read("lm_head.weight"))
    assert query not in fewer.names()


def test_model_of_a_configuration_answers_the_same_each_time(folder: Path) -> None:
    first, again, file = (LLM(path, **SMALL) for path in (folder, folder, folder / "config.json"))
    other = LLM(folder, weights_seed=1, **SMALL)
    (reply,) = first.generate([1, 2, 3], PARAMS)
    assert reply.text == ""
    assert len(reply.completions[0].token_ids) == 4
    assert [llm.generate([1, 2, 3], PARAMS)[0].completions for llm in (again, file)] == 2 * [
        reply.completions
    ]
    assert other.generate([1, 2, 3], PARAMS)[0].completions != reply.completions
    assert "".join(first.stream([1, 2, 3], PARAMS)) == ""


def test_mixture_of_experts_answers(tmp_path: Path) -> None:
    tiny_model("qwen3_moe").config.save_pretrained(tmp_path)
    for kernels in ("isobatch", "stock"):
        (reply,) = LLM(tmp_path, kernels=kernels, **SMALL).generate([1, 2, 3], PARAMS)
        assert len(reply.completions[0].token_ids) == 4


def test_layers_truncate_the_model(folder: Path) -> None:
    llm = LLM(folder, layers=1, **SMALL)
    assert len(llm.engine.decoder.layers) == llm.engine.decoder.config.num_layers == 1
    with pytest.raises(ConfigError, match="at most 2"):
        LLM(folder, layers=3, **SMALL)


@pytest.mark.parametrize("architecture", ["qwen3", "qwen3_moe"])
def test_gpu_has_the_same_model(architecture: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"moe_intermediate_size": 64} if architecture == "qwen3_moe" else {}
    tiny_model(architecture, **changes).config.save_pretrained(tmp_path)
    config = random_config(tmp_path)
    ops = GpuOps(dtypes()[0], (config.num_heads, config.num_kv_heads, config.head_size))
    ours = load_decoder(checkpoint(config), certified_ops())
    theirs = load_decoder(RandomCheckpoint(config, 0, gpu.random_weights, Path("tiny")), ops)
    pairs = [(ours.embedding, theirs.embedding)]
    assert bits_equal(ours.final_norm.weight, theirs.final_norm.weight.float().cpu())
    for one, other in zip(ours.layers, theirs.layers, strict=True):
        pairs.append((one.attention.qkv, other.attention.qkv))
        if isinstance(one.mlp, SparseMLP) and isinstance(other.mlp, SparseMLP):
            experts = (one.mlp.experts, other.mlp.experts)
            pairs += zip(*(each.down.weights for each in experts), strict=True)
            pairs += zip(*(each.gate_up.weights for each in experts), strict=True)
    for mine, its in pairs:
        assert isinstance(mine, PackedWeight)
        assert isinstance(its, DenseWeight)
        assert bits_equal(mine.rows(torch.arange(mine.outputs)).floats(), its.dense.float().cpu())
    assert len(pairs) == 3 if architecture == "qwen3" else 3 + 2 * 2 * 8


def test_text_is_refused(folder: Path) -> None:
    llm = LLM(folder, **SMALL)
    with pytest.raises(PromptError, match="expected token ids"):
        llm.generate(["hello"])
    with pytest.raises(PromptError, match="expected token ids"):
        llm.stream("hello")
    with pytest.raises(TokenizerError, match="no tokenizer"):
        llm.chat([{"role": "user", "content": "hello"}])
    with pytest.raises(InvalidSamplingError, match="stop_token_ids"):
        llm.generate([1], SamplingParams(stop=("x",)))


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_a_whole_configuration(name: str) -> None:
    config, shapes = random_config(name), preset(name).products()
    assert (config.vocab_size, config.hidden_size) == shapes["lm_head"]
    heads = config.num_heads + 2 * config.num_kv_heads
    assert (heads * config.head_size, config.hidden_size) == shapes["qkv"]
    if config.moe is None:
        assert (2 * config.intermediate_size, config.hidden_size) == shapes["gate_up"]
    assert (config.moe is None) == (preset(name).experts == 0)


@pytest.mark.parametrize(
    ("name", "billions"),
    [("qwen3-0.6b", 0.596), ("qwen3-8b", 8.19), ("qwen3-32b", 32.76),
     ("qwen3-30b-a3b", 30.53), ("qwen3-235b-a22b", 235.09), ("llama-3-1b", 1.236),
     ("llama-3-8b", 8.03), ("llama-3-70b", 70.55), ("smollm2-135m", 0.1345)],
)  # fmt: skip
def test_preset_has_as_many_weights_as_its_model(name: str, billions: float) -> None:
    weights = sum(map(torch.Size.numel, map(torch.Size, checkpoint(random_config(name))._shapes.values())))
    assert abs(weights / 1e9 - billions) < 0.001 * billions


@pytest.mark.weights
def test_smollm2s_preset_is_its_configuration() -> None:
    from isobatch.models.checkpoint import open_checkpoint

    assert random_config("smollm2-135m") == open_checkpoint("demo").config


@pytest.mark.parametrize(
    ("model", "error", "said"),
    [
        ("qwen3-8", UnknownKeyError, "did you mean 'qwen3-8b'"),
        ("no/such/folder", ModelNotFoundError, "a preset, a folder or a config.json"),
        (__file__, CheckpointError, "no configuration"),
        (None, ModelNotFoundError, "nothing that names a model"),
    ],
)
def test_what_has_no_configuration_is_refused(model: Any, error: type[IsobatchError], said: str) -> None:
    with pytest.raises(error, match=said):
        LLM(model, **SMALL)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"load": "dummy"}, "known: checkpoint, random"),
        ({"layers": 3}, 'load="random"'),
        ({"weights_seed": 3}, 'load="random"'),
        ({"load": "random", "layers": 0}, "bad layers"),
        ({"load": "random", "weights_seed": -1}, "bad weights_seed"),
    ],
)
def test_settings_without_meaning_are_refused(settings: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        EngineConfig(**settings)


def test_what_does_not_fit_is_refused_with_how_much_would(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = 3
    most = coded_bytes(checkpoint(random_config("qwen3-235b-a22b", layers)))
    for spare, said in ((0, "layers=3 would fit"), (-1, "layers=2 would fit"), (1 - most, "smaller model")):
        monkeypatch.setattr(backend, "available_bytes", lambda spare=spare: most + 2**24 + spare)
        with pytest.raises(OutOfMemoryError, match=said):
            LLM("qwen3-235b-a22b", **SMALL | {"kv_cache_bytes": 2**24})


def test_command_line_takes_token_ids(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", str(folder), "--set", "load=random", "--set", "kv_cache_bytes=1048576"]
    words += ["--temperature", "0", "--max-tokens", "4", "--ignore-eos"]
    assert main([*words, "1 2 3"]) == 2
    assert "add --token-ids" in capsys.readouterr().err
    assert main([*words, "--token-ids", "1 two 3"]) == 2
    assert "not token ids" in capsys.readouterr().err
    assert main([*words, "--token-ids", "--chat", "1"]) == 2
    capsys.readouterr()
    (reply,) = LLM(folder, **SMALL).generate([1, 2, 3], PARAMS)
    ids = list(reply.completions[0].token_ids)
    assert main([*words, "--token-ids", "1, 2, 3"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == " ".join(map(str, ids))
    assert main([*words, "--token-ids", "1 2 3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["completions"][0]["token_ids"] == ids
