"""Manifests: JSON lines, each an utterance or a text.

    {"audio": "clips/0001.flac", "text": "seven left"}
    {"audio": "clips/0002.flac", "text": "sieben links", "prompt": "translate the speech to German.", "voice": "anna"}

- `audio`: path of the sound file, relative to the manifest's folder. Also understood: `audio_filepath`, `audio_path`, `path`, `file`,
  `file_name`, and the audio column of the package datasets, `{"path": …}`
- `text`: the answer to train on. Also understood: `sentence`, `transcription`, `transcript`
- `prompt` (optional): the request, without the audio placeholder
- `voice` (optional): the speaker, used to group word error rates

A manifest of texts has only `prompt` and `text`. `duration` may be given; recordings are measured all the same. Other keys are
ignored with one warning for each manifest. A key that looks like a misspelling of one that the line does not have is refused, because
it would silently change the training. Null is the same as no key. Empty lines are skipped.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from warnings import warn

from granite_speech.config_values import shown
from granite_speech.errors import GraniteSpeechError, InputError
from granite_speech.inputs.audio import load_audio, measure_seconds
from granite_speech.training.manifest_keys import known_values

if TYPE_CHECKING:
    import torch

__all__ = ["Utterance", "read_manifest"]


@dataclass(frozen=True)
class Utterance:
    """One line of a manifest.

    Attributes:
        text: the answer, without surrounding whitespace.
        prompt: the request; None for the checkpoint's own transcription request.
        audio: the sound file; None in a manifest of texts.
        manifest, line: the line's file and number, counted from 1.
        voice: the speaker, used to group word error rates; None if the line has none.
    """

    text: str
    prompt: str | None
    audio: Path | None
    manifest: Path
    line: int
    voice: str | None = None

    @property
    def where(self) -> str:
        return f"{self.manifest}, line {self.line}"

    @contextmanager
    def named(self) -> Iterator[None]:
        """Add the manifest and line to any error of this package raised in the block."""
        try:
            yield
        except GraniteSpeechError as error:
            raise type(error)(got=f"{self.where}: {error.got}", expected=error.expected, remedy=error.remedy) from error

    def waveform(self, sampling_rate: int) -> "torch.Tensor":
        """Read `(samples,)` float32, resampled to this rate in Hz.

        Raises:
            AudioError: a file that cannot be used; names the line.
        """
        with self.named():
            return load_audio(self.audio, sampling_rate)

    def count_samples(self, sampling_rate: int) -> int:
        """Length in samples at this rate in Hz.

        Raises:
            AudioError: a file that cannot be used; names the line.
        """
        with self.named():
            # Rounded first: whole numbers of samples come out of the division with an error of 1e-7 at most.
            return math.ceil(round(measure_seconds(self.audio) * sampling_rate, 6))


def read_manifest(path: str | Path, *, audio: bool = True) -> list[Utterance]:
    """Read and check every line.

    Args:
        path: the manifest, in UTF-8.
        audio: True for utterances, False for texts, which have `prompt` and no `audio`.

    Raises:
        InputError: no manifest, an empty one, or an invalid line; names the file and line. Sound files must exist, but are not decoded.

    Warns of keys that are not used, once for the manifest.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise InputError(
            got=f"the manifest {str(path)!r}, which cannot be read ({error.strerror or error})",
            expected="a file with one JSON object per line",
            remedy="Check the path",
        ) from error
    ignored: set[str] = set()
    found = [_utterance(path, number, line, audio, ignored) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise InputError(
            got=f"the manifest {str(path)!r}, which has no lines",
            expected="one JSON object per line",
            remedy='Write {"audio": …, "text": …}',
        )
    if ignored:
        used = "audio, text, prompt and voice" if audio else "prompt and text"
        warn(f"{path}: the keys {', '.join(sorted(ignored))} are ignored; used are {used}.", stacklevel=2)
    return found


def _utterance(manifest: Path, number: int, line: bytes, audio: bool, ignored: set[str]) -> Utterance:
    """The utterance of a line. Adds the keys that it does not use to `ignored`."""

    def refuse(got: str, expected: str, remedy: str, cause: Exception | None = None) -> InputError:
        error = InputError(got=f"{manifest}, line {number}: {got}", expected=expected, remedy=remedy)
        error.__cause__ = cause
        return error

    example = '{"audio": "clip.flac", "text": "…"}' if audio else '{"prompt": "…", "text": "…"}'
    try:
        value = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        text = line.decode("utf-8", "replace")
        raise refuse(f"{text!r:.100}, which does not parse ({error})", f"a JSON object such as {example}", "Correct it", error) from error
    if not isinstance(value, dict):
        raise refuse(f"a {type(value).__name__}", f"a JSON object such as {example}", "Correct it")
    try:
        value, extra = known_values(value, audio=audio)
    except InputError as error:
        raise refuse(error.got, error.expected, error.remedy) from error
    ignored |= extra
    for name, one in value.items():
        if (problem := _not_text(one)) is not None:
            raise refuse(f"{name} = {shown(one)}{problem}", "non-empty text", f"Correct {name}, or remove the line")
    file = manifest.parent / value["audio"] if audio else None
    if file is not None and not file.is_file():
        kind = "is a folder" if file.is_dir() else "does not exist"
        raise refuse(f"audio {str(file)!r}, which {kind}", f"a sound file's path, relative to {str(manifest.parent)!r}", "Correct the path")
    return Utterance(value["text"].strip(), value.get("prompt"), file, manifest, number, value.get("voice"))


def _not_text(value: Any) -> str | None:
    """Why a value is not usable text, as the end of a message; None if it is."""
    if not isinstance(value, str) or not value.strip():
        return ""
    try:
        value.encode()
    except UnicodeError:  # JSON can escape one surrogate of a pair
        return ", which contains an unpaired surrogate"
    return ", which contains a NUL character" if "\0" in value else None
