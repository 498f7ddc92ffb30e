"""Lines to standard output and messages to standard error, either of which may be closed or stop taking them."""

import errno
import os
import sys
from contextlib import suppress

__all__ = ["OutputClosedError", "message", "open_missing_streams", "write_line"]

_READER_HAS_GONE = (errno.EPIPE, errno.EINVAL)  # the latter on Windows


class OutputClosedError(Exception):
    """Standard output takes no more lines."""


def write_line(text: str) -> None:
    """Print a line at once. Characters that the terminal's encoding lacks become escapes.

    Raises:
        OutputClosedError: it cannot be written. Why has been printed, unless the reader has just gone.
    """
    try:
        try:
            print(text, flush=True)
        except UnicodeEncodeError:
            encoding = sys.stdout.encoding
            print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except OSError as error:
        if error.errno not in _READER_HAS_GONE:
            message(f"standard output cannot be written: {error.strerror}")
        raise OutputClosedError from error


def message(text: object) -> None:
    """Print a line to standard error. If nobody reads it, the work continues."""
    with suppress(OSError):
        print(f"granite-speech: {text}", file=sys.stderr, flush=True)


def open_missing_streams() -> None:
    """Replace those of the three standard streams that were closed when the process began, so that writing to them is an OSError.

    Otherwise the next file to be opened would get the number of one of them, and what a library prints would be written into it.
    """
    while (descriptor := os.open(os.devnull, os.O_RDONLY)) <= 2:
        pass
    os.close(descriptor)
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, closefd=False))


def flush_streams() -> tuple[bool, bool]:
    """Write what is buffered. Returns whether standard output and standard error took it."""
    taken = []
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # ValueError: it was closed
            taken.append(False)
        else:
            taken.append(True)
    return tuple(taken)
