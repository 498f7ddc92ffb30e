"""Where there is speech in a recording: what changes faster than the noise around it.

Each band of the spectrum has a noise floor, which is the highest level that the band keeps for two seconds. Steady noise, hum, tones and
silence are their own floor, however loud they are; speech rises above it in some bands several times a second. So the level of a
recording does not matter, and a quiet speaker is found next to a loud one.

Everything is counted in frames of 10 ms. Frame i is samples `[160 * i, 160 * i + 160)`.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
from torch import Tensor

__all__ = ["FRAMES_PER_SECOND", "HOP", "RATE", "Activity", "EnergyDetector"]

RATE = 16000
HOP = 160
FRAMES_PER_SECOND = RATE // HOP

_SPAN, _FFT = 400, 512  # samples of a spectrum: 25 ms, padded with zeros
_EDGES = (100, 200, 300, 400, 510, 630, 770, 920, 1080, 1270, 1480, 1720, 2000, 2320, 2700, 3150, 3700, 4300, 4900, 5500, 6100, 6700, 7300)
_BINS = np.array([-(-edge * _FFT // RATE) for edge in _EDGES])
_WIDTHS = np.diff(np.append(_BINS, _FFT // 2)).astype(np.float32)
_HANN = np.hanning(_SPAN + 1)[:-1].astype(np.float32)
_SMOOTHING = 5  # frames
_STEADY = 200  # frames: a level that lasts this long is noise
_PAUSE, _FAINTER, _CHANGING = 25, 15.0, 20.0  # frames, dB, score: and a shorter one that hardly changes, next to something louder
# dB of full scale, per band. Dither of 16 bits is -110 dB, and speech that peaks at -60 dB is 30 dB above it. Fainter sounds may be the end
# of a word, but are not a word.
_QUIETEST, _INAUDIBLE = -110.0, -125.0
# Gaussian noise in a band of n bins is on average 7.4 / √n dB above its floor, with a standard deviation of 3.05 / √n (measured).
_MEAN, _DEVIATION = 7.4, 3.05
_TOO_SHORT = 25  # frames: a word is longer, and changes
_FAINTEST_VOICE = 1e-9  # mean square
_BATCH = 2 * FRAMES_PER_SECOND  # frames that are detected at once
# The excess over noise's mean, in standard deviations and summed over the bands. White noise exceeds 6 in one frame of a thousand and 12
# in one of an hour; the faintest word in noise 5 dB below it exceeds 38.
_WEAK, _STRONG = 6.0, 18.0


@dataclass(frozen=True)
class Activity:
    """What was found in consecutive frames.

    Attributes:
        level: `(frames,)` float32, dB above the noise floor, the mean of the bands: where it is lowest, a cut does the least harm.
        weak: `(frames,)` bool: there may be speech, if there is surely speech nearby.
        strong: `(frames,)` bool: there surely is.
    """

    level: np.ndarray
    weak: np.ndarray
    strong: np.ndarray

    def __len__(self) -> int:
        return len(self.level)

    def __getitem__(self, part: slice) -> Self:
        return Activity(self.level[part], self.weak[part], self.strong[part])

    def __add__(self, other: Self) -> Self:
        return Activity(*(np.concatenate([getattr(one, name) for one in (self, other)]) for name in ("level", "weak", "strong")))

    @classmethod
    def none(cls) -> Self:
        """Of no frames."""
        return cls(np.zeros(0, np.float32), np.zeros(0, bool), np.zeros(0, bool))


class EnergyDetector:
    """Finds speech in a stream, with a delay of 2 to 4 s. What it finds does not depend on how the stream is divided."""

    def __init__(self) -> None:
        self._count = 0  # samples taken
        self._returned = 0  # frames
        self._samples = np.zeros(0, np.float32)  # from the first sample of the next spectrum
        self._powers = np.zeros((0, len(_EDGES)), np.float32)  # mean square by frame and band, from the first that smoothing needs
        self._decibels = np.zeros((0, len(_EDGES)), np.float32)  # of them, smoothed, from the first that a noise floor needs
        self._sharp = self._decibels  # the same frames, not smoothed: where to cut
        self._first = 0  # the number of that frame

    def push(self, samples: Tensor) -> Activity:
        """Take the next samples, `(samples,)` float32. Returns what is known of the frames after those returned before."""
        self._count += len(samples)
        self._transform(samples.numpy())
        frames = self._first + len(self._decibels) - _STEADY - self._returned
        return self._detect(frames) if frames >= _BATCH else Activity.none()

    def finish(self) -> Activity:
        """The rest, now that there are no more samples. Altogether there is a frame for every 160 samples begun."""
        if not self._count:
            return Activity.none()
        if not len(self._powers):
            self._transform(np.zeros(_SPAN - len(self._samples), np.float32))
        # A frame that has no spectrum of its own repeats the last one. Zeros after the end would look like a change.
        self._smooth(self._powers[-1:].repeat(_SPAN // HOP + _SMOOTHING // 2, 0))
        frames = -(-self._count // HOP) - self._first
        self._decibels, self._sharp = self._decibels[:frames], self._sharp[:frames]
        decibels, found = self._decibels, self._detect(self._first + len(self._decibels) - self._returned)
        if self._returned <= _TOO_SHORT and found.strong.mean() < 0.5 and _is_voice(decibels):
            surely = np.ones(len(found), bool)
            return Activity(found.level, surely, surely)
        return found

    def _transform(self, samples: np.ndarray) -> None:
        self._samples = np.concatenate([self._samples, samples])
        spectra = (len(self._samples) - _SPAN) // HOP + 1
        if spectra > 0:
            self._smooth(_band_powers(self._samples, spectra))
            self._samples = self._samples[spectra * HOP :].copy()

    def _smooth(self, powers: np.ndarray) -> None:
        if not len(self._powers):  # frame 0 has no spectrum of its own either
            powers = np.concatenate([powers[:1].repeat(1 + _SMOOTHING // 2, 0), powers])
        self._powers = np.concatenate([self._powers, powers])
        frames = len(self._powers) - _SMOOTHING + 1
        if frames > 0:
            mean = sum(self._powers[shift : shift + frames] for shift in range(_SMOOTHING)) / _SMOOTHING
            middle = self._powers[_SMOOTHING // 2 :][:frames]
            self._decibels = np.concatenate([self._decibels, 10 * np.log10(mean + 1e-13)])
            self._sharp = np.concatenate([self._sharp, 10 * np.log10(middle + 1e-13)])
            self._powers = self._powers[frames:]

    def _detect(self, frames: int) -> Activity:
        """The next frames. Their floors depend on frames up to `_STEADY` away."""
        begin = self._returned - self._first
        end = begin + frames
        around = self._decibels[: end + _STEADY]
        levels, floors = around[begin:end], _floors(around, _STEADY)[begin:end]
        sharp = np.maximum(self._sharp[begin:end], _INAUDIBLE) - np.maximum(floors, _INAUDIBLE)
        weak = (_score(levels - np.maximum(floors, _INAUDIBLE)) > _WEAK) & ~_pauses(around)[begin:end]
        strong = weak & (_score(levels - np.maximum(floors, _QUIETEST)) > _STRONG)
        self._returned += frames
        drop = max(0, end - _STEADY)
        self._decibels, self._sharp, self._first = self._decibels[drop:], self._sharp[drop:], self._first + drop
        return Activity(sharp.mean(1), weak, strong)


def _pauses(decibels: np.ndarray) -> np.ndarray:
    """`(frames,)` bool: a shorter steady sound, if it is much fainter than what is within a second of it. So the noise between two
    utterances is found although it is not in them, and a long vowel is not noise."""
    total = 10 * np.log10(np.power(10, decibels / 10).sum(1, keepdims=True))
    near = np.pad(total, ((FRAMES_PER_SECOND, FRAMES_PER_SECOND), (0, 0)), constant_values=-np.inf)
    loudest = -_sliding_minimum(-near, 2 * FRAMES_PER_SECOND + 1)
    length = min(_PAUSE, len(decibels))
    lowest, highest = _sliding_minimum(decibels, length), -_sliding_minimum(-decibels, length)
    steady = _score(highest - np.maximum(lowest, _INAUDIBLE)) < _CHANGING
    steady = np.pad(steady.astype(np.float32)[:, None], ((length - 1, length - 1), (0, 0)))
    return (-_sliding_minimum(-steady, length) > 0)[:, 0] & (total < loudest - _FAINTER)[:, 0]


def _score(excess: np.ndarray) -> np.ndarray:
    """How unlikely it is that noise exceeds its floor by `(frames, bands)` dB; `(frames,)`."""
    return np.clip((excess * np.sqrt(_WIDTHS) - _MEAN) / _DEVIATION - 1.5, 0, 10).sum(1)


def _is_voice(decibels: np.ndarray) -> bool:
    """Whether a recording may be speech although it is too short to change: a part of a vowel. Noise has a spectrum without peaks, a tone
    nothing but a peak, and hum does not change at all."""
    power = np.power(10, decibels / 10)
    mean = power.mean(0)
    if mean.sum() < _FAINTEST_VOICE or np.sort(mean)[-2:].sum() > 0.95 * mean.sum():
        return False
    density, octave = 10 * np.log10(mean / _WIDTHS), np.log2(_BINS + _WIDTHS / 2)
    straight = np.polyval(np.polyfit(octave, density, 1), octave)
    loud = decibels[:, mean > mean.max() / 100]
    return np.std(density - straight) > 3 and np.ptp(loud, axis=0).max() > 3


def _band_powers(samples: np.ndarray, spectra: int) -> np.ndarray:
    """The mean square in each band, `(spectra, bands)` float32, of the spectrum that begins at every 160th sample."""
    pieces = np.lib.stride_tricks.sliding_window_view(samples, _SPAN)[::HOP][:spectra]
    pieces = (pieces - pieces.mean(1, keepdims=True)) * _HANN
    power = np.square(np.abs(np.fft.rfft(pieces, _FFT)))[:, : _FFT // 2]
    return np.add.reduceat(power, _BINS, axis=1) * (2 / (np.square(_HANN).sum() * _FFT))


def _floors(decibels: np.ndarray, length: int) -> np.ndarray:
    """For each frame and band, the highest level that the band keeps for `length` frames around it: a morphological opening."""
    length = min(length, len(decibels))
    lowest = _sliding_minimum(decibels, length)
    padded = np.pad(lowest, ((length - 1, length - 1), (0, 0)), constant_values=-np.inf)
    return -_sliding_minimum(-padded, length)


def _sliding_minimum(values: np.ndarray, length: int) -> np.ndarray:
    """Of every `length` consecutive rows, by doubling."""
    span = 1
    while 2 * span <= length:
        values, span = np.minimum(values[:-span], values[span:]), 2 * span
    rest = length - span
    return np.minimum(values[: len(values) - rest], values[rest:]) if rest else values
