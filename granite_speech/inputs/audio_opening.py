"""Opening a sound file: paths, standard input, pipes and open files, each as one seekable binary file; and where its sound begins."""

import io
import os
import re
import stat
import sys
from typing import BinaryIO

from granite_speech.errors import AudioError
from granite_speech.inputs.audio_headers import Source, read_header

__all__ = ["find_start", "open_seekable"]

# No format begins with this many zeros.
FIRST_BYTES = 64
# FFmpeg tolerates this many zeros before an mp3 stream; decoding is the same with them as without.
ZEROS_KEPT = 1024
URL = re.compile(r"(https?|ftps?|s3|gs|hf|file):/|data:|[a-z][a-z0-9+.-]+://", re.IGNORECASE)


def open_seekable(file: str | os.PathLike | BinaryIO, most: int) -> tuple[str, BinaryIO, bool]:
    """A file's name for messages, the seekable binary file, and whether the caller of this function must close it.

    Args:
        most: the most bytes to read into memory from a file that is not seekable.
    """
    if isinstance(file, (str, os.PathLike)):
        if os.fspath(file) == "-":
            return "standard input", _in_memory(sys.stdin.buffer, "standard input", most), True
        path = os.fsdecode(file)
        opened = _open_path(path)
        if stat.S_ISREG(os.fstat(opened.fileno()).st_mode):  # /dev/zero is seekable too, but has no end
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
    except (OSError, ValueError) as error:  # ValueError: a NUL, or characters that no file name can have
        raise _not_opened(path, error) from error


def _not_opened(path: str, error: Exception) -> AudioError:
    if URL.match(path):
        return AudioError(got=f"the URL {path!r}", expected="a local file", remedy="Download it first")
    if os.path.isdir(path):
        return AudioError(got=f"{path!r}, which is a folder", expected="a sound file", remedy="Pass the files in it one by one")
    if os.path.exists(path):
        return AudioError(got=f"{path!r}, which cannot be read ({error})", expected="a readable file", remedy="Check its permissions")
    if not path.isprintable() or any("\udc80" <= character <= "\udcff" for character in path):
        return AudioError(
            got=f"{path!r}, which does not exist and whose name is not valid UTF-8",
            expected="a sound file",
            remedy="For a name in Latin-1 or another old encoding, pass what os.listdir returns, or os.fsdecode of its bytes",
        )
    return AudioError(got=f"{path!r}, which does not exist", expected="a sound file", remedy="Check the path")


def _in_memory(file, name: str, most: int) -> io.BytesIO:
    pieces, count = [], 0
    while count <= most and (piece := file.read(most + 1 - count)):  # a pipe without a buffer returns what it has
        pieces.append(piece)
        count += len(piece)
    if count > most:
        raise AudioError(
            got=f"{name!r} with more than {most} bytes",
            expected="a recording within max_bytes",
            remedy="Raise max_bytes, or save it to a file and pass its path",
        )
    return io.BytesIO(pieces[0] if len(pieces) == 1 else b"".join(pieces))


def find_start(file: BinaryIO, name: str) -> int:
    """Where the sound file begins within `file`: after an ID3 tag in front of a format that has none, or after leading zeros.

    Some recorders write zeros first, and FFmpeg gives up if there are many.
    """
    file.seek(0)
    block, count = file.read(FIRST_BYTES), 0
    if not block:
        raise AudioError(
            got=f"{name!r}, which is empty (0 bytes) and does not decode", expected="a sound file", remedy="Record or copy it again"
        )
    if block[:3] == b"ID3" and len(block) == FIRST_BYTES:
        # The tag stores its length in 7 bits of each byte.
        tag = 10 + sum(value << shift for value, shift in zip(block[6:10], (21, 14, 7, 0), strict=True))
        return tag if read_header(Source(file, tag)).kind else 0
    if block.strip(b"\0"):
        return 0
    while block and not block.strip(b"\0"):
        count += len(block)
        block = file.read(1 << 16)
    count += len(block) - len(block.lstrip(b"\0"))
    return count if read_header(Source(file, count)).kind else max(0, count - ZEROS_KEPT)
