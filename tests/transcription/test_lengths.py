"""Recordings of forty lengths from 0.1 to 60 s, with speech and without; `make sweep` reads six hundred."""

from collections.abc import Iterable, Iterator

import numpy as np
import pytest
import torch

from granite_speech import Transcriber, Transcript
from tests.support import sweep_lengths
from tests.support.spoken import load
from tests.support.sweep_lengths import SILENCES, failures, lengths, voices


def test_speech_gives_words_and_silence_none_at_any_length():
    with Transcriber(*load()) as transcriber:
        found = failures(transcriber, voices(), 40)
    assert not found, "\n".join(found)


class Deaf:
    """Gives the same text for every recording."""

    def __init__(self, text: str):
        self.text = text

    def stream(self, recordings: Iterable[torch.Tensor]) -> Iterator[Transcript]:
        for _ in recordings:
            yield Transcript(self.text)


def test_the_sweep_sees_missing_words_and_words_for_silence(monkeypatch):
    monkeypatch.setattr(sweep_lengths, "_own_answer", lambda transcriber, samples: "one")
    missing = failures(Deaf(""), voices(), 12)
    assert len(missing) == 12 and all("no word for speech" in one for one in missing)
    invented = failures(Deaf("nothing"), voices(), 12)
    assert len(invented) == 12 and all("words for silence: 'nothing'" in one for one in invented)


def test_the_sweep_sees_words_that_silence_changes(monkeypatch):
    monkeypatch.setattr(sweep_lengths, "_own_answer", lambda transcriber, samples: "one")

    class Forgetful:
        """Knows an utterance, but not with silence around it."""

        def stream(self, recordings):
            for one in recordings:
                inside = (
                    text for samples, text in voices() if samples.tobytes() in one.numpy().tobytes() and len(one) < len(samples) + 8000
                )
                yield Transcript(next(inside, "nothing"))

    changed = [one for one in failures(Forgetful(), voices(), 12) if "alone it is" in one]
    assert len(changed) > 6 and all("'nothing'; alone it is " in one for one in changed)


def test_lengths_are_from_a_tenth_of_a_second_to_a_minute():
    assert lengths(40)[0] == pytest.approx(0.1) and lengths(40)[-1] == pytest.approx(60)
    assert len(lengths(600)) == 600 and np.all(np.diff(lengths(600)) > 0)


@pytest.mark.parametrize("kind", SILENCES)
def test_silence_has_its_length_and_no_speech(kind):
    samples = SILENCES[kind](np.random.default_rng(0), 1600)
    assert samples.shape == (1600,) and samples.dtype == np.float32 and np.abs(samples).max() < 0.4
    assert SILENCES[kind](np.random.default_rng(0), 1).shape == (1,)
