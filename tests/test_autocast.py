"""`torch.autocast` over a float32 model: forward, generate and training, with both backends."""

import pytest
import torch

from granite_speech.engine.runtime import _can_be_captured
from tests.support.small_models import AUDIO, batch, small_model
from tests.support.two_libraries import WORDS, library

DTYPES = [torch.bfloat16, torch.float16]
CLOSE = 0.05  # of the largest value; bfloat16 keeps 8 bits


@pytest.fixture(params=["torch", "triton"])
def backend(request, monkeypatch) -> str:
    monkeypatch.setenv("GRANITE_SPEECH_KERNELS", request.param)
    return request.param


def error(value: torch.Tensor, truth: torch.Tensor) -> float:
    return float((value.float() - truth).abs().max() / truth.abs().max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward(backend, dtype):
    model = small_model()
    inputs = batch(model)
    with torch.no_grad():
        truth = model(**inputs)
        with torch.autocast("cpu", dtype):
            output = model(**inputs, output_hidden_states=True, output_attentions=True)
    assert output.logits.dtype == dtype
    assert 0 < error(output.logits, truth.logits) < CLOSE
    assert error(output.audio_hidden_states, truth.audio_hidden_states) < CLOSE


def test_a_cache_keeps_the_dtype_of_the_weights(backend):
    model = small_model()
    inputs = batch(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        first = model(**inputs)
        token = first.logits[:, -1:].argmax(-1)
        mask = torch.cat((inputs["attention_mask"], torch.ones_like(token)), dim=1)
        second = model(input_ids=token, attention_mask=mask, past_key_values=first.past_key_values)
    assert first.past_key_values.keys[0].dtype == torch.float32
    with torch.no_grad():
        whole = model(**inputs | {"input_ids": torch.cat((inputs["input_ids"], token), 1), "attention_mask": mask})
    assert error(second.logits[:, -1], whole.logits[:, -1]) < CLOSE


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True, "top_k": 1}, {"repetition_penalty": 1.1}], ids=str)
def test_generate_on_the_bundled_checkpoint(options, dtype):
    lib = library("granite_speech")
    inputs = lib.processor("USER: <|audio|>transcribe the speech to text.\n ASSISTANT:", lib.clips[0])
    with torch.inference_mode(), torch.autocast("cpu", dtype):
        ids = lib.model.generate(**inputs, max_new_tokens=30, **options)
    assert lib.processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0].strip() == WORDS
    # Pages and state were made under autocast, and are used again without it.
    assert torch.equal(lib.model.generate(**inputs, max_new_tokens=30), lib.new_model().generate(**inputs, max_new_tokens=30))


def test_generate_of_a_batch(backend):
    model = small_model()
    inputs = batch(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.generate(**inputs, max_new_tokens=4).shape == (len(inputs["input_ids"]), inputs["input_ids"].shape[1] + 4)


def test_gradients_are_float32_and_close(backend):
    def gradients(enabled: bool) -> torch.Tensor:
        model = small_model()
        inputs = batch(model)
        labels = inputs["input_ids"].masked_fill((inputs["attention_mask"] == 0) | (inputs["input_ids"] == AUDIO), -100)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = model(**inputs, labels=labels).loss
        loss.backward()
        assert all(one.grad.dtype == torch.float32 for one in model.parameters() if one.grad is not None)
        return torch.cat([one.grad.flatten() for one in model.parameters() if one.grad is not None])

    ours, truth = gradients(True), gradients(False)
    assert 0 < float((ours - truth).norm() / truth.norm()) < 0.2


def test_training_mode(backend):
    model = small_model().train()
    inputs = batch(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["input_ids"] == AUDIO, -100)).loss
    loss.backward()
    assert all(bool(one.grad.isfinite().all()) for one in model.parameters() if one.grad is not None)


def test_nothing_is_captured(monkeypatch):
    # A graph keeps the dtypes of the call that it was captured in.
    monkeypatch.setenv("GRANITE_SPEECH_KERNELS", "triton")
    model = small_model()
    assert _can_be_captured(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert not _can_be_captured(model)


def test_float64_is_left_alone():
    model = small_model().double()
    inputs = batch(model)
    inputs["input_features"] = inputs["input_features"].double()
    with torch.no_grad():
        truth = model(**inputs).logits
        with torch.autocast("cpu", torch.bfloat16):
            assert error(model(**inputs).logits, truth.float()) < 1e-6
