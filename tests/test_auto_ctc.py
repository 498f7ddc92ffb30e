"""Auto classes choose by the folder between the two model families, and a wrong one names the right one."""

import json
import shutil

import pytest
import torch
import transformers

import granite_speech
from granite_speech import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForCTC,
    AutoModelForSpeechSeq2Seq,
    AutoProcessor,
    AutoTokenizer,
    GraniteSpeech5CTCConfig,
    GraniteSpeech5Encoder,
    GraniteSpeech5FeatureExtractor,
    GraniteSpeech5ForCTC,
    GraniteSpeech5Processor,
    GraniteSpeechConfig,
    GraniteSpeechModel,
    GraniteSpeechProcessor,
)
from granite_speech.errors import CheckpointNotFoundError, InputError, UnsupportedError
from granite_speech.inputs.ctc_tokenizer import GraniteSpeech5Tokenizer
from tests.support.ctc_tokenizers import write_ctc_tokenizer

SEQ2SEQ = ("AutoModelForSpeechSeq2Seq", "AutoModelForSeq2SeqLM", "AutoModelForMultimodalLM")
# The released model's card, with either package.
SNIPPET = """
from PACKAGE import AutoModelForCTC, AutoProcessor

processor = AutoProcessor.from_pretrained(name)
model = AutoModelForCTC.from_pretrained(name, dtype=torch.float32, device_map="cpu")
inputs = processor(clips, sampling_rate=processor.feature_extractor.sampling_rate, return_tensors="pt").to(model.device, dtype=model.dtype)
ids = model.generate(**inputs)
texts = processor.batch_decode(ids, skip_special_tokens=True)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ctc")
    size = write_ctc_tokenizer(folder)
    encoder = {"vocab_size": size, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = transformers.GraniteSpeech5ForCTC(
        transformers.GraniteSpeech5CTCConfig(vocab_size=size, encoder_config=encoder | {"context_size": 8, "max_position_embeddings": 8})
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    transformers.GraniteSpeech5Processor(transformers.GraniteSpeech5FeatureExtractor(), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def files(folder, tmp_path):
    """The same folder without weights, which may be changed."""
    for file in folder.glob("*.json"):
        shutil.copy(file, tmp_path)
    return tmp_path


def test_a_model_cards_snippet_gives_the_same_text(folder):
    clips = [(torch.randn(16000, generator=torch.Generator().manual_seed(seed)) * 0.1).numpy() for seed in (0, 1)]
    mine, theirs = ({"name": str(folder), "clips": clips, "torch": torch} for _ in range(2))
    exec(SNIPPET.replace("PACKAGE", "granite_speech"), mine)
    exec(SNIPPET.replace("PACKAGE", "transformers"), theirs)
    assert type(mine["model"]) is GraniteSpeech5ForCTC and torch.equal(mine["ids"], theirs["ids"])
    assert mine["texts"] == theirs["texts"] and all(mine["texts"])


def test_each_class_loads_what_transformers_loads(folder):
    for name in ("AutoConfig", "AutoProcessor", "AutoTokenizer", "AutoFeatureExtractor", "AutoModel", "AutoModelForCTC"):
        ours, theirs = (getattr(package, name).from_pretrained(str(folder)) for package in (granite_speech, transformers))
        expected = "GraniteSpeech5Tokenizer" if name == "AutoTokenizer" else type(theirs).__name__
        assert type(ours).__name__ == expected
    assert AutoTokenizer.from_pretrained(folder).decode([5, 5]) == AutoTokenizer.from_pretrained(folder).decode([5])


def test_an_encoder_alone(folder, tmp_path):
    GraniteSpeech5Encoder.from_pretrained(folder).save_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path)) is GraniteSpeech5Encoder
    assert type(transformers.AutoModel.from_pretrained(str(tmp_path))) is transformers.GraniteSpeech5Encoder
    config = AutoConfig.from_pretrained(tmp_path)
    made = AutoModel.from_config(config, dtype=torch.bfloat16)
    assert type(made) is GraniteSpeech5Encoder and made.out.weight.dtype == torch.bfloat16
    with pytest.raises(UnsupportedError, match=r"'granite_speech5_encoder' for AutoModelForCTC.*Load it with AutoModel\b"):
        AutoModelForCTC.from_pretrained(tmp_path)


def test_a_model_is_built_from_a_configuration_of_either_package(folder):
    config = AutoConfig.from_pretrained(folder)
    for given in (config, transformers.AutoConfig.from_pretrained(str(folder)), config.to_dict()):
        for auto in (AutoModelForCTC, AutoModel):
            model = auto.from_config(given, dtype=torch.float32)
            assert type(model) is GraniteSpeech5ForCTC and model.config.encoder_config.hidden_size == 16
    with pytest.raises(UnsupportedError, match="Load it with AutoModelForCTC"):
        AutoModelForSpeechSeq2Seq.from_config(config)
    with pytest.raises(UnsupportedError, match="Load it with AutoModelForSpeechSeq2Seq"):
        AutoModelForCTC.from_config(GraniteSpeechConfig())


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_a_class_of_the_other_family_names_the_right_one(files, name):
    load = getattr(granite_speech, name).from_pretrained
    message = rf"'granite_speech5_ctc' for {name}; expected 'granite_speech' or 'granite_speech_plus'\. Load it with AutoModelForCTC"
    for options in ({}, {"config": AutoConfig.from_pretrained(files)}, {"config": str(files)}):
        with pytest.raises(UnsupportedError, match=message):
            load(files, **options)


def test_the_other_familys_folder_is_refused_by_name_and_still_loads():
    message = r"'granite_speech' for AutoModelForCTC; expected 'granite_speech5_ctc'\. Load it with AutoModelForSpeechSeq2Seq"
    with pytest.raises(UnsupportedError, match=message):
        AutoModelForCTC.from_pretrained("embedded")
    assert type(AutoModel.from_pretrained("embedded")) is GraniteSpeechModel
    assert type(AutoProcessor.from_pretrained("embedded")) is GraniteSpeechProcessor


def test_other_models_and_missing_folders_are_refused(files):
    with pytest.raises(CheckpointNotFoundError, match="nowhere"):
        AutoModelForCTC.from_pretrained(files / "nowhere")
    with pytest.raises(InputError, match="trust_remote_cod"):
        AutoModelForCTC.from_pretrained(files, trust_remote_cod=True)
    with pytest.raises(InputError, match="no folder and no config"):
        AutoModelForCTC.from_pretrained(None)
    (files / "config.json").write_text(json.dumps({"model_type": "whisper"}))
    with pytest.raises(UnsupportedError, match=r"'whisper'; expected .*'granite_speech5_ctc'"):
        AutoModelForCTC.from_pretrained(files)
    (files / "config.json").unlink()
    with pytest.raises(CheckpointNotFoundError, match=r"config\.json"):
        AutoModelForCTC.from_pretrained(files)


def test_a_folder_with_only_a_processor(files):
    (files / "config.json").unlink()
    assert type(AutoProcessor.from_pretrained(files)) is GraniteSpeech5Processor
    for kept in ("processor_config.json", "tokenizer_config.json"):
        others = [file for file in files.glob("*_config.json") if file.name != kept]
        parked = [file.rename(file.with_suffix(".parked")) for file in others]
        assert kept != "processor_config.json" or type(AutoFeatureExtractor.from_pretrained(files)) is GraniteSpeech5FeatureExtractor
        assert type(AutoTokenizer.from_pretrained(files)) is GraniteSpeech5Tokenizer
        for file in parked:
            file.rename(file.with_suffix(".json"))


def test_only_what_is_loaded_anyway_can_be_registered():
    AutoConfig.register("granite_speech5_ctc", GraniteSpeech5CTCConfig)
    AutoModelForCTC.register(GraniteSpeech5CTCConfig, GraniteSpeech5ForCTC, exist_ok=True)
    AutoProcessor.register(GraniteSpeech5CTCConfig, GraniteSpeech5Processor)
    AutoTokenizer.register(GraniteSpeech5CTCConfig, fast_tokenizer_class=GraniteSpeech5Tokenizer)
    AutoFeatureExtractor.register(GraniteSpeech5CTCConfig, GraniteSpeech5FeatureExtractor)
    for call in (
        lambda: AutoModelForCTC.register(GraniteSpeechConfig, GraniteSpeech5ForCTC),
        lambda: AutoModelForSpeechSeq2Seq.register(GraniteSpeech5CTCConfig, GraniteSpeech5ForCTC),
        lambda: AutoProcessor.register(GraniteSpeech5CTCConfig, GraniteSpeechProcessor),
        lambda: AutoFeatureExtractor.register(transformers.WhisperConfig, GraniteSpeech5FeatureExtractor),
    ):
        with pytest.raises(UnsupportedError, match="register"):
            call()


def test_an_auto_class_is_not_instantiated():
    with pytest.raises(InputError, match=r"a model loaded or built .*Call AutoModelForCTC\.from_pretrained"):
        AutoModelForCTC()
