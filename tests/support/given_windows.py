"""Windows that a test chooses, in place of those that are found in the recording."""

from granite_speech.transcription import job
from granite_speech.transcription.windows import Window

__all__ = ["given"]


def given(monkeypatch, *windows: Window) -> None:
    """Every recording is cut into these windows."""

    class Given:
        duration = windows[-1].end

        def __init__(self, blocks, **options):
            self._windows = iter(windows)

        def __next__(self) -> Window:
            return next(self._windows)

    monkeypatch.setattr(job, "Windows", Given)
