"""TurboCTC's feature extractor: clips to log-mel features with their deltas.

The counterpart of transformers 5.23's `GraniteSpeech5FeatureExtractor`. Its spectrogram is that of `log_mel`, floored below the
clip's own maximum; the deltas are those of `torchaudio.functional.compute_deltas`. torchaudio itself is not needed.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from granite_speech.config_values import number
from granite_speech.errors import AudioError, ConfigError, InputError
from granite_speech.inputs.batch import BatchFeature
from granite_speech.inputs.clips import check_clips, clips_of_batch
from granite_speech.inputs.extractor import Extractor
from granite_speech.inputs.log_mel import Spectrogram, as_device, check_sizes
from granite_speech.inputs.padding import round_up
from granite_speech.inputs.sources import arrays_and_rates
from granite_speech.inputs.text_options import UNLIMITED, check_choice, padding_and_limit

__all__ = ["CTCFrameCounts", "GraniteSpeech5FeatureExtractor", "count_ctc_frames"]

_SIZES = ("num_mel_bins", "sampling_rate", "n_fft", "win_length", "hop_length", "delta_win_length")
_STACKED = 2  # mel frames in an encoder frame


class CTCFrameCounts(NamedTuple):
    """The length of one clip at each stage."""

    mel: int
    encoder: int
    output: int


def count_ctc_frames(samples: int, *, hop_length: int = 160, subsamplings: int = 2) -> CTCFrameCounts:
    """Lengths of a clip of `samples` samples: mel frames, frames into the encoder (pairs of mel frames, the last one filled), and frames
    out of it after `subsamplings` blocks that halve them and drop an odd one (`GraniteSpeech5EncoderConfig.subsamplings`).

    A clip shorter than one hop has no frame; the feature extractor refuses it.
    """
    mel = samples // hop_length
    encoder = -(-mel // _STACKED)
    return CTCFrameCounts(mel, encoder, encoder >> subsamplings)


class GraniteSpeech5FeatureExtractor(Spectrogram, Extractor):
    """Turns clips into log-mel features with deltas.

    Args:
        num_mel_bins: mel bands. A frame has 4 * num_mel_bins features: two mel frames, each followed by its delta.
        sampling_rate: of every clip, in Hz; clips are not resampled here (see `granite_speech.inputs.audio`).
        n_fft: FFT size in samples, even.
        win_length: Hann window in samples, at most n_fft.
        hop_length: samples from one mel frame to the next.
        delta_win_length: mel frames that a delta is computed from, at least 3.
        logmel_floor_db: how far below a clip's maximum its features are floored, in powers of ten (in spite of its name).
        padding_value: what `pad` fills with.
        **kwargs: kept for `to_dict`, and attributes; `padding_side` and `return_attention_mask` are those of `pad`. `feature_size` has no
            effect, as in transformers.

    Raises:
        ConfigError: a size that is not a positive integer or is too large, sizes that contradict each other, or a floor that is no number.
    """

    SETTINGS = (*_SIZES, "logmel_floor_db", "padding_value", "feature_size", "padding_side", "return_attention_mask")
    model_input_names = ["input_features", "attention_mask"]  # noqa: RUF012 (a list, as in transformers)
    delta_expansion = 2
    frame_stacking = _STACKED

    def __init__(
        self,
        num_mel_bins: int = 80,
        sampling_rate: int = 16000,
        n_fft: int = 512,
        win_length: int = 400,
        hop_length: int = 160,
        delta_win_length: int = 3,
        logmel_floor_db: float = 8.0,
        padding_value: float = 0.0,
        **kwargs,
    ):
        sizes = dict(zip(_SIZES, (num_mel_bins, sampling_rate, n_fft, win_length, hop_length, delta_win_length), strict=True))
        check_sizes(sizes)
        if delta_win_length < 3:
            raise ConfigError(
                got=f"delta_win_length = {delta_win_length}", expected="at least 3", remedy="Correct it in preprocessor_config.json"
            )
        for name, value in (("logmel_floor_db", logmel_floor_db), ("padding_value", padding_value)):
            if expected := number(-1e6, 1e6)(value):
                raise ConfigError(got=f"{name} = {value!r:.40}", expected=expected, remedy="Correct it in preprocessor_config.json")
        names = {"sample_rate": sampling_rate, "n_fft": n_fft, "win_length": win_length, "hop_length": hop_length, "n_mels": num_mel_bins}
        super().__init__(names)
        self.num_mel_bins, self.n_fft, self.win_length, self.hop_length = num_mel_bins, n_fft, win_length, hop_length
        self.delta_win_length, self.logmel_floor_db, self.padding_value = delta_win_length, logmel_floor_db, padding_value
        kwargs.pop("feature_size", None)
        self.feature_size = num_mel_bins * self.delta_expansion * self.frame_stacking
        self._keep(kwargs)

    def count_frames(self, samples: int, subsamplings: int = 2) -> CTCFrameCounts:
        """`count_ctc_frames` with this extractor's hop."""
        return count_ctc_frames(samples, hop_length=self.hop_length, subsamplings=subsamplings)

    @torch.no_grad()
    def extract_packed(self, audios: Sequence[torch.Tensor], device: str | torch.device) -> tuple[torch.Tensor, list[int]]:
        """Features of all clips, end to end.

        Clips on the CPU are joined there and copied to the device once, without waiting for it. Clips on an accelerator cost
        one wait, to check that they are finite.

        Args:
            audios: clips `(samples,)`, float32, at least one sample each, on any device. A clip shorter than a hop has no frame.
            device: of the computation and the result.

        Returns:
            `(total_frames, 4 * num_mel_bins)` float32 on device, and each clip's number of frames.

        Raises:
            AudioError: as `__call__`, except for clips that are too short.
            InputError: no such device.
        """
        device = as_device(device)
        check_clips(audios)
        samples = [clip.numel() for clip in audios]
        counts = [self.count_frames(one).encoder for one in samples]
        frames = [count * _STACKED for count in counts]
        # An odd last frame gets a partner. Zeros are added if the clip ends before the middle of its window.
        lengths = [max(one, (count - 1) * self.hop_length + 1) for one, count in zip(samples, frames, strict=True)]
        log_mel = self._normalized(audios, lengths, frames, frames, self.logmel_floor_db, device)
        with_deltas = torch.cat((log_mel, self._deltas(log_mel, frames)), dim=1)
        return with_deltas.view(-1, self.feature_size), counts

    def _deltas(self, log_mel: torch.Tensor, frames: Sequence[int]) -> torch.Tensor:
        """The slope of each mel band at each frame, from the frames on either side of it within the clip; the outermost are repeated."""
        reach = (self.delta_win_length - 1) // 2
        ends = np.cumsum(frames)
        first, last = np.repeat(ends - frames, frames), np.repeat(ends - 1, frames)
        rows = np.arange(len(first))
        steps = np.arange(1, reach + 1)[:, None]
        neighbors = np.stack([np.minimum(rows + steps, last), np.maximum(rows - steps, first)])
        after, before = torch.from_numpy(neighbors).to(log_mel.device)
        total = torch.zeros_like(log_mel)
        for step in range(reach):
            total += (log_mel[after[step]] - log_mel[before[step]]) * (step + 1)
        return total.div_(reach * (reach + 1) * (2 * reach + 1) / 3)

    def __call__(
        self,
        raw_speech: Any,
        truncation: bool = False,
        pad_to_multiple_of: int | None = None,
        return_tensors: str | None = None,
        padding: bool | str | None = "longest",
        max_length: int | None = None,
        sampling_rate: int | None = None,
        return_attention_mask: bool = True,
        device: str | torch.device | None = "cpu",
    ) -> BatchFeature:
        """Features of a batch, padded, as the model's public `forward` takes them.

        Each clip has the features that it has alone. In transformers the last frames of a clip that is shorter than the batch see
        the zeros after it, and here, as for a single clip there, its reflected end. Beyond its end there are zeros, where transformers has
        the features of silence; the mask excludes both.

        Args:
            raw_speech: one clip `(samples,)`, clips of one length `(clips, samples)`, `(clips, samples, channels)`, or a list of clips
                `(samples,)` or with at most 8 channels, `(samples, channels)` or `(channels, samples)`, which are averaged; numpy
                arrays, tensors or lists of numbers, floating point in [-1, 1] or int16.
            truncation: whether clips are cut to `max_length`.
            pad_to_multiple_of: of samples, to which the length of the batch is rounded up.
            return_tensors: "pt" or None for tensors; "np" for arrays.
            padding: True or "longest" to pad to the longest clip; "max_length" to pad to `max_length`; False: all clips have one length.
            max_length: in samples.
            sampling_rate: of the clips, in Hz, to have it checked.
            return_attention_mask: whether to return the mask.
            device: of the computation and the result; None for the device of the first clip.

        Returns:
            input_features `(clips, frames, 4 * num_mel_bins)` float32, zero after a clip's end, and attention_mask `(clips, frames)`
            int64, 1 for the clip's frames; both on the device.

        Raises:
            AudioError: no clips, or a clip that is empty, shorter than a hop, not finite, complex, of another integer type
                or another rank; another sampling_rate than the extractor's.
            InputError: neither an array nor a list, no such device, or a length that does not fit the options.
        """
        check_choice("return_tensors", return_tensors, (None, "pt", "np"))
        check_choice("truncation", truncation, (True, False, None))
        self._check_rate(sampling_rate)
        arrays, rates = arrays_and_rates(raw_speech, None, self.sampling_rate)
        for rate in rates:
            self._check_rate(rate)
        clips = clips_of_batch(arrays)
        if padding == "max_length" and max_length is None:
            raise InputError(got="padding='max_length' without max_length", expected="max_length in samples", remedy="Pass max_length")
        padding, limit = padding_and_limit(padding, max_length, UNLIMITED, cut=truncation)
        if truncation and limit is not None:
            clips = [clip[:limit] for clip in clips]
        longest = self._batch_length([clip.numel() for clip in clips], padding, max_length, pad_to_multiple_of)
        self._check_lengths(clips)
        packed, counts = self.extract_packed(clips, clips[0].device if device is None else device)
        features = packed.new_zeros(len(counts), self.count_frames(longest).encoder, self.feature_size)
        for row, clip in zip(features, packed.split(counts), strict=True):
            row[: len(clip)] = clip
        batch = BatchFeature(input_features=features)
        if return_attention_mask:
            mask = np.arange(features.shape[1]) < np.array(counts)[:, None]
            batch["attention_mask"] = torch.from_numpy(mask.astype(np.int64)).to(features.device)
        return batch.convert_to_tensors(None if return_tensors == "pt" else return_tensors)

    def _batch_length(self, samples: list[int], padding: str | None, max_length: int | None, multiple: int | None) -> int:
        """Samples to which all clips are padded."""
        if padding is None and min(samples) != max(samples):
            raise InputError(
                got=f"clips of {min(samples)} to {max(samples)} samples with padding=False",
                expected="clips of one length",
                remedy="Pass padding=True, or one clip at a time",
            )
        length = round_up(max_length if padding == "max_length" else max(samples), multiple)
        if max(samples) > length:
            raise InputError(
                got=f"a clip of {max(samples)} samples with max_length={max_length}",
                expected=f"at most {length} samples",
                remedy="Pass truncation=True, or a larger max_length",
            )
        return length

    def _check_lengths(self, clips: Sequence[torch.Tensor]) -> None:
        for index, clip in enumerate(clips):
            if 0 < clip.numel() < self.hop_length:
                raise AudioError(
                    got=f"clip {index} has {clip.numel()} samples, too few for one frame",
                    expected=f"at least {self.hop_length} samples, {self.hop_length / self.sampling_rate:.3g} s",
                    remedy="Omit the clip: it is too short for speech",
                )

    def to_dict(self) -> dict[str, Any]:
        """The contents of a configuration file, as transformers writes it."""
        names = (*_SIZES, "logmel_floor_db", "padding_value", "feature_size", "padding_side", "return_attention_mask")
        kept = {name: getattr(self, name, value) for name, value in self.extra_kwargs.items()}
        return {**kept, **{name: getattr(self, name) for name in names}, "feature_extractor_type": type(self).__name__}
