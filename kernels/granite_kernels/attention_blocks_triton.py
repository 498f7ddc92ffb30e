"""`attention_blocks` in Triton: one program writes the slots of one clip, so that none has to look for its clip."""

import torch
import triton
import triton.language as tl

from granite_kernels.launch import ARCHITECTURES, Tile, architecture, launch, launching, register
from granite_kernels.tiles import TileTable, predicted

# A clip of 10 s has 3 or 4 slots, and one of 5 minutes has 75.
_TILES = TileTable(
    "attention_blocks",
    "forward",
    {(chip,): predicted(Tile({"BLOCK": 32}, 1), "2026-11-27") for chip in ARCHITECTURES},
    candidates=lambda key: [Tile({"BLOCK": block}, warps) for block, warps in ((32, 1), (64, 1), (128, 4))],
)


@triton.jit(do_not_specialize=["num_clips", "num_slots", "total_frames", "context_size"])
def _attention_blocks_kernel(cu_seqlens_ptr, blocks_ptr, num_clips, num_slots, total_frames, context_size, BLOCK: tl.constexpr):
    """The slots of one clip, BLOCK at a time; the last program's are those of the padding.

    Grid: (num_clips + 1,). cu_seqlens (num_clips + 1,); blocks (num_slots, 3) int32, contiguous.
    """
    clip = tl.program_id(0)
    start = tl.load(cu_seqlens_ptr + clip)
    end = total_frames
    past = num_slots
    if clip < num_clips:
        end = tl.load(cu_seqlens_ptr + clip + 1)
        past = tl.minimum(end // context_size + clip + 1, num_slots)
    slot = start // context_size + clip
    for first_slot in range(slot, past, BLOCK):
        here = first_slot + tl.arange(0, BLOCK)
        first = start + (here - slot) * context_size
        rows = tl.maximum(tl.minimum(end - first, context_size), 0)
        exists = here < past
        tl.store(blocks_ptr + 3 * here, tl.where(rows > 0, first, 0), mask=exists)
        tl.store(blocks_ptr + 3 * here + 1, rows, mask=exists)
        tl.store(blocks_ptr + 3 * here + 2, tl.where(clip < num_clips, rows, 0), mask=exists)


def _attention_blocks(cu_seqlens: torch.Tensor, total_frames: int, context_size: int) -> torch.Tensor:
    """`attention_blocks` by the Triton kernel."""
    clips = cu_seqlens.shape[0] - 1
    slots = total_frames // context_size + clips + 1
    blocks = torch.empty(slots, 3, dtype=torch.int32, device=cu_seqlens.device)
    if launching(cu_seqlens):
        launch(
            _attention_blocks_kernel, (clips + 1,), _TILES[architecture(cu_seqlens.device),], cu_seqlens_ptr=cu_seqlens,
            blocks_ptr=blocks, num_clips=clips, num_slots=slots, total_frames=total_frames, context_size=context_size,
        )  # fmt: skip
    return blocks


attention_blocks_triton = register(_attention_blocks)
