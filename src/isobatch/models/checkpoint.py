"""A checkpoint behind one door: canonical tensor names, rows on demand, coded or in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch

from isobatch.bits import bits_equal
from isobatch.errors import CheckpointError
from isobatch.kernels.coding import CodedRows, Coding
from isobatch.models.config import ModelConfig, MoeConfig
from isobatch.models.gguf import GgufCheckpoint
from isobatch.models.huggingface import HuggingFaceCheckpoint
from isobatch.models.locate import locate

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
# Frequencies that checkpoints from before transformers 4.32 carry along; ours come from the configuration.
_IGNORED_SUFFIX = "rotary_emb.inv_freq"
_ROWS_AT_ONCE = 4096
_NAMED_AT_MOST = 3


class Checkpoint(Protocol):
    """Weights that can be read a few rows at a time.

    Tensor names are Hugging Face's, such as model.layers.0.self_attn.q_proj.weight; matrices are (out, in).
    """

    @property
    def config(self) -> ModelConfig:
        """The model that the weights are for."""

    @property
    def path(self) -> Path:
        """The folder or file that they come from."""

    def names(self) -> frozenset[str]:
        """The names of all tensors."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor.

        Args:
            name: one of names().

        Returns:
            Its dimensions.

        Raises:
            CheckpointError: no such tensor.
        """

    def coding(self, name: str) -> Coding:
        """How the numbers of one tensor are stored.

        Args:
            name: one of names().

        Raises:
            CheckpointError: no such tensor.
        """

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> CodedRows:
        """Rows of one matrix as they are stored, and no others: the memory used is that of the rows.

        Args:
            name: one of names(), of two dimensions.
            start: the first row.
            stop: the row after the last; None for all.

        Returns:
            CPU, contiguous, the caller's own; (stop - start, ...) in the tensor's coding.

        Raises:
            CheckpointError: no such tensor.
            IntegrityError: no such rows.

        Determinism:
            A function of the file's bytes. How the rows are cut makes no difference.
        """

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows of one tensor as float32.

        Args:
            name: one of names().
            start: the first row.
            stop: the row after the last; None for all.

        Returns:
            float32, CPU, contiguous, the caller's own; (stop - start, ...).

        Raises:
            CheckpointError: no such tensor.
            IntegrityError: no such rows.

        Determinism:
            A function of the file's bytes: every stored value is widened exactly, or scaled by single float32
            multiplications and additions, each rounded once. How the rows are cut makes no difference.
        """

    def close(self) -> None:
        """Let go of the files. Nothing can be read afterwards."""


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a model's weights and check that they are all there.

    Args:
        path: a Hugging Face folder, a .gguf file, or the name of a repository in the Hugging Face cache.

    Returns:
        The checkpoint, checked by check_tensors.

    Raises:
        ModelNotFoundError: nothing there.
        UnsupportedModelError: a model or a number format that we do not have.
        CheckpointError: damaged or incomplete.
    """
    found = locate(path)
    checkpoint: Checkpoint = HuggingFaceCheckpoint(found) if found.is_dir() else GgufCheckpoint(found)
    try:
        check_tensors(checkpoint)
    except CheckpointError:
        checkpoint.close()
        raise
    return checkpoint


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The tensors that a model needs.

    Args:
        config: the model.

    Returns:
        Name to shape, in the order of use. Without lm_head.weight if the embedding stands in for it.
    """
    hidden, head = config.hidden_size, config.head_size
    queries, keys = config.num_heads * head, config.num_kv_heads * head
    layer: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (hidden,)}
    for projection, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
        layer[f"self_attn.{projection}.weight"] = (rows, hidden)
        if config.attention_bias:
            layer[f"self_attn.{projection}.bias"] = (rows,)
    if config.qk_norm:
        layer["self_attn.q_norm.weight"] = layer["self_attn.k_norm.weight"] = (head,)
    layer["self_attn.o_proj.weight"] = (hidden, queries)
    if config.output_bias:
        layer["self_attn.o_proj.bias"] = (hidden,)
    layer["post_attention_layernorm.weight"] = (hidden,)

    tensors: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, hidden)}
    for index in range(config.num_layers):
        parts = layer | _mlp_tensors(config, config.experts_of(index))
        tensors.update({f"model.layers.{index}.{name}": shape for name, shape in parts.items()})
    tensors["model.norm.weight"] = (hidden,)
    if not config.tie_embeddings:
        tensors[OUTPUT] = (config.vocab_size, hidden)
    return tensors


def _mlp_tensors(config: ModelConfig, moe: MoeConfig | None) -> dict[str, tuple[int, ...]]:
    """Those of an MLP, or of a mixture of experts."""

    def mlp(prefix: str, inner: int) -> dict[str, tuple[int, ...]]:
        shapes = {"gate": (inner, config.hidden_size), "up": (inner, config.hidden_size)}
        shapes["down"] = (config.hidden_size, inner)
        return {f"{prefix}.{name}_proj.weight": shape for name, shape in shapes.items()}

    if moe is None:
        return mlp("mlp", config.intermediate_size)
    tensors: dict[str, tuple[int, ...]] = {"mlp.gate.weight": (moe.experts, config.hidden_size)}
    for expert in range(moe.experts):
        tensors |= mlp(f"mlp.experts.{expert}", moe.inner)
    return tensors


def check_tensors(checkpoint: Checkpoint) -> None:
    """Check that the checkpoint has exactly the tensors that its model needs.

    A tied output projection may be stored all the same, if it is the embedding bit for bit.

    Args:
        checkpoint: the weights.

    Raises:
        CheckpointError: tensors are missing, misshapen or unknown; the message names the first few of each.
    """
    expected = expected_tensors(checkpoint.config)
    present = {name for name in checkpoint.names() if not name.endswith(_IGNORED_SUFFIX)}
    if checkpoint.config.tie_embeddings and OUTPUT in present:
        expected[OUTPUT] = expected[EMBEDDING]
    problems = {
        "missing": [name for name in expected if name not in present],
        "unknown": sorted(present - set(expected)),
        "misshapen": [
            f"{name} {checkpoint.shape(name)} instead of {shape}"
            for name, shape in expected.items()
            if name in present and checkpoint.shape(name) != shape
        ],
    }
    parts = [f"{len(names)} {kind}: {_first_few(names)}" for kind, names in problems.items() if names]
    if parts:
        raise CheckpointError(
            f"the tensors in {checkpoint.path} do not fit its configuration",
            got="; ".join(parts),
            fix="fetch the checkpoint again",
        )
    if checkpoint.config.tie_embeddings and OUTPUT in present:
        _check_tied(checkpoint)


def _first_few(names: list[str]) -> str:
    return ", ".join(names[:_NAMED_AT_MOST]) + (", ..." if len(names) > _NAMED_AT_MOST else "")


def _check_tied(checkpoint: Checkpoint) -> None:
    rows = checkpoint.config.vocab_size
    for start in range(0, rows, _ROWS_AT_ONCE):
        stop = min(start + _ROWS_AT_ONCE, rows)
        if not bits_equal(checkpoint.read(EMBEDDING, start, stop), checkpoint.read(OUTPUT, start, stop)):
            raise CheckpointError(
                f"{checkpoint.path} says that {OUTPUT} is {EMBEDDING}, and stores another one",
                fix="set tie_word_embeddings to false if the stored one is meant",
            )
