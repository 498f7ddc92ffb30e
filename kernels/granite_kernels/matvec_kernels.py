"""Device functions for products of a few rows with a whole matrix, without tensor cores: each element is used too few times.

A kernel calls `load_matrix` and `load_vector`, then `await_inputs`, and only then `load_row` and `product`, for one row of x after
another. Nothing is computed from what it loaded before it calls `await_inputs`: the next launch would begin later, because a program
lets it begin there. A sum is added up in an order that depends on BLOCK_K and the number of warps alone, so a row gets the same bits
whatever the other rows are.
"""

import triton
import triton.language as tl


@triton.jit
def load_matrix(matrix_ptr, n, INPUTS: tl.constexpr, STRIDE: tl.constexpr, BLOCK_K: tl.constexpr):
    """Rows n of a matrix of rows of INPUTS elements, with zeros up to BLOCK_K. Every n must be a row: a mask would cost registers."""
    k = tl.arange(0, BLOCK_K)
    pointers = matrix_ptr + n.to(tl.int64)[:, None] * STRIDE + k[None, :]
    return tl.load(pointers) if INPUTS == BLOCK_K else tl.load(pointers, mask=(k < INPUTS)[None, :], other=0)


@triton.jit
def load_vector(vector_ptr, INPUTS: tl.constexpr, BLOCK_K: tl.constexpr):
    """INPUTS elements, with zeros up to BLOCK_K; ones for None, which cost nothing."""
    k = tl.arange(0, BLOCK_K)
    return tl.full((BLOCK_K,), 1.0, tl.float32) if vector_ptr is None else tl.load(vector_ptr + k, mask=k < INPUTS, other=0.0)


@triton.jit
def load_row(x_ptr, row, rows, stride, INPUTS: tl.constexpr, BLOCK_K: tl.constexpr):
    """One row of x, with zeros up to BLOCK_K; only zeros if there is no such row."""
    k = tl.arange(0, BLOCK_K)
    return tl.load(x_ptr + tl.cast(row, tl.int64) * stride + k, mask=(k < INPUTS) & (row < rows), other=0.0)


@triton.jit
def product(matrix, x, norm_weight, eps, NORM: tl.constexpr, INPUTS: tl.constexpr):
    """Σ_k matrix[n, k] · norm_weight[k] · x[k] in float32; if NORM, divided by sqrt(mean(x²) + eps)."""
    x = x.to(tl.float32)
    acc = tl.sum(_widened(matrix) * (norm_weight.to(tl.float32) * x)[None, :], axis=1)
    if NORM:  # applied to the sum, so that the products need not wait for the sum of squares
        acc *= tl.rsqrt(tl.sum(x * x, axis=0) / INPUTS + eps)
    return acc


@triton.jit
def _widened(matrix):
    """The elements in float32, exactly."""
    if matrix.dtype == tl.int8:
        # GPUs convert integers at a quarter of the rate of other instructions or less, which would take as long as reading them. So
        # the integer is added to the lowest bits of 1.5 · 2²³, and that number is subtracted.
        return (matrix.to(tl.int32) + 0x4B400000).to(tl.float32, bitcast=True) - 12582912.0
    return matrix.to(tl.float32)
