"""Products of a few rows with a whole matrix: the tiles of the kernels in `matvec_kernels.py`. Needs no Triton.

A program holds some rows of the matrix in registers and multiplies them by one row of x after another. Reading the matrix takes
the time, so a program's share of it is loaded at once, and before the program waits for x.
"""

from granite_kernels.launch import Tile
from granite_kernels.tiles import TileTable, predicted

# The most rows of x, and the longest, that one program multiplies.
MAX_ROWS, MAX_INPUTS = 8, 16384
# Columns of a tile of `head_argmax`, which are one program's, and the longest row of x for which a program can hold these.
HEAD_TILE, MAX_HEAD_INPUTS = 8, 4096

# Rows of the matrix, and warps, of a program, by bytes of an element and elements of a row. In an experiment on an H200, 16, 32 and 64 KiB
# for each program of 4 warps were equal within 10 %. An A100 has about half the bandwidth of an H200 for each multiprocessor, so it needs
# half as much in flight. int8 has no more rows than bfloat16, so that the smallest matrices still give every multiprocessor a program.
_HOPPER = {
    **{(1, 2048): (8, 4), (1, 4096): (4, 8), (1, 8192): (2, 8), (1, 16384): (1, 8)},
    **{(2, 2048): (8, 4), (2, 4096): (4, 4), (2, 8192): (2, 4), (2, 16384): (2, 8)},
    **{(4, 2048): (4, 4), (4, 4096): (2, 4), (4, 8192): (2, 8), (4, 16384): (2, 16)},
}
_AMPERE = _HOPPER | {
    **{(2, 2048): (4, 4), (2, 4096): (2, 4), (2, 8192): (2, 8), (2, 16384): (2, 16)},
    **{(4, 2048): (2, 4), (4, 4096): (2, 4), (4, 8192): (2, 8), (4, 16384): (1, 16)},
}
_CHOSEN = {(chip, *key): row for chip, rows in ((80, _AMPERE), (90, _HOPPER), (100, _HOPPER)) for key, row in rows.items()}


def _candidates(key: tuple[int, int, int]) -> list[Tile]:
    """The present tile, and those with 64 to 128 elements of the matrix for each thread.

    More than 128, which for several rows of x stay in registers as float32, would not fit beside a thread's part of two rows of x.
    """
    inputs = key[2]
    shapes = [(rows, warps) for rows in (1, 2, 4, 8, 16) for warps in ((4, 8) if inputs < 16384 else (8, 16))]
    fitting = [(rows, warps) for rows, warps in shapes if 64 * 32 * warps <= rows * inputs <= 128 * 32 * warps]
    return [Tile({"BLOCK_N": rows}, warps) for rows, warps in dict.fromkeys([_CHOSEN[key], *fitting])]


# By architecture, bytes of an element of the matrix, and elements of its rows.
_TILES = TileTable(
    "fused_linear",
    "rows of the matrix",
    {key: predicted(Tile({"BLOCK_N": rows}, warps), "2026-11-27") for key, (rows, warps) in _CHOSEN.items()},
    candidates=_candidates,
)
# HEAD_TILE rows of the matrix have as many more warps as they are more than those above.
_HEAD_TILES = TileTable(
    "head_argmax",
    "warps",
    {
        key: predicted(Tile({"BLOCK_N": HEAD_TILE}, warps * HEAD_TILE // rows), "2026-11-27")
        for key, (rows, warps) in _CHOSEN.items()
        if key[1] > 1 and key[2] <= MAX_HEAD_INPUTS
    },
    candidates=lambda key: [Tile({"BLOCK_N": HEAD_TILE}, key[2] // 2048 * warps) for warps in (4, 8, 16)],
)


def matvec_tile(inputs: int, width: int, architecture: int) -> Tile:
    """The tile for a matrix of rows of `inputs` elements of `width` bytes: BLOCK_N rows of BLOCK_K elements."""
    return _with_block_k(_TILES, inputs, width, architecture)


def head_tile(inputs: int, width: int, architecture: int) -> Tile:
    """The tile for HEAD_TILE rows of the matrix."""
    return _with_block_k(_HEAD_TILES, inputs, width, architecture)


def _with_block_k(table: TileTable, inputs: int, width: int, architecture: int) -> Tile:
    block_k = max(64, 1 << (inputs - 1).bit_length())
    tile = table[architecture, width, max(2048, block_k)]
    return Tile({**tile.blocks, "BLOCK_K": block_k}, tile.num_warps)
