"""Many recordings on one CTC model: those that wait run together. Callers submit from any thread; one worker thread runs the model."""

import os
import weakref
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, Self
from warnings import warn

import torch
from torch import Tensor

from granite_speech.engine.counters import Counters
from granite_speech.engine.cpu_threads import without_team
from granite_speech.engine.ctc_worker import CTCRequest, CTCWorker
from granite_speech.engine.handle import Handle, check_process
from granite_speech.engine.loop import WorkerLoop
from granite_speech.errors import InputError
from granite_speech.inputs.audio import AudioWarning
from granite_speech.inputs.ctc_processor import GraniteSpeech5Processor
from granite_speech.inputs.recordings import recording_blocks
from granite_speech.modules.ctc_frames import FramesToPath

__all__ = ["CTCEngine"]

# Frames, 50 a second, that run together. A CPU computes no faster for more, and its caches hold no more.
_MAX_FRAMES = {"cuda": 65536, "cpu": 3000}
# Requests that should wait while others run, so that there is always enough to run together.
_MAX_ROWS = {"cuda": 256, "cpu": 16}
_INPUTS = {"input_features", "attention_mask"}


class CTCEngine:
    """Transcribes many recordings at once with one model. What a recording gets does not depend on the others.

    The model must not be moved, trained or given other modules while an engine uses it; weights may change in place between requests.

    `with CTCEngine(model, processor) as engine:` closes it at the end. An engine that nobody holds any more, and every engine when the
    interpreter exits, cancels what is left and ends its thread. After a fork, the engine exists in the parent alone: in the child,
    everything raises EngineError.

    Args:
        model: a `GraniteSpeech5ForCTC` in evaluation mode, on the device where it should run.
        processor: of the same checkpoint; None if requests come as `inputs` and nobody needs `Answer.text`.
        max_frames: frames, 50 a second, that run together; a longer recording runs alone. 65,536 on a GPU and 3,000 on a CPU if omitted.

    Attributes:
        max_rows: requests that should be waiting while others run.

    Raises:
        InputError: a model in training mode, or max_frames that is no integer from 1.
    """

    def __init__(self, model: FramesToPath, processor: GraniteSpeech5Processor | None, max_frames: int | None = None):
        if model.training:
            raise InputError(got="a model in training mode", expected="one in evaluation mode", remedy="Call model.eval() first")
        if max_frames is not None and (isinstance(max_frames, bool) or not isinstance(max_frames, int) or max_frames < 1):
            raise InputError(got=f"max_frames={max_frames!r:.60}", expected="an integer from 1", remedy="Omit it for the default")
        kind = model.device.type
        self.model, self.processor = model, processor
        self.max_frames = _MAX_FRAMES.get(kind, _MAX_FRAMES["cuda"]) if max_frames is None else max_frames
        self.max_rows = _MAX_ROWS.get(kind, _MAX_ROWS["cuda"])
        self._process = os.getpid()
        self._loop = WorkerLoop(CTCWorker(model, self.max_frames), model.device)
        # The thread refers to the loop alone, so that an engine that nobody holds is collected. This also runs at exit.
        self._finalizer = weakref.finalize(self, self._loop.close, cancel=True)

    def submit(self, audio: Any = None, *, inputs: Mapping[str, Any] | None = None, sampling_rate: int | None = None) -> Handle:
        """Ask for the tokens of a recording. Decoding of files and log-mel features run in the caller's thread; then this returns.

        Args:
            audio: a recording as `Transcriber.transcribe` takes it.
            inputs: what the processor returned for one clip, in place of audio.
            sampling_rate: of arrays in `audio`, in Hz; None for the processor's.

        Returns:
            A handle: wait for `result()`, `await` it, or `cancel()` it. Its answer has, for each token, the largest log-probability of
            the token's frames and its first and last frame. All tokens arrive together.

        Raises:
            EngineError: the engine is closed, its worker has failed, or it belongs to another process.
            InputError, AudioError: a recording or inputs that cannot be used.
        """
        check_process(self._process)
        self._loop.check_open()
        with torch.no_grad(), without_team() if self.model.device.type == "cpu" else nullcontext():
            frames = self._features(audio, sampling_rate) if inputs is None else self._given(inputs, audio)
            request = CTCRequest(frames.to(self.model.dtype), Handle(self, partial(_text, self.processor)), len(frames) / 50)
        self._loop.submit(request)
        return request.handle

    def counters(self) -> Counters:
        """What the engine has done and is doing: `steps` counts the packs that ran, and `rows` the recordings in them."""
        return self._loop.worker.snapshot()

    def close(self, cancel: bool = False) -> None:
        """Take no more requests, finish those that there are, and end the thread. Closing twice does nothing.

        Args:
            cancel: cancel them instead; their handles then have finish_reason "cancelled".

        Raises:
            EngineError: in a process that was forked from the engine's.
        """
        check_process(self._process)
        self._loop.close(cancel)
        self._finalizer.detach()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(cancel=kind is not None)

    def _features(self, audio: Any, sampling_rate: int | None) -> Tensor:
        """`(frames, 4 * num_mel_bins)` of a recording, on the model's device."""
        if self.processor is None or audio is None:
            raise InputError(
                got="audio for an engine without a processor" if self.processor is None else "no audio",
                expected="a recording",
                remedy="Make the engine with a processor, or pass inputs" if self.processor is None else "Pass audio",
            )
        blocks, warning = recording_blocks(audio, self.processor.feature_extractor.sampling_rate, sampling_rate)
        samples = list(blocks)
        if (message := warning()) is not None:
            warn(message, AudioWarning, stacklevel=3)
        clip = torch.cat(samples) if samples else torch.zeros(0)
        # Without the mask, which would be read from the device.
        return self.processor(clip, device=self.model.device, return_attention_mask=False)["input_features"][0]

    def _given(self, inputs: Mapping[str, Any], audio: Any) -> Tensor:
        """The same, of what the processor returned."""
        if audio is not None:
            raise InputError(got="inputs together with audio", expected="one of the two", remedy="Pass what the processor returned alone")
        names = {name for name, value in inputs.items() if value is not None}
        if not {"input_features"} <= names <= _INPUTS:
            raise InputError(
                got=f"inputs with {', '.join(sorted(names)) or 'nothing'}",
                expected="input_features, and attention_mask if some frames are padding",
                remedy="Pass what the processor returned for one clip",
            )
        features, mask = (inputs.get(name) for name in ("input_features", "attention_mask"))
        clips = self.model.encoder.clips(features, mask)
        if len(clips.lengths) != 1:
            raise InputError(got=f"inputs of {len(clips.lengths)} clips", expected="one clip", remedy="Submit each clip on its own")
        return features[0, : clips.lengths[0]].to(self.model.device)


def _text(processor: GraniteSpeech5Processor | None, ids: list[int]) -> str:
    return "" if processor is None else processor.decode(ids, skip_special_tokens=True, group_tokens=False)
