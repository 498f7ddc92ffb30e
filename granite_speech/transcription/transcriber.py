"""From recordings to their texts, with a model and its processor in one object."""

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, Self, overload
from warnings import warn

import torch
from granite_kernels import OPERATIONS

from granite_speech.engine.engine import Engine
from granite_speech.engine.handle import Handle
from granite_speech.errors import EngineError, GraniteSpeechError
from granite_speech.inputs.audio import AudioWarning
from granite_speech.inputs.processor import BatchFeature, GraniteSpeechProcessor
from granite_speech.inputs.recordings import Recording
from granite_speech.model import GraniteSpeechForConditionalGeneration
from granite_speech.transcription.job import Job, Transcript, is_numbers
from granite_speech.transcription.read_ahead import ReadAhead

__all__ = ["Transcriber", "TruncatedAnswerWarning"]

# Recordings that are read ahead, for each answer that the engine can work on: some to work on, and some ready to follow.
_AHEAD = 2


class TruncatedAnswerWarning(UserWarning):
    """An answer reached a limit before the model finished it, so the text is incomplete."""


class Transcriber:
    """A model and its processor, with an `Engine` that answers many requests at once.

    The engine is made when the first recording comes, and again if it was closed or has failed, if the process was forked, or if the
    model has moved. Its thread and memory are freed by `close`, at the end of `with Transcriber(…) as transcriber:`, or when nobody
    holds the transcriber any more. Any number of threads may use one transcriber. A pickle or copy has the model and the processor.

    Args:
        model: the model, on the device where it should run.
        processor: the processor of the same checkpoint.
    """

    def __init__(self, model: GraniteSpeechForConditionalGeneration, processor: GraniteSpeechProcessor):
        self.model, self.processor = model, processor
        self._engine: Engine | None = None
        self._made_for: tuple[Any, ...] = ()
        self._lock, self._process = threading.Lock(), os.getpid()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.model, self.processor)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        quantize: str | None = None,
    ) -> Self:
        """Loads both from a folder or hub id.

        Args:
            name_or_path: a folder, or a hub id such as "ibm-granite/granite-speech-3.3-2b".
            device: of the model; None for CUDA if available, else the CPU.
            dtype: of the weights; None for the checkpoint's.
            quantize: "int8" rounds the weights of the language model's layers to 8 bits.

        Raises:
            CheckpointError, ConfigError, InputError: a checkpoint, device or dtype that cannot be used.
            KernelError: GRANITE_SPEECH_KERNELS asks for kernels that cannot run on the device.
        """
        chosen = device if device is not None else "cuda" if torch.cuda.is_available() else "cpu"
        processor = GraniteSpeechProcessor.from_pretrained(name_or_path)
        model = GraniteSpeechForConditionalGeneration.from_pretrained(name_or_path, device=chosen, dtype=dtype, quantize=quantize)
        for operation in OPERATIONS.values():
            operation.resolve(None, model.device, model.dtype)  # fails here rather than at the first recording
        return cls(model, processor)

    @overload
    def transcribe(
        self, audio: Recording, prompt: str | None = None, max_new_tokens: int = 400, *, sampling_rate: int | None = None
    ) -> str: ...

    @overload
    def transcribe(
        self, audio: Sequence[Recording], prompt: str | None = None, max_new_tokens: int = 400, *, sampling_rate: int | None = None
    ) -> list[str]: ...

    def transcribe(self, audio, prompt=None, max_new_tokens=400, *, sampling_rate=None):
        """The text of one recording, or of each in a list.

        Args:
            audio: a file that `granite_speech.load_audio` reads: a path, "-" for standard input, an open binary file, or its
                content as bytes; or an array or tensor `(samples,)`, `(samples, channels)` or `(channels, samples)`. A list or
                tuple has any number of these, and they are transcribed together; one of numbers is a recording `(samples,)`.
            prompt: the request; the release's own request for a transcript if omitted.
            max_new_tokens: the longest answer.
            sampling_rate: of arrays, in Hz; None for the processor's. Not used for files.

        Returns:
            The text; for a list, a list of texts in the same order.

        Warns:
            TruncatedAnswerWarning: the answer reached max_new_tokens, or the end of the model's context, before it ended.
            AudioWarning: as `granite_speech.load_audio`.

        Raises:
            AudioError: a recording that cannot be used, or one too long for the model's context. For a list, the message begins with
                the recording's index, and what is left of the list is cancelled; `stream` goes on after an error.
            EngineError: the transcriber was closed meanwhile.
        """
        if isinstance(audio, (list, tuple)) and not is_numbers(audio):
            return self._transcribe_all(audio, prompt, max_new_tokens, sampling_rate)
        job = Job(self.model, self.processor, self._submit, audio, prompt, max_new_tokens, sampling_rate)
        job.read()
        job.submit()
        try:
            transcript = job.transcript()
        except BaseException:
            job.cancel()  # an interrupted caller no longer needs the answer
            raise
        _warn_of(transcript, "", stacklevel=3)
        return transcript.text

    def stream(
        self, recordings: Iterable[Recording], prompt: str | None = None, max_new_tokens: int = 400, *, sampling_rate: int | None = None
    ) -> Iterator[Transcript]:
        """Transcripts of any number of recordings, in order, each as soon as it and those before it are complete.

        A thread takes the recordings from the iterable and reads them ahead: at most two for each answer that the engine can work on,
        and about three hours of audio. Closing the iterator, as a `break` in a loop over it does, cancels what is left.

        Args:
            recordings: each as `transcribe` takes one; also an iterator that waits, or that never ends.
            prompt, max_new_tokens, sampling_rate: of all of them, as for `transcribe`.

        Yields:
            A `Transcript` for each recording. Warnings and errors of a recording are in it, and do not end the iterator.

        Raises:
            InputError: the model is in training mode.
            What the iterable raises, after the transcripts of the recordings before that; and errors that are not of this package,
            such as a lack of memory.
        """
        options = {"prompt": prompt, "max_new_tokens": max_new_tokens, "sampling_rate": sampling_rate}
        job = partial(Job, self.model, self.processor, self._submit, **options)
        ahead = ReadAhead(recordings, job, _AHEAD * self._running_engine().max_rows)
        try:
            yield from ahead
        finally:
            ahead.stop()

    def close(self, cancel: bool = False) -> None:
        """Finish what other threads are waiting for, and free the engine's thread and memory. A later call makes a new engine.

        Args:
            cancel: do not finish it; those that wait get an EngineError.
        """
        self._forget_engine_of_parent()
        with self._lock:
            engine, self._engine = self._engine, None
        if engine is not None:
            engine.close(cancel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(cancel=kind is not None)

    def _transcribe_all(self, audio: Sequence[Recording], *options: Any) -> list[str]:
        """The texts of a list; the first error ends it."""
        prompt, max_new_tokens, sampling_rate = options
        texts = []
        with closing(self.stream(audio, prompt, max_new_tokens, sampling_rate=sampling_rate)) as transcripts:
            for index, one in enumerate(transcripts):
                name = f"recording {index}" + (f" ({os.fspath(audio[index])!r})" if isinstance(audio[index], (str, PathLike)) else "")
                if one.error is not None:
                    raise _named(one.error, name) from one.error
                _warn_of(one, f"{name}: ", stacklevel=4)
                texts.append(one.text)
        return texts

    def _submit(self, inputs: BatchFeature, max_new_tokens: int) -> Handle:
        engine = self._running_engine()
        try:
            return engine.submit(inputs=inputs, max_new_tokens=max_new_tokens)
        except EngineError:  # it was closed, or its worker has failed
            with self._lock:
                if self._engine is engine:
                    self._engine = None
            return self._running_engine().submit(inputs=inputs, max_new_tokens=max_new_tokens)

    def _running_engine(self) -> Engine:
        """The engine, made again if it does not fit the model as it is now."""
        self._forget_engine_of_parent()
        made_for = self.model, self.processor, self.model.device, self.model.dtype, self.model.training
        with self._lock:
            if self._engine is None or self._made_for != made_for:
                self._engine = None  # its memory is free before the next one needs it
                self._engine, self._made_for = Engine(self.model, self.processor), made_for
            return self._engine

    def _forget_engine_of_parent(self) -> None:
        """After a fork: the engine's thread does not exist here, and the lock may have been held by another one."""
        if self._process != os.getpid():
            self._engine, self._lock, self._process = None, threading.Lock(), os.getpid()


def _warn_of(transcript: Transcript, name: str, stacklevel: int) -> None:
    for category, message in ((AudioWarning, transcript.audio_warning), (TruncatedAnswerWarning, transcript.truncated)):
        if message is not None:
            warn(name + message, category, stacklevel=stacklevel)


def _named(error: GraniteSpeechError, name: str) -> GraniteSpeechError:
    """The same error, about this recording."""
    return type(error)(got=f"{name}: {error.got}", expected=error.expected, remedy=error.remedy)
