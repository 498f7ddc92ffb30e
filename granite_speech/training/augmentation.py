"""Augmentation: random changes to a clip that imitate other speakers, rooms, microphones and telephone lines.

Waveforms are `(samples,)` float32 NumPy arrays at 16 kHz, in [-1, 1], and are never changed in place. All randomness comes from the
`numpy.random.Generator` passed in, so equal seeds give equal data.
"""

from collections.abc import Callable, Sequence

import numpy as np

__all__ = ["augment"]

RATE = 16000


def augment(waveform: np.ndarray, generator: np.random.Generator, strength: float = 1.0, others: Sequence[np.ndarray] = ()) -> np.ndarray:
    """Change a clip at random: its speaker, room, noise, microphone and line.

    Args:
        waveform: speech with little silence around it.
        generator: source of all randomness.
        strength: scales the probability of each change. At 0 only the silence around the speech and the level vary.
        others: clips to mix into background babble.
    """

    def sometimes(probability: float) -> bool:
        return generator.random() < probability * strength

    if sometimes(0.8):
        waveform = change_voice(waveform, generator)
    if sometimes(0.3):
        waveform = clip_edges(waveform, generator)
    if not sometimes(0.3):
        waveform = add_silence(waveform, generator)
    if sometimes(0.3):
        waveform = add_echo(waveform, generator)
    if sometimes(0.6):
        waveform = equalize(waveform, generator)
    if sometimes(0.25) and len(others):
        waveform = add_babble(waveform, generator, others)
    if sometimes(0.7):
        waveform = add_noise(waveform, generator)
    waveform = change_gain(waveform, generator)
    if sometimes(0.2):
        waveform = quantize(waveform, generator)
    # Last, because a clip quantized at 8 kHz has no quantization noise above 4 kHz either.
    return limit_band(waveform, generator) if sometimes(0.45) else waveform


def stretch_samples(waveform: np.ndarray, factor: float) -> np.ndarray:
    """Play `factor` times as fast, which shifts pitch and formants too. Cuts or zero-pads the spectrum; returns `size / factor` samples."""
    target = max(1, round(waveform.size / factor))
    if target == waveform.size or waveform.size == 0:
        return waveform
    # Pad to a length with a fast FFT. The padding also takes the wrap-around, and is cut off at the end.
    size = _fast_size(waveform.size + 256)
    spectrum = np.fft.rfft(waveform, size)
    padded = max(2, round(size * target / waveform.size))
    resampled = np.fft.irfft(spectrum[: padded // 2 + 1], padded) * (padded / size)
    return resampled[:target].astype(np.float32)


def _fast_size(size: int) -> int:
    """The smallest size of the form 2ⁿ, 3·2ⁿ or 5·2ⁿ that is at least `size`: fast for an FFT."""
    return min(base << max(0, (-(-size // base) - 1).bit_length()) for base in (1, 3, 5))


N_FFT, HOP = 512, 128
_WINDOW = np.sqrt(0.5 - 0.5 * np.cos(2 * np.pi * np.arange(N_FFT) / N_FFT)).astype(np.float32)


def change_voice(
    waveform: np.ndarray,
    rng: np.random.Generator,
    pitch: float | None = None,
    formants: float | None = None,
    tempo: float | None = None,
) -> np.ndarray:
    """Imitate another speaker: change pitch, vocal tract length and tempo independently. Each is random if omitted.

    Args:
        pitch: factor on the fundamental frequency, 0.75 to 1.35.
        formants: factor on the resonances, 0.82 to 1.22.
        tempo: factor on the speed, 0.7 to 1.4.
    """
    pitch = np.exp(rng.uniform(-0.28, 0.3)) if pitch is None else pitch
    # Higher voices usually come from shorter vocal tracts.
    formants = np.exp(0.25 * np.log(pitch) + rng.uniform(-0.14, 0.14)) if formants is None else formants
    tempo = np.exp(rng.uniform(-0.35, 0.33)) if tempo is None else tempo
    faster = stretch_samples(waveform, pitch)  # this scales formants and tempo by `pitch` too
    return _reshape(faster, formants / pitch, tempo / pitch)


def _reshape(waveform: np.ndarray, formants: float, tempo: float) -> np.ndarray:
    """Scale formants and tempo with a phase vocoder."""
    padded = np.pad(waveform, (N_FFT, 2 * N_FFT))
    frames = np.lib.stride_tricks.sliding_window_view(padded, N_FFT)[::HOP]
    spectrum = np.fft.rfft(frames * _WINDOW).astype(np.complex64)  # NumPy 1's FFT returns complex128
    magnitude = np.abs(spectrum) + np.float32(1e-6)
    magnitude *= _formant_gain(magnitude, formants)
    out = _overlap_add(_at_tempo(magnitude, np.angle(spectrum), tempo))
    start = int(N_FFT / tempo)
    return out[start : start + max(1, int(waveform.size / tempo))] * np.float32(HOP * 2 / N_FFT)


def _formant_gain(magnitude: np.ndarray, formants: float) -> np.ndarray:
    """Gain `(frames, bins)` that stretches the spectral envelope, the low part of the cepstrum, along frequency."""
    cepstrum = np.fft.irfft(np.log(magnitude))
    cepstrum[:, 32 : N_FFT - 31] = 0
    envelope = np.fft.rfft(cepstrum).real.astype(np.float32)
    bins = np.arange(N_FFT // 2 + 1)
    source = np.minimum(bins / formants, N_FFT // 2)
    below = np.minimum(source.astype(int), N_FFT // 2 - 1)
    share = (source - below).astype(np.float32)
    moved = envelope[:, below] * (1 - share) + envelope[:, below + 1] * share
    return np.exp(np.clip(moved - envelope, -6, 3))


def _at_tempo(magnitude: np.ndarray, phase: np.ndarray, tempo: float) -> np.ndarray:
    """Spectra of frames read `tempo` frames apart. Each bin's phase advances as it did between the two frames around the point read."""
    places = np.arange(0, len(magnitude) - 1.001, tempo)
    left = places.astype(int)
    between = (places - left).astype(np.float32)[:, None]
    advance = (phase[left + 1] - phase[left]) / np.float32(2 * np.pi)  # in turns
    total = np.cumsum(np.concatenate([phase[:1] / np.float32(2 * np.pi), advance[:-1] - np.round(advance[:-1])]), axis=0)
    angle = np.float32(2 * np.pi) * (total - np.round(total))
    level = magnitude[left] * (1 - between) + magnitude[left + 1] * between
    changed = np.empty(level.shape, np.complex64)
    changed.real, changed.imag = level * np.cos(angle), level * np.sin(angle)
    return changed


def _overlap_add(spectrum: np.ndarray) -> np.ndarray:
    """The waveform of windowed frames `HOP` samples apart."""
    pieces = np.fft.irfft(spectrum).astype(np.float32) * _WINDOW
    out = np.zeros((len(pieces) + N_FFT // HOP) * HOP, np.float32)
    for offset in range(N_FFT // HOP):
        part = pieces[:, offset * HOP : (offset + 1) * HOP].reshape(-1)
        out[offset * HOP : offset * HOP + part.size] += part
    return out


def clip_edges(waveform: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Cut up to 50 ms from each end, as if recording started late or stopped early, and fade both ends."""
    first, last = (rng.uniform(0, 0.05, 2) * RATE).astype(int)
    cut = waveform[first : max(waveform.size - last, first + RATE // 20)].copy()
    ramp = min(cut.size, int(rng.uniform(0.002, 0.05) * RATE))
    slope = np.linspace(0, 1, ramp, dtype=np.float32)
    cut[:ramp] *= slope
    cut[cut.size - ramp :] *= slope[::-1]
    return cut


def add_silence(waveform: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Add up to 0.6 s of silence at each end, usually much less."""
    before, after = (0.6 * rng.random(2) ** 2.5 * RATE).astype(int)
    return np.pad(waveform, (before, after))


def add_echo(waveform: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Imitate a room: convolve with the direct sound followed by low-passed noise that decays by 60 dB in 0.1 to 0.7 s."""
    seconds = rng.uniform(0.1, 0.7)
    time = np.arange(int(seconds * RATE), dtype=np.float32) / RATE
    tail = rng.standard_normal(time.size, dtype=np.float32) * np.exp(-6.9 / seconds * time)
    tail[1:] = tail[1:] + rng.uniform(0, 0.9) * tail[:-1]
    tail[: int(rng.uniform(0.001, 0.01) * RATE)] = 0
    tail *= 10 ** (-rng.uniform(0, 15) / 20) / np.sqrt(np.square(tail).sum() + 1e-9)
    tail[0] = 1
    size = _fast_size(waveform.size + tail.size)
    wet = np.fft.irfft(np.fft.rfft(waveform, size) * np.fft.rfft(tail, size), size)
    return wet[: waveform.size + min(tail.size, RATE // 5)].astype(np.float32)


def equalize(waveform: np.ndarray, rng: np.random.Generator, depth_db: float = 8.0) -> np.ndarray:
    """Imitate a microphone: an uneven but smooth frequency response, and a high-pass at up to 300 Hz."""
    knots = rng.normal(0, depth_db / 2, 8) + np.linspace(-1, 1, 8) * rng.normal(0, depth_db / 2)
    cut = rng.uniform(0, 300)

    def response(hertz: np.ndarray) -> np.ndarray:
        mel = np.log1p(hertz / 700)
        shape = 10 ** (np.interp(mel, np.linspace(0, np.log1p(8000 / 700), 8), knots) / 20)
        return shape * (hertz / (hertz + cut + 1e-3)) ** 2

    return _filter(waveform, response)


def limit_band(waveform: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Imitate a recording at 8 kHz or a telephone: a low-pass, usually at 3.2 to 4 kHz, and sometimes a high-pass near 300 Hz."""
    top = rng.uniform(3200, 4000) if rng.random() < 0.8 else rng.uniform(2500, 6500)
    bottom = rng.uniform(150, 350) if rng.random() < 0.4 else 0.0
    width = rng.uniform(20, 300)
    return _filter(waveform, lambda hertz: np.clip((top - hertz) / width, 0, 1) * np.clip((hertz - bottom) / 50 + 1, 0, 1))


def _filter(waveform: np.ndarray, response: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Multiply the spectrum by the real `response(hertz)`, which leaves the phase alone."""
    size = _fast_size(waveform.size + RATE // 50)
    hertz = np.linspace(0, RATE / 2, size // 2 + 1, dtype=np.float32)
    return np.fft.irfft(np.fft.rfft(waveform, size) * response(hertz), size)[: waveform.size].astype(np.float32)


def add_noise(waveform: np.ndarray, rng: np.random.Generator, snr_db: float | None = None) -> np.ndarray:
    """Add steady noise, from white to a low rumble. The signal-to-noise ratio is 5 to 45 dB if omitted."""
    size = _fast_size(waveform.size)
    spectrum = np.fft.rfft(rng.standard_normal(size, dtype=np.float32))
    spectrum /= np.sqrt(np.arange(1, spectrum.size + 1)) ** rng.uniform(0, 2)
    return _mix(waveform, np.fft.irfft(spectrum, size)[: waveform.size], rng.uniform(5, 45) if snr_db is None else snr_db)


def add_babble(waveform: np.ndarray, rng: np.random.Generator, others: Sequence[np.ndarray], snr_db: float | None = None) -> np.ndarray:
    """Add three to six other clips, looped from a random start. The signal-to-noise ratio is 8 to 30 dB if omitted."""
    babble = np.zeros(waveform.size, np.float32)
    for number in rng.integers(0, len(others), rng.integers(3, 7)):
        if others[number].size:
            babble += np.resize(np.roll(others[number], rng.integers(others[number].size)), waveform.size)
    return _mix(waveform, babble, rng.uniform(8, 30) if snr_db is None else snr_db)


def _mix(waveform: np.ndarray, noise: np.ndarray, snr_db: float) -> np.ndarray:
    speech, power = np.square(waveform).mean(), np.square(noise).mean()
    return (waveform + noise * np.sqrt(speech / (power + 1e-12) * 10 ** (-snr_db / 10))).astype(np.float32)


def change_gain(waveform: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Scale the peak to between 0 and 36 dB below full scale; small reductions are more likely."""
    return (waveform * (10 ** (-36 * rng.random() ** 1.5 / 20) / (np.abs(waveform).max() + 1e-6))).astype(np.float32)


def quantize(waveform: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Quantize to 8-bit µ-law, as telephones do, or to 8 to 12 bits."""
    x = np.clip(waveform, -1, 1)
    if rng.random() < 0.5:
        code = np.round(np.sign(x) * np.log1p(255 * np.abs(x)) / np.log(256) * 127) / 127
        return (np.sign(code) * np.expm1(np.abs(code) * np.log(256)) / 255).astype(np.float32)
    steps = 2.0 ** rng.integers(7, 12)
    return (np.round(x * steps) / steps).astype(np.float32)
