"""The tensors of an adapter that a model is to load: from a folder or the hub, or given, and checked against the model's layers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from granite_speech.checkpoints.folder import read_adapter, resolve
from granite_speech.checkpoints.tensor_file import open_tensors, read_tensor, staging_buffer
from granite_speech.checkpoints.weight_names import canonical_keys, is_lora
from granite_speech.errors import CheckpointError, InputError, UnsupportedError
from granite_speech.modules.adapter import LoraLinear
from granite_speech.modules.adapter_config import AdapterConfig

__all__ = ["AdapterLoadInfo", "checked_paths", "from_folder", "from_tensors"]


@dataclass
class AdapterLoadInfo:
    """What `load_adapter` returns: all empty, because any difference is an error here. The names are those of transformers."""

    missing_keys: set[str] = field(default_factory=set)
    unexpected_keys: set[str] = field(default_factory=set)
    mismatched_keys: set[str] = field(default_factory=set)
    error_msgs: list[str] = field(default_factory=list)


def from_folder(name_or_path: str | Path, options: dict[str, Any]) -> tuple[AdapterConfig, dict[str, Tensor]]:
    accepted = ("revision", "token", "cache_dir", "local_files_only")
    hub = {name: options.pop(name) for name in accepted if name in options}
    subfolder = options.pop("subfolder", None) or ""
    if unknown := [name for name, value in options.items() if value not in (None, False, "auto") and name != "use_safetensors"]:
        raise InputError(
            got=f"the options {', '.join(sorted(unknown))} for load_adapter",
            expected=", ".join((*accepted, "subfolder")),
            remedy="Remove them; an adapter is read to where the model is",
        )
    folder = resolve(name_or_path, **hub) / subfolder
    values, entries = read_adapter(folder)
    config, tensors, staging = AdapterConfig.from_dict(values), {}, staging_buffer(torch.device("cpu"))
    for name, entry in entries.items():
        with open_tensors(entry.file) as file:
            tensors[name] = read_tensor(file, entry, dtype=entry.dtype, device=torch.device("cpu"), staging=staging)
    return config, tensors


def from_tensors(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tensors = {name: given[key] for key, name in canonical_keys(given).items()}
    if others := [name for name in tensors if not is_lora(name)]:
        raise UnsupportedError(
            got=f"adapter_state_dict with {', '.join(others[:3])}",
            expected="LoRA matrices only (lora_A.weight and lora_B.weight)",
            remedy="Load whole modules with load_state_dict",
        )
    return tensors


def checked_paths(tensors: dict[str, Tensor], modules: dict[str, nn.Module], config: AdapterConfig) -> list[str]:
    """The layers that have tensors, once every tensor is known to fit."""
    paths = sorted({name.rpartition(".lora_")[0] for name in tensors})
    for path in paths:
        layer = modules.get(path)
        if not isinstance(layer, LoraLinear):
            continue  # attach_to says what is wrong
        expected = {"A": (config.rank(path), layer.in_features), "B": (layer.out_features, config.rank(path))}
        for letter, shape in expected.items():
            found = tensors.get(f"{path}.lora_{letter}.weight")
            if found is None or tuple(found.shape) != shape:
                raise CheckpointError(
                    got=f"{path}.lora_{letter}.weight " + ("missing" if found is None else f"of shape {tuple(found.shape)}"),
                    expected=f"shape {shape}",
                    remedy="Check that the adapter is for this model, and that its adapter_config.json belongs to its tensors",
                )
    return paths
