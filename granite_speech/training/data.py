"""Where the loop gets its batches: utterances with sound, and texts."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from granite_speech.errors import AudioError, InputError
from granite_speech.training.batches import Batch, Row, plan_batches
from granite_speech.training.dialogue import Dialogue
from granite_speech.training.manifest import Utterance
from granite_speech.training.seeds import derived_seed

__all__ = ["Augment", "SpeechData", "TextData"]

Augment = Callable[[Tensor, torch.Generator, int], Tensor]


class SpeechData:
    """Utterances in packed batches, bounded by the audio in them.

    Everything that can be wrong with a line, but for the samples themselves, is found here. Nothing depends on what was loaded before:
    an utterance's augmentation follows from the seed, the epoch and its own number.

    Args:
        utterances: of a manifest.
        dialogue: makes token ids of prompts and texts.
        batch_seconds: seconds of audio in a batch at most.
        seed: of order and augmentation.
        device: where batches go. Features are computed on the CPU.
        ctc: whether a CTC loss is asked for: each text must then fit the CTC head's characters and its clip's frames.
        augment: `waveform (samples,) float32 at the model's rate, generator, epoch → waveform`, applied anew each time, before the
            features. It must draw its random numbers from the generator alone.
        cache_bytes: of memory for features, or for waveforms where they are augmented, kept as they are made.

    Raises:
        AudioError: a sound file that cannot be read.
        InputError: an utterance too long for a batch, too short for its text, or with a text or prompt that cannot be used.
    """

    def __init__(
        self,
        utterances: Sequence[Utterance],
        dialogue: Dialogue,
        *,
        batch_seconds: float,
        seed: int = 0,
        device: torch.device | str = "cpu",
        ctc: bool = False,
        augment: Augment | None = None,
        cache_bytes: int = 2 << 30,
    ):
        self.utterances, self.dialogue = list(utterances), dialogue
        self.seed, self.device, self.ctc, self.augment = seed, torch.device(device), ctc, augment
        self.extractor = dialogue.processor.audio_processor
        self.rate = self.extractor.sampling_rate
        self._cache: dict[int, Tensor] = {}
        self._cache_room = cache_bytes
        self.samples = [one.count_samples(self.rate) for one in self.utterances]
        self.budget = int(batch_seconds * self.rate)
        self._rows = [self._row(*pair) for pair in zip(self.utterances, self.samples, strict=True)]

    @property
    def audio_seconds(self) -> float:
        """Of all utterances together, as their headers have it."""
        return sum(self.samples) / self.rate

    def _row(self, utterance: Utterance, samples: int) -> Row:
        """An utterance as ids; the audio tokens are put in when its clip's length is known for certain."""
        frames = self.extractor.count_frames(samples).encoder
        with utterance.named():
            self.dialogue.request(utterance.prompt, frames)
            answer = self.dialogue.answer(utterance.text)
            characters = self.dialogue.characters(utterance.text) if self.ctc else []
        seconds = samples / self.rate
        if samples > self.budget:
            raise InputError(
                got=f"{utterance.where}: {seconds:.1f} seconds of audio",
                expected=f"at most {self.budget / self.rate:g}, which a batch may hold",
                remedy="Raise batch_seconds where there is memory for it, or cut the recording",
            )
        # Between two equal labels CTC needs a blank.
        needed = len(characters) + sum(one == other for one, other in pairwise(characters))
        if frames < max(needed, 2):
            raise AudioError(
                got=f"{utterance.where}: {frames} frames of audio ({seconds:.2f} s)" + (f" for {needed} labels" if needed > 2 else ""),
                expected=f"at least {max(needed, 2)} frames",
                remedy="Check that text and recording belong together, or take the line out",
            )
        return Row(ids=answer, answer_length=len(answer), characters=characters, name=utterance.where)

    def plan(self, epoch: int) -> list[list[int]]:
        return plan_batches(self.samples, self.budget, seed=self.seed, epoch=epoch)

    def load(self, epoch: int, indices: list[int]) -> Batch:
        features = [self.features(epoch, index) for index in indices]
        rows = []
        for index, frames in zip(indices, features, strict=True):
            row = self._rows[index]
            request = self.dialogue.request(self.utterances[index].prompt, len(frames))
            rows.append(replace(row, ids=request + row.ids))
        return Batch.pack(
            rows,
            features,
            audio_token=self.dialogue.audio_token,
            audio_seconds=sum(self.samples[index] for index in indices) / self.rate,
            device=self.device,
        )

    def features(self, epoch: int, index: int) -> Tensor:
        """`(frames, 2 * n_mels)` float32 of one utterance, by itself: what it is batched with changes no bit of it."""
        if self.augment is None:
            return self._kept(index, lambda: self._extract(index, self.utterances[index].waveform(self.rate)))
        waveform = self.waveform(index)
        generator = torch.Generator().manual_seed(derived_seed("augment", self.seed, epoch, index))
        return self._extract(index, self.augment(waveform.clone(), generator, epoch))

    def waveform(self, index: int) -> Tensor:
        """`(samples,)` float32 of one utterance as it was recorded, at the model's rate; not to be changed in place."""
        return self._kept(index, lambda: self.utterances[index].waveform(self.rate))

    def _extract(self, index: int, waveform: Tensor) -> Tensor:
        with self.utterances[index].named():
            features, _ = self.extractor.extract_packed([waveform], "cpu")
        if len(features) < 2:
            raise AudioError(
                got=f"{self.utterances[index].where}: {len(waveform)} samples of audio",
                expected=f"at least {4 * self.extractor.melspec_kwargs['hop_length']}",
                remedy="Take the line out, or leave more of the clip where it is augmented",
            )
        return features

    def _kept(self, index: int, make: Callable[[], Tensor]) -> Tensor:
        if index in self._cache:
            return self._cache[index]
        value = make()
        # Nothing is thrown out for it: an epoch asks for each utterance once, and would find what it wants already gone.
        if value.nbytes <= self._cache_room:
            self._cache_room -= value.nbytes
            self._cache[index] = value
        return value


class TextData:
    """Texts in packed batches, bounded by their tokens, for a language model that learns without sound.

    Args:
        texts: of a manifest of texts.
        dialogue: makes token ids of prompts and texts.
        batch_tokens: tokens in a batch at most.
        seed: of the order.
        device: where batches go.

    Raises:
        InputError: a text too long for a batch, or one that cannot be used.
    """

    def __init__(
        self, texts: Sequence[Utterance], dialogue: Dialogue, *, batch_tokens: int, seed: int = 0, device: torch.device | str = "cpu"
    ):
        self.dialogue, self.budget, self.seed, self.device = dialogue, batch_tokens, seed, torch.device(device)
        self._rows = [self._row(one) for one in texts]

    def _row(self, text: Utterance) -> Row:
        with text.named():
            request, answer = self.dialogue.text_request(text.prompt), self.dialogue.answer(text.text)
        ids = request + answer
        if len(ids) > self.budget or not request:
            raise InputError(
                got=f"{text.where}: {len(ids)} tokens, {len(request)} of them the prompt",
                expected=f"a prompt of a token at least, and at most {self.budget} in all, which a batch may hold",
                remedy="Raise batch_tokens, or correct the line",
            )
        return Row(ids=ids, answer_length=len(answer), characters=[], name=text.where)

    def plan(self, epoch: int) -> list[list[int]]:
        return plan_batches([len(row.ids) for row in self._rows], self.budget, seed=self.seed, epoch=epoch)

    def load(self, epoch: int, indices: list[int]) -> Batch:
        rows = [self._rows[index] for index in indices]
        return Batch.pack(rows, None, audio_token=self.dialogue.audio_token, audio_seconds=0.0, device=self.device)
