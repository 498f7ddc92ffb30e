"""From one sampling rate to another: torchaudio's windowed-sinc filter, on a whole waveform or block by block."""

import math
from fractions import Fraction
from numbers import Integral
from typing import TYPE_CHECKING

from granite_speech.errors import AudioError, MissingDependencyError
from granite_speech.inputs.audio_decoding import HIGHEST_RATE, LOWEST_RATE

if TYPE_CHECKING:
    import torch

__all__ = ["BlockResampler", "check_rate", "resample"]

# The filter has numerator x denominator taps of the reduced ratio: 44101 Hz to 16 kHz would take 3 GB. With this bound it takes
# tens of MB. All common rates are exact; others are off by at most one part in 4,000 in speed.
LARGEST_DENOMINATOR = 2_000
# Zero crossings of the sinc on either side, and its roll-off: torchaudio's defaults.
FILTER_WIDTH, ROLLOFF = 6, 0.99


def resample(samples: "torch.Tensor", rate: int, sampling_rate: int = 16000) -> "torch.Tensor":
    """Resamples a waveform `(…, samples)` float32 from `rate` to `sampling_rate`, both in Hz (`torchaudio.functional.resample`).

    Raises:
        AudioError: a rate that is not an integer, or not from 1 kHz to 768 kHz.
        MissingDependencyError: torchaudio cannot be imported.
    """
    check_rate(rate)
    check_rate(sampling_rate)
    if rate == sampling_rate:
        return samples
    ratio = _ratio(rate, sampling_rate)
    return _torchaudio(rate, sampling_rate).functional.resample(samples, ratio.numerator, ratio.denominator)


def check_rate(rate: int) -> None:
    """Refuses an impossible rate."""
    if not isinstance(rate, Integral) or not LOWEST_RATE <= rate <= HIGHEST_RATE:
        raise AudioError(
            got=f"a sampling rate of {rate!r:.40} Hz", expected=f"{LOWEST_RATE} to {HIGHEST_RATE} Hz", remedy="Correct the rate"
        )


def _ratio(rate: int, sampling_rate: int) -> Fraction:
    ratio = Fraction(int(rate), int(sampling_rate))
    return ratio.limit_denominator(LARGEST_DENOMINATOR) if ratio >= 1 else 1 / (1 / ratio).limit_denominator(LARGEST_DENOMINATOR)


def _torchaudio(rate: int, sampling_rate: int):
    try:
        import torchaudio.functional
        import torchaudio.transforms
    except (ImportError, OSError, RuntimeError) as error:  # OSError, RuntimeError: built for a different CUDA from torch
        raise MissingDependencyError(
            got=f"sound at {rate} Hz and no working torchaudio ({error})",
            expected=f"torchaudio, to resample it to {sampling_rate} Hz",
            remedy="Install the torchaudio that belongs to the installed torch, or convert the file to "
            f"{sampling_rate} Hz: ffmpeg -i IN -ac 1 -ar {sampling_rate} OUT.wav",
        ) from error
    return torchaudio


class BlockResampler:
    """`resample` for a waveform that comes in blocks. The results, joined, equal that for the whole waveform.

    The filter runs on blocks that overlap by its width, and results near the edges are discarded.
    """

    def __init__(self, rate: int, sampling_rate: int):
        import torch

        ratio = _ratio(rate, sampling_rate)
        # `period` input samples give `outputs` output samples. Blocks are cut at whole periods, where the filter's phase is the same.
        self.period, self.outputs = ratio.numerator, ratio.denominator
        self.is_identity = self.period == self.outputs
        self.waiting = torch.zeros(0)
        self.before = 0  # samples at the start of `waiting` whose output was already returned
        if not self.is_identity:
            width = math.ceil(FILTER_WIDTH * self.period / (min(self.period, self.outputs) * ROLLOFF))
            self.overlap = math.ceil(width / self.period) * self.period
            transforms = _torchaudio(rate, sampling_rate).transforms
            self.filter = transforms.Resample(
                self.period, self.outputs, lowpass_filter_width=FILTER_WIDTH, rolloff=ROLLOFF, dtype=torch.float32
            )

    def push(self, samples: "torch.Tensor") -> "torch.Tensor":
        """Takes `(samples,)` float32 and returns the output that is final so far, possibly empty."""
        if self.is_identity:
            return samples
        import torch

        self.waiting = torch.cat([self.waiting, samples])
        ready = (len(self.waiting) - self.before - self.overlap) // self.period * self.period
        if ready <= 0:
            return self.waiting[:0]
        end = self.before + ready
        result = self.filter(self.waiting[: end + self.overlap])[self._outputs(self.before) : self._outputs(end)]
        cut = max(0, end - self.overlap)
        self.waiting, self.before = self.waiting[cut:].clone(), end - cut
        return result

    def finish(self) -> "torch.Tensor":
        """The rest of the output, after the last `push`."""
        if self.is_identity or not len(self.waiting):
            return self.waiting[:0]
        result = self.filter(self.waiting)[self._outputs(self.before) :]
        self.waiting, self.before = self.waiting[:0], 0
        return result

    def _outputs(self, samples: int) -> int:
        return samples // self.period * self.outputs
