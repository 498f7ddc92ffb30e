"""Where each word of a text is in the frames of its audio: forced alignment with the encoder's CTC head.

The labels of the head are characters, by code point, and 0 is the blank. The alignment is the likeliest path through the frames on which
the letters of the text follow each other (Kürzinger et al., arXiv 2007.09127). Case and accents do not matter: a letter may be any of its
variants. What is not a letter of the text, such as a space or a comma, counts as a blank.

A word that the labels cannot spell, such as "42" or one in another script, is bridged: a wildcard takes its place on the path, and it gets
the frames between its neighbours in which the head hears something.
"""

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import torch
from torch import Tensor

from granite_speech.transcription.viterbi import best_path

__all__ = ["Place", "align"]

# Labels from 256 on are not code points in the heads of 4.x, which have 348: Katakana, in an order that is not published.
_KATAKANA_HEAD, _LATIN = 348, 256
_SPACE = ord(" ")
# The least probability that counts, so that a letter which the head does not hear anywhere costs a path no more than that.
_FLOOR = 1e-4
# A digit or a sign may be a label that the head was never trained to give. It is spelled if some frame has it with this probability.
_EVER_HEARD = 0.1
# A frame that is neither blank nor space, with this probability, is speech.
_HEARD = 0.5
_SPOKEN_SIGNS = frozenset("%&@#")
_LIGATURES = {"œ": "oe", "Œ": "OE"}


@dataclass(frozen=True)
class Place:
    """Where a word is, or several words that are bridged together.

    Attributes:
        first, last: the frames of its first and last letter.
        words: how many words.
        weights: for each, how much of the time it takes: its number of letters; 0 for punctuation alone.
        confidence: the geometric mean of the letters' probabilities; None: the words are bridged.
    """

    first: int
    last: int
    words: int
    weights: tuple[int, ...]
    confidence: float | None


def align(log_probabilities: Tensor, words: Sequence[str]) -> list[Place]:
    """Places of words, in order. Every word is in exactly one.

    Args:
        log_probabilities: of the CTC head, `(frames, labels)` float32 on the CPU.
        words: of the text. Any text will do: if the letters do not fit into the frames, all words are bridged.
    """
    if not words or not len(log_probabilities):
        return [Place(0, 0, len(words), tuple(map(_weight, words)), None)] if words else []
    probabilities = log_probabilities.exp()
    spelled = [_spelled(word, probabilities) for word in words]
    runs = [(len(list(members)), letters) for letters, members in _runs(spelled)]
    targets = [target for _, letters in runs for target in ([()] if letters is None else letters)]
    path = _path(probabilities, targets)
    if path is None:
        runs, path = [(len(words), None)], [(0, len(probabilities) - 1)]
    return list(_places(words, runs, path, probabilities))


def _runs(spelled: Sequence[list[tuple[int, ...]] | None]) -> Iterator[tuple[list[tuple[int, ...]] | None, Iterator]]:
    """Each word that is spelled, together with punctuation after it, and neighbours that are not."""
    number, before, keys = 0, object(), []
    for letters in spelled:
        begins = (letters != [] and not (letters is None and before is None)) or not keys
        number, before = number + begins, letters if begins else before
        keys.append((number, None if before == [] else before))
    return ((key[1], members) for key, members in groupby(keys))


def _places(words, runs, path, probabilities) -> Iterator[Place]:
    at = word = 0
    for count, letters in runs:
        own = path[at : at + (1 if letters is None else len(letters))]
        after = path[at + len(own)][0] if at + len(own) < len(path) else len(probabilities)
        weights = tuple(map(_weight, words[word : word + count]))
        if letters is None:
            before = path[at - 1][1] if at else -1
            yield Place(*_heard(probabilities, before + 1, after), count, weights, None)
        else:
            best = [probabilities[first : last + 1, labels].sum(1).max() for (first, last), labels in zip(own, letters, strict=True)]
            confidence = torch.stack(best).clamp(_FLOOR, 1.0).log().mean().exp().item()
            yield Place(own[0][0], own[-1][1], count, weights, confidence)
        at, word = at + len(own), word + count


def _heard(probabilities: Tensor, begin: int, end: int) -> tuple[int, int]:
    """The first and last frame between two words in which the head hears something; all of them if it hears nothing."""
    if begin >= end:
        return max(begin - 1, 0), max(begin - 1, 0)
    part = probabilities[begin:end]
    quiet = part[:, 0] + (part[:, _SPACE] if part.shape[1] > _SPACE else 0)
    heard = (quiet < 1 - _HEARD).nonzero()
    return (begin, end - 1) if not len(heard) else (begin + int(heard[0]), begin + int(heard[-1]))


def _path(probabilities: Tensor, targets: Sequence[tuple[int, ...]]) -> list[tuple[int, int]] | None:
    """The first and last frame of each target; None if there are not enough frames. A target without labels is a wildcard."""
    columns = {labels: number for number, labels in enumerate(dict.fromkeys(targets), 1)}
    emissions = probabilities.new_ones(len(probabilities), 1 + len(columns))
    other = torch.ones(probabilities.shape[1], dtype=torch.bool)
    other[list(_letters(_limit(probabilities)))] = False
    for labels, number in columns.items():
        if labels:
            emissions[:, number] = probabilities[:, labels].sum(1)
            other[list(labels)] = False
    emissions[:, 0] = probabilities[:, other].sum(1)
    return best_path(emissions.clamp(_FLOOR, 1.0).log(), [columns[one] for one in targets])


def _spelled(word: str, probabilities: Tensor) -> list[tuple[int, ...]] | None:
    """The labels that each letter of a word may have; none for punctuation alone. None: a part of it has no label."""
    letters = []
    for character in unicodedata.normalize("NFKC", "".join(_LIGATURES.get(one, one) for one in word)):
        if not _is_spoken(character):
            continue
        labels = _labels(character, _limit(probabilities))
        if not labels or (not character.isalpha() and probabilities[:, labels].sum(1).max() < _EVER_HEARD):
            return None
        letters.append(labels)
    return letters


def _is_spoken(character: str) -> bool:
    return character.isalnum() or character in _SPOKEN_SIGNS or unicodedata.category(character)[0] == "S"


def _weight(word: str) -> int:
    return sum(map(_is_spoken, word))


def _limit(probabilities: Tensor) -> int:
    """The labels below this are code points."""
    return _LATIN if probabilities.shape[1] == _KATAKANA_HEAD else probabilities.shape[1]


@lru_cache(4096)
def _labels(character: str, limit: int) -> tuple[int, ...]:
    """The code points of a character's variants that are labels."""
    base = "".join(one for one in unicodedata.normalize("NFD", character) if not unicodedata.combining(one))
    variants = {one for form in (character, base) for one in (form, form.lower(), form.upper()) if len(one) == 1}
    return tuple(sorted(ord(one) for one in variants if 0 < ord(one) < limit))


@lru_cache(8)
def _letters(limit: int) -> tuple[int, ...]:
    return tuple(code for code in range(1, limit) if chr(code).isalpha())
