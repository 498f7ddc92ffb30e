"""Manifests: their contents, and errors that name the file and line before training starts."""

import json
import wave
from pathlib import Path

import pytest

from granite_speech.errors import AudioError, InputError
from granite_speech.training import finetune, read_manifest
from tests.support.tiny_speech import write_sound

PHONE = Path(__file__).parents[1] / "audio_files" / "phone.m4a"


@pytest.fixture
def folder(tmp_path):
    write_sound(tmp_path / "one.wav", "one")
    (tmp_path / "noise.wav").write_text("this is no sound")
    (tmp_path / "sub").mkdir()
    return tmp_path


def write(folder, *lines, name="m.jsonl"):
    (folder / name).write_bytes(b"\n".join(one if isinstance(one, bytes) else json.dumps(one).encode() for one in lines))
    return folder / name


GOOD = {"audio": "one.wav", "text": "one"}


def test_reading_a_manifest(folder):
    elsewhere = write_sound(folder / "sub" / "two.wav", "two")
    lines = (
        b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r",
        b"",
        {"audio": str(elsewhere), "text": " zwei é ", "prompt": "in German?"},
        b"  ",
    )
    first, second = read_manifest(write(folder, *lines))
    assert (first.audio, first.text, first.prompt, first.line) == (folder / "one.wav", "one", None, 1)
    assert (second.audio, second.text, second.prompt, second.line) == (elsewhere, "zwei é", "in German?", 3)
    (text,) = read_manifest(write(folder, {"prompt": "one?", "text": "1"}), audio=False)
    assert (text.audio, text.prompt, text.text) == (None, "one?", "1")


def test_a_line_may_name_the_speaker(folder):
    named, unnamed = read_manifest(write(folder, GOOD | {"voice": "anna"}, GOOD))
    assert (named.voice, unnamed.voice) == ("anna", None)
    assert (named.text, named.prompt, named.audio) == (unnamed.text, unnamed.prompt, unnamed.audio)


BAD = {
    "not JSON": (b'{"audio": "one.wav"', "does not parse"),
    "not UTF-8": (b'{"audio": "one.wav", "text": "\xff"}', "does not parse"),
    "deep": (b"[" * 100_000, "does not parse"),
    "a list": ([1], "a list"),
    "no text": ({"audio": "one.wav"}, "no text"),
    "no audio": ({"text": "one"}, "no audio"),
    "empty": ({}, "no audio and no text"),
    "blank text": (GOOD | {"text": "  "}, "text = '  '"),
    "text of another type": (GOOD | {"text": 5}, "text = 5"),
    "null text": (GOOD | {"text": None}, "no text"),
    "voice of another type": (GOOD | {"voice": 5}, "voice = 5"),
    "blank voice": (GOOD | {"voice": " "}, "voice = ' '"),
    "an unpaired surrogate": (GOOD | {"text": "\ud800"}, "an unpaired surrogate"),
    "NUL": (GOOD | {"audio": "one.wav\0"}, "contains a NUL character"),
    "a misspelled key": (GOOD | {"promt": "?"}, "the key 'promt', and no 'prompt'"),
    "a misspelled key in capitals": (GOOD | {"Voice": "anna"}, "the key 'Voice', and no 'voice'"),
    "a misspelled needed key": ({"audio": "one.wav", "transcripton": "one"}, "the key 'transcripton', and no 'transcription'"),
    "two texts": (GOOD | {"sentence": "two"}, "text = 'one' and sentence = 'two'"),
    "two files": (GOOD | {"audio_filepath": "two.wav"}, "audio = 'one.wav' and audio_filepath = 'two.wav'"),
    "a part of a recording": (GOOD | {"offset": 2.5, "duration": 1.0}, "offset = 2.5"),
    "samples in place of a file": (GOOD | {"audio": {"array": [0.0]}}, "audio = {'array'"),
    "no such file": (GOOD | {"audio": "two.wav"}, "two.wav', which does not exist"),
    "a folder": (GOOD | {"audio": "sub"}, "which is a folder"),
}


@pytest.mark.parametrize("line, message", BAD.values(), ids=BAD)
def test_an_invalid_line_is_reported_before_the_model_is_loaded(folder, line, message):
    manifest = write(folder, GOOD, b"", GOOD, line, GOOD)
    with pytest.raises(InputError) as caught:
        finetune(manifest, folder / "no model", folder / "out", progress=False)
    assert f"{manifest}, line 4: " in caught.value.got and message in caught.value.got
    assert caught.value.expected and caught.value.remedy
    assert not (folder / "out").exists()


def test_texts_have_a_prompt_and_no_audio(folder):
    with pytest.raises(InputError, match="the key 'audio' in a manifest of texts"):
        read_manifest(write(folder, GOOD | {"prompt": "?"}), audio=False)
    with pytest.raises(InputError, match="the key 'voice' in a manifest of texts"):
        read_manifest(write(folder, {"prompt": "?", "text": "one", "voice": "anna"}), audio=False)
    with pytest.raises(InputError, match="no prompt"):
        read_manifest(write(folder, {"text": "one"}), audio=False)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "line",
    [
        {"audio_filepath": "one.wav", "duration": 0.25, "text": "one"},  # NeMo
        {"audio_filepath": "one.wav", "duration": None, "offset": 0.0, "text": "one"},
        {"path": "one.wav", "sentence": "one"},  # Common Voice
        {"file_name": "one.wav", "transcription": "one"},  # a folder of the package datasets
        {"audio": {"path": "one.wav", "bytes": None}, "transcript": "one"},  # its audio column
        {"audio": {"path": "one.wav"}, "path": "one.wav", "text": "one", "sentence": "one"},
        {"file": "one.wav", "text": " one ", "prompt": None, "voice": None},
        {"audio_path": "one.wav", "text": "one", "sentence": None},
    ],
    ids=lambda line: " ".join(line),
)
def test_names_of_common_data_sets_are_understood(folder, line):
    (one,) = read_manifest(write(folder, line))
    assert (one.audio, one.text, one.prompt, one.voice) == (folder / "one.wav", "one", None, None)


def test_other_keys_are_ignored_with_one_warning(folder):
    lines = [GOOD | {"lang": "en", "id": number, "up_votes": 2, "choice": "a"} for number in range(3)]
    with pytest.warns(UserWarning) as caught:
        found = read_manifest(write(folder, *lines, GOOD | {"accent": ""}))
    assert len(found) == 4 and len(caught) == 1
    message = str(caught[0].message)
    assert "m.jsonl: the keys accent, choice, id, lang, up_votes are ignored; used are audio, text, prompt and voice" in message
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="the keys lang are ignored; used are prompt and text"):
        read_manifest(write(folder, {"prompt": "?", "text": "one", "lang": "en"}), audio=False)


def test_missing_and_empty_manifests_are_refused(folder):
    for path, message in ((folder / "absent.jsonl", "absent.jsonl"), (folder, "cannot be read"), (write(folder, b"\n"), "has no lines")):
        with pytest.raises(InputError, match=message):
            read_manifest(path)


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 44100])
def test_lengths_from_headers_equal_the_number_of_samples(tmp_path, rate):
    for samples in (1, 999, 4321):
        with wave.open(str(tmp_path / "a.wav"), "wb") as file:
            file.setparams((2, 2, rate, 0, "NONE", ""))
            file.writeframes(b"\1\0" * 2 * samples)
        (one,) = read_manifest(write(tmp_path, {"audio": "a.wav", "text": "a"}))
        assert one.count_samples(16000) == len(one.waveform(16000))


def test_an_unknown_length_in_a_header_is_ignored(tmp_path):
    """Programs that pipe a WAV write such headers."""
    file = write_sound(tmp_path / "one.wav", "one")
    data = bytearray(file.read_bytes())
    data[4:8] = data[40:44] = b"\xff\xff\xff\xff"
    file.write_bytes(data)
    (one,) = read_manifest(write(tmp_path, GOOD))
    assert one.count_samples(16000) == len(one.waveform(16000)) == 4000


def test_a_manifest_of_m4a_recordings_is_read_and_measured(tmp_path):
    (tmp_path / "phone.m4a").write_bytes(PHONE.read_bytes())
    (tmp_path / "cut.m4a").write_bytes(PHONE.read_bytes()[:-1000])
    whole, cut = read_manifest(write(tmp_path, {"audio": "phone.m4a", "text": "a"}, {"audio": "cut.m4a", "text": "a"}))
    for rate in (8000, 16000):
        assert whole.count_samples(rate) == len(whole.waveform(rate)) > rate
    with pytest.raises(AudioError, match=r"m\.jsonl, line 2: .*cut\.m4a"):
        cut.count_samples(16000)


def test_sound_that_does_not_decode_names_its_line(folder):
    manifest = write(folder, GOOD, GOOD | {"audio": "noise.wav"})
    utterance = read_manifest(manifest)[1]
    for call in (utterance.count_samples, utterance.waveform):
        with pytest.raises(AudioError) as caught:
            call(16000)
        assert f"{manifest}, line 2: " in caught.value.got and "noise.wav" in caught.value.got
