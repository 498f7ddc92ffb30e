"""`head_argmax` in Triton: one program computes a tile of columns for up to MAX_ROWS rows."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from granite_kernels.errors import KernelError
from granite_kernels.launch import Tile, architecture, launch, launching, register
from granite_kernels.matvec import HEAD_TILE, MAX_HEAD_INPUTS, MAX_ROWS, head_tile
from granite_kernels.matvec_kernels import load_matrix, load_row, load_vector, product
from granite_kernels.op import CHOICE
from granite_kernels.primitives import await_inputs, rounded


@triton.jit(do_not_specialize=["rows", "tiles"])
def _head_argmax_kernel(
    x_ptr, weight_ptr, norm_weight_ptr, scores_ptr, ids_ptr, log_sums_ptr, rows, vocab, tiles, stride_x, eps, scale,
    INPUTS: tl.constexpr, STRIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The largest logit of BLOCK_N columns, its column and their log-sum-exp, for ROWS rows.

    Grid: (tiles · ⌈rows / ROWS⌉,), blocks of rows fastest, because they share the weight in L2. x (rows, INPUTS), weight (vocab, INPUTS)
    with STRIDE between its rows, norm_weight (INPUTS,) or None; scores, in x's dtype, ids and log_sums (rows, tiles), contiguous.
    """
    row_blocks = tl.cdiv(rows, ROWS)
    tile, first = tl.program_id(0) // row_blocks, tl.program_id(0) % row_blocks * ROWS
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    matrix = load_matrix(weight_ptr, tl.minimum(column, vocab - 1), INPUTS, STRIDE, BLOCK_K)
    norm_weight = load_vector(norm_weight_ptr, INPUTS, BLOCK_K)
    await_inputs(PDL)
    following = load_row(x_ptr, first, rows, stride_x, INPUTS, BLOCK_K)
    for number in tl.static_range(ROWS):
        row, x = first + number, following
        if number + 1 < ROWS:  # loaded now, because it takes as long as the product
            following = load_row(x_ptr, row + 1, rows, stride_x, INPUTS, BLOCK_K)
        logits = rounded(product(matrix, x, norm_weight, eps, norm_weight_ptr is not None, INPUTS), x_ptr.dtype.element_ty).to(tl.float32)
        logits = rounded(logits * scale, x_ptr.dtype.element_ty).to(tl.float32)
        logits = tl.where(column < vocab, logits, -float("inf"))
        score, place = tl.max(logits, axis=0, return_indices=True, return_indices_tie_break_left=True)
        most = tl.where(tl.abs(score) < float("inf"), score, 0.0)  # the difference of two infinities is no number
        total = tl.sum(tl.exp(logits - most), axis=0)
        result = tl.cast(row, tl.int64) * tiles + tile
        tl.store(scores_ptr + result, score.to(scores_ptr.dtype.element_ty), mask=row < rows)
        tl.store(ids_ptr + result, tile * BLOCK_N + place, mask=row < rows)
        tl.store(log_sums_ptr + result, most + tl.log(total), mask=row < rows)


def _head_argmax(x: Tensor, weight: Tensor, norm_weight: Tensor | None, eps: float, divisor: float) -> tuple[Tensor, Tensor, Tensor]:
    """`head_argmax` by the Triton kernel.

    Raises:
        KernelError: x has no columns, or more than MAX_HEAD_INPUTS.
    """
    (rows, inputs), vocab = x.shape, weight.shape[0]
    if not 0 < inputs <= MAX_HEAD_INPUTS:
        remedy = f"Use impl='torch' or {CHOICE}=torch to run the PyTorch reference"
        raise KernelError(got=f"head_argmax: x has {inputs} columns", expected=f"1 to {MAX_HEAD_INPUTS}", remedy=remedy)
    tiles = triton.cdiv(vocab, HEAD_TILE)
    scores, ids, log_sums = (x.new_empty(rows, tiles, dtype=dtype) for dtype in (x.dtype, torch.int32, torch.float32))
    if launching(x) and scores.numel():
        tile, most = head_tile(inputs, x.element_size(), architecture(x.device)), min(triton.next_power_of_2(rows), MAX_ROWS)
        constants = {"INPUTS": inputs, "STRIDE": weight.stride(0), "ROWS": most}
        launch(
            _head_argmax_kernel, (tiles * triton.cdiv(rows, most),), Tile({**tile.blocks, **constants}, tile.num_warps),
            x_ptr=x, weight_ptr=weight, norm_weight_ptr=norm_weight, scores_ptr=scores, ids_ptr=ids, log_sums_ptr=log_sums, rows=rows,
            vocab=vocab, tiles=tiles, stride_x=x.stride(0), eps=eps, scale=1 / divisor,  # as PyTorch divides by a number on a GPU
        )  # fmt: skip
    return scores, ids, log_sums


head_argmax_triton = register(_head_argmax)
