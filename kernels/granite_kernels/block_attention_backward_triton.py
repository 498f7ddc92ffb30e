"""Tiles and launches of the backward of block attention."""

import torch
import triton
from torch import Tensor

from granite_kernels.block_attention_backward_kernels import (
    _block_attention_bwd_e_kernel,
    _block_attention_bwd_kv_kernel,
    _block_attention_bwd_q_kernel,
)
from granite_kernels.launch import Tile, architecture, launch, launching, register

# By architecture and bytes per element. Chosen from the compiled code, 2026-11-22, not by measurement. With two accumulators it has
# twice the forward's warps, although both halves then compute the same scores.
_NARROW = Tile({"BLOCK": 16, "STEP": 32}, 4)
_TILES = {
    80: {2: Tile({"BLOCK": 32, "STEP": 32}, 4), 4: _NARROW},
    90: {2: Tile({"BLOCK": 64, "STEP": 64}, 8), 4: _NARROW},
    100: {2: Tile({"BLOCK": 64, "STEP": 64}, 8), 4: _NARROW},
}
# The gradient of rel_pos_emb is a sum over all blocks, in at most _MAX_CHUNKS partial sums of at least _MIN_SLOTS slots each.
_MAX_CHUNKS, _MIN_SLOTS = 8, 4


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
    """The arguments that all kernels share."""
    sizes = {"total_frames": q.shape[0], "num_clips": cu_seqlens.shape[0] - 1, "num_heads": q.shape[1], "dim_head": q.shape[2]}
    positions = {"context_size": context_size, "max_pos_emb": rel_pos_emb.shape[0] // 2, "stride_e": rel_pos_emb.stride(0)}
    strides = {"stride_q": q.stride(0), "stride_k": k.stride(0), "stride_v": v.stride(0)}
    strides |= {"stride_qh": q.stride(1), "stride_kh": k.stride(1), "stride_vh": v.stride(1)}
    tensors = {"q_ptr": q, "k_ptr": k, "v_ptr": v, "e_ptr": rel_pos_emb, "cu_seqlens_ptr": cu_seqlens}
    return tensors | sizes | positions | strides


def _block_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_pos_emb: Tensor,
    cu_seqlens: Tensor,
    out: Tensor,
    rest: Tensor,
    lse: Tensor,
    context_size: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and rel_pos_emb. grad_out and out are contiguous. Every sum has a fixed order, so the bits are too."""
    heads, dim, max_pos_emb = q.shape[1], q.shape[2], rel_pos_emb.shape[0] // 2
    grad_q, grad_k, grad_v = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3))
    delta = torch.empty(lse.shape, dtype=lse.dtype, device=lse.device)
    tile = _tile(q)
    block = tile.blocks["BLOCK"]
    tiles, slots = triton.cdiv(context_size, block), _slots(q, cu_seqlens, context_size)
    chunks = min(_MAX_CHUNKS, triton.cdiv(slots, _MIN_SLOTS))
    partial = torch.empty((chunks, heads, 2 * tiles - 1, 2, block, dim), dtype=torch.float32, device=q.device)
    if launching(q):
        given = _arguments(q, k, v, rel_pos_emb, cu_seqlens, context_size) | {"scale": scale, "grad_out_ptr": grad_out, "lse_ptr": lse}
        given["delta_ptr"] = delta
        grid = (slots * heads * tiles,)
        forward = {"out_ptr": out, "rest_ptr": rest if q.dtype != torch.float32 else None}
        launch(_block_attention_bwd_q_kernel, grid, tile, **given, **forward, grad_q_ptr=grad_q)
        launch(_block_attention_bwd_kv_kernel, grid, tile, **given, grad_k_ptr=grad_k, grad_v_ptr=grad_v)
        chunk = {"num_slots": slots, "slots_per_chunk": triton.cdiv(slots, chunks)}
        launch(_block_attention_bwd_e_kernel, (chunks, heads, 2 * tiles - 1), tile, **given, **chunk, partial_ptr=partial)
    upper, lower = partial.sum((0, 1)).unbind(1)
    bands = torch.nn.functional.pad(upper, (0, 0, 0, 0, 1, 0)) + torch.nn.functional.pad(lower, (0, 0, 0, 0, 0, 1))
    reach, middle = context_size - 1, tiles * block  # the bands begin at distance -tiles · block
    occurring = bands.flatten(0, 1)[middle - reach : middle + reach + 1]
    beyond = max_pos_emb - reach
    return grad_q, grad_k, grad_v, torch.nn.functional.pad(occurring, (0, 0, beyond, beyond)).to(rel_pos_emb.dtype)


backward_op = register(_block_attention_backward)
