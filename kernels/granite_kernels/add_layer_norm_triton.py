"""`add_layer_norm` in Triton: one program holds whole rows in registers, so that each element is read and written once.

The backward saves no statistics: it recomputes them from rows that it needs anyway. Of two norms it computes one after the other.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from granite_kernels.errors import KernelError
from granite_kernels.launch import ARCHITECTURES, Tile, architecture, launch, launching, register
from granite_kernels.op import CHOICE
from granite_kernels.primitives import await_inputs, rounded
from granite_kernels.tiles import TileTable, predicted

MAX_WIDTH = 8192

# Keys: architecture, bytes per element, class of width, which is a power of two.
_KEYS = [(chip, size, width) for chip in ARCHITECTURES for size in (2, 4) for width in (1024, 2048, 4096, 8192)]
# A thread holds 32 elements of a row. The order of a row's sum depends on the number of warps, which is therefore the same for many
# rows and for few. On an H200 a prototype in bfloat16, 1024 wide, was fastest with 1 row and 1 warp for 64,000 rows (97 % of the
# bandwidth), and with 2 rows and 1 warp for 500 (bench/results/prototypes-nvidia-h200-2026-11-27-9291861c.json). This kernel has not been
# timed.
_TILES = TileTable(
    "add_layer_norm",
    "forward",
    {key: predicted(Tile({"ROWS": 1}, key[2] // 1024), "2026-11-27") for key in _KEYS},
    candidates=lambda key: [Tile({"ROWS": 1}, key[2] // wide) for wide in (1024, 512, 256)],
)
_FEW_ROWS = 2048
# Two rows in float32 would not fit into registers.
_FEW_TILES = TileTable(
    "add_layer_norm",
    "forward, few rows",
    {key: predicted(Tile({"ROWS": 4 // key[1]}, _TILES[key].num_warps), "2026-11-27") for key in _KEYS},
    candidates=lambda key: [Tile({"ROWS": rows}, _TILES[key].num_warps) for rows in range(1, 4 // key[1] + 1)],
)
# A thread holds 16 elements of a row, since it also sums two gradients over rows, in float32: eight programs a multiprocessor.
_BACKWARD_TILES = TileTable(
    "add_layer_norm",
    "backward",
    {key: predicted(Tile({"PROGRAMS": 1024}, key[2] // 512), "2026-11-27") for key in _KEYS},
    candidates=lambda key: [Tile({"PROGRAMS": count}, key[2] // wide) for count in (512, 1024, 2048) for wide in (512, 256)],
)


@triton.jit
def _standardised(y, inside, width, eps):
    """(y − mean) / √(variance + eps) of one row, zero where not inside, and 1 / √(variance + eps)."""
    # The mean is subtracted before squares are summed: a large mean would leave nothing of a small variance.
    centred = tl.where(inside, y - tl.sum(y, axis=0) / width, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, axis=0) / width + eps)
    return centred * scale, scale


@triton.jit
def _pair_mean(x_ptr, stride_x, pair, column, inside):
    """The mean of rows `pair` and `pair` + 1, rounded to x's dtype; zero if `pair` is -1."""
    there = inside & (pair >= 0)
    x_ptr += pair.to(tl.int64) * stride_x + column
    one = tl.load(x_ptr, mask=there, other=0.0).to(tl.float32)
    other = tl.load(x_ptr + stride_x, mask=there, other=0.0).to(tl.float32)
    return rounded((one + other) * 0.5, x_ptr.dtype.element_ty)


@triton.jit(do_not_specialize=["rows"])
def _add_layer_norm_fwd_kernel(
    x_ptr, delta_ptr, pairs_ptr, weight_ptr, bias_ptr, next_weight_ptr, next_bias_ptr, first_ptr, second_ptr, rows, width, stride_x,
    stride_delta, eps, multiplier, next_eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """ROWS rows of both results.

    Grid: (⌈rows / ROWS⌉,). x and delta (rows, width), strides (stride_x, 1) and (stride_delta, 1); with pairs (rows,) int32, x has any
    number of rows. weight, bias, and next_weight and next_bias or None: (width,). first and second (rows, width), contiguous: sum and
    normed, or normed and its norm.
    """
    column = tl.arange(0, BLOCK)
    exists = column < width
    weight = tl.load(weight_ptr + column, mask=exists, other=0.0)
    bias = tl.load(bias_ptr + column, mask=exists, other=0.0)
    if next_weight_ptr is not None:
        next_weight = tl.load(next_weight_ptr + column, mask=exists, other=0.0)
        next_bias = tl.load(next_bias_ptr + column, mask=exists, other=0.0)
    await_inputs(PDL)
    dtype: tl.constexpr = first_ptr.dtype.element_ty
    begin = tl.program_id(0).to(tl.int64) * ROWS
    xs = ()
    deltas = ()
    for r in tl.static_range(ROWS):
        row = begin + r
        inside = exists & (row < rows)
        if pairs_ptr is not None:
            pair = tl.load(pairs_ptr + row, mask=row < rows, other=-1)
            xs += (_pair_mean(x_ptr, stride_x, pair, column, exists),)
        else:
            xs += (tl.load(x_ptr + row * stride_x + column, mask=inside, other=0.0),)
        deltas += (tl.load(delta_ptr + row * stride_delta + column, mask=inside, other=0.0),)
    for r in tl.static_range(ROWS):
        row = begin + r
        inside = exists & (row < rows)
        first = rounded(xs[r].to(tl.float32) + multiplier * deltas[r].to(tl.float32), dtype)
        standard, _ = _standardised(first.to(tl.float32), inside, width, eps)
        second = rounded(standard * weight + bias, dtype)
        if next_weight_ptr is not None:
            first = second  # zero past the row's end, as bias is
            standard, _ = _standardised(first.to(tl.float32), inside, width, next_eps)
            second = rounded(standard * next_weight + next_bias, dtype)
        tl.store(first_ptr + row * width + column, first, mask=inside)
        tl.store(second_ptr + row * width + column, second, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _add_layer_norm_bwd_kernel(
    x_ptr, delta_ptr, pairs_ptr, weight_ptr, grad_normed_ptr, grad_sum_ptr, grad_x_ptr, grad_delta_ptr, partial_ptr, rows, width,
    stride_x, stride_delta, eps, multiplier,
    PROGRAMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of one norm for every PROGRAMS-th row, and this program's part of those of weight and bias.

    Grid: (min(PROGRAMS, rows),). x and delta (rows, width), strides (stride_x, 1) and (stride_delta, 1); without delta, x is the sum.
    weight (width,). grad_normed, grad_sum or None, grad_x, grad_delta or None: (rows, width), contiguous. partial (programs, 2, width)
    float32: weight, bias. With pairs (rows,) int32, grad_x and, if there is a delta, x have any number of rows, and only those of a pair
    are written.
    """
    column = tl.arange(0, BLOCK)
    inside = column < width
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    grad_weight = tl.zeros((BLOCK,), tl.float32)
    grad_bias = tl.zeros((BLOCK,), tl.float32)
    dtype: tl.constexpr = grad_x_ptr.dtype.element_ty
    for number in range(tl.program_id(0), rows, PROGRAMS):
        row = tl.cast(number, tl.int64)
        if pairs_ptr is not None:
            pair = tl.load(pairs_ptr + row)
        if pairs_ptr is not None and delta_ptr is not None:
            total = _pair_mean(x_ptr, stride_x, pair, column, inside).to(tl.float32)
        else:
            total = tl.load(x_ptr + row * stride_x + column, mask=inside, other=0.0).to(tl.float32)
        if delta_ptr is not None:
            delta = tl.load(delta_ptr + row * stride_delta + column, mask=inside, other=0.0).to(tl.float32)
            total = rounded(total + multiplier * delta, dtype).to(tl.float32)
        standard, scale = _standardised(total, inside, width, eps)
        grad = tl.load(grad_normed_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)
        grad_weight += grad * standard
        grad_bias += grad
        grad *= weight
        along = tl.sum(grad * standard, axis=0) / width
        grad = scale * (grad - tl.sum(grad, axis=0) / width - standard * along)
        if grad_sum_ptr is not None:
            grad += tl.load(grad_sum_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)
        if pairs_ptr is not None:
            there = inside & (pair >= 0)
            pair_ptr = grad_x_ptr + pair.to(tl.int64) * width + column
            tl.store(pair_ptr, rounded(grad * 0.5, dtype), mask=there)
            tl.store(pair_ptr + width, rounded(grad * 0.5, dtype), mask=there)
        else:
            tl.store(grad_x_ptr + row * width + column, rounded(grad, dtype), mask=inside)
        if grad_delta_ptr is not None:
            tl.store(grad_delta_ptr + row * width + column, rounded(multiplier * grad, dtype), mask=inside)
    partial_ptr += tl.program_id(0) * 2 * width
    tl.store(partial_ptr + column, grad_weight, mask=inside)
    tl.store(partial_ptr + width + column, grad_bias, mask=inside)


def _tile(table: TileTable, x: Tensor) -> Tile:
    """The table's tile for rows of this width."""
    block = triton.next_power_of_2(x.shape[1])
    tile = table[architecture(x.device), x.element_size(), max(block, 1024)]
    return Tile({**tile.blocks, "BLOCK": block}, tile.num_warps)


def _add_layer_norm(
    x: Tensor,
    delta: Tensor,
    weight: Tensor,
    bias: Tensor,
    next_weight: Tensor | None = None,
    next_bias: Tensor | None = None,
    eps: float = 1e-5,
    multiplier: float = 1.0,
    next_eps: float | None = None,
    pairs: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`add_layer_norm` by the Triton kernel.

    Raises:
        KernelError: the rows are wider than MAX_WIDTH.
    """
    rows, width = delta.shape
    if width > MAX_WIDTH:
        remedy = f"Use impl='torch' or {CHOICE}=torch to run the PyTorch reference"
        raise KernelError(got=f"add_layer_norm: x has {width} columns", expected=f"at most {MAX_WIDTH}", remedy=remedy)
    first, second = x.new_empty(rows, width), x.new_empty(rows, width)
    if launching(x) and width:
        tile = _tile(_FEW_TILES if rows <= _FEW_ROWS else _TILES, x)
        launch(
            _add_layer_norm_fwd_kernel, (triton.cdiv(rows, tile.blocks["ROWS"]),), tile, x_ptr=x, delta_ptr=delta, pairs_ptr=pairs,
            weight_ptr=weight, bias_ptr=bias, next_weight_ptr=next_weight, next_bias_ptr=next_bias, first_ptr=first, second_ptr=second,
            rows=rows, width=width, stride_x=x.stride(0), stride_delta=delta.stride(0), eps=eps, multiplier=multiplier,
            next_eps=eps if next_eps is None else next_eps,
        )  # fmt: skip
    return first, second


def _add_layer_norm_backward(
    grad_normed: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    eps: float,
    multiplier: float | None,
    pairs: Tensor | None,
    rows_of_x: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, delta, weight and bias of one norm, given contiguous gradients of its results.

    Without delta, x is the sum, even with pairs; the gradient of x then has rows_of_x rows all the same. Without multiplier, the gradient
    of delta is empty.
    """
    rows, width = grad_normed.shape
    tile = _tile(_BACKWARD_TILES, x)
    programs = min(tile.blocks["PROGRAMS"], rows)
    grad_x = x.new_empty(rows, width) if pairs is None else x.new_zeros(rows_of_x, width)
    grad_delta = x.new_empty((rows, width) if multiplier is not None else (0,))
    partial = x.new_empty(programs, 2, width, dtype=torch.float32)
    if launching(x) and width:
        launch(
            _add_layer_norm_bwd_kernel, (programs,), tile, x_ptr=x, delta_ptr=delta, pairs_ptr=pairs, weight_ptr=weight,
            grad_normed_ptr=grad_normed, grad_sum_ptr=grad_sum, grad_x_ptr=grad_x,
            grad_delta_ptr=None if multiplier is None else grad_delta, partial_ptr=partial, rows=rows, width=width, stride_x=x.stride(0),
            stride_delta=0 if delta is None else delta.stride(0), eps=eps, multiplier=1.0 if multiplier is None else multiplier,
        )  # fmt: skip
    grad_weight, grad_bias = partial.sum(0).to(weight.dtype).unbind(0)
    return grad_x, grad_delta, grad_weight.clone(), grad_bias.clone()


add_layer_norm_triton = register(_add_layer_norm)
_backward_op = register(_add_layer_norm_backward)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, delta, weight, _, next_weight, _, ctx.eps, ctx.multiplier, ctx.next_eps, pairs = inputs
    ctx.rows_of_x = x.shape[0]
    # A sum that is returned is the residual stream, which lives on anyway.
    kept = (output[0], None) if next_weight is None else (x, delta)
    ctx.save_for_backward(*kept, weight, next_weight, None if next_weight is None else output[0], pairs)


def _backward(ctx: Any, grad_first: Tensor, grad_second: Tensor) -> tuple[Tensor | None, ...]:
    # Detached, so that asking for a second derivative, which does not exist, raises.
    x, delta, weight, next_weight, normed, pairs = (None if one is None else one.detach() for one in ctx.saved_tensors)
    grad_first, grad_second = grad_first.detach().contiguous(), grad_second.detach().contiguous()
    of_next = (None, None)
    if next_weight is not None:
        next_eps = ctx.eps if ctx.next_eps is None else ctx.next_eps
        grad_second, _, *of_next = _backward_op(grad_second, grad_first, normed, None, next_weight, next_eps, None, None, len(normed))
        grad_first = None
    gradients = _backward_op(grad_second, grad_first, x, delta, weight, ctx.eps, ctx.multiplier, pairs, ctx.rows_of_x)
    return *gradients, *of_next, None, None, None, None


add_layer_norm_triton.register_autograd(_backward, setup_context=_save)
