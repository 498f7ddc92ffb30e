"""Products of a few rows with a whole matrix: the tiles of the kernels in `matvec_kernels.py`. Needs no Triton.

A program holds some rows of the matrix in registers and multiplies them by one row of x after another. Reading the matrix takes
the time, so a program's share of it is loaded at once, and before the program waits for x.
"""

from granite_kernels.launch import Tile

# The most rows of x, and the longest, that one program multiplies.
MAX_ROWS, MAX_INPUTS = 8, 16384
# Columns of a tile of `head_argmax`, which are one program's, and the longest row of x for which a program can hold these.
HEAD_TILE, MAX_HEAD_INPUTS = 8, 4096

# By bytes of a matrix element and BLOCK_K: rows of the matrix, and warps, of a program. Chosen 2026-11-27 from the compiled code, and
# from measurements of 32 KiB for each program of 4 warps on an H200; the same on every architecture, because nothing has been
# measured on the others. A thread then holds 256 bytes of the matrix or less, and the row of x, of which it also loads the next, takes
# as much again. int8 has the tiles of bfloat16 up to 4096, because a small matrix in larger ones would leave multiprocessors idle.
_SAME = {
    1: {2048: (8, 4), 4096: (4, 4), 8192: (2, 8), 16384: (2, 8)},
    2: {2048: (8, 4), 4096: (4, 4), 8192: (2, 4), 16384: (2, 8)},
    4: {2048: (4, 4), 4096: (2, 4), 8192: (2, 8), 16384: (2, 16)},
}
_TILES = {80: _SAME, 90: _SAME, 100: _SAME}


def matvec_tile(inputs: int, width: int, architecture: int) -> Tile:
    """The tile for a matrix of rows of `inputs` elements of `width` bytes: BLOCK_N rows of BLOCK_K elements."""
    block_k = max(64, 1 << (inputs - 1).bit_length())
    block_n, num_warps = _TILES[architecture][width][max(2048, block_k)]
    return Tile({"BLOCK_N": block_n, "BLOCK_K": block_k}, num_warps)


def head_tile(inputs: int, width: int, architecture: int) -> Tile:
    """The tile for HEAD_TILE rows of the matrix: more warps, where `matvec_tile` has fewer rows."""
    tile = matvec_tile(inputs, width, architecture)
    return Tile({**tile.blocks, "BLOCK_N": HEAD_TILE}, tile.num_warps * HEAD_TILE // tile.blocks["BLOCK_N"])
