"""A process that measures one thing after another, and is replaced when a failure may have left CUDA unusable in it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, Self

__all__ = ["Outcome", "Worker"]

# Spawned: a forked child could not use CUDA once its parent has.
_CONTEXT = get_context("spawn")


@dataclass(frozen=True)
class Outcome:
    """What a measurement came to.

    Args:
        found: entries for the result file; empty if it was not timed.
        not_timed: why not.
        spoiled: nothing else may be measured in that process: a failed capture leaves PyTorch's allocator and random generators
            in capture mode, and after an illegal memory access every CUDA call fails.
    """

    found: dict[str, Any] = field(default_factory=dict)
    not_timed: str = ""
    spoiled: bool = False


class Worker:
    """Runs functions of modules, one at a time, in one process until an outcome is spoiled; then a new process runs the next."""

    def __init__(self) -> None:
        self._process: Any = None
        self._connection: Connection | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def call(self, function: Callable[..., Outcome], *arguments: Any) -> Outcome:
        """The outcome of the function; of one whose process dies, that it died."""
        if self._process is None:
            self._start()
        try:
            self._connection.send((function, arguments))
            outcome = self._connection.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.join()
            outcome = Outcome(not_timed=f"its process ended with exit code {self._process.exitcode}", spoiled=True)
        if outcome.spoiled:
            self._stop()
        return outcome

    def _start(self) -> None:
        self._connection, theirs = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(target=_serve, args=(theirs,))
        self._process.start()
        # The process then has the only other end: it reads an end of file when this process is gone.
        theirs.close()

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()  # a spoiled process may wait for its device forever
            self._process.join()
            self._connection.close()
            self._process = self._connection = None


def _serve(connection: Connection) -> None:
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        connection.send(function(*arguments))
