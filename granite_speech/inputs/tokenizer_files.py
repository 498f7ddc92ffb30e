"""The files of a tokenizer: tokenizer.json, tokenizer_config.json, and those of earlier versions of transformers."""

import json
from collections.abc import Mapping
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from granite_speech.checkpoints.folder import load_json
from granite_speech.errors import CheckpointError, CheckpointNotFoundError, MissingDependencyError
from granite_speech.inputs.chat_template import read_chat_template, write_text
from granite_speech.inputs.vocabulary import ROLES, Vocabulary, named_roles

if TYPE_CHECKING:
    import tokenizers

__all__ = ["CONFIG", "read_files", "write_files"]

BACKEND, CONFIG = "tokenizer.json", "tokenizer_config.json"
# Written to tokenizer.json, to a file of their own, or not true of another folder.
_NOT_SAVED = {"chat_template", "add_bos_token", "add_eos_token", "extra_special_tokens", "additional_special_tokens", "name_or_path"}


def read_files(folder: Path) -> "tuple[tokenizers.Tokenizer, dict[str, Any], str | dict[str, str] | None]":
    """The backend, the contents of tokenizer_config.json, and the chat template.

    Raises:
        CheckpointNotFoundError: there is no tokenizer.json.
        CheckpointError: a file with invalid contents.
        MissingDependencyError: tokenizers is not installed.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MissingDependencyError(got="no tokenizers", expected="the package tokenizers", remedy="pip install tokenizers") from error
    file = folder / BACKEND
    if not file.is_file():
        raise CheckpointNotFoundError(
            got=f"no {file}", expected="a folder with a tokenizer.json", remedy="Name a whole checkpoint folder or a hub id"
        )
    try:
        backend = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(got=f"{file}, unreadable ({error})", expected="a tokenizer", remedy="Download it again") from error
    config = _read(folder / CONFIG)
    if config.get("added_tokens_decoder") is None:
        # Folders older than added_tokens_decoder: special_tokens_map.json overrides tokenizer_config.json there.
        config.update(_read(folder / "special_tokens_map.json"))
        _add_legacy_tokens(backend, _read(folder / "added_tokens.json"), config)
    else:
        _add_tokens(backend, config["added_tokens_decoder"], folder / CONFIG)
    return backend, config, read_chat_template(folder, config)


def write_files(folder: Path, vocabulary: Vocabulary, config: Mapping[str, Any], settings: Mapping[str, Any], prefix: str) -> list[Path]:
    """Writes tokenizer.json and tokenizer_config.json, as transformers 4.x and 5.x read them. Returns the files.

    Args:
        folder: must exist.
        vocabulary: tokens and roles as they are now.
        config: what was read.
        settings: entries that replace those, with tokenizer_class.
        prefix: of the files' names; "" for none.
    """
    files = [folder / f"{prefix}{name}" for name in (CONFIG, BACKEND)]
    entries = {name: value for name, value in config.items() if name not in _NOT_SAVED and name not in named_roles(config)}
    entries |= {**settings, **vocabulary.special_tokens}
    if isinstance(config.get("extra_special_tokens"), dict):
        entries["extra_special_tokens"] = {role: token for role, token in vocabulary.special_tokens.items() if role not in ROLES}
    if extra := vocabulary.extra_special_tokens:
        entries["additional_special_tokens"] = extra  # transformers 5 reads this name too; 4 expects a dictionary under the other one
    if "added_tokens_decoder" in entries:
        decoder = vocabulary.added_tokens_decoder
        entries["added_tokens_decoder"] = {str(index): _description(token) for index, token in decoder.items()}
    write_text(files[0], json.dumps(entries, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
    vocabulary.backend.save(str(files[1]))
    return files


def _description(token: "tokenizers.AddedToken") -> dict[str, Any]:
    names = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    return {name: getattr(token, name) for name in names}


def _read(file: Path) -> dict[str, Any]:
    return load_json(file) if file.is_file() else {}


def _add_legacy_tokens(backend: "tokenizers.Tokenizer", added: dict[str, int], config: dict[str, Any]) -> None:
    """Adds the tokens of added_tokens.json that the vocabulary lacks, in the order of their ids."""
    from tokenizers import AddedToken

    special = set(named_roles(config).values())
    for token, _ in sorted(added.items(), key=lambda item: item[1]):
        if backend.token_to_id(token) is None:
            backend.add_tokens([AddedToken(token, special=token in special, normalized=token not in special)])


def _add_tokens(backend: "tokenizers.Tokenizer", added: Any, file: Path) -> None:
    """Adds the tokens of added_tokens_decoder, from `file`, that tokenizer.json lacks, in the order of their ids."""
    from tokenizers import AddedToken

    known = {str(index) for index in backend.get_added_tokens_decoder()}
    try:
        late = sorted(((int(index), token) for index, token in added.items() if index not in known), key=itemgetter(0))
        backend.add_tokens([AddedToken(**token) for _, token in late])
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(
            got=f"added_tokens_decoder in {file}, which does not describe tokens ({error})",
            expected="ids and their tokens",
            remedy="Download it again",
        ) from error
