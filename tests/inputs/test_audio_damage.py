"""The intact part of damaged files, limits on decoding, and headers that claim too much or were never filled in."""

import io
import resource
import struct
import time
import tracemalloc

import numpy as np
import pytest
import soundfile
import torch

from granite_speech.errors import AudioError, InputError
from granite_speech.inputs.audio import AudioWarning, load_audio, read_blocks
from tests.support.made_sounds import encoded, voice
from tests.support.sound_headers import au_header, wav_header

RATE = 16000
KINDS = {
    "wav": ("wav", "pcm_s16le"),
    "aiff": ("aiff", "pcm_s16be"),
    "au": ("au", "pcm_s16be"),
    "w64": ("w64", "pcm_s16le"),
    "caf": ("caf", "pcm_s16le"),
    "flac": ("flac", "flac"),
    "vorbis": ("ogg", "vorbis"),
    "opus": ("ogg", "libopus"),
    "flac in ogg": ("ogg", "flac"),
    "mp3": ("mp3", "libmp3lame"),
    "mp3 in wav": ("wav", "libmp3lame"),
    "aac": ("adts", "aac"),
    "webm": ("webm", "libopus"),
    "mkv": ("matroska", "flac"),
    "avi": ("avi", "libmp3lame"),
    "wma": ("asf", "wmav2"),
    "mp4 in fragments": ("mp4", "aac"),
}


def peak() -> int:
    """The largest memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def made(kind: str) -> bytes:
    container, codec = KINDS[kind]
    rate = {"libopus": 48000, "wmav2": 44100}.get(codec, RATE)
    flags = "frag_keyframe+empty_moov" if container == "mp4" else None
    return encoded(
        container,
        codec,
        np.concatenate([voice(rate)] * 3),
        rate,
        channels=2 if codec == "vorbis" else 1,
        bit_rate=64000 if codec == "wmav2" else None,
        movflags=flags,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_is_an_error_that_says_how_much_is_intact(kind):
    content = made(kind)
    length = len(load_audio(io.BytesIO(content)))
    for size in (len(content) * 2 // 3, len(content) - 10):
        cut = content[:size]
        with pytest.raises(AudioError, match=r"cut off or damaged \(.*\); its first \d\.\d\d s are intact") as caught:
            load_audio(io.BytesIO(cut))
        assert "errors='warn'" in str(caught.value)
        with pytest.warns(AudioWarning, match="cut off") as warned:
            intact = load_audio(io.BytesIO(cut), errors="warn")
        assert len(warned) == 1 and warned[0].filename == __file__
        assert f"its first {len(intact) / RATE:.2f} s are intact" in str(caught.value)
        # An Ogg page may hold a second, an MP4 fragment more; the sound before them is all there.
        assert length * size / len(content) - 2.2 * RATE < len(intact) <= length
        whole = load_audio(io.BytesIO(content))[: len(intact) - 4 * 1152]
        torch.testing.assert_close(intact[: len(whole)], whole, rtol=0, atol=1e-4)


def test_a_damaged_end_in_blocks():
    """The intact blocks come first, then the error."""
    content = made("flac")[:-2000]
    blocks = []
    with pytest.raises(AudioError, match="cut off"):
        blocks.extend(read_blocks(io.BytesIO(content), block_seconds=0.5))
    with pytest.warns(AudioWarning, match="cut off"):
        intact = load_audio(io.BytesIO(content), errors="warn")
    blocks = []
    with pytest.warns(AudioWarning, match="cut off"):
        blocks.extend(read_blocks(io.BytesIO(content), block_seconds=0.5, errors="warn"))
    assert torch.equal(torch.cat(blocks), intact) and all(len(block) == RATE // 2 for block in blocks[:-1])


def test_an_mp3_without_a_xing_header_cannot_reveal_a_cut():
    content = made("mp3")
    begin = content.index(b"Xing") if b"Xing" in content else content.index(b"Info")
    content = content[: begin - 21] + content[content.index(b"\xff\xf3", begin) :]
    assert len(load_audio(io.BytesIO(content[: len(content) // 2]))) > 2 * RATE


def test_an_appended_mp3_that_is_cut():
    one = made("mp3")
    with pytest.raises(AudioError, match="cut off"):
        load_audio(io.BytesIO(one + one[: len(one) // 2]))


def test_a_file_without_an_intact_part_is_an_error():
    for kind in ("wav", "flac", "vorbis", "mp3"):
        with pytest.raises(AudioError):
            load_audio(io.BytesIO(made(kind)[:60]), errors="warn")


# --- headers that were never filled in ---------------------------------------------------------------------------------------------

LENGTHS = {"zeros": (0, 0), "zero samples": (36, 0), "a pipe": (0xFFFFFFFF, 0xFFFFFFFF), "sox to a pipe": (0x7FFFFFFF, 0x7FFFFFDB)}


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_U8", "PCM_24", "FLOAT", "ULAW"])
@pytest.mark.parametrize("kind", ["WAV", "WAVEX"])
def test_a_wav_is_read_to_its_end(recwarn, lengths, subtype, kind):
    file = io.BytesIO()
    soundfile.write(file, np.stack([voice(), voice()], axis=1), RATE, format=kind, subtype=subtype)
    expected = load_audio(io.BytesIO(file.getvalue()))
    content = bytearray(file.getvalue())
    outer, data = LENGTHS[lengths]
    place = content.index(b"data") + 4
    struct.pack_into("<I", content, 4, outer)
    struct.pack_into("<I", content, place, data)
    assert torch.equal(load_audio(io.BytesIO(bytes(content))), expected)
    assert [one.category for one in recwarn] == ([] if data else [AudioWarning])
    del content[-1]  # a recorder that was killed within a sample
    assert len(load_audio(io.BytesIO(bytes(content)), errors="warn")) == len(expected) - 1


@pytest.mark.parametrize("kind", ["RF64", "W64", "AIFF", "AU"])
def test_other_headers_that_were_never_filled_in(kind):
    file = io.BytesIO()
    soundfile.write(file, voice(), RATE, format=kind, subtype="PCM_16")
    content = bytearray(file.getvalue())
    expected = load_audio(io.BytesIO(file.getvalue()))
    for mark, offset, form, value in {
        "RF64": [(b"ds64", 8, "<Q", 0), (b"ds64", 16, "<Q", 0), (b"ds64", 24, "<Q", 0)],
        "W64": [(b"riff", 16, "<Q", 0), (b"data\xf3\xac", 16, "<Q", 24)],
        "AIFF": [(b"FORM", 4, ">I", 0), (b"COMM", 10, ">I", 0), (b"SSND", 4, ">I", 8)],
        "AU": [(b".snd", 8, ">I", 0)],
    }[kind]:
        struct.pack_into(form, content, content.index(mark) + offset, value)
    with pytest.warns(AudioWarning, match="never filled in"):
        sound = load_audio(io.BytesIO(bytes(content)))
    torch.testing.assert_close(sound, expected, rtol=0, atol=1e-4)


def test_a_recording_without_samples_but_with_other_chunks():
    content = wav_header(data=b"") + b"LIST" + struct.pack("<I", 4) + b"INFO"
    content = content[:4] + struct.pack("<I", len(content) - 8) + content[8:]
    with pytest.raises(AudioError, match="no samples"):
        load_audio(io.BytesIO(content))


# --- limits ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["wav", "mp3", "opus"])
def test_errors_name_the_limit_that_was_exceeded(kind):
    content = made(kind)
    samples = len(load_audio(io.BytesIO(content)))
    seconds = samples / RATE
    assert len(load_audio(io.BytesIO(content), max_seconds=seconds + 0.1, max_bytes=4 * samples + 2000)) == samples
    with pytest.raises(AudioError, match=r"exceeds max_seconds=5"):
        load_audio(io.BytesIO(content), max_seconds=5)
    with pytest.raises(AudioError, match=r"exceeds max_bytes=100000"):
        load_audio(io.BytesIO(content), max_bytes=100_000)
    with pytest.raises(AudioError, match=r"exceeds max_seconds=5"):
        list(read_blocks(io.BytesIO(content), max_seconds=5, errors="warn"))


def test_decoding_stops_at_the_limit():
    """An hour of silence in 100 kB."""
    content = encoded("flac", "flac", np.zeros(RATE * 3600, np.float32))
    tracemalloc.start()
    started = time.process_time()
    with pytest.raises(AudioError, match="max_seconds=60"):
        load_audio(io.BytesIO(content), max_seconds=60)
    assert time.process_time() - started < 2
    assert tracemalloc.get_traced_memory()[1] < 32 << 20
    tracemalloc.stop()


@pytest.mark.parametrize(
    "options",
    [{"max_seconds": 0}, {"max_seconds": "9"}, {"max_bytes": -1}, {"max_seconds": float("nan")}, {"errors": "ignore"}, {"max_bytes": True}],
)
def test_invalid_options(options):
    with pytest.raises(InputError):
        load_audio(io.BytesIO(made("wav")), **options)


def test_invalid_options_of_read_blocks():
    for block_seconds in (0, -1, "1", float("nan"), float("inf"), None):
        with pytest.raises(InputError):
            read_blocks(io.BytesIO(made("wav")), block_seconds=block_seconds)
    with pytest.raises(AudioError, match="does not exist"):
        read_blocks("nowhere.wav")


def impossible() -> dict[str, bytes]:
    flac = bytearray(made("flac"))
    (packed,) = struct.unpack(">Q", flac[18:26])
    flac[18:26] = struct.pack(">Q", 655_350 << 44 | 7 << 41 | packed & (1 << 41) - 1)
    description = struct.pack(">d4sIIIII", 16000.0, b"lpcm", 0, 2, 1, 10**6, 16)
    caf = b"caff\0\1\0\0desc" + struct.pack(">q", 32) + description + b"data" + struct.pack(">qI", -1, 0) + bytes(100)
    return {
        "au of 10**6 channels": au_header(channels=10**6),
        "caf of 10**6 channels": caf,
        "wav of 65535 channels": wav_header(channels=65535),
        "flac of 8 channels at 655350 Hz": bytes(flac),
        "wav of 8 channels at 655350 Hz": wav_header(channels=8, rate=655_350),
    }


@pytest.mark.parametrize("name", impossible())
def test_impossible_headers_are_refused_at_once(name):
    content = impossible()[name]
    tracemalloc.start()
    started = time.process_time()
    with pytest.raises(AudioError, match=r"\d+ channels at \d+ Hz"):
        load_audio(io.BytesIO(content))
    assert time.process_time() - started < 0.05
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_metadata_that_claims_four_gigabytes():
    content = bytearray(made("wav"))
    place = content.index(b"LIST") + 4
    struct.pack_into("<I", content, place, 0xFFFFFFFF)
    before = peak()
    with pytest.raises(AudioError, match="does not decode"):
        load_audio(io.BytesIO(bytes(content)))
    assert peak() - before < 64 << 20


# --- blocks --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 48000, 44101])
@pytest.mark.parametrize("seconds", [0.01, 0.37, 1.0, 100.0])
def test_blocks_joined_are_the_whole(rate, seconds):
    from granite_speech.inputs.resampling import resample

    sound = np.concatenate([voice(rate), voice(rate, number=1)])
    file = io.BytesIO()
    soundfile.write(file, sound, rate, format="WAV", subtype="FLOAT")
    blocks = list(read_blocks(file, block_seconds=seconds))
    assert all(len(block) == max(1, round(seconds * RATE)) for block in blocks[:-1])
    expected = resample(torch.from_numpy(sound), rate)
    torch.testing.assert_close(torch.cat(blocks), expected, rtol=0, atol=1e-6)
    assert torch.equal(torch.cat(blocks), load_audio(file))
