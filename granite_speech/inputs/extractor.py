"""What the feature extractors of both model families have: files, and the padding of features that are already computed."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch

from granite_speech.checkpoints.call_options import HUB_OPTIONS, hub_options
from granite_speech.checkpoints.folder import load_json, resolve
from granite_speech.checkpoints.upload import PushToHub, saving
from granite_speech.errors import AudioError, InputError
from granite_speech.inputs.batch import BatchFeature
from granite_speech.inputs.feature_padding import pad_features
from granite_speech.inputs.processor_files import EXTRACTOR, extractor_arguments, read_configuration, write_json
from granite_speech.inputs.sources import arrays_and_rates

__all__ = ["Extractor"]


class Extractor(PushToHub):
    """Base of the feature extractors."""

    SETTINGS: ClassVar[tuple[str, ...]]  # entries of a configuration file that can be replaced when loading
    sampling_rate: int
    padding_value: float
    padding_side = "right"
    return_attention_mask = True

    def _keep(self, extra: dict[str, Any]) -> None:
        """Entries of a file without a meaning here are kept for `to_dict`, and are attributes unless a method has the name."""
        for name in ("processor_class", "feature_extractor_type"):
            extra.pop(name, None)
        self.extra_kwargs = extra
        for name, value in extra.items():
            if not callable(getattr(type(self), name, None)):
                setattr(self, name, value)

    def _check_rate(self, sampling_rate: int | None) -> None:
        if sampling_rate not in (None, self.sampling_rate):
            raise AudioError(
                got=f"clips with a sampling rate of {sampling_rate!r:.40}",
                expected=f"{self.sampling_rate} Hz",
                remedy="Resample them with granite_speech.inputs.audio.resample, or pass them to the processor, which does",
            )

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
        """The contents of a configuration file."""
        raise NotImplementedError

    @classmethod
    def _changed(cls, contents: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
        """The contents of a file, with changes."""
        return {**contents, **changes}

    @classmethod
    def from_dict(cls, feature_extractor_dict: Mapping[str, Any], **changes: Any) -> Self | tuple[Self, dict[str, Any]]:
        """From the contents of a configuration file.

        Args:
            feature_extractor_dict: the contents.
            changes: replace entries. With return_unused_kwargs=True, those that are no entries are returned too.

        Raises:
            ConfigError, UnsupportedError: as the class.
            InputError: a change of something that is not an entry.
        """
        return_unused = changes.pop("return_unused_kwargs", False)
        names = {*feature_extractor_dict, *cls.SETTINGS}
        unused = {name: value for name, value in changes.items() if name not in names}
        if unused and not return_unused:
            raise InputError(got=f"unknown options {', '.join(unused)}", expected=", ".join(sorted(names)), remedy="Remove them")
        changes = {name: value for name, value in changes.items() if name in names}
        extractor = cls(**extractor_arguments(cls._changed(feature_extractor_dict, changes), cls.__name__))
        return (extractor, unused) if return_unused else extractor

    @classmethod
    def get_feature_extractor_dict(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The contents of a folder's configuration file, and the options that are changes of it. options: as in `from_pretrained`."""
        names = {*cls.SETTINGS, "return_unused_kwargs"}
        if options.get("return_unused_kwargs"):
            names |= options.keys() - set(HUB_OPTIONS)
        changes = {name: options.pop(name) for name in list(options) if name in names}
        path = Path(pretrained_model_name_or_path).expanduser()
        if path.is_file():
            hub_options(options, f"{cls.__name__}.from_pretrained")
            return load_json(path), changes
        folder = resolve(pretrained_model_name_or_path, **hub_options(options, f"{cls.__name__}.from_pretrained"))
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
    ) -> Self | tuple[Self, dict[str, Any]]:
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
        with saving(save_directory, f"{type(self).__name__}.save_pretrained", push_to_hub=push_to_hub, options=options) as folder:
            self.to_json_file(folder / EXTRACTOR)
        return [str(folder / EXTRACTOR)]

    @classmethod
    def from_json_file(cls, json_file: str | Path) -> Self:
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
