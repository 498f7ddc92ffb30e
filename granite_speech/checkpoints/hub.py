"""From a name to a folder: a local path, the checkpoint bundled with the package ("embedded"), or a Hugging Face hub id."""

import re
from pathlib import Path

from granite_speech.errors import CheckpointError, CheckpointNotFoundError, InputError, MissingDependencyError

__all__ = ["EMBEDDED", "EMBEDDED_FOLDER", "resolve"]

# The checkpoint bundled with the package: its name, and its folder, which is right whatever the working directory holds.
EMBEDDED = "embedded"
EMBEDDED_FOLDER = Path(__file__).parents[1] / "assets" / "embedded"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Weights, configurations, tokenizer and chat template; no pickles, which are never opened here. Files in subfolders are
# other formats of the same weights.
_WANTED = ["*.json", "*.safetensors", "*.jinja", "merges.txt", "vocab.txt", "tokenizer.model"]
_UNWANTED = ["*/*"]


def resolve(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
) -> Path:
    """The local folder of a checkpoint, downloaded into the hub's cache if need be.

    Args:
        name_or_path: a folder, "embedded", or a hub id "owner/name". If a folder has the same name as a hub id, the folder is used.
            "embedded" is the checkpoint bundled with the package, unless the working directory has a folder of that name with a
            config.json in it. A `Path`, or a string such as "./embedded", is always a folder.
        revision: branch, tag or commit on the hub; None is the default branch. Not used for a local folder.
        cache_dir: the hub's cache; None is Hugging Face's own place (`HF_HOME`).
        local_files_only: take what is in the cache and do not use the network.
        token: access token for private and gated repositories; None uses the one that is logged in.

    Returns:
        The folder, whose files may be links into the cache.

    Raises:
        CheckpointNotFoundError: no such folder, repository or revision, no permission, or no network and not in the cache.
        CheckpointError: the path is a file, or the download broke off.
        InputError: a name that is neither string nor Path.
        MissingDependencyError: huggingface_hub is needed and not installed.
    """
    if not isinstance(name_or_path, str | Path):
        raise InputError(
            got=f"a checkpoint's name of type {type(name_or_path).__name__}",
            expected="a string or a pathlib.Path",
            remedy="Pass a folder, or a hub id such as 'ibm-granite/granite-speech-3.3-2b'",
        )
    if name_or_path == EMBEDDED and not Path(EMBEDDED, "config.json").is_file():
        return EMBEDDED_FOLDER
    path = Path(name_or_path).expanduser()
    if name_or_path != "" and path.is_dir():  # Path("") is the working directory, which an empty name does not mean
        return path
    if path.is_file():
        raise CheckpointError(
            got=f"{str(path)!r}, which is a file",
            expected="the folder of a checkpoint",
            remedy=f"Pass the folder it lies in, {str(path.parent)!r}",
        )
    if isinstance(name_or_path, Path) or not _HUB_ID.fullmatch(name_or_path):
        raise CheckpointNotFoundError(
            got=f"{str(name_or_path)!r}, where there is no folder",
            expected='an existing folder, or a hub id of the form "owner/name"',
            remedy="Check the path, or pass a hub id such as 'ibm-granite/granite-speech-3.3-2b'",
        )
    return _download(name_or_path, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only, token=token)


def _download(repo_id: str, *, revision: str | None, local_files_only: bool, **options) -> Path:
    try:
        import huggingface_hub as hub
    except ImportError as error:
        raise MissingDependencyError(
            got=f"the hub id {repo_id!r} without the package huggingface_hub",
            expected="huggingface_hub, which fetches checkpoints",
            remedy="Install it (pip install huggingface_hub), or pass a local folder",
        ) from error
    try:
        folder = hub.snapshot_download(
            repo_id,
            revision=revision,
            local_files_only=local_files_only,
            allow_patterns=_WANTED,
            ignore_patterns=_UNWANTED,
            **options,
        )
    except Exception as error:
        # What leaves the download is an open set (the hub's, httpx's and the file system's errors, by version of each), and
        # whoever calls this has one thing to handle: the checkpoint is not here.
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
            got=f"{where}, which is neither a local folder nor a repository that the hub shows to this account",
            expected="an existing folder or hub id",
            remedy="Check the spelling; for a private repository log in (hf auth login) or pass token=",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return CheckpointNotFoundError(
            got=f"{where}, a revision that the hub does not have",
            expected="a branch, tag or commit of that repository",
            remedy="Check revision=, or leave it out for the default branch",
        )
    if isinstance(error, errors.LocalEntryNotFoundError):
        reason = "with local_files_only=True" if local_files_only else f"and the hub did not give it ({error.__cause__ or error})"
        return CheckpointNotFoundError(
            got=f"{where}, which is not complete in the local cache, {reason}",
            expected="a complete snapshot in the cache, or a connection to the hub",
            remedy="Fetch it once with a connection (and the same cache_dir=), or pass a local folder",
        )
    return CheckpointError(
        got=f"{where}, whose download failed with {type(error).__name__}: {error}",
        expected="a download that completes",
        remedy="Try again, finished files are kept; check the free disk space and the network",
    )
