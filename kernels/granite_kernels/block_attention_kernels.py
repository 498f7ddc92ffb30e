"""The kernels of block attention: the forward, and a backward of three without atomics.

The relative bias never exists in memory. Queries and keys of a block are cut into tiles of B frames, so the distances of a
query tile m and a key tile n begin at (m − n)·B; cut into bands of B distances, d = δ·B + r, a pair of tiles with
δ = m − n touches the bands δ (where the key's place b in its tile is at most the query's place a) and δ − 1 (where it is
beyond), and of each place r = (a − b) mod B in a band a query needs exactly one of the two. So q · bandᵀ for the two bands,
one value chosen for each (a, r), and `_mirror` along the rows give the bias of the tile; the gradient goes the same way
back, for the mirror is its own inverse. A query tile that walks along its keys meets each band twice and computes it once.
"""

import triton
import triton.language as tl

from granite_kernels.primitives import INTERPRETED, dot, locate, rounded

LOG2_E = tl.constexpr(1.4426950408889634)
# Sizes that a batch, not a model, decides, and what never steers an address.
VARYING = ["total_frames", "num_clips", "num_slots", "slots_per_chunk", "context_size", "max_pos_emb", "scale"]


@triton.jit
def _swap_bit(bits, BIT: tl.constexpr):
    """One step of `_swap_mirror`."""
    B: tl.constexpr = bits.shape[0]
    bits = tl.reshape(bits, (B, B // (2 * BIT), 2, BIT))
    # The sum of a pair without one of the two is the other; it compiles to an exchange.
    partner = bits ^ tl.xor_sum(bits, 2, keep_dims=True)
    a = tl.arange(0, B)[:, None]
    differs = ((a & BIT) != 0) ^ ((a & (BIT - 1)) < tl.arange(0, BIT)[None, :])
    return tl.reshape(tl.where(differs[:, None, None, :], partner, bits), (B, B))


@triton.jit
def _swap_mirror(x):
    """x[a, (a − b) mod B] at (a, b) of a float32 (B, B) tile, in registers.

    Bit by bit from the highest: bit k of a − r is bit k of a, of r, and the borrow from the bits below. Each step chooses
    between an element and the one whose column differs in that bit, which is another register or a neighbouring lane;
    `tl.gather` would take the tile through shared memory, or one shuffle for every source register.
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
    if INTERPRETED:  # which walks through an xor sum element by element
        B: tl.constexpr = x.shape[0]
        a = tl.arange(0, B)
        return tl.gather(x, (a[:, None] - a[None, :]) & (B - 1), 1)
    return _swap_mirror(x)


@triton.jit
def _in_upper_band(BLOCK: tl.constexpr):
    """(query's place, place in the band): whether a pair of tiles with difference δ needs band δ there; else it is δ − 1."""
    a = tl.arange(0, BLOCK)
    return a[None, :] <= a[:, None]


@triton.jit
def _find_block(slot, cu_seqlens_ptr, num_clips, total_frames, context_size):
    """(first frame, rows to write, frames that exist) of a block: no frame of a padding block exists, an idle slot has no row."""
    clip, start, end, number = locate(slot, cu_seqlens_ptr, num_clips, total_frames, context_size)
    first = start + number * context_size
    rows = tl.minimum(end - first, context_size)
    return first, rows, tl.where(clip < num_clips, tl.maximum(rows, 0), 0)


@triton.jit
def _origin(ptr, head, stride_head, first, stride):
    """The first frame of a block and head. From here on 32 bits reach every row, and spare the registers of wider addresses."""
    return ptr + head.to(tl.int64) * stride_head + first.to(tl.int64) * stride


@triton.jit
def _load_rows(ptr, rows, stride, exists, dim_head, BLOCK_D: tl.constexpr):
    """(rows, BLOCK_D) of a matrix (…, dim_head) whose row stride is given; zeros in rows that do not exist and past dim_head."""
    d = tl.arange(0, BLOCK_D)
    return tl.load(ptr + rows[:, None] * stride + d[None, :], mask=exists[:, None] & (d < dim_head)[None, :], other=0.0)


@triton.jit
def _band(band, max_pos_emb, frames, BLOCK: tl.constexpr):
    """The rows of rel_pos_emb of one band, and which of their distances `frames` frames have."""
    distance = band * BLOCK + tl.arange(0, BLOCK)
    return distance + max_pos_emb, (distance < frames) & (distance > -frames)


@triton.jit
def _products(a_ptr, a_rows, a_stride, a_exists, b_ptr, b_rows, b_stride, b_exists, dim_head, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """a · bᵀ of two tiles of rows, read STEP features at a time, for registers do not hold operands of them all."""
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, dim_head, STEP):
        a = _load_rows(a_ptr + start, a_rows, a_stride, a_exists, dim_head - start, STEP)
        b = _load_rows(b_ptr + start, b_rows, b_stride, b_exists, dim_head - start, STEP)
        total = dot(a, tl.trans(b), total)
    return total


@triton.jit
def _score_gradient(
    q_ptr, i, stride_q, queries, grad_out_ptr, stride_grad_out, k_ptr, j, stride_k, keys, v_ptr, stride_v,
    upper, lower, lse, delta, scale, dim_head, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """(softmax weights, d loss / d scaled score) of one tile; both exactly zero for pairs that do not exist.

    Pointers are a block's and head's, i and j its frames, queries and keys say which of them exist. upper and lower are
    q · bandᵀ; lse is in base 2; delta is Σ_d grad_out · out.
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
    """The result of BLOCK queries of one block and head, by online softmax over tiles of BLOCK keys.

    Grid: slots · num_heads · query tiles of a block, the last fastest, so that programs with the same keys run together.
    q, k, v (total_frames, num_heads, dim_head), strides given; e = rel_pos_emb (2 · max_pos_emb + 1, dim_head);
    cu_seqlens (num_clips + 1,); out (total_frames, num_heads, dim_head), contiguous. scale is in base 2. For a backward also rest,
    as out, what its rounding cut off (None in float32), and lse (num_heads, total_frames) float32, the base-2 logarithm of each
    softmax's denominator; else both None.
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
        out = tl.zeros((BLOCK, BLOCK_D), tl.float32)
        top = tl.full((BLOCK,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        for n in range(0, tl.cdiv(frames, BLOCK)):
            j = n * BLOCK + place
            e, has_e = _band(m - n - 1, max_pos_emb, frames, BLOCK)
            if STEP == BLOCK_D:  # q stays where it is
                lower = dot(q, tl.trans(_load_rows(e_ptr, e, stride_e, has_e, dim_head, BLOCK_D)), None)
                scores = dot(q, tl.trans(_load_rows(k_ptr, j, stride_k, j < frames, dim_head, BLOCK_D)), None)
            else:
                lower = _products(q_ptr, i, stride_q, i < frames, e_ptr, e, stride_e, has_e, dim_head, BLOCK, STEP)
                scores = _products(q_ptr, i, stride_q, i < frames, k_ptr, j, stride_k, j < frames, dim_head, BLOCK, STEP)
            bias = _mirror(tl.where(_in_upper_band(BLOCK), upper, lower))
            upper = lower
            scores = tl.where((j < frames)[None, :], (scores + bias) * scale, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, 1))  # finite from the first tile on: a tile has at least one key
            weights = tl.exp2(scores - higher[:, None])
            fade = tl.exp2(top - higher)
            total = total * fade + tl.sum(weights, 1)
            v = _load_rows(v_ptr, j, stride_v, j < frames, dim_head, BLOCK_D)
            out = dot(rounded(weights, v.dtype), v, out * fade[:, None])
            top = higher
        total = tl.where(total == 0, 1.0, total)  # padding has no keys, and zeros as its result
        out = out / total[:, None]
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
            tl.store(lse_ptr + head.to(tl.int64) * total_frames + first + i, top + tl.log2(total), mask=i < to_write)


@triton.jit(do_not_specialize=VARYING)
def _block_attention_bwd_q_kernel(
    q_ptr, k_ptr, v_ptr, e_ptr, cu_seqlens_ptr, out_ptr, rest_ptr, grad_out_ptr, lse_ptr, delta_ptr, grad_q_ptr,
    total_frames, num_clips, num_heads, dim_head, context_size, max_pos_emb, scale,
    stride_q, stride_qh, stride_k, stride_kh, stride_v, stride_vh, stride_e,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The gradient of BLOCK queries of one block and head; and their delta, which the other two kernels read.

    Grid, inputs: as the forward's. out, rest, grad_out, grad_q (total_frames, num_heads, dim_head), contiguous; delta
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
        if rest_ptr is not None:  # a gradient is a difference from delta: the rounding of out would show in it
            exact += _load_rows(_origin(rest_ptr, head, dim_head, first, row), i, row, i < frames, dim_head, BLOCK_D).to(tl.float32)
        delta = tl.sum(grad_out.to(tl.float32) * exact, 1)
        of_head = head.to(tl.int64) * total_frames + first + i
        tl.store(delta_ptr + of_head, delta, mask=i < to_write)
        lse = tl.load(lse_ptr + of_head, mask=i < frames, other=0.0)
        e, has_e = _band(m, max_pos_emb, frames, BLOCK)
        upper = _products(q_ptr, i, stride_q, i < frames, e_ptr, e, stride_e, has_e, dim_head, BLOCK, STEP)
        grad_q = tl.zeros((BLOCK, BLOCK_D), tl.float32)
        # Of the band that the last tile began: gradients by place in the band.
        begun = tl.zeros((BLOCK, BLOCK), dtype)
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
            grad_q = dot(tl.where(_in_upper_band(BLOCK), by_place, begun), band, grad_q)
            begun = by_place
        e, has_e = _band(m - tl.cdiv(frames, BLOCK), max_pos_emb, frames, BLOCK)
        band = _load_rows(e_ptr, e, stride_e, has_e, dim_head, BLOCK_D)
        grad_q = dot(tl.where(_in_upper_band(BLOCK), 0.0, begun), band, grad_q)
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

    Grid: slots · num_heads · key tiles of a block, the last fastest. Inputs: as the other kernels'. grad_k, grad_v
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
    """What the pairs of tiles with one difference, of one head and a chunk of blocks, give to the two bands that they touch.

    Grid: (chunks, num_heads, 2 · tiles of a block − 1). Inputs: as the other kernels'. partial (chunks, num_heads,
    2 · tiles − 1, 2, BLOCK, dim_head) float32, contiguous: bands δ and δ − 1 for δ from 1 − tiles on.
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
