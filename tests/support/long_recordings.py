"""Long recordings assembled from utterances, and what a transcript made of each utterance.

A recording is written piece by piece, so its length is not limited by memory.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from granite_speech.inputs.audio import resample

__all__ = ["Difference", "Passage", "Spoken", "assemble", "cut_out", "differences", "draw_pauses", "passages"]

RATE = 16_000
_PIECE_SECONDS = 10  # longest piece of a pause in memory


@dataclass(frozen=True)
class Spoken:
    """An utterance in a recording: its words, and where it starts and ends in seconds."""

    text: str
    start: float
    end: float


@dataclass(frozen=True)
class Passage:
    """Utterances and segments that overlap in time, and none that overlaps another passage's."""

    spoken: tuple[Spoken, ...]
    segments: tuple[Any, ...]

    @property
    def text(self) -> str:
        """What the segments say."""
        return " ".join(" ".join(one.text for one in self.segments).split())

    @property
    def expected(self) -> str:
        return " ".join(one.text for one in self.spoken)


@dataclass(frozen=True)
class Difference:
    """Words that differ between two texts.

    Attributes:
        kind: "lost", "changed", "doubled" (the same words stand next to them) or "added".
        expected, heard: the words in either text.
        at_edge: whether the first or last word of the expected text is among them.
    """

    kind: str
    expected: tuple[str, ...]
    heard: tuple[str, ...]
    at_edge: bool


def draw_pauses(rng: np.random.Generator, count: int, shortest: float, longest: float, *, total: float | None = None) -> tuple[float, ...]:
    """`count` pauses in seconds, uniform between two lengths.

    Args:
        total: what they add up to: what exceeds `shortest` is scaled, so `longest` may be exceeded.
    """
    pauses = rng.uniform(shortest, longest, count)
    if total is not None:
        spare = total - shortest * count
        assert spare >= 0, f"{count} pauses of {shortest} s are longer than {total:.1f} s"
        pauses = shortest + (pauses - shortest) * spare / (pauses - shortest).sum()
    return tuple(pauses.tolist())


def assemble(
    file: Path,
    utterances: Sequence[tuple[Any, str]],
    pauses: Sequence[float],
    *,
    rate: int = RATE,
    noise_db: float | None = None,
    gains_db: Sequence[float] = (),
    seed: int = 0,
) -> list[Spoken]:
    """Write a recording, and return where each utterance is in it.

    Args:
        file: its suffix says the format: 16-bit WAV or FLAC.
        utterances: samples `(samples,)` at 16 kHz, and the words.
        pauses: in seconds: before each utterance, and after the last one.
        rate: of the file, in Hz.
        noise_db: of white noise in the whole recording, relative to the level (RMS) of all utterances, such as -40; None: no noise.
        gains_db: of each utterance; empty: as they are.
        seed: of the noise.
    """
    assert len(pauses) == len(utterances) + 1 and len(gains_db) in (0, len(utterances))
    waveforms = [np.asarray(samples, np.float32) for samples, _ in utterances]
    gains = [10 ** (gain / 20) for gain in gains_db] or [1.0] * len(waveforms)
    noise = 0.0 if noise_db is None else _level(waveforms) * 10 ** (noise_db / 20)
    rng, truth, written = np.random.default_rng(seed), [], 0
    with soundfile.SoundFile(file, "w", rate, 1, subtype="PCM_16") as output:

        def write(samples: np.ndarray) -> None:
            nonlocal written
            if noise:
                samples = samples + noise * rng.standard_normal(samples.size, np.float32)
            output.write(np.clip(samples, -1, 1))
            written += samples.size

        for pause, waveform, gain, (_, text) in zip(pauses, waveforms, gains, utterances, strict=False):
            for piece in _silence(pause, rate):
                write(piece)
            start = written
            write(gain * resample(torch.from_numpy(waveform), RATE, rate).numpy())
            truth.append(Spoken(text, start / rate, written / rate))
        for piece in _silence(pauses[-1], rate):
            write(piece)
    return truth


def _level(waveforms: Sequence[np.ndarray]) -> float:
    energy = sum(float(np.square(one, dtype=np.float64).sum()) for one in waveforms)
    return (energy / sum(one.size for one in waveforms)) ** 0.5


def _silence(seconds: float, rate: int) -> Iterator[np.ndarray]:
    left = round(seconds * rate)
    while left > 0:
        yield np.zeros(min(left, _PIECE_SECONDS * rate), np.float32)
        left -= _PIECE_SECONDS * rate


def cut_out(recording: Path, truth: Sequence[Spoken], folder: Path) -> list[Path]:
    """Each utterance as a WAV file of its own, with the samples that it has in the recording."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    with soundfile.SoundFile(recording) as whole:
        for number, one in enumerate(truth):
            whole.seek(round(one.start * whole.samplerate))
            samples = whole.read(round((one.end - one.start) * whole.samplerate), dtype="int16")
            files.append(folder / f"{number:04d}.wav")
            soundfile.write(files[-1], samples, whole.samplerate, subtype="PCM_16")
    return files


def passages(truth: Sequence[Spoken], segments: Sequence[Any]) -> list[Passage]:
    """Utterances with the segments that overlap them, in the order of time. A segment in a pause is a passage without an utterance."""
    found: list[tuple[list[Spoken], list[Any]]] = []
    end = float("-inf")
    for one in sorted([*truth, *segments], key=lambda one: (one.start, one.end)):
        if one.start >= end:
            found.append(([], []))
        found[-1][not isinstance(one, Spoken)].append(one)
        end = max(end, one.end)
    return [Passage(tuple(spoken), tuple(heard)) for spoken, heard in found]


def differences(expected: str, heard: str) -> list[Difference]:
    """Where two texts differ, by the alignment with the fewest errors."""
    import jiwer

    before, after = expected.split(), heard.split()
    if not before or not after:
        return [Difference("lost" if before else "added", tuple(before), tuple(after), True)] if before or after else []
    found = []
    for chunk in jiwer.process_words(" ".join(before), " ".join(after)).alignments[0]:
        if chunk.type == "equal":
            continue
        one = tuple(before[chunk.ref_start_idx : chunk.ref_end_idx])
        other = tuple(after[chunk.hyp_start_idx : chunk.hyp_end_idx])
        kind = {"delete": "lost", "substitute": "changed", "insert": "added"}[chunk.type]
        if kind == "added" and other in _neighbours(after, chunk.hyp_start_idx, chunk.hyp_end_idx):
            kind = "doubled"
        at_edge = chunk.ref_start_idx == 0 or chunk.ref_end_idx == len(before)
        found.append(Difference(kind, one, other, at_edge))
    return found


def _neighbours(words: Sequence[str], begin: int, end: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """As many words before and after a place as are at it."""
    count = end - begin
    return tuple(words[max(0, begin - count) : begin]), tuple(words[end : end + count])
