"""What the windows of a call have in common if the model is TurboCTC, and how a long recording is cut for it.

The encoder attends within blocks of `context_size` frames, counted from the beginning of a window. A block sees others through the
convolutions alone: a few frames of its neighbors in each layer, and what those have seen in turn. So windows that begin where a block
begins, and have some whole blocks more on either side than they give to the text, say what the whole recording at once would say.

How many blocks can matter at all is known (`reach`): 15 of the released model, 151 s on either side. How much they do falls by a factor
of 50 to 100 with each block of 128 frames, because a block is 128 frames and its neighbor sees 3 of them. With three blocks, 31 s, what
is left is the rounding of float32: in models of 16 layers with random weights, at most 4e-5 in a log-probability. So windows have three
blocks on either side, or `reach` if that is less, which makes them exact.

Features are those of the window: they are floored 8 powers of ten below its own maximum, not the recording's. In a window without
speech, noise is that much louder.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from granite_speech.config_ctc import GraniteSpeech5EncoderConfig
from granite_speech.errors import InputError
from granite_speech.inputs.batch import BatchFeature
from granite_speech.inputs.ctc_processor import GraniteSpeech5Processor
from granite_speech.inputs.delta_features import GraniteSpeech5FeatureExtractor
from granite_speech.inputs.languages import requested_languages
from granite_speech.model_ctc import GraniteSpeech5ForCTC
from granite_speech.transcription.options import TranscribeOptions
from granite_speech.transcription.window_piece import CallSetup, WindowPiece, check_processor, window_seconds
from granite_speech.transcription.windows import Window
from granite_speech.transcription.word_edges import loudness

__all__ = ["LONGEST_WINDOW", "CTCSetup", "block_samples", "check_ctc_options", "reach"]

# Seconds. What a window in blocks gives to the text: a CPU has less memory, and nothing to gain from longer ones.
_GIVEN = {"cpu": 300.0, "cuda": 600.0}
_MARGIN = 3 * 128  # frames out of the encoder
LONGEST_WINDOW = 300.0  # that a call can ask for
_USUAL_WINDOW = 30.0  # if a call asks for pauses


def block_samples(config: GraniteSpeech5EncoderConfig, extractor: GraniteSpeech5FeatureExtractor) -> int:
    """Samples between two places where blocks of all layers begin."""
    return extractor.hop_length * extractor.frame_stacking * config.context_size << config.subsamplings


def reach(config: GraniteSpeech5EncoderConfig, extractor: GraniteSpeech5FeatureExtractor) -> int:
    """How many whole blocks before its own first frame a block's result can depend on; no more than that after its last."""
    first = 0  # frames, at the rate of the layer
    for number in reversed(range(config.num_hidden_layers)):
        first = (2 * first if number in config.subsample_layers else first) - config.conv_kernel_size // 2
        first = first // config.context_size * config.context_size
    mel = extractor.frame_stacking * first - (extractor.delta_win_length - 1) // 2
    return math.ceil((extractor.n_fft // 2 - mel * extractor.hop_length) / block_samples(config, extractor))


def check_ctc_options(options: TranscribeOptions) -> None:
    """Refuse what only a language model can do.

    Raises:
        InputError: an option with another value than its default, or a language other than English.
    """
    for name in ("task", "target_language", "prompt", "keywords", "max_new_tokens", "temperature", "prompt_mode", "prefix_text"):
        value, usual = getattr(options, name), getattr(_DEFAULTS, name)
        if value != usual and not (name == "keywords" and _is_empty(value)) and value != "":
            shown = None if name == "max_new_tokens" else usual
            raise InputError(
                got=f"{name}={value!r:.60} for a CTC model",
                expected=f"{name}={shown!r}: it writes down what it hears, and has no language model to prompt",
                remedy=f"Omit {name}, or load a checkpoint with a language model, such as 'ibm-granite/granite-speech-4.1-2b'",
            )
    if requested_languages("transcribe", options.language, None)[0] not in (None, "English"):
        raise InputError(
            got=f"language={options.language!r:.40} for a CTC model",
            expected="None or 'en': it takes no language, and writes down what it hears",
            remedy="Omit language",
        )


def _is_empty(keywords: Any) -> bool:
    return isinstance(keywords, (str, list, tuple, set)) and not keywords


_DEFAULTS = TranscribeOptions()


@dataclass(frozen=True, kw_only=True)
class CTCSetup(CallSetup):
    """What all windows of a call have in common. `submit` is `CTCEngine.submit`.

    Attributes:
        limit: longest window, in seconds, if the call chooses windows.
    """

    model: GraniteSpeech5ForCTC
    processor: GraniteSpeech5Processor
    limit: float

    @classmethod
    def of(cls, model: GraniteSpeech5ForCTC, processor: GraniteSpeech5Processor, options: TranscribeOptions, **others: Any) -> Self:
        """As `Setup.of`."""
        check_processor(processor, GraniteSpeech5Processor)
        check_ctc_options(options)
        limit, notes = window_seconds(options, _USUAL_WINDOW, LONGEST_WINDOW, "because they take memory")
        return cls(model=model, processor=processor, options=options, notes=notes, limit=limit, **others)

    @property
    def rate(self) -> int:
        return self._extractor.sampling_rate

    @property
    def _extractor(self) -> GraniteSpeech5FeatureExtractor:
        return self.processor.feature_extractor

    @cached_property
    def frame_seconds(self) -> float:
        """From one frame out of the encoder to the next: 0.08 of the released model."""
        return block_samples(self._config, self._extractor) / self._config.context_size / self.rate

    @property
    def level_seconds(self) -> float:
        """From one value of `level` to the next."""
        return self._extractor.hop_length / self.rate

    @property
    def _config(self) -> GraniteSpeech5EncoderConfig:
        return self.model.config.encoder_config

    @property
    def cuts(self) -> dict[str, Any]:
        """At pauses or at equal distances if the call says so; otherwise in blocks."""
        options = self.options
        if options.chooses_windows:
            return {"limit": self.limit, "segmentation": options.segmentation, "overlap": options.chunk_overlap}
        block = block_samples(self._config, self._extractor) / self.rate
        margin = min(reach(self._config, self._extractor), math.ceil(_MARGIN / self._config.context_size))
        given = max(1, round(_GIVEN.get(self.model.device.type, _GIVEN["cuda"]) / block))
        return {"limit": (given + 2 * margin) * block, "segmentation": "blocks", "overlap": 2 * margin * block}

    def piece(self, window: Window, is_first: bool) -> WindowPiece:
        return WindowPiece(self, window, is_first)

    def inputs(self, samples: Tensor, is_first: bool = False) -> BatchFeature:
        with torch.no_grad():  # without the mask, which would be read from the device
            return self.processor(samples, device=self.model.device, return_attention_mask=False)

    def level(self, inputs: BatchFeature) -> Tensor:
        features, bands = inputs["input_features"][0], self._extractor.num_mel_bins
        return loudness(features.view(-1, 2, 2, bands)[:, :, 0].flatten(1), bands)  # without the deltas

    def text(self, ids: list[int]) -> str:
        """Of tokens."""
        return self.processor.decode(ids, skip_special_tokens=True, group_tokens=False)
