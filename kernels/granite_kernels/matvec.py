"""Products of a few rows with a whole matrix: the tiles of the kernels in `matvec_kernels.py`. Needs no Triton.

A program holds some rows of the matrix in registers and multiplies them by one row of x after another. Reading the matrix takes
the time, so a program's share of it is loaded at once, and before the program waits for x.
"""

from granite_kernels.launch import Tile

# The most rows of x, and the longest, that one program multiplies.
MAX_ROWS, MAX_INPUTS = 8, 16384
# Columns of a tile of `head_argmax`, which are one program's, and the longest row of x for which a program can hold these.
HEAD_TILE, MAX_HEAD_INPUTS = 8, 4096

# By architecture, bytes of a matrix element and BLOCK_K: rows of the matrix, and warps, of a program. Chosen 2026-11-27 from the
# compiled code, and from an experiment on an H200, in which 16, 32 and 64 KiB for each program of 4 warps were equal within 10 %. An
# A100 has about half the bandwidth of an H200 for each multiprocessor, so it needs half as much in flight. Neither it nor a B200 was
# measured. A thread has at most 128 elements of the matrix, which for several rows of x stay in registers as float32, beside its part
# of two rows of x. int8 has no more rows than bfloat16, so that the smallest matrices still give every multiprocessor a program.
_HOPPER = {
    1: {2048: (8, 4), 4096: (4, 8), 8192: (2, 8), 16384: (1, 8)},
    2: {2048: (8, 4), 4096: (4, 4), 8192: (2, 4), 16384: (2, 8)},
    4: {2048: (4, 4), 4096: (2, 4), 8192: (2, 8), 16384: (2, 16)},
}
_AMPERE = {
    1: {2048: (8, 4), 4096: (4, 8), 8192: (2, 8), 16384: (1, 8)},
    2: {2048: (4, 4), 4096: (2, 4), 8192: (2, 8), 16384: (2, 16)},
    4: {2048: (2, 4), 4096: (2, 4), 8192: (2, 8), 16384: (1, 16)},
}
_TILES = {80: _AMPERE, 90: _HOPPER, 100: _HOPPER}


def matvec_tile(inputs: int, width: int, architecture: int) -> Tile:
    """The tile for a matrix of rows of `inputs` elements of `width` bytes: BLOCK_N rows of BLOCK_K elements."""
    block_k = max(64, 1 << (inputs - 1).bit_length())
    block_n, num_warps = _TILES[architecture][width][max(2048, block_k)]
    return Tile({"BLOCK_N": block_n, "BLOCK_K": block_k}, num_warps)


def head_tile(inputs: int, width: int, architecture: int) -> Tile:
    """The tile for HEAD_TILE rows of the matrix: more warps, where `matvec_tile` has fewer rows."""
    tile = matvec_tile(inputs, width, architecture)
    return Tile({**tile.blocks, "BLOCK_N": HEAD_TILE}, tile.num_warps * HEAD_TILE // tile.blocks["BLOCK_N"])
