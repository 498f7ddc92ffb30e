"""transformers' `Auto` classes: the snippets of the model cards run with one changed import and give the same text."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers

import granite_speech
from granite_speech import GraniteSpeechConfig, GraniteSpeechForConditionalGeneration, GraniteSpeechProcessor
from granite_speech.errors import CheckpointNotFoundError, InputError, UnsupportedError
from granite_speech.inputs.audio import load_audio
from granite_speech.inputs.tokenizer import GraniteSpeechTokenizer
from tests.support.random_checkpoint import write_checkpoint

SAMPLE = Path(granite_speech.__file__).parent / "assets" / "jfk.flac"

# The calls on the cards of granite-speech-3.3 and 4.1, which differ only in the conversation.
SNIPPET = """
from PACKAGE import AutoModelForSpeechSeq2Seq, AutoProcessor

processor = AutoProcessor.from_pretrained(name)
tokenizer = processor.tokenizer
model = AutoModelForSpeechSeq2Seq.from_pretrained(name, device_map=device, torch_dtype=dtype)
prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
model_inputs = processor(prompt, wav, device=device, return_tensors="pt").to(device)
model_outputs = model.generate(**model_inputs, max_new_tokens=24, do_sample=False, num_beams=1)
new_tokens = model_outputs[0, model_inputs["input_ids"].shape[-1]:].unsqueeze(0)
texts = tokenizer.batch_decode(new_tokens, add_special_tokens=False, skip_special_tokens=True)
"""
CHATS = {
    "3.3": [
        {"role": "system", "content": "You are Granite, developed by IBM. You are a helpful AI assistant"},
        {"role": "user", "content": "<|audio|>can you transcribe the speech into a written format?"},
    ],
    "4.1": [{"role": "user", "content": "<|audio|>transcribe the speech with proper punctuation and capitalization."}],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("random-checkpoint")
    write_checkpoint(folder)
    return folder


def run_snippet(package: str, folder: Path, chat: list, dtype: torch.dtype) -> dict:
    wav = load_audio(SAMPLE)[None, :48000]  # (1, samples), as torchaudio loads a mono file
    names = {"name": str(folder), "device": "cpu", "wav": wav, "chat": chat, "dtype": dtype}
    exec(SNIPPET.replace("PACKAGE", package), names)
    return names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("card", CHATS)
def test_a_model_cards_snippet_gives_the_same_text(folder, card, dtype):
    mine, theirs = (run_snippet(package, folder, CHATS[card], dtype) for package in ("granite_speech", "transformers"))
    assert mine["prompt"] == theirs["prompt"]
    assert torch.equal(mine["model_inputs"]["input_ids"], theirs["model_inputs"]["input_ids"])
    assert mine["model"].dtype == dtype and type(mine["model"]) is GraniteSpeechForConditionalGeneration
    # In bfloat16 two logits of a random model may tie at a later token, and which is larger then depends on the machine.
    same = 24 if dtype == torch.float32 else 4
    assert torch.equal(mine["new_tokens"][:, :same], theirs["new_tokens"][:, :same])
    assert len(mine["texts"]) == 1 and len(mine["texts"][0]) > 5
    assert mine["texts"] == theirs["texts"] or dtype != torch.float32


def test_batch_decode_accepts_transformers_arguments(folder):
    ids = [[1, 70, 300], [5, 6]]
    theirs = transformers.AutoTokenizer.from_pretrained(str(folder))
    processor = granite_speech.AutoProcessor.from_pretrained(folder)
    for one in (processor, processor.tokenizer):
        assert one.batch_decode(ids, add_special_tokens=False) == theirs.batch_decode(ids, add_special_tokens=False)


def test_each_auto_class_loads_its_part(folder):
    assert granite_speech.AutoConfig.from_pretrained(folder) == GraniteSpeechConfig.from_pretrained(folder)
    processor = GraniteSpeechProcessor.from_pretrained(folder)
    assert granite_speech.AutoTokenizer.from_pretrained(str(folder)).encode("the speech") == processor.tokenizer.encode("the speech")
    assert granite_speech.AutoFeatureExtractor.from_pretrained(folder).to_dict() == processor.audio_processor.to_dict()
    config = granite_speech.AutoConfig.from_pretrained(folder)
    assert granite_speech.AutoModelForSpeechSeq2Seq.from_config(config).config is config


AUTO = tuple(name for name in granite_speech.__all__ if name.startswith("Auto") and name != "AutoModelForCTC")  # test_auto_ctc.py


@pytest.mark.parametrize("name", AUTO)
def test_another_model_is_refused_by_name(folder, tmp_path, name):
    for file in folder.glob("*.json*"):
        shutil.copy(file, tmp_path)
    load = getattr(granite_speech, name).from_pretrained
    for model_type in ("whisper", "granite_speech_nar"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        with pytest.raises(UnsupportedError, match=f"model_type '{model_type}'"):
            load(tmp_path)
    with pytest.raises(CheckpointNotFoundError, match="nowhere"):
        load(tmp_path / "nowhere")
    with pytest.raises(InputError, match="trust_remote_cod"):
        load(folder, trust_remote_cod=True)
    assert load(folder, trust_remote_code=True, revision="main") is not None


@pytest.mark.parametrize("name", ["AutoModelForSpeechSeq2Seq", "AutoModel"])
def test_a_part_of_a_model_is_no_model(folder, tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "granite"}))
    with pytest.raises(UnsupportedError, match=r"'granite' for .*part of a model.*Pass the folder of the whole checkpoint"):
        getattr(granite_speech, name).from_pretrained(tmp_path)


def test_part_of_a_model_is_refused_and_a_processor_needs_no_model(folder, tmp_path):
    for file in folder.glob("*.json*"):
        shutil.copy(file, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "granite"}))
    with pytest.raises(UnsupportedError, match="part of a model"):
        granite_speech.AutoProcessor.from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    assert granite_speech.AutoProcessor.from_pretrained(tmp_path).audio_token == "<|audio|>"
    with pytest.raises(CheckpointNotFoundError, match=r"config\.json"):
        granite_speech.AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", AUTO)
def test_an_auto_class_is_not_instantiated(name):
    with pytest.raises(InputError, match=rf"Call {name}\.from_pretrained"):
        getattr(granite_speech, name)()


def test_only_what_is_loaded_anyway_can_be_registered():
    from granite_speech import AutoConfig, AutoModelForSpeechSeq2Seq, GraniteSpeechModel

    AutoConfig.register("granite_speech", GraniteSpeechConfig, exist_ok=True)
    AutoModelForSpeechSeq2Seq.register(GraniteSpeechConfig, GraniteSpeechForConditionalGeneration, exist_ok=True)
    granite_speech.AutoProcessor.register(GraniteSpeechConfig, GraniteSpeechProcessor)
    granite_speech.AutoTokenizer.register(GraniteSpeechConfig, fast_tokenizer_class=GraniteSpeechTokenizer)
    granite_speech.AutoFeatureExtractor.register(GraniteSpeechConfig, granite_speech.GraniteSpeechFeatureExtractor)
    for call in (
        lambda: AutoConfig.register("my_speech", GraniteSpeechConfig),
        lambda: AutoConfig.register("whisper", transformers.WhisperConfig),
        lambda: granite_speech.AutoTokenizer.register(GraniteSpeechConfig, slow_tokenizer_class=transformers.BertTokenizer),
        lambda: granite_speech.AutoProcessor.register("granite_speech", GraniteSpeechProcessor),
        lambda: AutoModelForSpeechSeq2Seq.register(GraniteSpeechConfig, GraniteSpeechModel),
        lambda: AutoModelForSpeechSeq2Seq.register(transformers.WhisperConfig, GraniteSpeechForConditionalGeneration),
    ):
        with pytest.raises(UnsupportedError, match="register"):
            call()
