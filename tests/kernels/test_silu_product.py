"""The gate of a SwiGLU layer compared with the formula, on both backends."""

import math

import pytest
import torch
import torch.nn.functional as F
from granite_kernels import KernelError, silu_product
from granite_kernels.silu_product import silu_product_cost

BACKENDS = pytest.mark.parametrize("impl", ["torch", "triton"])


@BACKENDS
def test_the_result_matches_the_formula(impl: str):
    x = torch.randn(5, 14, generator=torch.Generator().manual_seed(0))
    out = silu_product(x, impl=impl)
    for row in range(5):
        for column in range(7):
            gate, up = float(x[row, column]), float(x[row, 7 + column])
            assert math.isclose(out[row, column], gate / (1 + math.exp(-gate)) * up, rel_tol=1e-6)


@BACKENDS
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # from NumPy, with which the interpreter computes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_large_gates_are_finite(dtype: torch.dtype, impl: str):
    gates = torch.tensor([-6e4, -200.0, -100.0, -88.0, 0.0, 88.0, 100.0, 200.0])
    x = torch.cat((gates, torch.full((8,), 0.5))).to(dtype)[None]
    out = silu_product(x, impl=impl)[0]
    torch.testing.assert_close(out.double(), F.silu(x[0, :8].double()) * 0.5, rtol=torch.finfo(dtype).eps, atol=1e-30)


def test_the_bits_are_those_of_eager_code():
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(silu_product(x), F.silu(x[:, :16]) * x[:, 16:])


def test_the_kernel_rounds_once():
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = F.silu(x[:, :16].double()) * x[:, 16:].double()
    torch.testing.assert_close(silu_product(x, impl="triton").double(), exact, rtol=0.501 * 2**-7, atol=0)


def test_an_odd_number_of_columns_is_refused():
    with pytest.raises(KernelError, match=r"silu_product: x has 5 columns; expected an even number\."):
        silu_product(torch.zeros(2, 5))


def test_the_cost_reads_both_halves_and_writes_one():
    assert silu_product_cost(torch.zeros(3, 10, dtype=torch.bfloat16)).bytes == 3 * 15 * 2
