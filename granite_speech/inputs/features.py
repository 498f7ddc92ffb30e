"""The feature extractor: clips to padded log-mel features, and its configuration files.

The counterpart of transformers' `GraniteSpeechFeatureExtractor`. `log_mel` computes the features.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from granite_speech.checkpoints.call_options import HUB_OPTIONS, hub_options
from granite_speech.checkpoints.folder import load_json, resolve
from granite_speech.checkpoints.upload import PushToHub, saving
from granite_speech.errors import AudioError, ConfigError, InputError
from granite_speech.inputs.batch import BatchFeature
from granite_speech.inputs.clips import as_clips
from granite_speech.inputs.feature_padding import pad_features
from granite_speech.inputs.log_mel import FrameCounts, LogMel, count_frames
from granite_speech.inputs.processor_files import EXTRACTOR, EXTRACTOR_TYPE, extractor_arguments, read_configuration, write_json
from granite_speech.inputs.sources import arrays_and_rates
from granite_speech.inputs.text_options import check_choice

__all__ = ["FrameCounts", "GraniteSpeechFeatureExtractor", "count_frames"]


_MELSPEC = {"sampling_rate": "sample_rate", "n_fft": "n_fft", "win_length": "win_length", "hop_length": "hop_length", "n_mels": "n_mels"}
# Entries of a configuration file that can be replaced when loading.
_ENTRIES = (
    *_MELSPEC, "projector_window_size", "projector_downsample_rate", "padding_value", "feature_size", "melspec_kwargs", "padding_side",
    "return_attention_mask",
)  # fmt: skip


class GraniteSpeechFeatureExtractor(LogMel, PushToHub):
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
    padding_side = "right"
    return_attention_mask = True

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
        for name in ("processor_class", "feature_extractor_type"):
            kwargs.pop(name, None)
        self.extra_kwargs = kwargs
        for name, value in kwargs.items():
            if not callable(getattr(type(self), name, None)):
                setattr(self, name, value)

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
        if sampling_rate not in (None, self.sampling_rate):
            raise AudioError(
                got=f"clips with a sampling rate of {sampling_rate!r:.40}",
                expected=f"{self.sampling_rate} Hz",
                remedy="Resample them with granite_speech.inputs.audio.resample, or pass them to the processor, which does",
            )
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

    def fetch_audio(self, audio_url_or_urls: Any, sampling_rate: int | None = None) -> Any:
        """Sound files as float32 arrays `(samples,)`; arrays are returned as they are. A list gives a list.

        Args:
            audio_url_or_urls: a path, an array, or a list of them. Network addresses are refused.
            sampling_rate: to which files are resampled, in Hz; None for the extractor's.
        """
        if isinstance(audio_url_or_urls, list | tuple):
            return [self.fetch_audio(one, sampling_rate) for one in audio_url_or_urls]
        if isinstance(audio_url_or_urls, np.ndarray | torch.Tensor):
            return audio_url_or_urls
        arrays, _ = arrays_and_rates(str(audio_url_or_urls), None, sampling_rate or self.sampling_rate)
        return arrays[0].numpy()

    def pad(
        self,
        processed_features: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        padding: bool | str = True,
        max_length: int | None = None,
        truncation: bool = False,
        pad_to_multiple_of: int | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
    ) -> BatchFeature:
        """Pads features of several clips to one length, as data collators do.

        Args:
            processed_features: a dictionary with input_features, clips `(frames, 2 * n_mels)` in a list; or a list of such
                dictionaries, each of one clip.
            padding: True or "longest", "max_length", or False.
            max_length: in frames.
            truncation: whether longer clips are cut to max_length.
            pad_to_multiple_of: rounds lengths up.
            return_attention_mask: whether to add attention_mask `(clips, frames)`, 1 for frames and 0 for padding; None for the attribute.
            return_tensors: "pt" or "np"; None for the form of the input.

        Raises:
            InputError: no input_features, or options that contradict each other.
        """
        mask = self.return_attention_mask if return_attention_mask is None else return_attention_mask
        left = self.padding_side == "left"
        entries, kind = pad_features(
            processed_features, padding, max_length, truncation, pad_to_multiple_of, mask, left=left, filler=self.padding_value
        )
        return BatchFeature(entries, tensor_type=return_tensors or kind)

    # --- files --------------------------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The contents of a configuration file: plain names for transformers 5.x, melspec_kwargs for 4.x."""
        mel = dict(self.melspec_kwargs)
        del mel["sample_rate"]
        return {
            **{name: getattr(self, name, value) for name, value in self.extra_kwargs.items()},
            "feature_extractor_type": EXTRACTOR_TYPE,
            "sampling_rate": self.sampling_rate,
            **mel,
            "melspec_kwargs": dict(self.melspec_kwargs),
            "projector_window_size": self.projector_window_size,
            "projector_downsample_rate": self.projector_downsample_rate,
            "padding_value": self.padding_value,
            "feature_size": self.feature_size,
        }

    @classmethod
    def from_dict(cls, feature_extractor_dict: Mapping[str, Any], **changes: Any) -> Any:
        """From the contents of a configuration file.

        Args:
            feature_extractor_dict: the contents.
            changes: replace entries. With return_unused_kwargs=True, those that are no entries are returned too.

        Raises:
            ConfigError, UnsupportedError: as the class.
            InputError: a change of something that is not an entry.
        """
        return_unused = changes.pop("return_unused_kwargs", False)
        names = {*feature_extractor_dict, *_ENTRIES}
        unused = {name: value for name, value in changes.items() if name not in names}
        if unused and not return_unused:
            raise InputError(got=f"unknown options {', '.join(unused)}", expected=", ".join(sorted(names)), remedy="Remove them")
        changes = {name: value for name, value in changes.items() if name in names}
        extractor = cls(**extractor_arguments(_changed(feature_extractor_dict, changes)))
        return (extractor, unused) if return_unused else extractor

    @classmethod
    def get_feature_extractor_dict(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The contents of a folder's configuration file, and the options that are changes of it. options: as in `from_pretrained`."""
        names = {*_ENTRIES, "return_unused_kwargs"}
        if options.get("return_unused_kwargs"):
            names |= options.keys() - set(HUB_OPTIONS)
        changes = {name: options.pop(name) for name in list(options) if name in names}
        path = Path(pretrained_model_name_or_path).expanduser()
        if path.is_file():
            hub_options(options, "GraniteSpeechFeatureExtractor.from_pretrained")
            return load_json(path), changes
        folder = resolve(pretrained_model_name_or_path, **hub_options(options, "GraniteSpeechFeatureExtractor.from_pretrained"))
        return read_configuration(folder)[0], changes

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        revision: str | None = None,
        **options: Any,
    ) -> Any:
        """Loads the feature extractor of a folder, a hub id or a JSON file.

        Args:
            pretrained_model_name_or_path: a JSON file, or as in `granite_speech.checkpoints.hub.resolve`.
            cache_dir, force_download, local_files_only, token, revision: as in `resolve`.
            options: subfolder; arguments of the class, which replace
                those in the file; return_unused_kwargs; and options of transformers that change nothing here.

        Raises:
            CheckpointNotFoundError: no such folder or id, or no configuration in it.
            CheckpointError, ConfigError, UnsupportedError: a file with invalid contents, or of another model.
            InputError: an unknown option.
        """
        options |= {"cache_dir": cache_dir, "force_download": force_download, "local_files_only": local_files_only, "token": token}
        options["revision"] = revision
        contents, changes = cls.get_feature_extractor_dict(pretrained_model_name_or_path, **options)
        return cls.from_dict(contents, **changes)

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **options: Any) -> list[str]:
        """Writes preprocessor_config.json.

        Args:
            save_directory: created if missing.
            push_to_hub: also upload it.
            options: of the upload: repo_id, commit_message, private, token …

        Returns:
            The path of the file, in a list.
        """
        with saving(save_directory, "GraniteSpeechFeatureExtractor.save_pretrained", push_to_hub=push_to_hub, options=options) as folder:
            self.to_json_file(folder / EXTRACTOR)
        return [str(folder / EXTRACTOR)]

    @classmethod
    def from_json_file(cls, json_file: str | Path) -> "GraniteSpeechFeatureExtractor":
        """From a configuration file."""
        return cls.from_dict(load_json(json_file))

    def to_json_string(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def to_json_file(self, json_file_path: str | Path) -> None:
        """Writes a configuration file."""
        write_json(Path(json_file_path), self.to_dict())

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"


def _changed(contents: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The contents with changes; a size is changed in both places that a file gives it."""
    melspec = changes.get("melspec_kwargs", contents.get("melspec_kwargs"))
    if isinstance(melspec, dict):
        melspec = melspec | {_MELSPEC[name]: value for name, value in changes.items() if name in _MELSPEC}
        return {**contents, **changes, "melspec_kwargs": melspec}
    return {**contents, **changes}
