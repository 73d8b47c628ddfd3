"""Sampling parameters: what is accepted is normalised, what is not is refused with a fix."""

from __future__ import annotations

import dataclasses
import math
import pickle
import re
from typing import Any

import pytest

from isobatch.engine.sampling_params import SamplingParams
from isobatch.errors import InvalidSamplingError, UnknownKeyError

FLOATS = [
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
]
INTS = ["top_k", "seed", "n", "max_tokens", "logprobs", "prompt_logprobs"]
BOOLS = ["ignore_eos", "include_stop_str_in_output", "receipt"]


def test_every_parameter_is_covered_here() -> None:
    names = {field.name for field in dataclasses.fields(SamplingParams)}
    assert names == {*FLOATS, *INTS, *BOOLS, "stop", "stop_token_ids"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0),
        ("temperature", -0.0),
        ("temperature", 2.0**-126),
        ("temperature", 2.0**127),
        ("top_k", 0),
        ("top_k", 2**31 - 1),
        ("top_p", 1),
        ("top_p", 2.0**-126),
        ("min_p", 0),
        ("min_p", 1),
        ("repetition_penalty", 2.0**127),
        ("presence_penalty", -2),
        ("presence_penalty", 2),
        ("frequency_penalty", -2.0),
        ("frequency_penalty", 2.0),
        ("seed", 0),
        ("seed", 2**64 - 1),
        ("seed", None),
        ("n", 1),
        ("max_tokens", 1),
        ("logprobs", 0),
        ("logprobs", 20),
        ("prompt_logprobs", 0),
        ("prompt_logprobs", 20),
        ("ignore_eos", True),
        ("include_stop_str_in_output", True),
        ("stop_token_ids", (0,)),
    ],
)
def test_the_ends_of_each_range_are_accepted(name: str, value: Any) -> None:
    assert getattr(SamplingParams.from_mapping({name: value}), name) == value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1e-9),
        ("temperature", 2.0**-127),  # zero to a float32 that flushes denormals
        ("temperature", 10**400),  # not even a float
        ("top_k", -1),
        ("top_p", 0),
        ("top_p", 1.0000001),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("seed", -1),
        ("seed", 2**64),
        ("n", 0),
        ("n", None),
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", None),
        ("logprobs", -1),
        ("logprobs", 21),
        ("prompt_logprobs", 21),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", ["a", 1]),
        ("stop", b"a"),
        ("stop", None),
        ("stop", {"a": 1}),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [True]),
        ("stop_token_ids", [1.0]),
        ("stop_token_ids", 1),
        ("stop_token_ids", "12"),
        ("stop_token_ids", None),
        *((name, value) for name in FLOATS for value in (math.nan, math.inf, -math.inf, True, "1", None)),
        *((name, value) for name in INTS for value in (True, 1.0, "1", math.nan)),
        *((name, value) for name in BOOLS for value in (0, 1, "true", None)),
    ],
)
def test_a_bad_value_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidSamplingError, match=rf"'{name}'.*expected .*got .*\w+\);") as caught:
        SamplingParams.from_mapping({name: value})
    assert caught.value.expected
    assert caught.value.got
    assert caught.value.fix


def test_a_huge_value_makes_a_short_message() -> None:
    with pytest.raises(InvalidSamplingError) as caught:
        SamplingParams.from_mapping({"stop_token_ids": "x" * 10**6})
    assert len(str(caught.value)) < 300


def test_numbers_and_lists_are_normalised() -> None:
    params = SamplingParams.from_mapping({"temperature": 0, "stop": "\n\n", "stop_token_ids": [7, 8]})
    assert type(params.temperature) is float
    assert params.stop == ("\n\n",)
    assert params.stop_token_ids == (7, 8)
    assert SamplingParams.from_mapping({"stop": ["a", "b"]}).stop == ("a", "b")
    assert params == SamplingParams(temperature=0.0, stop=("\n\n",), stop_token_ids=(7, 8))


def test_parameters_cannot_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().top_k = 5  # type: ignore[misc]


def test_an_empty_mapping_means_the_defaults() -> None:
    assert SamplingParams.from_mapping({}) == SamplingParams()


@pytest.mark.parametrize(
    ("key", "near"), [("temprature", "temperature"), ("max_token", "max_tokens"), ("topk", "top_k")]
)
def test_an_unknown_key_names_the_nearest(key: str, near: str) -> None:
    with pytest.raises(UnknownKeyError, match=re.escape(f"unknown sampling parameter {key!r}")) as caught:
        SamplingParams.from_mapping({key: 1})
    assert f"did you mean {near!r}?" in str(caught.value)


@pytest.mark.parametrize("values", [None, [1], "temperature"])
def test_what_is_no_mapping_is_refused(values: Any) -> None:
    with pytest.raises(InvalidSamplingError, match="not a mapping"):
        SamplingParams.from_mapping(values)


def test_parameters_without_a_name_are_refused() -> None:
    with pytest.raises(InvalidSamplingError, match=r"parameters go by name; .*; got 0\.5"):
        SamplingParams(0.5)  # type: ignore[call-arg]


def test_errors_survive_the_way_out_of_a_process() -> None:
    for error in (UnknownKeyError("key", "x", ["y"]), InvalidSamplingError("what", got=3, fix="this")):
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again), again.fix) == (type(error), str(error), error.fix)
