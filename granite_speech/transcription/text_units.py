"""Where a text may be divided: between words, and in scripts without spaces between characters."""

import re
import unicodedata
from collections.abc import Iterator
from itertools import pairwise

__all__ = ["text_units"]

# Thai to Lao, Burmese, Khmer, Chinese and Japanese: scripts without spaces between words. Korean has them.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u30ff\u31f0-\u31ff\u3400-\u9fff\uf900-\ufaff\uff00-\uff9f\U00020000-\U0003ffff]"
)
# Where they do not allow a new line: before marks, closing punctuation and small kana, and after opening brackets.
_MARKS = {"Mn", "Mc", "Me", "Cf", "Zs"}
_NOT_FIRST = _MARKS | {"Pe", "Pf", "Po", "Lm", "Sk"}
_NOT_LAST = {"Ps", "Pi", "Zs"}
_SMALL_KANA = frozenset("ぁぃぅぇぉっゃゅょゎァィゥェォッャュョヮ")


def text_units(text: str, width: int | None = None) -> Iterator[tuple[str, str]]:
    """The words of a text, and in scripts without spaces what a line break may not divide.

    Args:
        text: in one line, with single spaces.
        width: divide longer units of scripts without spaces between any two characters; None: do not.

    Yields:
        The space that separates a unit from the one before it, or "", and the unit.
    """
    for word in text.split(" "):
        space = " "
        for unit in _characters(word, _NOT_FIRST, _NOT_LAST) if _UNSPACED.search(word) else [word]:
            too_long = width is not None and len(unit) > width and _UNSPACED.search(unit)
            for piece in _characters(unit, _MARKS, set()) if too_long else [unit]:
                yield space, piece
                space = ""


def _characters(word: str, not_first: set[str], not_last: set[str]) -> list[str]:
    """Divide a word beside each character of a script without spaces, except before and after certain categories of characters."""
    pieces = [word[0]]
    for before, after in pairwise(word):
        kept = unicodedata.category(after) in not_first or unicodedata.category(before) in not_last
        kept = kept or (not_last and after in _SMALL_KANA) or not (_UNSPACED.match(before) or _UNSPACED.match(after))
        if kept:
            pieces[-1] += after
        else:
            pieces.append(after)
    return pieces
