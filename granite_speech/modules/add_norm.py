"""A residual sum and the LayerNorm after it, which are one launch on a GPU."""

import torch
from granite_kernels import OPERATIONS
from granite_kernels.op import accumulator
from torch import Tensor, nn

from granite_speech.modules.autocast import autocast_dtype
from granite_speech.modules.side_by_side import is_plain

__all__ = ["add_norm", "has_kernels", "mean_of_pairs"]


def has_kernels(x: Tensor) -> bool:
    """Whether `add_layer_norm` runs as a kernel on this tensor. Then so do the other operations of the encoder."""
    return OPERATIONS["add_layer_norm"].resolve(None, x.device, x.dtype) == "triton"


def add_norm(
    x: Tensor,
    delta: Tensor,
    norm: nn.LayerNorm,
    next_norm: nn.LayerNorm | None = None,
    *,
    multiplier: float = 1.0,
    pairs: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A residual sum and the norm after it, packed.

    Args:
        x, delta: `(rows, width)`; the sum is `x + multiplier * delta`.
        norm: of the sum.
        next_norm: of that norm.
        pairs: `(rows of delta,)` int32. Row r of the sum is then that of the mean of rows `pairs[r]` and `pairs[r] + 1` of x, or of zeros
            if it is −1.

    Returns:
        The sum and its norm; with `next_norm`, the norm of the sum and `next_norm` of it.
    """
    norms = [norm] if next_norm is None else [norm, next_norm]
    is_readable = x.dtype == delta.dtype and x.stride(1) == delta.stride(1) == 1
    if is_readable and has_kernels(x) and all(_is_usual(one, x) for one in norms):
        options = {"eps": norm.eps, "multiplier": multiplier} | ({} if next_norm is None else {"next_eps": next_norm.eps})
        options |= {} if pairs is None else {"pairs": pairs}
        return OPERATIONS["add_layer_norm"].run(x, delta, *(part for one in norms for part in (one.weight, one.bias)), **options)
    x = torch.add(x if pairs is None else mean_of_pairs(x, pairs), delta, alpha=multiplier)
    normed = norm(x)
    return (x, normed) if next_norm is None else (normed, next_norm(normed))


def mean_of_pairs(x: Tensor, pairs: Tensor) -> Tensor:
    """`(rows, width)` → `(len(pairs), width)`: means of two rows one after the other, computed at least in float32; zeros for −1."""
    if len(x) < 2:
        return x.new_zeros(len(pairs), x.shape[1])
    wide, firsts = accumulator(x.dtype), pairs.clamp(0, len(x) - 2)
    mean = ((x.index_select(0, firsts).to(wide) + x.index_select(0, firsts + 1).to(wide)) / 2).to(x.dtype)
    return mean.masked_fill(pairs[:, None] < 0, 0)


def _is_usual(norm: nn.Module, x: Tensor) -> bool:
    """Whether a module is LayerNorm and no more, computed in the dtype of x, which it is not under autocast."""
    if type(norm) is not nn.LayerNorm or norm.weight is None or norm.bias is None or norm.normalized_shape != x.shape[1:]:
        return False
    can_be_read = (is_plain(one) and one.is_contiguous() and one.dtype == x.dtype for one in (norm.weight, norm.bias))
    return all(can_be_read) and autocast_dtype(x.device) is None
