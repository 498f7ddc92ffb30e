"""The whole small model with interpreted Triton kernels, compared with the reference path."""

import pytest
import torch
from granite_kernels import OPERATIONS
from granite_kernels.op import CHOICE

from granite_speech.errors import GraniteSpeechError, KernelError
from tests.support.small_models import LAYER_OPERATIONS, batch, small_model

CALLED: set[str] = set()
# A greedy answer draws no noise, the adapter is part of other launches, `silu_product` is for
# int8 weights alone, and `ctc_greedy` is TurboCTC's.
NOT_CALLED = {"ctc_greedy", "exponential_noise", "lora_linear", "silu_product"}


@pytest.fixture
def use_backend(monkeypatch: pytest.MonkeyPatch):
    """Chooses the backend, and records in CALLED every operation whose Triton backend is called."""
    for name, operation in OPERATIONS.items():
        monkeypatch.setitem(operation.__dict__, "triton", recording_calls(name, operation.triton))

    def choose(backend: str) -> None:
        CALLED.clear()
        monkeypatch.setenv(CHOICE, backend)

    return choose


def recording_calls(name: str, function):
    def recording(*args, **kwargs):
        CALLED.add(name)
        return function(*args, **kwargs)

    return recording


def test_logits_and_greedy_ids_match_the_reference(use_backend):
    model = small_model()
    inputs = batch(model)
    results = {}
    for backend in ("torch", "triton"):
        use_backend(backend)
        with torch.no_grad():
            logits = model(**inputs).logits
        ids = model.generate(**inputs, max_new_tokens=6, eos_token_id=[])
        results[backend] = logits, ids
        assert (OPERATIONS.keys() - NOT_CALLED if backend == "triton" else set()) == CALLED
    (expected, expected_ids), (logits, ids) = results["torch"], results["triton"]
    real = inputs["attention_mask"].bool()
    assert float((logits - expected)[real].abs().max()) <= 1e-4
    assert torch.equal(ids, expected_ids)


@pytest.mark.parametrize("training", [False, True])
def test_gradients_match_the_reference(use_backend, training: bool):
    gradients = {}
    for backend in ("torch", "triton"):
        use_backend(backend)
        model = small_model().train(training)  # BatchNorm folded into the kernel, or after it
        inputs = batch(model)
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        model(**inputs, labels=labels, use_cache=False).loss.backward()
        gradients[backend] = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
        expected = {name for name, one in OPERATIONS.items() if one.differentiable} | {"attention_blocks"}
        assert (expected if backend == "triton" else set()) == CALLED
    assert gradients["torch"].keys() == gradients["triton"].keys()
    for name, expected in gradients["torch"].items():
        difference = float((gradients["triton"][name] - expected).abs().max())
        assert difference <= 1e-3 * float(expected.abs().max()) + 1e-7, name


def test_a_module_says_which_backend_it_uses(use_backend):
    model = small_model()
    for backend in ("torch", "triton"):
        use_backend(backend)
        text = repr(model)
        for name in LAYER_OPERATIONS:
            assert f"{name}={backend}" in text


@pytest.mark.parametrize("chosen, dtype", [("triton", torch.float32), ("triton", torch.float64), ("tritn", torch.float32)], ids=str)
def test_a_model_that_cannot_run_can_be_printed(use_backend, monkeypatch, chosen, dtype):
    """Triton chosen for CPU tensors without the interpreter, for an unsupported dtype, and misspelled."""
    model = small_model().to(dtype)
    use_backend(chosen)
    monkeypatch.setattr("granite_kernels.op._interpreted", lambda: False)
    text = repr(model)
    for name in LAYER_OPERATIONS:
        assert f"{name}=unavailable" in text
    with pytest.raises(KernelError) as refused:
        model(**batch(model))
    assert isinstance(refused.value, GraniteSpeechError) and f"GRANITE_SPEECH_KERNELS={chosen}" in str(refused.value)
