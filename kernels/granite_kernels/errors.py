"""The base of every error that this project raises on purpose, and the kernels' own."""

__all__ = ["GraniteSpeechError", "KernelError"]


class GraniteSpeechError(Exception):
    """Base of all errors of this project.

    Args:
        got: what was given, with its value, shape or path. A sentence without its full stop.
        expected: what would have been right, read after the word "expected".
        remedy: what the reader can do now. A sentence without its full stop.
    """

    def __init__(self, *, got: str, expected: str, remedy: str):
        super().__init__(f"{got}; expected {expected}. {remedy}.")
        self.got, self.expected, self.remedy = got, expected, remedy

    def __reduce__(self):
        # Keyword-only arguments are not in Exception.args: without this the error could not leave a worker process.
        return _rebuild, (type(self), self.got, self.expected, self.remedy)


def _rebuild(cls: type[GraniteSpeechError], got: str, expected: str, remedy: str) -> GraniteSpeechError:
    return cls(got=got, expected=expected, remedy=remedy)


class KernelError(GraniteSpeechError, ValueError):
    """A call that an operation cannot serve."""
