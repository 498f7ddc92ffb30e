"""From recordings of any length to their texts, with a model and its processor in one object."""

import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import Any, Literal, Self, overload
from warnings import warn

import torch
from granite_kernels import OPERATIONS
from torch import nn

from granite_speech.auto import AutoProcessor
from granite_speech.checkpoints.placement import choose_device
from granite_speech.engine.ctc_engine import CTCEngine
from granite_speech.engine.engine import Engine
from granite_speech.engine.handle import Handle
from granite_speech.errors import EngineError, InputError
from granite_speech.inputs.audio import AudioWarning
from granite_speech.inputs.batch import BatchFeature
from granite_speech.inputs.ctc_processor import GraniteSpeech5Processor
from granite_speech.inputs.recordings import Recording
from granite_speech.model import GraniteSpeechForConditionalGeneration
from granite_speech.model_ctc import GraniteSpeech5ForCTC
from granite_speech.transcription.answers import Answers
from granite_speech.transcription.ctc_answers import CTCAnswers
from granite_speech.transcription.ctc_piece import CTCSetup
from granite_speech.transcription.job import Job
from granite_speech.transcription.live_models import check_model, is_accelerated, own_processor, running_model
from granite_speech.transcription.options import TranscribeOptions
from granite_speech.transcription.piece import Setup
from granite_speech.transcription.read_ahead import ReadAhead
from granite_speech.transcription.transcript import Segment, Transcript
from granite_speech.transcription.window_piece import CallSetup

__all__ = ["Transcriber", "TranscriptWarning", "TruncatedAnswerWarning"]

# Windows that are read ahead, for each answer that the engine can work on: some to work on, and some ready to follow.
_AHEAD = 2
# Of one recording, on a CPU: more of them would take more memory the longer it is. A GPU needs more to be busy.
_OF_ONE_ON_CPU = 16


class TranscriptWarning(UserWarning):
    """A part of a transcript is missing or doubtful."""


class TruncatedAnswerWarning(TranscriptWarning):
    """An answer reached a limit before the model finished it, so the text is incomplete."""


class Transcriber:
    """A model and its processor, with an `Engine` that answers many requests at once, or a `CTCEngine` if the model is TurboCTC.

    A recording may have any length: it is cut at pauses into windows that the model can transcribe, silence is left out, and the
    windows of all recordings are answered together. TurboCTC needs no pauses (`ctc_piece`).

    The engine is made when the first recording comes, and again if it was closed or has failed, if the process was forked, or if the
    model has moved. Its thread and memory are freed by `close`, at the end of `with Transcriber(…) as transcriber:`, or when nobody
    holds the transcriber any more. Any number of threads may use one transcriber. A pickle or copy has the model and the processor.

    A live model of transformers works after `granite_speech.accelerate(model)`, which peft may have wrapped. Each call takes its weights,
    adapters, device and dtype as they are then. Its logits are divided by `logits_scaling` here, as those of this package's model, also
    where transformers (from 5.10 on) does not divide.

    Args:
        model: the model, on the device where it should run.
        processor: the processor of the same checkpoint; one of transformers is read once, here.

    Raises:
        InputError: something else, such as a model of transformers that is not accelerated.
        UnsupportedError: a model of peft with prompt tuning or another adapter that adds tokens.
    """

    def __init__(self, model: nn.Module, processor: Any):
        check_model(model)
        self.model, self.processor = model, own_processor(processor)
        self._engine: Engine | CTCEngine | None = None
        self._made_for: tuple[Any, ...] = ()
        self._lock, self._process = threading.Lock(), os.getpid()

    def __reduce__(self) -> tuple[Any, ...]:
        if is_accelerated(self.model):
            raise InputError(
                got="a pickle or copy of a Transcriber with a model of transformers",
                expected="one with a model of this package, because the copy of a model is not accelerated",
                remedy="Copy the model, accelerate the copy, and make another Transcriber with it",
            )
        return type(self), (self.model, self.processor)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        quantize: str | None = None,
        **download: Any,
    ) -> Self:
        """Loads both from a folder or hub id.

        Args:
            name_or_path: a folder, or a hub id such as "ibm-granite/granite-speech-3.3-2b".
            device: of the model; None for CUDA if available, else the CPU.
            dtype: of the weights; None for "fastest" on a CPU, which is bfloat16 if the processor multiplies it faster than float32,
                else float32; and for the checkpoint's on a GPU. "auto" is the checkpoint's.
            quantize: "int8" rounds the weights of the language model's layers to 8 bits; on a CPU also those of the encoder and the
                projector, and multiplies in 8 bits.
            download: revision, cache_dir, local_files_only and token, as for the model's `from_pretrained`.

        Raises:
            CheckpointError, ConfigError, InputError: a checkpoint, device or dtype that cannot be used.
            KernelError: GRANITE_SPEECH_KERNELS asks for kernels that cannot run on the device.
        """
        chosen = choose_device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu", None)
        dtype = "fastest" if dtype is None and chosen.type == "cpu" else dtype
        processor = AutoProcessor.from_pretrained(name_or_path, **download)
        kind = GraniteSpeech5ForCTC if isinstance(processor, GraniteSpeech5Processor) else GraniteSpeechForConditionalGeneration
        model = kind.from_pretrained(name_or_path, device=chosen, dtype=dtype, quantize=quantize, **download)
        for operation in OPERATIONS.values():
            operation.resolve(None, model.device, model.dtype)  # fails here rather than at the first recording
        return cls(model, processor)

    @overload  # before that of a list, because a str is a sequence of str
    def transcribe(
        self,
        audio: Recording,
        prompt: str | None = None,
        max_new_tokens: int | None = None,
        *,
        sampling_rate: int | None = None,
        stream: Literal[False] = False,
        **options: Any,
    ) -> Transcript: ...

    @overload
    def transcribe(
        self,
        audio: Sequence[Recording],
        prompt: str | None = None,
        max_new_tokens: int | None = None,
        *,
        sampling_rate: int | None = None,
        stream: Literal[False] = False,
        **options: Any,
    ) -> list[Transcript]: ...

    @overload
    def transcribe(
        self, audio: Any, prompt: str | None = None, max_new_tokens: int | None = None, *, stream: Literal[True], **options: Any
    ) -> Iterator[Segment] | Iterator[Transcript]: ...

    def transcribe(self, audio, prompt=None, max_new_tokens=None, *, sampling_rate=None, stream=False, **options):
        """The text of one recording, or of each in a list, of any length.

        Args:
            audio: a file that `granite_speech.load_audio` reads: a path, "-" for standard input, an open binary file, or its
                content as bytes; or an array or tensor `(samples,)`, `(samples, channels)` or `(channels, samples)`. A list or
                tuple has any number of these, and they are transcribed together; one of numbers is a recording `(samples,)`.
            prompt: the request; the checkpoint's own for a transcript or a translation if omitted.
            max_new_tokens: the longest answer for a window; None for that of `TranscribeOptions`.
            sampling_rate: of arrays, in Hz; None for the processor's. Not used for files. `sample_rate` is the same.
            stream: return an iterator: over the segments of one recording, each as soon as it is final; over the transcripts of a list.
            options: the fields of `TranscribeOptions`: task, language, target_language, keywords, temperature, segmentation,
                chunk_length, chunk_overlap, clip_timestamps, compression_ratio_threshold, word_timestamps, prompt_mode, prefix_text
                and errors.

        Returns:
            A `Transcript`, which is the text, a `str`, with its segments and warnings; for a list, a list in the same order.

        Warns:
            TruncatedAnswerWarning: an answer reached max_new_tokens, or the end of the model's context, before it ended.
            TranscriptWarning: a window failed, or its text repeats itself.
            AudioWarning: as `granite_speech.load_audio`.

        Raises:
            InputError: an option that cannot be used, a model in training mode, or one that is not accelerated any more.
            UnsupportedError: an accelerated model with hooks, adapters other than plain LoRA, or quantized layers.
            AudioError: a recording that cannot be used. For a list, the message begins with the recording's index, and what is left
                of the list is cancelled; `stream` goes on after an error.
            EngineError: the transcriber was closed meanwhile, or the model failed, as for a lack of memory.
        """
        options |= {"prompt": prompt, "max_new_tokens": max_new_tokens, "sampling_rate": sampling_rate}
        several = isinstance(audio, (list, tuple)) and not _is_numbers(audio)
        if stream:
            return self.stream(audio, **options) if several else self._segments(audio, options)
        transcripts = []
        with closing(self.stream(audio if several else iter([audio]), **options)) as done:
            for index, one in enumerate(done):
                name = _name(index, audio[index]) if several else ""
                _raise_error(one, name)
                _warn_of(one, name)
                transcripts.append(one)
        return transcripts if several else transcripts[0]

    def stream(
        self,
        recordings: Iterable[Recording],
        prompt: str | None = None,
        max_new_tokens: int | None = None,
        *,
        sampling_rate: int | None = None,
        **options: Any,
    ) -> Iterator[Transcript]:
        """Transcripts of any number of recordings, in order, each as soon as it and those before it are complete.

        A thread takes the recordings from the iterable and reads them ahead: at most two windows for each answer that the engine can
        work on, of one recording 16 on a CPU, and about two hours of audio. Closing the iterator, as a `break` in a loop over it does,
        cancels what is left.

        Args:
            recordings: each as `transcribe` takes one; also an iterator that waits, or that never ends.
            prompt, max_new_tokens, sampling_rate, options: of all of them, as for `transcribe`.

        Yields:
            A `Transcript` for each recording. Warnings and errors of a recording are in it, and do not end the iterator.

        Raises:
            InputError, UnsupportedError: an option or a model that cannot be used, as for `transcribe`.
            What the iterable raises, after the transcripts of the recordings before that; and errors that are not of this package,
            such as a lack of memory, while a recording is read.
        """
        options |= {"prompt": prompt, "max_new_tokens": max_new_tokens, "sampling_rate": sampling_rate}
        with closing(self.stream_segments(recordings, **options)) as events:
            for _, one in events:
                if isinstance(one, Transcript):
                    yield one

    def stream_segments(
        self,
        recordings: Iterable[Recording],
        *,
        on_progress: Callable[[int, float], None] | None = None,
        sampling_rate: int | None = None,
        **options: Any,
    ) -> Iterator[tuple[int, Segment | Transcript]]:
        """As `stream`, with each segment as soon as it is final.

        Args:
            recordings, sampling_rate, options: as for `stream`.
            on_progress: called in this thread with the index of a recording and the seconds of it that are done.

        Yields:
            The index of a recording with each of its segments, and then with its transcript.
        """
        _check_several(recordings)
        sampling_rate = _one_rate(sampling_rate, options.pop("sample_rate", None))
        model = running_model(self.model)
        setup = self._setup(model, TranscribeOptions.of(options), sampling_rate)
        most = _AHEAD * self._running_engine(model).max_rows
        of_one = _OF_ONE_ON_CPU if model.device.type == "cpu" else most
        ahead = ReadAhead(recordings, partial(Job, setup), most, of_one)
        try:
            for index, job in enumerate(ahead):
                report = partial(on_progress, index) if on_progress is not None else lambda seconds: None
                answers = _parts(model)[1](setup, report)
                for segment in answers.segments(ahead.pieces(job)):
                    yield index, segment
                report(job.duration)
                yield index, answers.transcript(job)
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

    def _segments(self, audio: Recording, options: dict[str, Any]) -> Iterator[Segment]:
        """The segments of one recording, then its warnings and its error."""
        with closing(self.stream_segments(iter([audio]), **options)) as events:
            for _, one in events:
                if isinstance(one, Segment):
                    yield one
                else:
                    _raise_error(one, "")
                    _warn_of(one, "")

    def _setup(self, model: Any, options: TranscribeOptions, sampling_rate: int | None) -> CallSetup:
        kind, *_ = _parts(model)
        return kind.of(model, self.processor, options, submit=partial(self._submit, model), sampling_rate=sampling_rate)

    def _submit(self, model: Any, inputs: BatchFeature, **options: Any) -> Handle:
        engine = self._running_engine(model)
        try:
            return engine.submit(inputs=inputs, **options)
        except EngineError:  # it was closed, or its worker has failed
            with self._lock:
                if self._engine is engine:
                    self._engine = None
            return self._running_engine(model).submit(inputs=inputs, **options)

    def _running_engine(self, model: Any) -> Engine | CTCEngine:
        """The engine, made again if it does not fit the model as it is now."""
        self._forget_engine_of_parent()
        made_for = model, self.processor, model.device, model.dtype, model.training
        with self._lock:
            if self._engine is None or self._made_for != made_for:
                self._engine = None  # its memory is free before the next one needs it
                self._engine, self._made_for = _parts(model)[2](model, self.processor), made_for
            return self._engine

    def _forget_engine_of_parent(self) -> None:
        """After a fork: the engine's thread does not exist here, and the lock may have been held by another one."""
        if self._process != os.getpid():
            self._engine, self._lock, self._process = None, threading.Lock(), os.getpid()


def _parts(model: Any) -> tuple[type, type, type]:
    """What transcribes with a model of its family: the setup of a call, the answers to it, and the engine."""
    return (CTCSetup, CTCAnswers, CTCEngine) if isinstance(model, GraniteSpeech5ForCTC) else (Setup, Answers, Engine)


def _one_rate(sampling_rate: int | None, sample_rate: int | None) -> int | None:
    """The sampling rate of a call, which has two names."""
    if None not in (sampling_rate, sample_rate) and sampling_rate != sample_rate:
        raise InputError(
            got=f"sampling_rate={sampling_rate!r:.40} and sample_rate={sample_rate!r:.40}",
            expected="one of them: they are the same option",
            remedy="Omit one",
        )
    return sample_rate if sampling_rate is None else sampling_rate


def _check_several(recordings: Any) -> None:
    """Refuse one recording in place of several: letters of a path, lines of a file and samples of an array are no recordings."""
    one = isinstance(recordings, Recording | bytearray | memoryview | Mapping) or hasattr(recordings, "read")
    if one or _is_numbers(recordings):
        raise InputError(
            got=f"a {type(recordings).__name__}, not several recordings",
            expected="an iterable of recordings",
            remedy="Pass a list, even of one; or call transcribe",
        )


def _warn_of(transcript: Transcript, name: str) -> None:
    """Give the warnings of a transcript, which name the line outside this package that called it."""
    categories = {"audio": AudioWarning, "truncated": TruncatedAnswerWarning}
    frame, stacklevel = sys._getframe(), 1
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).startswith("granite_speech."):
        frame, stacklevel = frame.f_back, stacklevel + 1
    for note in transcript.warnings:
        is_part = note.start is not None and (note.start > 0 or note.end < transcript.duration - 0.01)
        message = str(note) if is_part else note.message
        warn((f"{name}: " if name else "") + message, categories.get(note.type, TranscriptWarning), stacklevel=stacklevel)


def _raise_error(transcript: Transcript, name: str) -> None:
    error = transcript.error
    if error is not None and name:
        raise type(error)(got=f"{name}: {error.got}", expected=error.expected, remedy=error.remedy) from error
    if error is not None:
        raise error


def _name(index: int, recording: Recording) -> str:
    return f"recording {index}" + (f" ({os.fspath(recording)!r})" if isinstance(recording, (str, PathLike)) else "")


def _is_numbers(recording: Any) -> bool:
    """Whether this is a list or tuple of samples, one recording, and not of recordings."""
    return isinstance(recording, (list, tuple)) and bool(recording) and all(isinstance(one, Real) for one in recording)
