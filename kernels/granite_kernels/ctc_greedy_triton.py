"""`ctc_greedy` in Triton: a program for each row of logits, then one for each clip.

The order of a row's sums depends on its length alone, and a clip's program sees only its own frames.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from granite_kernels.launch import ARCHITECTURES, Tile, architecture, launch, launching, register
from granite_kernels.tiles import TileTable, predicted

# Columns of a row at a time, 16 of them in each thread. All of a released row at once would take so many registers that only one program
# fits on a multiprocessor.
_TILES = TileTable(
    "ctc_greedy",
    "rows",
    {(chip,): predicted(Tile({"BLOCK": 4096}, 8), "2026-11-28") for chip in ARCHITECTURES},
    candidates=lambda key: [Tile({"BLOCK": 32 * warps * each}, warps) for warps in (4, 8, 16) for each in (8, 16, 32)],
)
# Frames of a clip at a time. A clip of 30 s has 375 frames in the released model, so most are done in one or two steps.
_CLIP_TILE = Tile({"BLOCK": 256}, 4)
_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=["num_clips"])
def _ctc_best_kernel(
    logits_ptr, cu_seqlens_ptr, ids_ptr, logprobs_ptr, entropy_ptr, tokens_ptr, token_logprobs_ptr, first_frames_ptr, last_frames_ptr,
    num_clips, vocab, stride_logits,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The best id of one row, its log-probability and the row's entropy; and no token in this row, until the next kernel finds one.

    Grid: (rows,). logits (rows, vocab), stride (stride_logits, 1). cu_seqlens (num_clips + 1,) int32. The results (rows,).
    """
    row = tl.program_id(0).to(tl.int64)
    is_frame = row < tl.load(cu_seqlens_ptr + num_clips)
    logits_ptr += row * stride_logits
    best = tl.cast(float("-inf"), tl.float32)
    place = 0
    # Of the columns so far, with y = log2(e) · (logit − shift): Σ 2^y and Σ 2^y · y.
    shift = tl.cast(0.0, tl.float32)
    total = tl.cast(0.0, tl.float32)
    moment = tl.cast(0.0, tl.float32)
    for start in range(0, tl.where(is_frame, vocab, 0), BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + column, mask=column < vocab, other=float("-inf")).to(tl.float32)
        largest = tl.max(x, axis=0)  # of numbers: NaN is passed over
        where = tl.min(tl.where(x == largest, column, 2147483647), axis=0)
        is_better = (largest > best) & (total == total)
        best = tl.maximum(best, largest)
        # The difference of two infinities is no number.
        moved = (shift - tl.where(tl.abs(best) < float("inf"), best, 0.0)) * _LOG2_E
        shift = tl.where(tl.abs(best) < float("inf"), best, 0.0)
        y = (x - shift) * _LOG2_E
        p = tl.exp2(y)
        added = tl.sum(p, axis=0)
        factor = tl.where(total == 0.0, 0.0, tl.exp2(moved))  # of no columns, or only of −∞, `moved` means nothing
        moment = factor * (moment + moved * total) + tl.sum(p * tl.maximum(y, -200.0), axis=0)  # 2^y is 0 from there on down to −∞
        if (added != added) & (total == total):  # the first NaN of the row
            place = tl.min(tl.where(x != x, column, 2147483647), axis=0)
        else:
            place = tl.where(is_better, where, place)
        total = factor * total + added
    best, total = tl.where(is_frame, best, 0.0), tl.where(is_frame, total, 1.0)
    logarithm = tl.log(total)
    tl.store(ids_ptr + row, tl.where(is_frame, place, -1))
    tl.store(logprobs_ptr + row, best - shift - logarithm)
    tl.store(entropy_ptr + row, logarithm - moment / total * _LN_2)
    tl.store(tokens_ptr + row, -1)
    tl.store(token_logprobs_ptr + row, 0.0)
    tl.store(first_frames_ptr + row, -1)
    tl.store(last_frames_ptr + row, -1)


@triton.jit
def _highest_of_run(begins, highest, next_begins, next_highest):
    """Joins two stretches of frames: whether a run begins in them, and the highest log-probability of the last run in them."""
    joined = tl.maximum(highest, next_highest, propagate_nan=tl.PropagateNan.ALL)
    return begins | next_begins, tl.where(next_begins != 0, next_highest, joined)


@triton.jit
def _ctc_collapse_kernel(
    ids_ptr, logprobs_ptr, cu_seqlens_ptr, tokens_ptr, token_logprobs_ptr, first_frames_ptr, last_frames_ptr, counts_ptr, blank,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The tokens of one clip and their number.

    Grid: (clips,). cu_seqlens (clips + 1,) int32, counts (clips,), the others (rows,), contiguous.
    """
    clip = tl.program_id(0)
    begin = tl.load(cu_seqlens_ptr + clip)
    frames = tl.load(cu_seqlens_ptr + clip + 1) - begin
    row = begin.to(tl.int64)
    ids_ptr += row
    logprobs_ptr += row
    tokens_ptr += row
    token_logprobs_ptr += row
    first_frames_ptr += row
    last_frames_ptr += row
    count = tl.cast(0, tl.int32)
    before = tl.cast(float("-inf"), tl.float32)  # the highest so far of the last run
    for start in range(0, frames, BLOCK):
        frame = start + tl.arange(0, BLOCK)
        inside = frame < frames
        own = tl.load(ids_ptr + frame, mask=inside, other=-1)
        begins = own != tl.load(ids_ptr + frame - 1, mask=inside & (frame > 0), other=-1)
        ends = own != tl.load(ids_ptr + frame + 1, mask=frame + 1 < frames, other=-1)
        logprob = tl.load(logprobs_ptr + frame, mask=inside, other=0.0)
        is_token = inside & (own != blank)
        is_first = is_token & begins
        number = count + tl.cumsum(is_first.to(tl.int32), axis=0) - 1
        begun, highest = tl.associative_scan((begins.to(tl.int32), logprob), 0, _highest_of_run)
        highest = tl.where(begun != 0, highest, tl.maximum(highest, before, propagate_nan=tl.PropagateNan.ALL))
        tl.store(tokens_ptr + number, own, mask=is_first)
        tl.store(first_frames_ptr + number, frame, mask=is_first)
        tl.store(last_frames_ptr + number, frame, mask=is_token & ends)
        tl.store(token_logprobs_ptr + number, highest, mask=is_token & ends)
        count += tl.sum(is_first.to(tl.int32), axis=0)
        before = tl.sum(tl.where(frame == start + BLOCK - 1, highest, 0.0), axis=0)
    tl.store(counts_ptr + clip, count)


def _ctc_greedy(
    logits: Tensor, cu_seqlens: Tensor, blank: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`ctc_greedy` by the Triton kernels."""
    (rows, vocab), clips = logits.shape, cu_seqlens.shape[0] - 1
    ids, tokens, first_frames, last_frames = (logits.new_empty(rows, dtype=torch.int32) for _ in range(4))
    logprobs, entropy, token_logprobs = (logits.new_empty(rows, dtype=torch.float32) for _ in range(3))
    counts = logits.new_empty(clips, dtype=torch.int32)
    if launching(logits):
        of_tokens = {
            "tokens_ptr": tokens, "token_logprobs_ptr": token_logprobs, "first_frames_ptr": first_frames, "last_frames_ptr": last_frames,
        }  # fmt: skip
        launch(
            _ctc_best_kernel, (rows,), _tile(vocab, architecture(logits.device)), logits_ptr=logits, cu_seqlens_ptr=cu_seqlens,
            ids_ptr=ids, logprobs_ptr=logprobs, entropy_ptr=entropy, **of_tokens, num_clips=clips, vocab=vocab,
            stride_logits=logits.stride(0),
        )  # fmt: skip
        launch(
            _ctc_collapse_kernel, (clips,), _CLIP_TILE, ids_ptr=ids, logprobs_ptr=logprobs, cu_seqlens_ptr=cu_seqlens, **of_tokens,
            counts_ptr=counts, blank=blank,
        )  # fmt: skip
    return ids, logprobs, entropy, tokens, token_logprobs, first_frames, last_frames, counts


def _tile(vocab: int, chip: int) -> Tile:
    """The table's tile, or a smaller one for a row that is shorter."""
    tile = _TILES[chip,]
    block = min(triton.next_power_of_2(vocab), tile.blocks["BLOCK"])
    return Tile({**tile.blocks, "BLOCK": block}, min(max(block * tile.num_warps // tile.blocks["BLOCK"], 1), tile.num_warps))


ctc_greedy_triton = register(_ctc_greedy)
