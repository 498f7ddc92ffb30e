"""from_pretrained and save_pretrained: the same logits from every layout, files that transformers reads, and refusals."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from granite_speech import (
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    GraniteSpeechConfig,
    GraniteSpeechForConditionalGeneration,
    GraniteSpeechModel,
    InputError,
    UnsupportedError,
)
from granite_speech.modules.adapter import attach_adapter
from granite_speech.modules.adapter_config import AdapterConfig
from tests.checkpoints.test_weight_names import LAYOUTS, LORA, build, truth
from tests.support.reference_models import SPECS, build_reference, clip_inputs, scale_logits, write_released_layout

pytestmark = pytest.mark.filterwarnings("ignore")

IDS = torch.tensor([[5, 39, 39, 39, 7, 11, 3]])
FEATURES = torch.randn(1, 11, 8, generator=torch.Generator().manual_seed(3))


def from_weights(weights: dict[str, torch.Tensor], tied: bool) -> GraniteSpeechForConditionalGeneration:
    """Our model with the configuration of `test_weight_names.build` and these weights, made without any file."""
    model = GraniteSpeechForConditionalGeneration(GraniteSpeechConfig.from_dict(build(tied=tied).config.to_dict())).eval()
    config = AdapterConfig.plain(LORA["r"], LORA["lora_alpha"], LORA["target_modules"])
    attach_adapter(model, config, [name.removesuffix(".lora_A.weight") for name in weights if name.endswith(".lora_A.weight")])
    model.load_state_dict(weights)
    return model


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("write", LAYOUTS, ids=lambda write: write.__name__)
def test_every_layout_gives_identical_results(write, tied, tmp_path):
    weights = write(tmp_path, tied)
    if not (tmp_path / "config.json").exists():  # a state dict in memory has none
        (tmp_path / "config.json").write_text(json.dumps(build(tied=tied).config.to_dict()))
    headless = "without_head" in write.__name__
    expected = from_weights(weights, tied or headless)
    inputs = {"input_ids": IDS, "input_features": FEATURES}
    with torch.no_grad():
        states = GraniteSpeechModel.from_pretrained(tmp_path)(**inputs).last_hidden_state
        assert torch.equal(states, expected.model(**inputs).last_hidden_state)
        if headless and not tied:
            # The configuration has an untied head but the file has none: it must not be invented.
            with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
                GraniteSpeechForConditionalGeneration.from_pretrained(tmp_path)
            return
        model = GraniteSpeechForConditionalGeneration.from_pretrained(str(tmp_path))
        assert torch.equal(model(**inputs).logits, expected(**inputs).logits)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == (tied or headless)
    assert not model.training


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
@pytest.mark.parametrize("path_type", [str, lambda path: path], ids=["str", "Path"])
def test_saved_models_load_in_transformers(spec, path_type, tmp_path):
    first = write_released_layout(build_reference(spec), tmp_path / "first")
    ours = GraniteSpeechForConditionalGeneration.from_pretrained(path_type(first))
    ours.save_pretrained(path_type(tmp_path / "second"), max_shard_size="100KB")
    assert (tmp_path / "second" / "model.safetensors.index.json").exists()
    kind = "GraniteSpeechPlus" if spec.is_plus else "GraniteSpeech"
    reference, info = getattr(transformers, f"{kind}ForConditionalGeneration").from_pretrained(
        str(tmp_path / "second"), output_loading_info=True
    )
    assert not any(info.values()), info
    scale_logits(reference)
    again = GraniteSpeechForConditionalGeneration.from_pretrained(tmp_path / "second")
    inputs = clip_inputs(spec, 31)
    with torch.no_grad():
        logits = ours(**inputs).logits
        assert torch.equal(again(**inputs).logits, logits)
        assert float((reference(**inputs).logits - logits).abs().max() / logits.abs().max()) < 3e-5
    for part in ("text_config", "encoder_config", "projector_config"):
        assert getattr(again.config, part) == getattr(ours.config, part)


def test_an_adapter_attached_here_is_saved_with_its_configuration(tmp_path):
    model = from_weights(truth(build()), tied=True)
    config = AdapterConfig.plain(2, 6, ["k_proj"])
    attach_adapter(model, config, ["language_model.model.layers.1.self_attn.k_proj", "encoder.layers.0.ff1.up_proj"])
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    again = GraniteSpeechForConditionalGeneration.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS, input_features=FEATURES).logits, model(input_ids=IDS, input_features=FEATURES).logits)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], written["target_modules"]) == (2, 6, ["k_proj", "up_proj"])


@pytest.fixture
def folder(tmp_path):
    return write_released_layout(build_reference(SPECS[0]), tmp_path / "checkpoint")


def test_a_merged_adapter_gives_the_same_logits_and_is_saved_in_the_weights(folder, tmp_path):
    model = GraniteSpeechForConditionalGeneration.from_pretrained(folder)
    inputs = clip_inputs(SPECS[0], 31)
    with torch.no_grad():
        before = model(**inputs).logits
        model.merge_adapter()
        merged = model(**inputs).logits
        assert float((merged - before).abs().max() / before.abs().max()) < 1e-5
        model.save_pretrained(tmp_path / "merged")
        assert not (tmp_path / "merged" / "adapter_config.json").exists()
        again = GraniteSpeechForConditionalGeneration.from_pretrained(tmp_path / "merged")
        assert torch.equal(again(**inputs).logits, merged)


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", "torch.bfloat16"])
@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_the_dtype_can_be_chosen(folder, name, dtype):
    model = GraniteSpeechForConditionalGeneration.from_pretrained(folder, **{name: dtype})
    assert {one.dtype for one in model.parameters()} == {torch.bfloat16}
    assert model.generate(**clip_inputs(SPECS[0], 31), max_new_tokens=3).shape[1] > 0


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_configurations_dtype_is_the_default(folder, key):
    values = json.loads((folder / "config.json").read_text())
    values.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps(values | {key: "float16"}))
    assert GraniteSpeechForConditionalGeneration.from_pretrained(folder, dtype="auto").dtype == torch.float16
    assert GraniteSpeechForConditionalGeneration.from_pretrained(folder).dtype == torch.float16
    assert GraniteSpeechForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize("options", [{"device": "cpu"}, {"device_map": "cpu"}, {"device_map": {"": "cpu"}}, {"device_map": "auto"}])
def test_the_device_can_be_chosen(folder, options):
    expected = "cuda" if options.get("device_map") == "auto" and torch.cuda.is_available() else "cpu"
    assert GraniteSpeechForConditionalGeneration.from_pretrained(folder, **options).device.type == expected


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"attn_implementaton": "eager"}, "'attn_implementaton'.*Did you mean 'attn_implementation'"),
        ({"attn_implementation": "egaer"}, "attn_implementation='egaer'"),
        ({"attention_dropout": 0.1}, "Pass text_config={'attention_dropout': 0.1}"),
        ({"max_new_tokenz": 3}, "unknown option 'max_new_tokenz'"),
        ({"dtype": "int8"}, "int8"),
        ({"dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
        ({"dtype": 16}, "16"),
        ({"device": "tpu9"}, "tpu9"),
        ({"device": "cpu", "device_map": "cpu"}, "device and device_map"),
        ({"device_map": {"encoder": 0, "language_model": 1}}, "language_model"),
    ],
)
def test_bad_options_are_refused(folder, options, named):
    with pytest.raises(InputError, match=named):
        GraniteSpeechForConditionalGeneration.from_pretrained(folder, **options)


def change_config(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def change_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


DAMAGE = {
    "no config": (lambda f: (f / "config.json").unlink(), CheckpointNotFoundError, "config.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), CheckpointNotFoundError, "safetensors"),
    "truncated": (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]), CheckpointError, "bytes"),
    "missing": (lambda f: change_weights(f, lambda t: t.pop("encoder.out.bias")), CheckpointError, r"encoder\.out\.bias"),
    "extra": (lambda f: change_weights(f, lambda t: t.update({"encoder.new": torch.ones(2)})), CheckpointError, r"encoder\.new"),
    "shape": (lambda f: change_config(f, window_size=10), CheckpointError, r"projector\.query.*\(1, 3, 24\).*\(1, 2, 24\)"),
    "nar": (lambda f: change_config(f, model_type="granite_speech_nar"), UnsupportedError, "non-autoregressive"),
    "turboctc": (lambda f: (f / "config.json").write_text('{"model_type": "granite_speech5_ctc"}'), ConfigError, "class of that model"),
    "another model": (lambda f: change_config(f, model_type="whisper"), UnsupportedError, "whisper"),
    "no model type": (lambda f: change_config(f, model_type=None), ConfigError, "model_type"),
    "only a part": (lambda f: (f / "config.json").write_text('{"model_type": "granite_speech_encoder"}'), ConfigError, "part of a model"),
    "absurd": (lambda f: change_config(f, downsample_rate=7), ConfigError, "downsample_rate"),
    "adapter without weights": (lambda f: (f / "adapter_model.safetensors").unlink(), CheckpointError, "adapter_model"),
    "another adapter": (lambda f: (f / "adapter_config.json").write_text('{"peft_type": "IA3"}'), UnsupportedError, "IA3"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_folder_is_refused(kind, folder):
    damage, expected, message = DAMAGE[kind]
    damage(folder)
    with pytest.raises(expected, match=message):
        GraniteSpeechForConditionalGeneration.from_pretrained(folder)


def test_missing_keys_are_named_up_to_ten(folder):
    change_weights(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if ".ff1." in name])
    with pytest.raises(CheckpointError, match=r"30 weights missing.*and 20 more"):
        GraniteSpeechForConditionalGeneration.from_pretrained(folder)


def test_a_folder_with_only_a_pickle_is_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        GraniteSpeechForConditionalGeneration.from_pretrained(folder)


def test_a_missing_adapter_gives_a_warning(folder):
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_config.json").unlink()
    with pytest.warns(UserWarning, match="has_lora_adapter"):
        GraniteSpeechForConditionalGeneration.from_pretrained(folder)


def test_generation_config_is_used_and_kept(folder, tmp_path):
    (folder / "generation_config.json").write_text('{"max_new_tokens": 3, "eos_token_id": []}')
    model = GraniteSpeechForConditionalGeneration.from_pretrained(folder)
    inputs = clip_inputs(SPECS[0], 31)
    assert model.generate(**inputs).shape[1] == inputs["input_ids"].shape[1] + 3
    model.save_pretrained(tmp_path / "copy")
    assert json.loads((tmp_path / "copy" / "generation_config.json").read_text()) == {"max_new_tokens": 3, "eos_token_id": []}


def test_saving_over_the_folder_a_model_was_loaded_from(folder):
    model = GraniteSpeechForConditionalGeneration.from_pretrained(folder)
    copy = shutil.copytree(folder, folder.with_name("copy"))
    model.save_pretrained(folder)
    assert load_file(folder / "model.safetensors").keys() == load_file(copy / "model.safetensors").keys()
    again = GraniteSpeechForConditionalGeneration.from_pretrained(folder)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_a_model_loaded_in_inference_mode_can_be_trained():
    with torch.inference_mode():
        model = GraniteSpeechForConditionalGeneration.from_pretrained("embedded")
    model(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    assert model.lm_head.weight.grad is not None
    assert not any(one.is_inference() for one in (*model.parameters(), *model.buffers()))
