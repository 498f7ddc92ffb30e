"""The keys of a manifest's lines: their names in common data sets, keys that are ignored, and misspelled ones."""

from typing import Any

from granite_speech.config_values import shown
from granite_speech.errors import InputError

__all__ = ["known_values"]

# Each key, and the names that common data sets give it: NeMo's manifests, Common Voice, and the folders and audio columns of the
# package datasets.
_NAMES = {
    "audio": ("audio", "audio_filepath", "audio_path", "path", "file", "file_name"),
    "text": ("text", "sentence", "transcription", "transcript"),
    "prompt": ("prompt",),
    "voice": ("voice",),
}
_DURATION = "duration"  # of the recording in seconds, as NeMo writes it; the recording itself is measured
_OFFSET = "offset"  # where an utterance starts in a longer recording, in seconds


def known_values(line: dict[str, Any], *, audio: bool) -> tuple[dict[str, Any], set[str]]:
    """The values of a line by the names used here, and the keys that are ignored.

    Args:
        line: the JSON object.
        audio: True for utterances, False for texts, which have a prompt and no audio.

    Raises:
        InputError: a missing key; two keys for the same thing with different values; a key that looks like a misspelling of one that
            the line does not have; an utterance that is a part of its recording.
    """
    wanted = ("audio", "text", "prompt", "voice") if audio else ("prompt", "text")
    values = {name: _value(line, name) for name in wanted if any(_is_given(line, other) for other in _NAMES[name])}
    extra = [key for key in line if not any(key in _NAMES[name] for name in wanted) and key != _DURATION]
    for key in extra:
        _refuse_misspelled(key, [name for name in wanted if name not in values])
    if not audio and (given := [key for key in extra if key in (*_NAMES["audio"], *_NAMES["voice"])]):
        raise InputError(
            got=f"the key {shown(given[0])} in a manifest of texts", expected="only prompt and text", remedy="Remove it, or use it as audio"
        )
    needed = ("audio", "text") if audio else ("prompt", "text")
    if missing := [name for name in needed if name not in values]:
        also = f"; also understood are {', '.join(_NAMES[missing[0]][1:])}" if len(_NAMES[missing[0]]) > 1 else ""
        raise InputError(
            got=f"no {' and no '.join(missing)}", expected=f"{_example(audio)}{also}", remedy="Add the missing keys, or rename them"
        )
    if audio and line.get(_OFFSET) not in (None, 0):
        raise InputError(
            got=f"{_OFFSET} = {shown(line[_OFFSET])}, so the utterance is a part of its recording",
            expected="a sound file for each utterance",
            remedy="Cut the recording into files, one for each line",
        )
    return values, {key for key in extra if key != _OFFSET}


def _example(audio: bool) -> str:
    return 'a JSON object such as {"audio": "clip.flac", "text": "…"}' if audio else 'a JSON object such as {"prompt": "…", "text": "…"}'


def _is_given(line: dict[str, Any], key: str) -> bool:
    """Whether a line has a value. Data sets write null for a column that an utterance does not have."""
    return line.get(key) is not None


def _value(line: dict[str, Any], name: str) -> Any:
    found = {key: _path(line[key]) if name == "audio" else line[key] for key in _NAMES[name] if _is_given(line, key)}
    first, *others = found
    for other in others:
        if found[other] != found[first]:
            raise InputError(
                got=f"{first} = {shown(found[first])} and {other} = {shown(found[other])}",
                expected=f"one {name}, or the same under both names",
                remedy=f"Remove one of the two, and keep {name!r}",
            )
    return found[first]


def _path(value: Any) -> Any:
    """The path in an audio column of the package datasets, {"path": …, "array": …}; other values unchanged."""
    return value["path"] if isinstance(value, dict) and isinstance(value.get("path"), str) else value


def _refuse_misspelled(key: str, absent: list[str]) -> None:
    for name in absent:
        for known in _NAMES[name]:
            if _distance(key.lower(), known) <= (1 if len(known) <= 5 else 2):
                raise InputError(
                    got=f"the key {shown(key)}, and no {known!r}",
                    expected=f"{known!r}, if that is what it means",
                    remedy=f"Rename it to {name!r}, or to something else if it is not",
                )


def _distance(one: str, other: str) -> int:
    """How many letters must be inserted, removed or replaced to make one word of the other."""
    if abs(len(one) - len(other)) > 2:
        return 3
    row = list(range(len(other) + 1))
    for i, left in enumerate(one, 1):
        before, row[0] = row[0], i
        for j, right in enumerate(other, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (left != right))
    return row[-1]
