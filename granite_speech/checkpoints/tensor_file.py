"""A reader of the safetensors format. It checks the header before allocating, and reads each tensor into its final storage.

A file has 8 bytes of header length (little-endian), a JSON header (name → dtype, shape, byte range), and the tensors' bytes
without gaps. Files are not memory-mapped: mapped pages count as resident memory in addition to the tensor they are copied to,
so that a model of half the machine's memory would not load.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from granite_speech.errors import CheckpointError, CheckpointNotFoundError, UnsupportedError

__all__ = ["TensorEntry", "open_tensors", "read_header", "read_tensor", "same_values", "staging_buffer"]

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_MAX_HEADER_BYTES = 100_000_000  # the limit of the format's own reader
_CHUNK_BYTES = 32 * 1024 * 1024  # size of the buffer for tensors that change dtype or leave the host


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor is stored.

    Attributes:
        file: the file.
        dtype: its dtype in the file.
        shape: its shape.
        start: offset of its first byte in the file.
        nbytes: its size in bytes.
    """

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int


_DOWNLOAD_AGAIN = "Download or save the checkpoint again"


def _bad(path: Path, got: str, expected: str, remedy: str = _DOWNLOAD_AGAIN) -> CheckpointError:
    return CheckpointError(got=f"{str(path)!r}: {got}", expected=expected, remedy=remedy)


@contextmanager
def open_tensors(path: Path) -> Iterator[BinaryIO]:
    """A file open for unbuffered reading. An OSError while it is open becomes a CheckpointError."""
    try:
        with open(path, "rb", buffering=0) as file:
            yield file
    except OSError as error:
        raise _bad(path, f"it cannot be read: {error}", "a readable file", "Check the permissions and the disk") from error


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one file, by their names in it. Reads only the header.

    Raises:
        CheckpointNotFoundError: no regular file at this path.
        CheckpointError: the file is truncated, its header is malformed, or the header does not describe the bytes after it.
        UnsupportedError: a dtype of the format that is not supported here, such as F8_E4M3.
    """
    if not path.is_file():
        raise CheckpointNotFoundError(got=f"no file {str(path)!r}", expected="a safetensors file there", remedy=_DOWNLOAD_AGAIN)
    with open_tensors(path) as file:
        size = path.stat().st_size
        prefix = file.read(8)
        if prefix == b"version ":
            raise _bad(path, "a git-lfs pointer, not the weights themselves", "a safetensors file", "Run `git lfs pull` in that folder")
        header_bytes = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or header_bytes > size - 8:
            raise _bad(path, f"{size} bytes with a header of {header_bytes}", "a header that ends within the file")
        if header_bytes > _MAX_HEADER_BYTES:
            raise _bad(path, f"a header of {header_bytes} bytes", f"at most {_MAX_HEADER_BYTES}")
        raw = file.read(header_bytes)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise _bad(path, f"a header that is not JSON ({error})", "a JSON object") from error
    if not isinstance(header, dict):
        raise _bad(path, f"a header of type {type(header).__name__}", "a JSON object")
    header.pop("__metadata__", None)
    data_start, data_bytes = 8 + header_bytes, size - 8 - header_bytes
    entries = {name: _entry(path, name, info, data_start, data_bytes) for name, info in header.items()}
    _check_coverage(path, entries, data_start, data_bytes)
    return entries


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    # Of two equal names json silently keeps the last, which may be the wrong tensor.
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(name for name in names if names.count(name) > 1)!r} occurs twice")
    return values


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63  # isinstance would accept True


def _entry(path: Path, name: str, info: object, data_start: int, data_bytes: int) -> TensorEntry:
    fields = info if isinstance(info, dict) else {}
    dtype_name, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype_name, str) or not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        raise _bad(path, f"an entry {name!r} of {str(info)[:100]}", "dtype, shape and data_offsets [begin, end]")
    if not all(_is_size(value) for value in (*shape, *offsets)):
        raise _bad(path, f"shape {str(shape)[:100]} and data_offsets {offsets} of {name!r}", "integers from 0 to 2**63 - 1")
    if dtype_name not in _DTYPES:
        raise UnsupportedError(
            got=f"{str(path)!r}: dtype {dtype_name!r} of {name!r}",
            expected=f"one of {', '.join(_DTYPES)}",
            remedy="Use a checkpoint that is not quantised, or convert this one to BF16",
        )
    dtype = _DTYPES[dtype_name]
    begin, end = offsets
    if not begin <= end <= data_bytes:
        raise _bad(path, f"bytes {begin} to {end} for {name!r}", f"a range within the {data_bytes} bytes after the header")
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise _bad(path, f"{end - begin} bytes for {name!r}", f"as many as shape {str(shape)[:100]} needs in {dtype_name}")
    return TensorEntry(path, dtype, tuple(shape), data_start + begin, end - begin)


def _check_coverage(path: Path, entries: dict[str, TensorEntry], data_start: int, data_bytes: int) -> None:
    """Raise unless the tensors fill the file from the header to the end, without gaps or overlaps."""
    end = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if entry.start != end:
            kind = "overlaps the tensor before it" if entry.start < end else f"leaves {entry.start - end} bytes unused before it"
            raise _bad(path, f"{name!r} {kind}", "tensors that follow one another without gaps")
        end += entry.nbytes
    if end != data_start + data_bytes:
        raise _bad(path, f"{data_start + data_bytes - end} bytes after the last tensor", "tensors that fill the file to its end")


def staging_buffer(device: torch.device) -> torch.Tensor:
    """Host memory for `read_tensor`, uint8 (32 MiB,), to be used for a whole checkpoint.

    A new buffer for each tensor would leave holes in memory between the tensors, and the process would grow to the size of the
    file.

    Args:
        device: where the tensors go. For a GPU the memory is pinned, which makes copies faster.
    """
    return torch.empty(_CHUNK_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")


def read_tensor(
    file: BinaryIO,
    entry: TensorEntry,
    *,
    dtype: torch.dtype,
    device: torch.device,
    staging: torch.Tensor,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Read one tensor into its final storage.

    Args:
        file: `entry.file`, from open_tensors.
        entry: the tensor to read.
        dtype: dtype of the result.
        device: device of the result.
        staging: from staging_buffer; used if the tensor changes dtype or leaves the host.
        out: the storage to read into, contiguous, of shape `entry.shape` and this dtype and device; allocated if omitted.

    Returns:
        Contiguous, of shape `entry.shape`.

    Raises:
        CheckpointError: the file ends early, because it has shrunk since its header was read.
    """
    tensor = torch.empty(entry.shape, dtype=dtype, device=device) if out is None else out
    file.seek(entry.start)
    if tensor.dtype == entry.dtype and tensor.device.type == "cpu":
        _read_exactly(file, entry, tensor)
        return tensor
    flat, staged = tensor.view(-1), staging.view(entry.dtype)
    for first in range(0, flat.numel(), staged.numel()):
        part = staged[: min(staged.numel(), flat.numel() - first)]
        _read_exactly(file, entry, part)
        flat[first : first + part.numel()].copy_(part)
    return tensor


def _read_exactly(file: BinaryIO, entry: TensorEntry, tensor: torch.Tensor) -> None:
    """Fill a contiguous tensor on the host from the file's current position."""
    if tensor.numel() == 0:
        return
    target = memoryview(tensor.view(-1).view(torch.uint8).numpy())
    done = 0
    while done < len(target):  # one read returns at most 2 GiB
        count = file.readinto(target[done:])
        if not count:
            raise _bad(entry.file, f"the end of the file {len(target) - done} bytes early", "all bytes that its header describes")
        done += count


def same_values(first: TensorEntry, second: TensorEntry) -> bool:
    """Whether two stored tensors have the same dtype, shape and bytes. Uses at most 64 MiB of host memory."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    with open_tensors(first.file) as one, open_tensors(second.file) as other:
        one.seek(first.start)
        other.seek(second.start)
        for done in range(0, first.nbytes, _CHUNK_BYTES):
            count = min(_CHUNK_BYTES, first.nbytes - done)
            if one.read(count) != other.read(count):
                return False
    return True
