"""The README's Python examples run, and the files and names that the documents mention exist."""

import re

import pytest
import soundfile

from granite_speech.inputs.recordings import PROMPT_3, PROMPT_4
from tests.support.paths import ROOT
from tests.support.small_models import small_model

README = ROOT / "README.md"
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "bench/results/README.md", "granite_speech/assets/README.md", "kernels/README.md")


def python_examples() -> tuple[str, str, str]:
    """Of one recording, of a batch, and of a warm-up."""
    one, batch, warmup = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    return one, batch, warmup


def test_the_example_of_one_recording_prints_its_words(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    exec(compile(python_examples()[0], str(README), "exec"), {})
    assert capsys.readouterr().out == "open menu seven two five stop\n"


def test_the_example_of_a_batch_transcribes_its_files(tmp_path, monkeypatch):
    samples, rate = soundfile.read(ROOT / "granite_speech/assets/sample.flac")
    soundfile.write(tmp_path / "speech.wav", samples, rate)
    soundfile.write(tmp_path / "interview.mp3", samples, rate)
    example = python_examples()[1]
    for written, bundled in (("ibm-granite/granite-speech-3.3-2b", "embedded"), (PROMPT_3, PROMPT_4)):
        assert example.count(written) == 1
        example = example.replace(written, bundled)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(example, str(README), "exec"), names)
    assert names["texts"] == [" open menu seven two five stop"] * 2


def test_the_example_of_a_warm_up_runs():
    exec(compile(python_examples()[2], str(README), "exec"), {"model": small_model()})


@pytest.mark.parametrize("document", DOCUMENTS)
def test_mentioned_files_exist(document):
    text = (ROOT / document).read_text()
    folder = (ROOT / document).parent
    missing = [link for link in re.findall(r"\]\((?!https?:)([^)#]+)", text) if not (folder / link).exists()]
    missing += [path for path in re.findall(r"`([\w.-]+/[\w./*-]*)`", text) if not [*ROOT.glob(path), *folder.glob(path)]]
    assert not missing


def test_names_in_the_where_is_table_are_in_the_file_before_them():
    (table,) = re.findall(r"\| Where is .*?\n\n", README.read_text(), re.DOTALL)
    found = re.findall(r"`([\w./]+\.py)`: ((?:`\w+`(?:, )?)+)", table)
    assert found
    for file, names in found:
        for name in re.findall(r"\w+", names):
            assert re.search(rf"^(def )?{name}\b", (ROOT / file).read_text(), re.MULTILINE), f"{file} has no {name}"
