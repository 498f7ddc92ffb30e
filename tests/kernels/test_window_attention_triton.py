"""The kernels of attention within windows: limits, extreme scores, neighbours, distant rows, and what is launched."""

import pytest
import torch
from granite_kernels import KernelError, window_attention
from granite_kernels.launch import recorded_launches
from granite_kernels.testing import poisoned_allocations

from tests.kernels.test_window_attention import draw


def triton(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: float) -> torch.Tensor:
    with poisoned_allocations():
        return window_attention(q, k, v, **options, impl="triton")


def gradients(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, incoming: torch.Tensor) -> tuple[torch.Tensor, ...]:
    leaves = [one.detach().requires_grad_() for one in (q, k, v)]
    with poisoned_allocations():
        return torch.autograd.grad(triton(*leaves), leaves, incoming)


@pytest.mark.parametrize(("queries", "keys", "dim", "limited"), [(16, 1, 2, "queries"), (1, 64, 2, "keys"), (1, 1, 128, "dim")])
def test_shapes_above_a_limit_are_refused(queries: int, keys: int, dim: int, limited: str):
    sizes = {"windows": 1, "queries": queries, "keys": keys, "heads": 1, "dim": dim}
    at_limit, beyond = draw(**sizes), draw(**sizes | {limited: sizes[limited] + 1})
    torch.testing.assert_close(triton(*at_limit), window_attention(*at_limit), rtol=1e-5, atol=1e-5)
    message = rf"^window_attention: {limited} = {sizes[limited] + 1}; expected at most {sizes[limited]}\. Use impl='torch'"
    with pytest.raises(KernelError, match=message):
        triton(*beyond)
    assert window_attention(*beyond).isfinite().all()


@pytest.mark.parametrize("keys", [3, 18])
def test_large_scores_choose_one_value(keys: int):
    q, k, v = draw(1, 2, keys, 1, 4)
    k = torch.zeros_like(k)
    k[0, keys - 1, 0, :2] = 1e4
    q = torch.tensor([[1e3, 0, 0, 0], [0, -1e3, 0, 0]])[None, :, None]
    out = triton(q, k, v)
    torch.testing.assert_close(out[0, 0, 0], v[0, keys - 1, 0])  # the key with the large score
    torch.testing.assert_close(out[0, 1, 0], v[0, : keys - 1, 0].mean(0))  # all but the key with the large negative one
    grad_q, grad_k, grad_v = gradients(q, k, v, torch.ones_like(out))
    assert all(one.isfinite().all() for one in (grad_q, grad_k))
    torch.testing.assert_close(grad_v[0, :, 0, 0].sum(), torch.tensor(2.0))


def test_a_window_gets_the_same_bits_between_neighbours_of_nan():
    q, k, v = draw(1, 2, 3, 2, 4, torch.bfloat16)
    incoming = torch.randn(1, 2, 2, 4, generator=torch.Generator().manual_seed(1)).bfloat16()
    alone = [triton(q, k, v), *gradients(q, k, v, incoming)]
    around = [torch.cat((one * torch.nan, one, one * torch.nan)) for one in (q, k, v, incoming)]
    together = [triton(*around[:3]), *gradients(*around)]
    assert all(torch.equal(several[1], one[0]) for several, one in zip(together, alone, strict=True))


def test_an_incoming_gradient_may_have_stride_0():
    given = draw()
    dense = gradients(*given, torch.ones(2, 2, 2, 5))
    assert all(map(torch.equal, gradients(*given, torch.ones(()).expand(2, 2, 2, 5)), dense))


def test_windows_may_be_more_than_2_to_the_31_elements_apart():
    q, k, v = draw(2, 1, 2, 1, 4, torch.bfloat16)
    # Of these 4 GiB, only the memory pages of two windows are used.
    far = torch.empty(2**31 + 128, dtype=torch.bfloat16).as_strided((2, 2, 1, 4), (2**31 + 16, 8, 4, 1))
    far.copy_(k)
    incoming = torch.ones(2, 1, 1, 4, dtype=torch.bfloat16)
    assert torch.equal(window_attention(q, far, v, impl="triton"), triton(q, k, v))
    assert all(map(torch.equal, gradients(q, far, v, incoming), gradients(q, k, v, incoming)))


def test_inference_and_a_backward_are_one_launch_each_and_shared_queries_are_not_copied():
    q, k, v = (torch.empty(rows, count, 16, 64, dtype=torch.bfloat16, device="meta") for rows, count in ((1, 3), (34, 15), (34, 15)))
    with recorded_launches(90) as launches:
        out = triton(q, k, v)
    assert [one.grid for one in launches] == [(34 * 4,)]  # four heads for each program
    assert launches[0].arguments["q_ptr"].untyped_storage().nbytes() == q.nbytes
    with recorded_launches(90) as launches:
        gradients(q, k, v, out)
    assert len(launches) == 2
