"""The kernel of block attention's forward, and the device functions that it shares with the backward.

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
