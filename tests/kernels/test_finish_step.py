"""The end of a decode step compared with a loop over single rows."""

import pytest
import torch
from granite_kernels import KernelError, finish_step
from granite_kernels.finish_step import OPERATION, finish_step_cost

INF = float("inf")


def state(rows: int, *, ends: list[list[int]] | None = None, **changes: list[int]) -> dict[str, torch.Tensor]:
    """The state of rows that are all active and far from their limits, except for `changes`."""
    values = {"active": [1] * rows, "kv_lens": [5] * rows, "limits": [9] * rows} | changes
    return {
        "tokens": torch.full((rows,), -7),
        "history": torch.full((rows,), -9),
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
    chosen = finish_step(scores, ids, **given)
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


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_of_equal_scores_the_first_is_chosen(dtype: torch.dtype, impl: str):
    scores = torch.tensor([row for row, _ in TIES], dtype=dtype)
    columns = [column for _, column in TIES]
    assert finish_step(scores, None, **state(len(TIES)), impl=impl).tolist() == columns
    ids = torch.tensor([[40, 30, 20, 10]] * len(TIES), dtype=torch.int32)
    assert finish_step(scores, ids, **state(len(TIES)), impl=impl).tolist() == [40 - 10 * column for column in columns]


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_score_that_is_not_a_number_gives_one_of_the_candidates(impl: str):
    scores = torch.full((3, 5), torch.nan)
    scores[1, 2], scores[2, 4] = 1.0, -INF
    ids = torch.arange(10, 15, dtype=torch.int32).expand(3, -1)
    chosen = finish_step(scores, ids, **state(3), impl=impl)
    assert all(10 <= one < 15 for one in chosen.tolist())


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("ends", [[], [-1], [-1, 5, -1]], ids=str)
def test_only_the_given_ends_end_a_row(ends: list[int], impl: str):
    given = state(3, ends=[ends] * 3)
    finish_step(torch.eye(3), None, **given, impl=impl)
    assert given["active"].tolist() == [1, 1, 1]


def test_scores_without_candidates_are_refused():
    with pytest.raises(KernelError, match=r"finish_step: scores has no candidates; expected at least one\."):
        finish_step(torch.empty(2, 0), None, **state(2))


def test_the_cost_counts_the_scores_and_one_id_per_row():
    inputs = next(case for case in OPERATION.cases if case.name == "with ids").inputs(torch.bfloat16)
    assert finish_step_cost(**inputs).bytes == 9 * (50 * 2 + 4 + 3 * 8 + 4 * 4 + 2 * 8)
