"""An engine's log-probabilities: the model's own, for each token, whatever chose it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench.embedded import recorded_clips
from granite_speech import Engine, GraniteSpeechForConditionalGeneration, GraniteSpeechProcessor
from granite_speech.engine import decode_rows
from granite_speech.engine.decode_rows import DecodeRows
from granite_speech.engine.state import tokens_and_logprobs
from granite_speech.inputs.requests import transcript_request
from tests.support.engine_requests import MODEL, TIMEOUT, Gate, length, prompt, spoken_prompt
from tests.support.random_requests import assert_own_logprobs
from tests.support.small_models import attentive, small_model

RULES = [{}, {"seed": 7, "temperature": 1.5, "top_p": 0.9}, {"repetition_penalty": 1.6}, {"min_new_tokens": 40}]


def test_the_bundled_checkpoint_is_sure_of_what_it_hears_and_less_of_what_it_is_made_to_say():
    model, processor = (one.from_pretrained("embedded") for one in (GraniteSpeechForConditionalGeneration, GraniteSpeechProcessor))
    clips, _ = recorded_clips()
    asked = [(clip, rules) for clip in clips[:2] for rules in RULES]
    with Engine(model, processor, max_rows=5) as engine:
        handles = [engine.submit(audio=clip, max_new_tokens=45, **rules) for clip, rules in asked]
        answers = [handle.result(TIMEOUT) for handle in handles]
    request = transcript_request(processor)
    for (clip, _), answer in zip(asked, answers, strict=True):
        assert_own_logprobs(model, processor(request, clip), answer)
    greedy = [answer for (_, rules), answer in zip(asked, answers, strict=True) if not rules]
    longer = [answer for (_, rules), answer in zip(asked, answers, strict=True) if "min_new_tokens" in rules]
    assert all(max(map(abs, one.logprobs)) < 1 for one in greedy)
    assert all(min(one.logprobs) < -5 for one in longer), "the end token, which was not allowed, was likelier"


@pytest.mark.parametrize("where", ["decoder.layers.0", "lm_head"])
def test_hooks_which_need_modules_change_nothing(where: str):
    model = attentive(small_model())
    calls = []
    model.get_submodule(where).register_forward_hook(lambda *given: calls.append(1))
    inputs = spoken_prompt(3, 40)
    with Engine(model, None) as engine:
        answer = engine.submit(inputs=inputs, **length(9)).result(TIMEOUT)
    assert len(calls) >= 9
    assert_own_logprobs(model, inputs, answer)


def test_128_requests_at_once_have_their_own():
    asked = [prompt(number, 2 + number % 9) for number in range(128)]
    with Engine(MODEL, None, max_rows=128, max_pages=400) as engine:
        handles = [engine.submit(inputs=one, **length(4)) for one in asked]
        answers = [one.result(TIMEOUT) for one in handles]
    for inputs, answer in zip(asked, answers, strict=True):
        assert_own_logprobs(MODEL, inputs, answer)


def test_a_cancelled_answer_has_one_for_each_of_its_tokens():
    with Engine(MODEL, None) as engine, Gate(DecodeRows, "step", call=6) as gate:
        handle = engine.submit(inputs=prompt(1), **length(30))
        gate.wait()
        handle.cancel()
        gate.open()
        answer = handle.result(TIMEOUT)
    assert answer.finish_reason == "cancelled" and answer.token_ids
    assert_own_logprobs(MODEL, prompt(1), answer)


def test_one_copy_of_a_step_brings_tokens_and_log_probabilities(monkeypatch: pytest.MonkeyPatch):
    read = []
    own = decode_rows.Reading
    monkeypatch.setattr(decode_rows, "Reading", lambda tensor: read.append(tensor) or own(tensor))
    with Engine(MODEL, None) as engine:
        answer = engine.submit(inputs=prompt(1), **length(7)).result(TIMEOUT)
    assert len(read) == len(answer.logprobs) == 7
    assert all(one.is_contiguous() for one in read)


@given(steps=st.integers(1, 8), rows=st.integers(1, 9))
def test_a_copy_of_a_record_has_what_was_written(steps: int, rows: int):
    record = torch.zeros(8, 2, rows, dtype=torch.int64)
    written = torch.arange(8 * rows).view(8, rows) - (1 << 40), torch.randn(8, rows)
    for view, values in zip(tokens_and_logprobs(record), written, strict=True):
        for step in range(8):
            view[step].copy_(values[step])
    for view, values in zip(tokens_and_logprobs(record[:steps].clone()), written, strict=True):
        assert torch.equal(view, values[:steps])
