"""One window of a recording on its way to its text: prepared in a reader's thread, then answered by an engine."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from granite_speech.engine.cpu_threads import without_team
from granite_speech.engine.handle import Answer, Handle
from granite_speech.errors import AudioError, EngineError, GraniteSpeechError
from granite_speech.generation.token_bytes import TokenBytes
from granite_speech.inputs.processor import BatchFeature, GraniteSpeechProcessor
from granite_speech.modules.transfers import Reading
from granite_speech.transcription.options import TranscribeOptions
from granite_speech.transcription.tagged_answers import TaggedAnswer
from granite_speech.transcription.transcript import TranscriptNote, Word
from granite_speech.transcription.windows import Window
from granite_speech.transcription.word_edges import loudness
from granite_speech.transcription.words import aligned_words, tagged_words

__all__ = ["Piece", "Setup"]


@dataclass(frozen=True)
class Setup:
    """What all windows of a call have in common.

    Attributes:
        model, processor: of the same checkpoint.
        submit: asks an engine for the answer to the processor's inputs, with options of `Engine.submit`.
        options: of the call.
        request: the full prompt of a window.
        first_request: that of a recording's first window, which may have the beginning of the answer.
        limit: longest window, in seconds.
        notes: what to say of each transcript.
        sampling_rate: of arrays, in Hz; None: the processor's.
    """

    model: Any
    processor: GraniteSpeechProcessor
    submit: Callable[..., Handle]
    options: TranscribeOptions
    request: str
    first_request: str
    limit: float
    notes: tuple[TranscriptNote, ...]
    sampling_rate: int | None

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

    def alone(self) -> Any:
        """A block that prepares inputs: on a CPU without OpenMP's team, which belongs to the engine's worker."""
        return without_team() if self.model.device.type == "cpu" else nullcontext()

    def inputs(self, samples: torch.Tensor, is_first: bool = False) -> BatchFeature:
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


class Piece:
    """A window and its answer. Make it and call `submit` and `answer`, in this order; an error of the first two is raised by the last.

    Args:
        setup: what it has in common with others.
        window: its samples are kept, because they may be needed again.
        is_first: whether the recording begins with it.
    """

    def __init__(self, setup: Setup, window: Window, is_first: bool = False):
        self.window, self.is_first = window, is_first
        self._setup = setup
        self._inputs: BatchFeature | None = None
        self._handle: Handle | None = None
        self._error: GraniteSpeechError | None = None
        self._level: Reading | None = None
        self._limit = 0
        try:
            self._inputs = setup.inputs(window.samples, is_first)
            if setup.options.word_timestamps:
                self._level = Reading(loudness(self._inputs["input_features"][0], setup.spectrum["n_mels"]))
        except GraniteSpeechError as error:
            self._error = error

    def submit(self) -> None:
        """Ask for the answer."""
        if self._error is not None:
            return
        options = self._setup.options
        self._limit = min(options.max_new_tokens, self._setup.context - self._inputs["input_ids"].shape[1])
        asked = {"stop_on_repetition": options.compression_ratio_threshold is not None, "ctc": options.word_timestamps}
        if options.temperature:
            asked["temperature"] = options.temperature
        try:
            self._handle = self._setup.submit(self._inputs, max_new_tokens=self._limit, **asked)
        except GraniteSpeechError as error:
            self._error = error
        self._inputs = None

    @property
    def was_submitted(self) -> bool:
        """Whether an engine has taken it."""
        return self._handle is not None

    def cancel(self) -> None:
        """Nobody waits for the answer any more."""
        if self._handle is not None:
            self._handle.cancel()

    def answer(self) -> Answer:
        """Wait for the answer.

        Raises:
            EngineError: the transcriber was closed before the answer was complete, or the model computed NaN.
            Any error of preparing or submitting it, or of the engine.
        """
        if self._error is not None:
            raise self._error
        answer = self._handle.result()
        if answer.finish_reason == "cancelled":
            raise EngineError(
                got=f"a request cancelled after {len(answer.token_ids)} tokens, because its transcriber was closed",
                expected="a whole answer",
                remedy="Transcribe the recording again; that makes a new engine",
            )
        heard = answer.ctc_logprobs
        if any(map(math.isnan, answer.logprobs)) or (heard is not None and bool(heard.isnan().any())):
            dtype = str(self._setup.model.dtype).removeprefix("torch.")
            raise EngineError(
                got=f"probabilities that are NaN, from a model in {dtype}",
                expected="numbers",
                remedy="Load the model with dtype='float32', and check its weights",
            )
        return answer

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
        level, frame_seconds = self._level.wait(), setup.spectrum["hop_length"] / setup.rate
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
