"""Bodies drawn from our own OpenAPI description, and bytes that follow no description at all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

from tests.server_harness import Running, serving, tiny_folder, tiny_llm

PATHS = ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize")
BOUNDED = settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving({"tiny": tiny_llm(tiny_folder(tmp_path_factory.mktemp("tiny")))}) as running:
        yield running
        running.expect_idle()


@pytest.fixture(scope="module")
def schema(server: Running) -> Any:
    return schemathesis.openapi.from_dict(httpx.get(f"{server.url}/openapi.json").json())


def expect_well_behaved(response: httpx.Response) -> None:
    """Answered, and a refusal has OpenAI's body."""
    assert response.status_code < 500, response.text
    if response.status_code >= 400:
        assert response.json()["error"].keys() == {"message", "type", "param", "code"}


@pytest.mark.parametrize("path", PATHS)
def test_bodies_by_our_own_description_are_served_or_refused(server: Running, schema: Any, path: str) -> None:
    operation = schema[path]["POST"]

    @BOUNDED
    @given(case=operation.as_strategy())
    def run(case: Any) -> None:
        # Shorter replies and one model, so that more is tried in the time.
        if isinstance(case.body, dict):
            case.body |= {"model": "tiny"} | ({"max_tokens": 2} if "completions" in path else {})
        case.call_and_validate(
            base_url=server.url,
            checks=[not_a_server_error, status_code_conformance, response_schema_conformance],
        )

    run()


@BOUNDED
@given(content=st.binary(max_size=200), path=st.sampled_from(PATHS))
def test_any_bytes_are_a_400(server: Running, content: bytes, path: str) -> None:
    headers = {"content-type": "application/json"}
    response = httpx.post(f"{server.url}{path}", content=content, headers=headers)
    assert response.status_code == 400
    expect_well_behaved(response)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3)
    ),
    max_leaves=8,
)
FIELDS = ("model", "prompt", "messages", "max_tokens", "n", "stop", "temperature", "logprobs", "seed", "echo")


@BOUNDED
@given(changes=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3), path=st.sampled_from(PATHS[:2]))
def test_any_value_of_any_field_is_served_or_refused(
    server: Running, changes: dict[str, Any], path: str
) -> None:
    said = [{"role": "user", "content": "x"}]
    base = {"messages": said} if "chat" in path else {"prompt": "x"}
    body = {"model": "tiny", "max_tokens": 2} | base | changes
    # NaN and infinity too, as Python's json writes them.
    headers = {"content-type": "application/json"}
    content = json.dumps(body).encode()
    expect_well_behaved(httpx.post(f"{server.url}{path}", content=content, headers=headers))


def test_the_description_says_what_is_strict(schema: Any) -> None:
    described = schema.raw_schema
    models = described["components"]["schemas"]
    for name in ("ChatRequest", "CompletionRequest", "ChatMessage", "TokenizeRequest"):
        assert models[name]["additionalProperties"] is False
    operation = described["paths"]["/v1/completions"]["post"]
    assert "422" not in operation["responses"]
    assert {"400", "401", "413", "429", "503", "504"} <= operation["responses"].keys()
