"""What `granite-speech FILE …` prints and writes, with a stand-in for the model; and what happens if nobody reads it."""

import json
import os
import subprocess
import sys
import time

import pytest

from granite_speech import AudioError, Transcriber
from granite_speech.cli import main
from granite_speech.transcription.transcript import Segment, Transcript, TranscriptNote
from tests.support.paths import ROOT
from tests.support.scripted_transcriber import FIRST_LINE, ScriptedTranscriber, transcript

CUT = TranscriptNote("truncated", "the answer was cut off", 2.0, 4.0)
FAILED_WINDOW = TranscriptNote("window_error", "no memory", 0.0, 2.0)
REPEATED = TranscriptNote("repetition", "the text repeats itself", 0.0, 2.0)
DAMAGED = AudioError(got="'d.wav', which is cut off", expected="a whole file", remedy="Copy it again")
RESULTS = {
    "a.wav": transcript("one", "two"),
    "b.wav": transcript("three"),
    "cut.wav": transcript("four", "five", warnings=[CUT]),
    "doubtful.wav": transcript("six", warnings=[REPEATED]),
    "window.wav": Transcript(
        "seven",
        segments=[Segment(0, 0.0, 2.0, "", error="no memory"), Segment(1, 2.0, 4.0, "seven")],
        warnings=[FAILED_WINDOW],
        duration=4.0,
    ),
    "damaged.wav": transcript("eight", error=DAMAGED),
    "silent.wav": transcript(),
    "日.wav": transcript("日本語"),
}


@pytest.fixture
def transcriber(monkeypatch, tmp_path):
    scripted = ScriptedTranscriber(RESULTS)
    monkeypatch.setattr(Transcriber, "from_pretrained", scripted.from_pretrained)
    monkeypatch.chdir(tmp_path)
    return scripted


def run(capfd, *arguments):
    """The exit status, standard output, and standard error without its first line, which says what runs."""
    status = main(["--model", "m", *map(str, arguments)])
    out, err = capfd.readouterr()
    return status, out, err.removeprefix(FIRST_LINE)


# --- standard output --------------------------------------------------------------------------------------------------------------


def test_one_recording_has_a_line_for_what_is_between_pauses_and_no_name(transcriber, capfd):
    assert run(capfd, "a.wav") == (0, "one\ntwo\n", "")
    assert main(["transcribe", "--model", "m", "a.wav"]) == 0 and capfd.readouterr() == ("one\ntwo\n", FIRST_LINE)
    assert "verify:\n[failed" in run(capfd, "a.wav", "verify")[1], "only the first word is a command"


def test_a_layout_of_subtitles_without_subtitles_is_ignored_with_a_message(transcriber, capfd):
    ignored = "granite-speech: --max-line-width, --max-line-count ignored: neither srt nor vtt is written\n"
    layout = ("--max_line_width", "20", "--max_line_count", "2")
    assert run(capfd, "a.wav", *layout) == (0, "one\ntwo\n", ignored)
    assert run(capfd, "a.wav", *layout, "-f", "txt,json")[2].startswith(ignored)
    assert "ignored" not in run(capfd, "a.wav", *layout, "-f", "all")[2] + run(capfd, "a.wav", *layout, "-f", "vtt")[2]


def test_several_recordings_have_their_names_before_their_texts(transcriber, capfd):
    status, out, err = run(capfd, "a.wav", "absent.wav", "silent.wav", "b.wav", "a.wav")
    failed = "absent.wav:\n[failed: 'absent.wav', which does not exist]"
    assert out == f"a.wav:\none\ntwo\n\n{failed}\n\nsilent.wav:\n\nb.wav:\nthree\n\na.wav:\none\ntwo\n"
    assert err == "granite-speech: absent.wav: 'absent.wav', which does not exist; expected a sound file. Check the path.\n"
    assert status == 1


def test_one_recording_that_fails_leaves_standard_output_empty(transcriber, capfd):
    status, out, err = run(capfd, "absent.wav")
    assert (status, out) == (1, "") and err.startswith("granite-speech: absent.wav: ")
    assert run(capfd, "silent.wav") == (0, "", "")


@pytest.mark.parametrize(
    "name, status, out, message",
    [
        ("cut.wav", 1, "four\nfive\n", "2.00 to 4.00 s: the answer was cut off"),
        ("window.wav", 1, "seven\n", "0.00 to 2.00 s: no memory"),
        ("damaged.wav", 1, "eight\n", "'d.wav', which is cut off; expected a whole file. Copy it again."),
        ("doubtful.wav", 0, "six\n", "0.00 to 2.00 s: the text repeats itself"),
    ],
)
def test_what_went_wrong_is_named_once_and_the_text_is_printed(transcriber, capfd, name, status, out, message):
    assert run(capfd, name) == (status, out, f"granite-speech: {name}: {message}\n")
    assert run(capfd, name, "--quiet") == (status, out, f"granite-speech: {name}: {message}\n"), "messages of faults are not progress"


def test_a_damaged_recording_among_others_has_its_text_and_its_entry(transcriber, capfd):
    _, out, _ = run(capfd, "damaged.wav", "b.wav")
    assert out == "damaged.wav:\neight\n[failed: 'd.wav', which is cut off]\n\nb.wav:\nthree\n"


def test_a_sentence_is_printed_before_the_next_segment_is_known(transcriber, capfd):
    transcriber.results["said.wav"] = transcript("One.", "two", "three")
    seen = []
    transcriber.before_event = lambda event: seen.append(capfd.readouterr().out)
    main(["--model", "m", "said.wav", "b.wav"])
    assert seen == ["", "said.wav:\nOne.\n", "", "two\n", "three\n", "\nb.wav:\n"] and capfd.readouterr().out == "three\n"


def test_segments_without_a_pause_between_them_are_one_line(transcriber, capfd):
    pieces = [
        Segment(place, 2.0 * place, 2.0 * place + 1.5, text)
        for place, text in enumerate(["one\ntwo", "  three\r\n", "four.", "Five", "six"])
    ]
    transcriber.results["talk.wav"] = Transcript("…", segments=pieces, duration=10.0)
    assert run(capfd, "talk.wav") == (0, "one two three four.\nFive six\n", "")
    long = [Segment(place, float(place), place + 1.0, "word " * 20) for place in range(10)]
    transcriber.results["long talk.wav"] = Transcript("…", segments=long, duration=10.0)
    out = run(capfd, "long talk.wav")[1]
    assert out.split() == ["word"] * 200 and all(300 <= len(line) < 400 for line in out.splitlines()[:-1]) and out.count("\n") == 3


def test_no_model_is_said(transcriber, capfd):
    assert main(["a.wav"]) == 0
    out, err = capfd.readouterr()
    first, second = err.splitlines()
    assert out == "one\ntwo\n" and "no --model" in second and "70 English words" in second
    assert first == "granite-speech: embedded, bfloat16 on cpu, 1 thread"
    (name, _) = transcriber.loaded[0]
    assert (name / "config.json").is_file()


# --- files ------------------------------------------------------------------------------------------------------------------------


def test_files_are_written_instead_of_standard_output(transcriber, capfd, tmp_path):
    status, out, err = run(capfd, "a.wav", "b.wav", "-f", "srt", "json", "--output_dir", "out")
    assert (status, out) == (0, "")
    written = [f"granite-speech: {name}.wav: written to out/{name}.srt, out/{name}.json" for name in "ab"]
    assert err.splitlines() == written
    assert sorted(one.name for one in (tmp_path / "out").iterdir()) == ["a.json", "a.srt", "b.json", "b.srt"]
    assert json.loads((tmp_path / "out/a.json").read_text())["text"] == "one two"


@pytest.mark.parametrize(
    "options, names",
    [(["--output-dir", "."], ["a.txt"]), (["-f", "vtt"], ["a.vtt"]), (["-f", "all"], ["a.json", "a.srt", "a.tsv", "a.txt", "a.vtt"])],
)
def test_the_defaults_are_txt_and_the_working_directory(transcriber, capfd, tmp_path, options, names):
    assert run(capfd, "a.wav", "--verbose", "False", *options) == (0, "", "")
    assert sorted(one.name for one in tmp_path.iterdir()) == names


def test_subtitles_have_the_layout_that_was_asked_for(transcriber, capfd, tmp_path):
    transcriber.results["long.wav"] = transcript("one two three four five six")
    assert run(capfd, "long.wav", "-f", "srt", "--max_line_width", "9", "--max-line-count=1", "--quiet")[0] == 0
    lines = (tmp_path / "long.srt").read_text().splitlines()
    assert [line for line in lines if line[:1].isalpha()] == ["one two", "three", "four five", "six"]


def test_a_file_that_cannot_be_written_is_named_and_the_others_are_written(transcriber, capfd, tmp_path):
    (tmp_path / "a.txt").mkdir()
    (tmp_path / "a.txt/inside").touch()
    status, out, err = run(capfd, "a.wav", "b.wav", "-f", "txt")
    assert (status, out) == (1, "")
    first, second = err.splitlines()
    assert first.startswith("granite-speech: a.wav: ") and "a.txt" in first and "wav: written to" not in first
    assert second == "granite-speech: b.wav: written to b.txt" and (tmp_path / "b.txt").read_text() == "three\n"


def test_a_folder_that_cannot_be_made_is_found_before_the_model_is_loaded(transcriber, capfd, tmp_path):
    (tmp_path / "file").touch()
    status, out, err = run(capfd, "a.wav", "-o", "file/folder")
    assert (status, out, transcriber.loaded) == (2, "", []) and "file/folder" in err and err.count("\n") == 1


def test_an_input_given_twice_is_transcribed_once(transcriber, capfd):
    assert run(capfd, "a.wav", "b.wav", "a.wav", "-f", "txt", "--quiet") == (0, "", "")
    assert transcriber.taken == ["a.wav", "b.wav"]


def test_resuming_skips_what_is_complete(transcriber, capfd, tmp_path):
    names = ["a.wav", "cut.wav", "absent.wav", "b.wav"]
    for name in names[:2]:
        (tmp_path / name).touch()
    assert run(capfd, "a.wav", "cut.wav", "absent.wav", "-f", "txt", "srt")[0] == 1
    (tmp_path / "b.srt").touch()  # of b.wav, txt is missing
    transcriber.taken.clear()
    status, _, err = run(capfd, *names, "-f", "txt", "srt", "--resume")
    assert transcriber.taken == ["cut.wav", "absent.wav", "b.wav"] and status == 1
    assert err.splitlines()[0] == "granite-speech: complete, and skipped: 1 of 4 files"
    assert "b.wav: written to b.txt, b.srt" in err


def test_if_all_is_complete_no_model_is_loaded(transcriber, capfd, tmp_path):
    (tmp_path / "a.wav").touch()
    run(capfd, "a.wav", "-f", "txt")
    assert run(capfd, "a.wav", "-f", "txt", "--resume", "--quiet") == (0, "", "")
    assert len(transcriber.loaded) == 1


# --- when nobody reads ------------------------------------------------------------------------------------------------------------

# The command in a process of its own, without torch.
SCRIPT = """
import sys, threading, time, types
transcriber = types.ModuleType("granite_speech.transcription.transcriber")
sys.modules[transcriber.__name__] = transcriber
sys.modules["torch"] = types.SimpleNamespace(get_num_threads=lambda: 1, set_num_threads=lambda count: None)
from granite_speech.cli import command
from granite_speech.transcription.transcript import Segment, Transcript
class Device:
    type = "cpu"
    def __str__(self):
        return "cpu"
model = types.SimpleNamespace(dtype="torch.bfloat16", device=Device())
def stream_segments(recordings, on_progress=None, **options):
    for index, name in enumerate(recordings):
        segments = [Segment(place, 2.0 * place, 2.0 * place + 1, f"text {place} of {name}") for place in range(3)]
        for segment in segments:
            on_progress(index, segment.end)
            yield index, segment
            time.sleep(PAUSE)
        yield index, Transcript("x", segments=segments, duration=6.0)
loaded = types.SimpleNamespace(stream_segments=stream_segments, model=model)
transcriber.Transcriber = types.SimpleNamespace(from_pretrained=lambda *_, **__: loaded)
threading.Thread(target=time.sleep, args=[WAIT]).start()
command()
"""
LINES = "".join(f"text {place} of a.wav\n" for place in range(3))


def start(*arguments, pause=0.0, wait=0.0, before="", **options) -> subprocess.Popen:
    """The command, in a shell if something is to be done `before` it, such as closing a stream."""
    usual = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    environment = usual | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])} | options.pop("env", {})
    script = SCRIPT.replace("PAUSE", str(pause)).replace("WAIT", str(wait))
    command = [sys.executable, "-c", script, *arguments]
    if before:
        command = ["sh", "-c", f'{before}; exec "$@"', "sh", *command]
    return subprocess.Popen(command, env=environment, text=True, bufsize=1, **options)


def finish(process: subprocess.Popen) -> tuple[int, str | None, str | None]:
    out, err = process.communicate(timeout=30)
    return process.returncode, out, err


@pytest.mark.parametrize("environment", [{}, {"PYTHONUNBUFFERED": "1"}], ids=["buffered", "unbuffered"])
def test_a_pipe_that_is_closed_ends_the_run_at_once(environment):
    began = time.monotonic()
    with start("a.wav", pause=0.2, wait=20, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert "text 0" in process.stdout.readline()
        process.stdout.close()
        assert process.wait(15) == 1
        assert process.stderr.readline() == FIRST_LINE.replace(" m,", " embedded,")
        assert "70 English words" in process.stderr.readline() and process.stderr.read() == ""
    assert time.monotonic() - began < 15, "it does not wait for its threads"


def test_help_into_a_closed_pipe_gives_no_traceback():
    reading, writing = os.pipe()
    os.close(reading)
    with start("--help", stdout=writing, stderr=subprocess.PIPE) as process:
        os.close(writing)
        assert finish(process) == (1, None, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no such device")
def test_a_full_disk_under_standard_output_is_named():
    with open("/dev/full", "w") as full, start("a.wav", "--model", "m", stdout=full, stderr=subprocess.PIPE) as process:
        status, _, err = finish(process)
    assert status == 1 and err == FIRST_LINE + "granite-speech: standard output cannot be written: No space left on device\n"


def test_streams_that_are_closed_from_the_beginning(tmp_path):
    process = start("a.wav", "b.wav", "-f", "txt", before="exec 0<&- >&- 2>&-", cwd=tmp_path)
    assert process.wait(30) == 0
    assert (tmp_path / "a.txt").read_text() == LINES, "messages did not get into a file that took the number of a stream"
    status, out, _ = finish(start("a.wav", before="exec 2>&-", stdout=subprocess.PIPE))
    assert (status, out) == (0, LINES), "nor into standard output"
    status, _, err = finish(start("a.wav", "--model", "m", "--quiet", before="exec >&-", stderr=subprocess.PIPE))
    assert status == 1 and err.startswith("granite-speech: standard output cannot be written: ") and err.count("\n") == 1


def test_messages_that_nobody_reads_do_not_end_the_run():
    reading, writing = os.pipe()
    os.close(reading)
    process = start("a.wav", stdout=subprocess.PIPE, stderr=writing)
    os.close(writing)
    assert finish(process) == (0, LINES, None)


def test_characters_that_the_encoding_lacks_are_escaped():
    name = os.fsdecode(b"\xff\xe6\x97\xa5.wav")
    for encoding, written in (("ascii", "\\udcff\\u65e5.wav"), ("utf-8", "\\udcff日.wav")):
        process = start(
            name, name, "--model", "m", "--quiet", stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={"PYTHONIOENCODING": encoding}
        )
        status, out, err = finish(process)
        assert (status, err, out.splitlines()[0]) == (0, "", f"{written}:")
