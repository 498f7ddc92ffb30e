"""Small language models on a CPU: the few calls of `SmallLayers` give what the modules give."""

from collections.abc import Callable

import pytest
import torch
from granite_kernels.op import CHOICE
from torch import Tensor, nn

from granite_speech import Engine, GraniteSpeechForConditionalGeneration
from granite_speech.modules import small_layers
from granite_speech.modules.int8_layers import round_to_int8
from granite_speech.modules.small_layers import SmallLayers
from tests.support.small_models import attentive, batch, small_model

Model = GraniteSpeechForConditionalGeneration


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the passes that were made here, one after another."""
    seen: list[str] = []
    for name in ("prompt", "step"):
        own = getattr(SmallLayers, name)

        def recorded(self, x: Tensor, *arguments, own: Callable = own, name: str = name) -> Tensor:
            seen.append(f"{name} of {len(x)}")
            return own(self, x, *arguments)

        monkeypatch.setattr(SmallLayers, name, recorded)
    return seen


def audio_rows(model: Model, rows: int = 2) -> dict[str, object]:
    """The rows of `batch` with audio, all of which have the adapter."""
    inputs = batch(model)
    return {name: value[:rows] for name, value in inputs.items()}


def scores_of(model: Model, inputs: dict[str, object], **options: object) -> tuple[Tensor, Tensor]:
    """Tokens and their scores, `(rows, steps, vocabulary)`."""
    output = model.generate(**inputs, max_new_tokens=9, eos_token_id=[], return_dict_in_generate=True, **options)
    return output.sequences, output.scores and torch.stack(output.scores, dim=1)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_answers_are_those_of_the_modules(rows: int, dtype: torch.dtype, passes: list[str], monkeypatch: pytest.MonkeyPatch):
    model = attentive(small_model()).to(dtype)
    inputs = audio_rows(model, rows)
    inputs["input_features"] = inputs["input_features"].to(dtype)
    ids, _ = scores_of(model, inputs)
    assert [one.split()[0] for one in passes] == ["prompt", *["step"] * 8]
    assert set(passes[1:]) == {f"step of {rows}"}
    # Records of logits would run the modules, but the engine gives each token's log-probability as it is.
    found = logprobs_of(model, inputs)
    monkeypatch.setenv(CHOICE, "torch")
    passes.clear()
    expected = logprobs_of(model, inputs)
    assert not passes
    if dtype == torch.float32:
        assert torch.equal(ids, scores_of(model, inputs)[0])
    torch.testing.assert_close(found[:1], expected[:1], rtol=0, atol=1e-4 if dtype == torch.float32 else 0.2)
    if dtype == torch.float32:
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def logprobs_of(model: Model, inputs: dict[str, object]) -> Tensor:
    """Of the first row's answer."""
    first = {name: value[:1] for name, value in inputs.items()}
    with Engine(model, None) as engine:
        return torch.tensor(engine.submit(inputs=first, max_new_tokens=9).result().logprobs)


def test_every_logit_of_a_step_is_that_of_the_modules(passes: list[str], monkeypatch: pytest.MonkeyPatch):
    # With a penalty, all logits of a step are computed.
    model = attentive(small_model())
    inputs = audio_rows(model)
    found, _ = scores_of(model, inputs, repetition_penalty=1.3)
    assert passes
    monkeypatch.setenv(CHOICE, "torch")
    expected, _ = scores_of(model, inputs, repetition_penalty=1.3)
    assert torch.equal(found, expected)


def test_int8_weights_are_made_wider_once(passes: list[str], monkeypatch: pytest.MonkeyPatch):
    model = attentive(small_model())
    round_to_int8(model)
    found, _ = scores_of(model, audio_rows(model), repetition_penalty=1.3)
    assert passes and model.decoder.layers[0].mlp.up_proj.weight.dtype == torch.int8
    monkeypatch.setenv(CHOICE, "torch")
    assert torch.equal(found, scores_of(model, audio_rows(model), repetition_penalty=1.3)[0])


def test_a_row_without_the_adapter_is_left_to_the_modules(passes: list[str]):
    model = small_model()
    model.generate(**batch(model), max_new_tokens=3, eos_token_id=[])
    assert not passes


def test_a_large_weight_is_left_to_the_modules(passes: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(small_layers, "_LARGEST", 64 * 32 * 2 - 1)  # gate and up
    model = small_model()
    model.generate(**audio_rows(model), max_new_tokens=3, eos_token_id=[])
    assert not passes


@pytest.mark.parametrize("how", ["in place", "through .data", "another adapter", "merged"])
def test_a_changed_weight_changes_the_next_answer(how: str, passes: list[str], monkeypatch: pytest.MonkeyPatch):
    model = attentive(small_model())
    inputs = audio_rows(model)
    before, _ = scores_of(model, inputs)
    attention = model.decoder.layers[1].self_attn
    with torch.no_grad():
        if how == "in place":
            attention.o_proj.weight.mul_(-1)
        elif how == "through .data":
            attention.o_proj.weight.data.mul_(-1)
        elif how == "another adapter":
            for layer in model.decoder.layers:
                layer.self_attn.v_proj.lora_B.weight.mul_(-9)
        else:
            model.merge_adapter()
    passes.clear()
    after, _ = scores_of(model, inputs)
    assert passes
    monkeypatch.setenv(CHOICE, "torch")
    assert torch.equal(after, scores_of(model, inputs)[0])
    assert torch.equal(after, before) == (how == "merged")


def test_a_weight_that_changes_while_an_engine_runs_changes_the_next_token(passes: list[str]):
    model = attentive(small_model())
    inputs = audio_rows(model, 1)

    def answer(engine: Engine) -> list[int]:
        return engine.submit(inputs=inputs, max_new_tokens=9).result().token_ids

    with Engine(model, None) as engine:
        first = answer(engine)
        with torch.no_grad():
            model.decoder.layers[0].mlp.down_proj.weight.mul_(-1)
        second = answer(engine)
    assert passes and first != second
    with Engine(model, None) as engine:
        assert answer(engine) == second


def test_rows_that_have_ended_and_pages_of_others_change_nothing(passes: list[str]):
    """Rows end one after another, so that those that go on move together, and the next request finds pages that are scattered."""
    model = attentive(small_model())
    inputs = batch(model)
    alone = [
        model.generate(**{name: value[row : row + 1] for name, value in inputs.items()}, max_new_tokens=12, eos_token_id=[])[0, -12:]
        for row in range(2)
    ]
    both = model.generate(**audio_rows(model), max_new_tokens=12, eos_token_id=[])
    assert torch.equal(both[:, -12:], torch.stack(alone))
    stop = next(int(one) for one in alone[0] if int(one) not in alone[1].tolist())
    length = alone[0].tolist().index(stop) + 1
    ended = model.generate(**audio_rows(model), max_new_tokens=12, eos_token_id=[stop], pad_token_id=94)[:, -12:]
    assert torch.equal(ended[0, :length], alone[0][:length]) and torch.equal(ended[1], alone[1])
    assert {"step of 1", "step of 2"} <= set(passes)


def test_memory_of_nobody_may_hold_anything(passes: list[str]):
    model = attentive(small_model())
    expected, _ = scores_of(model, audio_rows(model))
    for pool in (*model.runtime.pool.keys, *model.runtime.pool.values):
        pool.fill_(torch.nan)
    found, _ = scores_of(model, audio_rows(model))
    assert passes and torch.equal(found, expected)


def test_a_hook_of_all_modules_is_seen_from_the_next_request_on():
    model, seen = small_model(), []
    scores_of(model, audio_rows(model))
    with nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__)):
        scores_of(model, audio_rows(model))
    assert seen.count("GraniteDecoderLayer") == 2 * 9  # in the prompt and in eight steps
    seen.clear()
    scores_of(model, audio_rows(model))
    assert not seen


@pytest.mark.parametrize("first", ["head", "layers"])
def test_a_hook_that_moves_from_one_module_to_another_is_seen(first: str):
    model = small_model()
    seen: list[str] = []
    places = {"head": model.lm_head, "layers": model.decoder.layers[0]}
    for name in (first, *(places.keys() - {first})):
        hook = places[name].register_forward_hook(lambda *_, name=name: seen.append(name))
        scores_of(model, audio_rows(model))
        hook.remove()
        assert set(seen) == {name}
        seen.clear()
    scores_of(model, audio_rows(model))
    assert not seen
