"""Adapters by name: what comparisons with transformers do not show."""

import copy
import json

import peft
import pytest
import torch
from torch import nn

from granite_speech import GraniteSpeechForConditionalGeneration
from granite_speech.errors import CheckpointError, InputError, UnsupportedError
from granite_speech.modules.adapter import LoraLinear
from granite_speech.modules.adapter_config import AdapterConfig
from granite_speech.modules.adapter_targets import target_paths
from tests.support.small_models import AUDIO, small_model

CONFIG = {"r": 3, "lora_alpha": 30, "target_modules": ["q_proj", "k_proj"], "init_lora_weights": False}
LAYER = "language_model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def model():
    torch.manual_seed(0)
    return small_model()


def inputs():
    generator = torch.Generator().manual_seed(1)
    return {
        "input_ids": torch.tensor([[AUDIO] * 3 + [5, 6, 7], [8, 9, 10, 11, 12, 13]]),
        "input_features": torch.randn(1, 15, 160, generator=generator),
    }


@torch.no_grad()
def logits(model):
    return model(**inputs()).logits


def saved(model, folder):
    """An adapter's folder, as peft lays it out."""
    model.save_pretrained(folder / "whole")
    alone = folder / "adapter"
    alone.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (folder / "whole" / name).rename(alone / name)
    return alone


# --- one at a time ---------------------------------------------------------------------------------------------------------------


def test_parameters_have_the_names_of_the_active_adapter(model):
    names = set(model.state_dict())
    model.add_adapter(CONFIG, "second")
    assert f"{LAYER}.lora_A.weight" in model.state_dict() and model.get_submodule(LAYER).lora_A.weight.shape[0] == 3
    model.set_adapter("default")
    assert set(model.state_dict()) == names


def test_adapters_are_on_for_rows_with_audio_only(model):
    before = logits(model)
    model.add_adapter(CONFIG, "second")
    after = logits(model)
    assert torch.equal(after[1], before[1]) and not torch.allclose(after[0], before[0], atol=1e-3)


def test_an_adapter_set_aside_moves_with_the_model(model):
    model.add_adapter(CONFIG, "second")
    model.to(torch.float64)
    model.set_adapter("default")
    assert {one.dtype for one in model.parameters()} == {torch.float64}
    logits(model)


def test_a_copy_has_its_own_adapters(model):
    model.add_adapter(CONFIG, "second")
    twin = copy.deepcopy(model)
    twin.set_adapter("default")
    assert model.active_adapters() == ["second"] and not torch.equal(logits(twin), logits(model))
    twin.set_adapter("second")
    assert torch.equal(logits(twin), logits(model))
    with torch.no_grad():
        twin.get_submodule(LAYER).lora_B.weight.add_(1)
    assert not torch.equal(logits(twin), logits(model))


def test_both_models_share_their_adapters(model):
    model.model.add_adapter(CONFIG, "second")
    assert model.active_adapters() == ["second"] and set(model.get_adapter_state_dict()) == set(model.model.get_adapter_state_dict())
    assert f"{LAYER}.lora_A.weight" in model.get_adapter_state_dict()
    model.disable_adapters()
    off = model.model(**inputs()).last_hidden_state
    model.model.enable_adapters()
    assert not torch.equal(model.model(**inputs()).last_hidden_state, off)


def test_off_lasts_through_generate_and_is_not_saved(model, tmp_path):
    options = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_scores": True}
    on = model.generate(**inputs(), **options).scores[0]
    bare = copy.deepcopy(model)
    bare.delete_adapter("default")
    model.disable_adapters()
    off = model.generate(**inputs(), **options).scores[0]
    torch.testing.assert_close(off, bare.generate(**inputs(), **options).scores[0], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(off[0], on[0], atol=1e-3)
    model.save_pretrained(tmp_path)
    again = GraniteSpeechForConditionalGeneration.from_pretrained(tmp_path)
    model.enable_adapters()
    assert torch.equal(logits(again), logits(model))


def test_a_merge_removes_the_active_adapter_only(model):
    before = logits(model)
    model.add_adapter(CONFIG, "second")
    on = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model)[0], on[0], rtol=1e-4, atol=1e-4)
    assert sorted(model.peft_config) == ["default"] and model.get_submodule(LAYER).lora_A is None
    model.set_adapter("default")
    assert not torch.allclose(logits(model)[0], on[0], atol=1e-3) and not torch.equal(logits(model), before)


# --- training --------------------------------------------------------------------------------------------------------------------


def test_a_new_adapter_trains_alone(model):
    model.add_adapter(CONFIG, "second")
    trained = {name for name, one in model.named_parameters() if one.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    model.set_adapter("default")
    assert not model.get_submodule(LAYER).adapters["second"].a.weight.requires_grad
    assert model.get_submodule(LAYER).lora_A.weight.requires_grad


def test_float32_adapters_next_to_bfloat16_weights(model):
    model.to(torch.bfloat16)
    model.add_adapter(CONFIG | {"lora_dropout": 0.1}, "second")
    narrow = logits(model)
    for one in (one for one in model.parameters() if one.requires_grad):
        one.data = one.data.float()
    assert narrow.dtype == logits(model).dtype == torch.bfloat16
    torch.testing.assert_close(logits(model), narrow, rtol=0.05, atol=0.05)
    model.train()(**inputs()).logits.float().square().mean().backward()
    gradient = model.get_submodule(LAYER).lora_B.weight.grad
    assert gradient.dtype == torch.float32 and gradient.any()


def test_several_adapters_train_together(model):
    model.add_adapter(CONFIG, "second")
    model.set_adapter(["default", "second"])
    model(**inputs()).logits.square().mean().backward()
    adapters = model.get_submodule(LAYER).adapters
    assert all(one.b.weight.grad is not None and one.b.weight.grad.any() for one in adapters.values())
    with pytest.raises(InputError, match=r"\['default', 'second'\]"):
        model.save_pretrained("nowhere")


# --- loading ---------------------------------------------------------------------------------------------------------------------


def test_hotswap_changes_rank_and_scaling(model, tmp_path):
    other = copy.deepcopy(model)
    other.merge_adapter()
    other.add_adapter(CONFIG | {"r": 5, "target_modules": ["v_proj", "k_proj"]})
    folder = saved(other, tmp_path)
    model.enable_peft_hotswap(target_rank=8)
    model.load_adapter(folder, adapter_name="default")
    expected = copy.deepcopy(model)
    assert expected.get_submodule(LAYER).lora_A is None and sorted(model.peft_config) == ["default"]
    assert set(model.get_adapter_state_dict()) == set(other.get_adapter_state_dict())
    for name, one in other.get_adapter_state_dict().items():
        assert torch.equal(model.get_adapter_state_dict()[name], one)


def test_an_adapter_that_does_not_fit_changes_nothing(model, tmp_path):
    folder = saved(copy.deepcopy(model), tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"r": 7}))
    before, names = logits(model), set(model.state_dict())
    with pytest.raises(CheckpointError, match=r"lora_A.weight of shape \(4, 32\); expected shape \(7, 32\)"):
        model.load_adapter(str(folder), adapter_name="second")
    assert torch.equal(logits(model), before) and set(model.state_dict()) == names and sorted(model.peft_config) == ["default"]


def test_half_an_adapter_is_refused(model):
    tensors = model.get_adapter_state_dict()
    tensors.pop(f"{LAYER}.lora_B.weight")
    with pytest.raises(CheckpointError, match=r"lora_B\.weight missing"):
        model.load_adapter(peft_config=model.adapter_config, adapter_state_dict=tensors, adapter_name="second")
    with pytest.raises(UnsupportedError, match="not a module of this model"):
        two = {f"encoder.nothing.lora_{letter}.weight": torch.ones(4, 4) for letter in "AB"}
        model.load_adapter(peft_config=model.adapter_config, adapter_state_dict=two, adapter_name="second")


BAD = {
    "nothing to load": (lambda m: m.load_adapter(adapter_name="x"), InputError, "peft_model_id"),
    "a name twice": (lambda m: m.add_adapter(CONFIG), InputError, "'default', which the model has"),
    "an unknown name": (lambda m: m.set_adapter("other"), InputError, r"'other'; expected one of \['default'\]"),
    "deleting an unknown name": (lambda m: m.delete_adapter(["default", "x"]), InputError, "'x'"),
    "tensors of an unknown name": (lambda m: m.get_adapter_state_dict("x"), InputError, "'x'"),
    "hotswap of an unknown name": (lambda m: m.load_adapter("f", "x", hotswap=True), InputError, "hotswap=True"),
    "an unknown option": (lambda m: m.load_adapter("f", "x", max_memory={0: "1GB"}), InputError, "max_memory"),
    "a device": (lambda m: m.load_adapter("f", "x", device_map={"": 1}), InputError, "device_map"),
    "no targets": (lambda m: m.add_adapter({"r": 4}, "x"), InputError, "without target_modules"),
    "no match": (lambda m: m.add_adapter(CONFIG | {"target_modules": ["proj"]}, "x"), InputError, "no module"),
    "a bad regex": (lambda m: m.add_adapter(CONFIG | {"target_modules": "("}, "x"), InputError, "regular expression"),
    "the head": (lambda m: m.add_adapter(CONFIG | {"target_modules": ["lm_head"]}, "x"), UnsupportedError, "a Linear"),
    "not a configuration": (lambda m: m.add_adapter("lora", "x"), InputError, "of type str"),
    "an initialisation": (lambda m: m.add_adapter(CONFIG | {"init_lora_weights": "eva"}, "x"), UnsupportedError, "'eva'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_calls_are_refused_and_change_nothing(model, name):
    call, error, message = BAD[name]
    before = set(model.state_dict())
    with pytest.raises(error, match=message):
        call(model)
    assert set(model.state_dict()) == before and model.active_adapters() == ["default"]


def test_without_an_adapter(model):
    model.merge_adapter()
    assert not hasattr(model, "peft_config") and model.adapter_config is None and not model._hf_peft_config_loaded
    for call in (model.active_adapters, model.disable_adapters, model.enable_adapters, model.get_adapter_state_dict):
        with pytest.raises(InputError, match="without adapters"):
            call()


# --- which modules ---------------------------------------------------------------------------------------------------------------

TARGETS = {
    "names": {"target_modules": ["q_proj", "up_proj"]},
    "ends of paths": {"target_modules": ["self_attn.q_proj", "layers.1.mlp.up_proj"]},
    "a regex": {"target_modules": r".*language_model.*\.[qk]_proj"},
    "layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    "one layer of a pattern": {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
    "excluded names": {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["layers.0.mlp.up_proj"]},
    "an excluded regex": {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r"encoder\..*"},
}


@pytest.mark.parametrize("name", TARGETS)
def test_targets_are_those_of_peft(model, name):
    model.merge_adapter()
    chosen = target_paths(dict(model.named_modules()), AdapterConfig.read(peft.LoraConfig(**TARGETS[name])).raw)
    wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**TARGETS[name])).base_model
    assert sorted(chosen) == sorted(wrapped.targeted_module_names) != []


def test_all_linear_is_saved_as_names_of_the_same_modules(model):
    model.merge_adapter()
    model.add_adapter(CONFIG | {"target_modules": "all-linear"})
    names = model.adapter_config.raw["target_modules"]
    linear = sorted(name for name, one in model.named_modules() if isinstance(one, LoraLinear))
    assert sorted(target_paths(dict(model.named_modules()), {"target_modules": names})) == linear
    assert max(len(name.split(".")) for name in names) < 4


# --- peft's layers ---------------------------------------------------------------------------------------------------------------


def test_methods_that_would_miss_pefts_layers_are_refused(model):
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    for call in (lambda: model.add_adapter(CONFIG, "x"), model.merge_adapter, lambda: model.delete_adapter("default")):
        with pytest.raises(UnsupportedError, match="peft has wrapped"):
            call()
    with pytest.raises(InputError, match="merge_and_unload"):
        model.save_pretrained("nowhere")
    assert wrapped.merge_and_unload() is model and not hasattr(model, "peft_config")
    model.add_adapter(CONFIG)


def test_an_adapter_of_another_name_stays_and_can_be_chosen(model):
    own = logits(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]), adapter_name="mine").eval()
    assert model.active_adapters() == ["mine"] and not torch.allclose(logits(model)[0], own[0], atol=1e-3)
    model.set_adapter("default")
    torch.testing.assert_close(logits(model)[0], own[0], rtol=1e-4, atol=1e-4)
    assert type(wrapped.peft_config["default"]) is peft.LoraConfig and wrapped.peft_config["default"].r == 4


def test_a_failed_wrapping_leaves_the_adapter(model):
    before = logits(model)
    with pytest.raises(ValueError, match="not found"):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["nothing"]))
    assert torch.equal(logits(model), before) and model.adapter_config.r == 4


@pytest.mark.parametrize("part", ["projector", "encoder", "embed_tokens", "lm_head"])
def test_modules_to_save(model, part, tmp_path):
    options = {"target_modules": ["q_proj"], "modules_to_save": [part]}
    bare = copy.deepcopy(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**options)).eval()
    for one in wrapped.parameters():
        if one.requires_grad:
            nn.init.normal_(one, std=0.5) if one.dim() > 1 else nn.init.uniform_(one, 0.5, 1.5)
    wrapped.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(bare, tmp_path)
    assert torch.equal(logits(again), logits(wrapped))
    assert torch.equal(again.generate(**inputs(), max_new_tokens=3), wrapped.generate(**inputs(), max_new_tokens=3))


def test_injected_layers(model):
    model.merge_adapter()
    before = logits(model)
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False), model, "x")
    model._hf_peft_config_loaded = True
    assert not torch.allclose(logits(model)[0], before[0], atol=1e-3)
    text = {"input_ids": inputs()["input_ids"][1:]}
    model.generate(**text, max_new_tokens=1)  # without audio, so the adapter goes off
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    assert set(peft.get_peft_model_state_dict(model, adapter_name="x")) == {
        f"{name}.lora_{letter}.weight" for name, one in model.named_modules() if hasattr(one, "base_layer") for letter in "AB"
    }
