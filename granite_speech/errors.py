"""Every error this package raises on purpose: one small tree, one message shape.

A message always has three parts: what came, what was expected, and what to do about it. The constructor asks for the
three by name, so no error can be raised without them.

    GraniteSpeechError
    ├── ConfigError               a configuration value that no model can be built from
    ├── CheckpointError           a folder or file that is not the checkpoint it claims to be
    │   └── CheckpointNotFoundError   nothing at that path or under that hub id
    ├── InputError                a tensor, text or option given to a call
    │   └── AudioError            sound that cannot be used
    ├── KernelError               a call that a kernel cannot serve, or a backend that cannot run here (granite_kernels raises it)
    ├── UnsupportedError          valid elsewhere, and deliberately not done here
    └── MissingDependencyError    a package that this one call needs is not installed

Each class is also the built-in exception that a caller would have caught before (ValueError, FileNotFoundError, …).
"""

from granite_kernels.errors import GraniteSpeechError, KernelError

__all__ = [
    "AudioError",
    "CheckpointError",
    "CheckpointNotFoundError",
    "ConfigError",
    "GraniteSpeechError",
    "InputError",
    "KernelError",
    "MissingDependencyError",
    "UnsupportedError",
]


class ConfigError(GraniteSpeechError, ValueError):
    """A configuration value that no model can be built from."""


class CheckpointError(GraniteSpeechError, ValueError):
    """A folder or file that is not the checkpoint it claims to be."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """Nothing at that path, or nothing reachable under that hub id."""


class InputError(GraniteSpeechError, ValueError):
    """A tensor, text or option given to a call."""


class AudioError(InputError):
    """Sound that cannot be used: empty, not finite, of the wrong rank or type, or in a file that does not decode."""


class UnsupportedError(GraniteSpeechError, NotImplementedError):
    """Something that is valid elsewhere and deliberately not done here."""


class MissingDependencyError(GraniteSpeechError, ImportError):
    """A package that this one call needs is not installed."""
