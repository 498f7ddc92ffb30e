"""Products on a CPU with one of a few numbers of rows.

oneDNN, which multiplies everything but float32 there, prepares a product for each number of rows that it meets, in about half a
millisecond, and keeps the last thousand of them, at up to a megabyte each. Recordings and prompts have any number of frames and tokens.
"""

import torch
import torch.nn.functional as F
from granite_kernels.cpu import few_sizes
from torch import Tensor

__all__ = ["linear", "with_few_sizes"]

_ANY = 16  # so few rows may have any number
_BY_OTHERS = (torch.float32, torch.float64)  # dtypes that oneDNN does not multiply


def with_few_sizes(x: Tensor) -> Tensor:
    """`(rows, in)`, the same or, where it is for oneDNN, with rows of zeros after its last."""
    rows = x.shape[0]
    if rows <= _ANY or x.device.type != "cpu" or x.dtype in _BY_OTHERS or torch.is_grad_enabled():
        return x
    return x if few_sizes(rows) == rows else F.pad(x, (0, 0, 0, few_sizes(rows) - rows))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`: `(..., in)` to `(..., out)`."""
    if x.device.type != "cpu" or x.dtype in _BY_OTHERS or torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    y = F.linear(with_few_sizes(flat), weight, bias)[: flat.shape[0]]
    return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.shape[0])
