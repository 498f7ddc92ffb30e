"""A folder that holds an adapter and no model, as peft saves it: finding the model that it is for."""

from pathlib import Path
from typing import Any

from granite_speech.checkpoints.folder import load_json, resolve
from granite_speech.errors import CheckpointNotFoundError

__all__ = ["base_of_adapter", "is_only_adapter"]

_CONFIG = "adapter_config.json"


def is_only_adapter(folder: Path) -> bool:
    """Whether the folder has an adapter's configuration, and neither a model's configuration nor a model's weights."""
    return (folder / _CONFIG).is_file() and not (folder / "config.json").is_file() and not any(folder.glob("model*.safetensors*"))


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
