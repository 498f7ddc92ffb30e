"""Recordings to texts in one call."""

from collections.abc import Iterator, Sequence
from os import PathLike
from typing import Any, Literal, overload
from warnings import warn

import torch

from granite_speech.checkpoints.hub import EMBEDDED_FOLDER
from granite_speech.inputs.recordings import Recording
from granite_speech.transcription.load_model import LoadedModel
from granite_speech.transcription.transcriber import Transcriber
from granite_speech.transcription.transcript import Segment, Transcript

__all__ = ["transcribe"]

_LOADING = ("device", "dtype", "quantize", "revision", "cache_dir", "local_files_only", "token")


_Model = str | PathLike | Transcriber | LoadedModel | None


@overload  # the first one, because a str is a sequence of str
def transcribe(audio: Recording, model: _Model = None, *, stream: Literal[False] = False, **options: Any) -> Transcript: ...


@overload
def transcribe(audio: Sequence[Recording], model: _Model = None, *, stream: Literal[False] = False, **options: Any) -> list[Transcript]: ...


@overload
def transcribe(audio: Any, model: _Model = None, *, stream: Literal[True], **options: Any) -> Iterator[Segment] | Iterator[Transcript]: ...


def transcribe(
    audio: Any, model: _Model = None, *, stream: bool = False, **options: Any
) -> Transcript | list[Transcript] | Iterator[Segment] | Iterator[Transcript]:
    """The text of one recording, or of each in a list, of any length.

        print(granite_speech.transcribe("meeting.mp3", model="ibm-granite/granite-speech-4.1-2b"))

    A name is loaded at each call. For several calls, make a `Transcriber` once, or call `load_model` once, and pass it.

    Args:
        audio: as for `Transcriber.transcribe`.
        model: a folder, a hub id, a `Transcriber`, or what `load_model` returned; the small checkpoint inside the package if omitted,
            which knows 70 English words.
        stream: return an iterator: over the segments of one recording, or the transcripts of a list.
        options: of `Transcriber.transcribe`; and of `Transcriber.from_pretrained` if `model` is a name.

    Returns, warns, raises:
        As `Transcriber.transcribe`; also what `Transcriber.from_pretrained` raises.
    """
    if isinstance(model, LoadedModel):
        model = model.transcriber
    if isinstance(model, Transcriber):
        return model.transcribe(audio, stream=stream, **options)
    if model is None:
        warn(
            "no model given: using the small one inside the package, which knows only 70 English words. For any speech, pass for example "
            "model='ibm-granite/granite-speech-3.3-2b'",
            UserWarning,
            stacklevel=2,
        )
        model = EMBEDDED_FOLDER
    loading = {name: options.pop(name) for name in _LOADING if name in options}
    if options.get("fp16") is False and loading.get("dtype") in (None, "float32", torch.float32):
        del options["fp16"]
        loading["dtype"] = "float32"  # as on the command line
    transcriber = Transcriber.from_pretrained(model, **loading)
    if stream:
        return _until_done(transcriber, audio, options)
    with transcriber:
        return transcriber.transcribe(audio, **options)


def _until_done(transcriber: Transcriber, audio: Any, options: dict[str, Any]) -> Iterator[Any]:
    with transcriber:
        yield from transcriber.transcribe(audio, stream=True, **options)
