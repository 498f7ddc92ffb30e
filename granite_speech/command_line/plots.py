"""The images that `--plot` asks for: each recording is read again when its words are known."""

import math
import os
from collections.abc import Sequence
from pathlib import Path

from granite_speech.command_line.output import message
from granite_speech.errors import GraniteSpeechError, InputError
from granite_speech.transcription.output_names import output_names
from granite_speech.transcription.plot import PAGE_SECONDS, check_plot_file, plot_words
from granite_speech.transcription.transcript import Transcript

__all__ = ["Plots"]

_MANY_PAGES = 10


class Plots:
    """Where the plots of some recordings are written.

    Args:
        recordings: their paths.
        target: an image, for one recording; or a folder, which exists or ends with a slash: "DIR/speech.png" for "speech.wav".
        quiet: print no line for a plot that is written.

    Attributes:
        failed: whether a plot is missing.

    Raises:
        GraniteSpeechError: a plot cannot be written, or a recording cannot be read again.
    """

    def __init__(self, recordings: Sequence[str], target: str, quiet: bool):
        self._quiet, self.failed = quiet, False
        recordings = list(dict.fromkeys(recordings))
        for one in recordings:
            if os.path.exists(one) and not os.path.isfile(one) and not os.path.isdir(one):  # a folder is no recording anyway
                raise InputError(
                    got=f"--plot with {one}", expected="a file, which can be read again", remedy="Save the recording to a file"
                )
        paths = [Path(target)]
        if target.endswith(("/", os.sep)) or os.path.isdir(target):
            names = output_names(recordings, target, [".png", ".page999.png"])
            paths = [Path(target, f"{name}.png") for name in names]
        elif len(recordings) > 1:
            got = f"--plot {target} with {len(recordings)} recordings"
            raise InputError(got=got, expected="a folder for their plots", remedy="Pass for example --plot plots/")
        elif os.path.realpath(target) == os.path.realpath(recordings[0]):
            raise InputError(got=f"--plot {target}, which is the recording", expected="another file", remedy="Name it words.png")
        self._paths = dict(zip(recordings, map(check_plot_file, paths), strict=True))

    def take(self, name: str, transcript: Transcript) -> None:
        """Plot a recording that is done; once, if it was given twice."""
        path = self._paths.pop(name, None)
        if path is None:
            return
        if transcript.error is not None:
            message(f"{name}: not plotted")  # why has been printed
            self.failed = True
            return
        pages = math.ceil(transcript.duration / PAGE_SECONDS)
        if pages > _MANY_PAGES and not self._quiet:
            message(f"{name}: drawing {pages} pages, a second or two for each")
        try:
            first, *others = plot_words(transcript, name, path)
        except Exception as error:  # whatever a plot fails with, as a lack of memory, the other recordings have their texts
            reason = error if isinstance(error, GraniteSpeechError) else f"not plotted ({type(error).__name__}: {error})"
            message(f"{name}: {reason}")
            self.failed = True
            return
        if not self._quiet:
            message(f"{name}: plotted to {first}" + (f" and {len(others)} more pages" if others else ""))
