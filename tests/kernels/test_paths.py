"""The choice of a product's path by its shape and rows."""

import pytest
from granite_kernels.paths import Path, block_rows, product_path, silu_path

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


def test_int8_weights_are_read_by_blocks_of_rows_before_they_are_made_wider():
    assert [block_rows(rows, int8=True) for rows in (1, 8, 9, 32, 33, 128)] == [1, 8, 8, 8, 33, 128]
    assert [block_rows(rows, int8=False) for rows in (1, 9, 32)] == [1, 9, 32]


def test_silu_is_in_the_epilogue_of_products_that_do_not_stay_in_the_cache():
    encoder = [silu_path(rows, 4096, 90) for rows in (500, 6000, 6200, 64_000)]
    assert encoder == [L, L, Path.EPILOGUE, Path.EPILOGUE]
    assert [silu_path(rows, 4096, 100) for rows in (6200, 64_000)] == [L, Path.EPILOGUE]
    assert silu_path(64_000, 4096, 80) is L
