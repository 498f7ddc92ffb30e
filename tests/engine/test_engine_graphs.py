"""An engine on a device that captures graphs and reads tokens one step late, as a GPU does."""

import random
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from granite_kernels.op import CHOICE

from bench.stand_in_gpu import StandInGPU
from granite_speech import Engine
from granite_speech.engine import runtime
from granite_speech.engine.decoding import StepKey
from granite_speech.engine.encoding import EncoderBucket
from granite_speech.engine.prefill import PromptBucket
from granite_speech.engine.worker import Worker
from tests.support.fake_graph import FakeCapture
from tests.support.random_requests import RandomRequest, assert_as_generate, assert_own_logprobs, paused, random_request
from tests.support.small_models import attentive, batch, small_model

PLAIN = attentive(small_model())


def captured_kinds(engine):
    graphs = engine._loop.worker._runtime
    return {type(key) for one in (graphs.encoder_graphs, graphs.decoder_graphs) for key in list(one.keys())}


@pytest.mark.parametrize(("seed", "max_pages", "captures"), [(0, 400, True), (1, 14, True), (2, 400, False), (3, 14, False)])
def test_tokens_read_one_step_late_are_those_of_generate(monkeypatch, seed, max_pages, captures):
    model = attentive(small_model())
    if captures:
        monkeypatch.setattr(runtime, "_can_be_captured", lambda model: not model.training)
        model.runtime.make_capture = lambda device: lambda function: function
    dice = random.Random(seed)
    requests = [random_request(500 * seed + number, model, sample=number % 5 == 0) for number in range(60)]
    with Engine(model, None, max_rows=12, max_pages=max_pages) as engine, Engine(PLAIN, None, max_pages=400) as plain:
        engine._loop.worker._rows._ahead = 1
        with paused(engine):
            handles = [engine.submit(inputs=one.inputs, **one.options) for one in requests]
        for handle in dice.sample(handles, 10):
            handle.cancel()
        answers = [handle.result(60) for handle in handles]
        counters = engine.counters()
        assert counters.pages_used == 0
        if captures:
            assert captured_kinds(engine) == {StepKey, PromptBucket, EncoderBucket}
            assert counters.seconds["capture"] > 0
        for request, answer in zip(requests, answers, strict=True):
            if "seed" not in request.options:
                assert_as_generate(PLAIN, request, answer)
            else:
                drawn = plain.submit(inputs=request.inputs, **request.options).result(60).token_ids
                assert answer.token_ids == drawn[: len(answer.token_ids)]
                assert_own_logprobs(PLAIN, request.inputs, answer)


def ends_with(request, tokens, _):
    return len(request.tokens) == tokens


@torch.no_grad()
def test_a_row_without_an_answer_is_not_active_on_the_device(monkeypatch):
    """It would go on writing to pages that belong to another answer. Answers end in every way here."""
    monkeypatch.setattr(runtime, "_can_be_captured", lambda model: not model.training)
    model, dice = attentive(small_model()), random.Random(0)
    model.runtime.make_capture = lambda device: lambda function: function
    worker = Worker(model, 8, 200)
    worker._rows._ahead = 1
    requests = [random_request(number, model).for_worker(model) for number in range(60)]
    for number, one in enumerate(requests):
        if number % 3 == 0:  # ends after a few tokens as a stop string would end it, which only the host knows
            one.repetition = SimpleNamespace(add=partial(ends_with, one, dice.randint(1, 6)))
        worker.add(one)
    while worker.busy:
        if dice.random() < 0.2:
            worker.cancel(dice.choice(worker.requests()))
        worker.turn()
        rows = worker._rows
        free = [place for place, one in enumerate(rows.requests) if one is None]
        assert not rows.state.active[free].any()
    assert {one.handle.result(0).finish_reason for one in requests} == {"stop", "length", "repeated", "cancelled"}


def test_replayed_steps_depend_on_nothing_that_the_host_computes(monkeypatch):
    """Under the strict stand-in for CUDA graphs, with the Triton kernels. It captures while answers are in progress."""
    monkeypatch.setenv(CHOICE, "triton")
    model, capture = attentive(small_model()), FakeCapture()
    model.runtime.make_capture = lambda device: capture
    # One short prompt with a clip and one without, so that few shapes are captured: the interpreter is slow.
    requests = [replace(random_request(number, model), options={"max_new_tokens": 6, "eos_token_id": []}) for number in (0, 11)]
    with Engine(model, None, max_rows=2, max_pages=60) as engine:
        for _ in range(2):
            handles = [engine.submit(inputs=one.inputs, **one.options) for one in requests]
            answers = [handle.result(120) for handle in handles]
        assert capture.replays >= 5
    monkeypatch.setenv(CHOICE, "torch")
    for request, answer in zip(requests, answers, strict=True):
        if "seed" not in request.options:
            assert_as_generate(PLAIN, request, answer)


def test_warmup_captures_the_step_for_every_number_of_rows(monkeypatch):
    monkeypatch.setattr(runtime, "_can_be_captured", lambda model: not model.training)
    model = small_model()
    model.runtime.make_capture = lambda device: lambda function: function
    with Engine(model, None, max_rows=8) as engine:
        engine.warmup()
        keys = engine._loop.worker._runtime.decoder_graphs.keys()
        assert {key.rows for key in keys if isinstance(key, StepKey)} == {1, 2, 4, 8}


def test_a_turn_waits_for_a_gpu_only_for_tokens():
    plain = batch(PLAIN)
    width = plain["input_ids"].shape[1]
    rows = [
        {"input_ids": plain["input_ids"][row : row + 1, width - int(plain["attention_mask"][row].sum()) :]} | clip
        for row, clip in enumerate(
            [{"input_features": plain["input_features"][row : row + 1, :frames]} for row, frames in enumerate((50, 23))] + [{}]
        )
    ]
    options = {"max_new_tokens": 6, "eos_token_id": [], "repetition_penalty": 1.3}
    expected = [PLAIN.generate(**one, **options)[0, one["input_ids"].shape[1] :].tolist() for one in rows]
    with StandInGPU() as gpu, torch.no_grad():
        model = gpu.move(attentive(small_model()))
        worker, requests = Worker(model, 4, 40), []
        for inputs in rows:
            on_gpu = {name: one if name == "input_ids" else gpu.move(one) for name, one in inputs.items()}
            requests.append(RandomRequest(on_gpu, options).for_worker(model))
            worker.add(requests[-1])
        gpu.waits.clear()
        while worker.busy:
            worker.turn()
        assert gpu.waits == []
    assert [one.handle.result(0).token_ids for one in requests] == expected
