"""Rebuild a byte-level BPE tokenizer from a GGUF file's metadata.

The file has the vocabulary and the merges, but only a name for how text is split before any merge. The
recipes below are those of the models' own tokenizer.json; "default" is what llama.cpp does when a file says
just that.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split

from isobatch.errors import TokenizerError
from isobatch.models.fields import Fields

_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5


@dataclass(frozen=True, slots=True)
class _Recipe:
    """What the name of a pre-tokenizer stands for.

    Args:
        steps: how text is cut and turned into the byte alphabet.
        ignore_merges: whether a piece that is a token as it stands is taken whole.
        add_bos: whether a text begins with the bos token, where the file does not say.
        nfc: whether text is brought into Unicode's composed form first.
    """

    steps: tuple[PreTokenizer, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    nfc: bool = False


def _split(pattern: str) -> PreTokenizer:
    return Split(Regex(pattern), behavior="isolated")


def _words(digits: str) -> PreTokenizer:
    return _split(
        rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


_BYTES = ByteLevel(add_prefix_space=False, use_regex=False)
_GPT2_WORDS_TO_BYTES = ByteLevel(add_prefix_space=False, use_regex=True)
_RECIPES = {
    "gpt-2": _Recipe((_GPT2_WORDS_TO_BYTES,)),
    "smollm": _Recipe((Digits(individual_digits=True), _GPT2_WORDS_TO_BYTES)),
    "llama-bpe": _Recipe((_words(r"\p{N}{1,3}"), _BYTES), ignore_merges=True, add_bos=True),
    "qwen2": _Recipe((_words(r"\p{N}"), _BYTES), nfc=True),
    "default": _Recipe(
        (
            _split(r"[\p{P}\$\+<=>\^~\|]+"),
            _split(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"),
            _split(r"\p{N}+"),
            _split(r"[0-9][0-9][0-9]"),
            _BYTES,
        )
    ),
}


def gguf_backend(fields: Fields) -> Tokenizer:
    """The tokenizer in a GGUF file.

    Args:
        fields: the file's metadata.

    Returns:
        A tokenizer that gives what the model's own tokenizer.json would.

    Raises:
        TokenizerError: an unknown kind of tokenizer or pre-tokenizer, or an inconsistent vocabulary.
        CheckpointError: an entry is missing or of the wrong type.
    """
    kind, name = fields.get("tokenizer.ggml.model", str), fields.get("tokenizer.ggml.pre", str, "none")
    if kind != "gpt2":
        raise TokenizerError("unknown kind of tokenizer", expected="gpt2, byte-level BPE", got=repr(kind))
    if name not in _RECIPES:
        raise TokenizerError(
            "unknown pre-tokenizer", expected=f"one of {', '.join(_RECIPES)}", got=repr(name)
        )
    recipe = _RECIPES[name]
    tokens = fields.items("tokenizer.ggml.tokens", str)
    types = fields.items("tokenizer.ggml.token_type", int)
    # An unused token only gives a name to a row that pads the embedding; no text leads to it.
    vocabulary = {
        token: index
        for index, (token, kind) in enumerate(zip(tokens, types, strict=False))
        if kind != _UNUSED
    }
    if len(types) != len(tokens) or len(vocabulary) + types.count(_UNUSED) != len(tokens):
        raise TokenizerError(
            "the vocabulary is inconsistent",
            expected="every token once, with a type",
            got=f"{len(tokens)} tokens, {len(set(tokens))} of them different, and {len(types)} types",
        )
    backend = Tokenizer(_model(vocabulary, fields.items("tokenizer.ggml.merges", str), recipe.ignore_merges))
    if recipe.nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = Sequence(list(recipe.steps))
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(
        [
            AddedToken(tokens[index], special=kind == _CONTROL, normalized=False)
            for index, kind in enumerate(types)
            if kind in (_CONTROL, _USER_DEFINED)
        ]
    )
    _add_ends(backend, fields, recipe)
    return backend


def _model(vocabulary: dict[str, int], lines: list[str], ignore_merges: bool) -> models.BPE:
    merges = [(left, right) for left, _, right in (line.partition(" ") for line in lines)]
    try:
        return models.BPE(vocab=vocabulary, merges=merges, ignore_merges=ignore_merges)
    except Exception as error:  # what the library raises is a plain Exception
        raise TokenizerError("the merges do not fit the vocabulary", got=error) from error


def _add_ends(backend: Tokenizer, fields: Fields, recipe: _Recipe) -> None:
    ends = {
        "bos": fields.get("tokenizer.ggml.add_bos_token", bool, recipe.add_bos),
        "eos": fields.get("tokenizer.ggml.add_eos_token", bool, False),
    }
    ids = [(end, fields.get(f"tokenizer.ggml.{end}_token_id", int)) for end, wanted in ends.items() if wanted]
    if ids:
        order = ("bos", "$A", "eos")
        single = " ".join(part for part in order if part == "$A" or ends[part])
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
