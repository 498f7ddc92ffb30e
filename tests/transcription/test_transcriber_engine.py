"""The engine in a `Transcriber`: one for all threads, made when it is needed, and again when it cannot be used."""

import copy
import gc
import os
import pickle
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from granite_speech import Engine, EngineError, InputError, Transcriber
from granite_speech.engine.handle import Handle
from granite_speech.engine.requests import Repetition
from granite_speech.engine.worker import Worker
from granite_speech.transcription import transcriber as module
from tests.support.spoken import SPEECH, load, sentences

SPOKEN = sentences()
FILES = [SPEECH / one.audio for one in SPOKEN]
TEXTS = [one.text for one in SPOKEN]


@pytest.fixture(scope="module")
def loaded():
    return load()


@pytest.fixture
def transcriber(loaded) -> Iterator[Transcriber]:
    transcriber = Transcriber(*loaded)
    yield transcriber
    transcriber.close(cancel=True)


@pytest.fixture
def made(monkeypatch) -> list[Engine]:
    """The engines that transcribers make."""
    made = []

    def make(*arguments) -> Engine:
        made.append(Engine(*arguments))
        return made[-1]

    monkeypatch.setattr(module, "Engine", make)
    return made


@pytest.fixture
def slow(transcriber, monkeypatch):
    """Answers of 100,000 tokens."""
    monkeypatch.setattr(Repetition, "add", lambda repetition, token: False)
    monkeypatch.setattr(transcriber.model, "generation_config", {"eos_token_id": []})
    monkeypatch.setattr(transcriber.model.config.text_config, "max_position_embeddings", 1 << 20)


def engine_threads() -> int:
    gc.collect()
    return sum(one.name == "granite-speech-engine" for one in threading.enumerate())


def wait_until_decoding(transcriber: Transcriber) -> None:
    end = time.monotonic() + 60
    while transcriber._engine is None or not transcriber._engine.counters().decoding:
        assert time.monotonic() < end
        time.sleep(0.005)


def test_threads_share_one_engine_and_get_their_own_words(transcriber, made):
    assert not made, "made when the first recording comes"
    begin = threading.Barrier(8)

    def work(number: int) -> list[str]:
        begin.wait()
        files = FILES[number:] + FILES[:number]
        return transcriber.transcribe(files) if number % 2 else [transcriber.transcribe(one) for one in files[:4]]

    with ThreadPoolExecutor(8) as threads:
        for number, got in enumerate(threads.map(work, range(8))):
            assert got == (TEXTS[number:] + TEXTS[:number])[: len(got)]
    assert len(made) == 1


def test_closing_frees_the_thread_and_the_next_call_makes_a_new_engine(transcriber, made):
    others = engine_threads()
    assert transcriber.transcribe(FILES[0]) == TEXTS[0]
    assert engine_threads() == others + 1
    transcriber.close()
    transcriber.close()
    assert engine_threads() == others
    assert transcriber.transcribe(FILES[:2]) == TEXTS[:2]
    made[-1].close()  # not through the transcriber
    assert transcriber.transcribe(FILES[0]) == TEXTS[0]
    assert len(made) == 3


def test_a_stream_survives_a_new_engine(transcriber):
    stream = transcriber.stream(FILES)
    got = [next(stream).text for _ in range(2)]
    transcriber.close()  # finishes what was submitted
    assert got + [one.text for one in stream] == TEXTS


def test_closing_finishes_what_others_wait_for_unless_told_to_cancel(transcriber, slow):
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(transcriber.transcribe, FILES[0], max_new_tokens=60)
        wait_until_decoding(transcriber)
        transcriber.close()
        assert waiting.done() or waiting.result(5)
        waiting = threads.submit(transcriber.transcribe, FILES[0], max_new_tokens=100_000)
        wait_until_decoding(transcriber)
        transcriber.close(cancel=True)
        with pytest.raises(EngineError, match=r"cancelled after \d+ tokens, because its transcriber was closed"):
            waiting.result(60)


def test_leaving_the_with_block_by_an_error_cancels(loaded, monkeypatch):
    closed = []
    monkeypatch.setattr(Engine, "close", lambda engine, cancel: closed.append(cancel))
    with Transcriber(*loaded) as transcriber:
        transcriber.transcribe(FILES[0])
    with pytest.raises(KeyError), Transcriber(*loaded) as transcriber:
        transcriber.transcribe(FILES[0])
        raise KeyError
    assert closed == [False, True]


def test_a_transcriber_that_nobody_holds_ends_its_thread(loaded):
    others = engine_threads()
    transcriber = Transcriber(*loaded)
    transcriber.transcribe(FILES[0])
    assert engine_threads() == others + 1
    del transcriber
    assert engine_threads() == others


def test_an_engine_that_failed_is_replaced(transcriber, made, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(Worker, "turn", lambda worker: 1 / 0)
        with pytest.raises(EngineError, match=r"no answer .ZeroDivisionError") as caught:
            transcriber.transcribe(FILES[0])
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
        assert len(made) == 2, "another try, with a new engine"
    assert transcriber.transcribe(FILES[0]) == TEXTS[0]
    assert len(made) == 3


def test_a_model_that_changes_gets_a_new_engine(transcriber, made):
    assert transcriber.transcribe(FILES[0]) == TEXTS[0]
    transcriber.model = copy.deepcopy(transcriber.model)
    assert transcriber.transcribe(FILES[0]) == TEXTS[0]
    transcriber.model.to(torch.float64)
    assert transcriber.transcribe(FILES[0]) == TEXTS[0]
    assert len(made) == 3
    transcriber.model.train()
    for transcribe in (transcriber.transcribe, lambda file: list(transcriber.stream([file]))):
        with pytest.raises(InputError, match=r"training mode.*Call model.eval\(\) first"):
            transcribe(FILES[0])
    transcriber.model.eval()
    assert transcriber.transcribe(FILES[0]) == TEXTS[0]


def test_an_interrupted_wait_cancels_its_request(transcriber, slow, monkeypatch):
    def interrupted(handle: Handle) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Handle, "result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        transcriber.transcribe(FILES[0], max_new_tokens=100_000)
    end = time.monotonic() + 60
    while transcriber._engine.counters().cancelled == 0 and time.monotonic() < end:
        time.sleep(0.005)
    assert transcriber._engine.counters().cancelled == 1


@pytest.mark.parametrize(
    "again", [copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))], ids=["copy", "deepcopy", "pickle"]
)
def test_a_copy_has_the_model_and_an_engine_of_its_own(transcriber, made, again):
    transcriber.transcribe(FILES[0])
    other = again(transcriber)
    assert len(made) == 1
    with other:
        assert other.transcribe(FILES[:3]) == TEXTS[:3]
    assert len(made) == 2
    assert transcriber.transcribe(FILES[0]) == TEXTS[0]
    assert len(made) == 2


def test_after_a_fork_both_processes_transcribe(transcriber):
    stream = transcriber.stream(FILES)
    assert next(stream).text == TEXTS[0]
    reading, writing = os.pipe()
    transcriber._lock.acquire()  # as if another thread were making an engine
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(60)
            with pytest.raises(EngineError, match="forked"):
                next(stream)  # its threads are the parent's
            stream.close()
            transcriber.close()  # does nothing: the engine is the parent's
            os.write(writing, "\n".join(transcriber.transcribe(FILES[:2])).encode())
            transcriber.close()
            status = 0
        finally:
            os._exit(status)
    transcriber._lock.release()
    os.close(writing)
    with os.fdopen(reading) as pipe:
        assert pipe.read().splitlines() == TEXTS[:2]
    assert os.waitpid(child, 0)[1] == 0
    assert [one.text for one in stream] == TEXTS[1:]
    assert transcriber.transcribe(FILES[0]) == TEXTS[0]
