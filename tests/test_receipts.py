"""Receipts: what is in them, that they depend on the request alone, and that no edit goes unnoticed."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isobatch import LLM, SamplingParams
from isobatch.engine.receipt import PARAMS, Receipt
from isobatch.engine.receipt_json import read_receipt, receipt_from_json
from isobatch.engine.request import FinishReason
from isobatch.engine.seeds import seed_of
from isobatch.errors import InvalidSamplingError, ReceiptError
from isobatch.models.weights_digest import Witness, weights_digest
from isobatch.ops import certified_ops
from tests.checkpoints import edit_json, tiny_model, trained_bpe
from tests.engine_harness import (
    IDENTITY,
    Ask,
    TinyCheckpoint,
    World,
    alone,
    captured_logits,
    drive,
    fixed_asks,
    stream,
    tiny_world,
)


def receipts(world: World, asks: tuple[Ask, ...], **how: Any) -> list[str]:
    """The written receipts of requests that are served together."""
    replies = drive(world.engine(**how), asks)
    return [receipt_of(reply).to_json() for reply in replies]


def receipt_of(reply: Any, index: int = 0) -> Receipt:
    receipt = reply.completions[index].receipt
    assert isinstance(receipt, Receipt)
    return receipt


# What is in them.


def test_rows_are_digests_of_the_logits_that_the_model_gave() -> None:
    """Written out as a stranger would read the specification, from logits before any penalty."""
    ask = Ask(stream(0)[:30], SamplingParams(seed=1, repetition_penalty=1.5, max_tokens=9, receipt=True))
    world = tiny_world()
    with captured_logits(world.decoder) as steps:
        (reply,) = drive(world.engine(), [ask])
    rows = torch.cat(steps)
    digests = [hashlib.sha256(row.numpy().astype("<f4").tobytes()).digest() for row in rows]
    written = json.loads(receipt_of(reply).to_json())
    assert written["logits"]["rows"] == [one.hex()[:8] for one in digests]
    assert written["logits"]["digest"] == hashlib.sha256(b"".join(digests)).hexdigest()
    own = written.pop("digest")
    canonical = json.dumps(written, sort_keys=True, separators=(",", ":"))
    assert own == hashlib.sha256(canonical.encode()).hexdigest()


def test_receipt_has_every_parameter_that_decides_what_is_said() -> None:
    assert set(PARAMS) | {"n", "logprobs", "prompt_logprobs", "receipt"} == set(SamplingParams.__slots__)


def test_without_asking_there_is_none_and_nothing_is_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_logits: torch.Tensor) -> list[bytes]:
        raise AssertionError("hashed for nobody")

    monkeypatch.setattr("isobatch.engine.runner.row_digests", refuse)
    (reply,) = drive(tiny_world().engine(), [Ask(stream(0)[:9], SamplingParams(seed=1))])
    assert reply is not None
    assert reply.completions[0].receipt is None


def test_what_the_engine_filled_in_is_in_the_receipt() -> None:
    """A drawn seed, the derived seeds of n completions, and the room that the context left."""
    prompt = stream(0)[:20]
    ask = Ask(prompt, SamplingParams(n=3, max_tokens=99, ignore_eos=True, receipt=True, logprobs=2))
    (reply,) = drive(tiny_world().engine(max_context=25), [ask])
    assert reply is not None
    for index, completion in enumerate(reply.completions):
        receipt = receipt_of(reply, index)
        assert receipt.params.seed == completion.seed == seed_of(reply.completions[0].seed, index)
        assert (receipt.params.n, receipt.params.max_tokens, receipt.params.logprobs) == (1, 5, None)
        assert (receipt.token_ids, receipt.finish_reason) == (completion.token_ids, FinishReason.LENGTH)
        (again,) = drive(tiny_world().engine(), [Ask(prompt, receipt.params)])
        assert receipt_of(again) == receipt


def test_stock_kernels_give_no_receipt() -> None:
    engine = tiny_world("stock").engine()
    engine.identity = None
    with pytest.raises(InvalidSamplingError, match="receipt"):
        engine.check_request([1, 2], SamplingParams(receipt=True))


# They depend on the request alone. The engine's relations compare receipts as well; these say it of receipts.

WAYS: dict[str, dict[str, Any]] = {
    "batched": {},
    "chunked": {"max_batch_tokens": 7},
    "two at a time": {"max_batch_sequences": 2},
    "chaos": {"policy": "chaos:5", "max_batch_tokens": 48},
    "preempted": {"blocks": 13, "prefix_cache": False},
}


@cache
def asks() -> tuple[Ask, ...]:
    """Greedy and sampled, every filter and penalty, ends of all kinds."""
    varied: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 0.7, "top_p": 0.8, "stop_token_ids": [7, 50]},
        {"top_k": 9, "frequency_penalty": 0.5},
        {"min_p": 0.05, "presence_penalty": -0.5, "ignore_eos": True},
        {"temperature": 1.5, "repetition_penalty": 1.3},
    ]
    return tuple(
        Ask(stream(i % 2)[: 17 + 37 * i], SamplingParams(seed=i, max_tokens=24, receipt=True, **each))
        for i, each in enumerate(varied)
    )


@pytest.mark.parametrize("way", WAYS)
def test_receipt_depends_on_the_request_alone(way: str) -> None:
    world = tiny_world()
    want = [receipt_of(alone(world, ask)).to_json() for ask in asks()]
    engine = world.engine(**WAYS[way])
    for _ in range(2):  # the second time, prompts come from the prefix cache
        replies = drive(engine, asks())
        assert [receipt_of(reply).to_json() for reply in replies] == want
    if way in ("preempted", "chaos"):
        assert any(reply.completions[0].preemptions for reply in replies if reply), "nothing was preempted"


@pytest.mark.parametrize("way", ["batched", "chunked", "chaos"])
def test_control_logits_that_depend_on_the_load_are_caught(way: str) -> None:
    world = tiny_world("linear_by_rows")
    want = [receipt_of(alone(world, ask)) for ask in asks()]
    got = [receipt_of(reply) for reply in drive(world.engine(**WAYS[way]), asks())]
    assert got != want
    # Low bits, and not one other token: what a receipt sees and a comparison of texts does not.
    assert any(a.token_ids == b.token_ids and a.rows != b.rows for a, b in zip(got, want, strict=True))


# Written and read.


@cache
def _written() -> str:
    receipt = receipt_of(alone(tiny_world(), fixed_asks()[1]))
    params = replace(receipt.params, seed=2**64 - 1, stop=("a", "\u2028ü"), stop_token_ids=(3, 4))
    return replace(
        receipt, params=params, messages=({"role": "user", "content": "x \ud83d\ude00"},)
    ).to_json()


def test_reading_gives_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "receipt.json"
    path.write_text(_written())
    receipt = read_receipt(path)
    assert receipt.to_json() == _written()
    assert receipt.identity == IDENTITY


def test_layout_and_spelling_of_numbers_are_free() -> None:
    """As a browser would write it: other spaces, other order, 1 for 1.0; the seed stays whole."""
    content = json.loads(_written())
    content["params"]["top_p"] = 1
    pretty = json.dumps(dict(reversed(content.items())), indent=2, ensure_ascii=False)
    assert receipt_from_json(pretty).to_json() == _written()


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    children = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    yield path
    for key, child in children:
        yield from _leaves(child, (*path, key))


def _put(content: Any, path: tuple[Any, ...], change: Callable[[Any], Any]) -> Any:
    if not path:
        return change(content)
    copy = dict(content) if isinstance(content, dict) else list(content)
    copy[path[0]] = _put(content[path[0]], path[1:], change)
    return copy


_PLACES = list(_leaves(json.loads(_written())))
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=400, deadline=None)
@given(path=st.sampled_from(_PLACES), value=_JSON)
def test_every_edit_is_found(path: tuple[Any, ...], value: Any) -> None:
    content = json.loads(_written())
    edited = _put(content, path, lambda _old: value)
    if edited == content:  # True is 1 to Python: whether it is to us, the next test asks
        return
    with pytest.raises(ReceiptError):
        receipt_from_json(json.dumps(edited))


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("isobatch_receipt",), 2, "another schema"),
        (("isobatch_receipt",), True, "another schema"),
        (("isobatch_receipt",), 1.5, "another schema"),
        (("fingerprint",), "iso-0123456789abcdef", "fingerprint is not its own"),
        (("digest",), "0" * 64, "digest is not its own"),
        (("params", "seed"), 1, "bad params.seed"),
        (("params", "seed"), "01", "bad params.seed"),
        (("params", "top_p"), 0, "parameters that no request can have"),
        (("params", "ignore_eos"), 1, "parameters that no request can have"),
        (("completion", "finish_reason"), "abort", "stop or length"),
        (("completion", "token_ids", 0), True, "elements of another kind"),
        (("completion", "token_ids", 0), 2**63, "elements of another kind"),
        (("completion", "token_ids"), [], "not empty"),
        (("logits", "rows"), ["01234567"], "one for each of"),
        (("logits", "digest"), "0", "64 hexadecimal digits"),
        (("prompt", "text"), "x", "a text or messages; got 'both'"),
        (("prompt",), {"token_ids": [1], "text": None}, "without prompt.messages"),
    ],
)
def test_what_is_no_receipt_is_refused_by_name(path: tuple[Any, ...], value: Any, said: str) -> None:
    with pytest.raises(ReceiptError, match=said):
        receipt_from_json(json.dumps(_put(json.loads(_written()), path, lambda _old: value)))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("{}", "not a receipt"),
        ("[1]", "not a receipt"),
        ('{"isobatch_receipt": NaN}', "not JSON"),
        ('{"isobatch_receipt": 1, "isobatch_receipt": 1}', "twice"),
        ('{"isobatch_receipt": 1}', "without completion"),
    ],
)
def test_what_is_not_json_is_refused(text: str, said: str) -> None:
    with pytest.raises(ReceiptError, match=said):
        receipt_from_json(text)


@settings(max_examples=200, deadline=None)
@given(at=st.integers(0, len(_written()) - 1), byte=st.integers(0, 255))
def test_every_damaged_byte_is_found(at: int, byte: int) -> None:
    whole = _written().encode()
    damaged = whole[:at] + bytes([byte]) + whole[at + 1 :]
    try:
        receipt = receipt_from_json(damaged.decode())
    except (ReceiptError, UnicodeDecodeError):
        return
    assert receipt.to_json() == _written()  # a space for another, at most


# The identity.


def test_digest_of_weights_is_that_of_every_bit_of_them() -> None:
    class Flipped(TinyCheckpoint):
        """One bit of one number is the other way round."""

        def __init__(self, name: str, place: int) -> None:
            super().__init__()
            self._name, self._place = name, place

        def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
            whole = super().read(name)
            if name == self._name:
                whole.view(-1).view(torch.int32)[self._place] ^= 1
            return whole[start:stop]

    plain = TinyCheckpoint()
    rng = random.Random(1)
    digests = [weights_digest(plain)]
    for name in sorted(plain.names()):
        last = plain.read(name).numel() - 1
        places = [0, rng.randrange(1, last), last]
        digests += [weights_digest(Flipped(name, place)) for place in places]
    assert len(set(digests)) == len(digests) == 1 + 3 * len(plain.names())


def test_digest_of_weights_does_not_depend_on_how_they_are_read() -> None:
    from isobatch.models.loading import load_decoder

    loaded, cut = Witness(TinyCheckpoint()), Witness(TinyCheckpoint())
    load_decoder(loaded, certified_ops())
    for name in sorted(cut.names(), reverse=True):
        rows = cut.shape(name)[0]
        for start in range(0, rows, 7):
            read = cut.rows if len(cut.shape(name)) > 1 else cut.read
            read(name, start, min(start + 7, rows))
    assert loaded.digest() == cut.digest() == weights_digest(TinyCheckpoint())


def test_fingerprint_follows_weights_configuration_tokenizer_numerics_and_version(tmp_path: Path) -> None:
    def saved(name: str, **settings: Any) -> Path:
        tiny_model("llama", vocab_size=448, **settings).save_pretrained(tmp_path / name)
        tokenizer = trained_bpe("llama-bpe", ["the quick brown fox " * 9])
        tokenizer.save(str(tmp_path / name / "tokenizer.json"))
        return tmp_path / name

    same, folder = saved("same"), saved("plain")
    other_norm = saved("norm", rms_norm_eps=1e-4)
    other_words = saved("words")
    trained_bpe("llama-bpe", ["a lazy dog " * 9]).save(str(other_words / "tokenizer.json"))
    template = saved("template")
    (template / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    ends = saved("ends")
    edit_json(ends / "generation_config.json", eos_token_id=[2, 3])

    def made(path: Path) -> Any:
        llm = LLM(path, kv_cache_bytes=1 << 20, progress=False)
        assert llm.identity is not None
        assert llm.fingerprint == llm.identity.fingerprint
        return llm.identity

    plain = made(folder)
    assert made(same) == plain
    others = [made(path) for path in (other_norm, other_words, template, ends)]
    others += [replace(plain, numerics="num-0"), replace(plain, version="9")]
    prints = [identity.fingerprint for identity in (plain, *others)]
    assert len(set(prints)) == len(prints)
    assert LLM(folder, kernels="stock", kv_cache_bytes=1 << 20, progress=False).fingerprint is None
