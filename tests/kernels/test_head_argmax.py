"""The head's argmax compared with `torch.argmax` over all logits: ties, extremes, tile edges and rows in blocks."""

import pytest
import torch
import torch.nn.functional as F
from granite_kernels import KernelError, head_argmax
from granite_kernels.head_argmax import OPERATION, TILE, head_argmax_cost, head_argmax_library
from granite_kernels.launch import recorded_launches
from granite_kernels.matvec import MAX_HEAD_INPUTS
from granite_kernels.op import Case
from granite_kernels.testing import poisoned_allocations

OPTIONS = {"eps": 1e-5, "divisor": 8.0}
both = pytest.mark.parametrize("impl", ["torch", "triton"])


def draw(rows: int, inputs: int, vocab: int, dtype=torch.bfloat16, **options) -> dict:
    return Case("", OPERATION.cases[0].make, {"rows": rows, "inputs": inputs, "vocab": vocab, **options}).inputs(dtype)


def tiled(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest logit of each tile and the first column that has it, by Python's comparisons."""
    scores, ids = [], []
    for row in logits.tolist():
        starts = range(0, len(row), TILE)
        ids.append([max(range(start, min(start + TILE, len(row))), key=lambda column: (row[column], -column)) for start in starts])
        scores.append([row[column] for column in ids[-1]])
    return torch.tensor(scores).to(logits.dtype), torch.tensor(ids, dtype=torch.int32)


def check(given: dict, logits: torch.Tensor, impl: str) -> None:
    with poisoned_allocations():
        scores, ids, log_sums = head_argmax(**given, impl=impl)
    assert ids.dtype == torch.int32 and scores.dtype == given["x"].dtype and log_sums.dtype == torch.float32
    expected_scores, expected_ids = tiled(logits)
    assert torch.equal(scores, expected_scores) and torch.equal(ids, expected_ids)
    tiles = F.pad(logits.double(), (0, -logits.shape[1] % TILE), value=-torch.inf).unflatten(1, (-1, TILE))
    torch.testing.assert_close(log_sums, tiles.logsumexp(-1).float(), rtol=1e-6, atol=1e-6)
    best = scores.argmax(dim=1, keepdim=True)
    assert torch.equal(ids.gather(1, best)[:, 0].long(), logits.argmax(dim=1))


def one_hot_logits(wanted: torch.Tensor) -> dict:
    """Arguments whose products are exactly `wanted`, (rows, vocab): row r of x selects column r of the weight."""
    rows = wanted.shape[0]
    x = torch.eye(rows, dtype=wanted.dtype)
    return {"x": x, "weight": wanted.t().contiguous(), "norm_weight": None, "eps": 0.0, "divisor": 1.0}


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_lowest_of_equal_logits_wins(dtype: torch.dtype, impl: str):
    rng = torch.Generator().manual_seed(0)
    wanted = torch.randint(-2, 3, (3, 45), generator=rng).to(dtype)
    wanted[1] = 0.25
    check(one_hot_logits(wanted), wanted, impl)


@both
def test_logits_are_rounded_before_and_after_the_division(impl: str):
    """Two logits that either rounding makes equal: the first of them wins, although the second is larger."""
    x = torch.tensor([[1.0, 15 / 4096]]).bfloat16()
    # 1.9375 + 15 / 4096 rounds to 1.9375, but divided by 1.875 it would round to another number than that.
    before = torch.tensor([[1.9375, 0.0], [1.9375, 1.0], [1.0, 0.0]]).bfloat16()
    after = torch.tensor([[1.9296875, 0.0], [1.9375, 0.0], [1.0, 0.0]]).bfloat16()
    for weight in (before, after):
        scores, ids, _ = head_argmax(x, weight, None, eps=0.0, divisor=1.875, impl=impl)
        assert (scores.item(), ids.item()) == (1.03125, 0)


@both
def test_extreme_logits(impl: str):
    most = torch.finfo(torch.float32).max
    wanted = torch.full((2, 19), -most)
    wanted[0, 3], wanted[0, 17], wanted[1, 18] = -1.0, most, -2.0
    check(one_hot_logits(wanted), wanted, impl)
    # Products of zeros with infinity are NaN, so x has one column here.
    wanted = torch.full((1, 19), -torch.inf)
    wanted[0, 5], wanted[0, 6] = torch.inf, torch.inf
    check(one_hot_logits(wanted), wanted, impl)


@both
@pytest.mark.parametrize("vocab", [1, TILE - 1, TILE, TILE + 1, 5 * TILE])
def test_tile_edges(vocab: int, impl: str):
    given = draw(2, 16, vocab)
    h = given["norm_weight"].double() * F.rms_norm(given["x"].double(), (16,), eps=1e-5)
    logits = F.linear(h, given["weight"].double()) / given["divisor"]
    scores, ids, log_sums = head_argmax(**given, impl=impl)
    expected_scores, expected_ids = tiled(logits)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(scores.double(), expected_scores, rtol=0.02, atol=0.01)
    torch.testing.assert_close(log_sums.double().logsumexp(1), logits.logsumexp(1), rtol=0.02, atol=0.02)


def test_a_row_gets_the_same_bits_whatever_the_other_rows_are():
    given = draw(11, 40, 11)
    expected = head_argmax(**given, impl="triton")
    for own in (slice(0, 1), slice(10, 11), slice(1, 10)):
        some = head_argmax(**{**given, "x": given["x"][own]}, impl="triton")
        assert all(torch.equal(one, every[own]) for one, every in zip(some, expected, strict=True))


def test_one_launch_with_a_program_for_each_tile_and_block_of_rows():
    for rows, grid in ((1, 4), (8, 4), (9, 8), (20, 12)):
        given = draw(rows, 32, 27)
        with recorded_launches(90) as launches:
            head_argmax(**{name: one.to("meta") if isinstance(one, torch.Tensor) else one for name, one in given.items()}, impl="triton")
        (one,) = launches
        assert one.grid == (grid,) and one.tile.blocks["BLOCK_N"] == TILE and one.tile.blocks["PDL"] == 1


@pytest.mark.parametrize("inputs", [0, MAX_HEAD_INPUTS + 1])
def test_rows_too_wide_for_a_program_are_refused(inputs: int):
    given = (torch.zeros(1, inputs), torch.zeros(3, inputs), None)
    with pytest.raises(KernelError, match=f"head_argmax: x has {inputs} columns; expected 1 to {MAX_HEAD_INPUTS}. Use impl='torch'"):
        head_argmax(*given, **OPTIONS, impl="triton")
    head_argmax(*given, **OPTIONS, impl="torch")


@pytest.mark.parametrize("name", ["x", "weight", "norm_weight"])
def test_a_call_that_needs_a_gradient_is_refused(name: str):
    given = draw(2, 16, 9, torch.float32)
    given[name].requires_grad_()
    with pytest.raises(KernelError, match=f"head_argmax: {name}, a tensor that requires a gradient; expected inference"):
        head_argmax(**given)


def test_cost_and_library_call_match_a_count_by_hand():
    given = draw(3, 16, 21)
    cost = head_argmax_cost(**given)
    assert (cost.flops, cost.bytes) == (2 * 3 * 16 * 21, 2 * (3 * 16 + 21 * 16 + 16) + 3 * 3 * (2 + 4 + 4))
    assert torch.equal(head_argmax_library(**given)(), F.linear(given["x"], given["weight"]))
