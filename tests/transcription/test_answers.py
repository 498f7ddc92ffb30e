"""From answers to segments: windows that fail, repeat themselves, overlap or are cut off; progress; what the caller gets when."""

import warnings
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

import granite_speech
from granite_speech import (
    AudioError,
    EngineError,
    InputError,
    Segment,
    Transcriber,
    Transcript,
    TranscriptWarning,
    TruncatedAnswerWarning,
    load_audio,
)
from granite_speech.engine.handle import Answer, Handle
from granite_speech.transcription import answers
from granite_speech.transcription.piece import Piece
from granite_speech.transcription.repetition import compression_ratio, repeats
from granite_speech.transcription.windows import Window
from tests.support.given_windows import given
from tests.support.spoken import SPEECH, load, sentences

SPOKEN = [one for one in sentences() if " " in one.text][:5]
CLIPS = [load_audio(SPEECH / one.audio) for one in SPOKEN]
TEXTS = [one.text for one in SPOKEN]
PAUSE = torch.zeros(32_000)
RATE = 16_000


@pytest.fixture(scope="module")
def transcriber() -> Iterator[Transcriber]:
    with Transcriber(*load()) as transcriber:
        yield transcriber


def joined() -> tuple[torch.Tensor, list[tuple[float, float]]]:
    """The five sentences with pauses of two seconds, and where each is."""
    parts, places, position = [PAUSE], [], 2.0
    for clip in CLIPS:
        parts += [clip, PAUSE]
        places.append((position, position + len(clip) / RATE))
        position += len(clip) / RATE + 2.0
    return torch.cat(parts), places


def test_the_segments_of_a_recording_with_pauses(transcriber):
    samples, places = joined()
    progress = []
    events = list(transcriber.stream_segments([samples], on_progress=lambda index, seconds: progress.append((index, seconds))))
    transcript = events[-1][1]
    assert transcript == " ".join(TEXTS) and [index for index, _ in events] == [0] * 6
    assert [one for _, one in events[:-1]] == list(transcript.segments)
    assert [one.text for one in transcript.segments] == TEXTS and [one.id for one in transcript.segments] == list(range(5))
    for segment, (start, end) in zip(transcript.segments, places, strict=True):
        assert abs(segment.start - start) < 0.3 and abs(segment.end - end) < 0.3
    assert transcript.duration == pytest.approx(len(samples) / RATE) and transcript.warnings == ()
    assert progress == sorted(progress) and progress[-1] == (0, transcript.duration)


def test_stream_gives_segments_of_one_recording_and_transcripts_of_a_list(transcriber):
    samples, _ = joined()
    stream = transcriber.transcribe(samples, stream=True)
    first = next(stream)
    assert isinstance(first, Segment) and first.text == TEXTS[0]
    assert [one.text for one in stream] == TEXTS[1:]
    several = list(transcriber.transcribe([samples, CLIPS[0]], stream=True))
    assert several == [" ".join(TEXTS), TEXTS[0]] and all(isinstance(one, Transcript) for one in several)
    with pytest.raises(AudioError, match="does not exist"):
        next(transcriber.transcribe("nowhere.wav", stream=True))


def test_one_call_does_it_all():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert granite_speech.transcribe(CLIPS[0], model="embedded", device="cpu") == TEXTS[0]
        assert granite_speech.transcribe(CLIPS[:2], "embedded", dtype="float32") == TEXTS[:2]
        assert [one.text for one in granite_speech.transcribe(CLIPS[0], "embedded", stream=True)] == TEXTS[:1]
        with Transcriber(*load()) as transcriber:
            assert granite_speech.transcribe(CLIPS[1], transcriber, max_new_tokens=100) == TEXTS[1]
    with pytest.warns(UserWarning, match="knows only 70 English words") as caught:
        assert granite_speech.transcribe(CLIPS[0]) == TEXTS[0]
    assert caught[0].filename == __file__
    with pytest.raises(granite_speech.InputError, match="the option 'cuda'"):
        granite_speech.transcribe(CLIPS[0], "embedded", cuda=True)


# --- windows that fail ----------------------------------------------------------------------------------------------------------------


def failing(monkeypatch, bad: set[int], error: Exception) -> None:
    """The windows with these numbers fail, at the second try too."""
    prepare, numbers = Piece.__init__, {}

    def numbered(piece: Piece, setup, window: Window, is_first: bool = False) -> None:
        prepare(piece, setup, window, is_first)
        piece.number = numbers.setdefault(window.start, len(numbers))

    def answer(piece: Piece) -> Answer:
        if piece.number in bad:
            raise error
        return answered(piece)

    answered = Piece.answer
    monkeypatch.setattr(Piece, "__init__", numbered)
    monkeypatch.setattr(Piece, "answer", answer)


@pytest.mark.parametrize(
    "error", [RuntimeError("no memory"), AudioError(got="no memory", expected="some", remedy="Buy")], ids=["other", "own"]
)
def test_a_failed_window_is_a_warning_and_the_others_have_their_texts(transcriber, monkeypatch, error):
    failing(monkeypatch, {1}, error)
    samples, places = joined()
    [transcript] = transcriber.stream([samples])
    assert transcript.error is None and not transcript.is_complete
    assert transcript == " ".join([TEXTS[0], *TEXTS[2:]])
    assert [one.error is None for one in transcript.segments] == [True, False, True, True, True]
    [note] = transcript.warnings
    assert note.type == "window_error" and "no memory" in note.message and abs(note.start - places[1][0]) < 0.3
    with pytest.warns(TranscriptWarning, match="s: this window has no text: .*no memory"):
        assert all(one.words is None for one in transcriber.transcribe(samples).segments)
    with pytest.warns(TranscriptWarning):
        timed = transcriber.transcribe(samples, word_timestamps=True)
    assert timed.segments[1].words == () and timed.words == tuple(word for one in timed.segments for word in one.words)


def test_if_all_windows_fail_the_recording_has_failed(transcriber, monkeypatch):
    failing(monkeypatch, {0, 1, 2, 3, 4}, AudioError(got="no memory", expected="some", remedy="Buy"))
    samples, _ = joined()
    [transcript] = transcriber.stream([samples])
    assert isinstance(transcript.error, AudioError) and transcript == ""
    with pytest.raises(AudioError, match="no memory"):
        transcriber.transcribe(samples)


def test_a_lack_of_memory_does_not_end_the_run(transcriber, monkeypatch):
    failing(monkeypatch, {0}, RuntimeError("no memory"))
    first, second = transcriber.stream([CLIPS[0], torch.cat([PAUSE, PAUSE, CLIPS[1]])])
    assert isinstance(first.error, EngineError) and "RuntimeError: no memory" in str(first.error) and not first.is_complete
    assert isinstance(first.error.__cause__, RuntimeError)
    assert second == TEXTS[1] and second.error is None


@pytest.mark.parametrize("name", ["encoder.out.weight", "language_model.model.norm.weight"])
def test_a_model_that_computes_nan_is_an_error_and_not_a_text(name):
    model, processor = load()
    with torch.no_grad():
        model.get_parameter(name)[0] = torch.nan
    with Transcriber(model, processor) as broken, pytest.raises(EngineError, match="NaN, from a model in float32"):
        broken.transcribe(CLIPS[0], word_timestamps=True)


def test_ctc_probabilities_that_are_nan_are_an_error(transcriber, monkeypatch):
    def heard(handle: Handle) -> Answer:
        found = answer(handle)
        return replace(found, ctc_logprobs=torch.full_like(found.ctc_logprobs, torch.nan))

    answer = Handle.result
    monkeypatch.setattr(Handle, "result", heard)
    with pytest.raises(EngineError, match="NaN"):
        transcriber.transcribe(CLIPS[0], word_timestamps=True)


def test_a_window_whose_engine_failed_is_tried_again(transcriber, monkeypatch):
    answer, failures = Handle.result, iter([False, True])

    def fails_once(handle: Handle, timeout: float | None = None) -> Answer:
        if next(failures, False):
            raise RuntimeError("the engine's worker failed")
        return answer(handle, timeout)

    monkeypatch.setattr(Handle, "result", fails_once)
    samples, _ = joined()
    [transcript] = transcriber.stream([samples])
    assert transcript == " ".join(TEXTS) and transcript.is_complete and next(failures, None) is None


def test_a_damaged_end_leaves_the_text_before_it(transcriber, tmp_path):
    import soundfile

    samples, _ = joined()
    soundfile.write(tmp_path / "cut.flac", samples.numpy(), RATE)
    content = (tmp_path / "cut.flac").read_bytes()
    (tmp_path / "cut.flac").write_bytes(content[: len(content) // 2])
    [transcript] = transcriber.stream([tmp_path / "cut.flac"])
    assert isinstance(transcript.error, AudioError) and "cut off" in str(transcript.error)
    assert transcript.startswith(TEXTS[0]) and len(transcript) < len(" ".join(TEXTS))
    with pytest.raises(AudioError, match="cut off"):
        transcriber.transcribe(tmp_path / "cut.flac")
    with pytest.warns(granite_speech.AudioWarning, match="were loaded"):
        again = transcriber.transcribe(tmp_path / "cut.flac", errors="warn")
    assert again == transcript and again.error is None


def test_each_window_that_was_cut_off_is_named(transcriber):
    samples, places = joined()
    with pytest.warns(TruncatedAnswerWarning, match=r"^\d+\.\d\d to \d+\.\d\d s: the answer was cut off after 1 tokens") as caught:
        transcript = transcriber.transcribe(samples, max_new_tokens=1)
    assert len(caught) == 5 and {one.filename for one in caught} == {__file__}
    assert [abs(one.start - start) < 0.3 for one, (start, _) in zip(transcript.warnings, places, strict=True)] == [True] * 5


def test_a_chunk_length_beyond_the_checkpoints_limit_is_named(transcriber):
    samples, _ = joined()
    with pytest.warns(TranscriptWarning, match="windows are at most 4 s long, which is the checkpoint's limit to transcribe, not 30"):
        transcript = transcriber.transcribe(samples, chunk_length=30.0)
    assert transcript == " ".join(TEXTS) and transcript.warnings[0].type == "chunk_clamp" and transcript.is_complete
    assert transcriber.transcribe(samples, chunk_length=3.5).warnings == ()
    with pytest.raises(InputError, match=r"chunk_overlap=2.5 for windows of 4 s; expected at most half of them"):
        transcriber.transcribe(samples, chunk_overlap=2.5)


# --- texts that repeat themselves ---------------------------------------------------------------------------------------------------


def test_what_repeats():
    assert repeats("five", "repeated", 2.4) and not repeats("five", "repeated", None)
    assert repeats("go on and on " * 20, "stop", 2.4) and not repeats("go on and on " * 20, "stop", 50)
    assert not repeats("And so, my fellow Americans, ask not what your country can do for you.", "stop", 2.4)
    assert compression_ratio("") == 0.0 and compression_ratio("ü" * 400) > 20


def looping(monkeypatch, seconds: float) -> list[float]:
    """Answers to windows of at least this length repeat themselves; returns the lengths of all that are tried."""
    lengths, answered = [], Piece.answer

    def answer(piece: Piece) -> Answer:
        lengths.append(piece.window.end - piece.window.start)
        if lengths[-1] >= seconds:
            return Answer("la " * 100, [1] * 100, "repeated")
        return answered(piece)

    monkeypatch.setattr(Piece, "answer", answer)
    return lengths


def test_a_window_that_repeats_is_cut_and_tried_again(transcriber, monkeypatch):
    two = torch.cat([CLIPS[1], torch.zeros(4_000), CLIPS[3]])
    given(monkeypatch, Window(0.0, len(two) / RATE, two))
    lengths = looping(monkeypatch, len(two) / RATE - 0.1)
    transcript = transcriber.transcribe(two)
    assert transcript == f"{TEXTS[1]} {TEXTS[3]}" and transcript.warnings == () and len(lengths) == 3
    assert [one.text for one in transcript.segments] == TEXTS[1:4:2] and transcript.segments[0].end == transcript.segments[1].start

    lengths = looping(monkeypatch, 0.0)
    with pytest.warns(TranscriptWarning, match="the text repeats itself, in smaller windows too"):
        transcript = transcriber.transcribe(two)
    assert {one.type for one in transcript.warnings} == {"repetition"} and transcript.is_complete
    assert len(lengths) <= 2 ** (answers._CUTS + 1) and min(lengths) < len(two) / RATE / 2
    assert transcriber.transcribe(two, compression_ratio_threshold=None).warnings == ()

    monkeypatch.setattr(Piece, "answer", lambda piece: Answer("la " * 100, [1] * 400, "length"))
    [transcript] = transcriber.stream([two])
    assert {one.type for one in transcript.warnings} == {"repetition", "truncated"} and not transcript.is_complete


# --- overlaps ----------------------------------------------------------------------------------------------------------------------------


def test_words_of_an_overlap_are_joined_before_a_segment_is_final(transcriber, monkeypatch):
    given(monkeypatch, Window(0.0, 2.0, CLIPS[0]), Window(1.5, 3.0, CLIPS[1], overlap=0.5), Window(4.0, 5.0, CLIPS[2]))
    calls = []

    def join(before: str, after: str, **seconds: float) -> tuple[str, str]:
        calls.append((before, after, seconds))
        return before + " <", "> " + after

    monkeypatch.setattr(answers, "join", join)
    got = list(transcriber.transcribe(CLIPS[0], stream=True))
    assert calls == [(TEXTS[0], TEXTS[1], {"overlap": 0.5, "before_seconds": 2.0, "after_seconds": 1.5})]
    assert [one.text for one in got] == [TEXTS[0] + " <", "> " + TEXTS[1], TEXTS[2]]
    assert [(one.start, one.end) for one in got] == [(0.0, 1.75), (1.75, 3.0), (4.0, 5.0)]
