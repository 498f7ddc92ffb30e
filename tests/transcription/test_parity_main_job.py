"""Transcription against transformers: the same folder and recording give the same ids and words."""

from pathlib import Path

import pytest
import torch
import transformers

import granite_speech
from granite_speech.errors import AudioError
from granite_speech.inputs.audio import load_audio
from granite_speech.inputs.requests import PROMPT_4
from granite_speech.transcription.transcriber import Transcriber
from tests.support.random_checkpoint import write_checkpoint

SAMPLE = Path(granite_speech.__file__).parent / "assets" / "jfk.flac"
STEPS = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("random-checkpoint")
    write_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def ours(folder) -> Transcriber:
    return Transcriber.from_pretrained(folder, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def theirs(folder) -> tuple:
    return (
        transformers.AutoModelForSpeechSeq2Seq.from_pretrained(str(folder)),
        transformers.AutoProcessor.from_pretrained(str(folder)),
    )


def sweep(seconds: float, low: float, high: float) -> torch.Tensor:
    """A rising tone with a little noise."""
    time = torch.arange(int(16000 * seconds)) / 16000
    noise = torch.randn(len(time), generator=torch.Generator().manual_seed(int(low)))
    return 0.3 * torch.sin(2 * torch.pi * (low + (high - low) * time / (2 * seconds)) * time) + 0.01 * noise


@pytest.mark.parametrize("recording", ["speech", "short sweep", "long sweep"])
def test_ids_and_words(recording, ours, theirs):
    samples = {
        "speech": lambda: load_audio(SAMPLE),
        "short sweep": lambda: sweep(0.7, 200, 3000),
        "long sweep": lambda: sweep(17.3, 90, 7000),
    }
    audio = samples[recording]()
    model, processor = theirs
    chat = [{"role": "user", "content": f"<|audio|>{PROMPT_4}"}]
    prompt = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    inputs = processor(prompt, audio[None], return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False)

    mine = ours.processor(prompt, audio)
    assert torch.equal(mine["input_ids"], inputs["input_ids"])
    assert torch.equal(ours.model.generate(**mine, max_new_tokens=STEPS), expected)
    words = processor.decode(expected[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert ours.transcribe(audio, max_new_tokens=STEPS) == words
    assert len(set(expected[0, -STEPS:].tolist())) > 5  # a model that repeats itself would agree with anything


def test_the_recording_and_the_prompt_affect_the_answer(ours):
    speech, tone = load_audio(SAMPLE), sweep(3.0, 100, 900)
    answers = {ours.transcribe(speech, max_new_tokens=STEPS), ours.transcribe(tone, max_new_tokens=STEPS)}
    answers.add(ours.transcribe(speech, prompt="translate the speech to German.", max_new_tokens=STEPS))
    assert len(answers) == 3
    assert ours.transcribe(str(SAMPLE), max_new_tokens=STEPS) in answers


def test_a_clip_too_short_for_an_audio_token_is_refused(ours):
    """Without audio tokens the model would invent words."""
    short, clip = torch.zeros(159), sweep(1.0, 300, 600)
    with pytest.raises(AudioError, match="clip 0 has 159 samples, too few for one audio token"):
        ours.transcribe(short)
    with pytest.raises(AudioError, match="clip 1 has 159 samples"):
        ours.processor(["<|audio|>what?", "<|audio|>what?"], [clip, short])
    assert ours.processor("<|audio|>what?", torch.zeros(160))["input_features_lengths"].tolist() == [1]
