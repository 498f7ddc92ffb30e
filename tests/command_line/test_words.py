"""Times of words on the command line, in subtitles and in plots, with a stand-in for the model."""

import os
import sys

import pytest
import srt

from granite_speech import Transcriber
from granite_speech.cli import main
from granite_speech.transcription.transcript import Segment, Transcript, Word
from tests.support.scripted_transcriber import FIRST_LINE, ScriptedTranscriber, transcript
from tests.support.sound_headers import wav_header


@pytest.fixture
def transcriber(monkeypatch, tmp_path):
    scripted = ScriptedTranscriber({"words.wav": with_words("one", "two")})
    monkeypatch.setattr(Transcriber, "from_pretrained", scripted.from_pretrained)
    monkeypatch.chdir(tmp_path)
    return scripted


def run(capfd, *arguments):
    status = main(["--model", "m", *map(str, arguments)])
    out, err = capfd.readouterr()
    return status, out, err.removeprefix(FIRST_LINE)


def with_words(*texts: str) -> Transcript:
    """A word in each second, 0.4 s long."""
    words = [Word(text, place + 0.1, place + 0.5, 0.9, 0.8, 0.95) for place, text in enumerate(texts)]
    segment = Segment(0, 0.1, len(words) - 0.5, " ".join(texts), words=words)
    return Transcript(segment.text, segments=[segment], words=words, duration=float(len(words)))


def test_subtitles_of_words_have_their_times(transcriber, capfd, tmp_path):
    line = ("words.wav", "-f", "srt", "--word_timestamps", "True", "--quiet")
    assert run(capfd, *line, "--max_words_per_line", "1") == (0, "", "")
    assert [(one.start.total_seconds(), one.end.total_seconds(), one.content) for one in subtitles(tmp_path / "words.srt")] == [
        (0.1, 0.5, "one"),
        (1.1, 1.5, "two"),
    ]
    assert run(capfd, *line, "--highlight_words", "True") == (0, "", "")
    assert [one.content for one in subtitles(tmp_path / "words.srt")] == ["<u>one</u> two", "one two", "one <u>two</u>"]


def subtitles(path):
    return list(srt.parse(path.read_text()))


def test_times_of_words_that_nothing_shows_are_said_to_be_so(transcriber, capfd):
    said = "granite-speech: --word-timestamps shows no times: none of json, srt, tsv, vtt is written\n"
    assert run(capfd, "words.wav", "--word-timestamps") == (0, "one two\n", said)
    assert run(capfd, "words.wav", "--word-timestamps", "-f", "txt", "--quiet") == (0, "", said)
    assert run(capfd, "words.wav", "--word-timestamps", "-f", "txt,json", "--quiet") == (0, "", "")
    ignored = "granite-speech: --highlight-words ignored: neither srt nor vtt is written\n"
    assert run(capfd, "words.wav", "--word-timestamps", "--highlight-words", "-f", "json", "--quiet") == (0, "", ignored)


# --- plots ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def recordings(transcriber, tmp_path):
    for name in ("one.wav", "two.wav"):
        (tmp_path / name).write_bytes(wav_header(data=bytes(2 * 32_000)))
        transcriber.results[name] = with_words("one", "two")
    return transcriber


def test_a_plot_is_written_beside_the_text(recordings, capfd, tmp_path):
    assert run(capfd, "one.wav", "--plot", "plots/words.png") == (0, "one two\n", "granite-speech: one.wav: plotted to plots/words.png\n")
    assert (tmp_path / "plots/words.png").read_bytes().startswith(b"\x89PNG")
    assert recordings.calls == [{"word_timestamps": True}]


@pytest.fixture
def plotted(monkeypatch):
    """What is to be plotted, and the length of each recording in pages."""
    calls, lengths = [], {}

    def plot_words(transcript, audio, file):
        calls.append((str(transcript), audio, str(file)))
        return [file] * lengths.get(audio, 1)

    monkeypatch.setattr("granite_speech.command_line.plots.plot_words", plot_words)
    return calls, lengths


def test_several_recordings_are_plotted_into_a_folder(recordings, plotted, capfd, tmp_path):
    calls, lengths = plotted
    lengths["two.wav"] = 3
    (tmp_path / "folder").mkdir()
    for folder in ("new/", "folder"):
        calls.clear()
        status, _, err = run(capfd, "one.wav", "two.wav", "one.wav", "--plot", folder)
        name = folder.rstrip("/")
        assert status == 0 and calls == [("one two", "one.wav", f"{name}/one.png"), ("one two", "two.wav", f"{name}/two.png")]
        assert err.splitlines()[1] == f"granite-speech: two.wav: plotted to {name}/two.png and 2 more pages"
    assert run(capfd, "one.wav", "--plot", "folder", "--quiet")[2] == ""


def test_a_plot_that_takes_long_is_announced(recordings, plotted, capfd):
    recordings.results["one.wav"].duration = 3601.0
    assert "granite-speech: one.wav: drawing 61 pages, a second or two for each" in run(capfd, "one.wav", "--plot", "a.pdf")[2].splitlines()
    assert run(capfd, "one.wav", "--plot", "a.pdf", "--quiet")[2] == ""


def test_recordings_of_one_name_have_plots_of_their_own(recordings, plotted, capfd, tmp_path):
    (tmp_path / "one.mp3").touch()
    recordings.results["one.mp3"] = with_words("three")
    assert run(capfd, "one.wav", "one.mp3", "--plot", "folder/")[0] == 0
    assert [file for _, _, file in plotted[0]] == ["folder/one.wav.png", "folder/one.mp3.png"]


def test_a_recording_that_failed_is_not_plotted_and_the_others_are(recordings, plotted, capfd):
    status, _, err = run(capfd, "absent.wav", ".", "two.wav", "--plot", "folder/")
    assert status == 1 and [audio for _, audio, _ in plotted[0]] == ["two.wav"]
    assert [line for line in err.splitlines() if "plotted" in line] == [
        "granite-speech: absent.wav: not plotted",
        "granite-speech: .: not plotted",
        "granite-speech: two.wav: plotted to folder/two.png",
    ]


def test_a_plot_that_fails_is_named_and_the_others_are_written(recordings, capfd, tmp_path):
    recordings.results["one.wav"] = transcript("no", "words")
    status, _, err = run(capfd, "one.wav", "two.wav", "--plot", "folder/")
    first, second = err.splitlines()
    assert status == 1 and "one.wav: a transcript without words" in first and second.endswith("plotted to folder/two.png")
    assert [one.name for one in (tmp_path / "folder").iterdir()] == ["two.png"]


def test_a_lack_of_memory_for_a_plot_does_not_end_the_run(recordings, capfd, monkeypatch):
    def plot_words(transcript, audio, file):
        raise MemoryError("no memory")

    monkeypatch.setattr("granite_speech.command_line.plots.plot_words", plot_words)
    status, out, err = run(capfd, "one.wav", "two.wav", "--plot", "folder/")
    assert status == 1 and out.count("one two") == 2
    assert err.splitlines() == [f"granite-speech: {one}.wav: not plotted (MemoryError: no memory)" for one in ("one", "two")]


def test_what_a_plot_would_harm_or_cannot_read_again_is_refused_before_the_model_is_loaded(recordings, capfd, tmp_path):
    (tmp_path / "sound.png").write_bytes((tmp_path / "one.wav").read_bytes())
    assert "which is the recording" in run(capfd, "sound.png", "--plot", "./sound.png")[2]
    os.mkfifo(tmp_path / "pipe")
    status, out, err = run(capfd, "pipe", "--plot", "words.png")
    assert (status, out, recordings.loaded) == (2, "", []) and "can be read again" in err


def test_the_package_that_a_plot_needs_is_missed_before_the_model_is_loaded(recordings, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, out, err = run(capfd, "one.wav", "--plot", "words.png")
    assert (status, out, recordings.loaded) == (2, "", []) and "granite-speech-triton[plot]" in err and err.count("\n") == 1
