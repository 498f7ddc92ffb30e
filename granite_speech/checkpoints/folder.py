"""A checkpoint's folder: finding its weights, and loading them into a module.

    folder = resolve("ibm-granite/granite-speech-3.3-2b")
    checkpoint = Checkpoint.open(folder)                  # headers only: names, dtypes, shapes, all checked
    with torch.device("meta"):
        module = …                                        # its state dict has the canonical names of weight_names.py
    load_into(module, checkpoint, dtype=torch.bfloat16, device=torch.device("cuda"))

All layouts that transformers and peft have written can be read.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from torch import nn

from granite_speech.checkpoints.hub import resolve
from granite_speech.checkpoints.tensor_file import TensorEntry, open_tensors, read_header, read_tensor, same_values, staging_buffer
from granite_speech.checkpoints.weight_names import EMBEDDING, HEAD, canonical_keys, is_lora, is_optional
from granite_speech.errors import CheckpointError, CheckpointNotFoundError, InputError, UnsupportedError

__all__ = [
    "ADAPTER",
    "ADAPTER_CONFIG",
    "Checkpoint",
    "TensorEntry",
    "file_names",
    "list_up_to_ten",
    "load_into",
    "load_json",
    "read_adapter",
    "resolve",
]

_MODEL, _INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_MAX_JSON_BYTES = 64 * 1024 * 1024  # the largest file, tokenizer.json, has several MB


def load_json(path: str | Path) -> dict:
    """The JSON object in a file.

    Raises:
        CheckpointNotFoundError: no such file.
        CheckpointError: not readable, larger than 64 MiB, not UTF-8, not JSON, or not an object.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointNotFoundError(
            got=f"no file {path.name!r} in {str(path.parent)!r}",
            expected="that file",
            remedy="Check that the folder holds a whole checkpoint, or download or save it again",
        )
    try:
        size = path.stat().st_size
        value = json.loads(path.read_text(encoding="utf-8")) if size <= _MAX_JSON_BYTES else None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            got=f"{str(path)!r}, which does not parse: {error}", expected="a JSON object in UTF-8", remedy="Download or save the file again"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            got=f"{str(path)!r} with {size} bytes" if size > _MAX_JSON_BYTES else f"{str(path)!r} with a {type(value).__name__}",
            expected=f"a JSON object of at most {_MAX_JSON_BYTES} bytes",
            remedy="Check that this is the checkpoint's own file",
        )
    return value


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a folder, located and checked but not yet read.

    Attributes:
        folder: the folder.
        entries: canonical name (see weight_names.py) → where the tensor is stored. LoRA matrices are included, as
            `<path of the linear layer>.lora_A.weight` (rank, in_features) and `.lora_B.weight` (out_features, rank).
        adapter_config: the contents of adapter_config.json, unchanged; None without an adapter.
    """

    folder: Path
    entries: dict[str, TensorEntry]
    adapter_config: dict | None

    @classmethod
    def open(cls, folder: str | Path, variant: str | None = None) -> "Checkpoint":
        """Read the headers of a folder's weights: model.safetensors or its shards, and the adapter's file.

        With a variant they are "model.<variant>.safetensors", or shards in "model.safetensors.index.<variant>.json".

        If LoRA matrices are both in the model's file and in the adapter's, as transformers saves them with an adapter attached,
        only the adapter's file is used.

        Raises:
            CheckpointNotFoundError: no such folder, or no weights in it.
            CheckpointError: only pickles, a damaged or truncated file, an index that does not match its shards, or an adapter
                without its weights or its configuration.
            UnsupportedError: a quantised dtype, or an adapter that is not plain LoRA.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise CheckpointNotFoundError(
                got=f"{str(folder)!r}, which is not a folder", expected="a checkpoint's folder", remedy="Check the path"
            )
        stored = _read_model(folder, variant)
        has_adapter_file = (folder / ADAPTER).exists()
        if has_adapter_file:
            stored = {key: entry for key, entry in stored.items() if not is_lora(key)}
        entries = {name: stored[key] for key, name in canonical_keys(stored).items()}
        if has_adapter_file:
            adapter_config, matrices = read_adapter(folder)
            return cls(folder, entries | matrices, adapter_config)
        has_lora, has_config = any(map(is_lora, entries)), (folder / ADAPTER_CONFIG).exists()
        if has_config and not has_lora:
            _refuse_pickles(folder, "adapter_model")
        if has_lora != has_config:
            present, absent = ("LoRA matrices", ADAPTER_CONFIG) if has_lora else (ADAPTER_CONFIG, ADAPTER)
            raise CheckpointError(
                got=f"{str(folder)!r} with {present} but no {absent}",
                expected="an adapter's weights and its configuration, or neither",
                remedy=f"Add the {absent} of the same adapter, or remove the {present}",
            )
        return cls(folder, entries, load_json(folder / ADAPTER_CONFIG) if has_config else None)

    def head_is_tied(self) -> bool:
        """Whether the language model's head is its input embedding."""
        return self.is_tied(HEAD, EMBEDDING)

    def is_tied(self, name: str, other: str) -> bool:
        """Whether a weight is the same as another: the file has only one of the two, or both with the same bytes.

        The weights decide, because `tie_word_embeddings` is in different places by version, and they may contradict each other.
        """
        if name not in self.entries or other not in self.entries:
            return True
        return same_values(self.entries[name], self.entries[other])


def read_adapter(folder: str | Path, *, whole_modules: bool = False) -> tuple[dict, dict[str, TensorEntry]]:
    """An adapter's folder: the contents of adapter_config.json, and canonical name → LoRA matrix (or `whole_modules` saved with it).

    Raises:
        CheckpointNotFoundError: one of the two files is missing.
        CheckpointError: a damaged file, or a pickle in place of adapter_model.safetensors.
        UnsupportedError: tensors that are not LoRA matrices (DoRA magnitudes, biases, whole modules).
    """
    folder = Path(folder)
    config = load_json(folder / ADAPTER_CONFIG)
    if not (folder / ADAPTER).exists():
        _refuse_pickles(folder, "adapter_model")
    stored = read_header(folder / ADAPTER)
    matrices = {name: stored[key] for key, name in canonical_keys(stored).items()}
    others = [name for name in matrices if not is_lora(name)]
    if others and not (whole_modules and config.get("modules_to_save")):
        raise UnsupportedError(
            got=f"{str(folder / ADAPTER)!r} with {list_up_to_ten(others)}",
            expected="LoRA matrices only (lora_A.weight and lora_B.weight)",
            remedy="Load it with peft.PeftModel.from_pretrained(model, folder), which may then merge it into the model",
        )
    return config, matrices


def file_names(variant: str | None) -> tuple[str, str]:
    """The names of the file of all weights, and of the index of shards."""
    if not variant:
        return _MODEL, _INDEX
    if not re.fullmatch(r"[\w.-]+", variant):
        raise InputError(got=f"variant={variant!r:.100}", expected="part of a file's name, such as 'fp16'", remedy="Check variant=")
    return f"model.{variant}.safetensors", f"model.safetensors.index.{variant}.json"


def _read_model(folder: Path, variant: str | None) -> dict[str, TensorEntry]:
    """Tensors of model.safetensors or, without that file, of the shards in the index, by their names in the files."""
    model, index = file_names(variant)
    if (folder / model).exists():
        return read_header(folder / model)
    if (folder / index).exists():
        return _read_shards(folder / index)
    _refuse_pickles(folder, "")
    adapter_only = (folder / ADAPTER_CONFIG).exists()
    base = load_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path") if adapter_only else None
    raise CheckpointNotFoundError(
        got=f"{str(folder)!r}, which has " + (f"an adapter for {base!r} and no model" if adapter_only else "no weights"),
        expected=f"{model}, or {index} and its shards",
        remedy="Load the model first and the adapter into it" if adapter_only else "Check the path, and that the download completed",
    )


def _read_shards(index: Path) -> dict[str, TensorEntry]:
    folder = index.parent
    weight_map = load_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(name, str) for name in weight_map.values()):
        raise _bad_index(index, "no weight_map from names to file names", "a weight_map")
    stored: dict[str, TensorEntry] = {}
    for shard in sorted(set(weight_map.values())):
        # An index must not name files outside its folder, existing or not. The file itself may be a link to outside, as all
        # files in the hub's cache are.
        if shard != Path(shard).name or "\\" in shard or not shard.endswith(".safetensors"):
            raise _bad_index(index, f"the shard {shard!r}", "a plain file name that ends in .safetensors")
        if not (folder / shard).is_file():
            raise _bad_index(index, f"the shard {shard!r}, which is missing", "every shard in the same folder")
        for key, entry in read_header(folder / shard).items():
            if key in stored:
                raise _bad_index(index, f"{key!r} in {stored[key].file.name!r} and in {shard!r}", "each tensor in one shard")
            stored[key] = entry
    for key in weight_map.keys() | stored.keys():
        named, real = weight_map.get(key), stored[key].file.name if key in stored else None
        if named != real:
            raise _bad_index(
                index, f"{key!r} in {named or 'no shard'}, but it is in {real or 'no shard'}", "an index that matches the shards"
            )
    return stored


def _bad_index(index: Path, got: str, expected: str) -> CheckpointError:
    return CheckpointError(got=f"{str(index)!r}: {got}", expected=expected, remedy="Download or save all shards and the index again")


def _refuse_pickles(folder: Path, prefix: str) -> None:
    names = sorted(path.name for pattern in _PICKLES for path in folder.glob(prefix + pattern))
    if names:
        raise CheckpointError(
            got=f"{str(folder)!r} with {list_up_to_ten(names)} and no safetensors file",
            expected="safetensors files; a pickle can run code when it is opened, so none is opened here",
            remedy="If you trust it, convert it with transformers (save_pretrained writes safetensors), or use a safetensors release",
        )


def list_up_to_ten(items: Iterable[str]) -> str:
    items = sorted(items)
    more = f" and {len(items) - 10} more" if len(items) > 10 else ""
    return ", ".join(items[:10]) + more


# A model that is loaded in inference mode can be trained afterwards.
@torch.inference_mode(False)
def load_into(
    module: nn.Module,
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | None,
    device: torch.device,
    mismatched: list[tuple[str, torch.Size, torch.Size]] | None = None,
    places: Callable[[dict[str, torch.dtype]], dict[str, torch.Tensor]] | None = None,
    store: Mapping[str, Callable[[torch.Tensor, torch.Tensor | None], None]] | None = None,
) -> None:
    """Load a checkpoint into a module that was built on the meta device.

    Names and shapes are compared first, and nothing is allocated unless all match. A parameter with two names in the module (a
    tied head) is read once, whichever name the file has, and stays tied. The host needs at most the destination's own memory
    and 32 MiB.

    Args:
        module: its state dict has the checkpoint's canonical names, LoRA matrices included.
        checkpoint: the weights.
        dtype: of floating-point tensors; None keeps the dtypes of the file. Integers always keep theirs.
        device: where the weights go.
        mismatched: takes the name, the file's shape and the model's shape of weights whose shapes differ; they are then allocated
            without values. Such a weight is an error if this is None.
        places: called with the dtype of every tensor that will be read, by name. It returns the memory to read some of them into; the
            others get memory of their own.
        store: by name, called with the values of a tensor in the file's dtype and its memory from `places`, in place of storing it.

    Raises:
        CheckpointError: names missing from the file or unknown to the module, different shapes, two different values for one
            tied weight, a file that cannot be read, or a tensor of the module that is in no file.
    """
    plan = _plan(module, checkpoint, mismatched)
    wanted = module.state_dict(keep_vars=True)
    for name, _, shape in mismatched or ():
        names = [other for other, tensor in wanted.items() if tensor is wanted[name]]
        _replace(module, names, torch.empty(shape, dtype=dtype or checkpoint.entries[name].dtype, device=device))
    dtypes = {names[0]: _dtype_of(module, names[0], entry, dtype) for entry, names in plan}
    memory, store = {} if places is None else places(dtypes), store or {}
    staging = staging_buffer(device)
    for path, tensors in groupby(plan, key=lambda item: item[0].file):
        with open_tensors(path) as file:
            for entry, names in tensors:
                name, out = names[0], memory.pop(names[0], None)
                if name in store:
                    store[name](read_tensor(file, entry, dtype=entry.dtype, device=device, staging=staging), out)
                else:
                    _replace(module, names, read_tensor(file, entry, dtype=dtypes[name], device=device, staging=staging, out=out))
    for name, tensor in module.state_dict(keep_vars=True).items():
        if is_optional(name) and name not in checkpoint.entries:
            _replace(module, [name], torch.zeros(tensor.shape, dtype=tensor.dtype, device=device))
    unfilled = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
    if unfilled:
        raise CheckpointError(
            got=f"tensors that are in no file: {list_up_to_ten(unfilled)}",
            expected="non-persistent buffers with their values",
            remedy="Build them outside the meta device, in the module's constructor",
        )


def _dtype_of(module: nn.Module, name: str, entry: TensorEntry, dtype: torch.dtype | None) -> torch.dtype:
    """What a tensor of a file becomes in the module."""
    if is_optional(name):
        return torch.int64  # transformers may have stored this counter as a floating-point number
    if not entry.dtype.is_floating_point:
        return entry.dtype
    chosen = dtype or entry.dtype
    kept = getattr(module, "_keep_in_fp32_modules_strict", ())
    return torch.float32 if chosen.itemsize < 4 and any(f".{one}." in f".{name}" for one in kept) else chosen


def _plan(module: nn.Module, checkpoint: Checkpoint, mismatched: list | None) -> list[tuple[TensorEntry, list[str]]]:
    """The tensors to read and their names in the module, in the order of the files. Raises if file and module do not match."""
    wanted = module.state_dict(keep_vars=True)  # with keep_vars, a tied parameter is one object under its names
    names_by_tensor: dict[int, list[str]] = {}
    for name, tensor in wanted.items():
        names_by_tensor.setdefault(id(tensor), []).append(name)

    plan, missing, wrong = [], [], []
    for names in names_by_tensor.values():
        stored = [name for name in names if name in checkpoint.entries]
        if not stored:
            missing += [" or ".join(names)] if not is_optional(names[0]) else []
            continue
        shape = wanted[stored[0]].shape
        if mismatched is not None and checkpoint.entries[stored[0]].shape != shape:
            mismatched.append((stored[0], torch.Size(checkpoint.entries[stored[0]].shape), shape))
            continue
        for name in stored:
            entry, tensor = checkpoint.entries[name], wanted[name]
            is_same_kind = entry.dtype.is_floating_point == tensor.dtype.is_floating_point or is_optional(name)
            if entry.shape != tensor.shape or not is_same_kind:
                there, here = f"{tuple(entry.shape)} {entry.dtype}", f"{tuple(tensor.shape)} {tensor.dtype}"
                wrong.append(f"{name} (in the file {there}, in the model {here})")
            elif name != stored[0] and not same_values(checkpoint.entries[stored[0]], entry):
                wrong.append(f"{name} (in the model tied to {stored[0]}, in the file with other values)")
        plan.append((checkpoint.entries[stored[0]], names))
    extra = checkpoint.entries.keys() - wanted.keys()
    findings = {"missing in the file": missing, "unknown to the model": extra, "that do not match": wrong}
    if missing or extra or wrong:
        raise CheckpointError(
            got=f"{str(checkpoint.folder)!r}: "
            + "; ".join(f"{len(found)} weights {kind}: {list_up_to_ten(found)}" for kind, found in findings.items() if found),
            expected="the weights of the model that the configuration describes",
            remedy="Check that config.json and the weights belong together",
        )
    return sorted(plan, key=lambda item: (item[0].file, item[0].start))


def _replace(module: nn.Module, names: list[str], tensor: torch.Tensor) -> None:
    """Replace a parameter or buffer by a tensor, one object under all of its names."""
    value = tensor
    for name in names:
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        old = getattr(owner, leaf)
        if isinstance(old, nn.Parameter) and value is tensor:
            value = nn.Parameter(tensor, requires_grad=old.requires_grad)
        setattr(owner, leaf, value)
