"""Output files: names that do not collide, whole files or none, and runs that can be killed and resumed."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from granite_speech.errors import AudioError, InputError, OutputError
from granite_speech.transcription import output_files
from granite_speech.transcription.output_files import OutputFiles
from granite_speech.transcription.output_names import partial_name
from granite_speech.transcription.subtitles import SubtitleOptions
from granite_speech.transcription.transcript import Segment, Transcript, TranscriptNote
from granite_speech.transcription.writers import FORMATS, write_text
from tests.support.paths import ROOT

WHOLE = Transcript("open menu", segments=[Segment(0, 0.0, 1.5, "open menu")], duration=1.5)
ERROR = AudioError(got="a file that is cut off", expected="a whole file", remedy="Copy it again")
OLD = Transcript("old", segments=[Segment(0, 0.0, 1.0, "old")], duration=1.0)
CUT = Transcript(
    "open", segments=[Segment(0, 0.0, 1.0, "open")], warnings=[TranscriptNote("truncated", "the answer was cut off", 0.0, 1.0)]
)
HALF = Transcript("open", segments=[Segment(0, 0.0, 1.0, "open")], error=ERROR, duration=1.0)


@pytest.fixture(autouse=True)
def working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files(inputs, *formats, folder="out"):
    return OutputFiles(inputs, folder, formats or ("srt",), SubtitleOptions())


def names(inputs, *formats, folder="out"):
    outputs = files(inputs, *formats, folder=folder)
    return [path.relative_to(folder).as_posix() for index in range(len(inputs)) for path in outputs.paths(index)]


def made(*inputs):
    for name in inputs:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("sound")
        os.utime(name, (1e9, 1e9))
    return list(inputs)


def tree(folder="."):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in Path(folder).rglob("*") if not path.is_dir()}


# --- names -----------------------------------------------------------------------------------------------------------------------


def test_names_are_those_of_the_inputs():
    assert names(["a/speech.wav", "b/talk.part.1.mp3", "-"], "srt", "txt") == [
        *("speech.srt", "speech.txt", "talk.part.1.srt", "talk.part.1.txt", "stdin.srt", "stdin.txt")
    ]
    assert OutputFiles(["a/speech.wav"], None, ["txt"], SubtitleOptions()).paths(0) == [Path("speech.txt")]
    assert names([".wav", "no_suffix", "..", "", "folder/"]) == [".wav.srt", "no_suffix.srt", *names(["..", ""]), "folder.srt"]


def test_inputs_that_share_a_name_get_longer_ones():
    assert names(["x/speech.wav", "x/speech.mp3", "x/talk.wav"]) == ["speech.wav.srt", "speech.mp3.srt", "talk.srt"]
    assert names(["x/a/speech.wav", "x/b/speech.wav", "x/b/c.wav"]) == ["a/speech.wav.srt", "b/speech.wav.srt", "c.srt"]
    assert names(["speech.wav", "a/speech.wav"]) == ["speech.wav.srt", "a/speech.wav.srt"]
    assert names(["stdin.wav", "-"]) == ["stdin.wav.srt", "stdin.srt"]
    # A name of one may be what another one is lengthened to.
    assert names(["a/x.wav", "a/x.mp3", "b/x.wav.flac"]) == ["a/x.wav.srt", "x.mp3.srt", "x.wav.flac.srt"]


def test_case_and_composition_do_not_make_names_different():
    assert names(["Speech.wav", "speech.mp3"]) == ["Speech.wav.srt", "speech.mp3.srt"]
    assert names(["caf\u00e9.wav", "cafe\u0301.mp3"]) == ["caf\u00e9.wav.srt", "cafe\u0301.mp3.srt"]
    assert names(["a/Speech.wav", "a/speech.wav"]) == ["Speech.wav-1.srt", "speech.wav-2.srt"]


def test_an_input_given_twice_is_one_output(tmp_path):
    made("a/speech.wav")
    Path("link").symlink_to("a")
    same = ["a/speech.wav", "./a//speech.wav", "a/../a/speech.wav", str(tmp_path / "a/speech.wav"), "link/speech.wav"]
    assert names(same) == ["speech.srt"] * 5 and names(["-", "-"]) == ["stdin.srt"] * 2


def test_no_input_is_overwritten(tmp_path):
    made("notes.json", "x.txt", "speech.wav", "Speech.SRT.ogg", "a.srt", ".b.srt.partial", "c.failed")
    outputs = OutputFiles(["notes.json", "x.txt"], None, FORMATS, SubtitleOptions())
    assert {path.name for path in outputs.paths(0)} == {f"notes.json.{one}" for one in FORMATS}
    assert {path.name for path in outputs.paths(1)} == {f"x.txt.{one}" for one in FORMATS}
    assert OutputFiles(["x.txt"], None, ["srt"], SubtitleOptions()).paths(0) == [Path("x.srt")], "no collision with this format"
    Path("here").symlink_to(tmp_path)
    assert names(["a.srt"], folder="here") == ["a.srt.srt"]
    assert names(["b.wav", ".b.srt.partial"], folder=".")[0] == "b.wav.srt"
    assert names(["c.wav", "c.failed"], folder=".") == ["c.wav.srt", "c.failed.srt"]
    Path("out").mkdir()
    made("out/real.srt")
    Path("real.ogg").symlink_to("out/real.srt")
    assert names(["real.ogg"]) == ["real.ogg.srt"], "the target of a link"


PATHS = st.lists(
    st.sampled_from(["a", "A", "b", "x.wav", "X.wav", "x.srt", "x.wav.srt", "x", "-", "x.wav-1", "x.failed"]), min_size=1, max_size=3
)


@settings(max_examples=200, deadline=None)
@given(st.lists(PATHS.map("/".join), max_size=8))
def test_any_inputs_have_different_names(inputs):
    outputs = OutputFiles(inputs, None, ["srt", "txt"], SubtitleOptions())
    owners, places = {}, {os.path.abspath(one) for one in inputs if one != "-"}
    for index, source in enumerate(inputs):
        for path in outputs.paths(index):
            assert ".." not in path.parts and not path.is_absolute()
            assert os.path.abspath(path) not in places
            place = source if source == "-" else os.path.abspath(source)
            assert owners.setdefault(str(path).casefold(), place) == place


# --- writing ---------------------------------------------------------------------------------------------------------------------


def test_each_format_is_written():
    inputs = made("speech.wav")
    outputs = files(inputs, *FORMATS, folder="new/folder")
    assert not outputs.is_complete(0)
    assert outputs.write(0, WHOLE) == outputs.paths(0) and outputs.is_complete(0)
    expected = {f"speech.{format}": write_text(WHOLE, format, SubtitleOptions()).encode() for format in FORMATS}
    assert tree("new/folder") == expected
    assert {path.stat().st_mode & 0o777 for path in outputs.paths(0)} == {0o666 & ~_umask()}


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_subfolders_are_made():
    outputs = files(made("a/speech.wav", "b/speech.wav"))
    outputs.write(1, WHOLE)
    assert set(tree("out")) == {"b/speech.wav.srt"} and outputs.is_complete(1) and not outputs.is_complete(0)


def test_subtitles_have_their_layout():
    OutputFiles(["a.wav"], "out", ["vtt"], SubtitleOptions(4)).write(0, WHOLE)
    assert b"open\nmenu\n" in tree("out")["a.vtt"]


def test_what_makes_an_input_incomplete():
    outputs = files(made("speech.wav"), "txt", "srt")
    outputs.write(0, WHOLE)
    assert outputs.is_complete(0)
    for leftover in (".speech.srt.partial", ".speech.failed.partial", "speech.failed"):
        made(f"out/{leftover}")
        assert not outputs.is_complete(0), leftover
        outputs.write(0, WHOLE)
        assert outputs.is_complete(0) and set(tree("out")) == {"speech.txt", "speech.srt"}
    os.utime("speech.wav")
    os.utime("out/speech.srt", (1e9, 1e9))
    assert not outputs.is_complete(0), "older than the input"
    outputs.write(0, WHOLE)
    Path("out/speech.txt").unlink()
    assert not outputs.is_complete(0)
    Path("out/speech.txt").mkdir()
    assert not outputs.is_complete(0)


def test_the_standard_input_is_never_complete():
    outputs = files(["-"])
    outputs.write(0, WHOLE)
    assert set(tree("out")) == {"stdin.srt"} and not outputs.is_complete(0)


@pytest.mark.parametrize("transcript", [CUT, HALF], ids=["cut", "error"])
def test_an_incomplete_transcript_is_written_and_marked(transcript):
    outputs = files(made("speech.wav"), "txt", "json")
    assert outputs.write(0, transcript) == [Path("out/speech.failed"), *outputs.paths(0)] and not outputs.is_complete(0)
    assert tree("out")["speech.txt"] == b"open\n" and "cut off" in tree("out")["speech.failed"].decode()
    outputs.write(0, WHOLE)
    assert outputs.is_complete(0) and set(tree("out")) == {"speech.txt", "speech.json"}


def test_if_nothing_was_read_only_the_error_is_written():
    name = os.fsdecode(b"caf\xe9.wav")
    outputs = files([name], "txt", "json")
    (path,) = outputs.write(0, Transcript(error=ERROR))
    assert not outputs.is_complete(0)
    assert tree("out") == {path.name: f"caf\ufffd.wav\n{ERROR}\n".encode()} and path.suffix == ".failed"


def test_silence_is_complete():
    outputs = files(made("speech.wav"), *FORMATS)
    outputs.write(0, Transcript(duration=3.0))
    assert outputs.is_complete(0) and json.loads(tree("out")["speech.json"])["duration"] == 3.0


def test_names_of_the_greatest_length():
    inputs = made("é" * 125 + "a.mp3", "é" * 125 + "b.mp3", "x" + "é" * 122 + ".mp3", "y" + "é" * 122 + ".mp3")
    outputs = files(inputs, *FORMATS)
    for index in range(4):
        outputs.write(index, CUT)
        outputs.write(index, WHOLE)
        assert outputs.is_complete(index)
    found = tree("out")
    assert len(found) == 4 * len(FORMATS) and {"x" + "é" * 122 + ".txt", "y" + "é" * 122 + ".txt"} <= found.keys()
    partials = {partial_name(name) for name in found}
    assert len(partials) == len(found) and max(len(os.fsencode(name)) for name in partials) <= 255


@pytest.mark.parametrize("formats", [(), ("srt", "ass"), "srt"])
def test_formats_are_checked(formats):
    with pytest.raises(InputError, match="txt, srt, vtt, tsv, json"):
        OutputFiles(["a.wav"], "out", formats, SubtitleOptions())
    assert not Path("out").exists()


# --- faults ----------------------------------------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_made():
    made("file")
    with pytest.raises(OutputError, match="file/out"):
        files(["a.wav"], folder="file/out")
    with pytest.raises(OutputError, match="file"):
        files(["a.wav"], folder="file")


@pytest.mark.parametrize("call", ["open", "fsync", "replace"])
@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=["full", "interrupt"])
def test_a_fault_leaves_no_partial_file(monkeypatch, call, fault):
    outputs = files(made("speech.wav"), "txt", "srt", "json")
    outputs.write(0, WHOLE)
    before = tree("out")
    home, true = (output_files, open) if call == "open" else (os, getattr(os, call))
    results = iter([fault] if call == "replace" else [None, fault])

    def failing(*arguments, **keywords):
        if (error := next(results)) is not None:
            raise error
        return true(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(home, call, failing, raising=False)
        with pytest.raises(OutputError if isinstance(fault, OSError) else KeyboardInterrupt) as caught:
            outputs.write(0, Transcript("other", segments=[Segment(0, 0.0, 1.0, "other")]))
    assert tree("out") == before
    if isinstance(fault, OSError):
        assert "out/speech." in str(caught.value) and "No space left" in str(caught.value)
    outputs.write(0, WHOLE)
    assert tree("out") == before


def test_a_folder_in_the_place_of_a_file():
    outputs = files(made("speech.wav"), "txt", "srt")
    Path("out/speech.srt").mkdir()
    with pytest.raises(OutputError, match=r"out/speech\.srt"):
        outputs.write(0, WHOLE)
    assert set(tree("out")) <= {"speech.txt"}


def test_a_link_in_the_place_of_a_partial_file_is_not_followed():
    outputs = files(made("speech.wav", "precious"))
    Path("out/.speech.srt.partial").symlink_to(Path("precious").resolve())
    outputs.write(0, WHOLE)
    assert tree()["precious"] == b"sound" and outputs.is_complete(0) and not Path("out/speech.srt").is_symlink()


# --- killed and resumed ----------------------------------------------------------------------------------------------------------

COUNT = 200
# Writes the outputs of COUNT inputs, those that are not complete, and a line for each: with a pause in the middle, where a kill comes.
RUN = """
import os, sys
from granite_speech.transcription.output_files import OutputFiles
from granite_speech.transcription.subtitles import SubtitleOptions
from granite_speech.transcription.transcript import Segment, Transcript

inputs, folder = sys.argv[2:], sys.argv[1]
outputs = OutputFiles(inputs, folder, ["txt", "srt", "json"], SubtitleOptions(42, 2))
for index, name in enumerate(inputs):
    if not outputs.is_complete(index):
        words = [f"{os.path.basename(name)} word {n}" for n in range(40)]
        segments = [Segment(n, n, n + 1.0, text) for n, text in enumerate(words)]
        outputs.write(index, Transcript(" ".join(words), segments=segments, duration=40.0))
        print(name, flush=True)
"""
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}


def check_whole(folder, inputs, formats=("txt", "srt", "json")):
    """Each file is there once and whole, and nothing else."""
    found = tree(folder)
    assert set(found) == {f"{Path(name).stem}.{format}" for name in inputs for format in formats}
    for name in inputs:
        words = [f"{Path(name).name} word {n}" for n in range(40)]
        assert found[f"{Path(name).stem}.txt"].decode().split("\n")[:-1] == words
        assert json.loads(found[f"{Path(name).stem}.json"])["text"] == " ".join(words)
        assert found[f"{Path(name).stem}.srt"].decode().count(" --> ") == 40


def test_a_run_that_is_killed_is_resumed():
    inputs = made(*(f"in/{n:03d}.wav" for n in range(COUNT)))
    written = []
    for until in (20, 90, 91, 150, COUNT):
        command = [sys.executable, "-c", RUN, "out", *inputs]
        with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                written.append(line.strip())
                if len(written) >= until and until < COUNT:
                    time.sleep(0.0007 * (until % 7))
                    process.send_signal(signal.SIGKILL)
                    break
            written += process.stdout.read().split()
        assert process.returncode == (-signal.SIGKILL if until < COUNT else 0)
        for path, content in tree("out").items():
            assert path.endswith(".partial") or content.endswith(b"\n"), "no file with its final name is cut off"
    unsaid = set(inputs) - set(written)  # killed after its last file was renamed, and before it said so
    assert set(written) <= set(inputs) and len(unsaid) <= 4, unsaid
    assert len(written) - len(set(written)) <= 4, "an input is written again only if its last step was cut off"
    check_whole("out", inputs)


class Killed(BaseException):
    """The process has ended: no call to the operating system is made any more."""


@pytest.mark.parametrize("dying", [WHOLE, CUT], ids=["complete", "incomplete"])
@pytest.mark.parametrize("before", [None, OLD, HALF], ids=["first run", "after a complete run", "after an incomplete run"])
def test_a_run_may_die_at_any_step(monkeypatch, before, dying):
    formats = ("txt", "json")
    old, new, *others = (
        {f"speech.{one}": write_text(it, one, SubtitleOptions()).encode() for one in formats} for it in (OLD, WHOLE, CUT, HALF)
    )
    whole = {content for contents in (old, new, *others) for content in contents.values()}
    steps = 0
    while True:
        shutil.rmtree("out", ignore_errors=True)
        outputs = files(made("speech.wav"), *formats)
        if before is not None:
            outputs.write(0, before)
        if not dies(monkeypatch, outputs, dying, steps):
            break
        for path, content in tree("out").items():
            assert path.endswith((".partial", ".failed")) or content in whole
        if not outputs.is_complete(0):
            outputs.write(0, WHOLE)
        assert outputs.is_complete(0) and tree("out") in ([new, old] if before is OLD else [new]), "of one run"
        steps += 1
    assert steps >= 8, "removing, flushing and renaming each, and removing the mark"


def dies(monkeypatch, outputs, transcript, steps):
    """Whether writing takes more than so many steps; it ends after them as if killed."""
    left = steps

    def step(call):
        def limited(*arguments, **keywords):
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return call(*arguments, **keywords)

        return limited

    with monkeypatch.context() as patch:
        for name in ("fsync", "replace", "unlink"):
            patch.setattr(os, name, step(getattr(os, name)))
        try:
            outputs.write(0, transcript)
        except Killed:
            return True
    return False
