"""The whole small model through the Triton kernels, interpreted, beside its reference path."""

import pytest
import torch
from granite_kernels import OPERATIONS
from granite_kernels.op import CHOICE

from granite_speech.errors import GraniteSpeechError, KernelError
from tests.support.small_models import batch, small_model

REACHED: set[str] = set()


@pytest.fixture
def through(monkeypatch: pytest.MonkeyPatch):
    """Which half runs, and a note of every operation whose Triton half was called."""
    for name, operation in OPERATIONS.items():
        noted = noting_calls(name, operation.triton)
        monkeypatch.setitem(operation.__dict__, "triton", noted)

    def choose(half: str) -> None:
        REACHED.clear()
        monkeypatch.setenv(CHOICE, half)

    return choose


def noting_calls(name: str, function):
    def noting(*args, **kwargs):
        REACHED.add(name)
        return function(*args, **kwargs)

    return noting


def test_logits_and_greedy_ids_are_the_references(through):
    model = small_model()
    inputs = batch(model)
    results = {}
    for half in ("torch", "triton"):
        through(half)
        with torch.no_grad():
            logits = model(**inputs).logits
        ids = model.generate(**inputs, max_new_tokens=6, eos_token_id=[])
        results[half] = logits, ids
        assert set(OPERATIONS if half == "triton" else ()) == REACHED
    (expected, expected_ids), (logits, ids) = results["torch"], results["triton"]
    real = inputs["attention_mask"].bool()
    assert float((logits - expected)[real].abs().max()) <= 1e-4
    assert torch.equal(ids, expected_ids)


@pytest.mark.parametrize("training", [False, True])
def test_gradients_are_the_references(through, training: bool):
    gradients = {}
    for half in ("torch", "triton"):
        through(half)
        model = small_model().train(training)  # BatchNorm folded into the kernel, or behind it
        inputs = batch(model)
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        model(**inputs, labels=labels, use_cache=False).loss.backward()
        gradients[half] = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
        assert {name for name, one in OPERATIONS.items() if one.differentiable and half == "triton"} == REACHED
    assert gradients["torch"].keys() == gradients["triton"].keys()
    for name, expected in gradients["torch"].items():
        difference = float((gradients["triton"][name] - expected).abs().max())
        assert difference <= 1e-3 * float(expected.abs().max()) + 1e-7, name


def test_a_module_says_which_backend_it_uses(through):
    model = small_model()
    for backend in ("torch", "triton"):
        through(backend)
        said = repr(model)
        for name in OPERATIONS:
            assert f"{name}={backend}" in said


@pytest.mark.parametrize("chosen, dtype", [("triton", torch.float32), ("triton", torch.float64), ("tritn", torch.float32)], ids=str)
def test_a_model_that_cannot_run_can_be_printed(through, monkeypatch, chosen, dtype):
    """Triton chosen for CPU tensors without the interpreter, for a dtype it does not serve, and misspelled."""
    model = small_model().to(dtype)
    through(chosen)
    monkeypatch.setattr("granite_kernels.op._interpreted", lambda: False)
    said = repr(model)
    for name in OPERATIONS:
        assert f"{name}=unavailable" in said
    with pytest.raises(KernelError) as refused:
        model(**batch(model))
    assert isinstance(refused.value, GraniteSpeechError) and f"GRANITE_SPEECH_KERNELS={chosen}" in str(refused.value)
