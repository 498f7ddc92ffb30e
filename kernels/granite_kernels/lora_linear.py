"""A linear layer with low-rank adapters, chosen row by row."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from granite_kernels.op import Arguments, Case, Cost, Draw, Operation, accumulator, called_with, nbytes, triton_backend


class LoraLinearInputs(NamedTuple):
    """The arguments of `lora_linear` except `impl`."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    lora_a: torch.Tensor
    lora_b: torch.Tensor
    scaling: torch.Tensor
    adapter_index: torch.Tensor | None


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
    """x·Wᵀ + bias + scaling[n] · (x·A[n]ᵀ)·B[n]ᵀ, where n is the row's adapter. Rows without an adapter have only x·Wᵀ + bias.

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

    An adapter_index of −1 means no adapter. Its values are not checked, because that would wait for the device. x·Aᵀ is rounded
    to x's dtype before ·B, as in eager code; every sum is float32 (float64 for float64). A row's result does not depend on
    adapters that the row does not use, even if they hold NaN or infinity.

    Args:
        impl: "triton", "torch", or None for the fastest available.

    Raises:
        KernelError: wrong shapes, dtypes, devices or strides, or adapter_index is None and there is no adapter 0.

    In a decode step an adapter is split over two launches instead: `fused_linear` computes x·Aᵀ beside x·Wᵀ, and the launch that
    follows applies B.

    The adapter is LoRA (Hu et al., arXiv 2106.09685) as peft applies it, without dropout. peft keeps float32 adapters with a
    bfloat16 base: convert them when they are loaded, because one call has one dtype.
    """
    inputs = LoraLinearInputs(x, weight, bias, lora_a, lora_b, scaling, adapter_index)
    _check(inputs)
    return OPERATION.select(impl, x)(*inputs)


def _check(inputs: LoraLinearInputs) -> None:
    arguments = Arguments("lora_linear")
    arguments.tensor("x", inputs.x, "rows in")
    arguments.tensor("weight", inputs.weight, "out in")
    if inputs.bias is not None:
        arguments.tensor("bias", inputs.bias, "out")
    arguments.tensor("lora_a", inputs.lora_a, "adapters rank in")
    arguments.tensor("lora_b", inputs.lora_b, "adapters out rank")
    wide = (torch.float32, torch.float64) if inputs.x.dtype == torch.float64 else (torch.float32,)
    arguments.tensor("scaling", inputs.scaling, "adapters", wide)
    if inputs.adapter_index is not None:
        arguments.index("adapter_index", inputs.adapter_index, "rows")
    elif inputs.lora_a.shape[0] == 0:
        arguments.refuse(
            "adapter_index is None and there are no adapters",
            "at least one adapter, because None means adapter 0",
            "Use a plain linear layer, or an adapter_index of -1 in every row",
        )


@called_with(LoraLinearInputs)
def lora_linear_reference(inputs: LoraLinearInputs) -> torch.Tensor:
    """`lora_linear` in PyTorch: applies every adapter to every row, then selects, so that it never waits for a device.

    The products are PyTorch's in x's dtype, which accumulate in float32 and round once, so no bfloat16 weight is copied to
    float32. Each product is rounded, and then they are added in float32, as in eager code with peft.
    """
    x, weight, bias, lora_a, lora_b, scaling, adapter_index = inputs
    wide = accumulator(x.dtype)
    out = F.linear(x, weight, bias)
    for adapter in range(1 if adapter_index is None else lora_a.shape[0]):
        delta = F.linear(F.linear(x, lora_a[adapter]), lora_b[adapter])
        if x.dtype == wide:
            adapted = torch.addcmul(out, delta, scaling[adapter])
        else:
            adapted = torch.addcmul(out.to(wide), delta.to(wide), scaling[adapter]).to(x.dtype)
        out = adapted if adapter_index is None else torch.where((adapter_index == adapter)[:, None], adapted, out)
    return out


@called_with(LoraLinearInputs)
def lora_linear_cost(inputs: LoraLinearInputs) -> Cost:
    """FLOPs: the base product, and both low-rank products for the rows with an adapter. Bytes: x, weight, bias, the result,
    adapter_index and scaling, and A and B of the adapters that some row uses; x·Aᵀ stays on the chip."""
    (rows, in_features), (_, out_features, rank) = inputs.x.shape, inputs.lora_b.shape
    index, itemsize = inputs.adapter_index, inputs.x.element_size()
    used = {0: rows} if index is None else {n: index.tolist().count(n) for n in range(inputs.lora_a.shape[0])}
    used = {adapter: count for adapter, count in used.items() if count}
    flops = 2 * rows * in_features * out_features + 2 * sum(used.values()) * rank * (in_features + out_features)
    moved = nbytes(inputs.x, inputs.weight, inputs.bias, inputs.scaling, index) + rows * out_features * itemsize
    return Cost(flops=flops, bytes=moved + len(used) * rank * (in_features + out_features) * itemsize)


@called_with(LoraLinearInputs)
def lora_linear_library(inputs: LoraLinearInputs) -> Callable[[], torch.Tensor]:
    """The base product alone: the cost of the layer without adapters."""
    return partial(F.linear, inputs.x, inputs.weight, inputs.bias)


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
    """`choice` is repeated over the rows; None passes adapter_index=None."""
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
    _case("no row has an adapter", (-1,), 6, 64, 32, 16),
    _case("every other row", (0, -1), 33, 64, 48, 16),
    _case("three adapters", (0, 2, -1, 1, 2), 37, 64, 48, 16, adapters=3, bias=True),
    _case("unused adapters", (1, -1), 10, 32, 48, 8, adapters=4),
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
    wide=("scaling",),
    triton=triton_backend("lora_linear"),
)
