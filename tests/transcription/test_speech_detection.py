"""Speech is found at any level and length, and steady sounds of any kind are silence."""

import sys
from functools import cache
from types import ModuleType

import numpy as np
import pytest
import soundfile
import torch

from granite_speech.errors import MissingDependencyError
from granite_speech.transcription.silero import SileroDetector
from granite_speech.transcription.speech import Activity, EnergyDetector
from granite_speech.transcription.windows import Windows
from tests.support.spoken import SPEECH

RATE = 16000


@cache
def clip(number: int) -> np.ndarray:
    """A sentence of tests/speech; its loudest sample is 0.5."""
    return soundfile.read(SPEECH / f"{number:02}.flac", dtype="float32")[0]


def noise(count: int, seed: int = 0, tilt: float = 0.0) -> np.ndarray:
    """Gaussian, with a mean square of 1; its power falls with the frequency to the power of `tilt`."""
    spectrum = np.fft.rfft(np.random.default_rng(seed).standard_normal(count))
    frequency = np.maximum(np.arange(len(spectrum)), 1)
    sound = np.fft.irfft(spectrum / frequency ** (tilt / 2), count)
    return sound / sound.std()


def detect(samples: np.ndarray, block: int = 16000) -> Activity:
    detector, found = EnergyDetector(), Activity.none()
    for piece in torch.from_numpy(samples.astype(np.float32)).split(block):
        found = found + detector.push(piece)
    return found + detector.finish()


def windows(samples: np.ndarray, limit: float = 4.0, **options) -> list:
    return list(Windows(iter(torch.from_numpy(samples.astype(np.float32)).split(8000)), limit=limit, **options))


def seconds(count: int) -> np.ndarray:
    return np.arange(count) / RATE


SILENCES = {
    "zeros": lambda count: np.zeros(count),
    "a constant": lambda count: np.full(count, 0.1),
    "dither": lambda count: np.round(np.random.default_rng(0).triangular(-1, 0, 1, count)) / 32768,
    "loud white noise": lambda count: 0.03 * noise(count),
    "faint white noise": lambda count: 0.001 * noise(count, 1),
    "pink noise": lambda count: 0.03 * noise(count, 2, 1),
    "brown noise": lambda count: 0.03 * noise(count, 3, 2),
    "mains hum": lambda count: 0.1 * np.sin(2 * np.pi * 50 * seconds(count)) + 0.03 * np.sin(2 * np.pi * 150 * seconds(count)),
    "a tone": lambda count: 0.2 * np.sin(2 * np.pi * 1000 * seconds(count)),
}


@pytest.mark.parametrize("length", [0.01, 0.1, 0.3, 1.1, 6.0, 30.0])
@pytest.mark.parametrize("kind", SILENCES)
def test_a_steady_sound_is_silence(kind, length):
    assert not windows(SILENCES[kind](int(length * RATE)))


def test_a_click_is_not_speech():
    clicks = 0.001 * noise(10 * RATE)
    clicks[:: 3 * RATE] += 0.9
    assert not windows(clicks)


@pytest.mark.parametrize("gain", [1.0, 0.002])
@pytest.mark.parametrize("length", [0.1, 0.15, 0.25, 0.5, 1.0, 2.0])
def test_speech_of_any_length_and_level_is_found(length, gain):
    for number in range(12):
        sound = gain * clip(number)
        assert windows(sound[: int(length * RATE)]), number


@pytest.mark.parametrize("tilt", [0, 1, 2])
def test_speech_in_noise_5_db_below_it_is_found_and_the_rest_is_a_pause(tilt):
    pause, sounds = np.zeros(2 * RATE), [clip(number) for number in range(12)]
    silent = np.concatenate([part for sound in sounds for part in (pause, sound)])
    level = np.sqrt(np.mean(np.concatenate(sounds) ** 2)) * 10 ** (-5 / 20)
    noisy, begin = silent + level * noise(len(silent), 0, tilt), 0
    found = detect(noisy)
    assert sum(window.end - window.start for window in windows(noisy)) < np.concatenate(sounds).size / RATE + 12 * 0.5
    for number, sound in enumerate(sounds):
        before, speech = found[begin + 20 : begin + 180], found[begin + 200 : begin + 200 + len(sound) // 160]
        assert speech.strong.sum() >= 9 and not before.strong.any(), number
        begin += 200 + len(sound) // 160


def test_noise_between_utterances_but_not_in_them_is_a_pause():
    sounds = [part for number in range(4) for part in (clip(number), 0.005 * noise(RATE // 2, number))]
    found = detect(np.concatenate(sounds))
    at = len(sounds[0]) // 160
    assert found.strong[: at - 5].any()
    assert not found.weak[at + 5 : at + 45].any()


def test_a_quiet_speaker_next_to_a_loud_one_is_found():
    sound = np.concatenate([clip(0), np.zeros(RATE), 0.01 * clip(3), np.zeros(RATE), clip(5)])
    assert len(windows(sound)) >= 3
    assert any(
        len(clip(0)) / RATE + 0.8 < window.start < window.end < (len(clip(0)) + len(clip(3))) / RATE + 1.2 for window in windows(sound)
    )


def test_nothing_audible_is_lost_around_speech():
    """Whole words from their first to their last sound, however soft: what is left out is 50 dB fainter than the loudest part."""
    pause = np.zeros(RATE)
    for number in range(12):
        sound = np.concatenate([pause, pause, pause, clip(number), pause, pause, pause])
        covered = np.zeros(len(sound), bool)
        for window in windows(sound):
            covered[round(window.start * RATE) : round(window.end * RATE)] = True
        power = np.square(sound[: len(sound) // 160 * 160].reshape(-1, 160)).mean(1)
        left = np.square(np.where(covered, 0, sound)[: len(sound) // 160 * 160].reshape(-1, 160)).mean(1)
        assert left.max() < 1e-5 * power.max(), number
        assert covered.sum() < len(clip(number)) + 0.2 * RATE


def test_a_rising_tone_is_a_sound_to_transcribe():
    """Its level does not change, but its spectrum does."""
    time = seconds(int(17.3 * RATE))
    rising = 0.3 * np.sin(2 * np.pi * (90 + 200 * time) * time) + 0.01 * noise(len(time))
    (window,) = windows(rising, limit=30)
    assert len(window.samples) == len(rising)


def test_what_is_found_does_not_depend_on_the_blocks():
    sound = np.concatenate([part for number in range(12) for part in (clip(number), np.zeros(RATE // 3))])
    sound = np.concatenate([sound, sound]) + 0.001 * noise(2 * len(sound))
    first = detect(sound, 30 * RATE)
    assert len(first) == -(-len(sound) // 160)
    for block in (777, len(sound)):
        other = detect(sound, block)
        for name in ("level", "weak", "strong"):
            assert np.array_equal(getattr(first, name), getattr(other, name))


@pytest.mark.parametrize("count", [0, 1, 159, 160, 399, 400, 561])
def test_every_160_samples_begun_are_a_frame(count):
    assert len(detect(noise(count + 2)[:count])) == -(-count // 160)


class Loud(torch.nn.Module):
    """In place of silero-vad's network."""

    def forward(self, chunk: torch.Tensor, rate: int) -> torch.Tensor:
        assert chunk.shape == (512,) and rate == RATE
        return (chunk.abs().amax() > 0.05).float()[None, None]


@pytest.fixture
def silero(monkeypatch):
    """A package that, like silero-vad, is imported with one thread for PyTorch."""
    module = ModuleType("silero_vad")

    def load_silero_vad():
        torch.set_num_threads(1)
        return Loud()

    module.load_silero_vad = load_silero_vad
    monkeypatch.setitem(sys.modules, "silero_vad", module)


def test_silero_finds_speech_and_threads_stay(silero):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        SileroDetector()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    sound = np.concatenate([np.zeros(3 * RATE + 100), clip(3), np.zeros(30 * RATE), clip(5)])
    found = windows(sound, segmentation="silero")
    assert found and abs(found[0].start - 3) < 0.1 and all(window.end - window.start < 4 for window in found)
    assert not windows(0.001 * noise(RATE), segmentation="silero")


def test_without_silero_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "silero_vad", None)
    with pytest.raises(MissingDependencyError, match=r"granite-speech-triton\[vad\]"):
        windows(clip(0), segmentation="silero")
