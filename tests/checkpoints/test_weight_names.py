"""Every spelling of the weights' names, written by transformers and peft themselves if their present versions still use it."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import GraniteSpeechConfig, GraniteSpeechForConditionalGeneration, GraniteSpeechModel
from transformers.utils import logging

from granite_speech.checkpoints import weight_names
from granite_speech.checkpoints.folder import Checkpoint, read_adapter
from granite_speech.checkpoints.tensor_file import open_tensors, read_tensor, staging_buffer
from granite_speech.checkpoints.writing import save
from granite_speech.errors import CheckpointError

logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings("ignore")  # peft warns about a base model without a name

CPU = torch.device("cpu")
LORA = dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


def build(*, tied=True, adapter=False, kind=GraniteSpeechForConditionalGeneration):
    torch.manual_seed(7)
    config = GraniteSpeechConfig(
        text_config=dict(
            model_type="granite", vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4
        ),
        encoder_config=dict(
            input_dim=8,
            num_layers=2,
            hidden_dim=12,
            num_heads=2,
            dim_head=6,
            output_dim=5,
            context_size=4,
            max_pos_emb=8,
            feedforward_mult=2,
        ),
        projector_config=dict(
            model_type="blip_2_qformer",
            hidden_size=12,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            encoder_hidden_size=12,
            vocab_size=5,
        ),
        audio_token_index=39,
        tie_word_embeddings=tied,
    )
    model = kind(config)
    if adapter:
        model.add_adapter(LoraConfig(**LORA))
    return model


def truth(model):
    """The model's weights with the released folders' names, by rules independent of the code under test; a tied head once."""
    weights = {}
    for key, tensor in model.state_dict().items():
        name = key.removeprefix("model.").replace(".base_layer", "").replace(".default", "")
        if name.startswith("language_model."):
            name = "language_model.model." + name.removeprefix("language_model.")
        elif name == "lm_head.weight":
            if tensor.data_ptr() == model.state_dict()["model.language_model.embed_tokens.weight"].data_ptr():
                continue
            name = "language_model.lm_head.weight"
        weights[name] = tensor.clone()
    return weights


def write_released(folder, model):
    """The layout of the released folders, with an adapter file if the model has an adapter."""
    model.save_pretrained(str(folder))  # config.json and adapter_config.json; the weights are replaced
    weights = truth(model)
    save_file({k: v for k, v in weights.items() if "lora" not in k}, folder / "model.safetensors", {"format": "pt"})
    if (folder / "adapter_model.safetensors").exists():
        adapter = {f"base_model.model.{k}": v for k, v in weights.items() if "lora" in k}
        assert "base_model.model.language_model.model.layers.0.self_attn.q_proj.lora_A.weight" in adapter
        save_file(adapter, folder / "adapter_model.safetensors", {"format": "pt"})
    return weights


def load(folder, kind=GraniteSpeechForConditionalGeneration):
    model, info = kind.from_pretrained(str(folder), output_loading_info=True)
    assert not any(info.values()), info
    return model


def released(folder, tied):
    return write_released(folder, build(tied=tied))


def released_with_adapter(folder, tied):
    return write_released(folder, build(tied=tied, adapter=True))


def adapter_in_both_files(folder, tied):
    weights = write_released(folder, build(tied=tied, adapter=True))
    layers = {k.rsplit(".lora_", 1)[0] + ".weight" for k in weights if "lora" in k}
    renamed = {}
    for name, tensor in weights.items():
        if "lora" in name:
            renamed[name.replace(".weight", ".default.weight")] = tensor + 1  # different values, because the adapter's file must win
        else:
            renamed[name.replace(".weight", ".base_layer.weight") if name in layers else name] = tensor
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    return weights


def loaded_and_saved(folder, tied):
    write_released(folder, build(tied=tied))
    model = load(folder)
    model.save_pretrained(str(folder))
    return truth(model)


def loaded_then_adapter(folder, tied):
    write_released(folder, build(tied=tied))
    model = load(folder)
    model.add_adapter(LoraConfig(**LORA))
    model.save_pretrained(str(folder))
    return truth(model)


def state_dict_in_memory(folder, tied):
    model = build(tied=tied)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return truth(model) | ({"language_model.lm_head.weight": state["lm_head.weight"]})


def built_from_config(folder, tied):
    model = build(tied=tied)
    model.save_pretrained(str(folder))
    return truth(model)


def built_from_config_with_adapter(folder, tied):
    model = build(tied=tied, adapter=True)
    model.save_pretrained(str(folder))
    return truth(model)


def without_head(folder, tied):
    model = build(tied=tied, kind=GraniteSpeechModel)
    model.save_pretrained(str(folder))
    return truth(model)


def without_head_in_memory(folder, tied):
    model = build(tied=tied, kind=GraniteSpeechModel)
    save_file({k: v.clone() for k, v in model.state_dict().items()}, folder / "model.safetensors", {"format": "pt"})
    return truth(model)


def released_with_adapter_loaded_and_saved(folder, tied):
    write_released(folder, build(tied=tied, adapter=True))
    model = load(folder)
    model.save_pretrained(str(folder))
    return truth(model)


def newer_adapter_file_loaded_and_saved(folder, tied):
    loaded_then_adapter(folder, tied)
    model = load(folder)
    model.save_pretrained(str(folder))
    return truth(model)


def built_from_config_with_adapter_loaded_and_saved(folder, tied):
    built_from_config_with_adapter(folder, tied)
    model = load(folder)
    model.save_pretrained(str(folder))
    return truth(model)


def as_5_17_wrote_it(folder):
    """Rename the weights of a model built from its config: transformers 5.17 wrote one `model.` more before its language model."""
    weights = load_file(folder / "model.safetensors")
    inner = r"^(language_model\.model\.|language_base_model\.model\.model\.model\.)(?!lm_head)"
    save_file({re.sub(inner, r"\1model.", name): one for name, one in weights.items()}, folder / "model.safetensors", {"format": "pt"})


def built_from_config_by_5_17(folder, tied):
    weights = built_from_config(folder, tied)
    as_5_17_wrote_it(folder)
    return weights


def built_from_config_with_adapter_by_5_17(folder, tied):
    weights = built_from_config_with_adapter(folder, tied)
    as_5_17_wrote_it(folder)
    return weights


def built_from_config_with_adapter_loaded_and_saved_by_5_17(folder, tied):
    weights = built_from_config_with_adapter_loaded_and_saved(folder, tied)
    as_5_17_wrote_it(folder)
    return weights


# Layout → a key that its files must have, so that this test fails if transformers changes what it writes.
LAYOUTS = {
    released: "language_model.model.layers.0.self_attn.q_proj.weight",
    released_with_adapter: "language_model.model.layers.0.self_attn.q_proj.weight",
    adapter_in_both_files: "language_model.model.layers.0.self_attn.q_proj.lora_A.default.weight",
    loaded_and_saved: "language_model.model.layers.0.self_attn.q_proj.weight",
    loaded_then_adapter: "language_model.model.layers.0.self_attn.q_proj.lora_A.default.weight",
    state_dict_in_memory: "model.language_model.layers.0.self_attn.q_proj.weight",
    built_from_config: "language_model.model.layers.0.self_attn.q_proj.weight",
    built_from_config_with_adapter: "language_model.model.layers.0.self_attn.q_proj.base_layer.weight",
    built_from_config_by_5_17: "language_model.model.model.layers.0.self_attn.q_proj.weight",
    built_from_config_with_adapter_by_5_17: "language_model.model.model.layers.0.self_attn.q_proj.base_layer.weight",
    without_head: "language_model.model.layers.0.self_attn.q_proj.weight",
    without_head_in_memory: "language_model.layers.0.self_attn.q_proj.weight",
    released_with_adapter_loaded_and_saved: "base_model.model.language_model.model.layers.0.self_attn.q_proj.base_layer.weight",
    newer_adapter_file_loaded_and_saved: "language_base_model.model.model.model.layers.0.self_attn.q_proj.base_layer.weight",
    built_from_config_with_adapter_loaded_and_saved: "language_base_model.model.model.model.layers.0.self_attn.q_proj.base_layer.weight",
    built_from_config_with_adapter_loaded_and_saved_by_5_17: (
        "language_base_model.model.model.model.model.layers.0.self_attn.q_proj.base_layer.weight"
    ),
}


def read_all(checkpoint):
    return {name: read_one(entry) for name, entry in checkpoint.entries.items()}


def read_one(entry):
    with open_tensors(entry.file) as file:
        return read_tensor(file, entry, dtype=entry.dtype, device=CPU, staging=staging_buffer(CPU))


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert different == []


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("write", LAYOUTS, ids=lambda write: write.__name__)
def test_every_layout_opens_with_the_same_names_and_values(write, tied, tmp_path):
    expected = write(tmp_path, tied)
    assert LAYOUTS[write] in load_file(tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    assert_same(read_all(checkpoint), expected)
    assert checkpoint.head_is_tied() is (tied or "without_head" in write.__name__)
    assert (checkpoint.adapter_config is not None) == any("lora" in name for name in expected)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_saved_weights_load_in_transformers_with_equal_values(tied, tmp_path):
    source = build(tied=tied, adapter=True)
    weights = truth(source)
    save(
        tmp_path,
        {k: v for k, v in weights.items() if "lora" not in k},
        config=source.config.to_dict(),
        adapter_tensors={k: v for k, v in weights.items() if "lora" in k},
        adapter_config={"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        max_shard_size=20_000,
    )
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert_same(truth(load(tmp_path)), weights)
    assert_same(read_all(Checkpoint.open(tmp_path)), weights)


def test_pefts_names_for_a_headless_models_adapter_are_read(tmp_path):
    model = build(adapter=True, kind=GraniteSpeechModel)
    model.save_pretrained(str(tmp_path))
    assert "base_model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight" in load_file(tmp_path / "adapter_model.safetensors")
    config, entries = read_adapter(tmp_path)
    assert config["r"] == 4
    expected = {name: tensor for name, tensor in truth(model).items() if "lora" in name}
    assert_same({name: read_one(entry) for name, entry in entries.items()}, expected)
    with pytest.raises(CheckpointError, match=r"an adapter for .* and no model"):
        Checkpoint.open(tmp_path)


def test_of_several_adapters_the_one_in_the_adapter_file_is_loaded(tmp_path):
    model = build(adapter=True)
    model.add_adapter(LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj"], init_lora_weights=False), adapter_name="second")
    model.save_pretrained(str(tmp_path))
    entries = Checkpoint.open(tmp_path).entries
    lora = {name: entry.shape for name, entry in entries.items() if "lora" in name}
    assert lora == {
        f"language_model.model.layers.{i}.self_attn.q_proj.lora_{m}.weight": shape
        for i in (0, 1)
        for m, shape in (("A", (2, 16)), ("B", (16, 2)))
    }
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lora_A\.default\.weight' and .*lora_A\.second\.weight' both name"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("lm_head.weight", "language_model.lm_head.weight"),
        ("base_model.model.lm_head.lora_B.speech.weight", "language_model.lm_head.lora_B.weight"),
        ("language_base_model.model.model.lm_head.weight", "language_model.lm_head.weight"),
        ("model.encoder.layers.0.ff1.up_proj.base_layer.bias", "encoder.layers.0.ff1.up_proj.bias"),
        ("base_model.model.encoder.layers.0.ff1.up_proj.lora_A.weight", "encoder.layers.0.ff1.up_proj.lora_A.weight"),
        (
            "model.projector.qformer.encoder.layer.0.output_query.dense.weight",
            "projector.qformer.encoder.layer.0.output_query.dense.weight",
        ),
        ("encoder.layers.3.conv.batch_norm.num_batches_tracked", "encoder.layers.3.conv.batch_norm.num_batches_tracked"),
        ("model.encoder.attention_dists", None),
        ("attention_dists", None),
        ("language_model.model.rotary_emb.inv_freq", None),
        ("model.language_model.rotary_emb.original_inv_freq", None),
        ("projector.qformer.embeddings.position_ids", None),
        ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.weight"),
        ("vision_tower.encoder.weight", "vision_tower.encoder.weight"),
    ],
)
def test_canonical_name(given, expected):
    assert weight_names.canonical(given) == expected


NAMES = st.sampled_from(
    [
        "encoder.layers.0.attn.to_q.weight",
        "projector.query",
        "language_model.model.layers.1.self_attn.v_proj.weight",
        "language_model.model.embed_tokens.weight",
        "language_model.model.norm.weight",
        "language_model.lm_head.weight",
    ]
)


@settings(deadline=None)
@given(name=NAMES, wrappers=st.sampled_from(["", "model.", "base_model.model.", "base_model.model.model."]), inner=st.integers(0, 3))
def test_wrappers_are_ignored(name, wrappers, inner):
    spelled = wrappers + name.replace("language_model.model.", "language_model." + "model." * inner)
    assert weight_names.canonical(spelled) == name
    assert weight_names.canonical(name) == name


PARTS = ["base_model", "model", "language_model", "language_base_model", "encoder", "projector", "lm_head", "layers", "0", "base_layer"]


@settings(deadline=None)
@given(st.lists(st.sampled_from(PARTS), unique=True), st.sampled_from(["weight", "lora_A.weight", "lora_B.default.weight", "query"]))
def test_a_canonical_name_is_its_own_canonical_name(parts, last):
    name = weight_names.canonical(".".join([*parts, last]))
    assert weight_names.canonical(name) == name


def test_two_spellings_of_one_weight_are_an_error():
    with pytest.raises(CheckpointError, match=r"'encoder\.out\.bias' and 'model\.encoder\.out\.bias' both name"):
        weight_names.canonical_keys(["projector.query", "encoder.out.bias", "model.encoder.out.bias"])
    assert weight_names.canonical_keys(["model.projector.query", "attention_dists"]) == {"model.projector.query": "projector.query"}
