"""The backward of block attention: three kernels without atomics. `block_attention_kernels` says how bands become biases."""

import triton
import triton.language as tl

from granite_kernels.block_attention_kernels import (
    LOG2_E,
    VARYING,
    _band,
    _find_block,
    _in_upper_band,
    _load_rows,
    _mirror,
    _origin,
    _products,
)
from granite_kernels.primitives import dot, rounded


@triton.jit
def _score_gradient(
    q_ptr, i, stride_q, queries, grad_out_ptr, stride_grad_out, k_ptr, j, stride_k, keys, v_ptr, stride_v,
    upper, lower, lse, delta, scale, dim_head, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """(softmax weights, d loss / d scaled score) of one tile; both exactly zero for pairs that do not exist.

    The pointers are at one block and head. i and j are frames of the block; queries and keys say which of them exist. upper and
    lower are q · bandᵀ; lse is in base 2; delta is Σ_d grad_out · out.
    """
    exists = queries[:, None] & keys[None, :]
    bias = _mirror(tl.where(_in_upper_band(BLOCK), upper, lower))
    scores = (_products(q_ptr, i, stride_q, queries, k_ptr, j, stride_k, keys, dim_head, BLOCK, STEP) + bias) * (scale * LOG2_E)
    weights = tl.where(exists, tl.exp2(scores - lse[:, None]), 0.0)
    grad_weights = _products(grad_out_ptr, i, stride_grad_out, queries, v_ptr, j, stride_v, keys, dim_head, BLOCK, STEP)
    return weights, tl.where(exists, weights * (grad_weights - delta[:, None]), 0.0)


@triton.jit(do_not_specialize=VARYING)
def _block_attention_bwd_q_kernel(
    q_ptr, k_ptr, v_ptr, e_ptr, cu_seqlens_ptr, out_ptr, rest_ptr, grad_out_ptr, lse_ptr, delta_ptr, grad_q_ptr,
    total_frames, num_clips, num_heads, dim_head, context_size, max_pos_emb, scale,
    stride_q, stride_qh, stride_k, stride_kh, stride_v, stride_vh, stride_e,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The gradient of BLOCK queries of one block and head, and their delta, which the other two kernels read.

    Grid and inputs as in the forward kernel. out, rest, grad_out, grad_q (total_frames, num_heads, dim_head), contiguous; delta
    (num_heads, total_frames) float32.
    """
    tiles = tl.cdiv(context_size, BLOCK)
    m = tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles % num_heads
    first, to_write, frames = _find_block(tl.program_id(0) // tiles // num_heads, cu_seqlens_ptr, num_clips, total_frames, context_size)
    if m * BLOCK < to_write:
        place = tl.arange(0, BLOCK)
        i = m * BLOCK + place
        row = num_heads * dim_head
        dtype: tl.constexpr = q_ptr.dtype.element_ty
        q_ptr = _origin(q_ptr, head, stride_qh, first, stride_q)
        k_ptr = _origin(k_ptr, head, stride_kh, first, stride_k)
        v_ptr = _origin(v_ptr, head, stride_vh, first, stride_v)
        grad_out_ptr = _origin(grad_out_ptr, head, dim_head, first, row)
        grad_out = _load_rows(grad_out_ptr, i, row, i < frames, dim_head, BLOCK_D)
        out = _load_rows(_origin(out_ptr, head, dim_head, first, row), i, row, i < frames, dim_head, BLOCK_D)
        exact = out.to(tl.float32)
        if rest_ptr is not None:  # delta is subtracted from gradients, where the rounding error of out would show
            exact += _load_rows(_origin(rest_ptr, head, dim_head, first, row), i, row, i < frames, dim_head, BLOCK_D).to(tl.float32)
        delta = tl.sum(grad_out.to(tl.float32) * exact, 1)
        of_head = head.to(tl.int64) * total_frames + first + i
        tl.store(delta_ptr + of_head, delta, mask=i < to_write)
        lse = tl.load(lse_ptr + of_head, mask=i < frames, other=0.0)
        e, has_e = _band(m, max_pos_emb, frames, BLOCK)
        upper = _products(q_ptr, i, stride_q, i < frames, e_ptr, e, stride_e, has_e, dim_head, BLOCK, STEP)
        grad_q = tl.zeros((BLOCK, BLOCK_D), tl.float32)
        # Gradients of the band shared with the previous key tile, by place in the band.
        pending = tl.zeros((BLOCK, BLOCK), dtype)
        for n in range(0, tl.cdiv(frames, BLOCK)):
            j = n * BLOCK + place
            e, has_e = _band(m - n - 1, max_pos_emb, frames, BLOCK)
            lower = _products(q_ptr, i, stride_q, i < frames, e_ptr, e, stride_e, has_e, dim_head, BLOCK, STEP)
            grad = _score_gradient(
                q_ptr, i, stride_q, i < frames, grad_out_ptr, row, k_ptr, j, stride_k, j < frames, v_ptr, stride_v,
                upper, lower, lse, delta, scale, dim_head, BLOCK, STEP,
            )[1]  # fmt: skip
            upper = lower
            k = _load_rows(k_ptr, j, stride_k, j < frames, dim_head, BLOCK_D)
            grad_q = dot(rounded(grad, dtype), k, grad_q)
            by_place = rounded(_mirror(grad), dtype)
            e, has_e = _band(m - n, max_pos_emb, frames, BLOCK)
            band = _load_rows(e_ptr, e, stride_e, has_e, dim_head, BLOCK_D)
            grad_q = dot(tl.where(_in_upper_band(BLOCK), by_place, pending), band, grad_q)
            pending = by_place
        e, has_e = _band(m - tl.cdiv(frames, BLOCK), max_pos_emb, frames, BLOCK)
        band = _load_rows(e_ptr, e, stride_e, has_e, dim_head, BLOCK_D)
        grad_q = dot(tl.where(_in_upper_band(BLOCK), 0.0, pending), band, grad_q)
        d = tl.arange(0, BLOCK_D)
        target = _origin(grad_q_ptr, head, dim_head, first, row) + i[:, None] * row + d[None, :]
        tl.store(target, rounded(grad_q * scale, dtype), mask=(i < to_write)[:, None] & (d < dim_head)[None, :])


@triton.jit(do_not_specialize=VARYING)
def _block_attention_bwd_kv_kernel(
    q_ptr, k_ptr, v_ptr, e_ptr, cu_seqlens_ptr, grad_out_ptr, lse_ptr, delta_ptr, grad_k_ptr, grad_v_ptr,
    total_frames, num_clips, num_heads, dim_head, context_size, max_pos_emb, scale,
    stride_q, stride_qh, stride_k, stride_kh, stride_v, stride_vh, stride_e,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The gradients of BLOCK keys and values of one block and head.

    Grid: slots · num_heads · key tiles of a block, key tiles fastest. Inputs as in the other kernels. grad_k, grad_v
    (total_frames, num_heads, dim_head), contiguous.
    """
    tiles = tl.cdiv(context_size, BLOCK)
    n = tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles % num_heads
    first, to_write, frames = _find_block(tl.program_id(0) // tiles // num_heads, cu_seqlens_ptr, num_clips, total_frames, context_size)
    if n * BLOCK < to_write:
        place = tl.arange(0, BLOCK)
        j = n * BLOCK + place
        row = num_heads * dim_head
        dtype: tl.constexpr = q_ptr.dtype.element_ty
        q_ptr = _origin(q_ptr, head, stride_qh, first, stride_q)
        k_ptr = _origin(k_ptr, head, stride_kh, first, stride_k)
        v_ptr = _origin(v_ptr, head, stride_vh, first, stride_v)
        grad_out_ptr = _origin(grad_out_ptr, head, dim_head, first, row)
        grad_k = tl.zeros((BLOCK, BLOCK_D), tl.float32)
        grad_v = tl.zeros((BLOCK, BLOCK_D), tl.float32)
        for m in range(0, tl.cdiv(frames, BLOCK)):
            i = m * BLOCK + place
            of_head = head.to(tl.int64) * total_frames + first + i
            lse = tl.load(lse_ptr + of_head, mask=i < frames, other=0.0)
            delta = tl.load(delta_ptr + of_head, mask=i < frames, other=0.0)
            e, has_e = _band(m - n, max_pos_emb, frames, BLOCK)
            upper = _products(q_ptr, i, stride_q, i < frames, e_ptr, e, stride_e, has_e, dim_head, BLOCK, STEP)
            e, has_e = _band(m - n - 1, max_pos_emb, frames, BLOCK)
            lower = _products(q_ptr, i, stride_q, i < frames, e_ptr, e, stride_e, has_e, dim_head, BLOCK, STEP)
            weights, grad = _score_gradient(
                q_ptr, i, stride_q, i < frames, grad_out_ptr, row, k_ptr, j, stride_k, j < frames, v_ptr, stride_v,
                upper, lower, lse, delta, scale, dim_head, BLOCK, STEP,
            )  # fmt: skip
            grad_out = _load_rows(grad_out_ptr, i, row, i < frames, dim_head, BLOCK_D)
            grad_v = dot(tl.trans(rounded(weights, dtype)), grad_out, grad_v)
            q = _load_rows(q_ptr, i, stride_q, i < frames, dim_head, BLOCK_D)
            grad_k = dot(tl.trans(rounded(grad, dtype)), q, grad_k)
        d = tl.arange(0, BLOCK_D)
        target = j[:, None] * row + d[None, :]
        mask = (j < to_write)[:, None] & (d < dim_head)[None, :]
        tl.store(_origin(grad_k_ptr, head, dim_head, first, row) + target, rounded(grad_k * scale, dtype), mask=mask)
        tl.store(_origin(grad_v_ptr, head, dim_head, first, row) + target, rounded(grad_v, dtype), mask=mask)


@triton.jit(do_not_specialize=VARYING)
def _block_attention_bwd_e_kernel(
    q_ptr, k_ptr, v_ptr, e_ptr, cu_seqlens_ptr, grad_out_ptr, lse_ptr, delta_ptr, partial_ptr,
    total_frames, num_clips, num_slots, slots_per_chunk, num_heads, dim_head, context_size, max_pos_emb, scale,
    stride_q, stride_qh, stride_k, stride_kh, stride_v, stride_vh, stride_e,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One partial gradient of rel_pos_emb: from all pairs of tiles with difference δ, in one head and chunk of blocks.

    Grid: (chunks, num_heads, 2 · tiles of a block − 1), where the last is δ + tiles − 1. Inputs as in the other kernels. partial
    (chunks, num_heads, 2 · tiles − 1, 2, BLOCK, dim_head) float32, contiguous: bands δ and δ − 1 for each δ.
    """
    tiles = tl.cdiv(context_size, BLOCK)
    chunk, head = tl.program_id(0), tl.program_id(1)
    difference = tl.program_id(2) - (tiles - 1)
    place = tl.arange(0, BLOCK)
    row = num_heads * dim_head
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    e_upper, has_upper = _band(difference, max_pos_emb, context_size, BLOCK)
    e_lower, has_lower = _band(difference - 1, max_pos_emb, context_size, BLOCK)
    grad_upper = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    grad_lower = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for slot in range(chunk * slots_per_chunk, tl.minimum((chunk + 1) * slots_per_chunk, num_slots)):
        first, _to_write, frames = _find_block(slot, cu_seqlens_ptr, num_clips, total_frames, context_size)
        existing = tl.cdiv(frames, BLOCK)
        for m in range(tl.maximum(difference, 0), tl.minimum(existing, existing + difference)):
            i = m * BLOCK + place
            j = (m - difference) * BLOCK + place
            q_block = _origin(q_ptr, head, stride_qh, first, stride_q)
            k_block = _origin(k_ptr, head, stride_kh, first, stride_k)
            v_block = _origin(v_ptr, head, stride_vh, first, stride_v)
            grad_out_block = _origin(grad_out_ptr, head, dim_head, first, row)
            of_head = head.to(tl.int64) * total_frames + first + i
            lse = tl.load(lse_ptr + of_head, mask=i < frames, other=0.0)
            delta = tl.load(delta_ptr + of_head, mask=i < frames, other=0.0)
            upper = _products(q_block, i, stride_q, i < frames, e_ptr, e_upper, stride_e, has_upper, dim_head, BLOCK, STEP)
            lower = _products(q_block, i, stride_q, i < frames, e_ptr, e_lower, stride_e, has_lower, dim_head, BLOCK, STEP)
            grad = _score_gradient(
                q_block, i, stride_q, i < frames, grad_out_block, row, k_block, j, stride_k, j < frames, v_block, stride_v,
                upper, lower, lse, delta, scale, dim_head, BLOCK, STEP,
            )[1]  # fmt: skip
            by_place = rounded(_mirror(grad), dtype)
            q = _load_rows(q_block, i, stride_q, i < frames, dim_head, BLOCK_D)
            in_upper = _in_upper_band(BLOCK)
            grad_upper = dot(tl.trans(tl.where(in_upper, by_place, 0.0)), q, grad_upper)
            grad_lower = dot(tl.trans(tl.where(in_upper, 0.0, by_place)), q, grad_lower)
    d = tl.arange(0, BLOCK_D)
    number = (chunk.to(tl.int64) * num_heads + head) * (2 * tiles - 1) + tl.program_id(2)
    target = partial_ptr + (number * 2 * BLOCK + place[:, None]) * dim_head + d[None, :]
    mask = (d < dim_head)[None, :]
    tl.store(target, grad_upper * scale, mask=mask)
    tl.store(target + BLOCK * dim_head, grad_lower * scale, mask=mask)
