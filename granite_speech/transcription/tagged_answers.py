"""Answers of plus checkpoints that have tags: who speaks, or where words end.

`[Speaker 1]:` is before what a speaker says, and `[T:45]` after a word, or after `_`, a silence: it ended at 0.45 s. Only the last three
digits of the centiseconds are written, so that 10.45 s is `[T:45]` too. This is the format of the model card of
granite-speech-4.1-2b-plus; what a model writes may be wrong anywhere.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby, pairwise
from math import ceil, inf
from typing import Self

from granite_speech.transcription.text_units import text_units

__all__ = ["TaggedAnswer", "TaggedWord", "parse_tags"]

_TAG = re.compile(r"\[\s*T\s*:(?P<time>[^\[\]]{0,12})\]|\[\s*Speaker\s+(?P<speaker>[^\[\]]{1,24})\]\s*:?", re.IGNORECASE)
# The beginning of a tag where an answer was cut off.
_CUT_TAG = re.compile(r"\[\s*(?:T(?:\s*:[^\[\]]*)?|S(?:p(?:e(?:a(?:k(?:e(?:r[^\[\]]*)?)?)?)?)?)?)?$", re.IGNORECASE)
_CENTISECONDS = re.compile(r"[0-9]{1,6}(?:\.[0-9]+)?")
_SILENCE = "_"

# In centiseconds.
_PERIOD = 1000  # after which times begin again
_LONGEST = 300  # a word is shorter
_BEYOND = 30  # a time this little after the window's end is taken for it
_CHARACTER = 8  # the usual duration of one
# What is unlikely, in times that are left out as wrong: each centisecond of a word, or of a silence, that is longer than `_LONGEST`.
_WORD_COST, _SILENCE_COST = 1 / 200, 1 / 2000
_LOOK_BACK = 12  # one more than the times in a row that may be wrong
_MOST_CHOICES = 4


@dataclass(frozen=True)
class TaggedWord:
    """A unit of the text, as `text_units` divides it.

    Attributes:
        word: the unit.
        begin, stop: its place: `answer[begin:stop]` is the word.
        start, end: in seconds from the window's beginning; None in an answer without times.
        bridged: whether its times are not from tags, because these are missing or wrong: then they fill the room between others.
        speaker: who says it: "Speaker 1"; None: not known.
        turn: the number of the speaker's turn in the answer.
    """

    word: str
    begin: int
    stop: int
    start: float | None = None
    end: float | None = None
    bridged: bool = False
    speaker: str | None = None
    turn: int = 0


@dataclass(frozen=True)
class TaggedAnswer:
    """An answer, and what its tags say.

    Attributes:
        text: without tags, with single spaces.
        raw_text: as the model wrote it, without space around it; None: with prompt_mode="default", which asks for no tags.
        words: the units of `text`, in order; none with prompt_mode="default".
        has_speakers: whether its tags are those of speakers.
    """

    text: str
    raw_text: str | None = None
    words: tuple[TaggedWord, ...] = ()
    has_speakers: bool = False

    @property
    def turns(self) -> tuple[dict[str, str], ...] | None:
        """With prompt_mode="speaker_attributed", what each speaker says, in order: {"speaker": "Speaker 1", "text": …}. Words before the
        first tag are in none, unless the answer continues the turn of a speaker."""
        if not self.has_speakers:
            return None
        turns = [list(some) for _, some in groupby(self.words, lambda one: one.turn)]
        return tuple({"speaker": some[0].speaker, "text": _joined(some)} for some in turns if some[0].speaker is not None)

    def beginning(self, text: str) -> Self:
        """Without its last words: `text` has the first ones."""
        return replace(self, text=text, words=self.words[: len(list(text_units(text))) if text else 0])

    def end(self, text: str) -> Self:
        """Without its first words: `text` has the last ones."""
        return replace(self, text=text, words=self.words[len(self.words) - len(list(text_units(text))) :] if text else ())


@dataclass
class _Token:
    """What is between two spaces or tags: a word or a silence. Times are in centiseconds from the window's beginning."""

    begin: int
    text: str
    speaker: str | None
    turn: int  # its number in the answer
    written: int | None = None
    end: float | None = None

    @property
    def is_silence(self) -> bool:
        return self.text == _SILENCE


@dataclass(frozen=True)
class _Choice:
    """That the time written after a token is right.

    Attributes:
        place: of the token; -1: before the first.
        time: its end.
        cost: of everything until there.
        before: the choice that it follows.
    """

    place: int
    time: float
    cost: float
    before: "_Choice | None"


def parse_tags(answer: str, prompt_mode: str, seconds: float = inf, prefix: str = "") -> TaggedAnswer:
    """Read the tags of an answer.

    Args:
        answer: as the model wrote it.
        prompt_mode: that of its request.
        seconds: length of the window: no time is after it. inf: any time is possible.
        prefix: the text that the answer continues, with its tags: it tells who was speaking and where the last word ended.

    Returns:
        The text and its words, with speakers, or with times that never go back.
    """
    if prompt_mode == "default":
        return TaggedAnswer(answer.strip())
    before = _tokens(prefix, None)
    tokens = _tokens(answer, before[-1].speaker if before else None)
    first, limit = 0, 100 * seconds
    is_timed = prompt_mode == "word_timestamps"
    if is_timed:
        _choose_ends(before, first, limit)
        first = max((one.end for one in before if one.end is not None), default=0)
        _choose_ends(tokens, first, limit)
    words = _timed(tokens, first, limit) if is_timed else (unit for one in tokens for unit in _units(one))
    words = tuple(words)
    return TaggedAnswer(_joined(words), answer.strip(), words, has_speakers=not is_timed)


def _tokens(answer: str, speaker: str | None) -> list[_Token]:
    """The words and silences of an answer, each with the time that was written after it.

    Args:
        speaker: who was speaking before it.
    """
    cut = _CUT_TAG.search(answer)
    end = len(answer) if cut is None else cut.start()
    tokens: list[_Token] = []
    place, turn, is_new = 0, 0, False  # is_new: a token has come since the last time
    for tag in [*_TAG.finditer(answer, 0, end), None]:
        for word in re.finditer(r"\S+", answer[place : end if tag is None else tag.start()]):
            tokens.append(_Token(place + word.start(), word[0], speaker, turn))
            is_new = True
        if tag is None:
            break
        place = tag.end()
        if tag["speaker"] is not None:
            speaker, turn = f"Speaker {' '.join(tag['speaker'].split())}", turn + 1
            continue
        if not is_new:  # of a silence that was not written
            tokens.append(_Token(place, _SILENCE, speaker, turn))
        is_new = False
        if _CENTISECONDS.fullmatch(tag["time"].strip()):
            tokens[-1].written = round(float(tag["time"]))
    return tokens


def _choose_ends(tokens: list[_Token], first: float, limit: float) -> None:
    """Set the ends of tokens whose times make sense together. A time that is wrong must not move those after it by ten seconds.

    Args:
        first: when the first token begins.
        limit: when the window ends.
    """
    timed = [place for place, one in enumerate(tokens) if one.written is not None]
    words = [0, *accumulate(not one.is_silence for one in tokens)]
    silences = [0, *accumulate(one.is_silence for one in tokens)]

    def cost(begin: int, stop: int, duration: float) -> float:
        """Of tokens[begin:stop] if they take so long together."""
        excess = max(0, duration - _LONGEST * max(1, words[stop] - words[begin]))
        return excess * (_SILENCE_COST if silences[stop] > silences[begin] else _WORD_COST)

    # For each time that was written, the cheapest choices that end with it.
    start = _Choice(-1, first, 0.0, None)
    choices: list[list[_Choice]] = [[start]]
    for number, place in enumerate(timed, 1):
        found: dict[float, _Choice] = {}
        for earlier in range(max(0, number - _LOOK_BACK), number):
            for one in choices[earlier]:
                time = _next_time(tokens[place].written, one.time)
                total = one.cost + number - earlier - 1 + cost(one.place + 1, place + 1, time - one.time)
                if time <= limit + _BEYOND and (time not in found or total < found[time].cost):
                    found[time] = _Choice(place, time, total, one)
        choices.append(sorted(found.values(), key=lambda one: one.cost)[:_MOST_CHOICES])
    ends = [(one.cost + len(timed) - number, one) for number, some in enumerate(choices) for one in some]
    best = min(ends, key=lambda pair: pair[0])[1]
    while best is not start:
        tokens[best.place].end = min(best.time, limit)
        best = best.before


def _next_time(written: int, after: float) -> float:
    """The first time from `after` on that is written like this; inf if there is none."""
    if written >= _PERIOD:  # the digits that are usually left out
        return written if written >= after else inf
    return written + _PERIOD * max(0, ceil((after - written) / _PERIOD))


def _timed(tokens: list[_Token], first: float, limit: float) -> Iterator[TaggedWord]:
    """The units of words. Tokens without an end share the room until the next end, in proportion to their lengths."""
    begin, place = first, 0
    while place < len(tokens):
        stop = next((at for at in range(place, len(tokens)) if tokens[at].end is not None), None)
        some = tokens[place : len(tokens) if stop is None else stop + 1]
        length = sum(len(one.text) for one in some)
        end = min(limit, begin + _CHARACTER * length) if stop is None else tokens[stop].end
        is_bridged = stop is None or len(some) > 1
        done = 0
        for one in some:
            units = list(_units(one))
            for unit in units:
                at = done + unit.begin - one.begin
                times = [round((begin + (end - begin) * part / length) / 100, 3) for part in (at, at + len(unit.word))]
                yield replace(unit, start=times[0], end=times[1], bridged=is_bridged or len(units) > 1)
            done += len(one.text)
        begin, place = end, place + len(some)


def _units(token: _Token) -> Iterator[TaggedWord]:
    if token.is_silence:
        return
    place = token.begin
    for _, unit in text_units(token.text):
        yield TaggedWord(unit, place, place + len(unit), speaker=token.speaker, turn=token.turn)
        place += len(unit)


def _joined(words: Sequence[TaggedWord]) -> str:
    """Words with a space between them if the answer has something there: a space or a tag."""
    spaces = ["", *(" " if before.stop < after.begin else "" for before, after in pairwise(words))]
    return "".join(space + one.word for space, one in zip(spaces, words, strict=False))
