"""A feed-forward's inner tensor is its widest by far. On a CPU it is computed for some of the rows at a time."""

import torch
from torch import Tensor

__all__ = ["number_of_parts"]

# Of the inner tensor, at most. The C library takes memory for one of 32 MiB or more from the system, and gives it back, at each call:
# the system then clears every page of it.
_BYTES = 2**24


def number_of_parts(x: Tensor, inner: int) -> int:
    """Into how many parts to split the rows `(rows, width)` of a feed-forward whose inner width is `inner`; 1 if not at all."""
    if x.dim() != 2 or x.device.type != "cpu" or torch.is_grad_enabled():
        return 1
    return max(1, -(-len(x) * inner * x.element_size() // _BYTES))
