"""The table of word error rates: what each condition does to a waveform, and what is counted."""

import numpy as np
import pytest

from granite_speech.training.bundled_checkpoint import conditions
from granite_speech.training.bundled_checkpoint.conditions import CONDITIONS, measure
from granite_speech.training.manifest import Utterance


@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_condition_changes_sound_and_nothing_else(condition):
    waveform = np.sin(np.arange(16000) * 0.3).astype(np.float32) * np.hanning(16000).astype(np.float32)
    changed = CONDITIONS[condition](waveform, np.random.default_rng(0))
    assert changed.dtype == np.float32 and np.isfinite(changed).all() and changed.size > 8000
    assert (condition == "as spoken") == np.array_equal(changed, waveform)
    assert np.array_equal(changed, CONDITIONS[condition](waveform, np.random.default_rng(0)))


def test_what_is_counted(monkeypatch, tmp_path):
    said = ["seven", "one two", "stop", "four five six"]
    texts, spelled = ["seven", "one two", "start", "four six"], ["seven", "one", "stop", "four six"]
    monkeypatch.setattr(conditions, "transcripts", lambda *arguments, change: texts)
    monkeypatch.setattr(conditions, "ctc_transcripts", lambda *arguments, change: spelled)
    utterances = [Utterance(text, None, tmp_path / "a.wav", tmp_path / "m.jsonl", line) for line, text in enumerate(said, 1)]
    row = measure(None, None, utterances, "room echo, 0.1 to 0.7 s")
    assert row.to_dict() == {
        "condition": "room echo, 0.1 to 0.7 s",
        "utterances": 4,
        "wer": round(2 / 7, 4),
        "wer_of_single_words": 0.5,
        "wer_of_single_digits": 0.0,
        "ctc_wer": round(2 / 7, 4),
        "ctc_is_text": 0.5,
    }


def test_model_and_encoder_hear_the_same(monkeypatch, tmp_path):
    import torch

    heard = []

    def listen(model, processor, utterances, *, change):
        heard.append(change(torch.ones(4000), 0))
        return ["one"]

    monkeypatch.setattr(conditions, "transcripts", listen)
    monkeypatch.setattr(conditions, "ctc_transcripts", listen)
    utterances = [Utterance("one", None, tmp_path / "a.wav", tmp_path / "m.jsonl", 1)]
    measure(None, None, utterances, "noise 10 dB below the speech")
    measure(None, None, utterances, "noise 10 dB below the speech", seed=1)
    assert torch.equal(heard[0], heard[1]) and not torch.equal(heard[0], heard[2])
