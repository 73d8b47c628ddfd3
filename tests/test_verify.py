"""Verification: true receipts are verified whatever the chunk, false ones refuted at the right place.

The receipts here are forged by `dataclasses.replace` or through JSON with the digest made anew, so that
nothing but the recomputation can find the forgery. What is true is decided by an oracle: a receipt is true if
and only if the engine, asked the request in it, gives that very receipt.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isobatch import LLM, SamplingParams
from isobatch.cli import bench_verify, main
from isobatch.engine.engine import Engine
from isobatch.engine.receipt import Receipt
from isobatch.engine.receipt_json import read_receipt, receipt_from_json
from isobatch.engine.request import FinishReason
from isobatch.engine.verify import Outcome, Verdict, verify
from isobatch.errors import ConfigError, RequestError
from isobatch.models.locate import demo_weights
from tests.checkpoints import tiny_model, trained_bpe
from tests.engine_harness import TINY, Ask, alone, drive, smollm2, stream, tiny_world

PROMPT = "Ünïcödé: the same bits"
CORPUS = [PROMPT, "the quick brown fox " * 9]
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
VERIFIED, REFUTED, UNKNOWN = Outcome.VERIFIED, Outcome.REFUTED, Outcome.UNKNOWN


def save(path: Path, **settings_: Any) -> Path:
    """A tiny Llama with a tokenizer and a chat template."""
    tiny_model("llama", vocab_size=448, max_position_embeddings=256, **settings_).save_pretrained(path)
    trained_bpe("llama-bpe", CORPUS).save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return load(folder)


def load(path: Path, **settings_: Any) -> LLM:
    return LLM(path, kv_cache_bytes=1 << 21, progress=False, **settings_)


def receipt_of(reply: Any, index: int = 0) -> Receipt:
    receipt = reply.completions[index].receipt
    assert isinstance(receipt, Receipt)
    return receipt


@cache
def engine() -> Engine:
    return tiny_world().engine()


# True receipts.

_PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.7, 1.0, 2.0]),
    top_k=st.sampled_from([0, 0, 7]),
    top_p=st.sampled_from([1.0, 0.8]),
    min_p=st.sampled_from([0.0, 0.0, 0.1]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.7]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 2**64 - 1),
    max_tokens=st.integers(1, 40),
    ignore_eos=st.booleans(),
    stop_token_ids=st.sampled_from([(), (), (7, 50)]),
    receipt=st.just(True),
)
_ASK = st.builds(
    lambda number, length, params: Ask(stream(number)[:length], params),
    st.integers(0, 3),
    st.sampled_from((1, 2, 15, 16, 17, 40, 129)),
    _PARAMS,
)


@settings(max_examples=60, deadline=None)
@given(ask=_ASK, chunk=st.sampled_from((1, 3, 16, 64, 256)))
def test_true_receipt_is_verified_in_any_chunks(ask: Ask, chunk: int) -> None:
    verdict = verify(engine(), receipt_of(alone(tiny_world(), ask)), chunk=chunk)
    assert verdict.outcome is VERIFIED, verdict


def test_receipts_from_any_load_are_verified() -> None:
    """Decoded, batched, chunked, preempted; verified in one pass."""
    asks = [
        Ask(stream(i)[: 9 + i], SamplingParams(seed=i, max_tokens=30, ignore_eos=True, receipt=True, n=2))
        for i in range(4)
    ]
    busy = tiny_world().engine(policy="chaos:3", blocks=12, max_batch_tokens=20)
    for reply in drive(busy, asks):
        for index in range(2):
            assert verify(engine(), receipt_of(reply, index)).outcome is VERIFIED


@pytest.mark.parametrize("fault", ["linear_by_rows", "cascade_attention", "stock"])
def test_control_reply_whose_decoding_was_not_prefill_is_refuted(fault: str) -> None:
    ask = Ask(stream(0)[:40], SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, receipt=True))
    receipt = receipt_of(alone(tiny_world(fault), ask))
    verdict = verify(engine(), receipt)
    assert (verdict.outcome, verdict.field) == (REFUTED, "logits.rows"), verdict


def test_verifying_disturbs_no_request() -> None:
    world = tiny_world()
    asks = [Ask(stream(i)[:30], SamplingParams(seed=i, max_tokens=12, receipt=True)) for i in range(3)]
    receipts = [receipt_of(alone(world, ask)) for ask in asks]
    busy = world.engine()
    numbers = [busy.add(ask.prompt, ask.params) for ask in asks]
    replies: dict[int, Any] = {}
    while busy.has_work:
        replies |= {reply.request_id: reply for reply in busy.step()}
        assert all(verify(busy, receipt).outcome is VERIFIED for receipt in receipts)
        busy.scheduler.check()
    assert [receipt_of(replies[number]) for number in numbers] == receipts


# False ones.


def is_true(receipt: Receipt, of: Engine) -> bool:
    """The oracle: ask the engine, token by token."""
    try:
        of.check_request(receipt.prompt_token_ids, receipt.params)
    except RequestError:
        return False
    if len(receipt.prompt_token_ids) + receipt.params.max_tokens > of.max_context:
        return False
    (reply,) = drive(of, [Ask(receipt.prompt_token_ids, receipt.params)])
    return reply is not None and not reply.error and receipt_of(reply) == receipt


def _base() -> Receipt:
    params = SamplingParams(
        temperature=0.9, top_p=0.9, top_k=40, seed=28, max_tokens=20, repetition_penalty=1.2, receipt=True
    )
    return receipt_of(alone(tiny_world(), Ask(stream(0)[:20], params)))


def _with(sequence: tuple[Any, ...], at: int, value: Any) -> tuple[Any, ...]:
    at %= len(sequence)
    return (*sequence[:at], value, *sequence[at + 1 :])


_AT, _TOKEN = st.integers(0, 200), st.integers(0, TINY.vocab_size + 2)
_HEX = st.text("0123456789abcdef", min_size=8, max_size=8)
_VALUES: dict[str, list[Any]] = {
    "temperature": [0, 0.1, 0.9, 0.9000001, 3],
    "top_k": [0, 1, 39, 40],
    "top_p": [0.1, 0.5, 0.9, 1],
    "min_p": [0, 0.001, 0.3],
    "repetition_penalty": [1, 1.2, 2],
    "presence_penalty": [0, 1],
    "frequency_penalty": [0, -1, 1],
    "seed": [0, 28, 29, 2**64 - 1],
    "max_tokens": [1, 3, 19, 20, 21, 10**6],
    "ignore_eos": [False, True],
    "stop_token_ids": [(), (2,), (50, 7), tuple(range(0, 101, 3)), (10**6,)],
}
_FORGERIES: list[st.SearchStrategy[Callable[[Receipt], Receipt]]] = [
    st.builds(lambda at, t: lambda r: replace(r, token_ids=_with(r.token_ids, at, t)), _AT, _TOKEN),
    st.builds(
        lambda at, t: lambda r: replace(r, prompt_token_ids=_with(r.prompt_token_ids, at, t)), _AT, _TOKEN
    ),
    st.builds(lambda at, row: lambda r: replace(r, rows=_with(r.rows, at, row)), _AT, _HEX),
    st.builds(lambda at: lambda r: replace(r, logits=r.logits[::-1]), _AT),
    st.builds(lambda n: lambda r: replace(r, token_ids=r.token_ids[:n], rows=r.rows[:n]), st.integers(1, 25)),
    st.builds(
        lambda t, row: lambda r: replace(r, token_ids=(*r.token_ids, t), rows=(*r.rows, row)), _TOKEN, _HEX
    ),
    st.builds(lambda x: lambda r: replace(r, finish_reason=x), st.sampled_from([*FinishReason][:2])),
    st.builds(lambda x: lambda r: replace(r, stop_reason=x), st.sampled_from([None, 0, 2, 50, "x"])),
    st.builds(lambda x: lambda r: replace(r, text=x), st.sampled_from(["", "x", " "])),
    *(
        st.builds(
            lambda x, name=name: lambda r: replace(r, params=replace(r.params, **{name: x})),
            st.sampled_from(values),
        )
        for name, values in _VALUES.items()
    ),
]
_FORGED = st.lists(st.one_of(_FORGERIES), min_size=1, max_size=2)


@settings(max_examples=150, deadline=None)
@given(changes=_FORGED, chunk=st.sampled_from((5, 256)))
def test_receipt_is_verified_if_and_only_if_the_engine_says_the_same(
    changes: list[Callable[[Receipt], Receipt]], chunk: int
) -> None:
    forged = _base()
    for change in changes:
        forged = change(forged)
    forged = receipt_from_json(forged.to_json())  # its own digest is right
    verdict = verify(engine(), forged, chunk=chunk)
    assert verdict.outcome is (VERIFIED if is_true(forged, engine()) else REFUTED), verdict


def test_control_the_oracle_and_the_forgeries_say_both() -> None:
    """Of the parameters some can be changed so that the reply stays, and all so that it does not."""
    base = _base()
    assert is_true(base, engine())
    assert is_true(replace(base, params=replace(base.params, temperature=0.9000001)), engine())
    assert not is_true(replace(base, params=replace(base.params, seed=29)), engine())


@pytest.mark.parametrize("believed", ["sampler.choose", "row_digests"])
def test_control_a_verifier_that_believes_is_fooled(believed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the recomputation that finds a forgery: without one half of it, that half's forgery passes."""
    base = _base()
    forged = {
        "sampler.choose": replace(base, params=replace(base.params, seed=29)),
        "row_digests": replace(base, rows=("00000000",) * 20, logits=sha256(bytes(32 * 20)).hexdigest()),
    }[believed]
    assert verify(engine(), forged).outcome is REFUTED
    echo: dict[str, Callable[..., Any]] = {
        "sampler.choose": lambda _ops, _logits, _states: list(forged.token_ids),
        "row_digests": lambda logits: [bytes(32)] * len(logits),
    }
    monkeypatch.setattr(f"isobatch.engine.verify.{believed}", echo[believed])
    assert verify(engine(), forged).outcome is VERIFIED


def forge(receipt: Receipt, **params: Any) -> Receipt:
    return replace(receipt, params=replace(receipt.params, **params))


@pytest.mark.parametrize(
    ("field", "token", "change"),
    [
        ("completion.token_ids", 4, lambda r: replace(r, token_ids=_with(r.token_ids, 4, 99))),
        ("completion.token_ids", 4, lambda r: replace(r, token_ids=_with(r.token_ids, 4, 2**62))),
        ("logits.rows", 6, lambda r: replace(r, rows=_with(r.rows, 6, "00000000"))),
        ("logits.rows", 0, lambda r: replace(r, prompt_token_ids=_with(r.prompt_token_ids, 3, 9))),
        ("logits.digest", None, lambda r: replace(r, logits="0" * 64)),
        ("completion.text", None, lambda r: replace(r, text="words")),
        ("completion.finish_reason", None, lambda r: replace(r, finish_reason=FinishReason.STOP)),
        ("completion.stop_reason", None, lambda r: replace(r, stop_reason=2)),
        ("completion.token_ids", 0, lambda r: forge(r, seed=29)),
        ("completion.token_ids", 19, lambda r: forge(r, max_tokens=21)),
        ("completion.token_ids", 2, lambda r: forge(r, max_tokens=3)),
        ("completion.token_ids", 8, lambda r: forge(r, stop_token_ids=(r.token_ids[8],))),
        ("params.max_tokens", None, lambda r: forge(r, max_tokens=TINY.context_length)),
        ("request", None, lambda r: forge(r, stop_token_ids=(TINY.vocab_size,))),
        ("request", None, lambda r: forge(r, stop=("no tokenizer",))),
        ("request", None, lambda r: replace(r, prompt_token_ids=(1, TINY.vocab_size))),
        ("prompt.token_ids", None, lambda r: r.asked_as(prompt="no tokenizer")),
        ("identity.weights", None, lambda r: replace(r, identity=replace(r.identity, weights="0" * 64))),
        ("identity.tokenizer", None, lambda r: replace(r, identity=replace(r.identity, tokenizer="0"))),
    ],
)
def test_verdict_names_what_differs(
    field: str, token: int | None, change: Callable[[Receipt], Receipt]
) -> None:
    base = _base()
    assert len(set(base.token_ids[:9])) == 9
    for chunk in (1, 256):
        verdict = verify(engine(), change(base), chunk=chunk)
        assert (verdict.outcome, verdict.field, verdict.token) == (REFUTED, field, token)
        assert field in str(verdict)


@pytest.mark.parametrize("name", ["numerics", "version"])
def test_other_numerics_and_other_versions_cannot_be_judged(name: str) -> None:
    base = _base()
    forged = replace(base, identity=replace(base.identity, **{name: "other"}))
    assert verify(engine(), forged).outcome is UNKNOWN


def test_what_cannot_verify_says_so() -> None:
    stock = tiny_world("stock").engine()
    stock.identity = None
    for of, chunk in ((stock, 256), (engine(), 0)):
        with pytest.raises(ConfigError):
            verify(of, _base(), chunk=chunk)


# With text: stop strings, prompts, conversations.


def _asks(llm: LLM) -> list[Receipt]:
    (whole,) = llm.generate(PROMPT, SamplingParams(seed=3, max_tokens=40, ignore_eos=True))
    stops = [(), (whole.text[9:12],), (whole.text[20:21], "nowhere")]
    params = [
        SamplingParams(seed=3, max_tokens=40, ignore_eos=True, stop=stop, include_stop_str_in_output=keep,
                       receipt=True)
        for stop in stops for keep in (False, True)
    ]  # fmt: skip
    replies = llm.generate([PROMPT] * len(params), params)
    talk = [{"role": "user", "content": PROMPT}]
    replies += llm.chat(talk, SamplingParams(seed=4, max_tokens=9, receipt=True))
    return [receipt_of(reply) for reply in replies]


def test_receipts_with_text_are_verified_and_hold_what_was_asked(llm: LLM) -> None:
    receipts = _asks(llm)
    assert [receipt.prompt for receipt in receipts] == [PROMPT] * 6 + [None]
    assert receipts[-1].messages == ({"role": "user", "content": PROMPT},)
    assert {receipt.finish_reason for receipt in receipts} == {FinishReason.STOP, FinishReason.LENGTH}
    for receipt in receipts:
        assert llm.verify(receipt_from_json(receipt.to_json()), chunk=11).outcome is VERIFIED


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("completion.text", lambda r: replace(r, text=r.text + " ")),
        ("completion.text", lambda r: forge(r, include_stop_str_in_output=True)),
        ("completion.stop_reason", lambda r: replace(r, stop_reason=None)),
        ("completion.finish_reason", lambda r: replace(r, finish_reason=FinishReason.LENGTH)),
        ("completion.token_ids", lambda r: forge(r, stop=())),
        ("completion.token_ids", lambda r: forge(r, stop=(*r.params.stop, r.text[:3]))),
        ("prompt.token_ids", lambda r: replace(r, prompt=r.prompt + "!")),
        ("prompt.token_ids", lambda r: r.asked_as(messages=[{"role": "user", "content": PROMPT}])),
        ("prompt", lambda r: replace(r, prompt="\ud800")),
        ("logits.rows", lambda r: replace(r.asked_as(), prompt_token_ids=(5, *r.prompt_token_ids[1:]))),
    ],
)
def test_forged_words_are_refuted(llm: LLM, field: str, change: Callable[[Receipt], Receipt]) -> None:
    verdict = llm.verify(change(_asks(llm)[2]))
    assert (verdict.outcome, verdict.field) == (REFUTED, field), verdict


def _flip(path: Path, name: str, at: int) -> None:
    """The lowest bit of one float32 number of a tensor in a safetensors file."""
    raw = bytearray(path.read_bytes())
    (size,) = struct.unpack("<Q", raw[:8])
    begin, end = json.loads(raw[8 : 8 + size])[name]["data_offsets"]
    raw[8 + size + begin + 4 * at % (end - begin)] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight", "lm_head.weight"]
)
def test_one_bit_of_one_weight_is_caught(llm: LLM, tmp_path: Path, name: str) -> None:
    receipt = _asks(llm)[0]
    assert load(save(tmp_path)).verify(receipt).outcome is VERIFIED
    _flip(tmp_path / "model.safetensors", name, 17)
    other = load(tmp_path)
    assert other.fingerprint != llm.fingerprint
    verdict = other.verify(receipt)
    assert (verdict.outcome, verdict.field) == (REFUTED, "identity.weights")
    # Even where the receipt says that it is by these weights.
    assert other.identity is not None
    verdict = other.verify(replace(receipt, identity=other.identity))
    assert (verdict.outcome, verdict.field) == (REFUTED, "logits.rows")
    assert verdict.token is not None


@pytest.mark.weights
def test_real_reply_is_verified_and_its_forgery_refuted() -> None:
    params = SamplingParams(temperature=0.8, top_p=0.95, seed=5, max_tokens=30, receipt=True)
    (reply,) = smollm2().chat([{"role": "user", "content": "Why is the sky blue?"}], params)
    receipt = receipt_of(reply)
    assert smollm2().verify(receipt, chunk=20).outcome is VERIFIED
    verdict = smollm2().verify(replace(receipt, token_ids=_with(receipt.token_ids, 21, 42)))
    assert (verdict.field, verdict.token, verdict.said) == ("completion.token_ids", 21, 42)
    assert verdict.found == receipt.token_ids[21]


# The command line.


def generate(folder: Path, *words: str) -> int:
    return main(["generate", str(folder), PROMPT, "--set", "kv_cache_bytes=1048576", *words])


@pytest.fixture(scope="module")
def written(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("receipts") / "receipt.json"
    assert generate(folder, "--seed", "3", "--max-tokens", "12", "--receipt", str(path)) == 0
    return path


def check(receipt: Path, model: Path, *words: str) -> int:
    return main(["verify", str(receipt), "--model", str(model), "--set", "kv_cache_bytes=1048576", *words])


def test_command_verifies_what_generate_wrote(
    folder: Path, written: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(written, folder, "--chunk", "5") == 0
    assert capsys.readouterr().out == "verified (12 tokens)\n"
    assert check(written, folder, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    receipt = read_receipt(written)
    assert (said["outcome"], said["receipt"]) == ("verified", receipt.digest)
    assert main(["doctor", "--quick", "--json", "--model", str(folder)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["fingerprint"] == said["fingerprint"]


def test_command_writes_a_receipt_for_each_completion(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--seed", "3", "--max-tokens", "5", "--n", "2", "--json", "--receipt", str(tmp_path / "r.json")]
    assert generate(folder, "and another", "--chat", *words) == 0
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    completions = [completion for reply in said for completion in reply["completions"]]
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["r-1.json", "r-2.json", "r-3.json", "r-4.json"]
    for file, completion in zip(files, completions, strict=True):
        assert json.loads(file.read_text()) == completion["receipt"]
        assert check(file, folder) == 0


def _saved(path: Path, receipt: Receipt) -> Path:
    path.write_text(receipt.to_json())
    return path


def test_command_tells_false_from_unreadable(
    folder: Path, written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    receipt, path = read_receipt(written), tmp_path / "r.json"
    assert check(_saved(path, replace(receipt, token_ids=_with(receipt.token_ids, 3, 9))), folder) == 1
    assert "refuted: completion.token_ids, token 3: the receipt has 9" in capsys.readouterr().out
    assert check(_saved(path, replace(receipt, text="")), folder, "--json") == 1
    assert json.loads(capsys.readouterr().out)["field"] == "completion.text"
    other = replace(receipt, identity=replace(receipt.identity, version="0.0"))
    assert check(_saved(path, other), folder) == 2
    assert "another version" in capsys.readouterr().out
    path.write_text(written.read_text().replace('"seed": "3"', '"seed": "4"'))
    assert check(path, folder) == 2
    assert "damaged, or edited" in capsys.readouterr().out
    path.write_bytes(b"\xff\x00")
    assert check(path, folder, "--json") == 2
    assert json.loads(capsys.readouterr().out)["error"]["type"] == "ReceiptError"
    for receipt_file, model in ((tmp_path / "none.json", folder), (written, tmp_path / "none")):
        assert check(receipt_file, model) == 2
        assert capsys.readouterr().out.startswith("unknown: ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("verify r.json", "required: --model"),
        ("verify r.json --model m --chunk 0", "bad --chunk"),
        ("verify r.json --model m --kernels stock", "stock kernels cannot verify"),
        ("verify r.json --model m --set chunk=3", "unknown engine setting"),
        ("generate m hi --receipt /no/such/folder/r.json", "a folder that exists"),
        ("generate m hi --receipt r.json --kernels stock", "no receipts for stock kernels"),
    ],
)
def test_bad_usage_is_refused(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words.split()) == 2
    assert said in capsys.readouterr().err


@pytest.mark.weights
def test_bench_is_gated_by_true_and_forged_receipts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench_verify.gate(demo_weights()) == []
    monkeypatch.setattr(LLM, "verify", lambda _self, _receipt: Verdict(VERIFIED))
    assert main(["bench", "verify", "--json"]) == 1
    (first, second) = json.loads(capsys.readouterr().out)["gate"]
    assert "forged at token 30 is verified" in first
    assert first != second


def test_verdicts_are_sentences() -> None:
    assert str(Verdict(VERIFIED, note="3 tokens")) == "verified (3 tokens)"
    verdict = Verdict(REFUTED, "completion.token_ids", 3, 9, 7, "equal logits, another choice")
    where = "refuted: completion.token_ids, token 3"
    assert str(verdict) == f"{where}: the receipt has 9, this model 7 (equal logits, another choice)"
