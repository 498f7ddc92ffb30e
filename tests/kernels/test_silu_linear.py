"""A linear layer with SiLU or a SwiGLU gate after it compared with the formula, on both backends."""

import math
import operator

import pytest
import torch
from granite_kernels import KernelError, silu_linear
from granite_kernels.silu_linear import silu_linear_cost

BACKENDS = pytest.mark.parametrize("impl", ["torch", "triton"])


def normal(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, row: int, column: int) -> float:
    """One element of x·Wᵀ + bias, in Python's floats."""
    return sum(map(operator.mul, x[row].tolist(), weight[column].tolist())) + (0.0 if bias is None else float(bias[column]))


def silu(y: float) -> float:
    return y / (1 + math.exp(-y))


@BACKENDS
@pytest.mark.parametrize("bias", [None, normal(6, seed=2)], ids=["no bias", "bias"])
def test_the_result_matches_the_formula(impl: str, bias: torch.Tensor | None):
    x, weight = normal(4, 9), normal(6, 9, seed=1)
    out = silu_linear(x, weight, bias, impl=impl)
    gated = silu_linear(x, weight, bias, gated=True, impl=impl)
    assert out.shape == (4, 6) and gated.shape == (4, 3)
    for row in range(4):
        y = [product(x, weight, bias, row, column) for column in range(6)]
        assert all(math.isclose(out[row, column], silu(y[column]), rel_tol=2e-6, abs_tol=1e-6) for column in range(6))
        assert all(math.isclose(gated[row, column], silu(y[column]) * y[3 + column], rel_tol=2e-6, abs_tol=1e-6) for column in range(3))


@BACKENDS
def test_inputs_stay_as_they_are_and_the_result_is_new(impl: str):
    x, weight, bias = normal(3, 8), normal(6, 8), normal(6)
    before = x.clone(), weight.clone(), bias.clone()
    out = silu_linear(x, weight, bias, impl=impl)
    assert all(map(torch.equal, (x, weight, bias), before))
    assert out.is_contiguous() and not silu_linear(x, weight, gated=True, impl=impl)._is_view()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.zeros(6, 5)}, r"weight has shape \(6, 5\); expected \(out, in\) with in = 4 as in x\."),
        ({"bias": torch.zeros(5)}, r"bias has shape \(5,\); expected \(out\) with out = 6 as in weight\."),
        ({"bias": torch.zeros(3), "gated": True}, r"bias has shape \(3,\); expected \(2·out\) with 2·out = 6 as in weight\."),
        ({"weight": torch.zeros(7, 4), "gated": True}, r"gated with 7 rows of weight; expected an even number: gate, then up\."),
        ({"bias": torch.zeros(6, requires_grad=True)}, r"bias, a tensor that requires a gradient; expected inference\."),
    ],
)
def test_wrong_arguments_are_refused(changes: dict, message: str):
    with pytest.raises(KernelError, match=f"silu_linear: {message}"):
        silu_linear(**({"x": torch.zeros(2, 4), "weight": torch.zeros(6, 4)} | changes))


def test_the_cost_is_the_product_with_everything_moved_once():
    x, weight, bias = (torch.zeros(size, dtype=torch.bfloat16) for size in ((3, 10), (8, 10), (8,)))
    plain, gated = silu_linear_cost(x, weight, bias), silu_linear_cost(x, weight, gated=True)
    assert plain.flops == gated.flops == 2 * 3 * 10 * 8
    assert plain.bytes == 2 * (30 + 80 + 8 + 24)
    assert gated.bytes == 2 * (30 + 80 + 12)
