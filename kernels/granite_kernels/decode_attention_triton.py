"""`decode_attention` in Triton: one launch from the q|k|v product to attention's result.

The keys of a row are cut into pieces of PIECE, one tile each. Several programs share the pieces of a row and a group of query heads;
each writes the softmax states of its pieces, and the last of them to arrive merges all states in order. If one program has all
pieces, it merges them in registers. Both give the same bits, which depend on the row's own keys alone. The states and their merging
are those of `paged_attention`'s decode kernel, so with equal pieces and tiles the bits are too.

A decode step waits for this kernel, which moves few bytes. So everything that is known early is loaded before it waits for the
launch before it.
"""

import math

import torch
import triton
import triton.language as tl

from granite_kernels.launch import ARCHITECTURES, MULTIPROCESSORS, Tile, architecture, launch, launching, register
from granite_kernels.paged_attention_triton import DECODE_ROWS, _group_size, _merge_states, _normalised
from granite_kernels.primitives import await_inputs, dot, rounded
from granite_kernels.rotary_write_triton import exchanged, partner_of, projection_arguments, projection_blocks, rotation
from granite_kernels.tiles import TileTable, predicted

# Keys per piece and tile. A row's bits depend on this alone.
_PIECE = 64


def _tile(num_warps: int, fill: int = 2) -> Tile:
    """FILL is the launcher's: the programs per multiprocessor up to which several programs share a row's pieces."""
    return Tile({"PIECE": _PIECE, "FILL": fill}, num_warps)


# By bytes per element and model: a thread holds keys and values of two pieces. In other models, whose heads are not a power of two or
# whose pages do not hold whole pieces, their addresses and masks need more registers. Chosen from the compiled code.
_TILES = TileTable(
    "decode_attention",
    "forward",
    {
        (chip, width, model): predicted(_tile(warps), "2026-11-27")
        for chip in ARCHITECTURES
        for (width, model), warps in {(2, "usual"): 4, (4, "usual"): 8, (2, "other"): 8, (4, "other"): 8}.items()
    },
    candidates=lambda key: [_tile(warps, fill) for warps in ((4, 8) if key[1:] == (2, "usual") else (8,)) for fill in (1, 2, 4)],
    bits=("PIECE",),
)
# Arguments that Triton does not specialise on.
_SIZES = ["num_groups", "sharing", "page_size", "capacity", "max_pieces", "stride_bt", "qk_scale", "scaling_q", "scaling_k", "scaling_v"]


@triton.jit
def _load_page(piece, end, pages_ptr, page_size, PIECE: tl.constexpr, WHOLE: tl.constexpr):
    """The page of a piece, or if it is not WHOLE, in one page, of each of its keys. int32; 0 from key `end` on."""
    keys = piece * PIECE if WHOLE else piece * PIECE + tl.arange(0, PIECE)
    return tl.load(pages_ptr + keys // page_size, mask=keys < end, other=0)


@triton.jit
def _load_piece(
    piece, page, end, k_ptr, v_ptr, page_size, stride_kp, stride_ks, stride_vp, stride_vs,
    HEAD_DIM: tl.constexpr, PIECE: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Keys and values of a piece, (PIECE, BLOCK_D) each; zeros from key `end` on, whose memory may hold NaN."""
    n, d = tl.arange(0, PIECE), tl.arange(0, BLOCK_D)
    first = piece * PIECE
    place = first % page_size + n if WHOLE else (first + n) % page_size
    here = (first + n < end)[:, None] & (d < HEAD_DIM)[None, :]
    page, place = page.to(tl.int64), place.to(tl.int64)
    k = tl.load(k_ptr + (page * stride_kp + place * stride_ks)[:, None] + d[None, :], mask=here, other=0.0)
    v = tl.load(v_ptr + (page * stride_vp + place * stride_vs)[:, None] + d[None, :], mask=here, other=0.0)
    return k, v


@triton.jit
def _state(q, k, v, exists, qk_scale):
    """The softmax state of the rows of q over one tile of keys: largest score, sum of weights, sum of weighted values.

    This is the arithmetic of `paged_attention` for the first tile of a piece.
    """
    scores = dot(q, tl.trans(k), None) * qk_scale
    scores = tl.where(exists[None, :], scores, float("-inf"))
    m_i = tl.max(scores, axis=1)
    m_finite = tl.where(m_i == float("-inf"), 0.0, m_i)
    weights = tl.exp2(scores - m_finite[:, None])
    return m_i, tl.sum(weights, axis=1), dot(rounded(weights, v.dtype), v, None)


@triton.jit
def _low_rank(feature, low_ptr, b_ptr, rank, stride_b, scaling, adapted, BLOCK_R: tl.constexpr):
    """What the adapter adds to these features of one kind, float32: scaling · low·B[feature]ᵀ; zero if b_ptr is None or not `adapted`.

    feature (features,); low_ptr is at the row's x·Aᵀ of this kind.
    """
    delta = tl.zeros(feature.shape, tl.float32)
    if b_ptr is not None and adapted:
        for start in range(0, rank, BLOCK_R):
            r = start + tl.arange(0, BLOCK_R)
            low = tl.load(low_ptr + r, mask=r < rank, other=0.0).to(tl.float32)
            b_ptrs = b_ptr + feature.to(tl.int64)[:, None] * stride_b + r[None, :]
            delta += tl.sum(tl.load(b_ptrs, mask=(r < rank)[None, :], other=0.0).to(tl.float32) * low[None, :], axis=1)
    return delta * scaling


@triton.jit
def _low_rank_of_group(
    first, low_ptr, b_ptr, rank, stride_b, scaling,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """What the adapter adds to GROUP query heads from head `first` on, (BLOCK_M, BLOCK_D) float32."""
    m, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    delta = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, rank, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        low = tl.load(low_ptr + r, mask=r < rank, other=0.0)
        # One product per head, in which only the head's row of the tile is not zero. Its loads do not wait for the previous one.
        for head in tl.range(0, GROUP, num_stages=3):
            b_ptrs = b_ptr + ((first + head) * HEAD_DIM + d).to(tl.int64)[None, :] * stride_b + r[:, None]
            b = tl.load(b_ptrs, mask=(d < HEAD_DIM)[None, :] & (r < rank)[:, None], other=0.0)
            delta = dot(tl.where((m == head)[:, None], low[None, :], 0.0), b, delta)
    return delta * scaling


@triton.jit
def _merge_stored(
    ml_ptr, acc_ptr, out_ptr, pieces, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Merge the stored states of `pieces` pieces in order, and write the result."""
    m, d = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    exists = m < GROUP
    here = exists[:, None] & (d < HEAD_DIM)[None, :]
    m_i = tl.full([BLOCK_G], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    # Each merge waits for the previous one, but the loads do not: unrolling puts several in flight. They bypass L1, which does not
    # see what other multiprocessors wrote.
    for piece in tl.range(0, pieces, loop_unroll_factor=4):
        head = piece * GROUP + m
        m_j = tl.load(ml_ptr + head * 2, mask=exists, other=float("-inf"), cache_modifier=".cg")
        l_j = tl.load(ml_ptr + head * 2 + 1, mask=exists, other=0.0, cache_modifier=".cg")
        acc_ptrs = acc_ptr + head[:, None] * HEAD_DIM + d[None, :]
        m_i, l_i, acc = _merge_states(m_i, l_i, acc, m_j, l_j, tl.load(acc_ptrs, mask=here, other=0.0, cache_modifier=".cg"))
    tl.store(out_ptr + m[:, None] * HEAD_DIM + d[None, :], rounded(_normalised(l_i, acc), out_ptr.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=_SIZES)
def _decode_attention_kernel(
    qkv_ptr, cos_ptr, sin_ptr, k_ptr, v_ptr, block_table_ptr, kv_lens_ptr, counters_ptr, low_ptr, lora_q_ptr, lora_k_ptr, lora_v_ptr,
    adapter_index_ptr, out_ptr, ml_ptr, acc_ptr, num_groups, sharing, page_size, capacity, max_pieces, rank_q, rank_k, rank_v, qk_scale,
    scaling_q, scaling_k, scaling_v, stride_qkv, stride_cos, stride_sin, stride_low, stride_lora_q, stride_lora_k, stride_lora_v,
    stride_kp, stride_ks, stride_kh, stride_vp, stride_vs, stride_vh, stride_bt,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PIECE: tl.constexpr, WHOLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Attention of one row, in one group of GROUP query heads, to every `slots`-th piece of its keys.

    Grid: (rows · num_groups, slots); `sharing` groups share a KV head. qkv (rows, (num_heads + 2 KV heads) · HEAD_DIM), cos and sin
    (rows, HEAD_DIM), caches (pages, page_size, KV heads, HEAD_DIM), block_table (rows, capacity / page_size), kv_lens (rows,),
    counters (rows · num_groups,), low (rows, ranks) or None, lora_q, lora_k and lora_v (heads · HEAD_DIM, rank) or None,
    adapter_index (rows,) or None, out contiguous; the states ml (rows, num_groups, max_pieces, GROUP, 2), which holds the largest
    score and the sum of weights, and acc (…, max_pieces, GROUP, HEAD_DIM), float32.
    """
    program, slot, slots = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    row, group = program // num_groups, program % num_groups
    # Before the wait: no launch of the chain writes the length, the pages, the keys of earlier tokens, the adapter of a row or B. The
    # new token's key and value, which this launch writes, are not read from the cache.
    kv_len = tl.maximum(tl.minimum(tl.load(kv_lens_ptr + row), capacity), 0)
    pieces = tl.cdiv(kv_len, PIECE)
    if slot >= tl.maximum(pieces, 1):
        return
    wide_row, kv_head = row.to(tl.int64), group // sharing
    pages_ptr = block_table_ptr + wide_row * stride_bt
    k_ptr += kv_head.to(tl.int64) * stride_kh
    v_ptr += kv_head.to(tl.int64) * stride_vh
    newest = kv_len - 1
    page = _load_page(slot, newest, pages_ptr, page_size, PIECE, WHOLE)
    k, v = _load_piece(
        slot, page, newest, k_ptr, v_ptr, page_size, stride_kp, stride_ks, stride_vp, stride_vs, HEAD_DIM, PIECE, BLOCK_D, WHOLE
    )
    page = _load_page(slot + slots, newest, pages_ptr, page_size, PIECE, WHOLE)
    newest_page = tl.load(pages_ptr + newest // page_size, mask=kv_len > 0, other=0).to(tl.int64)
    adapted = True
    if adapter_index_ptr is not None:
        adapted = tl.load(adapter_index_ptr + row) >= 0
    await_inputs(PDL)

    # All loads before the first use, so that they wait for memory together. Only the program with the last piece needs the new key.
    m, n, d = tl.arange(0, BLOCK_M), tl.arange(0, PIECE), tl.arange(0, BLOCK_D)
    exists, other = m < GROUP, partner_of(d, HEAD_DIM)
    here = exists[:, None] & (d < HEAD_DIM)[None, :]
    has_newest = (pieces > 0) & ((pieces - 1) % slots == slot)
    x_ptr = qkv_ptr + wide_row * stride_qkv
    cos_ptr += wide_row * stride_cos
    sin_ptr += wide_row * stride_sin
    # One cosine per element of the tile of queries: a vector would be exchanged between threads.
    same, head = tl.zeros_like(m)[:, None], (group * GROUP + m)[:, None] * HEAD_DIM
    cos, sin = tl.load(cos_ptr + same + d[None, :], mask=here, other=0.0), tl.load(sin_ptr + same + d[None, :], mask=here, other=0.0)
    q = tl.load(x_ptr + head + d[None, :], mask=here, other=0.0).to(tl.float32)
    q_other = tl.load(x_ptr + head + other[None, :], mask=here, other=0.0).to(tl.float32)
    new = has_newest & (d < HEAD_DIM)
    cos_new, sin_new = tl.load(cos_ptr + d, mask=new, other=0.0), tl.load(sin_ptr + d, mask=new, other=0.0)
    x_ptr += (num_groups * GROUP + kv_head) * HEAD_DIM
    k_new, k_other = tl.load(x_ptr + d, mask=new, other=0.0).to(tl.float32), tl.load(x_ptr + other, mask=new, other=0.0).to(tl.float32)
    v_new = tl.load(x_ptr + num_groups // sharing * HEAD_DIM + d, mask=new, other=0.0).to(tl.float32)

    dtype: tl.constexpr = qkv_ptr.dtype.element_ty
    if low_ptr is not None:
        low_ptr += wide_row * stride_low
        if lora_q_ptr is not None and adapted:
            delta = _low_rank_of_group(
                group * GROUP, low_ptr, lora_q_ptr, rank_q, stride_lora_q, scaling_q, GROUP, HEAD_DIM, BLOCK_M, BLOCK_D, BLOCK_R
            )
            q += delta
            q_other += exchanged(delta, HEAD_DIM)
        if has_newest:
            first = kv_head * HEAD_DIM
            # Past HEAD_DIM, any feature that exists: nothing uses the result.
            feature = first + d % HEAD_DIM
            k_new += _low_rank(feature, low_ptr + rank_q, lora_k_ptr, rank_k, stride_lora_k, scaling_k, adapted, BLOCK_R)
            k_other += _low_rank(first + other, low_ptr + rank_q, lora_k_ptr, rank_k, stride_lora_k, scaling_k, adapted, BLOCK_R)
            low_ptr += rank_q + rank_k
            v_new += _low_rank(feature, low_ptr, lora_v_ptr, rank_v, stride_lora_v, scaling_v, adapted, BLOCK_R)
    q = rounded(rotation(q, q_other, cos, sin), dtype)
    k_new, v_new = rounded(rotation(k_new, k_other, cos_new, sin_new), dtype), rounded(v_new, dtype)
    place = (newest % page_size).to(tl.int64)
    writes = new & (group % sharing == 0)
    tl.store(k_ptr + newest_page * stride_kp + place * stride_ks + d, k_new, mask=writes)
    tl.store(v_ptr + newest_page * stride_vp + place * stride_vs + d, v_new, mask=writes)

    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    arrivals = tl.minimum(slots, pieces)
    ml_ptr += program.to(tl.int64) * max_pieces * 2 * GROUP
    acc_ptr += program.to(tl.int64) * max_pieces * GROUP * HEAD_DIM
    # Without disable_licm, addresses of all keys stay in registers, which then spill.
    for piece in tl.range(slot, pieces, slots, disable_licm=True):
        keys = piece * PIECE + n
        k = tl.where((keys == newest)[:, None], k_new[None, :], k)
        v = tl.where((keys == newest)[:, None], v_new[None, :], v)
        # The next piece is loaded while this one is computed, and the page after it, whose number the loads after that need.
        k_next, v_next = _load_piece(
            piece + slots, page, newest, k_ptr, v_ptr, page_size, stride_kp, stride_ks, stride_vp, stride_vs,
            HEAD_DIM, PIECE, BLOCK_D, WHOLE,
        )  # fmt: skip
        page = _load_page(piece + 2 * slots, newest, pages_ptr, page_size, PIECE, WHOLE)
        m_j, l_j, acc_j = _state(q, k, v, keys < kv_len, qk_scale)
        k, v = k_next, v_next
        if arrivals == 1:
            m_i, l_i, acc = _merge_states(m_i, l_i, acc, m_j, l_j, acc_j)
        else:
            # Side by side, so that they are exchanged between threads at once.
            ml = (piece * GROUP + m)[:, None] * 2 + tl.arange(0, 2)[None, :]
            tl.store(ml_ptr + ml, tl.join(m_j, l_j), mask=exists[:, None])
            tl.store(acc_ptr + (piece * GROUP + m)[:, None] * HEAD_DIM + d[None, :], acc_j, mask=here)
    out_ptr += (wide_row * num_groups + group) * GROUP * HEAD_DIM
    if arrivals <= 1:
        tl.store(out_ptr + m[:, None] * HEAD_DIM + d[None, :], rounded(_normalised(l_i, acc), dtype), mask=here)
    else:
        tl.debug_barrier()  # the addition publishes what all threads of the program stored before it
        if tl.atomic_add(counters_ptr + program, 1, sem="acq_rel", scope="gpu") == arrivals - 1:
            tl.store(counters_ptr + program, 0)
            _merge_stored(ml_ptr, acc_ptr, out_ptr, pieces, GROUP, HEAD_DIM, BLOCK_G, BLOCK_D)


def _decode_attention(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    kv_lens: torch.Tensor,
    counters: torch.Tensor,
    low: torch.Tensor | None = None,
    lora_q: torch.Tensor | None = None,
    lora_k: torch.Tensor | None = None,
    lora_v: torch.Tensor | None = None,
    adapter_index: torch.Tensor | None = None,
    *,
    num_heads: int,
    scale: float,
    scaling_q: float = 1.0,
    scaling_k: float = 1.0,
    scaling_v: float = 1.0,
) -> torch.Tensor:
    """`decode_attention` by the Triton kernel.

    Raises:
        KernelError: head_dim is above 128.
    """
    rows, (page_size, num_kv_heads, head_dim) = qkv.shape[0], k_cache.shape[1:]
    blocks = projection_blocks("decode_attention", qkv, head_dim, lora_q, lora_k, lora_v)
    out = qkv.new_empty(rows, num_heads, head_dim)
    if not launching(qkv) or out.numel() == 0:
        return out
    group_size = _group_size(num_heads // num_kv_heads)
    num_groups = num_heads // group_size
    capacity = block_table.shape[1] * page_size
    usual = page_size % _PIECE == 0 and head_dim == blocks["BLOCK_D"]
    chip = architecture(qkv.device)
    tile = _TILES[chip, qkv.element_size(), "usual" if usual else "other"]
    pieces = triton.cdiv(capacity, _PIECE)
    slots = _slots(tile.blocks["FILL"] * MULTIPROCESSORS[chip], rows * num_groups, pieces)
    num_states = rows * num_groups * pieces * group_size if slots > 1 else 0
    blocks |= {"GROUP": group_size, "BLOCK_G": triton.next_power_of_2(group_size), "BLOCK_M": DECODE_ROWS}
    blocks |= {"PIECE": _PIECE, "WHOLE": int(page_size % _PIECE == 0)}
    launch(
        _decode_attention_kernel, (rows * num_groups, slots), Tile(blocks, tile.num_warps),
        **projection_arguments(qkv, cos, sin, k_cache, v_cache, low, lora_q, lora_k, lora_v, adapter_index),
        block_table_ptr=block_table, kv_lens_ptr=kv_lens, counters_ptr=counters, out_ptr=out,
        ml_ptr=torch.empty(2 * num_states, dtype=torch.float32, device=qkv.device),
        acc_ptr=torch.empty(num_states * head_dim, dtype=torch.float32, device=qkv.device),
        num_groups=num_groups, sharing=num_groups // num_kv_heads, page_size=page_size, capacity=capacity, max_pieces=pieces,
        qk_scale=scale * math.log2(math.e), scaling_q=scaling_q, scaling_k=scaling_k, scaling_v=scaling_v,
        stride_bt=block_table.stride(0),
    )  # fmt: skip
    return out


def _slots(fill: int, programs: int, pieces: int) -> int:
    """The number of programs that share the pieces of one row and group of heads. Any number gives the same bits."""
    return max(1, min(pieces, fill // programs))


decode_attention_triton = register(_decode_attention, mutates=("k_cache", "v_cache", "counters"))
