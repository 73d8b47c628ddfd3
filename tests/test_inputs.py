"""What callers may pass in: what is understood, and what is refused with an error of ours and a way out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import isobatch.engine.llm
from isobatch import LLM, EngineConfig, SamplingParams
from isobatch.errors import (
    ConfigError,
    InvalidSamplingError,
    IsobatchError,
    ModelNotFoundError,
    PromptError,
    UnknownKeyError,
)
from tests.checkpoints import tiny_model, trained_bpe

PARAMS = SamplingParams(seed=3, max_tokens=4, ignore_eos=True)
MESSAGE = {"role": "user", "content": "fox"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("tiny")
    tiny_model("llama", vocab_size=448, max_position_embeddings=256).save_pretrained(path)
    trained_bpe("llama-bpe", ["the quick brown fox " * 9]).save(str(path / "tokenizer.json"))
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return path


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(folder, kv_cache_bytes=2**20, progress=False)


@pytest.mark.parametrize("make", [list, tuple, iter, lambda texts: (text for text in texts)])
def test_any_iterable_of_prompts_is_taken_whole(make: Callable[[list[Any]], Any], llm: LLM) -> None:
    texts: list[Any] = ["the quick", "brown", [5, 6]]
    each = [PARAMS, SamplingParams(seed=4), PARAMS]
    want = [llm.generate([text], params)[0] for text, params in zip(texts, each, strict=True)]
    got = llm.generate(make(texts), make(each))
    assert [reply.completions for reply in got] == [reply.completions for reply in want]
    (one,) = llm.generate(make([5, 6]), PARAMS)
    assert one.completions == want[2].completions
    conversation = [MESSAGE, {"role": "assistant", "content": "the"}]
    (chatted,) = llm.chat(make(conversation), PARAMS)
    both = llm.chat(make([conversation, [MESSAGE]]), PARAMS)
    assert [chatted.text] == [both[0].text]
    assert len(both) == 2


def test_integers_of_numpy_are_token_ids(llm: LLM) -> None:
    (want,) = llm.generate([5, 6], PARAMS)
    kinds: list[Any] = [[np.int64(5), np.int32(6)], [[np.uint8(5), 6]], np.array([5, 6]).tolist()]
    for prompts in kinds:
        assert llm.generate(prompts, PARAMS)[0].completions == want.completions


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        (b"fox", "got bytes"),
        ([b"fox"], "got bytes"),
        (bytearray(b"fox"), "got bytearray"),
        ({"fox": 1}, "got dict"),
        ([{"fox": 1}], "got dict"),
        ({"fox", "the"}, "got set"),
        ([{5, 6}], "got set"),
        (None, "got NoneType"),
        (5, "got int 5"),
        (["fox", None], "got NoneType"),
        ([1, "fox"], "got int 1"),
        ([True, False], "got bool"),
        (np.array([5, 6]), "got ndarray; call its tolist()"),
        ([np.array([5, 6])], "got ndarray; call its tolist()"),
        (torch.tensor([5, 6]), "got Tensor; call its tolist()"),
        (SamplingParams, "got the class SamplingParams itself"),
        ([[5, "fox"]], "got 'fox'"),
        ([[5, 2.0]], "got 2.0"),
        ([[True]], "got True"),
        ([[2**80]], "0 to 447"),
    ],
)
def test_prompts_of_another_kind_are_refused(prompts: Any, said: str, llm: LLM) -> None:
    with pytest.raises(PromptError) as caught:
        llm.generate(prompts, PARAMS)
    assert said in str(caught.value)
    with pytest.raises(PromptError):
        llm.stream(prompts, PARAMS)
    assert not llm.engine.has_work


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"max_tokens": 2}, "from_mapping"),
        ([{"max_tokens": 2}], "from_mapping"),
        ([None], "got NoneType"),
        (SamplingParams, "got the class SamplingParams itself"),
        ("greedy", "got str 'greedy'"),
        (5, "got int 5"),
    ],
)
def test_parameters_of_another_kind_are_refused(params: Any, said: str, llm: LLM) -> None:
    calls: list[Callable[[Any, Any], object]] = [llm.generate, llm.stream]
    for call in calls:
        with pytest.raises(InvalidSamplingError) as caught:
            call("fox", params)
        assert said in str(caught.value)
    assert not llm.engine.has_work


def test_unknown_parameter_names_the_nearest() -> None:
    unknown: dict[str, Any] = {"temprature": 1}
    with pytest.raises(UnknownKeyError, match="did you mean 'temperature'"):
        SamplingParams(**unknown)


@pytest.mark.parametrize("stop", ["\ud800", ["fox", "\udfff"]])
def test_stop_string_that_no_reply_can_contain_is_refused(stop: Any) -> None:
    with pytest.raises(InvalidSamplingError, match="surrogate"):
        SamplingParams(stop=stop)


@pytest.mark.parametrize(
    "conversations",
    [None, 5, "fox", b"fox", MESSAGE, ["fox"], [None], [MESSAGE, [MESSAGE]], [["fox"]], [[MESSAGE, None]]],
)
def test_conversations_of_another_kind_are_refused(conversations: Any, llm: LLM) -> None:
    with pytest.raises(PromptError):
        llm.chat(conversations, PARAMS)


def test_stream_refuses_at_the_call(llm: LLM) -> None:
    refused: list[tuple[Any, Any, type[IsobatchError]]] = [
        (["the", "fox"], PARAMS, PromptError),
        ("", PARAMS, PromptError),
        ([448], PARAMS, PromptError),
        ("fox", SamplingParams(n=2), InvalidSamplingError),
        ("fox", SamplingParams(stop_token_ids=(448,)), InvalidSamplingError),
        ([5] * 256, PARAMS, PromptError),
    ]
    for prompt, params, error in refused:
        with pytest.raises(error):
            llm.stream(prompt, params)
    llm.stream("fox", PARAMS)  # never read on, so never begun
    assert not llm.engine.has_work


# Settings and models.


@pytest.mark.parametrize("config", [{"policy": "fcfs"}, EngineConfig, "fcfs"])
def test_config_of_another_kind_is_refused(config: Any, folder: Path) -> None:
    with pytest.raises(ConfigError, match="expected an EngineConfig"):
        LLM(folder, config)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"policy": "chaos:x"}, "chaos:SEED"),
        ({"policy": "FCFS"}, "known: chaos:SEED, fcfs"),
        ({"max_context": 257}, "at most 256"),
        ({"kv_cache_bytes": 100}, "single block"),
    ],
)
def test_settings_are_refused_before_the_weights_are_loaded(
    settings: dict[str, Any], said: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_arguments: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(isobatch.engine.llm, "load_decoder", load)
    with pytest.raises(ConfigError) as caught:
        LLM(folder, **settings)
    assert said in str(caught.value)


@pytest.mark.parametrize("model", [None, 5, b"x", "", ["demo"], Path])
def test_what_names_no_model_is_refused(model: Any) -> None:
    with pytest.raises(ModelNotFoundError, match="nothing that names a model"):
        LLM(model)


@pytest.mark.weights
def test_demo_is_a_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    llm = LLM("demo", kv_cache_bytes=1 << 24, progress=False)
    assert llm.engine.decoder.config.vocab_size == 49152


def test_without_a_terminal_loading_says_how_far_it_is(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    LLM(folder, kv_cache_bytes=2**20).generate("fox", PARAMS)
    assert capsys.readouterr().err.splitlines() == ["loading: 1 of 2 layers", "loading: 2 of 2 layers"]
    LLM(folder, kv_cache_bytes=2**20, progress=True).generate(["fox"] * 9, PARAMS)
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "generating: 9 of 9 replies"
    assert len(lines) <= 6
    LLM(folder, kv_cache_bytes=2**20, progress=False).generate("fox", PARAMS)
    assert capsys.readouterr().err == ""


def test_conversation_without_messages_is_refused(llm: LLM) -> None:
    with pytest.raises(PromptError, match="without messages"):
        llm.chat([[MESSAGE], []])


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b"])
def test_name_that_no_file_can_have_is_refused(name: str) -> None:
    with pytest.raises(ModelNotFoundError):
        LLM(name)
