"""An engine's log-probabilities of the encoder's CTC head: those of the clips alone, whatever else is encoded with them."""

from typing import Any

import pytest
import torch
from granite_kernels.op import CHOICE
from torch import Tensor

from bench.embedded import recorded_clips
from granite_speech import Engine, GraniteSpeechForConditionalGeneration
from granite_speech.engine import runtime
from granite_speech.engine.decode_rows import DecodeRows
from granite_speech.engine.handle import Answer
from tests.support.engine_requests import TIMEOUT, Gate, length, prompt, spoken_prompt
from tests.support.random_requests import paused, random_request
from tests.support.small_models import small_model
from tests.support.spoken import load

MODEL = small_model()


@torch.no_grad()
def expected(model: Any, inputs: dict[str, Any]) -> Tensor:
    """Of each clip alone, end to end."""
    features = inputs["input_features"]
    lengths = inputs.get("input_features_lengths", [features.shape[1]] * len(features))
    alone = [model.encoder(clip[None, :frames], output_hidden_states=True) for clip, frames in zip(features, lengths, strict=True)]
    return model.encoder.out(torch.cat([one.hidden_states[-1][0] for one in alone])).log_softmax(-1)


def check(model: Any, inputs: dict[str, Any], answer: Answer) -> None:
    assert answer.ctc_logprobs.dtype == torch.float32 and answer.ctc_logprobs.device.type == "cpu"
    torch.testing.assert_close(answer.ctc_logprobs, expected(model, inputs), rtol=0, atol=1e-5)


def answers(engine: Engine, requests: list[tuple[dict[str, Any], bool]], **options: Any) -> list[Answer]:
    """To requests with and without ctc, which come at once."""
    with paused(engine):
        handles = [engine.submit(inputs=inputs, ctc=asked, **(options or length(3))) for inputs, asked in requests]
    return [one.result(TIMEOUT) for one in handles]


@pytest.mark.parametrize("captures", [False, True], ids=["eager", "captured"])
def test_requests_encoded_together_have_their_own(monkeypatch, captures):
    model = small_model()
    if captures:
        monkeypatch.setattr(runtime, "_can_be_captured", lambda model: not model.training)
        model.runtime.make_capture = lambda device: lambda function: function
    requests = [(spoken_prompt(number, 20 + 13 * number), number % 3 != 1) for number in range(9)] + [(prompt(9), True)]
    some = [random_request(seed, model).inputs for seed in range(30)]
    requests.append((next(one for one in some if len(one.get("input_features_lengths", ())) == 2), True))
    with Engine(model, None) as engine:
        for _ in range(3 if captures else 1):
            found = answers(engine, requests)
        assert bool(len(engine._loop.worker._runtime.encoder_graphs)) == captures
    for (inputs, asked), answer in zip(requests, found, strict=True):
        if asked and "input_features" in inputs:
            check(MODEL, inputs, answer)
        else:
            assert answer.ctc_logprobs is None, "not asked for, or no audio"


@pytest.mark.parametrize("hooked", [False, True], ids=["packed", "with hooks"])
def test_a_clip_encoded_a_few_blocks_at_a_time(monkeypatch, hooked):
    monkeypatch.setattr("granite_speech.engine.encoder_queue._FRAMES", {"cpu": 64, "cuda": 64})
    model = small_model()
    if hooked:
        model.encoder.layers[0].register_forward_hook(lambda *given: None)
    requests = [(spoken_prompt(1, 300), True), (spoken_prompt(2, 30), True), (spoken_prompt(3, 301), False), (spoken_prompt(4, 200), True)]
    with Engine(model, None) as engine:
        found = answers(engine, requests)
    assert found[2].ctc_logprobs is None
    for (inputs, asked), answer in zip(requests, found, strict=True):
        if asked:
            check(MODEL, inputs, answer)


@pytest.mark.parametrize("frames", [40, 2000], ids=["short", "long"])
def test_layers_that_are_concatenated_for_the_projector_are_no_part_of_them(frames):
    config = small_model().config
    config.encoder_config.cat_hidden_layers = [1]
    config.projector_config.encoder_hidden_size *= 2
    model = GraniteSpeechForConditionalGeneration(config).eval()
    inputs = spoken_prompt(1, frames)
    with Engine(model, None) as engine:
        check(model, inputs, engine.submit(inputs=inputs, ctc=True, **length(2)).result(TIMEOUT))


def test_requests_that_lose_their_pages_keep_them():
    requests = [(spoken_prompt(number, 40), True) for number in range(6)]
    with Engine(MODEL, None, max_pages=6) as engine:
        found = answers(engine, requests, **length(40))
        assert engine.counters().preempted > 0
    for (inputs, _), answer in zip(requests, found, strict=True):
        check(MODEL, inputs, answer)


def test_a_cancelled_answer_has_them_once_its_audio_is_encoded():
    inputs = spoken_prompt(1, 40)
    with Engine(MODEL, None) as engine, Gate(DecodeRows, "step", call=6) as gate:
        handle = engine.submit(inputs=inputs, ctc=True, **length(30))
        gate.wait()
        handle.cancel()
        gate.open()
        answer = handle.result(TIMEOUT)
    assert answer.finish_reason == "cancelled"
    check(MODEL, inputs, answer)


def test_kernels_give_the_same(monkeypatch):
    inputs = spoken_prompt(1, 23)
    truth = expected(MODEL, inputs)
    monkeypatch.setenv(CHOICE, "triton")
    with Engine(MODEL, None) as engine:
        found = engine.submit(inputs=inputs, ctc=True, **length(1)).result(TIMEOUT).ctc_logprobs
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-4)


def test_without_ctc_the_head_does_no_more_than_the_feedback(monkeypatch):
    calls, run = [], MODEL.encoder.ctc_logits
    monkeypatch.setattr(MODEL.encoder, "ctc_logits", lambda states: calls.append(states.shape[0]) or run(states))
    with Engine(MODEL, None) as engine:
        assert engine.submit(inputs=spoken_prompt(1, 40), **length(2)).result(TIMEOUT).ctc_logprobs is None
        assert calls == []
        engine.submit(inputs=spoken_prompt(1, 40), ctc=True, **length(2)).result(TIMEOUT)
        assert calls == [40]


def test_the_bundled_checkpoint_spells_what_it_hears():
    model, processor = load()
    clips, texts = recorded_clips()
    with Engine(model, processor) as engine:
        answer = engine.submit(audio=clips[0], ctc=True).result(TIMEOUT)
    best = answer.ctc_logprobs.argmax(-1).unique_consecutive().tolist()
    assert "".join(map(chr, filter(None, best))).split() == answer.text.split() == texts[0].split()
