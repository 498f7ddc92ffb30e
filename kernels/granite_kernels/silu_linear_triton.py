"""`silu_linear` in Triton: persistent programs, whose operands the copy engine (TMA) brings, and SiLU before the product is stored.

Few rows, other chips, and tensors that the copy engine cannot read are left to the library's product and a pass over it.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from granite_kernels.launch import Tile, architecture, has_memory, launch, launching, multiprocessors, register
from granite_kernels.paths import Path, silu_path
from granite_kernels.primitives import dot, rounded
from granite_kernels.silu_product_triton import silu_product_triton
from granite_kernels.tiles import TileTable, predicted

# The copy engine reads and writes 16 bytes at a time.
_UNIT = 16


def _tile(block_m: int, block_n: int, num_warps: int, num_stages: int, parts: int = 2) -> Tile:
    return Tile({"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": 64, "PARTS": parts}, num_warps, num_stages)


def _candidates(key: tuple) -> list[Tile]:
    """Tiles without spills. Small ones leave room for a second program, which multiplies while the first one applies SiLU."""
    if key[-1]:
        return [_tile(128, 128, 8, 3), _tile(128, 128, 8, 4), _tile(128, 128, 8, 4, 1), _tile(128, 64, 4, 3), _tile(128, 64, 8, 4)]
    wide = [_tile(128, 256, 8, 3), _tile(128, 256, 8, 3, 1), _tile(128, 256, 8, 4), _tile(256, 128, 8, 3), _tile(256, 128, 8, 4)]
    return [*wide, _tile(128, 128, 4, 3), _tile(128, 128, 8, 3), _tile(128, 128, 8, 4)]


# By architecture, bytes per element, and whether the layer is gated. On an H200, a similar kernel was fastest with the tile of 90 that is
# not gated (bench/results/experiments-nvidia-h200-2026-11-26-cdd1619a.json, "tma (128, 256, 64, 8, 3)"); this one has not been timed.
_TILES = TileTable(
    "silu_linear",
    "forward",
    {
        (90, 2, False): predicted(_tile(128, 256, 8, 3, 1), "2026-11-27"),
        (90, 2, True): predicted(_tile(128, 128, 8, 4, 1), "2026-11-27"),
        (100, 2, False): predicted(_tile(128, 256, 8, 4), "2026-11-27"),
        (100, 2, True): predicted(_tile(128, 128, 8, 4, 1), "2026-11-27"),
    },
    candidates=_candidates,
    architectures=(90, 100),
)


@triton.jit
def _place(tile, tiles_m, tiles_n, GROUP: tl.constexpr = 8):
    """Row and column of a tile. Tiles are counted by columns within GROUP rows of them, so that those which are computed at one time
    share rows of x and of the weight in the L2 cache."""
    group = tile // (GROUP * tiles_n)
    first = group * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    rest = tile % (GROUP * tiles_n)
    return first + rest % height, rest // height


@triton.jit
def _parts(acc, PARTS: tl.constexpr):
    """The columns of acc in PARTS equal parts, 1 or 2, from left to right."""
    if PARTS == 1:
        return (acc,)
    else:
        return acc.reshape(acc.shape[0], 2, acc.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def _add_bias(y, bias_ptr, column, outputs):
    if bias_ptr is None:
        return y
    else:
        return y + tl.load(bias_ptr + column, mask=column < outputs, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["rows"])
def _silu_linear_kernel(
    x_desc, weight_desc, out_desc, bias_ptr, rows, inputs, outputs,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows and BLOCK_N columns of the result at a time, until all are computed.

    Grid: any number of programs. Descriptors: x (rows, inputs) in blocks of (BLOCK_M, BLOCK_K); weight (outputs, inputs), or if GATED
    (2 · outputs, inputs), in blocks of (BLOCK_N, BLOCK_K); out (rows, outputs) in blocks of (BLOCK_M, BLOCK_N / PARTS). They read zeros
    outside of a tensor, and write nothing there. bias (outputs,) or (2 · outputs,), or None.
    """
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(outputs, BLOCK_N)
    WIDTH: tl.constexpr = BLOCK_N // PARTS
    # Flattened with the loop inside, so that the operands of the next tile are on their way while this one is stored.
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        m, n = _place(tile, tiles_m, tiles_n)
        gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        up = gate
        for k in range(0, inputs, BLOCK_K):
            x = x_desc.load([m * BLOCK_M, k])
            gate = dot(x, weight_desc.load([n * BLOCK_N, k]).T, gate)
            if GATED:
                up = dot(x, weight_desc.load([outputs + n * BLOCK_N, k]).T, up)
        gates, ups = _parts(gate, PARTS), _parts(up, PARTS)
        for part in tl.static_range(PARTS):
            column = n * BLOCK_N + part * WIDTH + tl.arange(0, WIDTH)
            y = _add_bias(gates[part], bias_ptr, column, outputs)
            y = y / (1.0 + tl.exp(-y))
            if GATED:
                y *= _add_bias(ups[part], bias_ptr if bias_ptr is None else bias_ptr + outputs, column, outputs)
            out_desc.store([m * BLOCK_M, n * BLOCK_N + part * WIDTH], rounded(y, out_desc.dtype))


def _silu_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, gated: bool = False) -> torch.Tensor:
    """`silu_linear` by the Triton kernel, or by the library's product and a pass over it."""
    outputs = weight.shape[0] // 2 if gated else weight.shape[0]
    if not launching(x):
        return x.new_empty(x.shape[0], outputs)
    if has_kernel(x, weight, gated):
        return _by_kernel(x, weight, bias, gated, _TILES[architecture(x.device), x.element_size(), gated])
    return _around_library(x, weight, bias, gated)


def has_kernel(x: torch.Tensor, weight: torch.Tensor, gated: bool) -> bool:
    """Whether the kernel computes a call, and not the library."""
    is_worth_it = silu_path(x.shape[0], weight.shape[0], architecture(x.device)) is Path.EPILOGUE
    return is_worth_it and _has_descriptors(x, weight, weight.shape[0] // 2 if gated else weight.shape[0])


def _around_library(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gated: bool) -> torch.Tensor:
    y = F.linear(x, weight, bias)
    return silu_product_triton.launcher(y) if gated else F.silu(y, inplace=True)


def _has_descriptors(x: torch.Tensor, weight: torch.Tensor, outputs: int) -> bool:
    """Whether the copy engine can read x and weight and write the result, and the kernel has their dtype."""
    units = _UNIT // x.element_size()
    return x.element_size() == 2 and outputs % units == 0 and all(_is_readable(one, units) for one in (x, weight))


def _is_readable(tensor: torch.Tensor, units: int) -> bool:
    """Whether every row begins at a multiple of 16 bytes, and none overlaps the next."""
    start = tensor.data_ptr() if has_memory(tensor) else tensor.storage_offset() * tensor.element_size()
    width, (stride, last) = tensor.shape[1], tensor.stride()
    return start % _UNIT == 0 and stride % units == 0 and stride >= width > 0 and last == 1


def _by_kernel(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gated: bool, tile: Tile) -> torch.Tensor:
    """The result by the kernel, with `tile`, for tensors of which `_has_descriptors` is true."""
    (rows, inputs), outputs = x.shape, weight.shape[0] // 2 if gated else weight.shape[0]
    out, blocks = x.new_empty(rows, outputs), tile.blocks
    tiles = triton.cdiv(rows, blocks["BLOCK_M"]) * triton.cdiv(outputs, blocks["BLOCK_N"])
    launch(
        _silu_linear_kernel, (min(tiles, _programs(tile, gated, x.device)),), replace(tile, blocks={**blocks, "GATED": int(gated)}),
        x_desc=TensorDescriptor.from_tensor(x, [blocks["BLOCK_M"], blocks["BLOCK_K"]]),
        weight_desc=TensorDescriptor.from_tensor(weight, [blocks["BLOCK_N"], blocks["BLOCK_K"]]),
        out_desc=TensorDescriptor.from_tensor(out, [blocks["BLOCK_M"], blocks["BLOCK_N"] // blocks["PARTS"]]),
        bias_ptr=bias, rows=rows, inputs=inputs, outputs=outputs,
    )  # fmt: skip
    return out


def _programs(tile: Tile, gated: bool, device: torch.device) -> int:
    """Programs that run at once: one on every multiprocessor, or two if it has shared memory for both."""
    m, n, k, parts = (tile.blocks[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "PARTS"))
    elements = tile.num_stages * k * (m + (2 * n if gated else n)) + m * n // parts
    shared = 2 * elements + 1280  # 256 bytes of barriers at most, and 1 KiB that every program takes
    return multiprocessors(device) * max(1, min(2, 228 * 1024 // shared))


silu_linear_triton = register(_silu_linear)
