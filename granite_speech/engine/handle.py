"""What a caller holds of a request: its tokens as they arrive, its answer, or its error. Works with threads and with asyncio."""

import asyncio
import math
import os
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from granite_speech.errors import EngineError
from granite_speech.modules.transfers import Reading

__all__ = ["Answer", "Handle", "check_process"]


@dataclass(frozen=True)
class Answer:
    """The end of a request.

    Attributes:
        text: of the tokens, without special ones.
        token_ids: new tokens, with the one that ended the answer.
        finish_reason: "stop": an end token or a stop string; "length": max_new_tokens, or the engine's pages are full; "repeated":
            the same tokens again and again, if stop_on_repetition; "cancelled".
        logprobs: of each token, its natural log-probability after those before it, in the model's own distribution: before temperature,
            penalties and other rules.
        ctc_logprobs: with ctc=True, `(frames, output_dim)` float32 on the CPU: the natural log-probabilities of the encoder's CTC head,
            50 frames a second, of all clips end to end. None: not asked for, no audio, or max_new_tokens=0. They do not count when
            answers are compared.
        frames: of a `CTCEngine`: each token's first and last frame, counted from the recording's first.
        frame_logprobs: of a `CTCEngine`: `(frames,)` float32 on the CPU, the log-probability of each frame's likeliest entry, which may be
            the blank. It does not count when answers are compared.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    logprobs: list[float] = field(default_factory=list)
    ctc_logprobs: Tensor | None = field(default=None, compare=False, repr=False)
    frames: list[tuple[int, int]] = field(default_factory=list)
    frame_logprobs: Tensor | None = field(default=None, compare=False, repr=False)


class Handle:
    """One request of an `Engine`. Iterate over it for token ids as they arrive, in any number of threads or tasks.

    A task that is cancelled while it awaits a handle or its next token cancels the request; anywhere else, call `cancel`.
    """

    on_cancel: Callable[[], None] | None

    def __init__(self, engine: Any, decode: Callable[[list[int]], str]):
        self._engine = engine  # an engine that nobody holds closes, and must not while a handle is waited for
        self._decode = decode  # must not refer to the engine
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._tokens: list[int] = []
        self._logprobs: list[float] = []
        self._wakeups: list[tuple[float, Callable[[], None]]] = []  # each with the number of tokens that are not enough
        self.ctc: Reading | None = None  # the CTC head's log-probabilities, if they are wanted, once the audio is encoded
        self.frames: list[tuple[int, int]] = []  # those of a CTC model's answer, and their log-probabilities
        self.frame_logprobs: Tensor | None = None
        self._future: Future[str] = Future()  # of the finish reason
        self._future.set_running_or_notify_cancel()  # so that nobody but the engine ends it

    def result(self, timeout: float | None = None) -> Answer:
        """The answer, once it is complete; up to where it was cancelled, if it was.

        Args:
            timeout: seconds to wait at most; None: any time.

        Raises:
            TimeoutError: it is not complete yet. The request goes on.
            EngineError: the engine belongs to another process.
            Any error of this request, or the one that ended the engine.
        """
        check_process(self._process)
        reason = self._future.result(timeout)
        ctc = None if self.ctc is None else self.ctc.wait()
        return Answer(
            self._decode(self._tokens), list(self._tokens), reason, list(self._logprobs), ctc, list(self.frames), self.frame_logprobs
        )

    @property
    def done(self) -> bool:
        """Whether the request has ended, in whatever way."""
        return self._future.done()

    def cancel(self) -> bool:
        """End the request. `result()` then returns the tokens that there are. False if it had ended before."""
        check_process(self._process)
        with self._lock:
            if self.done:
                return False
            on_cancel = self.on_cancel
        on_cancel()
        return True

    def __iter__(self) -> Iterator[int]:
        count = 0
        while True:
            check_process(self._process)
            arrived = threading.Event()
            if self._wait_beyond(count, arrived.set):
                arrived.wait()
            ended = self.done  # read first: the last token is added before the end
            if count < len(self._tokens):
                yield self._tokens[count]
                count += 1
            elif ended:
                self._raise_error()
                return

    async def __aiter__(self) -> AsyncIterator[int]:
        count = 0
        while True:
            await self._arrival(count)
            ended = self.done
            if count < len(self._tokens):
                yield self._tokens[count]
                count += 1
            elif ended:
                self._raise_error()
                return

    def __await__(self) -> Generator[Any, None, Answer]:
        return self._answer().__await__()

    async def _answer(self) -> Answer:
        await self._arrival(math.inf)
        return self.result()

    async def _arrival(self, count: float) -> None:
        """Wait for more than `count` tokens, or for the end."""
        check_process(self._process)
        loop, arrived = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with suppress(RuntimeError):  # the loop may have been closed meanwhile
                loop.call_soon_threadsafe(arrived.set)

        if not self._wait_beyond(count, wake):
            return
        try:
            await arrived.wait()
        except asyncio.CancelledError:
            self.cancel()
            raise

    def _wait_beyond(self, count: float, wake: Callable[[], None]) -> bool:
        """Have `wake` called when there are more than `count` tokens, or at the end; False if that is so already."""
        with self._lock:
            if len(self._tokens) > count or self.done:
                return False
            self._wakeups.append((count, wake))
            return True

    def _raise_error(self) -> None:
        """Raise the error of a request that has ended with one."""
        self._future.result()

    # The engine's side.

    def add(self, token: int, logprob: float) -> None:
        with self._lock:
            self._logprobs.append(logprob)
            self._tokens.append(token)
            tokens = len(self._tokens)
            wakeups = [wake for count, wake in self._wakeups if count < tokens]
            if wakeups:
                self._wakeups = [one for one in self._wakeups if one[0] >= tokens]
        for wake in wakeups:
            wake()

    def finish(self, reason: str) -> None:
        self._end(lambda: self._future.set_result(reason))

    def fail(self, error: BaseException) -> None:
        self._end(lambda: self._future.set_exception(error))

    def _end(self, end: Callable[[], None]) -> None:
        with self._lock:
            if not self.done:
                end()
            self._engine = None
            self.on_cancel = None  # it refers to the request, with its audio
            wakeups, self._wakeups = self._wakeups, []
        for _, wake in wakeups:
            wake()


def check_process(process: int) -> None:
    """Raise EngineError in a process that was forked from the engine's."""
    if os.getpid() != process:
        raise EngineError(
            got=f"an engine of process {process}, in process {os.getpid()}, which was forked from it and has no worker thread",
            expected="an engine of this process",
            remedy="Make a new Engine after the fork",
        )
