"""The processor against transformers' GraniteSpeechProcessor: single clips at lengths around every boundary, and files."""

import importlib
import json
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from granite_speech.errors import AudioError, CheckpointNotFoundError, InputError, MissingDependencyError, UnsupportedError
from granite_speech.inputs.features import GraniteSpeechFeatureExtractor, count_frames
from granite_speech.inputs.processor import GraniteSpeechProcessor
from granite_speech.inputs.tokenizer import GraniteSpeechTokenizer
from tests.support.small_tokenizer import write_tokenizer

transformers = importlib.import_module("transformers")

TOLERANCE = 2e-5
PROMPT = "USER: <|audio|>transcribe the speech with proper punctuation and capitalization.\n ASSISTANT:"
HOP, PAIR, WINDOW = 160, 320, 4800
# transformers fails under 257 samples. Each boundary, and one sample to either side of it.
LENGTHS = sorted(
    {
        boundary + offset
        for boundary in (400, 512, 2 * HOP, 3 * HOP, 2 * PAIR, 3 * PAIR, WINDOW - HOP, WINDOW, WINDOW + HOP, 2 * WINDOW, 5 * WINDOW)
        for offset in (-1, 0, 1)
    }
    | {257, 16000, 80000}
)


def clip(samples: int, seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(samples + seed)
    time = torch.arange(samples) / 16000
    return 0.3 * torch.sin(2 * torch.pi * (200 + 400 * time) * time) + 0.05 * torch.randn(samples, generator=rng)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processor")
    write_tokenizer(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = transformers.GraniteSpeechProcessor(transformers.GraniteSpeechFeatureExtractor(), tokenizer)
    theirs.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def ours(folder):
    return GraniteSpeechProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def theirs(folder):
    return transformers.AutoProcessor.from_pretrained(folder)


def assert_alike(batch, expected):
    assert set(batch) - {"input_features_lengths"} == set(expected)
    for name in expected:
        assert batch[name].dtype == expected[name].dtype
        assert batch[name].shape == expected[name].shape
        if name == "input_features":
            torch.testing.assert_close(batch[name], expected[name], rtol=0, atol=TOLERANCE)
        else:
            assert torch.equal(batch[name], expected[name])


@pytest.mark.parametrize("samples", LENGTHS)
def test_single_clips(ours, theirs, samples):
    sound = clip(samples)
    assert_alike(ours(PROMPT, sound, return_tensors="pt"), theirs(PROMPT, sound, return_tensors="pt"))


@settings(max_examples=15, deadline=None)
@given(samples=st.integers(257, 30000), level=st.integers(0, 5))
def test_any_length_and_level(ours, theirs, samples, level):
    sound = clip(samples) * 10.0**-level
    assert_alike(ours(PROMPT, sound), theirs(PROMPT, sound, return_tensors="pt"))


def test_every_form_of_audio(ours, theirs):
    sound = clip(20000)
    for form in (sound, sound[None], sound.numpy(), [sound.numpy()], [sound], torch.stack([sound, clip(20000, seed=1)])):
        many = getattr(form, "ndim", 1) == 2 and form.shape[0] == 2
        text = [PROMPT, "USER: again <|audio|>"] if many else PROMPT
        assert_alike(ours(text, form), theirs(text, list(form) if many else form, return_tensors="pt"))  # 5.23 takes a tensor for one clip
    assert_alike(ours(["no sound", "USER: none either"]), theirs(["no sound", "USER: none either"], return_tensors="pt", padding=True))


def test_clips_of_unequal_lengths_give_the_same_as_alone(ours, theirs):
    clips = [clip(n) for n in (30000, 257, 4799, 16000)]
    batch = ours([PROMPT] * 4, clips)
    expected = theirs([PROMPT] * 4, clips, return_tensors="pt")
    for name in ("input_ids", "attention_mask", "input_features_mask"):
        assert torch.equal(batch[name], expected[name])
    assert batch.input_features.shape == expected["input_features"].shape
    for index, sound in enumerate(clips):
        frames = batch.input_features_lengths[index]
        alone = theirs(PROMPT, sound, return_tensors="pt")["input_features"][0]
        torch.testing.assert_close(batch.input_features[index, :frames], alone, rtol=0, atol=TOLERANCE)
        assert not batch.input_features[index, frames:].any()


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(160, 12000), min_size=1, max_size=4), split=st.integers(0, 4))
def test_token_counts_match_the_clips(ours, lengths, split):
    texts = ["<|audio|>" * len(lengths[:split]) + "x", "y" + "<|audio|> and " * len(lengths[split:])]
    batch = ours(texts, [torch.zeros(n) for n in lengths])
    audio_token = ours.tokenizer.convert_tokens_to_ids("<|audio|>")
    tokens = [count_frames(n).tokens for n in lengths]
    counts = (batch.input_ids == audio_token).sum(dim=1).tolist()
    assert counts == [sum(tokens[:split]), sum(tokens[split:])]
    assert int(batch.input_features_mask.sum()) == sum(tokens)


def test_integers_and_devices(ours):
    sound = (clip(5000) * 32767).to(torch.int16)
    batch = ours(PROMPT, sound, device=None, sampling_rate=16000)
    assert torch.equal(batch.input_features, ours(PROMPT, sound.float() / 32768).input_features)
    moved = batch.to("cpu", torch.bfloat16)
    assert moved.input_features.dtype == torch.bfloat16 and moved.input_ids.dtype == torch.int64
    assert ours(PROMPT, sound, return_tensors=None).input_ids == batch.input_ids.tolist()


@pytest.mark.parametrize("rate", [8000, 44100, 48000])
def test_clips_of_another_rate_are_resampled(ours, theirs, rate):
    """Compared with transformers on clips that torchaudio resampled; unequal lengths, one of them int16."""
    import torchaudio

    clips = [clip(rate), (clip(rate // 3) * 32767).to(torch.int16).numpy()]
    at_16_khz = [torchaudio.functional.resample(one, rate, 16000) for one in (clips[0], torch.from_numpy(clips[1]).float() / 32768)]
    batch = ours([PROMPT, PROMPT], clips, sampling_rate=rate)
    assert batch.input_features_lengths.tolist() == [ours.audio_processor.count_frames(len(one)).encoder for one in at_16_khz]
    for index, sound in enumerate(at_16_khz):
        alone = theirs(PROMPT, sound, return_tensors="pt")["input_features"][0]
        torch.testing.assert_close(batch.input_features[index, : len(alone)], alone, rtol=0, atol=TOLERANCE)
    assert batch.input_features.shape != ours([PROMPT, PROMPT], clips).input_features.shape


def test_resampling_without_torchaudio_is_refused_by_name(ours, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchaudio.functional", None)
    assert ours(PROMPT, clip(8000), sampling_rate=16000).input_features_lengths.tolist() == [25]
    with pytest.raises(MissingDependencyError, match=r"torchaudio.*16000"):
        ours(PROMPT, clip(8000), sampling_rate=8000)


def test_refusals(ours):
    sound = torch.zeros(1000)
    with pytest.raises(InputError, match=r"0 placeholder\(s\) <\|audio\|> for 1 clip"):
        ours("no placeholder", sound)
    with pytest.raises(InputError, match=r"2 placeholder\(s\) <\|audio\|> for 1 clip"):
        ours([PROMPT, PROMPT], sound)
    with pytest.raises(InputError, match=r"1 placeholder\(s\) <\|audio\|> for 0 clip"):
        ours(PROMPT)
    for rate in (44, 10**7, 44100.5, "44100"):
        with pytest.raises(AudioError, match="sampling rate of"):
            ours(PROMPT, sound, sampling_rate=rate)
    with pytest.raises(AudioError, match=r"1 placeholder\(s\) <\|audio\|> for 2 clip"):
        ours(PROMPT, [sound, sound])
    with pytest.raises(InputError, match=r"audio and audios"):
        ours(PROMPT, sound, audios=sound)
    with pytest.raises(InputError, match=r"unknown options \['colour'\]"):
        ours(PROMPT, sound, colour=1)
    with pytest.raises(InputError, match="text of type"):
        ours(None, sound)
    with pytest.raises(InputError, match="text of type"):
        ours([], None)
    for rate in (None, 16000, 8000):
        with pytest.raises(AudioError, match="clip 1 has NaN"):
            ours([PROMPT, PROMPT], [sound, torch.full((9,), torch.nan)], sampling_rate=rate)


def test_text_methods_use_the_tokenizer(ours, theirs):
    ids = ours("the speech<|end_of_text|>").input_ids
    assert ours.batch_decode(ids, skip_special_tokens=True) == theirs.batch_decode(ids, skip_special_tokens=True) == ["the speech"]
    assert ours.decode(ids[0]) == theirs.decode(ids[0]) == "the speech<|end_of_text|>"
    messages = [{"role": "user", "content": "<|audio|>hello"}]
    for options in ({}, {"add_generation_prompt": True}, {"chat_template": "{{ messages[0].role }}"}):
        assert ours.apply_chat_template(messages, **options) == theirs.apply_chat_template(messages, **options)
    own = GraniteSpeechProcessor(ours.audio_processor, ours.tokenizer, chat_template="{{ messages[0].content }}!")
    assert own.apply_chat_template(messages) == "<|audio|>hello!"


def test_transformers_reads_what_is_saved(ours, folder, tmp_path):
    other = GraniteSpeechFeatureExtractor(n_mels=64, projector_window_size=12, projector_downsample_rate=4, return_attention_mask=True)
    for extractor in (ours.audio_processor, other):
        processor = GraniteSpeechProcessor(extractor, ours.tokenizer)
        processor.save_pretrained(tmp_path)
        theirs, again = transformers.AutoProcessor.from_pretrained(tmp_path), GraniteSpeechProcessor.from_pretrained(str(tmp_path))
        assert type(theirs).__name__ == "GraniteSpeechProcessor"
        sound = clip(9000)
        expected = theirs(PROMPT, sound, return_tensors="pt")
        assert_alike(processor(PROMPT, sound), expected)
        assert_alike(again(PROMPT, sound), expected)
        assert theirs.chat_template == again.chat_template == ours.chat_template
        for name in ("melspec_kwargs", "sampling_rate", "projector_window_size", "projector_downsample_rate"):
            assert getattr(theirs.audio_processor, name) == getattr(again.audio_processor, name) == getattr(extractor, name)


def test_files_of_transformers_4(ours, folder, tmp_path):
    """A preprocessor_config.json with melspec_kwargs, and a minimal processor_config.json."""
    write_tokenizer(tmp_path)
    melspec = {"sample_rate": 16000, "n_fft": 512, "win_length": 400, "hop_length": 160, "n_mels": 80}
    legacy = {
        "feature_extractor_type": "GraniteSpeechFeatureExtractor",
        "melspec_kwargs": melspec,
        "processor_class": "GraniteSpeechProcessor",
        "projector_downsample_rate": 5,
        "projector_window_size": 15,
        "sampling_rate": 16000,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(legacy))
    minimal = {"audio_token": "<|audio|>", "processor_class": "GraniteSpeechProcessor"}
    (tmp_path / "processor_config.json").write_text(json.dumps(minimal))
    processor = GraniteSpeechProcessor.from_pretrained(tmp_path)
    assert_alike(
        processor(PROMPT, clip(9000)), transformers.AutoProcessor.from_pretrained(tmp_path)(PROMPT, clip(9000), return_tensors="pt")
    )
    assert processor.audio_processor.melspec_kwargs == melspec
    (tmp_path / "processor_config.json").unlink()
    assert GraniteSpeechProcessor.from_pretrained(tmp_path).audio_token == "<|audio|>"

    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**legacy, "feature_extractor_type": "WhisperFeatureExtractor"}))
    with pytest.raises(UnsupportedError, match="WhisperFeatureExtractor"):
        GraniteSpeechProcessor.from_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointNotFoundError, match="no feature extractor"):
        GraniteSpeechProcessor.from_pretrained(tmp_path)


def test_saving_keeps_how_tokenizer_json_splits_text(tmp_path):
    """Released folders name GPT2Tokenizer, for which transformers 5.x ignores that split. We save a class that keeps it."""
    from tokenizers import Regex, Tokenizer, pre_tokenizers

    write_tokenizer(tmp_path)
    backend = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("."), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "GPT2Tokenizer"}))
    tokenizer = GraniteSpeechTokenizer.from_folder(tmp_path)
    text = "the speech"
    assert tokenizer.encode(text) == backend.encode(text).ids and len(tokenizer.encode(text)) == len(text)
    tokenizer.save_pretrained(tmp_path / "saved")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "saved").encode(text) == tokenizer.encode(text)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).encode(text) != tokenizer.encode(text)


def test_audio_is_not_changed(ours):
    sound = np.random.default_rng(0).normal(size=3000).astype(np.float32)
    before = sound.copy()
    ours(PROMPT, sound)
    assert np.array_equal(sound, before)
