"""int8 weights packed for a CPU: the same model, whatever is done with it afterwards."""

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from granite_kernels.cpu import has_int8
from torch import nn

from granite_speech import GraniteSpeechForConditionalGeneration
from granite_speech.modules import int8_weight
from granite_speech.modules.fused_layers import FusedLayers
from granite_speech.modules.int8_layers import pack_layers, packed_head, round_to_int8
from granite_speech.modules.int8_weight import Int8Weight
from granite_speech.modules.quantized import int8_rows, projections
from tests.modules.test_quantized import speech
from tests.support.random_checkpoint import write_checkpoint

Model = GraniteSpeechForConditionalGeneration
pytestmark = pytest.mark.skipif(not has_int8(), reason="a processor that is not fast at products of 8-bit integers")


@pytest.fixture(autouse=True)
def pack_small_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_weight, "_FEWEST", 1)
    monkeypatch.delenv("GRANITE_SPEECH_KERNELS", raising=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(path)
    return path


@pytest.fixture
def plain(folder: Path) -> Model:
    return Model.from_pretrained(folder)


@pytest.fixture
def model(folder: Path) -> Model:
    return Model.from_pretrained(folder, quantize="int8")


def packed_layers(model: nn.Module) -> dict[str, Int8Weight]:
    return {name: one for name, one in model.named_modules() if isinstance(one, Int8Weight) and one.packed is not None}


def error(ours: torch.Tensor, truth: torch.Tensor) -> float:
    return float((ours.detach().double() - truth.detach().double()).norm() / truth.detach().double().norm())


def test_the_layers_of_all_parts_are_packed_and_first_and_last_ones_are_not(model: Model):
    names = packed_layers(model)
    parts = {"language_model.model.layers", "encoder.layers", "projector."}
    for part in parts:
        assert any(part in name for name in names), part
    assert {id(one) for one in projections(model.decoder)} <= {id(one) for one in names.values()}
    for one in (model.encoder.input_linear, model.encoder.out, model.encoder.out_mid):
        assert one.weight_scale is None
    assert model.decoder.embed_tokens.weight.is_floating_point()
    attention = model.decoder.layers[0].self_attn
    assert attention.q_proj.packed.whole is attention.k_proj.packed.whole is attention.v_proj.packed.whole


def test_every_layer_and_the_model_compute_nearly_the_same(plain: Model, model: Model, folder: Path):
    """The whole of this random model, which turns a small change of its input into a large one, is held to its own error in bfloat16."""
    with torch.no_grad():
        for name, layer in packed_layers(model).items():
            original = plain.get_submodule(name)
            shape = (2, layer.in_channels, 9) if isinstance(layer, nn.Conv1d) else (2, 9, layer.in_features)
            x = torch.randn(shape)
            assert error(layer(x), original(x)) < 0.02, name
        inputs, narrow = speech(model), Model.from_pretrained(folder, dtype=torch.bfloat16)
        truth = plain(**inputs).logits
        assert error(model(**inputs).logits, truth) < 3 * error(narrow(**inputs).logits, truth)
        features, truth = inputs["input_features"], plain.encoder(inputs["input_features"]).last_hidden_state
        allowed = 3 * error(narrow.encoder(features.bfloat16()).last_hidden_state, truth)
        assert error(model.encoder(features).last_hidden_state, truth) < allowed
    assert model.generate(**inputs, max_new_tokens=4).shape == plain.generate(**inputs, max_new_tokens=4).shape


def test_hooks_see_the_padded_layout_and_change_nothing(model: Model):
    inputs = speech(model)
    expected = model.encoder(inputs["input_features"]).last_hidden_state
    seen = []
    model.encoder.layers[0].conv.register_forward_hook(lambda module, arguments, output: seen.append(output.dim()))
    torch.testing.assert_close(model.encoder(inputs["input_features"]).last_hidden_state, expected, rtol=1e-3, atol=1e-3)
    assert seen == [3]


def test_a_clip_does_not_depend_on_a_loud_neighbour(model: Model):
    quiet = torch.randn(1, 30, model.config.encoder_config.input_dim)
    together = torch.cat((quiet, 20 * torch.randn_like(quiet)))
    with torch.no_grad():
        torch.testing.assert_close(model.encoder(together).last_hidden_state[:1], model.encoder(quiet).last_hidden_state)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda one: pickle.loads(pickle.dumps(one)),
    "to": lambda one: one.to("cpu"),
    "bfloat16 and back": lambda one: one.bfloat16().float(),
}


@pytest.mark.parametrize("name", COPIES)
def test_copies_and_other_dtypes_stay_packed(name: str, model: Model):
    state = {key: one.clone() for key, one in model.state_dict().items()}
    changed = COPIES[name](model)
    assert packed_layers(changed).keys() == packed_layers(model).keys()
    for key, one in changed.state_dict().items():
        assert one.dtype == state[key].dtype, key
        if one.dtype == torch.int8 or key.endswith("weight_scale"):
            assert torch.equal(one, state[key]), key
    assert all(one.weight.untyped_storage().nbytes() == 1 for one in packed_layers(changed).values())
    inputs = speech(model)
    assert torch.equal(changed.generate(**inputs, max_new_tokens=3), model.generate(**inputs, max_new_tokens=3))


def test_the_state_dict_has_the_rounded_values_and_loads(plain: Model, model: Model):
    state = model.state_dict()
    for name, layer in packed_layers(model).items():
        weight, scale = int8_rows(plain.get_submodule(name).weight.detach().flatten(1))
        assert torch.equal(state[f"{name}.weight"].flatten(1), weight), name
        assert torch.equal(layer.weight_scale, scale), name
    inputs = speech(model)
    expected = model(**inputs).logits
    other = copy.deepcopy(model)
    other.load_state_dict({name: torch.zeros_like(one) if one.dtype == torch.int8 else one for name, one in state.items()})
    assert not packed_layers(other)
    assert error(other(**inputs).logits, expected) > 0.1
    other.load_state_dict(state)
    other.generate(**inputs, max_new_tokens=1)  # a request packs what is not packed
    assert packed_layers(other).keys() == packed_layers(model).keys()
    torch.testing.assert_close(other(**inputs).logits, expected)


def test_another_device_gets_plain_weights(model: Model):
    state = model.state_dict()
    layer = model.decoder.layers[0].mlp.down_proj
    layer._unpack()
    assert torch.equal(layer.weight, state["language_model.model.layers.0.mlp.down_proj.weight"])
    assert not packed_layers(model.to("meta"))


def test_an_adapter_of_a_packed_layer_is_added(model: Model):
    layer = model.decoder.layers[0].self_attn.k_proj
    x = torch.randn(3, layer.in_features)
    before = layer(x)
    layer.attach(rank=2, scaling=0.5, name="new", initial=False)
    index = torch.tensor([0, -1, 0], dtype=torch.int32)
    torch.testing.assert_close(layer(x, index)[1], before[1])
    torch.testing.assert_close(layer(x, index)[0], before[0] + 0.5 * layer.lora_B(layer.lora_A(x[:1]))[0])


def test_autocast_multiplies_in_its_dtype(model: Model):
    layer = model.decoder.layers[0].mlp.down_proj
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(3, layer.in_features)).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_weight_of_the_head_decides(dtype: torch.dtype, folder: Path, monkeypatch: pytest.MonkeyPatch):
    model = Model.from_pretrained(folder, quantize="int8", dtype=dtype)
    used, own = [], FusedLayers._decided
    monkeypatch.setattr(FusedLayers, "_decided", lambda self, *arguments: used.append(1) or own(self, *arguments))
    inputs = speech(model)
    ours = model.generate(**inputs, max_new_tokens=8, eos_token_id=[])
    assert used
    monkeypatch.setattr("granite_speech.modules.fused_layers.packed_head", lambda head: None)
    assert torch.equal(model.generate(**inputs, max_new_tokens=8, eos_token_id=[]), ours)


def test_the_heads_copy_follows_its_weight(model: Model):
    model.generate(**speech(model), max_new_tokens=1)
    before = packed_head(model.lm_head)
    assert before is not None
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    assert packed_head(model.lm_head) is None
    pack_layers(model)
    assert packed_head(model.lm_head) not in (None, before)


@pytest.fixture
def bare_encoder(plain: Model) -> Iterator[nn.Module]:
    holder = nn.Module()
    holder.encoder = plain.encoder
    yield holder


def test_a_part_alone_can_be_rounded(bare_encoder: nn.Module, model: Model):
    round_to_int8(bare_encoder)
    features = torch.randn(2, 20, model.config.encoder_config.input_dim)
    torch.testing.assert_close(bare_encoder.encoder(features).last_hidden_state, model.encoder(features).last_hidden_state)


def test_processors_without_fast_products_round_the_language_model_alone(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("granite_kernels.int8_cpu.has_int8", lambda: False)
    model = Model.from_pretrained(folder, quantize="int8")
    assert not packed_layers(model)
    assert all(one.weight.dtype == torch.int8 for one in projections(model.decoder))
    assert all(one.is_floating_point() for one in model.encoder.parameters())
