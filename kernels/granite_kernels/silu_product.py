"""The gate of a SwiGLU layer: SiLU of one half of the columns times the other half."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from granite_kernels.op import Arguments, Case, Cost, Draw, Operation, called_with, nbytes, triton_backend


class SiluProductInputs(NamedTuple):
    """The arguments of `silu_product` except `impl`."""

    x: torch.Tensor


def silu_product(x: torch.Tensor, *, impl: str | None = None) -> torch.Tensor:
    """SiLU(gate) · up, where gate is the first half of each row of x and up the second.

    | argument | shape | stride | dtype |
    |---|---|---|---|
    | x | (rows, 2 · width): gate, then up | last 1, first free | any float |
    | returns | (rows, width) | contiguous | as x |

    SiLU(gate) = gate / (1 + exp(−gate)), computed in float32 (float64 for float64). The reference rounds it before the product, as
    eager code does; the kernel rounds once.

    Args:
        impl: "triton", "torch", or None for the fastest available.

    Raises:
        KernelError: wrong shape, dtype or stride, an odd number of columns, or an x that needs a gradient.

    The layer is SwiGLU (Shazeer, arXiv 2002.05202).
    """
    inputs = SiluProductInputs(x)
    _check(inputs)
    return OPERATION.select(impl, x)(*inputs)


def _check(inputs: SiluProductInputs) -> None:
    arguments, x = Arguments("silu_product"), inputs.x
    arguments.tensor("x", x, "rows 2·width")
    if x.shape[1] % 2:
        arguments.refuse(f"x has {x.shape[1]} columns", "an even number", "Pass gate and up side by side, equally wide")
    arguments.refuse_gradients(x=x)


@called_with(SiluProductInputs)
def silu_product_reference(inputs: SiluProductInputs) -> torch.Tensor:
    """`silu_product` in PyTorch, with the calls and roundings of eager code."""
    gate, up = inputs.x.chunk(2, dim=-1)
    return (F.silu(gate) * up).contiguous()


@called_with(SiluProductInputs)
def silu_product_cost(inputs: SiluProductInputs) -> Cost:
    """FLOPs: a sum, a division and a product per element, without the exponential. Bytes: x and the result."""
    elements = inputs.x.numel() // 2
    return Cost(flops=3 * elements, bytes=nbytes(inputs.x) + elements * inputs.x.element_size())


@called_with(SiluProductInputs)
def silu_product_library(inputs: SiluProductInputs) -> Callable[[], torch.Tensor]:
    """SiLU alone."""
    return partial(F.silu, inputs.x.chunk(2, dim=-1)[0])


def _make(draw: Draw, *, rows: int, width: int) -> dict[str, Any]:
    """x is a view of a wider tensor."""
    wide = draw.normal(rows, 2 * width + 16, std=3.0)
    wide[:, 2 * width :] = torch.nan
    return {"x": wide[:, : 2 * width]}


def _case(name: str, rows: int, width: int, *, released: bool = False) -> Case:
    return Case(name, _make, {"rows": rows, "width": width}, released)


CASES = (
    _case("4.1-2b, 16 rows", 16, 4096, released=True),
    _case("4.1-2b, 128 rows", 128, 4096, released=True),
    _case("4.1-2b, prompts of 8 clips", 8 * 180, 4096, released=True),
    _case("3.3-2b, 128 rows", 128, 8192, released=True),
    _case("3.3-8b, 16 rows", 16, 12800, released=True),
    _case("3.3-8b, prompts of 8 clips", 8 * 180, 12800, released=True),
    _case("several rows", 9, 64),
    _case("odd width", 5, 37),
    _case("wider than a tile", 2, 1100),
    _case("width 1", 3, 1),
    _case("no rows", 0, 32),
    _case("no columns", 3, 0),
)

OPERATION = Operation(
    name="silu_product",
    call=silu_product,
    reference=silu_product_reference,
    cost=silu_product_cost,
    cases=CASES,
    library=silu_product_library,
    triton=triton_backend("silu_product"),
)
