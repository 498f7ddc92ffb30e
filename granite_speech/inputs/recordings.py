"""What people pass for a recording, as the processor needs it."""

import io
from collections.abc import Callable, Iterator, Mapping
from numbers import Real
from os import PathLike
from typing import Any, BinaryIO
from warnings import warn

import numpy as np
from torch import Tensor

from granite_speech.errors import AudioError
from granite_speech.inputs.audio import AudioWarning, blocks_with_warning, load_with_warning, resample
from granite_speech.inputs.clips import MOST_CHANNELS, check_clips, clips_of_prompt
from granite_speech.inputs.processor import GraniteSpeechProcessor
from granite_speech.inputs.sources import arrays_and_rates, file_of

__all__ = ["Recording", "recording_blocks", "samples_of"]

Recording = str | PathLike | BinaryIO | bytes | np.ndarray | Tensor


def samples_of(recording: Any, processor: GraniteSpeechProcessor, sampling_rate: int | None) -> tuple[Any, int | None]:
    """Samples and their rate for `processor`: files and bytes are decoded, at the model's rate (None); anything else is
    unchanged, and read by the processor.

    Args:
        recording: a `Recording`, an entry of `datasets`, or a list of clips for a prompt with several.
        processor: of the model.
        sampling_rate: of an array, in Hz; None for the model's.

    Raises:
        AudioError: a file that cannot be used.
    """
    if isinstance(recording, (np.ndarray, Tensor, list, tuple, Mapping)) or hasattr(recording, "get_all_samples"):
        return recording, sampling_rate
    file = io.BytesIO(recording) if isinstance(recording, (bytes, bytearray, memoryview)) else recording
    samples, warning = load_with_warning(file, processor.audio_processor.sampling_rate)
    if warning is not None:
        warn(warning, AudioWarning, stacklevel=2)
    return samples, None


def recording_blocks(
    recording: Any, target: int, sampling_rate: int | None = None, errors: str = "raise"
) -> tuple[Iterator[Tensor], Callable[[], str | None]]:
    """One recording, block by block: for files, in memory that does not grow with their length.

    Args:
        recording: a path, "-" for standard input, a `data:` address, the bytes of a file, or an open binary file; an array, tensor or
            list of numbers `(samples,)`, `(samples, channels)` or `(channels, samples)`; an entry or a decoder of `datasets`. A list with
            one of these is the same.
        target: the rate of the blocks, in Hz.
        sampling_rate: of arrays that do not say theirs, in Hz; None for `target`.
        errors: "raise", or "warn" to take the intact part of a file whose end is damaged or missing for the whole.

    Returns:
        An iterator of `(samples,)` float32 on the CPU, mono, at the rate `target`: blocks of 2 s of a file, or anything else in one
        block. And a function that returns the text of the file's `AudioWarning`, or None, once the iterator has ended.

    Raises:
        AudioError: a recording that cannot be used: at once, or by the iterator when it reaches the fault in a file. If the end of a file
            is damaged, its intact blocks come first.
        InputError: another type, a network address, or an invalid option.
        MissingDependencyError: as `granite_speech.load_audio`.
    """
    if _is_list(recording) and len(recording) == 1 and not isinstance(recording[0], Real):
        recording = recording[0]
    file = file_of(recording)
    if file is not None:
        return blocks_with_warning(file, target, errors=errors)
    return iter([_whole(recording, target, sampling_rate)]), lambda: None


def _is_list(recording: Any) -> bool:
    return isinstance(recording, (list, tuple))


def _whole(recording: Any, target: int, sampling_rate: int | None) -> Tensor:
    """The samples `(samples,)` of a recording that is not a file, checked and at the rate `target`."""
    if _is_list(recording):
        recording = _numbers(recording)
    elif not isinstance(recording, (np.ndarray, Tensor, Mapping)) and not hasattr(recording, "get_all_samples"):
        raise _not_one(f"a {type(recording).__name__}")
    arrays, rates = arrays_and_rates(recording, sampling_rate, target)
    clips = clips_of_prompt(arrays, 1, 1)
    if clips is None:
        shape = tuple((arrays if isinstance(arrays, (np.ndarray, Tensor)) else arrays[0]).shape)
        raise _not_one(f"samples of shape {shape}")
    check_clips(clips)
    clip, rate = clips[0].cpu(), rates[0]
    return clip if rate is None else resample(clip, rate, target)


def _numbers(recording: list | tuple) -> np.ndarray:
    if not recording or not isinstance(recording[0], Real):
        raise _not_one(f"a list of {len(recording)} recordings")
    try:
        return np.asarray(recording)
    except ValueError as error:  # some are lists
        raise _not_one(f"a list with more than numbers ({error})") from error


def _not_one(got: str) -> AudioError:
    return AudioError(
        got=got,
        expected=f"one recording: a file, or samples (samples,), or with at most {MOST_CHANNELS} channels (samples, channels) or "
        "(channels, samples)",
        remedy="Pass the recordings one by one",
    )
