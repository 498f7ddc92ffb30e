"""Saving models and configurations, as users write it, here and in transformers; each loads what the other has saved."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file

from granite_speech import (
    CheckpointError,
    GraniteSpeechConfig,
    GraniteSpeechCTCEncoder,
    GraniteSpeechForConditionalGeneration,
    GraniteSpeechModel,
    InputError,
    UnsupportedError,
)
from granite_speech.checkpoints.hub import EMBEDDED_FOLDER
from granite_speech.checkpoints.weight_names import canonical_keys
from granite_speech.modules.adapter import attach_adapter
from granite_speech.modules.adapter_config import AdapterConfig
from tests.support.two_libraries import Call, comparison


def plain_folder(lib):
    """The bundled checkpoint without its adapter."""
    folder = lib.new_folder()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(Path(lib.folder) / name, folder)
    return str(folder)


def plain(lib, kind="GraniteSpeechForConditionalGeneration", **options):
    return getattr(lib, kind).from_pretrained(plain_folder(lib), **options)


def saved(lib, model=None, **options):
    """The folder after `save_pretrained` with these options."""
    folder = lib.new_folder() / "saved"
    (model or plain(lib)).save_pretrained(str(folder), **options)
    return folder


def weight_files(folder):
    return sorted(path.name for path in folder.iterdir() if "safetensors" in path.name) if folder.exists() else []


def stored(folder):
    """Canonical name → a digest of each tensor that was written."""
    tensors = {}
    for path in sorted(folder.glob("model*.safetensors")):
        tensors |= load_file(path)
    names = canonical_keys(tensors)
    return {name: [str(tensors[key].dtype), float(tensors[key].double().sum())] for key, name in names.items()}


def config(folder):
    return json.loads((folder / "config.json").read_text())


def changed_state(lib, model):
    """The model's state dict with every value doubled, by the names of each package."""
    return {name: tensor * 2 for name, tensor in model.state_dict().items()}


def second_save(lib, **options):
    folder = lib.new_folder()
    model = plain(lib)
    model.save_pretrained(folder, max_shard_size="500KB")
    model.save_pretrained(folder, **options)
    return weight_files(folder)


CALLS = {
    "files": Call(lambda lib: weight_files(saved(lib))),
    "by name": Call(lambda lib: (lambda f: (plain(lib).save_pretrained(save_directory=str(f)), weight_files(f))[1])(lib.new_folder())),
    "a folder in a new folder": Call(
        lambda lib: (lambda f: (plain(lib).save_pretrained(str(f)), weight_files(f))[1])(lib.new_folder() / "a" / "b")
    ),
    "weights": Call(lambda lib: stored(saved(lib))),
    "weights in a dtype": Call(lambda lib: (lambda f: [stored(f), config(f)["dtype"]])(saved(lib, plain(lib, dtype=torch.bfloat16)))),
    "a model that changed its dtype": Call(lambda lib: config(saved(lib, plain(lib).half()))["dtype"]),
    "the configuration": Call(lambda lib: {name: one for name, one in config(saved(lib)).items() if name != "has_lora_adapter"}),
    "whether there is an adapter": Call(
        lambda lib: config(saved(lib))["has_lora_adapter"],
        differs="transformers keeps true for a model without one, as its configuration said",
    ),
    "safe serialization": Call(lambda lib: weight_files(saved(lib, safe_serialization=True))),
    "options that change nothing": Call(lambda lib: weight_files(saved(lib, save_peft_format=True, token=None, push_to_hub=False))),
    "no layout of earlier versions": Call(lambda lib: stored(saved(lib, save_original_format=False))),
    "not the main process": Call(lambda lib: weight_files(saved(lib, is_main_process=False))),
    "a variant": Call(lambda lib: weight_files(saved(lib, variant="fp16"))),
    "a variant read again": Call(
        lambda lib: plain(lib, dtype=None).__class__.from_pretrained(str(saved(lib, variant="fp16")), variant="fp16").dtype
    ),
    "shards of a variant read again": Call(
        lambda lib: lib.AutoModelForSpeechSeq2Seq.from_pretrained(
            str(saved(lib, variant="v2", max_shard_size="1MB")), variant="v2", output_loading_info=True
        )[1]
    ),
    "sizes of shards": Call(lambda lib: [len(weight_files(saved(lib, max_shard_size=size))) > 2 for size in ("1MB", 10**6, "1mb", "2GB")]),
    "a save over shards": Call(lambda lib: second_save(lib), differs="transformers leaves the index of the shards that it removes"),
    "a save of a variant over shards": Call(lambda lib: second_save(lib, variant="fp16")),
    "a state dict": Call(lambda lib: (lambda m: stored(saved(lib, m, state_dict=m.state_dict())))(plain(lib))),
    "a changed state dict": Call(lambda lib: (lambda m: stored(saved(lib, m, state_dict=changed_state(lib, m))))(plain(lib))),
    "a state dict in half precision": Call(
        lambda lib: (lambda m: stored(saved(lib, m, state_dict={name: one.half() for name, one in m.state_dict().items()})))(plain(lib))
    ),
    "the model without its head": Call(lambda lib: weight_files(saved(lib, plain(lib, "GraniteSpeechModel")))),
    "the model without its head, whole again": Call(
        lambda lib: lib.GraniteSpeechForConditionalGeneration.from_pretrained(
            str(saved(lib, plain(lib, "GraniteSpeechModel"))), output_loading_info=True
        )[1]["mismatched_keys"]
    ),
    "a new model": Call(
        lambda lib: len(stored(saved(lib, lib.AutoModelForSpeechSeq2Seq.from_config(lib.AutoConfig.from_pretrained(lib.folder)))))
    ),
    "an adapter": Call(
        lambda lib: [name for name in weight_files(saved(lib, lib.model)) if name.startswith("adapter")],
    ),
    "a configuration": Call(lambda lib: (lambda f: (lib.model.config.save_pretrained(f), config(f)["window_size"])[1])(lib.new_folder())),
    "tags": Call(lambda lib: (lambda m: (m.add_model_tags(["a", "b"]), m.add_model_tags("c"), m.model_tags)[2])(plain(lib))),
    "a pickle": Call(
        lambda lib: weight_files(saved(lib, safe_serialization=False)),
        refused=UnsupportedError,
        differs="transformers writes safetensors all the same",
    ),
    "a file in place of the folder": Call(
        lambda lib: plain(lib).save_pretrained(str(Path(lib.folder) / "config.json")),
        refused=CheckpointError,
        differs="transformers logs an error, returns, and saves nothing",
    ),
}

test_saving = comparison(CALLS)


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "1MB"}, {"state_dict": True}, {"variant": "v2"}], ids=str)
def test_each_package_loads_what_the_other_saved(options, tmp_path):
    import transformers

    ours = GraniteSpeechForConditionalGeneration.from_pretrained("embedded")
    theirs = transformers.AutoModelForSpeechSeq2Seq.from_pretrained(str(EMBEDDED_FOLDER))
    for model, folder in ((ours, tmp_path / "ours"), (theirs, tmp_path / "theirs")):
        given = options | ({"state_dict": model.state_dict()} if "state_dict" in options and model is ours else {})
        model.save_pretrained(str(folder), **{name: one for name, one in given.items() if one is not True})
    loading = {name: one for name, one in options.items() if name == "variant"}
    back, info = transformers.AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "ours", output_loading_info=True, **loading)
    assert not any(info.values()), info
    values = {name: tensor for name, tensor in ours.state_dict().items()}
    for source in (back.state_dict(), GraniteSpeechForConditionalGeneration.from_pretrained(tmp_path / "ours", **loading).state_dict()):
        for key, name in canonical_keys(source).items():
            assert torch.equal(source[key], values[name]), name
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["has_lora_adapter"] is True


def test_the_encoder_by_itself(tmp_path):
    import transformers

    whole = GraniteSpeechForConditionalGeneration.from_pretrained("embedded")
    encoder = GraniteSpeechCTCEncoder.from_pretrained("embedded", dtype="float32", device_map="cpu", trust_remote_code=True)
    assert not encoder.training and encoder.num_parameters() == whole.encoder.num_parameters()
    encoder.save_pretrained(tmp_path / "ours", safe_serialization=True)
    transformers.GraniteSpeechCTCEncoder.from_pretrained(str(tmp_path / "ours")).save_pretrained(str(tmp_path / "theirs"))
    theirs, info = transformers.GraniteSpeechCTCEncoder.from_pretrained(str(tmp_path / "ours"), output_loading_info=True)
    assert not any(info.values()), info
    for one in (encoder, theirs, *(GraniteSpeechCTCEncoder.from_pretrained(tmp_path / name) for name in ("ours", "theirs"))):
        state = one.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in whole.encoder.state_dict().items())
    state = {name: one * 2 for name, one in encoder.state_dict().items()}
    encoder.save_pretrained(tmp_path / "doubled", state_dict=state)
    assert torch.equal(GraniteSpeechCTCEncoder.from_pretrained(tmp_path / "doubled").out.weight, encoder.out.weight * 2)
    with pytest.raises(CheckpointError, match=r"without \['out\.bias'\] and with unknown names \['more'\]"):
        state["more"] = state.pop("out.bias")
        encoder.save_pretrained(tmp_path / "bad", state_dict=state)
    half = GraniteSpeechCTCEncoder.from_pretrained("embedded", torch_dtype=torch.float16, dropout=0.5)
    assert half.out.weight.dtype == half.config.dtype == torch.float16 and half.config.dropout == 0.5
    with pytest.raises(InputError, match=r"unknown option 'dropuot'.*'dropout'"):
        GraniteSpeechCTCEncoder.from_pretrained("embedded", dropuot=0.5)


def test_an_encoder_with_an_adapter_is_not_saved_without_it(tmp_path):
    whole = GraniteSpeechForConditionalGeneration.from_pretrained("embedded")
    attach_adapter(whole, AdapterConfig.plain(2, 4, ["up_proj"]), ["encoder.layers.0.ff1.up_proj"])
    with pytest.raises(UnsupportedError, match="merge_adapter"):
        whole.encoder.save_pretrained(tmp_path / "encoder")
    whole.save_pretrained(tmp_path / "whole")
    with pytest.raises(UnsupportedError, match="merge_adapter"):
        GraniteSpeechCTCEncoder.from_pretrained(tmp_path / "whole")


def test_a_state_dict_to_save_is_complete_and_known(tmp_path):
    for kind in (GraniteSpeechForConditionalGeneration, GraniteSpeechModel):
        model = kind.from_pretrained("embedded")
        state = model.state_dict()
        with pytest.raises(CheckpointError, match=r"without 1 weights .*encoder\.out\.bias"):
            model.save_pretrained(tmp_path / "a", state_dict={name: one for name, one in state.items() if name != "encoder.out.bias"})
        with pytest.raises(CheckpointError, match=r"1 unknown names \['encoder\.new'\]"):
            model.save_pretrained(tmp_path / "a", state_dict=state | {"encoder.new": torch.ones(1)})
        assert not (tmp_path / "a").exists()
        without_lora = {name: one for name, one in state.items() if "lora" not in name}
        model.save_pretrained(tmp_path / kind.__name__, state_dict=without_lora)
        assert json.loads((tmp_path / kind.__name__ / "config.json").read_text())["has_lora_adapter"] is False
        assert not (tmp_path / kind.__name__ / "adapter_config.json").exists()


def test_a_copied_head_is_not_saved_twice(tmp_path):
    model = GraniteSpeechForConditionalGeneration.from_pretrained("embedded")
    copies = {name: one.clone() for name, one in model.state_dict().items()}
    model.save_pretrained(tmp_path / "tied", state_dict=copies)
    assert "language_model.lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    copies["language_model.lm_head.weight"] *= 2  # a head of its own is not lost
    model.save_pretrained(tmp_path / "untied", state_dict=copies)
    again = GraniteSpeechForConditionalGeneration.from_pretrained(tmp_path / "untied")
    assert torch.equal(again.lm_head.weight, model.lm_head.weight * 2)


def test_a_variant_leaves_other_weights_alone(tmp_path):
    model = GraniteSpeechForConditionalGeneration.from_pretrained("embedded")
    model.save_pretrained(tmp_path, max_shard_size="1MB")
    plain = set(weight_files(tmp_path))
    model.half().save_pretrained(tmp_path, variant="fp16", max_shard_size="1MB")
    model.save_pretrained(tmp_path, variant="fp16")
    assert set(weight_files(tmp_path)) == plain | {"model.fp16.safetensors"}
    assert GraniteSpeechForConditionalGeneration.from_pretrained(tmp_path, variant="fp16", dtype="auto").dtype == torch.float16


@pytest.fixture
def uploads(monkeypatch):
    made = []
    monkeypatch.setattr(huggingface_hub, "create_repo", lambda repo_id, **_: SimpleNamespace(repo_id=repo_id))

    def upload_folder(repo_id, folder_path, allow_patterns, commit_message, **_):
        names = {path.name for path in Path(folder_path).iterdir()}
        made.append((repo_id, set(allow_patterns) if allow_patterns else names, commit_message))
        return "https://hub/commit/1"

    monkeypatch.setattr(huggingface_hub, "upload_folder", upload_folder)
    return made


def test_models_and_configurations_are_pushed(uploads, tmp_path):
    model = GraniteSpeechForConditionalGeneration.from_pretrained("embedded")
    files = {"config.json", "model.safetensors", "adapter_config.json", "adapter_model.safetensors"}
    assert model.push_to_hub("me/model", commit_message="words", private=True, max_shard_size="5GB") == "https://hub/commit/1"
    model.config.push_to_hub("me/config")
    (tmp_path / "notes.txt").write_text("mine")
    model.save_pretrained(tmp_path, push_to_hub=True, repo_id="me/other", commit_message="more")
    GraniteSpeechConfig().save_pretrained(tmp_path, push_to_hub=True)
    (first, config, second, last) = uploads
    assert first[0] == "me/model" and first[1] >= files and first[2] == "words"
    assert config[:2] == ("me/config", {"config.json"})
    assert second[0] == "me/other" and second[1] >= files and "notes.txt" not in second[1] and second[2] == "more"
    assert last[:2] == (tmp_path.name, {"config.json"})
    with pytest.raises(InputError, match=r"'comit_message'.*commit_message"):
        model.push_to_hub("me/model", comit_message="x")
    assert len(uploads) == 4


def test_the_tags_of_a_model_are_pushed(uploads, monkeypatch, tmp_path):
    tagged = []
    monkeypatch.setattr("granite_speech.checkpoints.upload._tag", lambda repo_id, tags, token: tagged.append(tags))
    model = GraniteSpeechForConditionalGeneration.from_pretrained("embedded")
    model.push_to_hub("me/model")
    model.add_model_tags(["speech", "granite"])
    model.push_to_hub("me/model", tags=["new", "speech"])
    model.save_pretrained(tmp_path, push_to_hub=True)
    assert tagged == [["new", "speech", "granite"], ["speech", "granite"]]
