"""OpenAI's protocol, as the official client speaks it: what comes back, and what is refused and how."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion

from isobatch import LLM, SamplingParams
from isobatch.engine.receipt_json import receipt_from_json
from tests.server_harness import QUESTION, Running, serving, tiny_folder, tiny_llm

CHAT: dict[str, Any] = {"model": "tiny", "messages": QUESTION, "max_tokens": 12, "seed": 3}
TEXT: dict[str, Any] = {"model": "tiny", "prompt": "the same bits", "max_tokens": 12, "seed": 3}
IGNORE_EOS = {"ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def alone(folder: Path) -> LLM:
    """The model that the server has, once more, for replies from Python."""
    return tiny_llm(folder)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Running]:
    with serving({"tiny": tiny_llm(folder)}) as running:
        yield running


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client
    server.expect_idle()


def sent(body: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return body | changes


def error_of(response: httpx.Response) -> dict[str, Any]:
    """OpenAI's error body, which has these four fields and no path or source line in them."""
    body = response.json()
    assert body.keys() == {"error"}
    error: dict[str, Any] = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert ".py" not in error["message"]
    assert "/" + "work" not in error["message"]
    return error


# Replies


def test_chat_says_what_llm_says(client: openai.OpenAI, alone: LLM) -> None:
    params = SamplingParams(seed=3, max_tokens=12, n=2, logprobs=2, ignore_eos=True)
    (want,) = alone.chat(QUESTION, params)
    got = client.chat.completions.create(
        **sent(CHAT, n=2, logprobs=True, top_logprobs=2), extra_body=IGNORE_EOS
    )
    assert isinstance(got, ChatCompletion)
    assert got.system_fingerprint == want.fingerprint == alone.fingerprint
    assert got.usage is not None
    assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (len(want.prompt_token_ids), 24)
    for choice, completion in zip(got.choices, want.completions, strict=True):
        assert (choice.message.content, choice.finish_reason) == (completion.text, "length")
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert completion.log_probs is not None
        for token, entry in zip(choice.logprobs.content, completion.log_probs, strict=True):
            assert token.logprob == entry.log_prob
            assert token.bytes == list(alone.tokenizer.token_bytes(entry.token_id))
            assert [top.logprob for top in token.top_logprobs] == [value for _, value in entry.top]


def test_completions_are_those_of_each_prompt_alone(client: openai.OpenAI, alone: LLM) -> None:
    texts = ["the same bits", "the quick brown fox", "Ünï"]
    params = SamplingParams(seed=3, max_tokens=12, logprobs=3)
    batch = client.completions.create(**sent(TEXT, prompt=texts, logprobs=3))
    assert [choice.index for choice in batch.choices] == [0, 1, 2]
    for text, choice, reply in zip(texts, batch.choices, alone.generate(texts, params), strict=True):
        one = client.completions.create(**sent(TEXT, prompt=text, logprobs=3))
        assert isinstance(one, Completion)
        assert one.choices[0].logprobs == choice.logprobs
        assert one.choices[0].text == choice.text == reply.text
        assert choice.logprobs is not None
        scored = reply.completions[0].log_probs or ()
        assert choice.logprobs.token_logprobs == [entry.log_prob for entry in scored]


def test_token_ids_are_a_prompt(client: openai.OpenAI, alone: LLM) -> None:
    ids = alone.tokenizer.encode("the same bits")
    texts = [
        [choice.text for choice in client.completions.create(**sent(TEXT, prompt=prompt)).choices]
        for prompt in ("the same bits", ids, [ids, ids])
    ]
    assert texts[0] * 2 == texts[1] * 2 == texts[2]


@pytest.mark.parametrize("limit", [12, 0])
def test_echo_begins_with_the_prompt_and_scores_it(client: openai.OpenAI, alone: LLM, limit: int) -> None:
    (want,) = alone.generate("the same bits", SamplingParams(seed=3, prompt_logprobs=1))
    got = client.completions.create(**sent(TEXT, echo=True, logprobs=1, max_tokens=limit))
    assert got.choices[0].text.startswith("the same bits")
    assert got.usage is not None
    assert got.usage.completion_tokens == limit
    scores = got.choices[0].logprobs
    assert scores is not None
    assert scores.tokens is not None
    assert scores.token_logprobs is not None
    assert scores.text_offset is not None
    prompt = len(want.prompt_token_ids)
    assert len(scores.tokens) == prompt + limit
    assert "".join(scores.tokens[:prompt]) == "the same bits"
    assert scores.text_offset[prompt - 1] + len(scores.tokens[prompt - 1]) == len("the same bits")
    entries = want.prompt_log_probs or ()
    assert scores.token_logprobs[:prompt] == [None, *(entry.log_prob for entry in entries)]


@pytest.mark.parametrize("stop", [None, "e", ["th", "qu", " "]])
def test_chat_stream_says_what_the_whole_reply_says(client: openai.OpenAI, stop: Any) -> None:
    body = sent(CHAT, n=3, logprobs=True, top_logprobs=1, stop=stop, max_tokens=60)
    whole = client.chat.completions.create(**body)
    options: Any = {"include_usage": True}
    *chunks, last = client.chat.completions.create(**body, stream=True, stream_options=options)
    assert (last.choices, last.usage) == ([], whole.usage)
    assert {chunk.id for chunk in chunks} == {last.id}
    assert {chunk.system_fingerprint for chunk in [*chunks, last]} == {whole.system_fingerprint}
    for choice in whole.choices:
        mine = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert "".join(c.delta.content or "" for c in mine) == choice.message.content
        assert [c.delta.role for c in mine] == ["assistant"] + [None] * (len(mine) - 1)
        assert [c.finish_reason for c in mine] == [None] * (len(mine) - 1) + [choice.finish_reason]
        assert choice.logprobs is not None
        streamed = [t for c in mine if c.logprobs is not None for t in c.logprobs.content or ()]
        assert streamed == choice.logprobs.content


def test_completion_stream_says_what_the_whole_reply_says(client: openai.OpenAI) -> None:
    body = sent(TEXT, prompt=["the same bits", "fox"], n=2, logprobs=1)
    whole = client.completions.create(**body)
    chunks = list(client.completions.create(**body, stream=True))
    for choice in whole.choices:
        mine = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert "".join(c.text for c in mine) == choice.text
        assert choice.logprobs is not None
        for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
            streamed = [x for c in mine if c.logprobs is not None for x in getattr(c.logprobs, name)]
            assert streamed == getattr(choice.logprobs, name)
    echoed = list(client.completions.create(**sent(TEXT, stream=True, echo=True)))
    alone = client.completions.create(**sent(TEXT, echo=True))
    assert "".join(chunk.choices[0].text for chunk in echoed) == alone.choices[0].text


def test_events_are_written_as_openai_writes_them(server: Running) -> None:
    response = server.post("/v1/chat/completions", sent(CHAT, stream=True))
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, nothing = response.text.split("\n\n")
    assert (events[-1], nothing) == ("data: [DONE]", "")
    assert all(event.startswith("data: {") for event in events[:-1])


def test_equal_requests_get_equal_replies_but_for_id_and_time(server: Running) -> None:
    one, other = (server.post("/v1/chat/completions", sent(CHAT, logprobs=True)).json() for _ in range(2))
    assert one["id"] != other["id"]
    for reply in (one, other):
        del reply["id"], reply["created"]
    assert one == other


def test_seed_that_was_drawn_is_reported_and_repeats_the_reply(server: Running) -> None:
    def chat(**changes: Any) -> dict[str, Any]:
        reply = server.post("/v1/chat/completions", sent(CHAT, max_tokens=40, n=2) | changes).json()
        return {"said": [c["message"] for c in reply["choices"]], "seed": reply["isobatch"]["seed"]}

    drawn, another = chat(seed=None), chat(seed=None)
    assert drawn["seed"] != another["seed"]
    assert drawn["said"] != another["said"]
    assert chat(seed=drawn["seed"]) == drawn
    assert chat(seed=None, temperature=0)["seed"] == 0


@pytest.mark.parametrize("streaming", [True, False])
def test_receipts_come_with_each_choice_and_are_true(server: Running, alone: LLM, streaming: bool) -> None:
    wanted = {"isobatch": {"receipt": True}, "n": 2, "stream": streaming}
    for path, body, choices in (
        ("/v1/chat/completions", CHAT, 2),
        ("/v1/completions", TEXT | {"prompt": ["the same", "bits"]}, 4),
    ):
        reply = server.post(path, body | wanted)
        last = reply.text.split("\n\n")[-3].removeprefix("data: ") if streaming else reply.text
        receipts = [receipt_from_json(json.dumps(one)) for one in json.loads(last)["isobatch"]["receipts"]]
        assert [alone.verify(receipt).outcome for receipt in receipts] == ["verified"] * choices
        assert {receipt.fingerprint for receipt in receipts} == {alone.fingerprint}
        assert all((receipt.messages or receipt.prompt) is not None for receipt in receipts)


def test_fields_that_change_nothing_change_nothing(server: Running) -> None:
    plain = server.post("/v1/chat/completions", CHAT).json()
    kept: dict[str, Any] = {"refusal": None, "tool_calls": None, "function_call": None, "annotations": []}
    noted = sent(
        CHAT,
        messages=[QUESTION[0] | kept | {"content": [{"type": "text", "text": QUESTION[0]["content"]}]}],
        user="somebody",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        logit_bias={},
        tools=[],
        tool_choice="none",
        response_format={"type": "text"},
        max_completion_tokens=12,
        top_p=None,
        isobatch={"receipt": False},
    )
    assert server.post("/v1/chat/completions", noted).json()["choices"] == plain["choices"]


def test_chat_without_a_limit_may_fill_the_context(server: Running) -> None:
    body = {name: value for name, value in CHAT.items() if name != "max_tokens"}
    counted = server.post("/v1/chat/completions", body | IGNORE_EOS).json()["usage"]
    assert counted["total_tokens"] == 256


def test_models_are_listed(client: openai.OpenAI, alone: LLM) -> None:
    (listed,) = client.models.list().data
    assert client.models.retrieve("tiny") == listed
    assert (listed.id, listed.owned_by) == ("tiny", "isobatch")
    with pytest.raises(openai.NotFoundError) as info:
        client.models.retrieve("org/other")
    assert info.value.code == "model_not_found"


def test_tokens_there_and_back(server: Running, alone: LLM) -> None:
    ids = alone.tokenizer.encode("Ünïcödé <|im_end|>")
    got = server.post("/tokenize", {"prompt": "Ünïcödé <|im_end|>"}).json()
    assert got == {"tokens": ids, "count": len(ids), "max_model_len": 256}
    assert server.post("/detokenize", {"tokens": ids}).json() == {"prompt": "Ünïcödé <|im_end|>"}
    chat = alone.tokenizer.encode(alone.tokenizer.chat(QUESTION), add_special_tokens=False)
    assert server.post("/tokenize", {"messages": QUESTION}).json()["tokens"] == chat


def test_probes_and_metrics(server: Running, alone: LLM) -> None:
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    (model,) = httpx.get(f"{server.url}/ready").json()["models"]
    assert (model["id"], model["state"], model["system_fingerprint"]) == ("tiny", "ready", alone.fingerprint)
    before = metric(server, "isobatch_reply_tokens_total")
    server.post("/v1/completions", TEXT | IGNORE_EOS)
    assert metric(server, "isobatch_reply_tokens_total") == before + 12
    assert metric(server, 'isobatch_ready{model="tiny"}') == 1
    assert metric(server, 'isobatch_requests_total{path="/v1/completions",status="200"}') >= 1
    free, whole = (metric(server, f'isobatch_kv_blocks{name}{{model="tiny"}}') for name in ("_free", ""))
    assert free == whole > 0
    drafts = [metric(server, f'isobatch_{name}_tokens{{model="tiny"}}') for name in ("drafted", "accepted")]
    assert drafts == [0, 0]


def metric(server: Running, name: str) -> float:
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    (line,) = (line for line in lines if line.startswith(f"{name} "))
    return float(line.split()[-1])


# Refusals

CHAT_PATH, TEXT_PATH = "/v1/chat/completions", "/v1/completions"
REFUSED: list[tuple[str, dict[str, Any], int, str | None, str]] = [
    (CHAT_PATH, {"temprature": 0}, 400, "temprature", "did you mean 'temperature'?"),
    (CHAT_PATH, {"logit_bias": {"1": 5}}, 400, "logit_bias", "unsupported"),
    (CHAT_PATH, {"tools": [{"type": "function"}]}, 400, "tools", "unsupported"),
    (CHAT_PATH, {"response_format": {"type": "json_object"}}, 400, "response_format", "unsupported"),
    (CHAT_PATH, {"top_logprobs": 2}, 400, "top_logprobs", "without logprobs"),
    (CHAT_PATH, {"logprobs": True, "top_logprobs": 21}, 400, "logprobs", "from 0 to 20"),
    (CHAT_PATH, {"max_completion_tokens": 5}, 400, "max_completion_tokens", "different things"),
    (CHAT_PATH, {"stream_options": {"include_usage": True}}, 400, "stream_options", "without stream"),
    (CHAT_PATH, {"isobatch": {"recipe": True}}, 400, "isobatch", "isobatch.recipe"),
    (CHAT_PATH, {"isobatch": {"reciept": True}}, 400, "isobatch", "did you mean 'isobatch.receipt'?"),
    (CHAT_PATH, {"messages": []}, 400, "messages", "at least 1"),
    (CHAT_PATH, {"messages": [{"role": "tool", "content": "x"}]}, 400, "messages", "'user'"),
    (CHAT_PATH, {"messages": [{"role": "user"}]}, 400, "messages", "'messages[0].content' is missing"),
    (CHAT_PATH, {"messages": [{"role": "user", "content": 3}]}, 400, "messages", "messages[0].content'"),
    (CHAT_PATH, {"messages": [{"role": "system", "content": "x"}]}, 400, "prompt", "no system"),
    (CHAT_PATH, {"messages": [{"role": "user", "content": "x", "name": "y"}]}, 400, "messages", "name"),
    (CHAT_PATH, {"model": "gpt-4o"}, 404, "model", "'gpt-4o'"),
    (CHAT_PATH, {"model": None}, 400, "model", "string"),
    (CHAT_PATH, {"n": 0}, 400, "n", "from 1"),
    (CHAT_PATH, {"n": "2"}, 400, "n", "integer; got '2'"),
    (CHAT_PATH, {"n": True}, 400, "n", "integer"),
    (CHAT_PATH, {"temperature": -1}, 400, "temperature", "or a number"),
    (CHAT_PATH, {"temperature": "hot"}, 400, "temperature", "number"),
    (CHAT_PATH, {"top_p": 0}, 400, "top_p", "number from"),
    (CHAT_PATH, {"seed": -1}, 400, "seed", "from 0"),
    (CHAT_PATH, {"seed": 2**64}, 400, "seed", "from 0"),
    (CHAT_PATH, {"stop": ["x"] * 17}, 400, "stop", "at most 16"),
    (CHAT_PATH, {"stop": ""}, 400, "stop", "none empty"),
    (CHAT_PATH, {"max_tokens": 0}, 400, "max_tokens", "at least one"),
    (TEXT_PATH, {"prompt": ""}, 400, "prompt", "at least one token"),
    (TEXT_PATH, {"prompt": []}, 400, "prompt", "without any"),
    (TEXT_PATH, {"prompt": [[]]}, 400, "prompt", "at least one token"),
    (TEXT_PATH, {"prompt": [448]}, 400, "prompt", "from 0 to 447"),
    (TEXT_PATH, {"prompt": [-1]}, 400, "prompt", "from 0 to 447"),
    (TEXT_PATH, {"prompt": [1, "x"]}, 400, "prompt", "valid"),
    (TEXT_PATH, {"prompt": [1.5]}, 400, "prompt", "valid"),
    (TEXT_PATH, {"prompt": {"text": "x"}}, 400, "prompt", "valid"),
    (TEXT_PATH, {"prompt": [7] * 256}, 400, "prompt", "1 to 255 tokens"),
    (TEXT_PATH, {"suffix": "x"}, 400, "suffix", "unsupported"),
    (TEXT_PATH, {"best_of": 3}, 400, "best_of", "unsupported"),
    (TEXT_PATH, {"max_tokens": 0}, 400, "max_tokens", "echo"),
    (TEXT_PATH, {"echo": True, "logprobs": 1, "stream": True}, 400, "echo", "streamed"),
    (TEXT_PATH, {"stop_token_ids": [448]}, 400, None, "stop token"),
    (TEXT_PATH, {"n": 1024, "prompt": ["x"] * 9}, 429, None, "too many"),
    ("/tokenize", {"prompt": "x", "messages": QUESTION}, 400, "prompt", "not both"),
    ("/tokenize", {"prompt": "x", "model": "other"}, 404, "model", "'other'"),
    ("/detokenize", {"tokens": [448]}, 400, "prompt", "0 to 447"),
]


@pytest.mark.parametrize(("path", "changes", "status", "param", "said"), REFUSED)
def test_what_cannot_be_served_is_refused_by_name(
    server: Running, path: str, changes: dict[str, Any], status: int, param: str | None, said: str
) -> None:
    body = {CHAT_PATH: CHAT, TEXT_PATH: TEXT}.get(path, {})
    response = server.post(path, body | changes)
    error = error_of(response)
    assert (response.status_code, error["param"]) == (status, param), error
    assert said in error["message"]
    server.expect_idle()


def test_prompt_that_does_not_fit_has_openais_code(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as info:
        client.completions.create(**sent(TEXT, prompt=[7] * 256))
    assert info.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as info:
        client.completions.create(**sent(TEXT, prompt=""))
    assert info.value.code is None


JSON_TYPE = {"content-type": "application/json"}
DEEP = b"[" * 100_000
LONE = json.dumps(sent(CHAT, messages=[{"role": "user", "content": "\ud800"}])).encode()
NAN = json.dumps(sent(CHAT, temperature=math.nan)).encode()


@pytest.mark.parametrize(
    ("content", "headers"),
    [
        (b"", JSON_TYPE),
        (b"{", JSON_TYPE),
        (b"null", JSON_TYPE),
        (b"[]", JSON_TYPE),
        (b'"text"', JSON_TYPE),
        (b"\xff\xfe{}", JSON_TYPE),
        (b'{"model": "\xff"}', JSON_TYPE),
        (DEEP, JSON_TYPE),
        (b'{"model": "tiny", "max_tokens": ' + b"9" * 5000 + b"}", JSON_TYPE),
        (LONE, JSON_TYPE),
        (NAN, JSON_TYPE),
        (json.dumps(CHAT).encode(), {"content-type": "text/plain"}),
        (json.dumps(CHAT).encode(), {"content-type": "multipart/form-data; boundary=x"}),
        (json.dumps(CHAT).encode(), {}),
    ],
)
def test_what_is_no_json_object_is_a_400(server: Running, content: bytes, headers: dict[str, str]) -> None:
    response = httpx.post(f"{server.url}{CHAT_PATH}", content=content, headers=headers)
    assert response.status_code == 400
    error_of(response)


def test_body_that_is_no_json_says_where_it_stops_being(server: Running) -> None:
    response = httpx.post(f"{server.url}{CHAT_PATH}", content=b'{"model": "tiny",}', headers=JSON_TYPE)
    assert "at character 17" in error_of(response)["message"]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b'{"model": "tiny", "prompt": "a", "temperature": 0, "temperature": 1}', "temperature"),
        (b'{"model": "tiny", "prompt": "a", "isobatch": {"receipt": true, "receipt": false}}', "receipt"),
        (b'{"model": "tiny", "model": "tiny", "prompt": "a"}', "model"),
    ],
)
def test_field_that_is_given_twice_is_refused_by_name(server: Running, body: bytes, field: str) -> None:
    response = httpx.post(f"{server.url}/v1/completions", content=body, headers=JSON_TYPE)
    assert response.status_code == 400
    error = error_of(response)
    assert error["message"] == f"the field {field!r} is given twice"
    assert error["param"] == field


def test_one_name_in_two_objects_is_not_given_twice(server: Running) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    body = sent(CHAT, messages=[*messages, messages[0]], max_tokens=2)
    assert httpx.post(f"{server.url}{CHAT_PATH}", json=body, timeout=60).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nothing", 404), ("GET", CHAT_PATH, 405), ("GET", "/static/../app.py", 404)],
)
def test_other_paths_and_methods_have_error_bodies_too(
    server: Running, method: str, path: str, status: int
) -> None:
    response = httpx.request(method, f"{server.url}{path}")
    assert response.status_code == status
    error_of(response)
