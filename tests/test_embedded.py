"""The embedded checkpoint transcribes speech correctly, and no longer does when one of its parts is damaged."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from granite_kernels.op import CHOICE

import granite_speech
from granite_speech import GraniteSpeechForConditionalGeneration, GraniteSpeechProcessor
from granite_speech.checkpoints.hub import EMBEDDED_FOLDER
from granite_speech.cli import main
from granite_speech.modules.fused_layers import FusedLayers
from granite_speech.training import transcripts
from granite_speech.training.bundled_checkpoint.vocabulary import VOCABULARY
from tests.support.spoken import SPEECH, assert_understood, load, sentences

SAMPLE = Path(granite_speech.__file__).parent / "assets" / "sample.flac"
SAMPLE_WORDS = "open menu seven two five stop"


@pytest.fixture(scope="module")
def embedded():
    return load()


def test_twelve_sentences_are_transcribed_correctly(embedded):
    assert_understood(*embedded)


def test_the_twelve_sentences_are_varied():
    texts = [one.text for one in sentences()]
    assert len(set(texts)) == 12 and {len(text.split()) for text in texts} == {1, 2, 3, 4, 5, 6, 8}
    assert len({word for text in texts for word in text.split()}) > 12
    assert all(one.voice.startswith("espeak-ng:") for one in sentences())


def without_adapter(model):
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.zero_()


def without_ctc_feedback(model):
    model.encoder.out_mid.weight.zero_()
    model.encoder.out_mid.bias.zero_()


def with_shifted_positions(model):
    for layer in model.encoder.layers:
        layer.attn.rel_pos_emb.weight.copy_(layer.attn.rel_pos_emb.weight.roll(1, 0))


@pytest.mark.parametrize("damage", [without_adapter, without_ctc_feedback, with_shifted_positions])
def test_a_damaged_model_is_caught(damage):
    model, processor = load()
    with torch.no_grad():
        damage(model)
    with pytest.raises(AssertionError):
        assert_understood(model, processor)


@pytest.mark.parametrize(
    ("multiplier", "plain"),
    [("embedding_multiplier", 1.0), ("attention_multiplier", 32**-0.5), ("residual_multiplier", 1.0), ("logits_scaling", 1.0)],
)
def test_a_missing_multiplier_is_caught(multiplier, plain, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(EMBEDDED_FOLDER, folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["text_config"][multiplier] != plain
    config["text_config"][multiplier] = plain
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(AssertionError):
        assert_understood(*load(folder))


def test_without_the_adapter_the_language_model_does_its_own_task(embedded):
    model, processor = embedded
    chats = [[{"role": "user", "content": f"write the digits as words: {digits}"}] for digits in ("4 0", "7 1 9", "2", "3 3 5 8")]
    inputs = processor([processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats])
    ids = model.generate(**inputs, max_new_tokens=60)
    answers = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert [one.strip() for one in answers] == ["four zero", "seven one nine", "two", "three three five eight"]


def test_the_kernels_give_the_same_words(embedded, monkeypatch):
    shortest = min(sentences(), key=lambda one: one.count_samples(16_000))
    monkeypatch.setenv(CHOICE, "triton")
    steps, run = [], FusedLayers._few_rows
    monkeypatch.setattr(FusedLayers, "_few_rows", lambda *arguments: steps.append(1) or run(*arguments))
    assert transcripts(*embedded, [shortest]) == [shortest.text]
    assert steps


def test_transformers_gives_the_same_words(embedded):
    transformers = pytest.importorskip("transformers")
    reference = transformers.GraniteSpeechForConditionalGeneration.from_pretrained(EMBEDDED_FOLDER).eval()
    processor = transformers.AutoProcessor.from_pretrained(EMBEDDED_FOLDER)
    chat = [{"role": "user", "content": "<|audio|>transcribe the speech with proper punctuation and capitalization."}]
    prompt = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    for one in sentences()[:6]:
        inputs = processor(prompt, one.waveform(16_000), return_tensors="pt")
        with torch.no_grad():
            ids = reference.generate(**inputs, max_new_tokens=60, do_sample=False, num_beams=1)
        assert processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip() == one.text


def test_the_command_uses_the_embedded_checkpoint_and_says_so(capfd):
    assert main(["transcribe", str(SAMPLE)]) == 0
    printed = capfd.readouterr()
    assert printed.out == SAMPLE_WORDS + "\n"
    assert "inside the package" in printed.err and f"{len(VOCABULARY)} English words" in printed.err


def test_the_auto_classes_load_the_embedded_checkpoint():
    processor = granite_speech.AutoProcessor.from_pretrained("embedded")
    model = granite_speech.AutoModelForSpeechSeq2Seq.from_pretrained("embedded")
    assert isinstance(processor, GraniteSpeechProcessor) and isinstance(model, GraniteSpeechForConditionalGeneration)
    assert model.dtype == torch.float32


def test_a_checkpoint_folder_named_embedded_takes_precedence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("embedded").mkdir()
    assert GraniteSpeechForConditionalGeneration.from_pretrained("embedded").dtype == torch.float32
    Path("embedded/config.json").write_text("{}")
    with pytest.raises(granite_speech.errors.GraniteSpeechError):
        GraniteSpeechForConditionalGeneration.from_pretrained("embedded")


def test_the_embedded_checkpoint_is_small():
    assert sum(file.stat().st_size for file in EMBEDDED_FOLDER.glob("*.safetensors")) <= 8_000_000
    assert sum(file.stat().st_size for file in SPEECH.glob("*")) <= 1_000_000
