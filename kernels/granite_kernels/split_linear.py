"""A linear layer for few rows, cut along the inner dimension so that every multiprocessor has work. Its parts are not yet added."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from granite_kernels.op import Arguments, Case, Cost, Draw, Operation, accumulator, called_with, nbytes, triton_backend

MAX_PARTS = 8
# A slice of the inner dimension is a multiple of this, which every kernel's BLOCK_K divides.
SLICE_UNIT = 128


class SplitLinearInputs(NamedTuple):
    """The arguments of `split_linear` except `impl`."""

    x: torch.Tensor
    weight: torch.Tensor
    parts: int


def split_linear(x: torch.Tensor, weight: torch.Tensor, *, parts: int, impl: str | None = None) -> torch.Tensor:
    """Partial sums of x·Wᵀ, for `add_rms_norm` to add: part p sums over the p-th slice of the inner dimension.

    ::

        out[p] = x[:, s]·W[:, s]ᵀ     s = p · width to (p + 1) · width, width = ⌈⌈in / 128⌉ / parts⌉ · 128

    | argument | shape | stride | dtype |
    |---|---|---|---|
    | x | (rows, in) | last 1, first free | any float |
    | weight | (out, in) | last 1, first free | as x |
    | returns | (parts, rows, out) | contiguous | float32, or float64 for float64 |

    Slices past the inner dimension give zeros. `parts_for` says how many parts keep a GPU busy.

    Args:
        parts: the number of slices, 1 to 8.
        impl: "triton", "torch", or None for the fastest available.

    Raises:
        KernelError: wrong shapes, dtypes, devices or strides, parts that are not an integer from 1 to 8, or a tensor that needs a
            gradient.
    """
    inputs = SplitLinearInputs(x, weight, parts)
    _check(inputs)
    return OPERATION.select(impl, x)(*inputs)


def _check(inputs: SplitLinearInputs) -> None:
    arguments, parts = Arguments("split_linear"), inputs.parts
    arguments.tensor("x", inputs.x, "rows in")
    arguments.tensor("weight", inputs.weight, "out in")
    if not isinstance(parts, int) or not 1 <= parts <= MAX_PARTS:
        arguments.refuse(f"parts={parts!r}", f"an integer from 1 to {MAX_PARTS}", "Use parts_for(rows, inputs, outputs)")
    arguments.refuse_gradients(x=inputs.x, weight=inputs.weight)


def parts_for(rows: int, inputs: int, outputs: int) -> int:
    """The number of parts, 1 to 8, with which a (rows, inputs) times (outputs, inputs) product has about one program for each
    multiprocessor. 1 means that a split gains nothing.

    A rule of 2026-11-27 for the 132 multiprocessors of an H100 or H200, and the kernel's tiles of 32 columns and up to 64 rows. An H200
    took least time with what it gives for 64 rows of o_proj and down_proj. Each part keeps at least four steps of 128.
    """
    tiles = -(-outputs // 32) * -(-rows // 64)
    return max(1, min(132 // max(tiles, 1), inputs // (4 * SLICE_UNIT), MAX_PARTS))


def slice_width(inputs: int, parts: int) -> int:
    """The width of a slice of the inner dimension."""
    units = -(-inputs // SLICE_UNIT)
    return -(-units // parts) * SLICE_UNIT


@called_with(SplitLinearInputs)
def split_linear_reference(inputs: SplitLinearInputs) -> torch.Tensor:
    """`split_linear` in PyTorch."""
    x, weight, parts = inputs
    wide, width = accumulator(x.dtype), slice_width(x.shape[1], parts)
    slices = [slice(part * width, (part + 1) * width) for part in range(parts)]
    return torch.stack([F.linear(x[:, one].to(wide), weight[:, one].to(wide)) for one in slices])


@called_with(SplitLinearInputs)
def split_linear_cost(inputs: SplitLinearInputs) -> Cost:
    """FLOPs: the product, and no sum of the parts. Bytes: x, the weight and the result."""
    (rows, width), outputs = inputs.x.shape, inputs.weight.shape[0]
    wide = accumulator(inputs.x.dtype).itemsize
    return Cost(flops=2 * rows * width * outputs, bytes=nbytes(inputs.x, inputs.weight) + inputs.parts * rows * outputs * wide)


@called_with(SplitLinearInputs)
def split_linear_library(inputs: SplitLinearInputs) -> Callable[[], torch.Tensor]:
    """The whole product in x's dtype."""
    return partial(F.linear, inputs.x, inputs.weight)


def _make(draw: Draw, *, rows: int, inputs: int, outputs: int, parts: int) -> dict[str, Any]:
    """x and weight are views of wider tensors."""
    x, weight = draw.normal(rows, inputs + 16), draw.normal(outputs, inputs + 16, std=max(inputs, 1) ** -0.5)
    x[:, inputs:] = weight[:, inputs:] = torch.nan
    return {"x": x[:, :inputs], "weight": weight[:, :inputs], "parts": parts}


def _case(name: str, rows: int, inputs: int, outputs: int, parts: int | None = None, *, released: bool = False) -> Case:
    """parts=None asks `parts_for`."""
    parts = parts or parts_for(rows, inputs, outputs)
    return Case(name, _make, {"rows": rows, "inputs": inputs, "outputs": outputs, "parts": parts}, released)


CASES = (
    _case("4.1-2b o_proj, 16 rows", 16, 2048, 2048, released=True),
    _case("4.1-2b o_proj, 64 rows", 64, 2048, 2048, released=True),
    _case("4.1-2b down_proj, 16 rows", 16, 4096, 2048, released=True),
    _case("4.1-2b down_proj, 64 rows", 64, 4096, 2048, released=True),
    _case("3.3-8b down_proj, 32 rows", 32, 12800, 4096, released=True),
    _case("two slices, the second short", 17, 300, 48, 2),
    _case("three slices", 9, 300, 80, 3),
    _case("slices past the end", 5, 140, 32, 4),
    _case("one slice", 33, 96, 64, 1),
    _case("odd sizes", 19, 131, 53, 2),
    _case("more rows than a tile", 70, 150, 37, 2),
    _case("one row", 1, 32, 16, 1),
    _case("no rows", 0, 32, 16, 2),
    _case("no inner dimension", 3, 0, 16, 2),
)

OPERATION = Operation(
    name="split_linear",
    call=split_linear,
    reference=split_linear_reference,
    cost=split_linear_cost,
    cases=CASES,
    library=split_linear_library,
    triton=triton_backend("split_linear"),
)
