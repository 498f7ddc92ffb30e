"""Common recordings: every container and codec, appended files, pictures and subtitles next to the sound.

The expected sound of the committed files was decoded by another program: see audio_files/README.md.
"""

import hashlib
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile

from granite_speech.errors import AudioError
from granite_speech.inputs.audio import AudioWarning, load_audio
from tests.support.made_sounds import best_match, encoded, voice

FILES = Path(__file__).parents[1] / "audio_files"
RECORDINGS = os.environ.get("GRANITE_SPEECH_RECORDINGS", "")
# Samples at 16 kHz in one packet of the codec.
MP3, AAC, VORBIS, OPUS, GSM, WMA, PCM = 576, 1024, 1024, 320, 640, 743, 1

CASES = {
    "vbr_without_xing.mp3": (["vbr_without_xing"], MP3),
    "concatenated.mp3": (["concatenated-1", "concatenated-2"], MP3),
    "chained.ogg": (["chained-1", "chained-2"], VORBIS),
    "mp3_inside.wav": (["mp3_without_trimming"], MP3),
    "leading_zeros.mp3": (["mp3_without_trimming"], MP3),
    "phone.m4a": (["phone"], AAC),
    "opposite_polarity.wav": (["opposite_polarity"], PCM),
    "cover_art.m4a": (["aac_with_extras"], AAC),
    "cover_art.mp3": (["cover_art-mp3"], MP3),
    "subtitles.mkv": (["subtitles-mkv"], PCM),
    "subtitles.mp4": (["aac_with_extras"], AAC),
    "voice.wma": (["voice"], WMA),
    "gsm.wav": (["gsm"], GSM),
}


def assert_holds(sound: np.ndarray, parts: list[np.ndarray], frame: int, least: float = 0.999) -> None:
    """Each part is in its place, to within one codec frame, and there is at most one frame of other sound."""
    place = 0
    for part in parts:
        begin = max(0, place - frame)
        correlation, _ = best_match(sound[begin : place + len(part) + frame], part, frame + place - begin)
        assert correlation > least
        place += len(part)
    assert abs(len(sound) - place) <= frame


@pytest.mark.parametrize("name", CASES)
def test_files_hold_what_another_decoder_finds(name):
    parts, frame = CASES[name]
    expected = [soundfile.read(FILES / "expected" / f"{part}.flac", dtype="float32")[0] for part in parts]
    assert_holds(load_audio(FILES / name).numpy(), expected, frame)
    assert_holds(load_audio(io.BytesIO((FILES / name).read_bytes())).numpy(), expected, frame)


def test_a_header_that_was_never_filled_in():
    expected, _ = soundfile.read(FILES / "expected" / "header_never_filled.flac", dtype="float32")
    with pytest.warns(AudioWarning, match="header was never filled in") as caught:
        sound = load_audio(FILES / "header_never_filled.wav").numpy()
    assert_holds(sound, [expected], PCM)
    assert len(caught) == 1 and caught[0].filename == __file__


def test_video_without_sound():
    with pytest.raises(AudioError, match=r"no audio track \(only video\)"):
        load_audio(FILES / "no_audio.mp4")


# --- containers and codecs -----------------------------------------------------------------------------------------------------------

CODECS = {
    "mp4": ("aac", "libmp3lame", "flac", "alac", "ac3", "libopus"),
    "mov": ("aac", "alac", "pcm_s24le"),
    "3gp": ("aac", "libopencore_amrnb"),
    "matroska": ("aac", "vorbis", "libopus", "flac", "ac3"),
    "webm": ("libopus", "vorbis"),
    "ogg": ("libopus", "vorbis", "flac"),
    "avi": ("libmp3lame", "ac3", "pcm_s16le"),
    "mpegts": ("aac", "libmp3lame", "ac3"),
    "flv": ("aac", "libmp3lame"),
    "asf": ("wmav2", "wmav1", "libmp3lame"),
    "wav": ("libmp3lame", "adpcm_ms", "pcm_alaw"),
    "caf": ("alac", "pcm_s16be", "pcm_mulaw"),
    "adts": ("aac",),
    "ac3": ("ac3",),
    "eac3": ("eac3",),
    "amr": ("libopencore_amrnb",),
    "wv": ("wavpack",),
    "tta": ("tta",),
}
RATES = {"libopencore_amrnb": 8000, "libopus": 48000, "ac3": 48000, "eac3": 48000, "wmav1": 44100, "wmav2": 44100}
# The longest packet, in samples at the codec's rate. Muxers without a place for the encoder's delay leave it in.
PACKETS = {"aac": 1024, "libmp3lame": 1152, "ac3": 1536, "eac3": 1536, "libopus": 960, "vorbis": 1024, "wmav1": 2048, "wmav2": 2048}
PACKETS |= {"flac": 0, "alac": 4096, "adpcm_ms": 1012, "libopencore_amrnb": 160, "wavpack": 0, "tta": 0}
BIT_RATES = {"wmav1": 64000, "wmav2": 64000, "libopencore_amrnb": 12200}
QUALITY = {"libopencore_amrnb": 0.7, "libmp3lame": 0.99}  # AMR keeps the spectrum rather than the waveform


@pytest.mark.parametrize(("container", "codec"), [(container, codec) for container, codecs in CODECS.items() for codec in codecs])
def test_containers_and_codecs(container, codec):
    rate = 44100 if container == "flv" else RATES.get(codec, 16000)
    content = encoded(container, codec, rate=rate, channels=2 if codec == "vorbis" else 1, bit_rate=BIT_RATES.get(codec))
    sound = load_audio(io.BytesIO(content), rate).numpy()
    packet = PACKETS.get(codec, 0)
    assert_holds(sound, [voice(rate)], 2 * packet if container in ("adts", "mpegts", "flv") else packet * 5 // 4, QUALITY.get(codec, 0.995))


@pytest.mark.parametrize("movflags", ["faststart", "frag_keyframe+empty_moov", "default_base_moof+frag_keyframe+empty_moov+dash"])
def test_mp4_as_servers_write_it(tmp_path, movflags):
    sound = load_audio(io.BytesIO(encoded("mp4", "aac", movflags=movflags, path=tmp_path / "sound.mp4"))).numpy()
    assert_holds(sound, [voice()], 2 * AAC)


@pytest.mark.parametrize("channels", [6, 8])
@pytest.mark.parametrize(("container", "codec"), [("mp4", "aac"), ("matroska", "flac"), ("ogg", "libopus"), ("wav", "pcm_s16le")])
def test_surround_sound(container, codec, channels):
    content = encoded(container, codec, rate=48000, channels=channels)
    assert_holds(load_audio(io.BytesIO(content), 48000).numpy(), [voice(48000)], 2 * AAC, 0.99)


def test_more_channels_than_a_layout_has_names_for():
    file = io.BytesIO()
    soundfile.write(file, np.repeat(voice()[:, None], 30, axis=1), 16000, format="WAV", subtype="FLOAT")
    assert_holds(load_audio(file).numpy(), [voice()], PCM)


# --- appended files, and changes within one --------------------------------------------------------------------------------------------

LINKS = {
    "mp3": (("mp3", "libmp3lame", 16000, 1), ("mp3", "libmp3lame", 44100, 2), 3 * MP3),
    "mp3 of one kind": (("mp3", "libmp3lame", 16000, 1), ("mp3", "libmp3lame", 16000, 1), 3 * MP3),
    "aac": (("adts", "aac", 16000, 1), ("adts", "aac", 44100, 2), 2 * AAC),
    "ac3": (("ac3", "ac3", 48000, 1), ("ac3", "ac3", 32000, 2), 768),
    "a transport stream": (("mpegts", "aac", 16000, 1), ("mpegts", "aac", 44100, 2), 2 * AAC),
    "vorbis": (("ogg", "vorbis", 16000, 2), ("ogg", "vorbis", 44100, 2), VORBIS),
    "opus": (("ogg", "libopus", 48000, 1), ("ogg", "libopus", 48000, 2), OPUS),
    "vorbis and opus": (("ogg", "vorbis", 16000, 2), ("ogg", "libopus", 48000, 1), VORBIS),
    "opus and flac": (("ogg", "libopus", 48000, 2), ("ogg", "flac", 22050, 1), OPUS),
    "flac": (("flac", "flac", 16000, 1), ("flac", "flac", 44100, 2), PCM),
    "wav": (("wav", "pcm_s16le", 16000, 1), ("wav", "pcm_s16le", 44100, 2), PCM),
    "aiff": (("aiff", "pcm_s16be", 16000, 1), ("aiff", "pcm_s16be", 44100, 2), PCM),
    "mp4": (("mp4", "aac", 16000, 1), ("mp4", "aac", 44100, 2), AAC),
    "matroska": (("matroska", "libopus", 48000, 1), ("matroska", "flac", 16000, 2), OPUS),
}


@pytest.mark.parametrize("name", LINKS)
@pytest.mark.parametrize("swapped", [False, True])
def test_appended_files_are_all_read(name, swapped):
    *kinds, frame = LINKS[name]
    parts = [encoded(container, codec, rate=rate, channels=channels) for container, codec, rate, channels in kinds]
    if swapped:
        parts.reverse()
    alone = [load_audio(io.BytesIO(part)).numpy() for part in parts]
    sound = load_audio(io.BytesIO(b"".join(parts))).numpy()
    assert_holds(sound, alone, frame, 0.99)
    assert all(best_match(part, voice(), frame)[0] > 0.99 for part in alone)


ID3 = b"ID3\3\0\0\0\0\0\x14TIT2" + (5).to_bytes(4, "big") + b"\0\0\0abcd" + bytes(5)
APE = b"APETAGEX" + (2000).to_bytes(4, "little") + (32).to_bytes(4, "little") + bytes(16)


@pytest.mark.parametrize(
    ("container", "codec", "rate"),
    [("mp3", "libmp3lame", 16000), ("adts", "aac", 16000), ("flac", "flac", 16000), ("ogg", "libopus", 48000), ("wav", "pcm_s16le", 16000)],
)
def test_tags_before_and_after_are_no_damage(recwarn, container, codec, rate):
    content = encoded(container, codec, rate=rate)
    length = len(load_audio(io.BytesIO(content)))
    for tagged in (ID3 + content, content + b"TAG" + bytes(125), content + APE, content + APE + b"TAG" + bytes(125), content + b"\r\n"):
        assert len(load_audio(io.BytesIO(tagged))) == length
    assert not recwarn.list


def test_the_last_of_appended_files_may_be_cut_off():
    """The sound before a damaged file is intact."""
    link = encoded("ogg", "libopus", rate=48000)
    length = len(load_audio(io.BytesIO(link)))
    assert len(load_audio(io.BytesIO(link * 3))) == 3 * length
    with pytest.raises(AudioError, match=r"cut off.*its first \d"):
        load_audio(io.BytesIO(link * 3 + link[: len(link) // 2]))
    with pytest.warns(AudioWarning, match="cut off"):
        assert len(load_audio(io.BytesIO(link * 3 + link[:200]), errors="warn")) >= 3 * length
    wav = encoded("wav", "pcm_s16le")
    with pytest.warns(AudioWarning, match="does not decode"):
        assert len(load_audio(io.BytesIO(wav + wav[:30]), errors="warn")) == len(voice())


def test_bad_packets_among_good_ones_are_skipped():
    for container, codec in (("mp3", "libmp3lame"), ("adts", "aac"), ("mp4", "aac"), ("flac", "flac")):
        content = bytearray(encoded(container, codec, sound=np.tile(voice(), 3)))
        middle = len(content) // 2
        content[middle : middle + 300] = np.random.default_rng(0).bytes(300)
        sound = load_audio(io.BytesIO(bytes(content))).numpy()
        assert len(sound) > 2.7 * len(voice())
        assert best_match(sound[-len(voice()) :], voice(), 2 * AAC)[0] > 0.98, f"{codec}: the sound after the damage"


# --- recordings of real people -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not RECORDINGS, reason="GRANITE_SPEECH_RECORDINGS names no folder with recordings")
@pytest.mark.parametrize("name", json.loads((FILES / "recordings.json").read_text()))
def test_recordings_of_real_people(name):
    expected = json.loads((FILES / "recordings.json").read_text())[name]
    path = Path(RECORDINGS) / name
    assert hashlib.sha256(path.read_bytes()).hexdigest() == expected["sha256"], "another file of that name"
    sound = load_audio(path).numpy()
    assert abs(len(sound) - expected["samples"]) <= MP3
    rms = [np.sqrt(np.mean(np.square(sound[begin : begin + 16000], dtype=np.float64))) for begin in range(0, len(sound), 16000)]
    np.testing.assert_allclose(rms, expected["rms"], rtol=0.02, atol=2e-5)
    whole, rate = soundfile.read(path, dtype="float32", always_2d=True)
    own = load_audio(path, rate).numpy()
    assert_holds(own, [whole.mean(axis=1)], MP3 * 2)
