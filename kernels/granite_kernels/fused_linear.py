"""A linear layer together with what surrounds it in the language model: a norm before it, a gate, a multiplier and a sum after it."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from granite_kernels.matvec import MAX_ROWS
from granite_kernels.op import Arguments, Case, Cost, Draw, Operation, called_with, nbytes, triton_backend


class FusedLinearInputs(NamedTuple):
    """The arguments of `fused_linear` except `impl`."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None = None
    norm_weight: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    lora_a: torch.Tensor | None = None
    weight_scale: torch.Tensor | None = None
    eps: float = 0.0
    multiplier: float = 1.0
    gated: bool = False


def fused_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    lora_a: torch.Tensor | None = None,
    weight_scale: torch.Tensor | None = None,
    *,
    eps: float = 0.0,
    multiplier: float = 1.0,
    gated: bool = False,
    impl: str | None = None,
) -> torch.Tensor:
    """A norm, one or several projections side by side, a gate, a multiplier and a residual sum. Inference only.

    ::

        h = norm_weight · x / sqrt(mean(x²) + eps)          h = x without norm_weight
        y = h·Wᵀ + bias                                     W = weight · weight_scale[:, None] if weight is int8
        y = silu(y[:, :out // 2]) · y[:, out // 2:]         if gated
        result = residual + multiplier · y                  multiplier · y without residual
        result = [multiplier · y | h·lora_aᵀ]               with lora_a

    | argument | shape | stride | dtype |
    |---|---|---|---|
    | x | (rows, in) | last 1, first free | any float |
    | weight | (out, in) | last 1, first free | as x, or int8 |
    | bias | (out,) or None | 1 | as x |
    | norm_weight | (in,) or None | 1 | as x |
    | residual | (rows, width) or None; width is out, or out / 2 if gated | last 1, first free | as x |
    | lora_a | (rank, in) or None | last 1, first free | as x |
    | weight_scale | (out,) if weight is int8, otherwise None | 1 | float32, or float64 with x in float64 |
    | returns | (rows, width), or (rows, out + rank) with lora_a | contiguous | as x |

    This is how an adapter enters a decode step: the columns h·lora_aᵀ are raw, without bias or multiplier, and the launch that
    follows applies B and the scaling. `lora_linear` is the operation for the whole product. Every sum is float32 (float64 for
    float64). In Triton, a row among up to MAX_ROWS gets the same bits whatever the other rows are.

    Args:
        eps: added to the mean square, if there is a norm_weight.
        multiplier: of y.
        gated: the first half of the weight's rows is a gate for the second half.
        impl: "triton", "torch", or None for the fastest available.

    Raises:
        KernelError: wrong shapes, dtypes, devices or strides, an int8 weight without weight_scale or the reverse, an odd number of
            weight rows with gated, lora_a together with gated or residual, or a gradient would be needed. In Triton also `in`
            of 0 or above 16384.

    The norm is RMSNorm (Zhang and Sennrich, arXiv 1910.07467), the gate is SwiGLU (Shazeer, arXiv 2002.05202).
    """
    inputs = FusedLinearInputs(x, weight, bias, norm_weight, residual, lora_a, weight_scale, eps, multiplier, gated)
    _check(inputs)
    return OPERATION.select(impl, x)(*inputs)


def _check(inputs: FusedLinearInputs) -> None:
    arguments = Arguments("fused_linear")
    arguments.tensor("x", inputs.x, "rows in")
    arguments.tensor("weight", inputs.weight, "out in", (inputs.x.dtype, torch.int8))
    for name, value, layout in (
        ("bias", inputs.bias, "out"),
        ("norm_weight", inputs.norm_weight, "in"),
        ("residual", inputs.residual, "rows width"),
        ("lora_a", inputs.lora_a, "rank in"),
    ):
        if value is not None:
            arguments.tensor(name, value, layout)
    _check_scale(arguments, inputs)
    _check_width(arguments, inputs)
    tensors = {name: value for name, value in inputs._asdict().items() if isinstance(value, torch.Tensor)}
    arguments.refuse_gradients(**tensors)


def _check_scale(arguments: Arguments, inputs: FusedLinearInputs) -> None:
    """An int8 weight has a scale for each of its rows, and no other weight has."""
    quantised = inputs.weight.dtype == torch.int8
    if inputs.weight_scale is not None:
        wide = (torch.float32, torch.float64) if inputs.x.dtype == torch.float64 else (torch.float32,)
        arguments.tensor("weight_scale", inputs.weight_scale, "out", wide)
        if not quantised:
            arguments.refuse(f"weight_scale with a weight in {inputs.weight.dtype}", "an int8 weight", "Omit weight_scale")
    elif quantised:
        arguments.refuse("an int8 weight without weight_scale", "a scale for each of its rows", "Pass weight_scale (out,) float32")


def _check_width(arguments: Arguments, inputs: FusedLinearInputs) -> None:
    """The number of columns, and options that exclude each other."""
    outputs, width = inputs.weight.shape[0], result_width(inputs)
    if inputs.gated and outputs % 2:
        arguments.refuse(f"gated with {outputs} rows of weight", "an even number: gate, then up", "Check how weight was joined")
    if inputs.lora_a is not None and (inputs.gated or inputs.residual is not None):
        arguments.refuse(f"lora_a with {'gated' if inputs.gated else 'residual'}", "lora_a alone", "Make two calls, or use lora_linear")
    if inputs.residual is not None and inputs.residual.shape[1] != width:
        shape = tuple(inputs.residual.shape)
        arguments.refuse(f"residual has shape {shape}", f"{width} columns, as the result", "Check how residual and weight were made")


def result_width(inputs: FusedLinearInputs) -> int:
    """Columns of the result."""
    width = inputs.weight.shape[0] // 2 if inputs.gated else inputs.weight.shape[0]
    return width if inputs.lora_a is None else width + inputs.lora_a.shape[0]


@called_with(FusedLinearInputs)
def fused_linear_reference(inputs: FusedLinearInputs) -> torch.Tensor:
    """`fused_linear` in PyTorch, rounded after each step as eager code is. An int8 weight is first converted to x's dtype."""
    h, weight = inputs.x, inputs.weight
    if inputs.norm_weight is not None:
        h = inputs.norm_weight * F.rms_norm(h, inputs.norm_weight.shape, eps=inputs.eps)
    if inputs.weight_scale is not None:
        weight = (weight * inputs.weight_scale[:, None]).to(h.dtype)
    out = F.linear(h, weight, inputs.bias)
    if inputs.gated:
        gate, up = out.chunk(2, dim=-1)
        out = F.silu(gate) * up
    if inputs.residual is not None:
        out = torch.add(inputs.residual, out, alpha=inputs.multiplier)
    elif inputs.multiplier != 1:
        out = out * inputs.multiplier
    return out if inputs.lora_a is None else torch.cat([out, F.linear(h, inputs.lora_a)], dim=-1)


@called_with(FusedLinearInputs)
def fused_linear_cost(inputs: FusedLinearInputs) -> Cost:
    """FLOPs: the products, without norm, gate and sums. Bytes: every argument and the result, once."""
    (rows, in_features), columns = inputs.x.shape, inputs.weight.shape[0]
    columns += 0 if inputs.lora_a is None else inputs.lora_a.shape[0]
    moved = nbytes(*(one for one in inputs if isinstance(one, torch.Tensor)))
    return Cost(flops=2 * rows * in_features * columns, bytes=moved + rows * result_width(inputs) * inputs.x.element_size())


@called_with(FusedLinearInputs)
def fused_linear_library(inputs: FusedLinearInputs) -> Callable[[], torch.Tensor]:
    """The product with the weight alone; an int8 weight is converted to x's dtype beforehand."""
    return partial(F.linear, inputs.x, inputs.weight.to(inputs.x.dtype))


def _make(
    draw: Draw,
    *,
    rows: int,
    inputs: int,
    outputs: int,
    rank: int = 0,
    bias: bool = False,
    norm: bool = False,
    residual: bool = False,
    int8: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """The residual is a part of wider rows, whose other columns hold NaN."""
    around = draw.normal(rows, (outputs // 2 if options.get("gated") else outputs) + 8)
    around[:, -8:] = torch.nan
    return {
        "x": draw.normal(rows, inputs),
        "weight": _int8(draw, outputs, inputs) if int8 else draw.normal(outputs, inputs, std=inputs**-0.5),
        "bias": draw.normal(outputs) if bias else None,
        "norm_weight": draw.normal(inputs) if norm else None,
        "residual": around[:, :-8] if residual else None,
        "lora_a": draw.normal(rank, inputs, std=inputs**-0.5) if rank else None,
        "weight_scale": draw.normal(outputs, std=inputs**-0.5 / 64, dtype=_wide(draw.dtype)) if int8 else None,
        "eps": 1e-5 if norm else 0.0,
        **options,
    }


def _int8(draw: Draw, *size: int) -> torch.Tensor:
    """Integers of the whole range. Meta tensors wherever `Draw.normal` gives these."""
    if not draw.values or draw.device.type == "meta":
        return torch.empty(size, device="meta", dtype=torch.int8)
    return torch.randint(-128, 128, size, generator=draw.rng, dtype=torch.int8).to(draw.device)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _case(name: str, rows: int, inputs: int, outputs: int, *, released: bool = False, **options: Any) -> Case:
    return Case(name, _make, {"rows": rows, "inputs": inputs, "outputs": outputs, **options}, released)


def _released(name: str, inputs: int, outputs: int, **options: Any) -> tuple[Case, ...]:
    """One row, and as many as a single launch computes."""
    return tuple(_case(f"{name}, {rows} row{'s' * (rows > 1)}", rows, inputs, outputs, released=True, **options) for rows in (1, MAX_ROWS))


CASES = (
    *_released("4.1-2b qkv", 2048, 3072, norm=True),
    *_released("4.1-2b qkv in int8", 2048, 3072, norm=True, int8=True),
    *_released("4.1-2b o", 2048, 2048, residual=True, multiplier=0.22),
    *_released("4.1-2b gate|up", 2048, 8192, norm=True, gated=True),
    *_released("4.1-2b gate|up in int8", 2048, 8192, norm=True, gated=True, int8=True),
    *_released("4.1-2b down", 4096, 2048, residual=True, multiplier=0.22),
    *_released("4.1-2b down in int8", 4096, 2048, residual=True, multiplier=0.22, int8=True),
    *_released("4.1-2b head", 2048, 100353, norm=True, multiplier=1 / 8),
    *_released("3.3-2b qkv with adapter", 2048, 3072, norm=True, rank=128),
    *_released("3.3-2b qkv with adapter in int8", 2048, 3072, norm=True, rank=128, int8=True),
    *_released("3.3-2b down", 8192, 2048, residual=True, multiplier=0.22),
    *_released("3.3-2b down in int8", 8192, 2048, residual=True, multiplier=0.22, int8=True),
    *_released("3.3-8b qkv with adapter", 4096, 6144, norm=True, rank=128),
    *_released("3.3-8b down", 12800, 4096, residual=True, multiplier=0.22),
    *_released("3.3-8b down in int8", 12800, 4096, residual=True, multiplier=0.22, int8=True),
    *_released("3.3-8b gate|up", 4096, 25600, norm=True, gated=True),
    *_released("3.3-8b gate|up in int8", 4096, 25600, norm=True, gated=True, int8=True),
    _case("odd sizes", 3, 37, 21, bias=True, norm=True, residual=True, multiplier=0.22),
    _case("one row", 1, 64, 40),
    _case("no rows", 0, 64, 40, norm=True),
    _case("two rows, gated", 2, 64, 38, norm=True, gated=True),
    _case("eight rows, gated, with bias and residual", 8, 37, 42, bias=True, norm=True, gated=True, residual=True, multiplier=0.5),
    _case("bias and multiplier", 5, 64, 23, bias=True, multiplier=0.125),
    _case("adapter", 4, 64, 24, norm=True, rank=5, multiplier=0.5),
    _case("int8", 3, 100, 21, bias=True, norm=True, int8=True),
    _case("int8 and gated", 1, 64, 34, gated=True, int8=True),
    _case("int8 and adapter", 8, 64, 18, bias=True, norm=True, rank=11, int8=True),
    _case("wide rows", 1, 2088, 9, norm=True, residual=True),
    _case("nine rows", 9, 64, 24, bias=True, norm=True, rank=5, multiplier=0.5, int8=True),
    _case("twenty rows", 20, 37, 42, norm=True, gated=True, residual=True, multiplier=0.22, int8=True),
)

OPERATION = Operation(
    name="fused_linear",
    call=fused_linear,
    reference=fused_linear_reference,
    cost=fused_linear_cost,
    cases=CASES,
    library=fused_linear_library,
    wide=("weight_scale",),
    triton=triton_backend("fused_linear"),
)
