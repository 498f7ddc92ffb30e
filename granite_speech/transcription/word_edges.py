"""From the frames of a word's letters to where the word begins and ends, by the energy between neighbouring words.

A CTC head gives a letter in one frame or two, somewhere in the letter's sound: the first letter comes some 30 ms after a word begins, and
the last one 60 to 300 ms before it ends. Between the last letter of a word and the first one of the next there is a pause, or the faintest
moment between them: there the one ends and the other begins.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from granite_speech.transcription.alignment import Place

__all__ = ["edges", "loudness"]

# The quietest frames, as a share, are noise. What is a few decibels above them is speech, but not what is far below the loudest.
_NOISE, _ABOVE_NOISE, _DEPTH = 0.1, 4.0, 40.0
_LOUD = 0.95  # the quantile of a window's energy that is its speech
# Decibels above the floor, on average over the bands: below it, a frame is a pause. One loud frame counts as much as a few.
_PAUSE, _MOST = 0.4, 6.0
# A spectrum of 25 ms hears a sound about this long before it begins, in frames of 10 ms; and after it ends.
_BLUR = 0.5
# Pauses of at least this many frames end a word even if what follows is neither silence nor the next word: a breath, a click.
_LONG = 20


def loudness(features: Tensor, bands: int) -> Tensor:
    """How far each frame is above the noise, in decibels, on average over the bands; 0 is a pause.

    Args:
        features: of one clip, `(frames, 2 * bands)` or wider: log-mel as the encoder takes it, two frames of 10 ms side by side.
        bands: of the mel spectrum.

    Returns:
        `(2 * frames,)` float32, on the same device.
    """
    decibels = 40 * (features[:, : 2 * bands].float().reshape(-1, bands) - 1)  # it is log10 / 4 + 1
    power = torch.pow(10.0, decibels / 10)
    total = power.sum(1)
    quietest = total.topk(max(2, int(len(total) * _NOISE)), largest=False).indices
    noise, speech = power[quietest].mean(0), total.sort().values[int(_LOUD * (len(total) - 1))]
    floor = torch.maximum(noise * 10 ** (_ABOVE_NOISE / 10), speech * (10 ** (-_DEPTH / 10) / bands))
    return (decibels - 10 * floor.log10()).clamp(min=0).mean(1)


def edges(level: np.ndarray, places: Sequence[Place]) -> list[tuple[float, float]]:
    """Where each place begins and ends, in frames of 10 ms from the middle of the first one. None overlaps the next.

    Args:
        level: `loudness`, `(frames of 10 ms,)`.
        places: in frames of 20 ms, in order; each has frames of its own.
    """
    begins, ends = [], []
    for before, after in zip([None, *places], [*places, None], strict=True):
        low = 0 if before is None else 2 * before.last + 1
        high = len(level) if after is None else 2 * after.first
        end, begin = _pause(level[low:high]) if high > low else (0.0, 0.0)
        if before is not None:
            ends.append(low + end)
        if after is not None:
            begins.append(low + begin)
    return list(zip(begins, ends, strict=True))


def _pause(level: np.ndarray) -> tuple[float, float]:
    """Where the sound before a pause ends and the sound after it begins, in frames; the faintest moment if there is no pause."""
    quiet = _PAUSE - np.minimum(level, _MOST)
    main = _quietest_run(quiet)
    if main is None:
        faintest = float(level.argmin())
        return faintest, faintest
    begin, end = main
    while (earlier := _quietest_run(quiet[:begin])) is not None and earlier[1] - earlier[0] >= _LONG:
        begin = earlier[0]
    while (later := _quietest_run(quiet[end:])) is not None and later[1] - later[0] >= _LONG:
        end += later[1]
    # Frames are known by their middle. A pause begins and ends between two of them, where the sound has left the spectrum.
    first = begin - 0.5 - _BLUR if begin else 0.0
    last = end - 0.5 + _BLUR if end < len(quiet) else float(end)
    return (first, last) if first < last else ((first + last) / 2,) * 2


def _quietest_run(quiet: np.ndarray) -> tuple[int, int] | None:
    """The consecutive frames with the largest sum, if it is positive (Kadane's algorithm)."""
    if not len(quiet):
        return None
    sums = np.concatenate([[0.0], np.cumsum(quiet)])
    lowest = np.minimum.accumulate(sums)
    end = int((sums - lowest).argmax())
    if sums[end] <= lowest[end]:
        return None
    return int(np.flatnonzero(sums[: end + 1] == lowest[end])[-1]), end
