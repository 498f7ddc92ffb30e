"""Where a text may be divided: between words, and in scripts without spaces between characters."""

import re
import unicodedata
from collections.abc import Iterator
from itertools import pairwise

__all__ = ["single_spaces", "text_units"]

_WHITE_SPACE = re.compile(r"\s+")
_NO_BREAK_SPACES = re.compile("[\u00a0\u2007\u202f]+")

# Thai to Lao, Burmese, Khmer, Chinese and Japanese: scripts without spaces between words. Korean has them.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u30ff\u31f0-\u31ff\u3400-\u9fff\uf900-\ufaff\uff00-\uff9f\U00020000-\U0003ffff]"
)
# Where they do not allow a new line: before marks, closing punctuation and small kana, and after opening brackets.
_SPACES = {"Zs"}  # those that allow no line break; the others are single spaces
_MARKS = {"Mn", "Mc", "Me", "Cf"} | _SPACES
_NOT_FIRST = _MARKS | {"Pe", "Pf", "Po", "Lm", "Sk"}
_NOT_LAST = {"Ps", "Pi"} | _SPACES
_SMALL_KANA = frozenset("ぁぃぅぇぉっゃゅょゎァィゥェォッャュョヮ")


def single_spaces(text: str) -> str:
    """The text in one line, with single spaces. No-break spaces stay, as in French before a colon: they are inside a word."""
    return _WHITE_SPACE.sub(lambda found: found[0] if _NO_BREAK_SPACES.fullmatch(found[0]) else " ", text).strip()


def text_units(text: str, width: int | None = None) -> Iterator[tuple[str, str]]:
    """The words of a text, and in scripts without spaces what a line break may not divide.

    Args:
        text: in one line, with single spaces, as `single_spaces` makes it.
        width: divide longer units of scripts without spaces between any two characters; None: do not.

    Yields:
        The space that separates a unit from the one before it, or "", and the unit.
    """
    for word in text.split(" "):
        space = " "
        for unit in _characters(word) if _UNSPACED.search(word) else [word]:
            too_long = width is not None and len(unit) > width and _UNSPACED.search(unit)
            for piece in _characters(unit, forced=True) if too_long else [unit]:
                yield space, piece
                space = ""


def _characters(word: str, forced: bool = False) -> list[str]:
    """Divide a word beside each character of a script without spaces, except where the script allows no new line.

    Args:
        word: of at least one character.
        forced: divide it even there, except before marks and beside no-break spaces.
    """
    not_first, not_last = (_MARKS, _SPACES) if forced else (_NOT_FIRST, _NOT_LAST)
    pieces = [word[0]]
    for before, after in pairwise(word):
        kept = unicodedata.category(after) in not_first or unicodedata.category(before) in not_last
        kept = kept or (after in _SMALL_KANA and not forced) or not (_UNSPACED.match(before) or _UNSPACED.match(after))
        if kept:
            pieces[-1] += after
        else:
            pieces.append(after)
    return pieces
