"""A model that changes during a request, or between two requests to one engine, answers with what it is now."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from granite_speech import Engine
from granite_speech.modules.fused_layers import FusedLayers
from tests.support.engine_requests import TIMEOUT
from tests.support.small_models import attentive, batch, small_model

Model = Any


def numbers(*size: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(size, generator=torch.Generator().manual_seed(5)))


def replace_weight(model: Model) -> None:
    model.decoder.layers[0].mlp.down_proj.weight = numbers(32, 64)


def move_weight(model: Model) -> None:
    model.decoder.layers[0].self_attn.q_proj.weight.data = numbers(32, 32).data


def assign_weights(model: Model) -> None:
    model.load_state_dict(attentive(small_model(5)).state_dict(), assign=True)


def replace_layer(model: Model) -> None:
    model.decoder.layers[0] = copy.deepcopy(attentive(small_model(7)).decoder.layers[0])


def replace_head(model: Model) -> None:
    model.lm_head.weight = numbers(96, 32)


def switch_off(model: Model) -> None:
    model.disable_adapters()


def another_adapter(model: Model) -> None:
    module = model.decoder.layers[0].self_attn.q_proj
    module.attach(9, 1.0, name="other")
    nn.init.ones_(module.lora_B.weight)


def change_in_place(model: Model) -> None:
    model.decoder.layers[0].self_attn.q_proj.weight.data.mul_(-2)


def double(model: Model) -> None:
    model.decoder.layers[0].mlp.register_forward_hook(lambda module, arguments, output: output * 2)


CHANGES = (
    replace_weight, move_weight, assign_weights, replace_layer, replace_head, switch_off, another_adapter, change_in_place, double
)  # fmt: skip


class Callback:
    """A streamer that changes the model when it gets its third token."""

    def __init__(self, change: Callable[[], None]):
        self.change, self.calls = change, 0

    def put(self, ids: torch.Tensor) -> None:
        self.calls += 1
        if self.calls == 4:  # the first call brings the prompt
            self.change()

    def end(self) -> None:
        pass


def request(model: Model) -> dict[str, Any]:
    """One prompt with audio."""
    given = batch(model)
    return {"input_ids": given["input_ids"][:1], "input_features": given["input_features"][:1], "input_features_lengths": [50]}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_during_a_request_counts_from_the_next_token_on(change: Callable[[Model], None], monkeypatch: pytest.MonkeyPatch):
    answers = []
    for by_modules in (False, True):
        model = attentive(small_model())
        model.generate(**request(model), max_new_tokens=1)  # moves the weights side by side
        with monkeypatch.context() as patch:
            if by_modules:
                patch.setattr(FusedLayers, "of", lambda *_: None)
            streamer = Callback(lambda model=model: change(model))
            options = {"max_new_tokens": 6, "eos_token_id": [], "output_logits": True, "return_dict_in_generate": True}
            answers.append(model.generate(**request(model), streamer=streamer, **options))
    for one, other in zip(*(answer.logits for answer in answers), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change", [one for one in CHANGES if one is not double])
def test_an_engine_answers_with_the_model_as_it_is(change: Callable[[Model], None]):
    model = attentive(small_model())
    options = {"max_new_tokens": 6, "eos_token_id": []}
    with Engine(model, None, max_rows=2) as engine:
        engine.submit(inputs=request(model), **options).result(TIMEOUT)
        change(model)
        answer = engine.submit(inputs=request(model), **options).result(TIMEOUT).token_ids
        assert answer == model.generate(**request(model), **options)[0, -6:].tolist()
