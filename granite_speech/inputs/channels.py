"""From several channels to one: their mean, or the loudest one where they cancel out.

Some recorders and cables invert one channel. Its mean with the other is silence, though each alone is fine. Channels count as
cancelling out if their mean has less than a quarter of the energy that it would have if they had nothing to do with each other.
"""

import numpy as np
import torch

__all__ = ["ChannelEnergies", "mix"]

CANCELLED = 0.25


def mix(channels: torch.Tensor) -> torch.Tensor:
    """One channel `(samples,)` of a clip `(channels, samples)`, floating point. Waits for no device."""
    mean = channels.mean(dim=0)
    if channels.shape[0] == 1 or channels.shape[1] == 0:
        return mean
    # Around each channel's own average: a constant offset is no sound.
    energies = torch.stack([(channel - channel.mean()).norm().double().square() for channel in (*channels, mean)])
    loudest = channels.index_select(0, energies[:-1].argmax().view(1))[0]
    return torch.where(energies[-1] < CANCELLED * energies[:-1].sum() / channels.shape[0] ** 2, loudest, mean)


class ChannelEnergies:
    """The same decision for a recording that goes by in pieces: one for each stretch with an equal number of channels.

    Pieces are `(channels, samples)` with at least two channels, and come with the number of their stretch.
    """

    def __init__(self):
        self.totals: dict[int, list[np.ndarray | int]] = {}

    def mean(self, stretch: int, channels: np.ndarray) -> np.ndarray:
        """The mean over channels, whose energies are counted."""
        mean = channels.mean(axis=0, dtype=np.float32)
        rows = np.concatenate([channels, mean[None]]).astype(np.float64)
        totals = self.totals.setdefault(stretch, [0, 0.0, 0.0])
        totals[0] += channels.shape[1]
        totals[1] += rows.sum(axis=1)
        totals[2] += np.square(rows).sum(axis=1)
        return mean

    def chosen(self, stretch: int, channels: np.ndarray) -> np.ndarray:
        """The mean, or the loudest channel of a stretch whose channels cancel out, once all of it has been counted."""
        loudest = self._loudest_of_cancelled(stretch)
        return channels.mean(axis=0, dtype=np.float32) if loudest is None else channels[loudest].copy()

    def any_cancelled(self) -> bool:
        """Whether `mean` has lost the sound of any stretch."""
        return any(self._loudest_of_cancelled(stretch) is not None for stretch in self.totals)

    def _loudest_of_cancelled(self, stretch: int) -> int | None:
        count, sums, squares = self.totals[stretch]
        *channels, mean = squares - np.square(sums) / max(count, 1)
        cancelled = mean < CANCELLED * sum(channels) / len(channels) ** 2
        return int(np.argmax(channels)) if cancelled else None
