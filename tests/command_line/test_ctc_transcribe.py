"""`granite-speech FILE --model FOLDER` with a TurboCTC checkpoint: text, files, plots, and what is refused."""

import json
import wave
from pathlib import Path

import pytest
import torch

from granite_speech.cli import main
from granite_speech.command_line.threads import no_slower
from granite_speech.model_ctc import GraniteSpeech5ForCTC
from tests.support.ctc_speech import TONES, sound

WORDS = ["one", "two", 1.5, "three"]


@pytest.fixture
def recording(tmp_path) -> Path:
    samples, _ = sound(WORDS)
    path = tmp_path / "tones.wav"
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes((samples * 32767).round().to(torch.int16).numpy().tobytes())
    return path


def run(capfd, *arguments) -> tuple[int, str, str]:
    status = main([*map(str, arguments), "--model", str(TONES), "--dtype", "float32"])
    return status, *capfd.readouterr()


def test_the_text_is_printed_after_a_line_that_names_the_model(recording, capfd):
    status, out, err = run(capfd, recording)
    assert (status, out) == (0, "one two\nthree\n")
    assert err.splitlines()[0].startswith(f"granite-speech: {TONES}, float32 on cpu, ")
    assert run(capfd, "transcribe", recording)[:2] == (0, "one two\nthree\n")


def test_files_have_the_words_and_their_times(recording, tmp_path, capfd):
    folder = tmp_path / "out"
    status, out, _ = run(capfd, recording, "--output-format", "all", "--output-dir", folder, "--word-timestamps")
    assert (status, out) == (0, "")
    result = json.loads((folder / "tones.json").read_text())
    assert result["text"] == "one two three" and [one["word"] for one in result["words"]] == ["one", "two", "three"]
    assert (folder / "tones.txt").read_text() == "one two\nthree\n"
    for kind, expected in (("srt", "one two"), ("vtt", "one two"), ("tsv", "one two")):
        assert expected in (folder / f"tones.{kind}").read_text()


def test_a_plot_shows_the_words(recording, tmp_path, capfd):
    pytest.importorskip("matplotlib")
    image = tmp_path / "words.png"
    assert run(capfd, recording, "--plot", image)[0] == 0
    assert image.stat().st_size > 10_000


def test_what_the_model_cannot_do_is_one_message(recording, capfd):
    status, out, err = run(capfd, recording, "--prompt", "what?")
    assert (status, out) == (2, "") and "prompt='what?' for a CTC model" in err.splitlines()[-1]


def test_the_size_of_its_products_decides_the_threads():
    model = GraniteSpeech5ForCTC.from_pretrained(TONES, dtype="float32")
    before = torch.get_num_threads()
    assert no_slower(2, model) in (1, 2)
    assert torch.get_num_threads() == before
