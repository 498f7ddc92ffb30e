"""Recordings of any length to texts with TurboCTC: what was said, when, in which files, and what is refused."""

import copy
import json
import pickle
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import granite_speech
from granite_speech import AudioError, EngineError, InputError, Transcriber
from granite_speech.engine import ctc_engine
from granite_speech.engine.ctc_worker import CTCWorker
from granite_speech.inputs.processor import GraniteSpeechProcessor
from granite_speech.model_ctc import GraniteSpeech5ForCTC
from granite_speech.transcription.transcriber import TranscriptWarning
from tests.support.ctc_speech import RATE, TONES, sentence, sound
from tests.support.spoken import load


@pytest.fixture(scope="module")
def shared() -> Iterator[Transcriber]:
    with Transcriber.from_pretrained(TONES, dtype="float32") as transcriber:
        yield transcriber


@pytest.fixture
def transcriber(shared) -> Transcriber:
    shared.close()
    return shared


def text_of(words: list) -> str:
    return " ".join(word for word in words if isinstance(word, str))


def spoken(seed: int, words: int = 8) -> tuple[list[str], torch.Tensor]:
    said = sentence(np.random.default_rng(seed), words)
    return said, sound(said, seed)[0]


def test_the_folder_decides_which_model_transcribes(transcriber):
    assert isinstance(transcriber.model, GraniteSpeech5ForCTC)
    said, samples = spoken(1)
    assert transcriber.transcribe(samples) == granite_speech.transcribe(samples, str(TONES), dtype="float32") == text_of(said)
    for kind, dtype in ((None, None), ("int8", "float32"), (None, "bfloat16")):
        with Transcriber.from_pretrained(TONES, quantize=kind, dtype=dtype) as other:
            assert other.transcribe(samples) == text_of(said)


def test_recordings_of_a_list_get_what_they_get_alone(transcriber):
    several = [spoken(seed, 1 + seed % 7) for seed in range(12)]
    together = transcriber.transcribe([samples for _, samples in several], word_timestamps=True)
    assert together == [text_of(said) for said, _ in several]
    for one, (_, samples) in zip(together, several, strict=True):
        alone = transcriber.transcribe(samples, word_timestamps=True)
        assert alone.words == one.words and alone.segments == one.segments


def test_words_have_the_times_at_which_they_are_said(transcriber):
    words = ["two", "one", 2.0, "three", 0.5, "four", "one"]
    samples, times = sound(words, 4)
    found = transcriber.transcribe(samples, word_timestamps=True)
    assert [one.word for one in found.words] == text_of(words).split()
    for word, (begin, end) in zip(found.words, times, strict=True):
        assert abs(word.start - begin) < 0.06 and abs(word.end - end) < 0.06
        assert 0.9 < word.confidence == word.ctc_confidence <= 1 and word.lm_confidence is None
    assert [one.text for one in found.segments] == ["two one", "three four one"], "a segment ends in a pause"
    assert [one.words for one in found.segments] == [found.words[:2], found.words[2:]]
    assert all(one.start == one.words[0].start and one.end == one.words[-1].end for one in found.segments)
    assert 0.9 < found.confidence <= 1 and found.is_complete
    without = transcriber.transcribe(samples)
    assert without.words is None and all(one.words is None for one in without.segments)
    for one, (begin, end) in zip(without.segments, (times[0][:1] + times[1][1:], times[2][:1] + times[4][1:]), strict=True):
        assert begin <= one.start < begin + 0.4 and end - 0.4 < one.end <= end + 0.1, "those of the tokens"


def test_a_speaker_who_never_pauses_has_segments_of_a_readable_length(transcriber):
    said, samples = spoken(3, 120)
    found = transcriber.transcribe(samples, word_timestamps=True)
    assert found == text_of(said) and len(found.segments) > 1
    assert all(one.end - one.start <= 30 for one in found.segments)
    assert [one.word for one in found.words] == said


def test_a_stream_gives_segments_as_they_are_final(transcriber):
    words = ["one", 2.0, "two", 2.0, "three"]
    segments = list(transcriber.transcribe(sound(words)[0], stream=True))
    assert [one.text for one in segments] == ["one", "two", "three"] and [one.id for one in segments] == [0, 1, 2]


@pytest.mark.parametrize(
    "options",
    [
        {"segmentation": "energy"},
        {"segmentation": "fixed", "chunk_length": 6, "chunk_overlap": 2},
        {"chunk_length": 5},
        {"chunk_length": 8, "chunk_overlap": 2},
    ],
    ids=str,
)
def test_a_call_may_choose_its_windows(transcriber, options):
    rng = np.random.default_rng(8)
    words = [part for _ in range(8) for part in (*sentence(rng, 4), 1.5)]
    samples, times = sound(words, 8)
    found = transcriber.transcribe(samples, word_timestamps=True, **options)
    assert found == text_of(words)
    for word, (begin, end) in zip(found.words, times, strict=True):
        assert abs(word.start - begin) < 0.3 and abs(word.end - end) < 0.3


def test_parts_of_a_recording(transcriber):
    words = ["one", 1.0, "two", 1.0, "three", 1.0, "four"]
    samples, times = sound(words)
    ranges = [times[1][0] - 0.3, times[1][1] + 0.3, times[3][0] - 0.3]
    found = transcriber.transcribe(samples, clip_timestamps=ranges, word_timestamps=True)
    assert found == "two four"
    assert abs(found.words[0].start - times[1][0]) < 0.1 and abs(found.words[1].start - times[3][0]) < 0.1


def test_a_window_is_no_longer_than_memory_allows(transcriber):
    with pytest.warns(TranscriptWarning, match="windows are at most 300 s long, because they take memory, not 900"):
        assert transcriber.transcribe(spoken(1)[1], chunk_length=900) == text_of(spoken(1)[0])


def test_silence_has_no_words_and_what_is_too_short_is_an_error(transcriber):
    for samples in (torch.zeros(500), torch.zeros(3 * RATE), 0.003 * torch.randn(3 * RATE, generator=torch.Generator().manual_seed(1))):
        found = transcriber.transcribe(samples, word_timestamps=True)
        assert (found, found.segments, found.words, found.confidence) == ("", (), (), None) and found.is_complete
    for samples, match in ((torch.zeros(0), "no samples"), (torch.zeros(100), "too few for one frame")):
        with pytest.raises(AudioError, match=match):
            transcriber.transcribe(samples)


def test_an_error_in_one_recording_leaves_the_others(transcriber, tmp_path):
    (tmp_path / "broken.wav").write_bytes(b"no sound")
    said, samples = spoken(2)
    found = list(transcriber.stream([samples, tmp_path / "broken.wav", torch.full((RATE,), torch.nan), tmp_path / "none.wav", samples]))
    assert [str(one) for one in found] == [text_of(said), "", "", "", text_of(said)]
    assert [isinstance(one.error, AudioError) for one in found] == [False, True, True, True, False]
    with pytest.raises(AudioError, match=r"recording 1 \('.*broken\.wav'\)"):
        transcriber.transcribe([samples, str(tmp_path / "broken.wav")])


@pytest.mark.parametrize(
    "options",
    [
        {"prompt": "what?"},
        {"initial_prompt": "names"},
        {"keywords": ["Ada"]},
        {"keyword_biases": "Ada"},
        {"task": "translate"},
        {"temperature": 0.5},
        {"max_new_tokens": 20},
        {"prompt_mode": "speaker_attributed"},
        {"prompt_mode": "default", "prefix_text": "so"},
        {"language": "German"},
    ],
    ids=str,
)
def test_what_only_a_language_model_can_do_is_refused_by_name(transcriber, options):
    with pytest.raises(InputError) as caught:
        transcriber.transcribe(spoken(1)[1], **options)
    assert any(f"{name}=" in str(caught.value) for name in ("prompt", "keywords", *options))


def test_options_that_change_nothing_are_accepted(transcriber):
    said, samples = spoken(1)
    defaults = {"task": "transcribe", "prompt": None, "keywords": [], "temperature": (0.0, 0.2), "max_new_tokens": None}
    others = {"compression_ratio_threshold": None, "prompt_mode": "default", "prefix_text": "", "beam_size": 1, "language": "en-US"}
    found = transcriber.transcribe(samples, **defaults, **others)
    assert found == text_of(said) and found.language == "en-US"
    assert transcriber.transcribe(samples, language="English") == transcriber.transcribe(samples, language="auto") == found


def test_a_processor_of_the_other_family_is_refused(transcriber):
    _, processor = load()
    assert isinstance(processor, GraniteSpeechProcessor)
    with pytest.raises(InputError, match="a GraniteSpeechProcessor with a model of another family"):
        Transcriber(transcriber.model, processor).transcribe(torch.zeros(RATE))
    with pytest.raises(InputError, match="training mode"):
        Transcriber(copy.deepcopy(transcriber.model).train(), transcriber.processor).transcribe(torch.zeros(RATE))


def test_copies_and_pickles_transcribe(transcriber):
    said, samples = spoken(5)
    for other in (copy.copy(transcriber), pickle.loads(pickle.dumps(transcriber))):
        with other:
            assert other.transcribe(samples) == text_of(said)


def test_closing_ends_what_others_wait_for(transcriber, monkeypatch):
    go, begun, turn = threading.Event(), threading.Event(), CTCWorker.turn
    monkeypatch.setattr(CTCWorker, "turn", lambda worker: (begun.set(), go.wait(30), turn(worker)))
    monkeypatch.setitem(ctc_engine._MAX_FRAMES, "cpu", 1)  # one after another
    said, samples = spoken(1)
    with ThreadPoolExecutor(2) as threads:
        waiting = threads.submit(transcriber.transcribe, [samples] * 3)
        assert begun.wait(30)
        loop, end = transcriber._engine._loop, time.monotonic() + 30
        while len(loop.worker.requests()) + len(loop._new) < 3 and time.monotonic() < end:
            time.sleep(0.01)
        closing = threads.submit(transcriber.close, True)
        while not loop._cancels and time.monotonic() < end:
            time.sleep(0.01)
        go.set()
        closing.result(30)
        with pytest.raises(EngineError):
            waiting.result(30)
    assert transcriber.transcribe(samples) == text_of(said), "a new engine"


def test_an_engine_that_fails_once_is_replaced(transcriber, monkeypatch):
    failures, turn = [ZeroDivisionError("once")], CTCWorker.turn

    def failing(worker: CTCWorker) -> None:
        if failures:
            raise failures.pop()
        turn(worker)

    monkeypatch.setattr(CTCWorker, "turn", failing)
    said, samples = spoken(1)
    assert transcriber.transcribe(samples) == text_of(said)
    monkeypatch.setattr(CTCWorker, "turn", lambda worker: 1 / 0)
    with pytest.raises(EngineError, match=r"no answer .ZeroDivisionError"):
        transcriber.transcribe(samples)


def test_load_model_gives_dictionaries(transcriber):
    said, samples = spoken(6)
    assert "granite-speech-5.0-470m-turboctc" in granite_speech.available_models()
    with granite_speech.load_model(TONES, dtype="float32") as model:
        result = model.transcribe(samples.numpy(), sample_rate=RATE)
    assert result.text == text_of(said) and [one.word for one in result.words] == said
    assert json.loads(json.dumps(result))["segments"][0]["words"][0]["ctc_confidence"] > 0.9
