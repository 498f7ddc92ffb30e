"""The kernel of exponential noise: the same bits as Python's integers, whatever the tile and the other rows."""

import pytest
import torch
from granite_kernels import exponential_noise
from granite_kernels.exponential_noise import OPERATION
from granite_kernels.exponential_noise_triton import TILES
from granite_kernels.launch import recorded_launches
from granite_kernels.testing import poisoned_allocations

from tests.kernels.test_exponential_noise import EXTREMES, VOCABULARY, assert_exact, index

BLOCK = TILES[(80,)].blocks["BLOCK"]


def noise(seeds: torch.Tensor, counters: torch.Tensor, columns: int) -> torch.Tensor:
    with poisoned_allocations():
        return exponential_noise(seeds, counters, columns, impl="triton")


@pytest.mark.parametrize("case", [one for one in OPERATION.cases if not one.released], ids=lambda one: one.name)
def test_every_element_comes_from_its_own_bits(case):
    inputs = case.inputs(torch.float32)
    assert_exact(noise(**inputs), inputs["seeds"].tolist(), inputs["counters"].tolist())


@pytest.mark.parametrize("columns", [BLOCK - 1, BLOCK, BLOCK + 1])
def test_tile_edges(columns: int):
    assert_exact(noise(*index([11, -12], [4, 5]), columns), [11, -12], [4, 5])


def test_a_whole_vocabulary_and_the_extremes_of_the_noise():
    seeds, counters = index(list(EXTREMES), [3] * len(EXTREMES))
    assert_exact(noise(seeds, counters, VOCABULARY), list(EXTREMES), [3] * len(EXTREMES))


def test_a_row_gets_the_same_bits_with_other_rows_and_other_numbers_of_columns():
    seeds, counters = index([5, -9, 5, 2**40], [0, 7, 1, 7])
    out = noise(seeds, counters, BLOCK + 41)
    for row in range(4):
        for columns in (BLOCK + 41, BLOCK, 6, 1):
            assert torch.equal(noise(seeds[row : row + 1], counters[row : row + 1], columns)[0], out[row, :columns])


def test_rows_and_columns_without_elements_launch_nothing():
    with recorded_launches(90) as launches:
        for rows, columns in ((0, 5), (5, 0), (0, 0)):
            assert noise(*index([1] * rows, [1] * rows, "meta"), columns).shape == (rows, columns)
        assert launches == []
        noise(*index([1] * 5, [1] * 5, "meta"), BLOCK + 1)
    (one,) = launches
    assert one.grid == (10,)
