"""The forward's tiles and launch, and the registration of `block_attention` with its backward."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from granite_kernels.attention_blocks_triton import attention_blocks_triton
from granite_kernels.block_attention_backward_triton import backward_op
from granite_kernels.block_attention_kernels import JOINT, LOG2_E, MIRROR, SLIDE, _block_attention_fwd_kernel
from granite_kernels.errors import KernelError
from granite_kernels.launch import Tile, architecture, launch, launching, register
from granite_kernels.tiles import TileTable, predicted


def _form(form: tl.constexpr, block: int, keys: int, step: int, warps: int, stages: int = 1) -> Tile:
    return Tile({"FORM": form.value, "BLOCK": block, "KEYS": keys, "STEP": step}, warps, stages)


_DATE = "2026-11-27"
_JOINT_32, _SLIDE_32, _MIRROR_64 = (_form(*form, 128, 4, 2) for form in ((JOINT, 64, 32), (SLIDE, 64, 32), (MIRROR, 64, 64)))
_SMALL = [_form(form, 16, 16, 32, 2) for form in (MIRROR, SLIDE)]
_CANDIDATES = {
    (80, 2): [*(_form(form, 32, 32, 32, 2) for form in (MIRROR, SLIDE)), _form(MIRROR, 32, 32, 64, 2)],
    (90, 2): [
        *(_form(form, 64, 32, 128, 4, stages) for form in (JOINT, SLIDE) for stages in (2, 3)),
        *(_form(form, 64, 64, 128, 4, 2) for form in (JOINT, SLIDE, MIRROR)),
        _form(MIRROR, 64, 64, 128, 4, 3),
    ],
    (100, 2): [_form(MIRROR, 64, 64, 128, 4), _form(SLIDE, 64, 64, 128, 4), _SLIDE_32],
    **{(chip, 4): _SMALL for chip in (80, 90, 100)},
}
# By architecture and bytes per element. The kernel is slowed by waiting: the mirror's loop took 854 µs with one program on a
# multiprocessor of an H200, and 538 with two (bench/results/experiments-nvidia-h200-2026-11-26-cdd1619a.json). So the row for 90 is the
# form of which most programs fit, then the one with the fewest instructions and waits. Compiled for 90 in bfloat16, 4 warps, 2 stages:
#
#     | form | keys a step | registers | shared, KiB | programs | instructions in the loop, for 64 keys | waits for products in a step |
#     | mirror | 64 | 255 | 112 | 2 | 886 | 2 |
#     | slide | 64 | 202 | 112 | 2 | 817 | 2 |
#     | joint | 64 | 238 | 112 | 2 | 830 | 1 |
#     | slide | 32 | 156 | 64 | 3 | 1012 | 2 |
#     | joint | 32 | 168 | 64 | 3 | 1002 | 1 |
#
# A block of 200 frames has 7 tiles of 32 keys, or 4 of 64. On 80 and 100 the results of products are laid out in another way, in which
# sliding goes through shared memory. float32 needs three products for each, so its tiles are small.
_TILES = TileTable(
    "block_attention",
    "forward",
    {
        (80, 2): predicted(_CANDIDATES[80, 2][0], _DATE),
        (90, 2): predicted(_JOINT_32, _DATE),
        (100, 2): predicted(_CANDIDATES[100, 2][0], _DATE),
        **{(chip, 4): predicted(_SMALL[0], _DATE) for chip in (80, 90, 100)},
    },
    candidates=lambda key: _CANDIDATES[key],
    alternatives={(80, 2): [_CANDIDATES[80, 2][1]], (90, 2): [_SLIDE_32, _MIRROR_64], (100, 2): [_SLIDE_32], (90, 4): [_SMALL[1]]},
    bits=("FORM", "BLOCK", "KEYS", "STEP"),
)
# The slots of a grid's third axis.
_MOST_SLOTS = 65535


def _tile(q: Tensor) -> Tile:
    """The tile, independent of the batch, so that a clip gets the same bits in every batch. Two head widths keep compilations few."""
    tile = _TILES[architecture(q.device), q.element_size()]
    width = 64 if q.shape[2] <= 64 and q.element_size() == 2 else 128
    return Tile({**tile.blocks, "BLOCK_D": width, "STEP": min(tile.blocks["STEP"], width)}, tile.num_warps, tile.num_stages)


def _block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_pos_emb: Tensor,
    cu_seqlens: Tensor,
    blocks: Tensor | None,
    context_size: int,
    scale: float,
    for_backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The result; for a backward also its rounding error and the (num_heads, total_frames) base-2 log-sum-exp, else empty."""
    frames, heads, dim = q.shape
    with_rest = for_backward and q.dtype != torch.float32
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    rest = torch.empty(q.shape if with_rest else (0,), dtype=q.dtype, device=q.device)
    lse = torch.empty((heads, frames) if for_backward else (0,), dtype=torch.float32, device=q.device)
    if launching(q):
        blocks = _blocks(cu_seqlens, blocks, frames, context_size)
        tile = _tile(q)
        launch(
            _block_attention_fwd_kernel, (triton.cdiv(context_size, tile.blocks["BLOCK"]), heads, blocks.shape[0]), tile,
            q_ptr=q, k_ptr=k, v_ptr=v, e_ptr=rel_pos_emb, blocks_ptr=blocks, out_ptr=out,
            rest_ptr=rest if with_rest else None, lse_ptr=lse if for_backward else None,
            total_frames=frames, num_heads=heads, dim_head=dim, context_size=context_size, max_pos_emb=rel_pos_emb.shape[0] // 2,
            scale=scale * LOG2_E.value, stride_q=q.stride(0), stride_qh=q.stride(1), stride_k=k.stride(0), stride_kh=k.stride(1),
            stride_v=v.stride(0), stride_vh=v.stride(1), stride_e=rel_pos_emb.stride(0),
        )  # fmt: skip
    return out, rest, lse


def _blocks(cu_seqlens: Tensor, given: Tensor | None, total_frames: int, context_size: int) -> Tensor:
    """The table of blocks, made now if it is not given."""
    return attention_blocks_triton.launcher(cu_seqlens, total_frames, context_size) if given is None else given


_forward_op = register(_block_attention)


def _save(ctx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, rel_pos_emb, cu_seqlens, blocks, ctx.context_size, ctx.scale, _ = inputs
    ctx.save_for_backward(q, k, v, rel_pos_emb, cu_seqlens, blocks, *output)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, grad_out: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    # There is no second derivative.
    q, k, v, rel_pos_emb, cu_seqlens, blocks, *forward = (None if one is None else one.detach() for one in ctx.saved_tensors)
    blocks = attention_blocks_triton(cu_seqlens, q.shape[0], ctx.context_size) if blocks is None else blocks
    gradients = backward_op(grad_out.detach().contiguous(), q, k, v, rel_pos_emb, blocks, *forward, ctx.context_size, ctx.scale)
    return *gradients, None, None, None, None, None


_forward_op.register_autograd(_backward, setup_context=_save)


def block_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_pos_emb: Tensor,
    cu_seqlens: Tensor,
    context_size: int,
    scale: float | None = None,
    blocks: Tensor | None = None,
) -> Tensor:
    """`block_attention` by the Triton kernels.

    Raises:
        KernelError: dim_head is above 128, or the batch has more slots for blocks than a grid.
    """
    for_backward = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v, rel_pos_emb))
    scale = _scale(q, cu_seqlens, context_size, scale)
    return _forward_op(q, k, v, rel_pos_emb, cu_seqlens, blocks, context_size, scale, for_backward)[0]


def _without_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_pos_emb: Tensor,
    cu_seqlens: Tensor,
    context_size: int,
    scale: float | None = None,
    blocks: Tensor | None = None,
) -> Tensor:
    """`block_attention_triton` past torch.library, for `Operation.run`."""
    return _block_attention(q, k, v, rel_pos_emb, cu_seqlens, blocks, context_size, _scale(q, cu_seqlens, context_size, scale), False)[0]


def _scale(q: Tensor, cu_seqlens: Tensor, context_size: int, scale: float | None) -> float:
    """The scale, once the kernels' limits are checked."""
    dim, slots = q.shape[2], q.shape[0] // context_size + cu_seqlens.shape[0]
    for name, value, most in (("dim_head", dim, 128), ("the number of slots for blocks", slots, _MOST_SLOTS)):
        if value > most:
            raise KernelError(
                got=f"block_attention: {name} = {value}",
                expected=f"at most {most}",
                remedy="Use impl='torch' or GRANITE_SPEECH_KERNELS=torch to run the PyTorch reference",
            )
    return dim**-0.5 if scale is None else float(scale)


block_attention_triton.launcher = _without_backward
