"""The bundled checkpoint's word times and confidences, in recordings made of words whose places are known."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from granite_speech import Transcriber
from granite_speech.transcription.transcript import Transcript
from tests.support.known_words import WORDS, auc, is_right, known_words, matched, recording
from tests.support.long_recordings import Spoken
from tests.support.spoken import load

KNOWN = known_words()


@pytest.fixture(scope="module")
def transcriber() -> Iterator[Transcriber]:
    with Transcriber(*load()) as transcriber:
        yield transcriber


@dataclass
class Errors:
    """How far the times of right words are off, in seconds, and how many words there were, right or wrong."""

    starts: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    spoken: int = 0

    def add(self, spoken: Sequence[Spoken], transcript: Transcript) -> None:
        self.spoken += len(spoken)
        for truth, word in matched(spoken, transcript.words):
            self.starts.append(abs(word.start - truth.start))
            self.ends.append(abs(word.end - truth.end))

    def check(self, *, right: float, starts: tuple[float, float], ends: tuple[float, float]) -> None:
        """Assert the share of right words, and the median and the 95th percentile of both errors."""
        assert len(self.starts) >= right * self.spoken
        for errors, most in ((self.starts, starts), (self.ends, ends)):
            found = np.quantile(errors, (0.5, 0.95))
            assert (found <= most).all(), found


def recordings(folder: Path, seeds: Sequence[int], words: int, **settings) -> Iterator[tuple[Path, list[Spoken]]]:
    """Recordings of words drawn at random, and what is spoken in them."""
    for seed in seeds:
        drawn = np.random.default_rng(seed).permutation(len(KNOWN))[:words]
        file = folder / f"{seed}.wav"
        yield file, recording(file, [KNOWN[number] for number in drawn], seed, **settings)


def test_the_words_are_of_many_kinds_and_their_files_small():
    assert len({one.voice for one in KNOWN}) == 8 and len({one.text for one in KNOWN}) >= 30
    assert all(0.1 < one.samples.size / 16_000 < 2 for one in KNOWN)
    assert sum(file.stat().st_size for file in WORDS.iterdir()) < 350_000


def test_words_of_short_recordings_have_their_times(transcriber, tmp_path):
    errors = Errors()
    for file, spoken in recordings(tmp_path, range(100, 112), 4):
        errors.add(spoken, transcriber.transcribe(file, word_timestamps=True))
    errors.check(right=0.85, starts=(0.01, 0.04), ends=(0.015, 0.06))


@pytest.mark.parametrize(("noise", "starts", "ends"), [(None, (0.01, 0.04), (0.015, 0.06)), (-10, (0.04, 0.12), (0.06, 0.15))], ids=str)
def test_words_of_longer_recordings_have_their_times_in_the_recording(transcriber, tmp_path, noise, starts, ends):
    errors = Errors()
    for file, spoken in recordings(tmp_path, (0, 1), len(KNOWN), noise_db=noise, longest=1.0):
        transcript = transcriber.transcribe(file, word_timestamps=True)
        assert len(transcript.segments) > 10 and transcript.duration > 45
        errors.add(spoken, transcript)
    errors.check(right=0.9 if noise is None else 0.6, starts=starts, ends=ends)


def test_all_words_of_a_transcript_are_in_order_and_in_their_segments(transcriber, tmp_path):
    [(file, _)] = recordings(tmp_path, [2], 24)
    transcript = transcriber.transcribe(file, word_timestamps=True)
    assert [one.word for one in transcript.words] == transcript.split()
    edges = [edge for one in transcript.words for edge in (one.start, one.end)]
    assert edges == sorted(edges) and edges[0] >= 0 and edges[-1] <= transcript.duration
    assert all(one.end - one.start > 0.05 for one in transcript.words), "words last"
    for segment in transcript.segments:
        assert [one.word for one in segment.words] == segment.text.split()
        assert (segment.start, segment.end) == (segment.words[0].start, segment.words[-1].end)


def test_a_wrong_word_has_less_confidence_than_a_right_one(transcriber, tmp_path):
    right, wrong = [], []
    for noise in (-10, -5, 0):
        for file, spoken in recordings(tmp_path, range(3), 20, noise_db=noise):
            words = transcriber.transcribe(file, word_timestamps=True).words
            for word, is_true in zip(words, is_right(spoken, words), strict=True):
                (right if is_true else wrong).append(word)
    assert min(len(right), len(wrong)) > 50
    for name in ("confidence", "ctc_confidence", "lm_confidence"):
        assert auc([one[name] for one in right], [one[name] for one in wrong]) >= 0.8, name
