"""What became of a recording: its text, the segments it consists of, and what went wrong."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Self

from granite_speech.errors import GraniteSpeechError

__all__ = ["Segment", "Transcript", "TranscriptNote"]


class _Named:
    """Can be read like the dictionary that `to_dict` makes, because the segments of whisper and of IBM's package are dictionaries."""

    def __getitem__(self, name: Any) -> Any:
        if name in self.__dataclass_fields__:
            return getattr(self, name)
        raise KeyError(name)

    def __contains__(self, name: Any) -> bool:
        return name in self.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def keys(self) -> tuple[str, ...]:
        """Those of `to_dict`: an error has a key only if there is one."""
        return tuple(self.to_dict())

    def get(self, name: Any, default: Any = None) -> Any:
        """An attribute, or `default` if there is none of that name."""
        return getattr(self, name) if name in self else default


@dataclass(frozen=True)
class Segment(_Named):
    """What was said in one window of a recording. `segment["text"]` is `segment.text`.

    Attributes:
        id: its place in the recording, from 0.
        start, end: of the window, in seconds from the recording's beginning.
        text: what was said; empty if the window failed.
        temperature: 0 for greedy decoding.
        error: why there is no text; None: nothing failed.
    """

    id: int
    start: float
    end: float
    text: str
    temperature: float = 0.0
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Values for JSON, with the keys of IBM's package: `error` only if there is one."""
        return {name: value for name, value in asdict(self).items() if name != "error" or value is not None}


@dataclass(frozen=True)
class TranscriptNote(_Named):
    """Something to know about a transcript.

    Attributes:
        type: "window_error": a window has no text. "truncated": an answer reached a limit before its end. "repetition": a text repeats
            itself, and still did in smaller windows. "audio": something is wrong with the sound file. "chunk_clamp": windows are shorter
            than the call said.
        message: in a sentence.
        start, end: of the window, in seconds; None: of the whole recording.
    """

    type: str
    message: str
    start: float | None = None
    end: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Values for JSON; `start` and `end` only if they are known."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def __str__(self) -> str:
        return self.message if self.start is None else f"{self.start:.2f} to {self.end:.2f} s: {self.message}"


class Transcript(str):
    """The text of a recording, a `str`, with what else is known about it. `transcript["segments"]` is `transcript.segments`.

    Attributes:
        text: the same as a plain `str`.
        segments: a tuple of `Segment`, in order; their texts, joined by spaces, are the text.
        warnings: a tuple of `TranscriptNote`: what was cut off, failed, or is doubtful.
        language: of the speech, as the call said; None: it did not.
        target_language: of the text, if it is a translation.
        duration: of the recording, in seconds, as far as it was read.
        error: why the recording could not be read to its end; None: nothing failed. There may be text from before the fault.
    """

    segments: tuple[Segment, ...]
    warnings: tuple[TranscriptNote, ...]
    language: str | None
    target_language: str | None
    duration: float
    error: GraniteSpeechError | None

    def __new__(
        cls,
        text: str = "",
        *,
        segments: Iterable[Segment] = (),
        warnings: Iterable[TranscriptNote] = (),
        language: str | None = None,
        target_language: str | None = None,
        duration: float = 0.0,
        error: GraniteSpeechError | None = None,
    ) -> Self:
        self = super().__new__(cls, text)
        self.segments, self.warnings = tuple(segments), tuple(warnings)
        self.language, self.target_language, self.duration, self.error = language, target_language, duration, error
        return self

    def __getnewargs_ex__(self) -> tuple[tuple[str], dict[str, Any]]:
        return (str(self),), dict(self.__dict__)

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, str):
            return super().__getitem__(key)
        if key in self.keys():
            return getattr(self, key)
        raise KeyError(key)

    def keys(self) -> tuple[str, ...]:
        """The names of the attributes. `in` and iteration are those of the text."""
        return "text", *Transcript.__annotations__

    def get(self, name: Any, default: Any = None) -> Any:
        """An attribute, or `default` if there is none of that name."""
        return self[name] if name in self.keys() else default

    @property
    def text(self) -> str:
        """The text as a plain `str`."""
        return str(self)

    @property
    def truncated(self) -> str | None:
        """Why the text is incomplete where an answer reached a limit, in the words of `TruncatedAnswerWarning`; None: it did not."""
        return self._first("truncated")

    @property
    def audio_warning(self) -> str | None:
        """What is wrong with the sound file, although it was read, in the words of `AudioWarning`; None: nothing."""
        return self._first("audio")

    def _first(self, kind: str) -> str | None:
        return next((one.message for one in self.warnings if one.type == kind), None)

    @property
    def is_complete(self) -> bool:
        """Whether nothing failed and nothing was cut off."""
        return self.error is None and not any(one.type in ("window_error", "truncated") for one in self.warnings)

    def to_dict(self) -> dict[str, Any]:
        """Values for JSON, with the keys of IBM's package, "duration", and "error" if there is one."""
        values = {
            "text": self.text,
            "segments": [one.to_dict() for one in self.segments],
            "language": self.language,
            "target_language": self.target_language,
            "duration": round(self.duration, 3),
            "warnings": [one.to_dict() for one in self.warnings],
        }
        return values if self.error is None else values | {"error": str(self.error)}
