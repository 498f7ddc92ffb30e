"""Turns prompts and clips into the inputs of the model's `forward` and `generate`.

The counterpart of transformers' `GraniteSpeechProcessor`. Reads and writes the files of transformers 4.x and 5.x.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from granite_speech.checkpoints.folder import load_json, resolve
from granite_speech.errors import CheckpointError, CheckpointNotFoundError, InputError, UnsupportedError
from granite_speech.inputs.audio import resample
from granite_speech.inputs.clips import check_clips, clips_of_prompt
from granite_speech.inputs.features import BatchFeature, GraniteSpeechFeatureExtractor
from granite_speech.inputs.tokenizer import GraniteSpeechTokenizer, write_chat_template

__all__ = ["BatchFeature", "GraniteSpeechProcessor"]

EXTRACTOR_TYPE = "GraniteSpeechFeatureExtractor"


class GraniteSpeechProcessor:
    """A feature extractor and a tokenizer that agree on the number of audio tokens.

    Args:
        audio_processor: the feature extractor.
        tokenizer: the tokenizer; its audio_token, if it has one, overrides the argument.
        audio_token: the placeholder for one clip in a prompt.
        chat_template: replaces the tokenizer's.
    """

    def __init__(
        self,
        audio_processor: GraniteSpeechFeatureExtractor,
        tokenizer: GraniteSpeechTokenizer,
        audio_token: str = "<|audio|>",
        chat_template: str | dict[str, str] | None = None,
    ):
        self.audio_processor = audio_processor
        self.tokenizer = tokenizer
        self.audio_token: str = getattr(tokenizer, "audio_token", None) or audio_token
        self.chat_template = tokenizer.chat_template if chat_template is None else chat_template

    def __call__(
        self,
        text: str | Sequence[str],
        audio=None,
        device: str | torch.device | None = "cpu",
        sampling_rate: int | None = None,
        return_tensors: str | None = "pt",
        padding: bool = True,
        **kwargs,
    ) -> BatchFeature:
        """The model's inputs for prompts and their clips.

        Args:
            text: one prompt or a list. Each `<|audio|>` is the place of one clip, in order, across all prompts.
            audio: None if no prompt has a placeholder. Else numpy arrays or tensors, floating point in [-1, 1] or int16: one clip
                `(samples,)`; clips of one length `(clips, samples)`, as many rows as placeholders; one clip with at most 8 channels,
                `(samples, channels)` as soundfile returns it or `(channels, samples)` as torchaudio does, for one placeholder; or a
                list of clips. Channels are averaged; if they cancel out, the loudest is used.
            device: of the features. Token ids stay on the CPU until `.to(device)`.
            sampling_rate: of the clips, in Hz; None for the model's. Clips at another rate are resampled
                (`granite_speech.inputs.audio.resample`, which needs torchaudio).
            return_tensors: "pt", or None for token ids in lists.
            padding: whether to pad shorter prompts, on the tokenizer's padding_side.

        Returns:
            input_ids and attention_mask `(prompts, tokens)` int64; with audio also input_features
            `(clips, max_frames, 2 * n_mels)` float32, input_features_mask `(clips, max_tokens)` bool and
            input_features_lengths, encoder frames of each clip as a list.

        Raises:
            InputError: unknown options; placeholders without audio.
            AudioError: another layout, or a number of clips that differs from the number of placeholders (both checked before anything
                is computed); a clip that cannot be used or is too short for one audio token; an impossible rate.
            MissingDependencyError: another sampling rate, and torchaudio cannot be imported.
        """
        if kwargs:
            raise InputError(
                got=f"unknown options {sorted(kwargs)}",
                expected="text, audio, device, sampling_rate, return_tensors and padding",
                remedy="The clips are named audio" if "audios" in kwargs else "Remove them",
            )
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, (list, tuple)) or not all(isinstance(one, str) for one in texts):
            raise InputError(got=f"text of type {type(text).__name__}", expected="a string or a list of strings", remedy="Pass those")
        placeholders = sum(text.count(self.audio_token) for text in texts)
        if audio is None and placeholders:
            raise InputError(
                got=f"{placeholders} placeholder(s) {self.audio_token} for 0 clip(s)",
                expected="one clip for each placeholder",
                remedy="Pass the clips as audio",
            )
        features = BatchFeature()
        if audio is not None:
            clips = clips_of_prompt(audio, placeholders, self.audio_token)
            features = self.audio_processor(self._resampled(clips, sampling_rate), device=device)
        texts = self._expand(texts, features.pop("audio_embed_sizes", []))
        return BatchFeature({**self.tokenizer(texts, padding=padding, return_tensors=return_tensors), **features})

    def _resampled(self, clips: list[torch.Tensor], sampling_rate: int | None) -> list[torch.Tensor]:
        """The clips at the model's rate. They are checked before they are resampled, because a filter would spread a NaN."""
        if sampling_rate is None:
            return clips
        check_clips(clips)
        return [resample(clip, sampling_rate, self.audio_processor.sampling_rate) for clip in clips]

    def _expand(self, texts: Sequence[str], sizes: list[int]) -> list[str]:
        """Repeats each placeholder once for each audio token of its clip."""
        pieces = [text.split(self.audio_token) for text in texts]
        size = iter(sizes)
        return [piece[0] + "".join(self.audio_token * next(size) + rest for rest in piece[1:]) for piece in pieces]

    def decode(self, token_ids, skip_special_tokens: bool = False) -> str | list[str]:
        """See `GraniteSpeechTokenizer.decode`."""
        return self.tokenizer.decode(token_ids, skip_special_tokens)

    def batch_decode(self, sequences, skip_special_tokens: bool = False, *, add_special_tokens: bool = False) -> list[str]:
        """See `GraniteSpeechTokenizer.batch_decode`."""
        return self.tokenizer.batch_decode(sequences, skip_special_tokens, add_special_tokens=add_special_tokens)

    def apply_chat_template(self, conversation, chat_template: str | None = None, tokenize: bool = False, **kwargs):
        """See `GraniteSpeechTokenizer.apply_chat_template`; here, as in transformers, the default is to return text."""
        if chat_template is None and isinstance(self.chat_template, str):
            chat_template = self.chat_template
        elif isinstance(self.chat_template, dict):
            chat_template = self.chat_template.get(chat_template or "default", chat_template)
        return self.tokenizer.apply_chat_template(conversation, chat_template=chat_template, tokenize=tokenize, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **unknown: Any,
    ) -> "GraniteSpeechProcessor":
        """Loads the processor from a folder or hub id.

        5.x keeps the feature extractor inside processor_config.json, 4.x in preprocessor_config.json.

        Raises:
            CheckpointNotFoundError: no such folder or id, or neither file in it, or no tokenizer.json.
            CheckpointError, ConfigError: a file with invalid contents.
            UnsupportedError: the feature extractor of another model.
            InputError: unknown options.
        """
        if unknown:
            raise InputError(
                got=f"unknown options {', '.join(sorted(unknown))} for from_pretrained",
                expected="revision, cache_dir, local_files_only and token",
                remedy="Remove them; code from a checkpoint is never run",
            )
        folder = resolve(
            pretrained_model_name_or_path, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only, token=token
        )
        extractor, audio_token = _read_configuration(folder)
        tokenizer = GraniteSpeechTokenizer.from_folder(folder)
        return cls(GraniteSpeechFeatureExtractor(**extractor), tokenizer, audio_token=audio_token)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes processor_config.json (5.x), preprocessor_config.json (4.x), the tokenizer's files and the chat template."""
        folder = Path(folder)
        self.tokenizer.save_pretrained(folder)
        write_chat_template(folder, self.chat_template)
        name = type(self).__name__
        extractor = self.audio_processor.to_dict()
        _write_json(
            folder / "processor_config.json", {"processor_class": name, "audio_token": self.audio_token, "audio_processor": extractor}
        )
        _write_json(folder / "preprocessor_config.json", {**extractor, "processor_class": name})


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _read_configuration(folder: Path) -> tuple[dict[str, Any], str]:
    """The feature extractor's arguments and the audio token."""
    file, legacy_file = folder / "processor_config.json", folder / "preprocessor_config.json"
    config = load_json(file) if file.is_file() else {}
    extractor, audio_token = config.get("audio_processor"), config.get("audio_token", "<|audio|>")
    if not isinstance(extractor, dict | None) or not isinstance(audio_token, str) or not audio_token:
        raise CheckpointError(
            got=f"{file} with audio_processor {extractor!r:.100} and audio_token {audio_token!r:.100}",
            expected="an object and a token",
            remedy="Download it again",
        )
    if extractor is None:
        if not legacy_file.is_file():
            raise CheckpointNotFoundError(
                got=f"no feature extractor in {folder}",
                expected="processor_config.json with an audio_processor, or preprocessor_config.json",
                remedy="Name a whole checkpoint folder or a hub id",
            )
        extractor = load_json(legacy_file)
    extractor = {name: value for name, value in extractor.items() if name != "processor_class"}
    kind = extractor.pop("feature_extractor_type", EXTRACTOR_TYPE)
    if kind != EXTRACTOR_TYPE:
        raise UnsupportedError(got=f"feature_extractor_type = {kind!r}", expected=EXTRACTOR_TYPE, remedy="Name a Granite Speech checkpoint")
    return extractor, audio_token
