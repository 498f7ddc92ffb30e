"""`CTCEngine`: what a recording gets does not depend on the others, and nobody waits for ever."""

import asyncio
import gc
import math
import os
import threading
import wave
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from granite_speech.engine import ctc_worker, runtime
from granite_speech.engine.ctc_engine import CTCEngine
from granite_speech.engine.ctc_worker import CTCWorker
from granite_speech.errors import AudioError, EngineError, InputError
from granite_speech.inputs.ctc_processor import GraniteSpeech5Processor
from granite_speech.model_ctc import GraniteSpeech5ForCTC
from tests.support.ctc_speech import TONES, sound

SENTENCES = (["one", "two"], ["four"], ["three", "three", 1.0, "two"], ["two", "four", "one", "three", "four"])


@pytest.fixture(scope="module")
def model() -> GraniteSpeech5ForCTC:
    return GraniteSpeech5ForCTC.from_pretrained(TONES, dtype="float32")


@pytest.fixture(scope="module")
def processor() -> GraniteSpeech5Processor:
    return GraniteSpeech5Processor.from_pretrained(TONES)


@pytest.fixture
def engine(model, processor) -> Iterator[CTCEngine]:
    engine = CTCEngine(model, processor)
    yield engine
    engine.close(cancel=True)


@pytest.fixture
def held(monkeypatch) -> Iterator[threading.Event]:
    """Turns wait until this is set."""
    go, turn = threading.Event(), CTCWorker.turn
    monkeypatch.setattr(CTCWorker, "turn", lambda worker: (go.wait(30), turn(worker)))
    yield go
    go.set()


def text_of(words: list) -> str:
    return " ".join(word for word in words if isinstance(word, str))


def test_the_answer_says_what_was_heard_when_and_how_surely(engine):
    words = SENTENCES[2]
    samples, times = sound(words)
    answer = engine.submit(samples).result(60)
    assert (answer.text, answer.finish_reason) == (text_of(words), "stop")
    assert answer.token_ids == engine.processor.tokenizer.encode(text_of(words), add_special_tokens=False)
    for (first, last), logprob in zip(answer.frames, answer.logprobs, strict=True):
        assert logprob == pytest.approx(float(answer.frame_logprobs[first : last + 1].max())) and math.log(0.8) < logprob <= 0
    begins = [first * 0.08 for first, _ in answer.frames][:2]
    assert all(begin - 0.1 < found < end for found, (begin, end) in zip(begins, times, strict=False))
    assert len(answer.frame_logprobs) == engine.processor.feature_extractor.count_frames(len(samples)).output


def test_inputs_of_the_processor_files_and_bytes_give_the_same(engine, tmp_path):
    samples, _ = sound(SENTENCES[3])
    path = tmp_path / "tones.wav"
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes((samples * 32767).round().to(torch.int16).numpy().tobytes())
    padded = engine.processor([samples, torch.zeros(2 * len(samples))])
    first = {name: value[:1] for name, value in padded.items()}
    answers = [engine.submit(one).result(60) for one in (samples, str(path), path.read_bytes())]
    answers.append(engine.submit(inputs=first).result(60))
    assert {one.text for one in answers} == {text_of(SENTENCES[3])}
    assert answers[-1].logprobs == pytest.approx(answers[0].logprobs, abs=1e-5)


@given(st.lists(st.integers(1, 400), min_size=1, max_size=9), st.sampled_from([1, 300, 5000]))
@settings(max_examples=15, deadline=None)
def test_any_recording_gets_what_it_gets_alone(model, frames, max_frames):
    rng = torch.Generator().manual_seed(sum(frames))
    features = [torch.randn(1, count, 96, generator=rng) for count in frames]
    with CTCEngine(model, None) as alone, CTCEngine(model, None, max_frames) as together:
        handles = [together.submit(inputs={"input_features": one}) for one in features]
        for one, handle in zip(features, handles, strict=True):
            expected, found = alone.submit(inputs={"input_features": one}).result(60), handle.result(60)
            assert (found.token_ids, found.frames) == (expected.token_ids, expected.frames)
            assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-5)


def test_waiting_recordings_run_together_up_to_a_number_of_frames(model, processor, held):
    with CTCEngine(model, processor, max_frames=120) as engine:
        handles = [engine.submit(inputs={"input_features": torch.zeros(1, count, 96)}) for count in (500, 50, 60, 20, 1)]
        held.set()
        assert all(one.result(60).finish_reason == "stop" for one in handles)
        found = engine.counters()
        # The first one may have begun before the others came.
        assert (found.steps, found.rows, found.finished, found.waiting, found.decoding) == (3, 5, 5, 0, 0)
        assert found.audio_seconds == pytest.approx(631 / 50)


def test_a_recording_too_short_for_a_frame_out_has_no_tokens_and_an_empty_one_is_refused(engine):
    short = engine.submit(torch.zeros(500)).result(60)
    assert (short.text, short.token_ids, short.frames) == ("", [], [])
    for samples in (torch.zeros(0), torch.zeros(159)):
        with pytest.raises(AudioError):
            engine.submit(samples)


def test_a_graph_for_each_bucket_gives_the_same(model, processor, monkeypatch):
    samples = [sound(words, seed)[0] for seed, words in enumerate(SENTENCES)]
    with CTCEngine(model, processor) as engine:
        expected = [engine.submit(one).result(60) for one in samples]
    monkeypatch.setattr(runtime, "_can_be_captured", lambda model: not model.training)
    monkeypatch.setattr(runtime, "_cuda_capture", lambda device: lambda function: function)
    with CTCEngine(model, processor) as engine:
        for _ in range(3):
            for one, answer in zip(samples, expected, strict=True):
                found = engine.submit(one).result(60)
                assert (found.token_ids, found.frames) == (answer.token_ids, answer.frames)
        assert len(engine._loop.worker._followed.graphs) == 1, "all fit 256 frames"


def test_a_gpu_has_its_next_work_before_its_last_is_read(model, processor, monkeypatch, held):
    events = []
    run, finish = CTCWorker._run, CTCWorker._finish
    monkeypatch.setattr(CTCWorker, "_run", lambda worker, pack: (events.append("run"), run(worker, pack))[1])
    monkeypatch.setattr(CTCWorker, "_finish", lambda worker, done: (events.append("read"), finish(worker, done))[1])
    monkeypatch.setattr(CTCWorker, "_reads_at_once", property(lambda worker: False))
    with CTCEngine(model, processor, max_frames=1) as engine:
        handles = [engine.submit(sound(words)[0]) for words in SENTENCES[:3]]
        held.set()
        assert [one.result(60).text for one in handles] == [text_of(words) for words in SENTENCES[:3]]
    assert events == ["run", "run", "read", "run", "read", "read"]


# --- ends ----------------------------------------------------------------------------------------------------------------------------


def test_closing_finishes_what_there_is_or_cancels_it(model, processor, held):
    engine = CTCEngine(model, processor)
    handle = engine.submit(sound(["one"])[0])
    held.set()
    engine.close()
    engine.close()
    assert handle.result(0).text == "one"
    with pytest.raises(EngineError, match="closed engine"):
        engine.submit(sound(["one"])[0])
    held.clear()
    engine = CTCEngine(model, processor, max_frames=1)
    handles = [engine.submit(sound(["one"])[0]) for _ in range(5)]
    threading.Timer(0.2, held.set).start()
    engine.close(cancel=True)
    assert all(one.done for one in handles) and handles[-1].result(0).finish_reason == "cancelled"
    assert engine.counters().cancelled + engine.counters().finished == 5


def test_a_cancelled_recording_leaves_the_others(model, processor, held):
    with CTCEngine(model, processor, max_frames=1) as engine:
        handles = [engine.submit(sound(words)[0]) for words in SENTENCES]
        assert handles[2].cancel()
        held.set()
        reasons = [one.result(60).finish_reason for one in handles]
        assert reasons == ["stop", "stop", "cancelled", "stop"] and not handles[2].cancel()
        assert handles[3].result(0).text == text_of(SENTENCES[3])


def test_a_task_that_is_cancelled_cancels_its_recording(model, processor, held):
    async def main(engine: CTCEngine) -> str:
        first, second = engine.submit(sound(["one"])[0]), engine.submit(sound(["two"])[0])
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(second, 0.05)
        held.set()
        assert (await first).text == "one"
        return (await second).finish_reason

    with CTCEngine(model, processor, max_frames=1) as engine:
        assert asyncio.run(main(engine)) == "cancelled"


@pytest.mark.parametrize("place", ["decode", "Reading"])
def test_an_error_of_the_model_reaches_everybody(model, processor, monkeypatch, place):
    with CTCEngine(model, processor) as engine:
        monkeypatch.setattr(ctc_worker, place, lambda *arguments: 1 / 0)
        handle = engine.submit(sound(["one"])[0])
        with pytest.raises(ZeroDivisionError):
            handle.result(60)
        with pytest.raises(EngineError, match="worker failed with ZeroDivisionError"):
            engine.submit(sound(["one"])[0])


def test_nan_is_an_error_of_its_recording_alone(engine):
    wrong = torch.zeros(1, 200, 96)
    wrong[0, 150] = math.nan
    handles = [engine.submit(inputs={"input_features": wrong}), engine.submit(sound(["two"])[0])]
    with pytest.raises(EngineError, match="NaN, from a model in float32"):
        handles[0].result(60)
    assert handles[1].result(60).text == "two" and engine.counters().failed == 1


def test_an_engine_that_nobody_holds_ends_its_thread(model, processor):
    engine = CTCEngine(model, processor)
    thread, handle = engine._loop._thread, engine.submit(sound(["one"])[0])
    del engine
    assert handle.result(60).text == "one"
    del handle
    gc.collect()
    thread.join(30)
    assert not thread.is_alive()


def test_a_forked_process_is_told(engine):
    handle = engine.submit(sound(["one"])[0])
    handle.result(60)
    child = os.fork()
    if not child:
        errors = 0
        for call in (lambda: engine.submit(torch.zeros(16000)), handle.result, engine.close):
            try:
                call()
            except EngineError:
                errors += 1
        os._exit(errors)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3


def test_a_model_that_changes_its_dtype_is_refused(processor):
    model = GraniteSpeech5ForCTC.from_pretrained(TONES, dtype="float32")
    with CTCEngine(model, processor) as engine:
        assert engine.submit(sound(["one"])[0]).result(60).text == "one"
        model.bfloat16()
        with pytest.raises(EngineError, match=r"become torch\.bfloat16"):
            engine.submit(sound(["one"])[0]).result(60)


@pytest.mark.parametrize(
    "call, match",
    [
        ({}, "no audio"),
        ({"audio": torch.zeros(16000), "inputs": {}}, "inputs together with audio"),
        ({"inputs": {"attention_mask": torch.ones(1, 5)}}, "inputs with attention_mask"),
        ({"inputs": {"input_features": torch.zeros(1, 5, 96), "labels": torch.zeros(1, 2)}}, "labels"),
        ({"inputs": {"input_features": torch.zeros(2, 5, 96)}}, "2 clips"),
        ({"inputs": {"input_features": torch.zeros(1, 5, 95)}}, r"\(1, 5, 95\)"),
    ],
)
def test_what_is_no_recording_is_refused(engine, call, match):
    with pytest.raises(InputError, match=match):
        engine.submit(**call)


def test_an_engine_needs_a_model_in_evaluation_mode_and_a_size(model, processor):
    for size in (0, True, 1.5, "many"):
        with pytest.raises(InputError, match="max_frames="):
            CTCEngine(model, processor, size)
    with CTCEngine(model, None) as engine, pytest.raises(InputError, match="without a processor"):
        engine.submit(torch.zeros(16000))
    training = GraniteSpeech5ForCTC.from_pretrained(TONES).train()
    with pytest.raises(InputError, match="training mode"):
        CTCEngine(training, processor)
