"""Loading weights into a module and saving them: names, dtypes, tied weights, memory, and files."""

import subprocess
import sys
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import save_file
from torch import nn

from granite_speech.checkpoints import tensor_file
from granite_speech.checkpoints.folder import Checkpoint, load_into, load_json
from granite_speech.checkpoints.writing import save
from granite_speech.errors import CheckpointError, InputError
from tests.support.paths import ROOT

CPU = torch.device("cpu")
LORA = {"encoder.out.lora_A.weight": torch.ones(2, 3), "encoder.out.lora_B.weight": torch.ones(4, 2)}

# --- loading ---------------------------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """A miniature checkpoint: a buffer, an integer, a scalar, an empty tensor, and a head that may be tied."""

    def __init__(self, *, tied=False, step=True):
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.out = nn.Linear(3, 4)
        self.encoder.norm = nn.BatchNorm1d(5, track_running_stats=step)
        self.projector = nn.Module()
        self.projector.query = nn.Parameter(torch.empty(()), requires_grad=False)
        self.projector.none = nn.Parameter(torch.empty(0, 7))
        self.language_model = nn.Module()
        self.language_model.model = nn.Module()
        self.language_model.model.embed_tokens = nn.Embedding(6, 3)
        self.language_model.lm_head = nn.Linear(3, 6, bias=False)
        if tied:
            self.language_model.lm_head.weight = self.language_model.model.embed_tokens.weight


HEAD, EMBEDDING = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"


def on_meta(**options):
    with torch.device("meta"):
        return Small(**options)


def weights(dtype=torch.float32):
    torch.manual_seed(3)
    state = {name: torch.randn(tensor.shape).to(dtype) for name, tensor in Small().state_dict().items()}
    return state | {"encoder.norm.num_batches_tracked": torch.tensor(41)}


def stored(folder, tensors):
    save_file(tensors, folder / "model.safetensors")
    return Checkpoint.open(folder)


FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("chunk_bytes", [16, 1 << 25])
@pytest.mark.parametrize("target", [None, *FLOATS], ids=str)
@pytest.mark.parametrize("source", FLOATS, ids=str)
def test_weights_load_from_and_to_every_dtype(source, target, chunk_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_file, "_CHUNK_BYTES", chunk_bytes)
    source_weights, module = weights(source), on_meta()
    load_into(module, stored(tmp_path, source_weights), dtype=target, device=CPU)
    for name, tensor in module.state_dict().items():
        expected = source_weights[name] if name.endswith("tracked") else source_weights[name].to(target or source)
        assert tensor.dtype == expected.dtype
        assert torch.equal(tensor, expected), name
    assert module.projector.query.requires_grad is False
    assert module.encoder.out.weight.requires_grad is True
    assert isinstance(module.encoder.out.weight, nn.Parameter)
    assert "running_mean" in dict(module.encoder.norm.named_buffers())


@pytest.mark.parametrize("names", [{HEAD}, {EMBEDDING}, {HEAD, EMBEDDING}], ids=["head", "embedding", "both"])
def test_a_tied_head_is_one_parameter_under_either_name(names, tmp_path):
    tensors = weights()
    tensors[HEAD] = tensors[EMBEDDING].clone()
    checkpoint = stored(tmp_path, {name: tensors[name] for name in tensors if name not in {HEAD, EMBEDDING} - names})
    module = on_meta(tied=True)
    load_into(module, checkpoint, dtype=None, device=CPU)
    assert module.language_model.lm_head.weight is module.language_model.model.embed_tokens.weight
    assert torch.equal(module.language_model.lm_head.weight, tensors[EMBEDDING])
    assert checkpoint.head_is_tied()


def test_a_tied_module_refuses_two_different_weights(tmp_path):
    checkpoint = stored(tmp_path, weights())
    assert not checkpoint.head_is_tied()
    with pytest.raises(CheckpointError, match=r"1 weights that do not match: .*tied to .*with other values"):
        load_into(on_meta(tied=True), checkpoint, dtype=None, device=CPU)


def test_an_untied_module_requires_a_head_in_the_file(tmp_path):
    tensors = weights()
    del tensors[HEAD]
    with pytest.raises(CheckpointError, match=r"1 weights missing in the file: language_model\.lm_head\.weight; expected"):
        load_into(on_meta(), stored(tmp_path, tensors), dtype=None, device=CPU)


def test_all_mismatches_are_in_one_error_and_nothing_is_loaded(tmp_path):
    tensors = weights()
    del tensors["encoder.out.bias"], tensors["projector.query"]
    tensors["encoder.out.weight"] = torch.zeros(4, 2)
    tensors["encoder.norm.num_batches_tracked"] = torch.zeros(2)
    tensors |= {f"encoder.extra.{i:02}": torch.zeros(1) for i in range(12)}
    module = on_meta()
    with pytest.raises(CheckpointError) as caught:
        load_into(module, stored(tmp_path, tensors), dtype=None, device=CPU)
    message = str(caught.value)
    assert "2 weights missing in the file: encoder.out.bias, projector.query;" in message
    assert "12 weights unknown to the model: encoder.extra.00, " in message
    assert "encoder.extra.09 and 2 more;" in message
    assert "encoder.out.weight (in the file (4, 2) torch.float32, in the model (4, 3) torch.float32)" in message
    assert "num_batches_tracked (in the file (2,) torch.float32, in the model () torch.int64)" in message
    assert all(tensor.is_meta for tensor in module.state_dict().values())


def test_the_step_counter_is_optional(tmp_path):
    tensors = weights()
    del tensors["encoder.norm.num_batches_tracked"]
    module = on_meta()
    load_into(module, stored(tmp_path, tensors), dtype=torch.bfloat16, device=CPU)
    assert torch.equal(module.encoder.norm.num_batches_tracked, torch.tensor(0))


def test_a_buffer_in_no_file_is_an_error(tmp_path):
    module = on_meta()
    module.encoder.register_buffer("window", torch.empty(3, device="meta"), persistent=False)
    with pytest.raises(CheckpointError, match=r"in no file: encoder\.window; .*outside the meta device"):
        load_into(module, stored(tmp_path, weights()), dtype=None, device=CPU)


def test_a_file_that_shrinks_after_its_header_was_read_is_an_error(tmp_path):
    checkpoint = stored(tmp_path, weights())
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="the end of the file 3 bytes early"):
        load_into(on_meta(), checkpoint, dtype=None, device=CPU)
    file.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_into(on_meta(), checkpoint, dtype=None, device=CPU)


def test_loaded_weights_do_not_depend_on_the_file(tmp_path):
    tensors, module = weights(), on_meta()
    load_into(module, stored(tmp_path, tensors), dtype=None, device=CPU)
    (tmp_path / "model.safetensors").write_bytes(bytes(10_000))
    assert torch.equal(module.encoder.out.weight, tensors["encoder.out.weight"])


MEASURE = """
import sys, torch
from granite_speech.checkpoints.folder import Checkpoint, load_into
def peak(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))
torch.zeros(1000, dtype=torch.bfloat16).copy_(torch.zeros(1000))
with torch.device("meta"):
    module = torch.nn.ModuleDict({"encoder": torch.nn.ModuleList(torch.nn.Linear(2048, 2048, bias=False) for _ in range(int(sys.argv[3])))})
baseline = peak("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # resets the high-water mark
load_into(module, Checkpoint.open(sys.argv[1]), dtype=getattr(torch, sys.argv[2]), device=torch.device("cpu"))
print(peak("VmHWM") - baseline)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize(("dtype", "of_the_file"), [("float32", 1.0), ("bfloat16", 0.5)])
def test_peak_memory_is_little_more_than_the_destination(dtype, of_the_file, tmp_path):
    layers = 12
    save_file({f"encoder.{i}.weight": torch.ones(2048, 2048) for i in range(layers)}, tmp_path / "model.safetensors")
    nbytes = layers * 2048 * 2048 * 4
    command = [sys.executable, "-c", MEASURE, str(tmp_path), dtype, str(layers)]
    peak = int(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    assert 0.9 * of_the_file * nbytes < peak < of_the_file * nbytes + (48 << 20)


# --- saving ----------------------------------------------------------------------------------------------------------------------


def read_back(folder):
    module = on_meta(tied=Checkpoint.open(folder).head_is_tied())
    load_into(module, Checkpoint.open(folder), dtype=None, device=CPU)
    return module.state_dict()


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


@pytest.mark.parametrize("as_type", [str, Path])
def test_save_writes_the_released_layout(as_type, tmp_path):
    folder, tensors = tmp_path / "new" / "folder", weights(torch.bfloat16)
    adapter_config = {"r": 2, "peft_type": "LORA"}
    save(as_type(folder), tensors, config={"b": 1, "a": "é"}, adapter_tensors=LORA, adapter_config=adapter_config)
    assert files(folder) == {"config.json", "model.safetensors", "adapter_model.safetensors", "adapter_config.json"}
    with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in tensors.items())
    with safetensors.safe_open(folder / "adapter_model.safetensors", "pt") as file:
        assert set(file.keys()) == {f"base_model.model.{name}" for name in LORA}
    assert load_json(folder / "config.json") == {"b": 1, "a": "é"}
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.adapter_config == adapter_config
    assert checkpoint.entries.keys() == tensors.keys() | LORA.keys()
    assert checkpoint.entries["encoder.out.lora_B.weight"].shape == (4, 2)


def test_weights_are_as_readable_as_the_configuration(tmp_path):
    save(tmp_path, weights(), config={})
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


@pytest.mark.parametrize("limit", [1, 60, 100, "0.1KB", 10_000])
def test_a_large_checkpoint_is_split_into_shards(limit, tmp_path):
    tensors = weights()
    save(tmp_path, tensors, config={}, max_shard_size=limit)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert [shard.name for shard in shards] == [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    if limit == 10_000:
        assert files(tmp_path) == {"config.json", "model.safetensors"}
    else:
        index = load_json(tmp_path / "model.safetensors.index.json")
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
        assert set(index["weight_map"].values()) == {shard.name for shard in shards}
        for shard in shards:
            sizes = [one.nbytes for one in tensor_file.read_header(shard).values()]
            assert len(sizes) == 1 or sum(sizes) <= 100
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in read_back(tmp_path).items())


def test_a_save_removes_an_earlier_checkpoint(tmp_path):
    tensors = weights()
    (tmp_path / "tokenizer.json").write_text("{}")
    save(tmp_path, tensors, config={}, max_shard_size=60)
    save(tmp_path, tensors, config={}, adapter_tensors=LORA, adapter_config={"r": 2})
    assert files(tmp_path) == {"tokenizer.json", "config.json", "model.safetensors", "adapter_model.safetensors", "adapter_config.json"}
    save(tmp_path, tensors, config={}, max_shard_size=100)
    count = len(list(tmp_path.glob("model-*-of-*.safetensors")))
    assert count > 1
    assert len(files(tmp_path)) == count + 3
    assert Checkpoint.open(tmp_path).adapter_config is None


def test_saving_into_the_folder_of_origin_does_not_write_through_links(tmp_path):
    folder, blob = tmp_path / "snapshot", tmp_path / "blob"
    folder.mkdir()
    save_file(weights(), blob)
    (folder / "model.safetensors").symlink_to(blob)
    before = blob.read_bytes()
    state = read_back(folder)
    state["encoder.out.bias"] += 1
    save(folder, state, config={})
    assert torch.equal(read_back(folder)["encoder.out.bias"], weights()["encoder.out.bias"] + 1)
    assert blob.read_bytes() == before  # a save must not change the cache's file through the link


def test_a_failed_save_keeps_the_earlier_checkpoint(tmp_path):
    save(tmp_path, weights(), config={"a": 1})
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    changed = {name: tensor + 1 for name, tensor in weights().items()}
    with pytest.raises(CheckpointError, match=r"could not be written: .*not JSON serializable"):
        save(tmp_path, changed, config={"a": object()})
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="could not be written"):
        save(tmp_path / "file", weights(), config={})


def test_transposed_parameters_and_tied_tensors_are_saved(tmp_path):
    tensors = weights()
    tensors["encoder.out.weight"] = torch.arange(12.0).view(3, 4).t()
    tensors["encoder.out.bias"] = nn.Parameter(torch.arange(4.0))
    tensors[HEAD] = tensors[EMBEDDING]
    save(tmp_path, tensors, config={})
    state = read_back(tmp_path)
    assert HEAD not in Checkpoint.open(tmp_path).entries
    assert torch.equal(state["encoder.out.weight"], tensors["encoder.out.weight"])
    assert torch.equal(state["encoder.out.bias"], torch.arange(4.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensors": {"model.encoder.out.bias": torch.ones(1)}}, "1 tensors to save: model.encoder.out.bias; .*canonical"),
        ({"tensors": LORA}, "2 tensors to save: .*other than of LoRA matrices"),
        ({"tensors": {"projector.query": torch.ones(1, device="meta")}}, "1 tensors to save: projector.query"),
        ({"adapter_tensors": {"projector.query": torch.ones(1)}, "adapter_config": {}}, "canonical names of LoRA matrices"),
        ({"adapter_tensors": LORA}, "an adapter's weights without its configuration"),
        ({"adapter_config": {"r": 2}}, "an adapter's weights without its configuration, or the reverse"),
    ],
)
def test_save_refuses_bad_arguments(changes, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        save(tmp_path / "new", **({"tensors": weights(), "config": {}} | changes))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("size", ["five", "5 XB", "-1GB", "", 0, -5, True, None])
def test_a_malformed_shard_size_is_refused(size, tmp_path):
    with pytest.raises(InputError, match="max_shard_size"):
        save(tmp_path, weights(), config={}, max_shard_size=size)
