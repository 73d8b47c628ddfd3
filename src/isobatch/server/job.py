"""What one HTTP request has asked of an engine, as the event loop sees it.

What is held of a reply is at most the reply, however slowly it is read: pieces that nobody has fetched are
handed out together.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from isobatch.engine.output import Reply, TokenLogProbs
from isobatch.engine.request import FinishReason
from isobatch.engine.sampling_params import SamplingParams
from isobatch.errors import IsobatchError


@dataclass(frozen=True, slots=True)
class Piece:
    """What a completion has said since its last piece.

    Args:
        prompt: which of the job's prompts.
        index: which of its n completions.
        text: may be empty, while a character or a possible stop string is incomplete.
        tokens: sampled since.
        log_probs: of these tokens, if asked for.
        finish: why it is over, in its last piece; else None.
    """

    prompt: int
    index: int
    text: str
    tokens: tuple[int, ...]
    log_probs: tuple[TokenLogProbs, ...] | None
    finish: FinishReason | None


class Job:
    """What one HTTP request has asked of the engine: one reply for each of its prompts.

    Made by `Worker.submit`, used in the event loop, and to be closed by whoever uses it.

    Args:
        prompts: token ids of each.
        params: how they are continued.
        streaming: whether pieces are wanted before the replies.
        release: called once or more when the engine need not work for it any longer.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        streaming: bool,
        release: Callable[[Job], None],
    ) -> None:
        self.prompts, self.params, self.streaming = prompts, params, streaming
        self.replies: dict[int, Reply] = {}
        self._release = release
        self._pieces: list[Piece] = []
        self._error: IsobatchError | None = None
        self._news = asyncio.Event()
        self.closed = False

    @property
    def sequences(self) -> int:
        """How many completions it takes."""
        return len(self.prompts) * self.params.n

    async def pieces(self) -> AsyncIterator[list[Piece]]:
        """What there is to say, as it comes; over when all is said.

        Raises:
            ServerError: the engine went down, or time was up.
            RequestError: a prompt failed on the way.
        """
        while True:
            await self._news.wait()
            self._news.clear()
            # All looked at before the yield, during which more may come.
            pieces, self._pieces = self._pieces, []
            error, over = self._error, self.closed or len(self.replies) == len(self.prompts)
            if pieces:
                yield pieces
            if error is not None:
                raise error
            if over:
                return

    async def whole(self) -> list[Reply]:
        """All replies, in the order of the prompts; fewer if the job was closed before.

        Raises:
            ServerError, RequestError: as `pieces`.
        """
        async for _ in self.pieces():
            pass
        return [self.replies[at] for at in sorted(self.replies)]

    def take(self, pieces: list[Piece], replies: dict[int, Reply]) -> None:
        """Has the job know what a step has made of it. In the event loop."""
        if self.closed:
            return
        self._pieces += pieces
        failed = (reply.error for reply in replies.values() if reply.error is not None)
        if (error := next(failed, None)) is not None:
            self.fail(error)
            return
        self.replies |= replies
        if len(self.replies) == len(self.prompts):
            self._release(self)
        self._news.set()

    def fail(self, error: IsobatchError) -> None:
        """Ends the job with an error, unless it is over already."""
        if self._error is None and not self.closed and len(self.replies) < len(self.prompts):
            self._error = error
            self._release(self)
            self._news.set()

    def close(self) -> None:
        """Says that nobody is waiting any more; what is unfinished is aborted. May be called again."""
        if not self.closed:
            self.closed = True
            self._release(self)
            self._news.set()
