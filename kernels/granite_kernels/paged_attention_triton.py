"""The Triton half of paged attention: a form for few queries that cuts the keys, and a form for many that cuts the queries.

A sequence's own number of queries chooses its form, and what is summed in which order follows from its own lengths alone, so
that its bits do not depend on the batch. The few queries of a decode step share one tile with the query heads that read the
same keys; the keys are cut into pieces of a fixed number, and the pieces' softmax states are merged in order. Whether one
program takes all pieces of a sequence, or many take a few each and a second kernel merges, is only a matter of speed: both
call the same device functions on the same float32 states.
"""

import math

import torch
import triton
import triton.language as tl

from granite_kernels.errors import KernelError
from granite_kernels.launch import Tile, architecture, launch, launching, register
from granite_kernels.op import CHOICE
from granite_kernels.primitives import dot, locate, rounded

MAX_HEAD_DIM = 128
DECODE_ROWS = 16  # of the decode form's tile: the fewest that tensor cores take

# 2026-11-22, predicted from bytes in flight and from what compiles without a spill; not yet measured. By architecture and bytes
# of an element: (BLOCK_N, num_warps, num_stages) of the decode form, (BLOCK_M, BLOCK_N, num_warps, num_stages) of the other.
# The pipeline loads the page numbers of a tile of keys ahead of the keys themselves: of five stages two hold keys and values.
_DECODE = {
    80: {2: (64, 4, 5), 4: (32, 4, 3)},
    90: {2: (64, 4, 5), 4: (32, 4, 3)},
    100: {2: (64, 4, 5), 4: (32, 4, 3)},
}
_PREFILL = {
    80: {2: (64, 64, 8, 3), 4: (32, 32, 8, 3)},
    90: {2: (128, 64, 8, 5), 4: (64, 32, 8, 3)},
    100: {2: (128, 64, 8, 5), 4: (32, 32, 8, 3)},
}
# Keys of a piece. The one number here, with BLOCK_N and BLOCK_M, that a sequence's bits depend on.
PIECE = 256
# Programs that fill the chip, four for each multiprocessor: with fewer, a sequence's pieces go to several programs each.
_FILL = {80: 432, 90: 528, 100: 592}
# As many pieces as one program reads in about the time that the second launch takes: up to here no sequence is shared out.
_ALONE = 2
# Arguments that no kernel is compiled again for: sizes that change from call to call, the width of the block table among them,
# and those that few instructions depend on.
_SIZES = ["num_sequences", "num_rows", "num_groups", "group_size", "sharing", "page_size", "capacity", "stride_bt", "pieces", "rows"]
_SIZES += ["few", "causal"]


@triton.jit
def _rows_of_tile(m, tile, start, n, group, group_size, queries):
    """Row m of a tile is query m // group_size of the tile's, and number m % group_size of a group of query heads.

    Returns (the row of q, the query's number in its sequence, the head, whether there is such a query).
    """
    t = tile * queries + m // group_size
    return start + t, t, group * group_size + m % group_size, (m < queries * group_size) & (t < n)


@triton.jit
def _merge_states(best, total, values, other_best, other_total, other_values):
    """The softmax state of one set of keys and then another: the largest score, and sums of weights and of weighted values.

    The multiply-adds are spelled out, for two kernels merge the same states and have to round alike.
    """
    largest = tl.maximum(best, other_best)
    # No key at all: -inf less -inf would be NaN.
    reference = tl.where(largest == float("-inf"), 0.0, largest)
    mine, other = tl.exp2(best - reference), tl.exp2(other_best - reference)
    total = tl.fma(total, mine, other_total * other)
    values = tl.fma(values, mine[:, None], other_values * other[:, None])
    return largest, total, values


@triton.jit
def _normalised(total, values):
    """What a state comes to: zeros where no key was seen."""
    return values / tl.where(total > 0, total, 1.0)[:, None]


@triton.jit
def _attend(
    q,
    seen,
    first,
    end,
    pages_ptr,
    k_ptr,
    v_ptr,
    page_size,
    head_dim,
    stride_kp,
    stride_ks,
    stride_vp,
    stride_vs,
    qk_scale,
    BLOCK_N: tl.constexpr,
):
    """The softmax state of the rows of q over keys `first` to `end`, of which row m sees those below seen[m].

    q (BLOCK_M, BLOCK_D), zero past head_dim; pages_ptr at the sequence's row of block_table, k_ptr and v_ptr at the KV head.
    """
    BLOCK_M: tl.constexpr = q.shape[0]
    BLOCK_D: tl.constexpr = q.shape[1]
    d = tl.arange(0, BLOCK_D)
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    values = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in tl.range(first, end, BLOCK_N, disable_licm=True):
        keys = start + tl.arange(0, BLOCK_N)
        exists = keys < end
        here = exists[:, None] & (d < head_dim)[None, :]
        page = tl.load(pages_ptr + keys // page_size, mask=exists, other=0).to(tl.int64)
        slot = (keys % page_size).to(tl.int64)
        # Zeros where there is no key: memory past a sequence's keys may hold NaN, and 0 · NaN is NaN.
        k = tl.load(k_ptr + (page * stride_kp + slot * stride_ks)[:, None] + d[None, :], mask=here, other=0.0)
        scores = dot(q, tl.trans(k), None) * qk_scale
        scores = tl.where(keys[None, :] < seen[:, None], scores, float("-inf"))
        largest = tl.maximum(best, tl.max(scores, axis=1))
        reference = tl.where(largest == float("-inf"), 0.0, largest)
        weights = tl.exp2(scores - reference[:, None])
        rescale = tl.exp2(best - reference)
        total = total * rescale + tl.sum(weights, axis=1)
        v = tl.load(v_ptr + (page * stride_vp + slot * stride_vs)[:, None] + d[None, :], mask=here, other=0.0)
        values = dot(rounded(weights, v.dtype), v, values * rescale[:, None])
        best = largest
    return best, total, values


@triton.jit(do_not_specialize=_SIZES)
def _paged_attention_decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    sums_ptr,
    values_ptr,
    block_table_ptr,
    kv_lens_ptr,
    cu_seqlens_ptr,
    num_sequences,
    num_rows,
    num_groups,
    group_size,
    sharing,
    head_dim,
    page_size,
    capacity,
    pieces,
    rows,
    qk_scale,
    causal,
    stride_qt,
    stride_qh,
    stride_kp,
    stride_ks,
    stride_kh,
    stride_vp,
    stride_vs,
    stride_vh,
    stride_bt,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Attention of one sequence's few queries, in one group of query heads, to every `slots`-th piece of its keys.

    Grid (num_groups · (num_sequences + 1), slots); the last sequence is the padding, which gets zeros. A group is of
    `group_size` query heads, and `sharing` groups read one KV head. With one slot the pieces are merged here and the result is
    written, with more every piece's state is. Sequences whose queries do not fit BLOCK_M are left to the prefill kernel.

    q (num_rows, heads, head_dim) and the caches (pages, page_size, KV heads, head_dim) with strides; out contiguous;
    block_table (num_sequences, capacity / page_size); kv_lens (num_sequences,); cu_seqlens (num_sequences + 1,);
    sums (num_sequences, num_groups, pieces, 2, rows): largest score, sum of weights; values (…, pieces, rows, head_dim).
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
    exists = exists & (m < rows)  # a sequence longer than was promised must not reach past the states
    here = exists[:, None] & (d < head_dim)[None, :]
    q = tl.load(q_ptr + (row.to(tl.int64) * stride_qt + head.to(tl.int64) * stride_qh)[:, None] + d[None, :], mask=here, other=0.0)
    seen = kv_len - (n - 1 - t) * causal
    pages_ptr = block_table_ptr + sequence.to(tl.int64) * stride_bt
    kv_head = (group // sharing).to(tl.int64)
    k_ptr += kv_head * stride_kh
    v_ptr += kv_head * stride_vh
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    values = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for piece in range(slot, tl.cdiv(kv_len, PIECE), slots):
        first = piece * PIECE
        end = tl.minimum(first + PIECE, kv_len)
        piece_best, piece_total, piece_values = _attend(
            q, seen, first, end, pages_ptr, k_ptr, v_ptr, page_size, head_dim, stride_kp, stride_ks, stride_vp, stride_vs, qk_scale, BLOCK_N
        )
        if slots == 1:
            best, total, values = _merge_states(best, total, values, piece_best, piece_total, piece_values)
        else:
            state = program.to(tl.int64) * pieces + piece
            tl.store(sums_ptr + state * 2 * rows + m, piece_best, mask=exists)
            tl.store(sums_ptr + (state * 2 + 1) * rows + m, piece_total, mask=exists)
            tl.store(values_ptr + (state * rows + m)[:, None] * head_dim + d[None, :], piece_values, mask=here)
    if slots == 1:
        out = out_ptr + (row.to(tl.int64) * num_heads + head)[:, None] * head_dim + d[None, :]
        tl.store(out, rounded(_normalised(total, values), out_ptr.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=_SIZES)
def _paged_attention_merge_kernel(
    out_ptr,
    sums_ptr,
    values_ptr,
    kv_lens_ptr,
    cu_seqlens_ptr,
    num_groups,
    group_size,
    few,
    head_dim,
    capacity,
    pieces,
    rows,
    BLOCK_D: tl.constexpr,
    PIECE: tl.constexpr,
):
    """One row of the decode kernel's tile: the states of a sequence's pieces merged in order, and the result written.

    Grid (num_groups · num_sequences, rows); pointers as in the decode kernel, whose sequences are those of up to `few` queries.
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
    best = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    values = tl.zeros([1, BLOCK_D], tl.float32)
    # A merge waits for the one before it, the loads for nothing: unrolled, eight are on their way together.
    for piece in tl.range(0, tl.cdiv(kv_len, PIECE), loop_unroll_factor=8):
        state = program.to(tl.int64) * pieces + piece
        piece_best = tl.load(sums_ptr + state * 2 * rows + m)
        piece_total = tl.load(sums_ptr + (state * 2 + 1) * rows + m)
        piece_values = tl.load(values_ptr + (state * rows + m)[:, None] * head_dim + d[None, :], mask=here, other=0.0)
        best, total, values = _merge_states(best, total, values, piece_best, piece_total, piece_values)
    out = out_ptr + (row.to(tl.int64) * num_groups * group_size + head)[:, None] * head_dim + d[None, :]
    tl.store(out, rounded(_normalised(total, values), out_ptr.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=_SIZES)
def _paged_attention_prefill_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    block_table_ptr,
    kv_lens_ptr,
    cu_seqlens_ptr,
    num_sequences,
    num_rows,
    num_groups,
    group_size,
    sharing,
    few,
    head_dim,
    page_size,
    capacity,
    qk_scale,
    causal,
    stride_qt,
    stride_qh,
    stride_kp,
    stride_ks,
    stride_kh,
    stride_vp,
    stride_vs,
    stride_vh,
    stride_bt,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Attention of BLOCK_M // group_size queries of one sequence, in a group of query heads, to all keys they see.

    Grid (num_groups · slots,), slots as for `locate`. Sequences of at most `few` queries, and padding, are the decode
    kernel's. Pointers as there.
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
    _, total, values = _attend(
        q, seen, 0, end, pages_ptr, k_ptr, v_ptr, page_size, head_dim, stride_kp, stride_ks, stride_vp, stride_vs, qk_scale, BLOCK_N
    )
    out = out_ptr + (row.to(tl.int64) * num_groups * group_size + head)[:, None] * head_dim + d[None, :]
    tl.store(out, rounded(_normalised(total, values), out_ptr.dtype.element_ty), mask=here)


def _paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    kv_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    max_query_len: int,
    scale: float,
    causal: bool,
) -> torch.Tensor:
    num_rows, num_heads, head_dim = q.shape
    num_sequences, (page_size, num_kv_heads) = kv_lens.shape[0], k_cache.shape[1:3]
    if head_dim > MAX_HEAD_DIM:
        remedy = f"Use impl='torch' or {CHOICE}=torch to run the PyTorch reference"
        raise KernelError(got=f"paged_attention: head_dim {head_dim}", expected=f"at most {MAX_HEAD_DIM}", remedy=remedy)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not launching(q) or out.numel() == 0:
        return out
    chip = architecture(q.device)
    decode, prefill = _tiles(chip, q.element_size(), head_dim)
    group_size = _group_size(num_heads // num_kv_heads)
    num_groups = num_heads // group_size
    few = DECODE_ROWS // group_size
    capacity = block_table.shape[1] * page_size
    outcome = {"out_ptr": out, "kv_lens_ptr": kv_lens, "cu_seqlens_ptr": cu_seqlens_q, "capacity": capacity, "head_dim": head_dim}
    outcome |= {"num_groups": num_groups, "group_size": group_size}
    given = {"q_ptr": q, "k_ptr": k_cache, "v_ptr": v_cache, "block_table_ptr": block_table, "num_sequences": num_sequences}
    given |= {"num_rows": num_rows, "page_size": page_size, "sharing": num_groups // num_kv_heads}
    given |= {"qk_scale": scale * math.log2(math.e), "causal": int(causal)}
    given |= {"stride_qt": q.stride(0), "stride_qh": q.stride(1), "stride_bt": block_table.stride(0)}
    for name, cache in (("k", k_cache), ("v", v_cache)):
        given |= {f"stride_{name}{dim}": cache.stride(index) for index, dim in enumerate("psh")}
    pieces = triton.cdiv(capacity, PIECE)
    programs = num_sequences * num_groups
    slots = _slots(chip, programs, pieces)
    rows = min(max_query_len, few) * group_size
    held = programs * pieces * rows if slots > 1 else 0
    sums = torch.empty(2 * held, dtype=torch.float32, device=q.device)
    values = torch.empty(held * head_dim, dtype=torch.float32, device=q.device)
    states = {"sums_ptr": sums, "values_ptr": values, "pieces": pieces, "rows": rows}
    launch(_paged_attention_decode_kernel, (programs + num_groups, slots), decode, **outcome, **given, **states)
    if slots > 1:
        merge = Tile({"BLOCK_D": decode.blocks["BLOCK_D"], "PIECE": PIECE}, num_warps=1)
        launch(_paged_attention_merge_kernel, (programs, rows), merge, **outcome, **states, few=few)
    if max_query_len > few:
        tiles = num_rows // (prefill.blocks["BLOCK_M"] // group_size) + num_sequences + 1
        launch(_paged_attention_prefill_kernel, (tiles * num_groups,), prefill, **outcome, **given, few=few)
    return out


def _group_size(sharing: int) -> int:
    """How many of the query heads that share a KV head go together: the largest part of them that fits the decode form's tile."""
    return next(size for size in range(min(sharing, DECODE_ROWS), 0, -1) if sharing % size == 0)


def _tiles(chip: int, width: int, head_dim: int) -> tuple[Tile, Tile]:
    """The tiles of the decode and of the prefill kernel."""
    BLOCK_D = max(16, triton.next_power_of_2(head_dim))
    BLOCK_N, *decode = _DECODE[chip][width]
    blocks = {"BLOCK_M": DECODE_ROWS, "BLOCK_N": BLOCK_N, "BLOCK_D": BLOCK_D, "PIECE": PIECE}
    BLOCK_M, BLOCK_N, *prefill = _PREFILL[chip][width]
    return Tile(blocks, *decode), Tile({"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "BLOCK_D": BLOCK_D}, *prefill)


def _slots(chip: int, programs: int, pieces: int) -> int:
    """How many programs share the pieces of one sequence and group of heads. Any number gives the same bits."""
    return 1 if pieces <= _ALONE else max(1, min(pieces, _FILL[chip] // max(1, programs)))


_paged_attention_op = register(_paged_attention)


def paged_attention_triton(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    kv_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    *,
    max_query_len: int,
    scale: float,
    causal: bool = True,
) -> torch.Tensor:
    """`paged_attention` by the Triton kernels; arguments as those of its reference.

    Raises:
        KernelError: a head_dim above 128.
    """
    return _paged_attention_op(q, k_cache, v_cache, block_table, kv_lens, cu_seqlens_q, max_query_len, scale, causal)
