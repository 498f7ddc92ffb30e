"""One recording, read window by window."""

from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from granite_speech.errors import GraniteSpeechError
from granite_speech.inputs.recordings import recording_blocks
from granite_speech.transcription.window_piece import CallSetup, WindowPiece
from granite_speech.transcription.windows import Windows

__all__ = ["Job"]


class Job:
    """One recording. A reader's thread calls `read`; another one takes `pieces`.

    Args:
        setup: of the call.
        recording: as `Transcriber.transcribe` takes one.

    Attributes:
        pieces: those that were read and whose answers nobody has taken yet.
        ended: whether there will be no more.
        duration: seconds that were read, once it has ended.
        audio_warning: what is wrong with the sound file, although it was read; None: nothing.
        error: why it could not be read to its end; None: it was.
    """

    def __init__(self, setup: CallSetup, recording: Any):
        self._setup, self._recording = setup, recording
        self.pieces: deque[WindowPiece] = deque()
        self.ended = False
        self.duration = 0.0
        self.audio_warning: str | None = None
        self.error: GraniteSpeechError | None = None

    @property
    def seconds(self) -> float:
        """Seconds of audio in `pieces`."""
        return sum(one.window.end - one.window.start for one in self.pieces)

    def read(self, add: Callable[[WindowPiece], bool]) -> None:
        """Read the recording, and add its windows.

        Args:
            add: takes a piece, and returns when another one may be read; False: nobody wants another one.
        """
        try:
            self._read(add)
        except GraniteSpeechError as error:
            self.error = error
        self._recording = None

    def _read(self, add: Callable[[WindowPiece], bool]) -> None:
        setup, options = self._setup, self._setup.options
        with setup.alone():
            blocks, warning = recording_blocks(self._recording, setup.rate, setup.sampling_rate, options.errors)
        windows = Windows(blocks, **setup.cuts, spans=options.clip_timestamps)
        count = 0
        try:
            while True:
                with setup.alone():
                    window = next(windows, None)
                    piece = None if window is None else setup.piece(window, is_first=not count)
                if piece is None:
                    break
                count += 1
                if not add(piece):
                    return
        finally:
            self.duration = windows.duration
        self.audio_warning = warning()
        if not count:
            # Silence has no text. What is too short for the model is an error even so.
            with setup.alone():
                setup.inputs(torch.zeros(min(round(windows.duration * setup.rate), setup.rate)))
