"""From the blocks of a recording to windows of speech, each short enough for a model. Silence is in none of them.

Windows end in pauses. Speech without a pause for longer than the limit is cut where it is faintest, and there the two windows overlap,
because the cut may go through a word: `overlaps.join` removes the words that both have.

Positions are counted in the detector's frames of 10 ms, from the beginning of the recording or of its span.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from granite_speech.transcription.options import SHORTEST_WINDOW
from granite_speech.transcription.silero import SileroDetector
from granite_speech.transcription.speech import FRAMES_PER_SECOND, HOP, RATE, Activity, EnergyDetector

__all__ = ["Window", "Windows", "halves"]

_DETECTORS = {"energy": EnergyDetector, "vad": EnergyDetector, "silero": SileroDetector, "fixed": EnergyDetector}

# In frames.
_CLOSURE = 20  # the silence inside a word before p, t or k is shorter
_SHORTEST_SPEECH = 9  # a click is shorter
# Shares of the limit. A model that was trained on short clips does not know silence, neither around speech nor in it: pauses of 0.6 s,
# joined, cost the bundled checkpoint 2 % of its words, and margins of 0.1 s 1 %. One that was trained on long recordings knows both.
_MARGIN, _PAUSE = 1 / 300, 1 / 20
_LONGEST_MARGIN, _LONGEST_PAUSE = 20, 150
_NEAR = 15  # speech this soon after a cut is the rest of a passage, however short
_CUT_SMOOTHING = 5
_CLEAR = 0.4  # a dip to this part of the usual level, in dB above the floor, is a pause
_DEEP = 10  # and at least this much fainter: a voice without pauses is its own floor
_SHARED = 100  # of two windows that are cut apart in speech; a quarter of a short limit
_LONGEST_SILENCE = 200  # in a recording that is passed whole
_PIECE = 2 * RATE  # samples that go through a detector at once


@dataclass(frozen=True)
class Window:
    """A part of a recording.

    Attributes:
        start, end: in seconds from the beginning of the recording.
        samples: `(samples,)` float32, 16 kHz, in memory of its own.
        overlap: seconds at its beginning that the window before it has too.
    """

    start: float
    end: float
    samples: Tensor
    overlap: float = 0.0


class Windows:
    """The windows of one recording, in order, as its blocks arrive. Memory does not grow with the length of the recording.

    A recording of at most `limit` that has speech, and no silence longer than 2 s, is one window, with every sample.

    Args:
        blocks: the recording's consecutive samples, each `(samples,)` float32 at 16 kHz on the CPU, of any length.
        limit: the longest window, in seconds.
        segmentation: "energy" and "vad" cut where `EnergyDetector` finds no speech; "silero" where silero-vad finds none; "fixed" every
            `limit` seconds, and omits windows without speech; "blocks" every `limit - overlap` seconds, whatever is there.
        overlap: seconds that consecutive windows share if segmentation is "fixed" or "blocks".
        spans: the parts of the recording to use, as (begin, end) in seconds, in order; an end of None is the recording's. None: all.

    Attributes:
        duration: seconds read so far. What follows the last span is not read.

    Options are those of `TranscribeOptions`, which checks them.

    Raises:
        MissingDependencyError: silero-vad is not installed.
        Whatever reading the blocks raises; the windows before that have been returned.
    """

    def __init__(
        self,
        blocks: Iterable[Tensor],
        *,
        limit: float,
        segmentation: str = "energy",
        overlap: float = 0.0,
        spans: Sequence[tuple[float, float | None]] | None = None,
    ):
        self._detector = _DETECTORS.get(segmentation)
        self._limit, self._overlap = _samples(limit), _samples(overlap)
        self._fixed = segmentation == "fixed"
        self._spans = [(0, None)] if spans is None else [(_samples(begin), None if end is None else _samples(end)) for begin, end in spans]
        self._reader = _Reader(blocks)
        self._windows = self._all()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Window:
        return next(self._windows)

    @property
    def duration(self) -> float:
        return self._reader.position / RATE

    def _all(self) -> Iterator[Window]:
        for begin, end in self._spans:
            pieces = self._reader.read(begin, end)
            if self._detector is None:
                yield from self._in_blocks(pieces, begin)
            else:
                yield from self._of_span(_View(pieces, self._detector(), begin))
            if self._reader.failure is not None:
                raise self._reader.failure

    def _of_span(self, view: "_View") -> Iterator[Window]:
        view.read_to(self._limit // HOP + 1)
        if view.ended and view.count <= self._limit and _longest_silence(view.activity) <= _LONGEST_SILENCE:
            return iter([view.window(0, view.count)])
        return self._in_steps(view) if self._fixed else self._in_pauses(view)

    def _in_blocks(self, pieces: Iterator[Tensor], offset: int) -> Iterator[Window]:
        """Windows at equal distances that leave nothing out. The last one is as long as the rest."""
        samples, begin, overlap = torch.zeros(0), 0, 0
        while True:
            read = [samples]
            while sum(map(len, read)) <= self._limit and (piece := next(pieces, None)) is not None:
                read.append(piece)
            samples = torch.cat(read)
            is_last = len(samples) <= self._limit
            own = samples[: self._limit].clone()
            if len(own):
                yield Window((offset + begin) / RATE, (offset + begin + len(own)) / RATE, own, overlap / RATE)
            if is_last:
                return
            step, overlap = self._limit - self._overlap, self._overlap
            samples, begin = samples[step:], begin + step

    def _in_steps(self, view: "_View") -> Iterator[Window]:
        """Windows at equal distances."""
        begin, known = 0, 0
        while not view.ended or begin < view.count:
            view.read_to(-(-(begin + self._limit) // HOP))
            end = min(begin + self._limit, view.count)
            view.drop(begin // HOP)
            if len(_speech(view.activity[: -(-end // HOP) - view.first], False)):
                yield view.window(begin, end, overlap=known - begin if known > begin else 0)
                known = end
            if view.ended and end == view.count:
                break
            begin += self._limit - self._overlap

    def _in_pauses(self, view: "_View") -> Iterator[Window]:
        """Windows that begin and end in pauses, if there are any."""
        rules = _Rules.of(self._limit // HOP)
        at, overlap, inside = 0, 0, False  # inside: the window before was cut off in speech
        while True:
            view.read_to(at + rules.needed)
            view.drop(at)
            activity = view.activity[: rules.needed]
            speech, last = _speech(activity, inside), view.ended and len(activity) == len(view.activity)
            if len(speech) and speech[0, 0] <= (_NEAR if inside else rules.margin):
                cut = _cut(activity, speech, rules)
                yield view.window(at * HOP, min((at + cut.end) * HOP, view.count), overlap * HOP)
                at, overlap, inside = at + cut.next, cut.end - cut.next, cut.inside
                continue
            if len(speech):
                at += int(speech[0, 0]) - rules.margin
            elif last:
                return
            else:
                at += len(activity) - FRAMES_PER_SECOND  # what begins here may turn out to be speech
            overlap, inside = 0, False


@dataclass(frozen=True)
class _Rules:
    """What windows are like, in frames.

    Attributes:
        limit: the longest.
        margin: kept before and after speech.
        pause: speech on both sides of a shorter one belongs together.
    """

    limit: int
    margin: int
    pause: int

    @classmethod
    def of(cls, limit: int) -> Self:
        return cls(limit, min(round(limit * _MARGIN), _LONGEST_MARGIN), max(_CLOSURE, min(round(limit * _PAUSE), _LONGEST_PAUSE)))

    @property
    def needed(self) -> int:
        """How far to look ahead: a window, a pause, and what tells speech from a click after it."""
        return self.limit + self.pause + FRAMES_PER_SECOND


@dataclass(frozen=True)
class _Cut:
    """Where a window ends and the next one may begin, in frames from the beginning of the window; and whether that is in speech."""

    end: int
    next: int
    inside: bool


def _cut(activity: Activity, speech: np.ndarray, rules: _Rules) -> _Cut:
    """Where to end a window.

    Args:
        activity: from the window's beginning, and for longer than a window and a pause, unless the recording ends before.
        speech: `(passages, 2)` where there is speech in it.
    """
    pauses = np.append(speech[1:, 0], len(activity)) - speech[:, 1]
    # At the end of the recording there is nothing to leave a part of the pause to.
    ends = speech[:, 1] + np.minimum(rules.margin, np.append(pauses[:-1] // 2, pauses[-1]))
    count = int(np.argmax(np.append(pauses[:-1] >= rules.pause, True))) + 1
    if ends[count - 1] <= rules.limit:
        return _Cut(int(ends[count - 1]), int(ends[count - 1]), False)
    places = np.flatnonzero(ends[: count - 1] <= rules.limit)
    if len(places):
        late = places[ends[places] >= rules.limit // 2]
        places = late if len(late) else places
        end = int(ends[places[::-1][np.argmax(pauses[places][::-1])]])
        return _Cut(end, end, False)
    return _cut_in_speech(activity.level, rules.limit)


def _cut_in_speech(level: np.ndarray, limit: int) -> _Cut:
    smooth = np.convolve(level, np.full(_CUT_SMOOTHING, 1 / _CUT_SMOOTHING), "same")
    lowest = limit // 2
    at = lowest + int(np.argmin(smooth[lowest:limit]))
    usual = float(np.median(level[:limit]))
    if smooth[at] < min(_CLEAR * usual, usual - _DEEP):
        return _Cut(at, at, True)
    shared = min(_SHARED, limit // 4)
    at = lowest + int(np.argmin(smooth[lowest : limit - shared // 2]))
    end = at + shared // 4 + int(np.argmin(smooth[at + shared // 4 : at + shared // 2 + 1]))
    begin = at - shared // 2 + int(np.argmin(smooth[at - shared // 2 : at - shared // 4 + 1]))
    return _Cut(end, begin, True)


def _speech(activity: Activity, inside: bool) -> np.ndarray:
    """The passages with speech, `(passages, 2)`: the first frame, and the one after the last.

    Args:
        inside: speech at the beginning is the end of a passage, so it may be short.
    """
    edges = np.flatnonzero(np.diff(np.concatenate([[False], activity.weak, [False]])))
    counts = np.append(0, np.cumsum(activity.strong))
    pieces = edges.reshape(-1, 2)
    pieces = pieces[(counts[pieces[:, 1]] > counts[pieces[:, 0]]) | (inside & (pieces[:, 0] <= _NEAR))]
    if not len(pieces):
        return pieces
    apart = pieces[1:, 0] - pieces[:-1, 1] >= _CLOSURE
    begins, ends = pieces[np.append(True, apart), 0], pieces[np.append(apart, True), 1]
    surely = counts[ends] - counts[begins] >= min(_SHORTEST_SPEECH, max(1, len(activity) // 2))
    if inside:
        surely[0] |= begins[0] <= _NEAR
    return np.stack([begins, ends], 1)[surely]


def _longest_silence(activity: Activity) -> float:
    """In frames; infinite if there is no speech."""
    speech = _speech(activity, False)
    silences = np.append(speech[:, 0], len(activity)) - np.append(0, speech[:, 1])
    return float(silences.max()) if len(speech) else math.inf


class _View:
    """The part of a span that is in memory: samples and what the detector found, read as far as somebody asks.

    Args:
        pieces: the span's samples.
        detector: takes them.
        offset: the span's first sample, counted from the recording's.
    """

    def __init__(self, pieces: Iterator[Tensor], detector: Any, offset: int):
        self._pieces, self._detector, self._offset = pieces, detector, offset
        self._samples = torch.zeros(0)  # from the frame `first`
        self.activity, self.first = Activity.none(), 0
        self.count, self.ended = 0, False  # samples read

    def read_to(self, frame: int) -> None:
        """Read until what is known reaches this frame, or to the end."""
        while not self.ended and self.first + len(self.activity) < frame:
            piece = next(self._pieces, None)
            if piece is None:
                self.ended, found = True, self._detector.finish()
            else:
                self._samples, found = torch.cat([self._samples, piece]), self._detector.push(piece)
                self.count += len(piece)
            self.activity = self.activity + found

    def drop(self, frame: int) -> None:
        """Forget what is before this frame."""
        count = frame - self.first
        self._samples, self.activity, self.first = self._samples[count * HOP :], self.activity[count:], frame

    def window(self, begin: int, end: int, overlap: int = 0) -> Window:
        """Of these samples of the span."""
        begin, end = int(begin), int(end)  # of NumPy's types, which seconds would have too
        samples = self._samples[begin - self.first * HOP : end - self.first * HOP].clone()
        return Window((self._offset + begin) / RATE, (self._offset + end) / RATE, samples, float(overlap / RATE))


class _Reader:
    """Reads parts of a recording, in order, once."""

    def __init__(self, blocks: Iterable[Tensor]):
        self._blocks, self._rest = iter(blocks), torch.zeros(0)
        self.position = 0  # samples
        self.failure: Exception | None = None

    def read(self, begin: int, end: int | None) -> Iterator[Tensor]:
        """The samples from `begin` to `end`, in pieces that are not longer than a detector should take."""
        while end is None or self.position < end:
            if not len(self._rest):
                try:
                    self._rest = next(self._blocks)
                except StopIteration:
                    return
                except Exception as error:  # for later: what was read before it is intact
                    self.failure = error
                    return
            most = _PIECE if end is None else min(_PIECE, end - self.position)
            if self.position < begin:
                most = min(most, begin - self.position)
            piece, self._rest = self._rest[:most], self._rest[most:]
            self.position += len(piece)
            if self.position > begin:
                yield piece


def halves(window: Window) -> tuple[Window, Window] | None:
    """A window in two, cut where it is faintest near its middle. None: it is too short to cut, less than half a second."""
    if len(window.samples) < SHORTEST_WINDOW * RATE:
        return None
    detector = EnergyDetector()
    level = (detector.push(window.samples) + detector.finish()).level
    smooth = np.convolve(level, np.full(_CUT_SMOOTHING, 1 / _CUT_SMOOTHING), "same")
    third = len(level) // 3
    at = (third + int(np.argmin(smooth[third : 2 * third + 1]))) * HOP
    middle = window.start + at / RATE
    first = Window(window.start, middle, window.samples[:at].clone(), window.overlap)
    return first, Window(middle, window.end, window.samples[at:].clone())


def _samples(seconds: float) -> int:
    return round(seconds * RATE)
