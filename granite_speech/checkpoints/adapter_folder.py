"""A folder that holds an adapter and no model, as peft saves it: finding the model that it is for, and putting both together."""

from pathlib import Path
from typing import Any

from granite_speech.checkpoints.folder import Checkpoint, load_json, read_adapter, resolve
from granite_speech.checkpoints.weight_names import EMBEDDING, HEAD, is_lora
from granite_speech.errors import CheckpointError, CheckpointNotFoundError

__all__ = ["base_of_adapter", "is_only_adapter", "with_adapter"]

_CONFIG = "adapter_config.json"


def is_only_adapter(folder: Path) -> bool:
    """Whether the folder has an adapter's configuration, and neither a model's configuration nor a model's weights."""
    return (folder / _CONFIG).is_file() and not (folder / "config.json").is_file() and not any(folder.glob("model*.safetensors*"))


def with_adapter(base: Checkpoint, folder: Path) -> Checkpoint:
    """A model's checkpoint with the adapter of another folder, in place of its own.

    Whole modules that were trained along with the adapter (peft's `modules_to_save`) replace those of the model, and are then in use
    for requests without audio too.

    Raises:
        CheckpointError, UnsupportedError: as `read_adapter`; a weight of another module, or of another shape.
    """
    config, tensors = read_adapter(folder, whole_modules=True)
    entries = {name: entry for name, entry in base.entries.items() if not is_lora(name)}
    whole = {name: entry for name, entry in tensors.items() if not is_lora(name)}
    for name, entry in whole.items():
        if name != HEAD and (name not in entries or entries[name].shape != entry.shape):
            raise CheckpointError(
                got=f"{str(entry.file)!r} with {name} of shape {tuple(entry.shape)}",
                expected=f"shape {tuple(entries[name].shape)}" if name in entries else "weights that the model has",
                remedy="Load it with peft.PeftModel.from_pretrained(model, folder)",
            )
    if EMBEDDING in whole and HEAD not in entries and HEAD not in whole:
        whole[HEAD] = entries[EMBEDDING]  # the head was tied to the embeddings as they were
    return Checkpoint(base.folder, entries | tensors | whole, config | {"modules_to_save": None})


def base_of_adapter(folder: Path, **hub: Any) -> tuple[Path, str]:
    """The folder of the model that an adapter is for, and its name in adapter_config.json.

    Args:
        folder: with adapter_config.json.
        hub: cache_dir, local_files_only and token.

    Raises:
        CheckpointNotFoundError: the file names no model, or one that cannot be found.
    """
    config = load_json(folder / _CONFIG)
    base = config.get("base_model_name_or_path")
    try:
        if isinstance(base, str) and base:
            return resolve(base, revision=config.get("revision"), **hub), base
        reason = "adapter_config.json has no base_model_name_or_path"
    except CheckpointNotFoundError as error:
        reason = error.got
    raise CheckpointNotFoundError(
        got=f"{str(folder)!r}, which has an adapter for the model {base!r} and no model ({reason})",
        expected="base_model_name_or_path with the folder or hub id of the model",
        remedy="Load the model first and the adapter into it: model.load_adapter(folder, 'name')",
    )
