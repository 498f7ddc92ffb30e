"""`split_linear` in Triton: one program computes a tile of rows and columns over one slice of the inner dimension."""

from dataclasses import replace

import torch
import triton
import triton.language as tl

from granite_kernels.launch import Tile, architecture, launch, launching, register
from granite_kernels.primitives import await_inputs, dot
from granite_kernels.tiles import TileTable, predicted


def _tile(block_k: int, num_warps: int, num_stages: int) -> Tile:
    return Tile({"BLOCK_N": 32, "BLOCK_K": block_k}, num_warps, num_stages)


# By architecture and bytes per element, for all numbers of rows. On an H200 a prototype was fastest with the tile of 90 in 16 bits, for 64
# rows (bench/results/experiments-nvidia-h200-2026-11-26-cdd1619a.json). The others follow from it and from the shared memory of the chip.
# This kernel has not been timed.
_TILES = TileTable(
    "split_linear",
    "forward",
    {
        (80, 2): predicted(_tile(128, 4, 3), "2026-11-27"),
        (80, 4): predicted(_tile(32, 4, 4), "2026-11-27"),
        (90, 2): predicted(_tile(128, 4, 4), "2026-11-27"),
        (90, 4): predicted(_tile(32, 4, 4), "2026-11-27"),
        (100, 2): predicted(_tile(128, 4, 4), "2026-11-27"),
        (100, 4): predicted(_tile(32, 8, 4), "2026-11-27"),
    },
    candidates=lambda key: [
        _tile(block_k, warps, stages)
        for block_k, stages in (((128, 3), (128, 4), (64, 4), (64, 6)) if key[1] == 2 else ((32, 4), (32, 6), (64, 3)))
        for warps in (4, 8)
    ],
)


@triton.jit(do_not_specialize=["rows"])
def _split_linear_kernel(
    x_ptr, weight_ptr, out_ptr, rows, inputs, outputs, width, stride_x, stride_weight,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One tile of a part's sums.

    Grid: (⌈outputs / BLOCK_N⌉, parts, ⌈rows / BLOCK_M⌉). x (rows, inputs), weight (outputs, inputs), out (parts, rows, outputs) float32,
    contiguous. BLOCK_K divides width, the width of a slice.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    await_inputs(PDL)
    x_rows, weight_rows = x_ptr + m.to(tl.int64)[:, None] * stride_x, weight_ptr + n.to(tl.int64)[None, :] * stride_weight
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(part * width, tl.minimum((part + 1) * width, inputs), BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_rows + k[None, :], mask=(m < rows)[:, None] & (k < inputs)[None, :], other=0.0)
        weight = tl.load(weight_rows + k[:, None], mask=(k < inputs)[:, None] & (n < outputs)[None, :], other=0.0)
        acc = dot(x, weight, acc)
    out = out_ptr + (part.to(tl.int64) * rows + m)[:, None] * outputs + n[None, :]
    tl.store(out, acc, mask=(m < rows)[:, None] & (n < outputs)[None, :])


def _split_linear(x: torch.Tensor, weight: torch.Tensor, parts: int) -> torch.Tensor:
    """`split_linear` by the Triton kernel."""
    from granite_kernels.split_linear import slice_width  # here, because that file imports this one

    (rows, inputs), outputs = x.shape, weight.shape[0]
    out = x.new_empty(parts, rows, outputs, dtype=torch.float32)
    if launching(x):
        tile = _TILES[architecture(x.device), x.element_size()]
        block_m = min(max(triton.next_power_of_2(rows), 16), 64)
        launch(
            _split_linear_kernel, (triton.cdiv(outputs, tile.blocks["BLOCK_N"]), parts, triton.cdiv(rows, block_m)),
            replace(tile, blocks={**tile.blocks, "BLOCK_M": block_m}), x_ptr=x, weight_ptr=weight, out_ptr=out, rows=rows,
            inputs=inputs, outputs=outputs, width=slice_width(inputs, parts), stride_x=x.stride(0), stride_weight=weight.stride(0),
        )  # fmt: skip
    return out


split_linear_triton = register(_split_linear)
