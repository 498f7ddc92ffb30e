"""TurboCTC's features against transformers' for each clip alone; lengths, batches, options and bad input."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from granite_speech import GraniteSpeech5EncoderConfig, GraniteSpeech5FeatureExtractor, GraniteSpeechFeatureExtractor
from granite_speech.errors import AudioError, ConfigError, InputError, UnsupportedError
from granite_speech.inputs.delta_features import count_ctc_frames
from granite_speech.inputs.log_mel import ROWS_PER_BLOCK

TOLERANCE = 2e-5
RATE = 16000
OURS, THEIRS = GraniteSpeech5FeatureExtractor(), transformers.GraniteSpeech5FeatureExtractor()
OTHER = {
    "num_mel_bins": 40, "n_fft": 400, "win_length": 320, "hop_length": 200, "delta_win_length": 6, "logmel_floor_db": 3.5,
    "sampling_rate": 8000, "padding_value": -1.0,
}  # fmt: skip


def noise(samples: int, seed: int = 0, level: float = 0.1) -> torch.Tensor:
    return torch.randn(samples, generator=torch.Generator().manual_seed(seed)) * level


def alone(clip, extractor=THEIRS, **options):
    return extractor(clip, sampling_rate=extractor.sampling_rate, **options)


def assert_equals_alone(batch, clips, theirs=THEIRS):
    for row, mask, clip in zip(batch["input_features"], batch["attention_mask"], clips, strict=True):
        expected = alone(clip, theirs)["input_features"][0]
        assert mask.sum() == len(expected) and mask[: len(expected)].all()
        torch.testing.assert_close(row[: len(expected)], expected, rtol=0, atol=TOLERANCE)
        assert not row[len(expected) :].any()


# --- a clip -------------------------------------------------------------------------------------------------------------------------

SIGNALS = {
    "noise": noise(2 * RATE),
    "noise at -100 dB": noise(2 * RATE, level=1e-5),
    "silence": torch.zeros(2 * RATE),
    "a click": torch.nn.functional.one_hot(torch.tensor(12345), 2 * RATE).float(),
    "a tone": torch.sin(torch.arange(2 * RATE) * 0.17),
    "voice after silence": torch.cat([torch.zeros(RATE), noise(RATE)]),
    "silence after voice": torch.cat([noise(RATE), torch.zeros(RATE + 80)]),
}


@pytest.mark.parametrize("name", SIGNALS)
def test_signals_equal_transformers(name):
    torch.testing.assert_close(OURS(SIGNALS[name])["input_features"], alone(SIGNALS[name])["input_features"], rtol=0, atol=TOLERANCE)


@settings(max_examples=60, deadline=None)
@given(samples=st.one_of(st.integers(257, 3000), st.builds(lambda n, d: 160 * n + d, st.integers(2, 40), st.integers(-1, 1))))
def test_a_clip_of_any_length_equals_transformers(samples):
    ours, theirs = OURS(noise(samples)), alone(noise(samples))
    assert torch.equal(ours["attention_mask"], theirs["attention_mask"]) and ours["attention_mask"].dtype == torch.int64
    assert ours["input_features"].shape == theirs["input_features"].shape
    torch.testing.assert_close(ours["input_features"], theirs["input_features"], rtol=0, atol=TOLERANCE)
    assert OURS.count_frames(samples)[:2] == (samples // 160, ours["input_features"].shape[1])


@pytest.mark.parametrize("change", [*({name: value} for name, value in OTHER.items()), OTHER, {"delta_win_length": 9}], ids=str)
def test_other_settings_equal_transformers(change):
    ours, theirs = GraniteSpeech5FeatureExtractor(**change), transformers.GraniteSpeech5FeatureExtractor(**change)
    assert ours.to_dict() == theirs.to_dict()
    torch.testing.assert_close(ours(noise(5000))["input_features"], alone(noise(5000), theirs)["input_features"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("samples", [160, 161, 200, 256])
def test_clips_shorter_than_half_a_window_are_reflected_more_than_once(samples):
    # transformers refuses them; numpy's reflection is that of torch.stft, and has no limit.
    theirs = transformers.GraniteSpeech5FeatureExtractor()
    padded = np.pad(np.pad(noise(samples).numpy(), (0, max(0, 161 - samples))), 256, mode="reflect")
    theirs.mel_filters.spectrogram.center = False
    mel = theirs.mel_filters(torch.from_numpy(padded))[:, :2].clamp_min(1e-10).log10()
    mel = torch.maximum(mel, mel.max() - 8) / 4 + 1
    delta = (mel[:, 1] - mel[:, 0]) / 2
    expected = torch.cat((mel[:, 0], delta, mel[:, 1], delta))
    torch.testing.assert_close(OURS(noise(samples))["input_features"][0, 0], expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("samples", [1, 2, 100, 159])
def test_a_clip_without_a_frame_is_refused(samples):
    with pytest.raises(AudioError, match=rf"clip 1 has {samples} samples, too few for one frame; expected at least 160"):
        OURS([noise(1000), noise(samples)])
    packed, lengths = OURS.extract_packed([noise(1000), noise(samples)], "cpu")
    assert lengths == [3, 0] and packed.shape == (3, 320)


def test_counts_after_the_encoder():
    for layers, subsamplings in ([0, 1], 2), ([], 0), ([3], 1), ([1, 2, 2, 99], 2):
        config = GraniteSpeech5EncoderConfig(num_hidden_layers=4, subsample_layers=layers)
        assert config.subsamplings == subsamplings
        for samples in (160, 4800, 4960, 16000 * 7 + 81):
            counts = count_ctc_frames(samples, subsamplings=config.subsamplings)
            theirs = transformers.GraniteSpeech5EncoderConfig(num_hidden_layers=4, subsample_layers=layers)
            left = counts.encoder
            for layer in range(theirs.num_hidden_layers):
                left = left // 2 if layer in theirs.subsample_layers else left
            assert counts.output == left


# --- batches ------------------------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(257, 6000), min_size=1, max_size=5))
def test_a_clip_in_a_batch_equals_the_clip_alone(lengths):
    clips = [noise(samples, seed) for seed, samples in enumerate(lengths)]
    batch = OURS(clips)
    assert_equals_alone(batch, clips)
    assert torch.equal(batch["attention_mask"], alone(clips)["attention_mask"])
    packed, counts = OURS.extract_packed(clips, "cpu")
    assert (
        torch.equal(packed, batch["input_features"][batch["attention_mask"].bool()]) and counts == batch["attention_mask"].sum(1).tolist()
    )
    for clip, part in zip(clips, packed.split(counts), strict=True):
        assert torch.equal(part, OURS.extract_packed([clip], "cpu")[0])


def test_many_frames_are_computed_in_parts(monkeypatch):
    clips = [noise(40000), noise(7000, 1)]
    whole, _ = OURS.extract_packed(clips, "cpu")
    monkeypatch.setitem(ROWS_PER_BLOCK, "cpu", 37)
    torch.testing.assert_close(OURS.extract_packed(clips, "cpu")[0], whole, rtol=0, atol=1e-6)


OPTIONS = [
    {},
    {"padding": True},
    {"padding": "longest", "pad_to_multiple_of": 1000},
    {"padding": "max_length", "max_length": 9000},
    {"padding": "max_length", "max_length": 9000, "pad_to_multiple_of": 4096},
    {"padding": "max_length", "max_length": 3000, "truncation": True},
    {"max_length": 3000, "truncation": True},
    {"max_length": 3001, "truncation": True, "pad_to_multiple_of": 320},
    {"padding": "max_length", "max_length": 3000, "truncation": True, "pad_to_multiple_of": 1024},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_padding_and_truncation_are_those_of_transformers(options):
    clips = [noise(5000), noise(3210, 1), noise(1777, 2)]
    ours, theirs = OURS(clips, **options), alone(clips, **options)
    assert torch.equal(ours["attention_mask"], theirs["attention_mask"])
    assert ours["input_features"].shape == theirs["input_features"].shape
    assert_equals_alone(ours, [clip[: options["max_length"]] if options.get("truncation") else clip for clip in clips])


def test_clips_of_one_length_need_no_padding():
    clips = [noise(5000), noise(5000, 1)]
    ours, theirs = OURS(clips, padding=False), alone(clips, padding=False)
    torch.testing.assert_close(ours["input_features"], theirs["input_features"], rtol=0, atol=TOLERANCE)
    assert OURS(clips[0], padding=False, pad_to_multiple_of=8000)["input_features"].shape == (1, 25, 320)
    with pytest.raises(InputError, match=r"clips of 4000 to 5000 samples with padding=False"):
        OURS([noise(5000), noise(4000)], padding=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"padding": "max_length"}, "without max_length"),
        ({"padding": "max_length", "max_length": 4000}, r"a clip of 5000 samples with max_length=4000.*at most 4000.*truncation=True"),
        ({"padding": "most"}, "padding = 'most'"),
        ({"return_tensors": "tf"}, "return_tensors = 'tf'"),
        ({"truncation": "longest_first", "max_length": 100}, "truncation = 'longest_first'"),
        ({"device": "tpu9"}, "tpu9"),
        ({"max_length": -1, "truncation": True}, "max_length = -1"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        OURS(noise(5000), **options)


# --- forms --------------------------------------------------------------------------------------------------------------------------


def test_every_form_of_transformers_gives_the_same():
    one, two = noise(4000), noise(4000, 1)
    stereo = torch.stack((one, two), dim=1)
    forms = [
        one, one.numpy(), [one], (one.numpy(),), one.double(), torch.stack((one, two)), np.stack((one, two)), [one, two.numpy()],
        [one.tolist(), two.tolist()], stereo[None], [stereo, one],
    ]  # fmt: skip
    for form in forms:
        theirs = alone(form)
        ours = OURS(form)
        torch.testing.assert_close(ours["input_features"], theirs["input_features"], rtol=0, atol=TOLERANCE)
        assert torch.equal(ours["attention_mask"], theirs["attention_mask"])


def test_more_forms_are_accepted():
    one, two = noise(4000), noise(4000, 1)
    expected = OURS(one)["input_features"]
    for form in (one.tolist(), one[None], [one[None]], {"array": one.numpy(), "sampling_rate": RATE}):
        assert torch.equal(OURS(form)["input_features"], expected)
    mean = OURS((one + two) / 2)["input_features"]
    for form in (torch.stack((one, two), dim=1), [torch.stack((one, two))]):
        torch.testing.assert_close(OURS(form)["input_features"], mean, rtol=0, atol=TOLERANCE)
    sixteen = (one.clamp(-1, 1) * 32767).round()
    assert torch.equal(OURS(sixteen.short())["input_features"], OURS(sixteen / 32768)["input_features"])


def test_tensors_arrays_and_no_mask():
    assert isinstance(OURS(noise(4000), return_tensors="np")["input_features"], np.ndarray)
    assert set(OURS(noise(4000), return_attention_mask=False)) == {"input_features"}
    assert list(OURS(noise(4000), return_tensors="pt", device=None)) == ["input_features", "attention_mask"] == OURS.model_input_names


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ([], "no clips"),
        (torch.zeros(0), "no samples"),
        (torch.full((4000,), float("nan")), "NaN"),
        (torch.zeros(4000, dtype=torch.complex64), "complex64"),
        (torch.zeros(4000, dtype=torch.int64), "int64"),
        (torch.zeros(3, 3, 3, 400), r"shape \(3, 3, 3, 400\)|shape \(3, 3, 400\)"),
        ([torch.zeros(20, 4000)], r"clip 0 has shape \(20, 4000\)"),
    ],
    ids=str,
)
def test_bad_clips_are_refused(form, message):
    with pytest.raises(AudioError, match=message):
        OURS(form)


def test_another_rate_is_refused():
    for call in (lambda: OURS(noise(4000), sampling_rate=8000), lambda: OURS({"array": noise(4000).numpy(), "sampling_rate": 8000})):
        with pytest.raises(AudioError, match="8000; expected 16000 Hz"):
            call()


# --- settings and files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in ("num_mel_bins", "n_fft", "win_length", "hop_length", "sampling_rate") for value in (0, -1, 2.5, "8")),
        *(("delta_win_length", value) for value in (2, None, True)),
        *(("logmel_floor_db", value) for value in ("8", float("nan"), None)),
        ("padding_value", None),
        ("win_length", 600),
        ("n_fft", 511),
    ],
)
def test_bad_settings_are_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=name):
        GraniteSpeech5FeatureExtractor(**{name: value})


@pytest.mark.parametrize("values", [{}, OTHER], ids=["defaults", "others"])
def test_files_go_both_ways(values, tmp_path):
    theirs = transformers.GraniteSpeech5FeatureExtractor(**values, note=[1])
    theirs.save_pretrained(tmp_path / "theirs")
    ours = GraniteSpeech5FeatureExtractor.from_pretrained(tmp_path / "theirs")
    assert ours.to_dict() == theirs.to_dict() and ours.note == [1]
    ours.save_pretrained(tmp_path / "ours")
    again = transformers.GraniteSpeech5FeatureExtractor.from_pretrained(tmp_path / "ours")
    assert again.to_dict() == theirs.to_dict()
    changed = GraniteSpeech5FeatureExtractor.from_pretrained(tmp_path / "ours", num_mel_bins=30)
    assert changed.feature_size == 120 and changed.num_mel_bins == 30


def test_files_of_another_family_are_refused(tmp_path):
    GraniteSpeechFeatureExtractor().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="'GraniteSpeechFeatureExtractor'; expected GraniteSpeech5FeatureExtractor"):
        GraniteSpeech5FeatureExtractor.from_pretrained(tmp_path)
    OURS.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["feature_extractor_type"] == "GraniteSpeech5FeatureExtractor"
    with pytest.raises(UnsupportedError, match="expected GraniteSpeechFeatureExtractor"):
        GraniteSpeechFeatureExtractor.from_pretrained(tmp_path)


def test_features_are_padded_as_transformers_pads_them():
    clips = [dict(OURS(noise(samples), return_attention_mask=False)) for samples in (3000, 5000)]
    clips = [{"input_features": one["input_features"][0].numpy()} for one in clips]
    ours, theirs = (one.pad(clips, padding=True, return_tensors="pt") for one in (OURS, THEIRS))
    assert torch.equal(ours["input_features"], theirs["input_features"])
    assert torch.equal(ours["attention_mask"], theirs["attention_mask"])


def test_torchaudio_is_not_needed():
    code = "import sys; sys.modules['torchaudio'] = None; import torch, granite_speech as g; "
    code += "print(g.GraniteSpeech5FeatureExtractor()(torch.ones(800))['input_features'].shape)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "[1, 3, 320]" in result.stdout, result.stderr
