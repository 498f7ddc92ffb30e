"""`torch.autocast` around the operations that PyTorch does not know."""

from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor

__all__ = ["autocast_dtype", "cast"]


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast multiplies matrices in on this device; None where it is off."""
    kind = device.type
    return torch.get_autocast_dtype(kind) if _is_available(kind) and torch.is_autocast_enabled(kind) else None


def cast(tensors: Iterable[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    """What autocast does to the arguments of `F.linear`: float64 is left alone."""
    return [one if one is None or one.dtype == torch.float64 else one.to(dtype) for one in tensors]


@cache
def _is_available(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind)  # not on "meta"
