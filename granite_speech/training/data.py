"""Sources of batches for the training loop: utterances with audio, and texts."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from granite_speech.errors import AudioError, InputError
from granite_speech.inputs.delta_features import GraniteSpeech5FeatureExtractor
from granite_speech.inputs.features import GraniteSpeechFeatureExtractor
from granite_speech.training.batches import Batch, Row, plan_batches
from granite_speech.training.dialogue import Dialogue
from granite_speech.training.manifest import Utterance
from granite_speech.training.seeds import derived_seed

__all__ = ["AudioData", "Augment", "SpeechData", "TextData"]

Augment = Callable[[Tensor, torch.Generator, int], Tensor]


class AudioData:
    """What sources of utterances have in common: their features, in memory as far as there is room, and their order.

    Results do not depend on what was loaded before: an utterance's augmentation follows from the seed, the epoch and its index.

    Args:
        utterances: the lines of a manifest.
        extractor: turns waveforms into features.
        batch_seconds: most seconds of audio in a batch.
        seed: determines order and augmentation.
        device: where batches are put. Features are computed on the CPU.
        augment: as for `SpeechData`.
        cache_bytes: memory for keeping features, or waveforms if they are augmented.

    Raises:
        AudioError: a sound file that cannot be read.
    """

    fewest_frames: int  # of a clip that the model can use

    def __init__(
        self,
        utterances: Sequence[Utterance],
        extractor: GraniteSpeechFeatureExtractor | GraniteSpeech5FeatureExtractor,
        *,
        batch_seconds: float,
        seed: int,
        device: torch.device | str,
        augment: Augment | None,
        cache_bytes: int,
    ):
        self.utterances, self.extractor = list(utterances), extractor
        self.seed, self.device, self.augment = seed, torch.device(device), augment
        self.rate = extractor.sampling_rate
        self._cache: dict[int, Tensor] = {}
        self._cache_room = cache_bytes
        self.samples = [one.count_samples(self.rate) for one in self.utterances]
        self.budget = int(batch_seconds * self.rate)

    @property
    def audio_seconds(self) -> float:
        """Total length of the utterances, from their headers."""
        return sum(self.samples) / self.rate

    def seconds(self, indices: Sequence[int]) -> float:
        """Total length of some utterances."""
        return sum(self.samples[index] for index in indices) / self.rate

    def check_fits(self, utterance: Utterance, samples: int, frames: int, labels: Sequence[int]) -> None:
        """Check a clip's length.

        Args:
            utterance: for messages.
            samples: of the clip.
            frames: that the CTC head sees of it, or that the encoder takes.
            labels: of CTC.

        Raises:
            InputError: too long for a batch.
            AudioError: too short for the model or for its labels.
        """
        seconds = samples / self.rate
        if samples > self.budget:
            raise InputError(
                got=f"{utterance.where}: {seconds:.1f} seconds of audio",
                expected=f"at most {self.budget / self.rate:g}, the limit of a batch",
                remedy="Raise batch_seconds if memory allows, or cut the recording",
            )
        # CTC needs a blank between two equal labels.
        needed = len(labels) + sum(one == other for one, other in pairwise(labels))
        least = max(needed, self.fewest_frames)
        if frames < least:
            for_labels = f" for {needed} labels" if needed > self.fewest_frames else ""
            raise AudioError(
                got=f"{utterance.where}: {frames} frames of audio ({seconds:.2f} s){for_labels}",
                expected=f"at least {least} frames",
                remedy="Check that the text matches the recording, or remove the line",
            )

    def plan(self, epoch: int) -> list[list[int]]:
        return plan_batches(self.samples, self.budget, seed=self.seed, epoch=epoch)

    def features(self, epoch: int, index: int) -> Tensor:
        """`(frames, width)` float32 features of one utterance, which do not depend on the rest of its batch."""
        if self.augment is None:
            return self._kept(index, lambda: self._extract(index, self.utterances[index].waveform(self.rate)))
        waveform = self.waveform(index)
        generator = torch.Generator().manual_seed(derived_seed("augment", self.seed, epoch, index))
        return self._extract(index, self.augment(waveform.clone(), generator, epoch))

    def waveform(self, index: int) -> Tensor:
        """`(samples,)` float32: one utterance as recorded, at the model's rate. Do not change it in place."""
        return self._kept(index, lambda: self.utterances[index].waveform(self.rate))

    def _extract(self, index: int, waveform: Tensor) -> Tensor:
        with self.utterances[index].named():
            features, _ = self.extractor.extract_packed([waveform], "cpu")
        return features

    def _kept(self, index: int, make: Callable[[], Tensor]) -> Tensor:
        if index in self._cache:
            return self._cache[index]
        value = make()
        # No eviction: an epoch uses each utterance once, so it would always find that its next one has been evicted.
        if value.nbytes <= self._cache_room:
            self._cache_room -= value.nbytes
            self._cache[index] = value
        return value


class SpeechData(AudioData):
    """Packed batches of utterances, limited by seconds of audio.

    The constructor checks every line, except for the samples themselves.

    Args:
        utterances: the lines of a manifest.
        dialogue: turns prompts and texts into token ids.
        batch_seconds: most seconds of audio in a batch.
        seed: determines order and augmentation.
        device: where batches are put. Features are computed on the CPU.
        ctc: prepare for a CTC loss. Each text must then fit the CTC head's characters and its clip's frames.
        augment: `(waveform, generator, epoch) → waveform`, with waveforms `(samples,)` float32 at the model's rate. Called each time an
            utterance is used. All its randomness must come from the generator.
        cache_bytes: memory for keeping features, or waveforms if they are augmented.

    Raises:
        AudioError: a sound file that cannot be read, or one too short for its text.
        InputError: an utterance too long for a batch, or a text or prompt that cannot be used.
    """

    fewest_frames = 2

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
        options = {"batch_seconds": batch_seconds, "seed": seed, "device": device, "augment": augment, "cache_bytes": cache_bytes}
        super().__init__(utterances, dialogue.processor.audio_processor, **options)
        self.dialogue, self.ctc = dialogue, ctc
        self._rows = [self._row(*pair) for pair in zip(self.utterances, self.samples, strict=True)]

    def _row(self, utterance: Utterance, samples: int) -> Row:
        """The answer of an utterance as ids. `load` adds the request, once the clip's exact length is known."""
        frames = self.extractor.count_frames(samples).encoder
        with utterance.named():
            self.dialogue.request(utterance.prompt, frames)
            answer = self.dialogue.answer(utterance.text)
            characters = self.dialogue.characters(utterance.text) if self.ctc else []
        self.check_fits(utterance, samples, frames, characters)
        return Row(ids=answer, answer_length=len(answer), characters=characters, name=utterance.where)

    def load(self, epoch: int, indices: list[int]) -> Batch:
        features = [self.features(epoch, index) for index in indices]
        rows = []
        for index, frames in zip(indices, features, strict=True):
            row = self._rows[index]
            request = self.dialogue.request(self.utterances[index].prompt, len(frames))
            rows.append(replace(row, ids=request + row.ids))
        audio_token = self.dialogue.audio_token
        return Batch.pack(rows, features, audio_token=audio_token, audio_seconds=self.seconds(indices), device=self.device)

    def _extract(self, index: int, waveform: Tensor) -> Tensor:
        features = super()._extract(index, waveform)
        if len(features) < self.fewest_frames:
            raise AudioError(
                got=f"{self.utterances[index].where}: {len(waveform)} samples of audio",
                expected=f"at least {4 * self.extractor.melspec_kwargs['hop_length']}",
                remedy="Remove the line, or make the augmentation keep more of the clip",
            )
        return features


class TextData:
    """Packed batches of texts, limited by tokens, to train the language model without audio.

    Args:
        texts: the lines of a manifest of texts.
        dialogue: turns prompts and texts into token ids.
        batch_tokens: most tokens in a batch.
        seed: determines the order.
        device: where batches are put.

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
                expected=f"a prompt of at least one token, and at most {self.budget} tokens in all, the limit of a batch",
                remedy="Raise batch_tokens, or correct the line",
            )
        return Row(ids=ids, answer_length=len(answer), characters=[], name=text.where)

    def plan(self, epoch: int) -> list[list[int]]:
        return plan_batches([len(row.ids) for row in self._rows], self.budget, seed=self.seed, epoch=epoch)

    def load(self, epoch: int, indices: list[int]) -> Batch:
        rows = [self._rows[index] for index in indices]
        return Batch.pack(rows, None, audio_token=self.dialogue.audio_token, audio_seconds=0.0, device=self.device)
