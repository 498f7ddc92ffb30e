"""A curriculum: speech that gets harder from lesson to lesson."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from granite_speech.training.augmentation import augment
from granite_speech.training.batches import plan_batches
from granite_speech.training.data import SpeechData
from granite_speech.training.dialogue import Dialogue
from granite_speech.training.manifest import Utterance
from granite_speech.training.seeds import derived_seed

__all__ = ["Lessons"]


class Lessons(SpeechData):
    """Speech that gets harder. Each epoch is a lesson with a fixed number of clips.

    Lessons start with one or two clean words, continue with clean sentences, and then add more and more augmentation. With full
    augmentation from the start, the CTC loss is stuck for a long time at predicting only blanks.

    Args:
        utterances, dialogue, seed, device, ctc: as for `SpeechData`.
        lessons: number of lessons.
        lesson: clips in each lesson.
        batch_seconds: most seconds of audio in a batch; halved while speech is clean, for more and noisier steps.
    """

    # Fractions of the lessons at which short utterances end, clean speech ends, and augmentation reaches full strength.
    SHORT, CLEAN, FULL = 0.03, 0.08, 0.4

    def __init__(
        self,
        utterances: Sequence[Utterance],
        dialogue: Dialogue,
        *,
        lessons: int,
        lesson: int,
        batch_seconds: float = 12.0,
        seed: int = 0,
        device: torch.device | str = "cpu",
        ctc: bool = False,
    ):
        super().__init__(
            utterances, dialogue, batch_seconds=batch_seconds, seed=seed, device=device, ctc=ctc, augment=self._augment, cache_bytes=6 << 30
        )
        self.lessons, self.lesson = lessons, lesson
        self.words = [len(one.text.split()) for one in self.utterances]

    def share(self, epoch: int) -> float:
        """Progress through the lessons, from 0 to 1."""
        return epoch / self.lessons

    def strength(self, epoch: int) -> float:
        """Strength of the augmentation, from 0 to 1."""
        return float(np.clip((self.share(epoch) - self.CLEAN) / (self.FULL - self.CLEAN), 0.0, 1.0))

    def plan(self, epoch: int) -> list[list[int]]:
        share, count = self.share(epoch), len(self.utterances)
        # Lessons are consecutive slices of an endless sequence of passes over all clips, each pass in a new order.
        places = range(epoch * self.lesson, (epoch + 1) * self.lesson)
        chosen = [int(self._order(place // count)[place % count]) for place in places]
        chosen = [index for index in chosen if share >= self.SHORT or self.words[index] <= 2]
        budget = self.budget if share >= self.CLEAN else self.budget // 2
        batches = plan_batches([self.samples[index] for index in chosen], budget, seed=self.seed, epoch=epoch)
        return [[chosen[place] for place in batch] for batch in batches]

    def _order(self, number: int) -> np.ndarray:
        if number not in self._orders:
            self._orders[number] = np.random.default_rng(derived_seed("pass", self.seed, number)).permutation(len(self.utterances))
        return self._orders[number]

    @cached_property
    def _orders(self) -> dict[int, np.ndarray]:
        return {}

    def _augment(self, waveform: Tensor, generator: torch.Generator, epoch: int) -> Tensor:
        rng = np.random.default_rng(generator.initial_seed())
        changed = augment(waveform.numpy(), rng, self.strength(epoch), _Waveforms(self))
        # Pad to a tenth of a second, because a very short clip has no frames.
        return torch.from_numpy(np.pad(changed, (0, max(0, self.rate // 10 - changed.size))))


class _Waveforms(Sequence):
    """The clips' waveforms for babble, read on demand because only a few are used."""

    def __init__(self, data: Lessons):
        self.data = data

    def __len__(self) -> int:
        return len(self.data.utterances)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.data.waveform(int(index)).numpy()
