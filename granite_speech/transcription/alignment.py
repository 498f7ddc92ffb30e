"""Where each word of a text is in the frames of its audio: forced alignment with the encoder's CTC head.

The labels of the head are characters, by code point, and 0 is the blank. The alignment is the likeliest path through the frames on which
the letters of the text follow each other (Kürzinger et al., arXiv 2007.09127). Case and accents do not matter: a letter may be any of its
variants. What is not a letter of the text, such as a space or a comma, counts as a blank.

A word that the labels cannot spell, such as "42" or one in another script, is bridged: a wildcard takes its place on the path, and it gets
the frames between its neighbours in which the head hears something.
"""

import math
import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from torch import Tensor

from granite_speech.transcription.viterbi import best_path

__all__ = ["Place", "align"]

Labels = tuple[int, ...]  # those that a letter may have
_WILDCARD: Labels = ()

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
        weights: for each of the words, how much of the time it takes: its number of letters; 0 for punctuation alone.
        confidence: the geometric mean of the letters' probabilities; None: the words are bridged.
    """

    first: int
    last: int
    weights: tuple[int, ...]
    confidence: float | None


def align(log_probabilities: Tensor, words: Sequence[str]) -> list[Place]:
    """Places of words, in order. Every word is in exactly one.

    Args:
        log_probabilities: of the CTC head, `(frames, labels)` float32 on the CPU, at least one frame.
        words: of the text. Any text will do: if the letters do not fit into the frames, all words are bridged.
    """
    if not words:
        return []
    probabilities = np.exp(log_probabilities.numpy())
    groups = _groups([_spelled(word, probabilities) for word in words])
    targets = [target for _, letters in groups for target in (letters or [_WILDCARD])]
    columns = {labels: number for number, labels in enumerate(dict.fromkeys(targets), 1)}
    emissions = _emissions(probabilities, columns)
    path = best_path(emissions, [columns[one] for one in targets])
    if path is None:
        groups, targets, path = [(len(words), None)], [targets[0]], [(0, len(probabilities) - 1)]
    best = _best(emissions, path, [columns[one] for one in targets])
    places, at, word = [], 0, 0
    for count, letters in groups:
        own = path[at : at + len(letters or [_WILDCARD])]
        if letters:
            first, last, confidence = own[0][0], own[-1][1], math.exp(best[at : at + len(own)].sum() / len(own))
        else:
            begin = path[at - 1][1] + 1 if at else 0
            end = path[at + 1][0] if at + 1 < len(path) else len(probabilities)
            first, last, confidence = *_heard(probabilities, begin, end), None
        places.append(Place(first, last, tuple(map(_weight, words[word : word + count])), confidence))
        at, word = at + len(own), word + count
    return places


def _groups(spelled: Sequence[list[Labels] | None]) -> list[tuple[int, list[Labels] | None]]:
    """How many words go together, and their letters: a word that is spelled, with punctuation around it, or neighbours that are not."""
    groups: list[tuple[int, list[Labels] | None]] = []
    for letters in spelled:
        count, before = groups[-1] if groups else (0, None)
        if groups and (letters == [] or before == [] or (letters is None and before is None)):
            groups[-1] = count + 1, letters if before == [] else before
        else:
            groups.append((1, letters))
    return [(count, letters or None) for count, letters in groups]


def _emissions(probabilities: np.ndarray, columns: Mapping[Labels, int]) -> np.ndarray:
    """`(frames, 1 + columns)` logarithms: of the blank, which stands for everything but letters, and of each column's labels together."""
    members = np.zeros((probabilities.shape[1], 1 + len(columns)), np.float32)
    members[:, 0] = 1
    members[list(_letters(_limit(probabilities))), 0] = 0
    for labels, number in columns.items():
        members[list(labels), 0] = 0
        members[list(labels), number] = 1
    emissions = probabilities @ members
    emissions[:, columns.get(_WILDCARD, [])] = 1
    return np.log(emissions.clip(_FLOOR, 1))


def _best(emissions: np.ndarray, path: Sequence[tuple[int, int]], targets: Sequence[int]) -> np.ndarray:
    """The largest emission of each target in its frames."""
    lengths = [last + 1 - first for first, last in path]
    begins = np.cumsum([0, *lengths[:-1]])
    frames = np.arange(sum(lengths)) + np.repeat([first for first, _ in path] - begins, lengths)
    return np.maximum.reduceat(emissions[frames, np.repeat(targets, lengths)], begins)


def _heard(probabilities: np.ndarray, begin: int, end: int) -> tuple[int, int]:
    """The first and last frame between two words in which the head hears something; all of them if it hears nothing."""
    part = probabilities[begin:end]
    quiet = part[:, 0] + (part[:, _SPACE] if part.shape[1] > _SPACE else 0)
    heard = np.flatnonzero(quiet < 1 - _HEARD)
    return (begin + int(heard[0]), begin + int(heard[-1])) if len(heard) else (begin, end - 1)


def _spelled(word: str, probabilities: np.ndarray) -> list[Labels] | None:
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


def _limit(probabilities: np.ndarray) -> int:
    """The labels below this are code points."""
    return _LATIN if probabilities.shape[1] == _KATAKANA_HEAD else probabilities.shape[1]


def _labels(character: str, limit: int) -> Labels:
    """The labels that are variants of a character."""
    return _variants(limit).get(_base(character), ())


@lru_cache(8)
def _variants(limit: int) -> dict[str, Labels]:
    """The labels, by what is left of them without case and accents."""
    found = defaultdict(list)
    for code in range(1, limit):
        found[_base(chr(code))].append(code)
    return {base: tuple(codes) for base, codes in found.items()}


@lru_cache(4096)
def _base(character: str) -> str:
    return "".join(one for one in unicodedata.normalize("NFD", character.lower()) if not unicodedata.combining(one))


@lru_cache(8)
def _letters(limit: int) -> tuple[int, ...]:
    return tuple(code for code in range(1, limit) if chr(code).isalpha())
