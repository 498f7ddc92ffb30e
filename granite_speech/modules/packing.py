"""Packed segments: one tensor of all clips' frames or all sequences' tokens, and where each lies in it.

Lengths are kept on the host as well as in `cu_seqlens` on the device, so that no shape ever has to be read from the device.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from granite_speech.errors import InputError
from granite_speech.modules.transfers import on_device

__all__ = ["Bucket", "Segments", "host_lengths", "pack_clips"]


@dataclass(frozen=True)
class Segments:
    """Where each clip or sequence lies in a packed tensor.

    Attributes:
        lengths: frames or tokens of each.
        device: where the packed tensor is.
    """

    lengths: tuple[int, ...]
    device: torch.device

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """First row of each segment, then the total."""
        return tuple(accumulate(self.lengths, initial=0))

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """`starts` as int32 on the device, for the kernels."""
        return on_device(self.starts, self.device, torch.int32)

    @property
    def total(self) -> int:
        return self.starts[-1]

    @property
    def longest(self) -> int:
        return max(self.lengths, default=0)

    def rows_at(self, places: Iterable[int]) -> Tensor:
        """`(total,)` int64: the new place of each packed row if segment i is moved to begin at row `places[i]`."""
        rows = [torch.arange(place, place + length) for place, length in zip(places, self.lengths, strict=True)]
        return on_device(torch.cat(rows) if rows else torch.empty(0, dtype=torch.int64), self.device)

    def halved(self) -> "Segments":
        """Where the segments lie once each has half of its rows, rounded down."""
        return Segments(tuple(length // 2 for length in self.lengths), self.device)

    def pairs(self, halved: "Segments") -> Tensor:
        """`(halved.total,)` int32: for each row of `halved()`, the first of the two rows of the same segment that it comes from."""
        rows = [torch.arange(start, start + 2 * length, 2) for start, length in zip(self.starts, halved.lengths, strict=False)]
        return on_device(torch.cat(rows) if rows else torch.empty(0), self.device, torch.int32)

    @classmethod
    def of_batch(cls, padded: Tensor) -> "Segments":
        """Of a batch `(segments, width, features)` without padding."""
        if padded.dim() != 3:
            raise InputError(
                got=f"hidden_states of shape {tuple(padded.shape)}",
                expected="(clips, frames, width)",
                remedy="Add the missing dimensions with unsqueeze",
            )
        return cls((padded.shape[1],) * padded.shape[0], padded.device)

    def pack(self, padded: Tensor) -> Tensor:
        """`(segments, width, ...)` → `(total, ...)`."""
        width = padded.shape[1]
        if all(length == width for length in self.lengths):
            return padded.flatten(0, 1)
        return padded.flatten(0, 1).index_select(0, self.rows_at(segment * width for segment in range(len(self.lengths))))

    def pad(self, packed: Tensor, width: int) -> Tensor:
        """`(total, ...)` → `(segments, width, ...)`, zero beyond a segment's length."""
        return self.pad_to_multiple(packed, width, (1,) * len(self.lengths))

    def pad_to_multiple(self, packed: Tensor, width: int, windows: tuple[int, ...]) -> Tensor:
        """`(total, ...)` → `(sum of windows, width, ...)`: segment i fills `windows[i]` windows, zero beyond its length."""
        if all(length == width * count for length, count in zip(self.lengths, windows, strict=True)):
            return packed.reshape(sum(windows), width, *packed.shape[1:])
        rows = self.rows_at(accumulate((width * count for count in windows[:-1]), initial=0) if windows else ())
        padded = packed.new_zeros(sum(windows) * width, *packed.shape[1:]).index_copy(0, rows, packed)
        return padded.view(sum(windows), width, *packed.shape[1:])

    def window_rows(self, width: int, beyond: int) -> Tensor:
        """`(windows, width)` int64 on the host: packed rows of each segment, cut into windows; `beyond` after a segment's end."""
        after = torch.full((width - 1,), beyond)
        own = torch.arange(self.total).split(self.lengths) if self.lengths else ()
        pieces = [piece for rows in own for piece in (rows, after[: -len(rows) % width])]
        return torch.cat([after[:0], *pieces]).view(-1, width)


@dataclass(frozen=True)
class Bucket:
    """Stands in for `Segments` in a step of fixed shape: where each segment lies is known on the device alone.

    Attributes:
        cu_seqlens: `(segments + 1,)` int32. Rows from its last entry on are padding.
        total: rows, padding included.
        longest: a bound on the rows of one segment.
    """

    cu_seqlens: Tensor
    total: int
    longest: int

    def halved(self) -> "Bucket":
        """As `Segments.halved`, computed on the device."""
        lengths = self.cu_seqlens.diff() // 2
        cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        return Bucket(cu_seqlens, self.total // 2, self.longest // 2)

    def pairs(self, halved: "Bucket") -> Tensor:
        """As `Segments.pairs`; −1 for padding."""
        rows = torch.arange(halved.total, dtype=torch.int32, device=self.cu_seqlens.device)
        segment = torch.searchsorted(halved.cu_seqlens[1:], rows, right=True).clamp(max=len(self.cu_seqlens) - 2)
        first = self.cu_seqlens[segment] + 2 * (rows - halved.cu_seqlens[segment])
        return first.masked_fill(rows >= halved.cu_seqlens[-1], -1)


def host_lengths(lengths: list[int] | tuple[int, ...] | Tensor, clips: int, longest: int, name: str) -> tuple[int, ...]:
    """A caller's lengths, checked.

    A tensor on a device is copied to the host, which waits for the device; a list avoids that.
    """
    values = tuple(lengths.tolist()) if isinstance(lengths, Tensor) else tuple(lengths)
    if len(values) != clips or any(isinstance(one, bool) or not isinstance(one, int) or not 0 <= one <= longest for one in values):
        raise InputError(
            got=f"{name} = {list(values)!r:.200}",
            expected=f"{clips} integers from 0 to {longest}, one for each clip",
            remedy="Pass the processor's own value, or omit it if no clip is padded",
        )
    return values


def pack_clips(padded: Tensor, lengths: list[int] | Tensor | None) -> tuple[Tensor, Segments]:
    """`(clips, frames, features)` → packed `(total_frames, features)` and where the clips lie.

    Args:
        padded: features of all clips.
        lengths: each clip's true number of frames; None: no clip is padded.
    """
    if padded.dim() != 3:
        raise InputError(
            got=f"input features of shape {tuple(padded.shape)}",
            expected="(clips, frames, features)",
            remedy="Make them with GraniteSpeechProcessor or GraniteSpeechFeatureExtractor",
        )
    count, width, _ = padded.shape
    if lengths is None:
        return padded.flatten(0, 1), Segments.of_batch(padded)
    clips = Segments(host_lengths(lengths, count, width, "input_features_lengths"), padded.device)
    return clips.pack(padded), clips
