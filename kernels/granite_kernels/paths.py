"""How a product of the language model is computed: by its rows and the shape of its weight."""

from enum import Enum

__all__ = ["MATVEC_ROWS", "Path", "product_path"]


class Path(Enum):
    """Ways to compute x·Wᵀ with what comes before and after it."""

    MATVEC = "one launch that reads the weight once, with norm, residual or activation inside (`fused_linear`)"
    SPLIT = "partial sums over slices of the inner dimension (`split_linear`), which the norm that follows adds (`add_rms_norm`)"
    LIBRARY = "the library's product"


# NVIDIA H200, 2026-11-26, bench/results/experiments-nvidia-h200-2026-11-26-cdd1619a.json: the step of one row, 1.31 ms with matvecs,
# and products of 16 to 128 rows of 4.1-2b. Between 8 and 16 rows nothing was measured.
MATVEC_ROWS = 8
_SPLIT_ROWS = 64
# The most outputs of a product that gains from a split: with more, its tiles fill the chip (o and down gained, q|k|v hardly, gate|up
# lost).
_SPLIT_OUTPUTS = 2048


def product_path(rows: int, outputs: int, *, summed: bool) -> Path:
    """The path of a product.

    Args:
        rows: of x.
        outputs: rows of the weight.
        summed: whether what follows can add partial sums.
    """
    if rows <= MATVEC_ROWS:
        return Path.MATVEC
    if summed and rows <= _SPLIT_ROWS and outputs <= _SPLIT_OUTPUTS:
        return Path.SPLIT
    return Path.LIBRARY
