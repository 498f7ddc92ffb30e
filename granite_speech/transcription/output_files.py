"""The files of a run: each complete or absent, so that a run that was killed can be resumed."""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from granite_speech.errors import InputError, OutputError
from granite_speech.transcription.output_names import STANDARD_INPUT, output_names, partial_name
from granite_speech.transcription.subtitles import SubtitleOptions, one_line
from granite_speech.transcription.transcript import Transcript
from granite_speech.transcription.writers import FORMATS, write_text

__all__ = ["OutputFiles", "not_written"]

# What is wrong with a transcript, beside its files. While it is there, the input is to be transcribed again.
_FAILED = "failed"


class OutputFiles:
    """Where the transcripts of some inputs are written: "speech.srt" for "speech.wav".

    Inputs that share a name get longer ones, as `output_names` says; no file of one input replaces that of another one, nor an input.

    Args:
        inputs: paths of the recordings; "-" is the standard input.
        folder: of the files; created if missing. None: the working directory.
        formats: some of `FORMATS`.
        options: the layout of subtitles.

    Raises:
        InputError: no format, or an unknown one.
        OutputError: the folder cannot be created.
    """

    def __init__(self, inputs: Sequence[str], folder: str | None, formats: Sequence[str], options: SubtitleOptions):
        unknown = [one for one in formats if one not in FORMATS]
        if unknown or not formats:
            got = f"the output format {unknown[0]!r}" if unknown else "no output format"
            raise InputError(got=got, expected=f"some of {', '.join(FORMATS)}", remedy="Choose from these")
        self._inputs, self._options = [os.fspath(one) for one in inputs], options
        self._formats = tuple(dict.fromkeys(formats))
        self._folder = Path(folder or ".")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            raise not_written(self._folder, error) from error
        suffixes = [f".{one}" for one in (*self._formats, _FAILED)]
        self._names = output_names(self._inputs, os.fspath(self._folder), suffixes)

    def paths(self, index: int) -> list[Path]:
        """The files of input number `index`, one for each format."""
        return [self._path(index, one) for one in self._formats]

    def is_complete(self, index: int) -> bool:
        """Whether all files of an input are there, none older than the input, and nothing failed when they were written."""
        source = self._inputs[index]
        failed = self._path(index, _FAILED)
        if source == STANDARD_INPUT or any(map(os.path.lexists, [failed, *map(_partial, [failed, *self.paths(index)])])):
            return False  # the standard input may have something else today
        written = [_modified(one) for one in self.paths(index)]
        modified = _modified(source)
        return None not in written and (modified is None or min(written) >= modified)

    def write(self, index: int, transcript: Transcript) -> list[Path]:
        """Write all files of an input, and return their paths.

        If the transcript is not complete, a file "speech.failed" says why, and is the first of the paths. If there is an error and
        nothing was read, it is the only one.

        Raises:
            OutputError: something cannot be written. Files from before are as they were, unless the last step, renaming, failed.
            InputError: as `write_text`.
        """
        failed = self._path(index, _FAILED)
        has_text = transcript.error is None or transcript.text or transcript.segments
        contents = {self._path(index, one): write_text(transcript, one, self._options) for one in self._formats} if has_text else {}
        if transcript.is_complete:
            _write(contents)
            for stale in (failed, _partial(failed)):
                try:
                    stale.unlink(missing_ok=True)
                except OSError as error:
                    raise not_written(stale, error) from error
            return list(contents)
        _write({failed: _report(self._inputs[index], transcript)})  # first: whenever the process dies, the input is not complete
        _write(contents)
        return [failed, *contents]

    def _path(self, index: int, suffix: str) -> Path:
        return self._folder / f"{self._names[index]}.{suffix}"


def _write(contents: Mapping[Path, str]) -> None:
    """Replace files by new ones: none of them before all are on disk, and each at once."""
    path = None
    try:
        for path, text in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_partial(_partial(path), text)
        for path in contents:
            os.replace(_partial(path), path)
    except BaseException as error:
        for one in contents:
            with suppress(OSError, ValueError):
                _partial(one).unlink(missing_ok=True)
        if isinstance(error, (OSError, ValueError)):  # ValueError: characters that no file name can have
            raise not_written(path, error) from error
        raise


def _write_partial(partial: Path, text: str) -> None:
    partial.unlink(missing_ok=True)  # of a run that was killed
    with open(partial, "xb") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def _partial(path: Path) -> Path:
    return path.with_name(partial_name(path.name))


def _modified(path: str | Path) -> int | None:
    """When a file was modified, in nanoseconds; None: there is no such file."""
    try:
        return os.stat(path).st_mtime_ns if os.path.isfile(path) else None
    except (OSError, ValueError):
        return None


def _report(name: str, transcript: Transcript) -> str:
    """What went wrong with an input, a line for each fault."""
    faults = [] if transcript.error is None else [str(transcript.error)]
    lines = [name, *faults, *map(str, transcript.warnings)]
    return "".join(f"{one_line(line)}\n" for line in lines)


def not_written(path: Path, error: BaseException) -> OutputError:
    """The error for a file that cannot be written."""
    return OutputError(
        got=f"{path}, which cannot be written: {getattr(error, 'strerror', None) or error}",
        expected="a folder with free space that may be written to",
        remedy="Free space, change its permissions, or choose another folder",
    )
