"""The language model in few launches computes what its modules compute, and runs only where nobody must see the modules."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from granite_kernels.op import CHOICE
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from granite_speech.modules.fused_layers import FusedLayers
from granite_speech.modules.quantized import projections
from tests.support.small_models import attentive, batch, small_model, text

PROJECTIONS = (*(f"self_attn.{one}_proj" for one in "qkvo"), *(f"mlp.{one}_proj" for one in ("gate", "up", "down")))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are too small to split
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The passes that ran fused, by name."""
    seen: list[str] = []
    for name in ("_few_rows", "_many_rows"):
        own = getattr(FusedLayers, name)

        def watched(self: FusedLayers, *arguments: Any, name: str = name, own: Callable = own) -> Any:
            seen.append(name)
            return own(self, *arguments)

        monkeypatch.setattr(FusedLayers, name, watched)
    return seen


def by_modules(monkeypatch: pytest.MonkeyPatch, call: Callable[[], Any]) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(FusedLayers, "of", lambda *_: None)
        return call()


def texts(rows: int) -> dict[str, Any]:
    """Prompts of different lengths without audio, padded on the left."""
    rng = torch.Generator().manual_seed(rows)
    prompts = [text(3 + 2 * row % 11, rng) for row in range(rows)]
    width = max(map(len, prompts))
    ids = torch.stack([torch.cat((torch.full((width - len(one),), 94), one)) for one in prompts])
    mask = torch.stack([torch.cat((torch.zeros(width - len(one)), torch.ones(len(one)))) for one in prompts]).long()
    return {"input_ids": ids, "attention_mask": mask}


def generated(model: nn.Module, inputs: dict[str, Any], **options: Any) -> Any:
    settings = {"max_new_tokens": 3, "eos_token_id": [], "return_dict_in_generate": True, "output_logits": True}
    return model.generate(**inputs, **settings | options)


def assert_same_answers(got: Any, expected: Any) -> None:
    assert torch.equal(got.sequences, expected.sequences)
    for one, other in zip(got.logits, expected.logits, strict=True):
        assert float((one - other).abs().max()) <= 1e-5 * float(other.abs().max())


def with_biases(model: nn.Module) -> nn.Module:
    for layer in model.decoder.layers:
        for name in PROJECTIONS:
            module = layer.get_submodule(name)
            module.bias = nn.Parameter(torch.randn(module.out_features) * 0.3)
    return model


def with_adapters(*names: str) -> Callable[[nn.Module], nn.Module]:
    """The adapters of the model on these projections instead of q and v, with different ranks."""

    def change(model: nn.Module) -> nn.Module:
        for layer in model.decoder.layers:
            for path in PROJECTIONS:
                module = layer.get_submodule(path)
                module.adapters = {}
                module.activate([])
            for number, path in enumerate(names):
                module = layer.get_submodule(path)
                module.attach(3 + 2 * number, 0.7 + number)
                nn.init.normal_(module.lora_B.weight, std=0.5)
        return model

    return change


def switched_off(model: nn.Module) -> nn.Module:
    for module in model.decoder.modules():
        if getattr(module, "lora_A", None) is not None:
            module.adapter_enabled = False
    return model


def other_weights(model: nn.Module) -> nn.Module:
    return model


MODELS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "adapters on q and v": other_weights,
    "no adapter": with_adapters(),
    "adapters on k alone": with_adapters("self_attn.k_proj"),
    "adapters everywhere": with_adapters(*PROJECTIONS),
    "adapters on q and down": with_adapters("self_attn.q_proj", "mlp.down_proj"),
    "adapters switched off": switched_off,
    "biases": with_biases,
}


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", MODELS)
def test_answers_are_those_of_the_modules(name: str, backend: str, monkeypatch: pytest.MonkeyPatch, passes: list[str]):
    monkeypatch.setenv(CHOICE, backend)
    model = MODELS[name](attentive(small_model()))
    inputs = batch(model)  # rows with and without audio
    fused = generated(model, inputs)
    has_fused_rows = backend == "triton" and name not in ("adapters everywhere", "adapters on q and down")
    assert ("_few_rows" in passes) == has_fused_rows
    assert ("_many_rows" in passes) == (backend == "triton" or not has_fused_rows)
    assert_same_answers(fused, by_modules(monkeypatch, lambda: generated(model, inputs)))


@pytest.mark.parametrize("rows", [1, 8, 9, 20])
def test_any_number_of_rows_gives_the_same(rows: int, monkeypatch: pytest.MonkeyPatch, passes: list[str]):
    monkeypatch.setenv(CHOICE, "triton")
    model, inputs = attentive(small_model()), texts(rows)
    fused = generated(model, inputs)
    assert passes == ["_many_rows"] + 2 * ["_few_rows" if rows <= 8 else "_many_rows"]
    assert_same_answers(fused, by_modules(monkeypatch, lambda: generated(model, inputs)))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_tokens_of_many_requests_are_those_of_the_modules(backend: str, monkeypatch: pytest.MonkeyPatch):
    """Steps without logits, eager and then as a graph runs them: what the first request asks for, the second replays."""
    monkeypatch.setenv(CHOICE, backend)
    monkeypatch.setattr("granite_speech.engine.runtime._can_be_captured", lambda model: True)
    model, plain, steps = attentive(small_model()), attentive(small_model()), []
    model.runtime.make_capture = lambda device: lambda function: function
    own = FusedLayers.candidates
    monkeypatch.setattr(FusedLayers, "candidates", lambda self, states: steps.append(len(states.hidden)) or own(self, states))
    # Some answers end early. The interpreter is slow.
    options = {"max_new_tokens": 12 if backend == "torch" else 3, "eos_token_id": [5, 7, 40]}
    for rows in (1, 2, 3, 8, 9, 17) if backend == "torch" else (3, 9):
        inputs = texts(rows) if rows != 3 else batch(model)
        expected = by_modules(monkeypatch, lambda inputs=inputs: plain.generate(**inputs, **options))
        for _ in range(2):
            steps.clear()
            assert torch.equal(model.generate(**inputs, **options), expected)
            assert steps


# --- weights that no kernel can read, and modules of which only the usual kind is fused -------------------------------------------


def biased(name: str) -> Callable[[nn.Module], None]:
    """A bias of one projection alone."""

    def change(model: nn.Module) -> None:
        module = model.decoder.layers[0].get_submodule(name)
        module.bias = nn.Parameter(torch.randn(module.out_features, generator=torch.Generator().manual_seed(1)))

    return change


def transposed(name: str) -> Callable[[nn.Module], None]:
    """A weight whose columns are contiguous."""

    def change(model: nn.Module) -> None:
        module = model.get_submodule(name)
        module.weight = nn.Parameter(module.weight.detach().t().contiguous().t())

    return change


def of_another_class(name: str) -> Callable[[nn.Module], None]:
    """A weight without memory of its own, as those of torchao."""

    def change(model: nn.Module) -> None:
        module = model.get_submodule(name)
        module.weight = nn.Parameter(TwoTensor(*(module.weight.detach().clone() for _ in range(2))))

    return change


def renormalised(model: nn.Module) -> None:
    model.decoder.embed_tokens.max_norm = 1.0


def another_activation(model: nn.Module) -> None:
    model.decoder.layers[0].mlp.act_fn = nn.GELU()


CHANGES = {
    **{f"a bias of {name}": biased(name) for name in PROJECTIONS},
    **{f"{name} transposed": transposed(f"language_model.model.layers.0.{name}") for name in PROJECTIONS},
    "embeddings transposed": transposed("language_model.model.embed_tokens"),
    "head transposed": transposed("lm_head"),
    "o of another class": of_another_class("language_model.model.layers.0.self_attn.o_proj"),
    "down of another class": of_another_class("language_model.model.layers.0.mlp.down_proj"),
    "embeddings with max_norm": renormalised,
    "another activation": another_activation,
}


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", CHANGES)
def test_unusual_weights_give_the_answers_of_the_modules(name: str, backend: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(CHOICE, backend)
    model = attentive(small_model())
    model.decoder.layers = model.decoder.layers[:1]
    CHANGES[name](model)
    options = {"max_new_tokens": 2, "eos_token_id": [], "output_logits": True, "return_dict_in_generate": True}
    answers = [model.generate(**texts(1), **options) for _ in range(1 if backend == "triton" else 2)]
    expected = by_modules(monkeypatch, lambda: model.generate(**texts(1), **options))
    for answer in answers:
        assert_same_answers(answer, expected)


def test_a_model_of_inference_mode_answers_as_any_other():
    with torch.inference_mode():
        model = attentive(small_model())
        answer = model.generate(**batch(model), max_new_tokens=3, eos_token_id=[])
    assert torch.equal(answer, attentive(small_model()).generate(**batch(model), max_new_tokens=3, eos_token_id=[]))
    assert torch.equal(answer, model.generate(**batch(model), max_new_tokens=3, eos_token_id=[]))


# --- where modules run one by one ------------------------------------------------------------------------------------------------


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, *arguments: Any, **options: Any) -> Any:
        return self.inner(*arguments, **options)


def hooked(model: nn.Module) -> None:
    model.decoder.layers[1].mlp.register_forward_hook(lambda *_: None)


def wrapped(model: nn.Module) -> None:
    model.decoder.layers[0].mlp = Wrapped(model.decoder.layers[0].mlp)


def own_forward(model: nn.Module) -> None:
    module = model.decoder.layers[0].self_attn
    module.forward = type(module).forward.__get__(module)


def several_adapters(model: nn.Module) -> None:
    module = model.decoder.layers[0].self_attn.q_proj
    module.attach(2, 1.0, name="other")
    module.activate(["default", "other"])


def wide_adapter(model: nn.Module) -> None:
    model.decoder.layers[0].self_attn.q_proj.lora_A.double()
    model.decoder.layers[0].self_attn.q_proj.lora_B.double()


def another_norm(model: nn.Module) -> None:
    model.decoder.layers[1].input_layernorm = nn.RMSNorm(32, eps=1e-6)


@pytest.mark.parametrize("change", [hooked, wrapped, own_forward, several_adapters, wide_adapter, another_norm])
def test_what_must_be_seen_is_run_module_by_module(change: Callable[[nn.Module], None], passes: list[str]):
    model = small_model()
    inputs = batch(model)
    model.generate(**inputs, max_new_tokens=3, eos_token_id=[])
    assert passes
    passes.clear()
    change(model)
    model.generate(**inputs, max_new_tokens=3, eos_token_id=[])
    assert not passes


def test_a_hook_of_the_head_is_called(passes: list[str]):
    model, seen = small_model(), []
    model.lm_head.register_forward_hook(lambda module, arguments, output: seen.append(output.shape))
    model.generate(**batch(model), max_new_tokens=3, eos_token_id=[])
    assert seen == [(3, 1, 96)] * 3


def test_hidden_states_gradients_and_training_need_the_modules(passes: list[str]):
    model = small_model()
    inputs = batch(model)
    model.generate(**inputs, max_new_tokens=3, eos_token_id=[], output_hidden_states=True, return_dict_in_generate=True)
    model(**inputs)
    model.train().generate(**inputs, max_new_tokens=3, eos_token_id=[])
    assert not passes


@pytest.mark.parametrize("rows", [2, 19, 40])
def test_int8_weights_give_the_answers_of_the_modules(rows: int, monkeypatch: pytest.MonkeyPatch, passes: list[str]):
    """Few rows, rows in blocks, the last one not full, and many."""
    monkeypatch.setenv(CHOICE, "triton")
    model, inputs = attentive(small_model()), texts(rows)
    for module in projections(model.decoder):
        module.store_int8(module.weight.detach())
    fused = generated(model, inputs, max_new_tokens=2)
    assert passes == ["_many_rows", *{2: ["_few_rows"], 19: ["_few_rows"] * 3, 40: ["_many_rows"]}[rows]]
    assert_same_answers(fused, by_modules(monkeypatch, lambda: generated(model, inputs, max_new_tokens=2)))
