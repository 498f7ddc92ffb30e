"""One window of a recording on its way to the text that a language model answers."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from granite_speech.engine.handle import Answer
from granite_speech.errors import AudioError
from granite_speech.generation.token_bytes import TokenBytes
from granite_speech.inputs.processor import BatchFeature, GraniteSpeechProcessor
from granite_speech.inputs.requests import request_for, window_limit
from granite_speech.transcription.options import TranscribeOptions
from granite_speech.transcription.tagged_answers import TaggedAnswer
from granite_speech.transcription.transcript import Word
from granite_speech.transcription.window_piece import CallSetup, WindowPiece, check_processor, window_seconds
from granite_speech.transcription.windows import Window
from granite_speech.transcription.word_edges import loudness
from granite_speech.transcription.words import aligned_words, tagged_words

__all__ = ["Piece", "Setup"]


@dataclass(frozen=True, kw_only=True)
class Setup(CallSetup):
    """What all windows of a call have in common, for a model with a language model. `submit` takes options of `Engine.submit`.

    Attributes:
        request: the full prompt of a window.
        first_request: that of a recording's first window, which may have the beginning of the answer.
        limit: longest window, in seconds.
    """

    processor: GraniteSpeechProcessor
    request: str
    first_request: str
    limit: float

    @classmethod
    def of(cls, model: Any, processor: GraniteSpeechProcessor, options: TranscribeOptions, **others: Any) -> Self:
        """For a call.

        Args:
            model, processor, options: as the attributes.
            others: submit and sampling_rate.

        Raises:
            InputError: an option that the checkpoint cannot follow.
        """
        check_processor(processor, GraniteSpeechProcessor)
        keywords = tuple(options.keywords) if isinstance(options.keywords, Iterator) else options.keywords or ()  # for two requests
        names = ("task", "language", "target_language", "prompt", "prompt_mode")
        asked = {name: getattr(options, name) for name in names} | {"keywords": keywords, "model_type": model.config.model_type}
        longest = window_limit(model.config, options.task)
        limit, notes = window_seconds(options, longest, longest, f"which is the checkpoint's limit to {options.task}")
        requests = [request_for(processor, **asked, prefix_text=text) for text in (None, options.prefix_text)]
        of_call = {"model": model, "processor": processor, "options": options, "notes": notes, "limit": limit}
        return cls(**of_call, **others, request=requests[0], first_request=requests[1])

    @cached_property
    def pieces(self) -> TokenBytes:
        """The bytes of the tokenizer's tokens."""
        return TokenBytes(self.processor)

    @property
    def rate(self) -> int:
        """Samples per second of a window."""
        return self.processor.audio_processor.sampling_rate

    @property
    def spectrum(self) -> dict[str, Any]:
        """What kind of mel spectrum the processor computes: n_mels, hop_length and so on."""
        return self.processor.audio_processor.melspec_kwargs

    @property
    def context(self) -> int:
        """Tokens that the model can attend to."""
        return self.model.config.text_config.max_position_embeddings

    @property
    def cuts(self) -> dict[str, Any]:
        return {"limit": self.limit, "segmentation": self.options.segmentation, "overlap": self.options.chunk_overlap}

    def piece(self, window: Window, is_first: bool) -> "Piece":
        return Piece(self, window, is_first)

    def level(self, inputs: Mapping[str, Any]) -> Tensor:
        return loudness(inputs["input_features"][0], self.spectrum["n_mels"])

    def inputs(self, samples: Tensor, is_first: bool = False) -> BatchFeature:
        """The processor's inputs of a window `(samples,)`.

        Raises:
            AudioError: samples that cannot be used, or more than the model's context holds.
        """
        with torch.no_grad():
            request = self.first_request if is_first else self.request
            inputs = self.processor(request, samples, device=self.model.device)
        columns = inputs["input_ids"].shape[1]
        if columns >= self.context:
            raise AudioError(
                got=f"a recording whose prompt has {columns} tokens",
                expected=f"fewer than the {self.context} tokens of the model's context",
                remedy="Pass a smaller chunk_length",
            )
        return inputs


class Piece(WindowPiece):
    """A window and the language model's answer."""

    _setup: Setup
    _limit = 0

    def _asked(self) -> dict[str, Any]:
        options = self._setup.options
        self._limit = min(options.max_new_tokens, self._setup.context - self._inputs["input_ids"].shape[1])
        is_loop = options.compression_ratio_threshold is not None
        asked = {"max_new_tokens": self._limit, "stop_on_repetition": is_loop, "ctc": options.word_timestamps}
        return asked | ({"temperature": options.temperature} if options.temperature else {})

    def words(self, answer: Answer, tagged: TaggedAnswer, prefix: str) -> list[Word] | None:
        """The words of the answer with their times; None if the call has not asked for them.

        Args:
            answer: of this window.
            tagged: what it says.
            prefix: the text before it that was said in this window too.
        """
        setup, window = self._setup, self.window
        if not setup.options.word_timestamps:
            is_tagged = setup.options.prompt_mode == "word_timestamps"
            return tagged_words(answer, tagged, setup.pieces, start=window.start) if is_tagged else None
        level, frame_seconds = self.level(), setup.spectrum["hop_length"] / setup.rate
        place = {"start": window.start, "end": window.end, "prefix": prefix}
        return aligned_words(answer, tagged, setup.pieces, level=level, frame_seconds=frame_seconds, **place)

    def truncation(self, answer: Answer) -> str | None:
        """Which limit ended the answer; None: it is complete."""
        if answer.finish_reason != "length":
            return None
        count, remedy = len(answer.token_ids), "Pass a smaller chunk_length"
        if count < self._limit:
            where = "where the engine's memory for keys and values is full"
        elif count < self._setup.options.max_new_tokens:
            where = f"where the model's context of {self._setup.context} tokens ends"
        else:
            where, remedy = "which is max_new_tokens", "Raise max_new_tokens"
        return f"the answer was cut off after {count} tokens, {where}. {remedy}."
