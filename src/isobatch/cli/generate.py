"""`isobatch generate`: continues prompts."""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from isobatch.cli.model import MODEL_HELP, add_setting_options, config_from, load
from isobatch.cli.receipts import require_writable, write_receipts
from isobatch.engine.sampling_params import SamplingParams
from isobatch.engine.seeds import seed_for
from isobatch.errors import ConfigError, PromptError

if TYPE_CHECKING:
    from isobatch.engine.llm import LLM
    from isobatch.engine.output import Completion, Reply

_REQUEST_FAILED = 2
# Sampling parameters that are options by the same name; --receipt takes a file.
_OPTIONS = tuple(field.name for field in fields(SamplingParams) if field.name != "receipt")
# Where the words of the docstring are for Python programs.
_HELP = {
    "seed": "0 to 2**64 - 1; without one it is drawn, and reported.",
    "stop": "a string that ends the reply.",
    "stop_token_ids": "the id of a token that ends the reply.",
    "logprobs": "how many top log-probabilities come with each chosen token's own, 0 to 20; needs --json.",
    "prompt_logprobs": "the same for each prompt token; such a request makes no use of cached prefixes.",
}


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "generate",
        help="continue prompts",
        description="Continues prompts, each as if it were alone. Without PROMPT and --file, all of stdin is "
        "one prompt. A single completion is printed as it comes.",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("prompts", metavar="PROMPT", nargs="*", default=[], help="a text to continue")
    parser.add_argument("--file", type=Path, help="more prompts, one per line; blank lines do not count")
    parser.add_argument(
        "--token-ids",
        action="store_true",
        help="prompts are token ids, with spaces or commas between them, and replies are printed as such",
    )
    parser.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="wrap each prompt as a user's message in the model's chat template; implied by --system",
    )
    parser.add_argument("--system", metavar="TEXT", help="a system message before each prompt")
    add_setting_options(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object per reply, a line each")
    parser.add_argument(
        "--receipt",
        metavar="FILE",
        type=Path,
        help="where to write the receipt, for `isobatch verify`; of several completions, FILE-1, FILE-2, ...",
    )
    _add_sampling_options(parser.add_argument_group("sampling"))


def run(arguments: argparse.Namespace) -> int:
    """Generates, prints.

    Args:
        arguments: as `add_parser` defines them.

    Returns:
        0, or 2 if a request failed on the way.

    Raises:
        IsobatchError: nothing could be run.
    """
    # Everything that can be wrong without a model is found before one is loaded.
    given = {name: getattr(arguments, name) for name in _OPTIONS} | {"receipt": arguments.receipt is not None}
    params = SamplingParams(**{name: value for name, value in given.items() if value is not None})
    if not arguments.json and (params.logprobs is not None or params.prompt_logprobs is not None):
        raise ConfigError("log-probabilities are part of the JSON output only", fix="add --json")
    if arguments.system is not None and arguments.chat is False:
        raise ConfigError("--system needs a chat", fix="leave out --no-chat")
    chat = bool(arguments.chat) or arguments.system is not None
    if chat and arguments.token_ids:
        raise ConfigError("a chat is of texts, not of token ids", fix="leave out --token-ids")
    config = config_from(arguments)
    if config.load == "random" and not arguments.token_ids:
        raise ConfigError("a model with random weights has no tokenizer", fix="add --token-ids")
    if arguments.receipt is not None:
        require_writable(arguments.receipt)
        if config.kernels == "stock":
            raise ConfigError("there are no receipts for stock kernels", fix="leave out --receipt")
    prompts = _prompts(arguments)
    ids = [_token_ids(prompt) for prompt in prompts] if arguments.token_ids else None
    llm = load(arguments.model, config)
    talks = [_messages(arguments.system, prompt) for prompt in prompts] if chat else []
    single = len(prompts) == 1 and params.n == 1 and not arguments.json and ids is None
    if single and not params.receipt:
        _stream(llm, llm.tokenizer.encode_chat(talks[0]) if chat else prompts[0], params)
        return 0
    replies = llm.chat(talks, params) if chat else llm.generate(ids or prompts, params)
    if arguments.receipt is not None:
        for file in write_receipts(arguments.receipt, replies, params.n):
            print(f"isobatch: receipt in {file}", file=sys.stderr)
    for index, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
        if arguments.json:
            print(json.dumps(_as_json(prompt, reply)))
        elif single and reply.error is None:
            print(reply.text)
            _print_seed(llm, reply.completions[0].seed)
        else:
            _print_reply(index, reply, as_ids=ids is not None)
        if reply.error is not None:
            print(f"isobatch: prompt {index + 1}: {reply.error}", file=sys.stderr)
    return _REQUEST_FAILED if any(reply.error is not None for reply in replies) else 0


def _add_sampling_options(group: argparse._ArgumentGroup) -> None:
    """An option per field of SamplingParams, with the words of its docstring or of _HELP."""
    types, texts = get_type_hints(SamplingParams), _described(SamplingParams) | _HELP
    for field in fields(SamplingParams):
        if field.name not in _OPTIONS:
            continue
        option, kind = "--" + field.name.replace("_", "-"), types[field.name]
        text = texts.get(field.name, "").replace("%", "%%")
        if kind is bool:
            group.add_argument(option, action=argparse.BooleanOptionalAction, default=None, help=text)
            continue
        plain = (get_args(kind) or (kind,))[0]  # int, of int | None and of tuple[int, ...]
        if get_origin(kind) is tuple:
            text += " One per option, which may be repeated."
            group.add_argument(option, type=plain, metavar=plain.__name__.upper(), action="append", help=text)
        else:
            text += "" if field.default is None else f" Default {field.default}."
            group.add_argument(option, type=plain, metavar=plain.__name__.upper(), help=text)


def _described(kind: type) -> dict[str, str]:
    """What the docstring of a dataclass says about each field."""
    paragraph = (inspect.getdoc(kind) or "").partition("Args:\n")[2].partition("\n\n")[0]
    pieces = re.split(r"^    (\w+): ", paragraph, flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in zip(pieces[1::2], pieces[2::2], strict=True)}


def _prompts(arguments: argparse.Namespace) -> list[str]:
    prompts: list[str] = list(arguments.prompts)
    try:
        if arguments.file is not None:
            with arguments.file.open(encoding="utf-8") as lines:
                prompts += [line.rstrip("\n") for line in lines if not line.isspace()]
        elif not prompts and sys.stdin is not None and not sys.stdin.isatty():
            text = sys.stdin.read().removesuffix("\n")
            prompts += [text] if text else []
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read prompts from {arguments.file or 'stdin'}", got=error) from error
    if not prompts:
        raise PromptError("no prompt", fix="give one after MODEL, in a --file, or on stdin")
    return prompts


def _token_ids(prompt: str) -> list[int]:
    try:
        return [int(word) for word in prompt.replace(",", " ").split()]
    except ValueError as error:
        raise PromptError("not token ids", expected='such as "1 2 3"', got=repr(prompt)[:80]) from error


def _messages(system: str | None, prompt: str) -> list[dict[str, str]]:
    messages = [{"role": "user", "content": prompt}]
    return messages if system is None else [{"role": "system", "content": system}, *messages]


def _stream(llm: LLM, prompt: str | list[int], params: SamplingParams) -> None:
    # Drawn here rather than by the engine, so that the reply can be asked for again.
    params = replace(params, seed=seed_for(params))
    said = False
    try:
        for piece in llm.stream(prompt, params):
            print(piece, end="", flush=True)
            said = said or piece != ""
    finally:
        if said:
            print()
    _print_seed(llm, params.seed)


def _print_seed(llm: LLM, seed: int | None) -> None:
    print(f"isobatch: fingerprint {llm.fingerprint or 'none'}, seed {seed}", file=sys.stderr)


def _print_reply(index: int, reply: Reply, *, as_ids: bool) -> None:
    if reply.error is not None:
        return
    for completion in reply.completions:
        print(f"--- prompt {index + 1}, completion {completion.index + 1}, seed {completion.seed}")
        print(" ".join(map(str, completion.token_ids)) if as_ids else completion.text)


def _as_json(prompt: str, reply: Reply) -> dict[str, Any]:
    error, scored = reply.error, reply.prompt_log_probs
    return {
        "prompt": prompt,
        "completions": [_completion(completion) for completion in reply.completions],
        "prompt_log_probs": None if scored is None else [asdict(entry) for entry in scored],
        "fingerprint": reply.fingerprint,
        "cached_tokens": reply.cached_tokens,
        "error": None if error is None else {"type": type(error).__name__, "message": str(error)},
    }


def _completion(completion: Completion) -> dict[str, Any]:
    receipt = completion.receipt
    written = None if receipt is None else receipt.as_dict()
    return {**asdict(replace(completion, receipt=None)), "receipt": written}
