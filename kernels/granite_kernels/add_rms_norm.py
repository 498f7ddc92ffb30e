"""A residual sum and the RMSNorm after it, in one pass."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from granite_kernels.op import Arguments, Case, Cost, Draw, Operation, accumulator, called_with, nbytes, triton_backend


class AddRmsNormInputs(NamedTuple):
    """The arguments of `add_rms_norm` except `impl`."""

    x: torch.Tensor
    delta: torch.Tensor
    weight: torch.Tensor
    eps: float
    multiplier: float


def add_rms_norm(
    x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, *, eps: float, multiplier: float, impl: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of a residual stream and a branch, and its norm for the next branch.

    ::

        sum = x + multiplier · delta
        normed = weight · sum / √(mean(sum²) + eps)     the mean is over the row

    | argument | shape | stride | dtype |
    |---|---|---|---|
    | x | (rows, width) | last 1, first free | any float |
    | delta | (rows, width) | last 1, first free | as x |
    | or the parts of a delta | (parts, rows, width), of `split_linear` | last 1, others free | float32, or float64 as x |
    | weight | (width,) | 1 | as x |
    | returns | sum and normed, (rows, width) each | contiguous | as x |

    Partial sums are added in the order of the parts. All is computed in float32 (float64 for float64). The sum is rounded before it is
    normalised, so that normed is the norm of the sum that is returned. The reference rounds where eager code does: also the total of
    the parts, and the normalised row before it is multiplied by the weight. The kernel leaves out these two.

    Args:
        eps: added to the mean of the squares.
        multiplier: factor on delta; residual_multiplier in Granite.
        impl: "triton", "torch", or None for the fastest available.

    Raises:
        KernelError: wrong shapes, dtypes, devices or strides, no parts, or a tensor that needs a gradient; with "triton", a width above
            8192.

    RMSNorm is from Zhang and Sennrich, arXiv 1910.07467.
    """
    inputs = AddRmsNormInputs(x, delta, weight, eps, multiplier)
    _check(inputs)
    return OPERATION.select(impl, x)(*inputs)


def _check(inputs: AddRmsNormInputs) -> None:
    arguments, delta = Arguments("add_rms_norm"), inputs.delta
    arguments.tensor("x", inputs.x, "rows width")
    if isinstance(delta, torch.Tensor) and delta.ndim == 3:
        arguments.tensor("delta", delta, "parts rows width", (accumulator(inputs.x.dtype),))
        if not delta.shape[0]:
            arguments.refuse("delta has no parts", "at least 1", "Pass a (rows, width) delta for a product that is not split")
    else:
        arguments.tensor("delta", delta, "rows width")
    arguments.tensor("weight", inputs.weight, "width")
    arguments.refuse_gradients(x=inputs.x, delta=delta, weight=inputs.weight)


@called_with(AddRmsNormInputs)
def add_rms_norm_reference(inputs: AddRmsNormInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """`add_rms_norm` in PyTorch, with the calls and roundings of eager code."""
    x, delta, weight, eps, multiplier = inputs
    if delta.ndim == 3:
        delta = delta.sum(0).to(x.dtype)
    total = torch.add(x, delta, alpha=multiplier)
    if total.dtype == torch.float32:  # nothing is rounded in between
        return total.contiguous(), F.rms_norm(total, weight.shape, weight, eps)
    return total.contiguous(), weight * F.rms_norm(total, weight.shape, eps=eps)


@called_with(AddRmsNormInputs)
def add_rms_norm_cost(inputs: AddRmsNormInputs) -> Cost:
    """FLOPs: a multiply-add for the sum, one for the mean, two products for the norm, and the sum of the parts. Bytes: every tensor
    once."""
    x, delta, weight, *_ = inputs
    parts = delta.shape[0] if delta.ndim == 3 else 1
    return Cost(flops=(5 + parts) * x.numel(), bytes=3 * nbytes(x) + nbytes(delta, weight))


@called_with(AddRmsNormInputs)
def add_rms_norm_library(inputs: AddRmsNormInputs) -> Callable[[], torch.Tensor]:
    """The norm alone."""
    return partial(F.rms_norm, inputs.x, inputs.weight.shape, inputs.weight, inputs.eps)


def _make(draw: Draw, *, rows: int, width: int, parts: int | None = None, multiplier: float = 0.22) -> dict[str, Any]:
    """parts=None makes a delta that is not split. x is a view of a wider tensor."""
    wide = draw.normal(rows, width + 16)
    wide[:, width:] = torch.nan
    return {
        "x": wide[:, :width],
        "delta": draw.normal(rows, width) if parts is None else draw.normal(parts, rows, width, dtype=accumulator(draw.dtype)),
        "weight": draw.normal(width),
        "eps": 1e-5,
        "multiplier": multiplier,
    }


def _case(name: str, rows: int, width: int, parts: int | None = None, *, released: bool = False, **options: float) -> Case:
    return Case(name, _make, {"rows": rows, "width": width, "parts": parts, **options}, released)


CASES = (
    _case("2b, 1 row", 1, 2048, released=True),
    _case("2b, 16 rows", 16, 2048, released=True),
    _case("2b, 16 rows in 4 parts", 16, 2048, 4, released=True),
    _case("2b, 128 rows", 128, 2048, released=True),
    _case("2b, prompts of 8 clips", 8 * 180, 2048, released=True),
    _case("3.3-8b, 1 row", 1, 4096, released=True),
    _case("3.3-8b, 16 rows in 2 parts", 16, 4096, 2, released=True),
    _case("3.3-8b, 128 rows", 128, 4096, released=True),
    _case("three parts", 5, 64, 3),
    _case("not split", 9, 64),
    _case("eight parts", 2, 48, 8),
    _case("odd width", 7, 37, multiplier=1.0),
    _case("odd width, two parts", 3, 53, 2, multiplier=-0.5),
    _case("one part", 1, 96, 1),
    _case("width 1", 6, 1),
    _case("no rows", 0, 32),
)

OPERATION = Operation(
    name="add_rms_norm",
    call=add_rms_norm,
    reference=add_rms_norm_reference,
    cost=add_rms_norm_cost,
    cases=CASES,
    library=add_rms_norm_library,
    triton=triton_backend("add_rms_norm"),
)
