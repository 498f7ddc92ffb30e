"""What goes wrong in an engine, and who is told: one caller, or all of them."""

import asyncio
import threading

import pytest
import torch

from granite_speech import Engine, GraniteSpeechForConditionalGeneration, GraniteSpeechProcessor
from granite_speech.engine import encoder_queue, worker
from granite_speech.engine.decode_rows import DecodeRows
from granite_speech.engine.worker import Worker
from granite_speech.errors import AudioError, EngineError, InputError
from tests.support.engine_requests import MODEL, TIMEOUT, Gate, answer, in_thread, is_at_rest, length, prompt, spoken_prompt
from tests.support.small_models import small_model


@pytest.fixture
def engine():
    engine = Engine(MODEL, None, max_rows=8, max_pages=64)
    yield engine
    in_thread(engine.close, True).result(TIMEOUT)


def fail_at(monkeypatch, owner, name, call, error):
    """Make one call of a function, and all later ones, raise."""
    function, calls = getattr(owner, name), []

    def call_or_raise(*given, **named):
        calls.append(given)
        if len(calls) >= call:
            raise error
        return function(*given, **named)

    monkeypatch.setattr(owner, name, call_or_raise)


# --- an error that ends the engine -----------------------------------------------------------------------------------------------

FATAL = {"decode": (DecodeRows, "step", 4), "rows": (DecodeRows, "join", 1), "turn": (Worker, "turn", 3), "arrival": (Worker, "add", 3)}


@pytest.mark.parametrize("place", FATAL)
def test_an_error_of_the_worker_reaches_every_handle(monkeypatch, place):
    error = RuntimeError("the device is gone")
    started = threading.Event()  # the worker waits until everybody has asked
    turn = Worker.turn
    monkeypatch.setattr(Worker, "turn", lambda self: (started.wait(TIMEOUT), turn(self)))
    fail_at(monkeypatch, *FATAL[place], error)

    async def iterate(handle):
        return [token async for token in handle]

    async def use(handle):
        return await handle

    uses = [lambda one: one.result(TIMEOUT), list, lambda one: asyncio.run(iterate(one)), lambda one: asyncio.run(use(one))]
    engine = Engine(MODEL, None, max_rows=3, max_pages=64)
    handles = [engine.submit(inputs=prompt(seed), **length(20)) for seed in range(len(uses))]
    results = [in_thread(use, one) for use, one in zip(uses, handles, strict=True)]
    started.set()
    assert [one.exception(TIMEOUT) for one in results] == [error] * len(uses)
    later = [in_thread(use, one) for use, one in zip(uses, handles, strict=True)]
    assert [one.exception(TIMEOUT) for one in later] == [error] * len(uses)
    assert [one.cancel() for one in handles] == [False] * len(uses)
    for call in (lambda: engine.submit(inputs=prompt(1)), engine.warmup):
        with pytest.raises(EngineError, match=r"the device is gone.*Make a new Engine") as raised:
            call()
        assert raised.value.__cause__ is error
    in_thread(engine.close).result(TIMEOUT)


def test_leaving_the_block_of_a_failed_engine(monkeypatch):
    fail_at(monkeypatch, DecodeRows, "step", 2, MemoryError("no memory"))

    def use():
        with pytest.raises(MemoryError), Engine(MODEL, None, max_rows=2, max_pages=16) as engine:
            engine.submit(inputs=prompt(1), **length(5)).result(TIMEOUT)

    in_thread(use).result(TIMEOUT)


def test_a_model_that_was_moved():
    model = small_model()
    with Engine(model, None, max_rows=2, max_pages=16) as engine:
        model.double()
        with pytest.raises(EngineError, match=r"float64.*Close the engine before the model changes"):
            engine.submit(inputs=prompt(1)).result(TIMEOUT)


# --- an error of one request -----------------------------------------------------------------------------------------------------


def submit_together(engine, requests, **options):
    """Have the engine take all these requests before the same turn, after a request that finishes."""
    with Gate(Worker, "turn") as gate:
        engine.submit(inputs=prompt(99), **length(1))
        gate.wait()
        return [engine.submit(inputs=one, **options) for one in requests]


def test_an_error_in_the_encoder_reaches_one_request_of_a_pack(monkeypatch, engine):
    encode, packs = encoder_queue.encode, []

    def encode_or_raise(model, graphs, frames, clips):
        packs.append(clips.lengths)
        if 37 in clips.lengths:
            raise RuntimeError("this clip is broken")
        return encode(model, graphs, frames, clips)

    monkeypatch.setattr(encoder_queue, "encode", encode_or_raise)
    requests = [spoken_prompt(seed, frames) for seed, frames in enumerate((50, 37, 23))]
    handles = submit_together(engine, requests, **length(5))
    with pytest.raises(RuntimeError, match="this clip is broken"):
        handles[1].result(TIMEOUT)
    for place in (0, 2):
        assert handles[place].result(TIMEOUT).token_ids == answer(requests[place], **length(5))
    assert packs == [(23, 37, 50), (23,), (37,), (50,)]
    assert (engine.counters().failed, engine.counters().finished) == (1, 3)
    assert is_at_rest(engine)


def test_an_error_in_a_long_clip(monkeypatch, engine):
    engine._loop.worker._encoder._frames = 100
    blocks = MODEL.encoder.blocks

    def raise_after_one(frames, clips):
        yield next(blocks(frames, clips))
        raise RuntimeError("this clip is broken")

    requests = [spoken_prompt(seed, 300) for seed in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(MODEL.encoder, "blocks", raise_after_one)
        handle, other = engine.submit(inputs=requests[0], **length(5)), engine.submit(inputs=prompt(1), **length(5))
        with pytest.raises(RuntimeError, match="this clip is broken"):
            handle.result(TIMEOUT)
    assert other.result(TIMEOUT).token_ids == answer(prompt(1), **length(5))
    assert engine.submit(inputs=requests[1], **length(5)).result(TIMEOUT).token_ids == answer(requests[1], **length(5))
    assert is_at_rest(engine)


def test_an_error_in_a_prefill_reaches_one_request(monkeypatch, engine):
    """The prompts have their first 32 tokens in common, and wait for the one that computes them and fails."""
    prefill = worker.prefill_piece

    def prefill_or_raise(model, graphs, pool, tokens):
        if 89 in tokens.ids:
            raise RuntimeError("this prompt is broken")
        prefill(model, graphs, pool, tokens)

    monkeypatch.setattr(worker, "prefill_piece", prefill_or_raise)
    common = prompt(1, tokens=40)["input_ids"] % 80
    requests = [{"input_ids": torch.cat((common, torch.tensor([[middle, 7]])), 1)} for middle in (89, 5, 6)] + [prompt(3)]
    handles = submit_together(engine, requests, **length(5))
    with pytest.raises(RuntimeError, match="this prompt is broken"):
        handles[0].result(TIMEOUT)
    for handle, inputs in list(zip(handles, requests, strict=True))[1:]:
        assert handle.result(TIMEOUT).token_ids == answer(inputs, **length(5))
    assert engine.counters().failed == 1
    assert is_at_rest(engine)


# --- arguments that are refused --------------------------------------------------------------------------------------------------

IDS = torch.ones(1, 5, dtype=torch.int64)
REFUSED = {
    "unknown option": ({"text": "one", "colour": 3}, InputError, r"unknown options colour.*Remove"),
    "beams": ({"text": "one", "num_beams": 2}, InputError, r"num_beams=2.*Call model.generate"),
    "several answers": ({"text": "one", "seed": 1, "num_return_sequences": 2}, InputError, r"num_return_sequences=2.*Call model.generate"),
    "scores": ({"text": "one", "output_scores": True}, InputError, r"output_scores=True.*Call model.generate"),
    "long prompt": ({"inputs": {"input_ids": IDS.expand(1, 5).repeat(1, 30)}}, InputError, r"150 tokens; expected at most 128.*more pages"),
    "seed": ({"text": "one", "seed": "four"}, InputError, r"seed='four'.*Pass an integer"),
    "temperature": ({"text": "one", "temperature": -1.0}, InputError, r"temperature=-1.0.*Change or remove"),
    "stop": ({"text": "one", "stop": ""}, InputError, r"stop_strings=''.*Change or remove"),
    "max_new_tokens": ({"text": "one", "max_new_tokens": -1}, InputError, r"max_new_tokens=-1.*Change or remove"),
    "NaN": ({"audio": torch.full((16000,), float("nan"))}, AudioError, r"NaN.*Load the recording again"),
    "no samples": ({"audio": torch.zeros(0)}, AudioError, r"no samples.*Load the recording again"),
    "no file": ({"audio": "nowhere.wav"}, AudioError, r"nowhere.wav.*Check the path"),
    "no sound": ({"audio": b"no sound"}, AudioError, r"does not decode.*convert it"),
    "placeholder alone": ({"text": "<|audio|>what?"}, InputError, r"1 placeholder.* for 0 clip.*Pass the clips"),
    "no placeholder": ({"text": "what?", "audio": torch.zeros(16000)}, AudioError, r"0 placeholder.* for 1 clip.*Put <\|audio\|> into"),
    "nothing": ({}, InputError, r"neither text nor audio.*Pass text, audio or both"),
    "two texts": ({"text": ["one", "two"]}, InputError, r"\(2, 3\).*Submit each prompt on its own"),
    "two prompts": ({"inputs": {"input_ids": IDS.expand(2, 5)}}, InputError, r"\(2, 5\).*Submit each prompt on its own"),
    "inputs and text": ({"inputs": {"input_ids": IDS}, "text": "one"}, InputError, r"inputs together with text.*alone"),
    "no ids": ({"inputs": {}}, InputError, r"input_ids None.*Submit each prompt"),
    "ids of floats": ({"inputs": {"input_ids": IDS.float()}}, InputError, r"float32.*Use what the processor returned"),
    "token id": ({"inputs": {"input_ids": IDS * 100_000}}, InputError, r"token id 100000.*Use the processor"),
    "empty prompt": ({"inputs": {"input_ids": IDS[:, :0]}}, InputError, r"an empty prompt.*Give the model a text"),
    "mask": ({"inputs": {"input_ids": IDS, "attention_mask": IDS[:, 1:]}}, InputError, r"attention_mask of shape \(1, 4\).*or omit it"),
    "name": ({"inputs": {"input_ids": IDS, "position_ids": IDS}}, InputError, r"position_ids.*Pass what the processor returned"),
    "no mapping": ({"inputs": IDS}, InputError, r"inputs of type Tensor.*Pass what the processor returned"),
    "features alone": ({"inputs": {"input_ids": IDS, "input_features": torch.zeros(1, 9, 160)}}, InputError, "8 audio vectors.*Let the"),
    "features": ({"inputs": {"input_ids": IDS, "input_features": torch.zeros(1, 9, 3)}}, InputError, r"3 features.*Use the processor"),
}


@pytest.fixture(scope="module")
def speaking():
    """An engine of the bundled checkpoint, with room for 128 tokens."""
    model, processor = (one.from_pretrained("embedded") for one in (GraniteSpeechForConditionalGeneration, GraniteSpeechProcessor))
    engine = Engine(model.eval(), processor, max_rows=2, max_pages=8)
    yield engine
    in_thread(engine.close, True).result(TIMEOUT)


@pytest.mark.parametrize("what", REFUSED)
def test_arguments_that_submit_refuses(speaking, what):
    arguments, error, message = REFUSED[what]
    submitted = speaking.counters().submitted
    with pytest.raises(error, match=message):
        speaking.submit(**arguments)
    assert speaking.counters().submitted == submitted
    assert speaking.submit("one", **length(2)).result(TIMEOUT).finish_reason == "length"


@pytest.mark.parametrize("sizes", [{"max_rows": 0}, {"max_pages": 0}, {"max_rows": 2.5}, {"max_pages": True}], ids=str)
def test_sizes_that_are_refused(sizes):
    [(name, size)] = sizes.items()
    with pytest.raises(InputError, match=rf"{name}={size}; expected an integer from 1\. Omit it for the default"):
        Engine(MODEL, None, **sizes)


def test_a_model_in_training_mode():
    with pytest.raises(InputError, match=r"training mode.*Call model\.eval\(\) first"):
        Engine(small_model().train(), None)


@pytest.mark.parametrize("arguments", [{"text": "one"}, {"audio": torch.zeros(16000)}, {"inputs": prompt(1), "stop": "."}], ids=list)
def test_an_engine_without_a_processor_takes_inputs_alone(engine, arguments):
    with pytest.raises(InputError, match=r"engine without a processor.*Make the engine with a processor"):
        engine.submit(**arguments)
    given = engine.submit(inputs=prompt(1), **length(3)).result(TIMEOUT)
    assert (given.text, given.token_ids) == ("", answer(prompt(1), **length(3)))
