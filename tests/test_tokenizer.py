"""Tokenizers: both formats agree token for token, text survives, and streamed text is the whole text."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from gguf import GGMLQuantizationType
from hypothesis import given
from hypothesis import strategies as st

from isobatch.engine.tokenizer import Detokenizer, Tokenizer, load_tokenizer
from isobatch.errors import CheckpointError, PromptError, TokenizerError
from isobatch.models.checkpoint import open_checkpoint
from isobatch.models.config import ModelConfig, RopeConfig
from isobatch.models.locate import demo_weights
from tests.checkpoints import PRE_TOKENIZERS, edit_json, tokenizer_metadata, trained_bpe, write_gguf

TRICKY = [
    "",
    " ",
    "Hello, world!",
    "I'M here, you'LL see; they've they'd it's",
    "x = 1234567890 + 3.14e-10 ½ ٣ Ⅷ",
    "  two  and\n\n\nthree \t tabs\r\n \n end   ",
    "zażółć gęślą jaźń — „cytat”",
    "日本語のテキスト。漢字かな交じり",
    "🐢🏳️‍🌈👩‍👩‍👧‍👦 emoji e\u0301 é \u200b\ufeff",
    "<|im_start|>user\n<|im_end|> <|im_end",
    "a<tool>b<tool></tool>",
    "\x00\x01\x7f\u00ad\u2028",
    "$100 <a+b=c> ~|^ !!!???",
]
CORPUS = [*TRICKY, "the quick brown fox jumps over the lazy dog, " * 3, "1234 5678 in 2024", "naïve café"]


def _config(vocab_size: int = 512, bos: int | None = 1, eos: tuple[int, ...] = (2,)) -> ModelConfig:
    return ModelConfig(
        architecture="llama",
        vocab_size=vocab_size,
        hidden_size=8,
        intermediate_size=8,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_size=8,
        context_length=64,
        rms_norm_eps=1e-5,
        rope=RopeConfig(kind="default", theta=1e4),
        tie_embeddings=True,
        attention_bias=False,
        output_bias=False,
        qk_norm=False,
        bos_token_id=bos,
        eos_token_ids=eos,
    )


def _gguf(path: Path, backend: tokenizers.Tokenizer, pre: str, **changes: object) -> Path:
    """A file with a tokenizer and no model; an entry changed to None goes away."""
    named = {f"tokenizer.{key}".replace("__", "."): value for key, value in changes.items()}
    metadata = {"general.architecture": "llama"} | tokenizer_metadata(backend, pre) | named
    kept = {key: value for key, value in metadata.items() if value is not None}
    return write_gguf(path, kept, {"any": (np.zeros(1, np.float32), GGMLQuantizationType.F32)})


@pytest.fixture(scope="module")
def backends() -> dict[str, tokenizers.Tokenizer]:
    return {pre: trained_bpe(pre, CORPUS) for pre in PRE_TOKENIZERS}


@pytest.fixture(scope="module")
def smollm(backends: dict[str, tokenizers.Tokenizer]) -> Tokenizer:
    return Tokenizer(backends["smollm"], _config(), None, digest="")


@pytest.fixture
def folder(backends: dict[str, tokenizers.Tokenizer], tmp_path: Path) -> Path:
    backends["smollm"].save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    return tmp_path


# --- both formats agree ---


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_both_formats_tokenize_alike(
    pre: str, backends: dict[str, tokenizers.Tokenizer], tmp_path: Path
) -> None:
    backends[pre].save(str(tmp_path / "tokenizer.json"))
    folder = load_tokenizer(tmp_path, _config())
    file = _gguf(tmp_path / "model.gguf", backends[pre], pre, ggml__add_bos_token=False)
    single = load_tokenizer(file, _config())
    assert single.vocab_size == folder.vocab_size == 422
    for text in TRICKY:
        ids = folder.encode(text)
        assert single.encode(text) == ids == backends[pre].encode(text).ids
        for skip in (True, False):
            assert single.decode(ids, skip_special_tokens=skip) == folder.decode(
                ids, skip_special_tokens=skip
            )
            assert folder.decode(ids, skip_special_tokens=skip) == backends[pre].decode(ids, skip)


@pytest.fixture(scope="module")
def qwen(backends: dict[str, tokenizers.Tokenizer], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("qwen2") / "model.gguf"
    return load_tokenizer(_gguf(path, backends["qwen2"], "qwen2"), _config())


@given(text=st.text())
def test_both_formats_tokenize_any_text_alike(
    text: str, qwen: Tokenizer, backends: dict[str, tokenizers.Tokenizer]
) -> None:
    assert qwen.encode(text) == backends["qwen2"].encode(text).ids


def test_default_splits_as_llama_cpp_does(backends: dict[str, tokenizers.Tokenizer], tmp_path: Path) -> None:
    tokenizer = load_tokenizer(_gguf(tmp_path / "model.gguf", backends["gpt-2"], "default"), _config())
    for text in TRICKY:
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text
    pieces = tokenizer._backend.pre_tokenizer.pre_tokenize_str("a 12345, $x+1")
    assert [piece for piece, _ in pieces] == ["a", "Ġ", "123", "45", ",", "Ġ", "$", "x", "+", "1"]


def test_begin_and_end_tokens_are_added_as_the_file_says(
    backends: dict[str, tokenizers.Tokenizer], tmp_path: Path
) -> None:
    def encoded(pre: str, **changes: object) -> list[int]:
        path = _gguf(tmp_path / "model.gguf", backends[pre], pre, **changes)
        tokenizer = load_tokenizer(path, _config())
        assert tokenizer.encode("a", add_special_tokens=False) == plain
        return tokenizer.encode("a")

    plain = backends["llama-bpe"].encode("a").ids
    ends: dict[str, object] = {"ggml__bos_token_id": 1, "ggml__eos_token_id": 2}
    assert encoded("llama-bpe", **ends) == [1, *plain]
    assert encoded("llama-bpe", **ends, ggml__add_bos_token=False) == plain
    assert encoded("qwen2", **ends) == plain
    both = {"ggml__add_bos_token": True, "ggml__add_eos_token": True}
    assert encoded("qwen2", **ends, **both) == [1, *plain, 2]
    with pytest.raises(TokenizerError, match="bos_token_id"):
        encoded("llama-bpe")


# --- text survives ---


@given(text=st.text() | st.text(alphabet="ab 1\n<|im_end|>🐢é\u0301"))
def test_decode_undoes_encode(text: str, smollm: Tokenizer) -> None:
    assert smollm.decode(smollm.encode(text), skip_special_tokens=False) == text


@given(text=st.text())
def test_decode_undoes_encode_up_to_composition_for_qwen(text: str, qwen: Tokenizer) -> None:
    composed = unicodedata.normalize("NFC", text)
    assert qwen.decode(qwen.encode(text), skip_special_tokens=False) == composed


def test_added_tokens_are_their_own_text(smollm: Tokenizer) -> None:
    # The tokenizers library would take the letters of «né» for bytes.
    ids = smollm.encode("a«né»<tool><|im_end|>")
    assert len(ids) == 4
    assert smollm.decode(ids) == "a«né»<tool>"
    assert smollm.decode(ids, skip_special_tokens=False) == "a«né»<tool><|im_end|>"


def test_stored_limits_do_not_cut_prompts(folder: Path, backends: dict[str, tokenizers.Tokenizer]) -> None:
    limited = tokenizers.Tokenizer.from_str(backends["smollm"].to_str())
    limited.enable_truncation(4)
    limited.enable_padding(length=100)
    limited.save(str(folder / "tokenizer.json"))
    assert load_tokenizer(folder, _config()).encode(TRICKY[3]) == backends["smollm"].encode(TRICKY[3]).ids


def test_text_that_is_not_unicode_is_refused(smollm: Tokenizer) -> None:
    with pytest.raises(PromptError, match="not valid Unicode"):
        smollm.encode("a\ud800")


def test_rows_that_pad_the_embedding_have_no_text(smollm: Tokenizer) -> None:
    assert smollm.decode([511]) == ""
    for index in (-1, 512):
        with pytest.raises(PromptError, match="0 to 511"):
            smollm.decode([index])


# --- streaming ---


def _streamed(detokenizer: Detokenizer, ids: list[int]) -> list[str]:
    return [*map(detokenizer.push, ids), detokenizer.flush()]


@given(ids=st.lists(st.integers(0, 511)), skip=st.booleans())
def test_streamed_text_is_the_whole_text(ids: list[int], skip: bool, smollm: Tokenizer) -> None:
    parts = _streamed(smollm.incremental(skip_special_tokens=skip), ids)
    assert "".join(parts) == smollm.decode(ids, skip_special_tokens=skip)


@given(data=st.lists(st.binary(min_size=1, max_size=3)))
def test_streamed_bytes_are_the_whole_bytes(data: list[bytes]) -> None:
    parts = _streamed(Detokenizer(data.__getitem__), list(range(len(data))))
    assert "".join(parts) == b"".join(data).decode(errors="replace")


@given(text=st.text(alphabet="aé日🐢", min_size=1))
def test_characters_split_over_tokens_come_whole(text: str) -> None:
    encoded = text.encode()
    parts = _streamed(Detokenizer(lambda index: encoded[index : index + 1]), list(range(len(encoded))))
    assert [part for part in parts if part] == list(text)


def test_incomplete_character_comes_at_the_end(smollm: Tokenizer) -> None:
    lead = smollm.encode("🐢")[:-1]
    detokenizer = smollm.incremental()
    assert [detokenizer.push(index) for index in lead] == [""] * len(lead)
    assert detokenizer.flush() == "\ufffd" == smollm.decode(lead)


def test_every_token_is_looked_up_once() -> None:
    calls: list[int] = []

    def piece(index: int) -> bytes:
        calls.append(index)
        return b"x"

    _streamed(Detokenizer(piece), list(range(1000)))
    assert calls == list(range(1000))


# --- chat templates ---

MESSAGES = [{"role": "user", "content": "Hi <b> 'é'"}, {"role": "assistant", "content": "Yes"}]


def test_template_is_found_wherever_it_may_be(folder: Path) -> None:
    settings = folder / "tokenizer_config.json"

    def chat() -> str:
        return load_tokenizer(folder, _config()).chat(MESSAGES)

    with pytest.raises(TokenizerError, match="no chat template"):
        chat()
    edit_json(
        settings,
        chat_template="{{ bos_token }}{{ eos_token }}",
        bos_token="<s>",
        eos_token={"content": "</s>"},
    )
    assert chat() == "<s></s>"
    named = [{"name": "rag", "template": "no"}, {"name": "default", "template": "named"}]
    edit_json(settings, chat_template=named)
    assert chat() == "named"
    (folder / "chat_template.jinja").write_text("file {{ messages | length }}\n")
    assert chat() == "file 2"
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(TokenizerError, match=r"chat_template\.jinja"):
        chat()


def test_template_in_gguf_knows_its_tokens(backends: dict[str, tokenizers.Tokenizer], tmp_path: Path) -> None:
    source = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
    ids: dict[str, object] = {"ggml__bos_token_id": 1, "ggml__eos_token_id": 2, "chat_template": source}
    path = _gguf(tmp_path / "model.gguf", backends["smollm"], "smollm", **ids)
    assert load_tokenizer(path, _config()).chat(MESSAGES) == "<|im_start|>Hi <b> 'é'<|im_end|>"
    path = _gguf(tmp_path / "model.gguf", backends["smollm"], "smollm", **(ids | {"ggml__eos_token_id": 999}))
    with pytest.raises(TokenizerError, match="no usable tokenizer"):
        load_tokenizer(path, _config())


# --- damage and the unknown ---


def test_missing_or_broken_folder_is_refused(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("[")
    with pytest.raises(CheckpointError, match="tokenizer_config"):
        load_tokenizer(folder, _config())
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"cannot read .*tokenizer\.json"):
        load_tokenizer(folder, _config())
    (folder / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError, match=r"has no tokenizer\.json"):
        load_tokenizer(folder, _config())


def test_other_kinds_of_tokenizer_are_refused(folder: Path) -> None:
    for decoder in (None, {"type": "WordPiece", "prefix": "##", "cleanup": True}):
        edit_json(folder / "tokenizer.json", decoder=decoder)
        with pytest.raises(TokenizerError, match="byte-level BPE"):
            load_tokenizer(folder, _config())


def test_tokenizer_of_a_larger_model_is_refused(folder: Path) -> None:
    with pytest.raises(TokenizerError, match="ids below 421; got 421"):
        load_tokenizer(folder, _config(vocab_size=421))


def _without_a_type(metadata: dict[str, Any]) -> object:
    return metadata["tokenizer.ggml.token_type"][1:]


def _with_a_token_twice(metadata: dict[str, Any]) -> object:
    tokens = metadata["tokenizer.ggml.tokens"]
    return [*tokens[:-1], tokens[0]]


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("ggml.model", "llama", "expected gpt2"),
        ("ggml.model", None, "ggml.model"),
        ("ggml.pre", "tekken", "gpt-2, smollm, llama-bpe, qwen2, default; got 'tekken'"),
        ("ggml.pre", None, "got 'none'"),
        ("ggml.tokens", None, "ggml.tokens"),
        ("ggml.tokens", [1, 2], "ggml.tokens"),
        ("ggml.tokens", _with_a_token_twice, "421 of them different"),
        ("ggml.token_type", None, "ggml.token_type"),
        ("ggml.token_type", _without_a_type, "421 types"),
        ("ggml.merges", None, "ggml.merges"),
        ("ggml.merges", ["nosuch token"], "merges do not fit"),
        ("ggml.merges", ["nospace"], "merges do not fit"),
        ("chat_template", "{% if %}", "does not compile"),
    ],
)
def test_gguf_tokenizers_we_cannot_rebuild_are_refused(
    key: str,
    value: object | Callable[[dict[str, Any]], object],
    named: str,
    backends: dict[str, tokenizers.Tokenizer],
    tmp_path: Path,
) -> None:
    backend = backends["smollm"]
    if callable(value):
        value = value(tokenizer_metadata(backend, "smollm"))
    path = _gguf(tmp_path / "model.gguf", backend, "smollm", **{key: value})
    with pytest.raises(TokenizerError, match=named):
        load_tokenizer(path, _config())


# --- the real file ---


@pytest.fixture(scope="module")
def real() -> Tokenizer:
    checkpoint = open_checkpoint(demo_weights())
    return load_tokenizer(checkpoint.path, checkpoint.config)


# Six control characters, and the Unicode planes that nobody uses: SmolLM2's vocabulary lacks bytes of theirs.
REAL_TEXT = st.text(
    st.characters(
        exclude_categories=["Cs"], exclude_characters="\x04\x06\x13\x14\x16\x1d", max_codepoint=0x3FFFF
    )
)


@pytest.mark.weights
@given(text=REAL_TEXT)
def test_real_decode_undoes_encode(text: str, real: Tokenizer) -> None:
    ids = real.encode(text)
    assert real.decode(ids, skip_special_tokens=False) == text
    assert "".join(_streamed(real.incremental(skip_special_tokens=False), ids)) == text


@pytest.mark.weights
def test_real_chat_is_chatml(real: Tokenizer) -> None:
    text = real.chat([{"role": "user", "content": "What is 2+2?"}])
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = real.encode(text, add_special_tokens=False)
    assert ids[:3] == [1, 9690, 198]  # <|im_start|>, system, newline
    assert ids.count(real.eos_token_ids[0]) == 2
    assert (real.vocab_size, real.bos_token_id, real.eos_token_ids) == (49152, 1, (2,))
    assert real.encode("2024") == [34, 32, 34, 36]  # digits one by one
