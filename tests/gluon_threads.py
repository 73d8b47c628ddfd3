"""Threads of which one runs at a time, the next one drawn at random, and barriers as Hopper has them."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence


class HandoverError(AssertionError):
    """Groups of warps wait for one another for ever, or one reads what is not there."""


class _StoppedError(Exception):
    """Another thread has failed."""


class World:
    """The threads of one program, and copies on their way."""

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw
        self.copies: list[Callable[[], None]] = []
        self.failure: BaseException | None = None
        self._wants: dict[int, Callable[[], bool] | None] = {}
        self._turns: dict[int, threading.Semaphore] = {}
        self._back = threading.Semaphore(0)
        self._paces: dict[int, float] = {}

    def run(self, jobs: Sequence[Callable[[], object]]) -> None:
        """All jobs, until each has ended."""
        threads = [threading.Thread(target=self._body, args=(n, job)) for n, job in enumerate(jobs)]
        for n, thread in enumerate(threads):
            self._wants[n], self._turns[n] = None, threading.Semaphore(0)
            self._paces[n] = self.draw.choice((1, 1, 5, 30))  # one is slow, another fast, in each run others
            thread.start()
        haste = self.draw.choice((0.2, 1.0, 10.0))
        while self._wants and self.failure is None:
            ready = [n for n, want in self._wants.items() if want is None or want()]
            weights = [self._paces[n] for n in ready] + [haste * bool(self.copies)]
            if not sum(weights):
                self.failure = HandoverError("all wait, and nothing is on its way")
                break
            n = self.draw.choices([*ready, -1], weights)[0]
            if n < 0:
                self.copies.pop(self.draw.randrange(len(self.copies)))()
            else:
                self._turns[n].release()
                self._back.acquire()
        for turn in self._turns.values():
            turn.release()
        for thread in threads:
            thread.join()
        if self.failure is not None:
            raise self.failure

    def _body(self, n: int, job: Callable[[], object]) -> None:
        HERE.world, HERE.n = self, n
        self._turns[n].acquire()
        try:
            if self.failure is None:
                job()
        except _StoppedError:
            pass
        except BaseException as error:  # noqa: BLE001 - told by the thread that waits
            self.failure = self.failure or error
        del self._wants[n]
        self._back.release()

    def give_way(self, want: Callable[[], bool] | None = None) -> None:
        """Lets others run, and goes on when `want` is true."""
        self._wants[HERE.n] = want
        self._back.release()
        self._turns[HERE.n].acquire()
        if self.failure is not None:
            raise _StoppedError


HERE = threading.local()
"""`world`, and which of its threads this is; what the next program's draws are, and who runs beside it."""


def give_way(want: Callable[[], bool] | None = None) -> None:
    """Lets the other threads of this program go on, as `World.give_way`."""
    HERE.world.give_way(want)


class Barrier:
    """An mbarrier: a phase ends when all have arrived and all bytes have come."""

    def __init__(self) -> None:
        self.phase = self.count = self.missing = self.bytes = 0

    def arrive(self, expected: int = 0) -> None:
        if not self.missing:
            raise HandoverError("one arrives where all have")
        self.bytes += expected
        self.missing -= 1
        self.settle()

    def settle(self) -> None:
        if not self.missing and not self.bytes:
            self.phase, self.missing = self.phase + 1, self.count


class Barriers:
    """Several, in shared memory."""

    def __init__(self, number: int) -> None:
        self.barriers = [Barrier() for _ in range(number)]

    def index(self, at: int) -> Barrier:
        return self.barriers[int(at)]


class Alone:
    """Before a program's warps part: nobody is beside the first."""

    def give_way(self, want: Callable[[], bool] | None = None) -> None:
        if want is not None and not want():
            raise HandoverError("one waits before there is anyone to wait for")
