"""Ctrl-C between any two lines of the bookkeeping: nobody else gets a wrong text, the LLM goes on serving.

Signals come at a few of these places only; a trace function raises at every one.
"""

from __future__ import annotations

import ast
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import isobatch.engine
from isobatch import LLM, SamplingParams
from isobatch.engine.engine import Engine
from isobatch.engine.inputs import Prompt
from tests.checkpoints import tiny_model, trained_bpe
from tests.engine_harness import Ask, alone, expect_same, fixed_asks, tiny_world

ENGINE = Path(isobatch.engine.__file__).parent
FILES = {str(ENGINE / f"{name}.py") for name in (
    "engine", "scheduler", "block_pool", "prefix_cache", "request", "transcript", "llm", "policies", "batch",
    "drafts",
)}  # fmt: skip
PARAMS = SamplingParams(seed=3, max_tokens=9, ignore_eos=True, logprobs=2)
Place = tuple[str, int]


def _leaves_of_with() -> set[Place]:
    """Lines of `with` statements. They are traced a second time when the block is left, before the lock is
    released; there CPython takes no signal, on purpose."""
    places = set()
    for file in FILES:
        for node in ast.walk(ast.parse(Path(file).read_text())):
            if isinstance(node, ast.With):
                places.add((file, node.lineno))
    return places


SPARED = _leaves_of_with()


@dataclass
class Tracer:
    """Counts lines of the engine, and raises at one of them.

    Args:
        at: its number; None to count only.
        which: what to raise.
    """

    at: int | None
    which: type[BaseException] = KeyboardInterrupt
    lines: int = 0
    place: Place | None = None

    def __call__(self, frame: FrameType, event: str, _argument: object) -> Any:
        if frame.f_code.co_filename not in FILES:
            return None
        place = (frame.f_code.co_filename, frame.f_lineno)
        if event == "line" and place not in SPARED:
            self.lines += 1
            if self.lines == self.at:
                self.place = place
                raise self.which
        return self

    @contextmanager
    def tracing(self) -> Iterator[None]:
        before = sys.gettrace()
        sys.settrace(self)
        try:
            yield
        finally:
            sys.settrace(before)


def _each_line(run: Callable[[Tracer], None], *, stride: int) -> set[Place]:
    """Runs with an exception at each of every so many lines; the places where it struck.

    Lines come in loops, so that an odd stride gets to nearly all of them; 1 was run once and found no more.
    """
    struck: set[Place] = set()
    at, last = 1, False
    while not last:
        tracer = Tracer(at, MemoryError if at % 2 else KeyboardInterrupt)
        run(tracer)
        last = tracer.place is None
        struck |= set() if tracer.place is None else {tracer.place}
        at += stride
    return struck


def _caught(call: Callable[[], object], tracer: Tracer) -> None:
    try:
        with tracer.tracing():
            call()
    except (KeyboardInterrupt, MemoryError):
        assert tracer.place is not None


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    path: Path = tmp_path_factory.mktemp("tiny")
    tiny_model("llama", vocab_size=448, max_position_embeddings=256).save_pretrained(path)
    trained_bpe("llama-bpe", ["the quick brown fox " * 9]).save(str(path / "tokenizer.json"))
    return LLM(path, kv_cache_bytes=2**20, progress=False)


def test_interrupted_call_hurts_no_other(llm: LLM) -> None:
    """A stream, half read, goes on to its right end, whatever line another call is interrupted at."""
    (want,) = llm.generate("the quick", PARAMS)
    short = SamplingParams(seed=1, max_tokens=2, stop=("zz",))

    def run(tracer: Tracer) -> None:
        pieces = llm.stream("the quick", PARAMS)
        said = next(pieces) + next(pieces)
        prompts: list[Prompt] = ["fox", [5, 6, 7]]
        _caught(lambda: llm.generate(prompts, short), tracer)
        assert said + "".join(pieces) == want.text, tracer.place
        assert llm.generate("the quick", PARAMS)[0].completions[0] == want.completions[0], tracer.place
        llm.engine.scheduler.check()

    struck = _each_line(run, stride=5)
    assert {Path(file).stem for file, _ in struck} >= {"engine", "scheduler", "transcript", "llm"}
    assert len(struck) > 80


def test_interrupted_stream_hurts_no_other(llm: LLM) -> None:
    (want,) = llm.generate("brown", PARAMS)

    def run(tracer: Tracer) -> None:
        pieces = llm.stream("brown", PARAMS)
        said = next(pieces)

        others: list[Iterator[str]] = []  # kept, since a generator that is collected swallows what is raised

        def other() -> None:
            others.append(llm.stream("the fox", PARAMS))
            next(others[0])
            next(others[0])

        _caught(other, tracer)
        assert said + "".join(pieces) == want.text, tracer.place
        assert llm.generate("brown", PARAMS)[0].completions[0] == want.completions[0], tracer.place

    assert len(_each_line(run, stride=5)) > 40


@pytest.mark.parametrize("drafts", [0, 4])
@pytest.mark.parametrize("policy", ["fcfs", "chaos:3"])
def test_steps_interrupted_again_and_again_come_to_the_same_replies(policy: str, drafts: int) -> None:
    """Preemption, eviction and the prefix cache included: the pool holds the longest and little more."""
    asks = fixed_asks()
    want = [alone(tiny_world(), ask) for ask in asks]

    def serve(engine: Engine, first: int, stride: int) -> int:
        ids = [engine.add(ask.prompt, ask.params) for ask in asks]
        replies: dict[int, Any] = {}
        interrupted = 0
        for attempt in itertools.count():
            if not engine.has_work:
                break
            at = first + stride * attempt if attempt < 12 else None
            tracer = Tracer(at)
            _caught(lambda: engine.step(replies), tracer)
            interrupted += tracer.place is not None
        engine.scheduler.check()
        assert engine.pool.num_free == engine.pool.num_blocks
        for number, expected in zip(ids, want, strict=True):
            expect_same(replies[number], expected, f"interrupted {interrupted} times")
        return interrupted

    total = 0
    for first in range(1, 900, 61):
        engine = tiny_world().engine(blocks=12, policy=policy, max_batch_tokens=40, draft_tokens=drafts)
        total += serve(engine, first, 17)
    assert total > 60


def test_control_without_a_new_beginning_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above fail where what is half done is taken for whole."""
    ask = Ask(fixed_asks()[0].prompt, PARAMS)
    monkeypatch.setattr(Engine, "_mend", lambda _engine: None)

    def is_served(at: int) -> bool:
        engine = tiny_world().engine()
        number = engine.add(ask.prompt, ask.params)
        replies: dict[int, Any] = {}
        _caught(lambda: engine.step(replies), Tracer(at))
        try:
            for _ in range(PARAMS.max_tokens + 2):
                engine.step(replies)
            expect_same(replies[number], alone(tiny_world(), ask), "without a new beginning")
        except (AssertionError, KeyError):
            return False
        return True

    assert {is_served(at) for at in range(1, 120)} == {True, False}
