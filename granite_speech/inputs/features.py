"""The feature extractor: clips to padded log-mel features, and its configuration files.

The counterpart of transformers' `GraniteSpeechFeatureExtractor`. `log_mel` computes the features.
"""

from collections.abc import Mapping
from typing import Any

import torch

from granite_speech.errors import AudioError, ConfigError
from granite_speech.inputs.batch import BatchFeature
from granite_speech.inputs.clips import as_clips
from granite_speech.inputs.extractor import Extractor
from granite_speech.inputs.log_mel import FrameCounts, LogMel, count_frames
from granite_speech.inputs.text_options import check_choice

__all__ = ["FrameCounts", "GraniteSpeechFeatureExtractor", "count_frames"]


_MELSPEC = {"sampling_rate": "sample_rate", "n_fft": "n_fft", "win_length": "win_length", "hop_length": "hop_length", "n_mels": "n_mels"}
# Entries of a configuration file that can be replaced when loading.
_ENTRIES = (
    *_MELSPEC, "projector_window_size", "projector_downsample_rate", "padding_value", "feature_size", "melspec_kwargs", "padding_side",
    "return_attention_mask",
)  # fmt: skip


class GraniteSpeechFeatureExtractor(LogMel, Extractor):
    """Turns clips into log-mel features.

    Args:
        sampling_rate: of every clip, in Hz; clips are not resampled here (see `granite_speech.inputs.audio`).
        n_fft: FFT size in samples, even.
        win_length: Hann window in samples, at most n_fft.
        hop_length: samples from one mel frame to the next.
        n_mels: mel bands.
        projector_window_size: encoder frames in a projector window.
        projector_downsample_rate: divides projector_window_size; a window gives window / rate audio tokens.
        padding_value: what `pad` fills with.
        feature_size: kept for files that have it; it has no effect.
        melspec_kwargs: as written by transformers 4.x. Its entries (sample_rate, n_fft, win_length, hop_length,
            n_mels) take precedence over the arguments of the same meaning.
        **kwargs: kept for `to_dict`, and attributes; `padding_side` and `return_attention_mask` are those of `pad`.

    Raises:
        ConfigError: a size that is not a positive integer or is too large, or sizes that contradict each other.
        UnsupportedError: melspec_kwargs asks for another kind of spectrogram.
    """

    SETTINGS = _ENTRIES
    model_input_names = ["input_features"]  # noqa: RUF012 (a list, as in transformers)

    def __init__(
        self,
        sampling_rate: int = 16000,
        n_fft: int = 512,
        win_length: int = 400,
        hop_length: int = 160,
        n_mels: int = 80,
        projector_window_size: int = 15,
        projector_downsample_rate: int = 5,
        padding_value: float = 0.0,
        feature_size: int | None = None,
        melspec_kwargs: dict[str, Any] | None = None,
        **kwargs,
    ):
        sizes = {
            "sample_rate": sampling_rate,
            "n_fft": n_fft,
            "win_length": win_length,
            "hop_length": hop_length,
            "n_mels": n_mels,
        }
        if not isinstance(melspec_kwargs, dict | None):
            raise ConfigError(
                got=f"melspec_kwargs = {melspec_kwargs!r:.100}", expected="an object", remedy="Correct it in preprocessor_config.json"
            )
        given = melspec_kwargs or {}
        others = {name: value for name, value in given.items() if name not in sizes}
        super().__init__(
            {name: given.get(name, value) for name, value in sizes.items()}, others, projector_window_size, projector_downsample_rate
        )
        self.padding_value = padding_value
        self.feature_size = self.melspec_kwargs["n_mels"] if feature_size is None else feature_size
        self._keep(kwargs)

    def __call__(
        self,
        audios,
        device: str | torch.device | None = "cpu",
        *,
        sampling_rate: int | None = None,
        return_tensors: str | None = None,
    ) -> BatchFeature:
        """Features of a batch, padded, as the model's public `forward` takes them.

        Args:
            audios: one clip `(samples,)`, clips of one length `(batch, samples)`, or a list of clips `(samples,)` or
                `(1, samples)` of any lengths; numpy arrays or tensors, floating point in [-1, 1] or int16.
            device: of the computation and the result; None for the device of the first clip.
            sampling_rate: of the clips, in Hz, to have it checked.
            return_tensors: "pt" or None for tensors; "np" for arrays.

        Returns:
            input_features `(batch, max_frames, 2 * n_mels)` float32, zero after a clip's end; audio_embed_sizes, the list of
            audio tokens of each clip; input_features_mask `(batch, max_tokens)` bool on the CPU; input_features_lengths, encoder
            frames of each clip, `(batch,)` int64 on the CPU.

        Raises:
            AudioError: no clips, or a clip that is empty, too short for one audio token, not finite, complex, of another integer type
                or another rank; another sampling_rate than the extractor's.
            InputError: neither an array nor a list, or no such device.
        """
        check_choice("return_tensors", return_tensors, (None, "pt", "np"))
        self._check_rate(sampling_rate)
        clips = as_clips(audios)
        counts = [self.count_frames(clip.numel()) for clip in clips]
        packed, lengths = self.extract_packed(clips, clips[0].device if device is None else device)
        tokens = [count.tokens for count in counts]
        if 0 in tokens:
            index, hop = tokens.index(0), self.melspec_kwargs["hop_length"]
            raise AudioError(
                got=f"clip {index} has {clips[index].numel()} samples, too few for one audio token",
                expected=f"at least {hop} samples, {hop / self.sampling_rate:.3g} s",
                remedy="Omit the clip: it is too short for speech",
            )
        mask = torch.arange(max(tokens), device="cpu").view(1, -1) < torch.tensor(tokens, device="cpu").view(-1, 1)
        batch = BatchFeature(
            input_features=torch.nn.utils.rnn.pad_sequence(packed.split(lengths), batch_first=True),
            audio_embed_sizes=tokens,
            input_features_mask=mask,
            input_features_lengths=torch.tensor(lengths, dtype=torch.int64, device="cpu"),
        )
        return batch.convert_to_tensors(None if return_tensors == "pt" else return_tensors, ["audio_embed_sizes"])

    def to_dict(self) -> dict[str, Any]:
        """The contents of a configuration file: plain names for transformers 5.x, melspec_kwargs for 4.x."""
        mel = dict(self.melspec_kwargs)
        del mel["sample_rate"]
        return {
            **{name: getattr(self, name, value) for name, value in self.extra_kwargs.items()},
            "feature_extractor_type": type(self).__name__,
            "sampling_rate": self.sampling_rate,
            **mel,
            "melspec_kwargs": dict(self.melspec_kwargs),
            "projector_window_size": self.projector_window_size,
            "projector_downsample_rate": self.projector_downsample_rate,
            "padding_value": self.padding_value,
            "feature_size": self.feature_size,
        }

    @classmethod
    def _changed(cls, contents: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
        """The contents with changes; a size is changed in both places that a file gives it."""
        melspec = changes.get("melspec_kwargs", contents.get("melspec_kwargs"))
        if isinstance(melspec, dict):
            melspec = melspec | {_MELSPEC[name]: value for name, value in changes.items() if name in _MELSPEC}
            return {**contents, **changes, "melspec_kwargs": melspec}
        return {**contents, **changes}
