"""The kernel of the start of a decode step: accurate angles, and each row changed once."""

import inspect
import math

import pytest
import torch
from granite_kernels import begin_step
from granite_kernels.begin_step_triton import _begin_step_kernel
from granite_kernels.launch import recorded_launches
from granite_kernels.testing import poisoned_allocations

from tests.kernels.test_begin_step import NAMES, draw


def angles(positions: torch.Tensor, frequencies: torch.Tensor, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine from the kernel, of rows at these positions."""
    rows = len(positions)
    given = draw(rows, hidden=1, dtype=dtype) | {"frequencies": frequencies, "active": torch.ones(rows, dtype=torch.int32)}
    with poisoned_allocations():
        _, cos, sin, _ = begin_step(**given | {"positions": positions - 1}, multiplier=1.0, impl="triton")
    return cos, sin


def assert_close_to_the_float32_angle(positions: torch.Tensor, frequencies: torch.Tensor) -> None:
    cos, sin = angles(positions, frequencies)
    angle = (positions.float()[:, None] * frequencies).double()
    assert float((cos - angle.cos()).abs().max()) <= 2e-7
    assert float((sin - angle.sin()).abs().max()) <= 2e-7


def test_angles_are_accurate_up_to_131072():
    positions = torch.cat((torch.arange(60), torch.arange(131000, 131073, 6), torch.randint(0, 131073, (50,))))
    assert_close_to_the_float32_angle(positions, torch.tensor([-1.0, 1.0, 0.7311, -0.0331, 1e-4, 0.0]))


def test_angles_next_to_multiples_of_a_quarter_turn():
    positions = torch.arange(200)
    assert_close_to_the_float32_angle(positions, torch.tensor([math.pi / 2, -math.pi / 2, math.pi / 4, 0.7853, -0.7855, math.pi]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_results_are_the_references_except_for_rounding(dtype: torch.dtype):
    given = draw(9, hidden=40, head_dim=20, dtype=dtype)
    copies = {name: one.clone() for name, one in given.items()}
    expected = begin_step(**given, multiplier=12.0, impl="torch")
    with poisoned_allocations():
        x, cos, sin, lens = begin_step(**copies, multiplier=12.0, impl="triton")
    assert torch.equal(x, expected[0])
    assert torch.equal(lens, expected[3])
    assert all(torch.equal(copies[name], given[name]) for name in NAMES)
    # A cosine may be rounded to the neighbour, rarely: the two float32 values differ by 1e-7.
    for ours, theirs in ((cos, expected[1]), (sin, expected[2])):
        torch.testing.assert_close(ours, theirs, rtol=torch.finfo(dtype).eps, atol=2e-7)
        assert dtype == torch.float32 or (ours != theirs).sum() <= 1


def test_one_launch_that_waits_before_it_loads():
    given = {name: one.to("meta") for name, one in draw(3, hidden=2048, dtype=torch.bfloat16).items()}
    with recorded_launches(90) as launches:
        begin_step(**given, multiplier=12.0, impl="triton")
    (one,) = launches
    assert one.grid == (3, 3)
    source = inspect.getsource(_begin_step_kernel.fn)
    assert source.index("await_inputs(PDL)") < source.index("tl.load")
