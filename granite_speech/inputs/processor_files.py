"""The configuration files of a processor and of its feature extractor, as transformers 4.x and 5.x write them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from granite_speech.checkpoints.folder import load_json
from granite_speech.errors import CheckpointError, CheckpointNotFoundError, UnsupportedError

__all__ = ["EXTRACTOR", "PROCESSOR", "extractor_arguments", "read_configuration", "write_json"]

PROCESSOR, EXTRACTOR = "processor_config.json", "preprocessor_config.json"


def read_configuration(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The feature extractor's entries, and those of processor_config.json.

    5.x keeps the feature extractor inside processor_config.json, 4.x in preprocessor_config.json.

    Raises:
        CheckpointNotFoundError: there is no feature extractor.
        CheckpointError: a file with invalid contents.
    """
    file, legacy_file = folder / PROCESSOR, folder / EXTRACTOR
    config = load_json(file) if file.is_file() else {}
    extractor, audio_token = config.get("audio_processor"), config.get("audio_token", "<|audio|>")
    if extractor is None:
        extractor = config.get("feature_extractor")
    if not isinstance(extractor, dict | None) or not isinstance(audio_token, str) or not audio_token:
        raise CheckpointError(
            got=f"{file} with audio_processor {extractor!r:.100} and audio_token {audio_token!r:.100}",
            expected="an object and a token",
            remedy="Download it again",
        )
    if extractor is None:
        if not legacy_file.is_file():
            raise CheckpointNotFoundError(
                got=f"no feature extractor in {folder}",
                expected="processor_config.json with an audio_processor, or preprocessor_config.json",
                remedy="Name a whole checkpoint folder or a hub id",
            )
        extractor = load_json(legacy_file)
    return extractor, {**config, "audio_token": audio_token}


def extractor_arguments(entries: Mapping[str, Any], expected: str) -> dict[str, Any]:
    """The arguments of the feature extractor of this name.

    Raises:
        UnsupportedError: the feature extractor of another model.
    """
    arguments = {name: value for name, value in entries.items() if name not in ("processor_class", "feature_extractor_type", "auto_map")}
    kind = entries.get("feature_extractor_type", expected)
    if kind != expected:
        raise UnsupportedError(
            got=f"feature_extractor_type = {kind!r}", expected=expected, remedy="Name the checkpoint that this feature extractor belongs to"
        )
    return arguments


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
