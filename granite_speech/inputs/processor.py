"""Turns prompts and clips into the inputs of the model's `forward` and `generate`.

The counterpart of transformers' `GraniteSpeechProcessor`. Reads and writes the files of transformers 4.x and 5.x.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch

from granite_speech.errors import InputError
from granite_speech.inputs.batch import BatchEncoding, BatchFeature
from granite_speech.inputs.call_arguments import CallArguments, chat_arguments, only_one
from granite_speech.inputs.chat import audio_of, refuse_sanitizing, render_conversations, select_template, text_masks
from granite_speech.inputs.clips import clips_of_prompt, wrong_clips
from granite_speech.inputs.features import GraniteSpeechFeatureExtractor
from granite_speech.inputs.placeholders import count_placeholders, expand, moved, tokens_for
from granite_speech.inputs.processor_base import ProcessorBase
from granite_speech.inputs.sources import arrays_and_rates, resampled
from granite_speech.inputs.tokenizer import GraniteSpeechTokenizer

__all__ = ["BatchFeature", "GraniteSpeechProcessor"]


class GraniteSpeechProcessor(ProcessorBase):
    """A feature extractor and a tokenizer that agree on the number of audio tokens.

    Args:
        audio_processor: the feature extractor.
        tokenizer: the tokenizer; its audio_token, if it has one, overrides the argument.
        audio_token: the placeholder for one clip in a prompt.
        chat_template: replaces the tokenizer's.
    """

    extractor_class = GraniteSpeechFeatureExtractor
    tokenizer_class = GraniteSpeechTokenizer
    attributes = ("audio_processor", "tokenizer")

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
        audio: Any = None,
        device: str | torch.device | None = "cpu",
        sampling_rate: int | None = None,
        return_tensors: str | None = "pt",
        padding: bool | str = True,
        **options: Any,
    ) -> BatchFeature:
        """The model's inputs for prompts and their clips.

        Args:
            text: one prompt or a list. Each `<|audio|>` is the place of one clip, in order, across all prompts. A prompt in which it is
                already there once for each audio token is used as it is.
            audio: None if no prompt has a placeholder. Else numpy arrays or tensors, floating point in [-1, 1] or int16: one clip
                `(samples,)`; clips of one length `(clips, samples)`, as many rows as placeholders; one clip with at most 8 channels,
                `(samples, channels)` as soundfile returns it or `(channels, samples)` as torchaudio does, for one placeholder; or a
                list of clips. Channels are averaged; if they cancel out, the loudest is used. A clip can also be a list of numbers, a
                path or another sound file, or an entry of `datasets`, which says its own rate (`sources.arrays_and_rates`).
            device: of the features. Token ids stay on the CPU until `.to(device)`.
            sampling_rate: of clips that do not say theirs, in Hz; None for the model's. Clips at another rate are resampled
                (`granite_speech.inputs.audio.resample`, which needs torchaudio).
            return_tensors: "pt"; "np" for arrays; or None for token ids in lists.
            padding: whether to pad shorter prompts: True or "longest", "max_length", or False.
            options: others of `GraniteSpeechTokenizer.__call__` (padding_side, truncation, max_length, add_special_tokens, text_target …);
                text_kwargs, audio_kwargs and common_kwargs, dictionaries of options as in transformers; audios, the earlier name of audio.

        Returns:
            input_ids and attention_mask `(prompts, tokens)` int64; with audio also input_features
            `(clips, max_frames, 2 * n_mels)` float32, input_features_mask `(clips, max_tokens)` bool and
            input_features_lengths `(clips,)` int64, the encoder frames of each clip.

        Raises:
            InputError: unknown options; placeholders without audio; truncation that cuts audio tokens.
            AudioError: another layout, or a number of clips that differs from the number of placeholders (both checked before anything
                is computed); a clip that cannot be used or is too short for one audio token; an impossible rate.
            UnsupportedError: options of another modality.
            MissingDependencyError: another sampling rate, and torchaudio cannot be imported.
        """
        arguments = CallArguments.of(device, sampling_rate, return_tensors, padding, options)
        encoded, features, _ = self._process(text, only_one(audio, arguments.audio), arguments)
        if arguments.text["return_tensors"] == "np":
            features.convert_to_tensors("np")
        return BatchFeature({**encoded, **features})

    def _process(self, text: Any, audio: Any, arguments: CallArguments) -> tuple[BatchEncoding, BatchFeature, list[int]]:
        """The encoded prompts, the features, and how many tokens each placeholder became."""
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(one, str) for one in texts):
            raise InputError(got=f"text of type {type(text).__name__}", expected="a string or a list of strings", remedy="Pass those")
        placeholders, runs = count_placeholders(texts, self.audio_token)
        if audio is None or (isinstance(audio, list | tuple) and not audio):
            if placeholders:
                raise InputError(
                    got=f"{placeholders} placeholder(s) {self.audio_token} for 0 clip(s)",
                    expected="one clip for each placeholder",
                    remedy="Pass the clips as audio",
                )
            return self.tokenizer(texts, **arguments.text), BatchFeature(), []
        arrays, rates = arrays_and_rates(audio, arguments.sampling_rate, self.audio_processor.sampling_rate)
        clips = clips_of_prompt(arrays, placeholders, len(runs))
        if clips is None:
            raise wrong_clips(arrays, placeholders, self.audio_token)
        clips = resampled(clips, rates, self.audio_processor.sampling_rate)
        counts = tokens_for(runs, [self.audio_processor.count_frames(clip.numel()).tokens for clip in clips])
        if counts is None:
            raise wrong_clips(clips, placeholders, self.audio_token)
        features = self.audio_processor(clips, device=arguments.device)
        features.pop("audio_embed_sizes")
        encoded = self.tokenizer(expand(texts, self.audio_token, counts), **arguments.text)
        if arguments.text["truncation"] or arguments.text["max_length"]:
            self._check_audio_tokens(encoded, sum(counts))
        return encoded, features, counts

    def _check_audio_tokens(self, encoded: BatchEncoding, expected: int) -> None:
        audio_id = self.tokenizer.convert_tokens_to_ids(self.audio_token)
        left = sum(one.ids.count(audio_id) for one in encoded.encodings)
        if left != expected:
            raise InputError(
                got=f"truncation that leaves {left} of {expected} audio tokens",
                expected="all of them, because each is the place of a part of a clip",
                remedy="Raise max_length, or split the recording",
            )

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        tools: list[dict[str, Any]] | None = None,
        documents: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        return_assistant_tokens_mask: bool = False,
        tokenize: bool = False,
        return_tensors: str | None = None,
        return_dict: bool = False,
        load_audio_from_video: bool = False,
        processor_kwargs: Mapping[str, Any] | None = None,
        sanitize_control_tokens: bool = False,
        **names: Any,
    ) -> Any:
        """Formats messages as a prompt; with tokenize=True, also processes it and the recordings in the messages.

        Args:
            conversation: messages with "role" and "content"; or a list of conversations. A content is text, or a list of parts:
                {"type": "text", "text": …}, and {"type": "audio", "audio": …} for a recording in any form that `__call__` takes; its
                path may also be called "path" or "url".
            chat_template: a template, or the name of one of this processor's; None for its own.
            tools, documents, add_generation_prompt, continue_final_message: as in `GraniteSpeechTokenizer.apply_chat_template`.
            return_assistant_tokens_mask: whether to add assistant_masks, 1 for each token in a {% generation %} block of the template.
            tokenize: whether to return token ids, not text. As in transformers, the default is text.
            return_tensors: "pt", "np", or None for token ids in lists.
            return_dict: whether to return the result of `__call__`, not input_ids alone.
            load_audio_from_video: must be False.
            processor_kwargs: options of `__call__`.
            sanitize_control_tokens: must be False.
            **names: options of `__call__`, or names for the template.

        Raises:
            InputError, AudioError, UnsupportedError: as `__call__` and `GraniteSpeechTokenizer.apply_chat_template`.
        """
        options, names = chat_arguments(processor_kwargs, names, return_tensors, load_audio_from_video)
        refuse_sanitizing(sanitize_control_tokens)
        if return_assistant_tokens_mask and not (tokenize and return_dict):
            raise InputError(
                got="return_assistant_tokens_mask without token ids", expected="tokenize=True and return_dict=True", remedy="Pass them"
            )
        prompts = render_conversations(
            conversation,
            select_template(self.chat_template or self.tokenizer.chat_template, chat_template, tools),
            {**self.tokenizer.special_tokens_map, **names},
            audio_token=self.audio_token,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            with_spans=return_assistant_tokens_mask,
        )
        if not tokenize:
            return prompts.texts if prompts.batched else prompts.texts[0]
        bos = self.tokenizer.bos_token
        if bos is not None and prompts.texts[0].startswith(bos):
            options["options"].setdefault("add_special_tokens", False)
        arguments = CallArguments.of(**options)
        encoded, features, counts = self._process(prompts.texts, only_one(audio_of(conversation) or None, arguments.audio), arguments)
        result = BatchFeature({**encoded, **features})
        if return_assistant_tokens_mask:
            counts = counts or [1] * sum(text.count(self.audio_token) for text in prompts.texts)
            result["assistant_masks"] = text_masks(encoded.encodings, moved(prompts.texts, self.audio_token, counts, prompts.spans))
        result.convert_to_tensors(arguments.text["return_tensors"])
        return result if return_dict else result["input_ids"]

    # --- files --------------------------------------------------------------------------------------------------------------------------

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

        5.x keeps the feature extractor inside processor_config.json, 4.x in preprocessor_config.json.

        Args:
            pretrained_model_name_or_path: as in `granite_speech.checkpoints.hub.resolve`.
            cache_dir, force_download, local_files_only, token, revision: as in `resolve`.
            options: subfolder; settings that replace those in the
                folder: of `GraniteSpeechTokenizer.from_pretrained`, arguments of the feature extractor, and audio_token; and options of
                transformers that change nothing here.

        Raises:
            CheckpointNotFoundError: no such folder or id, or neither file in it, or no tokenizer.json.
            CheckpointError, ConfigError: a file with invalid contents.
            UnsupportedError: the feature extractor of another model.
            InputError: unknown options.
        """
        hub = {"cache_dir": cache_dir, "force_download": force_download, "local_files_only": local_files_only, "token": token}
        audio_token = options.pop("audio_token", None)
        extractor, tokenizer, config = cls._load(pretrained_model_name_or_path, options | hub | {"revision": revision})
        return cls(extractor, tokenizer, audio_token=audio_token or config["audio_token"])

    @classmethod
    def from_args_and_dict(cls, args: Sequence[Any], processor_dict: Mapping[str, Any], **changes: Any) -> Self:
        """A processor of a feature extractor and a tokenizer, `args`, with the audio_token and chat_template of a dictionary."""
        entries = {**processor_dict, **changes}
        return cls(*args, **{name: entries[name] for name in ("audio_token", "chat_template") if entries.get(name) is not None})

    def to_dict(self) -> dict[str, Any]:
        """The contents of processor_config.json."""
        return super().to_dict() | {"audio_token": self.audio_token}

    @property
    def feature_extractor(self) -> GraniteSpeechFeatureExtractor:
        """The feature extractor, under the name that it has in other processors."""
        return self.audio_processor

    @property
    def model_input_names(self) -> list[str]:
        """Names of the model's inputs that the parts make."""
        return [*self.audio_processor.model_input_names, *self.tokenizer.model_input_names]
