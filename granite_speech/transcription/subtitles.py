"""The cues of a transcript: which lines are shown, and from when to when."""

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from itertools import accumulate, groupby, islice, pairwise

from granite_speech.errors import InputError
from granite_speech.transcription.text_units import single_spaces, text_units
from granite_speech.transcription.transcript import Segment, Transcript, Word

__all__ = ["Cue", "SubtitleOptions", "cues", "one_line", "spoken"]

# The width of a line if only the number of lines is given: what broadcasters allow.
_WIDTH = 42
# Milliseconds that a cue is shown if its segment has no length.
_SHORTEST = 500
# Milliseconds. After a longer pause between two words a new cue begins, as in whisper, if cues are divided at all.
_LONG_PAUSE = 3000

_CONTROLS = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ufeff]")
_SURROGATES = re.compile("[\ud800-\udfff]")  # they have no form in UTF-8


@dataclass(frozen=True)
class SubtitleOptions:
    """The layout of srt and vtt files, as in whisper. Without any, a segment is one cue of one line.

    Cues have the times of their words, if a segment has words. Otherwise they share the segment's time by their characters.

    Attributes:
        max_line_width: characters in a line. A longer word gets a line of its own; text without spaces breaks between characters.
        max_line_count: lines in a cue; what does not fit goes into another cue. Alone it implies a width of 42.
        max_words_per_line: words in a line. Without `max_line_count`, it is the number of words in a cue.
        highlight_words: show each cue once for every word, which is underlined while it is spoken. Needs words with times.

    Any of the first three also divides a segment at pauses of more than 3 s between two words.

    Raises:
        InputError: a limit is not a whole number of at least 1, or `highlight_words` is not True or False.
    """

    max_line_width: int | None = None
    max_line_count: int | None = None
    max_words_per_line: int | None = None
    highlight_words: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.highlight_words, bool):
            raise InputError(got=f"highlight_words={self.highlight_words!r}", expected="True or False", remedy="Leave it out for False")
        for name, value in self._limits().items():
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise InputError(got=f"{name}={value!r}", expected="a whole number of at least 1", remedy="Leave it out for no limit")

    @property
    def divides(self) -> bool:
        """Whether a segment may become more than one cue or line."""
        return any(value is not None for value in self._limits().values())

    def _limits(self) -> dict[str, int | None]:
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name != "highlight_words"}


@dataclass(frozen=True)
class Cue:
    """Lines of text, shown from `start` to `end`, in milliseconds. No line is empty.

    Attributes:
        underlined: the word that is being spoken: the index of its line, and where it begins and ends there; None: no word.
    """

    start: int
    end: int
    lines: tuple[str, ...]
    underlined: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class _Piece:
    """Text that a line break does not divide, and when it is said, in milliseconds.

    Attributes:
        space: between it and the piece before it.
        word: the index of its word in the segment. A word without spaces that is too long for a line has several pieces.
    """

    space: str
    text: str
    word: int
    start: int
    end: int


# The lines of a cue.
_Block = list[list[_Piece]]


def cues(transcript: Transcript, options: SubtitleOptions) -> list[Cue]:
    """The cues of a transcript, in order: none begins before the one before it ends. No text is lost.

    Raises:
        InputError: a time is not finite, or words are to be highlighted and have no times.
    """
    groups = []
    for segment in spoken(transcript):
        if options.highlight_words and segment.words is None:
            raise InputError(
                got=f"highlight_words=True, and a segment without words: {segment.text!r:.60}",
                expected="words with times",
                remedy="Transcribe with word_timestamps=True (on the command line --word-timestamps), or omit highlight_words",
            )
        words = _words_of_units(segment)
        for block in _blocks(_pieces(segment, words, _width(options)), options):
            groups.append(_cues_of_words(block) if options.highlight_words and words is not None else [_cue(block)])
    return _with_gaps(groups, _without_overlaps([cue for group in groups for cue in group]))


def spoken(transcript: Transcript) -> list[Segment]:
    """The segments that have text, each in one line.

    Raises:
        InputError: a time is not finite.
    """
    segments = transcript.segments
    if not segments:
        segments = (Segment(0, 0.0, transcript.duration, transcript.text, words=transcript.words),)
    whole = [replace(one, text=one_line(one.text)) for one in segments if one.error is None]
    for segment in whole:
        for one in (segment, *(segment.words or ())):
            if not (math.isfinite(one.start) and math.isfinite(one.end)):
                kind = "segment" if one is segment else "word"
                got = f"a {kind} from {one.start} to {one.end} seconds"
                raise InputError(got=got, expected="finite times", remedy=f"Give each {kind} its times")
    return [one for one in whole if one.text]


def one_line(text: str) -> str:
    """The text in one line that any file can hold: as `single_spaces`, and without control characters."""
    return single_spaces(_CONTROLS.sub("", _SURROGATES.sub("\ufffd", text)))


def _words_of_units(segment: Segment) -> list[Word] | None:
    """The words of a segment, one for each unit of its text; None: it has none, or they are not those of its text."""
    words = [one for one in segment.words or () if one_line(one.word)]
    return words if [one_line(one.word) for one in words] == [unit for _, unit in text_units(segment.text)] else None


def _pieces(segment: Segment, words: list[Word] | None, width: int | None) -> Iterator[_Piece]:
    """The text of a segment. Without words, its time is shared by characters; so is that of a word with several pieces."""
    units = list(text_units(segment.text))
    times = _shared(_times(segment), [unit for _, unit in units]) if words is None else map(_times, words)
    for index, ((space, unit), time) in enumerate(zip(units, times, strict=True)):
        parts = [part for _, part in text_units(unit, width)]
        for place, (part, (start, end)) in enumerate(zip(parts, _shared(time, parts), strict=True)):
            yield _Piece("" if place else space, part, index, start, end)


def _times(one: Segment | Word) -> tuple[int, int]:
    start = round(1000 * max(one.start, 0.0))
    return start, max(round(1000 * one.end), start)


def _shared(time: tuple[int, int], texts: list[str]) -> list[tuple[int, int]]:
    """A part of the time for each text, in proportion to its characters."""
    characters = list(accumulate(map(len, texts), initial=0))
    return list(pairwise(time[0] + (time[1] - time[0]) * count // characters[-1] for count in characters))


def _width(options: SubtitleOptions) -> int | None:
    only_lines = options.max_line_count is not None and options.max_line_width is None and options.max_words_per_line is None
    return _WIDTH if only_lines else options.max_line_width


def _blocks(pieces: Iterable[_Piece], options: SubtitleOptions) -> list[_Block]:
    """Fill each line with as many pieces as it may have, at least one, and each block with as many lines."""
    width, count, words = _width(options), options.max_line_count, options.max_words_per_line
    blocks: list[_Block] = []
    length, end = 0, -math.inf
    for piece in pieces:
        longer = length + len(piece.space + piece.text)
        if not blocks or (options.divides and piece.start - end > _LONG_PAUSE):
            blocks.append([[]])
        else:
            first = blocks[-1][0 if count is None else -1][0]
            full = words is not None and piece.word - first.word >= words
            if full and count is None:
                blocks.append([[]])
            elif full or (width is not None and longer > width):
                if len(blocks[-1]) == count:
                    blocks.append([])
                blocks[-1].append([])
        line = blocks[-1][-1]
        length, end = longer if line else len(piece.text), piece.end
        line.append(piece)
    return blocks


def _cue(block: _Block) -> Cue:
    return Cue(block[0][0].start, max(piece.end for line in block for piece in line), tuple(map(_text, block)))


def _text(line: list[_Piece]) -> str:
    return line[0].text + "".join(piece.space + piece.text for piece in line[1:])


def _cues_of_words(block: _Block) -> list[Cue]:
    """The block once for each of its pieces, which is underlined."""
    found, lines = [], tuple(map(_text, block))
    for number, line in enumerate(block):
        ends = accumulate(len(piece.text) + (len(piece.space) if place else 0) for place, piece in enumerate(line))
        found += [Cue(one.start, one.end, lines, (number, end - len(one.text), end)) for one, end in zip(line, ends, strict=True)]
    return found


def _with_gaps(groups: list[list[Cue]], found: list[Cue]) -> list[Cue]:
    """The cues of all groups, and where two of one group do not meet, a cue between them that shows their lines as they are."""
    result, remaining = [], iter(found)
    for group in groups:
        members = list(islice(remaining, len(group)))
        for before, after in pairwise(members):
            result.append(before)
            if before.end < after.start:
                result.append(Cue(before.end, after.start, before.lines))
        result.append(members[-1])
    return result


def _without_overlaps(found: list[Cue]) -> list[Cue]:
    """The same cues with times that never go back: each is shown for at least a millisecond, and ends before the next one begins.

    Cues with one start share the time that the longest of them has.
    """
    starts = accumulate((one.start for one in found), max)
    groups = [(start, [cue for _, cue in pairs]) for start, pairs in groupby(zip(starts, found, strict=True), key=lambda pair: pair[0])]
    result, earliest = [], 0
    for index, (start, members) in enumerate(groups):
        start = max(start, earliest)
        following = groups[index + 1][0] if index + 1 < len(groups) else math.inf
        length = max(cue.end for cue in members) - start
        if length < len(members):
            length = len(members) * _SHORTEST
        length = max(min(length, following - start), len(members))
        edges = [start + length * n // len(members) for n in range(len(members) + 1)]
        result += [replace(cue, start=begin, end=end) for cue, (begin, end) in zip(members, pairwise(edges), strict=True)]
        earliest = edges[-1]
    return result
