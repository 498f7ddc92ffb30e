"""Adapters of an accelerated model: added, switched, merged or removed with peft at any time, before or after `accelerate`."""

import re
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import nn

from granite_speech import AccelerationWarning, accelerate, restore
from granite_speech.interop.follow import Replacement
from tests.support.live_models import LIVE_SPECS, language_model, speech
from tests.support.reference_models import build_reference, clip_inputs, prompt, set_adapter

ADAPTED, BARE = LIVE_SPECS[0], LIVE_SPECS[-1]  # with an adapter of its own, and without
QV = LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


@pytest.fixture(autouse=True)
def _warnings_are_errors() -> Iterator[None]:
    torch.manual_seed(0)  # of new adapters
    with warnings.catch_warnings():
        warnings.simplefilter("error", AccelerationWarning)
        yield


def base_of(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def results(model: Any, spec: Any, on: bool = True) -> list[torch.Tensor]:
    inputs = clip_inputs(spec, 45)
    set_adapter(base_of(model), on)  # of the model's own adapters; its `generate` leaves them as the last request needed them
    with torch.no_grad():
        logits = model(**inputs).logits
        ids = [model.generate(**inputs, max_new_tokens=8), model.generate(input_ids=prompt(0), max_new_tokens=8)]
        return [logits, model.get_audio_features(inputs["input_features"])[0], *ids, model(**inputs).logits]


def check(model: Any, spec: Any = BARE, on: bool = True) -> None:
    """An accelerated model computes what it does once it is restored; it is accelerated again afterwards."""
    assert isinstance(vars(base_of(model))["generate"], Replacement)
    ours = results(model, spec, on)
    theirs = results(restore(model), spec, on)
    for one, other in zip(ours, theirs, strict=True):
        if one.is_floating_point():
            assert float((one - other).abs().max()) <= 3e-5 * float(other.abs().max())
        else:
            assert torch.equal(one, other)
    accelerate(model)


def changed(before: list[torch.Tensor], after: list[torch.Tensor]) -> bool:
    return float((before[0] - after[0]).abs().max()) > 1e-4 * float(before[0].abs().max())


def test_an_adapter_added_switched_and_deleted_later():
    live = accelerate(build_reference(BARE))
    bare = results(live, BARE)
    live.add_adapter(QV, adapter_name="first")
    check(live)
    first = results(live, BARE)
    assert changed(bare, first)
    live.add_adapter(LoraConfig(r=5, target_modules=["k_proj", "up_proj"], init_lora_weights=False), adapter_name="second")
    live.set_adapter("second")
    check(live)
    second = results(live, BARE)
    assert changed(first, second)
    live.set_adapter(["first", "second"])
    check(live)
    check(live, on=False)
    live.delete_adapter("second")
    live.set_adapter("first")
    check(live)
    assert not changed(first, results(live, BARE))


def test_generate_switches_the_models_own_adapter_as_transformers_does():
    live = accelerate(build_reference(ADAPTED))
    layer = language_model(live).layers[0].self_attn.q_proj
    live.generate(input_ids=prompt(0), max_new_tokens=2)
    assert layer.disable_adapters
    live.generate(**clip_inputs(ADAPTED, 45), max_new_tokens=2)
    assert not layer.disable_adapters
    check(live, ADAPTED)


@pytest.mark.parametrize("order", ["before", "after"])
def test_a_peft_model(order: str):
    live = build_reference(BARE)
    was = type(live), live.forward
    model = get_peft_model(accelerate(live), QV) if order == "before" else accelerate(get_peft_model(live, QV))
    check(model)
    adapted = results(model, BARE)
    with model.disable_adapter():
        check(model)
        assert changed(adapted, results(model, BARE))
    model.merge_adapter()
    check(model)
    model.unmerge_adapter()
    check(model)
    with accelerate(model) as same:
        assert same is model
    merged = model.merge_and_unload()
    assert merged is live
    check(merged)
    assert not changed(adapted, results(merged, BARE))
    restore(model)
    assert (type(live), live.forward) == was and type(model).__name__ == "PeftModel" and not hasattr(type(model), "__enter__")


def test_a_merged_adapter_that_is_switched_off():
    model = accelerate(get_peft_model(build_reference(BARE), QV))
    model.merge_adapter()
    with model.disable_adapter(), warnings.catch_warnings():
        warnings.simplefilter("ignore", AccelerationWarning)
        check(model)


def test_adapters_of_encoder_and_projector():
    targets = ["to_q", "to_kv", "ff1.up_proj", "query", "value", "dense", "projector.linear", "out_mid", "down_proj"]
    model = accelerate(get_peft_model(build_reference(BARE), LoraConfig(r=4, target_modules=targets, init_lora_weights=False)))
    check(model)


def test_a_wider_adapter():
    model = accelerate(get_peft_model(build_reference(BARE).bfloat16(), QV))
    inputs = clip_inputs(BARE, 45)
    assert language_model(base_of(model)).layers[0].self_attn.q_proj.lora_A["default"].weight.dtype == torch.float32
    ids = model.generate(**inputs, max_new_tokens=3)
    assert torch.equal(ids, restore(model).generate(**inputs, max_new_tokens=3))


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=3, use_dora=True, target_modules=["q_proj"], init_lora_weights=False),
        LoraConfig(r=3, lora_bias=True, target_modules=["q_proj"], init_lora_weights=False),
        LoraConfig(r=3, target_modules=["embed_tokens", "up_conv"], init_lora_weights=False),
        LoraConfig(r=3, target_modules=["lm_head"], init_lora_weights=False),
        LoraConfig(r=3, target_modules=["q_proj"], trainable_token_indices=[1, 2, 3], init_lora_weights=False),
        IA3Config(target_modules=["k_proj", "ff1.up_proj"], feedforward_modules=[]),
    ],
    ids=["DoRA", "bias", "embedding and convolution", "head", "tokens", "IA3"],
)
def test_other_adapters_run_as_peft_wrote_them(config: Any):
    model = accelerate(get_peft_model(build_reference(BARE), config))
    for name, one in model.named_parameters():
        if "lora" in name or "ia3" in name or "delta" in name:
            nn.init.normal_(one, std=0.3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check(model)
    said = [str(one.message) for one in caught if one.category is AccelerationWarning]
    assert any(re.search("generate runs as transformers wrote it, because .* (is a peft|is not plain LoRA)", one) for one in said)
    assert len(said) == len(set(said)), "each reason once"


def test_modules_to_save():
    config = LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["projector", "lm_head"], init_lora_weights=False)
    model = accelerate(get_peft_model(build_reference(BARE), config))
    before = results(model, BARE)
    with torch.no_grad():
        for name, one in model.named_parameters():
            if "modules_to_save" in name and one.dim() > 1:
                one.mul_(1.5)
    assert changed(before, results(model, BARE))
    check(model)
    with model.disable_adapter():
        check(model)


def test_training_an_adapter_changes_the_next_answer():
    model = accelerate(get_peft_model(build_reference(BARE), QV))
    inputs = clip_inputs(BARE, 45)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == 119, -100)
    before = results(model, BARE)
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.5)
    losses = []
    for _ in range(5):
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] != losses[0]
    assert changed(before, results(model, BARE))
    check(model)


def test_state_dict_and_names_are_pefts():
    model = get_peft_model(build_reference(BARE), QV)
    names = list(model.state_dict()), [name for name, _ in model.named_modules()]
    accelerate(model)
    assert (list(model.state_dict()), [name for name, _ in model.named_modules()]) == names
    assert all(one.is_leaf for one in model.parameters())
    assert isinstance(speech(base_of(model)).encoder.layers, nn.ModuleList)


@pytest.mark.parametrize("training", [True, False])
def test_dropout_of_an_adapter(training: bool):
    """Layers that peft adds are in training mode until somebody calls eval(); the rest of the model need not be."""
    targets = ["q_proj", "ff1.up_proj"]
    config = LoraConfig(r=3, lora_dropout=0.5, target_modules=targets, init_lora_weights=False)
    model = accelerate(get_peft_model(build_reference(BARE), config)).train(training)
    base_of(model).training = False
    for module in model.modules():
        if not hasattr(module, "lora_dropout"):
            module.training = False
        for dropout in getattr(module, "lora_dropout", {}).values():
            dropout.training = training
    inputs = clip_inputs(BARE, 45)

    def answers() -> list[torch.Tensor]:
        torch.manual_seed(0)
        hot = {"do_sample": True, "top_k": 0, "temperature": 4.0}
        with torch.no_grad():
            return [model.get_audio_features(inputs["input_features"])[0], model.generate(**inputs, **hot)]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if training else "error", AccelerationWarning)
        ours = answers()
    theirs = [one for one in (restore(model), answers())[1]]
    assert float((ours[0] - theirs[0]).abs().max()) <= 3e-5 * float(theirs[0].abs().max()) and torch.equal(ours[1], theirs[1])


def test_the_encoder_as_one_of_modules_to_save():
    config = LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["encoder"], init_lora_weights=False)
    model = accelerate(get_peft_model(build_reference(BARE), config).eval())
    check(model)
    with model.disable_adapter():
        check(model)
