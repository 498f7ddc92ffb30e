"""The kernels of the residual sum and its norms: rounding, large means, gradients, and what is launched."""

import importlib
from functools import partial

import pytest
import torch
from granite_kernels import KernelError, add_layer_norm
from granite_kernels.add_layer_norm_triton import _BACKWARD_TILES, _FEW_TILES, _TILES, MAX_WIDTH
from granite_kernels.launch import Tile, recorded_launches
from granite_kernels.testing import poisoned_allocations

from tests.kernels.test_add_layer_norm import OPTIONS, draw, formula


def triton(**given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with poisoned_allocations():
        return add_layer_norm(**{**OPTIONS, **given}, impl="triton")


def gradients(function, given: dict[str, torch.Tensor], incoming: list[torch.Tensor], used: tuple[int, ...] = (0, 1)) -> list[torch.Tensor]:
    """Gradients of all tensors, from the results whose numbers are in `used`."""
    leaves = {name: one.detach().requires_grad_() for name, one in given.items()}
    results = function(**leaves)
    with poisoned_allocations():
        return list(
            torch.autograd.grad(
                [results[number] for number in used],
                list(leaves.values()),
                [incoming[number].to(results[number].dtype) for number in used],
            )
        )


def widened(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: one.double() for name, one in given.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_result_is_rounded_once(dtype: torch.dtype):
    given = draw(9, 52, True, dtype)
    weight, bias, next_weight, next_bias = (given[name] for name in ("weight", "bias", "next_weight", "next_bias"))
    total, normed = triton(x=given["x"], delta=given["delta"], weight=weight, bias=bias)
    first, second = triton(**given, next_eps=0.3)
    assert torch.equal(first, normed)
    exact = given["x"].double() + 0.5 * given["delta"].double()
    nothing = torch.zeros_like(exact)
    expected = {
        "total": (total, exact),
        "normed": (normed, formula(total.double(), nothing, weight.double(), bias.double())[1]),
        "second": (second, formula(first.double(), nothing, next_weight.double(), next_bias.double(), eps=0.3)[1]),
    }
    for ours, truth in expected.values():
        # Half a unit in the last place, and a little for float32.
        torch.testing.assert_close(ours.double(), truth, rtol=0.501 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("twice", [False, True])
def test_a_large_mean_leaves_the_variance(twice: bool):
    given = draw(4, 33, twice, torch.float32)
    given["x"] = given["x"].mul(64).round() / 64 + 1024  # multiples of 1/64, so that the sum is exact
    given["delta"] = given["delta"].mul(32).round() / 32
    incoming = list(torch.randn(2, 4, 33, generator=torch.Generator().manual_seed(1)))
    ours = [*triton(**given), *gradients(triton, given, incoming)]
    expected = [*formula(**widened(given)), *gradients(formula, widened(given), incoming)]
    for one, truth in zip(ours, expected, strict=True):
        # The mean is rounded by up to 6e-5. The mean of the squares less the square of the mean would be wrong by 0.1.
        torch.testing.assert_close(one.double(), truth, rtol=3e-4, atol=3e-4)


@pytest.mark.parametrize("used", [(0, 1), (0,), (1,)], ids=["both results", "the first", "the second"])
@pytest.mark.parametrize("twice", [False, True])
def test_gradients_match_autograd_of_the_formula(twice: bool, used: tuple[int, ...]):
    given = draw(5, 21, twice, torch.float32)
    incoming = list(torch.randn(2, 5, 21, generator=torch.Generator().manual_seed(1)))
    # Two programs, of three rows and of two.
    with _BACKWARD_TILES.using({(80, 4, 1024): Tile({"PROGRAMS": 2}, 1)}):
        ours = gradients(triton, given, incoming, used)
    expected = gradients(formula, widened(given), [one if number in used else one * 0 for number, one in enumerate(incoming)])
    for one, truth in zip(ours, expected, strict=True):
        torch.testing.assert_close(one.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("twice", [False, True])
def test_gradients_of_pairs_match_autograd_and_other_frames_have_none(twice: bool):
    given = draw(9, 21, twice, torch.float32)
    given["delta"] = given["delta"][:5]
    pairs = torch.tensor([6, 1, -1, 3, -1], dtype=torch.int32)
    incoming = list(torch.randn(2, 5, 21, generator=torch.Generator().manual_seed(1)))

    def expected(x: torch.Tensor, **others: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        means = torch.stack([(x[one] + x[one + 1]) / 2 if one >= 0 else torch.zeros_like(x[0]) for one in pairs.tolist()])
        return formula(means, **others)

    with _BACKWARD_TILES.using({(80, 4, 1024): Tile({"PROGRAMS": 2}, 1)}):
        ours = gradients(partial(triton, pairs=pairs), given, incoming)
    for one, truth in zip(ours, gradients(expected, widened(given), incoming), strict=True):
        torch.testing.assert_close(one.double(), truth, rtol=1e-5, atol=1e-5)
    assert not ours[0][[0, 5, 8]].any() and ours[0][[1, 2, 3, 4, 6, 7]].any(1).all()


def test_nan_in_a_frame_without_a_pair_reaches_no_result_or_gradient():
    given = draw(5, 21, True, torch.float32)
    given["x"][4], given["delta"] = torch.nan, given["delta"][:2]
    pairs = torch.tensor([0, 2], dtype=torch.int32)
    for twice in (False, True):
        some = given if twice else {name: one for name, one in given.items() if not name.startswith("next")}
        results = [*triton(**some, pairs=pairs), *gradients(partial(triton, pairs=pairs), some, [torch.ones(2, 21)] * 2)]
        assert all(one.isfinite().all() for one in results)


def test_incoming_gradients_may_have_stride_0():
    given = draw(3, 8, True, torch.float32)
    dense = gradients(triton, given, [torch.ones(3, 8)] * 2)
    assert all(map(torch.equal, gradients(triton, given, [torch.ones(()).expand(3, 8)] * 2), dense))


def test_a_row_gets_the_same_bits_alone_and_among_few_and_many(monkeypatch: pytest.MonkeyPatch):
    given = draw(5, 40, True, torch.bfloat16)
    few = triton(**given)
    monkeypatch.setattr(importlib.import_module("granite_kernels.add_layer_norm_triton"), "_FEW_ROWS", 0)
    assert all(map(torch.equal, triton(**given), few))
    alone = triton(**given | {"x": given["x"][3:4], "delta": given["delta"][3:4]})
    assert all(torch.equal(one[0], several[3]) for one, several in zip(alone, few, strict=True))


def test_few_rows_and_many_have_the_same_number_of_warps():
    """On a GPU the order of a row's sum depends on it."""
    for key, row in _TILES.rows.items():
        assert {one.num_warps for one in (_FEW_TILES[key], *_FEW_TILES.candidates(key))} == {row.tile.num_warps}


def test_rows_above_the_limit_are_refused():
    assert triton(**draw(1, MAX_WIDTH, False, torch.float32))[1].isfinite().all()
    with pytest.raises(KernelError, match=rf"add_layer_norm: x has {MAX_WIDTH + 1} columns; expected at most {MAX_WIDTH}\."):
        triton(**draw(1, MAX_WIDTH + 1, False, torch.float32))


@pytest.mark.parametrize(("rows", "grid"), [(500, 250), (64000, 64000)])
def test_inference_is_one_launch_and_each_norm_one_more_in_the_backward(rows: int, grid: int):
    for twice in (False, True):
        given = {name: one.to("meta") for name, one in draw(1, 1024, twice, torch.bfloat16).items()}
        given |= {name: torch.empty(rows, 1024, dtype=torch.bfloat16, device="meta") for name in ("x", "delta")}
        with recorded_launches(90) as launches:
            triton(**given)
        assert [one.grid for one in launches] == [(grid,)]
        with recorded_launches(90) as launches:
            gradients(triton, given, [given["x"]] * 2)
        assert len(launches) == (3 if twice else 2)
        pairs = torch.empty(rows, dtype=torch.int32, device="meta")
        with recorded_launches(90) as launches:
            triton(**given | {"x": torch.empty(2 * rows + 1, 1024, dtype=torch.bfloat16, device="meta")}, pairs=pairs)
        assert [one.grid for one in launches] == [(grid,)]
