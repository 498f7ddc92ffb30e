"""Resolves a checkpoint's name to a local folder. A name is a path, a Hugging Face hub id, or "embedded", the bundled checkpoint."""

import re
from pathlib import Path

from granite_speech.errors import CheckpointError, CheckpointNotFoundError, InputError, MissingDependencyError

__all__ = ["EMBEDDED", "EMBEDDED_FOLDER", "resolve"]

# Name and folder of the bundled checkpoint. The folder does not depend on the working directory, as the name may.
EMBEDDED = "embedded"
EMBEDDED_FOLDER = Path(__file__).parents[1] / "assets" / "embedded"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# A release by its name alone, as IBM's own package takes it.
_RELEASE = re.compile(r"granite-speech-\d[\w.-]*")
# Weights, configurations, tokenizer and chat template. Pickles are never opened, and subfolders hold other formats of the weights.
_WANTED = ["*.json", "*.safetensors", "*.jinja", "merges.txt", "vocab.txt", "tokenizer.model"]
_UNWANTED = ["*/*"]


def resolve(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    force_download: bool = False,
    subfolder: str | Path | None = "",
    weights: bool = True,
) -> Path:
    """The local folder of a checkpoint, which is downloaded into the hub's cache if needed.

    Args:
        name_or_path: a folder, "embedded", or a hub id "owner/name"; of IBM's releases also the name alone, "granite-speech-3.3-2b".
            A folder takes precedence over a hub id of the same name.
            "embedded" is the checkpoint bundled with the package, unless the working directory has a folder of that name with a
            config.json in it. A `Path`, or a string such as "./embedded", is always a folder.
        revision: branch, tag or commit on the hub; None is the default branch. Ignored for local folders.
        cache_dir: the hub's cache; None is Hugging Face's default (`HF_HOME`).
        local_files_only: use only the cache, not the network.
        token: access token for private and gated repositories; None uses that of the logged-in account.
        force_download: download the files again, even if the cache has them.
        subfolder: the checkpoint's place in the folder or repository; "" and None are its top.
        weights: also download the weights; without them a configuration or a processor is there sooner.

    Returns:
        The folder, `subfolder` included. Its files may be links into the cache.

    Raises:
        CheckpointNotFoundError: no such folder, repository or revision, no permission, or neither network nor cached files.
        CheckpointError: the path is a file, or the download failed.
        InputError: the name is neither a string nor a Path, or `subfolder` leads out of the folder.
        MissingDependencyError: huggingface_hub is needed and not installed.
    """
    if not isinstance(name_or_path, str | Path):
        raise InputError(
            got=f"a checkpoint's name of type {type(name_or_path).__name__}",
            expected="a string or a pathlib.Path",
            remedy="Pass a folder, or a hub id such as 'ibm-granite/granite-speech-3.3-2b'",
        )
    inside = _inside(subfolder)
    if name_or_path == EMBEDDED and not Path(EMBEDDED, "config.json").is_file():
        return _existing(EMBEDDED_FOLDER, inside)
    path = Path(name_or_path).expanduser()
    if name_or_path != "" and path.is_dir():  # Path("") would be the working directory
        return _existing(path, inside)
    if path.is_file():
        raise CheckpointError(
            got=f"{str(path)!r}, which is a file",
            expected="the folder of a checkpoint",
            remedy=f"Pass its folder, {str(path.parent)!r}",
        )
    if isinstance(name_or_path, str) and _RELEASE.fullmatch(name_or_path):
        name_or_path = f"ibm-granite/{name_or_path}"
    if isinstance(name_or_path, Path) or not _HUB_ID.fullmatch(name_or_path):
        raise CheckpointNotFoundError(
            got=f"{str(name_or_path)!r}, which is not an existing folder",
            expected='an existing folder, or a hub id of the form "owner/name"',
            remedy="Check the path, or pass a hub id such as 'ibm-granite/granite-speech-3.3-2b'",
        )
    options = {"cache_dir": cache_dir, "token": token, "force_download": force_download}
    return _existing(_download(name_or_path, inside, weights, revision=revision, local_files_only=local_files_only, **options), inside)


def _inside(subfolder: str | Path | None) -> str:
    """The subfolder with "/" between its parts; "" for none."""
    path = Path(subfolder or "") if isinstance(subfolder, str | Path | None) else None
    if path is None or path.is_absolute() or ".." in path.parts:
        raise InputError(
            got=f"subfolder={subfolder!r:.100}",
            expected="a relative path inside the folder or repository",
            remedy="Pass for example subfolder='checkpoint-500'",
        )
    return "" if path == Path() else path.as_posix()


def _existing(folder: Path, inside: str) -> Path:
    if inside and not (folder / inside).is_dir():
        raise CheckpointNotFoundError(
            got=f"subfolder={inside!r} of {str(folder)!r}, which does not exist",
            expected="an existing subfolder",
            remedy="Check subfolder=",
        )
    return folder / inside if inside else folder


def _download(repo_id: str, inside: str, weights: bool, *, revision: str | None, local_files_only: bool, **options) -> Path:
    try:
        import huggingface_hub as hub
    except ImportError as error:
        raise MissingDependencyError(
            got=f"the hub id {repo_id!r} without the package huggingface_hub",
            expected="huggingface_hub, which downloads checkpoints",
            remedy="Install it (pip install huggingface_hub), or pass a local folder",
        ) from error
    prefix = f"{inside}/" if inside else ""
    try:
        folder = hub.snapshot_download(
            repo_id,
            revision=revision,
            local_files_only=local_files_only,
            allow_patterns=[prefix + pattern for pattern in _WANTED if weights or pattern != "*.safetensors"],
            ignore_patterns=[prefix + pattern for pattern in _UNWANTED],
            **options,
        )
    except Exception as error:
        # A download can raise errors of the hub, of its HTTP library and of the file system, which vary by version. A caller needs one
        # error for all: the checkpoint is not available.
        raise _explain(error, repo_id, revision, local_files_only) from error
    return Path(folder)


def _explain(error: Exception, repo_id: str, revision: str | None, local_files_only: bool) -> CheckpointError:
    from huggingface_hub import errors

    where = f"{repo_id!r}" if revision is None else f"{repo_id!r} at revision {revision!r}"
    if isinstance(error, errors.GatedRepoError):
        return CheckpointNotFoundError(
            got=f"{where}, which is gated on the hub",
            expected="an account that has been granted access",
            remedy=f"Accept the terms on the page of {repo_id} and log in (hf auth login), or pass token=",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return CheckpointNotFoundError(
            got=f"{where}, which is neither a local folder nor a repository visible to this account",
            expected="an existing folder or hub id",
            remedy="Check the spelling; for a private repository, log in (hf auth login) or pass token=",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return CheckpointNotFoundError(
            got=f"{where}, a revision that the hub does not have",
            expected="a branch, tag or commit of that repository",
            remedy="Check revision=, or omit it for the default branch",
        )
    if isinstance(error, errors.LocalEntryNotFoundError):
        reason = "with local_files_only=True" if local_files_only else f"and could not be downloaded ({error.__cause__ or error})"
        return CheckpointNotFoundError(
            got=f"{where}, which is not complete in the local cache, {reason}",
            expected="a complete snapshot in the cache, or a connection to the hub",
            remedy="Download it once with a connection (and the same cache_dir=), or pass a local folder",
        )
    return CheckpointError(
        got=f"{where}, whose download failed with {type(error).__name__}: {error}",
        expected="a complete download",
        remedy="Try again (finished files are kept); check the free disk space and the network",
    )
