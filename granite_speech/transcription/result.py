"""The result of a call as a dictionary with the keys of IBM's package."""

from collections.abc import Mapping
from typing import Any, Self

from granite_speech.transcription.transcript import Transcript

__all__ = ["Item", "TranscriptionResult"]


class Item(dict):
    """A dictionary whose keys are attributes too, and so on for those in it: `item.words[0].start` is `item["words"][0]["start"]`."""

    def __init__(self, *values: Any, **names: Any):
        super().__init__()
        self.update(*values, **names)

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, _nested(value))

    def update(self, *values: Any, **names: Any) -> None:
        """As that of `dict`."""
        for name, value in dict(*values, **names).items():
            self[name] = value

    def __ior__(self, values: Any) -> Self:
        self.update(values)
        return self

    def __or__(self, values: Any) -> Self:
        return self.copy().__ior__(values)

    def setdefault(self, name: str, default: Any = None) -> Any:
        """As that of `dict`."""
        if name not in self:
            self[name] = default
        return self[name]

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no {name!r} here, only {', '.join(map(str, self))}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __delattr__(self, name: str) -> None:
        try:
            del self[name]
        except KeyError:
            raise AttributeError(f"no {name!r} here") from None

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self]

    def copy(self) -> Self:
        """The same keys and values in another one."""
        return type(self)(self)


def _nested(value: Any) -> Any:
    if isinstance(value, Mapping) and not isinstance(value, Item):
        return Item(value)
    return [_nested(one) for one in value] if isinstance(value, list | tuple) else value


class TranscriptionResult(Item):
    """What became of a recording, as a dictionary of values for JSON: `result["text"]`, which is also `result.text`.

        json.dumps(result)
        for segment in result.segments:
            print(segment.start, segment.end, segment.text)

    Attributes:
        text: of the whole recording.
        segments: a list, each with "id", "start" and "end" in seconds, "text", "temperature", "confidence" and "compression_ratio"; with
            "words" and "speakers" like those below; with "raw_text", the answer with its tags; with "error", if there is no text.
        language: as the call gave it.
        target_language: of a translation, as the call gave it, or "en"; None otherwise.
        warnings: a list, each with "type", "message" and mostly "start" and "end". A "window_error" has the keys of its segment too, and a
            "chunk_clamp" has "requested" and "applied" in seconds.
        duration: of the recording, in seconds.
        confidence: from 0 to 1, or None; `Transcript` says what it and those of words are.
        compression_ratio: how many times smaller zlib makes the text.
        words: with word_timestamps, or prompt_mode="word_timestamps": a list, each with "word", "start", "end", "confidence",
            "ctc_confidence" and "lm_confidence".
        speakers: with prompt_mode="speaker_attributed": a list of turns, each with "speaker" and "text".
    """

    text: str
    segments: list[Item]
    language: str | None
    target_language: str | None
    warnings: list[Item]
    duration: float
    confidence: float | None
    compression_ratio: float
    words: list[Item]
    speakers: list[Item]

    @classmethod
    def of(cls, transcript: Transcript, call: Mapping[str, Any], limit: float) -> Self:
        """From a transcript.

        Args:
            transcript: without an error.
            call: its task, language, target_language and chunk_length, as the caller gave them.
            limit: the longest window of the checkpoint, in seconds.
        """
        values = transcript.to_dict()
        values["language"] = call["language"]
        values["target_language"] = None
        if call["task"] == "translate":
            values["target_language"] = "en" if call["target_language"] is None else call["target_language"]
        failed = {(one["start"], one["end"]): one for one in values["segments"] if "error" in one}
        for note in values["warnings"]:
            if note["type"] == "window_error":
                note |= failed.get((note["start"], note["end"]), {})
            elif note["type"] == "chunk_clamp":
                note |= {"requested": call["chunk_length"], "applied": limit}
        return cls(values)
