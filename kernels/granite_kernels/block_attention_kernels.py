"""The kernels of block attention: the forward, and three kernels without atomics for the backward.

The relative bias is never in memory. The queries and keys of a block are cut into tiles of B frames, and the distances between
frames into bands of B: distance d = δ·B + r is at place r of band δ. A query tile m and a key tile n, with δ = m − n, need the
bands δ and δ − 1. Query place a and key place b have r = (a − b) mod B, in band δ if b ≤ a and in band δ − 1 otherwise, so
each (a, r) belongs to one of the two bands. The bias of a tile is therefore q · bandᵀ for both bands, one of the two values
selected for each (a, r), and `_mirror` along the rows, which moves it from place r to place b. `_mirror` is its own inverse, so
the gradient goes back the same way. A query tile meets each band twice on its way along the keys, and computes it once.
"""

import triton
import triton.language as tl

from granite_kernels.primitives import INTERPRETED, dot, locate, rounded

LOG2_E = tl.constexpr(1.4426950408889634)
# Sizes that depend on the batch and not on the model, and arguments that no address depends on.
VARYING = ["total_frames", "num_clips", "num_slots", "slots_per_chunk", "context_size", "max_pos_emb", "scale"]


@triton.jit
def _swap_bit(bits, BIT: tl.constexpr):
    """One step of `_swap_mirror`."""
    B: tl.constexpr = bits.shape[0]
    bits = tl.reshape(bits, (B, B // (2 * BIT), 2, BIT))
    # The xor of a pair with one of the two is the other. It compiles to an exchange.
    partner = bits ^ tl.xor_sum(bits, 2, keep_dims=True)
    a = tl.arange(0, B)[:, None]
    differs = ((a & BIT) != 0) ^ ((a & (BIT - 1)) < tl.arange(0, BIT)[None, :])
    return tl.reshape(tl.where(differs[:, None, None, :], partner, bits), (B, B))


@triton.jit
def _swap_mirror(x):
    """x[a, (a − b) mod B] at (a, b) of a float32 (B, B) tile, in registers.

    One bit at a time, from the highest: bit k of a − r is the xor of bit k of a, bit k of r, and the borrow from the lower bits.
    Each step selects an element or the one whose column differs in that bit, which is in another register or a neighbouring
    lane. `tl.gather` would send the tile through shared memory, or need one shuffle per source register.
    """
    B: tl.constexpr = x.shape[0]
    bits = x.to(tl.int32, bitcast=True)
    for step in tl.static_range(1, 8):
        if B >> step > 0:
            bits = _swap_bit(bits, B >> step)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _mirror(x):
    """x[a, (a − b) mod B] at (a, b) of a (B, B) tile: from place in a band to place of the key, and back."""
    if INTERPRETED:  # the interpreter computes xor_sum one element at a time
        B: tl.constexpr = x.shape[0]
        a = tl.arange(0, B)
        return tl.gather(x, (a[:, None] - a[None, :]) & (B - 1), 1)
    return _swap_mirror(x)


@triton.jit
def _in_upper_band(BLOCK: tl.constexpr):
    """(place of the query, place in the band): True where a pair of tiles with difference δ needs band δ, False for δ − 1."""
    a = tl.arange(0, BLOCK)
    return a[None, :] <= a[:, None]


@triton.jit
def _find_block(slot, cu_seqlens_ptr, num_clips, total_frames, context_size):
    """(first frame, rows to write, existing frames) of a block. A padding block has no frames, an idle slot no rows."""
    clip, start, end, number = locate(slot, cu_seqlens_ptr, num_clips, total_frames, context_size)
    first = start + number * context_size
    rows = tl.minimum(end - first, context_size)
    return first, rows, tl.where(clip < num_clips, tl.maximum(rows, 0), 0)


@triton.jit
def _origin(ptr, head, stride_head, first, stride):
    """The first frame of a block and head. From here, 32-bit offsets reach every row and save registers."""
    return ptr + head.to(tl.int64) * stride_head + first.to(tl.int64) * stride


@triton.jit
def _load_rows(ptr, rows, stride, exists, dim_head, BLOCK_D: tl.constexpr):
    """(rows, BLOCK_D) of a matrix (…, dim_head) with row stride `stride`; zeros in rows that do not exist and past dim_head."""
    d = tl.arange(0, BLOCK_D)
    return tl.load(ptr + rows[:, None] * stride + d[None, :], mask=exists[:, None] & (d < dim_head)[None, :], other=0.0)


@triton.jit
def _band(band, max_pos_emb, frames, BLOCK: tl.constexpr):
    """The rows of rel_pos_emb of one band, and whether their distances occur among `frames` frames."""
    distance = band * BLOCK + tl.arange(0, BLOCK)
    return distance + max_pos_emb, (distance < frames) & (distance > -frames)


@triton.jit
def _products(a_ptr, a_rows, a_stride, a_exists, b_ptr, b_rows, b_stride, b_exists, dim_head, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """a · bᵀ of two tiles of rows, read STEP features at a time because the registers cannot hold all of them."""
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, dim_head, STEP):
        a = _load_rows(a_ptr + start, a_rows, a_stride, a_exists, dim_head - start, STEP)
        b = _load_rows(b_ptr + start, b_rows, b_stride, b_exists, dim_head - start, STEP)
        acc = dot(a, tl.trans(b), acc)
    return acc


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
def _block_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, e_ptr, cu_seqlens_ptr, out_ptr, rest_ptr, lse_ptr,
    total_frames, num_clips, num_heads, dim_head, context_size, max_pos_emb, scale,
    stride_q, stride_qh, stride_k, stride_kh, stride_v, stride_vh, stride_e,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The result for BLOCK queries of one block and head, by online softmax over tiles of BLOCK keys.

    Grid: slots · num_heads · query tiles of a block, query tiles fastest, so that programs with the same keys run together.
    q, k, v (total_frames, num_heads, dim_head), strides given; e = rel_pos_emb (2 · max_pos_emb + 1, dim_head), stride_e;
    cu_seqlens (num_clips + 1,); out (total_frames, num_heads, dim_head), contiguous. scale includes log2(e). If a backward
    follows: rest, like out, for the rounding error of out (None in float32), and lse (num_heads, total_frames) float32, the
    base-2 log-sum-exp of each row of scores. Otherwise both are None.
    """
    tiles = tl.cdiv(context_size, BLOCK)
    m = tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles % num_heads
    first, to_write, frames = _find_block(tl.program_id(0) // tiles // num_heads, cu_seqlens_ptr, num_clips, total_frames, context_size)
    if m * BLOCK < to_write:
        place = tl.arange(0, BLOCK)
        i = m * BLOCK + place
        q_ptr = _origin(q_ptr, head, stride_qh, first, stride_q)
        k_ptr = _origin(k_ptr, head, stride_kh, first, stride_k)
        v_ptr = _origin(v_ptr, head, stride_vh, first, stride_v)
        if STEP == BLOCK_D:
            q = _load_rows(q_ptr, i, stride_q, i < frames, dim_head, BLOCK_D)
        e, has_e = _band(m, max_pos_emb, frames, BLOCK)
        upper = _products(q_ptr, i, stride_q, i < frames, e_ptr, e, stride_e, has_e, dim_head, BLOCK, STEP)
        acc = tl.zeros((BLOCK, BLOCK_D), tl.float32)
        m_i = tl.full((BLOCK,), float("-inf"), tl.float32)
        l_i = tl.zeros((BLOCK,), tl.float32)
        for n in range(0, tl.cdiv(frames, BLOCK)):
            j = n * BLOCK + place
            e, has_e = _band(m - n - 1, max_pos_emb, frames, BLOCK)
            if STEP == BLOCK_D:  # q stays in registers
                lower = dot(q, tl.trans(_load_rows(e_ptr, e, stride_e, has_e, dim_head, BLOCK_D)), None)
                scores = dot(q, tl.trans(_load_rows(k_ptr, j, stride_k, j < frames, dim_head, BLOCK_D)), None)
            else:
                lower = _products(q_ptr, i, stride_q, i < frames, e_ptr, e, stride_e, has_e, dim_head, BLOCK, STEP)
                scores = _products(q_ptr, i, stride_q, i < frames, k_ptr, j, stride_k, j < frames, dim_head, BLOCK, STEP)
            bias = _mirror(tl.where(_in_upper_band(BLOCK), upper, lower))
            upper = lower
            scores = tl.where((j < frames)[None, :], (scores + bias) * scale, float("-inf"))
            m_new = tl.maximum(m_i, tl.max(scores, 1))  # finite: every tile has at least one key
            weights = tl.exp2(scores - m_new[:, None])
            alpha = tl.exp2(m_i - m_new)
            l_i = l_i * alpha + tl.sum(weights, 1)
            v = _load_rows(v_ptr, j, stride_v, j < frames, dim_head, BLOCK_D)
            acc = dot(rounded(weights, v.dtype), v, acc * alpha[:, None])
            m_i = m_new
        l_i = tl.where(l_i == 0, 1.0, l_i)  # padding has no keys, and its result is zero
        out = acc / l_i[:, None]
        row = num_heads * dim_head
        narrow = rounded(out, out_ptr.dtype.element_ty)
        d = tl.arange(0, BLOCK_D)
        target = i[:, None] * row + d[None, :]
        mask = (i < to_write)[:, None] & (d < dim_head)[None, :]
        tl.store(_origin(out_ptr, head, dim_head, first, row) + target, narrow, mask=mask)
        if rest_ptr is not None:
            tl.store(
                _origin(rest_ptr, head, dim_head, first, row) + target,
                rounded(out - narrow.to(tl.float32), out_ptr.dtype.element_ty),
                mask=mask,
            )
        if lse_ptr is not None:
            tl.store(lse_ptr + head.to(tl.int64) * total_frames + first + i, m_i + tl.log2(l_i), mask=i < to_write)


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
