"""Paged attention in Triton: a decode kernel that splits the keys, and a prefill kernel that splits the queries.

A sequence's number of queries decides which kernel computes it. The order of its sums depends only on its own lengths, so its
bits do not depend on the batch. In a decode step, the few queries of a sequence and the query heads that share a KV head form
one tile. The keys are cut into pieces of fixed length, and the softmax states of the pieces are merged in order, either by one
program per sequence, or, where several programs share its pieces, by the merge kernel. Both give the same bits: they call the
same device functions on the same float32 states.
"""

import math
from dataclasses import replace

import torch
import triton
import triton.language as tl

from granite_kernels.errors import KernelError
from granite_kernels.launch import ARCHITECTURES, MULTIPROCESSORS, Tile, architecture, launch, launching, register
from granite_kernels.op import CHOICE
from granite_kernels.primitives import dot, locate, rounded
from granite_kernels.tiles import TileTable, predicted

MAX_HEAD_DIM = 128
DECODE_ROWS = 16  # rows of the decode kernel's tile: the fewest that tensor cores support

# Programs of the decode kernel per multiprocessor. With up to _FEW, several share the pieces of a sequence, until there are FILL.
_FEW = 2
# Up to this many pieces, one program reads them all: it takes about as long as launching the merge kernel. In a prefill, whose decode
# kernel has few sequences or none, up to twice as many.
_UNSHARED_PIECES, _UNSHARED_IN_PREFILL = 2, 4


def _decode_tile(block_n: int, num_warps: int, num_stages: int, piece: int, fill: int = 4) -> Tile:
    """FILL is the launcher's, and no constant of the kernel."""
    return Tile({"BLOCK_M": DECODE_ROWS, "BLOCK_N": block_n, "PIECE": piece, "FILL": fill}, num_warps, num_stages)


def _decode_candidates(key: tuple[int, int, str]) -> list[Tile]:
    _, width, batch = key
    tiles = [_decode_tile(*one, piece) for one in _DECODE_CANDIDATES[width] for piece in (128, 256)]
    return tiles + [_decode_tile(32, *((4, 3) if width == 4 else (2, 2)), 128, fill) for fill in (2, 8) if batch == "few"]


def _prefill_tile(block_m: int, block_n: int, num_warps: int, num_stages: int) -> Tile:
    return Tile({"BLOCK_M": block_m, "BLOCK_N": block_n}, num_warps, num_stages)


# One BLOCK_N, PIECE and number of warps serve all batches: warps share the sum of a row's weights, whose order therefore depends on their
# number. On an H200 on 2026-11-26, with pages of 16 and the pieces of a sequence in separate loops, 32 keys, 2 warps and 2 stages took
# 13.3 µs for one sequence of 300 keys and 26.0 µs for 128 of 200 (4.1-2b) in pieces of 128, and 23.7 and 25.0 µs in pieces of 256. 4 warps
# took 10.9 and 34.6 µs in pieces of 128 (bench/results/experiments-nvidia-h200-2026-11-26-cdd1619a.json).
_DECODE = TileTable(
    "paged_attention",
    "decode",
    {
        (chip, width, batch): predicted(_decode_tile(32, *warps_and_stages, 128), "2026-11-27")
        for chip in ARCHITECTURES
        for width, warps_and_stages in {2: (2, 2), 4: (4, 3)}.items()
        for batch in ("few", "many")
    },
    candidates=_decode_candidates,
    bits=("BLOCK_M", "BLOCK_N", "PIECE", "num_warps"),
)
# BLOCK_N, warps and stages, by bytes per element.
_DECODE_CANDIDATES = {
    2: ((32, 2, 2), (32, 2, 5), (32, 4, 5), (64, 2, 2), (64, 4, 2)),
    4: ((32, 2, 3), (32, 4, 2), (32, 4, 3)),
}
_PREFILL = TileTable(
    "paged_attention",
    "prefill",
    {
        (80, 2): predicted(_prefill_tile(64, 64, 8, 3), "2026-11-22"),
        (80, 4): predicted(_prefill_tile(32, 32, 8, 3), "2026-11-22"),
        (90, 2): predicted(_prefill_tile(128, 64, 8, 5), "2026-11-22"),
        (90, 4): predicted(_prefill_tile(64, 32, 8, 3), "2026-11-22"),
        (100, 2): predicted(_prefill_tile(128, 64, 8, 5), "2026-11-22"),
        (100, 4): predicted(_prefill_tile(32, 32, 8, 3), "2026-11-22"),
    },
    candidates=lambda key: [_prefill_tile(*one) for one in _PREFILL_CANDIDATES[key[1]] if key[0] > 80 or one[3] <= 3],
    bits=("BLOCK_M", "BLOCK_N"),
)
# BLOCK_M, BLOCK_N, warps and stages, by bytes per element.
_PREFILL_CANDIDATES = {
    2: ((64, 32, 4, 3), (64, 64, 4, 3), (64, 64, 4, 5), (64, 64, 8, 3), (128, 64, 4, 3), (128, 64, 8, 3), (128, 64, 8, 5)),
    4: ((32, 32, 4, 3), (32, 32, 8, 3), (64, 32, 4, 3), (64, 32, 8, 3)),
}
# Arguments that Triton does not specialise on: sizes that change from call to call, such as the block table's width, and those
# that few instructions depend on.
_SIZES = ["num_sequences", "num_rows", "num_groups", "group_size", "sharing", "page_size", "capacity", "stride_bt", "pieces", "rows"]
_SIZES += ["few", "causal"]


@triton.jit
def _rows_of_tile(m, tile, start, n, group, group_size, queries):
    """Row m of a tile is the tile's query m // group_size and head m % group_size of a group of query heads.

    Returns (row of q, number of the query in its sequence, head, whether the query exists).
    """
    t = tile * queries + m // group_size
    return start + t, t, group * group_size + m % group_size, (m < queries * group_size) & (t < n)


@triton.jit
def _merge_states(m_i, l_i, acc, m_j, l_j, acc_j):
    """The softmax state of two sets of keys: largest score m, sum of weights l, sum of weighted values acc.

    Explicit fma, because two kernels merge the same states and must round alike.
    """
    m_new = tl.maximum(m_i, m_j)
    m_finite = tl.where(m_new == float("-inf"), 0.0, m_new)  # without keys, -inf - -inf would be NaN
    alpha, beta = tl.exp2(m_i - m_finite), tl.exp2(m_j - m_finite)
    l_i = tl.fma(l_i, alpha, l_j * beta)
    acc = tl.fma(acc, alpha[:, None], acc_j * beta[:, None])
    return m_new, l_i, acc


@triton.jit
def _normalised(l_i, acc):
    """The attention of a softmax state; zero if it has no keys."""
    return acc / tl.where(l_i > 0, l_i, 1.0)[:, None]


@triton.jit
def _attend(
    q, seen, start, end, m_i, l_i, acc, pages_ptr, k_ptr, v_ptr, page_size, head_dim, stride_kp, stride_ks, stride_vp, stride_vs, qk_scale,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The softmax state of the rows of q with BLOCK_N more keys, from `start` on, of those before `end`. Row m sees those below seen[m].

    q (BLOCK_M, BLOCK_D), zero past head_dim. pages_ptr is at the sequence's row of block_table, k_ptr and v_ptr at the KV head.
    """
    d = tl.arange(0, q.shape[1])
    keys = start + tl.arange(0, BLOCK_N)
    exists = keys < end
    here = exists[:, None] & (d < head_dim)[None, :]
    page = tl.load(pages_ptr + keys // page_size, mask=exists, other=0).to(tl.int64)
    slot = (keys % page_size).to(tl.int64)
    # Load zeros past a sequence's keys: the memory there may hold NaN, and 0 · NaN is NaN.
    k = tl.load(k_ptr + (page * stride_kp + slot * stride_ks)[:, None] + d[None, :], mask=here, other=0.0)
    scores = dot(q, tl.trans(k), None) * qk_scale
    scores = tl.where(keys[None, :] < seen[:, None], scores, float("-inf"))
    m_new = tl.maximum(m_i, tl.max(scores, axis=1))
    m_finite = tl.where(m_new == float("-inf"), 0.0, m_new)
    weights = tl.exp2(scores - m_finite[:, None])
    alpha = tl.exp2(m_i - m_finite)
    l_i = l_i * alpha + tl.sum(weights, axis=1)
    v = tl.load(v_ptr + (page * stride_vp + slot * stride_vs)[:, None] + d[None, :], mask=here, other=0.0)
    acc = dot(rounded(weights, v.dtype), v, acc * alpha[:, None])
    return m_new, l_i, acc


@triton.jit
def _no_keys(BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """The softmax state of no keys."""
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    return m_i, tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M, BLOCK_D], tl.float32)


@triton.jit(do_not_specialize=_SIZES)
def _paged_attention_decode_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, ml_ptr, acc_ptr, block_table_ptr, kv_lens_ptr, cu_seqlens_ptr, num_sequences, num_rows,
    num_groups, group_size, sharing, head_dim, page_size, capacity, pieces, rows, qk_scale, causal,
    stride_qt, stride_qh, stride_kp, stride_ks, stride_kh, stride_vp, stride_vs, stride_vh, stride_bt,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """Attention of one sequence's few queries, in one group of query heads, to every `slots`-th piece of its keys.

    Grid: (num_groups · (num_sequences + 1), slots); sequence num_sequences is the padding, whose result is zero. A group has
    `group_size` query heads, and `sharing` groups share a KV head. With one slot this kernel merges the pieces and writes the
    result. With more it writes the state of every piece. The prefill kernel computes sequences whose queries do not fit BLOCK_M.

    q (num_rows, heads, head_dim) and the caches (pages, page_size, KV heads, head_dim), strides given; out contiguous;
    block_table (num_sequences, capacity / page_size); kv_lens (num_sequences,); cu_seqlens (num_sequences + 1,); the states
    ml (num_sequences, num_groups, pieces, 2, rows), which holds m and l, and acc (…, pieces, rows, head_dim), float32.
    """
    program, slot, slots = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    sequence, group = program // num_groups, program % num_groups
    num_heads = num_groups * group_size
    queries = BLOCK_M // group_size
    m, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    start = tl.load(cu_seqlens_ptr + sequence)
    if sequence == num_sequences:
        for tile in range(slot, tl.cdiv(num_rows - start, queries), slots):
            row, _, head, exists = _rows_of_tile(m, tile, start, num_rows - start, group, group_size, queries)
            out = out_ptr + (row.to(tl.int64) * num_heads + head)[:, None] * head_dim + d[None, :]
            nothing = tl.zeros([BLOCK_M, BLOCK_D], out_ptr.dtype.element_ty)
            tl.store(out, nothing, mask=exists[:, None] & (d < head_dim)[None, :])
        return
    n = tl.load(cu_seqlens_ptr + sequence + 1) - start
    kv_len = tl.minimum(tl.load(kv_lens_ptr + sequence), capacity)
    if n == 0 or n > queries:
        return
    row, t, head, exists = _rows_of_tile(m, 0, start, n, group, group_size, queries)
    exists = exists & (m < rows)  # more queries than max_query_len must not write past the states
    here = exists[:, None] & (d < head_dim)[None, :]
    q = tl.load(q_ptr + (row.to(tl.int64) * stride_qt + head.to(tl.int64) * stride_qh)[:, None] + d[None, :], mask=here, other=0.0)
    seen = kv_len - (n - 1 - t) * causal
    pages_ptr = block_table_ptr + sequence.to(tl.int64) * stride_bt
    kv_head = (group // sharing).to(tl.int64)
    k_ptr += kv_head * stride_kh
    v_ptr += kv_head * stride_vh
    m_i, l_i, acc = _no_keys(BLOCK_M, BLOCK_D)
    m_j, l_j, acc_j = _no_keys(BLOCK_M, BLOCK_D)
    # All pieces in one loop, so that the pipeline stays full from one piece to the next. Only the last piece may be short of tiles.
    per_piece: tl.constexpr = PIECE // BLOCK_N
    own = tl.cdiv(tl.cdiv(kv_len, PIECE) - slot, slots)
    tiles = own * per_piece - tl.maximum((slot + (own - 1) * slots + 1) * PIECE - kv_len, 0) // BLOCK_N
    for tile in tl.range(0, tiles, disable_licm=True):
        piece = slot + tile // per_piece * slots
        m_j, l_j, acc_j = _attend(
            q, seen, piece * PIECE + tile % per_piece * BLOCK_N, kv_len, m_j, l_j, acc_j, pages_ptr, k_ptr, v_ptr, page_size, head_dim,
            stride_kp, stride_ks, stride_vp, stride_vs, qk_scale, BLOCK_N,
        )  # fmt: skip
        if (tile % per_piece == per_piece - 1) | (tile == tiles - 1):
            if slots == 1:
                m_i, l_i, acc = _merge_states(m_i, l_i, acc, m_j, l_j, acc_j)
            else:
                state = program.to(tl.int64) * pieces + piece
                tl.store(ml_ptr + state * 2 * rows + m, m_j, mask=exists)
                tl.store(ml_ptr + (state * 2 + 1) * rows + m, l_j, mask=exists)
                tl.store(acc_ptr + (state * rows + m)[:, None] * head_dim + d[None, :], acc_j, mask=here)
            m_j, l_j, acc_j = _no_keys(BLOCK_M, BLOCK_D)
    if slots == 1:
        out = out_ptr + (row.to(tl.int64) * num_heads + head)[:, None] * head_dim + d[None, :]
        tl.store(out, rounded(_normalised(l_i, acc), out_ptr.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=_SIZES)
def _paged_attention_merge_kernel(
    out_ptr, ml_ptr, acc_ptr, kv_lens_ptr, cu_seqlens_ptr, num_groups, group_size, few, head_dim, capacity, pieces, rows,
    BLOCK_D: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """One row of the decode kernel's tile: merges the states of a sequence's pieces in order and writes the result.

    Grid: (num_groups · num_sequences, rows). Pointers as in the decode kernel, which computes sequences of up to `few` queries.
    """
    program = tl.program_id(0)
    sequence, group = program // num_groups, program % num_groups
    start = tl.load(cu_seqlens_ptr + sequence)
    n = tl.load(cu_seqlens_ptr + sequence + 1) - start
    kv_len = tl.minimum(tl.load(kv_lens_ptr + sequence), capacity)
    if n > few or tl.program_id(1) >= n * group_size:
        return
    m, d = tl.program_id(1) + tl.arange(0, 1), tl.arange(0, BLOCK_D)
    row, _, head, _ = _rows_of_tile(m, 0, start, n, group, group_size, few)
    here = (d < head_dim)[None, :]
    m_i = tl.full([1], float("-inf"), tl.float32)
    l_i = tl.zeros([1], tl.float32)
    acc = tl.zeros([1, BLOCK_D], tl.float32)
    # Each merge waits for the previous one, but the loads do not: unrolling puts eight in flight.
    for piece in tl.range(0, tl.cdiv(kv_len, PIECE), loop_unroll_factor=8):
        state = program.to(tl.int64) * pieces + piece
        m_j = tl.load(ml_ptr + state * 2 * rows + m)
        l_j = tl.load(ml_ptr + (state * 2 + 1) * rows + m)
        acc_j = tl.load(acc_ptr + (state * rows + m)[:, None] * head_dim + d[None, :], mask=here, other=0.0)
        m_i, l_i, acc = _merge_states(m_i, l_i, acc, m_j, l_j, acc_j)
    out = out_ptr + (row.to(tl.int64) * num_groups * group_size + head)[:, None] * head_dim + d[None, :]
    tl.store(out, rounded(_normalised(l_i, acc), out_ptr.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=_SIZES)
def _paged_attention_prefill_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, block_table_ptr, kv_lens_ptr, cu_seqlens_ptr, num_sequences, num_rows,
    num_groups, group_size, sharing, few, head_dim, page_size, capacity, qk_scale, causal,
    stride_qt, stride_qh, stride_kp, stride_ks, stride_kh, stride_vp, stride_vs, stride_vh, stride_bt,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Attention of BLOCK_M // group_size queries of one sequence, in one group of query heads, to all keys that they see.

    Grid: (num_groups · slots,), slots as for `locate`. The decode kernel computes padding and sequences of at most `few`
    queries. Pointers as in the decode kernel.
    """
    program = tl.program_id(0)
    group = program % num_groups
    queries = BLOCK_M // group_size
    sequence, start, end, tile = locate(program // num_groups, cu_seqlens_ptr, num_sequences, num_rows, queries)
    n = end - start
    if sequence == num_sequences or n <= few or tile * queries >= n:
        return
    m, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    row, t, head, exists = _rows_of_tile(m, tile, start, n, group, group_size, queries)
    here = exists[:, None] & (d < head_dim)[None, :]
    q = tl.load(q_ptr + (row.to(tl.int64) * stride_qt + head.to(tl.int64) * stride_qh)[:, None] + d[None, :], mask=here, other=0.0)
    kv_len = tl.minimum(tl.load(kv_lens_ptr + sequence), capacity)
    seen = kv_len - (n - 1 - t) * causal
    end = kv_len - tl.maximum(n - (tile + 1) * queries, 0) * causal
    pages_ptr = block_table_ptr + sequence.to(tl.int64) * stride_bt
    kv_head = (group // sharing).to(tl.int64)
    k_ptr += kv_head * stride_kh
    v_ptr += kv_head * stride_vh
    m_i, l_i, acc = _no_keys(BLOCK_M, BLOCK_D)
    for start in tl.range(0, end, BLOCK_N, disable_licm=True):
        m_i, l_i, acc = _attend(
            q, seen, start, end, m_i, l_i, acc, pages_ptr, k_ptr, v_ptr, page_size, head_dim, stride_kp, stride_ks, stride_vp, stride_vs,
            qk_scale, BLOCK_N,
        )  # fmt: skip
    out = out_ptr + (row.to(tl.int64) * num_groups * group_size + head)[:, None] * head_dim + d[None, :]
    tl.store(out, rounded(_normalised(l_i, acc), out_ptr.dtype.element_ty), mask=here)


def _paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    kv_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    max_query_len: int,
    scale: float,
    causal: bool = True,
) -> torch.Tensor:
    """`paged_attention` by the Triton kernels.

    Raises:
        KernelError: head_dim is above 128.
    """
    num_rows, num_heads, head_dim = q.shape
    num_sequences, (page_size, num_kv_heads) = kv_lens.shape[0], k_cache.shape[1:3]
    if head_dim > MAX_HEAD_DIM:
        remedy = f"Use impl='torch' or {CHOICE}=torch to run the PyTorch reference"
        raise KernelError(got=f"paged_attention: head_dim {head_dim}", expected=f"at most {MAX_HEAD_DIM}", remedy=remedy)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not launching(q) or out.numel() == 0:
        return out
    chip = architecture(q.device)
    group_size = _group_size(num_heads // num_kv_heads)
    num_groups = num_heads // group_size
    programs, few = num_sequences * num_groups, DECODE_ROWS // group_size
    decode = _DECODE[chip, q.element_size(), _batch(chip, programs)]
    blocks = {**decode.blocks, "BLOCK_D": max(16, triton.next_power_of_2(head_dim))}
    fill, block_d, piece = blocks.pop("FILL"), blocks["BLOCK_D"], blocks["PIECE"]
    capacity = block_table.shape[1] * page_size
    shared = {"out_ptr": out, "kv_lens_ptr": kv_lens, "cu_seqlens_ptr": cu_seqlens_q, "capacity": capacity, "head_dim": head_dim}
    shared |= {"num_groups": num_groups, "group_size": group_size}
    given = {"q_ptr": q, "k_ptr": k_cache, "v_ptr": v_cache, "block_table_ptr": block_table, "num_sequences": num_sequences}
    given |= {"num_rows": num_rows, "page_size": page_size, "sharing": num_groups // num_kv_heads}
    given |= {"qk_scale": scale * math.log2(math.e), "causal": int(causal)}
    given |= {"stride_qt": q.stride(0), "stride_qh": q.stride(1), "stride_bt": block_table.stride(0)}
    for name, cache in (("k", k_cache), ("v", v_cache)):
        given |= {f"stride_{name}{dim}": cache.stride(index) for index, dim in enumerate("psh")}
    pieces = triton.cdiv(capacity, piece)
    unshared = _UNSHARED_PIECES if max_query_len <= few else _UNSHARED_IN_PREFILL
    slots = _slots(fill * MULTIPROCESSORS[chip], programs, pieces) if pieces > unshared else 1
    rows = min(max_query_len, few) * group_size
    num_states = programs * pieces * rows if slots > 1 else 0
    ml = torch.empty(2 * num_states, dtype=torch.float32, device=q.device)
    acc = torch.empty(num_states * head_dim, dtype=torch.float32, device=q.device)
    states = {"ml_ptr": ml, "acc_ptr": acc, "pieces": pieces, "rows": rows}
    launch(_paged_attention_decode_kernel, (programs + num_groups, slots), replace(decode, blocks=blocks), **shared, **given, **states)
    if slots > 1:
        merge = Tile({"BLOCK_D": block_d, "PIECE": piece}, num_warps=1)
        launch(_paged_attention_merge_kernel, (programs, rows), merge, **shared, **states, few=few)
    if max_query_len > few:
        prefill = _PREFILL[chip, q.element_size()]
        prefill = replace(prefill, blocks={**prefill.blocks, "BLOCK_D": block_d})
        tiles = num_rows // (prefill.blocks["BLOCK_M"] // group_size) + num_sequences + 1
        launch(_paged_attention_prefill_kernel, (tiles * num_groups,), prefill, **shared, **given, few=few)
    return out


def _group_size(sharing: int) -> int:
    """Query heads per group: the largest divisor of those that share a KV head that fits the decode kernel's tile."""
    return next(size for size in range(min(sharing, DECODE_ROWS), 0, -1) if sharing % size == 0)


def _batch(chip: int, programs: int) -> str:
    """The class of a batch with this many programs, before any share the pieces of a sequence."""
    return "few" if programs <= _FEW * MULTIPROCESSORS[chip] else "many"


def _slots(fill: int, programs: int, pieces: int) -> int:
    """The number of programs that share the pieces of one sequence and group of heads. Any number gives the same bits."""
    return max(1, min(pieces, fill // max(1, programs)))


paged_attention_triton = register(_paged_attention)
