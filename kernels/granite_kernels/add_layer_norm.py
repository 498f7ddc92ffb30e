"""A residual sum and one or two LayerNorms after it, in one pass."""

from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from granite_kernels.op import Arguments, Case, Cost, Draw, Operation, accumulator, called_with, nbytes, triton_backend


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
    pairs: torch.Tensor | None = None


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
    pairs: torch.Tensor | None = None,
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of a residual stream and a branch, and its norm; or its norm, and the norm of that.

    ::

        sum    = x + multiplier · delta                      with pairs: residual + multiplier · delta
        residual[r] = (x[p] + x[p + 1]) / 2                  p = pairs[r]; 0 if p is -1
        normed = norm(sum; weight, bias, eps)
        norm(y; weight, bias, eps) = weight · (y − mean(y)) / √(mean((y − mean(y))²) + eps) + bias     means are over the row

    | argument | shape | stride | dtype |
    |---|---|---|---|
    | x, delta | (rows, width) | last 1, first free | any float, the same for both |
    | pairs | (rows,), or None | 1 | int32 |
    | weight, bias | (width,) | 1 | as x |
    | next_weight, next_bias | (width,), or both None | 1 | as x |
    | returns | without next_weight: sum and normed, (rows, width) each | contiguous | as x |
    | | with it: normed and norm(normed; next_weight, next_bias, next_eps) | contiguous | as x |

    The second form is for the end of a conformer block: its last norm is the residual stream of the next block, which begins with
    a norm. `pairs` is for a block that halves the frames: x may then have any number of rows. The mean, the sum and normed are each
    rounded before they are used. All else is computed in float32 (float64 for float64).

    Args:
        eps: added to the variance.
        multiplier: factor on delta.
        next_eps: added to the variance of the second norm; eps if omitted.
        pairs: the row of x with which each row's pair begins, or -1 for a row without a residual. No row of x may be in two pairs: in
            Triton its gradient would be that of one of them.
        impl: "triton", "torch", or None for the fastest available.

    Raises:
        KernelError: wrong shapes, dtypes, devices or strides, or next_weight, next_bias or next_eps without the others that they
            need; with "triton", a width above 8192.

    LayerNorm is from Ba, Kiros and Hinton, arXiv 1607.06450.
    """
    inputs = AddLayerNormInputs(x, delta, weight, bias, next_weight, next_bias, eps, multiplier, next_eps, pairs)
    _check(inputs)
    return OPERATION.select(impl, x)(*inputs)


def _check(inputs: AddLayerNormInputs) -> None:
    arguments = Arguments("add_layer_norm")
    arguments.tensor("x", inputs.x, "rows width" if inputs.pairs is None else "rows_of_x width")
    arguments.tensor("delta", inputs.delta, "rows width")
    if inputs.pairs is not None:
        arguments.index("pairs", inputs.pairs, "rows")
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
    x, delta, weight, bias, next_weight, next_bias, eps, multiplier, next_eps, pairs = inputs
    residual = x if pairs is None else _means(x, pairs)
    total = torch.add(residual, delta, alpha=multiplier).contiguous()
    normed = F.layer_norm(total, weight.shape, weight, bias, eps)
    if next_weight is None:
        return total, normed
    return normed, F.layer_norm(normed, weight.shape, next_weight, next_bias, eps if next_eps is None else next_eps)


def _means(x: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """The mean of each pair of rows, zero for a pair of -1, whatever x holds."""
    x = torch.cat((x, x.new_zeros(1, x.shape[1])))  # the last row is for pairs of -1
    absent = pairs < 0
    first, second = (x.index_select(0, (pairs + one).masked_fill(absent, len(x) - 1)) for one in (0, 1))
    wide = accumulator(x.dtype)
    return ((first.to(wide) + second.to(wide)) / 2).to(x.dtype)


@called_with(AddLayerNormInputs)
def add_layer_norm_cost(inputs: AddLayerNormInputs) -> Cost:
    """FLOPs: a multiply-add for the sum; for each norm two sums, a difference, a product and two multiply-adds. Bytes: every tensor
    once. With pairs, each row has two of x (fewer if some have none), and an addition and a product for their mean."""
    norms = 1 if inputs.next_weight is None else 2
    parameters = nbytes(inputs.weight, inputs.bias, inputs.next_weight, inputs.next_bias, inputs.pairs)
    read = inputs.x.numel() if inputs.pairs is None else min(inputs.x.numel(), 2 * inputs.delta.numel())
    moved = (read + 3 * inputs.delta.numel()) * inputs.x.element_size()
    flops = (2 + 8 * norms + (0 if inputs.pairs is None else 2)) * inputs.delta.numel()
    return Cost(flops=flops, bytes=moved + parameters)


@called_with(AddLayerNormInputs)
def add_layer_norm_library(inputs: AddLayerNormInputs) -> Callable[[], torch.Tensor]:
    """The first norm alone."""
    return partial(F.layer_norm, inputs.delta, inputs.weight.shape, inputs.weight, inputs.bias, inputs.eps)


def _make(
    draw: Draw, *, rows: int, width: int, twice: bool = False, multiplier: float = 0.5, clips: tuple[int, ...] | None = None
) -> dict[str, Any]:
    """`twice` has a second norm. x is a view of a wider tensor. `clips` are lengths of clips whose frames in x are paired, with `rows` rows
    of padding after them."""
    pairs = None
    if clips is not None:
        starts = accumulate(clips, initial=0)
        pairs = [start + frame for start, length in zip(starts, clips, strict=False) for frame in range(0, length - 1, 2)] + [-1] * rows
    given, rows = (rows, rows) if clips is None else (sum(clips), len(pairs))
    wide = draw.normal(given, width + 16)
    wide[:, width:] = torch.nan
    if pairs is not None and not wide.is_meta:
        paired = {first + one for first in pairs if first >= 0 for one in (0, 1)}
        wide[[row for row in range(given) if row not in paired]] = torch.nan
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
        "pairs": None if pairs is None else draw.int32(pairs),
    }


def _case(name: str, rows: int, width: int, *, released: bool = False, **options: Any) -> Case:
    return Case(name, _make, {"rows": rows, "width": width, **options}, released)


CASES = (
    _case("encoder, 10 s", 500, 1024, released=True),
    _case("encoder, 10 s, two norms", 500, 1024, twice=True, released=True),
    _case("encoder, 128 clips of 10 s", 128 * 500, 1024, released=True),
    _case("encoder, 128 clips of 10 s, two norms", 128 * 500, 1024, twice=True, released=True),
    _case("projector, 128 clips of 10 s", 128 * 102, 1024, multiplier=1.0, released=True),
    _case("turboctc, 128 clips of 10 s, pairs", 0, 1024, multiplier=1.0, clips=(500,) * 128, released=True),
    _case("turboctc, 8 clips to 30 s, pairs", 0, 1024, multiplier=1.0, clips=(150, 330, 500, 720, 900, 1111, 1400, 1500), released=True),
    _case("two norms", 9, 64, twice=True),
    _case("one norm", 5, 48),
    _case("odd width", 7, 37, multiplier=-0.25),
    _case("odd width, two norms", 3, 21, twice=True, multiplier=1.0),
    _case("three columns", 6, 3),
    _case("no rows", 0, 32, twice=True),
    _case("pairs", 0, 48, multiplier=1.0, clips=(8, 6)),
    _case("pairs, two norms", 0, 37, clips=(4, 2), twice=True),
    _case("pairs, odd clips and padding", 3, 21, clips=(7, 1, 0, 2, 5)),
    _case("pairs, two norms, odd clips and padding", 2, 40, clips=(3, 1), twice=True),
    _case("pairs, only padding", 2, 16, clips=()),
    _case("pairs, one frame", 0, 16, clips=(1,)),
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
