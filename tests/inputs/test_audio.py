"""Sound files: the formats that load, and the errors for damaged ones."""

import io
import os
import shutil
import struct
import sys
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from granite_speech.errors import AudioError, MissingDependencyError
from granite_speech.inputs import audio
from granite_speech.inputs.audio import estimate_seconds, load_audio, measure_seconds, read_blocks, resample
from tests.support.paths import ROOT

SAMPLES = 24000


def wave(rate: int = 16000, samples: int = SAMPLES, hertz: float = 300.0) -> np.ndarray:
    return (0.4 * np.sin(2 * np.pi * hertz * np.arange(samples) / rate)).astype(np.float32)


def written(sound: np.ndarray, rate: int = 16000, kind: str = "WAV", subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, sound, rate, format=kind, subtype=subtype)
    return file.getvalue()


def patched(content: bytes, offset: int, form: str, *values: int) -> bytes:
    changed = bytearray(content)
    struct.pack_into(form, changed, offset, *values)
    return bytes(changed)


WAV = written(wave())
FLAC = written(wave(), kind="FLAC")
DATA_LENGTH = WAV.find(b"data") + 4


@pytest.mark.parametrize(
    ("kind", "subtype", "error"),
    [
        ("WAV", "PCM_16", 1e-4),
        ("WAV", "PCM_U8", 1e-2),
        ("WAV", "PCM_24", 1e-6),
        ("WAV", "FLOAT", 0),
        ("WAV", "DOUBLE", 0),
        ("WAV", "ULAW", 2e-2),
        ("WAVEX", "PCM_16", 1e-4),
        ("RF64", "PCM_16", 1e-4),
        ("W64", "PCM_16", 1e-4),
        ("AIFF", "PCM_16", 1e-4),
        ("AU", "PCM_16", 1e-4),
        ("CAF", "PCM_16", 1e-4),
        ("FLAC", "PCM_16", 1e-4),
        ("OGG", "VORBIS", 5e-2),
        ("OGG", "OPUS", 5e-2),
        ("MP3", None, 5e-2),
    ],
)
def test_formats(tmp_path, kind, subtype, error):
    path = tmp_path / f"sound.{kind.lower()}"
    path.write_bytes(written(wave(), kind=kind, subtype=subtype))
    sound = load_audio(path)
    assert sound.dtype == torch.float32 and sound.shape == (SAMPLES,) and sound.is_contiguous()
    middle = slice(1000, -1000)
    assert np.abs(sound.numpy() - wave())[middle].max() <= error
    assert torch.equal(load_audio(str(path)), sound) and torch.equal(load_audio(io.BytesIO(path.read_bytes())), sound)


def test_channels_are_averaged():
    left, right = wave(hertz=300), wave(hertz=500)
    sound = load_audio(io.BytesIO(written(np.stack([left, right], axis=1), subtype="FLOAT")))
    torch.testing.assert_close(sound, torch.from_numpy((left + right) / 2))
    many = load_audio(io.BytesIO(written(np.repeat(left[:, None], 13, axis=1), subtype="FLOAT")))
    torch.testing.assert_close(many, torch.from_numpy(left))


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 24000, 32000, 44100, 48000, 96000, 44101, 16001, 767999])
def test_rates(rate):
    sound = load_audio(io.BytesIO(written(wave(rate, rate), rate, subtype="FLOAT")))
    assert abs(sound.numel() - 16000) <= 8
    spectrum = torch.fft.rfft(sound[1000:15000] * torch.hann_window(14000)).abs()
    assert abs(int(spectrum.argmax()) * 16000 / 14000 - 300) < 2
    assert abs(float(sound[2000:14000].abs().max()) - 0.4) < 0.01


def test_other_sampling_rates():
    assert load_audio(io.BytesIO(WAV), sampling_rate=8000).shape == (SAMPLES // 2,)
    assert resample(torch.zeros(2, 100), 16000, 16000).shape == (2, 100)
    for rate in (0, 1, -5, 2**31):
        with pytest.raises(AudioError, match="1000 to 768000 Hz"):
            resample(torch.zeros(100), rate)


@pytest.mark.parametrize("failure", [ImportError, OSError, RuntimeError])
def test_torchaudio_is_only_needed_to_resample(monkeypatch, failure):
    class Broken:
        def find_spec(self, name, *_):
            if name.partition(".")[0] == "torchaudio":
                raise failure("libcudart.so.13: cannot open shared object file")

    for name in [name for name in sys.modules if name.partition(".")[0] == "torchaudio"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    assert load_audio(io.BytesIO(WAV)).shape == (SAMPLES,)
    with pytest.raises(MissingDependencyError, match="torchaudio"):
        load_audio(io.BytesIO(written(wave(8000), 8000)))


def test_missing_pyav_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingDependencyError, match="pip install av"):
        load_audio(io.BytesIO(WAV))


def test_standard_input_and_pipes(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(WAV)))
    assert load_audio("-").shape == (SAMPLES,)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    with pytest.raises(AudioError, match="standard input"):
        load_audio("-")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(WAV))
    writer.start()
    assert load_audio(pipe).shape == (SAMPLES,)
    writer.join()


def test_a_pipe_without_a_buffer_is_read_to_its_end():
    class Pipe(io.RawIOBase):
        def __init__(self):
            self.content = io.BytesIO(WAV)

        def readable(self):
            return True

        def readinto(self, buffer):
            return self.content.readinto(memoryview(buffer)[:1000])

    torch.testing.assert_close(load_audio(Pipe()), load_audio(io.BytesIO(WAV)))
    with pytest.raises(AudioError, match="more than 2000 bytes"):
        load_audio(Pipe(), max_bytes=2000)


@pytest.mark.parametrize("length", [0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF000])
def test_a_wav_written_to_a_pipe_has_no_length(length):
    assert load_audio(io.BytesIO(patched(WAV, DATA_LENGTH, "<I", length))).shape == (SAMPLES,)


def test_a_flac_written_to_a_pipe_has_no_length():
    content = patched(patched(FLAC, 22, ">I", 0), 21, "B", FLAC[21] & 0xF0)
    torch.testing.assert_close(load_audio(io.BytesIO(content)), load_audio(io.BytesIO(FLAC)))


def test_a_wrong_outer_length_is_harmless():
    assert load_audio(io.BytesIO(patched(WAV, 4, "<I", len(WAV) + 100))).shape == (SAMPLES,)


def damaged() -> dict[str, tuple[bytes, str]]:
    kinds = {
        kind: written(wave(samples=48000), kind=kind) for kind in ("WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF", "FLAC", "OGG", "MP3")
    }
    cut = {f"half of {kind}": (content[: len(content) // 2], "cut off|does not decode") for kind, content in kinds.items()}
    return {
        **cut,
        "nothing": (b"", "does not decode"),
        "text": (b"hello world, this is no sound\n" * 40, "does not decode"),
        "noise": (np.random.default_rng(0).bytes(5000), "does not decode"),
        "a header alone": (WAV[:44], "cut off"),
        "no samples": (written(np.zeros(0, np.float32)), "no samples"),
        "a FLAC of a thousand hours": (patched(FLAC, 21, "B", FLAC[21] | 0x0F), "cut off"),
        "a WAV of a gigabyte": (patched(WAV, DATA_LENGTH, "<I", 1 << 30), "cut off"),
        "65535 channels": (patched(WAV, 22, "<H", 65535), "does not decode"),
        "no channels": (patched(WAV, 22, "<H", 0), "does not decode"),
        "a rate of 0": (patched(WAV, 24, "<I", 0), "does not decode|sampling rate"),
        "a rate of 1": (patched(WAV, 24, "<I", 1), "sampling rate of 1 Hz"),
        "a rate of 2 GHz": (patched(WAV, 24, "<I", 2**31 - 1), "sampling rate of 2147483647 Hz"),
        "NaN": (written(np.array([0, np.nan, 0], np.float32), subtype="FLOAT"), "NaN"),
        "infinity": (written(np.array([0, np.inf, 0], np.float32), subtype="FLOAT"), "NaN or infinite"),
    }


@pytest.mark.parametrize(("name", "content", "words"), [(name, *what) for name, what in damaged().items()], ids=list(damaged()))
def test_errors_for_damaged_files(tmp_path, name, content, words):
    path = tmp_path / "sound"
    path.write_bytes(content)
    tracemalloc.start()
    for source in (path, io.BytesIO(content)):
        with pytest.raises(AudioError, match=words) as raised:
            load_audio(source)
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()
    assert "0x" not in str(raised.value)


def test_errors_for_sources_that_are_not_sound_files(tmp_path):
    with pytest.raises(AudioError, match="does not exist"):
        load_audio(tmp_path / "none.wav")
    with pytest.raises(AudioError, match="is a folder"):
        load_audio(tmp_path)
    misnamed = tmp_path / "headerless.raw"
    misnamed.write_bytes(WAV)
    assert load_audio(misnamed).shape == (SAMPLES,), "the content decides the format, not the name"
    for source in (None, 3, b"bytes"):
        with pytest.raises(AudioError, match="open binary file"):
            load_audio(source)
    with pytest.raises(AudioError, match="opened as text"):
        load_audio(io.StringIO("text"))


@pytest.mark.parametrize(
    "address",
    [
        "https://example.com/a.wav",
        "HTTP://x",
        "s3://bucket/a.mp3",
        "file:///recordings/a.wav",
        "data:audio/wav;base64,UklGRg==",
        "hf://datasets/x/a.flac",
    ],
)
def test_an_address_is_not_a_file(address):
    for file in (address, Path(address)):
        with pytest.raises(AudioError, match=r"the URL .*expected a local file\. Download it first"):
            load_audio(file)


def test_file_names_in_other_encodings(tmp_path):
    """Python replaces the bytes of names that are not UTF-8 by surrogates."""
    folder = os.fsencode(tmp_path)
    name = os.path.join(folder, b"caf\xe9.wav")
    with open(name, "wb") as file:
        file.write(WAV)
    assert load_audio(os.fsdecode(name)).shape == (SAMPLES,)
    (listed,) = os.listdir(tmp_path)
    assert load_audio(tmp_path / listed).shape == (SAMPLES,)
    for missing in (os.path.join(folder, b"th\xe9.wav"), b"\xff"):
        with pytest.raises(AudioError, match=r"not valid UTF-8.*os\.listdir") as raised:
            load_audio(os.fsdecode(missing))
        str(raised.value).encode()  # can be printed anywhere
    assert load_audio(shutil.copy(os.fsdecode(name), tmp_path / "café 声.wav")).shape == (SAMPLES,)


def test_an_empty_file_is_called_empty(tmp_path):
    (tmp_path / "a.mp3").touch()
    for file in (tmp_path / "a.mp3", io.BytesIO()):
        with pytest.raises(AudioError, match=r"empty \(0 bytes\)"):
            load_audio(file)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_read_permission(tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(WAV)
    path.chmod(0)
    with pytest.raises(AudioError, match="cannot be read"):
        load_audio(path)


def test_an_endless_pipe_is_read_up_to_the_limit():
    with pytest.raises(AudioError, match="more than 1000000 bytes"):
        load_audio("/dev/zero", max_bytes=10**6)


def test_an_open_file_is_read_from_its_beginning_and_left_open(tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(WAV)
    with open(path, "rb") as file:
        file.seek(100)
        assert load_audio(file).shape == (SAMPLES,)
        assert not file.closed
        assert len(list(read_blocks(file, block_seconds=1))) == 2 and not file.closed
    with open(path, "rb", buffering=0) as file:
        assert load_audio(file).shape == (SAMPLES,)


# --- lengths -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "subtype"),
    [(kind, subtype) for kind in ("WAV", "WAVEX", "RF64") for subtype in ("PCM_U8", "PCM_16", "PCM_24", "FLOAT")] + [("FLAC", "PCM_16")],
)
def test_pcm_wav_and_flac_are_measured_from_the_header(monkeypatch, kind, subtype):
    content = written(np.repeat(wave(samples=12345)[:, None], 2, axis=1), 44100, kind, subtype)
    monkeypatch.setattr(audio, "decode", lambda *_: pytest.fail("the file was decoded"))
    assert measure_seconds(io.BytesIO(content)) == 12345 / 44100


@pytest.mark.parametrize("content", [WAV, FLAC, written(wave(), kind="OGG")], ids=["wav", "flac", "ogg"])
def test_appended_files_are_measured_together(content):
    assert measure_seconds(io.BytesIO(content * 2)) == 3.0


@pytest.mark.parametrize("kind", ["AIFF", "AU", "CAF", "W64", "OGG", "MP3"])
def test_other_formats_are_measured_by_decoding(kind):
    content = written(wave(22050, 30000), 22050, kind)
    assert measure_seconds(io.BytesIO(content)) == len(load_audio(io.BytesIO(content), 22050)) / 22050


def test_headers_without_a_true_length_are_measured_by_decoding():
    far_too_long = patched(patched(FLAC, 21, "B", FLAC[21] | 0x0F), 22, ">I", 0xFFFFFFFF)
    with pytest.raises(AudioError, match="cut off"):
        measure_seconds(io.BytesIO(far_too_long))
    for length in (0xFFFFFFFF, 0x7FFFF000):
        assert measure_seconds(io.BytesIO(patched(WAV, DATA_LENGTH, "<I", length))) == 1.5
    with pytest.warns(audio.AudioWarning, match="never filled in") as warned:
        assert measure_seconds(io.BytesIO(patched(patched(WAV, DATA_LENGTH, "<I", 0), 4, "<I", 0))) == 1.5
    assert warned[0].filename == __file__
    assert measure_seconds(io.BytesIO(patched(FLAC, 21, ">BI", FLAC[21] & 0xF0, 0))) == 1.5


@pytest.mark.parametrize(
    ("content", "words"),
    [(WAV[:-100], "cut off"), (written(wave(), kind="OGG")[:-500], "cut off"), (b"words" * 99, "does not decode"), (b"", "empty")],
)
def test_a_file_that_cannot_be_read_is_not_measured(content, words):
    with pytest.raises(AudioError, match=words):
        measure_seconds(io.BytesIO(content))


def test_the_measured_file_is_left_open_only_if_it_was_open(tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(WAV)
    with open(path, "rb") as file:
        assert measure_seconds(file) == measure_seconds(path) == 1.5 and not file.closed


@pytest.mark.parametrize("name", ["opposite_polarity.wav", "phone.m4a", "voice.wma", "leading_zeros.mp3", "gsm.wav"])
def test_lengths_are_estimated_without_decoding(monkeypatch, name):
    path = ROOT / "tests/audio_files" / name
    length = len(load_audio(path, errors="warn")) / 16000
    monkeypatch.setattr(audio, "decode", lambda *_: pytest.fail("the file was decoded"))
    assert estimate_seconds(path) == pytest.approx(length, abs=0.1)


def test_what_does_not_say_how_long_it_is_has_no_estimate(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer, or take what it wrote
    far_too_long = patched(patched(FLAC, 21, "B", FLAC[21] | 0x0F), 22, ">I", 0xFFFFFFFF)
    for name, content in (("text.wav", b"this is no sound"), ("empty.wav", b""), ("long.flac", far_too_long)):
        (tmp_path / name).write_bytes(content)
    for name in ("pipe", "text.wav", "empty.wav", "long.flac", "absent.wav", "."):
        assert estimate_seconds(tmp_path / name) is None, name
    assert estimate_seconds("-") is None


# --- damage at random --------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(source=st.sampled_from([WAV, FLAC]), cuts=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=6))
def test_damaged_headers_give_sound_or_an_audio_error(source, cuts):
    content = bytearray(source)
    for offset, value in cuts:
        content[offset] = value
    try:
        sound = load_audio(io.BytesIO(bytes(content)))
    except AudioError:
        return
    assert sound.ndim == 1 and sound.numel() and bool(sound.isfinite().all())
