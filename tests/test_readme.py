"""The README's Python examples run, and the files and names that the documents mention exist."""

import re
from types import CodeType

import pytest
import soundfile
import transformers

from granite_speech.checkpoints.hub import EMBEDDED_FOLDER
from granite_speech.inputs.requests import PROMPT_3, PROMPT_4
from granite_speech.interop.accelerate import acceleration_of
from tests.support import ctc_speech
from tests.support.paths import ROOT
from tests.support.small_models import small_model

README = ROOT / "README.md"
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "bench/results/README.md", "granite_speech/assets/README.md", "kernels/README.md")


NAMES = ("one recording", "many recordings", "words", "IBM's package", "TurboCTC", "two doors", "a batch", "an engine", "a warm-up")
WORDS = "open menu seven two five stop"


def example(name: str, **replaced: str) -> CodeType:
    """A Python example of the README, with some of its strings replaced."""
    text = dict(zip(NAMES, re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL), strict=True))[name]
    for written, ours in replaced.values():
        assert text.count(written) == 1
        text = text.replace(written, ours)
    return compile(text, str(README), "exec")


MODEL = ("ibm-granite/granite-speech-3.3-2b", "embedded")


@pytest.fixture
def recordings(tmp_path, monkeypatch):
    """A folder with the files that the examples name."""
    samples, rate = soundfile.read(ROOT / "granite_speech/assets/sample.flac")
    soundfile.write(tmp_path / "speech.wav", samples, rate)
    for name in ("interview.mp3", "talk.mp3"):
        soundfile.write(tmp_path / name, samples, rate)
    monkeypatch.chdir(tmp_path)


def test_the_examples_of_one_and_of_many_recordings_print_their_words(recordings, monkeypatch, capsys):
    names = {}
    with monkeypatch.context() as patched:
        patched.chdir(ROOT)
        exec(example("one recording"), names)
    text, *segments, warnings = capsys.readouterr().out.splitlines()
    assert (text, warnings) == (WORDS, "()") and " ".join(line.partition(" s: ")[2] for line in segments) == WORDS
    with monkeypatch.context() as patched:
        patched.chdir(ROOT)
        exec(example("words"), names)
    lines = capsys.readouterr().out.splitlines()
    assert [re.fullmatch(r"[0-9.]+ to [0-9.]+ s: (\w+) \((?:0|1)\.[0-9]+\)", line)[1] for line in lines] == WORDS.split()
    exec(example("many recordings"), names)
    assert names["results"] == [WORDS] * 2
    assert capsys.readouterr().out.split() == f"{WORDS} {WORDS} {WORDS}".split()


def test_the_example_of_ibms_package_transcribes_its_file(recordings, capsys):
    exec(example("IBM's package", model=("granite-speech-4.1-2b", "embedded")))
    text, start, confidence = capsys.readouterr().out.rsplit(maxsplit=2)
    assert text == WORDS and float(start) >= 0 and 0 < float(confidence) <= 1


def test_the_example_of_turboctc_transcribes_tones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = {"speech.wav": ["two", "one"], "interview.mp3": ["four"], "talk.mp3": ["three", "two", "four"]}
    for name, words in said.items():
        soundfile.write(name, ctc_speech.sound(words)[0].numpy(), ctc_speech.RATE)
    names = {}
    exec(example("TurboCTC", model=("ibm-granite/granite-speech-5.0-470m-turboctc", str(ctc_speech.TONES))), names)
    assert names["texts"] == ["two one", "four"] and names["result"] == "three two four"
    assert [word.word for word in names["result"].words] == said["talk.mp3"]


def test_the_example_of_two_doors_gives_the_model_of_transformers():
    names = {}
    exec(example("two doors", model=(MODEL[0], str(EMBEDDED_FOLDER))), names)
    assert isinstance(names["model"], transformers.GraniteSpeechForConditionalGeneration)
    assert acceleration_of(names["model"]) is not None


def test_the_example_of_a_batch_transcribes_its_files(recordings):
    names = {}
    exec(example("a batch", model=MODEL, request=(PROMPT_3, PROMPT_4)), names)
    assert names["texts"] == [f" {WORDS}"] * 2


def test_the_example_of_an_engine_transcribes_its_files(recordings, capsys):
    names = {}
    exec(example("an engine", model=MODEL), names)
    out = capsys.readouterr().out
    assert out.startswith(f" {WORDS}<|end_of_text|>")
    assert f"\n {WORDS}\nCounters(" in out
    assert names["answer"].finish_reason in ("stop", "length", "repeated")
    assert names["first"].done and names["engine"].counters().finished == 3


def test_the_example_of_a_warm_up_runs():
    exec(example("a warm-up"), {"model": small_model()})


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
