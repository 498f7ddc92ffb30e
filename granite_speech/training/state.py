"""The files of a training run: its checkpoint, a safetensors file replaced by a rename, and its log, in JSON lines."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from granite_speech.errors import CheckpointError, InputError

__all__ = ["TrainingFolder"]

_STATE, _LOG = "state.safetensors", "log.jsonl"


class TrainingFolder:
    """The folder with the checkpoint and log of a training run. `create` makes it."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.state_file, self.log_file = self.folder / _STATE, self.folder / _LOG

    def create(self) -> None:
        """Make the folder if it does not exist.

        Raises:
            CheckpointError: a folder that cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / ".writable").touch()
            (self.folder / ".writable").unlink(missing_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error

    @property
    def has_state(self) -> bool:
        return self.state_file.is_file()

    def write(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Write a checkpoint. The previous one is kept until the new one is complete on disk.

        Raises:
            CheckpointError: it could not be written, for example because the disk is full.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        unfinished = self.folder / f".{_STATE}.unfinished"
        try:
            on_host = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
            save_file(on_host, unfinished, {"training": json.dumps(facts)})
            with open(unfinished, "rb") as file:
                os.fsync(file.fileno())
            unfinished.replace(self.state_file)
        except (OSError, SafetensorError) as error:
            raise self._unwritable(error) from error

    def read(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The last checkpoint's tensors and facts.

        Raises:
            CheckpointError: a damaged file.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.state_file, "pt") as file:
                facts = json.loads((file.metadata() or {})["training"])
                if not isinstance(facts["identity"], dict) or type(facts["step"]) is not int:
                    raise ValueError(f"its facts are {facts!r:.60}")
                return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118 (not a dictionary)
        except (OSError, SafetensorError, LookupError, TypeError, ValueError, RecursionError) as error:
            raise CheckpointError(
                got=f"{str(self.state_file)!r}, which is not a training checkpoint ({error})",
                expected="a checkpoint written by this package",
                remedy="Remove it and start again",
            ) from error

    def check_identity(self, stored: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        """Refuse to resume a run with different values from those it was started with.

        Raises:
            InputError: names the values that differ.
        """
        own = json.loads(json.dumps(own))
        differing = sorted(name for name in stored.keys() | own.keys() if stored.get(name) != own.get(name))
        if differing:
            pairs = ", ".join(f"{name} = {own.get(name)!r:.60} (was {stored.get(name)!r:.60})" for name in differing)
            raise InputError(
                got=f"resuming the run in {str(self.folder)!r} with {pairs}",
                expected="the values it was started with",
                remedy="Use those values, or start a new run in another folder",
            )

    def cut_log(self, step: int) -> list[dict[str, Any]]:
        """Remove records of later steps, as left by a process killed between checkpoints. Returns the remaining records.

        The log is for people and plots, and resuming does not need it. A missing file counts as empty, and unreadable lines, such as a
        truncated last one, are dropped.

        Raises:
            CheckpointError: a log that cannot be written.
        """
        try:
            lines = self.log_file.read_text(encoding="utf-8", errors="replace").splitlines() if self.log_file.is_file() else []
            records = [record for record in map(_record, lines) if record is not None and record["step"] <= step]
            shorter = self.folder / f".{_LOG}.unfinished"
            shorter.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
            shorter.replace(self.log_file)
        except OSError as error:
            raise self._unwritable(error) from error
        return records

    def log(self, record: Mapping[str, Any]) -> None:
        """Add a record to the log.

        Raises:
            CheckpointError: a log that cannot be written.
        """
        try:
            with open(self.log_file, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: Exception) -> CheckpointError:
        return CheckpointError(
            got=f"{str(self.folder)!r}, which could not be written ({error})",
            expected="a writable folder with enough free space",
            remedy="Check the path, its permissions and the free disk space",
        )


def _record(line: str) -> dict[str, Any] | None:
    """A line of the log; None if it is not one."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and type(record.get("step")) is int else None
