"""`finish_step` in Triton: one program reads the scores of a row, chooses, and writes the row's state."""

import torch
import triton
import triton.language as tl

from granite_kernels.launch import ARCHITECTURES, Tile, architecture, launch, launching, register
from granite_kernels.primitives import await_inputs
from granite_kernels.tiles import TileTable, predicted

# Two 128-bit loads per thread of a block in bfloat16, and four blocks in flight.
TILES = TileTable(
    "finish_step",
    "forward",
    {(chip,): predicted(Tile({"BLOCK": 8192}, 16), "2026-11-27") for chip in ARCHITECTURES},
    candidates=lambda key: [Tile({"BLOCK": 32 * warps * each}, warps) for warps in (8, 16, 32) for each in (8, 16)],
)


@triton.jit(do_not_specialize=["candidates"])
def _finish_step_kernel(
    scores_ptr, ids_ptr, tokens_ptr, history_ptr, active_ptr, kv_lens_ptr, limits_ptr, ends_ptr, chosen_ptr, candidates, ends,
    stride_scores, stride_ids, stride_ends,
    BLOCK: tl.constexpr, BLOCK_ENDS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The best candidate of one row, and the row's new state.

    Grid: (rows,). scores (rows, candidates), ids (rows, candidates) or None, ends (rows, ends), the others (rows,).
    """
    row = tl.program_id(0).to(tl.int64)
    await_inputs(PDL)
    # Lane i keeps the best of columns i, i + BLOCK and so on, and its column. The first one, since only a larger score replaces it.
    lane, scores_ptr = tl.arange(0, BLOCK), scores_ptr + row * stride_scores
    best, column = tl.full((BLOCK,), float("-inf"), tl.float32), lane
    # Only the last block needs a mask, and loads with one are narrow.
    whole = candidates // BLOCK * BLOCK
    for start in tl.range(0, whole, BLOCK, loop_unroll_factor=4):
        score = tl.load(scores_ptr + start + lane).to(tl.float32)
        best, column = tl.where(score > best, score, best), tl.where(score > best, start + lane, column)
    score = tl.load(scores_ptr + whole + lane, mask=whole + lane < candidates, other=float("-inf")).to(tl.float32)
    best, column = tl.where(score > best, score, best), tl.where(score > best, whole + lane, column)
    column = tl.min(tl.where(best == tl.max(best, axis=0), column, 2147483647), axis=0)
    chosen = column.to(tl.int64)
    if ids_ptr is not None:
        chosen = tl.load(ids_ptr + row * stride_ids + column).to(tl.int64)
    e = tl.arange(0, BLOCK_ENDS)
    is_end = tl.load(ends_ptr + row * stride_ends + e, mask=e < ends, other=-1) == chosen
    ended = (tl.max(is_end.to(tl.int32), axis=0) > 0) | (tl.load(kv_lens_ptr + row) >= tl.load(limits_ptr + row))
    active = tl.load(active_ptr + row)
    tl.store(history_ptr + row, tl.where(active > 0, chosen, -1))
    tl.store(tokens_ptr + row, chosen)
    tl.store(active_ptr + row, tl.where(ended, 0, active))
    tl.store(chosen_ptr + row, chosen)


def _finish_step(
    scores: torch.Tensor,
    ids: torch.Tensor | None,
    tokens: torch.Tensor,
    history: torch.Tensor,
    active: torch.Tensor,
    kv_lens: torch.Tensor,
    limits: torch.Tensor,
    ends: torch.Tensor,
) -> torch.Tensor:
    """`finish_step` by the Triton kernel."""
    (rows, candidates), chosen = scores.shape, torch.empty_like(tokens)
    if launching(scores):
        tile = TILES[(architecture(scores.device),)]
        launch(
            _finish_step_kernel, (rows,),
            Tile({**tile.blocks, "BLOCK_ENDS": triton.next_power_of_2(max(ends.shape[1], 1))}, tile.num_warps),
            scores_ptr=scores, ids_ptr=ids, tokens_ptr=tokens, history_ptr=history, active_ptr=active, kv_lens_ptr=kv_lens,
            limits_ptr=limits, ends_ptr=ends, chosen_ptr=chosen, candidates=candidates, ends=ends.shape[1], stride_scores=scores.stride(0),
            stride_ids=0 if ids is None else ids.stride(0), stride_ends=ends.stride(0),
        )  # fmt: skip
    return chosen


finish_step_triton = register(_finish_step, mutates=("tokens", "history", "active"))
