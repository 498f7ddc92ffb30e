"""A thread that reads recordings and submits them while the answers to earlier ones are still awaited."""

import atexit
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from granite_speech.engine.warmup import FRAMES_A_SECOND
from granite_speech.errors import GraniteSpeechError
from granite_speech.transcription.job import Job, Transcript

__all__ = ["ReadAhead"]

# Features of this much audio are in memory at once, about 350 MB in float32, or those of one recording that is longer.
_SECONDS_AHEAD = 3 * 3600
# How long the interpreter waits, at its end, for a recording that is being read. A thread that it ends in the middle may crash.
_PATIENCE_AT_EXIT = 5.0


class ReadAhead:
    """Transcripts of recordings, in order. Iterate over it once.

    A thread of its own takes the recordings from the iterable, because the iterable may wait, and a transcript that is ready must
    not wait with it.

    Args:
        recordings: only the thread uses it, one recording at a time.
        job: makes the job of a recording.
        most: recordings read and not yet answered.
    """

    def __init__(self, recordings: Iterable[Any], job: Callable[[Any], Job], most: int):
        self._job, self._most, self._process = job, most, os.getpid()
        self._changed = threading.Condition()
        self._jobs: deque[Job] = deque()
        self._ended = self._stopped = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(recordings,), name="granite-speech-reader", daemon=True)
        atexit.register(self._leave)
        self._thread.start()

    def __iter__(self) -> Iterator[Transcript]:
        """Yields each transcript once it is complete; raises what the iterable raised after those of the recordings before that."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._ended)
                if not self._jobs:
                    break
                job = self._jobs[0]
            try:
                transcript = job.transcript()
            except GraniteSpeechError as error:
                transcript = Transcript("", error=error)
            with self._changed:
                self._jobs.popleft()
                self._changed.notify_all()
            yield transcript
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """Cancel what is left. Does not wait for the thread, which may be waiting for the iterable."""
        if os.getpid() != self._process:
            return  # after a fork the thread does not exist, and the lock may never be released
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
            for job in self._jobs:
                job.cancel()

    def _leave(self) -> None:
        self.stop()
        self._thread.join(_PATIENCE_AT_EXIT)

    def _run(self, recordings: Iterable[Any]) -> None:
        try:
            for recording in recordings:
                job = self._job(recording)
                job.read()
                if not self._start(job):
                    break
        except BaseException as error:  # for the thread that waits for transcripts
            self._error = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()
            atexit.unregister(self._leave)

    def _start(self, job: Job) -> bool:
        """Submit a job, and wait until another one may be read. False: stopped."""
        with self._changed:
            if not self._stopped:
                job.submit()  # under the lock, so that nothing is submitted after `stop`
                self._jobs.append(job)
                self._changed.notify_all()
            self._changed.wait_for(lambda: self._stopped or self._has_room())
            return not self._stopped

    def _has_room(self) -> bool:
        return len(self._jobs) < self._most and sum(job.frames for job in self._jobs) < _SECONDS_AHEAD * FRAMES_A_SECOND
