"""The log-mel spectrogram of 16 kHz speech, as the encoder's frames: how it is computed.

Clips are packed end to end, never padded to a common length. So a batch costs one FFT over all frames, and a clip has the
same features in a batch as alone.

The definition is that of transformers' `GraniteSpeechFeatureExtractor` for a single clip: the power mel spectrogram
of `torchaudio.transforms.MelSpectrogram` (periodic Hann window, centred frames, reflected edges, HTK triangles without
normalisation), log10 floored at the clip's own maximum less 8, mapped by x / 4 + 1, and mel frames stacked in pairs.
torchaudio itself is not needed.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from granite_speech.errors import ConfigError, InputError, UnsupportedError
from granite_speech.inputs.clips import check_clips

__all__ = ["FrameCounts", "LogMel", "Spectrogram", "as_device", "check_sizes", "count_frames", "mel_filters"]

# Mel frames transformed at once. Limits the scratch memory of an hour of audio to that of about three minutes on a CPU.
ROWS_PER_BLOCK = {"cpu": 1 << 14, "cuda": 1 << 18}
# The limit for every size in a file, and for the filters (bins times bands). The largest sampling rates are below it.
LARGEST_SIZE, LARGEST_FILTERS = 1_000_000, 1 << 24
# torchaudio's defaults for options that the released files do not set. No other values are supported.
FIXED_MELSPEC = {
    "f_min": 0.0,
    "f_max": None,
    "pad": 0,
    "power": 2.0,
    "normalized": False,
    "center": True,
    "pad_mode": "reflect",
    "onesided": None,
    "norm": None,
    "mel_scale": "htk",
}


class FrameCounts(NamedTuple):
    """The length of one clip at each stage."""

    mel: int
    encoder: int
    tokens: int


def count_frames(samples: int, *, hop_length: int = 160, window_size: int = 15, downsample_rate: int = 5) -> FrameCounts:
    """Lengths of a clip of `samples` samples: mel frames, encoder frames (pairs of mel frames), audio tokens.

    A partly filled last projector window gives as many tokens as a full one. A clip shorter than one hop has no encoder frame and no
    token; the feature extractor refuses it.
    """
    mel = samples // hop_length + 1
    encoder = mel // 2
    tokens = -(-encoder // window_size) * (window_size // downsample_rate)
    return FrameCounts(mel, encoder, tokens)


def check_sizes(sizes: Mapping[str, Any]) -> None:
    """Raise ConfigError for a size that is not a positive integer or is too large."""
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST_SIZE:
            raise ConfigError(
                got=f"{name} = {value!r:.40}",
                expected=f"an integer from 1 to {LARGEST_SIZE}",
                remedy="Correct it in preprocessor_config.json",
            )


class Spectrogram:
    """The log-mel spectrogram of clips laid end to end, of which each model family makes its own features.

    Args:
        melspec_kwargs: sample_rate, n_fft, win_length, hop_length and n_mels, checked by `check_sizes`.

    Raises:
        ConfigError: sizes that contradict each other, or filters that are too large.
    """

    def __init__(self, melspec_kwargs: dict[str, Any]):
        n_fft, win_length, n_mels = (melspec_kwargs[name] for name in ("n_fft", "win_length", "n_mels"))
        if n_fft * n_mels > LARGEST_FILTERS:
            raise ConfigError(
                got=f"n_fft = {n_fft} with n_mels = {n_mels}",
                expected=f"a product of at most {LARGEST_FILTERS}",
                remedy="Correct them in preprocessor_config.json",
            )
        if n_fft % 2 or win_length > n_fft:
            raise ConfigError(
                got=f"n_fft = {n_fft} with win_length = {win_length}",
                expected="an even n_fft that holds the window",
                remedy="Correct them in preprocessor_config.json",
            )
        self.melspec_kwargs = melspec_kwargs
        self.sampling_rate: int = melspec_kwargs["sample_rate"]
        self._constants: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def _normalized(
        self,
        audios: Sequence[torch.Tensor],
        lengths: Sequence[int],
        frames: Sequence[int],
        kept: Sequence[int],
        floor: float,
        device: torch.device,
    ) -> torch.Tensor:
        """Log-mel frames of all clips end to end, not below the clip's maximum less `floor`, mapped by x / 4 + 1.

        Args:
            audios: clips `(samples,)`, checked.
            lengths: samples of each clip with the zeros after it; its end is reflected after those.
            frames: mel frames of each clip that count towards its maximum.
            kept: how many of those are returned.
            floor: in powers of ten.
            device: of the computation and the result.

        Returns:
            `(sum of kept, n_mels)` float32.
        """
        hop, n_fft = self.melspec_kwargs["hop_length"], self.melspec_kwargs["n_fft"]
        # Each clip's part of the buffer begins at a multiple of hop, so that one strided view holds the frames of all
        # clips. The few frames that cross a border between clips are computed too, but never read.
        rows = [-(-(length + n_fft) // hop) for length in lengths]
        first_row = np.cumsum([0, *rows])
        total_rows = int(first_row[-1])
        signal = self._lay_out(audios, lengths, first_row[:-1] * hop, total_rows * hop + n_fft, device)
        log_mel = self._log_mel(signal, total_rows)

        within = np.arange(total_rows) - np.repeat(first_row[:-1], rows)
        # Rows that cross a border belong to an extra clip, whose maximum is never read.
        owner = np.where(within < np.repeat(frames, rows), np.repeat(np.arange(len(audios)), rows), len(audios))
        keep = np.flatnonzero(within < np.repeat(kept, rows))
        owner, keep = torch.from_numpy(owner).to(device), torch.from_numpy(keep).to(device)

        loudest = torch.full((len(audios) + 1,), -math.inf, device=device, dtype=torch.float32)
        loudest.scatter_reduce_(0, owner, log_mel.amax(dim=1), "amax")
        lowest = (loudest - floor)[owner[keep]].unsqueeze(1)
        return torch.maximum(log_mel[keep], lowest).div_(4).add_(1)

    def _lay_out(
        self, audios: Sequence[torch.Tensor], lengths: Sequence[int], starts: np.ndarray, size: int, device: torch.device
    ) -> torch.Tensor:
        """One buffer `(size,)` with every clip from its start on, zeros up to its length, and half an FFT of reflected samples on
        either side."""
        half = self.melspec_kwargs["n_fft"] // 2
        on_host = all(clip.device.type == "cpu" for clip in audios)
        pinned = on_host and device.type == "cuda"
        signal = torch.zeros(size, dtype=torch.float32, device="cpu" if on_host else device, pin_memory=pinned)
        for clip, start in zip(audios, starts.tolist(), strict=True):
            signal[start + half : start + half + clip.numel()].copy_(clip)
        signal = signal.to(device, non_blocking=pinned)

        samples = np.array(lengths, dtype=np.int64)[:, None]
        edge = np.tile(np.arange(half), (len(audios), 1))
        position = np.concatenate([edge - half, edge + samples], axis=1)
        # The reflection repeats with period 2 * (n - 1): a clip shorter than half an FFT is reflected several times.
        period = np.maximum(2 * (samples - 1), 1)
        folded = position % period
        source = np.where(samples == 1, 0, np.minimum(folded, period - folded))
        target_and_source = np.stack([position, source]) + (starts[:, None] + half)
        target, source = torch.from_numpy(target_and_source.reshape(2, -1)).to(device)
        signal[target] = signal[source]
        return signal

    def _log_mel(self, signal: torch.Tensor, total_rows: int) -> torch.Tensor:
        """log10 of the mel power of every frame: `(total_rows, n_mels)` float32."""
        hop, n_fft, n_mels = (self.melspec_kwargs[name] for name in ("hop_length", "n_fft", "n_mels"))
        window, filters = self._constants_on(signal.device)
        frames = signal.unfold(0, n_fft, hop)
        log_mel = torch.empty(total_rows, n_mels, dtype=torch.float32, device=signal.device)
        block = ROWS_PER_BLOCK.get(signal.device.type, ROWS_PER_BLOCK["cpu"])
        for begin in range(0, total_rows, block):
            end = min(begin + block, total_rows)
            spectrum = torch.fft.rfft(frames[begin:end] * window)
            power = spectrum.real.square().addcmul_(spectrum.imag, spectrum.imag)
            # In float64, which neither autocast nor settings for faster float32 products affect.
            mel = torch.mm(power.double(), filters)
            log_mel[begin:end] = mel.float().clamp_(min=1e-10).log10_()
        return log_mel

    def _constants_on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Window `(n_fft,)` float32 and filters `(n_fft // 2 + 1, n_mels)` float64, cached for each device."""
        if device not in self._constants:
            kwargs = self.melspec_kwargs
            window = torch.hann_window(kwargs["win_length"], periodic=True, dtype=torch.float32, device="cpu")
            left = (kwargs["n_fft"] - kwargs["win_length"]) // 2
            window = torch.nn.functional.pad(window, (left, kwargs["n_fft"] - kwargs["win_length"] - left))
            filters = mel_filters(kwargs["n_fft"] // 2 + 1, kwargs["n_mels"], kwargs["sample_rate"]).double()
            self._constants[device] = window.to(device), filters.to(device)
        return self._constants[device]


class LogMel(Spectrogram):
    """A spectrogram's sizes, checked, and its computation.

    Args:
        melspec_kwargs: sample_rate, n_fft, win_length, hop_length and n_mels.
        others: entries of torchaudio's melspec_kwargs beyond these, which must have the values of FIXED_MELSPEC.
        projector_window_size, projector_downsample_rate: how frames become audio tokens.

    Raises:
        ConfigError: a size that is not a positive integer or is too large, or sizes that contradict each other.
        UnsupportedError: another kind of spectrogram.
    """

    def __init__(self, melspec_kwargs: dict[str, Any], others: dict[str, Any], projector_window_size: int, projector_downsample_rate: int):
        for name, value in others.items():
            if name not in FIXED_MELSPEC or value != FIXED_MELSPEC[name]:
                raise UnsupportedError(
                    got=f"melspec_kwargs[{name!r}] = {value!r}",
                    expected=f"only {', '.join(melspec_kwargs)}",
                    remedy="Use the preprocessor_config.json that belongs to the checkpoint",
                )
        window = {"projector_window_size": projector_window_size, "projector_downsample_rate": projector_downsample_rate}
        check_sizes({**melspec_kwargs, **window})
        super().__init__(melspec_kwargs)
        self.projector_window_size = projector_window_size
        self.projector_downsample_rate = projector_downsample_rate
        if projector_window_size % projector_downsample_rate:
            raise ConfigError(
                got=f"projector_downsample_rate = {projector_downsample_rate}",
                expected=f"a divisor of projector_window_size = {projector_window_size}",
                remedy="Correct it in preprocessor_config.json",
            )

    def count_frames(self, samples: int) -> FrameCounts:
        """`count_frames` with this extractor's hop, window and rate."""
        return count_frames(
            samples,
            hop_length=self.melspec_kwargs["hop_length"],
            window_size=self.projector_window_size,
            downsample_rate=self.projector_downsample_rate,
        )

    @torch.no_grad()
    def extract_packed(self, audios: Sequence[torch.Tensor], device: str | torch.device) -> tuple[torch.Tensor, list[int]]:
        """Features of all clips, end to end.

        Clips on the CPU are joined there and copied to the device once, without waiting for it. Clips on an accelerator cost
        one wait, to check that they are finite.

        Args:
            audios: clips `(samples,)`, float32, at least one sample each, on any device. A clip shorter than a hop has no frame.
            device: of the computation and the result.

        Returns:
            `(total_frames, 2 * n_mels)` float32 on device, and each clip's number of encoder frames.

        Raises:
            AudioError: as `__call__`, except for clips that are too short.
            InputError: no such device.
        """
        device = as_device(device)
        check_clips(audios)
        lengths = [clip.numel() for clip in audios]
        counts = [self.count_frames(length) for length in lengths]
        # The odd last frame counts towards the maximum, then is dropped.
        frames = self._normalized(audios, lengths, [one.mel for one in counts], [one.encoder * 2 for one in counts], 8.0, device)
        return frames.view(-1, 2 * self.melspec_kwargs["n_mels"]), [count.encoder for count in counts]


def mel_filters(num_bins: int, n_mels: int, sampling_rate: int) -> torch.Tensor:
    """HTK triangles, `(num_bins, n_mels)` float32 on the CPU.

    Rounded to float32 at each step, in torchaudio's order. A tone at the foot of a triangle shows how its corners were
    rounded, and a more exact filter would differ there by far more than the tolerance.
    """
    top = float(sampling_rate // 2)
    bins = torch.linspace(0, top, num_bins, dtype=torch.float32, device="cpu")
    corners = torch.linspace(0.0, 2595.0 * math.log10(1.0 + top / 700.0), n_mels + 2, dtype=torch.float32, device="cpu")
    corners = 700.0 * (10.0 ** (corners / 2595.0) - 1.0)
    width = corners[1:] - corners[:-1]
    rising = (bins[:, None] - corners[None, :-2]) / width[:-1]
    falling = (corners[None, 2:] - bins[:, None]) / width[1:]
    return torch.minimum(rising, falling).clamp_(min=0.0)


def as_device(device: str | torch.device) -> torch.device:
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InputError(got=f"device {device!r:.100}", expected="a torch device", remedy="Pass 'cpu' or 'cuda'") from error
