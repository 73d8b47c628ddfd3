"""Models in GGUF files: the same as in a Hugging Face folder, and no damage goes unnoticed."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from hypothesis import given
from hypothesis import strategies as st

from isobatch.bits import bits_equal
from isobatch.errors import CheckpointError, IntegrityError, ModelError, UnsupportedModelError
from isobatch.models.checkpoint import open_checkpoint
from isobatch.models.config import ARCHITECTURES, RopeConfig
from isobatch.models.gguf_format import GgufFile
from isobatch.models.locate import demo_weights
from tests.checkpoints import Stored, gguf_metadata, gguf_tensors, tiny_model, write_gguf

Q = GGMLQuantizationType
_SPEEDS = 100.0 ** -(np.arange(8) / 8)  # radians per position, for heads of 16
QUERY, KEY = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.k_proj.weight"


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def saved(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "llama.gguf"
    return write_gguf(path, gguf_metadata(llama.config), gguf_tensors(llama))


# --- the same model ---


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_both_formats_of_a_model_are_one_model(architecture: str, tied: bool, tmp_path: Path) -> None:
    model = tiny_model(architecture, tie_word_embeddings=tied, rms_norm_eps=1e-5)
    model.save_pretrained(tmp_path)
    file = write_gguf(tmp_path / "model.gguf", gguf_metadata(model.config), gguf_tensors(model))
    folder, single = open_checkpoint(tmp_path), open_checkpoint(file)
    assert single.config == folder.config
    assert single.names() == folder.names()
    assert single.path == file
    for name in folder.names():
        assert single.shape(name) == folder.shape(name)
        assert bits_equal(single.read(name), folder.read(name))


def test_biases_are_put_back_in_order_too(tmp_path: Path) -> None:
    model = tiny_model("llama", attention_bias=True)
    file = write_gguf(tmp_path / "model.gguf", gguf_metadata(model.config), gguf_tensors(model))
    checkpoint = open_checkpoint(file)
    assert checkpoint.config.attention_bias
    assert checkpoint.config.output_bias
    for name, tensor in model.state_dict().items():
        assert bits_equal(checkpoint.read(name), tensor)


def _turned_halves(rows: npt.NDArray[Any], position: int) -> npt.NDArray[Any]:
    """Rotary positions as Hugging Face has them: number i of a head turns with number i + head / 2."""
    first, second = np.split(rows, 2)
    turn = np.exp(1j * position * _SPEEDS)[:, None]
    turned = (first + 1j * second) * turn
    return np.concatenate([turned.real, turned.imag])


def _turned_neighbours(rows: npt.NDArray[Any], position: int) -> npt.NDArray[Any]:
    """Rotary positions as llama.cpp has them: number 2i of a head turns with number 2i + 1."""
    turned = rows.copy()
    turn = np.exp(1j * position * _SPEEDS)[:, None]
    pairs = (rows[0::2] + 1j * rows[1::2]) * turn
    turned[0::2], turned[1::2] = pairs.real, pairs.imag
    return turned


def test_rotated_scores_are_the_same_as_in_llama_cpp(saved: Path) -> None:
    # What the permutation is for: it says nothing about indices, so that two mistakes cannot cancel out.
    ours, theirs = open_checkpoint(saved), GgufFile(saved)
    query, key = (ours.read(name, 16, 32).double().numpy() for name in (QUERY, KEY))
    stored = (
        theirs.rows(name, 16, 32).floats().double().numpy()
        for name in ("blk.1.attn_q.weight", "blk.1.attn_k.weight")
    )
    stored_query, stored_key = stored
    scores = _turned_halves(query, 3).T @ _turned_halves(key, 11)
    expected = _turned_neighbours(stored_query, 3).T @ _turned_neighbours(stored_key, 11)
    np.testing.assert_allclose(scores, expected, rtol=1e-12, atol=1e-12)
    unturned = _turned_halves(stored_query, 3).T @ _turned_halves(stored_key, 11)
    assert not np.allclose(unturned, expected, rtol=1e-3)


def test_rows_are_rows_of_the_whole(tmp_path: Path, llama: Any) -> None:
    file = write_gguf(tmp_path / "q8.gguf", gguf_metadata(llama.config), gguf_tensors(llama, Q.Q8_0))
    checkpoint = open_checkpoint(file)
    for name in (QUERY, KEY, "model.layers.0.mlp.down_proj.weight", "model.norm.weight"):
        whole = checkpoint.read(name)
        rows = len(whole)
        for start, stop in ((0, rows), (0, 1), (rows - 1, rows), (5, 30), (17, 18), (7, 7)):
            part = checkpoint.read(name, start, stop)
            assert part.is_contiguous()
            assert bits_equal(part, whole[start:stop])
            if whole.dim() > 1:
                assert bits_equal(checkpoint.rows(name, start, stop).floats(), whole[start:stop])
    for start, stop in ((-1, 2), (0, 65), (3, 2)):
        with pytest.raises(IntegrityError, match="rows of"):
            checkpoint.read(QUERY, start, stop)


def test_closed_checkpoint_reads_nothing(saved: Path) -> None:
    checkpoint = open_checkpoint(saved)
    checkpoint.close()
    checkpoint.close()
    with pytest.raises(CheckpointError, match="has no tensor"):
        checkpoint.read(QUERY)


# --- metadata ---


def _opened_with(tmp_path: Path, model: Any, changes: Mapping[str, object], **tensors: Stored) -> Any:
    """The checkpoint of a model whose metadata is changed; an entry changed to None goes away."""
    metadata = gguf_metadata(model.config) | dict(changes)
    kept = {key: value for key, value in metadata.items() if value is not None}
    return open_checkpoint(write_gguf(tmp_path / "model.gguf", kept, gguf_tensors(model) | tensors))


def test_end_tokens_are_collected_once_each(tmp_path: Path, llama: Any) -> None:
    ends = {"tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.eom_token_id": 2}
    assert _opened_with(tmp_path, llama, ends).config.eos_token_ids == (2, 5)
    none = {"tokenizer.ggml.eos_token_id": None, "tokenizer.ggml.bos_token_id": None}
    config = _opened_with(tmp_path, llama, none).config
    assert (config.bos_token_id, config.eos_token_ids) == (None, ())


def test_rope_scaling_is_understood(tmp_path: Path, llama: Any) -> None:
    linear: dict[str, object] = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.5}
    config = _opened_with(tmp_path, llama, linear).config
    assert config.rope == RopeConfig(kind="linear", theta=10000.0, factor=2.5)
    divisors: npt.NDArray[Any] = np.arange(1, 9, dtype=np.float32)
    both = {"rope_freqs.weight": (divisors, Q.F32)}
    checkpoint = _opened_with(tmp_path, llama, {"llama.rope.scaling.type": "none"}, **both)
    assert checkpoint.config.rope.frequency_divisors == (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)
    assert checkpoint.config.rope.kind == "default"
    assert "rope_freqs.weight" not in checkpoint.names()
    with pytest.raises(UnsupportedModelError, match="scales positions twice"):
        _opened_with(tmp_path, llama, linear, **both)
    with pytest.raises(CheckpointError, match="expected a vector"):
        _opened_with(tmp_path, llama, {}, **{"rope_freqs.weight": (divisors.reshape(2, 4), Q.F32)})
    with pytest.raises(CheckpointError, match="head_size / 2 = 8"):
        _opened_with(tmp_path, llama, {}, **{"rope_freqs.weight": (divisors[:4], Q.F32)})


def test_what_the_file_leaves_out_has_its_meaning(tmp_path: Path, llama: Any) -> None:
    optional = ("vocab_size", "attention.key_length", "attention.value_length", "rope.dimension_count")
    absent: dict[str, object] = {f"llama.{key}": None for key in (*optional, "rope.freq_base")}
    whole = _opened_with(tmp_path, llama, {})
    assert _opened_with(tmp_path, llama, absent).config == whole.config


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"general.architecture": "gemma"}, "llama, qwen2, qwen3"),
        ({"llama.expert_count": 8}, "expert_count"),
        ({"llama.attention.sliding_window": 64}, "sliding_window"),
        ({"llama.rope.scaling.type": "yarn"}, "none or linear; got 'yarn'"),
        ({"llama.rope.scaling.type": "llama3"}, "none or linear"),
        ({"llama.rope.dimension_count": 8}, "the head size, 16"),
        ({"llama.attention.value_length": 8}, "the head size, 16"),
        ({"split.count": 2}, "one part of several"),
    ],
)
def test_what_we_lack_is_refused_by_name(
    changes: dict[str, object], named: str, tmp_path: Path, llama: Any
) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        _opened_with(tmp_path, llama, changes)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((f"llama.{key}", None) for key in ("embedding_length", "block_count", "feed_forward_length")),
        *((f"llama.{key}", None) for key in ("context_length", "attention.head_count")),
        ("llama.attention.layer_norm_rms_epsilon", None),
        ("llama.attention.head_count", 0),
        ("llama.attention.head_count_kv", 3),
        ("llama.attention.head_count_kv", [2, 2]),
        ("llama.block_count", "two"),
        ("llama.block_count", 3),
        ("llama.vocab_size", 97),
        ("llama.rope.freq_base", 0.0),
        ("llama.rope.scaling.type", 1),
        ("tokenizer.ggml.eos_token_id", 96),
        ("general.alignment", "wide"),
        ("general.alignment", 0),
    ],
)
def test_missing_or_senseless_metadata_is_refused(
    key: str, value: object, tmp_path: Path, llama: Any
) -> None:
    with pytest.raises(CheckpointError):
        _opened_with(tmp_path, llama, {key: value})


# --- experts ---


def test_an_experts_matrix_is_its_part_of_the_stack(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe")
    file = write_gguf(tmp_path / "m.gguf", gguf_metadata(model.config), gguf_tensors(model, Q.Q8_0))
    ours, theirs = open_checkpoint(file), GGUFReader(file)
    stack = next(tensor for tensor in theirs.tensors if tensor.name == "blk.1.ffn_up_exps.weight")
    whole = dequantize(stack.data, stack.tensor_type)
    assert whole.shape == (8, 32, 64)
    for expert in (0, 3, 7):
        name = f"model.layers.1.mlp.experts.{expert}.up_proj.weight"
        assert ours.coding(name).bits == 8
        assert bits_equal(ours.read(name, 5, 9), torch.from_numpy(whole[expert, 5:9].copy()))


def test_settings_of_experts_are_read_or_refused(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe")
    for value, renormalise in ((None, True), (True, True), (False, False)):
        moe = _opened_with(tmp_path, model, {"qwen3moe.expert_weights_norm": value}).config.moe
        assert moe.renormalise is renormalise
    with pytest.raises(UnsupportedModelError, match="expert_shared_count"):
        _opened_with(tmp_path, model, {"qwen3moe.expert_shared_count": 1})
    for key, wrong in (("expert_count", 7), ("expert_count", None), ("expert_used_count", 9)):
        with pytest.raises(CheckpointError):
            _opened_with(tmp_path, model, {f"qwen3moe.{key}": wrong})


# --- damage ---


def test_tensors_must_be_exactly_the_models(tmp_path: Path, llama: Any) -> None:
    metadata, path = gguf_metadata(llama.config), tmp_path / "model.gguf"
    weights = gguf_tensors(llama)
    for missing, named in (("blk.1.ffn_up.weight", "up_proj"), ("token_embd.weight", "token_embd")):
        kept = {name: stored for name, stored in weights.items() if name != missing}
        with pytest.raises(CheckpointError, match=named):
            open_checkpoint(write_gguf(path, metadata, kept))
    one = weights["output_norm.weight"]
    for surplus in ("blk.0.attn_sinks.weight", "blk.00.attn_norm.weight", "cls.weight"):
        with pytest.raises(CheckpointError, match=f"1 unknown: {surplus}"):
            open_checkpoint(write_gguf(path, metadata, weights | {surplus: one}))


def _patched(saved: Path, tmp_path: Path, before: bytes, after: bytes) -> Path:
    content = saved.read_bytes()
    assert before in content
    path = tmp_path / "patched.gguf"
    path.write_bytes(content.replace(before, after, 1))
    return path


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        (b"GGUF", b"GGML", "not a GGUF file"),
        (b"blk.0.attn_q.weight", b"blk.0.attn_k.weight", "twice"),
        (b"blk.0.attn_q.weight\x02", b"blk.0.attn_q.weight\x05", "5 dimensions"),
        (b"general.architecture\x08", b"general.architecture\x0d", "damaged"),
        (b"general.architecture\x08", b"general.architecture\x09", "damaged"),
        (b"general.architecture", b"general.architectur\xff", "damaged"),
    ],
)
def test_damage_is_refused(saved: Path, tmp_path: Path, before: bytes, after: bytes, named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        open_checkpoint(_patched(saved, tmp_path, before, after))


def test_a_key_that_comes_twice_is_refused(tmp_path: Path, llama: Any) -> None:
    metadata = gguf_metadata(llama.config) | {"any.aa": 1, "any.ab": 1}
    path = write_gguf(tmp_path / "model.gguf", metadata, gguf_tensors(llama))
    with pytest.raises(CheckpointError, match=r"'any\.aa' twice"):
        open_checkpoint(_patched(path, tmp_path, b"any.ab", b"any.aa"))


def test_misplaced_tensors_and_surplus_bytes_are_refused(saved: Path, tmp_path: Path, llama: Any) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(saved.read_bytes() + bytes(32))
    with pytest.raises(CheckpointError, match="belong to nothing"):
        open_checkpoint(path)
    # A wrong alignment would shift every tensor, and nothing else would show it.
    with pytest.raises(CheckpointError, match=r"is not where|belong to nothing"):
        _opened_with(tmp_path, llama, {"general.alignment": 2})
    entry, after_the_first = b"blk.0.attn_q.weight" + struct.pack("<IQQI", 2, 64, 64, Q.F32), 96 * 64 * 4
    offset, other = (entry + struct.pack("<Q", place) for place in (after_the_first, after_the_first - 32))
    with pytest.raises(CheckpointError, match="is not where the one before it ends; expected offset 24576"):
        open_checkpoint(_patched(saved, tmp_path, offset, other))


@pytest.mark.parametrize("version", [b"\x01\0\0\0", b"\x04\0\0\0", b"\0\0\0\x03"])
def test_other_versions_and_byte_orders_are_refused(saved: Path, tmp_path: Path, version: bytes) -> None:
    with pytest.raises(UnsupportedModelError, match="2 or 3, little-endian"):
        open_checkpoint(_patched(saved, tmp_path, b"GGUF\x03\0\0\0", b"GGUF" + version))


def test_a_file_cut_short_anywhere_is_refused(saved: Path, tmp_path: Path) -> None:
    content, path = saved.read_bytes(), tmp_path / "short.gguf"
    for size in (*range(0, 4000, 13), *range(4000, len(content), 9973), len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(CheckpointError):
            open_checkpoint(path)


@given(data=st.data())
def test_no_damage_to_the_header_escapes_as_another_error(
    saved: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray(saved.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, 3000))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(content)
    with contextlib.suppress(ModelError):
        open_checkpoint(path).close()


# --- the real file ---


@pytest.mark.weights
def test_the_real_file_is_what_gguf_reads() -> None:
    path = demo_weights()
    ours, theirs = open_checkpoint(path), GGUFReader(path)
    assert {key for key in theirs.fields if key[:5] != "GGUF."} == set(GgufFile(path).metadata)
    expected = {tensor.name: tensor for tensor in theirs.tensors}
    assert len(ours.names()) == len(expected) == 272
    config = ours.config
    assert (config.num_layers, config.hidden_size, config.num_heads, config.num_kv_heads) == (30, 576, 9, 3)
    assert (config.vocab_size, config.rms_norm_eps, config.eos_token_ids) == (49152, 1e-5, (2,))
    assert config.tie_embeddings
    for name, stored in {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.layers.7.mlp.down_proj.weight": "blk.7.ffn_down.weight",
        "model.layers.29.input_layernorm.weight": "blk.29.attn_norm.weight",
    }.items():
        tensor = expected[stored]
        whole = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type)))
        assert bits_equal(ours.read(name, 5, 500), whole[5:500])
