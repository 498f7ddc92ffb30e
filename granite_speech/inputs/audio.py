"""Sound files to waveforms: any common format, any rate, any number of channels.

The model takes 16 kHz mono. Channels are averaged (`channels`) and torchaudio's windowed-sinc filter changes the rate.
Headers are not trusted: files are decoded in small pieces, and the result is compared with what the header claims.
"""

import math
import os
import warnings
from collections.abc import Callable, Iterator
from numbers import Real
from typing import TYPE_CHECKING, BinaryIO

from granite_speech.errors import AudioError, GraniteSpeechError, InputError
from granite_speech.inputs.audio_decoding import REMEDY_CONVERT, Piece, check_claims, container_seconds, decode
from granite_speech.inputs.audio_headers import Source, read_header
from granite_speech.inputs.audio_opening import find_start, open_seekable
from granite_speech.inputs.resampling import BlockResampler, check_rate, resample

if TYPE_CHECKING:
    import numpy as np
    import torch

__all__ = [
    "AudioWarning",
    "blocks_with_warning",
    "estimate_seconds",
    "load_audio",
    "load_with_warning",
    "measure_seconds",
    "read_blocks",
    "resample",
]

MAX_BYTES = 2 << 30
BLOCK_SECONDS = 30.0
# What is done with a block takes several times its memory.
SHORT_BLOCK_SECONDS = 2.0
BYTES_PER_SAMPLE = 4
# A longer recording than this is measured by decoding: such a length in a header is more likely damage.
LONGEST_SECONDS_FROM_HEADER = 24 * 3600


class AudioWarning(UserWarning):
    """Something is wrong with a sound file, but it was loaded."""


def load_audio(
    file: str | os.PathLike | BinaryIO,
    sampling_rate: int = 16000,
    *,
    max_seconds: float | None = None,
    max_bytes: int | None = MAX_BYTES,
    errors: str = "raise",
) -> "torch.Tensor":
    """Loads a recording.

    Reads the containers and codecs in common use: wav, flac, mp3, ogg, opus, m4a, mp4, mov, 3gp, webm, mkv, wma, amr, aac, ac3,
    aiff, au, caf and others. Channels are averaged; if they cancel out, only the loudest one is used. No other file and no network
    address is opened, even if the file is a playlist.

    Args:
        file: a path, "-" for standard input, or an open binary file, which is read from its beginning.
        sampling_rate: of the result, in Hz.
        max_seconds: the longest recording to accept; None for any.
        max_bytes: the most memory that the samples may take, 4 bytes each; None for no limit. The default is 9 hours at 16 kHz.
            Also limits the size of standard input and pipes, which are read into memory first.
        errors: "raise", or "warn" to load the intact part of a file whose end is damaged or missing.

    Returns:
        `(samples,)` float32 on the CPU, mono, PCM scaled to [-1, 1).

    Raises:
        AudioError: the file does not exist, does not decode, is shorter than its header says, exceeds a limit, has no samples,
            samples that are not finite, or an impossible rate. An mp3 without a Xing header does not say how long it should be, so
            it is not known whether its end is missing.
        InputError: an invalid option.
        MissingDependencyError: PyAV is not installed; or the rate differs and torchaudio cannot be imported.

    Warns:
        AudioWarning: the lengths in a header were never filled in, because the recorder was killed: the file is read to its end.
            With `errors="warn"`, also if the end is damaged or missing.
    """
    samples, warning = load_with_warning(file, sampling_rate, max_seconds=max_seconds, max_bytes=max_bytes, errors=errors)
    if warning is not None:
        warnings.warn(warning, AudioWarning, stacklevel=2)
    return samples


def load_with_warning(
    file: str | os.PathLike | BinaryIO,
    sampling_rate: int = 16000,
    *,
    max_seconds: float | None = None,
    max_bytes: int | None = MAX_BYTES,
    errors: str = "raise",
) -> tuple["torch.Tensor", str | None]:
    """As `load_audio`, but returns the text of the warning, or None: for threads that read files on behalf of another one."""
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
    warning = recording.warning()  # first, because there may be no samples
    return torch.cat(samples), warning


def read_blocks(
    file: str | os.PathLike | BinaryIO,
    sampling_rate: int = 16000,
    *,
    block_seconds: float = BLOCK_SECONDS,
    max_seconds: float | None = None,
    errors: str = "raise",
) -> Iterator["torch.Tensor"]:
    """Loads a recording block by block, in memory that does not grow with its length.

    The blocks, joined, equal what `load_audio` returns. A file with several channels is decoded twice, because whether they cancel
    out is only known at the end. A damaged end is reported after the last intact block.

    Args:
        file, sampling_rate, max_seconds, errors: as in `load_audio`. Standard input and pipes are read into memory first, up to 2 GiB.
        block_seconds: length of each block; the last one may be shorter.

    Yields:
        `(samples,)` float32 on the CPU, mono.

    Raises:
        AudioError, InputError, MissingDependencyError: as `load_audio`: at once if the path or an option is wrong, otherwise when
            the decoder reaches the fault.
    """
    _check_positive(block_seconds=block_seconds)
    recording = _Recording(file, sampling_rate, max_seconds, None, errors)
    return _reported(recording, max(1, round(block_seconds * sampling_rate)))


def blocks_with_warning(
    file: str | os.PathLike | BinaryIO, sampling_rate: int = 16000, *, errors: str = "raise"
) -> tuple[Iterator["torch.Tensor"], Callable[[], str | None]]:
    """As `read_blocks`, but instead of the warning a function returns its text, or None, once the blocks have ended."""
    recording, found = _Recording(file, sampling_rate, None, None, errors), []

    def blocks() -> Iterator["torch.Tensor"]:
        yield from _regroup(recording, round(SHORT_BLOCK_SECONDS * sampling_rate))
        found.append(recording.warning())

    return blocks(), lambda: found[0] if found else None


def measure_seconds(file: str | os.PathLike | BinaryIO) -> float:
    """The length of a recording, without keeping its samples.

    PCM WAV and FLAC are measured from their headers, so damage to their samples is not found here. Any other file is decoded once,
    piece by piece.

    Args:
        file: as in `load_audio`. Standard input and pipes are read into memory first, up to 2 GiB.

    Returns:
        Seconds. They are exact: the number of samples divided by the file's rate.

    Raises:
        AudioError, MissingDependencyError: the file cannot be loaded, as in `load_audio`.

    Warns:
        AudioWarning: the lengths in the header were never filled in.
    """
    recording = _Recording(file, 16000, None, None, "raise")
    try:
        seconds = recording.seconds_from_headers()
        if seconds is not None:
            return seconds
        for _ in recording.pieces():
            pass
    finally:
        recording.close()
    recording.report()
    return recording.seconds


def estimate_seconds(path: str | os.PathLike) -> float | None:
    """What a file says about its length, in milliseconds of work and without decoding: for a progress bar.

    Returns:
        Seconds; None if the file does not say, cannot be read, or is not a regular file.
    """
    if not os.path.isfile(path):  # opening a pipe would take what is in it
        return None
    try:
        recording = _Recording(path, 16000, None, None, "raise")
        try:
            seconds = recording.seconds_from_headers() or container_seconds(Source(recording.file, recording.begin))
        finally:
            recording.close()
    except (GraniteSpeechError, OSError):
        return None
    return seconds if seconds is not None and 0 < seconds <= LONGEST_SECONDS_FROM_HEADER else None


def _reported(recording: "_Recording", length: int) -> Iterator["torch.Tensor"]:
    yield from _regroup(recording, length)
    recording.report()


def _regroup(recording: "_Recording", length: int) -> Iterator["torch.Tensor"]:
    """Joins and splits the decoded pieces into blocks of `length` samples."""
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


class _Recording:
    """One file that can be decoded more than once, and what the last pass over it found."""

    def __init__(self, file, sampling_rate: int, max_seconds: float | None, max_bytes: int | None, errors: str):
        check_rate(sampling_rate)
        if max_seconds is not None:
            _check_positive(max_seconds=max_seconds)
        if errors not in ("raise", "warn"):
            raise InputError(got=f"errors={errors!r:.40}", expected="'raise' or 'warn'", remedy="Pass one of them")
        self.sampling_rate, self.max_seconds, self.max_bytes, self.errors = sampling_rate, max_seconds, max_bytes, errors
        self.name, self.file, self.is_ours = open_seekable(file, MAX_BYTES if max_bytes is None else max_bytes)
        self.begin = find_start(self.file, self.name)
        self.seconds, self.damage, self.unfilled = 0.0, None, False

    def close(self) -> None:
        if self.is_ours:
            self.file.close()

    def seconds_from_headers(self) -> float | None:
        """The length that the headers give, if the file is PCM WAV or FLAC and they are filled in; otherwise None."""
        seconds, begin = 0.0, self.begin
        while begin is not None:
            header = read_header(Source(self.file, begin))
            samples = header.samples or header.samples_of_wav
            if not samples or header.missing:
                return None
            check_claims(self.name, header.channels, header.rate)
            seconds += samples / header.rate
            begin = None if header.next is None else begin + header.next
        return seconds if seconds <= LONGEST_SECONDS_FROM_HEADER else None

    def pieces(self) -> Iterator[Piece]:
        """The samples as they are decoded, checked against the limits. Sets `seconds`, `damage` and `unfilled` at the end."""
        import numpy as np

        counts: dict[int, int] = {}  # samples by rate: adding up seconds would round at every piece
        seconds, damage, unfilled, begin = 0.0, None, False, self.begin
        while begin is not None:  # one file may be appended to another
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
                counts[piece.rate] = counts.get(piece.rate, 0) + piece.samples.shape[1]
                seconds = sum(count / rate for rate, count in counts.items())
                self._check_limits(seconds)
                if not np.isfinite(piece.samples).all():
                    raise AudioError(
                        got=f"{self.name!r} with NaN or infinite samples",
                        expected="finite samples",
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
                    remedy=f"Raise {option}, or read the recording in parts with granite_speech.read_blocks",
                )

    def stretches(self) -> Iterator[tuple[int, Piece]]:
        """The pieces, each with the number of its stretch; a new stretch begins where the rate or the number of channels changes."""
        number, previous = -1, None
        for piece in self.pieces():
            number += (piece.rate, len(piece.samples)) != previous
            previous = piece.rate, len(piece.samples)
            yield number, piece

    def resampled(self, mixed: Callable[[int, "np.ndarray"], "np.ndarray"]) -> Iterator["torch.Tensor"]:
        """The recording at `sampling_rate`, in pieces `(samples,)`.

        Args:
            mixed: turns several channels into one, given the number of the stretch and the samples `(channels, samples)`.
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
        """Raises or warns about what the last pass over the file found."""
        warning = self.warning()
        if warning is not None:
            warnings.warn(warning, AudioWarning, stacklevel=3)

    def warning(self) -> str | None:
        """What the last pass over the file found that a caller should know.

        Raises:
            AudioError: it found a fault.
        """
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
            return f"{intact} and were loaded"
        if self.unfilled:
            return (
                f"{self.name!r} does not say how long it is, because its header was never filled in: the recorder may have been killed. "
                f"It was read to its end, {self.seconds:.2f} s"
            )
        return None


def _check_positive(**options: float) -> None:
    for name, value in options.items():
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value < math.inf:
            raise InputError(got=f"{name}={value!r:.40}", expected="a positive number", remedy="Correct it")
