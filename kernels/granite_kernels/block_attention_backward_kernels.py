"""The backward of block attention: four kernels without atomics. `block_attention_kernels` says how bands become biases.

The first kernel computes the softmax weights P and the gradients S of the scaled scores, once, and writes them to scratch. The
gradients are then products over the frames of a block:

    grad_q = scale · (S·k + S'·E)     grad_k = scale · Sᵀ·q     grad_v = Pᵀ·grad_out     grad_E = scale · S'ᵀ·q, summed over all blocks

S' is S by distance instead of key: for a tile of queries its columns are the distances that occur, in order, so that they match
consecutive rows of E. The kernel of grad_q moves a tile of S there in registers, by `_mirror`, and also writes it to scratch.

With T tiles in a block, that is 8 + 4/T products of tiles for each pair of tiles. If each kernel computed the scores that it needs, it
would be 22. The scratch costs up to 3 · context_size + 4 · BLOCK elements for each frame and head; P and S' are read once, and S twice.
For 128 clips of 10 s in bfloat16 (8 heads of 128 features, blocks of 200 frames) that is 0.35 TFLOP, 1.6 GB of scratch traffic and
1.7 GB of other tensors: at least 0.8 ms at 4.24 TB/s, and 0.5 ms at 680 TFLOP/s.
"""

import triton
import triton.language as tl

from granite_kernels.block_attention_kernels import (
    LOG2_E,
    _band,
    _bias,
    _distances,
    _in_upper_band,
    _load_existing,
    _load_rows,
    _mirror,
    _origin,
    _product,
)
from granite_kernels.primitives import dot, rounded

# Sizes that depend on the batch and not on the model, and arguments that no address depends on.
VARYING = ["total_frames", "first_slot", "slots", "slots_per_chunk", "context_size", "max_pos_emb", "scale"]


@triton.jit
def _block_of(slot, blocks_ptr):
    """(first frame, rows to write, existing frames) of a slot: a row of the table of blocks."""
    return tl.load(blocks_ptr + slot * 3), tl.load(blocks_ptr + slot * 3 + 1), tl.load(blocks_ptr + slot * 3 + 2)


@triton.jit
def _scratch(ptr, slot, first_slot, head, num_heads, context_size, columns):
    """The first element of a block and head in scratch (slots, num_heads, context_size, columns)."""
    return ptr + ((slot - first_slot) * num_heads + head).to(tl.int64) * context_size * columns


@triton.jit
def _keys(frames):
    """The columns of a block's weights and gradients that are used: a multiple of 16, so that wide loads stay whole."""
    return tl.cdiv(frames, 16) * 16


@triton.jit
def _load_tile(ptr, rows, frames, first_column, bound, columns, BLOCK: tl.constexpr):
    """(rows, BLOCK columns) of one block's scratch, whose rows have `columns` columns; zeros past its frames and from `bound` on."""
    column = first_column + tl.arange(0, BLOCK)
    mask = (rows < frames)[:, None] & (column < bound)[None, :]
    return tl.load(ptr + rows[:, None] * columns + column[None, :], mask=mask, other=0.0)


@triton.jit
def _store_tile(ptr, rows, frames, first_column, bound, columns, values):
    """Writes `values` where `_load_tile` would read them."""
    column = first_column + tl.arange(0, values.shape[1])
    mask = (rows < frames)[:, None] & (column < bound)[None, :]
    tl.store(ptr + rows[:, None] * columns + column[None, :], values, mask=mask)


@triton.jit
def _store_gradient(ptr, head, num_heads, first, rows, to_write, dim_head, gradient, BLOCK_D: tl.constexpr):
    """Rows of a contiguous gradient (total_frames, num_heads, dim_head)."""
    d = tl.arange(0, BLOCK_D)
    row = num_heads * dim_head
    target = _origin(ptr, head, dim_head, first, row) + rows[:, None] * row + d[None, :]
    tl.store(target, rounded(gradient, ptr.dtype.element_ty), mask=(rows < to_write)[:, None] & (d < dim_head)[None, :])


@triton.jit(do_not_specialize=VARYING)
def _block_attention_bwd_scores_kernel(
    q_ptr, k_ptr, v_ptr, e_ptr, blocks_ptr, out_ptr, rest_ptr, grad_out_ptr, lse_ptr, weights_ptr, grads_ptr,
    total_frames, first_slot, num_heads, dim_head, context_size, max_pos_emb, scale,
    stride_q, stride_qh, stride_k, stride_kh, stride_v, stride_vh, stride_e,
    FORM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """P and S of BLOCK queries of one block and head; 0 for pairs that do not exist.

    Grid: (query tiles of a block, num_heads, slots), so that programs with the same keys run together.
    q, k, v, e and blocks as in the forward kernel; out, rest (None in float32) and grad_out (total_frames, num_heads, dim_head),
    contiguous; lse (num_heads, total_frames) float32, in base 2; scale without log2(e). weights and grads (slots, num_heads,
    context_size, BLOCK · tiles): scratch for the slots from first_slot on. Key tiles that a short block lacks are not written.
    """
    tiles = tl.cdiv(context_size, BLOCK)
    m, head, slot = tl.program_id(0), tl.program_id(1), first_slot + tl.program_id(2)
    first, _to_write, frames = _block_of(slot, blocks_ptr)
    if m * BLOCK < frames:
        place = tl.arange(0, BLOCK)
        i = m * BLOCK + place
        # What does not exist is read as the last frame or distance that does: its weights are 0.
        query = tl.minimum(i, frames - 1)
        row = num_heads * dim_head
        q_ptr = _origin(q_ptr, head, stride_qh, first, stride_q)
        k_ptr = _origin(k_ptr, head, stride_kh, first, stride_k)
        v_ptr = _origin(v_ptr, head, stride_vh, first, stride_v)
        e_ptr += max_pos_emb * stride_e
        grad_out_ptr = _origin(grad_out_ptr, head, dim_head, first, row)
        weights_ptr = _scratch(weights_ptr, slot, first_slot, head, num_heads, context_size, tiles * BLOCK)
        grads_ptr = _scratch(grads_ptr, slot, first_slot, head, num_heads, context_size, tiles * BLOCK)
        grad_out = _load_existing(grad_out_ptr, query, row, dim_head, BLOCK_D)
        exact = _load_existing(_origin(out_ptr, head, dim_head, first, row), query, row, dim_head, BLOCK_D).to(tl.float32)
        if rest_ptr is not None:  # delta is subtracted from gradients, where the rounding error of out would show
            exact += _load_existing(_origin(rest_ptr, head, dim_head, first, row), query, row, dim_head, BLOCK_D).to(tl.float32)
        delta = tl.sum(grad_out.to(tl.float32) * exact, 1)
        q = _load_existing(q_ptr, query, stride_q, dim_head, BLOCK_D)
        lse = tl.load(lse_ptr + head.to(tl.int64) * total_frames + first + query)
        distances = _distances(m * BLOCK, frames, BLOCK, FORM)
        upper = _product(q, q_ptr, query, stride_q, e_ptr, distances, stride_e, dim_head, BLOCK_D, STEP)
        for n in range(0, tl.cdiv(frames, BLOCK)):
            j = n * BLOCK + place
            key = tl.minimum(j, frames - 1)
            distances = _distances((m - n - 1) * BLOCK, frames, BLOCK, FORM)
            if STEP == BLOCK_D:  # all loads first, so that they are on their way together
                band = _load_existing(e_ptr, distances, stride_e, dim_head, BLOCK_D)
                k = _load_existing(k_ptr, key, stride_k, dim_head, BLOCK_D)
                v = _load_existing(v_ptr, key, stride_v, dim_head, BLOCK_D)
                lower = dot(q, tl.trans(band), None)
                scores = dot(q, tl.trans(k), None)
                grads = dot(grad_out, tl.trans(v), None)
            else:
                lower = _product(q, q_ptr, query, stride_q, e_ptr, distances, stride_e, dim_head, BLOCK_D, STEP)
                scores = _product(q, q_ptr, query, stride_q, k_ptr, key, stride_k, dim_head, BLOCK_D, STEP)
                grads = _product(grad_out, grad_out_ptr, query, row, v_ptr, key, stride_v, dim_head, BLOCK_D, STEP)
            scores += _bias(upper, lower, FORM)
            upper = lower
            weights = tl.exp2(scores * (scale * LOG2_E) - lse[:, None])
            weights = tl.where((i < frames)[:, None] & (j < frames)[None, :], weights, 0.0)
            grads = weights * (grads - delta[:, None])
            _store_tile(weights_ptr, i, frames, n * BLOCK, _keys(frames), tiles * BLOCK, rounded(weights, q.dtype))
            _store_tile(grads_ptr, i, frames, n * BLOCK, _keys(frames), tiles * BLOCK, rounded(grads, q.dtype))


@triton.jit(do_not_specialize=VARYING)
def _block_attention_bwd_q_kernel(
    k_ptr, e_ptr, blocks_ptr, grads_ptr, skewed_ptr, grad_q_ptr,
    first_slot, num_heads, dim_head, context_size, max_pos_emb, scale, stride_k, stride_kh, stride_e,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradient of BLOCK queries of one block and head, scale · (S·k + S'·E), and their S'.

    Grid and inputs as in the kernel before; grad_q (total_frames, num_heads, dim_head), contiguous. skewed (slots, num_heads,
    context_size, BLOCK · (tiles + 1)), whose columns are the distances from BLOCK · (m − tiles) on for query tile m. Bands that a
    short block lacks are not written.
    """
    tiles = tl.cdiv(context_size, BLOCK)
    m, head, slot = tl.program_id(0), tl.program_id(1), first_slot + tl.program_id(2)
    first, to_write, frames = _block_of(slot, blocks_ptr)
    if m * BLOCK < to_write:
        place = tl.arange(0, BLOCK)
        i = m * BLOCK + place
        columns = (tiles + 1) * BLOCK
        k_ptr = _origin(k_ptr, head, stride_kh, first, stride_k)
        grads_ptr = _scratch(grads_ptr, slot, first_slot, head, num_heads, context_size, tiles * BLOCK)
        skewed_ptr = _scratch(skewed_ptr, slot, first_slot, head, num_heads, context_size, columns)
        grad_q = tl.zeros((BLOCK, BLOCK_D), tl.float32)
        # Gradients in the band that two key tiles share, by place in the band, from the earlier of the two.
        pending = tl.zeros((BLOCK, BLOCK), grads_ptr.dtype.element_ty)
        # One step more than tiles of keys: the last band has gradients from the last tile alone.
        for n in range(0, tl.cdiv(frames, BLOCK) + 1):
            j = n * BLOCK + place
            e, has_e = _band(m - n, max_pos_emb, frames, BLOCK)
            grads = _load_tile(grads_ptr, i, frames, n * BLOCK, _keys(frames), tiles * BLOCK, BLOCK)
            k = _load_rows(k_ptr, j, stride_k, j < frames, dim_head, BLOCK_D)
            band = _load_rows(e_ptr, e, stride_e, has_e, dim_head, BLOCK_D)
            grad_q = dot(grads, k, grad_q)
            by_place = _mirror(grads.to(tl.float32)).to(grads.dtype)
            grads = tl.where(_in_upper_band(BLOCK), by_place, pending)
            pending = by_place
            _store_tile(skewed_ptr, i, frames, (tiles - n) * BLOCK, columns, columns, grads)
            grad_q = dot(grads, band, grad_q)
        _store_gradient(grad_q_ptr, head, num_heads, first, i, to_write, dim_head, grad_q * scale, BLOCK_D)


@triton.jit(do_not_specialize=VARYING)
def _block_attention_bwd_kv_kernel(
    q_ptr, blocks_ptr, grad_out_ptr, weights_ptr, grads_ptr, grad_k_ptr, grad_v_ptr,
    first_slot, num_heads, dim_head, context_size, scale, stride_q, stride_qh,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradient of BLOCK keys, scale · Sᵀ·q, or of BLOCK values, Pᵀ·grad_out, of one block and head.

    Grid: (2 · key tiles of a block, num_heads, slots), where even programs have keys. Inputs as in the first kernel; grad_k and grad_v
    (total_frames, num_heads, dim_head), contiguous.
    """
    tiles = tl.cdiv(context_size, BLOCK)
    n, head, slot = tl.program_id(0) // 2, tl.program_id(1), first_slot + tl.program_id(2)
    first, to_write, frames = _block_of(slot, blocks_ptr)
    if n * BLOCK < to_write:
        of_values = tl.program_id(0) % 2 == 1
        row = num_heads * dim_head
        stride = tl.where(of_values, row, stride_q)
        x_ptr = tl.where(of_values, _origin(grad_out_ptr, head, dim_head, first, row), _origin(q_ptr, head, stride_qh, first, stride_q))
        scratch_ptr = tl.where(of_values, weights_ptr, grads_ptr)
        scratch_ptr = _scratch(scratch_ptr, slot, first_slot, head, num_heads, context_size, tiles * BLOCK)
        place = tl.arange(0, BLOCK)
        gradient = tl.zeros((BLOCK, BLOCK_D), tl.float32)
        for m in range(0, tl.cdiv(frames, BLOCK)):
            i = m * BLOCK + place
            tile = _load_tile(scratch_ptr, i, frames, n * BLOCK, _keys(frames), tiles * BLOCK, BLOCK)
            gradient = dot(tl.trans(tile), _load_rows(x_ptr, i, stride, i < frames, dim_head, BLOCK_D), gradient)
        gradient *= tl.where(of_values, 1.0, scale)
        target_ptr = tl.where(of_values, grad_v_ptr, grad_k_ptr)
        _store_gradient(target_ptr, head, num_heads, first, n * BLOCK + place, to_write, dim_head, gradient, BLOCK_D)


@triton.jit(do_not_specialize=VARYING)
def _block_attention_bwd_e_kernel(
    q_ptr, blocks_ptr, skewed_ptr, partial_ptr,
    first_slot, slots, slots_per_chunk, num_heads, dim_head, context_size, stride_q, stride_qh,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A partial gradient of one band of rel_pos_emb, S'ᵀ·q: from one head and a chunk of the blocks.

    Grid: (chunks, num_heads, 2 · tiles of a block), where the last is the band + tiles. Inputs as in the first kernel, for `slots`
    slots from first_slot on. partial (chunks, num_heads, 2 · tiles, BLOCK, dim_head) float32, contiguous; if first_slot is not 0, it
    has the sums of the slots before, to which these are added.
    """
    tiles = tl.cdiv(context_size, BLOCK)
    chunk, head, band = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    columns = (tiles + 1) * BLOCK
    place, d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    number = (chunk.to(tl.int64) * num_heads + head) * (2 * tiles) + band
    target = partial_ptr + (number * BLOCK + place[:, None]) * dim_head + d[None, :]
    inside = (d < dim_head)[None, :]
    gradient = tl.load(target, mask=inside & (first_slot > 0), other=0.0)
    # The query tiles that have this band, of every block of the chunk.
    first_tile = tl.maximum(band - tiles, 0)
    number_of_tiles = tl.minimum(band, tiles - 1) + 1 - first_tile
    last_slot = tl.minimum((chunk + 1) * slots_per_chunk, slots)
    for step in range(chunk * slots_per_chunk * number_of_tiles, last_slot * number_of_tiles):
        slot = first_slot + step // number_of_tiles
        m = first_tile + step % number_of_tiles
        first, _to_write, frames = _block_of(slot, blocks_ptr)
        # A short block has fewer bands than the scratch has columns for.
        frames = tl.where(tl.cdiv(frames, BLOCK) >= tiles + m - band, frames, 0)
        i = m * BLOCK + place
        scratch = _scratch(skewed_ptr, slot, first_slot, head, num_heads, context_size, columns)
        grads = _load_tile(scratch, i, frames, (band - m) * BLOCK, columns, columns, BLOCK)
        q_block = _origin(q_ptr, head, stride_qh, first, stride_q)
        gradient = dot(tl.trans(grads), _load_rows(q_block, i, stride_q, i < frames, dim_head, BLOCK_D), gradient)
    tl.store(target, gradient, mask=inside)
