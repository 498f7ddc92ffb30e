"""The forms in which people hold audio: arrays, lists of numbers, files, entries of `datasets`. All become arrays with a rate."""

import base64
import binascii
import io
import math
from collections.abc import Mapping, Sequence
from numbers import Real
from os import PathLike
from typing import Any

import numpy as np
import torch

from granite_speech.errors import AudioError, InputError
from granite_speech.inputs.audio import load_audio, resample
from granite_speech.inputs.clips import check_clips

__all__ = ["arrays_and_rates", "file_of", "resampled"]

Array = np.ndarray | torch.Tensor


def arrays_and_rates(audio: Any, sampling_rate: int | None, target: int) -> tuple[Array | list[Array], list[int | None]]:
    """Arrays as `clips.clips_of_prompt` takes them, and the rate of each.

    Args:
        audio: an array or tensor; a list of numbers, which is one clip; a path, a `data:` address, bytes or an open binary file, which is
            decoded; {"array": …, "sampling_rate": …}, {"path": …} or {"bytes": …} as `datasets` gives; its decoders, which have
            get_all_samples; or a list of any of these, also nested.
        sampling_rate: of what does not say its own, in Hz; None for the target.
        target: the rate of decoded files, in Hz.

    Returns:
        One array for an array, otherwise a list; and a rate for each array of the list. None is the target.

    Raises:
        InputError: another type, or a network address.
        AudioError: a file that cannot be used.
    """
    if isinstance(audio, np.ndarray | torch.Tensor):
        return audio, [sampling_rate]
    if _is_several(audio):
        pairs = list(_each(audio, sampling_rate, target))
        return [array for array, _ in pairs], [rate for _, rate in pairs]
    array, rate = _one(audio, sampling_rate, target)
    return [array], [rate]


def resampled(clips: Sequence[torch.Tensor], rates: Sequence[int | None], target: int) -> list[torch.Tensor]:
    """Clips `(samples,)` at the rate `target`. They are checked before they are resampled, because a filter would spread a NaN.

    Args:
        clips: float32.
        rates: of `arrays_and_rates`.
        target: in Hz.

    Raises:
        AudioError: a clip that cannot be used, or an impossible rate.
        MissingDependencyError: another rate, and torchaudio cannot be imported.
    """
    if all(rate is None for rate in rates):
        return list(clips)
    check_clips(clips)
    rates = list(rates) * len(clips) if len(rates) < len(clips) else rates  # of the rows of one array
    pairs = zip(clips, rates, strict=True)
    return [clip if rate is None else resample(clip, rate, target) for clip, rate in pairs]


def _each(items: Any, sampling_rate: int | None, target: int):
    for item in items:
        if _is_several(item):
            yield from _each(item, sampling_rate, target)
        else:
            yield _one(item, sampling_rate, target)


def _is_several(value: Any) -> bool:
    """Whether this is a list of clips, and not one clip as a list of numbers. Only the first entry is looked at, because a clip can
    have millions."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes | bytearray | memoryview):
        return False
    return len(value) == 0 or not isinstance(value[0], Real)


def _one(item: Any, sampling_rate: int | None, target: int) -> tuple[Array, int | None]:
    if isinstance(item, np.ndarray | torch.Tensor):
        return item, sampling_rate
    file = file_of(item)
    if file is not None:
        return load_audio(file, target), None
    if isinstance(item, Mapping):
        return _entry(item, sampling_rate)
    if hasattr(item, "get_all_samples"):
        return _decoded(item)
    if isinstance(item, Sequence):
        return _numbers(item), sampling_rate
    raise InputError(
        got=f"audio of type {type(item).__name__}",
        expected="an array, a tensor, a list of numbers, a sound file, an entry of datasets, or a list of them",
        remedy="Pass one of these",
    )


def file_of(item: Any) -> Any:
    """The path or open binary file that `load_audio` reads, if a clip is one: a path, a `data:` address, bytes, an open file, or an
    entry of `datasets` that is not decoded. None: it is something else.

    Raises:
        InputError: a network address.
        AudioError: a `data:` address that is not base64.
    """
    if isinstance(item, Mapping) and item.get("array") is None:
        item = item.get("path") if item.get("bytes") is None else item["bytes"]
    if isinstance(item, bytes | bytearray | memoryview):
        return io.BytesIO(item)
    if isinstance(item, str):
        return _address(item)
    return item if isinstance(item, PathLike) or hasattr(item, "read") else None


def _decoded(decoder: Any) -> tuple[Array, int | None]:
    try:
        samples = decoder.get_all_samples()
    except (RuntimeError, ValueError, OSError) as error:  # the decoder's own: of a damaged file, or one that is gone
        raise AudioError(
            got=f"a {type(decoder).__name__} that failed ({error!s:.300})", expected="sound that it decodes", remedy="Pass the file's path"
        ) from error
    return samples.data, _rate(samples.sample_rate)


def _numbers(values: Any) -> np.ndarray:
    try:
        return np.asarray(values, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise AudioError(
            got=f"a clip that is a list with more than numbers ({error})", expected="samples in [-1, 1]", remedy="Pass an array"
        ) from error


def _entry(item: Mapping[str, Any], sampling_rate: int | None) -> tuple[Array, int | None]:
    """An entry of `datasets` that is decoded."""
    if item.get("array") is not None:
        array = item["array"]
        rate = item.get("sampling_rate")
        return _numbers(array) if isinstance(array, list | tuple) else array, sampling_rate if rate is None else _rate(rate)
    raise InputError(
        got=f"audio as a dictionary of {sorted(map(str, item))}",
        expected='{"array": …, "sampling_rate": …}, {"path": …} or {"bytes": …}',
        remedy="Pass one of these",
    )


def _rate(rate: Any) -> Any:
    return int(rate) if isinstance(rate, Real) and math.isfinite(rate) and int(rate) == rate else rate


def _address(text: str) -> Any:
    """A path, or the contents of a `data:` address."""
    if text.startswith(("http://", "https://", "ftp://", "s3://", "hf://")):
        raise InputError(
            got=f"the network address {text!r:.200}", expected="a local sound file", remedy="Download it first, and pass its path"
        )
    if not text.startswith("data:"):
        return text
    head, comma, data = text.partition(",")
    try:
        if not comma or not head.endswith(";base64"):
            raise ValueError("no base64")
        return io.BytesIO(base64.b64decode(data, validate=True))
    except (binascii.Error, ValueError) as error:
        raise AudioError(
            got=f"the address {text!r:.60} ({error})", expected="data:<type>;base64,<data>", remedy="Encode the file again"
        ) from error
