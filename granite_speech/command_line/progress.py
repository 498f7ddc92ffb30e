"""The progress bar of the command line: seconds of audio that are done, and how many of them in a second (RTFx)."""

import os
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from queue import Empty, SimpleQueue
from typing import Any, Self

__all__ = ["Progress"]

_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} s of audio [{elapsed}<{remaining}{postfix}]"


class Progress:
    """A bar on standard error.

    A thread reads the recordings' lengths from their headers, so that no text waits for them. There is a total once all are known. They
    are estimates; each is replaced by the true length when its recording is done.

    Args:
        recordings: paths; each has its place as its index.
        shown: False: there is no bar.
    """

    def __init__(self, recordings: Sequence[str], shown: bool):
        self._recordings, self._shown = recordings, shown
        self._measured: SimpleQueue[tuple[int, float]] = SimpleQueue()
        self._lengths: dict[int, float] = {}
        self._done: dict[int, float] = {}
        self._all_lengths = self._all_done = self._began = 0.0
        self._bar: Any = None

    def __enter__(self) -> Self:
        if self._shown:
            from tqdm import tqdm

            self._began = time.monotonic()
            self._bar = tqdm(bar_format=_FORMAT, file=sys.stderr, **_size())
            threading.Thread(target=self._measure, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def advance(self, index: int, seconds: float) -> None:
        """So many seconds of a recording are done."""
        if self._bar is None:
            return
        self._all_done += seconds - self._done.get(index, 0.0)
        self._done[index] = seconds
        with suppress(Empty):
            while True:
                self._set_length(*self._measured.get_nowait(), known=False)
        if len(self._lengths) == len(self._recordings):
            self._bar.total = max(1, round(self._all_lengths))
        self._bar.set_postfix_str(f"RTFx {self._all_done / (time.monotonic() - self._began + 1e-9):.0f}", refresh=False)
        self._bar.update(round(self._all_done) - self._bar.n)

    def finish(self, index: int, seconds: float) -> None:
        """A recording is done, and this is its length."""
        if self._bar is not None:
            self._set_length(index, seconds, known=True)
            self.advance(index, seconds)

    def aside(self) -> AbstractContextManager:
        """A block that prints lines, which would tear the bar if both are on one terminal."""
        return nullcontext() if self._bar is None else self._bar.external_write_mode(file=sys.stderr)

    def _set_length(self, index: int, seconds: float, known: bool) -> None:
        if known or index not in self._lengths:
            self._all_lengths += seconds - self._lengths.get(index, 0.0)
            self._lengths[index] = seconds

    def _measure(self) -> None:
        from granite_speech.inputs.audio import estimate_seconds

        for index, recording in enumerate(self._recordings):
            if self._bar is None:
                return
            seconds = estimate_seconds(recording)
            if seconds is not None:
                self._measured.put((index, seconds))


def _size() -> dict[str, Any]:
    """The terminal's size for tqdm, which shows nothing on one that does not say how large it is."""
    with suppress(OSError):
        if all(os.get_terminal_size(sys.stderr.fileno())):
            return {"dynamic_ncols": True}
    return {"ncols": 80, "nrows": 24}
