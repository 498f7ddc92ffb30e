"""The base class of the project's errors, and the kernels' own error."""

__all__ = ["GraniteSpeechError", "KernelError"]


class GraniteSpeechError(Exception):
    """Base of all errors of this project.

    Args:
        got: what was given, with its value, shape or path. No full stop at the end.
        expected: what would have been right, to be read after the word "expected".
        remedy: what the reader can do now. No full stop at the end.
    """

    def __init__(self, *, got: str, expected: str, remedy: str):
        super().__init__(f"{got}; expected {expected}. {remedy}.")
        self.got, self.expected, self.remedy = got, expected, remedy

    def __reduce__(self):
        # Exception.args lacks keyword-only arguments; without this the error cannot be pickled out of a worker process.
        return _rebuild, (type(self), self.got, self.expected, self.remedy)


def _rebuild(cls: type[GraniteSpeechError], got: str, expected: str, remedy: str) -> GraniteSpeechError:
    return cls(got=got, expected=expected, remedy=remedy)


class KernelError(GraniteSpeechError, ValueError):
    """Arguments that an operation does not support."""
