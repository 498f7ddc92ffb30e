"""A whole request in graphs: encoder, prefill and decode steps, captured by the stand-in for CUDA graphs."""

from typing import Any

import pytest
import torch
from granite_kernels.op import CHOICE

from granite_speech import GraniteSpeechForConditionalGeneration
from granite_speech.errors import InputError
from tests.support.fake_graph import FakeCapture
from tests.support.small_models import AUDIO, attentive, small_model, text


def request(model: GraniteSpeechForConditionalGeneration, frames: int, before: int, after: int) -> dict[str, Any]:
    """One prompt: some text, a clip, and some text."""
    rng = torch.Generator().manual_seed(frames)
    audio = torch.full((model.projector.tokens(frames),), AUDIO)
    ids = torch.cat((text(before, rng), audio, text(after, rng)))[None]
    clip = torch.randn(1, frames, model.config.encoder_config.input_dim, generator=rng)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "input_features": clip, "input_features_lengths": [frames]}


def answer(model: GraniteSpeechForConditionalGeneration, inputs: dict[str, Any]) -> torch.Tensor:
    return model.generate(**inputs, max_new_tokens=3, eos_token_id=[])


@pytest.fixture
def captured(monkeypatch) -> tuple[GraniteSpeechForConditionalGeneration, FakeCapture]:
    monkeypatch.setenv(CHOICE, "triton")
    model, capture = attentive(small_model()), FakeCapture()
    model.runtime.make_capture = lambda device: capture
    return model, capture


def test_after_warmup_the_first_request_replays_everything(captured):
    eager = attentive(small_model())
    eager.use_graphs = False
    model, capture = captured
    model.warmup(rows=[1], seconds=[0.3], text_tokens=6, eos_token_id=[])
    made = len(capture.graphs)
    for replays, inputs in enumerate((request(model, 20, 4, 3), request(model, 41, 1, 7)), start=1):
        assert torch.equal(answer(model, inputs), answer(eager, inputs))
        assert capture.replays == 4 * replays, "encoder, prefill and two steps"
    assert len(capture.graphs) == made


def test_audio_features_come_from_the_captured_encoder(captured):
    model, capture = captured
    inputs = request(model, 20, 1, 1)
    features = inputs["input_features"], inputs["input_features_lengths"]
    with torch.no_grad():
        first, second, other = (model.get_audio_features(one, [20]) for one in (features[0], features[0], 2 * features[0]))
    assert capture.replays == 2
    for name in ("last_hidden_state", "pooler_output"):
        torch.testing.assert_close(second[name], first[name], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(other[name], first[name], atol=1e-2), "a later replay must not overwrite an earlier result"
    assert model.get_audio_features(*features).pooler_output.requires_grad, "with gradients nothing is replayed"
    assert capture.replays == 2


@pytest.mark.parametrize("sizes", [{"rows": [0]}, {"seconds": [-1.0]}], ids=str)
def test_sizes_that_are_not_positive_are_refused(sizes):
    with pytest.raises(InputError, match="numbers above 0"):
        small_model().warmup(**sizes)


def test_warmup_without_graphs_changes_nothing():
    model, inputs = small_model(), request(small_model(), 20, 4, 3)
    expected = answer(small_model(), inputs)
    model.warmup(rows=[1, 2], seconds=[0.2])
    assert torch.equal(answer(model, inputs), expected) and len(model.runtime.decoder_graphs) == 0
