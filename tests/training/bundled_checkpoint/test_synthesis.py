"""Synthesis with stand-ins for the synthesizers: voices, held-out voices, and the manifest."""

import json
import stat
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from granite_speech.errors import InputError, MissingDependencyError
from granite_speech.training import read_manifest
from granite_speech.training.augmentation import RATE
from granite_speech.training.bundled_checkpoint import synthesis
from granite_speech.training.bundled_checkpoint.synthesis import Voice

# The interfaces of all three programs in one: speaks a tone as long as the text, and answers the queries of `find_voices`.
# Without Python's packages, and with one period of the tone many times over, because each sentence is a process.
STAND_IN = """#!{python} -IS
import re, sys, wave, math, struct
from pathlib import Path

PERIOD = struct.pack("<32h", *[int(9000 * math.sin(math.pi * n / 16)) for n in range(32)])

def speak(text, file, rate):
    samples = rate * 2 * len(text.split()) // 5
    with wave.open(file, "wb") as out:
        out.setparams((1, 2, rate, 0, "NONE", ""))
        out.writeframes(bytes(2 * rate) + (PERIOD * (samples // 32 + 1))[: 2 * samples] + bytes(2 * rate))

arguments = sys.argv[1:]
if "--version" in arguments:
    print("eSpeak NG text-to-speech: 1.51  Data at: {data}")
elif "-lv" in arguments:
    print("Voices available: awb kal kal16 rms slt")
elif Path(sys.argv[0]).name == "festival" and arguments[1].startswith("("):
    print("{festival}")
elif Path(sys.argv[0]).name == "festival":
    for text, file in re.findall('Text "(.*?)"[)][)] "(.*?)"', Path(arguments[1]).read_text("latin-1")):
        speak(text, file, 32000)
elif "-w" in arguments:
    speak(arguments[-1], arguments[arguments.index("-w") + 1], 22050)
else:
    speak(arguments[arguments.index("-t") + 1], arguments[arguments.index("-o") + 1], 16000)
"""


@pytest.fixture
def synthesizers(tmp_path, monkeypatch):
    programs, variants = tmp_path / "bin", tmp_path / "data/voices/!v"
    programs.mkdir()
    variants.mkdir(parents=True)
    for name in ("m1", "f2", *synthesis.HELD_OUT_VARIANTS):
        (variants / name).touch()
    script = STAND_IN.format(python=sys.executable, data=tmp_path / "data", festival=r"\n".join(synthesis.FESTIVAL_VOICES))
    for name in ("espeak-ng", "flite", "festival"):
        (programs / name).write_text(script)
        (programs / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    return programs


def test_held_out_voices():
    assert len(set(synthesis.HELD_OUT_VARIANTS)) == 6
    assert Voice("espeak-ng", f"en-us+{synthesis.HELD_OUT_VARIANTS[0]}").held_out
    assert Voice("espeak-ng", f"{synthesis.HELD_OUT_ACCENT}+m1").held_out
    assert Voice("espeak-ng", f"de+{synthesis.HELD_OUT_VARIANTS[1]}", "de").held_out
    assert not Voice("espeak-ng", "en-us+m1").held_out
    assert not Voice("flite", "slt").held_out


def test_missing_synthesizers_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingDependencyError, match=r"no espeak-ng, flite, festival; .*apt-get install espeak-ng flite festival"):
        synthesis.find_voices()


def test_festival_reads_each_language_in_its_encoding(synthesizers, monkeypatch):
    scripts = []
    monkeypatch.setattr(synthesis, "_run", lambda command: scripts.append(Path(command[-1]).read_bytes()))
    for name, language in (("czech_dita", "cs"), ("hy_fi_mv_diphone", "fi"), ("hindi_NSK_diphone", "hi")):
        synthesis.speak(Voice("festival", name, language), ["two thirty backward"], np.random.default_rng(0))
    assert "tú".encode("iso-8859-2") in scripts[0] and "bäk".encode("iso-8859-1") in scripts[1] and "टू".encode() in scripts[2]


def test_festival_continues_after_a_crash(synthesizers):
    script = (synthesizers / "festival").read_text()
    crash = "def speak(text, file, rate):\n    if 'hundred' in text: sys.exit(1)"
    (synthesizers / "festival").write_text(script.replace("def speak(text, file, rate):", crash))
    spoken = synthesis.speak(
        Voice("festival", "kal_diphone"), ["one", "hundred", "two", "hundred", "hundred", "six"], np.random.default_rng(0)
    )
    assert [waveform.size > 0 for waveform in spoken] == [True, False, True, False, False, True]


def test_missing_voices_are_named(synthesizers):
    (synthesizers / "flite").write_text("#!/bin/sh\necho Voices available: kal awb kal16 rms\n")
    with pytest.raises(MissingDependencyError, match="no flite's slt;"):
        synthesis.find_voices()


def test_find_voices(synthesizers):
    voices = synthesis.find_voices()
    assert len(set(voices)) == len(voices)
    assert len(voices) == 8 * (len(synthesis.ACCENTS) + len(synthesis.RESPELLING)) + 5 + len(synthesis.FESTIVAL_VOICES)
    drawn = synthesis.draw_voices(600, np.random.default_rng(0), held_out=False)
    assert {voice.engine for voice in drawn} == {"espeak-ng", "flite", "festival"}
    assert not any(voice.held_out for voice in drawn)
    assert all(voice.held_out for voice in synthesis.draw_voices(50, np.random.default_rng(0), held_out=True))


def test_synthesize_is_reproducible(synthesizers, tmp_path):
    first, second = (synthesis.synthesize(tmp_path / name, 12, 3, per_process=2) for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()
    lines = [json.loads(line) for line in first.read_text().splitlines()]
    assert len(lines) == 12
    for line in lines:
        assert set(line) == {"audio", "text", "voice"}
        samples, rate = soundfile.read(first.parent / line["audio"])
        # The second of silence at each end has been cut.
        assert rate == RATE and samples.size == pytest.approx(0.4 * RATE * len(line["text"].split()), abs=0.1 * RATE)
        assert (first.parent / line["audio"]).read_bytes() == (second.parent / line["audio"]).read_bytes()
    other = synthesis.synthesize(tmp_path / "c", 12, 4)
    assert [json.loads(line)["text"] for line in other.read_text().splitlines()] != [line["text"] for line in lines]


def test_the_written_manifest_can_be_read(synthesizers, tmp_path):
    manifest = synthesis.synthesize(tmp_path / "a", 6, 0)
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    utterances = read_manifest(manifest)
    assert [(one.text, one.voice) for one in utterances] == [(line["text"], line["voice"]) for line in lines]
    assert all(one.audio == tmp_path / "a" / line["audio"] for one, line in zip(utterances, lines, strict=True))
    assert all(one.count_samples(RATE) == one.waveform(RATE).numel() > 0 for one in utterances)


def test_synthesize_held_out_voices_and_given_sentences(synthesizers, tmp_path):
    manifest = synthesis.synthesize(tmp_path / "a", 6, 0, held_out=True, sentences=["stop", "go left"])
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    assert [line["text"] for line in lines] == ["stop", "go left"] * 3
    for line in lines:
        engine, _, name = line["voice"].partition(":")
        assert Voice(engine, name).held_out


def test_no_speech_at_all_is_an_error(synthesizers, tmp_path):
    for name in ("flite", "festival", "espeak-ng"):
        script = (synthesizers / name).read_text()
        (synthesizers / name).write_text(script.replace("def speak(text, file, rate):", "def speak(text, file, rate):\n    return\n"))
    with pytest.raises(InputError, match="no clip of 3"):
        synthesis.synthesize(tmp_path / "a", 3, 0)


def test_trim_silence():
    tone = (0.1 * np.sin(0.35 * np.arange(12800))).astype(np.float32)
    waveform = np.pad(tone, (8000, 4000))
    trimmed = synthesis.trim_silence(waveform)
    assert trimmed.size == pytest.approx(tone.size + 0.04 * RATE, abs=0.03 * RATE)
    hiss = 0.002 * np.random.default_rng(0).standard_normal(waveform.size).astype(np.float32)
    assert synthesis.trim_silence(waveform + hiss).size == pytest.approx(trimmed.size, abs=0.05 * RATE)
    assert synthesis.trim_silence(np.zeros(8000, np.float32)).size == 0
    assert synthesis.trim_silence(np.zeros(0, np.float32)).size == 0


@pytest.mark.parametrize("sentence", ["stop the music", "", '") (quit', "-o stop"])
def test_words_outside_the_vocabulary_are_refused(sentence: str, tmp_path):
    with pytest.raises(InputError, match="expected words of VOCABULARY"):
        synthesis.synthesize(tmp_path / "new", 1, 0, sentences=["stop", sentence])
    assert not (tmp_path / "new").exists()
