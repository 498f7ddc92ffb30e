"""The segments of one recording as they are found, and the transcript that is made of them."""

from collections.abc import Callable, Sequence
from math import exp

from granite_speech.engine.handle import Answer
from granite_speech.errors import EngineError, GraniteSpeechError
from granite_speech.transcription.job import Job
from granite_speech.transcription.transcript import Segment, Transcript, TranscriptNote
from granite_speech.transcription.window_piece import CallSetup, WindowPiece

__all__ = ["Collected", "confidence"]


class Collected:
    """What is known of one recording so far.

    Args:
        setup: of the call.
        on_progress: called with the end of each window that is done, in seconds.
    """

    def __init__(self, setup: CallSetup, on_progress: Callable[[float], None] = lambda seconds: None):
        self._setup, self._on_progress = setup, on_progress
        self._has_words = setup.options.word_timestamps or setup.options.prompt_mode == "word_timestamps"
        self._segments: list[Segment] = []
        self._notes: list[TranscriptNote] = []
        self._errors: list[Exception] = []
        self._logprobs: list[float] = []

    def transcript(self, job: Job) -> Transcript:
        """The transcript, after the last segment. If all windows failed, its error is that of the first one."""
        options, error = self._setup.options, job.error
        if self._errors and len(self._errors) == len(self._segments):
            error = _own(self._errors[0]) if error is None else error
        notes = [*self._setup.notes, *([] if job.audio_warning is None else [TranscriptNote("audio", job.audio_warning)])]
        return Transcript(
            " ".join(one.text for one in self._segments if one.text),
            segments=self._segments,
            warnings=notes + self._notes,
            words=[word for one in self._segments for word in one.words] if self._has_words else None,
            confidence=confidence(self._logprobs),
            language=options.language,
            target_language=(options.target_language or "English") if options.task == "translate" else None,
            duration=job.duration,
            error=error,
        )

    def _answer(self, piece: WindowPiece) -> tuple[WindowPiece, Answer]:
        """The answer, of another try if the engine failed: that may have been the fault of another window."""
        try:
            return piece, piece.answer()
        except EngineError:  # the transcriber was closed
            raise
        except Exception:
            if not piece.was_submitted:
                raise
        again = self._setup.piece(piece.window, piece.is_first)
        again.submit()
        return again, again.answer()

    def _note(self, kind: str, start: float, end: float, message: str) -> None:
        self._notes.append(TranscriptNote(kind, message, round(start, 3), round(end, 3)))


def confidence(logprobs: Sequence[float]) -> float | None:
    """The geometric mean of some probabilities; None of none."""
    return round(exp(sum(logprobs) / len(logprobs)), 4) if logprobs else None


def _own(error: Exception) -> GraniteSpeechError:
    """An error of this package: others, such as a lack of memory, end the recording but not those after it."""
    if isinstance(error, GraniteSpeechError):
        return error
    failed = EngineError(
        got=f"no answer ({type(error).__name__}: {error})",
        expected="one for each window",
        remedy="Transcribe the recording again; for less memory, pass a smaller chunk_length",
    )
    failed.__cause__ = error
    return failed
