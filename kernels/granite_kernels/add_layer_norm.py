"""A residual sum and one or two LayerNorms after it, in one pass."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from granite_kernels.op import Arguments, Case, Cost, Draw, Operation, called_with, nbytes, triton_backend


class AddLayerNormInputs(NamedTuple):
    """The arguments of `add_layer_norm` except `impl`."""

    x: torch.Tensor
    delta: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    next_weight: torch.Tensor | None = None
    next_bias: torch.Tensor | None = None
    eps: float = 1e-5
    multiplier: float = 1.0
    next_eps: float | None = None


def add_layer_norm(
    x: torch.Tensor,
    delta: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    next_weight: torch.Tensor | None = None,
    next_bias: torch.Tensor | None = None,
    *,
    eps: float,
    multiplier: float,
    next_eps: float | None = None,
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of a residual stream and a branch, and its norm; or its norm, and the norm of that.

    ::

        sum    = x + multiplier · delta
        normed = norm(sum; weight, bias, eps)
        norm(y; weight, bias, eps) = weight · (y − mean(y)) / √(mean((y − mean(y))²) + eps) + bias     means are over the row

    | argument | shape | stride | dtype |
    |---|---|---|---|
    | x, delta | (rows, width) | last 1, first free | any float, the same for both |
    | weight, bias | (width,) | 1 | as x |
    | next_weight, next_bias | (width,), or both None | 1 | as x |
    | returns | without next_weight: sum and normed, (rows, width) each | contiguous | as x |
    | | with it: normed and norm(normed; next_weight, next_bias, next_eps) | contiguous | as x |

    The second form is for the end of a conformer block: its last norm is the residual stream of the next block, which begins with
    a norm. The sum is rounded before it is normalised, and so is normed. All else is computed in float32 (float64 for float64).

    Args:
        eps: added to the variance.
        multiplier: factor on delta.
        next_eps: added to the variance of the second norm; eps if omitted.
        impl: "triton", "torch", or None for the fastest available.

    Raises:
        KernelError: wrong shapes, dtypes, devices or strides, or next_weight, next_bias or next_eps without the others that they
            need; with "triton", a width above 8192.

    LayerNorm is from Ba, Kiros and Hinton, arXiv 1607.06450.
    """
    inputs = AddLayerNormInputs(x, delta, weight, bias, next_weight, next_bias, eps, multiplier, next_eps)
    _check(inputs)
    return OPERATION.select(impl, x)(*inputs)


def _check(inputs: AddLayerNormInputs) -> None:
    arguments = Arguments("add_layer_norm")
    arguments.tensor("x", inputs.x, "rows width")
    arguments.tensor("delta", inputs.delta, "rows width")
    arguments.tensor("weight", inputs.weight, "width")
    arguments.tensor("bias", inputs.bias, "width")
    if (inputs.next_weight is None) != (inputs.next_bias is None):
        given, absent = ("next_weight", "next_bias") if inputs.next_bias is None else ("next_bias", "next_weight")
        arguments.refuse(f"{given} without {absent}", "both or neither", f"Pass {absent} too, or None for both for a single norm")
    if inputs.next_weight is not None:
        arguments.tensor("next_weight", inputs.next_weight, "width")
        arguments.tensor("next_bias", inputs.next_bias, "width")
    elif inputs.next_eps is not None:
        arguments.refuse("next_eps without next_weight", "a second norm for it", "Omit next_eps, or pass next_weight and next_bias")


@called_with(AddLayerNormInputs)
def add_layer_norm_reference(inputs: AddLayerNormInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """`add_layer_norm` in PyTorch, with the calls and roundings of eager code."""
    x, delta, weight, bias, next_weight, next_bias, eps, multiplier, next_eps = inputs
    total = torch.add(x, delta, alpha=multiplier).contiguous()
    normed = F.layer_norm(total, weight.shape, weight, bias, eps)
    if next_weight is None:
        return total, normed
    return normed, F.layer_norm(normed, weight.shape, next_weight, next_bias, eps if next_eps is None else next_eps)


@called_with(AddLayerNormInputs)
def add_layer_norm_cost(inputs: AddLayerNormInputs) -> Cost:
    """FLOPs: a multiply-add for the sum; for each norm two sums, a difference, a product and two multiply-adds. Bytes: every tensor
    once."""
    norms = 1 if inputs.next_weight is None else 2
    parameters = nbytes(inputs.weight, inputs.bias, inputs.next_weight, inputs.next_bias)
    return Cost(flops=(2 + 8 * norms) * inputs.x.numel(), bytes=4 * nbytes(inputs.x) + parameters)


@called_with(AddLayerNormInputs)
def add_layer_norm_library(inputs: AddLayerNormInputs) -> Callable[[], torch.Tensor]:
    """The first norm alone."""
    return partial(F.layer_norm, inputs.x, inputs.weight.shape, inputs.weight, inputs.bias, inputs.eps)


def _make(draw: Draw, *, rows: int, width: int, twice: bool = False, multiplier: float = 0.5) -> dict[str, Any]:
    """`twice` has a second norm. x is a view of a wider tensor."""
    wide = draw.normal(rows, width + 16)
    wide[:, width:] = torch.nan
    return {
        "x": wide[:, :width],
        "delta": draw.normal(rows, width),
        "weight": draw.normal(width),
        "bias": draw.normal(width),
        "next_weight": draw.normal(width) if twice else None,
        "next_bias": draw.normal(width) if twice else None,
        "eps": 1e-5,
        "multiplier": multiplier,
        "next_eps": 1e-3 if twice else None,
    }


def _case(name: str, rows: int, width: int, *, released: bool = False, **options: Any) -> Case:
    return Case(name, _make, {"rows": rows, "width": width, **options}, released)


CASES = (
    _case("encoder, 10 s", 500, 1024, released=True),
    _case("encoder, 10 s, two norms", 500, 1024, twice=True, released=True),
    _case("encoder, 128 clips of 10 s", 128 * 500, 1024, released=True),
    _case("encoder, 128 clips of 10 s, two norms", 128 * 500, 1024, twice=True, released=True),
    _case("projector, 128 clips of 10 s", 128 * 102, 1024, multiplier=1.0, released=True),
    _case("two norms", 9, 64, twice=True),
    _case("one norm", 5, 48),
    _case("odd width", 7, 37, multiplier=-0.25),
    _case("odd width, two norms", 3, 21, twice=True, multiplier=1.0),
    _case("three columns", 6, 3),
    _case("no rows", 0, 32, twice=True),
)

OPERATION = Operation(
    name="add_layer_norm",
    call=add_layer_norm,
    reference=add_layer_norm_reference,
    cost=add_layer_norm_cost,
    cases=CASES,
    library=add_layer_norm_library,
    differentiable=("x", "delta", "weight", "bias", "next_weight", "next_bias"),
    triton=triton_backend("add_layer_norm"),
)
