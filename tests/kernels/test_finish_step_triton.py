"""The kernel of the end of a decode step: every column counts, wherever it is, and the first of equal ones is chosen."""

import inspect

import pytest
import torch
from granite_kernels import finish_step
from granite_kernels.finish_step_triton import TILES, _finish_step_kernel
from granite_kernels.launch import recorded_launches
from granite_kernels.testing import poisoned_allocations

from tests.kernels.test_finish_step import first_best, state

BLOCK = TILES[(80,)].blocks["BLOCK"]
# Whole blocks, blocks left over from the unrolled loop, and a tail.
COLUMNS = 5 * BLOCK + 37


def chosen(scores: torch.Tensor) -> list[int]:
    given = state(len(scores))
    with poisoned_allocations():
        out = finish_step(scores, None, None, **given, impl="triton")
    expected = scores.double().log_softmax(-1).gather(1, out[:, None])[:, 0].float()
    torch.testing.assert_close(given["logprobs"], expected, rtol=1e-5, atol=1e-5)
    assert out.tolist() == given["tokens"].tolist() == given["history"].tolist()
    return out.tolist()


PLACES = [0, 1, BLOCK - 1, BLOCK, 3 * BLOCK + 5, 4 * BLOCK - 1, 4 * BLOCK + 6, 5 * BLOCK - 1, 5 * BLOCK, COLUMNS - 1]


def test_the_best_is_found_in_every_part_of_a_row():
    scores = torch.randn(len(PLACES), COLUMNS + 3, generator=torch.Generator().manual_seed(0))[:, :COLUMNS]
    for row, place in enumerate(PLACES):
        scores[row, place] = 9.0
    assert chosen(scores) == PLACES


def test_the_first_of_equal_scores_is_chosen_across_blocks_and_lanes():
    pairs = [
        (BLOCK + 3, 2 * BLOCK),
        (7, 5 * BLOCK + 2),
        (4 * BLOCK + 1, 5 * BLOCK + 1),
        (BLOCK - 1, BLOCK),
        (12, 13),
        (5, 3 * BLOCK + 5),
        (9, 5 * BLOCK + 9),
    ]
    scores = torch.zeros(len(pairs), COLUMNS, dtype=torch.bfloat16)
    for row, places in enumerate(pairs):
        scores[row, list(places)] = 2.0
    assert chosen(scores) == [first for first, _ in pairs]


def test_every_logit_counts_beside_other_scores():
    rng = torch.Generator().manual_seed(2)
    scores, logits = torch.rand(3, COLUMNS, generator=rng), torch.randn(3, COLUMNS + 5, generator=rng)[:, :COLUMNS]
    for place in PLACES:
        logits[:, place] += 9.0
    given = state(3)
    out = finish_step(scores, None, logits, **given, impl="triton")
    assert out.tolist() == first_best(scores)
    expected = logits.double().log_softmax(-1).gather(1, out[:, None])[:, 0].float()
    torch.testing.assert_close(given["logprobs"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("columns", [BLOCK - 1, BLOCK, BLOCK + 1])
def test_block_edges(columns: int):
    scores = torch.randn(3, columns, generator=torch.Generator().manual_seed(1))
    scores[0, -1] = scores[1, 0] = 8.0
    assert chosen(scores) == first_best(scores)


def test_one_launch_that_waits_before_it_loads():
    given = {name: one.to("meta") for name, one in state(3).items()}
    with recorded_launches(90) as launches:
        finish_step(torch.empty(3, 100, device="meta"), None, None, **given, impl="triton")
    (one,) = launches
    assert one.grid == (3,)
    source = inspect.getsource(_finish_step_kernel.fn)
    assert source.index("await_inputs(PDL)") < source.index("tl.load")
