"""The front door: text in, text out; streams; refusals that leave it in order; several callers at once."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import isobatch.engine.backend
from isobatch import LLM, EngineConfig, Reply, SamplingParams
from isobatch.bits import bits_equal
from isobatch.engine.request import FinishReason
from isobatch.errors import (
    CapacityError,
    ConfigError,
    InvalidSamplingError,
    IsobatchError,
    ModelNotFoundError,
    NonFiniteLogitsError,
    OutOfMemoryError,
    PromptError,
    TokenizerError,
    UnknownKeyError,
)
from isobatch.kernels.coding import CodedRows
from tests.checkpoints import tiny_model, trained_bpe
from tests.engine_harness import content, smollm2

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PROMPT = "Ünïcödé: the same bits"
# The tiny model speaks in random bytes, so that its replies are full of broken and of whole characters.
PARAMS = SamplingParams(seed=3, max_tokens=40, ignore_eos=True, logprobs=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer and a chat template."""
    path: Path = tmp_path_factory.mktemp("tiny")
    tiny_model("llama", vocab_size=448, max_position_embeddings=256).save_pretrained(path)
    trained_bpe("llama-bpe", [PROMPT, "the quick brown fox " * 9]).save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return path


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(folder, kv_cache_bytes=2**22, progress=False)


@pytest.fixture(autouse=True)
def _leaves_nothing_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "llm" in request.fixturenames:
        engine = request.getfixturevalue("llm").engine
        assert not engine.has_work
        assert engine.pool.num_free == engine.pool.num_blocks
        engine.scheduler.check()


def same(left: Reply, right: Reply) -> bool:
    pairs = zip(content(left), content(right), strict=True)
    return left.text == right.text and all(bits_equal(a, b) for a, b in pairs)


# Text.


def test_text_is_that_of_the_tokens(llm: LLM) -> None:
    (reply,) = llm.generate(PROMPT, PARAMS)
    assert reply.prompt_token_ids == tuple(llm.tokenizer.encode(PROMPT))
    assert reply.text == llm.tokenizer.decode(reply.completions[0].token_ids)
    assert reply.fingerprint == llm.fingerprint
    assert llm.fingerprint is not None
    assert llm.fingerprint.startswith("iso-")


def test_text_that_ends_within_a_character_says_so(llm: LLM) -> None:
    params = [replace(PARAMS, max_tokens=count) for count in range(1, 41)]
    replies = llm.generate([PROMPT] * 40, params)
    assert [reply.text for reply in replies] == [
        llm.tokenizer.decode(reply.completions[0].token_ids) for reply in replies
    ]
    held = [llm.tokenizer.incremental() for _ in replies]
    for heard, reply in zip(held, replies, strict=True):
        for token in reply.completions[0].token_ids:
            heard.push(token)
    assert any(heard.flush() for heard in held), "no reply ended within a character"


def test_prompts_of_every_kind_are_understood(llm: LLM) -> None:
    ids = llm.tokenizer.encode(PROMPT)
    (want,) = llm.generate(PROMPT, PARAMS)
    kinds: list[Any] = [[PROMPT], (PROMPT,), ids, tuple(ids), [ids], [tuple(ids)]]
    for prompts in kinds:
        (reply,) = llm.generate(prompts, PARAMS)
        assert same(reply, want)
    mixed: list[Any] = [PROMPT, ids]
    first, second = llm.generate(mixed, [PARAMS, SamplingParams(seed=4)])
    assert same(first, want)
    assert second.completions[0].seed == 4
    assert llm.generate([], PARAMS) == []
    assert len(llm.generate(PROMPT)[0].completions[0].token_ids) <= 16


def _first_stop(llm: LLM, tokens: tuple[int, ...], stops: list[str]) -> tuple[int, int, str] | None:
    """How many tokens, where in the text, and which, by trying every prefix."""
    for count in range(1, len(tokens) + 1):
        heard = llm.tokenizer.incremental()
        text = "".join(heard.push(token) for token in tokens[:count])
        found = [(text.index(stop), stops.index(stop), stop) for stop in stops if stop in text]
        if found:
            at, _, stop = min(found)
            return count, at, stop
    return None


def test_stop_string_ends_the_text_wherever_it_falls(llm: LLM) -> None:
    (whole,) = llm.generate(PROMPT, PARAMS)
    tokens, text = whole.completions[0].token_ids, whole.text
    cuts = [[text[start : start + length]] for start in range(0, len(text) - 5, 3) for length in (1, 2, 5)]
    cuts += [[text[9:12], text[5:10]], [text[8:30], text[10:12]], ["nowhere in it", text[20:21]], ["nowhere"]]
    params = [
        replace(PARAMS, stop=tuple(stops), include_stop_str_in_output=keep)
        for stops in cuts
        for keep in (False, True)
    ]
    spans = 0
    for each, reply in zip(params, llm.generate([PROMPT] * len(params), params), strict=True):
        completion = reply.completions[0]
        found = _first_stop(llm, tokens, list(each.stop))
        if found is None:
            assert (completion.text, completion.finish_reason) == (text, FinishReason.LENGTH)
            continue
        count, at, stop = found
        spans += len(llm.tokenizer.decode(tokens[count - 1 : count])) < len(stop)
        assert completion.token_ids == tokens[:count]
        assert completion.text == text[: at + (len(stop) if each.include_stop_str_in_output else 0)]
        assert (completion.finish_reason, completion.stop_reason) == (FinishReason.STOP, stop)
    assert spans > 5, "no stop string lay across tokens"


def test_stop_token_is_no_part_of_the_text(llm: LLM) -> None:
    (whole,) = llm.generate(PROMPT, PARAMS)
    tokens = whole.completions[0].token_ids
    stop = next(token for token in tokens[7:] if llm.tokenizer.decode([token]).strip())
    count = tokens.index(stop) + 1
    (reply,) = llm.generate(PROMPT, replace(PARAMS, stop_token_ids=(stop,)))
    assert reply.completions[0].token_ids == tokens[:count]
    assert reply.text == llm.tokenizer.decode(tokens[: count - 1])


def test_chat_is_the_rendered_template(llm: LLM) -> None:
    talk = [{"role": "user", "content": "Hi there"}]
    rendered = "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n"
    ids = llm.tokenizer.encode(rendered, add_special_tokens=False)
    (want,) = llm.generate([ids], PARAMS)
    assert same(llm.chat(talk, PARAMS)[0], want)
    both = llm.chat([talk, [*talk, {"role": "assistant", "content": "Hello"}]], PARAMS)
    assert same(both[0], want)
    assert len(both) == 2
    assert llm.chat([], PARAMS) == []


# Streams.


@pytest.mark.parametrize("stop", [[], [" "], ["the", "e"], ["\ufffd\ufffd"], ["nowhere"]])
@pytest.mark.parametrize("keep", [False, True])
def test_stream_says_what_generate_says(llm: LLM, stop: list[str], keep: bool) -> None:
    for seed in range(8):
        params = replace(
            PARAMS, seed=seed, temperature=0.7, stop=tuple(stop), include_stop_str_in_output=keep
        )
        assert "".join(llm.stream(PROMPT, params)) == llm.generate(PROMPT, params)[0].text


def test_stream_comes_in_pieces(llm: LLM) -> None:
    pieces = [piece for piece in llm.stream(PROMPT, PARAMS) if piece]
    assert len(pieces) > 10


def test_stream_that_is_left_early_frees_its_blocks(llm: LLM) -> None:
    for leave in (lambda s: s.close(), lambda s: None):
        pieces = llm.stream(PROMPT, PARAMS)
        next(pieces)
        assert llm.engine.has_work
        leave(pieces)
        del pieces
        assert not llm.engine.has_work


def test_stream_does_not_keep_others_out(llm: LLM) -> None:
    """Not a second stream, not a call of generate: each gets its own reply, though one's step serves all."""
    (want,) = llm.generate(PROMPT, PARAMS)
    (other,) = llm.generate("Something else", PARAMS)
    first, second = llm.stream(PROMPT, PARAMS), llm.stream("Something else", PARAMS)
    heard = [next(first), next(second)]
    assert same(llm.generate(PROMPT, PARAMS)[0], want)
    heard[0] += "".join(first)
    heard[1] += "".join(second)
    assert heard == [want.text, other.text]


# Refusals and failures.


def test_settings_that_cannot_be_honoured_are_refused(folder: Path) -> None:
    with pytest.raises(UnknownKeyError, match="did you mean 'kv_cache_bytes'"):
        LLM(folder, kv_cache_byte=1)
    with pytest.raises(ConfigError, match="single block"):
        LLM(folder, kv_cache_bytes=100)
    with pytest.raises(ConfigError, match="bad max_batch_tokens"):
        LLM(folder, max_batch_tokens=0)
    with pytest.raises(UnknownKeyError, match="did you mean 'stock'"):
        LLM(folder, kernels="stok")
    with pytest.raises(ConfigError, match="either a config or settings"):
        LLM(folder, EngineConfig(), max_batch_tokens=8)
    with pytest.raises(ModelNotFoundError):
        LLM(folder / "nothing")


def test_model_that_does_not_fit_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isobatch.engine.backend, "available_bytes", lambda: 10**6)
    with pytest.raises(OutOfMemoryError, match="1,000,000 available"):
        LLM(folder, kv_cache_bytes=10**6)
    monkeypatch.setattr(isobatch.engine.backend, "available_bytes", lambda: 10**7)
    assert LLM(folder, kv_cache_bytes=10**6, progress=False).generate(PROMPT, PARAMS)


@pytest.mark.parametrize(
    ("prompts", "params", "error"),
    [
        ([PROMPT, []], PARAMS, PromptError),
        ([[1, 2], [448]], PARAMS, PromptError),
        ([PROMPT, list(range(256))], PARAMS, PromptError),
        ([PROMPT, PROMPT], [PARAMS], PromptError),
        ([PROMPT, "\ud800"], PARAMS, PromptError),
        ([PROMPT, PROMPT], [PARAMS, SamplingParams(max_tokens=200)], CapacityError),
    ],
)
def test_refused_call_runs_nothing_and_the_next_is_served(
    folder: Path, prompts: Any, params: Any, error: type[IsobatchError]
) -> None:
    llm = LLM(folder, kv_cache_bytes=5 * 8192 * 2, progress=False)
    (before,) = llm.generate(PROMPT, PARAMS)
    with pytest.raises(error):
        llm.generate(prompts, params)
    assert not llm.engine.has_work
    assert llm.engine.pool.num_free == llm.engine.pool.num_blocks
    assert same(llm.generate(PROMPT, PARAMS)[0], before)


def test_refused_stream_and_chat_leave_nothing_behind(llm: LLM) -> None:
    with pytest.raises(InvalidSamplingError, match="n=2"):
        next(llm.stream(PROMPT, SamplingParams(n=2)))
    with pytest.raises(PromptError):
        next(llm.stream([], PARAMS))
    with pytest.raises(PromptError):
        llm.chat([{"role": "system", "content": "Be brief"}], PARAMS)
    assert llm.generate(PROMPT, PARAMS)


def test_chat_without_a_template_is_refused(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(TokenizerError, match="no chat template"):
        LLM(tmp_path, progress=False).chat([{"role": "user", "content": "Hi"}])


def _raise_at(op: str, call: int, error: BaseException) -> Callable[[str, Mapping[str, Any], Any], None]:
    seen = 0

    def observer(name: str, _arguments: Mapping[str, Any], _result: Any) -> None:
        nonlocal seen
        seen += name == op
        if name == op and seen == call:
            raise error

    return observer


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()])
@pytest.mark.parametrize(("op", "call"), [("embedding", 1), ("attention", 7), ("sample", 3)])
def test_interruption_leaves_the_engine_clean(llm: LLM, op: str, call: int, error: BaseException) -> None:
    want = llm.generate([PROMPT, "another"], PARAMS)
    with llm.engine.decoder.ops.observed(_raise_at(op, call, error)), pytest.raises(type(error)):
        llm.generate([PROMPT, "another"], PARAMS)
    assert not llm.engine.has_work
    with llm.engine.decoder.ops.observed(_raise_at(op, call, error)), pytest.raises(type(error)):
        "".join(llm.stream(PROMPT, PARAMS))
    assert not llm.engine.has_work
    again = llm.generate([PROMPT, "another"], PARAMS)
    assert all(same(left, right) for left, right in zip(again, want, strict=True))


def test_request_that_fails_on_the_way_raises_when_it_is_read(folder: Path) -> None:
    llm = LLM(folder, progress=False)
    token = llm.tokenizer.encode("Z")[0]
    llm.engine.decoder.embedding.put(token, CodedRows.of(torch.full((1, 64), float("nan"))))
    failed, fine = llm.generate(["Z", "a b"], PARAMS)
    assert isinstance(failed.error, NonFiniteLogitsError)
    with pytest.raises(NonFiniteLogitsError):
        _ = failed.text
    assert fine.error is None
    with pytest.raises(NonFiniteLogitsError):
        "".join(llm.stream("Z", PARAMS))


def test_two_threads_get_their_own_replies(llm: LLM) -> None:
    prompts = [["one", "two", "three"], ["four", "five"]]
    want = [llm.generate(batch, PARAMS) for batch in prompts]
    got: list[list[list[Reply]]] = [[], []]

    def call(which: int) -> None:
        got[which] = [llm.generate(prompts[which], PARAMS) for _ in range(4)]

    callers = [threading.Thread(target=call, args=(which,)) for which in range(2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    for which in range(2):
        assert len(got[which]) == 4
        for replies in got[which]:
            assert all(same(left, right) for left, right in zip(replies, want[which], strict=True))


def test_stock_kernels_carry_no_fingerprint(folder: Path) -> None:
    llm = LLM(folder, kernels="stock", progress=False)
    assert llm.fingerprint is None
    assert llm.generate(PROMPT, PARAMS)[0].fingerprint is None


# Real weights, real text.


@pytest.mark.weights
def test_real_stream_says_what_generate_says() -> None:
    params = SamplingParams(temperature=0.6, seed=5, max_tokens=24)
    (reply,) = smollm2().generate("Das Café liegt über den Dächern von", params)
    assert reply.text.strip()
    assert "".join(smollm2().stream("Das Café liegt über den Dächern von", params)) == reply.text
    stopped = replace(params, stop=(reply.text[12:18],))
    assert (
        "".join(smollm2().stream("Das Café liegt über den Dächern von", stopped))
        == (reply.text[: reply.text.index(reply.text[12:18])])
    )


@pytest.mark.weights
def test_real_chat_answers_and_ends() -> None:
    talk = [{"role": "user", "content": "What is the capital of France? Answer with one word."}]
    (reply,) = smollm2().chat(talk, SamplingParams(temperature=0, max_tokens=24))
    assert "Paris" in reply.text
    assert reply.completions[0].finish_reason is FinishReason.STOP
    assert "<|im" not in reply.text
    tokens = reply.prompt_token_ids
    assert tokens[0] == smollm2().tokenizer.bos_token_id
    assert tokens.count(tokens[0]) == smollm2().tokenizer.chat(talk).count("<|im_start|>")


@pytest.mark.weights
def test_real_multi_byte_text_comes_in_whole_characters() -> None:
    prompt = "Repeat: 🌉🌍 你好, 世界 é\nRepeat: 🌉🌍 你好, 世界 é\nRepeat:"
    params = SamplingParams(temperature=0, max_tokens=20)
    (reply,) = smollm2().generate(prompt, params)
    assert "🌉🌍 你好" in reply.text
    pieces = list(smollm2().stream(prompt, params))
    assert "".join(pieces) == reply.text
    assert not any("\ufffd" in piece for piece in pieces[:-1])
