"""`fused_linear` in Triton: one launch for up to MAX_ROWS rows, and around the library's product for more.

A program of the launch computes BLOCK_N columns of the result for all rows. The first programs compute those of the weight, the
others those of lora_a. Everything around the product happens in registers, in float32, and the result is rounded once.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from granite_kernels.errors import KernelError
from granite_kernels.launch import Tile, architecture, launch, launching, register
from granite_kernels.matvec import MAX_INPUTS, MAX_ROWS, matvec_tile
from granite_kernels.matvec_kernels import load_matrix, load_row, load_vector, product
from granite_kernels.op import CHOICE
from granite_kernels.primitives import await_inputs, rounded


@triton.jit
def _columns(
    x_ptr, matrix_ptr, scale_ptr, bias_ptr, norm_weight_ptr, residual_ptr, out_ptr, block, rows, columns, stride_x, stride_residual,
    stride_out, eps, multiplier,
    INPUTS: tl.constexpr, STRIDE: tl.constexpr, ROWS: tl.constexpr, GATED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Columns of the result from number `block` of BLOCK_N rows of one matrix; if GATED, half as many columns."""
    WIDTH: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    column = block * WIDTH + tl.arange(0, WIDTH)
    if GATED:  # each row of the gate is followed by the same row of the other half
        place = tl.arange(0, BLOCK_N)
        n = tl.minimum(block * WIDTH + place // 2, columns - 1) + place % 2 * columns
    else:
        n = tl.minimum(column, columns - 1)
    matrix = load_matrix(matrix_ptr, n, INPUTS, STRIDE, BLOCK_K)
    norm_weight = load_vector(norm_weight_ptr, INPUTS, BLOCK_K)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + n)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + n)
    await_inputs(PDL)
    following = load_row(x_ptr, 0, rows, stride_x, INPUTS, BLOCK_K)
    for row in tl.static_range(ROWS):
        x = following
        if row + 1 < ROWS:  # loaded now, because it takes as long as the product
            following = load_row(x_ptr, row + 1, rows, stride_x, INPUTS, BLOCK_K)
        here = (column < columns) & (row < rows)
        if residual_ptr is not None:
            residual = tl.load(residual_ptr + tl.cast(row, tl.int64) * stride_residual + column, mask=here, other=0.0)
        y = product(matrix, x, norm_weight, eps, norm_weight_ptr is not None, INPUTS)
        if scale_ptr is not None:
            y *= scale
        if bias_ptr is not None:
            y += bias.to(tl.float32)
        if GATED:
            gate, up = tl.split(y.reshape(WIDTH, 2))
            y = gate / (1 + tl.exp(-gate)) * up
        y *= multiplier
        if residual_ptr is not None:
            y += residual.to(tl.float32)
        tl.store(out_ptr + row * stride_out + column, rounded(y, out_ptr.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["rows"])
def _fused_linear_kernel(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, norm_weight_ptr, residual_ptr, lora_a_ptr, out_ptr, rows, columns, rank, stride_x,
    stride_residual, eps, multiplier,
    INPUTS: tl.constexpr, STRIDE: tl.constexpr, STRIDE_A: tl.constexpr, ROWS: tl.constexpr, GATED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_N columns of the result (if GATED, half as many), or BLOCK_A of h·lora_aᵀ.

    Grid: (tiles of the weight + tiles of lora_a,). x (rows, INPUTS), rows at most ROWS; weight (columns, INPUTS), or if GATED
    (2 · columns, INPUTS), with scale and bias for each of its rows or None; norm_weight (INPUTS,) or None; residual (rows, columns)
    or None; lora_a (rank, INPUTS) or None; out (rows, columns + rank), contiguous. STRIDE and STRIDE_A are between the rows of weight
    and lora_a: known to the compiler, they give loads of 128 bits wherever the rows are aligned.
    """
    WIDTH: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    program, tiles = tl.program_id(0), tl.cdiv(columns, WIDTH)
    if lora_a_ptr is None:
        _columns(
            x_ptr, weight_ptr, scale_ptr, bias_ptr, norm_weight_ptr, residual_ptr, out_ptr, program, rows, columns, stride_x,
            stride_residual, columns, eps, multiplier, INPUTS, STRIDE, ROWS, GATED, BLOCK_N, BLOCK_K, PDL,
        )  # fmt: skip
    elif program < tiles:
        _columns(
            x_ptr, weight_ptr, scale_ptr, bias_ptr, norm_weight_ptr, None, out_ptr, program, rows, columns, stride_x, 0, columns + rank,
            eps, multiplier, INPUTS, STRIDE, ROWS, False, BLOCK_N, BLOCK_K, PDL,
        )  # fmt: skip
    else:
        _columns(
            x_ptr, lora_a_ptr, None, None, norm_weight_ptr, None, out_ptr + columns, program - tiles, rows, rank, stride_x, 0,
            columns + rank, eps, 1.0, INPUTS, STRIDE_A, ROWS, False, BLOCK_A, BLOCK_K, PDL,
        )  # fmt: skip


def _fused_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, norm_weight: Tensor | None = None, residual: Tensor | None = None,
    lora_a: Tensor | None = None, weight_scale: Tensor | None = None, eps: float = 0.0, multiplier: float = 1.0, gated: bool = False,
) -> Tensor:  # fmt: skip
    """`fused_linear` by the Triton kernel, or for more than MAX_ROWS rows by the library's product.

    Raises:
        KernelError: x has no columns, or more than MAX_INPUTS.
    """
    (rows, inputs), columns = x.shape, weight.shape[0] // 2 if gated else weight.shape[0]
    if not 0 < inputs <= MAX_INPUTS:
        remedy = f"Use impl='torch' or {CHOICE}=torch to run the PyTorch reference"
        raise KernelError(got=f"fused_linear: x has {inputs} columns", expected=f"1 to {MAX_INPUTS}", remedy=remedy)
    rank = 0 if lora_a is None else lora_a.shape[0]
    if launching(x) and rows > MAX_ROWS:  # launching first: tracing must not add a guard on rows
        return _around_library(x, weight, bias, norm_weight, residual, lora_a, weight_scale, eps, multiplier, gated)
    out = x.new_empty(rows, columns + rank)
    if launching(x) and out.numel():
        tile, block_a = _tile(x, weight, lora_a, gated)
        width = tile.blocks["BLOCK_N"] // (2 if gated else 1)
        launch(
            _fused_linear_kernel, (triton.cdiv(columns, width) + triton.cdiv(rank, block_a),), tile,
            x_ptr=x, weight_ptr=weight, scale_ptr=weight_scale, bias_ptr=bias, norm_weight_ptr=norm_weight, residual_ptr=residual,
            lora_a_ptr=lora_a, out_ptr=out, rows=rows, columns=columns, rank=rank, stride_x=x.stride(0),
            stride_residual=0 if residual is None else residual.stride(0), eps=eps, multiplier=multiplier,
        )  # fmt: skip
    return out


def _tile(x: Tensor, weight: Tensor, lora_a: Tensor | None, gated: bool) -> tuple[Tile, int]:
    """The tile with the kernel's other constants, and its BLOCK_A."""
    chip, (rows, inputs) = architecture(x.device), x.shape
    tile = matvec_tile(inputs, weight.element_size(), chip)
    block_a = matvec_tile(inputs, x.element_size(), chip).blocks["BLOCK_N"] if lora_a is not None else 1
    constants = {
        "BLOCK_N": max(tile.blocks["BLOCK_N"], 2 if gated else 1),
        "INPUTS": inputs,
        "STRIDE": weight.stride(0),
        "STRIDE_A": 0 if lora_a is None else lora_a.stride(0),
        "ROWS": triton.next_power_of_2(rows),
        "GATED": int(gated),
        "BLOCK_A": block_a,
    }
    return Tile({**tile.blocks, **constants}, tile.num_warps), block_a


def _around_library(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm_weight: Tensor | None, residual: Tensor | None, lora_a: Tensor | None,
    weight_scale: Tensor | None, eps: float, multiplier: float, gated: bool,
) -> Tensor:  # fmt: skip
    """For many rows: the library's product is then faster than a kernel here would be."""
    h = x if norm_weight is None else norm_weight * F.rms_norm(x, norm_weight.shape, eps=eps)
    if weight_scale is not None:  # multiplied in float32, and rounded in the same pass
        weight = torch.mul(weight, weight_scale[:, None], out=torch.empty(weight.shape, dtype=x.dtype, device=x.device))
    out = F.linear(h, weight, bias)
    if gated:
        gate, up = out.chunk(2, dim=-1)
        out = F.silu(gate) * up
    if residual is not None:
        return torch.add(residual, out, alpha=multiplier)
    if multiplier != 1:
        out *= multiplier
    return out if lora_a is None else torch.cat([out, F.linear(h, lora_a)], dim=-1)


fused_linear_triton = register(_fused_linear)
