"""The table of blocks compared with blocks that are cut one after another."""

import pytest
import torch
from granite_kernels import KernelError, attention_blocks
from granite_kernels.attention_blocks import OPERATION, attention_blocks_cost
from torch.fx.experimental.proxy_tensor import make_fx

SMALL = [case for case in OPERATION.cases if not case.released]


@pytest.mark.parametrize("case", SMALL, ids=lambda one: one.name)
def test_every_block_has_its_clips_slot_and_the_other_slots_are_idle(case):
    lengths, context, after = case.shape["clips"], case.shape["context_size"], case.shape["after"]
    expected = [[0, 0, 0] for _ in range((sum(lengths) + after) // context + len(lengths) + 1)]
    start = 0
    for clip, length in enumerate([*lengths, after]):
        for number, first in enumerate(range(start, start + length, context)):
            rows = min(context, start + length - first)
            expected[start // context + clip + number] = [first, rows, rows if clip < len(lengths) else 0]
        start += length
    assert attention_blocks(**case.inputs(torch.float32)).tolist() == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens": torch.zeros(0, dtype=torch.int32)}, r"cu_seqlens is empty; expected clips \+ 1 offsets"),
        ({"total_frames": -1}, r"total_frames=-1; expected 0 or more"),
        ({"context_size": 0}, r"context_size=0; expected 1 or more"),
        ({"context_size": torch.tensor(8)}, r"context_size is of type Tensor; expected an integer"),
    ],
)
def test_wrong_arguments_are_refused(change: dict, message: str):
    right = {"cu_seqlens": torch.tensor([0, 4], dtype=torch.int32), "total_frames": 4, "context_size": 8}
    with pytest.raises(KernelError, match=f"^attention_blocks: {message}"):
        attention_blocks(**{**right, **change})


def test_the_number_of_frames_may_be_a_symbol():
    """As when a graph for batches of any length is traced."""
    cu_seqlens = torch.tensor([0, 5, 7], dtype=torch.int32)

    def table(cu_seqlens: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return attention_blocks(cu_seqlens, total_frames=x.shape[0], context_size=4, impl="triton")

    traced = make_fx(table, tracing_mode="symbolic")(cu_seqlens, torch.zeros(9))
    assert torch.equal(traced(cu_seqlens, torch.zeros(12)), table(cu_seqlens, torch.zeros(12)))


def test_cost_matches_a_count_by_hand():
    cost = attention_blocks_cost(torch.tensor([0, 5, 7], dtype=torch.int32), 9, 4)
    assert (cost.flops, cost.bytes) == (15, 5 * 3 * 4 + 3 * 4)  # 2 + 2 + 1 slots
