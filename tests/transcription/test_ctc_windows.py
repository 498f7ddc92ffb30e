"""Long recordings for TurboCTC: windows that are joined say what the whole recording at once says."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from granite_speech import Transcriber
from granite_speech.config_ctc import GraniteSpeech5EncoderConfig
from granite_speech.engine.ctc_engine import CTCEngine
from granite_speech.inputs.delta_features import GraniteSpeech5FeatureExtractor
from granite_speech.model_ctc import GraniteSpeech5ForCTC
from granite_speech.modules.packing import Segments
from granite_speech.transcription import ctc_piece
from granite_speech.transcription.ctc_answers import CTCAnswers
from granite_speech.transcription.ctc_piece import CTCSetup, block_samples, reach
from granite_speech.transcription.ctc_tokens import Token
from granite_speech.transcription.options import TranscribeOptions
from granite_speech.transcription.windows import Windows
from tests.support.ctc_models import SPECS, CTCSpec, build_ours, build_reference
from tests.support.ctc_speech import RATE, TONES, sentence, sound

EXTRACTOR = GraniteSpeech5FeatureExtractor()


@pytest.fixture(scope="module")
def transcriber() -> Transcriber:
    return Transcriber.from_pretrained(TONES, dtype="float32")


def signal(seconds: float, seed: int = 0) -> torch.Tensor:
    """Noise whose color and level change several times a second, never 80 dB below its loudest moment: no feature is at the floor."""
    rng = torch.Generator().manual_seed(seed)
    count = int(seconds * RATE)
    parts = []
    while sum(map(len, parts)) < count:
        length = int(torch.randint(800, 8000, (), generator=rng))
        noise = torch.randn(length, generator=rng)
        tone = torch.sin(torch.arange(length) * float(torch.rand((), generator=rng)))
        parts.append(0.02 * noise + 0.3 * float(torch.rand((), generator=rng)) * tone)
    return torch.cat(parts)[:count]


def test_blocks_of_the_released_model_begin_every_10_seconds_and_reach_15_blocks():
    config = GraniteSpeech5EncoderConfig()
    assert block_samples(config, EXTRACTOR) / RATE == 10.24
    assert reach(config, EXTRACTOR) == 15, "14 layers at the last rate, and less than one for the others and the features"


@pytest.mark.parametrize("spec", [*SPECS, CTCSpec("many layers", {"num_hidden_layers": 9})], ids=lambda spec: spec.name)
def test_nothing_farther_than_the_reach_changes_a_block_and_something_nearer_does(spec, tmp_path):
    model = build_ours(build_reference(spec), tmp_path)
    config = model.config.encoder_config
    extractor = GraniteSpeech5FeatureExtractor(num_mel_bins=5)
    blocks, step = reach(config, extractor), config.context_size << config.subsamplings
    rng = torch.Generator().manual_seed(0)
    frames = torch.randn((2 * blocks + 3) * step, 20, generator=rng, dtype=torch.float64)
    model.double()

    def middle(frames: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            states, _ = model.encode_packed(frames, Segments((len(frames),), frames.device))
        return states[(blocks + 1) * config.context_size : (blocks + 2) * config.context_size]

    whole, before, after = middle(frames), (blocks + 1) * step, (blocks + 2) * step
    far, near = frames.clone(), frames.clone()
    far[: before - blocks * step] = 7
    far[after + blocks * step :] = 7
    assert torch.equal(middle(far), whole)
    near[: before - (blocks - 2) * step] = 7
    near[after + (blocks - 2) * step :] = 7
    if blocks > 2:  # one may be needed for the features alone
        assert not torch.equal(middle(near), whole)


def heard(model: GraniteSpeech5ForCTC, transcriber: Transcriber, samples: torch.Tensor, spans=None) -> tuple[int, list[Token]]:
    """The number of windows, and the tokens that they are joined to."""
    with CTCEngine(model, None) as engine:
        setup = CTCSetup.of(
            model, transcriber.processor, TranscribeOptions(), submit=lambda inputs: engine.submit(inputs=inputs), sampling_rate=None
        )
        pieces = [setup.piece(one, False) for one in Windows(iter(samples.split(7000)), **setup.cuts, spans=spans)]
        for one in pieces:
            one.submit()
        answers, found = CTCAnswers(setup), []
        answers._segment = partial(_keep, answers, found)
        list(answers.segments(pieces))
    return len(pieces), found


def _keep(answers: CTCAnswers, found: list[Token], tokens: list[Token], until: float):
    found += tokens
    answers._open = replace(answers._open, tokens=answers._open.tokens[len(tokens) :])
    return iter(())


@pytest.fixture(scope="module")
def random_model(tmp_path_factory, transcriber) -> GraniteSpeech5ForCTC:
    """Its vocabulary and features are those of the checkpoint of tones. Which entry is likeliest changes from frame to frame."""
    sizes = {"vocab_size": transcriber.model.config.vocab_size, "num_mel_bins": 24}
    model = build_ours(build_reference(CTCSpec("random", sizes, {"tie_word_embeddings": False})), tmp_path_factory.mktemp("random"))
    frames = transcriber.processor(signal(30.0, 5))["input_features"][0]
    with torch.no_grad():
        states, _ = model.encode_packed(frames, Segments((len(frames),), frames.device))
        model.ctc_head.weight.normal_(generator=torch.Generator().manual_seed(1))
        model.ctc_head.bias.copy_(-model.ctc_head.weight @ states.mean(0))
    return model


def test_joined_windows_are_one_pass_over_three_minutes(random_model, transcriber, monkeypatch):
    samples = signal(180.0)
    count, whole = heard(random_model, transcriber, samples)
    assert count == 1 and len(whole) > 100
    for seconds, windows in ((3.0, 55), (20.0, 9)):
        monkeypatch.setitem(ctc_piece._GIVEN, "cpu", seconds)
        count, found = heard(random_model, transcriber, samples)
        assert abs(count - windows) <= 2
        assert [(one.id, round(one.first), round(one.last)) for one in found] == [
            (one.id, round(one.first), round(one.last)) for one in whole
        ]
        assert [one.logprob for one in found] == pytest.approx([one.logprob for one in whole], abs=1e-4)


@given(st.integers(1, 40 * RATE), st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_recordings_of_any_length_are_joined(random_model, transcriber, count, seed):
    samples = signal(count / RATE + 0.1, seed)[: max(count, 160)]
    _, whole = heard(random_model, transcriber, samples)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ctc_piece._GIVEN, "cpu", 3.0)
        _, found = heard(random_model, transcriber, samples)
    assert [(one.id, round(one.first), round(one.last)) for one in found] == [(one.id, round(one.first), round(one.last)) for one in whole]
    assert [one.logprob for one in found] == pytest.approx([one.logprob for one in whole], abs=1e-4)


def test_no_word_of_a_long_recording_is_lost_or_said_twice(transcriber, monkeypatch):
    rng = np.random.default_rng(11)
    words = [part for _ in range(40) for part in (*sentence(rng, 5), float(rng.uniform(0.2, 2.5)))]
    samples, times = sound(words, 11)
    whole = transcriber.transcribe(samples, word_timestamps=True)
    assert whole == " ".join(word for word in words if isinstance(word, str))
    monkeypatch.setitem(ctc_piece._GIVEN, "cpu", 6.4)
    found = transcriber.transcribe(samples, word_timestamps=True)
    assert found == whole and [one.text for one in found.segments] == [one.text for one in whole.segments]
    for word, other, (begin, end) in zip(found.words, whole.words, times, strict=True):
        assert abs(word.start - begin) < 0.08 and abs(word.end - end) < 0.08
        assert word.confidence == pytest.approx(other.confidence, abs=0.01)


def test_minutes_of_silence_have_no_words(transcriber, monkeypatch):
    monkeypatch.setitem(ctc_piece._GIVEN, "cpu", 6.4)
    samples, times = sound([60.0, "one", "two", 60.0, "three"])
    found = transcriber.transcribe(samples, word_timestamps=True)
    assert [one.text for one in found.segments] == ["one two", "three"]
    for word, (begin, end) in zip(found.words, times, strict=True):
        assert abs(word.start - begin) < 0.08 and abs(word.end - end) < 0.08


def test_a_window_that_fails_leaves_the_others_their_words(transcriber, monkeypatch):
    monkeypatch.setitem(ctc_piece._GIVEN, "cpu", 6.4)
    words = ["one", 1.2, "two", 1.2, "three"] * 8
    samples, _ = sound(words)
    heard, calls = CTCAnswers._heard, []

    def failing(answers: CTCAnswers, piece):
        calls.append(piece)
        if len(calls) == 2:
            monkeypatch.setattr(piece, "answer", lambda: 1 / 0)
            monkeypatch.setattr(piece, "_handle", None)
        return heard(answers, piece)

    monkeypatch.setattr(CTCAnswers, "_heard", failing)
    with pytest.warns(UserWarning, match=r"this window has no text: division by zero"):
        found = transcriber.transcribe(samples, word_timestamps=True)
    [failed] = [one for one in found.segments if one.error is not None]
    [note] = found.warnings
    assert (note.type, note.start, note.end) == ("window_error", failed.start, failed.end) and failed.words == ()
    said = " ".join(word for word in words if isinstance(word, str)).split()
    before = [one.word for one in found.words if one.end <= failed.start + 0.1]
    after = [one.word for one in found.words if one.start >= failed.end - 0.1]
    assert before == said[: len(before)] and after == said[-len(after) :] and len(before) + len(after) == len(found.words) > 10


def test_memory_does_not_grow_with_the_recording():
    blocks = (torch.zeros(2 * RATE) for _ in range(60))
    windows = Windows(blocks, limit=10.0, segmentation="blocks", overlap=4.0)
    first = next(windows)
    assert (first.start, first.end, first.overlap) == (0.0, 10.0, 0.0) and windows.duration <= 12
    later = list(windows)
    assert [(one.start, one.end - one.start, one.overlap) for one in later[:-1]] == [(6.0 * n, 10.0, 4.0) for n in range(1, len(later))]
    assert later[-1].end == 120.0 and all(one.samples.untyped_storage().nbytes() == 4 * len(one.samples) for one in later)


@pytest.mark.parametrize("count, expected", [(0, []), (1, [(0, 1)]), (40, [(0, 40)]), (41, [(0, 40), (30, 41)]), (70, [(0, 40), (30, 70)])])
def test_the_last_window_is_as_long_as_the_rest(count, expected):
    samples = torch.arange(float(count))
    found = list(Windows(iter([samples]), limit=40 / RATE, segmentation="blocks", overlap=10 / RATE))
    assert [(round(one.start * RATE), round(one.end * RATE)) for one in found] == expected
    assert all(torch.equal(one.samples, samples[begin:end]) for one, (begin, end) in zip(found, expected, strict=True))
