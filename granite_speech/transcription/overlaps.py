"""Two windows that overlap have some words in common: which are they?

Where they overlap, both texts should be the same, but a word at the edge of a window may be cut in two, so the last words of one text and
the first ones of the other are not trusted. Time decides what texts cannot: "five five" may be one word that both windows have.
"""

from collections.abc import Sequence
from difflib import SequenceMatcher
from itertools import product

from granite_speech.transcription.text_units import single_spaces

__all__ = ["join"]

_UNTRUSTED = 2  # words at each edge
_PENALTY = 0.45  # for leaving one out, in equal words
_ALIKE = 0.6  # SequenceMatcher's ratio of a word and a part of it, or what a model makes of a part


def join(before: str, after: str, *, overlap: float, before_seconds: float, after_seconds: float) -> tuple[str, str]:
    """Two texts without the words that are in both because their windows overlap.

    Case and punctuation do not matter. The words of the first text are kept, except for the last ones if they were cut off.

    Args:
        before, after: the texts of two consecutive windows.
        overlap: seconds that both windows have.
        before_seconds, after_seconds: the lengths of the windows, from which the words' durations are estimated.
    """
    if overlap <= 0 or not before.strip() or not after.strip():
        return before, after
    ours, theirs = (single_spaces(text).split(" ") for text in (before, after))
    left, right = [_plain(word) for word in ours], [_plain(word) for word in theirs]
    expected = _mean(_words_in(overlap, left[::-1], before_seconds), _words_in(overlap, right, after_seconds))
    ends, begins = _common(left, right, expected)
    return " ".join(ours[: len(ours) - ends]), " ".join(theirs[begins:])


def _common(left: Sequence[str], right: Sequence[str], expected: float) -> tuple[int, int]:
    """How many words to remove from the end of `left`, and from the beginning of `right`.

    Args:
        expected: about how many words both should have.
    """
    most = int(expected) + 2  # words are not equally long
    best, removal = 0.0, None
    for ends, begins in product(range(_UNTRUSTED + 1), repeat=2):
        sizes = range(1, min(len(left) - ends, len(right) - begins, most - max(ends, begins)) + 1)
        same = [size for size in sizes if left[len(left) - ends - size : len(left) - ends] == right[begins : begins + size]]
        if same:
            size = min(same, key=lambda size: (abs(size + max(ends, begins) - expected), -size))
            score = size - _PENALTY * (ends + begins)
            if score > best:
                best, removal = score, (ends, begins + size)
    if removal is not None:
        return removal
    if SequenceMatcher(None, left[-1], right[0], autojunk=False).ratio() >= _ALIKE:
        return (1, 0) if len(left[-1]) <= len(right[0]) else (0, 1)
    return 0, min(int(expected), len(right))  # a word that is whole in both windows, so one of the two is wrong


def _words_in(seconds: float, words: Sequence[str], duration: float) -> float:
    """About how many of the first words take that long, if each takes as long as its share of the letters."""
    letter = duration / sum(len(word) + 1 for word in words)
    count = 0.0
    for word in words:
        length = (len(word) + 1) * letter
        if seconds <= length:
            return count + seconds / length
        count, seconds = count + 1, seconds - length
    return count


def _mean(one: float, other: float) -> float:
    return (one + other) / 2


def _plain(word: str) -> str:
    """Without case and punctuation; a word of punctuation alone is unchanged."""
    return "".join(letter for letter in word.casefold() if letter.isalnum()) or word
