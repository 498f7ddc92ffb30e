"""Attention within windows compared with loops and with PyTorch's call, on both backends."""

import pytest
import torch
import torch.nn.functional as F
from granite_kernels import KernelError, window_attention
from granite_kernels.window_attention import window_attention_cost

BACKENDS = pytest.mark.parametrize("impl", ["torch", "triton"])


def draw(windows: int = 2, queries: int = 2, keys: int = 3, heads: int = 2, dim: int = 5, dtype=torch.float32) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(windows, rows, heads, dim, generator=rng).to(dtype) for rows in (queries, keys, keys)]


def formula(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    weights = torch.exp(scale * torch.einsum("wihd,wjhd->whij", q, k))
    return torch.einsum("whij,wjhd->wihd", weights / weights.sum(-1, keepdim=True), v)


@BACKENDS
@pytest.mark.parametrize(("scale", "queries", "keys"), [(None, 3, 15), (0.7, 1, 18)])
def test_the_result_and_its_gradients_match_the_formula(impl: str, scale: float | None, queries: int, keys: int):
    given = [one.requires_grad_() for one in draw(2, queries, keys)]
    wide = [one.detach().double().requires_grad_() for one in given]
    out = window_attention(*given, scale=scale, impl=impl)
    expected = formula(*wide, scale or 5**-0.5)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    incoming = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    ours, theirs = torch.autograd.grad(out, given, incoming), torch.autograd.grad(expected, wide, incoming.double())
    for one, truth in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.double(), truth, rtol=1e-5, atol=1e-5)


def test_a_value_is_the_sum_of_its_weights_by_hand():
    q, k, v = (one.tolist() for one in draw(dtype=torch.float64))
    out = window_attention(*draw(dtype=torch.float64), scale=1.0)
    for window in range(2):
        for query in range(2):
            for head in range(2):
                dots = [sum(a * b for a, b in zip(q[window][query][head], key[head], strict=True)) for key in k[window]]
                weights = torch.tensor(dots, dtype=torch.float64).softmax(0).tolist()
                for column in range(5):
                    expected = sum(weight * value[head][column] for weight, value in zip(weights, v[window], strict=True))
                    assert float(out[window, query, head, column]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 3])
def test_the_bits_are_those_of_eager_code(dtype: torch.dtype, rows: int):
    q, k, v = draw(3, 3, 15, 4, 16, dtype)
    q = q[:rows]
    heads_first = [one.transpose(1, 2) for one in (q.expand(3, -1, -1, -1), k, v)]
    expected = F.scaled_dot_product_attention(*heads_first).transpose(1, 2).flatten(2)
    assert torch.equal(window_attention(q, k, v).flatten(2), expected)


@BACKENDS
def test_shared_queries_are_those_of_every_window(impl: str):
    q, k, v = draw(3)
    shared = q[:1].clone().requires_grad_()
    repeated = shared.detach().repeat(3, 1, 1, 1).requires_grad_()
    out, expected = (window_attention(one, k, v, impl=impl) for one in (shared, repeated))
    assert torch.equal(out, expected)
    assert torch.equal(window_attention(shared.expand(3, -1, -1, -1), k, v, impl=impl), expected)
    (gradient,), (each,) = torch.autograd.grad(out.sum(), shared), torch.autograd.grad(expected.sum(), repeated)
    torch.testing.assert_close(gradient, each.sum(0, keepdim=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(3, 2, 2, 5)}, r"k has shape \(2, 3, 2, 5\); expected .* with windows = 3 as in q"),
        ({"q": torch.zeros(1, 2, 2, 4)}, r"k has shape \(2, 3, 2, 5\); expected .* with dim = 4 as in q"),
        ({"q": torch.zeros(2, 0, 2, 5)}, r"q has shape \(2, 0, 2, 5\); expected queries of at least 1"),
        ({"v": torch.zeros(2, 4, 2, 5)}, r"v has shape \(2, 4, 2, 5\); expected .* with keys = 3 as in k"),
        ({"k": torch.zeros(2, 0, 2, 5), "v": torch.zeros(2, 0, 2, 5)}, r"k has shape \(2, 0, 2, 5\); expected keys of at least 1"),
        ({"q": torch.zeros(2, 2, 10)}, r"q has shape \(2, 2, 10\); expected 4 dimensions"),
    ],
)
def test_wrong_arguments_are_refused(change: dict, message: str):
    with pytest.raises(KernelError, match=f"^window_attention: {message}"):
        window_attention(**dict(zip("qkv", draw(), strict=True)) | change)


def test_the_cost_matches_a_count_by_hand():
    q, k, v = draw(7, 3, 15, 2, 8, torch.bfloat16)
    pairs = 7 * 3 * 15
    cost = window_attention_cost(q, k, v)
    assert cost.flops == 2 * 2 * pairs * 2 * 8
    assert cost.bytes == 2 * 7 * (3 + 15 + 15 + 3) * 16
    shared = window_attention_cost(q[:1].expand(7, -1, -1, -1), k, v)
    assert shared == window_attention_cost(q[:1], k, v)
    assert shared.bytes == cost.bytes - 2 * 6 * 3 * 16
