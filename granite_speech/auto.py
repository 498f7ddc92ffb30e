"""transformers' `Auto` classes for this one model family; any other `model_type` is refused by name.

With these, a model card's snippet runs with one changed import:

    from granite_speech import AutoModelForSpeechSeq2Seq, AutoProcessor
"""

from pathlib import Path
from typing import Any

from granite_speech.checkpoints.folder import load_json, resolve
from granite_speech.config import GraniteSpeechConfig
from granite_speech.config_files import config_from_dict
from granite_speech.errors import InputError, UnsupportedError
from granite_speech.inputs.features import GraniteSpeechFeatureExtractor
from granite_speech.inputs.processor import GraniteSpeechProcessor
from granite_speech.inputs.tokenizer import GraniteSpeechTokenizer
from granite_speech.model import GraniteSpeechForConditionalGeneration

__all__ = ["AutoConfig", "AutoFeatureExtractor", "AutoModelForSpeechSeq2Seq", "AutoProcessor", "AutoTokenizer"]

_HUB_OPTIONS = {"revision", "cache_dir", "local_files_only", "token"}


class AutoConfig:
    """The configuration of a folder."""

    @staticmethod
    def from_pretrained(pretrained_model_name_or_path: str | Path, **hub: Any) -> GraniteSpeechConfig:
        """Read config.json.

        Args:
            pretrained_model_name_or_path: a folder, "embedded", or a hub id such as "ibm-granite/granite-speech-3.3-2b" (`hub.resolve`).
            hub: revision, cache_dir, local_files_only and token.

        Raises:
            UnsupportedError: another model_type.
            CheckpointNotFoundError, CheckpointError, ConfigError, InputError: as in
                `GraniteSpeechForConditionalGeneration.from_pretrained`.
        """
        return _config(_folder(pretrained_model_name_or_path, hub))


class AutoModelForSpeechSeq2Seq:
    """The model of a folder."""

    @staticmethod
    def from_pretrained(pretrained_model_name_or_path: str | Path, **options: Any) -> GraniteSpeechForConditionalGeneration:
        """As `GraniteSpeechForConditionalGeneration.from_pretrained`."""
        return GraniteSpeechForConditionalGeneration.from_pretrained(pretrained_model_name_or_path, **options)

    @staticmethod
    def from_config(config: GraniteSpeechConfig) -> GraniteSpeechForConditionalGeneration:
        """A model with random weights."""
        return GraniteSpeechForConditionalGeneration(config)


class AutoProcessor:
    """Feature extractor and tokenizer of a folder."""

    @staticmethod
    def from_pretrained(pretrained_model_name_or_path: str | Path, **hub: Any) -> GraniteSpeechProcessor:
        """As `GraniteSpeechProcessor.from_pretrained`; a config.json, if present, must be of this model family."""
        return GraniteSpeechProcessor.from_pretrained(_processing_folder(pretrained_model_name_or_path, hub))


class AutoTokenizer:
    """The tokenizer of a folder."""

    @staticmethod
    def from_pretrained(pretrained_model_name_or_path: str | Path, **hub: Any) -> GraniteSpeechTokenizer:
        """As `GraniteSpeechTokenizer.from_folder`, with the same check as `AutoProcessor`."""
        return GraniteSpeechTokenizer.from_folder(_processing_folder(pretrained_model_name_or_path, hub))


class AutoFeatureExtractor:
    """The feature extractor of a folder."""

    @staticmethod
    def from_pretrained(pretrained_model_name_or_path: str | Path, **hub: Any) -> GraniteSpeechFeatureExtractor:
        """The feature extractor of `AutoProcessor`."""
        return AutoProcessor.from_pretrained(pretrained_model_name_or_path, **hub).audio_processor


def _folder(name_or_path: str | Path, hub: dict[str, Any]) -> Path:
    if unknown := hub.keys() - _HUB_OPTIONS:
        raise InputError(
            got=f"unknown options {', '.join(sorted(unknown))} for from_pretrained",
            expected=", ".join(sorted(_HUB_OPTIONS)),
            remedy="Remove them; code from a checkpoint is never run",
        )
    return resolve(name_or_path, **hub)


def _config(folder: Path) -> GraniteSpeechConfig:
    config = config_from_dict(load_json(folder / "config.json"))
    if not isinstance(config, GraniteSpeechConfig):
        raise UnsupportedError(
            got=f"model_type {config.model_type!r}, which is part of a model",
            expected="'granite_speech' or 'granite_speech_plus'",
            remedy="Pass the folder of the whole checkpoint",
        )
    return config


def _processing_folder(name_or_path: str | Path, hub: dict[str, Any]) -> Path:
    """The folder, which may hold only a processor."""
    folder = _folder(name_or_path, hub)
    if (folder / "config.json").is_file():
        _config(folder)
    return folder
