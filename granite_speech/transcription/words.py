"""The words of a window's answer: when each was said, and how sure the encoder and the language model are of it."""

import math
from codecs import getincrementaldecoder
from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np
from torch import Tensor

from granite_speech.engine.handle import Answer
from granite_speech.generation.token_bytes import TokenBytes
from granite_speech.transcription.alignment import align
from granite_speech.transcription.tagged_answers import TaggedAnswer, TaggedWord
from granite_speech.transcription.text_units import single_spaces, text_units
from granite_speech.transcription.transcript import Word
from granite_speech.transcription.word_edges import edges

__all__ = ["aligned_words", "language_model_confidences", "tagged_words", "units_of"]


def aligned_words(
    answer: Answer,
    tagged: TaggedAnswer,
    pieces: TokenBytes,
    *,
    level: Tensor,
    frame_seconds: float,
    start: float,
    end: float,
    prefix: str = "",
) -> list[Word]:
    """The words of a window, with times by alignment with the CTC head.

    Args:
        answer: of the window, with `ctc_logprobs`.
        tagged: its text and tags.
        pieces: of the model's tokenizer.
        level: `loudness` of the window's features, one for each `frame_seconds`.
        start, end: of the window, in seconds. No word is beyond its end, as the level is, by a frame.
        prefix: text that was said in the window before the answer's, which continues it.
    """
    units = units_of(answer.text) if tagged.raw_text is None else tagged.words
    if not units:
        return []
    before = [unit for _, unit in text_units(single_spaces(prefix)) if unit]
    places = align(answer.ctc_logprobs, before + [one.word for one in units])
    times, acoustic = [], []
    for place, (first, last) in zip(places, edges(level.numpy(), places), strict=True):
        total = max(sum(place.weights), 1)
        shares = [first + (last - first) * part / total for part in accumulate(place.weights, initial=0)]
        # Of words without letters, punctuation has its place, and the rest shares the time equally.
        times += pairwise(shares) if sum(place.weights) else pairwise(np.linspace(first, last, len(place.weights) + 1).tolist())
        acoustic += [place.confidence if weight else None for weight in place.weights]
    linguistic = language_model_confidences(answer, [(one.begin, one.stop) for one in units], pieces)
    words = []
    for one, frames, ctc, lm in zip(units, times[len(before) :], acoustic[len(before) :], linguistic, strict=True):
        first, last = (min(start + frame * frame_seconds, end) for frame in frames)
        words.append(_word(one, first, last, ctc, lm, bridged=ctc is None))
    return words


def tagged_words(answer: Answer, tagged: TaggedAnswer, pieces: TokenBytes, *, start: float) -> list[Word]:
    """The words of a window whose times the model has written into its answer, with prompt_mode="word_timestamps".

    Arguments are those of `aligned_words`.
    """
    linguistic = language_model_confidences(answer, [(one.begin, one.stop) for one in tagged.words], pieces)
    return [_word(one, start + one.start, start + one.end, None, lm, one.bridged) for one, lm in zip(tagged.words, linguistic, strict=True)]


def language_model_confidences(answer: Answer, places: Sequence[tuple[int, int]], pieces: TokenBytes) -> list[float | None]:
    """The language model's probability of parts of an answer: the product of those of the tokens that they consist of.

    A token of space alone belongs to what follows it, and one with letters of several parts to each of them. One between two parts, such
    as a tag, belongs to neither.

    Args:
        answer: its text, tokens and their log-probabilities.
        places: begin and end of each part in the answer's text, in order.
        pieces: of the model's tokenizer.

    Returns:
        One for each part; None if the tokenizer's tokens are not the bytes of its text.
    """
    shown = [(pieces[token], logprob) for token, logprob in zip(answer.token_ids, answer.logprobs, strict=True) if pieces.is_shown(token)]
    decoder = getincrementaldecoder("utf-8")("replace")
    sums, part, text = [0.0] * len(places), 0, ""
    for number, (piece, logprob) in enumerate(shown, 1):
        begin = len(text)
        text += decoder.decode(piece, final=number == len(shown))
        # A character that is not complete belongs to all its tokens.
        end = len(text) + bool(decoder.getstate()[0])
        while part < len(places) and places[part][1] <= begin:
            part += 1
        for which in range(part, len(places)):
            first = places[which][0]
            if first >= end and (which > part or answer.text[begin:first].strip()):
                break
            sums[which] += logprob
    return [math.exp(one) for one in sums] if text == answer.text else [None] * len(places)


def units_of(text: str) -> list[TaggedWord]:
    """The units of an answer without tags."""
    units, place = [], 0
    for _, unit in text_units(single_spaces(text)):
        if unit:
            place = text.index(unit, place)
            units.append(TaggedWord(unit, place, place + len(unit)))
            place += len(unit)
    return units


def _word(unit: TaggedWord, begin: float, end: float, ctc: float | None, lm: float | None, bridged: bool) -> Word:
    known = [one for one in (ctc, lm) if one is not None]
    confidence = math.prod(known) ** (1 / len(known)) if known else 0.0
    rounded = [None if one is None else round(one, 4) for one in (confidence, ctc, lm)]
    return Word(unit.word, round(begin, 3), round(max(begin, end), 3), *rounded, speaker=unit.speaker, bridged=bridged)
