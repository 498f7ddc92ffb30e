"""The tiles of `lora_linear`'s kernels. Needs no Triton."""

from granite_kernels.launch import ARCHITECTURES, Tile
from granite_kernels.tiles import TileTable, predicted


def _split(block_m: int, block_k: int, num_warps: int, num_stages: int) -> Tile:
    return Tile({"BLOCK_M": block_m, "BLOCK_N": 64, "BLOCK_K": block_k}, num_warps, num_stages)


def _tiled(block_m: int, block_n: int, block_k: int, num_warps: int, num_stages: int) -> Tile:
    return Tile({"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "BLOCK_R": 64, "GROUP_M": 8}, num_warps, num_stages)


def _thin(block_m: int, block_k: int, num_stages: int) -> Tile:
    return Tile({"BLOCK_M": block_m, "BLOCK_R": 64, "BLOCK_K": block_k}, 4, num_stages)


# By architecture and bytes per element, from the roofline of an H200 and from the compiled code. The split tiles keep at least 48 KiB of
# the weight in flight, about twice what hides the latency of HBM. The tiled kernel's tiles hold two accumulators, for the base and the
# low-rank product, which rules out 128 × 256.
_DATE = "2026-11-22"
TILES = {
    "few": TileTable(
        "lora_linear",
        "few rows",
        {
            (chip, width): predicted(_split(16, 256 // width, 4, 4 if chip == 80 else 5), _DATE)
            for chip in ARCHITECTURES
            for width in (2, 4)
        },
        candidates=lambda key: [
            _split(16, steps // key[1], warps, stages) for steps, stages in ((256, 4), (256, 5), (512, 3)) for warps in (4, 8)
        ],
    ),
    "split": TileTable(
        "lora_linear",
        "rows",
        {
            (80, 2): predicted(_split(128, 64, 8, 4), _DATE),
            (80, 4): predicted(_split(128, 32, 8, 4), _DATE),
            (90, 2): predicted(_split(128, 128, 4, 4), _DATE),
            (90, 4): predicted(_split(128, 32, 8, 4), _DATE),
            (100, 2): predicted(_split(128, 128, 4, 4), _DATE),
            (100, 4): predicted(_split(128, 32, 4, 4), _DATE),
        },
        candidates=lambda key: [
            _split(128, steps // key[1], warps, stages) for steps, stages in ((128, 4), (256, 3), (256, 4)) for warps in (4, 8)
        ],
    ),
    "thin": TileTable(
        "lora_linear",
        "x·Aᵀ",
        {
            (chip, width): predicted(_thin(32, 128 if width == 2 else 32, 3 if (chip, width) == (80, 2) else 4), _DATE)
            for chip in ARCHITECTURES
            for width in (2, 4)
        },
        candidates=lambda key: [
            _thin(block_m, steps // key[1], stages) for block_m in (32, 64) for steps, stages in ((128, 4), (256, 3), (256, 4))
        ],
    ),
    "tiled": TileTable(
        "lora_linear",
        "many rows",
        {
            (80, 2): predicted(_tiled(128, 64, 64, 8, 3), _DATE),
            (80, 4): predicted(_tiled(64, 128, 32, 8, 3), _DATE),
            (90, 2): predicted(_tiled(128, 128, 64, 8, 4), _DATE),
            (90, 4): predicted(_tiled(128, 64, 32, 8, 3), _DATE),
            (100, 2): predicted(_tiled(128, 128, 64, 8, 4), _DATE),
            (100, 4): predicted(_tiled(64, 64, 32, 8, 3), _DATE),
        },
        candidates=lambda key: [
            _tiled(block_m, block_n, 128 // key[1], 8, stages)
            for block_m, block_n in ((64, 64), (64, 128), (128, 64), (128, 128))
            for stages in (3, 4)
        ],
    ),
}
