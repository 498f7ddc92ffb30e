"""The cues of a transcript: which lines are shown, and from when to when."""

import math
import re
from dataclasses import dataclass, fields, replace
from itertools import accumulate, groupby, pairwise

from granite_speech.errors import InputError
from granite_speech.transcription.text_units import text_units
from granite_speech.transcription.transcript import Segment, Transcript

__all__ = ["Cue", "SubtitleOptions", "cues", "one_line", "spoken"]

# The width of a line if only the number of lines is given: what broadcasters allow.
_WIDTH = 42
# Milliseconds that a cue is shown if its segment has no length.
_SHORTEST = 500

_CONTROLS = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ufeff]")
_SURROGATES = re.compile("[\ud800-\udfff]")  # they have no form in UTF-8
_SPACES = re.compile(r"\s+")
_NO_BREAK_SPACES = re.compile("[\u00a0\u2007\u202f]+")


@dataclass(frozen=True)
class SubtitleOptions:
    """The layout of srt and vtt files, as in whisper. Without any, a segment is one cue of one line.

    Attributes:
        max_line_width: characters in a line. A longer word gets a line of its own; text without spaces breaks between characters.
        max_line_count: lines in a cue; what does not fit goes into another cue. Alone it implies a width of 42.
        max_words_per_line: words in a line. Without `max_line_count`, it is the number of words in a cue.

    Raises:
        InputError: an option is not a whole number of at least 1.
    """

    max_line_width: int | None = None
    max_line_count: int | None = None
    max_words_per_line: int | None = None

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise InputError(got=f"{field.name}={value!r}", expected="a whole number of at least 1", remedy="Leave it out for no limit")


@dataclass(frozen=True)
class Cue:
    """Lines of text, shown from `start` to `end`, in milliseconds. No line is empty."""

    start: int
    end: int
    lines: tuple[str, ...]


def cues(transcript: Transcript, options: SubtitleOptions) -> list[Cue]:
    """The cues of a transcript, in order: none begins before the one before it ends. No text is lost.

    Raises:
        InputError: a time is not finite.
    """
    found = [cue for segment in spoken(transcript) for cue in _split(segment, options)]
    return _without_overlaps(found)


def spoken(transcript: Transcript) -> list[Segment]:
    """The segments that have text, each in one line.

    Raises:
        InputError: a time is not finite.
    """
    segments = transcript.segments
    if not segments:
        segments = (Segment(0, 0.0, transcript.duration, transcript.text),)
    whole = [replace(one, text=one_line(one.text)) for one in segments if one.error is None]
    for one in whole:
        if not (math.isfinite(one.start) and math.isfinite(one.end)):
            raise InputError(
                got=f"a segment from {one.start} to {one.end} seconds", expected="finite times", remedy="Give each segment its times"
            )
    return [one for one in whole if one.text]


def one_line(text: str) -> str:
    """The text in one line that any file can hold: single spaces, no line breaks, no control characters.

    No-break spaces stay, as in French before a colon.
    """
    text = _CONTROLS.sub("", _SURROGATES.sub("\ufffd", text))
    return _SPACES.sub(lambda found: found[0] if _NO_BREAK_SPACES.fullmatch(found[0]) else " ", text).strip()


def _split(segment: Segment, options: SubtitleOptions) -> list[Cue]:
    """The cues of one segment. Its time is shared among them by their characters, because a segment has no times of words."""
    blocks = _blocks(segment.text, options)
    start = round(1000 * max(segment.start, 0.0))
    length = max(round(1000 * segment.end) - start, 0)
    characters = list(accumulate((sum(map(len, lines)) for lines in blocks), initial=0))
    edges = [start + length * count // characters[-1] for count in characters]
    return [Cue(begin, end, tuple(lines)) for lines, (begin, end) in zip(blocks, pairwise(edges), strict=True)]


def _blocks(text: str, options: SubtitleOptions) -> list[list[str]]:
    """The lines of each cue."""
    width, count, words = options.max_line_width, options.max_line_count, options.max_words_per_line
    if count is None:
        return [_lines(part, width, None) for part in _lines(text, None, words)]
    if width is None and words is None:
        width = _WIDTH
    lines = _lines(text, width, words)
    return [lines[first : first + count] for first in range(0, len(lines), count)]


def _lines(text: str, width: int | None, words: int | None) -> list[str]:
    """Fill each line with as many units of the text as it may have, at least one."""
    if width is None and words is None:
        return [text]
    lines, line, count = [], "", 0
    for space, unit in text_units(text, width):
        longer = line + space + unit if line else unit
        if line and ((width is not None and len(longer) > width) or count == words):
            lines.append(line)
            line, count = unit, 0
        else:
            line = longer
        count += 1
    return [*lines, line]


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
