"""Exponential noise in Triton: one program computes a tile of one row, four columns from each call of the generator."""

import torch
import triton
import triton.language as tl

from granite_kernels.launch import ARCHITECTURES, Tile, architecture, launch, launching, register
from granite_kernels.tiles import TileTable, predicted

# One row of 4.1-2b's vocabulary gives most multiprocessors a program.
TILES = TileTable(
    "exponential_noise",
    "forward",
    {(chip,): predicted(Tile({"BLOCK": 1024}, 4), "2026-11-27") for chip in ARCHITECTURES},
    candidates=lambda key: [Tile({"BLOCK": block}, warps) for block in (512, 1024, 2048) for warps in (2, 4)],
)


@triton.jit(do_not_specialize=["columns"])
def _exponential_noise_kernel(out_ptr, seeds_ptr, counters_ptr, columns, BLOCK: tl.constexpr):
    """BLOCK columns of one row.

    Grid: (rows · ⌈columns / BLOCK⌉,). out (rows, columns), seeds (rows,) int64 and counters (rows,) int32, contiguous.
    """
    program, tiles = tl.program_id(0), tl.cdiv(columns, BLOCK)
    row, tile = program // tiles, program % tiles
    seed, counter = tl.load(seeds_ptr + row), tl.load(counters_ptr + row)
    group = tile * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    first, second, third, fourth = tl.philox(seed, group, counter, 0, 0)
    # The last dimension of a join counts fastest, so these are the words in the order of the columns.
    words = tl.join(tl.join(first, third), tl.join(second, fourth)).reshape(BLOCK)
    uniform = ((words >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2⁻²³
    column = tile * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + row.to(tl.int64) * columns + column, -tl.log(uniform), mask=column < columns)


def _exponential_noise(seeds: torch.Tensor, counters: torch.Tensor, columns: int) -> torch.Tensor:
    """`exponential_noise` by the Triton kernel."""
    rows = seeds.shape[0]
    out = torch.empty(rows, columns, dtype=torch.float32, device=seeds.device)
    if launching(seeds) and out.numel():
        tile = TILES[(architecture(seeds.device),)]
        grid = (rows * triton.cdiv(columns, tile.blocks["BLOCK"]),)
        launch(_exponential_noise_kernel, grid, tile, out_ptr=out, seeds_ptr=seeds, counters_ptr=counters, columns=columns)
    return out


exponential_noise_triton = register(_exponential_noise)
