"""Lists and streams of recordings: order, errors, how far the reader goes ahead, and what happens when nobody waits any more."""

import itertools
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import soundfile
import torch

from granite_speech import AudioError, AudioWarning, Engine, InputError, Transcriber, Transcript, TruncatedAnswerWarning, load_audio
from granite_speech.engine.requests import Repetition
from granite_speech.inputs.requests import transcript_request
from granite_speech.transcription import read_ahead
from granite_speech.transcription import transcriber as module
from granite_speech.transcription.job import Job
from tests.support.paths import ROOT
from tests.support.sound_headers import wav_header
from tests.support.spoken import SPEECH, load, sentences

SPOKEN = sentences()
FILES = [SPEECH / one.audio for one in SPOKEN]
TEXTS = [one.text for one in SPOKEN]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}


@pytest.fixture(scope="module")
def transcriber() -> Iterator[Transcriber]:
    with Transcriber(*load()) as transcriber:
        yield transcriber


@pytest.fixture
def narrow(transcriber, monkeypatch) -> Iterator[Transcriber]:
    """A transcriber whose engine works on two answers at once, so that four recordings are read ahead."""
    monkeypatch.setattr(module, "Engine", partial(Engine, max_rows=2))
    with Transcriber(transcriber.model, transcriber.processor) as narrow:
        yield narrow


def eventually(condition: Callable[[], bool], seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


def is_idle(transcriber: Transcriber) -> bool:
    counters = transcriber._engine.counters()
    done = counters.finished + counters.cancelled + counters.failed
    return counters.submitted == done and counters.waiting + counters.prefilling + counters.decoding + counters.pages_used == 0


class Counted:
    """Recordings without end, and how many were taken."""

    def __init__(self, *first: str):
        self.first, self.taken = first, 0

    def __iter__(self) -> Iterator[str | Path]:
        for file in itertools.chain(self.first, itertools.cycle(FILES)):
            self.taken += 1
            yield file


# --- order and words ---------------------------------------------------------------------------------------------------------------


def test_a_list_gives_the_words_that_generate_gives_one_by_one(transcriber):
    model, processor = transcriber.model, transcriber.processor
    expected = []
    for file in FILES:
        inputs = processor(transcript_request(processor), load_audio(file))
        ids = model.generate(**inputs, max_new_tokens=400)[0, inputs["input_ids"].shape[1] :]
        expected.append(processor.decode(ids.tolist(), skip_special_tokens=True).strip())
    assert expected == TEXTS
    assert transcriber.transcribe(FILES) == expected
    assert transcriber.transcribe(tuple(map(str, FILES))) == expected
    assert [transcriber.transcribe(file) for file in FILES] == expected
    assert [one for one in transcriber.stream(iter(FILES))] == [Transcript(text) for text in expected]


def test_a_list_may_mix_all_kinds_of_recordings(transcriber):
    samples, rate = soundfile.read(FILES[3], dtype="float32")
    with open(FILES[4], "rb") as file:
        mixture = [FILES[0], str(FILES[1]), FILES[2].read_bytes(), samples, file, load_audio(FILES[5])]
        assert rate == 16_000
        assert transcriber.transcribe(mixture) == TEXTS[:6]


def test_a_list_of_one_and_an_empty_list_give_lists(transcriber):
    assert transcriber.transcribe([FILES[0]]) == TEXTS[:1]
    assert transcriber.transcribe([load_audio(FILES[0])]) == TEXTS[:1]
    assert transcriber.transcribe([]) == transcriber.transcribe(()) == []
    assert list(transcriber.stream([])) == []


@pytest.mark.parametrize("kind", [list, tuple])
def test_numbers_are_one_recording(transcriber, kind):
    samples = kind(load_audio(FILES[0]).tolist())
    assert transcriber.transcribe(samples) == TEXTS[0]
    assert transcriber.transcribe([samples, FILES[1]]) == TEXTS[:2]


def test_options_reach_every_recording(transcriber):
    slow = [load_audio(file, 8_000) for file in FILES[:3]]
    assert transcriber.transcribe(slow, sampling_rate=8_000) == [transcriber.transcribe(one, sampling_rate=8_000) for one in slow]
    assert transcriber.transcribe(slow) != transcriber.transcribe(slow, sampling_rate=8_000)
    request = "transcribe the speech to text."
    assert transcriber.transcribe(FILES[:1], f"<|audio|>{request}") == transcriber.transcribe(FILES[:1], request)
    with pytest.raises(InputError, match="occurs 2 times"):
        transcriber.transcribe(slow, "a prompt with <|audio|> and <|audio|>")
    [cut] = transcriber.stream(FILES[:1], max_new_tokens=2)
    assert TEXTS[0].startswith(cut.text) and "cut off after 2 tokens, which is max_new_tokens" in cut.truncated


# --- errors and warnings -----------------------------------------------------------------------------------------------------------


def test_a_recording_that_fails_does_not_end_a_stream(transcriber):
    bad = [torch.full((16_000,), float("nan")), "nowhere.wav", b"RIFF", 5]
    mixture = [piece for pair in zip(FILES, bad, strict=False) for piece in pair]
    got = list(transcriber.stream(mixture))
    assert [one.text for one in got] == [TEXTS[0], "", TEXTS[1], "", TEXTS[2], "", TEXTS[3], ""]
    for one, word in zip(got[1::2], ("NaN", "nowhere.wav", "does not decode", "int"), strict=True):
        assert isinstance(one.error, AudioError) and word in str(one.error) and one.truncated is None
    assert all(one.error is None for one in got[::2])


def test_an_option_that_is_refused_ends_the_call_before_it_begins(transcriber):
    for call in (transcriber.stream, partial(transcriber.transcribe, stream=True)):
        recordings = Counted()
        with pytest.raises(InputError, match="max_new_tokens=-1"):
            next(iter(call(recordings if call is transcriber.stream else [FILES[0]], max_new_tokens=-1)))
        assert recordings.taken == 0


@pytest.mark.parametrize(
    "kind",
    [str, Path, Path.read_bytes, partial(open, mode="rb"), load_audio, lambda file: [0.0, 0.1]],
    ids=["str", "path", "bytes", "file", "tensor", "numbers"],
)
def test_one_recording_is_not_several(transcriber, kind):
    given = kind(FILES[0])
    for call in (transcriber.stream, transcriber.stream_segments):
        with pytest.raises(InputError, match=f"a {type(given).__name__}, not several recordings"):
            next(call(given))


def test_an_error_in_a_list_names_the_recording_and_cancels_the_rest(narrow):
    with pytest.raises(AudioError, match=r"recording 2 \('nowhere.wav'\): 'nowhere.wav', which does not exist; expected a sound file"):
        narrow.transcribe([*FILES[:2], "nowhere.wav", *FILES * 5])
    assert eventually(lambda: is_idle(narrow))
    assert narrow._engine.counters().submitted < 10
    with pytest.raises(AudioError, match="recording 1: clip 0 has no samples") as caught:
        narrow.transcribe([FILES[0], torch.zeros(0)])
    assert isinstance(caught.value.__cause__, AudioError)
    assert narrow.transcribe(FILES[:3]) == TEXTS[:3]


def test_what_the_iterable_raises_comes_after_the_recordings_before_it(transcriber):
    def recordings():
        yield from FILES[:2]
        raise KeyError("no more")

    got = []
    with pytest.raises(KeyError, match="no more"):
        got.extend(one.text for one in transcriber.stream(recordings()))
    assert got == TEXTS[:2]
    with pytest.raises(TypeError, match="not iterable"):
        list(transcriber.stream(5))


def test_an_error_that_is_not_the_recordings_ends_the_stream(narrow, monkeypatch):
    read = Job.read

    def fails(job: Job, add: Callable) -> None:
        if job._recording == FILES[1]:
            raise MemoryError("too little")
        read(job, add)

    monkeypatch.setattr(Job, "read", fails)
    stream = narrow.stream(FILES)
    assert next(stream).text == TEXTS[0]
    with pytest.raises(MemoryError, match="too little"):
        next(stream)
    assert eventually(lambda: is_idle(narrow))


def test_warnings_of_a_list_name_the_recording_and_the_callers_line(transcriber):
    with pytest.warns(TruncatedAnswerWarning) as caught:
        transcriber.transcribe([FILES[0], load_audio(FILES[1])], max_new_tokens=1)
    first, second = (str(one.message) for one in caught)
    assert first.startswith(f"recording 0 ({str(FILES[0])!r}): the answer was cut off after 1 tokens")
    assert second.startswith("recording 1: the answer was cut off")
    assert {one.filename for one in caught} == {__file__}


def test_a_sound_file_that_was_never_closed_gives_a_warning_and_its_words(transcriber, tmp_path):
    samples = (load_audio(FILES[0]) * 32768).short().numpy().tobytes()
    content = bytearray(wav_header(data=samples, claimed=0))
    content[4:8] = bytes(4)
    (tmp_path / "killed.wav").write_bytes(content)
    with pytest.warns(AudioWarning, match="killed.wav' does not say how long it is") as caught:
        assert transcriber.transcribe(tmp_path / "killed.wav") == TEXTS[0]
    assert [one.filename for one in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        killed, whole = transcriber.stream([tmp_path / "killed.wav", FILES[1]])
    assert killed.text == TEXTS[0] and "does not say how long it is" in killed.audio_warning
    assert whole == Transcript(TEXTS[1])
    with pytest.warns(AudioWarning, match=r"recording 1 .*does not say how long it is"):
        transcriber.transcribe([FILES[0], tmp_path / "killed.wav"])


def test_an_answer_cut_off_by_the_engines_memory_says_so(transcriber, monkeypatch):
    prompt = transcriber.processor(transcript_request(transcriber.processor), load_audio(FILES[3]))["input_ids"].shape[1]
    pages = prompt // 16 + 1
    monkeypatch.setattr(module, "Engine", partial(Engine, max_pages=pages))
    monkeypatch.setattr(transcriber.model, "generation_config", {"eos_token_id": []})
    with Transcriber(transcriber.model, transcriber.processor) as small:
        tokens = 16 * pages - prompt + 1
        with pytest.warns(TruncatedAnswerWarning, match=f"after {tokens} tokens, where the engine's memory .* is full. Pass a small"):
            small.transcribe(FILES[3])
        with pytest.raises(InputError, match=f"at most {16 * pages}, which max_pages={pages} holds"):
            small.transcribe(FILES[9])


# --- how far the reader goes -------------------------------------------------------------------------------------------------------


def test_recordings_are_taken_one_by_one_and_only_so_far_ahead(narrow):
    recordings = Counted()
    stream = narrow.stream(recordings)
    assert recordings.taken == 0
    for done, text in enumerate(TEXTS, start=1):
        assert next(stream).text == text
        assert eventually(lambda done=done: recordings.taken == done + 4)
        time.sleep(0.02)
        assert recordings.taken == done + 4
    stream.close()


def test_long_recordings_are_not_read_as_far_ahead(narrow, monkeypatch):
    monkeypatch.setattr(read_ahead, "_SECONDS_AHEAD", 0.1)  # less than any of them
    recordings = Counted()
    stream = narrow.stream(recordings)
    for done in range(1, 4):
        assert next(stream).text == TEXTS[done - 1]
        assert eventually(lambda done=done: recordings.taken == done + 1)
        time.sleep(0.02)
        assert recordings.taken == done + 1
    stream.close()


def test_a_transcript_does_not_wait_for_the_next_recording(transcriber):
    allowed = threading.Event()

    def recordings():
        for file in FILES[:3]:
            yield file
            assert allowed.wait(60)
            allowed.clear()

    stream = transcriber.stream(recordings())
    for text in TEXTS[:3]:
        assert next(stream).text == text
        assert not allowed.is_set()
        allowed.set()
    assert next(stream, None) is None


def test_later_recordings_are_answered_while_the_first_transcript_is_looked_at(narrow):
    stream = narrow.stream(Counted())
    next(stream)
    assert eventually(lambda: narrow._engine.counters().finished == 5)
    stream.close()


# --- nobody waits any more -------------------------------------------------------------------------------------------------------------


def test_closing_a_stream_cancels_what_is_left(narrow, monkeypatch):
    monkeypatch.setattr(narrow.model, "generation_config", {"eos_token_id": []})  # answers that would take long
    monkeypatch.setattr(Repetition, "add", lambda repetition, token: False)
    recordings = Counted("nowhere.wav")
    stream = narrow.stream(recordings, max_new_tokens=1000)
    assert next(stream).error is not None
    assert eventually(lambda: narrow._engine.counters().submitted == 4)
    stream.close()
    assert eventually(lambda: is_idle(narrow), seconds=5)
    assert narrow._engine.counters().cancelled == 4
    time.sleep(0.05)
    assert recordings.taken == 5 and narrow._engine.counters().submitted == 4


def test_leaving_a_loop_closes_its_stream(narrow):
    recordings = Counted()
    for one in narrow.stream(recordings):
        assert one.text == TEXTS[0]
        break
    assert eventually(lambda: is_idle(narrow))
    taken = recordings.taken
    time.sleep(0.05)
    assert recordings.taken == taken <= 5


def test_closing_a_stream_does_not_wait_for_its_iterable(narrow):
    allowed = threading.Event()

    def recordings():
        yield FILES[0]
        allowed.wait(60)
        yield FILES[1]

    stream = narrow.stream(recordings())
    assert next(stream).text == TEXTS[0]
    begin = time.monotonic()
    stream.close()
    assert time.monotonic() - begin < 5
    submitted = narrow._engine.counters().submitted
    allowed.set()
    assert eventually(lambda: not any(one.name == "granite-speech-reader" for one in threading.enumerate()))
    assert narrow._engine.counters().submitted == submitted == 1, "what comes after the end is not submitted"


LEFT_EARLY = """
import itertools, sys, time
from granite_speech import Transcriber
from granite_speech.transcription.job import Job
read = Job.read
def slowly(job, add):
    read(job, add)
    time.sleep(0.3)
    print("read", flush=True)
Job.read = slowly
stream = Transcriber.from_pretrained("embedded").stream(itertools.repeat(sys.argv[1]))
print(next(stream).text, flush=True)
"""


def test_an_interpreter_that_ends_waits_for_the_recording_being_read_and_no_longer():
    begin = time.monotonic()
    command = [sys.executable, "-c", LEFT_EARLY, str(FILES[0])]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert TEXTS[0] in done.stdout and done.stdout.endswith("read\n") and done.stdout.count("read") < 20
    assert time.monotonic() - begin < 100
