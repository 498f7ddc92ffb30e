"""The kernel of `silu_linear`, which the operation itself leaves out on a CPU and for few rows, and which calls it computes."""

from collections.abc import Iterator

import pytest
import torch
from granite_kernels import silu_linear
from granite_kernels.launch import Launch, Tile, recorded_launches
from granite_kernels.silu_linear import silu_linear_reference
from granite_kernels.silu_linear_triton import _TILES, _by_kernel, _programs
from granite_kernels.testing import assert_accurate, poisoned_allocations
from torch._subclasses.fake_tensor import FakeTensorMode

BF16 = torch.bfloat16
MULTIPROCESSORS = {90: 132, 100: 148}


def tile(parts: int, stages: int = 2) -> Tile:
    return Tile({"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "PARTS": parts}, 4, stages)


def inside(values: torch.Tensor) -> torch.Tensor:
    """The same values as a view whose rows begin at multiples of 16 bytes, within NaN."""
    wide = values.new_full((values.shape[0] + 2, values.shape[1] + 16), torch.nan)
    wide[1:-1, 8:-8] = values
    return wide[1:-1, 8:-8]


def arguments(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, a weight of `outputs` rows, and a bias."""
    rng = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(size, generator=rng) for size in ((rows, inputs), (outputs, inputs), (outputs,)))
    return inside(x.to(dtype)), inside((weight * inputs**-0.5).to(dtype)), bias.to(dtype)


# Sizes that no block divides, with more tiles than the four programs of a CPU and more rows of tiles than a group.
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "gated", "parts", "biased", "dtype"),
    [
        (150, 40, 72, False, 1, True, BF16),
        (150, 40, 72, False, 2, True, torch.float16),
        (33, 16, 8, False, 2, False, BF16),
        (20, 24, 2 * 72, True, 1, True, torch.float16),
        (150, 40, 2 * 40, True, 2, False, BF16),
        (5, 8, 2 * 40, True, 2, True, BF16),
    ],
)
def test_the_kernel_is_accurate(rows: int, inputs: int, outputs: int, gated: bool, parts: int, biased: bool, dtype: torch.dtype):
    x, weight, bias = arguments(rows, inputs, outputs, dtype)
    bias = bias if biased else None
    with poisoned_allocations():
        out = _by_kernel(x, weight, bias, gated, tile(parts))
    eager = silu_linear_reference(x, weight, bias, gated)
    truth = silu_linear_reference(x.double(), weight.double(), None if bias is None else bias.double(), gated)
    assert_accurate(out, eager, truth)


@pytest.mark.parametrize("gated", [False, True])
def test_the_kernel_rounds_once(gated: bool):
    x, weight, bias = arguments(40, 32, 64, BF16)
    out = _by_kernel(x, weight, bias, gated, tile(2)).double()
    exact = silu_linear_reference(x.double(), weight.double(), bias.double(), gated)
    torch.testing.assert_close(out, exact, rtol=0.501 * 2**-7, atol=1e-5)


def test_a_row_has_the_same_bits_in_every_batch():
    x, weight, bias = arguments(40, 40, 40, BF16)
    whole = _by_kernel(x, weight, bias, False, tile(2))
    assert torch.equal(_by_kernel(x[23:], weight, bias, False, tile(2)), whole[23:])


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # from NumPy, with which the interpreter computes
def test_large_products_are_finite():
    x, weight = torch.tensor([-6e4, -200.0, -88.0, 0.0, 88.0, 6e4], dtype=BF16)[:, None].expand(6, 8).contiguous(), torch.eye(8).to(BF16)
    out = _by_kernel(x, weight, None, False, tile(1))
    torch.testing.assert_close(out.double(), torch.nn.functional.silu(x.double()), rtol=2**-8, atol=1e-30)


def recorded(x: torch.Tensor, weight: torch.Tensor, *, chip: int, gated: bool = False) -> list[Launch]:
    with recorded_launches(chip) as launches:
        assert silu_linear(x, weight, gated=gated).shape == (x.shape[0], weight.shape[0] // (2 if gated else 1))
    return launches


def empty(*size: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("chip", [90, 100])
def test_many_rows_are_one_launch_that_fills_the_chip(chip: int, gated: bool):
    x, weight = empty(64_000, 1024), empty(4096, 1024)
    (launch,) = recorded(x, weight, chip=chip, gated=gated)
    assert launch.kernel.__name__ == "_silu_linear_kernel"
    assert launch.grid == (MULTIPROCESSORS[chip],)
    assert launch.tile.blocks == {**_TILES[chip, 2, gated].blocks, "GATED": int(gated)}


def test_fake_tensors_are_launched_too():
    with FakeTensorMode(), torch.device("cuda"):
        (launch,) = recorded(torch.empty(64_000, 64, dtype=BF16), torch.empty(4096, 64, dtype=BF16), chip=90)
    assert launch.arguments["x_desc"].shape == (64_000, 64)


def for_the_library() -> Iterator[tuple[str, int, torch.Tensor, torch.Tensor]]:
    x, weight = empty(64_000, 64), empty(4096, 64)
    yield "another chip", 80, x, weight
    yield "float32", 90, x.float(), weight.float()
    yield "few rows", 90, x[:500], weight
    yield "x begins between 16 bytes", 90, empty(64_000, 80)[:, 1:65], weight
    yield "weight begins between 16 bytes", 90, x, empty(4096, 80)[:, 4:68]
    yield "rows of x", 90, empty(64_000, 65)[:, :64], weight
    yield "rows of weight", 90, x, empty(4096, 68)[:, :64]
    yield "rows of the result", 90, x, empty(4100, 64)
    yield "one row that is repeated", 90, empty(1, 64).expand(64_000, 64), weight
    yield "no columns", 90, empty(64_000, 8)[:, :0], empty(4096, 8)[:, :0]
    yield "one column, whose stride means nothing", 90, empty(64_000, 8)[:, :1].as_strided((64_000, 1), (8, 8)), empty(4096, 8)[:, :1]


@pytest.mark.parametrize(("chip", "x", "weight"), [pytest.param(*case[1:], id=case[0]) for case in for_the_library()])
def test_other_calls_are_the_librarys(chip: int, x: torch.Tensor, weight: torch.Tensor):
    assert recorded(x, weight, chip=chip) == []
    assert [one.kernel.__name__ for one in recorded(x, weight, chip=chip, gated=True)] == ["_silu_product_kernel"]


@pytest.mark.parametrize(("block_n", "warps", "stages", "each"), [(256, 8, 3, 1), (128, 4, 3, 2), (128, 4, 4, 1), (64, 4, 3, 2)])
def test_two_programs_share_a_multiprocessor_that_has_memory_for_both(block_n: int, warps: int, stages: int, each: int):
    chosen = Tile({"BLOCK_M": 128, "BLOCK_N": block_n, "BLOCK_K": 64, "PARTS": 2}, warps, stages)
    with recorded_launches(90):
        assert _programs(chosen, False, torch.device("meta")) == each * 132
