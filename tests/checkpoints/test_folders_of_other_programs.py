"""Contents of a checkpoint's folder: shards and their index, adapters, pickles, JSON."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save as serialize
from safetensors.torch import save_file

from granite_speech.checkpoints import folder
from granite_speech.checkpoints.folder import Checkpoint, load_json, read_adapter
from granite_speech.errors import CheckpointError, CheckpointNotFoundError, UnsupportedError


def tensors_file(**values):
    """Bytes of a safetensors file with one float32 value under each name."""
    return serialize({name: torch.tensor([float(value)]) for name, value in values.items()})


GOOD = tensors_file(a=1, b=2)
SHARDS = {"one.safetensors": tensors_file(a=1), "two.safetensors": tensors_file(b=2)}
BOTH = {"a": "one.safetensors", "b": "two.safetensors"}
INDICES = {
    "no weight_map": ({}, SHARDS, "no weight_map"),
    "empty weight_map": ({"weight_map": {}}, SHARDS, "no weight_map"),
    "weight_map is a list": ({"weight_map": ["a"]}, SHARDS, "no weight_map"),
    "file name is a number": ({"weight_map": {"a": 1}}, SHARDS, "no weight_map"),
    "shard absent": ({"weight_map": BOTH | {"c": "three.safetensors"}}, SHARDS, "'three.safetensors', which is missing"),
    "key absent from its shard": (
        {"weight_map": BOTH | {"c": "one.safetensors"}},
        SHARDS,
        "'c' in one.safetensors, but it is in no shard",
    ),
    "key absent from the index": (
        {"weight_map": {"a": "one.safetensors"}},
        {"one.safetensors": GOOD},
        "'b' in no shard, but it is in one.safetensors",
    ),
    "key in another shard": (
        {"weight_map": {"a": "two.safetensors", "b": "one.safetensors"}},
        SHARDS,
        "in (one|two).safetensors, but it is in (one|two).safetensors",
    ),
    "key in two shards": (
        {"weight_map": BOTH},
        SHARDS | {"two.safetensors": GOOD},
        "'a' in 'one.safetensors' and in 'two.safetensors'",
    ),
    "parent folder": ({"weight_map": {"a": "../outside.safetensors"}}, SHARDS, r"the shard '../outside.safetensors'; expected a plain"),
    "subfolder": ({"weight_map": {"a": "sub/one.safetensors"}}, SHARDS, "the shard 'sub/one.safetensors'; expected a plain"),
    "absolute": ({"weight_map": {"a": "/etc/one.safetensors"}}, SHARDS, "the shard '/etc/one.safetensors'; expected a plain"),
    "backslash": ({"weight_map": {"a": "..\\one.safetensors"}}, SHARDS, "expected a plain file name"),
    "dots": ({"weight_map": {"a": ".."}}, SHARDS, "expected a plain file name"),
    "pickle": ({"weight_map": {"a": "pytorch_model-1.bin"}}, SHARDS, "ends in .safetensors"),
    "damaged shard": ({"weight_map": BOTH}, SHARDS | {"two.safetensors": GOOD[:-1]}, "two.safetensors'.*range within"),
}


@pytest.mark.parametrize("kind", INDICES)
def test_an_index_that_does_not_match_is_refused(kind, tmp_path):
    index, shards, message = INDICES[kind]
    inside = tmp_path / "folder"
    (inside / "sub").mkdir(parents=True)
    for place in (tmp_path / "outside.safetensors", inside / "sub" / "one.safetensors"):
        place.write_bytes(SHARDS["one.safetensors"])  # exists, but must not be opened
    for name, content in shards.items():
        (inside / name).write_bytes(content)
    (inside / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(inside)


def test_links_out_of_the_folder_are_followed(tmp_path):
    (tmp_path / "blobs").mkdir()
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for number, (name, content) in enumerate(SHARDS.items()):
        (tmp_path / "blobs" / str(number)).write_bytes(content)
        (snapshot / name).symlink_to(Path("..", "blobs", str(number)))
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": BOTH}))
    assert Checkpoint.open(snapshot).entries.keys() == {"a", "b"}


LORA = {"encoder.out.lora_A.weight": torch.ones(2, 3), "encoder.out.lora_B.weight": torch.ones(4, 2)}
FOLDERS = {
    "empty": ({}, CheckpointNotFoundError, "which has no weights"),
    "only a pickle": ({"pytorch_model.bin": b"x"}, CheckpointError, r"with pytorch_model.bin and no safetensors.*none is opened"),
    "sharded pickles": ({"pytorch_model-00001-of-00002.bin": b"x"}, CheckpointError, "pytorch_model-00001-of-00002.bin and no"),
    "a .pt file": ({"model.pt": b"x"}, CheckpointError, "with model.pt and no"),
    "adapter is a pickle": (
        {"model.safetensors": {}, "adapter_config.json": {"r": 2}, "adapter_model.bin": b"x"},
        CheckpointError,
        "with adapter_model.bin and no safetensors",
    ),
    "adapter without model": (
        {"adapter_config.json": {"base_model_name_or_path": "ibm/base"}, "adapter_model.safetensors": LORA},
        CheckpointNotFoundError,
        "an adapter for 'ibm/base' and no model",
    ),
    "adapter without its configuration": (
        {"model.safetensors": {}, "adapter_model.safetensors": LORA},
        CheckpointNotFoundError,
        "no file 'adapter_config.json'",
    ),
    "LoRA in the model without a configuration": ({"model.safetensors": LORA}, CheckpointError, "LoRA matrices but no adapter_config.json"),
    "configuration without matrices": (
        {"model.safetensors": {}, "adapter_config.json": {"r": 2}},
        CheckpointError,
        "adapter_config.json but no adapter_model.safetensors",
    ),
    "DoRA": (
        {
            "model.safetensors": {},
            "adapter_config.json": {"r": 2},
            "adapter_model.safetensors": LORA | {"encoder.out.lora_magnitude_vector": torch.ones(4)},
        },
        UnsupportedError,
        "with encoder.out.lora_magnitude_vector",
    ),
    "a whole module in the adapter": (
        {"model.safetensors": {}, "adapter_config.json": {"r": 2}, "adapter_model.safetensors": LORA | {"projector.query": torch.ones(4)}},
        UnsupportedError,
        "with projector.query",
    ),
}


def write_files(path, files):
    for name, content in files.items():
        if name.endswith(".safetensors"):
            save_file(content, path / name)
        else:
            (path / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_without_a_complete_checkpoint_is_refused(kind, tmp_path):
    files, error, message = FOLDERS[kind]
    write_files(tmp_path, files)
    with pytest.raises(error, match=message):
        Checkpoint.open(tmp_path)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(CheckpointNotFoundError, match="which is not a folder"):
        Checkpoint.open(tmp_path / "absent")
    with pytest.raises(CheckpointNotFoundError, match=r"no file 'adapter_config\.json'"):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "does not parse"),
        (b"{", "does not parse"),
        (b'"\xff"', "does not parse"),
        (b"[" * 100_000, "does not parse"),
        (b"[1]", "with a list"),
        (b"null", "with a NoneType"),
        (b'{"a": "' + b"x" * 100 + b'"}', "with 109 bytes; expected a JSON object of at most 100"),
    ],
)
def test_load_json_refuses_bad_files(content, message, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_bytes(content)
    monkeypatch.setattr(folder, "_MAX_JSON_BYTES", 100 if len(content) < 1000 else 10**6)
    with pytest.raises(CheckpointError, match=message):
        load_json(tmp_path / "config.json")


def test_load_json_reads_utf8(tmp_path):
    (tmp_path / "config.json").write_text('{"a": "ä"}', encoding="utf-8")
    assert load_json(str(tmp_path / "config.json")) == {"a": "ä"}
    with pytest.raises(CheckpointNotFoundError, match=r"no file 'other\.json'"):
        load_json(tmp_path / "other.json")
