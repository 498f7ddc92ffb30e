"""Where silero-vad, a small network, finds speech. It is a package of its own, imported only here."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from granite_speech.engine.cpu_threads import without_team
from granite_speech.errors import MissingDependencyError
from granite_speech.transcription.speech import HOP, RATE, Activity, EnergyDetector

__all__ = ["SileroDetector"]

_CHUNK = 512  # samples that the network takes at once
# Probabilities. silero-vad itself ends speech at 0.35: here a lost word is worse than a pause that is taken for speech.
_WEAK, _STRONG = 0.2, 0.5


class SileroDetector:
    """As `EnergyDetector`, by silero-vad. The levels, which say where a cut does the least harm, are those of `EnergyDetector`.

    Raises:
        MissingDependencyError: silero-vad is not installed.
    """

    def __init__(self) -> None:
        self._model = _load()
        self._energy = EnergyDetector()
        self._samples = torch.zeros(0)  # less than a chunk
        self._chunks = np.zeros(0, np.float32)  # the probability of each: 450 kB an hour
        self._frames = 0  # returned

    def push(self, samples: Tensor) -> Activity:
        """As `EnergyDetector.push`."""
        self._judge(samples)
        return self._activity(self._energy.push(samples))

    def finish(self) -> Activity:
        """As `EnergyDetector.finish`."""
        self._judge(torch.zeros(-len(self._samples) % _CHUNK))
        return self._activity(self._energy.finish())

    @torch.no_grad()
    def _judge(self, samples: Tensor) -> None:
        *chunks, self._samples = torch.cat([self._samples, samples]).split(_CHUNK)
        if len(self._samples) == _CHUNK:
            chunks, self._samples = [*chunks, self._samples], self._samples[:0]
        with without_team():
            found = [float(self._model(chunk, RATE)) for chunk in chunks]
        self._chunks = np.append(self._chunks, np.float32(found))

    def _activity(self, energy: Activity) -> Activity:
        """With the probability of the chunk that has the middle of each frame."""
        frames = self._frames + np.arange(len(energy))
        probability = self._chunks[(frames * HOP + HOP // 2) // _CHUNK]
        self._frames += len(energy)
        return Activity(energy.level, probability > _WEAK, probability > _STRONG)


def _load() -> Any:
    """The network, with a state of its own."""
    threads = torch.get_num_threads()
    try:
        from silero_vad import load_silero_vad

        return load_silero_vad()
    except ImportError as error:
        raise MissingDependencyError(
            got="no silero-vad",
            expected="it, for segmentation='silero'",
            remedy="pip install \"granite-speech-triton[vad]\", or use segmentation='energy'",
        ) from error
    finally:
        torch.set_num_threads(threads)  # silero-vad sets it to 1 when it is imported
