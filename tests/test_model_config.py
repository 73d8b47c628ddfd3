"""Model configurations: two generations of config.json read alike, the unknown and the senseless refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from isobatch.errors import CheckpointError, UnsupportedModelError
from isobatch.models.config import ModelConfig, MoeConfig, RopeConfig, config_from_huggingface

LLAMA_3_2: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "vocab_size": 128256,
}
QWEN_2_5: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN_3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN_3_MOE: dict[str, Any] = QWEN_3 | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
    "tie_word_embeddings": False,
}


def test_llama_3_2_is_understood() -> None:
    assert config_from_huggingface(LLAMA_3_2) == ModelConfig(
        architecture="llama",
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_layers=16,
        num_heads=32,
        num_kv_heads=8,
        head_size=64,
        context_length=131072,
        rms_norm_eps=1e-5,
        rope=RopeConfig(
            kind="llama3",
            theta=500000.0,
            factor=32.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_context=8192,
        ),
        tie_embeddings=True,
        attention_bias=False,
        output_bias=False,
        qk_norm=False,
        bos_token_id=128000,
        eos_token_ids=(128001, 128008, 128009),
    )


def test_qwen_is_understood() -> None:
    older, newer = config_from_huggingface(QWEN_2_5), config_from_huggingface(QWEN_3)
    assert (older.attention_bias, older.output_bias, older.qk_norm) == (True, False, False)
    assert (newer.attention_bias, newer.output_bias, newer.qk_norm) == (False, False, True)
    assert (older.head_size, newer.head_size) == (64, 128)
    assert older.rope == newer.rope == RopeConfig(kind="default", theta=1e6)
    assert older.eos_token_ids == (151645,)


def test_mixture_of_experts_is_understood() -> None:
    config = config_from_huggingface(QWEN_3_MOE)
    assert config.qk_norm
    assert config.moe == MoeConfig(experts=128, active=8, inner=768, renormalise=True)
    assert all(config.experts_of(layer) == config.moe for layer in range(28))
    assert config_from_huggingface(QWEN_3).experts_of(0) is None
    mixed = config_from_huggingface(QWEN_3_MOE | {"decoder_sparse_step": 3, "mlp_only_layers": [5]})
    assert [layer for layer in range(10) if mixed.experts_of(layer)] == [2, 8]
    absent = {key: value for key, value in QWEN_3_MOE.items() if key not in ("norm_topk_prob", "head_dim")}
    config = config_from_huggingface(absent)
    assert config.moe is not None
    assert not config.moe.renormalise
    assert config.head_size == 64


@pytest.mark.parametrize("settings", [LLAMA_3_2, QWEN_2_5, QWEN_3, QWEN_3_MOE])
def test_transformers_4_and_5_mean_the_same(settings: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoConfig

    (tmp_path / "config.json").write_text(json.dumps(settings))
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path)
    newer = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in newer
    assert "rope_theta" not in newer
    assert config_from_huggingface(newer) == config_from_huggingface(settings)


def test_end_tokens_of_the_generation_config_win() -> None:
    generation = {"eos_token_id": [151645, 151643]}
    assert config_from_huggingface(QWEN_3, generation).eos_token_ids == (151645, 151643)
    assert config_from_huggingface(QWEN_3, {}).eos_token_ids == (151645,)
    assert config_from_huggingface(QWEN_3 | {"eos_token_id": None}).eos_token_ids == ()


def test_absent_settings_mean_what_they_mean_to_transformers() -> None:
    optional = ("num_key_value_heads", "head_dim", "rope_theta", "rope_scaling", "rms_norm_eps")
    absent = {key: value for key, value in LLAMA_3_2.items() if key not in optional}
    config = config_from_huggingface(absent)
    assert (config.num_kv_heads, config.head_size, config.rms_norm_eps) == (32, 64, 1e-6)
    assert config.rope == RopeConfig(kind="default", theta=10000.0)
    assert config_from_huggingface(QWEN_3 | {"head_dim": None, "hidden_size": 512}).head_size == 128


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "mixtral"}, "llama, qwen2, qwen3"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForCausalLM"),
        ({"hidden_act": "gelu"}, "silu"),
        ({"sliding_window": 4096}, "sliding window"),
        ({"use_sliding_window": True}, "sliding window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding window"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "default, linear, llama3"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "default, linear, llama3"),
        ({"rope_parameters": {"rope_type": "longrope"}, "rope_scaling": None}, "default, linear, llama3"),
        ({"rope_scaling": {"type": "default", "mrope_section": [1, 2]}}, "mrope_section"),
        ({"rope_scaling": None, "rope_parameters": {"full_attention": {}}}, "full_attention"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ],
)
def test_what_we_lack_is_refused_by_name(changes: dict[str, object], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        config_from_huggingface(LLAMA_3_2 | changes)


@pytest.mark.parametrize(
    "changes",
    [
        *({name: None} for name in ("model_type", "vocab_size", "hidden_size", "num_hidden_layers")),
        *({name: None} for name in ("intermediate_size", "num_attention_heads", "max_position_embeddings")),
        {"vocab_size": "many"},
        {"vocab_size": True},
        {"hidden_size": 2048.0},
        {"hidden_size": 2**40},
        {"tie_word_embeddings": 1},
        {"architectures": "LlamaForCausalLM"},
        {"num_key_value_heads": 5},
        {"num_key_value_heads": 0},
        {"num_attention_heads": 0},
        {"num_hidden_layers": -1},
        {"num_hidden_layers": 10**9},
        {"head_dim": 63},
        {"rms_norm_eps": 0},
        {"rms_norm_eps": float("nan")},
        {"rms_norm_eps": 10**400},
        {"rope_theta": -1.0},
        {"rope_scaling": "llama3"},
        {"rope_scaling": {"rope_type": "linear"}},
        {"rope_scaling": {"rope_type": "linear", "factor": 0}},
        {"rope_scaling": LLAMA_3_2["rope_scaling"] | {"low_freq_factor": 4.0}},
        {"rope_scaling": LLAMA_3_2["rope_scaling"] | {"original_max_position_embeddings": 0}},
        {"rope_parameters": {"rope_type": "default"}},
        {"eos_token_id": "</s>"},
        {"eos_token_id": [1, None]},
        {"eos_token_id": 128256},
        {"bos_token_id": -1},
    ],
)
def test_nonsense_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(CheckpointError):
        config_from_huggingface(LLAMA_3_2 | changes)


@pytest.mark.parametrize(
    "changes",
    [
        *({name: None} for name in ("num_experts", "num_experts_per_tok", "moe_intermediate_size")),
        {"num_experts": 0},
        {"num_experts": 7},
        {"num_experts_per_tok": 0},
        {"moe_intermediate_size": -1},
        {"norm_topk_prob": 1},
        {"decoder_sparse_step": 0},
        {"mlp_only_layers": ["all"]},
        {"mlp_only_layers": 3},
        {"num_local_experts": 64},
    ],
)
def test_nonsense_about_experts_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(CheckpointError):
        config_from_huggingface(QWEN_3_MOE | changes)


def test_frequency_divisors_must_fit_the_head() -> None:
    config = copy.deepcopy(LLAMA_3_2)
    del config["rope_scaling"]
    rope = RopeConfig(kind="default", theta=1e4, frequency_divisors=(1.0,) * 3)
    values = {name: getattr(config_from_huggingface(config), name) for name in ModelConfig.__slots__}
    with pytest.raises(CheckpointError, match="frequency_divisors"):
        ModelConfig(**(values | {"rope": rope}))
    with pytest.raises(CheckpointError, match="divisor"):
        RopeConfig(kind="default", theta=1e4, frequency_divisors=(1.0, 0.0))
