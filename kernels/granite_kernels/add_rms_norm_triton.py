"""`add_rms_norm` in Triton: one program holds a whole row in registers, so that each element is read and written once."""

import torch
import triton
import triton.language as tl

from granite_kernels.errors import KernelError
from granite_kernels.launch import ARCHITECTURES, Tile, architecture, launch, launching, register
from granite_kernels.op import CHOICE
from granite_kernels.primitives import await_inputs, rounded
from granite_kernels.tiles import TileTable, predicted

MAX_WIDTH = 8192

# By architecture, bytes per element and BLOCK: 8 elements per thread for 2048 columns, and 16 for more. On an H200 a prototype in bfloat16,
# 2048 wide, was fastest with 8 warps (bench/results/prototypes-nvidia-h200-2026-11-27-9291861c.json). This kernel has not been timed.
_TILES = TileTable(
    "add_rms_norm",
    "warps",
    {
        (chip, width, block): predicted(Tile({}, warps), "2026-11-27")
        for chip in ARCHITECTURES
        for width in (2, 4)
        for block, warps in ((2048, 8), (4096, 8), (8192, 16))
    },
    candidates=lambda key: [Tile({}, warps) for warps in (2, 4, 8, 16, 32) if 4 <= key[2] // (32 * warps) <= 32],
)


@triton.jit
def _add_rms_norm_kernel(
    x_ptr, delta_ptr, weight_ptr, sum_ptr, normed_ptr, width, stride_x, stride_part, stride_delta, eps, multiplier,
    BLOCK: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row of the sum and of its norm.

    Grid: (rows,). x (rows, width), delta (PARTS, rows, width) in x's dtype or float32, weight (width,), sum and normed
    (rows, width), contiguous.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
    await_inputs(PDL)
    x = tl.load(x_ptr + row * stride_x + column, mask=inside, other=0.0).to(tl.float32)
    delta_ptr += row * stride_delta
    delta = tl.load(delta_ptr + column, mask=inside, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        delta += tl.load(delta_ptr + part * stride_part + column, mask=inside, other=0.0)
    total = rounded(x + multiplier * delta, sum_ptr.dtype.element_ty)
    tl.store(sum_ptr + row * width + column, total, mask=inside)
    wide = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / width + eps)
    tl.store(normed_ptr + row * width + column, rounded(wide * scale * weight, normed_ptr.dtype.element_ty), mask=inside)


def _add_rms_norm(
    x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float, multiplier: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`add_rms_norm` by the Triton kernel.

    Raises:
        KernelError: the rows are wider than MAX_WIDTH.
    """
    rows, width = x.shape
    if width > MAX_WIDTH:
        remedy = f"Use impl='torch' or {CHOICE}=torch to run the PyTorch reference"
        raise KernelError(got=f"add_rms_norm: x has {width} columns", expected=f"at most {MAX_WIDTH}", remedy=remedy)
    total, normed = x.new_empty(rows, width), x.new_empty(rows, width)
    if launching(x) and width:
        split = delta.ndim == 3
        launch(
            _add_rms_norm_kernel, (rows,), _tile(x, delta.shape[0] if split else 1), x_ptr=x, delta_ptr=delta, weight_ptr=weight,
            sum_ptr=total, normed_ptr=normed, width=width, stride_x=x.stride(0), stride_part=delta.stride(0) if split else 0,
            stride_delta=delta.stride(-2), eps=eps, multiplier=multiplier,
        )  # fmt: skip
    return total, normed


def _tile(x: torch.Tensor, parts: int) -> Tile:
    block = triton.next_power_of_2(x.shape[1])
    tile = _TILES[architecture(x.device), x.element_size(), max(block, 2048)]
    return Tile({**tile.blocks, "BLOCK": block, "PARTS": parts}, num_warps=min(max(block // 256, 1), tile.num_warps))


add_rms_norm_triton = register(_add_rms_norm)
