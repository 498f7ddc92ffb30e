"""What a CTC head gives that hears certain letters, and how loud they are, written down by hand."""

import numpy as np
import torch

__all__ = ["CHARACTERS", "frame", "level", "spelled"]

CHARACTERS = 256
_LOUD = 30.0


def spelled(text: str, *, frames: int, labels: int = CHARACTERS, probability: float = 0.9) -> torch.Tensor:
    """Log-probabilities `(frames, labels)` of a head that hears these characters in frames 2, 4, 6, …, and blanks otherwise.

    "_" is a blank too.
    """
    heard = torch.full((frames, labels), (1 - probability) / (labels - 1))
    said = {frame(place): ord(one) for place, one in enumerate(text) if one != "_"}
    for number in range(frames):
        heard[number, said.get(number, 0)] = probability
    return heard.log()


def frame(place: int) -> int:
    """The frame of a character of `spelled`, of 20 ms."""
    return 2 * place + 2


def level(text: str, *, frames: int) -> torch.Tensor:
    """`loudness` of what `spelled` hears, `(2 * frames,)`: nothing but spaces and "_" are silent, for 40 ms."""
    loud = np.zeros(2 * frames, np.float32)
    for place, one in enumerate(text):
        if one not in " _":
            loud[2 * frame(place) : 2 * frame(place) + 4] = _LOUD
    return torch.from_numpy(loud)
