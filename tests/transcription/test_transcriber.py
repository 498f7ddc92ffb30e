"""`Transcriber` says when an answer is incomplete, and refuses what the model's context cannot hold."""

import warnings

import pytest
import torch

from granite_speech.errors import AudioError, InputError
from granite_speech.inputs.audio import load_audio
from granite_speech.inputs.requests import transcript_request
from granite_speech.transcription.transcribe import transcribe
from granite_speech.transcription.transcriber import Transcriber, TruncatedAnswerWarning
from tests.support.spoken import SPEECH, load, sentences


@pytest.fixture
def transcriber() -> Transcriber:
    return Transcriber(*load())


@pytest.fixture(scope="module")
def shortest():
    return min(sentences(), key=lambda one: len(one.text))


def test_fp16_false_of_whisper_loads_float32(monkeypatch):
    loaded = []
    monkeypatch.setattr(Transcriber, "from_pretrained", lambda name, **settings: loaded.append(settings) or Transcriber(*load()))
    assert transcribe([], "m", fp16=False) == transcribe([], "m", fp16=False, dtype="float32") == transcribe([], "m", fp16=True) == []
    assert loaded == [{"dtype": "float32"}, {"dtype": "float32"}, {}]
    with pytest.raises(InputError, match="fp16=False"):
        transcribe([], "m", fp16=False, dtype="bfloat16")


def tokens_of(transcriber: Transcriber, text: str) -> int:
    """Tokens of an answer, including the end token."""
    return len(transcriber.processor.tokenizer.encode(" " + text, add_special_tokens=False)) + 1


def test_a_whole_answer_gives_no_warning(transcriber, shortest):
    """Even if the end token is the last one allowed."""
    needed = tokens_of(transcriber, shortest.text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for limit in (needed, needed + 1, 400):
            assert transcriber.transcribe(SPEECH / shortest.audio, max_new_tokens=limit) == shortest.text


@pytest.mark.parametrize("missing", [1, 2])
def test_an_answer_cut_off_by_its_limit_gives_a_warning(transcriber, shortest, missing):
    limit = tokens_of(transcriber, shortest.text) - missing
    with pytest.warns(TruncatedAnswerWarning, match=f"cut off after {limit} tokens, which is max_new_tokens") as caught:
        text = transcriber.transcribe(SPEECH / shortest.audio, max_new_tokens=limit)
    assert shortest.text.startswith(text)
    assert [one.filename for one in caught] == [__file__], "the warning names the caller's line"


def test_an_answer_cut_off_by_the_context_gives_a_warning(transcriber, shortest, monkeypatch):
    request = transcript_request(transcriber.processor)
    prompt = transcriber.processor(request, load_audio(SPEECH / shortest.audio))["input_ids"].shape[1]
    whole = prompt + tokens_of(transcriber, shortest.text)

    def transcribe(context: int) -> str:
        monkeypatch.setattr(transcriber.model.config.text_config, "max_position_embeddings", context)
        return transcriber.transcribe(SPEECH / shortest.audio)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert transcribe(whole) == shortest.text
    for context in (whole - 1, prompt + 1):
        with pytest.warns(
            TruncatedAnswerWarning, match=f"cut off after {context - prompt} tokens, where the model's context of {context} "
        ):
            assert shortest.text.startswith(transcribe(context))
    for context in (prompt, prompt - 1, 1):
        with pytest.raises(AudioError, match=f"whose prompt has {prompt} tokens; expected fewer than the {context} tokens"):
            transcribe(context)


def test_generate_itself_does_not_warn(transcriber):
    model = transcriber.model
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=2, eos_token_id=[])
