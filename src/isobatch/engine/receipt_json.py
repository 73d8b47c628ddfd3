"""From the written form of a receipt back to a `Receipt`: strictly, since it comes from anywhere."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from isobatch.engine.receipt import PARAMS, PREFIX, SCHEMA, Receipt
from isobatch.engine.request import FinishReason
from isobatch.engine.sampling_params import SamplingParams
from isobatch.errors import InvalidSamplingError, ReceiptError
from isobatch.ops.fingerprint import Identity

T = TypeVar("T")

_KEYS = {"isobatch_receipt", "fingerprint", "identity", "prompt", "params", "completion", "logits", "digest"}
_SEED = re.compile(r"0|[1-9][0-9]{0,19}")
_DIGEST, _ROW = re.compile(r"[0-9a-f]{64}"), re.compile(rf"[0-9a-f]{{{PREFIX}}}")


def read_receipt(path: Path) -> Receipt:
    """Reads the file that a receipt is kept in.

    Raises:
        ReceiptError: it cannot be read, or as `receipt_from_json`.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ReceiptError(f"cannot read {path}", got=error) from error
    return receipt_from_json(text)


def receipt_from_json(text: str) -> Receipt:
    """Reads a receipt.

    Args:
        text: as `Receipt.to_json` writes it; spaces and the order of keys are free.

    Returns:
        The receipt. Its own digest is right; whether it tells the truth is for `verify` to say.

    Raises:
        ReceiptError: not JSON, of another schema, with a field missing, surplus or of the wrong type, or with
            a digest or fingerprint that is not its own: damaged, or edited.
    """
    try:
        content = json.loads(text, object_pairs_hook=_distinct, parse_constant=_not_a_number)
    except (ValueError, RecursionError) as error:
        raise ReceiptError("a receipt that is not JSON", got=error) from error
    if not isinstance(content, dict) or "isobatch_receipt" not in content:
        raise ReceiptError("not a receipt", expected='a JSON object with "isobatch_receipt"')
    if (schema := content["isobatch_receipt"]) is True or schema != SCHEMA:
        raise ReceiptError("a receipt of another schema", expected=SCHEMA, got=reprlib.repr(schema))
    receipt = _receipt(_part(content, "", _KEYS))
    for name, said, is_ in (
        ("fingerprint", content["fingerprint"], receipt.fingerprint),
        ("digest", content["digest"], receipt.digest),
    ):
        if said != is_:
            raise ReceiptError(
                f"a receipt whose {name} is not its own: damaged, or edited",
                expected=is_,
                got=reprlib.repr(said),
            )
    return receipt


def _receipt(content: dict[str, Any]) -> Receipt:
    identity = _part(content["identity"], "identity", {"numerics", "weights", "tokenizer", "version"})
    prompt = _part(content["prompt"], "prompt", {"token_ids", "text", "messages"})
    params = _part(content["params"], "params", set(PARAMS))
    reply = _part(content["completion"], "completion", {"token_ids", "text", "finish_reason", "stop_reason"})
    logits = _part(content["logits"], "logits", {"rows", "digest"})
    messages = prompt["messages"]
    if messages is not None:
        messages = tuple(_list("prompt.messages", messages, _is_object))
        if prompt["text"] is not None:
            raise _wrong("prompt", "a text or messages", "both")
    receipt = Receipt(
        identity=Identity(**{name: _checked(f"identity.{name}", identity[name], str) for name in identity}),
        prompt_token_ids=_list("prompt.token_ids", prompt["token_ids"], _is_token),
        prompt=_checked("prompt.text", prompt["text"], str, type(None)),
        messages=messages,
        params=_params(params),
        token_ids=_list("completion.token_ids", reply["token_ids"], _is_token),
        text=_checked("completion.text", reply["text"], str),
        finish_reason=_finish_reason(reply["finish_reason"]),
        stop_reason=_checked("completion.stop_reason", reply["stop_reason"], str, int, type(None)),
        rows=_list("logits.rows", logits["rows"], lambda row: _matches(_ROW, row)),
        logits=_checked("logits.digest", logits["digest"], str),
    )
    if not _matches(_DIGEST, receipt.logits):
        raise _wrong("logits.digest", "64 hexadecimal digits", receipt.logits)
    if len(receipt.rows) != len(receipt.token_ids):
        raise _wrong("logits.rows", f"one for each of {len(receipt.token_ids)} tokens", len(receipt.rows))
    return receipt


def _params(values: dict[str, Any]) -> SamplingParams:
    if not _matches(_SEED, values["seed"]):
        raise _wrong("params.seed", "a whole number as a text", values["seed"])
    try:
        return SamplingParams.from_mapping({**values, "seed": int(values["seed"]), "receipt": True})
    except InvalidSamplingError as error:
        raise ReceiptError("a receipt with parameters that no request can have", got=error) from error


def _finish_reason(value: object) -> FinishReason:
    known = {reason.value: reason for reason in (FinishReason.STOP, FinishReason.LENGTH)}
    if not isinstance(value, str) or value not in known:
        raise _wrong("completion.finish_reason", " or ".join(known), value)
    return known[value]


def _part(value: object, name: str, keys: set[str]) -> dict[str, Any]:
    """An object with exactly these keys."""
    if not isinstance(value, dict):
        raise _wrong(name, "an object", value)
    if odd := sorted(keys ^ value.keys()):
        where = f"{name}.{odd[0]}" if name else odd[0]
        raise ReceiptError(f"a receipt {'without' if odd[0] in keys else 'with an unknown'} {where}")
    return value


def _list(name: str, value: object, fits: Callable[[Any], bool]) -> tuple[Any, ...]:
    """A list, not empty, each of whose elements fits."""
    if not isinstance(value, list) or not value:
        raise _wrong(name, "a list that is not empty", value)
    for element in value:
        if not fits(element):
            raise _wrong(name, "elements of another kind", element)
    return tuple(value)


def _checked(name: str, value: T, *kinds: type) -> T:
    if type(value) not in kinds:
        raise _wrong(name, " or ".join(kind.__name__ for kind in kinds), value)
    return value


def _is_token(value: object) -> bool:
    # Token ids beyond 64 bits fit in no tensor; that none is beyond the vocabulary is for `verify` to say.
    return type(value) is int and 0 <= value < 2**63


def _is_object(value: object) -> bool:
    return isinstance(value, dict)


def _matches(pattern: re.Pattern[str], value: object) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _wrong(name: str, expected: str, got: object) -> ReceiptError:
    return ReceiptError(f"a receipt with a bad {name}", expected=expected, got=reprlib.repr(got))


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; a key that is there twice would mean one thing to us and another to someone else."""
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a key is there twice")
    return made


def _not_a_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number of JSON's")
