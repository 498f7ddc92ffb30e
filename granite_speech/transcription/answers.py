"""From the answers to a recording's windows to its segments: windows that repeat themselves are cut, and overlaps are joined."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

from granite_speech.errors import EngineError, GraniteSpeechError
from granite_speech.transcription.job import Job
from granite_speech.transcription.overlaps import join
from granite_speech.transcription.piece import Piece, Setup
from granite_speech.transcription.repetition import repeats
from granite_speech.transcription.tagged_answers import TaggedAnswer, parse_tags
from granite_speech.transcription.transcript import Segment, Transcript, TranscriptNote
from granite_speech.transcription.windows import halves

__all__ = ["Answers"]

# A window whose text repeats itself is cut in halves at most this often: 30 s to less than 4.
_CUTS = 3


@dataclass(frozen=True)
class _Text:
    """The text of a window.

    Attributes:
        overlap: seconds at its beginning that the one before it has too.
        truncated: which limit ended it; None: it is complete.
        repeats: whether it repeats itself.
        error: why there is none; None: there is one.
        tagged: the text, and what the answer's tags say.
    """

    start: float
    end: float
    overlap: float
    text: str = ""
    truncated: str | None = None
    repeats: bool = False
    error: Exception | None = None
    tagged: TaggedAnswer = field(default_factory=partial(TaggedAnswer, ""))


class Answers:
    """Makes the segments and the transcript of one recording.

    Args:
        setup: of the call.
        on_progress: called with the end of each window that is done, in seconds.
    """

    def __init__(self, setup: Setup, on_progress: Callable[[float], None] = lambda seconds: None):
        self._setup, self._on_progress = setup, on_progress
        self._segments: list[Segment] = []
        self._notes: list[TranscriptNote] = []
        self._errors: list[Exception] = []

    def segments(self, pieces: Iterable[Piece]) -> Iterator[Segment]:
        """Yields each segment once nothing can change it any more."""
        held: _Text | None = None  # the window after it may have some of its words
        for piece in pieces:
            if held is not None and not piece.window.overlap:
                yield from self._segment(held)
                held = None
            for one in self._texts(piece):
                if held is not None:
                    if one.overlap:
                        held, one = _joined(held, one)
                    yield from self._segment(held)
                held = one
            self._on_progress(piece.window.end)
        if held is not None:
            yield from self._segment(held)

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
            language=options.language,
            target_language=(options.target_language or "English") if options.task == "translate" else None,
            duration=job.duration,
            error=error,
        )

    def _texts(self, piece: Piece, cuts: int = 0) -> list[_Text]:
        """The texts of a window, of two or more if it was cut because its text repeats itself."""
        window, threshold = piece.window, self._setup.options.compression_ratio_threshold
        place = _Text(window.start, window.end, window.overlap)
        try:
            piece, answer = self._answer(piece)
        except Exception as error:  # whatever a window fails with, the others have their texts
            return [replace(place, error=error)]
        options = self._setup.options
        prefix = options.prefix_text or "" if piece.is_first else ""
        tagged = parse_tags(answer.text, options.prompt_mode, window.end - window.start, prefix)
        found = replace(place, text=tagged.text, truncated=piece.truncation(answer), tagged=tagged)
        if not repeats(found.text, answer.finish_reason, threshold):
            return [found]
        smaller = halves(window) if cuts < _CUTS else None
        if smaller is None:
            return [replace(found, repeats=True)]
        parts = [Piece(self._setup, half, piece.is_first and not number) for number, half in enumerate(smaller)]
        for part in parts:
            part.submit()
        return [one for part in parts for one in self._texts(part, cuts + 1)]

    def _answer(self, piece: Piece):
        """The answer, of another try if the engine failed: that may have been the fault of another window."""
        try:
            return piece, piece.answer()
        except EngineError:  # the transcriber was closed
            raise
        except Exception:
            if not piece.was_submitted:
                raise
        again = Piece(self._setup, piece.window, piece.is_first)
        again.submit()
        return again, again.answer()

    def _segment(self, one: _Text) -> Iterator[Segment]:
        """The segment of a window, unless the model found no words in it. Notes what went wrong."""
        if one.error is not None:
            self._errors.append(one.error)
            self._note("window_error", one, f"this window has no text: {one.error}")
        if one.truncated is not None:
            self._note("truncated", one, one.truncated)
        if one.repeats:
            self._note("repetition", one, "the text repeats itself, in smaller windows too. It may not be what was said.")
        if one.text or one.error is not None:
            error = None if one.error is None else str(one.error)
            temperature = self._setup.options.temperature
            tags = {"speakers": one.tagged.turns, "raw_text": one.tagged.raw_text}
            segment = Segment(len(self._segments), round(one.start, 3), round(one.end, 3), one.text, temperature, error, **tags)
            self._segments.append(segment)
            yield segment

    def _note(self, kind: str, one: _Text, message: str) -> None:
        self._notes.append(TranscriptNote(kind, message, round(one.start, 3), round(one.end, 3)))


def _joined(before: _Text, after: _Text) -> tuple[_Text, _Text]:
    """Two windows that overlap, without the words that both have. They meet in the middle of the overlap."""
    lengths = {"before_seconds": before.end - before.start, "after_seconds": after.end - after.start}
    texts = join(before.text, after.text, overlap=after.overlap, **lengths)
    middle = after.start + after.overlap / 2
    tagged = before.tagged.beginning(texts[0]), after.tagged.end(texts[1])
    return replace(before, text=texts[0], end=middle, tagged=tagged[0]), replace(after, text=texts[1], start=middle, tagged=tagged[1])


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
