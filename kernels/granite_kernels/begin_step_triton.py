"""`begin_step` in Triton: the first program of a row advances it, and each of the others embeds a tile of it."""

import torch
import triton
import triton.language as tl

from granite_kernels.launch import Tile, launch, launching, register
from granite_kernels.primitives import await_inputs, cos_sin, rounded

# The same on every architecture: one 128-bit load per thread of a bfloat16 row, so there is nothing to choose.
_BLOCK, _WARPS = 1024, 4


@triton.jit(do_not_specialize=["placeholder"])
def _begin_step_kernel(
    embedding_ptr, tokens_ptr, positions_ptr, kv_lens_ptr, active_ptr, frequencies_ptr, x_ptr, cos_ptr, sin_ptr, lens_ptr,
    hidden, head_dim, stride_embedding, multiplier, placeholder,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row's position, lengths, cosine and sine, or BLOCK columns of its embedding.

    Grid: (rows, 1 + ⌈hidden / BLOCK⌉). embedding (vocab, hidden), tokens, positions, kv_lens, active and lens (rows,), frequencies
    (head_dim,) float32, x (rows, hidden), cos and sin (rows, head_dim). All but the embedding are contiguous.
    """
    row, program = tl.program_id(0).to(tl.int64), tl.program_id(1)
    await_inputs(PDL)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    if program == 0:
        d = tl.arange(0, BLOCK_D)
        frequency = tl.load(frequencies_ptr + d, mask=d < head_dim, other=0.0)
        active = tl.load(active_ptr + row)
        position = tl.load(positions_ptr + row) + active
        kv_len = tl.load(kv_lens_ptr + row) + active
        # Every thread loads these for itself, and one thread stores: the others must have loaded by then.
        tl.debug_barrier()
        tl.store(positions_ptr + row, position)
        tl.store(kv_lens_ptr + row, kv_len)
        tl.store(lens_ptr + row, kv_len * active)
        cos, sin = cos_sin(position.to(tl.float32) * frequency)
        tl.store(cos_ptr + row * head_dim + d, rounded(cos, dtype), mask=d < head_dim)
        tl.store(sin_ptr + row * head_dim + d, rounded(sin, dtype), mask=d < head_dim)
    else:
        column = (program - 1) * BLOCK + tl.arange(0, BLOCK)
        token = tl.load(tokens_ptr + row)
        token = tl.where(token == placeholder, 0, token)
        x = tl.load(embedding_ptr + token * stride_embedding + column, mask=column < hidden, other=0.0)
        tl.store(x_ptr + row * hidden + column, rounded(x.to(tl.float32) * multiplier, dtype), mask=column < hidden)


def _begin_step(
    embedding: torch.Tensor,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    kv_lens: torch.Tensor,
    active: torch.Tensor,
    frequencies: torch.Tensor,
    multiplier: float,
    placeholder: int = -1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`begin_step` by the Triton kernel."""
    rows, hidden, head_dim = tokens.shape[0], embedding.shape[1], frequencies.shape[0]
    x, lens = embedding.new_empty(rows, hidden), torch.empty_like(kv_lens)
    cos, sin = embedding.new_empty(rows, head_dim), embedding.new_empty(rows, head_dim)
    if launching(embedding):
        launch(
            _begin_step_kernel, (rows, 1 + triton.cdiv(hidden, _BLOCK)),
            Tile({"BLOCK": _BLOCK, "BLOCK_D": triton.next_power_of_2(max(head_dim, 1))}, _WARPS),
            embedding_ptr=embedding, tokens_ptr=tokens, positions_ptr=positions, kv_lens_ptr=kv_lens, active_ptr=active,
            frequencies_ptr=frequencies, x_ptr=x, cos_ptr=cos, sin_ptr=sin, lens_ptr=lens, hidden=hidden, head_dim=head_dim,
            stride_embedding=embedding.stride(0), multiplier=multiplier, placeholder=placeholder,
        )  # fmt: skip
    return x, cos, sin, lens


begin_step_triton = register(_begin_step, mutates=("positions", "kv_lens"))
