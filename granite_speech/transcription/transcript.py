"""What became of a recording: its text, its segments and words, and what went wrong."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Self

from granite_speech.errors import GraniteSpeechError
from granite_speech.transcription.repetition import compression_ratio

__all__ = ["Segment", "Transcript", "TranscriptNote", "Word"]


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
        try:
            return self[name]
        except KeyError:
            return default


@dataclass(frozen=True)
class Word(_Named):
    """A word, when it was said, and how sure the model is of it. `word["start"]` is `word.start`.

    Attributes:
        word: as in the text, with its punctuation and without spaces. In scripts without spaces it is a character or a few.
        start, end: in seconds from the recording's beginning.
        confidence: from 0 to 1: the geometric mean of those of the two that are known.
        ctc_confidence: how well the encoder's CTC head hears the word's letters where the word is: the geometric mean of their
            probabilities. None: the head's alphabet cannot spell the word.
        lm_confidence: the language model's probability of the word after those before it: the product of its tokens' probabilities.
            None: not known. whisper calls it `probability`.
        speaker: who says it, with prompt_mode="speaker_attributed": "Speaker 1".
        bridged: whether the times are not from the CTC head, because its alphabet cannot spell the word: they fill the room between the
            words beside it.
    """

    word: str
    start: float
    end: float
    confidence: float
    ctc_confidence: float | None = None
    lm_confidence: float | None = None
    speaker: str | None = None
    bridged: bool = False

    def __getitem__(self, name: Any) -> Any:
        return super().__getitem__("lm_confidence" if name == "probability" else name)

    def to_dict(self) -> dict[str, Any]:
        """Values for JSON, with the keys of IBM's package; `speaker` and `bridged` only if they apply."""
        values = asdict(self)
        return {name: value for name, value in values.items() if name not in ("speaker", "bridged") or value}


@dataclass(frozen=True)
class Segment(_Named):
    """What was said in one window of a recording. `segment["text"]` is `segment.text`.

    Attributes:
        id: its place in the recording, from 0.
        start, end: of the window, in seconds from the recording's beginning; with words, of the first and of the last one.
        text: what was said; empty if the window failed.
        temperature: 0 for greedy decoding.
        error: why there is no text; None: nothing failed.
        words: those of the text, in order, if the call asked for word_timestamps; none if the window failed. None: it did not ask.
        confidence: from 0 to 1: the geometric mean of the probabilities of the answer's tokens; None: there is no answer.
        speakers: with prompt_mode="speaker_attributed": the turns, each {"speaker": "Speaker 1", "text": …}; None otherwise.
        raw_text: the answer with its tags, with a prompt_mode whose answers have some; None otherwise.
    """

    id: int
    start: float
    end: float
    text: str
    temperature: float = 0.0
    error: str | None = None
    words: tuple[Word, ...] | None = None
    confidence: float | None = None
    speakers: tuple[dict[str, str], ...] | None = None
    raw_text: str | None = None

    @property
    def compression_ratio(self) -> float:
        """How many times smaller zlib makes the text: above 2.4, it repeats itself. 0 without text."""
        return round(compression_ratio(self.text), 4)

    def __getitem__(self, name: Any) -> Any:
        return self.compression_ratio if name == "compression_ratio" else super().__getitem__(name)

    def to_dict(self) -> dict[str, Any]:
        """Values for JSON, with the keys of IBM's package and `compression_ratio`; those that may be None only if they are not."""
        names = ("id", "start", "end", "text", "temperature", "error", "raw_text", "confidence", "compression_ratio")
        values = {name: self[name] for name in names} | {
            "words": None if self.words is None else [one.to_dict() for one in self.words],
            "speakers": None if self.speakers is None else [dict(one) for one in self.speakers],
        }
        return {name: value for name, value in values.items() if value is not None}


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
        words: a tuple of `Word`, those of all segments, if the call asked for word_timestamps; None: it did not.
        confidence: from 0 to 1: the geometric mean of the probabilities of all answers' tokens; None: there is no answer.
        language: of the speech, as the call said; None: it did not.
        target_language: of the text, if it is a translation.
        duration: of the recording, in seconds, as far as it was read.
        error: why the recording could not be read to its end; None: nothing failed. There may be text from before the fault.
    """

    segments: tuple[Segment, ...]
    warnings: tuple[TranscriptNote, ...]
    words: tuple[Word, ...] | None
    confidence: float | None
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
        words: Iterable[Word] | None = None,
        confidence: float | None = None,
        language: str | None = None,
        target_language: str | None = None,
        duration: float = 0.0,
        error: GraniteSpeechError | None = None,
    ) -> Self:
        self = super().__new__(cls, text)
        self.segments, self.warnings, self.words = tuple(segments), tuple(warnings), None if words is None else tuple(words)
        self.confidence = confidence
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
        return "text", *Transcript.__annotations__, "compression_ratio", "speakers"

    def get(self, name: Any, default: Any = None) -> Any:
        """An attribute, or `default` if there is none of that name."""
        return self[name] if name in self.keys() else default

    @property
    def text(self) -> str:
        """The text as a plain `str`."""
        return str(self)

    @property
    def compression_ratio(self) -> float:
        """How many times smaller zlib makes the text. 0 without text."""
        return round(compression_ratio(self), 4)

    @property
    def speakers(self) -> tuple[dict[str, str], ...] | None:
        """The turns of the speakers in all segments, each {"speaker": …, "text": …}; None without prompt_mode="speaker_attributed"."""
        turns = [one.speakers for one in self.segments if one.speakers is not None]
        return tuple(turn for several in turns for turn in several) if turns else None

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
        """Values for JSON, with the keys of IBM's package, and "confidence", "compression_ratio" and "duration".

        "words", "speakers" and "error" are there only if there are some.
        """
        values = {
            "text": self.text,
            "segments": [one.to_dict() for one in self.segments],
            "language": self.language,
            "target_language": self.target_language,
            "duration": round(self.duration, 3),
            "confidence": self.confidence,
            "compression_ratio": self.compression_ratio,
            "warnings": [one.to_dict() for one in self.warnings],
        }
        if self.words is not None:
            values["words"] = [one.to_dict() for one in self.words]
        if self.speakers is not None:
            values["speakers"] = [dict(one) for one in self.speakers]
        return values if self.error is None else values | {"error": str(self.error)}
