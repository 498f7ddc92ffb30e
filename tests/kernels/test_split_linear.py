"""Split products compared with the whole product, on both backends."""

import pytest
import torch
import torch.nn.functional as F
from granite_kernels import KernelError, split_linear
from granite_kernels.launch import recorded_launches
from granite_kernels.split_linear import MAX_PARTS, SLICE_UNIT, parts_for, slice_width, split_linear_cost

BACKENDS = pytest.mark.parametrize("impl", ["torch", "triton"])


def draw(rows: int = 5, inputs: int = 300, outputs: int = 36) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return torch.randn(rows, inputs, generator=rng), torch.randn(outputs, inputs, generator=rng)


@BACKENDS
@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_the_parts_are_the_products_of_their_slices(parts: int, impl: str):
    x, weight = draw()
    out = split_linear(x, weight, parts=parts, impl=impl)
    assert (out.shape, out.dtype) == ((parts, 5, 36), torch.float32)
    width = slice_width(300, parts)
    for part in range(parts):
        columns = slice(part * width, (part + 1) * width)
        torch.testing.assert_close(out[part], F.linear(x[:, columns], weight[:, columns]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.sum(0), F.linear(x, weight), rtol=1e-4, atol=1e-4)


@BACKENDS
def test_a_part_reads_only_its_own_slice(impl: str):
    x, weight = draw()
    expected = split_linear(x, weight, parts=3, impl=impl)
    x[:, :128] = weight[:, 256:] = torch.nan
    out = split_linear(x, weight, parts=3, impl=impl)
    assert torch.equal(out[1], expected[1])
    assert out[[0, 2]].isnan().all()


@BACKENDS
def test_sums_in_bfloat16_are_not_rounded(impl: str):
    x, weight = (one.bfloat16() for one in draw())
    out = split_linear(x, weight, parts=2, impl=impl).sum(0)
    torch.testing.assert_close(out.double(), F.linear(x.double(), weight.double()), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("parts", [0, MAX_PARTS + 1, 2.0, None])
def test_wrong_numbers_of_parts_are_refused(parts):
    with pytest.raises(KernelError, match=rf"split_linear: parts={parts}; expected an integer from 1 to {MAX_PARTS}\."):
        split_linear(*draw(), parts=parts)


@pytest.mark.parametrize("rows", [1, 9, 16, 64, 65, 128, 1440])
@pytest.mark.parametrize(("inputs", "outputs"), [(2048, 2048), (4096, 2048), (12800, 4096), (2048, 8192), (300, 64), (64, 0), (4096, 32)])
def test_parts_fill_the_chip_about_once(rows: int, inputs: int, outputs: int):
    parts = parts_for(rows, inputs, outputs)
    tiles = -(-outputs // 32) * -(-rows // 64)
    assert 1 <= parts <= MAX_PARTS
    assert parts == 1 or tiles * parts <= 132
    # No slice is empty, and one more part would be too many.
    assert (parts - 1) * slice_width(inputs, parts) < inputs
    assert parts == MAX_PARTS or tiles * (parts + 1) > 132 or inputs < (parts + 1) * 4 * SLICE_UNIT


def test_the_measured_layers_are_cut_into_two():
    assert [parts_for(64, inputs, 2048) for inputs in (2048, 4096)] == [2, 2]
    assert parts_for(64, 2048, 8192) == 1


@pytest.mark.parametrize(("rows", "block", "row_tiles"), [(9, 16, 1), (17, 32, 1), (64, 64, 1), (65, 64, 2)])
def test_tiles_follow_the_rows(rows: int, block: int, row_tiles: int):
    x, weight = (one.to("meta", torch.bfloat16) for one in draw(rows, 512, 64))
    with recorded_launches(90) as launches:
        split_linear(x, weight, parts=4, impl="triton")
    (one,) = launches
    assert one.tile.blocks["BLOCK_M"] == block
    assert one.grid == (2, 4, row_tiles)


def test_the_cost_writes_every_part_in_float32():
    x, weight = (one.bfloat16() for one in draw())
    cost = split_linear_cost(x, weight, 3)
    assert cost.flops == 2 * 5 * 300 * 36
    assert cost.bytes == 2 * 300 * (5 + 36) + 4 * 3 * 5 * 36
