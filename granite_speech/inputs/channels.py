"""From several channels to one: their mean, or the loudest one if they cancel out.

Some recorders and cables invert one channel, so that the mean of the two is silence though each alone is fine. Channels cancel out
if their mean has less than a quarter of the energy that the mean of uncorrelated channels would have.
"""

import numpy as np
import torch

__all__ = ["ChannelEnergies", "mix"]

CANCELLED = 0.25


def mix(channels: torch.Tensor) -> torch.Tensor:
    """One channel `(samples,)` of a clip `(channels, samples)`, floating point. Does not wait for the device."""
    mean = channels.mean(dim=0)
    if channels.shape[0] == 1 or channels.shape[1] == 0:
        return mean
    # Each channel's average is subtracted first: a constant offset is not sound.
    energies = torch.stack([(channel - channel.mean()).norm().double().square() for channel in (*channels, mean)])
    loudest = channels.index_select(0, energies[:-1].argmax().view(1))[0]
    return torch.where(energies[-1] < CANCELLED * energies[:-1].sum() / channels.shape[0] ** 2, loudest, mean)


class ChannelEnergies:
    """The same decision for a recording that comes in pieces, made once for each stretch with the same number of channels.

    Pieces are `(channels, samples)` with at least two channels, and come with the number of their stretch.
    """

    def __init__(self):
        self.totals: dict[int, list[np.ndarray | int]] = {}

    def mean(self, stretch: int, channels: np.ndarray) -> np.ndarray:
        """The mean over channels; also adds to the energies of the stretch."""
        mean = channels.mean(axis=0, dtype=np.float32)
        channels_and_mean = np.concatenate([channels, mean[None]]).astype(np.float64)
        totals = self.totals.setdefault(stretch, [0, 0.0, 0.0])
        totals[0] += channels.shape[1]
        totals[1] += channels_and_mean.sum(axis=1)
        totals[2] += np.square(channels_and_mean).sum(axis=1)
        return mean

    def chosen(self, stretch: int, channels: np.ndarray) -> np.ndarray:
        """The mean, or the loudest channel if they cancel out. Call it after `mean` has seen the whole stretch."""
        loudest = self._loudest_of_cancelled(stretch)
        return channels.mean(axis=0, dtype=np.float32) if loudest is None else channels[loudest].copy()

    def any_cancelled(self) -> bool:
        """Whether the channels of any stretch cancel out."""
        return any(self._loudest_of_cancelled(stretch) is not None for stretch in self.totals)

    def _loudest_of_cancelled(self, stretch: int) -> int | None:
        count, sums, squares = self.totals[stretch]
        *channels, mean = squares - np.square(sums) / max(count, 1)
        cancelled = mean < CANCELLED * sum(channels) / len(channels) ** 2
        return int(np.argmax(channels)) if cancelled else None
