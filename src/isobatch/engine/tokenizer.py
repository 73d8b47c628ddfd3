"""Text to tokens and back, for the byte-level BPE tokenizers of Llama 3, Qwen2, Qwen3 and SmolLM2.

Encoding is the tokenizers library's. Decoding is our own: a byte-level token means the same bytes wherever
it stands, so that a text is its tokens' bytes, one after the other, and a streamed token costs the same
however long the reply has become.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders

from isobatch.engine.chat_template import ChatTemplate
from isobatch.engine.gguf_tokenizer import gguf_backend
from isobatch.errors import CheckpointError, PromptError, TokenizerError
from isobatch.models.config import ModelConfig
from isobatch.models.fields import Fields, read_json
from isobatch.models.gguf_format import GgufFile


def _byte_of_letter() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, U+0100 and on for the other bytes."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_of_letter()


class Detokenizer:
    """Text from tokens as they come. Make one with Tokenizer.incremental.

    Args:
        piece: the bytes of a token.
    """

    def __init__(self, piece: Callable[[int], bytes]) -> None:
        self._piece = piece
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Take one more token, in constant time.

        Args:
            token_id: the token.

        Returns:
            The new text; empty while a character is incomplete.

        Raises:
            PromptError: a token that the model does not have.
        """
        return self._utf8.decode(self._piece(token_id))

    def flush(self) -> str:
        """Say that there are no more tokens.

        Returns:
            U+FFFD if the last character stayed incomplete, else nothing.
        """
        return self._utf8.decode(b"", final=True)


class Tokenizer:
    """A checkpoint's tokenizer and chat template. Make one with load_tokenizer.

    Args:
        backend: the tokenizer, byte-level.
        config: the model it belongs to.
        template: the chat template, if there is one.
        digest: of what all this was made from, 64 hexadecimal digits.

    Attributes:
        vocab_size: how many tokens have a text; the model's embedding may have more rows.
        eos_token_ids: the tokens that end a reply.
        bos_token_id: the token that begins a text, or None.

    Raises:
        TokenizerError: not a byte-level tokenizer, or with tokens that the model does not have.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        config: ModelConfig,
        template: ChatTemplate | None,
        digest: str,
    ) -> None:
        if not isinstance(backend.decoder, decoders.ByteLevel):
            raise TokenizerError(
                "unknown kind of tokenizer",
                expected="byte-level BPE, as of Llama 3, Qwen2, Qwen3 or SmolLM2",
                got=f"one whose decoder is {type(backend.decoder).__name__}",
            )
        # A stored limit would cut prompts silently.
        backend.no_truncation()
        backend.no_padding()
        vocabulary = backend.get_vocab(with_added_tokens=True)
        largest = max(vocabulary.values(), default=-1)
        if largest >= config.vocab_size:
            raise TokenizerError(
                "the tokenizer is not this model's", expected=f"ids below {config.vocab_size}", got=largest
            )
        self.vocab_size = len(vocabulary)
        self.digest = digest
        self.eos_token_ids = config.eos_token_ids
        self.bos_token_id = config.bos_token_id
        self._backend, self._template, self._rows = backend, template, config.vocab_size
        added = backend.get_added_tokens_decoder()
        # Added tokens are plain text; the others are spelt in the byte alphabet, translated when first met.
        self._pieces = {index: token.content.encode() for index, token in added.items()}
        self._special = frozenset(index for index, token in added.items() if token.special)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The tokens of a text. Special tokens that are written out in it count as such.

        Bytes for which the vocabulary has no token are left out, as by the model's own tokenizer: SmolLM2 has
        none for six of the control characters.

        Args:
            text: any text.
            add_special_tokens: whether to add what the checkpoint wants around a text, such as Llama 3's
                begin-of-text. A rendered chat has that already.

        Returns:
            Token ids, each less than the model's vocabulary.

        Raises:
            PromptError: a lone surrogate, which no UTF-8 text can hold.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise PromptError("the text is not valid Unicode", got=error) from error
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of tokens. Bytes that are not UTF-8 become U+FFFD.

        Args:
            ids: token ids.
            skip_special_tokens: whether to leave out tokens such as <|im_end|>.

        Returns:
            The text, without any clean-up of spaces.

        Raises:
            PromptError: a token that the model does not have.
        """
        return b"".join(self._piece(index, skip_special_tokens) for index in ids).decode(errors="replace")

    def token_bytes(self, index: int) -> bytes:
        """The bytes of one token, a special one's name included.

        Args:
            index: the token.

        Raises:
            PromptError: a token that the model does not have.
        """
        return self._piece(index, skip_special_tokens=False)

    def chat(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> str:
        """The text of a conversation, by the checkpoint's chat template. See ChatTemplate.render.

        Args:
            messages: each with a "role" and its "content".
            add_generation_prompt: whether to end with what begins the assistant's turn.

        Returns:
            The text, to be encoded with add_special_tokens=False.

        Raises:
            PromptError: the template refuses these messages.
            TokenizerError: there is no template, or it asks for the time.
        """
        if self._template is None:
            raise TokenizerError("the checkpoint has no chat template", fix="send plain prompts instead")
        return self._template.render(messages, add_generation_prompt=add_generation_prompt)

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The tokens of a conversation, ready for the assistant's turn.

        Args:
            messages: as for `chat`.

        Returns:
            Token ids, without special tokens beside those that the template writes.
        """
        return self.encode(self.chat(messages), add_special_tokens=False)

    def incremental(self, *, skip_special_tokens: bool = True) -> Detokenizer:
        """A decoder for a reply that comes token by token.

        Args:
            skip_special_tokens: as for decode.

        Returns:
            A detokenizer. All that it says, flush() included, is decode() of all tokens together. The prompt
            has no part in it: byte-level tokens mean the same wherever they stand.
        """
        return Detokenizer(lambda index: self._piece(index, skip_special_tokens))

    def _piece(self, index: int, skip_special_tokens: bool) -> bytes:
        if not 0 <= index < self._rows:
            raise PromptError(
                "a token that the model does not have", expected=f"0 to {self._rows - 1}", got=index
            )
        if skip_special_tokens and index in self._special:
            return b""
        piece = self._pieces.get(index)
        if piece is None:
            # Rows of the embedding that only pad it have no token, and no text.
            piece = self._pieces[index] = _spelt(self._backend.id_to_token(index) or "")
        return piece


def _spelt(token: str) -> bytes:
    try:
        return bytes(_BYTES[letter] for letter in token)
    except KeyError:
        return token.encode()


def load_tokenizer(path: Path, config: ModelConfig) -> Tokenizer:
    """The tokenizer of a checkpoint.

    Args:
        path: a Hugging Face folder or a .gguf file.
        config: the model, which says how many tokens there are and which end a reply.

    Returns:
        The tokenizer.

    Raises:
        TokenizerError: missing, damaged, of an unknown kind, or not this model's.
        CheckpointError: the file around it is damaged.
    """
    return _from_folder(path, config) if path.is_dir() else _from_gguf(path, config)


def _from_folder(path: Path, config: ModelConfig) -> Tokenizer:
    file = path / "tokenizer.json"
    if not file.is_file():
        raise TokenizerError(
            f"{path} has no tokenizer.json", fix="save it with a fast tokenizer of transformers"
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # what the library raises is a plain Exception
        raise TokenizerError(f"cannot read {file}", got=error, fix="fetch it again") from error
    settings_file, template_file = path / "tokenizer_config.json", path / "chat_template.jinja"
    settings = read_json(settings_file) if settings_file.is_file() else {}
    source = _default_template(settings.get("chat_template"))
    if template_file.is_file():
        try:
            source = template_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TokenizerError(f"cannot read {template_file}", got=error) from error
    sha = hashlib.sha256()
    for part in (file, settings_file, template_file):
        content = part.read_bytes() if part.is_file() else b""
        sha.update(f"{part.name} {len(content)} ".encode() + content)
    if source is None:
        return Tokenizer(backend, config, None, sha.hexdigest())
    special = {name: _content(value) for name, value in settings.items() if name.endswith("_token")}
    named = {name: content for name, content in special.items() if content is not None}
    return Tokenizer(backend, config, ChatTemplate(source, named), sha.hexdigest())


def _default_template(value: object) -> str | None:
    """The template in a tokenizer_config.json: a text, or a list of named ones."""
    if isinstance(value, list):
        entries = (entry for entry in value if isinstance(entry, dict) and entry.get("name") == "default")
        value = next(entries, {}).get("template")
    return value if isinstance(value, str) else None


def _content(token: object) -> str | None:
    """A special token in a tokenizer_config.json: a text, or an object with its content."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _from_gguf(path: Path, config: ModelConfig) -> Tokenizer:
    file = GgufFile(path)
    file.close()
    fields = Fields(file.metadata, str(path))
    try:
        backend = gguf_backend(fields)
        template = None
        if fields.has("tokenizer.chat_template"):
            tokens = fields.items("tokenizer.ggml.tokens", str)
            keys = {f"{name}_token": f"tokenizer.ggml.{name}_token_id" for name in ("bos", "eos")}
            named = {name: tokens[fields.get(key, int)] for name, key in keys.items() if fields.has(key)}
            template = ChatTemplate(fields.get("tokenizer.chat_template", str), named)
    except (CheckpointError, IndexError) as error:
        raise TokenizerError(f"{path} has no usable tokenizer", got=error) from error
    content = {key: value for key, value in file.metadata.items() if key.startswith("tokenizer.")}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return Tokenizer(backend, config, template, digest)
