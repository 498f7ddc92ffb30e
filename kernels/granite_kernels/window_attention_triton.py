"""`window_attention` in Triton: a few heads of one window fit into registers, so k and v are read once, in one go.

With 3 queries and 15 keys, tensor cores would multiply mostly padding. Here a thread holds 128 bits of some rows of k and v, all loads
are issued before the first is used, and a score is a sum over the few threads that share a row. A program needs no shared memory as
long as one warp has all rows of its heads.
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
# Queries whose products are unrolled. More are a loop.
_STEP = 4

# COLUMNS is how many columns of k a program loads: whole heads, or one head if that is wider. Keys: architecture, bytes per element,
# class of keys, which is a power of two. A thread holds 64 or fewer elements of k in the forward, and 32 in the backward, which also
# has both gradients in float32.
_KEYS = [(chip, size, keys) for chip in ARCHITECTURES for size in (2, 4) for keys in (4, 16, 64)]
_TILES = TileTable(
    "window_attention",
    "forward",
    {key: predicted(Tile({"COLUMNS": 128}, max(key[2] // 16, 1)), "2026-11-27") for key in _KEYS},
    candidates=lambda key: [Tile({"COLUMNS": 128 * wide}, max(key[2] // 16, 1) * more) for wide in (1, 2, 4, 8) for more in (1, 2, 4)],
)
_BACKWARD_TILES = TileTable(
    "window_attention",
    "backward",
    {key: predicted(Tile({"COLUMNS": 128}, max(key[2] // 8, 1)), "2026-11-27") for key in _KEYS},
    candidates=lambda key: [Tile({"COLUMNS": 64 * wide}, max(key[2] // 16, 1) * more) for wide in (1, 2, 4) for more in (1, 2, 4)],
)


@triton.jit
def _weights(q, k, exists, scale):
    """softmax of one query over the keys of a window: q (heads, dim), k (keys, heads, dim), both float32. Returns (keys, heads)."""
    scores = tl.where(exists, tl.sum(k * q[None], axis=2) * scale, -float("inf"))
    weights = tl.exp(scores - tl.max(scores, axis=0)[None])
    return weights / tl.sum(weights, axis=0)[None]


@triton.jit(do_not_specialize=["queries", "keys"])
def _window_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, queries, keys, heads, dim, scale,
    stride_qw, stride_qr, stride_qh, stride_kw, stride_kr, stride_kh, stride_vw, stride_vr, stride_vh,
    STEP: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_H heads of one window.

    Grid: (windows · ⌈heads / BLOCK_H⌉,), the heads of a window side by side. q (windows, queries, heads, dim), k and v (windows, keys, heads, dim), strides (w, r, h, 1) each.
    out (windows, queries, heads, dim), contiguous. STEP queries are computed side by side.
    """
    groups = tl.cdiv(heads, BLOCK_H)
    window = (tl.program_id(0) // groups).to(tl.int64)
    key = tl.arange(0, BLOCK_K)[:, None, None]
    head = tl.program_id(0) % groups * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    column = tl.arange(0, BLOCK_D)[None, :]
    real = (head < heads) & (column < dim)
    inside = (key < keys) & real[None]
    k = tl.load(k_ptr + window * stride_kw + key * stride_kr + (head * stride_kh + column)[None], mask=inside, other=0.0)
    v = tl.load(v_ptr + window * stride_vw + key * stride_vr + (head * stride_vh + column)[None], mask=inside, other=0.0)
    exists = tl.arange(0, BLOCK_K)[:, None] < keys
    q_ptr += window * stride_qw + head * stride_qh + column
    out_ptr += window * queries * heads * dim + head * dim + column
    for first in range(0, queries, STEP):
        for i in tl.static_range(STEP):
            query = first + i
            there = real & (query < queries)
            q = tl.load(q_ptr + query * stride_qr, mask=there, other=0.0).to(tl.float32)
            weights = _weights(q, k.to(tl.float32), exists, scale)
            out = tl.sum(weights[:, :, None] * v.to(tl.float32), axis=0)
            tl.store(out_ptr + query * heads * dim, rounded(out, out_ptr.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["queries", "keys"])
def _window_attention_bwd_kernel(
    q_ptr, k_ptr, v_ptr, grad_out_ptr, grad_q_ptr, grad_k_ptr, grad_v_ptr, queries, keys, heads, dim, scale,
    stride_qw, stride_qr, stride_qh, stride_kw, stride_kr, stride_kh, stride_vw, stride_vr, stride_vh,
    STEP: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK_H heads of one window. The weights are computed again.

    Grid, q, k and v: as in the forward. grad_out and grad_q (windows, queries, heads, dim), grad_k and grad_v (windows, keys, heads,
    dim), contiguous.
    """
    groups = tl.cdiv(heads, BLOCK_H)
    window = (tl.program_id(0) // groups).to(tl.int64)
    key = tl.arange(0, BLOCK_K)[:, None, None]
    head = tl.program_id(0) % groups * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    column = tl.arange(0, BLOCK_D)[None, :]
    real = (head < heads) & (column < dim)
    inside = (key < keys) & real[None]
    k = tl.load(k_ptr + window * stride_kw + key * stride_kr + (head * stride_kh + column)[None], mask=inside, other=0.0)
    v = tl.load(v_ptr + window * stride_vw + key * stride_vr + (head * stride_vh + column)[None], mask=inside, other=0.0)
    exists = tl.arange(0, BLOCK_K)[:, None] < keys
    grad_k = tl.zeros((BLOCK_K, BLOCK_H, BLOCK_D), tl.float32)
    grad_v = tl.zeros((BLOCK_K, BLOCK_H, BLOCK_D), tl.float32)
    dtype: tl.constexpr = grad_q_ptr.dtype.element_ty
    q_ptr += window * stride_qw + head * stride_qh + column
    place = window * queries * heads * dim + head * dim + column
    for first in range(0, queries, STEP):
        for i in tl.static_range(STEP):
            query = first + i
            there = real & (query < queries)
            q = tl.load(q_ptr + query * stride_qr, mask=there, other=0.0).to(tl.float32)
            grad = tl.load(grad_out_ptr + place + query * heads * dim, mask=there, other=0.0).to(tl.float32)
            weights = _weights(q, k.to(tl.float32), exists, scale)
            grad_v += weights[:, :, None] * grad[None]
            along = tl.sum(v.to(tl.float32) * grad[None], axis=2)
            scores = weights * (along - tl.sum(weights * along, axis=0)[None]) * scale
            grad_k += scores[:, :, None] * q[None]
            grad_q = tl.sum(scores[:, :, None] * k.to(tl.float32), axis=0)
            tl.store(grad_q_ptr + place + query * heads * dim, rounded(grad_q, dtype), mask=there)
    place = window * keys * heads * dim + key * heads * dim + (head * dim + column)[None]
    tl.store(grad_k_ptr + place, rounded(grad_k, dtype), mask=inside)
    tl.store(grad_v_ptr + place, rounded(grad_v, dtype), mask=inside)


def _run(kernel: Any, table: TileTable, q: Tensor, k: Tensor, v: Tensor, scale: float | None, **others: Tensor) -> None:
    """Launch one of the kernels over all windows."""
    (queries, heads, dim), (windows, keys) = q.shape[1:], k.shape[:2]
    block_k, block_d = triton.next_power_of_2(keys), triton.next_power_of_2(dim)
    tile = table[architecture(q.device), q.element_size(), next(some for some in (4, 16, 64) if keys <= some)]
    block_h = min(max(tile.blocks["COLUMNS"] // block_d, 1), triton.next_power_of_2(heads))
    blocks = {"STEP": max(min(queries, _STEP), 1), "BLOCK_K": block_k, "BLOCK_H": block_h, "BLOCK_D": block_d}
    launch(
        kernel, (windows * triton.cdiv(heads, block_h),), Tile(blocks, tile.num_warps), q_ptr=q, k_ptr=k, v_ptr=v, **others,
        queries=queries, keys=keys, heads=heads, dim=dim, scale=dim**-0.5 if scale is None else scale,
        stride_qw=q.stride(0), stride_qr=q.stride(1), stride_qh=q.stride(2), stride_kw=k.stride(0), stride_kr=k.stride(1),
        stride_kh=k.stride(2), stride_vw=v.stride(0), stride_vr=v.stride(1), stride_vh=v.stride(2),
    )  # fmt: skip


def _window_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """`window_attention` by the Triton kernel, for q with a row for each window.

    Raises:
        KernelError: more queries, keys or columns of a head than fit into a program.
    """
    _, queries, heads, dim = q.shape
    windows, keys = k.shape[:2]
    for name, size, most in (("queries", queries, MAX_QUERIES), ("keys", keys, MAX_KEYS), ("dim", dim, MAX_DIM)):
        if size > most:
            remedy = f"Use impl='torch' or {CHOICE}=torch to run the PyTorch reference"
            raise KernelError(got=f"window_attention: {name} = {size}", expected=f"at most {most}", remedy=remedy)
    out = q.new_empty(windows, queries, heads, dim)
    if launching(q) and queries:
        _run(_window_attention_fwd_kernel, _TILES, q, k, v, scale, out_ptr=out)
    return out


def _window_attention_backward(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, given that of the result, which is contiguous."""
    grad_q, grad_k, grad_v = (one.new_empty(one.shape) for one in (q, k, v))
    if launching(q):
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
    """`window_attention` by the Triton kernels. A row of q that all windows share is expanded, so its gradient is their sum."""
    return _forward_op(q.expand(k.shape[0], -1, -1, -1), k, v, scale)


def _without_backward(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """`window_attention_triton` past torch.library, for `Operation.run`."""
    return _window_attention(q.expand(k.shape[0], -1, -1, -1), k, v, scale)


window_attention_triton.launcher = _without_backward
