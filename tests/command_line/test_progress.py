"""The progress bar: on a terminal only, with seconds of audio and RTFx, and without tearing lines of text."""

import os
import pty
import re
import subprocess
import time

import pytest

from granite_speech.command_line.progress import Progress
from tests.command_line.test_transcribe import LINES, start
from tests.support.scripted_transcriber import FIRST_LINE
from tests.support.sound_headers import wav_header


def on_terminal(*arguments, stdout=None, **options) -> tuple[str, str]:
    """Run the command with a terminal as standard error, and as standard output unless another is given: what both get."""
    ours, theirs = pty.openpty()
    process = start(*arguments, stdout=theirs if stdout is None else stdout, stderr=theirs, pause=0.15, **options)
    os.close(theirs)
    shown = b""
    try:
        while block := os.read(ours, 1 << 16):
            shown += block
    except OSError:  # the process has ended
        pass
    os.close(ours)
    out = process.stdout.read() if stdout is not None else ""
    assert process.wait(30) == 0
    return shown.decode(), out


def rendered(shown: str) -> list[str]:
    """The lines that the terminal has in the end."""
    lines = []
    for line in shown.replace("\x1b[A", "").split("\n"):
        characters, column = [], 0
        for character in line:
            if character == "\r":
                column = 0
                continue
            characters[column : column + 1] = character
            column += 1
        lines.append("".join(characters).rstrip())
    return lines


@pytest.fixture
def sound(tmp_path):
    """A file of six seconds, which is what the stand-in for the model makes of it."""
    (tmp_path / "a.wav").write_bytes(wav_header(data=bytes(6 * 32_000)))
    return tmp_path


def test_the_bar_counts_seconds_of_audio_and_does_not_tear_lines(sound):
    shown, _ = on_terminal("a.wav", "--model", "m", cwd=sound)
    assert re.search(r"\d+/6 s of audio \[.*RTFx \d+\]", shown), shown
    lines = rendered(shown)
    assert lines[:4] == (FIRST_LINE + LINES).splitlines() and lines[4].startswith("100%|"), lines


def test_the_bar_without_a_length_and_with_a_pipe_for_text(tmp_path):
    shown, out = on_terminal("a.wav", "--model", "m", stdout=subprocess.PIPE, cwd=tmp_path)
    assert "s of audio" in shown and "RTFx" in shown and out == LINES


@pytest.mark.parametrize("option", [["--quiet"], ["--verbose", "False"]])
def test_no_bar_if_none_is_wanted(sound, option):
    assert on_terminal("a.wav", "--model", "m", *option, cwd=sound)[0].replace("\r", "") == LINES


def test_no_bar_without_a_terminal(sound):
    process = start("a.wav", "--model", "m", stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=sound)
    assert process.communicate(timeout=30) == (LINES, FIRST_LINE)


def test_the_total_is_known_when_all_lengths_are_and_is_corrected_at_the_end(monkeypatch, tmp_path):
    lengths = {"a": 10.0, "b": 20.0, "-": None}
    monkeypatch.setattr("granite_speech.inputs.audio.estimate_seconds", lengths.get)
    with Progress(["a", "b", "-"], shown=True) as progress:
        bar = progress._bar
        time.sleep(0.1)  # for the thread that measures
        progress.advance(0, 4.0)
        assert (bar.n, bar.total) == (4, None)
        progress.advance(1, 2.5)
        progress.finish(0, 12.0)
        assert (bar.n, bar.total) == (14, None), "the length of standard input is not known before its end"
        progress.finish(1, 20.0)
        progress.advance(2, 3.0)
        assert (bar.n, bar.total) == (35, None)
        progress.finish(2, 5.0)
        assert (bar.n, bar.total) == (37, 37)
