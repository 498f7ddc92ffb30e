"""Uploads a folder to the Hugging Face hub."""

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from granite_speech.checkpoints.call_options import check_unused
from granite_speech.errors import CheckpointError, InputError, MissingDependencyError

__all__ = ["PushToHub", "saving", "upload"]

_OPTIONS = ("repo_id", "commit_message", "commit_description", "private", "token", "revision", "create_pr", "tags")


def upload(
    folder: str | Path,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: Iterable[str] | None = None,
    files: Iterable[str] | None = None,
) -> str:
    """Upload a folder's files in one commit. The repository is created if it does not exist.

    Args:
        folder: what to upload.
        repo_id: "owner/name", or a name in the account's own namespace.
        commit_message, commit_description: of the commit.
        private: whether a new repository is private; None is the account's default.
        token: access token with permission to write; None uses that of the logged-in account.
        revision: the branch, created if it does not exist; None is the default branch.
        create_pr: open a pull request instead of committing.
        tags: added to the repository's model card.
        files: names of the files to upload; None uploads all.

    Returns:
        The commit's URL, as huggingface_hub's `CommitInfo`: a string with the attributes `oid`, `pr_url` and others.

    Raises:
        InputError: `repo_id` cannot be a repository's name.
        CheckpointError: no permission, no connection, or a failed upload.
        MissingDependencyError: huggingface_hub is not installed.
    """
    try:
        import huggingface_hub as hub
    except ImportError as error:
        raise MissingDependencyError(
            got=f"an upload to {repo_id!r} without the package huggingface_hub",
            expected="huggingface_hub, which uploads files",
            remedy="Install it (pip install huggingface_hub)",
        ) from error
    try:
        repo_id = hub.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        if revision is not None and not create_pr and not revision.startswith("refs/"):
            hub.create_branch(repo_id, branch=revision, token=token, exist_ok=True)
        if tags:
            _tag(repo_id, list(tags), token)
        return hub.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message or "Upload with granite-speech-triton",
            commit_description=commit_description,
            token=token,
            revision=revision,
            create_pr=create_pr,
            allow_patterns=None if files is None else list(files),
        )
    except Exception as error:  # of the hub, of its HTTP library and of the file system, as for a download
        raise _explain(error, repo_id) from error


def _tag(repo_id: str, tags: list[str], token: str | bool | None) -> None:
    """Add tags to the model card in the repository, and make a card if there is none."""
    from huggingface_hub import ModelCard, ModelCardData
    from huggingface_hub.errors import EntryNotFoundError

    try:
        card = ModelCard.load(repo_id, token=token)
    except EntryNotFoundError:
        card = ModelCard(f"---\n{ModelCardData(tags=[]).to_yaml()}\n---\n")
    known = list(card.data.tags or [])
    if added := [tag for tag in tags if tag not in known]:
        card.data.tags = known + added
        card.push_to_hub(repo_id, token=token)


def _explain(error: Exception, repo_id: str) -> CheckpointError | InputError:
    from huggingface_hub import errors

    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if isinstance(error, errors.HFValidationError):
        return InputError(
            got=f"the repository name {repo_id!r} ({reason:.200})", expected='"owner/name"', remedy="Pass for example 'me/my-model'"
        )
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403) or isinstance(error, errors.LocalTokenNotFoundError):
        return CheckpointError(
            got=f"an upload to {repo_id!r}, which is not permitted ({reason:.200})",
            expected="an account or token that may write to that repository",
            remedy="Log in (hf auth login), or pass token= with permission to write",
        )
    return CheckpointError(
        got=f"an upload to {repo_id!r} that failed with {type(error).__name__}: {reason:.300}",
        expected="a complete upload",
        remedy="Check the network, and call push_to_hub again; the saved files are kept if a folder was given",
    )


@contextmanager
def saving(folder: str | Path, call: str, *, push_to_hub: bool = False, options: Mapping[str, Any] | None = None) -> Iterator[Path]:
    """A folder for a `save_pretrained`, created if missing; afterwards the files that the block wrote are uploaded if asked to.

    Args:
        folder: where the block writes.
        call: the name of the call, for messages.
        push_to_hub: upload the files. The repository is `repo_id`, or if omitted the folder's name in the account's namespace.
        options: other options of the call: those of `upload`, and those that change nothing (`call_options`).

    Raises:
        CheckpointError: the path is a file, or the folder cannot be created.
        InputError, UnsupportedError: another option.
        The errors of `upload`.
    """
    options = dict(options or {})
    hub = {name: options.pop(name) for name in _OPTIONS if name in options}
    check_unused(options, call, known=("save_directory", "push_to_hub", *_OPTIONS))
    folder = _folder(folder)
    before = _times(folder)
    yield folder
    if push_to_hub:
        written = [name for name, time in _times(folder).items() if before.get(name) != time]
        upload(folder, hub.pop("repo_id", None) or folder.resolve().name, **hub, files=written)


def _folder(folder: str | Path) -> Path:
    if not isinstance(folder, str | Path) or folder == "":
        raise InputError(got=f"save_directory={folder!r:.100}", expected="a folder's path", remedy="Pass a string or a pathlib.Path")
    path = Path(folder).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            got=f"{str(path)!r}, which is a file" if path.is_file() else f"{str(path)!r}, which cannot be created: {error}",
            expected="a folder, existing or not",
            remedy="Pass another path",
        ) from error
    return path


def _times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.is_file()}


class PushToHub:
    """`push_to_hub` of a class that has `save_pretrained`.

    Attributes:
        model_tags: tags for the model card, in addition to those of a call.
    """

    model_tags: list[str] | None = None

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str | None = "50GB",
        tags: Iterable[str] | None = None,
        **options: Any,
    ) -> str:
        """Save into a temporary folder and upload it.

        Args:
            repo_id: "owner/name", or a name in the account's own namespace. Created if it does not exist.
            max_shard_size: of a model's files: bytes, or a number with KB, MB or GB.
            commit_message, commit_description, private, token, revision, create_pr, tags: of `upload`.
            options: transformers' options that change nothing here.

        Returns:
            The commit's URL, as huggingface_hub's `CommitInfo`.

        Raises:
            The errors of `upload` and of `save_pretrained`.
        """
        with tempfile.TemporaryDirectory(prefix="granite-speech-") as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size, repo_id=repo_id, **options)
            return upload(
                folder,
                repo_id,
                commit_message=commit_message,
                commit_description=commit_description,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
                tags=list(dict.fromkeys([*(tags or ()), *(self.model_tags or ())])),
            )
