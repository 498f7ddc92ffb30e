"""Clips as callers have them, and as the feature extractor wants them: float32, one dimension, finite."""

import math
from collections.abc import Sequence

import numpy as np
import torch

from granite_speech.errors import AudioError, InputError

__all__ = ["as_clips", "check_clips"]

# A sample beyond this would overflow the float32 power spectrum. Sound lies in [-1, 1].
LARGEST_SAMPLE = 1e15


def as_clips(audios) -> list[torch.Tensor]:
    """The forms `GraniteSpeechFeatureExtractor.__call__` takes, as float32 tensors `(samples,)`. int16 is scaled by 1 / 32768."""
    if isinstance(audios, (np.ndarray, torch.Tensor)):
        if audios.ndim not in (1, 2):
            raise _bad_clip(0, f"shape {tuple(audios.shape)}", "(samples,) or (batch, samples)")
        batch = _as_float32(audios, 0)
        clips = list(batch) if batch.ndim == 2 else [batch]
    elif isinstance(audios, Sequence) and not isinstance(audios, (str, bytes)):
        clips = []
        for index, audio in enumerate(audios):
            if not isinstance(audio, (np.ndarray, torch.Tensor)):
                raise _bad_clip(index, f"a {type(audio).__name__}", "a numpy array or a tensor")
            if audio.ndim != 1 and not (audio.ndim == 2 and audio.shape[0] == 1):
                raise _bad_clip(index, f"shape {tuple(audio.shape)}", "one channel: (samples,) or (1, samples)")
            clips.append(_as_float32(audio, index).reshape(-1))
    else:
        raise InputError(
            got=f"audio of type {type(audios).__name__}",
            expected="a numpy array, a tensor, or a list of them",
            remedy="Read files with granite_speech.inputs.audio.load_audio first",
        )
    return clips


def check_clips(clips: Sequence[torch.Tensor]) -> None:
    """Refuses what has no features. One pass over the samples; for clips on an accelerator one wait for all of them."""
    if not clips:
        raise AudioError(got="no clips", expected="at least one", remedy="Leave audio out for a request without sound")
    for index, clip in enumerate(clips):
        if clip.ndim != 1 or clip.dtype != torch.float32:
            raise _bad_clip(index, f"shape {tuple(clip.shape)}, {clip.dtype}", "(samples,) in torch.float32")
        if clip.numel() == 0:
            raise _bad_clip(index, "no samples", "at least one")
    extremes = [torch.stack(torch.aminmax(clip.detach())) for clip in clips]
    devices = {extreme.device for extreme in extremes}
    by_device = {device: [index for index, extreme in enumerate(extremes) if extreme.device == device] for device in devices}
    for indices in by_device.values():
        for index, (low, high) in zip(indices, torch.stack([extremes[i] for i in indices]).tolist(), strict=True):
            if not (math.isfinite(low) and math.isfinite(high)):
                raise _bad_clip(index, "NaN or infinite samples", "finite ones")
            if max(-low, high) > LARGEST_SAMPLE:
                raise _bad_clip(index, f"a sample of size {max(-low, high):.3g}", "samples between -1 and 1")


def _as_float32(audio: np.ndarray | torch.Tensor, index: int) -> torch.Tensor:
    is_tensor = isinstance(audio, torch.Tensor)
    if is_tensor and (audio.layout is not torch.strided or audio.is_meta):
        raise _bad_clip(index, f"samples of layout {audio.layout} on {audio.device}", "a dense tensor that holds its samples")
    if audio.dtype == (torch.int16 if is_tensor else np.dtype(np.int16)):
        return (audio.to(torch.float32) if is_tensor else torch.from_numpy(audio.astype(np.float32))) / 32768.0
    if not (audio.dtype.is_floating_point if is_tensor else np.issubdtype(audio.dtype, np.floating)):
        raise _bad_clip(index, f"samples of type {audio.dtype}", "floating point in [-1, 1], or int16")
    if is_tensor:
        return audio.detach().to(torch.float32)
    # A copy where torch could not share the memory: other byte order, negative strides, read-only.
    with np.errstate(over="ignore"):
        array = np.ascontiguousarray(audio, dtype=np.float32)
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _bad_clip(index: int, got: str, expected: str) -> AudioError:
    return AudioError(
        got=f"clip {index} has {got}",
        expected=expected,
        remedy="Load the recording again with granite_speech.inputs.audio.load_audio, or leave the clip out",
    )
