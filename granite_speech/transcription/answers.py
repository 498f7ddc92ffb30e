"""From the answers to a recording's windows to its segments: windows that repeat themselves are cut, and overlaps are joined."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

from granite_speech.engine.handle import Answer
from granite_speech.transcription.collected import Collected, confidence
from granite_speech.transcription.overlaps import join
from granite_speech.transcription.piece import Piece, Setup
from granite_speech.transcription.repetition import repeats
from granite_speech.transcription.tagged_answers import TaggedAnswer, parse_tags
from granite_speech.transcription.text_units import single_spaces, text_units
from granite_speech.transcription.transcript import Segment, Word
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
        words: of the text, if the call has asked for their times.
        logprobs: of the answer's tokens.
    """

    start: float
    end: float
    overlap: float
    text: str = ""
    truncated: str | None = None
    repeats: bool = False
    error: Exception | None = None
    tagged: TaggedAnswer = field(default_factory=partial(TaggedAnswer, ""))
    words: tuple[Word, ...] | None = None
    logprobs: tuple[float, ...] = ()


class Answers(Collected):
    """Makes the segments and the transcript of one recording, from the answers of a language model."""

    _setup: Setup

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

    def _texts(self, piece: Piece, cuts: int = 0) -> list[_Text]:
        """The texts of a window, of two or more if it was cut because its text repeats itself."""
        window = piece.window
        place = _Text(window.start, window.end, window.overlap)
        try:
            piece, answer = self._answer(piece)
            found = self._read(place, piece, answer)
            smaller = halves(window) if found.repeats and cuts < _CUTS else None
            if smaller is None:
                return [self._with_words(found, piece, answer)]
        except Exception as error:  # whatever a window fails with, the others have their texts
            return [replace(place, error=error)]
        parts = [self._setup.piece(half, piece.is_first and not number) for number, half in enumerate(smaller)]
        for part in parts:
            part.submit()
        return [one for part in parts for one in self._texts(part, cuts + 1)]

    def _read(self, place: _Text, piece: Piece, answer: Answer) -> _Text:
        """What the answer to a window says."""
        options = self._setup.options
        tagged = parse_tags(answer.text, options.prompt_mode, place.end - place.start, self._prefix(piece))
        is_loop = repeats(tagged.text, answer.finish_reason, options.compression_ratio_threshold)
        return replace(place, text=tagged.text, truncated=piece.truncation(answer), repeats=is_loop, tagged=tagged)

    def _with_words(self, found: _Text, piece: Piece, answer: Answer) -> _Text:
        said_before = parse_tags(self._prefix(piece), self._setup.options.prompt_mode).text
        words = piece.words(answer, found.tagged, said_before)
        return replace(found, words=None if words is None else tuple(words), logprobs=tuple(answer.logprobs))

    def _prefix(self, piece: Piece) -> str:
        """The beginning of the answer, which the call has given."""
        return (piece.is_first and self._setup.options.prefix_text) or ""

    def _segment(self, one: _Text) -> Iterator[Segment]:
        """The segment of a window, unless the model found no words in it. Notes what went wrong."""
        if one.error is not None:
            self._errors.append(one.error)
            self._note("window_error", one.start, one.end, f"this window has no text: {one.error}")
        if one.truncated is not None:
            self._note("truncated", one.start, one.end, one.truncated)
        if one.repeats:
            self._note("repetition", one.start, one.end, "the text repeats itself, in smaller windows too. It may not be what was said.")
        if one.text or one.error is not None:
            error = None if one.error is None else str(one.error)
            temperature = self._setup.options.temperature
            begin, end = (one.words[0].start, one.words[-1].end) if one.words else (round(one.start, 3), round(one.end, 3))
            others = {"speakers": one.tagged.turns, "raw_text": one.tagged.raw_text, "confidence": confidence(one.logprobs)}
            words = () if one.words is None and self._has_words else one.words
            segment = Segment(len(self._segments), begin, end, one.text, temperature, error, words, **others)
            self._logprobs += one.logprobs
            self._segments.append(segment)
            yield segment


def _joined(before: _Text, after: _Text) -> tuple[_Text, _Text]:
    """Two windows that overlap, without the words that both have. They meet in the middle of the overlap."""
    lengths = {"before_seconds": before.end - before.start, "after_seconds": after.end - after.start}
    texts = join(before.text, after.text, overlap=after.overlap, **lengths)
    middle = after.start + after.overlap / 2
    counts = [sum(1 for _, unit in text_units(single_spaces(text)) if unit) for text in texts]
    first, then = before.words, after.words
    if first is not None and then is not None:
        first, then = first[: counts[0]], then[len(then) - counts[1] :]
        earliest = first[-1].end if first else 0.0  # the times of two windows need not agree
        then = tuple(replace(one, start=max(one.start, earliest), end=max(one.end, earliest)) for one in then)
    return (
        replace(before, text=texts[0], end=middle, tagged=before.tagged.beginning(texts[0]), words=first),
        replace(after, text=texts[1], start=middle, tagged=after.tagged.end(texts[1]), words=then),
    )
