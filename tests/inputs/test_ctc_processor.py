"""TurboCTC's processor against transformers', and what it accepts beyond that."""

import json

import numpy as np
import pytest
import torch
import transformers

from granite_speech import GraniteSpeech5FeatureExtractor, GraniteSpeech5Processor
from granite_speech.errors import AudioError, InputError, UnsupportedError
from granite_speech.inputs.audio import load_audio, resample
from granite_speech.inputs.ctc_tokenizer import GraniteSpeech5Tokenizer
from tests.support.ctc_tokenizers import KINDS, write_ctc_tokenizer
from tests.support.paths import ROOT

SPEECH = ROOT / "tests" / "speech" / "00.flac"
TEXTS = ["hello world", "the quick brown fox"]


def noise(samples: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(samples, generator=torch.Generator().manual_seed(seed)) * 0.1


CLIPS = [noise(5000), noise(5000, 1)]  # of one length, for which transformers' features are those of each clip alone


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    write_ctc_tokenizer(folder, request.param)
    GraniteSpeech5FeatureExtractor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ours(folder):
    return GraniteSpeech5Processor.from_pretrained(folder)


@pytest.fixture(scope="module")
def theirs(folder):
    return transformers.GraniteSpeech5Processor.from_pretrained(folder)


def assert_alike(mine, other):
    assert set(mine) == set(other)
    for name, expected in other.items():
        assert type(mine[name]) is type(expected), name
        if isinstance(expected, torch.Tensor | np.ndarray):
            torch.testing.assert_close(torch.as_tensor(mine[name]), torch.as_tensor(expected), rtol=0, atol=2e-5)
        else:
            assert mine[name] == expected


CALLS = [
    {},
    {"text": TEXTS},
    {"text": TEXTS, "padding": True},
    {"text": TEXTS, "padding": True, "return_tensors": "pt"},
    {"text": TEXTS, "padding": True, "return_tensors": "np"},
    {"text": TEXTS, "common_kwargs": {"padding": True, "return_tensors": "pt"}},
    {"text": TEXTS, "text_kwargs": {"padding": "max_length", "max_length": 40}, "return_tensors": "pt"},
    {"text": TEXTS, "text_kwargs": {"padding": True, "padding_side": "left"}, "audio_kwargs": {"device": "cpu"}, "return_tensors": "pt"},
    {"text": TEXTS, "text_kwargs": {"truncation": True, "max_length": 3}, "return_tensors": "pt"},
    {"text": TEXTS, "audio_kwargs": {"truncation": True, "max_length": 4800}, "padding": True, "return_tensors": "pt"},
    {"text": TEXTS, "add_special_tokens": False, "padding": True, "return_tensors": "pt", "device": "cpu"},
    {"text": TEXTS, "return_special_tokens_mask": True},
    {"text": ["hello", "hello"], "return_tensors": "pt", "audio_kwargs": {"padding": False}},
    {"audio_kwargs": {"return_attention_mask": False}},
    {"return_tensors": "np"},
]


@pytest.mark.parametrize("options", CALLS, ids=str)
def test_calls_give_what_transformers_gives(ours, theirs, options):
    assert_alike(ours(CLIPS, sampling_rate=16000, **options), theirs(CLIPS, sampling_rate=16000, **options))


def test_one_clip_and_one_text(ours, theirs):
    for options in ({}, {"return_tensors": "pt"}):
        for clip in (CLIPS[0], CLIPS[0].numpy(), [CLIPS[0]]):
            assert_alike(
                ours(clip, "hello", sampling_rate=16000, **options), theirs(audio=clip, text="hello", sampling_rate=16000, **options)
            )


def test_text_alone(ours, theirs):
    assert_alike(ours(None, TEXTS), theirs(None, TEXTS))
    assert_alike(ours(text=TEXTS, padding=True, return_tensors="pt"), theirs(audio=None, text=TEXTS, padding=True, return_tensors="pt"))


def test_texts_are_padded_with_the_blank_if_they_become_tensors(ours):
    labels = ours(CLIPS, TEXTS, return_tensors="pt")["labels"]
    short = len(ours.tokenizer(TEXTS[0])["input_ids"])
    assert labels.shape[0] == 2 and not labels[0, short:].any() and short < labels.shape[1] and labels[1].all()


def test_the_mask_is_that_of_the_frames_even_when_it_is_not_returned(ours):
    # transformers then returns the mask of the labels in its place.
    assert set(ours(CLIPS, TEXTS, audio_kwargs={"return_attention_mask": False})) == {"input_features", "labels"}


def test_clips_of_unequal_lengths_equal_the_clips_alone(ours, theirs):
    clips = [noise(5000), noise(3217), noise(900)]
    batch = ours(clips, sampling_rate=16000)
    assert torch.equal(batch["attention_mask"], theirs(clips, sampling_rate=16000)["attention_mask"])
    for row, mask, clip in zip(batch["input_features"], batch["attention_mask"], clips, strict=True):
        torch.testing.assert_close(row[mask.bool()], theirs(clip, sampling_rate=16000)["input_features"][0], rtol=0, atol=2e-5)


def test_files_and_entries_of_datasets(ours):
    sound = load_audio(SPEECH)
    expected = ours(sound)["input_features"]
    for form in (
        str(SPEECH),
        SPEECH,
        [SPEECH],
        SPEECH.read_bytes(),
        {"array": sound.numpy(), "sampling_rate": 16000},
        {"path": str(SPEECH)},
    ):
        assert torch.equal(ours(form)["input_features"], expected)
    assert ours([SPEECH, sound.numpy()[:8000]], TEXTS)["input_features"].shape[0] == 2


def test_clips_at_another_rate_are_resampled(ours):
    clips = [noise(8000), noise(4000, 1)]
    expected = ours([resample(clip, 8000, 16000) for clip in clips])["input_features"]
    for mine in (
        ours(clips, sampling_rate=8000),
        ours(clips, audio_kwargs={"sampling_rate": 8000}),
        ours([{"array": clip.numpy(), "sampling_rate": 8000} for clip in clips]),
    ):
        assert torch.equal(mine["input_features"], expected)
    both = ours(torch.stack((noise(8000), noise(8000, 1))), sampling_rate=8000)["input_features"]
    assert torch.equal(both[:1], expected[:1])


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((), {}, InputError, "neither audio nor text"),
        ((CLIPS, "hello"), {}, InputError, r"1 text\(s\) for 2 clip\(s\)"),
        ((CLIPS[0], TEXTS), {}, InputError, r"2 text\(s\) for 1 clip\(s\)"),
        ((CLIPS,), {"foo": 1}, InputError, r"unknown options \['foo'\] in the call"),
        ((CLIPS,), {"audio_kwargs": {"stride": 1}}, InputError, r"unknown options \['stride'\] in audio_kwargs"),
        ((CLIPS,), {"text_kwargs": {"device": "cpu"}}, InputError, r"unknown options \['device'\] in text_kwargs"),
        ((CLIPS, TEXTS), {"padding": True, "text_kwargs": {"padding": False}}, InputError, "padding in text_kwargs and as a keyword"),
        ((CLIPS,), {"audio_kwargs": [1]}, InputError, "audio_kwargs of type list"),
        ((CLIPS,), {"sampling_rate": 8000, "audio_kwargs": {"sampling_rate": 16000}}, InputError, r"\[8000, 16000\]"),
        ((CLIPS,), {"audios": CLIPS}, InputError, "audio and audios"),
        ((CLIPS,), {"images": [1]}, UnsupportedError, "images for a model of speech"),
        ((CLIPS,), {"sampling_rate": -3}, AudioError, "-3"),
        (([],), {}, AudioError, "no clips"),
        ((["https://host/a.wav"],), {}, InputError, "network address"),
        (([noise(5000), torch.full((5000,), float("nan"))],), {"sampling_rate": 8000}, AudioError, "clip 1 has NaN"),
    ],
    ids=str,
)
def test_bad_calls_are_refused(ours, arguments, options, error, message):
    with pytest.raises(error, match=message):
        ours(*arguments, **options)


def test_decoding_is_that_of_the_tokenizer(ours, theirs):
    ids = torch.tensor([[0, 5, 5, 0, 5, 6, 6, 0, 0], [3, 3, 0, 0, 2, 24, 6, 6, 6]])
    for options in ({}, {"skip_special_tokens": True}, {"group_tokens": False}):
        assert ours.batch_decode(ids, **options) == theirs.batch_decode(ids, **options)
        assert ours.decode(ids[0], **options) == theirs.decode(ids[0], **options)
    assert ours.post_process_multimodal_output(ids) == theirs.post_process_multimodal_output(ids)


def test_files_go_both_ways(ours, theirs, tmp_path):
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    file = "processor_config.json"
    assert json.loads((tmp_path / "ours" / file).read_text()) == json.loads((tmp_path / "theirs" / file).read_text())
    assert not (tmp_path / "theirs" / "preprocessor_config.json").exists()  # the nested feature extractor is the only one
    back = transformers.AutoProcessor.from_pretrained(tmp_path / "ours")
    again = GraniteSpeech5Processor.from_pretrained(tmp_path / "theirs")
    assert type(back) is transformers.GraniteSpeech5Processor and type(back.tokenizer) is transformers.ParakeetTokenizer
    assert back.to_dict() == again.to_dict() == ours.to_dict()
    assert_alike(again(CLIPS, TEXTS), back(CLIPS, TEXTS))
    changed = GraniteSpeech5Processor.from_pretrained(tmp_path / "theirs", num_mel_bins=40, padding_side="left")
    assert changed.feature_extractor.feature_size == 160 and changed.tokenizer.padding_side == "left"


def test_parts_and_names(ours, theirs):
    assert ours.model_input_names == theirs.model_input_names and ours.get_attributes() == theirs.get_attributes()
    assert isinstance(ours.tokenizer, GraniteSpeech5Tokenizer) and isinstance(ours.feature_extractor, GraniteSpeech5FeatureExtractor)
    made = GraniteSpeech5Processor.from_args_and_dict([ours.feature_extractor, ours.tokenizer], {})
    assert made.to_dict() == ours.to_dict() and "GraniteSpeech5FeatureExtractor" in repr(made)
