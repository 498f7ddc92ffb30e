"""Converts clips from the forms that callers pass to the one that the feature extractor needs: float32, one dimension, finite."""

import math
from collections.abc import Sequence

import numpy as np
import torch

from granite_speech.errors import AudioError, InputError
from granite_speech.inputs.channels import mix

__all__ = ["as_clips", "check_clips", "clips_of_batch", "clips_of_prompt", "wrong_clips"]

# Only an axis of this length or less can be channels.
MOST_CHANNELS = 8

# A sample beyond this would overflow the float32 power spectrum. Sound lies in [-1, 1].
LARGEST_SAMPLE = 1e15


def as_clips(audios) -> list[torch.Tensor]:
    """The clips that `GraniteSpeechFeatureExtractor.__call__` takes, as float32 tensors `(samples,)`. int16 is scaled by 1 / 32768."""
    if isinstance(audios, (np.ndarray, torch.Tensor)):
        if audios.ndim not in (1, 2):
            raise _bad_clip(0, f"shape {tuple(audios.shape)}", "(samples,) or (batch, samples)")
        batch = _as_float32(audios, 0)
        return list(batch) if batch.ndim == 2 else [batch]
    clips = []
    for index, audio in enumerate(_as_arrays(audios)):
        if audio.ndim != 1 and not (audio.ndim == 2 and audio.shape[0] == 1):
            raise _bad_clip(index, f"shape {tuple(audio.shape)}", "one channel: (samples,) or (1, samples)")
        clips.append(_as_float32(audio, index).reshape(-1))
    return clips


def clips_of_batch(audios) -> list[torch.Tensor]:
    """The clips of a batch without prompts, each as float32 `(samples,)`; several channels become one (`channels.mix`).

    Args:
        audios: an array or tensor `(samples,)`, `(clips, samples)` or `(clips, samples, channels)`; `(samples, channels)` if its rows are
            too short for clips; or a list with one array for each clip, with or without channels.

    Raises:
        AudioError: samples or a shape that cannot be used.
        InputError: neither an array nor a list.
    """
    if not isinstance(audios, (np.ndarray, torch.Tensor)):
        arrays = _as_arrays(audios)
    elif audios.ndim == 2 and audios.shape[1] <= MOST_CHANNELS < audios.shape[0]:
        arrays = [audios]
    else:
        arrays = list(audios) if audios.ndim in (2, 3) else [audios]
    if not arrays:
        raise _no_clips()
    clips = []
    for index, array in enumerate(arrays):
        axis = _channel_axis(tuple(array.shape))
        if axis is None:
            channels = f"(samples, channels) or (channels, samples) with at most {MOST_CHANNELS} channels"
            raise _bad_clip(index, f"shape {tuple(array.shape)}", f"(samples,), {channels}")
        clips.append(_as_mono(array, index, axis))
    return clips


def clips_of_prompt(audios, expected: int, runs: int = 0) -> list[torch.Tensor] | None:
    """The clips for a prompt's placeholders, each as float32 `(samples,)`; several channels become one (`channels.mix`).

    Shapes alone decide the layout, and all are checked before any sample is read. The rows of an array of two dimensions are clips if
    there is one for each placeholder. Otherwise the array is one clip, with channels along the axis of length 8 or less.

    Args:
        audios: an array or tensor `(samples,)`, `(clips, samples)`, `(samples, channels)` or `(channels, samples)`; or a list with one
            array for each clip, with or without channels.
        expected: the number of placeholders in all prompts.
        runs: of placeholders without anything in between. With fewer clips than placeholders, each run may stand for some clips.

    Returns:
        The clips; None if these cannot belong to the placeholders.

    Raises:
        AudioError: samples that cannot be used.
        InputError: neither an array nor a list.
    """
    if not isinstance(audios, (np.ndarray, torch.Tensor)):
        arrays = _as_arrays(audios)
    elif audios.ndim == 2 and audios.shape[0] in (expected, runs):
        arrays = list(audios)
    else:
        arrays = [audios]
    layouts = [_channel_axis(tuple(array.shape)) for array in arrays]
    if None in layouts or not (len(arrays) == expected or 0 < runs <= len(arrays) < expected):
        return None
    return [_as_mono(array, index, axis) for index, (array, axis) in enumerate(zip(arrays, layouts, strict=True))]


def wrong_clips(audios, placeholders: int, audio_token: str) -> AudioError:
    """The error for clips that do not belong to the placeholders."""
    arrays = [audios] if isinstance(audios, (np.ndarray, torch.Tensor)) else audios
    shapes = ", ".join(str(tuple(array.shape)) for array in arrays[:4]) + (", …" if len(arrays) > 4 else "")
    return AudioError(
        got=f"{placeholders} placeholder(s) {audio_token} for {len(arrays)} clip(s) of shape {shapes or 'nothing'}",
        expected="one placeholder for each clip, or as many as its audio tokens. Clips are (clips, samples), or a list; one clip is "
        f"(samples,), or with at most {MOST_CHANNELS} channels (samples, channels) or (channels, samples)",
        remedy=f"Put {audio_token} into the prompt once where each clip belongs, and pass one of these layouts",
    )


def _channel_axis(shape: tuple[int, ...]) -> int | None:
    """The axis of a clip's channels: -1 if it has no such axis, None if this is not the shape of a clip."""
    if len(shape) == 1:
        return -1
    if len(shape) != 2 or shape[0] == shape[1]:
        return None
    axis = int(shape[1] < shape[0])
    return axis if 1 <= shape[axis] <= MOST_CHANNELS else None


def _as_mono(array: np.ndarray | torch.Tensor, index: int, axis: int) -> torch.Tensor:
    """A clip as float32 `(samples,)`, from channels along `axis` (`_channel_axis`)."""
    clip = _as_float32(array, index)
    return clip if axis < 0 else mix(clip if axis == 0 else clip.T)


def _as_arrays(audios) -> list[np.ndarray | torch.Tensor]:
    if not isinstance(audios, Sequence) or isinstance(audios, (str, bytes)):
        raise InputError(
            got=f"audio of type {type(audios).__name__}",
            expected="a numpy array, a tensor, or a list of them",
            remedy="Read files with granite_speech.load_audio first",
        )
    for index, audio in enumerate(audios):
        if not isinstance(audio, (np.ndarray, torch.Tensor)):
            raise _bad_clip(index, f"a {type(audio).__name__}", "a numpy array or a tensor")
    return list(audios)


def check_clips(clips: Sequence[torch.Tensor]) -> None:
    """Refuses clips that have no features. Reads all samples once; clips on an accelerator cost one wait for each device."""
    if not clips:
        raise _no_clips()
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
    # Copied if torch cannot share the memory: other byte order, negative strides, read-only.
    with np.errstate(over="ignore"):
        array = np.ascontiguousarray(audio, dtype=np.float32)
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _no_clips() -> AudioError:
    return AudioError(got="no clips", expected="at least one", remedy="Omit audio for a request without sound")


def _bad_clip(index: int, got: str, expected: str) -> AudioError:
    return AudioError(
        got=f"clip {index} has {got}",
        expected=expected,
        remedy="Load the recording again with granite_speech.load_audio, or omit the clip",
    )
