"""What every `from_pretrained`, `save_pretrained` and `push_to_hub` of this folder does with its options."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from granite_speech.checkpoints.call_options import check_unused
from granite_speech.errors import CheckpointError, InputError

__all__ = ["HUB_OPTIONS", "hub_arguments", "hub_options", "push", "saving", "upload_arguments"]

HUB_OPTIONS = {"cache_dir": None, "force_download": False, "local_files_only": False, "token": None, "revision": None, "subfolder": ""}
_UPLOAD = ("repo_id", "commit_message", "commit_description", "private", "token", "revision", "create_pr", "tags")


def hub_arguments(cache_dir: Any, force_download: bool, local_files_only: bool, token: Any, revision: str | None) -> dict[str, Any]:
    """The named arguments of a `from_pretrained` as options, without those at their default."""
    given = {
        "cache_dir": cache_dir,
        "force_download": force_download,
        "local_files_only": local_files_only,
        "token": token,
        "revision": revision,
    }
    return {name: value for name, value in given.items() if value != HUB_OPTIONS[name]}


def upload_arguments(message: Any, description: Any, private: Any, token: Any, revision: Any, create_pr: bool, tags: Any) -> dict[str, Any]:
    """The named arguments of a `push_to_hub` as options, without those at their default."""
    given = {"commit_message": message, "commit_description": description, "private": private, "token": token, "revision": revision}
    given |= {"create_pr": create_pr or None, "tags": tags}
    return {name: value for name, value in given.items() if value is not None}


def hub_options(options: dict[str, Any], call: str) -> dict[str, Any]:
    """The options of `hub.resolve` among those of a `from_pretrained`, without those at their default.

    Raises:
        InputError, UnsupportedError: another option that is unknown, or would change the result.
    """
    options = dict(options)
    earlier = options.pop("use_auth_token", None)  # the name of token in transformers 4
    found = {name: options.pop(name) for name in HUB_OPTIONS if name in options}
    if earlier is not None:
        found.setdefault("token", earlier)
    check_unused(options, call)
    return {name: value for name, value in found.items() if value is not None and value != HUB_OPTIONS[name]}


@contextmanager
def saving(folder: str | Path, call: str, push_to_hub: bool, options: dict[str, Any]) -> Iterator[Path]:
    """A folder to write to, created if missing; it is uploaded afterwards if asked to.

    Args:
        folder: the caller's.
        call: its name, for messages.
        push_to_hub: whether to upload. The repository is `repo_id`, or if omitted the folder's name in the account's namespace.
        options: of the upload, and those that change nothing.

    Raises:
        CheckpointError: a file is in the place of the folder, or the folder cannot be created.
        InputError, UnsupportedError: an unknown option, or not a path.
    """
    upload_options = {name: options[name] for name in _UPLOAD if name in options}
    check_unused({name: value for name, value in options.items() if name not in _UPLOAD}, call)
    if not isinstance(folder, str | Path) or folder == "":
        raise InputError(got=f"save_directory = {folder!r:.100}", expected="a folder's path", remedy="Pass a string or a pathlib.Path")
    path = Path(folder).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            got=f"{str(path)!r}, where no folder can be made ({error})", expected="a folder, existing or not", remedy="Pass another path"
        ) from error
    before = _times(path) if push_to_hub else {}
    yield path
    if push_to_hub:
        with tempfile.TemporaryDirectory(prefix="granite-speech-") as copies:  # of the files just written, not of others in the folder
            for name, time in _times(path).items():
                if before.get(name) != time:
                    (Path(copies) / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path / name, Path(copies) / name)
            _upload(Path(copies), upload_options.pop("repo_id", None) or path.resolve().name, upload_options)


def _times(folder: Path) -> dict[Path, int]:
    """When each file was written."""
    return {file.relative_to(folder): file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}


def push(save: Callable[[str], Any], repo_id: str, call: str, options: dict[str, Any]) -> Any:
    """Saves to a temporary folder and uploads it. Returns what the upload returns.

    Args:
        save: called with the folder.
        repo_id: the repository.
        call: the caller's name, for messages.
        options: of the upload, and those that change nothing.
    """
    check_unused({name: value for name, value in options.items() if name not in _UPLOAD}, call)
    with tempfile.TemporaryDirectory(prefix="granite-speech-") as folder:
        save(folder)
        return _upload(Path(folder), repo_id, {name: options[name] for name in _UPLOAD if name in options})


def _upload(folder: Path, repo_id: str, options: dict[str, Any]) -> Any:
    from granite_speech.checkpoints.upload import upload

    return upload(folder, repo_id, **options)
