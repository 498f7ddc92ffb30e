"""Augmentation: every change is reproducible, leaves its input alone, and does what it claims."""

import numpy as np
import pytest

from granite_speech.training import augmentation
from granite_speech.training.augmentation import RATE


def speech(seconds: float = 0.8) -> np.ndarray:
    """A buzz at 120 Hz with a resonance at 900 Hz."""
    time = np.arange(int(seconds * RATE)) / RATE
    harmonics = np.arange(1, 40)[:, None] * 120
    level = 1 / (1 + ((harmonics - 900) / 300) ** 2)
    return (0.05 * (level * np.sin(2 * np.pi * harmonics * time)).sum(0)).astype(np.float32)


def loudest_hertz(waveform: np.ndarray, low: float = 0.0) -> float:
    spectrum = np.abs(np.fft.rfft(waveform * np.hanning(waveform.size)))
    hertz = np.fft.rfftfreq(waveform.size, 1 / RATE)
    return float(hertz[np.argmax(spectrum * (hertz >= low))])


AUGMENTATIONS = {
    "change_voice": augmentation.change_voice,
    "clip_edges": augmentation.clip_edges,
    "add_silence": augmentation.add_silence,
    "add_echo": augmentation.add_echo,
    "equalize": augmentation.equalize,
    "limit_band": augmentation.limit_band,
    "add_noise": augmentation.add_noise,
    "add_babble": lambda waveform, rng: augmentation.add_babble(waveform, rng, [speech(0.3), speech(1.5)]),
    "change_gain": augmentation.change_gain,
    "quantize": augmentation.quantize,
    "augment": lambda waveform, rng: augmentation.augment(waveform, rng, 1.0, [speech(0.3)]),
}


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("seconds", [0.1, 0.8, 2.3])
def test_augmentations_are_reproducible_and_leave_their_input_alone(name, seconds):
    waveform = speech(seconds)
    before = waveform.copy()
    for seed in range(4):
        first, second = (AUGMENTATIONS[name](waveform, np.random.default_rng(seed)) for _ in range(2))
        assert first.dtype == np.float32 and first.ndim == 1 and first.size >= 0.05 * RATE
        assert np.isfinite(first).all()
        np.testing.assert_array_equal(first, second)
        np.testing.assert_array_equal(waveform, before)
    assert not np.array_equal(first, AUGMENTATIONS[name](waveform, np.random.default_rng(99)))


def test_augment_at_strength_zero_changes_only_level_and_silence():
    waveform = speech()
    changed = augmentation.augment(waveform, np.random.default_rng(0), 0.0)
    start = np.flatnonzero(changed)[0]
    inside = changed[start - 1 : start - 1 + waveform.size]
    assert np.corrcoef(inside, waveform)[0, 1] > 0.999


def test_change_voice_changes_pitch_formants_and_tempo_independently():
    waveform, rng = speech(1.0), np.random.default_rng(0)
    same = augmentation.change_voice(waveform, rng, 1.0, 1.0, 1.0)
    np.testing.assert_allclose(same[1000:-1000], waveform[1000:-1000], atol=1e-3)
    slow = augmentation.change_voice(waveform, rng, 1.0, 1.0, 0.8)
    assert slow.size == pytest.approx(waveform.size / 0.8, rel=0.01)
    assert loudest_hertz(slow[2000:-2000]) == pytest.approx(loudest_hertz(waveform), rel=0.02)
    # The resonance at 900 Hz moves with the formants, not with the pitch.
    large = augmentation.change_voice(waveform, rng, 1.0, 0.8, 1.0)
    assert loudest_hertz(large[2000:-2000]) == pytest.approx(720, abs=130)
    high = augmentation.change_voice(waveform, rng, 1.3, 1.0, 1.0)
    assert high.size == pytest.approx(waveform.size, rel=0.01)
    assert loudest_hertz(high[2000:-2000]) == pytest.approx(900, abs=160)


def test_stretch_samples_resamples():
    tone = np.sin(2 * np.pi * 440 * np.arange(22050) / 22050).astype(np.float32)
    resampled = augmentation.stretch_samples(tone, 22050 / RATE)
    expected = np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)
    assert resampled.size == RATE
    np.testing.assert_allclose(resampled[500:-500], expected[500:-500], atol=0.02)


def test_noise_has_the_requested_level():
    waveform = speech()
    noise = augmentation.add_noise(waveform, np.random.default_rng(0), snr_db=10.0) - waveform
    assert 10 * np.log10(np.square(waveform).mean() / np.square(noise).mean()) == pytest.approx(10.0, abs=0.1)


def test_limit_band_removes_high_frequencies():
    white = np.random.default_rng(0).standard_normal(RATE).astype(np.float32)
    limited = augmentation.limit_band(white, np.random.default_rng(1))
    power = np.square(np.abs(np.fft.rfft(limited)))
    assert power[6600:].sum() < 1e-3 * power.sum()
