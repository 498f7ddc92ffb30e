"""`from_pretrained(quantize="int8")`: the same words from half the memory, and clear refusals of what needs the original weights."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from granite_speech import AutoModel, AutoModelForSpeechSeq2Seq, GraniteSpeechForConditionalGeneration, InputError, UnsupportedError
from granite_speech.checkpoints import tensor_file
from granite_speech.modules import quantized
from granite_speech.modules.adapter import LoraLinear
from granite_speech.modules.quantized import dequantized, int8_rows, projections
from granite_speech.modules.side_by_side import arrange, padded_rows, side_by_side
from granite_speech.training import transcripts
from granite_speech.training.preparation import prepare
from granite_speech.transcription.transcriber import Transcriber
from tests.support.allocations import Allocations
from tests.support.random_checkpoint import write_checkpoint
from tests.support.small_models import batch, small_model
from tests.support.spoken import load, sentences

Model = GraniteSpeechForConditionalGeneration


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint as the released 3.x ones are: an untied model, and the adapter's two files."""
    path = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(path)
    return path


@pytest.fixture
def plain(folder: Path) -> Model:
    return Model.from_pretrained(folder)


@pytest.fixture
def model(folder: Path) -> Model:
    return Model.from_pretrained(folder, quantize="int8")


def relative_error(ours: Tensor, truth: Tensor) -> float:
    return float((ours.double() - truth.double()).norm().detach() / truth.double().norm().detach())


# --- rounding --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [70, 1 << 22])
def test_rows_are_rounded_to_the_nearest_of_255_values(dtype: torch.dtype, chunk: int, monkeypatch):
    monkeypatch.setattr(quantized, "_ELEMENTS_AT_ONCE", chunk)
    values = torch.randn(48, 64, generator=torch.Generator().manual_seed(0)).to(dtype) * torch.logspace(-6, 3, 48)[:, None].to(dtype)
    values[5] = 0
    weight, scale = int8_rows(values)
    assert weight.dtype == torch.int8
    assert scale.dtype == torch.float32
    assert scale[5] == 1
    rest = torch.arange(48) != 5
    assert (weight[rest].abs().amax(1) == 127).all()
    torch.testing.assert_close(scale[rest], values[rest].float().abs().amax(1) / 127)
    error = (values.double() - weight.double() * scale.double()[:, None]).abs()
    assert (error <= 0.5001 * scale.double()[:, None]).all()
    exact = weight.double() * scale.double()[:, None]
    for target in (torch.float32, torch.bfloat16, torch.float64):
        ours = dequantized(weight, scale, target)
        assert ours.dtype == target
        torch.testing.assert_close(ours.double(), exact, rtol=max(torch.finfo(target).eps, 1e-7), atol=0)
    out = torch.empty(48, 64, dtype=torch.int8)
    assert int8_rows(values, out)[0] is out
    assert torch.equal(out, weight)


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 5), (0, 4)])
def test_small_matrices(shape: tuple[int, int]):
    weight, scale = int8_rows(torch.full(shape, -2.0))
    assert weight.shape == shape
    assert (weight == -127).all()
    assert scale.shape == shape[:1]


def test_values_that_are_not_finite_stay_visible():
    weight, scale = int8_rows(torch.tensor([[1.0, float("nan")], [1.0, float("inf")], [1.0, 2.0]]))
    finite = dequantized(weight, scale, torch.float32).isfinite().all(1)
    assert finite.tolist() == [False, False, True]


# --- the model -------------------------------------------------------------------------------------------------------------------


def test_every_projection_is_int8_and_nothing_else(plain: Model, model: Model):
    int8 = {name for name, one in model.named_parameters() if one.dtype == torch.int8}
    names = {path for path, module in model.named_modules() if isinstance(module, LoraLinear) and module.weight_scale is not None}
    assert int8 == {f"{name}.weight" for name in names}
    assert len(int8) == 7 * model.config.text_config.num_hidden_layers
    assert all(name.startswith("language_model.model.layers.") and "lora" not in name for name in int8)
    for name, one in plain.named_parameters():
        if name not in int8:
            assert torch.equal(model.get_parameter(name), one), name
    for name in names:
        module, original = model.get_submodule(name), plain.get_submodule(name)
        assert not module.weight.requires_grad
        x = torch.randn(9, module.in_features)
        assert relative_error(module(x), original(x)) < 0.01, name
        assert relative_error(dequantized(module.weight, module.weight_scale, torch.float32), original.weight) < 0.01, name
    assert model.dtype == plain.dtype == torch.float32
    assert model.config.dtype == plain.config.dtype
    assert "int8" in repr(model.decoder.layers[0].mlp.down_proj)
    assert "int8" not in repr(model.encoder)
    assert repr(model).replace(", int8", "") == repr(plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_answers_are_those_of_the_rounded_weights(dtype: torch.dtype, folder: Path):
    """The same model with floating-point weights of exactly the int8 values."""
    model = Model.from_pretrained(folder, quantize="int8", dtype=dtype)
    rounded = Model.from_pretrained(folder, dtype=dtype)
    with torch.no_grad():
        for ours, theirs in zip(projections(model.decoder), projections(rounded.decoder), strict=True):
            theirs.weight.copy_(dequantized(ours.weight, ours.weight_scale, dtype))
    inputs = speech(model)
    torch.testing.assert_close(model(**inputs).logits, rounded(**inputs).logits)
    assert torch.equal(model.generate(**inputs, max_new_tokens=8), rounded.generate(**inputs, max_new_tokens=8))
    text = {"input_ids": inputs["input_ids"][:1, -5:]}  # without the adapter
    torch.testing.assert_close(model(**text).logits, rounded(**text).logits)


def speech(model: Model) -> dict[str, Any]:
    """Two rows with audio, of which one is padded, and one without."""
    rng, index = torch.Generator().manual_seed(3), model.config.audio_token_index
    count = model.model.projector.tokens(40)
    ids = torch.randint(0, 20, (3, count + 8), generator=rng)
    ids[:2, 3 : 3 + count] = index
    features = torch.randn(2, 40, model.config.encoder_config.input_dim, generator=rng)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "input_features": features}


def test_the_bundled_checkpoint_understands_as_before():
    model = Model.from_pretrained("embedded", quantize="int8")
    assert model.dtype == torch.float32
    assert transcripts(model, load()[1], sentences()) == [one.text for one in sentences()]


def test_weights_and_scales_lie_side_by_side(model: Model):
    for layer in model.decoder.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for modules in ([attention.q_proj, attention.k_proj, attention.v_proj], [mlp.gate_proj, mlp.up_proj]):
            weight, scale = (side_by_side(*(getattr(one, name) for one in modules)) for name in ("weight", "weight_scale"))
            assert weight.dtype == torch.int8
            assert torch.equal(weight, torch.cat([one.weight for one in modules]))
            assert torch.equal(scale, torch.cat([one.weight_scale for one in modules]))
        matrices = side_by_side(attention.q_proj.lora_A.weight, attention.v_proj.lora_A.weight)
        assert matrices.dtype == torch.float32
    assert padded_rows(model.lm_head.weight).dtype == torch.float32
    before = [one.data_ptr() for one in (*model.parameters(), *model.buffers())]
    arrange(model.decoder, model.lm_head)
    assert [one.data_ptr() for one in (*model.parameters(), *model.buffers())] == before


def test_weights_are_rounded_before_they_change_dtype(folder: Path, model: Model):
    narrow = Model.from_pretrained(folder, quantize="int8", dtype=torch.bfloat16)
    for ours, theirs in zip(projections(narrow.decoder), projections(model.decoder), strict=True):
        assert torch.equal(ours.weight, theirs.weight)
        assert torch.equal(ours.weight_scale, theirs.weight_scale)
        assert ours.activation_dtype == torch.bfloat16


CHANGES: dict[str, tuple[Callable[[nn.Module], nn.Module], torch.dtype]] = {
    "half": (lambda one: one.half(), torch.float16),
    "to dtype": (lambda one: one.to(torch.bfloat16), torch.bfloat16),
    "type": (lambda one: one.type(torch.float64), torch.float64),
    "to device": (lambda one: one.to("cpu"), torch.float32),
    "deepcopy": (copy.deepcopy, torch.float32),
    "pickle": (lambda one: pickle.loads(pickle.dumps(one)), torch.float32),
}


@pytest.mark.parametrize("name", CHANGES)
def test_int8_weights_and_float32_scales_are_kept(name: str, model: Model, folder: Path):
    change, dtype = CHANGES[name]
    state = {key: one.clone() for key, one in model.state_dict().items()}
    changed = change(model)
    for key, one in changed.state_dict().items():
        if key.endswith("weight_scale") or state[key].dtype == torch.int8:
            assert one.dtype == state[key].dtype, key
            assert torch.equal(one, state[key]), key
    assert changed.dtype == dtype
    changed.add_adapter({"r": 2, "target_modules": ["k_proj"]}, "new")
    layer = changed.decoder.layers[0].self_attn
    assert layer.k_proj.activation_dtype == layer.k_proj.lora_A.weight.dtype == dtype
    assert layer.k_proj(torch.randn(3, 128, dtype=dtype)).dtype == dtype
    assert "unavailable" not in repr(layer)
    arrange(changed.decoder, changed.lm_head)
    assert side_by_side(layer.q_proj.weight, layer.k_proj.weight, layer.v_proj.weight) is not None


def test_base_and_adapter_are_one_operation(model: Model, monkeypatch):
    monkeypatch.setattr(LoraLinear, "_in_parts", None)
    for dtype in (torch.float32, torch.bfloat16):
        layer, x = model.to(dtype).decoder.layers[0].self_attn, torch.randn(2, 3, 128, dtype=dtype)
        index = torch.tensor([0, -1, 0, 0, -1, -1], dtype=torch.int32)
        whole = layer.q_proj(x, index).flatten(0, 1)
        rows = [layer.q_proj(one[None], which[None]) for one, which in zip(x.flatten(0, 1), index, strict=True)]
        torch.testing.assert_close(whole, torch.cat(rows))


def test_autocast_multiplies_in_its_dtype(model: Model):
    layer, x = model.decoder.layers[0].self_attn, torch.randn(3, 128)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.q_proj(x).dtype == layer.k_proj(x).dtype == torch.bfloat16


def test_a_state_dict_of_int8_weights_loads_into_int8_weights(folder: Path, model: Model, plain: Model):
    state = {name: one.clone() for name, one in model.state_dict().items()}
    with torch.no_grad():
        for one in projections(model.decoder):
            one.weight.zero_(), one.weight_scale.zero_()
    model.load_state_dict(state)
    assert all(torch.equal(one, state[name]) for name, one in model.state_dict().items())
    with pytest.raises(UnsupportedError, match="load_state_dict with floating-point weights"):
        model.load_state_dict(plain.state_dict(), strict=False)


def test_a_given_state_dict_is_rounded(plain: Model, model: Model):
    state = {name: one for name, one in plain.state_dict().items() if "lora" not in name}
    given = Model.from_pretrained(None, config=plain.config, state_dict=state, quantize="int8")
    for ours, theirs in zip(projections(given.decoder), projections(model.decoder), strict=True):
        assert torch.equal(ours.weight, theirs.weight)
    assert side_by_side(given.decoder.layers[0].mlp.gate_proj.weight, given.decoder.layers[0].mlp.up_proj.weight) is not None


# --- memory ----------------------------------------------------------------------------------------------------------------------


def test_the_full_weights_are_never_in_memory_together(folder: Path, model: Model, plain: Model, monkeypatch):
    monkeypatch.setattr(tensor_file, "_CHUNK_BYTES", 4096)
    monkeypatch.setattr(quantized, "_ELEMENTS_AT_ONCE", 1024)
    full = sum(one.weight.nbytes for one in projections(plain.decoder))
    scales = sum(one.weight_scale.nbytes for one in projections(model.decoder))
    assert model.get_memory_footprint() == plain.get_memory_footprint() - full * 3 // 4 + scales
    with Allocations() as memory:
        kept = Model.from_pretrained(folder, quantize="int8")
    matrix, padding, chunks = 256 * 128 * 4, 64 * 128 * 4, 4 * 1024 * 4
    assert memory.peak < kept.get_memory_footprint() + matrix + padding + chunks + 2 * 4096


# --- doors and refusals ----------------------------------------------------------------------------------------------------------


def test_every_door_takes_the_option(folder: Path):
    models = [AutoModel.from_pretrained(folder, quantize="int8"), AutoModelForSpeechSeq2Seq.from_pretrained(folder, quantize="int8")]
    models.append(Transcriber.from_pretrained(folder, device="cpu", quantize="int8").model)
    assert all(one.weight.dtype == torch.int8 for model in models for one in projections(model.decoder))
    assert all(one.is_floating_point() for one in Model.from_pretrained(folder, quantize=None).parameters())


@pytest.mark.parametrize("value", ["int4", "INT8", 8, True, torch.int8, ""])
def test_other_values_are_refused(value: Any, folder: Path):
    with pytest.raises(InputError, match=r"quantize=.*; expected 'int8' or None"):
        Model.from_pretrained(folder, quantize=value)


@pytest.mark.parametrize("option", [{"quantization_config": {"load_in_8bit": True}}, {"load_in_8bit": True}, {"load_in_4bit": True}])
def test_other_quantization_is_refused_with_the_remedy(option: dict[str, Any], folder: Path):
    with pytest.raises(UnsupportedError, match="quantize='int8'"):
        Model.from_pretrained(folder, **option)


REFUSALS: dict[str, Callable[[Model, Path], object]] = {
    "save_pretrained": lambda model, folder: model.save_pretrained(folder / "saved"),
    "save_pretrained of": lambda model, folder: model.push_to_hub("owner/name"),
    "train": lambda model, folder: model.train(),
    "train of": lambda model, folder: model.model.train(),
    "train of a": lambda model, folder: model.language_model.train(),
    "init_weights": lambda model, folder: model.init_weights(),
    "training": lambda model, folder: prepare(model, ("encoder", "projector")),
    "merge_adapter": lambda model, folder: model.merge_adapter(),
    "merge_adapter of": lambda model, folder: model.language_model.merge_adapter(),
    "merge_adapter of a": lambda model, folder: model.decoder.layers[0].self_attn.q_proj.merge(),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_needs_the_original_weights_is_refused(name: str, model: Model, tmp_path):
    before = {key: one.clone() for key, one in model.state_dict().items()}
    with pytest.raises(UnsupportedError, match=rf"{name}.*quantize='int8'.*Load it without quantize"):
        REFUSALS[name](model, tmp_path)
    assert not any(module.training for module in model.modules())
    assert not (tmp_path / "saved").exists()
    assert all(torch.equal(one, before[key]) for key, one in model.state_dict().items())
    assert model.eval() is model


def test_adapters_are_loaded_switched_and_saved_as_before(model: Model, plain: Model, folder: Path):
    model.load_adapter(folder, adapter_name="again")
    model.set_adapter("default")
    ours, theirs = model.get_adapter_state_dict(), plain.get_adapter_state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    model.delete_adapter("again")
    assert torch.equal(model.generate(**speech(model), max_new_tokens=3), model.generate(**speech(model), max_new_tokens=3))


def test_adapters_of_another_dtype_and_several_at_once():
    model = small_model()
    inputs = batch(model)
    with torch.no_grad():
        for one in list(projections(model.decoder)):
            one.store_int8(one.weight)
            one.to(torch.float64) if one.lora_A is not None else None
    model.decoder.layers[0].self_attn.q_proj.float()
    model.add_adapter({"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False}, "second")
    model.set_adapter(["default", "second"])
    assert model.float()(**inputs).logits.isfinite().all()
