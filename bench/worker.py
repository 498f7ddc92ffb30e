"""A process that makes one measurement after another, and is replaced when a failure may have left CUDA unusable in it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, Self

__all__ = ["Outcome", "Worker"]

# Spawned: a forked child cannot use CUDA if its parent has.
_CONTEXT = get_context("spawn")


@dataclass(frozen=True)
class Outcome:
    """The outcome of one measurement.

    Args:
        values: entries for the result file; empty if nothing was timed.
        not_timed: the reason, if nothing was timed.
        unusable: the process must make no further measurement. After a failed capture, PyTorch's allocator and random generators stay
            in capture mode; after an illegal memory access, every CUDA call fails.
    """

    values: dict[str, Any] = field(default_factory=dict)
    not_timed: str = ""
    unusable: bool = False


class Worker:
    """Runs module-level functions one at a time in a child process, which is replaced after an outcome that makes it unusable."""

    def __init__(self) -> None:
        self._process: Any = None
        self._connection: Connection | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def call(self, function: Callable[..., Outcome], *arguments: Any, seconds: float | None = None) -> Outcome:
        """The function's outcome. If its process dies, or has none within `seconds`, the outcome says so."""
        if self._process is None:
            self._start()
        try:
            self._connection.send((function, arguments))
            if seconds is None or self._connection.poll(max(seconds, 0)):
                outcome = self._connection.recv()
            else:
                outcome = Outcome(not_timed=f"stopped after {seconds:.0f} s", unusable=True)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.join()
            outcome = Outcome(not_timed=f"its process ended with exit code {self._process.exitcode}", unusable=True)
        if outcome.unusable:
            self._stop()
        return outcome

    def _start(self) -> None:
        self._connection, child_end = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(target=_serve, args=(child_end,))
        self._process.start()
        # Only the child then holds this end, so it reads an end of file when this process is gone.
        child_end.close()

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()  # an unusable process may wait for its device forever
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
