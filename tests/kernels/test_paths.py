"""The choice of a product's path by its shape and rows."""

import pytest
from granite_kernels.paths import Path, product_path

M, S, L = Path.MATVEC, Path.SPLIT, Path.LIBRARY


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "summed", "path"),
    [
        (1, 2048, 3072, False, M),
        (8, 4096, 2048, True, M),
        (8, 12800, 4096, True, M),
        (1, 16385, 64, True, L),
        (9, 2048, 2048, True, S),
        (64, 4096, 2048, True, S),
        (64, 4096, 2048, False, L),
        (16, 12800, 4096, True, L),
        (16, 2048, 8192, False, L),
        (65, 4096, 2048, True, L),
        (128, 2048, 3072, False, L),
    ],
)
def test_few_rows_read_the_weight_once_and_some_products_are_split(rows: int, inputs: int, outputs: int, summed: bool, path: Path):
    assert product_path(rows, inputs, outputs, summed=summed) is path
