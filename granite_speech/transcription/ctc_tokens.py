"""Tokens of CTC with their times: parts of windows joined, cut at pauses, and grouped to words."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from granite_speech.transcription.alignment import Place
from granite_speech.transcription.text_units import single_spaces
from granite_speech.transcription.transcript import Word
from granite_speech.transcription.word_edges import edges
from granite_speech.transcription.words import units_of

__all__ = ["Token", "joined", "passages", "within", "words_of"]

# Seconds between two tokens that end a segment, and the longest segment. The token of a long word is heard in one frame or two of it, so
# shorter gaps need not be pauses.
_PAUSE, _LONGEST = 1.0, 30.0

Decode = Callable[[list[int]], str]


@dataclass(frozen=True)
class Token:
    """A run of frames with one id.

    Attributes:
        id: of the token.
        logprob: the largest of its frames.
        first, last: frames, counted from the beginning of the recording.
    """

    id: int
    logprob: float
    first: float
    last: float


def within(tokens: Sequence[Token], begin: float, end: float, logprobs: np.ndarray, start: float) -> list[Token]:
    """The part of each token that is in the frames from `begin` to `end`, which is not among them.

    Args:
        tokens: in order.
        begin, end: frames, counted from the beginning of the recording.
        logprobs: of all frames from `start` on.
    """
    found = []
    for one in tokens:
        first, last = max(one.first, begin), min(one.last, end - 1)
        if last <= first - 0.5:
            continue
        if (first, last) != (one.first, one.last):
            own = logprobs[round(first - start) : round(last - start) + 1]
            one = Token(one.id, float(own.max()) if len(own) else one.logprob, first, last)
        found.append(one)
    return found


def joined(before: Sequence[Token], after: Sequence[Token]) -> list[Token]:
    """Tokens of two parts of a recording that follow each other. A run of frames may go through both."""
    if before and after and before[-1].id == after[0].id and after[0].first < before[-1].last + 1.5:
        one, other = before[-1], after[0]
        run = Token(one.id, max(one.logprob, other.logprob), one.first, other.last)
        return [*before[:-1], run, *after[1:]]
    return [*before, *after]


def passages(tokens: Sequence[Token], decode: Decode, frame_seconds: float) -> Iterator[list[Token]]:
    """Tokens between pauses; longer passages are cut in their longest gap. A word is in one of them.

    Args:
        tokens: in order.
        decode: gives the text of ids.
        frame_seconds: from one frame to the next.
    """
    begin = 0
    gaps = [(after.first - before.last - 1) * frame_seconds for before, after in pairwise(tokens)]
    for place, gap in enumerate(gaps, 1):
        if gap >= _PAUSE and _is_between_words(tokens, place, decode):
            yield from _short(tokens[begin:place], gaps[begin : place - 1], decode, frame_seconds)
            begin = place
    if tokens:
        yield from _short(tokens[begin:], gaps[begin:], decode, frame_seconds)


def _short(tokens: Sequence[Token], gaps: Sequence[float], decode: Decode, frame_seconds: float) -> Iterator[list[Token]]:
    """A passage in parts that are not too long, as far as its words allow it."""
    while (tokens[-1].last + 1 - tokens[0].first) * frame_seconds > _LONGEST:
        fitting = [place for place in range(1, len(tokens)) if (tokens[place - 1].last + 1 - tokens[0].first) * frame_seconds <= _LONGEST]
        late = fitting[len(fitting) // 2 :]
        order = [*sorted(late, key=lambda place: -gaps[place - 1]), *reversed(fitting[: len(fitting) // 2])]
        cut = next((place for place in order if _is_between_words(tokens, place, decode)), None)
        if cut is None:
            break
        yield list(tokens[:cut])
        tokens, gaps = tokens[cut:], gaps[cut:]
    yield list(tokens)


def _is_between_words(tokens: Sequence[Token], place: int, decode: Decode) -> bool:
    """Whether the token of this number begins a word."""
    before, both = (single_spaces(decode([one.id for one in tokens[place - 1 : end]])) for end in (place, place + 1))
    if not before or len(both) <= len(before) or not both.startswith(before):
        return not before
    at = len(before) + both[len(before)].isspace()
    return any(one.begin == at for one in units_of(both))


def words_of(
    tokens: Sequence[Token], decode: Decode, level: np.ndarray, *, start: float, end: float, frame_seconds: float, level_seconds: float
) -> list[Word]:
    """The words of a passage. A word is where its tokens were heard; its edges are where the sound between two words is faintest.

    Args:
        tokens: of the passage.
        decode: gives the text of ids.
        level: `loudness` from `start` on, one for each `level_seconds`.
        start, end: where the words are, in seconds. Nothing else was said there.
        frame_seconds: from one frame to the next.
    """
    ids = [one.id for one in tokens]
    text = decode(ids)
    ends = [_common(text, decode(ids[:count])) for count in range(1, len(ids))]
    begins, ends = [0, *ends], [*ends, len(text)]
    units, places, confidences = units_of(text), [], []
    for unit in units:
        # A character may consist of several tokens: all but the last have no text of their own.
        own = [place for place in range(len(ids)) if begins[place] < unit.stop and max(ends[place], begins[place] + 1) > unit.begin]
        spoken = [
            place for place in own if any(map(str.isalnum, text[max(begins[place], unit.begin) : min(ends[place], unit.stop)]))
        ] or own
        confidences.append(math.exp(sum(tokens[place].logprob for place in own) / len(own)))
        places.append((tokens[spoken[0]].first, tokens[spoken[-1]].last))
    words = []
    times = _edges(places, level, start / frame_seconds, frame_seconds / level_seconds)
    for unit, sure, (first, last) in zip(units, confidences, times, strict=True):
        first, last = (min(max(start, start + one * level_seconds), end) for one in (first, last))
        words.append(Word(unit.word, round(first, 3), round(max(first, last), 3), round(sure, 4), round(sure, 4)))
    return words


def _common(text: str, other: str) -> int:
    """Characters with which both begin."""
    return next((place for place, (one, its) in enumerate(zip(text, other, strict=False)) if one != its), min(len(text), len(other)))


def _edges(places: Sequence[tuple[float, float]], level: np.ndarray, start: float, ratio: float) -> list[tuple[float, float]]:
    """Where words begin and end, in values of the level.

    Args:
        places: the first and last frame of each.
        level: how loud it is, from the frame `start` on.
        ratio: values of the level for each frame; even.
    """
    found, latest = [], -1
    for first, last in places:
        # `edges` counts in pairs of values, and words may share a token.
        begin = max(latest + 1, round((first - start) * ratio) // 2)
        latest = max(begin, round((last + 1 - start) * ratio) // 2 - 1)
        found.append(Place(begin, latest, (1,), None))
    level = np.pad(level, (0, max(0, 2 * (latest + 1) - len(level))))
    return edges(level, found)
