"""LLM: the front door for Python programs."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from isobatch.config import EngineConfig
from isobatch.engine.engine import Engine
from isobatch.engine.memory import available_bytes, require
from isobatch.engine.output import Reply
from isobatch.engine.sampling_params import SamplingParams
from isobatch.engine.tokenizer import load_tokenizer
from isobatch.errors import ConfigError, InvalidSamplingError, PromptError
from isobatch.models.checkpoint import open_checkpoint
from isobatch.models.loading import load_decoder
from isobatch.ops import certified_ops, stock_ops
from isobatch.ops.fingerprint import fingerprint

Prompt = str | Sequence[int]
Message = Mapping[str, str]


class LLM:
    """A model, loaded and ready.

    Args:
        model: a Hugging Face folder, a .gguf file, or a repository in the local Hugging Face cache.
        config: how to use the machine; or give its fields as keywords.
        progress: bars on stderr while loading and generating; by default when stderr is a terminal.
        settings: fields of `EngineConfig`, such as kv_cache_bytes=2**31.

    Raises:
        ModelError: the model cannot be used.
        ConfigError: an unknown or impossible setting.
        OutOfMemoryError: it does not fit.

    Determinism:
        Each reply depends on its own prompt, parameters and seed, the weights, and the numerics class that
        `fingerprint` names; on nothing else.
    """

    def __init__(
        self,
        model: str | Path,
        config: EngineConfig | None = None,
        *,
        progress: bool | None = None,
        **settings: Any,
    ) -> None:
        if config is not None and settings:
            raise ConfigError("either a config or settings", got=f"both, with {', '.join(settings)}")
        self.config = config or EngineConfig.from_mapping(settings)
        self._console = Console(stderr=True)
        self._progress = self._console.is_terminal if progress is None else progress
        # Held for one step at a time, so that a stream that is not read on keeps nobody waiting.
        self._lock = threading.Lock()
        self._abandoned: deque[int] = deque()
        self._finished: dict[int, Reply] = {}
        checkpoint = open_checkpoint(model)
        try:
            require(checkpoint.config, self.config.kv_cache_bytes, available_bytes())
            self.tokenizer = load_tokenizer(checkpoint.path, checkpoint.config)
            ops = certified_ops() if self.config.kernels == "isobatch" else stock_ops()
            with self._bar("loading", "layers") as update:
                decoder = load_decoder(checkpoint, ops, update)
        finally:
            checkpoint.close()
        self.fingerprint = fingerprint() if self.config.kernels == "isobatch" else None
        self.engine = Engine(decoder, self.tokenizer, self.config, self.fingerprint)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Reply]:
        """Continues prompts.

        Args:
            prompts: a text or token ids, or a list of such.
            params: for all prompts, or one for each.

        Returns:
            A reply per prompt, in order. A request that failed on the way has `error` set, and raises it when
            its `text` is read; the others are unharmed.

        Raises:
            RequestError: a prompt or parameter that can never be served; nothing was run.

        Determinism:
            See the class.
        """
        batch = _as_prompts(prompts)
        shared = params if params is not None else SamplingParams()
        each = [shared] * len(batch) if isinstance(shared, SamplingParams) else list(shared)
        if len(each) != len(batch):
            raise PromptError("as many parameters as prompts", expected=len(batch), got=len(each))
        return self._run([self._encode(p) for p in batch], each)

    def chat(
        self,
        conversations: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Reply]:
        """Continues conversations, written out by the model's own chat template.

        Args:
            conversations: messages of one conversation, each with "role" and "content", or a list of such.
            params: as for `generate`.

        Returns:
            As `generate`.

        Raises:
            TokenizerError: the model has no chat template.
            PromptError: the template refuses the messages.
            RequestError: as `generate`.
        """
        first = conversations[0] if conversations else None
        one = isinstance(first, Mapping)
        each: Any = [conversations] if one else conversations
        texts = [self.tokenizer.chat(messages) for messages in each]
        # The template writes the special tokens itself.
        return self.generate([self.tokenizer.encode(t, add_special_tokens=False) for t in texts], params)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[str]:
        """Continues one prompt, and yields its text as it comes.

        Args:
            prompt: a text or token ids.
            params: with n = 1.

        Yields:
            Pieces of text; together they are the reply's text.

        Raises:
            RequestError: it cannot be served, or failed on the way.
        """
        params = params or SamplingParams()
        if params.n != 1:
            raise InvalidSamplingError("stream yields one completion", expected="n=1", got=f"n={params.n}")
        with self._lock:
            request = self.engine.add(self._encode(prompt), params)
        said = ""
        try:
            while True:
                with self._lock:
                    replies = self._advance({request})
                    text = replies[request].text if replies else self.engine.text_so_far(request)[0]
                # A stop string still to come may take back its own beginning.
                held = 0 if replies else _possible_stop(text, params.stop)
                yield text[len(said) : len(text) - held]
                said = text[: len(text) - held]
                if replies:
                    return
        finally:
            self._drop([request])

    def _encode(self, prompt: Prompt) -> list[int]:
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)

    def _run(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[Reply]:
        order: list[int] = []
        replies: dict[int, Reply] = {}
        try:
            with self._lock:
                for prompt, each in zip(prompts, params, strict=True):
                    order.append(self.engine.add(prompt, each))
            with self._bar("generating", "replies") as update:
                while len(replies) < len(order):
                    with self._lock:
                        replies |= self._advance(set(order) - replies.keys())
                    update(len(replies), len(order))
            return [replies[i] for i in order]
        finally:
            # Refused half-way through the list, or interrupted: leave nothing behind in the engine.
            self._drop(order)

    def _advance(self, waiting: set[int]) -> dict[int, Reply]:
        """Those of these requests that are finished, after a step if none is. The lock is held."""
        self._clear_abandoned()
        if not waiting & self._finished.keys():
            for reply in self.engine.step():
                self._finished[reply.request_id] = reply
        return {i: self._finished.pop(i) for i in waiting & self._finished.keys()}

    def _drop(self, requests: list[int]) -> None:
        """Aborts requests: now, or if the lock is held, before the next step.

        A forgotten stream may be collected, and so dropped, in the middle of a step, on the very thread that
        runs it; the engine must not change under its feet.
        """
        self._abandoned.extend(requests)
        if self._lock.acquire(blocking=False):
            try:
                self._clear_abandoned()
            finally:
                self._lock.release()

    def _clear_abandoned(self) -> None:
        while self._abandoned:
            request = self._abandoned.popleft()
            self.engine.abort(request)
            self._finished.pop(request, None)

    def _bar(self, what: str, unit: str) -> _Bar:
        return _Bar(self._console, what, unit, enabled=self._progress)


class _Bar:
    """A progress bar on stderr, or nothing."""

    def __init__(self, console: Console, what: str, unit: str, *, enabled: bool) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
        self._bar = Progress(
            *columns, TextColumn(unit), TimeElapsedColumn(), console=console, disable=not enabled
        )
        self._task = self._bar.add_task(what, total=None)

    def __enter__(self) -> Any:
        self._bar.start()
        return lambda done, total: self._bar.update(self._task, completed=done, total=total)

    def __exit__(self, *_exception: object) -> None:
        self._bar.stop()


def _possible_stop(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of the text could be the beginning of a stop string."""
    lengths = (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
    return max(lengths, default=0)


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if prompts and all(isinstance(p, int) for p in prompts):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]
