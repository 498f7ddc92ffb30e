"""A thread that reads recordings and submits their windows while the answers to earlier ones are still awaited."""

import atexit
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from granite_speech.errors import EngineError
from granite_speech.transcription.job import Job
from granite_speech.transcription.window_piece import WindowPiece

__all__ = ["ReadAhead"]

# Windows of this much audio are in memory at once, up to 700 MB with their features.
_SECONDS_AHEAD = 2 * 3600
# How long the interpreter waits, at its end, for a window that is being read. A thread that it ends in the middle may crash.
_PATIENCE_AT_EXIT = 5.0


class ReadAhead:
    """Recordings, in order, each as a `Job` that is still being read. Iterate over it once, and over `pieces` of each job.

    A thread of its own takes the recordings from the iterable, because the iterable may wait, and a text that is ready must not wait
    with it.

    Args:
        recordings: only the thread uses it, one recording at a time.
        job: makes the job of a recording.
        most: windows read and not yet answered; a recording without any counts as one.
        most_of_one: such windows of one recording.
    """

    def __init__(self, recordings: Iterable[Any], job: Callable[[Any], Job], most: int, most_of_one: int):
        self._job, self._most, self._most_of_one, self._process = job, most, most_of_one, os.getpid()
        self._changed = threading.Condition()
        self._jobs: deque[Job] = deque()
        self._ended = self._stopped = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(recordings,), name="granite-speech-reader", daemon=True)
        atexit.register(self._leave)
        self._thread.start()

    def __iter__(self) -> Iterator[Job]:
        """Yields each job once it is begun; raises what the iterable raised after those of the recordings before that.

        Raises:
            EngineError: in a forked process, where the thread does not exist. `pieces` does, too.
        """
        while True:
            self._check_process()
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._ended)
                if not self._jobs:
                    break
                job = self._jobs[0]
            yield job
        if self._error is not None:
            raise self._error

    def pieces(self, job: Job) -> Iterator[WindowPiece]:
        """The windows of the first job, each once it is submitted. At the end there is room for another job.

        Raises:
            Whatever ended the thread in the middle of the job.
        """
        while True:
            self._check_process()
            with self._changed:
                self._changed.wait_for(lambda: job.pieces or job.ended or self._ended)
                if not job.pieces:
                    if not job.ended and self._error is not None:
                        raise self._error
                    self._jobs.popleft()
                    self._changed.notify_all()
                    return
                piece = job.pieces[0]
            yield piece
            with self._changed:
                job.pieces.popleft()
                self._changed.notify_all()

    def stop(self) -> None:
        """Cancel what is left. Does not wait for the thread, which may be waiting for the iterable."""
        if os.getpid() != self._process:
            return  # after a fork the thread does not exist, and the lock may never be released
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
            for job in self._jobs:
                for piece in job.pieces:
                    piece.cancel()

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise EngineError(
                got="an iterator over transcripts that was begun before the process was forked",
                expected="one begun in this process: its threads are in the other one",
                remedy="Transcribe the recordings again",
            )

    def _leave(self) -> None:
        self.stop()
        self._thread.join(_PATIENCE_AT_EXIT)

    def _run(self, recordings: Iterable[Any]) -> None:
        try:
            for recording in recordings:
                if not self._read(self._job(recording)):
                    break
        except BaseException as error:  # for the thread that waits for transcripts
            self._error = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()
            atexit.unregister(self._leave)

    def _read(self, job: Job) -> bool:
        """Read a recording, and wait until another one may be read. False: stopped."""
        with self._changed:
            if self._stopped:
                return False
            self._jobs.append(job)
            self._changed.notify_all()
        job.read(lambda piece: self._add(job, piece))
        with self._changed:
            job.ended = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._stopped or self._has_room())
            return not self._stopped

    def _add(self, job: Job, piece: WindowPiece) -> bool:
        """Submit a window, and wait until another one may be read. False: stopped."""
        with self._changed:
            if not self._stopped:
                piece.submit()  # under the lock, so that nothing is submitted after `stop`
                job.pieces.append(piece)
                self._changed.notify_all()
            # The last window of a recording need not wait here: its job does, once it has ended.
            self._changed.wait_for(lambda: self._stopped or (self._has_room() and len(job.pieces) < self._most_of_one))
            return not self._stopped

    def _has_room(self) -> bool:
        windows = sum(max(1, len(job.pieces)) for job in self._jobs)
        return windows < self._most and sum(job.seconds for job in self._jobs) < _SECONDS_AHEAD
