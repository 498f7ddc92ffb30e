"""Word error rates of a model, and of its encoder alone, under acoustic conditions such as noise and echo."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from granite_speech.inputs.processor import GraniteSpeechProcessor
from granite_speech.model import GraniteSpeechForConditionalGeneration
from granite_speech.training import augmentation
from granite_speech.training.bundled_checkpoint.vocabulary import DIGITS
from granite_speech.training.evaluation import ctc_transcripts, transcripts, word_error_rate
from granite_speech.training.manifest import Utterance
from granite_speech.training.seeds import derived_seed

__all__ = ["CONDITIONS", "Measured", "measure"]

Waveform = np.ndarray
_at_speed = partial(augmentation.change_voice, pitch=1.0, formants=1.0)

CONDITIONS: dict[str, Callable[[Waveform, np.random.Generator], Waveform]] = {
    "as spoken": lambda waveform, rng: waveform,
    "noise 20 dB below the speech": partial(augmentation.add_noise, snr_db=20.0),
    "noise 10 dB below the speech": partial(augmentation.add_noise, snr_db=10.0),
    "room echo, 0.1 to 0.7 s": augmentation.add_echo,
    "nothing above 4 kHz (3.2 to 4, one in five elsewhere)": augmentation.limit_band,
    "a quarter faster": partial(_at_speed, tempo=1.25),
    "a fifth slower": partial(_at_speed, tempo=0.8),
    "all of the training's changes": augmentation.augment,
}


@dataclass(frozen=True)
class Measured:
    """One row of the table. Rates are fractions, not percentages.

    Attributes:
        condition: a key of `CONDITIONS`.
        utterances: number of utterances.
        wer: word error rate of the model's text.
        wer_of_single_words, wer_of_single_digits: on utterances of one word, or of one digit.
        ctc_wer: word error rate of the encoder's own text.
        ctc_is_text: fraction of utterances for which the two texts are equal.
    """

    condition: str
    utterances: int
    wer: float
    wer_of_single_words: float
    wer_of_single_digits: float
    ctc_wer: float
    ctc_is_text: float

    def to_dict(self) -> dict[str, str | int | float]:
        """As JSON values, with rates rounded to 0.01 %."""
        return {name: round(value, 4) if isinstance(value, float) else value for name, value in asdict(self).items()}


def measure(
    model: GraniteSpeechForConditionalGeneration,
    processor: GraniteSpeechProcessor,
    utterances: Sequence[Utterance],
    condition: str = "as spoken",
    *,
    seed: int = 0,
) -> Measured:
    """Measure word error rates under one condition.

    Args:
        model: in evaluation mode.
        processor: from the same checkpoint.
        utterances: with sound files and reference texts.
        condition: a key of `CONDITIONS`.
        seed: of the condition's random numbers, which also depend on the utterance's index.

    Raises:
        AudioError: a sound file that cannot be used; names the line.
        MissingDependencyError: jiwer is not installed.
    """

    def change(waveform: Tensor, index: int) -> Tensor:
        rng = np.random.default_rng(derived_seed("condition", condition, seed, index))
        return torch.from_numpy(CONDITIONS[condition](waveform.numpy(), rng))

    texts = transcripts(model, processor, utterances, change=change)
    ctc_texts = ctc_transcripts(model, processor, utterances, change=change)
    references = [one.text for one in utterances]

    def errors(hypotheses: Sequence[str], keep: Callable[[str], bool] = bool) -> float:
        chosen = [pair for pair in zip(references, hypotheses, strict=True) if keep(pair[0])]
        return word_error_rate(*zip(*chosen, strict=True)) if chosen else float("nan")

    return Measured(
        condition=condition,
        utterances=len(references),
        wer=errors(texts),
        wer_of_single_words=errors(texts, lambda text: " " not in text),
        wer_of_single_digits=errors(texts, DIGITS.__contains__),
        ctc_wer=errors(ctc_texts),
        ctc_is_text=sum(one == other for one, other in zip(texts, ctc_texts, strict=True)) / len(references),
    )
