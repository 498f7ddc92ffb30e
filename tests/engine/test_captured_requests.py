"""`generate`, `get_audio_features` and `warmup` with captured stages of the encoder and the prefill.

Capturing keeps the function: a replay runs the same body again, on what was filled into the stage's tensors.
"""

import threading

import pytest
import torch

from granite_speech import InputError
from granite_speech.engine import runtime
from granite_speech.engine.encoding import EncoderBucket
from granite_speech.engine.prefill import PromptBucket
from tests.support.small_models import AUDIO, batch, small_model, text

PLAIN = small_model()
FEATURES = PLAIN.config.encoder_config.input_dim


@pytest.fixture
def model(monkeypatch):
    """A model whose requests are captured."""
    monkeypatch.setattr(runtime, "_can_be_captured", lambda model: not model.training)
    model = small_model()
    model.runtime.make_capture = lambda device: lambda function: function
    return model


def request(lengths, seed=0):
    """Prompts with one clip each, or none if its length is None, padded on the left."""
    rng = torch.Generator().manual_seed(seed)
    frames = [one for one in lengths if one is not None]
    counts = [0 if one is None else PLAIN.projector.tokens(one) for one in lengths]
    rows = [torch.cat((text(2 + row, rng), torch.full((count,), AUDIO), text(4, rng))) for row, count in enumerate(counts)]
    width = max(map(len, rows))
    inputs = {
        "input_ids": torch.stack([torch.nn.functional.pad(row, (width - len(row), 0), value=94) for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
    }
    if frames:
        inputs |= {"input_features": torch.randn(len(frames), max(frames), FEATURES, generator=rng), "input_features_lengths": frames}
    return inputs


def captured(graphs, kind):
    return {key for key in graphs._captured if isinstance(key, kind)}


def replays(monkeypatch, model):
    """A list that takes the key of every stage of the encoder and prefill that is replayed."""
    keys = []
    for graphs in (model.runtime.encoder_graphs, model.runtime.decoder_graphs):
        replay = graphs.replay
        monkeypatch.setattr(
            graphs, "replay", lambda key, replay=replay: (isinstance(key, (EncoderBucket, PromptBucket)) and keys.append(key), replay(key))
        )
    return keys


REQUESTS = [[50, 23], [None], [50, None, 23], [7], [23, 50], [None, None], [128], [1, 1, 1, 1, 1], [300]]
OPTIONS = [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2, "top_k": 5}, {"repetition_penalty": 1.3}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_answers_are_those_of_a_model_without_graphs(model, options):
    for seed, lengths in enumerate(REQUESTS * 3):
        inputs = request(lengths, seed)
        torch.manual_seed(seed)
        expected = PLAIN.generate(**inputs, max_new_tokens=6, **options)
        torch.manual_seed(seed)
        assert torch.equal(model.generate(**inputs, max_new_tokens=6, **options), expected), lengths


def test_the_second_request_of_a_size_replays_both_stages(model, monkeypatch):
    model.generate(**request([50, 23]), max_new_tokens=5)
    with model.runtime.session(model):
        pass
    keys = replays(monkeypatch, model)
    model.generate(**request([9, 60], seed=1), max_new_tokens=5)
    assert keys == [EncoderBucket(128, 2), PromptBucket(64, 2)]


def test_a_prefill_stays_captured_when_a_longer_answer_needs_another_state(model, monkeypatch):
    """The state grows with the pages of an answer; the pages of the pool suffice."""
    model.generate(**request([50]), max_new_tokens=100)
    model.generate(**request([50]), max_new_tokens=100)
    model.generate(**request([50]), max_new_tokens=1000, eos_token_id=list(range(96)))
    keys = replays(monkeypatch, model)
    model.generate(**request([50]), max_new_tokens=5)
    assert PromptBucket(64, 1) in keys


def test_stages_see_pages_that_have_moved(model):
    """A larger request moves the pages. What was captured before must not write to the old ones."""
    small, large = request([50], seed=1), request([None] * 9, seed=2)
    expected = PLAIN.generate(**small, max_new_tokens=6)
    for _ in range(2):
        assert torch.equal(model.generate(**small, max_new_tokens=6), expected)
    before = model.runtime.pool.keys[0]
    model.generate(**large, max_new_tokens=300, eos_token_id=list(range(96)))
    assert model.runtime.pool.keys[0] is not before
    for _ in range(3):
        assert torch.equal(model.generate(**small, max_new_tokens=6), expected)


@torch.no_grad()
def test_audio_features_are_captured(model, monkeypatch):
    clips, lengths = batch(PLAIN)["input_features"], [50, 23]
    expected = PLAIN.get_audio_features(clips, lengths)
    model.get_audio_features(clips, lengths)
    with model.runtime.session(model):
        pass
    keys = replays(monkeypatch, model)
    output = model.get_audio_features(clips, lengths)
    model.get_audio_features(clips + 1, lengths)  # an output belongs to the caller
    assert keys == [EncoderBucket(128, 2)] * 2
    torch.testing.assert_close(output.pooler_output, expected.pooler_output, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.last_hidden_state, expected.last_hidden_state, rtol=1e-5, atol=1e-5)


def test_audio_features_with_gradients(model):
    clips = torch.randn(1, 30, FEATURES)
    for _ in range(2):
        model.get_audio_features(clips).pooler_output.sum().backward()
    assert model.encoder.input_linear.weight.grad.abs().sum() > 0
    assert len(model.runtime.encoder_graphs) == 0


@torch.no_grad()
def test_forward_uses_no_stage_while_another_thread_has_a_session(model, monkeypatch):
    inputs = batch(PLAIN)
    expected = PLAIN.get_audio_features(inputs["input_features"], inputs["input_features_lengths"]).pooler_output
    model.generate(**inputs, max_new_tokens=2)
    results = []

    def other():
        with torch.no_grad():
            results.append(model(**inputs).audio_hidden_states)
            results.append(model.get_audio_features(inputs["input_features"], inputs["input_features_lengths"]).pooler_output)

    with model.runtime.session(model):
        keys = replays(monkeypatch, model)
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert keys == []
    for result in results:
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def test_a_session_ends_for_its_thread_also_after_an_error(model):
    with pytest.raises(ZeroDivisionError), model.runtime.session(model) as outer:
        with model.runtime.session(model) as inner:  # as in a streamer: a runtime of its own
            assert model.runtime.running is inner is not outer
        assert model.runtime.running is outer
        raise ZeroDivisionError
    assert model.runtime.running is None


# --- warmup ----------------------------------------------------------------------------------------------------------------------


def test_requests_after_a_warmup_capture_nothing_more(model):
    model.warmup(rows=[1, 3], seconds=[0.5, 1.0], text_tokens=6, max_new_tokens=20, eos_token_id=[95])
    encoder, decoder = (set(one._captured) for one in (model.runtime.encoder_graphs, model.runtime.decoder_graphs))
    assert {EncoderBucket(128, 1), EncoderBucket(128, 4), EncoderBucket(256, 4)} <= encoder
    assert {PromptBucket(64, 1), PromptBucket(64, 4)} <= decoder
    for lengths in ([50], [25], [50, 50, 50], [25, 25, 25]):
        inputs = request(lengths)
        expected = PLAIN.generate(**inputs, max_new_tokens=20, eos_token_id=[95])
        assert torch.equal(model.generate(**inputs, max_new_tokens=20, eos_token_id=[95]), expected)
    with model.runtime.session(model) as session:
        assert set(session.encoder_graphs._captured) == encoder
        assert set(session.decoder_graphs._captured) == decoder


def test_a_warmup_captures_the_steps_of_fewer_rows(model):
    model.warmup(rows=[6], seconds=[0.2], max_new_tokens=9, eos_token_id=[95])
    steps = model.runtime.decoder_graphs._captured.keys() - captured(model.runtime.decoder_graphs, PromptBucket)
    assert {key.rows for key in steps} == {1, 2, 4, 8}


def test_a_warmup_leaves_random_numbers_alone(model):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    model.warmup(seconds=[0.2], do_sample=True)
    assert torch.equal(torch.rand(1), expected)


def test_a_warmup_without_graphs_runs_one_request(monkeypatch):
    model, calls = small_model(), []
    encode = model.encoder.encode
    monkeypatch.setattr(model.encoder, "encode", lambda *given: (calls.append("encode"), encode(*given))[1])
    model.warmup(rows=[1, 2, 4], seconds=[0.3, 0.5])
    assert calls == ["encode"]


@pytest.mark.parametrize("sizes", [{"rows": []}, {"rows": [0]}, {"seconds": []}, {"seconds": [-1.0]}], ids=str)
def test_sizes_of_a_warmup_that_are_refused(sizes):
    with pytest.raises(InputError, match=next(iter(sizes))):
        PLAIN.warmup(**sizes)
    with pytest.raises(InputError, match="beams"):
        PLAIN.warmup(beams=3)


RULES = [
    {"no_repeat_ngram_size": 1},
    {"do_sample": True, "min_p": 0.02, "num_return_sequences": 2},
    {"logits_processor": [lambda ids, scores: scores.roll(ids.shape[1], 1)], "stopping_criteria": [lambda ids, scores: ids[:, -1] < 30]},
    {"stopping_criteria": [lambda ids, scores: ids[:, -1] < 20], "repetition_penalty": 1.3},
    {"output_hidden_states": True, "output_logits": True, "return_dict_in_generate": True},
    {"max_time": 100.0},
]


@pytest.mark.parametrize("options", RULES, ids=", ".join)
def test_rules_that_cannot_be_captured_run_without_graphs(model, options):
    """Between requests whose steps are captured, and with rows that a captured step would pad."""
    for seed in range(3):
        for lengths in ([50, 23, None], [23, 50]):
            inputs = request(lengths, seed)
            model.generate(**inputs, max_new_tokens=6)
            answers = []
            for one in (PLAIN, model):
                torch.manual_seed(seed)
                answers.append(one.generate(**inputs, max_new_tokens=12, **options))
            if isinstance(answers[0], torch.Tensor):
                assert torch.equal(*answers)
            else:
                for ours, expected in zip(answers[1].logits, answers[0].logits, strict=True):
                    torch.testing.assert_close(ours, expected)
                assert [one.shape for one in answers[1].hidden_states[1]] == [one.shape for one in answers[0].hidden_states[1]]
