"""A stand-in for uploads to the hub."""

from pathlib import Path
from typing import Any

from granite_speech.checkpoints import upload

__all__ = ["record_uploads"]


def record_uploads(monkeypatch) -> list[tuple[str, list[str], dict[str, Any]]]:
    """Replace the upload. Returns the list of uploads to come: repository, names of the files, and the options that are set."""
    uploads = []

    def record(folder: str | Path, repo_id: str, *, files: list[str] | None = None, **options: Any) -> str:
        names = [path.name for path in Path(folder).iterdir()] if files is None else files
        uploads.append((repo_id, sorted(names), {name: value for name, value in options.items() if value}))
        return repo_id

    monkeypatch.setattr(upload, "upload", record)
    return uploads
