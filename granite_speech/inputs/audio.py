"""Sound files to waveforms: any format libsndfile reads, any rate, any number of channels.

The model hears 16 kHz mono; the mean over channels and torchaudio's windowed-sinc resampling bring a recording there.
A header is never believed: files are read in blocks of bounded size, and what was read is compared with what was claimed.
"""

import io
import os
import re
import sys
from fractions import Fraction
from numbers import Integral
from typing import TYPE_CHECKING, BinaryIO

from granite_speech.errors import AudioError, MissingDependencyError

if TYPE_CHECKING:
    import torch

__all__ = ["load_audio", "resample"]

SAMPLES_PER_BLOCK = 1 << 20
# Outside of these a rate in a header is damage, not a recording.
LOWEST_RATE, HIGHEST_RATE = 1_000, 768_000
# The resampling kernel has numerator x denominator taps of the reduced ratio: 44101 Hz to 16 kHz would take 3 GB. With this
# bound it takes tens of MB; every customary rate is exact, and any other is at most one part in 4,000 off in speed.
LARGEST_DENOMINATOR = 2_000
# A length of this much or more, in a header, is what writers to a pipe put for "unknown".
UNKNOWN_LENGTH = 0x7FFF0000
# In mp3 the length is an estimate unless the encoder left a note, and a decoder drops some frames at the ends.
MP3_SLACK_FRAMES, MP3_SLACK_FRACTION = 2304, 0.01

LARGEST_OGG_PAGE = 27 + 255 + 255 * 255

REMEDY_CONVERT = "Check that it plays, or convert it: ffmpeg -i IN -ac 1 -ar 16000 OUT.wav"


def load_audio(file: str | os.PathLike | BinaryIO, sampling_rate: int = 16000) -> "torch.Tensor":
    """Reads a recording.

    Args:
        file: a path, "-" for standard input, or an open binary file.
        sampling_rate: wanted, in Hz.

    Returns:
        `(samples,)` float32 on the CPU, mono, PCM scaled to [-1, 1).

    Raises:
        AudioError: there is no such file; it does not decode, is shorter than its header says, holds no samples or
            samples that are not finite, or has a rate that no recording has.
        MissingDependencyError: soundfile is not installed; or the rate differs and torchaudio cannot be imported.
    """
    name, source = _open(file)
    samples, rate = _decode(source, name)
    return samples if rate == sampling_rate else resample(samples, rate, sampling_rate)


def resample(samples: "torch.Tensor", rate: int, sampling_rate: int = 16000) -> "torch.Tensor":
    """Brings a waveform `(…, samples)` float32 from `rate` to `sampling_rate`, both in Hz (`torchaudio.functional.resample`).

    Raises:
        AudioError: a rate that is no integer, below 1 kHz or above 768 kHz.
        MissingDependencyError: torchaudio cannot be imported.
    """
    for value in (rate, sampling_rate):
        if not isinstance(value, Integral) or not LOWEST_RATE <= value <= HIGHEST_RATE:
            raise AudioError(
                got=f"a sampling rate of {value!r:.40} Hz",
                expected=f"{LOWEST_RATE} to {HIGHEST_RATE} Hz",
                remedy="Correct the rate",
            )
    if rate == sampling_rate:
        return samples
    try:
        from torchaudio.functional import resample as sinc_resample
    except (ImportError, OSError, RuntimeError) as error:  # OSError, RuntimeError: built for another CUDA than torch
        raise MissingDependencyError(
            got=f"sound at {rate} Hz and no working torchaudio ({error})",
            expected=f"torchaudio, to bring it to {sampling_rate} Hz",
            remedy="Install the torchaudio that belongs to the installed torch, or convert the file to "
            f"{sampling_rate} Hz: ffmpeg -i IN -ac 1 -ar {sampling_rate} OUT.wav",
        ) from error
    ratio = Fraction(int(rate), int(sampling_rate))
    ratio = ratio.limit_denominator(LARGEST_DENOMINATOR) if ratio >= 1 else 1 / (1 / ratio).limit_denominator(LARGEST_DENOMINATOR)
    return sinc_resample(samples, ratio.numerator, ratio.denominator)


def _open(file: str | os.PathLike | BinaryIO) -> tuple[str, str | BinaryIO]:
    """The file's name for messages, and what soundfile can open: a path or a seekable binary file."""
    if isinstance(file, (str, os.PathLike)) and os.fspath(file) != "-":
        path = os.fsdecode(file)
        if not os.path.exists(path):
            raise AudioError(got=f"{path!r}, which does not exist", expected="a sound file", remedy="Check the path")
        if os.path.isdir(path):
            raise AudioError(got=f"{path!r}, which is a folder", expected="a sound file", remedy="Name the files in it one by one")
        if os.path.isfile(path):
            return path, path
        with open(path, "rb") as pipe:  # a named pipe cannot be sought in
            return path, io.BytesIO(pipe.read())
    if isinstance(file, (str, os.PathLike)):
        return "standard input", io.BytesIO(sys.stdin.buffer.read())
    if not hasattr(file, "read"):
        raise AudioError(got=f"a {type(file).__name__}", expected="a path, '-' or an open binary file", remedy="Wrap bytes in io.BytesIO")
    name = str(getattr(file, "name", "the file"))
    try:
        is_text = isinstance(file.read(0), str)
    except (OSError, ValueError) as error:  # closed, or opened for writing
        raise AudioError(got=f"{name} that cannot be read ({error})", expected="an open binary file", remedy="Open it again") from error
    if is_text:
        raise AudioError(got=f"{name}, opened as text", expected="a binary file", remedy="Open it with mode 'rb'")
    return name, file if hasattr(file, "seekable") and file.seekable() else io.BytesIO(file.read())


def _decode(source: str | BinaryIO, name: str) -> tuple["torch.Tensor", int]:
    """All samples of a file, the mean over its channels, and its rate."""
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: the package is there and libsndfile is not
        raise MissingDependencyError(
            got=f"no working soundfile ({error})", expected="soundfile, to read sound files", remedy="pip install soundfile"
        ) from error
    import numpy as np
    import torch

    class Stream(soundfile.SoundFile):
        """Reads on to the end of the data. A seekable SoundFile seeks after every block, which fails where a FLAC has no length."""

        def seekable(self) -> bool:
            return False

    blocks = []
    try:
        with Stream(source) as stream:
            rate, claimed, kind, log = stream.samplerate, stream.frames, stream.format, stream.extra_info
            block_frames = max(1, SAMPLES_PER_BLOCK // stream.channels)
            while (block := stream.read(block_frames, dtype="float32", always_2d=True)).shape[0]:
                blocks.append(block[:, 0].copy() if block.shape[1] == 1 else block.mean(axis=1, dtype=np.float32))
    except (soundfile.SoundFileError, TypeError, ValueError, OSError) as error:
        # TypeError and ValueError: soundfile's own, where the name asks for a headerless format or the file is text.
        raise AudioError(
            got=f"{name!r}, which does not decode ({getattr(error, 'error_string', error)})",
            expected="a sound file that libsndfile reads",
            remedy=REMEDY_CONVERT,
        ) from error
    samples = np.concatenate(blocks) if blocks else np.empty(0, dtype=np.float32)
    if not LOWEST_RATE <= rate <= HIGHEST_RATE:
        raise AudioError(
            got=f"{name!r} with a sampling rate of {rate} Hz", expected=f"{LOWEST_RATE} to {HIGHEST_RATE} Hz", remedy=REMEDY_CONVERT
        )
    shortfall = _shortfall(samples.size, claimed, kind, log) or (_ogg_shortfall(source) if kind == "OGG" else None)
    if shortfall:
        raise AudioError(got=f"{name!r}, which is cut off ({shortfall})", expected="a whole file", remedy="Copy or download it again")
    if not samples.size:
        raise AudioError(got=f"{name!r}, which holds no samples", expected="at least one", remedy=REMEDY_CONVERT)
    if not np.isfinite(samples).all():
        raise AudioError(
            got=f"{name!r} with NaN or infinite samples", expected="finite ones", remedy="Write the file again from its source"
        )
    return torch.from_numpy(samples), rate


def _shortfall(read: int, claimed: int, kind: str, log: str) -> str | None:
    """How a file falls short of what its header claims; None where it does not, or where the header does not know.

    libsndfile corrects the lengths of uncompressed formats by the file's size, and says so only in its log:
    "data : 96000 (should be 48014)".
    """
    # The outer RIFF length of a WAV is often wrong in files that are whole; its data chunk's is not.
    about_samples = r"^\s*data\s*:" if kind in ("WAV", "WAVEX") else r"(?i)^\s*(?:data|data size|SSND|riff|riff size)\s*:"
    for line in log.splitlines():
        lengths = re.search(r":\s*(\d+) \(should be (\d+)\)", line)
        if lengths and re.match(about_samples, line):
            header, actual = map(int, lengths.groups())
            if actual < header < UNKNOWN_LENGTH:
                return f"{actual} bytes of {header}"
    sizes = re.search(r"Data size : (\d+)\n[\s\S]*Block Align   : (\d+)\n", log) if kind == "RF64" else None
    if sizes:  # whose length libsndfile corrects without a word in that form
        header, block = map(int, sizes.groups())
        claimed = header // block if 0 < block <= header < 1 << 62 else claimed
    slack = MP3_SLACK_FRAMES + int(MP3_SLACK_FRACTION * claimed) if kind == "MP3" else 0
    unknown = claimed >= 1 << 62
    return f"{read} samples of {claimed}" if read < claimed - slack and not unknown else None


def _ogg_shortfall(source: str | BinaryIO) -> str | None:
    """Whether an Ogg file ends within a page (RFC 3533, section 6). libsndfile takes the pages before it for the whole."""
    if isinstance(source, str):
        with open(source, "rb") as file:
            return _ogg_shortfall(file)
    end = source.seek(0, os.SEEK_END)
    source.seek(-min(end, LARGEST_OGG_PAGE), os.SEEK_END)
    tail = source.read()
    page = tail[tail.rfind(b"OggS\0") :]
    lengths = page[27 : 27 + page[26]] if len(page) > 26 else b""
    whole = len(page) > 26 and len(lengths) == page[26] and len(page) >= 27 + len(lengths) + sum(lengths)
    return None if whole else "within its last page"
