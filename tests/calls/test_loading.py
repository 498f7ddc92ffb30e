"""Loading models and processors, as users write it, here and in transformers."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from granite_speech import (
    AutoModelForSpeechSeq2Seq,
    CheckpointError,
    CheckpointNotFoundError,
    GraniteSpeechForConditionalGeneration,
    GraniteSpeechModel,
    InputError,
    UnsupportedError,
)
from granite_speech.checkpoints.hub import EMBEDDED_FOLDER
from tests.support.two_libraries import Call, comparison

PARAMETER = "model.encoder.layers.0.conv.batch_norm.running_mean"
NOT_FOR_PARTS = "transformers reads a value of a part only in the part's dictionary; both refuse it"


def load(lib, **options):
    return lib.GraniteSpeechForConditionalGeneration.from_pretrained(lib.folder, **options)


def words(lib, model):
    """The words of the first clip, by a model that was loaded in the call."""
    if lib.name == "transformers":
        from tests.support.reference_models import scale_logits

        scale_logits(model)
    return lib.words(model.eval().generate(**lib.inputs, max_new_tokens=4))


def dtypes(model):
    return {str(one.dtype) for one in model.parameters()}


def in_subfolder(lib, source=None):
    folder = lib.new_folder()
    shutil.copytree(source or lib.folder, folder / "checkpoint-5")
    return str(folder)


def without_adapter(lib):
    folder = lib.new_folder()
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        if (Path(lib.folder) / name).exists():
            shutil.copy(Path(lib.folder) / name, folder)
    return str(folder)


def weights(lib):
    """The state dict of the model without its adapter, by the names of each package."""
    return load_model(lib, without_adapter(lib)).state_dict()


def load_model(lib, folder, **options):
    return lib.GraniteSpeechForConditionalGeneration.from_pretrained(folder, **options)


def resized(lib):
    """A folder whose projector has another number of queries than its configuration says."""
    folder = without_adapter(lib)
    tensors = load_file(f"{folder}/model.safetensors")
    tensors["projector.query"] = torch.zeros(1, 7, tensors["projector.query"].shape[2])
    save_file(tensors, f"{folder}/model.safetensors", {"format": "pt"})
    return folder


def facts(model):
    config = model.config
    names = ("name_or_path", "_attn_implementation", "dtype", "torch_dtype", "architectures", "model_type", "return_dict")
    return {name: getattr(config, name) for name in names}


CALLS = {
    # where from
    "a folder": Call(lambda lib: [load(lib).dtype, load(lib).device, load(lib).training]),
    "a Path": Call(lambda lib: lib.GraniteSpeechForConditionalGeneration.from_pretrained(Path(lib.folder)).dtype),
    "the folder by name": Call(
        lambda lib: lib.GraniteSpeechForConditionalGeneration.from_pretrained(pretrained_model_name_or_path=lib.folder).dtype
    ),
    "a relative path": Call(lambda lib: lib.AutoModelForSpeechSeq2Seq.from_pretrained(os.path.relpath(lib.folder)).dtype),
    "a subfolder": Call(
        lambda lib: words(lib, load_model(lib, in_subfolder(lib), subfolder="checkpoint-5")),
        differs="5.23 finds the adapter in the subfolder, and then takes the folder for one without a model",
    ),
    "a subfolder without an adapter": Call(
        lambda lib: load_model(lib, in_subfolder(lib, without_adapter(lib)), subfolder="checkpoint-5").dtype
    ),
    "the hub's options": Call(
        lambda lib: load(lib, cache_dir=None, force_download=False, local_files_only=True, token=None, revision="main").dtype
    ),
    "a file in place of a folder": Call(
        lambda lib: load_model(lib, lib.folder + "/model.safetensors"), refused=CheckpointError, differs="both refuse it"
    ),
    "no such folder": Call(lambda lib: load_model(lib, "./nowhere"), refused=CheckpointNotFoundError, differs="both refuse it"),
    # dtype and device
    "dtype": Call(lambda lib: dtypes(load(lib, dtype=torch.bfloat16))),
    "dtype by name": Call(lambda lib: dtypes(load(lib, dtype="float16"))),
    "torch_dtype": Call(lambda lib: dtypes(load(lib, torch_dtype=torch.float16))),
    "torch_dtype auto": Call(lambda lib: dtypes(load(lib, torch_dtype="auto"))),
    "no dtype": Call(lambda lib: dtypes(load(lib, dtype=None))),
    "the dtype in the configuration": Call(
        lambda lib: (lambda c: [c.dtype, c.text_config.dtype, c.encoder_config.dtype])(load(lib, dtype="bfloat16").config)
    ),
    "device_map": Call(lambda lib: load(lib, device_map="cpu").device),
    "device_map as a dictionary": Call(lambda lib: load(lib, device_map={"": "cpu"}).device),
    "device_map and what belongs to it": Call(
        lambda lib: load(lib, device_map="cpu", max_memory={"cpu": "8GB"}, offload_folder="offload", offload_buffers=False).dtype
    ),
    "device_map by modules": Call(lambda lib: load(lib, device_map={"model": "cpu", "lm_head": "cpu"}).device),
    # options that change nothing
    "remote code": Call(lambda lib: words(lib, lib.AutoModelForSpeechSeq2Seq.from_pretrained(lib.folder, trust_remote_code=True))),
    "attention": Call(lambda lib: [load(lib, attn_implementation=one).config._attn_implementation for one in ("eager", "sdpa", None)]),
    "the attention of the parts": Call(
        lambda lib: (
            load(lib, attn_implementation={"text_config": "eager", "encoder_config": "sdpa"}).config.text_config._attn_implementation
        )
    ),
    "set attention": Call(
        lambda lib: (lambda m: (m.set_attn_implementation("eager"), m.config._attn_implementation)[1])(load(lib)),
        differs="transformers warns that it does not change this model's after loading",
    ),
    "safetensors": Call(lambda lib: words(lib, load(lib, use_safetensors=True, weights_only=True, disable_mmap=True))),
    "memory": Call(lambda lib: load(lib, low_cpu_mem_usage=True, offload_state_dict=False, _fast_init=True, mirror=None).dtype),
    "nothing, by name": Call(
        lambda lib: (
            load(lib, quantization_config=None, gguf_file=None, variant=None, state_dict=None, fusion_config=None, tp_plan=None).dtype
        )
    ),
    "kernels": Call(lambda lib: load(lib, use_kernels=False, experts_implementation="eager", key_mapping=None, adapter_kwargs={}).dtype),
    # configurations
    "a configuration": Call(lambda lib: (lambda config: words(lib, load(lib, config=config)))(lib.AutoConfig.from_pretrained(lib.folder))),
    "a configuration by path": Call(lambda lib: words(lib, load(lib, config=lib.folder))),
    "a configuration is not changed": Call(
        lambda lib: (lambda config: (load(lib, config=config, dtype=torch.bfloat16), config.dtype)[1])(
            lib.AutoConfig.from_pretrained(lib.folder)
        )
    ),
    "a changed value": Call(lambda lib: load(lib, has_lora_adapter=False).config.has_lora_adapter),
    "a changed value of a part": Call(
        lambda lib: (lambda c: [c.attention_dropout, c.hidden_size])(load(lib, text_config={"attention_dropout": 0.1}).config.text_config)
    ),
    "a changed common value": Call(lambda lib: load(lib, output_hidden_states=True).config.output_hidden_states),
    "a value of a part": Call(lambda lib: load(lib, attention_dropout=0.1), refused=InputError, differs=NOT_FOR_PARTS),
    "a misspelled option": Call(lambda lib: load(lib, trust_remote=True), refused=InputError, differs="both refuse it"),
    "what the model knows": Call(lambda lib: facts(load(lib))),
    "names of the model": Call(
        lambda lib: (lambda m: [m.name_or_path, m.base_model_prefix, m.main_input_name, m.config_class.__name__])(load(lib))
    ),
    "a head of its own": Call(
        lambda lib: load(lib, tie_word_embeddings=False), refused=InputError, differs="transformers gives the head random weights"
    ),
    "without its head": Call(lambda lib: [type(one.base_model).__name__ for one in (lib.model, lib.model.model)]),
    "what must stay together": Call(lambda lib: lib.model._no_split_modules),
    # what comes back
    "loading information": Call(lambda lib: load(lib, output_loading_info=True)[1]),
    "another shape": Call(lambda lib: load_model(lib, resized(lib)), refused=CheckpointError, differs="both refuse it"),
    "another shape is ignored": Call(
        lambda lib: [
            (name.removeprefix("model."), *map(tuple, shapes))
            for name, *shapes in load_model(lib, resized(lib), ignore_mismatched_sizes=True, output_loading_info=True)[1]["mismatched_keys"]
        ]
    ),
    # weights in memory
    "a state dict and a configuration": Call(
        lambda lib: words(lib, load_model(lib, None, config=lib.AutoConfig.from_pretrained(lib.folder), state_dict=weights(lib)))
    ),
    # sizes
    "number of parameters": Call(
        lambda lib: (lambda m: [m.num_parameters(), m.num_parameters(True), m.num_parameters(exclude_embeddings=True)])(
            load_model(lib, without_adapter(lib))
        )
    ),
    "number of parameters with an adapter": Call(
        lambda lib: [lib.model.num_parameters(), lib.model.num_parameters(exclude_embeddings=True)]
    ),
    "memory footprint": Call(
        lambda lib: [lib.model.get_memory_footprint(return_buffers=False), load(lib, dtype="float16").get_memory_footprint(False)]
    ),
    "a parameter by name": Call(lambda lib: [lib.model.get_parameter_or_buffer(name).shape for name in ("lm_head.weight", PARAMETER)]),
    "accepted settings": Call(
        lambda lib: (lambda m: [m.set_use_kernels(False), m.set_experts_implementation("eager"), m.post_init()])(load(lib))
    ),
    "a hint about padding": Call(
        lambda lib: lib.model.warn_if_padding_and_no_attention_mask(lib.inputs["input_ids"], lib.inputs["attention_mask"])
    ),
    # new models
    "a new model": Call(lambda lib: lib.AutoModelForSpeechSeq2Seq.from_config(lib.AutoConfig.from_pretrained(lib.folder)).num_parameters()),
    "a new model in a dtype": Call(
        lambda lib: [
            str(lib.AutoModel.from_config(lib.AutoConfig.from_pretrained(lib.folder), **options).dtype)
            for options in (
                {"dtype": torch.float16},
                {"torch_dtype": "bfloat16"},
                {"trust_remote_code": True},
                {"attn_implementation": "eager"},
            )
        ]
    ),
    "a new model is trained": Call(lambda lib: lib.AutoModel.from_config(lib.AutoConfig.from_pretrained(lib.folder)).training),
    "a new model of a class": Call(
        lambda lib: lib.GraniteSpeechForConditionalGeneration(lib.AutoConfig.from_pretrained(lib.folder)).config._attn_implementation
    ),
    "a new model of a dtype": Call(
        lambda lib: (
            lib.GraniteSpeechForConditionalGeneration._from_config(lib.AutoConfig.from_pretrained(lib.folder), dtype="float16").dtype
        )
    ),
    # Auto classes
    "the Auto classes": Call(
        lambda lib: [
            type(getattr(lib, name).from_pretrained(lib.folder)).__name__
            for name in ("AutoConfig", "AutoModel", "AutoModelForSpeechSeq2Seq", "AutoModelForSeq2SeqLM", "AutoModelForMultimodalLM")
        ]
    ),
    "AutoModel": Call(lambda lib: lib.AutoModel.from_pretrained(lib.folder, dtype="auto").eval()(**lib.inputs).last_hidden_state),
    "AutoProcessor": Call(lambda lib: lib.AutoProcessor.from_pretrained(lib.folder, trust_remote_code=True, revision="main").audio_token),
    "AutoTokenizer": Call(
        lambda lib: lib.AutoTokenizer.from_pretrained(lib.folder, trust_remote_code=True, use_fast=True).encode("left two")
    ),
    "AutoFeatureExtractor": Call(lambda lib: type(lib.AutoFeatureExtractor.from_pretrained(lib.folder, trust_remote_code=False)).__name__),
    "an Auto class is not built": Call(lambda lib: lib.AutoModelForSpeechSeq2Seq(), refused=InputError, differs="both refuse it"),
}

test_loading = comparison(CALLS)


def test_options_that_would_change_the_result_are_refused():
    for options, named in (
        ({"load_in_8bit": True}, "load_in_8bit=True"),
        ({"use_safetensors": False}, "use_safetensors=False"),
        ({"device_map": {"encoder": "cpu", "projector": "cuda"}}, "encoder.*one device for all modules"),
        ({"device_map": {}}, "one device for all modules"),
        ({"tie_word_embeddings": False}, "head is its embedding"),
        ({"dtype": {"": "float32", "text_config": "bfloat16"}}, "one dtype for all parts"),
        ({"variant": "fp16"}, r"model\.fp16\.safetensors"),
        ({"variant": "../x"}, "variant"),
        ({"fusion_config": {"patch_embeddings": True}}, "fusion_config"),
    ):
        with pytest.raises((InputError, UnsupportedError, CheckpointNotFoundError), match=named):
            GraniteSpeechForConditionalGeneration.from_pretrained("embedded", **options)
    assert GraniteSpeechModel.from_pretrained("embedded", dtype={"": "float16", "text_config": "float16"}).dtype == torch.float16
    with pytest.raises(InputError, match="2 more positional arguments"):
        AutoModelForSpeechSeq2Seq.from_pretrained("embedded", "cpu", 3)


def test_the_configuration_of_transformers_can_be_passed():
    import transformers

    config = transformers.AutoConfig.from_pretrained(EMBEDDED_FOLDER)
    model = GraniteSpeechForConditionalGeneration.from_pretrained("embedded", config=config)
    assert type(model.config).__module__ == "granite_speech.config"
    assert AutoModelForSpeechSeq2Seq.from_config(config).num_parameters() == GraniteSpeechForConditionalGeneration(config).num_parameters()
    with pytest.raises(InputError, match="config of type int"):
        AutoModelForSpeechSeq2Seq.from_config(3)


@pytest.mark.parametrize("kind", [GraniteSpeechForConditionalGeneration, GraniteSpeechModel])
def test_a_state_dict_is_complete_and_known(kind):
    config = kind.from_pretrained("embedded").config
    source = GraniteSpeechForConditionalGeneration(config)
    state = source.state_dict()
    model = kind.from_pretrained(None, config=config, state_dict=state)
    assert torch.equal(model.get_input_embeddings().weight, source.get_input_embeddings().weight)
    with pytest.raises(CheckpointError, match=r"0 unknown names .* 1 missing ones .*encoder\.out\.bias"):
        kind.from_pretrained(None, config=config, state_dict={name: one for name, one in state.items() if name != "encoder.out.bias"})
    with pytest.raises(CheckpointError, match=r"1 unknown names \['encoder\.new'\]"):
        kind.from_pretrained(None, config=config, state_dict=state | {"encoder.new": torch.ones(1)})
    for given in ({"config": config}, {"state_dict": state}):
        with pytest.raises(InputError, match="expected one of them"):
            kind.from_pretrained(None, **given)


def test_weights_of_another_shape_get_random_values(tmp_path):
    shutil.copytree(EMBEDDED_FOLDER, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    embedding = "language_model.model.embed_tokens.weight"
    for name in ("encoder.input_linear.bias", "projector.qformer.layernorm.weight", "projector.query", embedding):
        tensors[name] = torch.cat([tensors[name], tensors[name]])
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"4 weights that do not match"):
        GraniteSpeechForConditionalGeneration.from_pretrained(tmp_path / "model")
    model, info = GraniteSpeechForConditionalGeneration.from_pretrained(
        tmp_path / "model", ignore_mismatched_sizes=True, output_loading_info=True, dtype=torch.float16
    )
    assert {name for name, *_ in info["mismatched_keys"]} == {
        "encoder.input_linear.bias",
        "projector.qformer.layernorm.weight",
        "projector.query",
        embedding,
    }
    assert bool((model.encoder.input_linear.bias == 0).all()) and bool((model.projector.qformer.layernorm.weight == 1).all())
    assert 0.02 < float(model.projector.query.detach().float().std()) < 0.1
    assert model.lm_head.weight is model.get_input_embeddings().weight and model.lm_head.weight.dtype == torch.float16
    assert not any(one.is_meta for one in model.parameters())


def test_options_of_generate_can_be_given():
    model = GraniteSpeechForConditionalGeneration.from_pretrained("embedded", generation_config={"max_new_tokens": 3, "eos_token_id": []})
    ids = torch.tensor([[1, 2, 3]])
    assert model.generate(ids).shape[1] == 6


def test_the_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(EMBEDDED_FOLDER, tmp_path / "model")
    assert AutoModelForSpeechSeq2Seq.from_pretrained("~/model").name_or_path == "~/model"


def test_padding_without_a_mask_gives_a_warning():
    model = AutoModelForSpeechSeq2Seq.from_pretrained("embedded")
    ids = torch.tensor([[1, 2, 3], [1, 2, model.config.text_config.pad_token_id]])
    with pytest.warns(UserWarning, match="attention_mask"):
        model.warn_if_padding_and_no_attention_mask(ids, None)
    with pytest.raises(AttributeError, match="no parameter and no buffer 'encoder"):
        model.get_parameter_or_buffer("encoder.nothing")
