"""`lora_linear` in Triton: one pair of kernels for few rows, where reading the weight takes the time, and one for many.

Up to SPLIT_ROWS rows, as in a decode step, the split kernel reads the weight once. Its grid covers the columns of the output and
those of x·Aᵀ, so that both products share one pass over x, times slices of the inner dimension, so that every multiprocessor has
work. The combine kernel adds the slices in order and applies B, scaling and bias.

For more rows, a thin kernel computes x·A[n]ᵀ once per row, and the tiled kernel adds its product with B[n] to the base product.
Computing x·Aᵀ again in every column tile would save that launch, but cost rank / BLOCK_N more FLOPs: half as many again for a
rank of 64 and tiles of 128 columns.

The gradient of x has the same form, with Wᵀ for W, B[n]ᵀ for A[n] and A[n]ᵀ for B[n], and runs in the last two kernels, which
accept transposed matrices (TRANSPOSED). An operation before the product belongs in `_load_x`, one after it in `_finish`.
"""

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from granite_kernels.errors import KernelError
from granite_kernels.launch import MULTIPROCESSORS, Tile, architecture, launch, launching, register
from granite_kernels.lora_linear_tiles import TILES
from granite_kernels.op import CHOICE
from granite_kernels.primitives import dot, rounded

MAX_RANK = 128
# The number of rows, which the host knows, selects the kernels: up to FEW_ROWS the split kernel in tiles of 16 rows, up to
# SPLIT_ROWS in tiles of 128, and then the tiled kernel. (512 rows and 2048 columns give it 64 programs, enough to be faster.)
FEW_ROWS, SPLIT_ROWS = 16, 256
# The combine kernel reads all slices, _ADDED at a time, so that it waits for memory once or twice.
MAX_SLICES, _ADDED = 8, tl.constexpr(4)
_COMBINE = Tile({"BLOCK_M": 16, "BLOCK_N": 64}, 4)


@triton.jit
def _own_adapter(adapter_index_ptr, m, rows, indexed, adapters):
    """The adapter of each row m: −1 for none and past the last row; 0 if adapter_index is None, in which case `indexed` is 0."""
    own = tl.load(adapter_index_ptr + m, mask=m < indexed, other=0)
    return tl.where((m < rows) & (own >= 0) & (own < adapters), own, -1)


@triton.jit
def _load_x(x_ptr, stride_x, m, k, rows, inputs):
    """The tile x[m, k]; zeros outside of x."""
    return tl.load(x_ptr + m.to(tl.int64)[:, None] * stride_x + k[None, :], mask=(m < rows)[:, None] & (k < inputs)[None, :], other=0.0)


@triton.jit
def _load_matrix(matrix_ptr, stride, n, k, columns, inputs, TRANSPOSED: tl.constexpr):
    """The tile (k, n) of a (columns, inputs) matrix, or if TRANSPOSED of an (inputs, columns) one; zeros outside of it."""
    if TRANSPOSED:
        pointers = matrix_ptr + k.to(tl.int64)[:, None] * stride + n[None, :]
    else:
        pointers = matrix_ptr + n.to(tl.int64)[None, :] * stride + k[:, None]
    return tl.load(pointers, mask=(k < inputs)[:, None] & (n < columns)[None, :], other=0.0)


@triton.jit
def _product(
    x_ptr, stride_x, matrix_ptr, stride, m, n, rows, columns, first, end, inputs,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Σ x[m, k] · matrix[n, k] over first ≤ k < end, in float32. If end < inputs, BLOCK_K must divide end − first."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(first, end, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = _load_x(x_ptr, stride_x, m, k, rows, inputs)
        acc = dot(x, _load_matrix(matrix_ptr, stride, n, k, columns, inputs, TRANSPOSED), acc)
    return acc


@triton.jit
def _add_low_rank(
    acc, low, own, b_ptr, stride_b_adapter, stride_b, scaling_ptr, n, r, columns, rank, adapters, TRANSPOSED: tl.constexpr
):  # fmt: skip
    """acc + scaling · low[m, r]·B[n, r]ᵀ with each row's own adapter. Selects rather than multiply by zero: adapters may hold NaN."""
    for adapter in range(adapters):
        mine = own == adapter
        if tl.max(mine.to(tl.int32), axis=0) > 0:
            b_adapter_ptr = b_ptr + tl.cast(adapter, tl.int64) * stride_b_adapter
            b = _load_matrix(b_adapter_ptr, stride_b, n, r, columns, rank, TRANSPOSED)
            scaling = tl.load(scaling_ptr + adapter)
            acc = tl.where(mine[:, None], acc + scaling * dot(low, b, None), acc)
    return acc


@triton.jit
def _finish(acc, bias_ptr, out_ptr, m, n, rows, columns):
    """Add the bias, round once and store the tile of out (rows, columns)."""
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
    mask = (m < rows)[:, None] & (n < columns)[None, :]
    tl.store(out_ptr + m.to(tl.int64)[:, None] * columns + n[None, :], rounded(acc, out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "indexed", "adapters"])
def _lora_linear_split_kernel(
    x_ptr, weight_ptr, a_ptr, adapter_index_ptr, partial_ptr, rows, indexed, adapters, inputs, outputs, rank, width, slice_width,
    stride_x, stride_weight, stride_a_adapter, stride_a,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A float32 partial sum: one tile of rows and columns over one slice of the inner dimension.

    Grid: (column tiles of the weight, then those of each adapter's A; slices; row tiles). x (rows, inputs), weight
    (outputs, inputs), a (adapters, rank, inputs), adapter_index (indexed,), partial (slices, rows, width), width ≥ outputs +
    rank: the base product, then the row's product with its adapter's A, which is not written if the row has no adapter.
    """
    tile = tl.program_id(0)
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    weight_tiles = tl.cdiv(outputs, BLOCK_N)
    matrix_ptr, stride, columns, wanted, place = weight_ptr, stride_weight, outputs, m < rows, 0
    if tile >= weight_tiles:
        rank_tiles = tl.cdiv(rank, BLOCK_N)
        adapter = (tile - weight_tiles) // rank_tiles
        tile = (tile - weight_tiles) % rank_tiles
        matrix_ptr, stride, columns = a_ptr + adapter.to(tl.int64) * stride_a_adapter, stride_a, rank
        wanted = _own_adapter(adapter_index_ptr, m, rows, indexed, adapters) == adapter
        place = outputs
    if tl.max(wanted.to(tl.int32), axis=0) > 0:
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        first = tl.program_id(1) * slice_width
        end = tl.minimum(first + slice_width, inputs)
        acc = _product(x_ptr, stride_x, matrix_ptr, stride, m, n, rows, columns, first, end, inputs, BLOCK_M, BLOCK_N, BLOCK_K, False)
        row = tl.cast(tl.program_id(1), tl.int64) * rows + m
        pointers = partial_ptr + row[:, None] * width + (place + n)[None, :]
        tl.store(pointers, acc, mask=wanted[:, None] & (n < columns)[None, :])


@triton.jit(do_not_specialize=["rows", "indexed", "adapters", "slices"])
def _lora_linear_combine_kernel(
    partial_ptr, bias_ptr, b_ptr, scaling_ptr, adapter_index_ptr, out_ptr, rows, indexed, adapters, outputs, rank, width,
    slices, stride_b_adapter, stride_b,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One tile of the result from its partial sums, added in the order of the slices.

    Grid: (column tiles, row tiles). partial (slices, rows, width) as the split kernel wrote it, bias (outputs,) or None, b
    (adapters, outputs, rank), scaling (adapters,), adapter_index (indexed,), out (rows, outputs).
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.arange(0, BLOCK_R)
    own = _own_adapter(adapter_index_ptr, m, rows, indexed, adapters)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    low = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for first in range(0, slices, _ADDED):
        for number in tl.static_range(_ADDED):
            row = (tl.cast(first + number, tl.int64) * rows + m)[:, None] * width
            exists = first + number < slices
            acc += tl.load(partial_ptr + row + n[None, :], mask=exists & (m < rows)[:, None] & (n < outputs)[None, :], other=0.0)
            low += tl.load(partial_ptr + row + outputs + r[None, :], mask=exists & (own >= 0)[:, None] & (r < rank)[None, :], other=0.0)
    low = rounded(low, out_ptr.dtype.element_ty)
    acc = _add_low_rank(acc, low, own, b_ptr, stride_b_adapter, stride_b, scaling_ptr, n, r, outputs, rank, adapters, False)
    _finish(acc, bias_ptr, out_ptr, m, n, rows, outputs)


@triton.jit(do_not_specialize=["rows", "indexed", "adapters"])
def _lora_linear_thin_kernel(
    x_ptr, a_ptr, adapter_index_ptr, low_ptr, rows, indexed, adapters, inputs, rank, stride_x, stride_a_adapter, stride_a,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """x·A[n]ᵀ for the rows of one tile whose adapter is n, rounded to x's dtype. The program of adapter 0 zeros rows without one.

    Grid: (row tiles, tiles of the rank, adapters or 1). x (rows, inputs), a (adapters, rank, inputs) or TRANSPOSED (adapters,
    inputs, rank), adapter_index (indexed,), low (rows, rank).
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    adapter = tl.program_id(2)
    own = _own_adapter(adapter_index_ptr, m, rows, indexed, adapters)
    pointers = low_ptr + m.to(tl.int64)[:, None] * rank + r[None, :]
    if tl.max((own == adapter).to(tl.int32), axis=0) > 0:
        a_adapter_ptr = a_ptr + adapter.to(tl.int64) * stride_a_adapter
        low = _product(x_ptr, stride_x, a_adapter_ptr, stride_a, m, r, rows, rank, 0, inputs, inputs, BLOCK_M, BLOCK_R, BLOCK_K, TRANSPOSED)
        tl.store(pointers, rounded(low, low_ptr.dtype.element_ty), mask=(own == adapter)[:, None] & (r < rank)[None, :])
    if adapter == 0:
        without = (m < rows) & (own < 0)
        tl.store(pointers, tl.zeros((BLOCK_M, BLOCK_R), low_ptr.dtype.element_ty), mask=without[:, None] & (r < rank)[None, :])


@triton.jit(do_not_specialize=["rows", "indexed", "adapters"])
def _lora_linear_tiled_kernel(
    x_ptr, low_ptr, weight_ptr, bias_ptr, b_ptr, scaling_ptr, adapter_index_ptr, out_ptr, rows, indexed, adapters, inputs, outputs,
    rank, stride_x, stride_weight, stride_b_adapter, stride_b,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """One tile of the result: base product, low-rank product and bias.

    Grid: row tiles × column tiles, in groups of GROUP_M row tiles that share weights in L2. x (rows, inputs), low
    (rows, rank), weight (outputs, inputs), bias (outputs,) or None, b (adapters, outputs, rank), scaling (adapters,),
    adapter_index (indexed,), out (rows, outputs). TRANSPOSED: weight (inputs, outputs), b (adapters, rank, outputs).
    """
    row_tiles, column_tiles = tl.cdiv(rows, BLOCK_M), tl.cdiv(outputs, BLOCK_N)
    group = tl.program_id(0) // (GROUP_M * column_tiles)
    place = tl.program_id(0) % (GROUP_M * column_tiles)
    height = tl.minimum(row_tiles - group * GROUP_M, GROUP_M)
    m = (group * GROUP_M + place % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = place // height * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = _product(
        x_ptr, stride_x, weight_ptr, stride_weight, m, n, rows, outputs, 0, inputs, inputs, BLOCK_M, BLOCK_N, BLOCK_K, TRANSPOSED
    )
    own = _own_adapter(adapter_index_ptr, m, rows, indexed, adapters)
    for first in range(0, rank, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        low = tl.load(low_ptr + m.to(tl.int64)[:, None] * rank + r[None, :], mask=(own >= 0)[:, None] & (r < rank)[None, :], other=0.0)
        acc = _add_low_rank(acc, low, own, b_ptr, stride_b_adapter, stride_b, scaling_ptr, n, r, outputs, rank, adapters, TRANSPOSED)
    _finish(acc, bias_ptr, out_ptr, m, n, rows, outputs)


def _lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: Tensor, adapter_index: Tensor | None
) -> Tensor:
    """`lora_linear` by the Triton kernels.

    Raises:
        KernelError: the rank is above MAX_RANK.
    """
    if lora_a.shape[1] > MAX_RANK:
        remedy = f"Use impl='torch' or {CHOICE}=torch to run the PyTorch reference"
        raise KernelError(got=f"lora_linear: lora_a has rank {lora_a.shape[1]}", expected=f"at most {MAX_RANK}", remedy=remedy)
    rows, (outputs, inputs), (adapters, rank, _) = x.shape[0], weight.shape, lora_a.shape
    if launching(x) and rows > SPLIT_ROWS:  # launching first: tracing must not add a guard on rows
        low = _lora_linear_thin(x, lora_a, adapter_index, False)
        return _lora_linear_tiled(x, low, weight, bias, lora_b, scaling, adapter_index, False)
    out = x.new_empty(rows, outputs)
    if launching(x):
        tile, slices, slice_width = _split_plan(x, outputs, rank)
        index = _index(x, adapter_index)
        # Rounded up to 16 columns: with a rank of 8, rows of the exact width would be unaligned and their loads narrow.
        width = outputs + triton.cdiv(rank, 16) * 16
        partial = x.new_empty(slices, rows, width, dtype=torch.float32)
        column_tiles, rank_tiles = (triton.cdiv(size, tile.blocks["BLOCK_N"]) for size in (outputs, rank))
        launch(
            _lora_linear_split_kernel, (column_tiles + adapters * rank_tiles, slices, triton.cdiv(rows, tile.blocks["BLOCK_M"])), tile,
            x_ptr=x, weight_ptr=weight, a_ptr=lora_a, partial_ptr=partial, inputs=inputs, outputs=outputs, rank=rank, width=width,
            slice_width=slice_width, stride_x=x.stride(0), stride_weight=weight.stride(0), stride_a_adapter=lora_a.stride(0),
            stride_a=lora_a.stride(1), **index, adapters=adapters,
        )  # fmt: skip
        # Only two widths, to compile few kernels: multiplying zeros takes less time than the loads anyway.
        launch(
            _lora_linear_combine_kernel,
            (triton.cdiv(outputs, _COMBINE.blocks["BLOCK_N"]), triton.cdiv(rows, _COMBINE.blocks["BLOCK_M"])),
            _with(_COMBINE, BLOCK_R=64 if rank <= 64 else MAX_RANK), partial_ptr=partial, bias_ptr=bias, b_ptr=lora_b,
            scaling_ptr=scaling, out_ptr=out, outputs=outputs, rank=rank, width=width, slices=slices, stride_b_adapter=lora_b.stride(0),
            stride_b=lora_b.stride(1), **index, adapters=adapters,
        )  # fmt: skip
    return out


def _lora_linear_thin(x: Tensor, lora_a: Tensor, adapter_index: Tensor | None, transposed: bool) -> Tensor:
    """x·A[n]ᵀ with each row's adapter, (rows, rank); zeros for rows without one. transposed: lora_a is (adapters, in, rank)."""
    adapters, rank = lora_a.shape[0], lora_a.shape[2 if transposed else 1]
    low = x.new_empty(x.shape[0], rank)
    if launching(x):
        tile = _tile("thin", x)
        launch(
            _lora_linear_thin_kernel,
            (triton.cdiv(x.shape[0], tile.blocks["BLOCK_M"]), triton.cdiv(rank, tile.blocks["BLOCK_R"]), max(adapters, 1)),
            _with(tile, TRANSPOSED=transposed), x_ptr=x, a_ptr=lora_a, low_ptr=low, inputs=x.shape[1], rank=rank, stride_x=x.stride(0),
            stride_a_adapter=lora_a.stride(0), stride_a=lora_a.stride(1), **_index(x, adapter_index), adapters=adapters,
        )  # fmt: skip
    return low


def _lora_linear_tiled(
    x: Tensor, low: Tensor, weight: Tensor, bias: Tensor | None, lora_b: Tensor, scaling: Tensor, adapter_index: Tensor | None,
    transposed: bool,
) -> Tensor:  # fmt: skip
    """x·Wᵀ + bias + scaling[n] · low·B[n]ᵀ. transposed: weight is (in, out) and lora_b (adapters, rank, out)."""
    (rows, inputs), outputs = x.shape, weight.shape[1 if transposed else 0]
    out = x.new_empty(rows, outputs)
    if launching(x):
        tile = _tile("tiled", x)
        launch(
            _lora_linear_tiled_kernel, (triton.cdiv(rows, tile.blocks["BLOCK_M"]) * triton.cdiv(outputs, tile.blocks["BLOCK_N"]),),
            _with(tile, TRANSPOSED=transposed), x_ptr=x, low_ptr=low, weight_ptr=weight, bias_ptr=bias, b_ptr=lora_b,
            scaling_ptr=scaling, out_ptr=out, inputs=inputs, outputs=outputs, rank=low.shape[1], stride_x=x.stride(0),
            stride_weight=weight.stride(0), stride_b_adapter=lora_b.stride(0), stride_b=lora_b.stride(1), **_index(x, adapter_index),
            adapters=lora_b.shape[0],
        )  # fmt: skip
    return out


def _tile(kernel: str, x: Tensor) -> Tile:
    return TILES[kernel][architecture(x.device), x.element_size()]


def _with(tile: Tile, **constants: int) -> Tile:
    return dataclasses.replace(tile, blocks={**tile.blocks, **constants})


def _split_plan(x: Tensor, outputs: int, rank: int) -> tuple[Tile, int, int]:
    """The split kernel's tile, the number of slices and their width. They depend on the layer, and on rows only by FEW_ROWS."""
    tile = _tile("few" if x.shape[0] <= FEW_ROWS else "split", x)
    tiles = triton.cdiv(outputs, tile.blocks["BLOCK_N"]) + triton.cdiv(rank, tile.blocks["BLOCK_N"])
    steps = triton.cdiv(x.shape[1], tile.blocks["BLOCK_K"])
    # One program of a multiprocessor runs at once.
    slices = min(max(MULTIPROCESSORS[architecture(x.device)] // max(tiles, 1), 1), MAX_SLICES)
    slice_steps = max(triton.cdiv(steps, slices), 1)
    return tile, triton.cdiv(steps, slice_steps), slice_steps * tile.blocks["BLOCK_K"]


def _index(x: Tensor, adapter_index: Tensor | None) -> dict:
    """The kernels' arguments for each row's adapter. None becomes an empty index, so that it needs no kernel of its own."""
    return {
        "adapter_index_ptr": x.new_empty(0, dtype=torch.int32) if adapter_index is None else adapter_index,
        "indexed": 0 if adapter_index is None else x.shape[0],
        "rows": x.shape[0],
    }


lora_linear_triton = register(_lora_linear)
_thin_op = register(_lora_linear_thin)
_tiled_op = register(_lora_linear_tiled)


def _setup_context(ctx, inputs, output):
    x, weight, _, lora_a, lora_b, scaling, adapter_index = inputs
    _, for_weight, _, for_a, for_b = ctx.needs_input_grad[:5]
    # A frozen layer that only passes a gradient on keeps no activation.
    ctx.save_for_backward(x if for_weight or for_a or for_b else None, weight, lora_a, lora_b, scaling, adapter_index)


def _backward(ctx, grad):
    x, weight, lora_a, lora_b, scaling, adapter_index = ctx.saved_tensors
    for_x, for_weight, for_bias, for_a, for_b = ctx.needs_input_grad[:5]
    grad = grad.contiguous()
    grad_x = grad_weight = grad_bias = grad_a = grad_b = None
    if for_x or for_a:
        low = _thin_op(grad, lora_b, adapter_index, True)
        if for_x:
            grad_x = _tiled_op(grad, low, weight, None, lora_a, scaling, adapter_index, True)
        if for_a:
            grad_a = _scaled((_by_adapter(low, adapter_index, scaling).t() @ x).view_as(lora_a), scaling)
    if for_b:
        low = _by_adapter(_thin_op(x, lora_a, adapter_index, False), adapter_index, scaling)
        adapters, outputs, rank = lora_b.shape
        grad_b = _scaled((grad.t() @ low).view(outputs, adapters, rank).transpose(0, 1), scaling)
    # PyTorch computes the large plain products.
    if for_weight:
        grad_weight = grad.t() @ x
    if for_bias:
        grad_bias = grad.sum(0)
    return grad_x, grad_weight, grad_bias, grad_a, grad_b, None, None


def _by_adapter(low: Tensor, adapter_index: Tensor | None, scaling: Tensor) -> Tensor:
    """(rows, adapters * rank): low in the columns of the row's adapter, zeros elsewhere. One product then serves all adapters."""
    number = torch.arange(scaling.shape[0], dtype=torch.int32, device=low.device)
    own = number == (0 if adapter_index is None else adapter_index[:, None])
    return torch.where(own[..., None], low[:, None, :], 0).flatten(1)


def _scaled(grad: Tensor, scaling: Tensor) -> Tensor:
    return (grad * scaling[:, None, None]).to(grad.dtype)


lora_linear_triton.register_autograd(_backward, setup_context=_setup_context)
