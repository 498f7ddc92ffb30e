"""Log-mel features against torchaudio; lengths, batches and bad input."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from granite_speech.errors import AudioError, ConfigError, InputError, UnsupportedError
from granite_speech.inputs.batch import BatchFeature
from granite_speech.inputs.features import GraniteSpeechFeatureExtractor, count_frames
from granite_speech.inputs.log_mel import mel_filters

TOLERANCE = 2e-5
RATE = 16000


def tone(hertz: float, samples: int = 2 * RATE, level: float = 1.0) -> torch.Tensor:
    return (level * torch.sin(2 * math.pi * hertz * torch.arange(samples, dtype=torch.float64) / RATE)).float()


def noise(samples: int, level: float = 0.1, seed: int = 0) -> torch.Tensor:
    return torch.randn(samples, generator=torch.Generator().manual_seed(seed)) * level


def chirp(samples: int = 2 * RATE) -> torch.Tensor:
    time = torch.arange(samples, dtype=torch.float64) / RATE
    return (0.5 * torch.sin(2 * math.pi * (20 + 1900 * time) * time)).float()


SIGNALS = {
    "noise": noise(2 * RATE),
    "noise at -100 dB": noise(2 * RATE, level=1e-5),
    "silence": torch.zeros(2 * RATE),
    "constant": torch.full((2 * RATE,), 0.7),
    "click": torch.nn.functional.one_hot(torch.tensor(12345), 2 * RATE).float(),
    "chirp": chirp(),
    "square wave": torch.sign(tone(250)),
    "tone at -80 dB": tone(440, level=1e-4),
    "tone of 16 bits": (tone(440) * 16384).round() / 32768,
    "voice after silence": torch.cat([torch.zeros(RATE), noise(RATE)]),
    **{f"tone of {hertz} Hz": tone(hertz) for hertz in (31.25, 100, 440, 997.3, 1000, 3999, 7990)},
}


def torchaudio_features(samples: np.ndarray) -> torch.Tensor:
    """The definition, computed by torchaudio, with numpy's reflection for clips that torch.stft refuses."""
    from torchaudio.transforms import MelSpectrogram

    mode = "reflect" if samples.size > 1 else "edge"
    padded = torch.from_numpy(np.pad(samples, 256, mode=mode))
    mel = MelSpectrogram(sample_rate=RATE, n_fft=512, win_length=400, hop_length=160, n_mels=80, center=False)(padded)
    log_mel = mel.T.clip(min=1e-10).log10()
    log_mel = torch.maximum(log_mel, log_mel.max() - 8) / 4 + 1
    return log_mel[: log_mel.shape[0] // 2 * 2].reshape(-1, 160)


@pytest.fixture(scope="module")
def extractor() -> GraniteSpeechFeatureExtractor:
    return GraniteSpeechFeatureExtractor()


def test_filters_are_torchaudios():
    from torchaudio.functional import melscale_fbanks

    assert torch.equal(mel_filters(257, 80, RATE), melscale_fbanks(257, 0.0, 8000.0, 80, RATE))
    assert torch.equal(mel_filters(201, 64, 8000), melscale_fbanks(201, 0.0, 4000.0, 64, 8000))


@pytest.mark.parametrize("name", SIGNALS)
def test_signals_equal_torchaudio(extractor, name):
    ours = extractor(SIGNALS[name])["input_features"][0]
    torch.testing.assert_close(ours, torchaudio_features(SIGNALS[name].numpy()), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("samples", [*range(1, 8), 159, 160, 161, *range(250, 264), 319, 320, 321, 4799, 4800, 4801])
def test_short_clips_equal_torchaudio(extractor, samples):
    clip = noise(samples, seed=samples)
    ours, _ = extractor.extract_packed([clip], "cpu")
    torch.testing.assert_close(ours, torchaudio_features(clip.numpy()), rtol=0, atol=TOLERANCE)


@settings(max_examples=200, deadline=None)
@given(samples=st.integers(1, 10**7), hop=st.integers(1, 400), rate=st.integers(1, 6), outputs=st.integers(1, 6))
def test_counts_are_consistent(samples, hop, rate, outputs):
    counts = count_frames(samples, hop_length=hop, window_size=rate * outputs, downsample_rate=rate)
    assert counts.mel == samples // hop + 1
    assert counts.encoder == counts.mel // 2
    windows = math.ceil(counts.encoder / (rate * outputs))
    assert counts.tokens == windows * outputs
    assert (counts.tokens == 0) == (samples < hop)


@settings(max_examples=40, deadline=None)
@given(samples=st.integers(160, 12000))
def test_tokens_equal_features_at_every_length(samples):
    batch = GraniteSpeechFeatureExtractor()(torch.zeros(samples))
    counts = count_frames(samples)
    assert batch["input_features"].shape == (1, counts.encoder, 160)
    assert batch["input_features_lengths"].tolist() == [counts.encoder]
    assert batch["audio_embed_sizes"] == [counts.tokens]
    assert batch["input_features_mask"].sum() == counts.tokens


@settings(max_examples=12, deadline=None)
@given(lengths=st.lists(st.integers(160, 9000), min_size=1, max_size=6), order=st.randoms())
def test_a_clip_does_not_depend_on_its_neighbours(lengths, order):
    extractor = GraniteSpeechFeatureExtractor()
    clips = [noise(n, level=10.0 ** -(i % 5), seed=n) for i, n in enumerate(lengths)]
    order.shuffle(clips)
    packed, frames = extractor.extract_packed(clips, "cpu")
    assert packed.dtype == torch.float32 and packed.shape == (sum(frames), 160)
    batch = extractor(clips)
    for index, (clip, part) in enumerate(zip(clips, packed.split(frames), strict=True)):
        alone = extractor(clip)["input_features"][0]
        torch.testing.assert_close(part, alone, rtol=0, atol=1e-6)
        assert torch.equal(batch["input_features"][index, : frames[index]], part)
        assert not batch["input_features"][index, frames[index] :].any()


def test_features_computed_in_blocks_are_the_same(extractor, monkeypatch):
    clips = [noise(20000), tone(300, 33333)]
    whole, frames = extractor.extract_packed(clips, "cpu")
    monkeypatch.setitem(sys.modules["granite_speech.inputs.log_mel"].ROWS_PER_BLOCK, "cpu", 37)
    blocks, block_frames = extractor.extract_packed(clips, "cpu")
    assert frames == block_frames
    torch.testing.assert_close(blocks, whole, rtol=0, atol=1e-6)


def test_every_form_of_the_same_clip(extractor):
    clip = (noise(5000) * 32768).round().clamp(-32768, 32767)
    sound = clip / 32768
    expected = extractor(sound)["input_features"]
    array = sound.numpy()
    read_only = array.copy()
    read_only.flags.writeable = False
    forms = [
        array,
        array[None],
        [array],
        [sound[None]],
        (sound,),
        sound.double(),
        array.astype(">f4"),
        array[::-1][::-1],
        read_only,
        torch.stack([sound, sound], dim=1)[:, 0],
        sound.clone().requires_grad_(),
        clip.to(torch.int16),
        clip.numpy().astype(np.int16),
        [clip.numpy().astype(">i2").astype(np.int16)],
    ]
    for form in forms:
        features = extractor(form)["input_features"]
        assert torch.equal(features, expected) and not features.requires_grad
    assert torch.equal(extractor(torch.stack([sound, sound]))["input_features"], expected.repeat(2, 1, 1))


@pytest.mark.parametrize(
    ("audios", "words"),
    [
        (np.zeros((2, 2, 100), np.float32), "clip 0 has shape (2, 2, 100)"),
        ([torch.zeros(10), torch.zeros(2, 10)], "clip 1 has shape (2, 10)"),
        ([torch.zeros(10), torch.zeros(0)], "clip 1 has no samples"),
        (torch.zeros(0), "clip 0 has no samples"),
        (torch.zeros(0, 10), "no clips"),
        ([], "no clips"),
        (torch.zeros(10, dtype=torch.complex64), "clip 0 has samples of type torch.complex64"),
        (np.zeros(10, np.int32), "clip 0 has samples of type int32"),
        ([torch.zeros(9), torch.zeros(9), torch.zeros(9, dtype=torch.uint8)], "clip 2 has samples of type torch.uint8"),
        ([torch.zeros(9), torch.tensor([0.0, math.nan])], "clip 1 has NaN"),
        ([torch.tensor([math.inf, 0.0]), torch.zeros(9)], "clip 0 has NaN or infinite"),
        (np.array([1e300]), "clip 0 has NaN or infinite"),
        (torch.tensor([1e30, -1.0]), "clip 0 has a sample of size 1e+30"),
        ([0.0, 0.1], "clip 0 has a float"),
        (torch.zeros(159), "clip 0 has 159 samples, too few for one audio token"),
        ([torch.zeros(160), torch.zeros(1)], "clip 1 has 1 samples, too few for one audio token"),
    ],
)
def test_unusable_clips_are_refused_by_index(extractor, audios, words):
    with pytest.raises(AudioError) as raised:
        extractor(audios)
    assert words in str(raised.value)


def test_other_types_are_refused(extractor):
    for audios in ("speech.wav", b"abc", {"array": np.zeros(9)}, None, 3):
        with pytest.raises(InputError, match="audio of type"):
            extractor(audios)
    with pytest.raises(AudioError, match="clip 1 has shape"):
        extractor.extract_packed([torch.zeros(9), torch.zeros(9, dtype=torch.float64)], "cpu")


@pytest.mark.parametrize(
    "options",
    [
        {"n_fft": 0},
        {"n_mels": 80.0},
        {"hop_length": True},
        {"win_length": 600},
        {"n_fft": 511},
        {"sampling_rate": -1},
        {"projector_downsample_rate": 4},
        {"melspec_kwargs": {"hop_length": 0}},
    ],
)
def test_impossible_sizes_are_refused(options):
    with pytest.raises(ConfigError):
        GraniteSpeechFeatureExtractor(**options)


def test_melspec_kwargs_are_honoured():
    written = {"sample_rate": 8000, "n_fft": 256, "win_length": 200, "hop_length": 80, "n_mels": 40}
    extractor = GraniteSpeechFeatureExtractor(melspec_kwargs=written)
    assert (extractor.melspec_kwargs, extractor.sampling_rate, extractor.feature_size) == (written, 8000, 40)
    assert extractor(torch.zeros(800))["input_features"].shape == (1, 5, 80)
    GraniteSpeechFeatureExtractor(melspec_kwargs={"mel_scale": "htk", "norm": None})
    with pytest.raises(UnsupportedError, match="slaney"):
        GraniteSpeechFeatureExtractor(melspec_kwargs={"mel_scale": "slaney"})
    with pytest.raises(UnsupportedError, match="window_fn"):
        GraniteSpeechFeatureExtractor(melspec_kwargs={"window_fn": "hamming"})


def test_to_dict_gives_the_same_extractor_and_keeps_unknown_entries():
    extractor = GraniteSpeechFeatureExtractor(n_mels=64, return_attention_mask=True, feature_size=80, padding_value=0.5)
    written = json.loads(json.dumps(extractor.to_dict()))
    assert written["return_attention_mask"] is True and written["n_mels"] == 64
    written.pop("feature_extractor_type")
    again = GraniteSpeechFeatureExtractor(**written)
    assert again.to_dict() == extractor.to_dict() and again.melspec_kwargs == extractor.melspec_kwargs


def test_global_settings_do_not_affect_the_features(extractor):
    expected = extractor(SIGNALS["chirp"])["input_features"]
    torch.set_default_dtype(torch.bfloat16)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
            features = GraniteSpeechFeatureExtractor()(SIGNALS["chirp"])["input_features"]
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision("highest")
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-6)


def test_batch_moves_its_tensors_and_nothing_else():
    batch = BatchFeature(input_ids=torch.tensor([1]), input_features=torch.zeros(1), input_features_lengths=[1])
    assert batch.to("cpu", torch.bfloat16) is batch
    assert batch.input_features.dtype == torch.bfloat16 and batch.input_ids.dtype == torch.int64
    assert batch.to(dtype=torch.float16).input_features.dtype == torch.float16
    assert batch.to(torch.device("meta")).input_ids.device.type == "meta"
    assert batch.input_features_lengths == [1]
    assert set({**batch}) == {"input_ids", "input_features", "input_features_lengths"}
    with pytest.raises(AttributeError, match="no entry 'labels'"):
        _ = batch.labels


def test_optional_packages_are_not_imported():
    """Features are computed without torchaudio, transformers and peft, and other packages are imported on first use."""
    code = """
import sys
for name in ("torchaudio", "transformers", "peft", "torchcodec"):
    sys.modules[name] = None
import torch
import granite_speech.inputs.audio, granite_speech.inputs.processor, granite_speech.inputs.tokenizer
from granite_speech.inputs.features import GraniteSpeechFeatureExtractor
assert GraniteSpeechFeatureExtractor()(torch.ones(4000))["input_features"].shape == (1, 13, 160)
assert "soundfile" not in sys.modules and "av" not in sys.modules and "tokenizers" not in sys.modules and "jinja2" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=".", timeout=120)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_an_accelerator(extractor):
    clips = [clip for clip in SIGNALS.values() if clip.any()]
    expected, frames = extractor.extract_packed(clips, "cpu")
    for source in (clips, [clip.cuda() for clip in clips]):
        features, lengths = extractor.extract_packed(source, "cuda")
        assert features.is_cuda and lengths == frames
        noisy = features.split(frames)[0].cpu()
        torch.testing.assert_close(noisy, expected.split(frames)[0], rtol=0, atol=TOLERANCE)
    with pytest.raises(AudioError, match="clip 1"):
        extractor.extract_packed([clips[0].cuda(), torch.full((9,), math.nan, device="cuda")], "cuda")
