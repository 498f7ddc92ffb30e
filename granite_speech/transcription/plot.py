"""A recording as an image: its spectrogram, its words at their times, and how sure the model is of each."""

import math
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from errno import EISDIR
from pathlib import Path
from typing import TYPE_CHECKING, Any

from granite_speech.errors import InputError, MissingDependencyError
from granite_speech.transcription.output_files import not_written
from granite_speech.transcription.output_names import partial_name
from granite_speech.transcription.subtitles import one_line
from granite_speech.transcription.transcript import Transcript, Word

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["PAGE_SECONDS", "check_plot_file", "plot_words"]

PAGE_SECONDS = 60

# Suffixes of what matplotlib writes without LaTeX.
_TYPES = ("png", "svg", "pdf", "jpg", "jpeg", "webp", "tif", "tiff", "gif", "svgz", "eps", "ps")


def plot_words(
    transcript: Transcript | Mapping[str, Any], audio: Any, file: str | os.PathLike[str], *, sampling_rate: int | None = None
) -> list[Path]:
    """Draw the log-mel spectrogram of a recording, its words from start to end, and their confidences from 0 to 1.

    A row has ten seconds and a page has six rows. A PDF has all pages. Of another type, the first page is `file`, "speech.png", and the
    others are "speech.page2.png" and so on. Characters that no installed font has are shown as boxes.

    Args:
        transcript: made with `word_timestamps=True`; or what `load_model(…).transcribe` returned, or the content of a json file.
        audio: the recording that was transcribed: whatever `Transcriber.transcribe` takes for one.
        file: the image to write. Its suffix says the type: .png, .svg, .pdf, or another that matplotlib has. Its folder is created.
        sampling_rate: of an array that does not say its own, in Hz; 16,000 if omitted.

    Returns:
        The files that were written.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        InputError: a transcript without words or of another recording, an unknown type of file, or no recording.
        AudioError: a recording that cannot be used.
        OutputError: the file cannot be written.
    """
    path = check_plot_file(file)
    words = _checked_words(transcript)
    title = one_line(os.path.basename(audio)) if isinstance(audio, (str, os.PathLike)) and os.path.isfile(audio) else ""
    mel, seconds = _log_mel(audio, sampling_rate)
    if any(one.start > seconds for one in words):
        raise InputError(
            got=f"a word at {max(one.start for one in words):.2f} s, and a recording of {seconds:.2f} s",
            expected="the recording that was transcribed",
            remedy="Pass this one; if it is an array, with its sampling_rate",
        )
    import matplotlib.style

    from granite_speech.transcription.plot_pages import pages

    # The user's settings could make an image that cannot be read. A missing glyph is a box, which needs no warning as well.
    with matplotlib.style.context("default"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)
        matplotlib.rcParams["font.family"] = _families("".join([title, *(one.word for one in words)]))
        drawn = pages(words, mel, seconds, title)
        return _write_document(path, drawn) if path.suffix.lower() == ".pdf" else _write_pages(path, drawn)


def check_plot_file(file: str | os.PathLike[str]) -> Path:
    """The path of an image, if it can be written. Its folder is created.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        InputError: its suffix is of no type of image.
        OutputError: it cannot be written.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            got="no matplotlib", expected="it, to plot words", remedy='pip install "granite-speech-triton[plot]"'
        ) from error
    path = Path(file)
    if path.suffix[1:].lower() not in _TYPES:
        raise InputError(
            got=f"{str(file)!r} for an image", expected=f"a name that ends with one of .{', .'.join(_TYPES)}", remedy="Name it words.png"
        )
    try:
        with _replacing(path) as partial:
            if path.is_dir():
                raise IsADirectoryError(EISDIR, os.strerror(EISDIR))
            partial.touch()
            partial.unlink()
    except ValueError as error:  # characters that no file name can have
        raise not_written(path, error) from error
    return path


def _checked_words(transcript: Transcript | Mapping[str, Any]) -> list[Word]:
    if not isinstance(transcript, Transcript | Mapping):
        raise InputError(got=f"a {type(transcript).__name__}", expected="a transcript", remedy="Pass what transcribe returned")
    words = transcript.get("words")
    if words is None and (isinstance(transcript, Mapping) or transcript):
        raise InputError(
            got="a transcript without words", expected="one whose words have times", remedy="Transcribe with word_timestamps=True"
        )
    if isinstance(transcript, Mapping):
        try:
            words = [Word(**one) for one in words]
        except TypeError as error:
            raise InputError(
                got=f"words that cannot be read ({error})", expected="those of a transcript", remedy="Pass what transcribe returned"
            ) from error
    for one in words or ():
        if not (math.isfinite(one.start) and math.isfinite(one.end)):
            raise InputError(
                got=f"a word from {one.start} to {one.end} seconds", expected="finite times", remedy="Give each word its times"
            )
    return list(words or ())


def _log_mel(audio: Any, sampling_rate: int | None) -> tuple[Any, float]:
    """The spectrogram that the encoder sees, `(frames, 80)` float16 at 100 frames a second, and the recording's length in seconds."""
    import numpy as np
    import torch

    from granite_speech.inputs.features import GraniteSpeechFeatureExtractor
    from granite_speech.inputs.recordings import recording_blocks

    extractor = GraniteSpeechFeatureExtractor()
    rate, bands = extractor.sampling_rate, extractor.melspec_kwargs["n_mels"]

    def spectrogram(samples: torch.Tensor) -> np.ndarray:
        return extractor([samples])["input_features"].view(-1, bands).half().numpy()

    # The transcript says what is wrong with the file.
    blocks, _ = recording_blocks(audio, rate, sampling_rate, errors="warn")
    # A minute at a time, because an hour at once would take a gigabyte. `pages` shows less than each minute's own range of loudness.
    mel, waiting, count = [], torch.zeros(0), 0
    for block in blocks:
        count += len(block)
        waiting = torch.cat([waiting, block])
        while len(waiting) > 2 * PAGE_SECONDS * rate:  # the last part is never too short
            mel.append(spectrogram(waiting[: PAGE_SECONDS * rate]))
            waiting = waiting[PAGE_SECONDS * rate :]
    return np.concatenate([*mel, spectrogram(waiting)]), count / rate


def _families(text: str) -> list[str]:
    """matplotlib's own font, and as many of those installed as are needed for the characters that it lacks."""
    import matplotlib
    from matplotlib.font_manager import fontManager, get_font

    chosen = ["DejaVu Sans"]
    missing = {ord(one) for one in one_line(text)} - get_font(fontManager.findfont(chosen[0])).get_charmap().keys()
    own = matplotlib.get_data_path()  # other fonts in it are for mathematics
    for entry in sorted(fontManager.ttflist, key=lambda one: (one.style != "normal", str(one.weight) not in ("400", "normal"), one.name)):
        if not missing:
            break
        if entry.name in chosen or str(entry.fname).startswith(own):
            continue
        with suppress(RuntimeError, OSError):  # of a damaged font
            font = get_font(entry.fname)
            found = missing & font.get_charmap().keys() if font.scalable else set()  # others, as of emoji, cannot be drawn
            if found:
                chosen.append(entry.name)
                missing -= found
    return chosen


def _write_pages(path: Path, drawn: Iterator["Figure"]) -> list[Path]:
    written = []
    for number, figure in enumerate(drawn, 1):
        one = path if number == 1 else path.with_suffix(f".page{number}{path.suffix}")
        with _replacing(one) as partial:
            figure.savefig(partial, format=path.suffix[1:].lower())
        written.append(one)
    return written


def _write_document(path: Path, drawn: Iterator["Figure"]) -> list[Path]:
    from matplotlib.backends.backend_pdf import PdfPages

    with _replacing(path) as partial, PdfPages(partial) as document:
        for figure in drawn:
            document.savefig(figure)
    return [path]


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A file that replaces `path` at the end of the block, if it was written. Nothing of it remains if the block fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(partial_name(path.name))
        try:
            yield partial
            if partial.exists():
                os.replace(partial, path)
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
    except OSError as error:
        raise not_written(path, error) from error
