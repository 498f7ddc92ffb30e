"""The reader of safetensors files: damaged files, unsupported dtypes, and single changed bytes."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from granite_speech.checkpoints.tensor_file import TensorEntry, read_header
from granite_speech.errors import CheckpointError, CheckpointNotFoundError, GraniteSpeechError, UnsupportedError


def tensors_file(header, data=b"", length=None):
    """Bytes of a safetensors file with this header, an object or raw bytes; `length` overrides the header's true length."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def entry(begin, end, shape=None, dtype="F32"):
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


GOOD = tensors_file({"__metadata__": {"format": "pt"}, "a": entry(0, 8), "b": entry(8, 12, [])}, bytes(12))
TWICE = b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'

DAMAGED = {
    "empty": (b"", "0 bytes with a header"),
    "shorter than the length field": (b"\x08\0\0\0\0\0\0", "7 bytes with a header"),
    "length field alone": (bytes(8), "not JSON"),
    "header longer than the file": (tensors_file({}, length=1000), "a header of 1000"),
    "header of 2**64 - 1": (tensors_file({}, length=2**64 - 1), "a header of 18446744073709551615"),
    "cut within the header": (GOOD[:40], "header that ends within the file"),
    "cut within the data": (GOOD[:-1], "range within the 11 bytes"),
    "cut before the data": (GOOD[:-12], "range within the 0 bytes"),
    "bytes after the data": (GOOD + b"\0", "1 bytes after the last tensor"),
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "not UTF-8": (tensors_file(b'{"\xff": 1}'), "not JSON"),
    "not JSON": (tensors_file(b"{a: 1}"), "not JSON"),
    "deeply nested": (tensors_file(b"[" * 100_000), "not JSON"),
    "a list": (tensors_file([]), "type list"),
    "a name twice": (tensors_file(TWICE, bytes(4)), "'a' occurs twice"),
    "entry is no object": (tensors_file({"a": 3}), "dtype, shape and data_offsets"),
    "no dtype": (tensors_file({"a": {"shape": [1], "data_offsets": [0, 4]}}, bytes(4)), "dtype, shape and data_offsets"),
    "no shape": (tensors_file({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, bytes(4)), "dtype, shape and data_offsets"),
    "no offsets": (tensors_file({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)), "dtype, shape and data_offsets"),
    "three offsets": (tensors_file({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, bytes(8)), "data_offsets"),
    "negative dimension": (tensors_file({"a": entry(0, 4, [-1, -1])}, bytes(4)), "integers from 0"),
    "fractional dimension": (tensors_file({"a": entry(0, 4, [1.0])}, bytes(4)), "integers from 0"),
    "dimension true": (tensors_file({"a": entry(0, 4, [True])}, bytes(4)), "integers from 0"),
    "dimension beyond int64": (tensors_file({"a": entry(0, 0, [0, 2**63])}), "integers from 0"),
    "negative offset": (tensors_file({"a": entry(-4, 0, [1])}, bytes(4)), "integers from 0"),
    "offsets reversed": (tensors_file({"a": entry(4, 0, [1])}, bytes(4)), "bytes 4 to 0"),
    "offsets beyond the file": (tensors_file({"a": entry(0, 8)}, bytes(4)), "range within the 4 bytes"),
    "fewer bytes than the shape": (tensors_file({"a": entry(0, 4, [2])}, bytes(4)), "4 bytes for 'a'"),
    "more bytes than the shape": (tensors_file({"a": entry(0, 8, [1])}, bytes(8)), "8 bytes for 'a'"),
    "huge claim": (tensors_file({"a": entry(0, 4, [2**40, 2**40])}, bytes(4)), "4 bytes for 'a'"),
    "overlap": (tensors_file({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)), "'b' overlaps"),
    "two in one place": (tensors_file({"a": entry(0, 4), "b": entry(0, 4)}, bytes(4)), "'b' overlaps"),
    "gap": (tensors_file({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12)), "'b' leaves 4 bytes unused"),
    "gap at the start": (tensors_file({"a": entry(4, 8)}, bytes(8)), "'a' leaves 4 bytes unused"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_refused(kind, tmp_path):
    content, message = DAMAGED[kind]
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_header(tmp_path / "a.safetensors")


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "C64", "U32"])
def test_an_unsupported_dtype_is_refused_by_name(dtype, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(tensors_file({"projector.query": entry(0, 4, dtype=dtype)}, bytes(4)))
    with pytest.raises(UnsupportedError, match=f"dtype '{dtype}' of 'projector.query'"):
        read_header(tmp_path / "a.safetensors")


def test_a_header_above_the_limit_of_the_format_is_refused(tmp_path):
    with open(tmp_path / "a.safetensors", "wb") as file:
        file.write((100_000_001).to_bytes(8, "little"))
        file.truncate(100_000_100)  # sparse, so it takes no space
    with pytest.raises(CheckpointError, match="a header of 100000001 bytes"):
        read_header(tmp_path / "a.safetensors")


@settings(deadline=None)
@given(position=st.integers(0, len(GOOD) - 1), value=st.integers(0, 255), cut=st.integers(0, len(GOOD)))
def test_a_changed_or_truncated_file_is_read_or_refused(tmp_path_factory, position, value, cut):
    file = tmp_path_factory.mktemp("changed") / "a.safetensors"
    content = GOOD[:position] + bytes([value]) + GOOD[position + 1 :]
    file.write_bytes(content[:cut] if cut % 2 else content)
    try:
        entries = read_header(file)
    except GraniteSpeechError:
        return
    assert sum(one.nbytes for one in entries.values()) <= 12


def test_an_undamaged_file_is_read(tmp_path):
    file = tmp_path / "a.safetensors"
    file.write_bytes(GOOD)
    start = len(GOOD) - 12
    assert read_header(file) == {
        "a": TensorEntry(file, torch.float32, (2,), start, 8),
        "b": TensorEntry(file, torch.float32, (), start + 8, 4),
    }


def test_a_missing_file_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "absent.safetensors"):
        with pytest.raises(CheckpointNotFoundError, match="no file"):
            read_header(path)
