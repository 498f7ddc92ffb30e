"""`GraniteSpeech5ForCTC`: loading, saving, training, adapters, int8, autocast, and the packed path."""

import copy
from pathlib import Path

import pytest
import torch
import transformers
from granite_kernels.cpu import has_int8
from granite_kernels.op import CHOICE
from peft import LoraConfig, get_peft_model
from safetensors import safe_open

from granite_speech.config_ctc import GraniteSpeech5CTCConfig
from granite_speech.errors import CheckpointError, ConfigError, InputError
from granite_speech.model import GraniteSpeechForConditionalGeneration
from granite_speech.model_ctc import GraniteSpeech5ForCTC
from granite_speech.modules import int8_weight
from granite_speech.modules.ctc_encoder import GraniteSpeech5Encoder
from tests.support.ctc_models import LENGTHS, SPECS, build_reference, labels, padded


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ctc")
    build_reference(SPECS[0]).save_pretrained(path)
    return path


@pytest.fixture
def model(folder: Path) -> GraniteSpeech5ForCTC:
    return GraniteSpeech5ForCTC.from_pretrained(folder)


def error(ours: torch.Tensor, truth: torch.Tensor) -> float:
    return float((ours.detach().double() - truth.detach().double()).norm() / truth.detach().double().norm())


# --- files -----------------------------------------------------------------------------------------------------------------------


def test_a_tied_head_is_one_parameter_and_is_written_once(model: GraniteSpeech5ForCTC, tmp_path: Path):
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "encoder.out.weight" in names and not any(name.startswith("ctc_head") for name in names)
    assert model.ctc_head.weight is model.encoder.out.weight and model.ctc_head.bias is model.encoder.out.bias


def test_a_state_dict_in_place_of_the_folders_weights(model: GraniteSpeech5ForCTC, folder: Path):
    theirs = transformers.GraniteSpeech5ForCTC.from_pretrained(folder).state_dict()
    for state in (theirs, {name: one for name, one in theirs.items() if not name.startswith("ctc_head")}):
        loaded = GraniteSpeech5ForCTC.from_pretrained(None, config=model.config, state_dict=state)
        assert all(torch.equal(loaded.state_dict()[name], one) for name, one in theirs.items())
        assert loaded.ctc_head.weight is loaded.encoder.out.weight
    with pytest.raises(CheckpointError, match=r"encoder\.input_linear\.weight"):
        GraniteSpeech5ForCTC.from_pretrained(None, config=model.config, state_dict={"encoder.out.bias": theirs["encoder.out.bias"]})


def test_load_state_dict_takes_either_head_of_a_tied_model(model: GraniteSpeech5ForCTC):
    state = {name: one + 1 for name, one in model.state_dict().items() if not name.startswith("encoder.out.")}
    model.load_state_dict(state)
    assert torch.equal(model.encoder.out.weight, state["ctc_head.weight"])


def test_given_values_are_written_by_any_names(model: GraniteSpeech5ForCTC, tmp_path: Path):
    state = {name: one.clone() + 1 for name, one in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=state, variant="plus", max_shard_size="20KB")
    loaded = GraniteSpeech5ForCTC.from_pretrained(tmp_path, variant="plus")
    assert all(torch.equal(one, state[name]) for name, one in loaded.state_dict().items())
    with pytest.raises(CheckpointError, match=r"without .*encoder\.out_mid"):
        model.save_pretrained(tmp_path, state_dict={name: one for name, one in state.items() if "out_mid" not in name})


def test_a_model_from_a_configuration_has_transformers_distribution_and_dtype(model: GraniteSpeech5ForCTC):
    theirs = transformers.GraniteSpeech5CTCConfig(**SPECS[0].config())
    for config in (theirs, model.config, model.config.to_dict()):
        made = GraniteSpeech5ForCTC._from_config(config, dtype=torch.bfloat16)
        assert {one.dtype for one in made.parameters()} == {torch.bfloat16}  # BatchNorm too, as in transformers
    weight = made.encoder.layers[0].feed_forward1.linear1.weight
    assert 0.015 < float(weight.float().std()) < 0.025
    assert not made.encoder.out.bias.any()


def test_weights_of_another_shape_are_an_error_or_random(model: GraniteSpeech5ForCTC, folder: Path):
    options = {"encoder_config": {"max_position_embeddings": 12}}
    with pytest.raises(CheckpointError, match=r"rel_pos_emb.*\(23, 16\).*\(25, 16\)"):
        GraniteSpeech5ForCTC.from_pretrained(folder, **options)
    loaded, info = GraniteSpeech5ForCTC.from_pretrained(folder, **options, ignore_mismatched_sizes=True, output_loading_info=True)
    assert len(info["mismatched_keys"]) == 4 and loaded.generate(**padded(loaded)).shape == (4, 15)


def test_each_family_names_the_class_for_the_other_ones_folder(folder: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="granite_speech5_ctc"):
        GraniteSpeechForConditionalGeneration.from_pretrained(folder)
    (tmp_path / "config.json").write_text('{"model_type": "granite_speech"}')
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(ConfigError, match="granite_speech5_ctc"):
        GraniteSpeech5ForCTC.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="GraniteSpeech5CTCConfig"):
        GraniteSpeech5ForCTC(GraniteSpeechForConditionalGeneration.config_class())


def test_the_encoder_of_a_whole_folder_and_in_bfloat16(model: GraniteSpeech5ForCTC, folder: Path, tmp_path: Path):
    encoder = GraniteSpeech5Encoder.from_pretrained(folder)
    inputs = padded(model)
    assert torch.equal(encoder(**inputs).last_hidden_state, model.get_encoder()(**inputs).last_hidden_state)
    narrow = GraniteSpeech5Encoder.from_pretrained(folder, dtype=torch.bfloat16)
    norm = narrow.layers[0].conv.norm
    assert norm.weight.dtype == norm.running_var.dtype == torch.float32 and narrow.out.weight.dtype == torch.bfloat16
    narrow.save_pretrained(tmp_path)
    again = GraniteSpeech5Encoder.from_pretrained(tmp_path)
    assert all(torch.equal(again.state_dict()[name], one) for name, one in narrow.state_dict().items())


# --- numbers ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "triton"])
@torch.no_grad()
def test_bfloat16_is_as_close_as_transformers(model: GraniteSpeech5ForCTC, folder: Path, monkeypatch: pytest.MonkeyPatch, backend: str):
    inputs = padded(model)
    truth = model(**inputs).logits[0]
    theirs = transformers.GraniteSpeech5ForCTC.from_pretrained(folder, dtype=torch.bfloat16)(**inputs).logits[0]
    monkeypatch.setenv(CHOICE, backend)
    ours = GraniteSpeech5ForCTC.from_pretrained(folder, dtype=torch.bfloat16)(**inputs).logits[0]
    assert ours.dtype == torch.bfloat16
    assert error(ours, truth) <= 1.25 * error(theirs, truth)


@torch.no_grad()
def test_under_autocast_it_is_as_close_as_transformers(model: GraniteSpeech5ForCTC, folder: Path):
    inputs = padded(model)
    truth, reference = model(**inputs).logits[0], transformers.GraniteSpeech5ForCTC.from_pretrained(folder)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = model(**inputs).logits[0], reference(**inputs).logits[0]
    assert ours.dtype == theirs.dtype
    assert error(ours, truth) <= 1.25 * error(theirs, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_int8_weights_are_close_and_the_last_layers_keep_theirs(folder: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype):
    if not has_int8():
        pytest.skip("a processor that is not fast at products of 8-bit integers")
    monkeypatch.setattr(int8_weight, "_FEWEST", 1)
    plain, model = (GraniteSpeech5ForCTC.from_pretrained(folder, dtype=dtype, **one) for one in ({}, {"quantize": "int8"}))
    attention = model.encoder.layers[3].self_attn
    assert attention.q_proj.packed.whole is attention.k_proj.packed.whole is attention.v_proj.packed.whole
    for one in (model.encoder.input_linear, model.encoder.out, model.encoder.out_mid, model.ctc_head):
        assert one.weight_scale is None
    for theirs, mine in zip(plain.encoder.layers, model.encoder.layers, strict=True):
        x = torch.randn(2, 9, 32, dtype=dtype)
        for name in ("feed_forward1", "conv"):
            assert error(getattr(mine, name)(x), getattr(theirs, name)(x)) < 0.03
    inputs = padded(model)
    assert error(model(**inputs).logits, plain(**inputs).logits) < 0.2
    with pytest.raises(Exception, match="int8"):
        model.save_pretrained(folder / "never")


@torch.no_grad()
def test_the_packed_path_is_that_of_generate(model: GraniteSpeech5ForCTC):
    inputs = padded(model)
    clips = model.encoder.clips(**inputs)
    states, left = model.encode_packed(clips.pack(inputs["input_features"]), clips)
    path = model.greedy_packed(states, left)
    sequences = model.generate(**inputs)
    for number, (first, length) in enumerate(zip(left.starts, left.lengths, strict=False)):
        assert path.ids[first : first + length].tolist() == sequences[number, :length].tolist()
        runs = [one for one in torch.unique_consecutive(sequences[number, :length]).tolist() if one != 0]
        assert path.tokens[first : first + int(path.counts[number])].tolist() == runs
        assert (sequences[number, length:] == 0).all()


# --- training --------------------------------------------------------------------------------------------------------------------


def test_batch_norm_counts_frames_and_no_padding(model: GraniteSpeech5ForCTC):
    inputs = padded(model, (40, 16))
    noisier = inputs | {"input_features": inputs["input_features"].clone()}
    noisier["input_features"][1, 16:] = 100.0
    statistics = []
    for given in (inputs, noisier):
        one = copy.deepcopy(model).train()
        one(**given)
        assert {int(layer.conv.norm.num_batches_tracked) for layer in one.encoder.layers} == {1}
        statistics.append(torch.cat([layer.conv.norm.running_mean for layer in one.encoder.layers]))
    assert torch.equal(*statistics)
    assert not torch.equal(statistics[0], torch.cat([layer.conv.norm.running_mean for layer in model.encoder.layers]))


@pytest.mark.parametrize("options", [{}, {"use_reentrant": True}], ids=str)
def test_gradient_checkpointing_gives_the_same_gradients_and_statistics(model: GraniteSpeech5ForCTC, options: dict):
    inputs = padded(model) | {"labels": labels(model)}
    found = []
    for checkpointing in (False, True):
        one = copy.deepcopy(model).train()
        if checkpointing:
            one.gradient_checkpointing_enable(options)
            assert one.is_gradient_checkpointing
        loss = one(**inputs).loss
        loss.backward()
        found.append(({name: p.grad for name, p in one.named_parameters()}, dict(one.named_buffers())))
    for plain, ours in zip(*found, strict=True):
        for name, value in plain.items():
            torch.testing.assert_close(ours[name], value, rtol=0, atol=2e-5 * float(value.abs().max()), msg=name)


def test_a_padded_batch_in_training_mode_with_hooks_gives_the_same_statistics(model: GraniteSpeech5ForCTC):
    inputs = padded(model)
    found = []
    for hooked in (False, True):
        one = copy.deepcopy(model).train()
        if hooked:
            one.encoder.layers[0].conv.norm.register_forward_hook(lambda *_: None)
        found.append((one(**inputs).logits.detach(), one.encoder.layers[0].conv.norm.running_var))
    for plain, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


def test_an_adapter_that_peft_trained_is_loaded_saved_and_merged(model: GraniteSpeech5ForCTC, folder: Path, tmp_path: Path):
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "linear2", "pointwise_lin1"], init_lora_weights=False)
    wrapped = get_peft_model(GraniteSpeech5ForCTC.from_pretrained(folder), config)
    wrapped.save_pretrained(tmp_path / "adapter")
    inputs = padded(model)
    expected, plain = wrapped(**inputs).logits, model(**inputs).logits
    assert not torch.allclose(plain, expected, atol=1e-2)
    model.load_adapter(tmp_path / "adapter")
    model.save_pretrained(tmp_path / "both")
    again = GraniteSpeech5ForCTC.from_pretrained(tmp_path / "both")
    merged = copy.deepcopy(again)
    merged.merge_adapter()
    merged.save_pretrained(tmp_path / "merged")
    for one in (model, again, merged, transformers.GraniteSpeech5ForCTC.from_pretrained(tmp_path / "merged")):
        torch.testing.assert_close(one(**inputs).logits[0], expected[0], rtol=0, atol=3e-4)


def test_lengths_that_leave_no_frame(model: GraniteSpeech5ForCTC):
    output = model(torch.randn(2, 3, 20), labels=torch.tensor([[1], [2]]))
    assert output.logits.shape == (2, 0, 23) and output.loss.item() == 0
    assert model.generate(torch.randn(1, 1, 20)).shape == (1, 0)
    assert model.generate(torch.randn(0, 8, 20)).shape == (0, 2)


def test_it_reports_what_transformers_asks_a_model_for(model: GraniteSpeech5ForCTC, folder: Path):
    theirs = transformers.GraniteSpeech5ForCTC.from_pretrained(folder)
    for name in ("main_input_name", "base_model_prefix", "loss_type", "supports_gradient_checkpointing", "dtype", "device"):
        assert getattr(model, name) == getattr(theirs, name), name
    assert model.num_parameters() == theirs.num_parameters() and model.get_output_embeddings() is None
    with pytest.raises(NotImplementedError):
        model.get_input_embeddings()
    assert isinstance(model.config, GraniteSpeech5CTCConfig) and len(LENGTHS) == len(padded(model)["input_features"])
