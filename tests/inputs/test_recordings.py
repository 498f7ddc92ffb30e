"""What people pass for one recording, as blocks of samples."""

import base64
import io
import sys
import wave
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from granite_speech.errors import AudioError, InputError
from granite_speech.inputs.audio import load_audio, resample
from granite_speech.inputs.recordings import recording_blocks
from tests.support.made_sounds import encoded, voice

RATE = 16000


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Seventy seconds, so that there are three blocks."""
    path = tmp_path_factory.mktemp("recordings") / "long.wav"
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
        file.writeframes((np.tile(voice(), 35) * 32767).astype("<i2").tobytes())
    return path


def read(recording, *options) -> tuple[torch.Tensor, str | None]:
    blocks, warning = recording_blocks(recording, RATE, *options)
    blocks = list(blocks)
    assert all(block.ndim == 1 and block.dtype == torch.float32 and block.device.type == "cpu" for block in blocks)
    return torch.cat(blocks), warning()


def test_files_come_in_blocks(path):
    expected = load_audio(path)
    blocks, warning = recording_blocks(path, RATE)
    assert [len(block) for block in blocks] == [2 * RATE] * 35 and warning() is None
    content = path.read_bytes()
    entry = {"bytes": None, "path": str(path), "array": None}
    forms = (path, str(path), content, bytearray(content), memoryview(content), io.BytesIO(content), entry)
    address = "data:audio/wav;base64," + base64.b64encode(content).decode()
    for recording in (*forms, address, {"bytes": content, "path": "another name.wav"}, [path], (content,)):
        samples, warning = read(recording, 8000)  # a file says its own rate
        assert torch.equal(samples, expected) and warning is None
    with open(path, "rb") as file:
        assert torch.equal(read(file)[0], expected) and not file.closed


def test_standard_input(path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(path.read_bytes())))
    assert torch.equal(read("-")[0], load_audio(path))


def test_files_are_not_read_ahead(path):
    with open(path, "rb", buffering=0) as file:
        blocks, _ = recording_blocks(file, RATE)
        next(blocks)
        assert file.tell() < 40 * RATE * 2


def test_samples_are_one_block():
    sound = voice().astype(np.float32)
    expected = torch.from_numpy(sound)
    stereo = np.stack([sound, 0.5 * sound])
    decoder = SimpleNamespace(get_all_samples=lambda: SimpleNamespace(data=expected[None], sample_rate=RATE))
    reversed_twice = np.ascontiguousarray(sound[::-1])[::-1]
    for recording in (sound, expected, expected.clone().requires_grad_(), sound[None], sound[:, None], sound.tolist(), reversed_twice):
        blocks, warning = recording_blocks(recording, RATE)
        (block,) = blocks
        assert torch.equal(block, expected) and not block.requires_grad and warning() is None
    for recording in ([sound], tuple(sound.tolist()), [sound.tolist()], decoder, {"array": sound.tolist(), "sampling_rate": RATE}):
        assert torch.equal(read(recording)[0], expected)
    integers = (sound * 32768).astype(np.int16)
    assert torch.equal(read(integers)[0], torch.from_numpy(integers).float() / 32768)
    torch.testing.assert_close(read(stereo)[0], 0.75 * expected)
    torch.testing.assert_close(read(torch.from_numpy(stereo.T))[0], 0.75 * expected)
    torch.testing.assert_close(read(expected.double())[0], expected)


def test_samples_are_resampled():
    sound = torch.from_numpy(voice(44100).astype(np.float32))
    expected = resample(sound, 44100, RATE)
    assert torch.equal(read(sound, 44100)[0], expected)
    assert torch.equal(read({"array": sound.numpy(), "sampling_rate": 44100.0}, 8000)[0], expected)
    assert torch.equal(read(sound.tolist(), 44100)[0], expected)


class Broken:
    """A decoder of a damaged file."""

    def get_all_samples(self):
        raise RuntimeError("no packets")


SOUND = np.zeros(RATE, dtype=np.float32)
REFUSED = {
    "none": (None, InputError, "NoneType"),
    "a number": (3.5, InputError, "float"),
    "a dictionary of something else": ({"text": "a"}, InputError, "text"),
    "a network address": ("https://example.org/a.wav", InputError, "network address"),
    "no file": ("no such file.wav", AudioError, "does not exist"),
    "no sound": (b"abc", AudioError, "does not decode"),
    "an empty file": (b"", AudioError, "empty"),
    "no base64": ("data:audio/wav,abc", AudioError, "base64"),
    "an empty list": ([], AudioError, "a list of 0 recordings"),
    "two recordings": ([SOUND, SOUND], AudioError, "a list of 2 recordings"),
    "two files": (["a.wav", "b.wav"], AudioError, "a list of 2 recordings"),
    "text among numbers": ([0.1, "a"], AudioError, "samples of type"),
    "lists among numbers": ([0.1, [0.2]], AudioError, "more than numbers"),
    "integers": ([0, 20000, -20000], AudioError, "int64"),
    "nine channels": (np.zeros((9, RATE), np.float32), AudioError, r"samples of shape \(9, 16000\)"),
    "three dimensions": (np.zeros((1, 1, RATE), np.float32), AudioError, r"samples of shape \(1, 1, 16000\)"),
    "one number": (np.array(1, np.float32), AudioError, r"samples of shape \(\)"),
    "no samples": (SOUND[:0], AudioError, "no samples"),
    "NaN": (SOUND + np.nan, AudioError, "NaN"),
    "NaN in a list": ([0.1, float("nan")], AudioError, "NaN"),
    "huge samples": (SOUND + 1e20, AudioError, "size"),
    "complex samples": (SOUND + 1j, AudioError, "complex"),
    "a decoder that fails": (Broken(), AudioError, r"a Broken that failed \(no packets\)"),
    "no rate": ({"array": SOUND, "sampling_rate": "high"}, AudioError, "sampling rate"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_a_recording(name):
    recording, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        read(recording)


def test_a_missing_file_is_refused_at_once():
    with pytest.raises(AudioError, match="does not exist"):
        recording_blocks("no such file.wav", RATE)
    with pytest.raises(InputError, match="errors="):
        recording_blocks(b"RIFF", RATE, None, "ignore")


@pytest.mark.filterwarnings("error")
def test_damaged_files():
    content = encoded("flac", "flac", np.concatenate([voice()] * 20))[:-20000]
    blocks, warning = recording_blocks(content, RATE)
    intact = []
    with pytest.raises(AudioError, match="cut off"):
        intact.extend(blocks)
    assert len(intact) > 15 and len(intact[0]) == 2 * RATE and warning() is None
    samples, warning = read(content, None, "warn")
    assert torch.equal(samples, torch.cat(intact)) and "cut off" in warning
    samples, warning = read(Path(__file__).parents[1] / "audio_files" / "header_never_filled.wav")
    assert len(samples) and "header was never filled in" in warning
