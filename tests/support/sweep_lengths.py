"""Recordings of many lengths: never empty where there is speech, never a word for silence, and silence around speech changes no word.

    python -m tests.support.sweep_lengths 600

Lengths are spaced evenly on a logarithmic scale from 0.1 to 60 s. Everything else is drawn from the number of the length, which is
printed with each failure; `python -m tests.support.sweep_lengths 600 NUMBER` repeats that one.
"""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch

from granite_speech import GraniteSpeechError, Transcriber
from granite_speech.inputs.requests import transcript_request
from granite_speech.training import read_manifest
from tests.support.spoken import SPEECH

__all__ = ["SILENCES", "failures", "lengths", "voices"]

RATE = 16_000
SHORTEST, LONGEST = 0.1, 60.0
_LIMIT = 4.0  # seconds: the longest window of the bundled checkpoint

Utterance = tuple[np.ndarray, str]


@dataclass(frozen=True)
class Case:
    """One recording, `(samples,)` float32 at 16 kHz.

    Attributes:
        kind: "silence", "speech", or "among silence": a known utterance, which must give its `text`.
    """

    what: str
    kind: str
    samples: np.ndarray
    text: str = ""


def lengths(count: int) -> list[float]:
    return np.geomspace(SHORTEST, LONGEST, count).tolist()


def voices(manifest: Path = SPEECH / "manifest.jsonl") -> list[Utterance]:
    """Waveforms and texts of a manifest."""
    return [(soundfile.read(one.audio, dtype="float32")[0], one.text) for one in read_manifest(manifest)]


def failures(transcriber: Transcriber, utterances: Sequence[Utterance], count: int, only: int | None = None) -> list[str]:
    """What went wrong at `count` lengths, each with silence, with speech, and with speech among silence; a sentence for each failure."""
    known, cases = _known(transcriber, utterances), deque()

    def recordings() -> Iterator[torch.Tensor]:
        for number, length in enumerate(lengths(count)):
            if only in (None, number):
                for case in cases_of(number, length, utterances, known):
                    cases.append(case)
                    yield torch.from_numpy(case.samples)

    found = []
    for transcript in transcriber.stream(recordings()):
        case = cases.popleft()
        fault = _fault(transcriber, case, transcript)
        if fault:
            found.append(f"{case.what}, {case.samples.size / RATE:.3f} s: {fault}")
    return found


def _known(transcriber: Transcriber, utterances: Sequence[Utterance]) -> list[Utterance]:
    """Utterances that the model recognizes as they are, and with a little silence around them: its answer must not hang by a thread."""
    known = list(utterances)
    for before, after in ((0, 0), (0.02, 0.1), (0.05, 0.02), (0.06, 0.2), (0.1, 0.05), (0.15, 0.2), (0.25, 0.1)):
        margins = round(before * RATE), round(after * RATE)
        answers = transcriber.stream([torch.from_numpy(np.pad(samples, margins)) for samples, _ in known])
        known = [one for one, answer in zip(known, answers, strict=True) if str(answer) == one[1]]
    return known


def _fault(transcriber: Transcriber, case: Case, transcript: str) -> str:
    text, words = str(transcript), [one.text for one in transcript.segments if one.text]
    if transcript.error is not None:
        return f"failed: {transcript.error}"
    if case.kind == "speech" and not text and not (case.samples.size < RATE // 2 and text == _own_answer(transcriber, case.samples)):
        return "no word for speech"
    if case.kind == "silence" and (text or words):
        return f"words for silence: {text or words!r}"
    # What fits into one window is passed whole, and then the model may be confused by the silence.
    is_whole = case.samples.size <= _LIMIT * RATE
    if case.kind == "among silence" and text != case.text and not (is_whole and text == _own_answer(transcriber, case.samples)):
        return f"{text!r}; alone it is {case.text!r}"
    return ""


@torch.no_grad()
def _own_answer(transcriber: Transcriber, samples: np.ndarray) -> str:
    """The model's answer to a clip, without any windows."""
    model, processor = transcriber.model, transcriber.processor
    inputs = processor(transcript_request(processor), torch.from_numpy(samples))
    ids = model.generate(**inputs, max_new_tokens=60)[0, inputs["input_ids"].shape[1] :]
    return processor.decode(ids.tolist(), skip_special_tokens=True).strip()


def cases_of(number: int, length: float, utterances: Sequence[Utterance], known: Sequence[Utterance]) -> list[Case]:
    """The recordings of one length, in seconds.

    Args:
        utterances: of which speech is made.
        known: those whose words can be compared.
    """
    rng, size = np.random.default_rng(number), max(1, round(length * RATE))
    silence, speech, around = (list(kinds)[number % len(kinds)] for kinds in (SILENCES, SPEECHES, QUIET))
    cases = [
        Case(f"number {number}: {silence}", "silence", SILENCES[silence](rng, size)),
        Case(f"number {number}: {speech}", "speech", _at_level(SPEECHES[speech](rng, size, utterances), rng)),
    ]
    if known:
        samples, text = known[rng.integers(len(known))]
        before, after = ((size, 0), (0, size), (size, size))[rng.integers(3)]
        samples = np.pad(samples, (before, after))
        what = f"number {number}: {text!r}, {before / RATE:.2f} s of {around} before it and {after / RATE:.2f} s after it"
        cases.append(Case(what, "among silence", samples + QUIET[around](rng, samples.size), text))
    return cases


# --- silence ---------------------------------------------------------------------------------------------------------------------


def _zeros(rng: np.random.Generator, size: int) -> np.ndarray:
    return np.zeros(size, np.float32)


def _dither(rng: np.random.Generator, size: int) -> np.ndarray:
    """At most one step of 16 bits."""
    return (np.rint(rng.random(size) - rng.random(size)) / 32768).astype(np.float32)


def _noise(dbfs: float) -> Callable[[np.random.Generator, int], np.ndarray]:
    """White noise of an RMS level."""
    return lambda rng, size: (10 ** (dbfs / 20) * rng.standard_normal(size)).astype(np.float32)


def _room(rng: np.random.Generator, size: int) -> np.ndarray:
    """Noise at -50 dBFS that is louder at low frequencies, as of a fan."""
    spectrum = np.fft.rfft(rng.standard_normal(size)) / np.sqrt(1 + np.arange(size // 2 + 1) * RATE / size / 50)
    noise = np.fft.irfft(spectrum, size) if size > 1 else np.zeros(1)
    return (10 ** (-50 / 20) * noise / (noise.std() + 1e-9)).astype(np.float32)


def _hum(rng: np.random.Generator, size: int) -> np.ndarray:
    """50 or 60 Hz with overtones, at about -30 dBFS, and a little noise."""
    base, seconds = rng.choice([50, 60]), np.arange(size) / RATE
    tones = sum(np.sin(2 * np.pi * base * harmonic * seconds + rng.uniform(0, 6)) / harmonic for harmonic in (1, 2, 3, 5))
    return (0.04 * tones).astype(np.float32) + _noise(-75)(rng, size)


def _offset(rng: np.random.Generator, size: int) -> np.ndarray:
    """Dither around a constant that is not zero."""
    return _dither(rng, size) + np.float32(rng.uniform(-0.3, 0.3))


SILENCES = {
    "zeros": _zeros,
    "dither": _dither,
    "noise at -60 dBFS": _noise(-60),
    "noise at -30 dBFS": _noise(-30),
    "a fan": _room,
    "hum": _hum,
    "DC offset": _offset,
}
# What is around speech, and under it: not so loud that it could hide any of it.
QUIET = {"zeros": _zeros, "dither": _dither, "noise at -70 dBFS": _noise(-70)}


# --- speech ----------------------------------------------------------------------------------------------------------------------


def _cut(rng: np.random.Generator, size: int, utterances: Sequence[Utterance]) -> np.ndarray:
    """Utterances without pauses, and of those the loudest stretch of the length."""
    whole = np.concatenate([np.zeros(0, np.float32), *_drawn(rng, size, utterances)])
    energy = np.concatenate([[0.0], np.cumsum(np.square(whole, dtype=np.float64))])
    begin = int(np.argmax(energy[size:] - energy[:-size])) if whole.size > size else 0
    return whole[begin : begin + size]


def _padded(rng: np.random.Generator, size: int, utterances: Sequence[Utterance]) -> np.ndarray:
    """One utterance somewhere in silence; if the length is less than the utterance's, the loudest stretch of it."""
    speech, _ = utterances[rng.integers(len(utterances))]
    if speech.size >= size:
        return _cut(rng, size, utterances)
    padded, begin = np.zeros(size, np.float32), rng.integers(size - speech.size + 1)
    padded[begin : begin + speech.size] = speech
    return padded


def _repeated(rng: np.random.Generator, size: int, utterances: Sequence[Utterance]) -> np.ndarray:
    """Utterances with pauses of 0.1 to 3 s, cut at the length, with noise 50 dB below them."""
    pieces, count = [], 0
    while count < size:
        speech, _ = utterances[rng.integers(len(utterances))]
        pieces += [speech, np.zeros(round(rng.uniform(0.1, 3) * RATE), np.float32)]
        count += sum(one.size for one in pieces[-2:])
    whole = np.concatenate(pieces)
    whole += whole.std() * 10 ** (-50 / 20) * rng.standard_normal(whole.size).astype(np.float32)
    return whole[:size] if size > RATE else _cut(rng, size, [(whole, "")])


def _drawn(rng: np.random.Generator, size: int, utterances: Sequence[Utterance]) -> Iterator[np.ndarray]:
    """Utterances that together have at least `size` samples."""
    while size > 0:
        speech, _ = utterances[rng.integers(len(utterances))]
        yield speech
        size -= speech.size


SPEECHES = {"speech without pauses": _cut, "an utterance in silence": _padded, "utterances with pauses": _repeated}


def _at_level(samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """With its peak at -30 to 0 dBFS."""
    return (samples * (10 ** (rng.uniform(-30, 0) / 20) / np.abs(samples).max())).astype(np.float32)


def main(arguments: Sequence[str]) -> int:
    count, only = int(arguments[0]), int(arguments[1]) if len(arguments) > 1 else None
    begin, utterances = time.perf_counter(), _all_voices()
    with Transcriber.from_pretrained("embedded") as transcriber:
        found = failures(transcriber, utterances, count, only)
    print(*found, sep="\n")
    print(f"{count} lengths, {len(utterances)} utterances, {len(found)} failures, {time.perf_counter() - begin:.0f} s")
    return int(bool(found))


def _all_voices() -> list[Utterance]:
    """Those of tests/speech, and 60 new ones of other voices if synthesizers are installed."""
    from granite_speech.training.bundled_checkpoint.synthesis import synthesize

    manifest = Path("build/sweep/manifest.jsonl")
    try:
        manifest = manifest if manifest.is_file() else synthesize(manifest.parent, 60, 3, held_out=True)
    except GraniteSpeechError as error:
        print(f"only the voices of tests/speech: {error}")
        return voices()
    return [*voices(), *voices(manifest)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]))
