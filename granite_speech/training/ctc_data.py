"""A source of batches for TurboCTC: utterances with audio, whose texts are labels."""

from collections.abc import Sequence

import torch

from granite_speech.config_ctc import GraniteSpeech5CTCConfig
from granite_speech.errors import InputError
from granite_speech.inputs.ctc_processor import GraniteSpeech5Processor
from granite_speech.modules.ctc_loss import blank_of
from granite_speech.training.batches import Batch, Row
from granite_speech.training.data import AudioData, Augment
from granite_speech.training.manifest import Utterance

__all__ = ["CTCData", "refuse_prompts"]


class CTCData(AudioData):
    """Packed batches of utterances, limited by seconds of audio. A batch's `characters` are the tokenizer's ids, and it has no prompts.

    The constructor checks every line, except for the samples themselves.

    Args:
        utterances: the lines of a manifest, without prompts.
        processor: turns texts into labels and waveforms into features.
        config: of the model.
        batch_seconds, seed, device, augment, cache_bytes: as for `SpeechData`.

    Raises:
        AudioError: a sound file that cannot be read, or one too short for its labels.
        InputError: an utterance too long for a batch, a prompt, or a text that does not give labels.
    """

    fewest_frames = 1

    def __init__(
        self,
        utterances: Sequence[Utterance],
        processor: GraniteSpeech5Processor,
        config: GraniteSpeech5CTCConfig,
        *,
        batch_seconds: float,
        seed: int = 0,
        device: torch.device | str = "cpu",
        augment: Augment | None = None,
        cache_bytes: int = 2 << 30,
    ):
        options = {"batch_seconds": batch_seconds, "seed": seed, "device": device, "augment": augment, "cache_bytes": cache_bytes}
        super().__init__(utterances, processor.feature_extractor, **options)
        self.processor, self.config, self._blank = processor, config, blank_of(config)
        self._rows = [self._row(*pair) for pair in zip(self.utterances, self.samples, strict=True)]

    def _row(self, utterance: Utterance, samples: int) -> Row:
        refuse_prompts([utterance])
        labels = self.processor(text=utterance.text)["labels"]
        known = range(self.config.vocab_size)
        wrong = sorted({one for one in labels if one == self._blank or one not in known})
        if wrong or not labels:
            what = f"whose labels include {wrong}" if wrong else "which gives no labels"
            raise InputError(
                got=f"{utterance.where}: the text {utterance.text!r:.100}, {what}",
                expected=f"words whose labels are below {self.config.vocab_size} and not {self._blank}, the blank",
                remedy="Correct the text, or use the checkpoint's own tokenizer",
            )
        frames = self.extractor.count_frames(samples, self.config.encoder_config.subsamplings).output
        self.check_fits(utterance, samples, frames, labels)
        return Row(ids=[], answer_length=0, characters=labels, name=utterance.where)

    def load(self, epoch: int, indices: list[int]) -> Batch:
        features = [self.features(epoch, index) for index in indices]
        rows = [self._rows[index] for index in indices]
        for index, row, frames in zip(indices, rows, features, strict=True):
            # Augmentation may have shortened it, and its header may promise more than there is.
            samples = min(len(frames) * 2 * self.extractor.hop_length, self.budget)
            self.check_fits(self.utterances[index], samples, len(frames) >> self.config.encoder_config.subsamplings, row.characters)
        return Batch.pack(rows, features, audio_token=-1, audio_seconds=self.seconds(indices), device=self.device)


def refuse_prompts(utterances: Sequence[Utterance]) -> None:
    """Raises InputError for a line with a prompt, which a CTC model does not take; names the line."""
    for one in utterances:
        if one.prompt is not None:
            raise InputError(
                got=f"{one.where}: the prompt {one.prompt!r:.100}",
                expected="none: a CTC model transcribes and takes no prompts",
                remedy="Remove the key, or tune a model with a language model",
            )
