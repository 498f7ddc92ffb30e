"""The end of a decode step compared with a loop over single rows."""

import math

import pytest
import torch
from granite_kernels import KernelError, finish_step, head_argmax
from granite_kernels.finish_step import OPERATION, finish_step_cost
from hypothesis import given, settings
from hypothesis import strategies as st

INF = float("inf")
both = pytest.mark.parametrize("impl", ["torch", "triton"])


def state(rows: int, *, ends: list[list[int]] | None = None, **changes: list[int]) -> dict[str, torch.Tensor]:
    """The state of rows that are all active and far from their limits, except for `changes`."""
    values = {"active": [1] * rows, "kv_lens": [5] * rows, "limits": [9] * rows} | changes
    return {
        "tokens": torch.full((rows,), -7),
        "history": torch.full((rows,), -9),
        "logprobs": torch.full((rows,), 9.0),
        **{name: torch.tensor(one, dtype=torch.int32) for name, one in values.items()},
        "ends": torch.tensor([[-1, -1]] * rows if ends is None else ends, dtype=torch.int64),
    }


def first_best(scores: torch.Tensor) -> list[int]:
    return [row.index(max(row)) for row in scores.tolist()]


def test_each_row_matches_the_rules():
    rng = torch.Generator().manual_seed(0)
    scores, ids = torch.randn(8, 20, generator=rng), torch.randint(0, 1000, (8, 20), generator=rng, dtype=torch.int32)
    best = [int(ids[row, column]) for row, column in enumerate(first_best(scores))]
    ends = [[-1, -1], [best[1], -1], [-1, best[2]], [best[4], -1], [-1, -1], [-1, -1], [best[6], best[6]], [-1, -1]]
    given = state(8, ends=ends, active=[1, 1, 0, 1, 1, 1, 1, 0], limits=[9, 9, 9, 9, 5, 4, 9, 6])
    chosen = finish_step(scores, ids, None, **given)
    assert chosen.tolist() == given["tokens"].tolist() == best
    assert given["history"].tolist() == [token if row not in (2, 7) else -1 for row, token in enumerate(best)]
    assert given["active"].tolist() == [1, 0, 0, 1, 0, 0, 0, 0]


TIES = [
    ([0.0, 3.0, 3.0, 1.0], 1),
    ([3.0, 3.0, 3.0, 3.0], 0),
    ([-INF, -INF, -2.0, -2.0], 2),
    ([-INF, -INF, -INF, -INF], 0),
    ([1.0, INF, 2.0, INF], 1),
    ([-0.0, 0.0, -1.0, 0.0], 0),
]


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_of_equal_scores_the_first_is_chosen(dtype: torch.dtype, impl: str):
    scores = torch.tensor([row for row, _ in TIES], dtype=dtype)
    columns = [column for _, column in TIES]
    assert finish_step(scores, None, None, **state(len(TIES)), impl=impl).tolist() == columns
    ids = torch.tensor([[40, 30, 20, 10]] * len(TIES), dtype=torch.int32)
    assert finish_step(scores, ids, None, **state(len(TIES)), impl=impl).tolist() == [40 - 10 * column for column in columns]


@both
def test_a_score_that_is_not_a_number_gives_one_of_the_candidates(impl: str):
    scores = torch.full((3, 5), torch.nan)
    scores[1, 2], scores[2, 4] = 1.0, -INF
    ids = torch.arange(10, 15, dtype=torch.int32).expand(3, -1)
    chosen = finish_step(scores, ids, None, **state(3), impl=impl)
    assert all(10 <= one < 15 for one in chosen.tolist())


@both
@pytest.mark.parametrize("ends", [[], [-1], [-1, 5, -1]], ids=str)
def test_only_the_given_ends_end_a_row(ends: list[int], impl: str):
    given = state(3, ends=[ends] * 3)
    finish_step(torch.eye(3), None, None, **given, impl=impl)
    assert given["active"].tolist() == [1, 1, 1]


def test_scores_without_candidates_are_refused():
    with pytest.raises(KernelError, match=r"finish_step: scores has no candidates; expected at least one\."):
        finish_step(torch.empty(2, 0), None, None, **state(2))


def own_logprob(logits: list[float], token: int, divisor: float = 1.0) -> float:
    """Of one token, by Python's own functions."""
    return logits[token] / divisor - math.log(math.fsum(math.exp(one / divisor) for one in logits))


@both
@settings(max_examples=15, deadline=None)
@given(data=st.data(), divisor=st.sampled_from([1.0, 3.0, 8.0]))
def test_the_log_probability_is_that_of_the_logits_whatever_the_scores_are(impl: str, data: st.DataObject, divisor: float):
    rows, width = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 40))
    number = st.floats(-60, 60, width=32)
    logits, others = (data.draw(st.lists(st.lists(number, min_size=width, max_size=width), min_size=rows, max_size=rows)) for _ in "ab")
    for scores, extra in ((logits, None), (others, torch.tensor(logits))):
        now = state(rows)
        chosen = finish_step(torch.tensor(scores), None, extra, **now, divisor=divisor, impl=impl).tolist()
        expected = [own_logprob(row, token, divisor) for row, token in zip(logits, chosen, strict=True)]
        assert now["logprobs"].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)


@both
def test_the_best_of_each_tile_with_its_log_sum_gives_the_log_probability_of_all_logits(impl: str):
    rng = torch.Generator().manual_seed(1)
    x, weight = torch.randn(3, 24, generator=rng), torch.randn(50, 24, generator=rng)
    scores, ids, log_sums = head_argmax(x, weight, None, eps=0.0, divisor=2.0, impl=impl)
    now, logits = state(3), (x @ weight.T / 2.0).tolist()
    chosen = finish_step(scores, ids, log_sums, **now, impl=impl).tolist()
    assert chosen == [row.index(max(row)) for row in logits] or impl == "triton"
    assert now["logprobs"].tolist() == pytest.approx([own_logprob(row, one) for row, one in zip(logits, chosen, strict=True)], abs=1e-5)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_token_whose_logits_are_far_apart_or_partly_infinite_has_a_finite_log_probability(dtype: torch.dtype, impl: str):
    logits = torch.tensor([[-INF, 5.0, -INF, 4.0], [6e4, -6e4, 0.0, -INF], [-6e4, -6e4, -INF, -6e4], [-INF, -INF, -INF, 0.0]], dtype=dtype)
    expected = [own_logprob([5.0, 4.0], 0), 0.0, -math.log(3), 0.0]
    for scores, extra in ((logits, None), (torch.where(logits == -INF, -INF, logits).float(), logits)):
        now = state(4)
        finish_step(scores, None, extra, **now, impl=impl)
        assert now["logprobs"].tolist() == pytest.approx(expected, abs=1e-5)


def test_the_cost_counts_the_scores_the_logits_and_one_id_per_row():
    state_of_row = 3 * 8 + 4 + 4 * 4 + 2 * 8
    expected = {
        "with ids": 9 * (50 * (2 + 4) + 4 + state_of_row),
        "drawn": 7 * (41 * (4 + 2) + state_of_row),
        "without ids": 6 * (37 * 2 + state_of_row),
    }
    for case in OPERATION.cases:
        if case.name in expected:
            assert finish_step_cost(**case.inputs(torch.bfloat16)).bytes == expected.pop(case.name)
    assert not expected
