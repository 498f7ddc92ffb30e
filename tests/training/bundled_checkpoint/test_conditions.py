"""Word error rates by acoustic condition: the changes to waveforms, and the counting."""

import numpy as np
import pytest

from granite_speech.training.bundled_checkpoint import conditions
from granite_speech.training.bundled_checkpoint.conditions import CONDITIONS, measure
from granite_speech.training.manifest import Utterance


@pytest.mark.parametrize("condition", CONDITIONS)
def test_each_condition_but_one_changes_the_waveform_reproducibly(condition):
    waveform = np.sin(np.arange(16000) * 0.3).astype(np.float32) * np.hanning(16000).astype(np.float32)
    changed = CONDITIONS[condition](waveform, np.random.default_rng(0))
    assert changed.dtype == np.float32 and np.isfinite(changed).all() and changed.size > 8000
    assert (condition == "as spoken") == np.array_equal(changed, waveform)
    assert np.array_equal(changed, CONDITIONS[condition](waveform, np.random.default_rng(0)))


def test_word_error_rates_are_counted(monkeypatch, tmp_path):
    references = ["seven", "one two", "stop", "four five six"]
    texts, ctc_texts = ["seven", "one two", "start", "four six"], ["seven", "one", "stop", "four six"]
    monkeypatch.setattr(conditions, "transcripts", lambda *arguments, change: texts)
    monkeypatch.setattr(conditions, "ctc_transcripts", lambda *arguments, change: ctc_texts)
    utterances = [Utterance(text, None, tmp_path / "a.wav", tmp_path / "m.jsonl", line) for line, text in enumerate(references, 1)]
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


def test_model_and_encoder_get_the_same_waveforms(monkeypatch, tmp_path):
    import torch

    waveforms = []

    def transcribe(model, processor, utterances, *, change):
        waveforms.append(change(torch.ones(4000), 0))
        return ["one"]

    monkeypatch.setattr(conditions, "transcripts", transcribe)
    monkeypatch.setattr(conditions, "ctc_transcripts", transcribe)
    utterances = [Utterance("one", None, tmp_path / "a.wav", tmp_path / "m.jsonl", 1)]
    measure(None, None, utterances, "noise 10 dB below the speech")
    measure(None, None, utterances, "noise 10 dB below the speech", seed=1)
    assert torch.equal(waveforms[0], waveforms[1]) and not torch.equal(waveforms[0], waveforms[2])
