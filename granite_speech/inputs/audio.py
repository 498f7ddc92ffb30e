"""Sound files to waveforms: any common format, any rate, any number of channels.

The model takes 16 kHz mono. Channels are averaged (`channels`), rates are changed by torchaudio's windowed-sinc filter.
A header is never believed: files are decoded in small pieces, and what came out is compared with what was claimed.
"""

import io
import math
import os
import re
import stat
import sys
import warnings
from collections.abc import Callable, Iterator
from numbers import Real
from typing import TYPE_CHECKING, BinaryIO

from granite_speech.errors import AudioError, InputError
from granite_speech.inputs.audio_decoding import REMEDY_CONVERT, Piece, decode
from granite_speech.inputs.audio_headers import Source, read_header
from granite_speech.inputs.resampling import BlockResampler, check_rate, resample

if TYPE_CHECKING:
    import numpy as np
    import torch

__all__ = ["AudioWarning", "load_audio", "read_blocks", "resample"]

MAX_BYTES = 2 << 30
BYTES_PER_SAMPLE = 4
# No format begins with this many zeros.
FIRST_BYTES = 64
# Of zeros before an mp3 stream, as many are left in as FFmpeg's own command can have without a difference to what it decodes.
ZEROS_KEPT = 1024
URL = re.compile(r"(https?|ftps?|s3|gs|hf|file):/|data:|[a-z][a-z0-9+.-]+://", re.IGNORECASE)


class AudioWarning(UserWarning):
    """A recording was loaded although something is wrong with its file."""


def load_audio(
    file: str | os.PathLike | BinaryIO,
    sampling_rate: int = 16000,
    *,
    max_seconds: float | None = None,
    max_bytes: int | None = MAX_BYTES,
    errors: str = "raise",
) -> "torch.Tensor":
    """Reads a recording.

    Any container and codec that people record in and FFmpeg decodes: wav, flac, mp3, ogg, opus, m4a, mp4, mov, 3gp, webm, mkv, wma,
    amr, aac, ac3, aiff, au, caf and others. Channels are averaged; if they cancel out, the loudest one is used alone. Nothing but
    the file is opened, even if it is a playlist that names others.

    Args:
        file: a path, "-" for standard input, or an open binary file, which is read from its beginning.
        sampling_rate: wanted, in Hz.
        max_seconds: the longest recording to accept; None for any.
        max_bytes: the most memory that the samples may take, 4 bytes each; None for any. The default is 9 hours at 16 kHz.
            Standard input and pipes, which are read into memory first, may not be larger than this either.
        errors: "raise", or "warn" to load what is intact of a file whose end is damaged or missing.

    Returns:
        `(samples,)` float32 on the CPU, mono, PCM scaled to [-1, 1).

    Raises:
        AudioError: there is no such file; it does not decode, is shorter than its header says, exceeds a limit, holds no samples or
            samples that are not finite, or has a rate that no recording has. An mp3 without a Xing header does not say how long
            it should be, so nobody can tell whether it was cut off.
        InputError: an option that is not what it should be.
        MissingDependencyError: PyAV is not installed; or the rate differs and torchaudio cannot be imported.

    Warns:
        AudioWarning: the lengths in a header were never filled in, because the recorder was killed: the file is read to its end. With
            `errors="warn"` also: the end is damaged or missing.
    """
    import torch

    from granite_speech.inputs.channels import ChannelEnergies

    if max_bytes is not None:
        _check_positive(max_bytes=max_bytes)
    recording = _Recording(file, sampling_rate, max_seconds, max_bytes, errors)
    energies = ChannelEnergies()
    try:
        samples = list(recording.resampled(energies.mean))
        if energies.any_cancelled():
            samples = list(recording.resampled(energies.chosen))
    finally:
        recording.close()
    recording.report()
    return torch.cat(samples)


def read_blocks(
    file: str | os.PathLike | BinaryIO,
    sampling_rate: int = 16000,
    *,
    block_seconds: float = 30.0,
    max_seconds: float | None = None,
    errors: str = "raise",
) -> Iterator["torch.Tensor"]:
    """Reads a recording block by block, as it is decoded, in memory that does not grow with its length.

    The blocks, joined, are what `load_audio` returns. A file with several channels is decoded twice, because only its end shows
    whether they cancel out. A damaged end is reported after the last intact block.

    Args:
        file, sampling_rate, max_seconds, errors: as for `load_audio`. Standard input and pipes are read into memory first, up to 2 GiB.
        block_seconds: length of each block; the last one may be shorter.

    Yields:
        `(samples,)` float32 on the CPU, mono.

    Raises:
        AudioError, InputError, MissingDependencyError: as `load_audio`; at once for what the path and the options show, and otherwise
            where it is found.
    """
    _check_positive(block_seconds=block_seconds)
    recording = _Recording(file, sampling_rate, max_seconds, None, errors)
    return _regroup(recording, max(1, round(block_seconds * sampling_rate)))


def _regroup(recording: "_Recording", length: int) -> Iterator["torch.Tensor"]:
    """Blocks of one length from pieces of any."""
    import torch

    from granite_speech.inputs.channels import ChannelEnergies

    energies = None

    def mixed(stretch: int, channels: "np.ndarray") -> "np.ndarray":
        nonlocal energies
        if energies is None:
            energies = ChannelEnergies()
            for number, piece in recording.stretches():
                energies.mean(number, piece.samples)
        return energies.chosen(stretch, channels)

    try:
        waiting, count = [], 0
        for samples in recording.resampled(mixed):
            waiting.append(samples)
            count += len(samples)
            if count >= length:
                *blocks, rest = torch.cat(waiting).split(length)
                if len(rest) == length:
                    blocks, rest = [*blocks, rest], rest[:0]
                yield from (block.clone() for block in blocks)
                waiting, count = [rest.clone()], len(rest)
        if count:
            yield torch.cat(waiting)
    finally:
        recording.close()
    recording.report()


class _Recording:
    """One file, which can be decoded more than once, and what is found out about it on the way."""

    def __init__(self, file, sampling_rate: int, max_seconds: float | None, max_bytes: int | None, errors: str):
        check_rate(sampling_rate)
        if max_seconds is not None:
            _check_positive(max_seconds=max_seconds)
        if errors not in ("raise", "warn"):
            raise InputError(got=f"errors={errors!r:.40}", expected="'raise' or 'warn'", remedy="Pass one of them")
        self.sampling_rate, self.max_seconds, self.max_bytes, self.errors = sampling_rate, max_seconds, max_bytes, errors
        self.name, self.file, self.is_ours = _open(file, MAX_BYTES if max_bytes is None else max_bytes)
        self.begin = _begin(self.file, self.name)
        self.seconds, self.damage, self.unfilled = 0.0, None, False

    def close(self) -> None:
        if self.is_ours:
            self.file.close()

    def pieces(self) -> Iterator[Piece]:
        """The samples as they are decoded, checked against the limits. Sets `seconds`, `damage` and `unfilled` at the end."""
        import numpy as np

        seconds, damage, unfilled, begin = 0.0, None, False, self.begin
        while begin is not None:  # files that were appended to one another
            header = read_header(Source(self.file, begin))
            unfilled = unfilled or header.unfilled
            end = None if header.next is None else begin + header.next
            decoder = decode(Source(self.file, begin, end, header.patches), header, self.name)
            while True:
                try:
                    piece = next(decoder)
                except StopIteration as stop:
                    damage = damage or stop.value
                    break
                except AudioError as error:
                    if begin == self.begin:
                        raise
                    damage = damage or f"what follows byte {begin} does not decode: {error.got}"
                    break
                seconds += piece.samples.shape[1] / piece.rate
                self._check_limits(seconds)
                if not np.isfinite(piece.samples).all():
                    raise AudioError(
                        got=f"{self.name!r} with NaN or infinite samples",
                        expected="finite ones",
                        remedy="Write the file again from its source",
                    )
                yield piece
            begin = end
        self.seconds, self.damage, self.unfilled = seconds, damage, unfilled

    def _check_limits(self, seconds: float) -> None:
        size = seconds * self.sampling_rate * BYTES_PER_SAMPLE
        for option, value, limit in (("max_seconds", seconds, self.max_seconds), ("max_bytes", size, self.max_bytes)):
            if limit is not None and value > limit * (1 + 1e-9):
                raise AudioError(
                    got=f"{self.name!r}, which exceeds {option}={limit}",
                    expected="a recording within the limit",
                    remedy=f"Raise {option}, or take the recording in parts with granite_speech.read_blocks",
                )

    def stretches(self) -> Iterator[tuple[int, Piece]]:
        """The pieces, and a number that changes with rate and channels."""
        number, previous = -1, None
        for piece in self.pieces():
            number += (piece.rate, len(piece.samples)) != previous
            previous = piece.rate, len(piece.samples)
            yield number, piece

    def resampled(self, mixed: Callable[[int, "np.ndarray"], "np.ndarray"]) -> Iterator["torch.Tensor"]:
        """The recording at the wanted rate, in pieces `(samples,)`.

        Args:
            mixed: makes one channel of several, given their stretch's number and the samples `(channels, samples)`.
        """
        import torch

        rate, resampler = None, None
        for stretch, piece in self.stretches():
            if piece.rate != rate:
                if resampler is not None:
                    yield resampler.finish()
                rate, resampler = piece.rate, BlockResampler(piece.rate, self.sampling_rate)
            one = piece.samples[0] if len(piece.samples) == 1 else mixed(stretch, piece.samples)
            yield resampler.push(torch.from_numpy(one))
        if resampler is not None:
            yield resampler.finish()

    def report(self) -> None:
        """Raise or warn about what the last pass over the file found."""
        intact = f"{self.name!r}, which is cut off or damaged ({self.damage}); its first {self.seconds:.2f} s are intact"
        if self.damage and self.errors == "raise":
            raise AudioError(
                got=intact,
                expected="a whole file",
                remedy="Copy or download it again, or load the intact part with errors='warn'",
            )
        if not self.seconds:
            raise AudioError(got=f"{self.name!r}, which holds no samples", expected="at least one", remedy=REMEDY_CONVERT)
        if self.damage:
            warnings.warn(f"{intact} and were loaded", AudioWarning, stacklevel=3)
        elif self.unfilled:
            warnings.warn(
                f"{self.name!r} does not say how long it is, because its header was never filled in: its recorder may have been killed. "
                f"All {self.seconds:.2f} s to its end were loaded",
                AudioWarning,
                stacklevel=3,
            )


# --- opening -----------------------------------------------------------------------------------------------------------------------


def _open(file: str | os.PathLike | BinaryIO, most: int) -> tuple[str, BinaryIO, bool]:
    """A file's name for messages, the seekable binary file, and whether it was opened here.

    Args:
        most: bytes to take from what cannot be sought in.
    """
    if isinstance(file, (str, os.PathLike)):
        if os.fspath(file) == "-":
            return "standard input", _in_memory(sys.stdin.buffer, "standard input", most), True
        path = os.fsdecode(file)
        opened = _open_path(path)
        if stat.S_ISREG(os.fstat(opened.fileno()).st_mode):  # a device such as /dev/zero can be sought in, and has no end
            return path, opened, True
        with opened:
            return path, _in_memory(opened, path, most), True
    if not hasattr(file, "read"):
        raise AudioError(got=f"a {type(file).__name__}", expected="a path, '-' or an open binary file", remedy="Wrap bytes in io.BytesIO")
    name = str(getattr(file, "name", "the file"))
    try:
        is_text = isinstance(file.read(0), str)
    except (OSError, ValueError) as error:  # closed, or opened for writing
        raise AudioError(got=f"{name} that cannot be read ({error})", expected="an open binary file", remedy="Open it again") from error
    if is_text:
        raise AudioError(got=f"{name}, opened as text", expected="a binary file", remedy="Open it with mode 'rb'")
    if hasattr(file, "seekable") and file.seekable():
        return name, file, False
    return name, _in_memory(file, name, most), True


def _open_path(path: str) -> BinaryIO:
    try:
        return open(path, "rb")
    except (OSError, ValueError) as error:  # ValueError: a zero byte, or characters that no file name can have
        raise _not_opened(path, error) from error


def _not_opened(path: str, error: Exception) -> AudioError:
    if URL.match(path):
        return AudioError(got=f"the URL {path!r}", expected="a local file", remedy="Download it first; nothing is fetched from here")
    if os.path.isdir(path):
        return AudioError(got=f"{path!r}, which is a folder", expected="a sound file", remedy="Name the files in it one by one")
    if os.path.exists(path):
        return AudioError(got=f"{path!r}, which cannot be read ({error})", expected="a readable file", remedy="Check its permissions")
    if not path.isprintable() or any("\udc80" <= character <= "\udcff" for character in path):
        return AudioError(
            got=f"{path!r}, which does not exist and whose name is not valid UTF-8",
            expected="a sound file",
            remedy="Names in Latin-1 or another old encoding work as os.listdir gives them, or as bytes through os.fsdecode",
        )
    return AudioError(got=f"{path!r}, which does not exist", expected="a sound file", remedy="Check the path")


def _in_memory(file, name: str, most: int) -> io.BytesIO:
    content = file.read(most + 1)
    if len(content) > most:
        raise AudioError(
            got=f"{name!r} with more than {most} bytes",
            expected="a recording within max_bytes",
            remedy="Raise max_bytes, or save it to a file and name that",
        )
    return io.BytesIO(content)


def _begin(file: BinaryIO, name: str) -> int:
    """Where a file begins: after a tag that some program has put before a format without a place for it, and after zeros.

    Some recorders write zeros first, and FFmpeg gives up on many of them.
    """
    file.seek(0)
    block, count = file.read(FIRST_BYTES), 0
    if not block:
        raise AudioError(
            got=f"{name!r}, which is empty (0 bytes) and does not decode", expected="a sound file", remedy="Record or copy it again"
        )
    if block[:3] == b"ID3" and len(block) == FIRST_BYTES:
        # Its length has 7 bits a byte.
        tag = 10 + sum(value << shift for value, shift in zip(block[6:10], (21, 14, 7, 0), strict=True))
        return tag if read_header(Source(file, tag)).kind else 0
    if block.strip(b"\0"):
        return 0
    while block and not block.strip(b"\0"):
        count += len(block)
        block = file.read(1 << 16)
    count += len(block) - len(block.lstrip(b"\0"))
    return count if read_header(Source(file, count)).kind else max(0, count - ZEROS_KEPT)


def _check_positive(**options: float) -> None:
    for name, value in options.items():
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value < math.inf:
            raise InputError(got=f"{name}={value!r:.40}", expected="a positive number", remedy="Correct it")
