"""The words of transcripts: every mode, windows that overlap, repeat themselves, fail or are silent."""

import warnings
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch

from granite_speech import InputError, Transcriber, TranscriptWarning
from granite_speech.engine.handle import Answer
from granite_speech.transcription.piece import Piece
from granite_speech.transcription.text_units import text_units
from granite_speech.transcription.transcript import Transcript
from granite_speech.transcription.windows import Window
from tests.support.given_windows import given
from tests.support.known_words import known_words, recording
from tests.support.long_recordings import Spoken
from tests.support.random_checkpoint import write_checkpoint
from tests.support.spoken import load

RATE = 16_000


@pytest.fixture(scope="module")
def transcriber() -> Iterator[Transcriber]:
    with Transcriber(*load()) as transcriber:
        yield transcriber


@pytest.fixture(scope="module")
def plus(tmp_path_factory) -> Iterator[Transcriber]:
    folder = tmp_path_factory.mktemp("plus")
    write_checkpoint(folder, is_plus=True)
    with Transcriber.from_pretrained(folder) as transcriber:
        yield transcriber


@pytest.fixture(scope="module")
def spoken(tmp_path_factory) -> tuple[torch.Tensor, list[Spoken]]:
    """A recording of 24 words, and where they are."""
    file = tmp_path_factory.mktemp("words") / "24.wav"
    drawn = np.random.default_rng(0).permutation(len(known_words()))[:24]
    places = recording(file, [known_words()[number] for number in drawn], 0, shortest=0.02, longest=0.15)
    return torch.from_numpy(soundfile.read(file, dtype="float32")[0]), places


def check(transcript: Transcript) -> None:
    """Assert that a transcript has all its words, in its segments, in order, with times in the recording and confidences."""
    assert [one.word for one in transcript.words] == _units(transcript)
    assert transcript.words == tuple(word for one in transcript.segments for word in one.words)
    for segment in transcript.segments:
        assert [one.word for one in segment.words] == _units(segment.text)
        assert segment.start == segment.words[0].start and segment.end == segment.words[-1].end
    times = [time for one in transcript.words for time in (one.start, one.end)]
    assert times == sorted(times) and times[0] >= 0 and times[-1] <= transcript.duration + 5e-4
    assert all(0 <= one.confidence <= 1 for one in transcript.words)


def _units(text: str) -> list[str]:
    return [unit for _, unit in text_units(" ".join(text.split())) if unit]


def saying(monkeypatch, *texts: str) -> None:
    """The windows have these answers, in turn, whatever the model says."""
    answer, rest = Piece.answer, iter(texts)

    def say(piece: Piece) -> Answer:
        text = next(rest)
        ids = piece._setup.processor.tokenizer.encode(text, add_special_tokens=False)
        return replace(answer(piece), text=text, token_ids=ids, logprobs=[-0.1] * len(ids), finish_reason="stop")

    monkeypatch.setattr(Piece, "answer", say)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"segmentation": "vad", "chunk_length": 2.0},
        {"segmentation": "fixed"},
        {"chunk_overlap": 1.0, "chunk_length": 3.0},
        {"temperature": 0.8},
        {"clip_timestamps": "1,4,6,9"},
        {"max_new_tokens": 3},
    ],
    ids=str,
)
def test_words_are_those_of_the_text_in_order(transcriber, spoken, options):
    """In a recording with so little silence that windows are cut in words and share some of them."""
    samples, places = spoken
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transcript = transcriber.transcribe(samples, word_timestamps=True, **options)
    assert len(transcript.segments) > 1
    check(transcript)
    assert all(one.ctc_confidence is not None and one.lm_confidence is not None for one in transcript.words)
    if not options.keys() & {"clip_timestamps", "max_new_tokens"}:
        assert abs(transcript.words[0].start - places[0].start) < 0.2 and abs(transcript.words[-1].end - places[-1].end) < 0.2


def test_a_text_is_the_same_with_and_without_words(transcriber, spoken, monkeypatch):
    samples, _ = spoken
    answer, read = Piece.answer, []
    monkeypatch.setattr(Piece, "answer", lambda piece: read.append(answer(piece)) or read[-1])
    plain = transcriber.transcribe(samples)
    assert read and all(one.ctc_logprobs is None for one in read), "nothing is computed for words that nobody asked for"
    timed = transcriber.transcribe(samples, word_timestamps=True)
    assert plain == timed and plain.words is None and all(one.words is None for one in plain.segments)
    assert [one.confidence for one in plain.segments] == pytest.approx([one.confidence for one in timed.segments], abs=1e-4)
    assert "words" not in plain.to_dict() and len(timed.to_dict()["words"]) == len(timed.words)


@pytest.mark.parametrize("samples", [torch.zeros(3 * RATE), 1e-3 * torch.randn(3 * RATE, generator=torch.Generator().manual_seed(0))])
def test_silence_has_no_words(transcriber, samples):
    transcript = transcriber.transcribe(samples, word_timestamps=True)
    assert transcript == "" and transcript.words == () and transcript.to_dict()["words"] == []


def test_words_of_a_translation_are_refused(transcriber, spoken):
    with pytest.raises(InputError, match="word_timestamps with task='translate'"):
        transcriber.transcribe(spoken[0], task="translate", target_language="de", word_timestamps=True)


def test_a_window_that_fails_has_no_words_and_the_others_have(transcriber, spoken, monkeypatch):
    samples, _ = spoken
    answer, failing = Piece.answer, []

    def fail(piece: Piece) -> Answer:
        if piece.window.start > 2 and (not failing or piece.window.start in failing):
            failing.append(piece.window.start)
            raise InputError(got="a window", expected="another", remedy="Wait")
        return answer(piece)

    monkeypatch.setattr(Piece, "answer", fail)
    with pytest.warns(TranscriptWarning, match="this window has no text"):
        transcript = transcriber.transcribe(samples, word_timestamps=True)
    failed = [one for one in transcript.segments if one.error is not None]
    assert [one.words for one in failed] == [()] and len(transcript.segments) > 2
    assert [one.word for one in transcript.words] == transcript.split()


def test_windows_cut_because_of_repetition_have_words(transcriber, spoken, monkeypatch):
    samples, places = spoken
    whole = Window(0.0, 3.5, samples[: int(3.5 * RATE)].clone())
    given(monkeypatch, whole)
    answer, lengths = Piece.answer, []

    def loop_if_long(piece: Piece) -> Answer:
        lengths.append(piece.window.end - piece.window.start)
        return replace(answer(piece), text="la " * 99, finish_reason="repeated") if lengths[-1] > 3 else answer(piece)

    monkeypatch.setattr(Piece, "answer", loop_if_long)
    transcript = transcriber.transcribe(samples, word_timestamps=True)
    assert len(lengths) == 3 and [bool(one.words) for one in transcript.segments] == [True, True]
    check(transcript)
    said = [one for one in places if one.end < 3]
    assert transcript.words[0].word == said[0].text and transcript.words[0].start == pytest.approx(said[0].start, abs=0.04)
    assert transcript.segments[1].words[0].start >= transcript.segments[0].end


@pytest.mark.parametrize(
    "texts",
    [
        ("open menu two", "two up stop"),
        ("open menu two", "up stop"),
        ("open", "open"),
        ("one two three four", "four"),
        ("open  menu\ntwo", " two  up "),
        ("open menu tw", "two up"),
        ("—", "— up"),
        ("東京です", "です。はい"),
    ],
    ids=str,
)
def test_windows_that_overlap_are_joined_with_their_words(transcriber, spoken, monkeypatch, texts):
    samples, _ = spoken
    given(monkeypatch, Window(0.0, 2.0, samples[: 2 * RATE].clone()), Window(1.5, 3.5, samples[24_000:56_000].clone(), overlap=0.5))
    saying(monkeypatch, *texts)
    check(transcriber.transcribe(samples, word_timestamps=True))


# --- plus: answers with tags ----------------------------------------------------------------------------------------------------------

SPEAKERS = "[Speaker 1]: open menu [Speaker 2]: two"
TIMES = "open [T:45] menu [T:90] _ [T:120] two [T:160]"


def two_windows(monkeypatch, samples: torch.Tensor) -> None:
    given(monkeypatch, Window(0.0, 2.0, samples[: 2 * RATE].clone()), Window(2.5, 4.5, samples[40_000:72_000].clone()))


@pytest.mark.parametrize("asked", [True, False], ids=str)
@pytest.mark.parametrize(("mode", "text"), [("speaker_attributed", SPEAKERS), ("word_timestamps", TIMES)])
def test_words_of_answers_with_tags(plus, spoken, monkeypatch, mode, text, asked):
    two_windows(monkeypatch, spoken[0])
    saying(monkeypatch, text, text)
    transcript = plus.transcribe(spoken[0], prompt_mode=mode, word_timestamps=asked, max_new_tokens=1)
    assert transcript == "open menu two open menu two" and [one.raw_text for one in transcript.segments] == [text, text]
    if mode == "speaker_attributed" and not asked:
        assert transcript.words is None
        return
    check(transcript)
    if mode == "speaker_attributed":
        assert [one.speaker for one in transcript.words] == ["Speaker 1", "Speaker 1", "Speaker 2"] * 2
    has_ctc = {one.ctc_confidence is not None or one.bridged for one in transcript.words}
    assert has_ctc == {asked}
    if not asked:
        assert [one.start for one in transcript.words] == [0.0, 0.45, 1.2, 2.5, 2.95, 3.7]
    assert all(0 < one.lm_confidence < 1 for one in transcript.words)


def test_words_of_a_prefix_are_no_words_of_the_answer(plus, spoken, monkeypatch):
    two_windows(monkeypatch, spoken[0])
    saying(monkeypatch, *["two up", "stop"] * 2)
    plain, continued = (
        plus.transcribe(spoken[0], prefix_text=prefix, word_timestamps=True, max_new_tokens=1) for prefix in (None, "open menu")
    )
    check(continued)
    assert plain == continued == "two up stop"
    assert plain.words[2] == continued.words[2], "the prefix is that of the first window alone"
    assert plain.words[0].start < continued.words[0].start
