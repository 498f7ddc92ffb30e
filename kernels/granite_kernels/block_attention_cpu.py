"""`block_attention` on a CPU, for inference: scaled_dot_product_attention, with the positions as its mask.

The reference makes the scores, their softmax and two products one after another, in float32. Here PyTorch's fused operation reads q, k
and v as they are. In bfloat16 its softmax and sums are float32, but two more values are rounded: the positions' part of a score, and a
softmax weight. Each query is multiplied with twice as many positions as in the reference, which costs less than the fusion saves.
"""

from collections.abc import Iterator
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from granite_kernels.block_attention import BlockAttentionInputs, block_attention_reference
from granite_kernels.cpu import has_bfloat16
from granite_kernels.op import bounds, called_with, join

# The positions' part of the scores of one call, at most: all blocks of a clip of 30 s with 8 heads. On a busy machine each operation
# takes milliseconds, so a few large ones are better than many whose operands stay in the cache.
_MASK_BYTES = 10_000_000


@called_with(BlockAttentionInputs)
def block_attention_cpu(inputs: BlockAttentionInputs) -> Tensor:
    """`block_attention` for CPU tensors that need no gradient. A clip's bits do not depend on its neighbours."""
    q, k, v, rel_pos_emb, cu_seqlens, context_size, scale, _ = inputs
    if q.dtype != torch.float32 and not (q.dtype == torch.bfloat16 and has_bfloat16()):
        return block_attention_reference(*inputs)
    frames, num_heads, dim_head = q.shape
    scale = dim_head**-0.5 if scale is None else scale
    clips = bounds(cu_seqlens, frames)
    # Row r is for the distance context_size - 1 - r, so the rows for a query and the keys 0, 1, 2, ... come one after another.
    max_pos_emb = rel_pos_emb.shape[0] // 2
    positions = rel_pos_emb[max_pos_emb - context_size + 1 : max_pos_emb + context_size].flip(0) * scale
    pieces = []
    for rows, length in _equal_blocks(clips, context_size, _MASK_BYTES // (num_heads * q.element_size())):
        blocks = [one[rows].unflatten(0, (-1, length)) for one in (q, k, v)]
        mask = _position_scores(blocks[0], positions[context_size - length : context_size + length - 1])
        heads_first = (one.transpose(1, 2) for one in blocks)
        attended = F.scaled_dot_product_attention(*heads_first, attn_mask=mask, scale=scale)
        pieces.append(attended.transpose(1, 2).flatten(0, 1))
    return join(pieces, q[clips[-1][1] if clips else 0 :])


def _position_scores(q: Tensor, band: Tensor) -> Tensor:
    """What the positions add to scores, (blocks, num_heads, length, length), of q (blocks, length, num_heads, dim_head) and band
    (2 · length - 1, dim_head).

    Each query is multiplied with the whole band. Its scores with the keys 0, 1, 2, ... are a window of that, which begins one column
    earlier for each query: a view.
    """
    blocks, length, num_heads, dim_head = q.shape
    width = band.shape[0]
    scores = q.reshape(-1, dim_head) @ band.T
    strides = (length * num_heads * width, width, num_heads * width - 1, 1)
    return scores.as_strided((blocks, num_heads, length, length), strides, length - 1)


def _equal_blocks(clips: list[tuple[int, int]], context_size: int, most: int) -> Iterator[tuple[slice, int]]:
    """The rows of adjacent blocks of one length, and that length. At most `most` elements of `_position_scores` a head, or one block."""
    starts = ((first, min(context_size, end - first)) for begin, end in clips for first in range(begin, end, context_size))
    for length, run in groupby(starts, lambda block: block[1]):
        run = list(run)
        first, end = run[0][0], run[-1][0] + length
        step = length * max(1, most // (length * (2 * length - 1)))
        for start in range(first, end, step):
            yield slice(start, min(start + step, end)), length
