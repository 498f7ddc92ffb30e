"""How a product is computed: by its rows and the shape of its weight."""

from enum import Enum

from granite_kernels.matvec import MAX_INPUTS, MAX_ROWS

__all__ = ["Path", "block_rows", "product_path", "silu_path"]


class Path(Enum):
    """Ways to compute x·Wᵀ with what comes before and after it."""

    MATVEC = "one launch that reads the weight once, with norm, residual or activation inside (`fused_linear`)"
    SPLIT = "partial sums over slices of the inner dimension (`split_linear`), which the norm that follows adds (`add_rms_norm`)"
    EPILOGUE = "a persistent product, which applies the activation before it stores (`silu_linear`)"
    LIBRARY = "the library's product"


# (most rows, path if what follows can add partial sums, path otherwise); more rows use the library. NVIDIA H200, 2026-11-26,
# bench/results/experiments-nvidia-h200-2026-11-26-cdd1619a.json: a step of one row took 1.31 ms with matvecs, and of the products of 16
# to 128 rows of 4.1-2b, o and down gained from a split. Nothing was measured between 1 row and 16.
_TABLE = ((MAX_ROWS, Path.MATVEC, Path.MATVEC), (64, Path.SPLIT, Path.LIBRARY))
# With more outputs, the tiles of a product fill the chip without a split: q|k|v hardly gained, and gate|up lost.
_SPLIT_OUTPUTS = 2048
# Up to this many rows, a step with int8 weights runs in blocks of MAX_ROWS. Otherwise the weights become wider before each product, which
# moves five times their bytes. Predicted 2026-11-27 from bytes and launches (bench/results/rehearsal.json), not measured.
_INT8_ROWS = 32
# The fewest bytes of a product, in 16 bits, after which its activation belongs into its epilogue, by architecture. On an NVIDIA H200, with
# 64,000 rows of 1024 → 4096 (524 MB), a prototype of that kernel took 0.89 ms, and the library's product and SiLU 0.99 ms (2026-11-26,
# bench/results/experiments-nvidia-h200-2026-11-26-cdd1619a.json). Nothing else was measured. Predicted 2026-11-27: a pass over a product
# is cheap as long as that stays in the L2 cache, which has 50 MB on an H100 or H200 and 126 MB on a B200.
_EPILOGUE_BYTES = {90: 50_000_000, 100: 126_000_000}


def block_rows(rows: int, *, int8: bool) -> int:
    """Rows of a decode step that go through the layers together, before the next block does."""
    return MAX_ROWS if int8 and MAX_ROWS < rows <= _INT8_ROWS else rows


def product_path(rows: int, inputs: int, outputs: int, *, summed: bool) -> Path:
    """The path of a product.

    Args:
        rows: of x.
        inputs, outputs: columns and rows of the weight.
        summed: whether what follows can add partial sums.
    """
    path = next((split if summed else other for most, split, other in _TABLE if rows <= most), Path.LIBRARY)
    too_wide = (path is Path.MATVEC and inputs > MAX_INPUTS) or (path is Path.SPLIT and outputs > _SPLIT_OUTPUTS)
    return Path.LIBRARY if too_wide else path


def silu_path(rows: int, outputs: int, architecture: int) -> Path:
    """The path of a product with SiLU after it, in 16 bits.

    Args:
        rows: of x.
        outputs: rows of the weight; of a gated layer, gate and up together.
        architecture: an entry of `launch.ARCHITECTURES`.
    """
    least = _EPILOGUE_BYTES.get(architecture)
    return Path.EPILOGUE if least is not None and 2 * rows * outputs >= least else Path.LIBRARY
