"""The kernel of fused_linear: tile edges, rows that must not see each other, exact int8, and the library's product for many rows."""

import importlib

import pytest
import torch
from granite_kernels import OPERATIONS, KernelError, fused_linear
from granite_kernels.launch import ARCHITECTURES, recorded_launches
from granite_kernels.matvec import MAX_INPUTS, MAX_ROWS, matvec_tile
from granite_kernels.op import Case
from granite_kernels.testing import assert_operation_accurate, poisoned_allocations

OP = OPERATIONS["fused_linear"]
FILE = importlib.import_module("granite_kernels.fused_linear_triton")


def draw(rows: int, inputs: int, outputs: int, dtype=torch.float32, **options):
    return Case("", OP.cases[0].make, {"rows": rows, "inputs": inputs, "outputs": outputs, **options}).inputs(dtype)


def triton(**inputs):
    return fused_linear(**inputs, impl="triton")


def check(inputs: dict) -> None:
    with poisoned_allocations():
        assert_operation_accurate(OP, inputs, impl="triton")


def launches(inputs: dict, architecture: int = 90) -> list:
    with recorded_launches(architecture) as recorded:
        triton(**{name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in inputs.items()})
    return recorded


@pytest.mark.parametrize("outputs", [1, 7, 8, 9, 17])
def test_columns_around_a_tile_edge(outputs: int):
    check(draw(2, 33, outputs, torch.bfloat16, bias=True, residual=True))
    check(draw(2, 33, 2 * outputs, torch.bfloat16, bias=True, gated=True))


@pytest.mark.parametrize("inputs", [1, 2, 63, 64, 65, 129])
def test_widths_around_a_power_of_two(inputs: int):
    check(draw(2, inputs, 9, torch.bfloat16, norm=True))
    check(draw(2, inputs, 9, torch.bfloat16, norm=True, int8=True))


@pytest.mark.parametrize("inputs", [2048, 4096, 8192, 12800])
def test_released_widths(inputs: int):
    check(draw(2, inputs, 9, torch.bfloat16, residual=True, multiplier=0.22))


@pytest.mark.parametrize("rank", [1, 8, 9])
def test_ranks_around_a_tile_edge(rank: int):
    check(draw(3, 40, 12, rank=rank, norm=True, bias=True, multiplier=0.5))


@pytest.mark.parametrize("options", [{"norm": True, "gated": True}, {"residual": True, "int8": True}, {"norm": True, "rank": 3}], ids=str)
def test_a_row_gets_the_same_bits_whatever_the_other_rows_are(options: dict):
    inputs = draw(MAX_ROWS, 100, 12, **options)
    out = triton(**inputs)
    for own in (slice(0, 1), slice(7, 8), slice(2, 4), slice(5, 8)):
        residual = None if inputs["residual"] is None else inputs["residual"][own]
        assert torch.equal(triton(**{**inputs, "x": inputs["x"][own], "residual": residual}), out[own])


def test_a_row_of_nan_stays_in_its_row():
    inputs = draw(5, 40, 12, norm=True, rank=3)
    expected = triton(**inputs)
    inputs["x"][2] = torch.nan
    out = triton(**inputs)
    assert out[2].isnan().all()
    others = [0, 1, 3, 4]
    assert torch.equal(out[others], expected[others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_int8_value_is_exact(dtype: torch.dtype):
    weight = torch.arange(-128, 128, dtype=torch.int32).to(torch.int8)[:, None].repeat(1, 3)
    x = torch.eye(3, dtype=dtype)
    out = triton(x=x, weight=weight, weight_scale=torch.full((256,), 0.5))
    assert torch.equal(out, 0.5 * torch.arange(-128, 128).to(dtype).expand(3, 256))


def test_everything_around_the_product_is_rounded_once():
    """In bfloat16, 1 + 2⁻⁸ and 0.5 · (1 + 2⁻⁷) need more bits than y or multiplier · y may have if they were rounded."""
    x = torch.tensor([[1.0, 2**-8]]).bfloat16()
    out = triton(x=x, weight=torch.ones(1, 2).bfloat16(), residual=torch.tensor([[-1.0]]).bfloat16())
    assert out.item() == 2**-8


@pytest.mark.parametrize("rows", [1, MAX_ROWS])
def test_up_to_eight_rows_are_one_launch_and_more_are_none(rows: int):
    (one,) = launches(draw(rows, 64, 40, torch.bfloat16, norm=True, residual=True))
    assert one.kernel is FILE._fused_linear_kernel
    assert one.grid == (5,) and one.tile.blocks["ROWS"] == rows and one.tile.blocks["PDL"] == 1
    (one,) = launches(draw(rows, 64, 42, torch.bfloat16, rank=9, int8=True))
    assert one.grid == (6 + 2,)
    (one,) = launches(draw(rows, 64, 42, torch.bfloat16, gated=True))
    assert one.grid == (6,)  # ⌈21 / 4⌉
    assert launches(draw(MAX_ROWS + 1, 64, 42, torch.bfloat16, gated=True, norm=True)) == []


@pytest.mark.parametrize("options", [{"norm": True, "gated": True, "residual": True, "multiplier": 0.22}, {"rank": 3, "multiplier": 0.5}])
def test_more_than_eight_rows_have_the_bits_of_the_library(options: dict):
    inputs = draw(MAX_ROWS + 1, 40, 12, torch.bfloat16, **options)
    before = inputs["x"].clone()
    assert torch.equal(triton(**inputs), fused_linear(**inputs, impl="torch"))
    assert torch.equal(inputs["x"], before)


def test_rows_too_wide_for_a_program_are_refused():
    assert triton(x=torch.zeros(1, MAX_INPUTS), weight=torch.ones(1, MAX_INPUTS)).item() == 0
    for inputs in (0, MAX_INPUTS + 1):
        with pytest.raises(KernelError, match=f"fused_linear: x has {inputs} columns; expected 1 to {MAX_INPUTS}. Use impl='torch'"):
            triton(x=torch.zeros(1, inputs), weight=torch.ones(1, inputs))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("width", [1, 2, 4])
def test_a_tile_covers_the_row_and_fits_into_registers(width: int, architecture: int):
    for inputs in (1, 37, 2048, 2049, 4096, 8192, 12800, MAX_INPUTS):
        tile = matvec_tile(inputs, width, architecture)
        rows, elements = tile.blocks["BLOCK_N"], tile.blocks["BLOCK_K"]
        assert elements >= inputs and (elements < 2 * inputs or elements == 64)
        assert rows * elements <= 128 * 32 * tile.num_warps
