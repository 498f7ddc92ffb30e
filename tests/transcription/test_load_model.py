"""`load_model`: names of checkpoints, what its object has, and the dictionary that its `transcribe` returns."""

import copy
import json
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_args, get_overloads, get_type_hints

import pytest
import soundfile
import torch

import granite_speech
from granite_speech import (
    AudioError,
    CheckpointError,
    CheckpointNotFoundError,
    EngineError,
    InputError,
    Transcript,
    TranscriptionResult,
    TranscriptWarning,
    TruncatedAnswerWarning,
    load_audio,
)
from granite_speech.checkpoints.hub import EMBEDDED_FOLDER
from granite_speech.transcription.load_model import LoadedModel
from granite_speech.transcription.piece import Piece
from granite_speech.transcription.transcriber import Transcriber
from tests.support.spoken import SPEECH, load, sentences

FIRST, SECOND = [one for one in sentences() if " " in one.text][:2]
FILES = [SPEECH / FIRST.audio, SPEECH / SECOND.audio]


@pytest.fixture(scope="module")
def model():
    with granite_speech.load_model("embedded", device="cpu") as model:
        yield model


@pytest.fixture
def loaded(monkeypatch) -> list[tuple]:
    """What is loaded, in place of loading it."""
    calls = []
    monkeypatch.setattr(Transcriber, "from_pretrained", lambda name, **settings: calls.append((name, settings)))
    return calls


# --- names ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, meant",
    [
        ("granite-speech-4.1-2b", "ibm-granite/granite-speech-4.1-2b"),
        ("granite-speech-4.1-2b-GGUF", "ibm-granite/granite-speech-4.1-2b"),
        ("ibm-granite/granite-speech-4.1-2b-plus-GGUF", "ibm-granite/granite-speech-4.1-2b-plus"),
        ("granite-4.0-1b-speech", "ibm-granite/granite-4.0-1b-speech"),
        ("ibm-granite/granite-speech-3.3-8b", "ibm-granite/granite-speech-3.3-8b"),
        ("somebody/tuned-GGUF", "somebody/tuned-GGUF"),
        ("embedded", "embedded"),
        (EMBEDDED_FOLDER, EMBEDDED_FOLDER),
        (str(EMBEDDED_FOLDER), str(EMBEDDED_FOLDER)),
    ],
)
def test_what_a_name_means(loaded, name, meant):
    assert granite_speech.load_model(name).name == str(name)
    assert [one for one, _ in loaded] == [meant]


def test_every_model_that_is_available_has_a_place(loaded):
    for name in granite_speech.available_models():
        granite_speech.load_model(name)
    places = [one for one, _ in loaded]
    assert places.pop() == "embedded" and all(one.startswith("ibm-granite/granite-") for one in places)
    granite_speech.load_model()
    assert loaded[-1][0] == places[0] == "ibm-granite/granite-speech-4.1-2b"


def test_a_folder_takes_precedence_over_a_name(loaded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("large", "granite-speech-4.1-2b-GGUF", "b.gguf"):
        Path(name).mkdir()
        granite_speech.load_model(name)
    assert [one for one, _ in loaded] == ["large", "granite-speech-4.1-2b-GGUF", "b.gguf"]


@pytest.mark.parametrize(
    "name", ["tiny", "base.en", "small", "medium", "large", "large-v3", "large-v3-turbo", "turbo", "openai/whisper-large-v3"]
)
def test_models_of_whisper_are_refused_with_the_names_that_exist(name):
    with pytest.raises(CheckpointNotFoundError, match=r"a model of whisper; expected one of granite-speech-4\.1-2b, .*embedded, a folder"):
        granite_speech.load_model(name)


def test_other_names_that_cannot_be_loaded():
    with pytest.raises(CheckpointError, match=r"the GGUF file 'models/granite\.gguf'; expected the checkpoint that it was made from"):
        granite_speech.load_model("models/granite.gguf")
    with pytest.raises(CheckpointNotFoundError, match="'nothing'"):
        granite_speech.load_model("nothing")
    with pytest.raises(InputError, match="type int"):
        granite_speech.load_model(3)


def test_how_it_is_loaded(loaded):
    with pytest.warns(UserWarning, match="^llama_cpp_quant, llama_cpp_timeout ignored: llama.cpp is not used$") as caught:
        granite_speech.load_model("embedded", device="cpu", download_root="cache", llama_cpp_quant="Q8_0", llama_cpp_timeout=5.0)
    assert [one.filename for one in caught] == [__file__]
    granite_speech.load_model(
        "embedded", device="auto", dtype="bfloat16", quantize="int8", revision="main", local_files_only=True, token="secret"
    )
    usual = dict.fromkeys(("device", "dtype", "quantize", "cache_dir", "revision", "token")) | {"local_files_only": False}
    assert loaded[0] == ("embedded", usual | {"device": "cpu", "cache_dir": "cache"})
    other = {"dtype": "bfloat16", "quantize": "int8", "revision": "main", "local_files_only": True, "token": "secret"}
    assert loaded[1] == ("embedded", usual | other)


# --- the object -------------------------------------------------------------------------------------------------------------------------


def test_what_a_model_has(model):
    assert isinstance(model.model, granite_speech.GraniteSpeechForConditionalGeneration)
    assert isinstance(model.processor, granite_speech.GraniteSpeechProcessor) and model.tokenizer is model.processor.tokenizer
    assert model.device == torch.device("cpu") and model.name == "embedded" and "'embedded'" in repr(model)


def test_it_works_again_after_it_was_closed_and_as_a_copy():
    with LoadedModel(Transcriber(*load()), "embedded") as model:
        assert model.transcribe(FILES[0])["text"] == FIRST.text
    assert model.transcriber._engine is None
    again = pickle.loads(pickle.dumps(model))
    assert again.transcribe(FILES[0]) == model.transcribe(FILES[0]) and again.name == "embedded"
    model.close()
    again.close(cancel=True)


def test_several_threads_use_one_model(model):
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(model.transcribe, FILES * 4))
    assert [one.text for one in results] == [FIRST.text, SECOND.text] * 4


def test_the_function_of_the_package_takes_a_loaded_model(model):
    assert granite_speech.transcribe(FILES[0], model) == FIRST.text
    assert [one.text for one in granite_speech.transcribe(FILES[0], model=model, stream=True)] == [FIRST.text]


# --- transcribe -------------------------------------------------------------------------------------------------------------------------


def test_a_list_gives_a_list(model):
    results = model.transcribe(FILES)
    assert [one.text for one in results] == [FIRST.text, SECOND.text] and all(type(one) is TranscriptionResult for one in results)
    assert model.transcribe(tuple(FILES[:1]))[0] == results[0] and model.transcribe([]) == []


def test_type_checkers_take_a_path_for_one_recording_and_a_list_for_several():
    for function, result in (
        (LoadedModel.transcribe, TranscriptionResult),
        (Transcriber.transcribe, Transcript),
        (granite_speech.transcribe, Transcript),
    ):
        # Checkers take the first one that fits, and a str is a sequence of str.
        one, several = map(get_type_hints, get_overloads(function)[:2])
        assert str in get_args(one["audio"]) and one["return"] is result
        assert several["return"] == list[result]


def test_the_rate_of_an_array_has_two_names(model):
    slow = load_audio(FILES[0])[::2].numpy()
    expected = model.transcribe(slow, sampling_rate=8000)
    assert expected.duration == pytest.approx(2 * len(slow) / 16_000, abs=1e-3)
    assert model.transcribe(slow, sample_rate=8000) == expected
    assert model.transcribe(slow, sample_rate=8000, sampling_rate=8000) == expected
    assert granite_speech.transcribe(slow, model, sample_rate=8000) == expected.text
    with pytest.raises(InputError, match="sampling_rate=16000 and sample_rate=8000; expected one of them"):
        model.transcribe(slow, sample_rate=8000, sampling_rate=16_000)


@pytest.fixture
def options(model, monkeypatch) -> list:
    """The options of each call, which is not made."""
    calls = []

    def taken(self, model, options, sampling_rate):
        calls.append(options)
        raise AudioError(got="enough", expected="no more", remedy="Stop")

    monkeypatch.setattr(Transcriber, "_setup", taken)
    return calls


@pytest.mark.parametrize(
    "call, expected",
    [
        ({}, True),
        ({"word_timestamps": False}, False),
        ({"task": "translate", "language": "fr"}, False),
        ({"prompt_mode": "speaker_attributed"}, True),
        ({"prompt_mode": "word_timestamps"}, False),
        ({"prompt_mode": "word_timestamps", "word_timestamps": True}, True),
    ],
    ids=str,
)
def test_words_have_times_unless_it_is_a_translation_or_the_model_writes_them(model, options, call, expected):
    with pytest.raises(AudioError, match="enough"):
        model.transcribe(FILES[0], **call)
    assert [one.word_timestamps for one in options] == [expected]


def test_options_reach_the_transcriber(model, options):
    call = {"language": "de", "keywords": ["a"], "temperature": (0.2, 0.4), "chunk_length": 3.0, "clip_timestamps": "1,2"}
    call |= {"initial_prompt": "go", "segmentation": "vad", "compression_ratio_threshold": None, "errors": "warn", "max_new_tokens": 9}
    with pytest.raises(AudioError, match="enough"):
        model.transcribe(FILES[0], **call)
    [found] = options
    assert (found.language, found.keywords, found.temperature, found.chunk_length) == ("de", ["a"], 0.2, 3.0)
    assert (found.clip_timestamps, found.prompt, found.segmentation) == (((1.0, 2.0),), "go", "vad")
    assert (found.compression_ratio_threshold, found.errors, found.max_new_tokens) == (None, "warn", 9)


@pytest.mark.parametrize(
    "call, message",
    [
        ({"beam_size": 5}, "beam_size=5"),
        ({"num_beams": 2}, "num_beams=2"),
        ({"vad_threshold": 0.5}, "vad_threshold=0.5"),
        ({"keywords": "a", "keyword_biases": "b"}, "keyword_biases and keywords"),
        ({"prompt": "a", "initial_prompt": "b"}, "initial_prompt and prompt"),
        ({"stream": True}, "stream=True"),
        ({"wrong": 1}, "'wrong'"),
    ],
    ids=str,
)
def test_options_that_cannot_be_used_are_named(model, call, message):
    with pytest.raises(InputError, match=message):
        model.transcribe(FILES[0], **call)


def test_options_of_whisper_that_mean_nothing_here_are_warned_of(model):
    ignored = {"condition_on_previous_text": True, "carry_initial_prompt": True, "append_punctuations": "!"}
    with pytest.warns(UserWarning) as caught:
        result = model.transcribe(FILES[0], **ignored)
    assert result.text == FIRST.text and {one.filename for one in caught} == {__file__}
    assert [str(one.message).partition(" ignored: ")[0] for one in caught] == list(ignored)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model.transcribe(FILES[0], condition_on_previous_text=False, best_of=5, verbose=False, stream=False) == result


@pytest.mark.parametrize(
    "dtype, fits, other", [("float32", False, "bfloat16"), ("bfloat16", True, "float32"), ("float16", True, "float32")]
)
def test_fp16_of_whisper_is_warned_of_if_the_model_has_another_dtype(dtype, fits, other):
    with granite_speech.load_model("embedded", device="cpu", dtype=dtype) as model, warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model.transcribe(FILES[0], fp16=fits).text == FIRST.text
        message = f"fp16={not fits} ignored: the model is in {dtype}. Pass dtype='{other}' to load_model"
        with pytest.warns(UserWarning, match=message):
            model.transcribe(FILES[0], fp16=not fits)


def test_verbose_prints_the_texts_of_segments(model, capsys):
    samples = torch.cat([torch.cat([load_audio(file), torch.zeros(32_000)]) for file in FILES])
    model.transcribe(samples, verbose=True)
    assert capsys.readouterr() == ("", f"{FIRST.text}\n{SECOND.text}\n")
    model.transcribe(samples)
    assert capsys.readouterr() == ("", "")


# --- the result -------------------------------------------------------------------------------------------------------------------------


def test_the_result_is_a_dictionary_with_attributes(model):
    result = model.transcribe(FILES[0], language="en")
    assert isinstance(result, dict) and type(result) is TranscriptionResult and result["text"] == result.text == FIRST.text
    assert {"text", "segments", "language", "target_language", "warnings", "confidence", "compression_ratio", "duration"} <= result.keys()
    segment = result.segments[0]
    assert isinstance(segment, dict) and segment.start == segment["start"] == result["segments"][0]["start"] and segment.id == 0
    assert (result.language, result.target_language, result.warnings) == ("en", None, [])
    assert result.duration == pytest.approx(soundfile.info(FILES[0]).duration, abs=1e-3)
    assert result.get("speakers", 0) == 0 and not hasattr(result, "speakers") and "segments" in dir(result)
    with pytest.raises(AttributeError, match="no 'seek' here, only id, start, end"):
        _ = segment.seek
    with pytest.raises(KeyError):
        result["seek"]


def test_the_result_goes_through_json_pickle_and_copies(model):
    result = model.transcribe(FILES[0])
    assert json.loads(json.dumps(result)) == result
    for other in (copy.copy(result), copy.deepcopy(result), pickle.loads(pickle.dumps(result)), pickle.loads(pickle.dumps(result, 0))):
        assert other == result and type(other) is TranscriptionResult and other.segments[0].start == result.segments[0].start
    assert type(result.copy()) is TranscriptionResult and result.copy() == result == TranscriptionResult(dict(result))


def test_the_result_can_be_changed_like_a_dictionary():
    result = TranscriptionResult(text="a", segments=[{"start": 1}])
    result.text, result["more"] = "b", {"of": [{"it": 2}]}
    result.update({"words": ({"word": "b"},)}, speakers=[])
    assert result["text"] == "b" and result.more.of[0].it == 2 and result.words[0].word == "b" and result.speakers == []
    assert result.setdefault("text", "c") == "b" and result.setdefault("rest", {"x": 1}).x == 1
    united = result | {"last": {"x": 2}}
    result |= {"next": {"x": 1}}
    assert united.last.x == 2 and "last" not in result and result.next.x == 1
    del result.rest
    assert "rest" not in result and type(result.copy().more).__name__ == "Item"
    with pytest.raises(AttributeError, match="rest"):
        del result.rest


def test_languages_are_those_of_the_call(model):
    translation = model.transcribe(FILES[0], task="translate", language="French")
    assert (translation.language, translation.target_language) == ("French", "en") and "words" not in translation
    assert model.transcribe(FILES[0], task="translate", target_language="German").target_language == "German"


def failing(monkeypatch, bad, error) -> None:
    """The windows that `bad` chooses by their start fail."""
    answer = Piece.answer

    def failed(piece: Piece):
        if bad(piece.window.start):
            raise error
        return answer(piece)

    monkeypatch.setattr(Piece, "answer", failed)


def test_a_window_that_fails_is_a_warning_with_ibms_keys(model, monkeypatch):
    failing(monkeypatch, lambda start: start > 1, RuntimeError("no memory"))
    samples = torch.cat([load_audio(FILES[0]), torch.zeros(32_000), load_audio(FILES[1])])
    with pytest.warns(TranscriptWarning, match="no memory") as caught:
        result = model.transcribe(samples)
    assert [one.filename for one in caught] == [__file__]
    assert result.text == FIRST.text
    failed, [note] = result.segments[1], result.warnings
    assert failed.error == "no memory" and failed.text == ""
    assert note.type == "window_error" and {key: note[key] for key in failed} == failed and "no memory" in note.message


def test_errors_of_a_recording_are_raised(model, monkeypatch):
    with pytest.raises(AudioError, match="does not exist"):
        model.transcribe("nowhere.wav")
    with pytest.raises(AudioError, match=r"recording 1 \('nowhere.wav'\)"):
        model.transcribe([FILES[0], "nowhere.wav"])
    failing(monkeypatch, lambda start: True, RuntimeError("no memory"))
    with pytest.raises(EngineError, match="no memory"):
        model.transcribe(FILES[0])


def test_warnings_name_the_callers_line(model):
    for call in (model.transcribe, model.transcriber.transcribe, lambda file, **options: granite_speech.transcribe(file, model, **options)):
        with pytest.warns(TruncatedAnswerWarning) as caught:
            call(FILES[0], max_new_tokens=1)
        assert [one.filename for one in caught] == [__file__]
