"""Exponential noise: the generator's known answers, every element compared with integers in Python, and its distribution."""

import math
from collections.abc import Sequence

import pytest
import torch
from granite_kernels import KernelError, exponential_noise
from granite_kernels.exponential_noise import OPERATION, exponential_noise_cost, exponential_noise_library, philox

VOCABULARY = 100353  # of 4.1-2b
# By seed, the column with the lowest or the highest uniform number in draw 3, and that number's top 23 bits.
EXTREMES = {49: (56499, 0), 8: (94905, 2**23 - 1)}
# Neighbouring uniform numbers give results that differ by 3.2e-7 or more of their size. The interpreter's logarithm is off by up
# to 2.7e-7, PyTorch's by 0.8e-7.
ROUNDING = 3e-7

# From Random123's file of known answers, kat_vectors: counter, key and result of philox4x32 with 10 rounds.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def index(seeds: Sequence[int], counters: Sequence[int], device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(seeds, dtype=torch.int64, device=device), torch.tensor(counters, dtype=torch.int32, device=device)


def words_of(seed: int, counter: int, group: int) -> list[int]:
    """Philox 4x32-10 as in section 3.3 of the paper, with Python's integers."""
    key, words = [seed % 2**32, seed // 2**32 % 2**32], [group, counter, 0, 0]
    for _ in range(10):
        (high0, low0), (high1, low1) = divmod(0xD2511F53 * words[0], 2**32), divmod(0xCD9E8D57 * words[2], 2**32)
        words = [high1 ^ words[1] ^ key[0], low1, high0 ^ words[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return words


def exact(seed: int, counter: int, columns: int) -> torch.Tensor:
    """One row in float64."""
    words = [word for group in range(-(-columns // 4)) for word in words_of(seed, counter, group)]
    return -((torch.tensor(words[:columns]) // 2**9 + 0.5).double() / 2**23).log()


def assert_exact(out: torch.Tensor, seeds: Sequence[int], counters: Sequence[int]) -> None:
    """Every element comes from the right bits, and is finite and above 0."""
    assert out.dtype == torch.float32 and out.is_contiguous() and len(out) == len(seeds)
    assert out.isfinite().all() and (out > 0).all()
    for row, seed, counter in zip(out, seeds, counters, strict=True):
        torch.testing.assert_close(row.double(), exact(seed, counter, len(row)), rtol=ROUNDING, atol=0)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_the_generator_gives_its_known_answers(counter: str, key: str, expected: str):
    counter, key, expected = ([int(word, 16) for word in text.split()] for text in (counter, key, expected))
    assert [int(word) for word in philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))] == expected


@pytest.mark.parametrize("case", [one for one in OPERATION.cases if not one.released], ids=lambda one: one.name)
def test_every_element_comes_from_its_own_bits(case):
    inputs = case.inputs(torch.float32)
    assert_exact(exponential_noise(**inputs), inputs["seeds"].tolist(), inputs["counters"].tolist())


@pytest.mark.parametrize("seed", EXTREMES)
def test_the_lowest_and_the_highest_uniform_numbers_give_finite_positive_noise(seed: int):
    column, bits = EXTREMES[seed]
    assert words_of(seed, 3, column // 4)[column % 4] >> 9 == bits
    out = exponential_noise(*index([seed], [3]), VOCABULARY)[0, column]
    assert float(out) == pytest.approx(-math.log((bits + 0.5) / 2**23), rel=ROUNDING)


def test_a_row_does_not_depend_on_other_rows_or_on_the_number_of_columns():
    seeds, counters = index([5, -9, 5, 2**40, 5], [0, 7, 1, 7, 0])
    out = exponential_noise(seeds, counters, 41)
    for row in range(5):
        for columns in (41, 40, 4, 3, 1):
            alone = exponential_noise(seeds[row : row + 1], counters[row : row + 1], columns)
            assert torch.equal(alone[0], out[row, :columns])
    assert torch.equal(exponential_noise(seeds.flip(0), counters.flip(0), 41), out.flip(0))
    assert torch.equal(out[0], out[4]) and len(out.unique()) == 4 * 41


@pytest.fixture(scope="module")
def samples() -> torch.Tensor:
    """Noise of 16 neighbouring seeds and 16 neighbouring counters, (16, 16, 1021), in float64."""
    seeds = torch.arange(1000, 1016).repeat_interleave(16)
    counters = torch.arange(16, dtype=torch.int32).repeat(16)
    return exponential_noise(seeds, counters, 1021).double().view(16, 16, 1021)


def test_mean_variance_and_third_moment_are_those_of_the_exponential_distribution(samples: torch.Tensor):
    # The variance of x^k's mean is ((2k)! − k!²) / n.
    for k in (1, 2, 3):
        sigma = math.sqrt((math.factorial(2 * k) - math.factorial(k) ** 2) / samples.numel())
        assert abs(float(samples.pow(k).mean()) - math.factorial(k)) < 4 * sigma


def test_the_distribution_function_is_that_of_the_exponential_distribution(samples: torch.Tensor):
    """Kolmogorov and Smirnov's distance, over all samples and over each word of the generator; 1.95 is passed once in 1000 times."""
    for part in (samples, *(samples[..., word::4] for word in range(4))):
        expected = -torch.expm1(-part.flatten().sort().values)
        steps = torch.arange(len(expected) + 1, dtype=torch.float64) / len(expected)
        distance = torch.maximum((expected - steps[:-1]).abs().max(), (expected - steps[1:]).abs().max())
        assert float(distance) * math.sqrt(len(expected)) < 1.95


@pytest.mark.parametrize("step", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("dim", [0, 1, 2], ids=["seeds", "counters", "columns"])
def test_neighbours_are_not_correlated(samples: torch.Tensor, dim: int, step: int):
    count = samples.shape[dim] - step
    pair = torch.stack([samples.narrow(dim, first, count).flatten() for first in (0, step)])
    for values in (pair, pair.log()):  # the logarithm weighs the small values, which win a race
        assert abs(float(values.corrcoef()[0, 1])) < 4 / math.sqrt(pair.shape[1])


def test_a_race_draws_columns_with_their_probabilities():
    probabilities = torch.tensor([0.6, 0.25, 0.1, 0.04, 0.01, 0.0])
    rows = 20000
    noise = exponential_noise(torch.full((rows,), 3), torch.arange(rows, dtype=torch.int32), 6)
    drawn = (probabilities / noise).argmax(1).bincount(minlength=6)
    expected = probabilities * rows
    assert drawn[5] == 0
    assert float(((drawn - expected)[:5] ** 2 / expected[:5]).sum()) < 18.5  # passed once in 1000 times


@pytest.mark.parametrize("columns", [-1, 2**31, 4.0, torch.tensor(4)], ids=str)
def test_the_number_of_columns_must_be_a_number_that_the_host_knows(columns):
    with pytest.raises(
        KernelError, match=r"^exponential_noise: columns.*; expected (0 to 2147483647|an integer)\. Pass the number of scores"
    ):
        exponential_noise(*index([1], [0], "meta"), columns)  # an accepted number costs no memory


def test_cost_and_library_call_match_a_count_by_hand():
    given = (*index([1, 2, 3], [0, 0, 0]), 7)
    cost = exponential_noise_cost(*given)
    assert (cost.flops, cost.bytes) == (2 * 21, 4 * 21 + 3 * (8 + 4))
    once, again = (exponential_noise_library(*given)().clone() for _ in range(2))
    assert once.shape == (3, 7) and once.dtype == torch.float32 and not torch.equal(once, again)
