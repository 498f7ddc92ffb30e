"""`window_attention` in Triton: a program computes a few heads of one window, and reads each key and value once.

With 3 queries and 15 keys, tensor cores would multiply mostly padding, and all is limited by memory. The heads of a row lie side by
side, so a warp reads whole cache lines of a row, 128 bits a thread. A row is a tile (heads, dim) of its own, and all rows are
unrolled: loads need not wait for each other, and a score is a sum over the few threads that share a head.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from granite_kernels.errors import KernelError
from granite_kernels.launch import ARCHITECTURES, Tile, architecture, launch, launching, register
from granite_kernels.op import CHOICE
from granite_kernels.primitives import rounded
from granite_kernels.tiles import TileTable, predicted

MAX_QUERIES, MAX_KEYS, MAX_DIM = 16, 64, 128
LOG2_E = tl.constexpr(1.4426950408889634)

# Keys: architecture, bytes per element, the largest number of queries. COLUMNS is how many columns of a row a program has: whole heads,
# as many as fit. BLOCK is how many keys are unrolled; more are a loop. All queries are unrolled, and a thread holds its columns of each
# in float32, so there are fewer columns for many queries.
_KEYS = [(chip, size, queries) for chip in ARCHITECTURES for size in (2, 4) for queries in (4, MAX_QUERIES)]
_MANY = Tile({"COLUMNS": 64, "BLOCK": 4}, 1)
# With few queries, 128 bits of a row for each thread.
_TILES = TileTable(
    "window_attention",
    "forward",
    {key: predicted(Tile({"COLUMNS": 512 // key[1], "BLOCK": 16}, 1) if key[2] == 4 else _MANY, "2026-11-27") for key in _KEYS},
    candidates=lambda key: (
        [Tile({"COLUMNS": 512 // key[1] * warps, "BLOCK": block}, warps) for warps in (1, 2, 4) for block in (16, 5)]
        if key[2] == 4
        else [_MANY]
    ),
)
# The backward has twice as many values for each pair of a query and a key, so a thread gets half as many columns, or fewer keys.
_BACKWARD_TILES = TileTable(
    "window_attention",
    "backward",
    {key: predicted(Tile({"COLUMNS": 128, "BLOCK": 16}, 1) if key[2] == 4 else _MANY, "2026-11-27") for key in _KEYS},
    candidates=lambda key: (
        [Tile({"COLUMNS": columns * warps, "BLOCK": block}, warps) for columns, block in ((128, 16), (256, 5)) for warps in (1, 2)]
        if key[2] == 4
        else [_MANY]
    ),
)


@triton.jit
def _place(
    q_ptr, k_ptr, v_ptr, heads, stride_qw, stride_qh, stride_kw, stride_kh, stride_vw, stride_vh,
    DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """This program's window, its columns of a contiguous row, which of them exist, and pointers to the first rows of q, k and v."""
    groups = tl.cdiv(heads, BLOCK_H)
    window = (tl.program_id(0) // groups).to(tl.int64)
    head = tl.program_id(0) % groups * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    column = tl.arange(0, BLOCK_D)[None, :]
    q_ptr += window * stride_qw + (head * stride_qh + column)
    k_ptr += window * stride_kw + (head * stride_kh + column)
    v_ptr += window * stride_vw + (head * stride_vh + column)
    return window, head * DIM + column, (head < heads) & (column < DIM), q_ptr, k_ptr, v_ptr


@triton.jit
def _load_rows(ptr, stride, start, inside, TOTAL: tl.constexpr, ROWS: tl.constexpr):
    """ROWS of TOTAL rows from `start` on, each a tile (heads, dim); zero where there is none."""
    rows = ()
    for j in tl.static_range(ROWS):
        rows += (tl.load(ptr + (start + j) * stride, mask=inside & (start + j < TOTAL), other=0.0),)
    return rows


@triton.jit
def _widened(rows, factor, ROWS: tl.constexpr):
    """The rows in float32, times a factor."""
    wide = ()
    for i in tl.static_range(ROWS):
        wide += (rows[i].to(tl.float32) * factor,)
    return wide


@triton.jit
def _repeated(tile, COUNT: tl.constexpr):
    copies = ()
    for _ in tl.static_range(COUNT):
        copies += (tile,)
    return copies


@triton.jit
def _products(rows, queries, BLOCK: tl.constexpr, QUERIES: tl.constexpr):
    """row · query of each head: tiles (heads,), number j · QUERIES + i for row j and query i."""
    sums = ()
    for j in tl.static_range(BLOCK):
        wide = rows[j].to(tl.float32)
        for i in tl.static_range(QUERIES):
            sums += (tl.sum(wide * queries[i], axis=1),)
    return sums


@triton.jit
def _scores(keys, queries, start, KEYS: tl.constexpr, BLOCK: tl.constexpr, QUERIES: tl.constexpr):
    """`_products`, and -inf for keys that do not exist."""
    products = _products(keys, queries, BLOCK, QUERIES)
    scores = ()
    for number in tl.static_range(BLOCK * QUERIES):
        scores += (tl.where(start + number // QUERIES < KEYS, products[number], -float("inf")),)
    return scores


@triton.jit
def _raised(tops, scores, BLOCK: tl.constexpr, QUERIES: tl.constexpr):
    """For each query the largest score so far, and the factor for sums of exponentials that were relative to `tops`."""
    higher = ()
    shrinks = ()
    for i in tl.static_range(QUERIES):
        top = tops[i]
        for j in tl.static_range(BLOCK):
            top = tl.maximum(top, scores[j * QUERIES + i])
        higher += (top,)
        shrinks += (tl.exp2(tops[i] - top),)
    return higher, shrinks


@triton.jit
def _exponentials(scores, tops, BLOCK: tl.constexpr, QUERIES: tl.constexpr):
    """2 ** (score − top of its query)"""
    weights = ()
    for number in tl.static_range(BLOCK * QUERIES):
        weights += (tl.exp2(scores[number] - tops[number % QUERIES]),)
    return weights


@triton.jit
def _accumulated(sums, shrinks, terms, BLOCK: tl.constexpr, QUERIES: tl.constexpr):
    """For each query sum · shrink + Σ_j term of key j."""
    results = ()
    for i in tl.static_range(QUERIES):
        total = sums[i] * shrinks[i]
        for j in tl.static_range(BLOCK):
            total += terms[j * QUERIES + i]
        results += (total,)
    return results


@triton.jit
def _weighted(sums, weights, rows, BLOCK: tl.constexpr, QUERIES: tl.constexpr):
    """For each query sum + Σ_j weight of row j · row j: tiles (heads, dim)."""
    for j in tl.static_range(BLOCK):
        wide = rows[j].to(tl.float32)
        more = ()
        for i in tl.static_range(QUERIES):
            more += (sums[i] + weights[j * QUERIES + i][:, None] * wide,)
        sums = more
    return sums


@triton.jit
def _window_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, heads, scale,
    stride_qw, stride_qr, stride_qh, stride_kw, stride_kr, stride_kh, stride_vw, stride_vr, stride_vh,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_H heads of one window.

    Grid: (windows · ⌈heads / BLOCK_H⌉,), the heads of a window side by side. q (windows, QUERIES, heads, DIM), k and v (windows, KEYS,
    heads, DIM), strides (w, r, h, 1) each. out (windows, QUERIES, heads, DIM), contiguous.
    """
    window, column, inside, q_ptr, k_ptr, v_ptr = _place(
        q_ptr, k_ptr, v_ptr, heads, stride_qw, stride_qh, stride_kw, stride_kh, stride_vw, stride_vh, DIM, BLOCK_H, BLOCK_D
    )
    queries = _widened(_load_rows(q_ptr, stride_qr, 0, inside, QUERIES, QUERIES), scale * LOG2_E, QUERIES)
    tops = _repeated(tl.full((BLOCK_H,), -float("inf"), tl.float32), QUERIES)
    totals = _repeated(tl.zeros((BLOCK_H,), tl.float32), QUERIES)
    outs = _repeated(tl.zeros((BLOCK_H, BLOCK_D), tl.float32), QUERIES)
    for start in range(0, KEYS, BLOCK):
        keys = _load_rows(k_ptr, stride_kr, start, inside, KEYS, BLOCK)
        values = _load_rows(v_ptr, stride_vr, start, inside, KEYS, BLOCK)
        scores = _scores(keys, queries, start, KEYS, BLOCK, QUERIES)
        tops, shrinks = _raised(tops, scores, BLOCK, QUERIES)
        weights = _exponentials(scores, tops, BLOCK, QUERIES)
        totals = _accumulated(totals, shrinks, weights, BLOCK, QUERIES)
        smaller = ()
        for i in tl.static_range(QUERIES):
            smaller += (outs[i] * shrinks[i][:, None],)
        outs = _weighted(smaller, weights, values, BLOCK, QUERIES)
    out_ptr += window * QUERIES * heads * DIM + column
    for i in tl.static_range(QUERIES):
        out = outs[i] * (1.0 / totals[i])[:, None]
        tl.store(out_ptr + i * heads * DIM, rounded(out, out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _window_attention_bwd_kernel(
    q_ptr, k_ptr, v_ptr, grad_out_ptr, grad_q_ptr, grad_k_ptr, grad_v_ptr, heads, scale,
    stride_qw, stride_qr, stride_qh, stride_kw, stride_kr, stride_kh, stride_vw, stride_vr, stride_vh,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK_H heads of one window.

    The first walk over the keys finds what softmax needs, and the second the gradients. If BLOCK is all keys, the compiler merges the
    two, as it finds the same loads and products in both.

    Grid, q, k and v: as in the forward. grad_out and grad_q (windows, QUERIES, heads, DIM), grad_k and grad_v (windows, KEYS, heads,
    DIM), contiguous.
    """
    window, column, inside, q_ptr, k_ptr, v_ptr = _place(
        q_ptr, k_ptr, v_ptr, heads, stride_qw, stride_qh, stride_kw, stride_kh, stride_vw, stride_vh, DIM, BLOCK_H, BLOCK_D
    )
    dtype: tl.constexpr = grad_q_ptr.dtype.element_ty
    width = heads * DIM
    grad_out_ptr += window * QUERIES * width + column
    grad_q_ptr += window * QUERIES * width + column
    grad_k_ptr += window * KEYS * width + column
    grad_v_ptr += window * KEYS * width + column
    queries = _widened(_load_rows(q_ptr, stride_qr, 0, inside, QUERIES, QUERIES), scale * LOG2_E, QUERIES)
    grads = _widened(_load_rows(grad_out_ptr, width, 0, inside, QUERIES, QUERIES), 1.0, QUERIES)
    tops = _repeated(tl.full((BLOCK_H,), -float("inf"), tl.float32), QUERIES)
    totals = _repeated(tl.zeros((BLOCK_H,), tl.float32), QUERIES)
    means = totals  # of grad · value over the keys, times totals
    for start in range(0, KEYS, BLOCK):
        scores = _scores(_load_rows(k_ptr, stride_kr, start, inside, KEYS, BLOCK), queries, start, KEYS, BLOCK, QUERIES)
        along = _products(_load_rows(v_ptr, stride_vr, start, inside, KEYS, BLOCK), grads, BLOCK, QUERIES)
        tops, shrinks = _raised(tops, scores, BLOCK, QUERIES)
        weights = _exponentials(scores, tops, BLOCK, QUERIES)
        terms = ()
        for number in tl.static_range(BLOCK * QUERIES):
            terms += (weights[number] * along[number],)
        totals = _accumulated(totals, shrinks, weights, BLOCK, QUERIES)
        means = _accumulated(means, shrinks, terms, BLOCK, QUERIES)

    inverses = ()
    averages = ()
    for i in tl.static_range(QUERIES):
        inverses += (1.0 / totals[i],)
        averages += (means[i] * inverses[i],)

    nothing = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
    grad_qs = _repeated(nothing, QUERIES)
    for start in range(0, KEYS, BLOCK):
        keys = _load_rows(k_ptr, stride_kr, start, inside, KEYS, BLOCK)
        scores = _scores(keys, queries, start, KEYS, BLOCK, QUERIES)
        along = _products(_load_rows(v_ptr, stride_vr, start, inside, KEYS, BLOCK), grads, BLOCK, QUERIES)
        for j in tl.static_range(BLOCK):
            wide = keys[j].to(tl.float32)
            grad_k = nothing
            grad_v = nothing
            more = ()
            for i in tl.static_range(QUERIES):
                weight = tl.exp2(scores[j * QUERIES + i] - tops[i]) * inverses[i]
                slope = weight * (along[j * QUERIES + i] - averages[i])
                grad_k += slope[:, None] * queries[i]
                grad_v += weight[:, None] * grads[i]
                more += (grad_qs[i] + slope[:, None] * wide,)
            grad_qs = more
            row, there = (start + j) * width, inside & (start + j < KEYS)
            tl.store(grad_k_ptr + row, rounded(grad_k / LOG2_E, dtype), mask=there)  # queries are times LOG2_E
            tl.store(grad_v_ptr + row, rounded(grad_v, dtype), mask=there)
    for i in tl.static_range(QUERIES):
        tl.store(grad_q_ptr + i * width, rounded(grad_qs[i] * scale, dtype), mask=inside)


def _run(kernel: Any, table: TileTable, q: Tensor, k: Tensor, v: Tensor, scale: float | None, **others: Tensor) -> None:
    """Launch one of the kernels over all windows."""
    (queries, heads, dim), (windows, keys) = q.shape[1:], k.shape[:2]
    tile = table[architecture(q.device), q.element_size(), 4 if queries <= 4 else MAX_QUERIES]
    columns, block_d = tile.blocks["COLUMNS"], triton.next_power_of_2(dim)
    block_h = min(max(columns // block_d, 1), triton.next_power_of_2(heads))
    sizes = {"QUERIES": queries, "KEYS": keys, "DIM": dim}
    blocks = {"BLOCK": min(keys, tile.blocks["BLOCK"]), "BLOCK_H": block_h, "BLOCK_D": block_d}
    # A head that is wider than the columns gets more threads.
    tile = Tile(sizes | blocks, tile.num_warps * max(block_d // columns, 1))
    launch(
        kernel, (windows * triton.cdiv(heads, block_h),), tile, q_ptr=q, k_ptr=k, v_ptr=v, **others, heads=heads,
        scale=dim**-0.5 if scale is None else scale, stride_qw=q.stride(0), stride_qr=q.stride(1), stride_qh=q.stride(2),
        stride_kw=k.stride(0), stride_kr=k.stride(1), stride_kh=k.stride(2), stride_vw=v.stride(0), stride_vr=v.stride(1),
        stride_vh=v.stride(2),
    )  # fmt: skip


def _window_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """`window_attention` by the Triton kernel, for q with a row for each window.

    Raises:
        KernelError: more queries, keys or columns of a head than fit into a program.
    """
    windows, queries, heads, dim = q.shape
    for name, size, most in (("queries", queries, MAX_QUERIES), ("keys", k.shape[1], MAX_KEYS), ("dim", dim, MAX_DIM)):
        if size > most:
            remedy = f"Use impl='torch' or {CHOICE}=torch to run the PyTorch reference"
            raise KernelError(got=f"window_attention: {name} = {size}", expected=f"at most {most}", remedy=remedy)
    out = q.new_empty(windows, queries, heads, dim)
    if launching(q) and out.numel():
        _run(_window_attention_fwd_kernel, _TILES, q, k, v, scale, out_ptr=out)
    return out


def _window_attention_backward(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, given that of the result, which is contiguous."""
    grad_q, grad_k, grad_v = (one.new_empty(one.shape) for one in (q, k, v))
    if launching(q) and q.numel():
        results = {"grad_q_ptr": grad_q, "grad_k_ptr": grad_k, "grad_v_ptr": grad_v}
        _run(_window_attention_bwd_kernel, _BACKWARD_TILES, q, k, v, scale, grad_out_ptr=grad_out, **results)
    return grad_q, grad_k, grad_v


_forward_op = register(_window_attention)
_backward_op = register(_window_attention_backward)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    saved = (tensor.detach() for tensor in ctx.saved_tensors)  # there is no second derivative
    return *_backward_op(grad_out.detach().contiguous(), *saved, ctx.scale), None


_forward_op.register_autograd(_backward, setup_context=_save)


def window_attention_triton(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """`window_attention` by the Triton kernels. A row of q that all windows share is expanded, so autograd sums its gradients."""
    return _forward_op(q.expand(k.shape[0], -1, -1, -1), k, v, scale)


def _without_backward(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """`window_attention_triton` past torch.library, for `Operation.run`."""
    return _window_attention(q.expand(k.shape[0], -1, -1, -1), k, v, scale)


window_attention_triton.launcher = _without_backward
