"""Random numbers that follow from where they are used, and from nothing that was drawn before.

So a checkpoint of the training holds no generator's state, and who goes on from one draws what he would have drawn.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["derived_seed", "seeded"]


def derived_seed(*parts: int | str) -> int:
    """A seed of 63 bits that follows from all parts, in their order."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@contextmanager
def seeded(device: torch.device, *parts: int | str) -> Iterator[None]:
    """torch's own generators, the host's and the device's, seeded from these parts; afterwards they are as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(derived_seed(*parts))
        yield
