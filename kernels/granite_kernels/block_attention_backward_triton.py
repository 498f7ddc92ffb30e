"""Tiles and launches of the backward of block attention."""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from granite_kernels.block_attention_backward_kernels import (
    _block_attention_bwd_e_kernel,
    _block_attention_bwd_kv_kernel,
    _block_attention_bwd_q_kernel,
    _block_attention_bwd_scores_kernel,
)
from granite_kernels.block_attention_kernels import MIRROR, SLIDE
from granite_kernels.launch import ARCHITECTURES, Tile, architecture, launch, launching, register
from granite_kernels.tiles import TileTable, predicted

_DATE = "2026-11-27"


def _scores(form: tl.constexpr, block: int, step: int, warps: int, stages: int = 1) -> Tile:
    return Tile({"FORM": form.value, "BLOCK": block, "STEP": step}, warps, stages)


def _scores_candidates(key: tuple[int, int]) -> list[Tile]:
    chip, width = key
    if width == 4:
        return [_scores(SLIDE, 32, 32, 4), _scores(SLIDE, 32, 32, 8), _scores(MIRROR, 16, 32, 4)]
    form = SLIDE if chip == 90 else MIRROR
    shapes = [(32, 4, 2), (64, 4, 2), (64, 8, 2), *([(32, 4, 1)] if chip == 80 else [(64, 4, 1), (64, 8, 1)])]
    return [_scores(form, block, 128, warps, stages) for block, warps, stages in shapes]


def _queries_candidates(key: tuple[int, int]) -> list[Tile]:
    chip, width = key
    if width == 4:
        return [Tile({}, 8, stages) for stages in (1, 2)]
    return [Tile({}, 8, 1), Tile({}, 8, 2), Tile({}, 4, 1), *([] if chip == 100 else [Tile({}, 4, 2), Tile({}, 4, 3)])]


def _products_candidates(key: tuple[int, int]) -> list[Tile]:
    return [Tile({}, 8, 1), Tile({}, 8, 2)] + [Tile({}, 4, stages) for stages in ((1, 2) if key[1] == 4 else (1, 2, 3, 4))]


# P and S. On 90, two programs of 4 warps share a multiprocessor: 228 registers and 80 KiB. All loads of an iteration are on their way
# together, which needs no second buffers; with them a program would take 136 KiB. Sliding takes fewer registers than the mirror (255)
# there, and more on 80 and 100. In float32, three TF32 products need three times the registers, so operands are read STEP features
# at a time.
_SCORES = TileTable(
    "block_attention",
    "backward scores",
    {
        (80, 2): predicted(_scores(MIRROR, 32, 128, 4, 2), _DATE),
        (90, 2): predicted(_scores(SLIDE, 64, 128, 4), _DATE),
        (100, 2): predicted(_scores(MIRROR, 64, 128, 4), _DATE),
        **{(chip, 4): predicted(_scores(SLIDE, 32, 32, 4), _DATE) for chip in ARCHITECTURES},
    },
    candidates=_scores_candidates,
    bits=("FORM", "BLOCK", "STEP"),
)
# The other kernels take BLOCK from the scores. On 90, two programs of grad_q share a multiprocessor: 248 registers and 80 KiB. On 100
# its second buffers spill, as do 4 warps in float32.
_QUERIES = TileTable(
    "block_attention",
    "backward queries",
    {
        **{(chip, 2): predicted(Tile({}, 4, 2), _DATE) for chip in (80, 90)},
        (100, 2): predicted(Tile({}, 4), _DATE),
        **{(chip, 4): predicted(Tile({}, 8), _DATE) for chip in ARCHITECTURES},
    },
    candidates=_queries_candidates,
)
# On 90, three programs share a multiprocessor (126 registers and 72 KiB), each with the operands of two tiles on their way.
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
    (frames, heads, dim), slots, reach = q.shape, blocks.shape[0], context_size - 1
    grad_q, grad_k, grad_v = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3))
    block = _tiles(q)[0].blocks["BLOCK"]
    tiles = triton.cdiv(context_size, block)
    rows = heads * context_size
    rounds = triton.cdiv(slots * rows * (3 * tiles + 1) * block * q.element_size(), _SCRATCH)
    at_once = triton.cdiv(slots, rounds)
    chunks = min(_MAX_CHUNKS, triton.cdiv(at_once, _MIN_SLOTS))
    partial = torch.empty((chunks, heads, 2 * tiles, block, dim), dtype=torch.float32, device=q.device)
    scratch = {"weights_ptr": q.new_empty(at_once * rows, tiles * block), "grads_ptr": q.new_empty(at_once * rows, tiles * block)}
    scratch |= {"skewed_ptr": q.new_empty(at_once * rows, (tiles + 1) * block), "partial_ptr": partial}
    if launching(q):
        given = {"q_ptr": q, "stride_q": q.stride(0), "stride_qh": q.stride(1), "grad_q_ptr": grad_q, "grad_out_ptr": grad_out}
        given |= {"k_ptr": k, "stride_k": k.stride(0), "stride_kh": k.stride(1), "grad_k_ptr": grad_k, "total_frames": frames}
        given |= {"v_ptr": v, "stride_v": v.stride(0), "stride_vh": v.stride(1), "grad_v_ptr": grad_v, "blocks_ptr": blocks}
        given |= {"e_ptr": rel_pos_emb, "stride_e": rel_pos_emb.stride(0), "max_pos_emb": rel_pos_emb.shape[0] // 2}
        given |= {"out_ptr": out, "rest_ptr": rest if q.dtype != torch.float32 else None, "lse_ptr": lse, "scale": scale}
        given |= {"num_heads": heads, "dim_head": dim, "context_size": context_size, "slots_per_chunk": triton.cdiv(at_once, chunks)}
        for first_slot in range(0, slots, at_once):
            here = min(at_once, slots - first_slot)
            grids = (tiles, heads, here), (2 * tiles, heads, here), (chunks, heads, 2 * tiles)
            _launch_round(grids, _tiles(q), given | scratch | {"first_slot": first_slot, "slots": here})
    bands = partial.sum((0, 1)).flatten(0, 1) * scale  # from distance -tiles · block on
    beyond = rel_pos_emb.shape[0] // 2 - reach
    grad_e = torch.nn.functional.pad(bands[tiles * block - reach : tiles * block + reach + 1], (0, 0, beyond, beyond))
    return grad_q, grad_k, grad_v, grad_e.to(rel_pos_emb.dtype)


def _launch_round(grids: tuple[tuple[int, ...], ...], tiles: tuple[Tile, ...], given: dict[str, object]) -> None:
    """The kernels for a range of slots, each with its own of the `given` arguments."""
    (of_queries, of_keys, of_bands), (scores, queries, products) = grids, tiles
    for kernel, grid, tile in (
        (_block_attention_bwd_scores_kernel, of_queries, scores),
        (_block_attention_bwd_q_kernel, of_queries, queries),
        (_block_attention_bwd_kv_kernel, of_keys, products),
        (_block_attention_bwd_e_kernel, of_bands, products),
    ):
        launch(kernel, grid, tile, **{name: given[name] for name in kernel.arg_names if name in given})


def _tiles(q: Tensor) -> tuple[Tile, Tile, Tile]:
    """The tiles of scores, of grad_q, and of the other gradients. Two head widths keep compilations few."""
    key = architecture(q.device), q.element_size()
    scores = _SCORES[key]
    width = 64 if q.shape[2] <= 64 and q.element_size() == 2 else 128
    sizes = {"BLOCK": scores.blocks["BLOCK"], "BLOCK_D": width}
    queries, products = (replace(table[key], blocks=sizes) for table in (_QUERIES, _PRODUCTS))
    return replace(scores, blocks={**scores.blocks, **sizes, "STEP": min(scores.blocks["STEP"], width)}), queries, products


backward_op = register(_block_attention_backward)
