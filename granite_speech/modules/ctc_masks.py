"""Attention masks of padded batches: from a mask to where the clips lie, and back."""

import torch
from torch import Tensor

from granite_speech.errors import InputError, UnsupportedError
from granite_speech.modules.packing import Segments
from granite_speech.modules.transfers import on_device, on_host

__all__ = ["clips_of", "mask_of"]


def clips_of(padded: Tensor, attention_mask: Tensor | None) -> Segments:
    """Where the clips of a batch lie once it is packed. A mask on a device is read by the host, which waits for the device.

    Args:
        padded: `(clips, frames, width)`.
        attention_mask: `(clips, frames)` of 0 and 1 or bool; None: no clip is padded.

    Raises:
        InputError: another shape.
        UnsupportedError: padding before or between the frames of a clip.
    """
    clips = Segments.of_batch(padded)
    if attention_mask is None:
        return clips
    if attention_mask.shape != padded.shape[:2]:
        raise InputError(
            got=f"an attention_mask of shape {tuple(attention_mask.shape)}",
            expected=f"{tuple(padded.shape[:2])}, one value for each frame",
            remedy="Pass the processor's attention_mask, or omit it if no clip is padded",
        )
    [mask] = on_host(attention_mask.bool())
    lengths = mask.sum(1)
    if not torch.equal(mask, torch.arange(mask.shape[1]) < lengths[:, None]):
        raise UnsupportedError(
            got="an attention_mask with zeros before a clip's last frame",
            expected="each clip's frames first, and the padding after them",
            remedy="Pad the features on the right, as the processor does",
        )
    return Segments(tuple(lengths.tolist()), padded.device)


def mask_of(clips: Segments, width: int) -> Tensor:
    """`(clips, width)` int32: 1 for frames and 0 for the padding after them."""
    ends = on_device(clips.lengths, clips.device, torch.int64)
    return (torch.arange(width, device=clips.device) < ends[:, None]).int()
