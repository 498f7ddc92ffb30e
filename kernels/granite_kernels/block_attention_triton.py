"""The forward's tiles and launch, and the registration of `block_attention` with its backward."""

import torch
import triton
from torch import Tensor

from granite_kernels.attention_blocks_triton import attention_blocks_triton
from granite_kernels.block_attention_backward_triton import backward_op
from granite_kernels.block_attention_kernels import LOG2_E, _block_attention_fwd_kernel
from granite_kernels.errors import KernelError
from granite_kernels.launch import Tile, architecture, launch, launching, register

# By architecture and bytes per element. Chosen from the compiled code, 2026-11-22, not by measurement. Two programs on 90 share a
# multiprocessor: registers and shared memory (112 KiB with two pipeline stages) just allow it. On 80 operands pass through
# registers, and three TF32 products need three times as many.
_NARROW = Tile({"BLOCK": 16, "STEP": 32}, 2)
_TILES = {
    80: {2: Tile({"BLOCK": 32, "STEP": 32}, 2), 4: _NARROW},
    90: {2: Tile({"BLOCK": 64, "STEP": 128}, 4, 2), 4: _NARROW},
    100: {2: Tile({"BLOCK": 64, "STEP": 128}, 4), 4: _NARROW},
}


def _tile(q: Tensor) -> Tile:
    """The tile, independent of the batch, so that a clip gets the same bits in every batch. Two head widths keep compilations few."""
    tile = _TILES[architecture(q.device)][q.element_size()]
    width = 64 if q.shape[2] <= 64 and q.element_size() == 2 else 128
    blocks = {"BLOCK": tile.blocks["BLOCK"], "BLOCK_D": width, "STEP": min(tile.blocks["STEP"], width)}
    return Tile(blocks, tile.num_warps, tile.num_stages)


def _slots(q: Tensor, cu_seqlens: Tensor, context_size: int) -> int:
    """The number of slots in which `locate` finds every block, including padding."""
    return q.shape[0] // context_size + cu_seqlens.shape[0]


def _arguments(q: Tensor, k: Tensor, v: Tensor, rel_pos_emb: Tensor, cu_seqlens: Tensor, context_size: int) -> dict[str, object]:
    """The inputs, their sizes and strides."""
    sizes = {"total_frames": q.shape[0], "num_clips": cu_seqlens.shape[0] - 1, "num_heads": q.shape[1], "dim_head": q.shape[2]}
    positions = {"context_size": context_size, "max_pos_emb": rel_pos_emb.shape[0] // 2, "stride_e": rel_pos_emb.stride(0)}
    strides = {"stride_q": q.stride(0), "stride_k": k.stride(0), "stride_v": v.stride(0)}
    strides |= {"stride_qh": q.stride(1), "stride_kh": k.stride(1), "stride_vh": v.stride(1)}
    tensors = {"q_ptr": q, "k_ptr": k, "v_ptr": v, "e_ptr": rel_pos_emb, "cu_seqlens_ptr": cu_seqlens}
    return tensors | sizes | positions | strides


def _block_attention(
    q: Tensor, k: Tensor, v: Tensor, rel_pos_emb: Tensor, cu_seqlens: Tensor, context_size: int, scale: float, for_backward: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The result; for a backward also its rounding error and the (num_heads, total_frames) base-2 log-sum-exp, else empty."""
    frames, heads = q.shape[:2]
    with_rest = for_backward and q.dtype != torch.float32
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    rest = torch.empty(q.shape if with_rest else (0,), dtype=q.dtype, device=q.device)
    lse = torch.empty((heads, frames) if for_backward else (0,), dtype=torch.float32, device=q.device)
    if launching(q):
        tile = _tile(q)
        grid = (_slots(q, cu_seqlens, context_size) * heads * triton.cdiv(context_size, tile.blocks["BLOCK"]),)
        given = _arguments(q, k, v, rel_pos_emb, cu_seqlens, context_size)
        results = {"out_ptr": out, "rest_ptr": rest if with_rest else None, "lse_ptr": lse if for_backward else None}
        launch(_block_attention_fwd_kernel, grid, tile, **given, **results, scale=scale * LOG2_E.value)
    return out, rest, lse


_forward_op = register(_block_attention)


def _save(ctx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, rel_pos_emb, cu_seqlens, ctx.context_size, ctx.scale, _ = inputs
    ctx.save_for_backward(q, k, v, rel_pos_emb, cu_seqlens, *output)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, grad_out: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = (tensor.detach() for tensor in ctx.saved_tensors)  # there is no second derivative
    q, k, v, rel_pos_emb, cu_seqlens, *forward = saved
    blocks = attention_blocks_triton(cu_seqlens, q.shape[0], ctx.context_size)
    gradients = backward_op(grad_out.detach().contiguous(), q, k, v, rel_pos_emb, blocks, *forward, ctx.context_size, ctx.scale)
    return *gradients, None, None, None, None


_forward_op.register_autograd(_backward, setup_context=_save)


def block_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, rel_pos_emb: Tensor, cu_seqlens: Tensor, context_size: int, scale: float | None = None
) -> Tensor:
    """`block_attention` by the Triton kernels.

    Raises:
        KernelError: dim_head is above 128.
    """
    for_backward = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v, rel_pos_emb))
    return _forward_op(q, k, v, rel_pos_emb, cu_seqlens, context_size, _scale(q, scale), for_backward)[0]


def _without_backward(
    q: Tensor, k: Tensor, v: Tensor, rel_pos_emb: Tensor, cu_seqlens: Tensor, context_size: int, scale: float | None = None
) -> Tensor:
    """`block_attention_triton` past torch.library, for `Operation.run`."""
    return _block_attention(q, k, v, rel_pos_emb, cu_seqlens, context_size, _scale(q, scale), False)[0]


def _scale(q: Tensor, scale: float | None) -> float:
    dim = q.shape[2]
    if dim > 128:
        raise KernelError(
            got=f"block_attention: dim_head = {dim}",
            expected="at most 128",
            remedy="Use impl='torch' or GRANITE_SPEECH_KERNELS=torch to run the PyTorch reference",
        )
    return dim**-0.5 if scale is None else float(scale)


block_attention_triton.launcher = _without_backward
