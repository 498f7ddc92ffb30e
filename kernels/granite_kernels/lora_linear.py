"""A linear layer with low-rank adapters that each row switches for itself."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from granite_kernels.op import Arguments, Case, Cost, Draw, Operation, accumulator, nbytes, triton_backend


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: torch.Tensor,
    adapter_index: torch.Tensor | None,
    *,
    impl: str | None = None,
) -> torch.Tensor:
    """x·Wᵀ + bias + scaling[n] · (x·A[n]ᵀ)·B[n]ᵀ, where n is the row's own adapter, or none.

    | argument | shape | stride | dtype |
    |---|---|---|---|
    | x | (rows, in) | last 1, first free | any float |
    | weight | (out, in) | last 1, first free | as x |
    | bias | (out,) or None | 1 | as x |
    | lora_a | (adapters, rank, in) | last 1, others free | as x |
    | lora_b | (adapters, out, rank) | last 1, others free | as x |
    | scaling | (adapters,) | 1 | float32, or float64 with x in float64 |
    | adapter_index | (rows,), or None for adapter 0 everywhere | 1 | int32 |
    | returns | (rows, out) | contiguous | as x |

    An adapter_index of −1 means none; the values are not checked, for that would wait for the device. x·Aᵀ is rounded to x's
    dtype before ·B, as eager code rounds it; every sum is float32 (float64 for float64). A row's result does not depend on
    adapters that it does not use, even where these are not finite.

    Args:
        impl: "triton", "torch", or None for the fastest that the device has.

    Raises:
        KernelError: shapes, dtypes, devices or strides other than the table's, or no adapter where adapter_index is None.

    The adapter is LoRA (Hu et al., arXiv 2106.09685) as peft applies it, without dropout. peft keeps adapters in float32 over
    a bfloat16 base: convert them when they are loaded, for one call has one dtype.
    """
    arguments = Arguments("lora_linear")
    arguments.tensor("x", x, "rows in")
    arguments.tensor("weight", weight, "out in")
    if bias is not None:
        arguments.tensor("bias", bias, "out")
    arguments.tensor("lora_a", lora_a, "adapters rank in")
    arguments.tensor("lora_b", lora_b, "adapters out rank")
    arguments.tensor("scaling", scaling, "adapters", (torch.float32, torch.float64) if x.dtype == torch.float64 else (torch.float32,))
    if adapter_index is not None:
        arguments.index("adapter_index", adapter_index, "rows")
    elif lora_a.shape[0] == 0:
        arguments.refuse(
            "adapter_index is None and there are no adapters",
            "at least one adapter, the one that None stands for",
            "Use a plain linear layer, or an adapter_index of -1 in every row",
        )
    multiply = OPERATION.select(impl, x)
    return multiply(x, weight, bias, lora_a, lora_b, scaling, adapter_index)


def lora_linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: torch.Tensor,
    adapter_index: torch.Tensor | None,
) -> torch.Tensor:
    """`lora_linear` in PyTorch: every adapter for every row, then each row's choice, so that no device is waited for.

    The products are the library's, in x's dtype: they accumulate in float32 and round once, and no call copies a bfloat16
    weight to float32. Each is rounded before they are added in float32, as in eager code around peft.
    """
    wide = accumulator(x.dtype)
    out = F.linear(x, weight, bias)
    for adapter in range(1 if adapter_index is None else lora_a.shape[0]):
        delta = F.linear(F.linear(x, lora_a[adapter]), lora_b[adapter])
        adapted = torch.addcmul(out.to(wide), delta.to(wide), scaling[adapter].to(wide)).to(x.dtype)
        out = adapted if adapter_index is None else torch.where((adapter_index == adapter)[:, None], adapted, out)
    return out


def lora_linear_cost(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: torch.Tensor,
    adapter_index: torch.Tensor | None,
) -> Cost:
    """FLOPs of the base product and of both thin products for the rows that have an adapter. Bytes: x, weight, bias, the
    result, adapter_index and scaling, and A and B of the adapters that some row uses; x·Aᵀ stays on the chip."""
    rows, inputs = x.shape
    outputs, rank = lora_b.shape[1:]
    used = {0: rows} if adapter_index is None else {n: adapter_index.tolist().count(n) for n in range(lora_a.shape[0])}
    used = {adapter: count for adapter, count in used.items() if count}
    flops = 2 * rows * inputs * outputs + 2 * sum(used.values()) * rank * (inputs + outputs)
    moved = nbytes(x, weight, bias, scaling, adapter_index) + rows * outputs * x.element_size()
    return Cost(flops=flops, bytes=moved + len(used) * rank * (inputs + outputs) * x.element_size())


def lora_linear_library(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: torch.Tensor,
    adapter_index: torch.Tensor | None,
) -> Callable[[], torch.Tensor]:
    """The base product alone: what the layer would cost without adapters."""
    return partial(F.linear, x, weight, bias)


def _make(
    draw: Draw,
    *,
    choice: tuple[int, ...] | None,
    rows: int,
    inputs: int,
    outputs: int,
    rank: int,
    adapters: int = 1,
    bias: bool = False,
) -> dict[str, Any]:
    index = None if choice is None else draw.int32([choice[row % len(choice)] for row in range(rows)])
    return {
        "x": draw.normal(rows, inputs),
        "weight": draw.normal(outputs, inputs, std=inputs**-0.5),
        "bias": draw.normal(outputs) if bias else None,
        "lora_a": draw.normal(adapters, rank, inputs, std=inputs**-0.5),
        "lora_b": draw.normal(adapters, outputs, rank, std=rank**-0.5),
        "scaling": draw.normal(adapters, dtype=accumulator(draw.dtype)),
        "adapter_index": index,
    }


def _case(
    name: str, choice: tuple[int, ...] | None, rows: int, inputs: int, outputs: int, rank: int, *, released: bool = False, **options
) -> Case:
    """`choice` is repeated over the rows; None leaves adapter_index out."""
    return Case(name, _make, {"choice": choice, "rows": rows, "inputs": inputs, "outputs": outputs, "rank": rank, **options}, released)


CASES = (
    _case("3.3-2b q_proj, 1 row", (0,), 1, 2048, 2048, 64, released=True),
    _case("3.3-2b v_proj, 1 row", (0,), 1, 2048, 512, 64, released=True),
    _case("3.3-2b q_proj, 128 rows, half with adapter", (0, -1), 128, 2048, 2048, 64, released=True),
    _case("3.3-2b q_proj, prompts of 8 clips", (0,), 8 * 180, 2048, 2048, 64, released=True),
    _case("3.3-8b q_proj, 1 row", (0,), 1, 4096, 4096, 64, released=True),
    _case("3.3-8b v_proj, 128 rows", (0,), 128, 4096, 1024, 64, released=True),
    _case("3.3-8b q_proj, prompts of 8 clips", (0,), 8 * 180, 4096, 4096, 64, released=True),
    _case("adapter 0 everywhere", None, 5, 64, 48, 16),
    _case("one row", (0,), 1, 64, 64, 8),
    _case("no row has one", (-1,), 6, 64, 32, 16),
    _case("every other row", (0, -1), 33, 64, 48, 16),
    _case("three adapters", (0, 2, -1, 1, 2), 37, 64, 48, 16, adapters=3, bias=True),
    _case("adapters that nobody uses", (1, -1), 10, 32, 48, 8, adapters=4),
    _case("bias", None, 17, 48, 80, 4, bias=True),
    _case("odd sizes", (0, -1, 1), 19, 37, 53, 5, adapters=2, bias=True),
    _case("rank 1", (0,), 7, 40, 24, 1),
    _case("no adapters", (-1,), 4, 32, 16, 8, adapters=0),
    _case("no rows", (0,), 0, 32, 16, 8),
    _case("largest rank", (0, 1), 5, 48, 32, 128, adapters=2),
    _case("a prompt", (0, -1, 1), 261, 48, 32, 16, adapters=2, bias=True),
)

OPERATION = Operation(
    name="lora_linear",
    call=lora_linear,
    reference=lora_linear_reference,
    cost=lora_linear_cost,
    cases=CASES,
    library=lora_linear_library,
    differentiable=("x", "weight", "bias", "lora_a", "lora_b"),
    triton=triton_backend("lora_linear"),
)
