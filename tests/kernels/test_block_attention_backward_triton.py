"""The backward of block attention: rounds of blocks, chunks of partial sums, and what is launched."""

import pytest
import torch
from granite_kernels import block_attention_backward_triton
from granite_kernels.block_attention import OPERATION
from granite_kernels.block_attention_backward_triton import _SCORES, _SCRATCH
from granite_kernels.block_attention_triton import block_attention_triton
from granite_kernels.launch import recorded_launches
from granite_kernels.testing import assert_operation_accurate, poisoned_allocations

from tests.kernels.test_block_attention_triton import draw, run


def test_rounds_of_blocks_give_the_same_gradients(monkeypatch: pytest.MonkeyPatch):
    inputs = draw(21, 8, 13, heads=2, context=20, padding=5, dtype=torch.bfloat16)
    once = run(inputs)
    monkeypatch.setattr(block_attention_backward_triton, "_SCRATCH", 30_000)  # for 2 of the 6 slots, each a chunk of its own
    monkeypatch.setattr(block_attention_backward_triton, "_MIN_SLOTS", 1)
    with poisoned_allocations():
        several = run(inputs)
        for name in ("grad q", "grad k", "grad v"):
            assert torch.equal(several[name], once[name]), name
        assert_operation_accurate(OPERATION, inputs, impl="triton")


def test_scratch_is_bounded_and_rounds_cover_every_slot():
    inputs = next(case for case in OPERATION.cases if case.name == "encoder, 128 clips of 10 s").inputs(torch.bfloat16, "meta")
    with recorded_launches(90) as launches:
        block_attention_triton(**{**inputs, "q": inputs["q"].requires_grad_()}).sum().backward()
    backward = [one for one in launches if "_bwd_" in one.kernel.__name__]
    scores = [one for one in backward if "scores" in one.kernel.__name__]
    assert len(backward) == 4 * len(scores) == 12
    ends = [one.arguments["first_slot"] + one.grid[2] for one in scores]
    assert [one.arguments["first_slot"] for one in scores] == [0, *ends[:-1]]
    assert ends[-1] == 128 * 500 // 200 + 128 + 1
    scratch = {**scores[0].arguments, **backward[1].arguments}
    size = sum(scratch[name].numel() * scratch[name].element_size() for name in ("weights_ptr", "grads_ptr", "skewed_ptr"))
    assert _SCRATCH / 2 < size <= _SCRATCH


@pytest.mark.parametrize("chip", [80, 90])
def test_tiles_of_other_chips_and_dtypes_are_as_accurate(chip: int):
    tile = {80: _SCORES.candidates((80, 4))[-1], 90: _SCORES.rows[90, 2].tile}[chip]
    with _SCORES.using({(80, 2): tile}):
        assert_operation_accurate(OPERATION, draw(70, context=66, max_pos=66, dtype=torch.bfloat16), impl="triton")
