"""`Transcriber` with a live TurboCTC model of transformers, and its processor."""

import pytest
import torch
import transformers

from granite_speech import InputError, Transcriber, accelerate
from tests.support.ctc_speech import RATE, TONES, sound

SAID = ["two", "four", "one", "three", "two"]


@pytest.fixture
def live() -> transformers.GraniteSpeech5ForCTC:
    return transformers.GraniteSpeech5ForCTC.from_pretrained(str(TONES)).eval()


def test_it_gives_the_text_and_the_times_of_our_own_model(live):
    samples, times = sound(SAID)
    processor = transformers.AutoProcessor.from_pretrained(str(TONES))
    with Transcriber.from_pretrained(TONES, dtype="float32") as ours, Transcriber(accelerate(live), processor) as theirs:
        expected = ours.transcribe(samples, word_timestamps=True)
        found = theirs.transcribe(samples, word_timestamps=True)
    assert found == expected == " ".join(SAID)
    assert [(one.start, one.end) for one in found.words] == [(one.start, one.end) for one in expected.words]
    assert all(abs(one.start - begin) < 0.1 and abs(one.end - end) < 0.1 for one, (begin, end) in zip(found.words, times, strict=True))


def test_each_call_has_the_weights_as_they_are(live):
    samples, _ = sound(SAID)
    with Transcriber(accelerate(live), transformers.AutoProcessor.from_pretrained(str(TONES))) as transcriber:
        assert transcriber.transcribe(samples) == " ".join(SAID)
        with torch.no_grad():
            live.ctc_head.bias[0] += 1000.0  # of the blank
        assert transcriber.transcribe(samples) == ""


def test_one_that_is_not_accelerated_is_refused(live):
    with pytest.raises(InputError, match="not accelerated"):
        Transcriber(live, transformers.AutoProcessor.from_pretrained(str(TONES))).transcribe(torch.zeros(RATE))
