"""Weights side by side: only their memory differs, for everybody who loads, trains, saves, copies or wraps a model."""

import copy
import io
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from granite_kernels.op import CHOICE
from safetensors.torch import load_file, save_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.dlpack import from_dlpack, to_dlpack

from granite_speech import GraniteSpeechForConditionalGeneration, accelerate, restore
from granite_speech.checkpoints import tensor_file
from granite_speech.interop.accelerate import acceleration_of
from granite_speech.modules.side_by_side import arrange, padded_rows, side_by_side
from tests.support.allocations import Allocations
from tests.support.live_models import LIVE_SPECS
from tests.support.live_models import batch as live_batch
from tests.support.reference_models import build_reference
from tests.support.small_models import AUDIO, batch, small_model

Model = GraniteSpeechForConditionalGeneration


def arranged(model: Model) -> Model:
    arrange(model.decoder, model.lm_head)
    return model


def groups(model: Model) -> list[list[Tensor]]:
    """The tensors that should lie one after another."""
    found = []
    for layer in model.decoder.layers:
        for modules in ([layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj], [layer.mlp.gate_proj, layer.mlp.up_proj]):
            matrices = [one.lora_A.weight for one in modules if one.lora_A is not None]
            found.append([one.weight for one in modules] + matrices)
            found.append([one.bias for one in modules if one.bias is not None])
    return [one for one in found if one]


def is_arranged(model: Model) -> bool:
    return all(side_by_side(*one) is not None for one in groups(model)) and padded_rows(model.lm_head.weight) is not None


def addresses(model: nn.Module) -> list[int]:
    return [one.data_ptr() for one in model.parameters()]


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: one.clone() for name, one in model.state_dict().items()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert list(one) == list(other)
    for name in one:
        assert one[name].dtype == other[name].dtype
        assert torch.equal(one[name], other[name]), name


def with_biases(**text: Any) -> Model:
    """Every projection with a bias, an adapter on all of them, an odd vocabulary, and a tied head."""
    config = copy.deepcopy(small_model().config)
    config.text_config.attention_bias = config.text_config.mlp_bias = True
    config.text_config.vocab_size = 97
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    torch.manual_seed(1)
    model = Model(config)
    model.add_adapter({"r": 3, "target_modules": ["q_proj", "k_proj", "gate_proj", "up_proj"], "init_lora_weights": False})
    return model.eval()


MODELS = [small_model, with_biases]


@pytest.mark.parametrize("make", MODELS)
def test_the_same_parameters_lie_side_by_side_with_the_same_values(make: Callable[[], Model]):
    model = make()
    before, objects = values(model), [id(one) for one in model.parameters()]
    assert not is_arranged(model)
    arranged(model)
    assert is_arranged(model)
    assert_equal(values(model), before)
    assert [id(one) for one in model.parameters()] == objects
    for tensors in groups(model):
        assert torch.equal(side_by_side(*tensors), torch.cat(tensors))
        assert torch.equal(side_by_side(*tensors[1:]), torch.cat(tensors[1:]))
        assert side_by_side(*reversed(tensors)) is None or len(tensors) == 1
    head = padded_rows(model.lm_head.weight)
    assert head.shape == (128, 32)
    assert torch.equal(head[: model.lm_head.out_features], model.lm_head.weight)
    assert not head[model.lm_head.out_features :].any()
    # One memory: what is written on one side is read on the other.
    layer = model.decoder.layers[0].self_attn
    with torch.no_grad():
        layer.v_proj.weight.fill_(7)
    whole = side_by_side(layer.q_proj.weight, layer.k_proj.weight, layer.v_proj.weight)
    assert (whole[-layer.v_proj.out_features :] == 7).all()
    assert not whole.requires_grad
    assert not whole.is_inference()


def test_q_k_and_v_of_the_encoder_lie_side_by_side_where_kernels_read_them(monkeypatch: pytest.MonkeyPatch):
    model = small_model()
    before, inputs = values(model), batch(model)
    pairs = [(block.attn.to_q.weight, block.attn.to_kv.weight) for block in model.encoder.layers]
    model.generate(**inputs, max_new_tokens=1)
    assert not any(side_by_side(*pair) is not None for pair in pairs)
    monkeypatch.setenv(CHOICE, "triton")
    model.generate(**inputs, max_new_tokens=1)
    assert all(side_by_side(*pair) is not None for pair in pairs)
    assert_equal(values(model), before)
    assert_equal(values(copy.deepcopy(model)), before)
    assert len(pickle.dumps(model.encoder)) <= len(pickle.dumps(small_model().encoder))


def test_a_second_call_changes_nothing():
    model = arranged(small_model())
    before = addresses(model)
    assert addresses(arranged(model)) == before
    with torch.inference_mode():
        assert addresses(arranged(model)) == before


def test_answers_and_gradients_are_those_of_before():
    def computed(model: Model) -> list[Tensor]:
        inputs = batch(model)
        output = model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["input_ids"] == AUDIO, -100))
        output.loss.backward()
        ids = model.generate(**inputs, max_new_tokens=5)
        return [output.logits, ids, *(one.grad for one in model.parameters() if one.grad is not None)]

    for ours, before in zip(computed(arranged(small_model())), computed(small_model()), strict=True):
        torch.testing.assert_close(ours, before)


def test_training_steps_are_those_of_before():
    def trained(prepare: Callable[[Model], object]) -> dict[str, Tensor]:
        model = small_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        for step in range(3):
            inputs = batch(model)
            model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["input_ids"] == AUDIO, -100)).loss.backward()
            if step == 1:
                prepare(model)  # the optimizer has its state, and the parameters their gradients
            optimizer.step()
            optimizer.zero_grad()
        return values(model)

    ours, before = trained(arranged), trained(lambda model: None)
    for name in before:
        torch.testing.assert_close(ours[name], before[name], msg=name)


# --- copies and files ------------------------------------------------------------------------------------------------------------


def saved_whole(model: Model, folder: Path) -> Model:
    torch.save(model, folder / "model.pt")
    return torch.load(folder / "model.pt", weights_only=False)


def saved_state(model: Model, folder: Path) -> Model:
    torch.save(model.state_dict(), folder / "state.pt")
    other = with_biases()
    other.load_state_dict(torch.load(folder / "state.pt"))
    return other


def saved_by_safetensors(model: Model, folder: Path) -> Model:
    save_model(model, folder / "model.safetensors")
    other = with_biases()
    other.load_state_dict(load_file(folder / "model.safetensors"))
    return other


COPIES: dict[str, Callable[[Model, Path], Model]] = {
    "copy.deepcopy": lambda model, folder: copy.deepcopy(model),
    "pickle": lambda model, folder: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_whole,
    "torch.save of the state dict": saved_state,
    "safetensors": saved_by_safetensors,
}


@pytest.mark.parametrize("name", COPIES)
def test_copies_have_the_values_and_can_be_arranged(name: str, tmp_path):
    model = arranged(with_biases())
    with torch.no_grad():
        model.decoder.layers[0].self_attn.k_proj.weight.mul_(2)
    other = COPIES[name](model, tmp_path)
    assert other.lm_head.weight is other.decoder.embed_tokens.weight
    assert_equal(values(other), values(model))
    assert is_arranged(arranged(other))
    assert not set(addresses(other)) & set(addresses(model))
    assert_equal(values(other), values(model))


def test_files_are_not_larger():
    plain, model = small_model(), arranged(small_model())
    for parts in (lambda one: one, lambda one: one.decoder.layers[0].self_attn.q_proj, lambda one: one.lm_head):
        assert len(pickle.dumps(parts(model))) <= len(pickle.dumps(parts(plain)))
    q_proj = io.BytesIO()
    torch.save(model.decoder.layers[0].self_attn.q_proj.weight, q_proj)
    assert q_proj.tell() < 6000


def test_a_program_that_looks_for_shared_storages_finds_none():
    # What Accelerator.save_model and save_state do. It keeps one tensor of each storage.
    clean = pytest.importorskip("accelerate.utils.other").clean_state_dict_for_safetensors
    model = arranged(small_model())
    assert_equal(clean(dict(model.state_dict())), model.state_dict())


@pytest.mark.parametrize("make", MODELS)
def test_saved_folders_are_the_same_and_load_side_by_side(make: Callable[[], Model], tmp_path):
    make().save_pretrained(tmp_path / "plain")
    arranged(make()).save_pretrained(tmp_path / "arranged")
    for file in (tmp_path / "plain").iterdir():
        if file.name != "adapter_config.json":  # names its folder
            assert (tmp_path / "arranged" / file.name).read_bytes() == file.read_bytes(), file.name
    loaded = Model.from_pretrained(tmp_path / "arranged")
    assert is_arranged(loaded)
    assert_equal(values(loaded), values(make()))


@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}, {"ignore_mismatched_sizes": True}])
def test_loading_is_side_by_side(options: dict[str, Any]):
    model = Model.from_pretrained("embedded", **options)
    assert is_arranged(model)
    assert not model.training
    before = addresses(model)
    assert addresses(arranged(model)) == before, "nothing is left to be moved"


def test_a_state_dict_loads_side_by_side():
    model = small_model()
    state = {name: one for name, one in model.state_dict().items() if "lora" not in name}
    loaded = Model.from_pretrained(None, config=model.config, state_dict=state)
    assert is_arranged(loaded)
    assert_equal(values(loaded), state)


# --- memory ----------------------------------------------------------------------------------------------------------------------


def nbytes(model: Model) -> int:
    return sum(one.nbytes for one in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_needs_no_more_memory_than_the_model(dtype: torch.dtype, monkeypatch):
    monkeypatch.setattr(tensor_file, "_CHUNK_BYTES", 4096)
    with Allocations() as allocations:
        model = Model.from_pretrained("embedded", dtype=dtype)
    assert is_arranged(model)
    assert nbytes(model) <= allocations.now < 1.02 * nbytes(model)
    assert allocations.peak <= allocations.now + 8192  # of which 4096 are read into


def test_arranging_needs_memory_for_one_layer():
    model = small_model()
    layers = [sum(one.nbytes for one in layer.parameters()) for layer in model.decoder.layers]
    with Allocations() as allocations:
        before = copy.deepcopy(model)
        size = allocations.now
        arranged(before)
    padding = 32 * 32 * 4
    assert allocations.peak <= size + max(*layers, before.lm_head.weight.nbytes) + padding
    assert allocations.now <= size + padding


def test_an_inactive_adapter_does_not_keep_the_memory_of_the_weights():
    model = small_model()
    layer = model.decoder.layers[0].self_attn
    arranged(model)
    old = weakref.ref(side_by_side(layer.q_proj.weight, layer.k_proj.weight).untyped_storage())
    state = values(model)
    model.add_adapter({"r": 2, "target_modules": ["k_proj"]}, "other")
    before = layer.q_proj.weight.data_ptr()
    arranged(model)
    assert layer.q_proj.weight.data_ptr() != before
    assert old() is None
    matrix = layer.q_proj.adapters["default"].a.weight
    assert matrix.untyped_storage().nbytes() == matrix.nbytes
    assert side_by_side(layer.q_proj.weight, matrix) is None
    assert is_arranged(model)
    model.set_adapter("default")
    assert is_arranged(arranged(model))
    assert_equal(values(model), state)


# --- what changes a model --------------------------------------------------------------------------------------------------------


def merged(model: Model) -> None:
    model.merge_adapter()


def deleted(model: Model) -> None:
    model.delete_adapter("default")


def resized(model: Model) -> None:
    torch.manual_seed(0)
    model.resize_token_embeddings(101)


def in_float64(model: Model) -> None:
    model.to(torch.float64)


def another_adapter(model: Model) -> None:
    torch.manual_seed(0)
    model.add_adapter({"r": 5, "target_modules": ["k_proj", "v_proj", "up_proj"], "init_lora_weights": False}, "other")


def replaced_weight(model: Model) -> None:
    torch.manual_seed(0)
    model.decoder.layers[1].mlp.gate_proj.weight = nn.Parameter(torch.randn(64, 32))


@pytest.mark.parametrize("change", [merged, deleted, resized, in_float64, another_adapter, replaced_weight])
@pytest.mark.parametrize("make", MODELS)
def test_a_changed_model_is_arranged_again(make: Callable[[], Model], change: Callable[[Model], None]):
    plain, model = make(), arranged(make())
    change(plain)
    change(model)
    assert_equal(values(model), values(plain))
    assert is_arranged(arranged(model))
    assert_equal(values(model), values(plain))
    assert model.generate(**batch(plain), max_new_tokens=3).equal(plain.generate(**batch(plain), max_new_tokens=3))


def test_a_model_that_peft_wraps_computes_and_merges_as_before():
    peft = pytest.importorskip("peft")

    def computed(model: Model) -> list[Tensor]:
        torch.manual_seed(0)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
        arrange(model.decoder, model.lm_head)
        logits = wrapped(**batch(model)).logits
        merged = wrapped.merge_and_unload()
        arrange(model.decoder, model.lm_head)
        return [logits, merged(**batch(model)).logits, *merged.state_dict().values()]

    for ours, before in zip(computed(arranged(small_model())), computed(small_model()), strict=True):
        torch.testing.assert_close(ours, before)


# --- what stays where it is ------------------------------------------------------------------------------------------------------


def projections(model: Model) -> list[nn.Parameter]:
    layer = model.decoder.layers[0].self_attn
    return [one.weight for one in (layer.q_proj, layer.k_proj, layer.v_proj)]


def flat_buffer(model: Model) -> None:
    """As FSDP and DeepSpeed keep parameters, in another order. Nobody but they refer to it."""
    whole, at = torch.cat([one.detach().flatten() for one in reversed(projections(model))]), 0
    for one in reversed(projections(model)):
        one.data = whole[at : at + one.numel()].view(one.shape)
        at += one.numel()


def shared_memory(model: Model) -> None:
    for one in projections(model):
        one.data.share_memory_()


def held_values(model: Model) -> object:
    return model.state_dict()


def on_meta(model: Model) -> None:
    for one in (model.decoder.layers[0].self_attn.q_proj, model.decoder.layers[0].self_attn.k_proj):
        one.to_empty(device="meta")


def subclass_of_parameter(model: Model) -> None:
    class Ours(nn.Parameter):
        pass

    model.decoder.layers[0].self_attn.k_proj.weight = Ours(projections(model)[1].detach())


def another_module(model: Model) -> None:
    class Linear(type(model.decoder.layers[0].self_attn.q_proj)):
        pass

    model.decoder.layers[0].self_attn.v_proj.__class__ = Linear


def two_dtypes(model: Model) -> None:
    model.decoder.layers[0].self_attn.k_proj.to(torch.float64)


OTHERS = [flat_buffer, shared_memory, held_values, on_meta, subclass_of_parameter, another_module, two_dtypes]


@pytest.mark.parametrize("make", OTHERS)
def test_weights_that_must_not_move_stay(make: Callable[[Model], object]):
    model = small_model()
    in_use = make(model)
    before = [one.data_ptr() for one in projections(model)]
    arranged(model)
    assert [one.data_ptr() for one in projections(model)] == before
    assert side_by_side(*projections(model)) is None
    layer = model.decoder.layers[1].mlp
    assert (side_by_side(layer.gate_proj.weight, layer.up_proj.weight) is None) == (in_use is not None)


def test_a_state_dict_that_is_in_use_stays_up_to_date():
    model = small_model()
    state = model.state_dict()
    arranged(model)
    with torch.no_grad():
        for one in model.parameters():
            one.zero_()
    assert not any(one.any() for name, one in state.items() if "running" not in name and "num_batches" not in name)


def test_weights_without_memory_lie_side_by_side_too():
    with FakeTensorMode():
        with torch.device("cuda"):
            model = small_model()
        for tensors in groups(model):
            assert side_by_side(*tensors) is None
        arranged(model)
        for tensors in groups(model):
            whole = side_by_side(*tensors)
            assert whole.shape == (sum(map(len, tensors)), *tensors[0].shape[1:])
            assert whole.device.type == "cuda"
        assert padded_rows(model.lm_head.weight).shape == (128, 32)
        storages = [one.untyped_storage()._cdata for one in model.parameters()]
        arranged(model)
        assert [one.untyped_storage()._cdata for one in model.parameters()] == storages


def test_neighbours_by_chance_are_not_side_by_side():
    whole = torch.zeros(5, 4)
    assert side_by_side(whole[:2], whole[2:5]).data_ptr() == whole.data_ptr()
    assert side_by_side(whole[:2], whole[3:5]) is None
    assert side_by_side(whole[:2], whole[2:5].view(torch.int32)) is None
    assert side_by_side(whole.T[:2], whole.T[2:4]) is None
    parts = [from_dlpack(to_dlpack(one)) for one in whole.split([2, 3])]  # as two allocations that happen to be neighbours
    assert side_by_side(*parts) is None
    assert padded_rows(whole[:3], 4) is None, "the row after them is not padding"
    assert padded_rows(torch.zeros(8, 4), 4).shape == (8, 4)


# --- live models of transformers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", LIVE_SPECS[:2], ids=lambda one: one.name)
def test_live_weights_of_transformers_may_be_arranged(spec: Any, tmp_path):
    plain, live = build_reference(spec), build_reference(spec)
    inputs = live_batch(spec)
    accelerate(live)
    twin = acceleration_of(live).twin
    live.generate(**inputs, max_new_tokens=2)  # the twin takes over the parameters
    objects = [id(one) for one in live.parameters()]
    arranged(twin)
    assert is_arranged(twin)
    assert [id(one) for one in live.parameters()] == objects
    ids = live.generate(**inputs, max_new_tokens=5)
    restore(live)
    assert torch.equal(ids, live.generate(**inputs, max_new_tokens=5))
    assert torch.equal(ids, plain.generate(**inputs, max_new_tokens=5))
    assert_equal(live.state_dict(), plain.state_dict())
    for model, name in ((plain, "plain"), (live, "live")):
        model.save_pretrained(str(tmp_path / name))
    for file in (tmp_path / "plain").glob("*.safetensors"):
        assert (tmp_path / "live" / file.name).read_bytes() == file.read_bytes(), file.name
    assert_equal(copy.deepcopy(live).state_dict(), plain.state_dict())
