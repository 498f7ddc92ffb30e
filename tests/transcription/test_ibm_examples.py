"""The Python examples of IBM's package granite-speech 0.0.3 run as they are: those of its README, of its guide for users of whisper and
of its page about model cards.

Their models are stand-ins: for granite-speech-4.1-2b the one inside the package, and for plus one with random weights, whose answers are
replaced by what plus could write.
"""

import inspect
import json
from dataclasses import replace
from typing import Any

import pytest
import soundfile

import granite_speech
from granite_speech.checkpoints import hub
from granite_speech.transcription.load_model import LoadedModel
from granite_speech.transcription.piece import Piece
from granite_speech.transcription.repetition import compression_ratio
from granite_speech.transcription.transcriber import Transcriber
from tests.support.paths import ROOT
from tests.support.random_checkpoint import write_checkpoint

WORDS = "open menu seven two five stop"
KEYS = {"text", "segments", "language", "target_language", "warnings"}

README = """
model = granite_speech.load_model()        # defaults to granite-speech-4.1-2b
result = model.transcribe("audio.wav")     # arbitrary-length audio
print(result["text"])
"""
README_OPTIONS = """
model = granite_speech.load_model(
    "granite-speech-4.1-2b",
    device=None,          # optional llama.cpp device override; use "cpu" for CPU-only
    llama_cpp_quant="Q4_K_M",
)

result = model.transcribe(
    "audio.wav",
    task="transcribe",
    language=None,        # source-language hint only, never detected
    keyword_biases=["Granite Speech", "watsonx.ai"],
    max_new_tokens=None,  # auto-size per window; pass an int to force a cap
    chunk_length=30.0,
    chunk_overlap=0.0,
    segmentation="fixed",  # use "vad" to skip silence and cut on speech activity
    clip_timestamps=None,  # e.g. "10,20" or "10,20,30,45" for selected ranges
)

print(result["text"])
"""
PLUS = """
plus = granite_speech.load_model("granite-speech-4.1-2b-plus")

speakers = plus.transcribe("meeting.wav", prompt_mode="speaker_attributed")
timestamps = plus.transcribe(
    "meeting.wav",
    prompt_mode="word_timestamps",
    max_new_tokens=10000,
)
"""
PREFIX = """
model.transcribe(
    "audio.wav",
    prompt_mode="speaker_attributed",
    prefix_text="[Speaker 1]: Hello how are you",
)
"""
# Each with the task, the language and the target that its result has.
CALLS = {
    "raw": ('model.transcribe("audio.wav", prompt="can you transcribe the speech into a written format?")', None, None),
    "words of one's own": (
        'model.transcribe("audio.wav", prompt="transcribe this earnings call and preserve IBM product names")',
        None,
        None,
    ),
    "whisper's prompt": ('model.transcribe("audio.wav", initial_prompt="transcribe this earnings call")', None, None),
    "keywords": ('model.transcribe("audio.wav", keyword_biases=["kw1", "kw2"])', None, None),
    "other keywords": ('model.transcribe("audio.wav", keyword_biases=["Granite Speech", "watsonx.ai"])', None, None),
    "a translation": ('model.transcribe("fr.wav", task="translate", language="fr")', "fr", "en"),
    "a raw translation": (
        'model.transcribe("audio.wav", task="translate", language="fr", target_language="en", prompt="translate the speech to English.")',
        "fr",
        "en",
    ),
    "a translation to English": ('model.transcribe("audio.wav", task="translate", language="fr", target_language="en")', "fr", "en"),
    "a translation with keywords": (
        'model.transcribe("audio.wav", task="translate", language="en", target_language="de", keyword_biases=["kw1", "kw2"])',
        "en",
        "de",
    ),
}


@pytest.fixture(scope="module")
def plus_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plus")
    write_checkpoint(folder, is_plus=True)
    return folder


@pytest.fixture
def names(tmp_path, monkeypatch, plus_folder) -> dict[str, Any]:
    """What an example can use: the package, and files in the working directory."""
    samples, rate = soundfile.read(ROOT / "granite_speech/assets/sample.flac")
    for name in ("audio", "fr", "meeting"):
        soundfile.write(tmp_path / f"{name}.wav", samples, rate)
    monkeypatch.chdir(tmp_path)
    folders = {"ibm-granite/granite-speech-4.1-2b": hub.EMBEDDED_FOLDER, "ibm-granite/granite-speech-4.1-2b-plus": plus_folder}
    monkeypatch.setattr(hub, "_download", lambda name, *_, **options: folders[name])
    return {"granite_speech": granite_speech}


def answering(monkeypatch, *texts: str) -> list[str]:
    """The windows have these answers, one after another, and then empty ones, whatever the model says.

    Returns: their prompts, a list that grows.
    """
    answer, prompts, rest = Piece.answer, [], iter(texts)
    monkeypatch.setattr(Piece, "answer", lambda piece: replace(answer(piece), text=next(rest, ""), finish_reason="stop"))
    submit = Transcriber._submit

    def submitted(self, model, inputs, **options):
        prompts.append(self.processor.tokenizer.decode(inputs["input_ids"][0]).replace("<|audio|>", ""))
        return submit(self, model, inputs, **options | {"max_new_tokens": 1})

    monkeypatch.setattr(Transcriber, "_submit", submitted)
    return prompts


def check(result: Any) -> None:
    """The keys and types that IBM's README calls stable."""
    assert isinstance(result, dict) and result.keys() >= KEYS and json.loads(json.dumps(result)) == result
    assert isinstance(result["text"], str) and isinstance(result["warnings"], list)
    for number, segment in enumerate(result["segments"]):
        assert segment["id"] == number and isinstance(segment["text"], str)
        assert all(isinstance(segment[name], float) for name in ("start", "end", "temperature"))


def test_the_readmes_first_example(names, capsys):
    exec(README, names)
    assert capsys.readouterr().out == f"{WORDS}\n"
    check(names["result"])


def test_the_readmes_example_of_options(names, capsys):
    with pytest.warns(UserWarning) as caught:
        exec(README_OPTIONS, names)
    assert [str(one.message).split(",")[0] for one in caught] == [
        "llama_cpp_quant ignored: llama.cpp is not used",
        "windows are at most 4 s long",
    ]
    result = names["result"]
    check(result)
    assert capsys.readouterr().out == f"{result['text']}\n" and set(WORDS.split()) & set(result["text"].split())
    assert [one["type"] for one in result["warnings"]] == ["chunk_clamp"]
    assert (result["warnings"][0]["requested"], result["warnings"][0]["applied"]) == (30.0, 4.0)


def test_the_names_of_arguments_are_ibms():
    assert {"device", "llama_cpp_quant", "download_root"} <= inspect.signature(granite_speech.load_model).parameters.keys()
    named = ("sample_rate", "task", "language", "target_language", "prompt", "prompt_mode", "prefix_text", "keyword_biases")
    named += ("max_new_tokens", "num_beams", "temperature", "verbose", "chunk_length", "chunk_overlap", "segmentation")
    named += ("vad_threshold", "vad_min_speech_duration", "vad_min_silence_duration", "vad_speech_pad", "initial_prompt")
    named += ("word_timestamps", "fp16", "clip_timestamps")
    assert set(named) <= inspect.signature(LoadedModel.transcribe).parameters.keys()


@pytest.mark.parametrize("name", CALLS)
def test_calls_of_the_other_pages(names, name):
    call, language, target = CALLS[name]
    exec(f'model = granite_speech.load_model("granite-speech-4.1-2b")\nresult = {call}', names)
    check(names["result"])
    assert (names["result"]["language"], names["result"]["target_language"]) == (language, target)


def test_the_function_of_the_package(names):
    names["result"] = granite_speech.transcribe("audio.wav", model="granite-speech-4.1-2b")
    exec('assert result["text"] and [one["start"] for one in result["segments"]]', names)
    with pytest.warns(UserWarning, match="no model given"):
        assert granite_speech.transcribe("audio.wav")["text"] == WORDS


def test_the_modes_of_plus(names, monkeypatch):
    raw = "[Speaker 1]: Hello there.\n[Speaker 2]: Hi.", "_ [T:30] hello [T:75] world [T:112]"
    prompts = answering(monkeypatch, *raw)
    exec(PLUS, names)
    speakers, timestamps = names["speakers"], names["timestamps"]
    check(speakers)
    check(timestamps)
    assert speakers["text"] == "Hello there. Hi." and speakers["segments"][0]["raw_text"] == raw[0]
    turns = [{"speaker": "Speaker 1", "text": "Hello there."}, {"speaker": "Speaker 2", "text": "Hi."}]
    assert speakers["speakers"] == speakers["segments"][0]["speakers"] == turns
    assert timestamps["text"] == "hello world" and timestamps["segments"][0]["raw_text"] == raw[1] and "speakers" not in timestamps
    assert "Speaker attribution: Transcribe and denote" in prompts[0] and "e.g. hello [T:45] world [T:82]" in prompts[1]


def test_a_call_of_plus_without_a_mode(names, monkeypatch):
    prompts = answering(monkeypatch, "hello [T:45]")
    exec('model = granite_speech.load_model("granite-speech-4.1-2b-plus")\nresult = model.transcribe("audio.wav")', names)
    assert names["result"]["text"] == "hello [T:45]" and "raw_text" not in names["result"]["segments"][0]
    assert " can you transcribe the speech into a written format?" in prompts[0]


def test_an_answer_that_continues_a_text(names, monkeypatch):
    prompts = answering(monkeypatch, " today [Speaker 2]: fine")
    exec(f'model = granite_speech.load_model("granite-speech-4.1-2b-plus")\nresult = {PREFIX.strip()}', names)
    assert prompts[0].endswith("<|end_of_role|>[Speaker 1]: Hello how are you")
    assert names["result"]["text"] == "today fine"
    assert names["result"]["speakers"] == [{"speaker": "Speaker 1", "text": "today"}, {"speaker": "Speaker 2", "text": "fine"}]


def test_only_the_first_window_continues_the_text(names, monkeypatch):
    prompts = answering(monkeypatch, "a", "b", "c")
    with granite_speech.load_model("granite-speech-4.1-2b-plus") as plus:
        assert plus.transcribe("audio.wav", prefix_text="so [Speaker 1] ", chunk_length=2.5)["text"] == "a b c"
    assert [one.partition("assistant<|end_of_role|>")[2] for one in prompts] == ["so [Speaker 1]", *[""] * (len(prompts) - 1)]
    assert len(prompts) > 1


def test_tags_are_no_repetition(names, monkeypatch):
    """zlib makes such an answer much smaller, but not its text. A text that repeats itself would be tried again in smaller windows."""
    raw = " ".join(f"[Speaker {number % 2 + 1}]: {7**number % 997}" for number in range(40))
    prompts = answering(monkeypatch, raw)
    with granite_speech.load_model("granite-speech-4.1-2b-plus") as plus:
        found = plus.transcribe("audio.wav", prompt_mode="speaker_attributed")
    assert compression_ratio(raw) > 2.4 > found.segments[0].compression_ratio and len(found.speakers) == 40
    assert len(prompts) == 1 and found.warnings == []


def test_windows_that_overlap_have_the_turns_of_what_is_left_of_their_texts(names, monkeypatch):
    answering(monkeypatch, "[Speaker 1]: one two three [Speaker 2]: four fi", "[Speaker 1]: four five six seven [Speaker 2]: eight nine")
    with granite_speech.load_model("granite-speech-4.1-2b-plus") as plus:
        found = plus.transcribe("audio.wav", prompt_mode="speaker_attributed", chunk_length=4.0, chunk_overlap=1.5)
    assert found.text == "one two three four five six seven eight nine"
    assert [one.text for one in found.speakers] == ["one two three", "four", "five six seven", "eight nine"]
    assert [" ".join(one.text for one in segment.speakers) for segment in found.segments] == [one.text for one in found.segments]


@pytest.mark.parametrize(
    "options", [{"prompt_mode": "speaker_attributed"}, {"prompt_mode": "word_timestamps"}, {"prefix_text": "previous"}], ids=str
)
def test_other_checkpoints_refuse_what_only_plus_was_trained_on(names, options):
    base = granite_speech.load_model("granite-speech-4.1-2b")
    with pytest.raises(granite_speech.InputError, match=f"{next(iter(options))}.*granite-speech-4.1-2b-plus"):
        base.transcribe("audio.wav", **options)
