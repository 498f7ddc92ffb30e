"""Tiles and launches of the backward of block attention."""

import torch
import triton
from torch import Tensor

from granite_kernels.block_attention_backward_kernels import (
    _block_attention_bwd_e_kernel,
    _block_attention_bwd_kv_kernel,
    _block_attention_bwd_q_kernel,
    _block_attention_bwd_scores_kernel,
    _block_attention_bwd_weights_kernel,
)
from granite_kernels.launch import ARCHITECTURES, Tile, architecture, launch, launching, register
from granite_kernels.tiles import TileTable, predicted

_DATE = "2026-11-27"


def _scores_candidates(key: tuple[int, int]) -> list[Tile]:
    if key[1] == 4:
        return [Tile({"BLOCK": block, "STEP": 32}, warps) for block, warps in ((16, 4), (32, 4), (32, 8))]
    shapes = [(32, 4, 1), (32, 4, 2), (64, 4, 1), (64, 4, 2), (64, 4, 3), (64, 8, 1)]
    if key[0] != 100:  # spills there
        shapes.append((64, 8, 2))
    return [Tile({"BLOCK": block, "STEP": 128}, warps, stages) for block, warps, stages in shapes]


def _products_candidates(key: tuple[int, int]) -> list[Tile]:
    if key[1] == 4:
        return [Tile({}, warps, stages) for warps in (4, 8) for stages in (1, 2)]
    return [Tile({}, 4, stages) for stages in (1, 2, 3, 4)] + [Tile({}, 8, stages) for stages in (1, 2)]


# P, S and S'. On 90, two programs of 4 warps share a multiprocessor: 163 registers and 88 KiB for P, 215 and 56 KiB for S. Three TF32
# products need three times the registers, so there operands are read STEP features at a time.
_SCORES = TileTable(
    "block_attention",
    "backward scores",
    {
        (80, 2): predicted(Tile({"BLOCK": 32, "STEP": 128}, 4, 2), _DATE),
        **{(chip, 2): predicted(Tile({"BLOCK": 64, "STEP": 128}, 4, 2), _DATE) for chip in (90, 100)},
        **{(chip, 4): predicted(Tile({"BLOCK": 32, "STEP": 32}, 4), _DATE) for chip in ARCHITECTURES},
    },
    candidates=_scores_candidates,
    bits=("BLOCK", "STEP"),
)
# The products with P, S and S', which take BLOCK from the scores. On 90, up to 126 registers and 72 KiB: three programs share a
# multiprocessor, and each has the operands of two tiles on their way.
_PRODUCTS = TileTable(
    "block_attention",
    "backward products",
    {(chip, width): predicted(Tile({}, 4, 3 if width == 2 else 1), _DATE) for chip in ARCHITECTURES for width in (2, 4)},
    candidates=_products_candidates,
)
# The most bytes of scratch. More blocks than fit are computed in several rounds.
_SCRATCH = 2**29
# The gradient of rel_pos_emb is a sum over all blocks, in at most _MAX_CHUNKS partial sums of at least _MIN_SLOTS slots each.
_MAX_CHUNKS, _MIN_SLOTS = 8, 4


def _block_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_pos_emb: Tensor,
    blocks: Tensor,
    out: Tensor,
    rest: Tensor,
    lse: Tensor,
    context_size: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and rel_pos_emb. grad_out and out are contiguous. Every sum has a fixed order, so the bits are too."""
    (_, heads, dim), slots = q.shape, blocks.shape[0]
    grad_q, grad_k, grad_v = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3))
    scores, products = _tiles(q)
    block = scores.blocks["BLOCK"]
    tiles = triton.cdiv(context_size, block)
    rows = heads * context_size
    rounds = triton.cdiv(slots * rows * (3 * tiles + 1) * block * q.element_size(), _SCRATCH)
    at_once = triton.cdiv(slots, rounds)
    chunks = min(_MAX_CHUNKS, triton.cdiv(at_once, _MIN_SLOTS))
    weights, grads = (q.new_empty(at_once * rows, tiles * block) for _ in range(2))
    skewed = q.new_empty(at_once * rows, (tiles + 1) * block)
    partial = torch.empty((chunks, heads, 2 * tiles, block, dim), dtype=torch.float32, device=q.device)
    if launching(q):
        sizes = {"num_heads": heads, "dim_head": dim, "context_size": context_size, "blocks_ptr": blocks}
        of_q = {"q_ptr": q, "stride_q": q.stride(0), "stride_qh": q.stride(1)}
        of_k = {"k_ptr": k, "stride_k": k.stride(0), "stride_kh": k.stride(1)}
        of_v = {"v_ptr": v, "stride_v": v.stride(0), "stride_vh": v.stride(1)}
        of_e = {"e_ptr": rel_pos_emb, "stride_e": rel_pos_emb.stride(0), "max_pos_emb": rel_pos_emb.shape[0] // 2}
        of_out = {"out_ptr": out, "rest_ptr": rest if q.dtype != torch.float32 else None, "grad_out_ptr": grad_out}
        for first_slot in range(0, slots, at_once):
            here = min(at_once, slots - first_slot)
            given = sizes | {"first_slot": first_slot}
            programs = here * heads * tiles
            launch(
                _block_attention_bwd_weights_kernel, (programs,), scores, **given, **of_q, **of_k, **of_e, scale=scale,
                lse_ptr=lse, total_frames=q.shape[0], weights_ptr=weights,
            )  # fmt: skip
            launch(
                _block_attention_bwd_scores_kernel, (programs,), scores, **given, **of_v, **of_out,
                weights_ptr=weights, grads_ptr=grads, skewed_ptr=skewed,
            )  # fmt: skip
            launch(
                _block_attention_bwd_q_kernel, (programs,), products, **given, **of_k, **of_e, scale=scale,
                grads_ptr=grads, skewed_ptr=skewed, grad_q_ptr=grad_q,
            )  # fmt: skip
            launch(
                _block_attention_bwd_kv_kernel, (programs, 2), products, **given, **of_q, scale=scale,
                grad_out_ptr=grad_out, weights_ptr=weights, grads_ptr=grads, grad_k_ptr=grad_k, grad_v_ptr=grad_v,
            )  # fmt: skip
            launch(
                _block_attention_bwd_e_kernel, (chunks, heads, 2 * tiles), products, **given, **of_q,
                skewed_ptr=skewed, partial_ptr=partial, slots=here, slots_per_chunk=triton.cdiv(at_once, chunks),
            )  # fmt: skip
    bands = partial.sum((0, 1)).flatten(0, 1) * scale
    reach, middle = context_size - 1, tiles * block  # the bands begin at distance -tiles · block
    beyond = rel_pos_emb.shape[0] // 2 - reach
    grad_e = torch.nn.functional.pad(bands[middle - reach : middle + reach + 1], (0, 0, beyond, beyond))
    return grad_q, grad_k, grad_v, grad_e.to(rel_pos_emb.dtype)


def _tiles(q: Tensor) -> tuple[Tile, Tile]:
    """The tiles of scores and of products. Two head widths keep compilations few."""
    key = architecture(q.device), q.element_size()
    scores, products = _SCORES[key], _PRODUCTS[key]
    width = 64 if q.shape[2] <= 64 and q.element_size() == 2 else 128
    sizes = {"BLOCK": scores.blocks["BLOCK"], "BLOCK_D": width}
    with_step = sizes | {"STEP": min(scores.blocks["STEP"], width)}
    return Tile(with_step, scores.num_warps, scores.num_stages), Tile(sizes, products.num_warps, products.num_stages)


backward_op = register(_block_attention_backward)
