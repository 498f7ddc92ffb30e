"""The kernel of the residual sum and its norm: rounding, rows that do not depend on each other, and its limit."""

import pytest
import torch
from granite_kernels import KernelError, add_rms_norm
from granite_kernels.add_rms_norm_triton import MAX_WIDTH
from granite_kernels.launch import recorded_launches
from granite_kernels.testing import poisoned_allocations

from tests.kernels.test_add_rms_norm import OPTIONS, draw


def triton(**given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with poisoned_allocations():
        return add_rms_norm(**given, **OPTIONS, impl="triton")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("parts", [None, 5])
def test_every_result_is_rounded_once(parts: int | None, dtype: torch.dtype):
    given = draw(9, 52, parts, dtype)
    total, normed = triton(**given)
    delta = given["delta"].double() if parts is None else given["delta"].double().sum(0)
    exact = given["x"].double() + 0.22 * delta
    # Half a unit in the last place, and a little for float32.
    torch.testing.assert_close(total.double(), exact, rtol=0.501 * torch.finfo(dtype).eps, atol=1e-6)
    wide = total.double()
    exact = given["weight"].double() * wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(normed.double(), exact, rtol=0.501 * torch.finfo(dtype).eps, atol=1e-6)


def test_parts_are_added_in_their_order():
    given = draw(2, 16, 3, torch.float32)
    given["x"].zero_()
    given["delta"][0], given["delta"][1], given["delta"][2] = 2.0**30, -(2.0**30), 1.0
    total, _ = add_rms_norm(**given, eps=1e-5, multiplier=1.0, impl="triton")
    assert (total == 1).all()


def test_a_row_gets_the_same_bits_alone_and_in_a_batch():
    given = draw(6, 40, 2, torch.bfloat16)
    everything = triton(**given)
    for row in range(6):
        alone = triton(x=given["x"][row : row + 1], delta=given["delta"][:, row : row + 1], weight=given["weight"])
        assert all(torch.equal(one[0], several[row]) for one, several in zip(alone, everything, strict=True))


def test_rows_above_the_limit_are_refused():
    assert triton(**draw(1, MAX_WIDTH, dtype=torch.float32))[1].isfinite().all()
    with pytest.raises(KernelError, match=rf"add_rms_norm: x has {MAX_WIDTH + 1} columns; expected at most {MAX_WIDTH}\."):
        triton(**draw(1, MAX_WIDTH + 1, dtype=torch.float32))


def test_a_row_is_one_program_and_a_split_delta_needs_no_other_launch():
    with recorded_launches(90) as launches:
        for parts in (None, 4):
            triton(**{name: one.to("meta") for name, one in draw(5, 2048, parts, torch.bfloat16).items()})
    assert [one.grid for one in launches] == [(5,), (5,)]
    assert [one.tile.blocks["PARTS"] for one in launches] == [1, 4]
