"""Every error that this package raises on purpose.

A message always has three parts: what was given, what was expected, and what to do about it. The constructor requires all
three by name.

    GraniteSpeechError
    ├── ConfigError               a configuration value that no model can be built from
    ├── CheckpointError           a folder or file that is not the checkpoint it claims to be
    │   └── CheckpointNotFoundError   nothing at that path or under that hub id
    ├── InputError                a tensor, text or option given to a call
    │   └── AudioError            audio that cannot be used
    ├── KernelError               a call that a kernel cannot serve, or a backend that cannot run here (from granite_kernels)
    ├── UnsupportedError          valid elsewhere, deliberately not supported here
    ├── EngineError               an engine that takes no more requests
    ├── OutputError               a file with results that cannot be written
    └── MissingDependencyError    a package that this call needs is not installed

Each class is also a built-in exception that callers may already catch (ValueError, FileNotFoundError, …).
"""

from granite_kernels.errors import GraniteSpeechError, KernelError

__all__ = [
    "AudioError",
    "CheckpointError",
    "CheckpointNotFoundError",
    "ConfigError",
    "EngineError",
    "GraniteSpeechError",
    "InputError",
    "KernelError",
    "MissingDependencyError",
    "OutputError",
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
    """Audio that cannot be used: empty, not finite, of the wrong rank or type, or in a file that cannot be decoded."""


class UnsupportedError(GraniteSpeechError, NotImplementedError):
    """Something that is valid elsewhere and deliberately not supported here."""


class EngineError(GraniteSpeechError, RuntimeError):
    """An engine that gave no answer, or takes no more requests: it is closed, its worker has failed, or it belongs to another process."""


class OutputError(GraniteSpeechError, OSError):
    """A file with results that cannot be written."""


class MissingDependencyError(GraniteSpeechError, ImportError):
    """A package that this call needs is not installed."""
