"""TurboCTC's processor: clips to the inputs of the model's `forward` and `generate`, and text to labels.

The counterpart of transformers 5.23's `GraniteSpeech5Processor`. Reads and writes its files.
"""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Self

import torch

from granite_speech.errors import InputError
from granite_speech.inputs.batch import BatchFeature
from granite_speech.inputs.call_arguments import group, only_one, refuse_other_modalities
from granite_speech.inputs.clips import clips_of_batch
from granite_speech.inputs.ctc_tokenizer import GraniteSpeech5Tokenizer
from granite_speech.inputs.delta_features import GraniteSpeech5FeatureExtractor
from granite_speech.inputs.processor_base import ProcessorBase
from granite_speech.inputs.sources import arrays_and_rates, resampled
from granite_speech.inputs.text_options import TextOptions

__all__ = ["GraniteSpeech5Processor"]

_TEXT = {one.name for one in fields(TextOptions)} | {"text_pair"}
_AUDIO = {"padding", "max_length", "truncation", "pad_to_multiple_of", "return_attention_mask", "return_tensors", "device"}
_EVERY = _TEXT | _AUDIO
_RATE = "sampling_rate"


class GraniteSpeech5Processor(ProcessorBase):
    """A feature extractor for clips and a tokenizer for their texts.

    Args:
        feature_extractor: of the clips.
        tokenizer: of the texts; its pad token is CTC's blank.
        chat_template: replaces the tokenizer's, and is only kept: the model takes no prompts.
    """

    extractor_class = GraniteSpeech5FeatureExtractor
    tokenizer_class = GraniteSpeech5Tokenizer
    attributes = ("feature_extractor", "tokenizer")

    def __init__(
        self,
        feature_extractor: GraniteSpeech5FeatureExtractor,
        tokenizer: GraniteSpeech5Tokenizer,
        chat_template: str | dict[str, str] | None = None,
    ):
        self.feature_extractor = feature_extractor
        self.tokenizer = tokenizer
        self.chat_template = tokenizer.chat_template if chat_template is None else chat_template

    def __call__(
        self,
        audio: Any = None,
        text: Any = None,
        sampling_rate: int | None = None,
        *,
        device: str | torch.device | None = "cpu",
        return_tensors: str | None = None,
        **options: Any,
    ) -> BatchFeature:
        """The model's inputs for clips, and labels for their texts.

        Args:
            audio: one clip or several: arrays and lists as in `GraniteSpeech5FeatureExtractor.__call__`, paths or other sound files, or
                entries of `datasets`, which say their own rate (`sources.arrays_and_rates`). None for text alone.
            text: the text of each clip; None for no labels.
            sampling_rate: of clips that do not say theirs, in Hz; None for the model's. Clips at another rate, which transformers refuses,
                are resampled (`granite_speech.inputs.audio.resample`, which needs torchaudio).
            device: of the features and their mask. Labels stay on the CPU until `.to(device)`.
            return_tensors: "pt"; "np" for arrays; None for features in tensors and labels in lists.
            options: of the tokenizer, of the feature extractor (truncation, max_length and pad_to_multiple_of count samples there), or of
                both, as transformers has them: `padding=True` is for both. text_kwargs, audio_kwargs and common_kwargs are dictionaries
                for one or both. Without `padding`, clips are padded, and texts if they become tensors.

        Returns:
            input_features `(clips, frames, 4 * num_mel_bins)` float32 and attention_mask `(clips, frames)` int64 for clips; labels
            `(clips, tokens)` int64 for texts, padded with the blank. Text alone has the attention_mask of its tokens.

        Raises:
            InputError: neither audio nor text, a text without a clip or the reverse, unknown options, or one given twice.
            AudioError: a clip that cannot be used or is too short for one frame; an impossible rate.
            UnsupportedError: options of another modality.
            MissingDependencyError: another sampling rate, and torchaudio cannot be imported.
        """
        options |= {} if return_tensors is None else {"return_tensors": return_tensors}
        options |= {} if device == "cpu" else {"device": device}
        audio = only_one(audio, options.pop("audios", None))
        text_options, audio_options, rate = _sorted_options(options, sampling_rate)
        if audio is None and text is None:
            raise InputError(got="neither audio nor text", expected="clips, or texts for labels", remedy="Pass audio")
        features = BatchFeature() if audio is None else self._features(audio, rate, audio_options)
        if text is None:
            return features
        text_options.setdefault("padding", text_options.get("return_tensors") is not None)
        encoded = self.tokenizer(text, **text_options)
        texts = len(encoded.encodings)
        if audio is not None and texts != len(features.input_features) and not text_options.get("return_overflowing_tokens"):
            raise InputError(
                got=f"{texts} text(s) for {len(features.input_features)} clip(s)",
                expected="one text for each clip",
                remedy="Pass lists of one length",
            )
        entries = dict(encoded)
        labels = entries.pop("input_ids")
        if audio is not None:
            entries.pop("attention_mask", None)  # the model's is that of the frames
        return BatchFeature({**entries, **features, "labels": labels})

    def _features(self, audio: Any, sampling_rate: int | None, options: Mapping[str, Any]) -> BatchFeature:
        target = self.feature_extractor.sampling_rate
        arrays, rates = arrays_and_rates(audio, sampling_rate, target)
        return self.feature_extractor(resampled(clips_of_batch(arrays), rates, target), **options)

    @property
    def model_input_names(self) -> list[str]:
        """Names of the model's inputs that the parts make."""
        return [*self.feature_extractor.model_input_names, "labels"]

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
    ) -> Self:
        """Loads the processor of a folder or hub id.

        Args:
            pretrained_model_name_or_path: as in `granite_speech.checkpoints.hub.resolve`.
            cache_dir, force_download, local_files_only, token, revision: as in `resolve`.
            options: subfolder; settings that replace those in the folder: of the tokenizer, and arguments of the feature extractor; and
                options of transformers that change nothing here.

        Raises:
            CheckpointNotFoundError: no such folder or id, no feature extractor in it, or no tokenizer.json.
            CheckpointError, ConfigError: a file with invalid contents.
            UnsupportedError: the feature extractor of another model.
            InputError: unknown options.
        """
        hub = {"cache_dir": cache_dir, "force_download": force_download, "local_files_only": local_files_only, "token": token}
        extractor, tokenizer, _ = cls._load(pretrained_model_name_or_path, options | hub | {"revision": revision})
        return cls(extractor, tokenizer)

    @classmethod
    def from_args_and_dict(cls, args: Any, processor_dict: Mapping[str, Any], **changes: Any) -> Self:
        """A processor of a feature extractor and a tokenizer, `args`, with the chat_template of a dictionary."""
        return cls(*args, chat_template={**processor_dict, **changes}.get("chat_template"))


def _sorted_options(options: dict[str, Any], sampling_rate: int | None) -> tuple[dict[str, Any], dict[str, Any], int | None]:
    """A call's options for the tokenizer and for the feature extractor, and the rate of the clips.

    As in transformers, those without a dictionary of their own are for every part that has an option of the name, and common ones give way.

    Raises:
        InputError: an unknown option, or one that is given twice with different values.
        UnsupportedError: options of another modality.
    """
    options = dict(options)
    text, audio, common = (group(options, name) for name in ("text_kwargs", "audio_kwargs", "common_kwargs"))
    refuse_other_modalities(options)
    for values in (audio, text, common, options):
        values.pop("load_audio_backend", None)  # files are always decoded with FFmpeg
    rates = {audio.pop(_RATE, None), common.pop(_RATE, None), sampling_rate} - {None}
    if len(rates) > 1:
        raise InputError(got=f"sampling rates {sorted(rates)}", expected="one rate", remedy="Pass sampling_rate once")
    groups = {"text_kwargs": (text, _TEXT), "audio_kwargs": (audio, _AUDIO)}
    for name, (values, known) in (groups | {"common_kwargs": (common, _EVERY), "the call": (options, _EVERY)}).items():
        if unknown := sorted(values.keys() - known):
            raise InputError(
                got=f"unknown options {unknown} in {name}", expected=f"some of {', '.join(sorted(known))}", remedy="Remove them"
            )
    for name, (values, _) in groups.items():
        if twice := sorted(one for one in values.keys() & options.keys() if values[one] != options[one]):
            raise InputError(got=f"{', '.join(twice)} in {name} and as a keyword", expected="each once", remedy="Remove one")
    both = common | options
    return (
        {name: value for name, value in both.items() if name in _TEXT} | text,
        {name: value for name, value in both.items() if name in _AUDIO} | audio,
        rates.pop() if rates else None,
    )
