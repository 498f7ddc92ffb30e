"""A linear layer and the SiLU after it, or the gate of a SwiGLU layer, without a second pass over the product."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from granite_kernels.op import Arguments, Case, Cost, Draw, Operation, called_with, nbytes, triton_backend


class SiluLinearInputs(NamedTuple):
    """The arguments of `silu_linear` except `impl`."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None = None
    gated: bool = False


def silu_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, gated: bool = False, impl: str | None = None
) -> torch.Tensor:
    """SiLU(y) with y = x·Wᵀ + bias. If `gated`, SiLU(gate) · up, where gate is the first half of each row of y and up the second.

    | argument | shape | stride | dtype |
    |---|---|---|---|
    | x | (rows, in) | last 1, first free | any float |
    | weight | (out, in); if gated (2 · out, in) | last 1, first free | as x |
    | bias | (out,); if gated (2 · out,); or None | 1 | as x |
    | returns | (rows, out) | contiguous | as x |

    SiLU(y) = y / (1 + exp(−y)). The kernel sums in float32 and rounds the result alone. The reference rounds y too, as eager code does.

    "triton" is one kernel where that is expected to be faster, and otherwise the library's product and a pass over it
    (`paths.silu_path`). The kernel takes bfloat16 and float16, on chips from compute capability 9.0 on, and rows of x, weight and result
    that begin at multiples of 16 bytes.

    Args:
        impl: "triton", "torch", or None for the fastest available.

    Raises:
        KernelError: wrong shapes, dtypes, devices or strides, gated with an odd number of rows of weight, or a tensor that needs a
            gradient.

    The layers are the feed-forwards of the Conformer (Gulati et al., arXiv 2005.08100) and of SwiGLU (Shazeer, arXiv 2002.05202).
    """
    inputs = SiluLinearInputs(x, weight, bias, gated)
    _check(inputs)
    return OPERATION.select(impl, x)(*inputs)


def _check(inputs: SiluLinearInputs) -> None:
    arguments, outputs = Arguments("silu_linear"), "2·out" if inputs.gated else "out"
    arguments.tensor("x", inputs.x, "rows in")
    arguments.tensor("weight", inputs.weight, f"{outputs} in")
    if inputs.bias is not None:
        arguments.tensor("bias", inputs.bias, outputs)
    if inputs.gated and inputs.weight.shape[0] % 2:
        arguments.refuse(
            f"gated with {inputs.weight.shape[0]} rows of weight", "an even number: gate, then up", "Check how weight was joined"
        )
    arguments.refuse_gradients(x=inputs.x, weight=inputs.weight, bias=inputs.bias)


@called_with(SiluLinearInputs)
def silu_linear_reference(inputs: SiluLinearInputs) -> torch.Tensor:
    """`silu_linear` in PyTorch, with the calls and roundings of eager code."""
    y = F.linear(inputs.x, inputs.weight, inputs.bias)
    if not inputs.gated:
        return F.silu(y)
    gate, up = y.chunk(2, dim=-1)
    return (F.silu(gate) * up).contiguous()


@called_with(SiluLinearInputs)
def silu_linear_cost(inputs: SiluLinearInputs) -> Cost:
    """FLOPs: the product. Bytes: every argument and the result, once."""
    (rows, width), columns = inputs.x.shape, inputs.weight.shape[0]
    arguments = nbytes(*(one for one in inputs if isinstance(one, torch.Tensor)))
    result = rows * (columns // 2 if inputs.gated else columns) * inputs.x.element_size()
    return Cost(flops=2 * rows * width * columns, bytes=arguments + result)


@called_with(SiluLinearInputs)
def silu_linear_library(inputs: SiluLinearInputs) -> Callable[[], torch.Tensor]:
    """The product with its bias alone."""
    return partial(F.linear, inputs.x, inputs.weight, inputs.bias)


def _make(draw: Draw, *, rows: int, inputs: int, outputs: int, bias: bool = False, gated: bool = False) -> dict[str, Any]:
    """outputs counts the rows of weight, which is a view of a wider tensor."""
    weight = draw.normal(outputs, inputs + 16, std=max(inputs, 1) ** -0.5)
    weight[:, inputs:] = torch.nan
    return {
        "x": draw.normal(rows, inputs),
        "weight": weight[:, :inputs],
        "bias": draw.normal(outputs) if bias else None,
        "gated": gated,
    }


def _case(name: str, rows: int, inputs: int, outputs: int, *, released: bool = False, **options: bool) -> Case:
    return Case(name, _make, {"rows": rows, "inputs": inputs, "outputs": outputs, **options}, released)


CASES = (
    _case("encoder up_proj, 128 clips of 10 s", 64_000, 1024, 4096, released=True, bias=True),
    _case("encoder up_proj, 8 clips of 30 s", 12_000, 1024, 4096, released=True, bias=True),
    _case("encoder up_proj, 10 s", 500, 1024, 4096, released=True, bias=True),
    _case("4.1-2b gate|up, prompts of 128 clips", 128 * 148, 2048, 2 * 4096, released=True, gated=True),
    _case("3.3-2b gate|up, prompts of 128 clips", 128 * 148, 2048, 2 * 8192, released=True, gated=True),
    _case("several rows", 9, 32, 40, bias=True),
    _case("gated", 6, 24, 2 * 20, gated=True),
    _case("odd sizes, gated, with bias", 5, 37, 2 * 11, bias=True, gated=True),
    _case("no bias", 3, 21, 13),
    _case("no rows", 0, 32, 16, bias=True),
    _case("no inner dimension", 3, 0, 16, bias=True),
)

OPERATION = Operation(
    name="silu_linear",
    call=silu_linear,
    reference=silu_linear_reference,
    cost=silu_linear_cost,
    cases=CASES,
    library=silu_linear_library,
    triton=triton_backend("silu_linear"),
)
