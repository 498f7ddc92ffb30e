"""One recording on its way to its text: read and prepared in a caller's thread, then answered by an engine."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch

from granite_speech.engine.cpu_threads import without_team
from granite_speech.engine.handle import Answer, Handle
from granite_speech.errors import AudioError, EngineError, GraniteSpeechError
from granite_speech.inputs.processor import BatchFeature, GraniteSpeechProcessor
from granite_speech.inputs.recordings import read_recording
from granite_speech.inputs.requests import transcript_request

__all__ = ["Job", "Transcript", "is_numbers"]


@dataclass(frozen=True)
class Transcript:
    """What became of one recording.

    Attributes:
        text: what was said; empty if there is an error.
        truncated: why the text is incomplete, in the words of `TruncatedAnswerWarning`; None: it is complete.
        error: why there is no text; None: there is one.
        audio_warning: what is wrong with the sound file, although it was read, in the words of `AudioWarning`; None: nothing.
    """

    text: str
    truncated: str | None = None
    error: GraniteSpeechError | None = None
    audio_warning: str | None = None


class Job:
    """One recording. Call `read`, `submit` and `transcript` in this order.

    Args:
        model, processor: of the same checkpoint.
        submit: asks an engine for the answer to the processor's inputs, of at most some number of tokens.
        recording: as `Transcriber.transcribe` takes one.
        prompt: the request; None: the checkpoint's own.
        max_new_tokens: the longest answer.
        sampling_rate: of an array, in Hz; None: the processor's.

    Attributes:
        frames: of its features, which are in memory until it ends.
    """

    def __init__(
        self,
        model: Any,
        processor: GraniteSpeechProcessor,
        submit: Callable[[BatchFeature, int], Handle],
        recording: Any,
        prompt: str | None,
        max_new_tokens: int,
        sampling_rate: int | None,
    ):
        self._model, self._processor, self._submit = model, processor, submit
        self._recording, self._sampling_rate = recording, sampling_rate
        self._prompt, self._max_new_tokens = prompt, max_new_tokens
        self._inputs: BatchFeature | None = None
        self._audio_warning: str | None = None
        self._error: GraniteSpeechError | None = None
        self._handle: Handle | None = None
        self.frames = 0

    def read(self) -> None:
        """Decode the file and compute its features. `transcript` raises the error, if there is one."""
        try:
            self._inputs = self._read()
            self.frames = int(self._inputs["input_features_lengths"].sum())
        except GraniteSpeechError as error:
            self._error = error
        self._recording = None

    def submit(self) -> None:
        """Ask for the answer. `transcript` raises the error, if there is one."""
        if self._error is not None:
            return
        try:
            self._handle = self._submit(self._inputs, self._limit)
        except GraniteSpeechError as error:
            self._error = error
        self._inputs = None

    def cancel(self) -> None:
        """Nobody waits for the transcript any more."""
        if self._handle is not None:
            self._handle.cancel()

    def transcript(self) -> Transcript:
        """Wait for the answer.

        Raises:
            EngineError: the transcriber was closed before the answer was complete.
            Any error of reading, of submitting, or of the request.
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
        truncated = self._truncation(answer) if answer.finish_reason == "length" else None
        return Transcript(answer.text.strip(), truncated, audio_warning=self._audio_warning)

    @property
    def _context(self) -> int:
        return self._model.config.text_config.max_position_embeddings

    def _read(self) -> BatchFeature:
        """The processor's inputs; sets the answer's limit."""
        processor, device = self._processor, self._model.device
        recording = np.asarray(self._recording) if is_numbers(self._recording) else self._recording
        with torch.no_grad(), without_team() if device.type == "cpu" else nullcontext():
            samples, rate, self._audio_warning = read_recording(recording, processor, self._sampling_rate)
            request = transcript_request(processor, self._prompt)
            inputs = processor(request, samples, device=device, sampling_rate=rate)
        columns = inputs["input_ids"].shape[1]
        if columns >= self._context:
            raise AudioError(
                got=f"a recording whose prompt has {columns} tokens",
                expected=f"fewer than the {self._context} tokens of the model's context",
                remedy="Transcribe it in shorter pieces",
            )
        self._limit = min(self._max_new_tokens, self._context - columns)
        return inputs

    def _truncation(self, answer: Answer) -> str:
        """Which limit ended the answer."""
        count, remedy = len(answer.token_ids), "Transcribe the recording in shorter pieces"
        if count < self._limit:
            where = "where the engine's memory for keys and values is full"
        elif count < self._max_new_tokens:
            where = f"where the model's context of {self._context} tokens ends"
        else:
            where, remedy = "which is max_new_tokens", "Raise max_new_tokens"
        return f"the answer was cut off after {count} tokens, {where}. {remedy}."


def is_numbers(recording: Any) -> bool:
    """Whether this is a list or tuple of samples, one recording, and not of recordings."""
    return isinstance(recording, (list, tuple)) and bool(recording) and all(isinstance(one, Real) for one in recording)
