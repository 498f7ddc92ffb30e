"""`finish_step` in Triton: one program reads the scores of a row, chooses, and writes the row's state and the token's log-probability."""

import torch
import triton
import triton.language as tl

from granite_kernels.launch import ARCHITECTURES, Tile, architecture, launch, launching, register
from granite_kernels.primitives import await_inputs
from granite_kernels.tiles import TileTable, predicted

_LOG2_E = tl.constexpr(1.4426950408889634)

# Two 128-bit loads per thread of a block in bfloat16, and four blocks in flight.
TILES = TileTable(
    "finish_step",
    "forward",
    {(chip,): predicted(Tile({"BLOCK": 8192}, 16), "2026-11-27") for chip in ARCHITECTURES},
    candidates=lambda key: [Tile({"BLOCK": 32 * warps * each}, warps) for warps in (8, 16, 32) for each in (8, 16)],
)


@triton.jit
def _added(total, most, x, scale):
    """A sum of exp(scale · (element − most)) with one more element, and with the new maximum. One exponential: the other is of 0."""
    # Equal numbers differ by nothing, also if they are infinite.
    power = tl.where(x == most, 1.0, tl.exp2(-tl.abs(x - most) * scale))
    return tl.where(x > most, total * power + 1.0, total + power)


@triton.jit(do_not_specialize=["candidates"])
def _finish_step_kernel(
    scores_ptr, ids_ptr, logits_ptr, tokens_ptr, history_ptr, logprobs_ptr, active_ptr, kv_lens_ptr, limits_ptr, ends_ptr, chosen_ptr,
    candidates, ends, stride_scores, stride_ids, stride_logits, stride_ends, scale,
    BLOCK: tl.constexpr, BLOCK_ENDS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The best candidate of one row, its log-probability, and the row's new state.

    Grid: (rows,). scores (rows, candidates), ids and logits (rows, candidates) or None, ends (rows, ends), the others (rows,).
    """
    row = tl.program_id(0).to(tl.int64)
    await_inputs(PDL)
    # Lane i keeps the best of columns i, i + BLOCK and so on, and its column. The first one, since only a larger score replaces it.
    # And it adds up their exponentials: of the scores, or of the logits, whose largest it keeps too.
    lane, scores_ptr, power = tl.arange(0, BLOCK), scores_ptr + row * stride_scores, scale * _LOG2_E
    best, column = tl.full((BLOCK,), float("-inf"), tl.float32), lane
    most, total = best, tl.zeros((BLOCK,), tl.float32)
    if logits_ptr is not None:
        logits_ptr += row * stride_logits
    # Only the last block needs a mask, and loads with one are narrow. More blocks at once would spill.
    whole = candidates // BLOCK * BLOCK
    for start in tl.range(0, whole, BLOCK, loop_unroll_factor=4 if logits_ptr is None else 2):
        score = tl.load(scores_ptr + start + lane).to(tl.float32)
        if logits_ptr is None:
            total = _added(total, best, score, power)
        else:
            logit = tl.load(logits_ptr + start + lane).to(tl.float32)
            total, most = _added(total, most, logit, power), tl.maximum(most, logit)
        best, column = tl.where(score > best, score, best), tl.where(score > best, start + lane, column)
    inside = whole + lane < candidates
    score = tl.load(scores_ptr + whole + lane, mask=inside, other=float("-inf")).to(tl.float32)
    if logits_ptr is None:
        total = _added(total, best, score, power)
    else:
        logit = tl.load(logits_ptr + whole + lane, mask=inside, other=float("-inf")).to(tl.float32)
        total, most = _added(total, most, logit, power), tl.maximum(most, logit)
    best, column = tl.where(score > best, score, best), tl.where(score > best, whole + lane, column)
    if logits_ptr is None:
        most = best
    largest, top = tl.max(best, axis=0), tl.max(most, axis=0)
    column = tl.min(tl.where(best == largest, column, 2147483647), axis=0)
    total = tl.sum(total * tl.where(most == top, 1.0, tl.exp2((most - top) * power)), axis=0)
    logit = largest
    if logits_ptr is not None and ids_ptr is None:
        logit = tl.load(logits_ptr + column).to(tl.float32)
    chosen = column.to(tl.int64)
    if ids_ptr is not None:
        chosen = tl.load(ids_ptr + row * stride_ids + column).to(tl.int64)
    e = tl.arange(0, BLOCK_ENDS)
    is_end = tl.load(ends_ptr + row * stride_ends + e, mask=e < ends, other=-1) == chosen
    ended = (tl.max(is_end.to(tl.int32), axis=0) > 0) | (tl.load(kv_lens_ptr + row) >= tl.load(limits_ptr + row))
    active = tl.load(active_ptr + row)
    tl.store(history_ptr + row, tl.where(active > 0, chosen, -1))
    tl.store(tokens_ptr + row, chosen)
    tl.store(logprobs_ptr + row, (logit - top) * scale - tl.log(total))
    tl.store(active_ptr + row, tl.where(ended, 0, active))
    tl.store(chosen_ptr + row, chosen)


def _finish_step(
    scores: torch.Tensor,
    ids: torch.Tensor | None,
    logits: torch.Tensor | None,
    tokens: torch.Tensor,
    history: torch.Tensor,
    logprobs: torch.Tensor,
    active: torch.Tensor,
    kv_lens: torch.Tensor,
    limits: torch.Tensor,
    ends: torch.Tensor,
    divisor: float = 1.0,
) -> torch.Tensor:
    """`finish_step` by the Triton kernel."""
    (rows, candidates), chosen = scores.shape, torch.empty_like(tokens)
    if launching(scores):
        tile = TILES[(architecture(scores.device),)]
        launch(
            _finish_step_kernel, (rows,),
            Tile({**tile.blocks, "BLOCK_ENDS": triton.next_power_of_2(max(ends.shape[1], 1))}, tile.num_warps),
            scores_ptr=scores, ids_ptr=ids, logits_ptr=logits, tokens_ptr=tokens, history_ptr=history, logprobs_ptr=logprobs,
            active_ptr=active, kv_lens_ptr=kv_lens, limits_ptr=limits, ends_ptr=ends, chosen_ptr=chosen, candidates=candidates,
            ends=ends.shape[1], stride_scores=scores.stride(0), stride_ids=0 if ids is None else ids.stride(0),
            stride_logits=0 if logits is None else logits.stride(0), stride_ends=ends.stride(0), scale=1 / divisor,
        )  # fmt: skip
    return chosen


finish_step_triton = register(_finish_step, mutates=("tokens", "history", "logprobs", "active"))
