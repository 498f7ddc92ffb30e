"""Seeds derived from where random numbers are used, not from earlier draws.

So training checkpoints need no generator state, and a resumed run draws the same numbers as an uninterrupted one.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["derived_seed", "seeded"]


def derived_seed(*parts: int | str) -> int:
    """A 63-bit seed derived from all parts in order."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@contextmanager
def seeded(device: torch.device, *parts: int | str) -> Iterator[None]:
    """Seed torch's generators, on the host and the device, from these parts; restore their state afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(derived_seed(*parts))
        yield
