"""Exponential noise from a counter-based generator: random draws of tokens that do not depend on the other rows of a batch."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from granite_kernels.op import Arguments, Case, Cost, Draw, Operation, called_with, nbytes, triton_backend

MOST_COLUMNS = 2**31 - 1

# The constants of Philox 4x32-10: two multipliers, and what is added to the two words of the key after each round.
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
KEY_STEPS = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10
WORD = 0xFFFFFFFF


class ExponentialNoiseInputs(NamedTuple):
    """The arguments of `exponential_noise` except `impl`."""

    seeds: torch.Tensor
    counters: torch.Tensor
    columns: int


def exponential_noise(seeds: torch.Tensor, counters: torch.Tensor, columns: int, *, impl: str | None = None) -> torch.Tensor:
    """Independent random numbers with the exponential distribution of rate 1, a row for each pair of a seed and a counter.

    ::

        out[r, c] = −log((n + 0.5) / 2²³)     n = top 23 bits of word c % 4 of Philox(key = seeds[r], counter = (c // 4, counters[r], 0, 0))

    so an element depends on its seed, its counter and its column alone. argmax_c(p_c / out[r, c]) draws c with probability p_c.

    | argument | shape | stride | dtype |
    |---|---|---|---|
    | seeds | (rows,) | 1 | int64, all 64 bits are the key |
    | counters | (rows,) | 1 | int32, 0 or more: the number of the draw |
    | returns | (rows, columns) | contiguous | float32, from 6e-8 to 16.6 |

    The random bits are the same in every backend; the logarithm may differ by rounding.

    Args:
        columns: numbers per row, known to the host.
        impl: "triton", "torch", or None for the fastest available.

    Raises:
        KernelError: wrong shapes, dtypes, devices or strides, or columns that are not an integer from 0 to 2³¹ − 1.

    Philox 4x32-10 is from Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011), and its words are those of the
    authors' library Random123.
    """
    inputs = ExponentialNoiseInputs(seeds, counters, columns)
    _check(inputs)
    return OPERATION.select(impl, seeds)(*inputs)


def _check(inputs: ExponentialNoiseInputs) -> None:
    arguments, columns = Arguments("exponential_noise"), inputs.columns
    arguments.tensor("seeds", inputs.seeds, "rows", (torch.int64,))
    arguments.index("counters", inputs.counters, "rows")
    if not isinstance(columns, int):
        arguments.refuse(f"columns is of type {type(columns).__name__}", "an integer", "Pass the number of scores in a row")
    if not 0 <= columns <= MOST_COLUMNS:
        arguments.refuse(f"columns={columns}", f"0 to {MOST_COLUMNS}", "Pass the number of scores in a row")


@called_with(ExponentialNoiseInputs)
def exponential_noise_reference(inputs: ExponentialNoiseInputs) -> torch.Tensor:
    """`exponential_noise` in PyTorch."""
    groups = torch.arange(-(-inputs.columns // 4), device=inputs.seeds.device)
    seeds, counters = inputs.seeds[:, None], inputs.counters[:, None].long()
    zero = torch.zeros_like(seeds)
    words = philox((groups, counters, zero, zero), (seeds & WORD, seeds >> 32 & WORD))
    words = torch.stack(words, dim=-1).flatten(1)[:, : inputs.columns]
    # Of the 32 bits, float32 holds 23 and the half exactly, so that no number is 0 or 1.
    return -torch.log(((words >> 9).float() + 0.5) * 2.0**-23)


def philox(counter: tuple[torch.Tensor, ...], key: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The four random words of Philox 4x32-10 for a counter of four words and a key of two.

    Words are int64 tensors of values below 2³², of shapes that broadcast together, which is the shape of the results.
    """
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(ROUNDS):
        # A product has 64 bits, so its int64 may be negative. Its high word is therefore masked after the shift.
        first, second = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1 = (second >> 32 & WORD) ^ c1 ^ k0, second & WORD
        c2, c3 = (first >> 32 & WORD) ^ c3 ^ k1, first & WORD
        k0, k1 = k0 + KEY_STEPS[0] & WORD, k1 + KEY_STEPS[1] & WORD
    return c0, c1, c2, c3


@called_with(ExponentialNoiseInputs)
def exponential_noise_cost(inputs: ExponentialNoiseInputs) -> Cost:
    """FLOPs: one multiply-add per number, without the logarithm; the generator computes with integers. Bytes: the result, the seeds
    and the counters."""
    numbers = inputs.seeds.shape[0] * inputs.columns
    return Cost(flops=2 * numbers, bytes=4 * numbers + nbytes(inputs.seeds, inputs.counters))


@called_with(ExponentialNoiseInputs)
def exponential_noise_library(inputs: ExponentialNoiseInputs) -> Callable[[], torch.Tensor]:
    """PyTorch's `exponential_` on a tensor that exists: the same distribution, from one generator for all rows."""
    out = torch.empty(inputs.seeds.shape[0], inputs.columns, device=inputs.seeds.device)
    return partial(torch.Tensor.exponential_, out)


def _make(
    draw: Draw, *, rows: int, columns: int, seeds: tuple[int, ...] | None = None, counters: tuple[int, ...] | None = None
) -> dict[str, Any]:
    """Random seeds and counters over their whole ranges, unless they are given."""
    any_seeds = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=draw.rng)
    any_counters = torch.randint(0, 2**31, (rows,), generator=draw.rng)
    return {
        "seeds": torch.tensor(any_seeds.tolist() if seeds is None else seeds, dtype=torch.int64, device=draw.device),
        "counters": draw.int32(any_counters.tolist() if counters is None else list(counters)),
        "columns": columns,
    }


def _case(name: str, rows: int, columns: int, *, released: bool = False, **given: tuple[int, ...]) -> Case:
    return Case(name, _make, {"rows": rows, "columns": columns, **given}, released)


CASES = (
    _case("3.3-2b, 1 row", 1, 49160, released=True),
    _case("3.3-2b, 128 rows", 128, 49160, released=True),
    _case("4.1-2b, 1 row", 1, 100353, released=True),
    _case("4.1-2b, 128 rows", 128, 100353, released=True),
    _case("columns not a multiple of 4", 3, 37),
    _case("more columns than a tile", 2, 2501),
    _case("1 column", 5, 1),
    _case("no columns", 3, 0),
    _case("no rows", 0, 12),
    _case("seeds at the edges", 6, 9, seeds=(0, -1, -(2**63), 2**63 - 1, 2**32, -(2**32))),
    _case("large counters, one seed", 4, 18, seeds=(7,) * 4, counters=(0, 1, 2**31 - 2, 2**31 - 1)),
)

OPERATION = Operation(
    name="exponential_noise",
    call=exponential_noise,
    reference=exponential_noise_reference,
    cost=exponential_noise_cost,
    cases=CASES,
    library=exponential_noise_library,
    triton=triton_backend("exponential_noise"),
)
