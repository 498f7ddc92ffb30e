"""`silu_product` in Triton: one program computes a tile of one row."""

import torch
import triton
import triton.language as tl

from granite_kernels.launch import ARCHITECTURES, Tile, architecture, launch, launching, register
from granite_kernels.primitives import await_inputs, rounded
from granite_kernels.tiles import TileTable, predicted

# One 128-bit load of gate and one of up per thread in bfloat16.
_TILES = TileTable(
    "silu_product",
    "forward",
    {(chip,): predicted(Tile({"BLOCK": 1024}, 4), "2026-11-27") for chip in ARCHITECTURES},
    candidates=lambda key: [Tile({"BLOCK": 256 * warps * loads}, warps) for warps in (2, 4, 8) for loads in (1, 2)],
)


@triton.jit
def _silu_product_kernel(x_ptr, out_ptr, width, stride_x, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """BLOCK columns of one row.

    Grid: (rows, ⌈width / BLOCK⌉). x (rows, 2 · width): gate, then up; out (rows, width), contiguous.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    await_inputs(PDL)
    x_ptr += row * stride_x
    gate = tl.load(x_ptr + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + width + column, mask=inside, other=0.0).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * width + column, rounded(out, out_ptr.dtype.element_ty), mask=inside)


def _silu_product(x: torch.Tensor) -> torch.Tensor:
    """`silu_product` by the Triton kernel."""
    rows, width = x.shape[0], x.shape[1] // 2
    out = x.new_empty(rows, width)
    if launching(x):
        tile = _TILES[(architecture(x.device),)]
        grid = (rows, triton.cdiv(width, tile.blocks["BLOCK"]))
        launch(_silu_product_kernel, grid, tile, x_ptr=x, out_ptr=out, width=width, stride_x=x.stride(0))
    return out


silu_product_triton = register(_silu_product)
