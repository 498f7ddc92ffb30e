"""The kernel of block attention's forward, and the device functions that it shares with the backward.

The relative bias is never in memory. The queries of a block are cut into tiles, its keys into tiles of N frames, and the distances
between frames into bands of N. For one tile of queries and one of keys, q · bandᵀ has the biases of all rows, but by distance: the
bias of query place a and key place b is in the column of distance a − b. A step along the keys needs one new band, and keeps the one
before it. There are two ways from distances to keys, both in registers, one bit of a row's place at a time:

- Mirror (also in the backward). Tiles of queries are N frames too. Distance d = δ·N + r is at place r of band δ. Query tile m and key
  tile n, with δ = m − n, need the bands δ and δ − 1. r = (a − b) mod N, in band δ if b ≤ a and in band δ − 1 otherwise. So a value of
  one of the two bands is selected for each (a, r), and `_mirror` along the rows moves it from place r to place b. `_mirror` is its own
  inverse, so the gradient goes back the same way.
- Slide. Bands are in descending order of distance, so that row a of the kept band and the new one, side by side, has the biases of
  all keys in order, N − 1 − a columns from the left. `_slide` moves each row by that much, selecting by bits of the row alone, in
  fewer instructions and registers than the mirror. It works for tiles of 2N queries too: the lower half of the queries is N distances
  further, so its new band is the one that the upper half had a step ago.
"""

import triton
import triton.language as tl

from granite_kernels.primitives import INTERPRETED, dot, rounded

LOG2_E = tl.constexpr(1.4426950408889634)
# Sizes that depend on the batch and not on the model, and arguments that no address depends on.
VARYING = ["total_frames", "context_size", "max_pos_emb", "scale"]
# The forms of the forward, a constant of its tile: see above. In JOINT, K and the new band are one operand of one product.
MIRROR, SLIDE, JOINT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _exchange(bits, moves, BIT: tl.constexpr):
    """Exchanges elements whose columns differ in BIT alone, where `moves` (rows, BIT): by row and by the lower bits of the column."""
    M: tl.constexpr = bits.shape[0]
    N: tl.constexpr = bits.shape[1]
    bits = tl.reshape(bits, (M, N // (2 * BIT), 2, BIT))
    # The xor of a pair with one of the two is the other. It compiles to an exchange of registers, or with a neighbouring lane.
    partner = bits ^ tl.xor_sum(bits, 2, keep_dims=True)
    return tl.reshape(tl.where(moves[:, None, None, :], partner, bits), (M, N))


@triton.jit
def _swap_mirror(x):
    """x[a, (a − b) mod B] at (a, b) of a float32 (B, B) tile, in registers.

    One bit at a time, from the highest: bit k of a − r is the xor of bit k of a, bit k of r, and the borrow from the lower bits.
    `tl.gather` would send the tile through shared memory, or need one shuffle per source register.
    """
    B: tl.constexpr = x.shape[0]
    a = tl.arange(0, B)[:, None]
    bits = x.to(tl.int32, bitcast=True)
    for step in tl.static_range(1, 8):
        if B >> step > 0:
            borrow = (a & ((B >> step) - 1)) < tl.arange(0, B >> step)[None, :]
            bits = _exchange(bits, ((a & (B >> step)) != 0) ^ borrow, B >> step)
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
def _halves(x):
    """The left and the right half of the columns."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _beside(left, right):
    """Two tiles of the same shape side by side."""
    return tl.reshape(tl.permute(tl.join(left, right), (0, 2, 1)), (left.shape[0], 2 * left.shape[1]))


@triton.jit
def _barrel_slide(left, right, shift):
    """`_slide` in registers.

    A barrel shifter: for each bit of `shift` from the highest, rows that have it take the columns that are so much further right. The
    columns that no later step can reach are dropped, so the steps get narrower. Bits from 8 on are whole registers of a matrix
    product's result. The last three are a rotation of 8 columns, after selecting those that come from the next 8.
    """
    N: tl.constexpr = left.shape[1]
    parts = (left.to(tl.int32, bitcast=True), right.to(tl.int32, bitcast=True))
    for step in tl.static_range(1, 8):
        if N >> step >= 8:
            further = ((shift & (N >> step)) != 0)[:, None]
            halves = ()
            for i in tl.static_range(len(parts)):
                halves += _halves(parts[i])
            parts = ()
            for i in tl.static_range(len(halves) - 1):
                parts += (tl.where(further, halves[i + 1], halves[i]),)
    last = (shift & 7)[:, None]
    groups = ()
    for i in tl.static_range(len(parts) - 1):
        bits = tl.where(tl.arange(0, 8)[None, :] < last, parts[i + 1], parts[i])
        for step in tl.static_range(1, 4):
            borrow = tl.arange(0, 8 >> step)[None, :] < (last & ((8 >> step) - 1))
            bits = _exchange(bits, ((last & (8 >> step)) != 0) ^ borrow, 8 >> step)
        groups += (bits,)
    for _ in tl.static_range(0, 5):
        if len(groups) > 1:
            pairs = ()
            for i in tl.static_range(len(groups) // 2):
                pairs += (_beside(groups[2 * i], groups[2 * i + 1]),)
            groups = pairs
    return groups[0].to(tl.float32, bitcast=True)


@triton.jit
def _slide(left, right, shift):
    """Column b + shift[a] of [left | right] at (a, b). Both are float32 (M, N) with N ≥ 16, shift (M,) is 0 to N − 1."""
    if INTERPRETED:  # as in `_mirror`
        return tl.gather(_beside(left, right), shift[:, None] + tl.arange(0, left.shape[1])[None, :], 1)
    return _barrel_slide(left, right, shift)


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
def _load_existing(ptr, rows, stride, dim_head, BLOCK_D: tl.constexpr):
    """`_load_rows` of rows that all exist: without a mask, which would take two more instructions for each load."""
    d = tl.arange(0, BLOCK_D)
    return tl.load(ptr + rows[:, None] * stride + d[None, :], mask=(d < dim_head)[None, :], other=0.0)


@triton.jit
def _occurring(distance, frames):
    """The nearest distance that occurs among `frames` frames: others are not read, and no pair of frames needs them."""
    return tl.minimum(tl.maximum(distance, 1 - frames), frames - 1)


@triton.jit
def _distances(start, frames, N: tl.constexpr, FORM: tl.constexpr):
    """The distances of the band of N from `start` on, in the order of the form's columns."""
    place = tl.arange(0, N)
    return _occurring(start + place if FORM == MIRROR else start + N - 1 - place, frames)


@triton.jit
def _product(q, q_ptr, i, stride_q, ptr, rows, stride, dim_head, BLOCK_D: tl.constexpr, STEP: tl.constexpr):
    """q · rowsᵀ. With STEP < BLOCK_D, q is read again, STEP features at a time, because the registers cannot hold all of them."""
    if STEP == BLOCK_D:
        acc = dot(q, tl.trans(_load_existing(ptr, rows, stride, dim_head, BLOCK_D)), None)
    else:
        acc = tl.zeros((i.shape[0], rows.shape[0]), tl.float32)
        for start in range(0, dim_head, STEP):
            part = _load_existing(q_ptr + start, i, stride_q, dim_head - start, STEP)
            acc = dot(part, tl.trans(_load_existing(ptr + start, rows, stride, dim_head - start, STEP)), acc)
    return acc


@triton.jit
def _first_bands(
    q, q_ptr, i, stride_q, e_ptr, distances, stride_e, dim_head, KEYS: tl.constexpr, BLOCK_D: tl.constexpr, STEP: tl.constexpr
):
    """What the first step along the keys finds: the product of the band that it keeps, and that of the band before its new one."""
    BLOCK: tl.constexpr = i.shape[0]
    if STEP == BLOCK_D:
        e = tl.trans(_load_existing(e_ptr, distances, stride_e, dim_head, BLOCK_D))
        product = tl.zeros((BLOCK, BLOCK), tl.float32)
        # One pass. Outside a loop, the operands would keep their shared memory until the end of the kernel.
        for _ in tl.range(0, dim_head, BLOCK_D, num_stages=1):
            product = dot(q, e, product)
    else:
        product = _product(q, q_ptr, i, stride_q, e_ptr, distances, stride_e, dim_head, BLOCK_D, STEP)
    kept, earlier = product, product
    if BLOCK > KEYS:
        tl.static_assert(BLOCK == 2 * KEYS)
        far, earlier = _halves(product)
        kept = tl.where((tl.arange(0, BLOCK) < KEYS)[:, None], earlier, far)
    return kept, earlier


@triton.jit
def _joint_product(
    q, k_ptr, stride_k, e_ptr, stride_e, first_key, first_query, frames, dim_head, KEYS: tl.constexpr, BLOCK_D: tl.constexpr
):
    """(q · keysᵀ, q · bandᵀ) in one product: KEYS rows of k, then KEYS rows of e."""
    place = tl.arange(0, 2 * KEYS)
    is_key = (place < KEYS)[:, None]
    j = first_key + place
    keys = k_ptr + tl.minimum(j, frames - 1)[:, None] * stride_k
    band = e_ptr + _occurring(first_query + KEYS - 1 - j, frames)[:, None] * stride_e
    d = tl.arange(0, BLOCK_D)
    both = tl.load(tl.where(is_key, keys, band) + d[None, :], mask=(d < dim_head)[None, :], other=0.0)
    return _halves(dot(q, tl.trans(both), None))


@triton.jit
def _bias(kept, new, FORM: tl.constexpr):
    """The biases by place of the key, from the two bands of a step."""
    BLOCK: tl.constexpr = new.shape[0]
    KEYS: tl.constexpr = new.shape[1]
    if FORM == MIRROR:
        return _mirror(tl.where(_in_upper_band(BLOCK), kept, new))
    return _slide(kept, new, ~tl.arange(0, BLOCK) & (KEYS - 1))


@triton.jit(do_not_specialize=VARYING)
def _block_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, e_ptr, blocks_ptr, out_ptr, rest_ptr, lse_ptr,
    total_frames, num_heads, dim_head, context_size, max_pos_emb, scale,
    stride_q, stride_qh, stride_k, stride_kh, stride_v, stride_vh, stride_e,
    FORM: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr, BLOCK_D: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The result for BLOCK queries of one block and head, by online softmax over tiles of KEYS keys.

    Grid: (query tiles of a block, num_heads, slots). Programs with the same keys run together.
    q, k, v (total_frames, num_heads, dim_head), strides given; e = rel_pos_emb (2 · max_pos_emb + 1, dim_head), stride_e;
    blocks (slots, 3) int32: first frame, rows to write, frames that exist; out (total_frames, num_heads, dim_head), contiguous.
    scale includes log2(e). If a backward follows: rest, like out, for the rounding error of out (None in float32), and lse
    (num_heads, total_frames) float32, the base-2 log-sum-exp of each row of scores. Otherwise both are None.
    """
    m = tl.program_id(0)
    head = tl.program_id(1)
    blocks_ptr += tl.program_id(2) * 3
    first = tl.load(blocks_ptr)
    to_write = tl.load(blocks_ptr + 1)
    frames = tl.load(blocks_ptr + 2)
    if m * BLOCK < to_write:
        a = tl.arange(0, BLOCK)
        b = tl.arange(0, KEYS)
        q_ptr = _origin(q_ptr, head, stride_qh, first, stride_q)
        k_ptr = _origin(k_ptr, head, stride_kh, first, stride_k)
        v_ptr = _origin(v_ptr, head, stride_vh, first, stride_v)
        e_ptr += max_pos_emb * stride_e  # at distance 0
        # A frame that does not exist is read as the last one that does. Its scores are masked, and its result is not written.
        i = tl.minimum(m * BLOCK + a, to_write - 1)
        q = _load_existing(q_ptr, i, stride_q, dim_head, BLOCK_D)
        nearest = _distances(m * BLOCK, frames, BLOCK, FORM)
        kept, earlier = _first_bands(q, q_ptr, i, stride_q, e_ptr, nearest, stride_e, dim_head, KEYS, BLOCK_D, STEP)
        acc = tl.zeros((BLOCK, BLOCK_D), tl.float32)
        m_i = tl.full((BLOCK,), float("-inf"), tl.float32)
        l_i = tl.zeros((BLOCK,), tl.float32)
        for n in range(0, tl.cdiv(frames, KEYS)):
            j = n * KEYS + b
            rows = tl.minimum(j, frames - 1)
            if FORM == JOINT:
                scores, band = _joint_product(q, k_ptr, stride_k, e_ptr, stride_e, n * KEYS, m * BLOCK, frames, dim_head, KEYS, BLOCK_D)
            else:
                distances = _distances(m * BLOCK - (n + 1) * KEYS, frames, KEYS, FORM)
                band = _product(q, q_ptr, i, stride_q, e_ptr, distances, stride_e, dim_head, BLOCK_D, STEP)
                scores = _product(q, q_ptr, i, stride_q, k_ptr, rows, stride_k, dim_head, BLOCK_D, STEP)
            new = band
            if BLOCK > KEYS:
                new = tl.where((a < KEYS)[:, None], band, earlier)
                earlier = band
            bias = _bias(kept, new, FORM)
            kept = new
            scores = (scores + bias) * scale + tl.where(j < frames, 0.0, float("-inf"))[None, :]
            m_new = tl.maximum(m_i, tl.max(scores, 1))  # finite: every tile has at least one key
            weights = tl.exp2(scores - m_new[:, None])
            alpha = tl.exp2(m_i - m_new)
            l_i = l_i * alpha + tl.sum(weights, 1)
            v = _load_existing(v_ptr, rows, stride_v, dim_head, BLOCK_D)
            acc = dot(rounded(weights, v.dtype), v, acc * alpha[:, None])
            m_i = m_new
        l_i = tl.where(l_i == 0, 1.0, l_i)  # padding has no keys, and its result is zero
        out = acc * (1.0 / l_i)[:, None]
        i = m * BLOCK + a
        row = num_heads * dim_head
        narrow = rounded(out, out_ptr.dtype.element_ty)
        d = tl.arange(0, BLOCK_D)
        target = i[:, None] * row + d[None, :]
        mask = (i < to_write)[:, None] & (d < dim_head)[None, :]
        tl.store(_origin(out_ptr, head, dim_head, first, row) + target, narrow, mask=mask)
        if rest_ptr is not None:
            rest = rounded(out - narrow.to(tl.float32), out_ptr.dtype.element_ty)
            tl.store(_origin(rest_ptr, head, dim_head, first, row) + target, rest, mask=mask)
        if lse_ptr is not None:
            tl.store(lse_ptr + head.to(tl.int64) * total_frames + first + i, m_i + tl.log2(l_i), mask=i < to_write)
