"""One window of a recording on its way to what an engine answers: prepared in a reader's thread, for a model of any family."""

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from granite_speech.engine.cpu_threads import without_team
from granite_speech.engine.handle import Answer, Handle
from granite_speech.errors import EngineError, GraniteSpeechError, InputError
from granite_speech.modules.transfers import Reading
from granite_speech.transcription.options import TranscribeOptions
from granite_speech.transcription.transcript import TranscriptNote
from granite_speech.transcription.windows import Window

__all__ = ["CallSetup", "WindowPiece", "check_processor", "window_seconds"]


@dataclass(frozen=True, kw_only=True)
class CallSetup:
    """What all windows of a call have in common.

    Attributes:
        model, processor: of the same checkpoint.
        submit: asks an engine for the answer to the processor's inputs.
        options: of the call.
        notes: what to say of each transcript.
        sampling_rate: of arrays, in Hz; None: the processor's.
    """

    model: Any
    processor: Any
    submit: Callable[..., Handle]
    options: TranscribeOptions
    notes: tuple[TranscriptNote, ...] = ()
    sampling_rate: int | None = None

    @property
    def rate(self) -> int:
        """Samples per second of a window."""
        raise NotImplementedError

    def alone(self) -> Any:
        """A block that prepares inputs: on a CPU without OpenMP's team, which belongs to the engine's worker."""
        return without_team() if self.model.device.type == "cpu" else nullcontext()

    @property
    def cuts(self) -> dict[str, Any]:
        """Where a recording is cut: limit, segmentation and overlap of `Windows`."""
        raise NotImplementedError

    def piece(self, window: Window, is_first: bool) -> "WindowPiece":
        """A window on its way to its answer."""
        raise NotImplementedError

    def inputs(self, samples: Tensor, is_first: bool = False) -> Mapping[str, Any]:
        """The processor's inputs of a window `(samples,)`.

        Raises:
            AudioError: samples that cannot be used.
        """
        raise NotImplementedError

    def level(self, inputs: Mapping[str, Any]) -> Tensor:
        """`word_edges.loudness` of a window."""
        raise NotImplementedError


def check_processor(processor: Any, kind: type) -> None:
    """Raise InputError for the processor of another model family."""
    if not isinstance(processor, kind):
        raise InputError(
            got=f"a {type(processor).__name__} with a model of another family",
            expected=f"a {kind.__name__}",
            remedy="Load the model and the processor from the same folder",
        )


def window_seconds(options: TranscribeOptions, usual: float, longest: float, why: str) -> tuple[float, tuple[TranscriptNote, ...]]:
    """The longest window of a call, in seconds, and what to say of it.

    Args:
        options: of the call.
        usual: if the call does not say.
        longest: that is possible.
        why: it is.

    Raises:
        InputError: windows would overlap by more than half.
    """
    asked = options.chunk_length
    limit, notes = min(usual if asked is None else asked, longest), ()
    if asked is not None and asked > longest:
        notes = (TranscriptNote("chunk_clamp", f"windows are at most {longest:g} s long, {why}, not {asked:g}"),)
    if options.chunk_overlap > limit / 2:
        raise InputError(
            got=f"chunk_overlap={options.chunk_overlap:g} for windows of {limit:g} s",
            expected="at most half of them",
            remedy="Pass a smaller chunk_overlap",
        )
    return limit, notes


class WindowPiece:
    """A window and its answer. Make it and call `submit` and `answer`, in this order; an error of the first two is raised by the last.

    Args:
        setup: what it has in common with others.
        window: its samples are kept, because they may be needed again.
        is_first: whether the recording begins with it.
    """

    def __init__(self, setup: CallSetup, window: Window, is_first: bool = False):
        self.window, self.is_first = window, is_first
        self._setup = setup
        self._inputs: Mapping[str, Any] | None = None
        self._handle: Handle | None = None
        self._error: GraniteSpeechError | None = None
        self._level: Reading | None = None
        try:
            self._inputs = setup.inputs(window.samples, is_first)
            if setup.options.word_timestamps:
                self._level = Reading(setup.level(self._inputs))
        except GraniteSpeechError as error:
            self._error = error

    def submit(self) -> None:
        """Ask for the answer."""
        if self._error is not None:
            return
        try:
            self._handle = self._setup.submit(self._inputs, **self._asked())
        except GraniteSpeechError as error:
            self._error = error
        self._inputs = None

    def _asked(self) -> dict[str, Any]:
        """Options of the engine's `submit`."""
        return {}

    @property
    def was_submitted(self) -> bool:
        """Whether an engine has taken it."""
        return self._handle is not None

    def cancel(self) -> None:
        """Nobody waits for the answer any more."""
        if self._handle is not None:
            self._handle.cancel()

    def level(self) -> Tensor:
        """How loud each 10 ms of the window are, if the call has asked for times of words."""
        return self._level.wait()

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
