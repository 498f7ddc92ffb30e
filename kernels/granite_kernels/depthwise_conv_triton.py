"""The gated depthwise convolution in Triton: tiles, launches and gradients of the kernels of depthwise_conv_kernels."""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
import triton

from granite_kernels.depthwise_conv_kernels import _depthwise_conv_bwd_kernel, _depthwise_conv_fwd_kernel
from granite_kernels.errors import KernelError
from granite_kernels.launch import ARCHITECTURES, MULTIPROCESSORS, Tile, architecture, launch, launching, register
from granite_kernels.op import CHOICE
from granite_kernels.tiles import TileTable, predicted

# The compiled window lengths. A kernel of another size uses the next longer one, with zero taps around its own. (So a frame that is
# not finite spoils all frames of its clip that the window reaches.)
_WINDOWS = (7, 15, 31)


def _tile(block_t: int, wide: int, step: int) -> Tile:
    """A tile of one warp, with `wide` channels per thread."""
    return Tile({"BLOCK_T": block_t, "BLOCK_C": 32 * wide, "STEP": step}, 1)


# By batch and window: BLOCK_T, channels per thread, frames of x per step. With a stride of 2, the same tiles have half as many results;
# they were not timed with it. The frames that a tile shares with its neighbours are read again
# from L2 and gated again, so a tile should be long; but every multiprocessor should have several programs. The next step is loaded
# while this one is computed, so wide and long steps hide latency, but take registers and so leave fewer warps.
# On an H200 on 2026-11-26, of 36 tiles of a kernel that masked every row, (32, 1, 8) was the fastest for one clip of 10 s, (32, 2, 8) for
# one of 30 s, and (128, 4, 8) and (128, 2, 8) for 128 clips; without masks, (128, 2, 8).
_USUAL = {
    "short": {7: (32, 1, 8), 15: (32, 1, 8), 31: (32, 1, 4)},
    "middle": {7: (32, 2, 8), 15: (32, 2, 8), 31: (64, 1, 4)},
    "long": {7: (128, 2, 8), 15: (128, 2, 8), 31: (128, 1, 4)},
}
_OTHERS = {
    "short": ((16, 1, 8), (16, 2, 4), (16, 2, 8), (32, 1, 4), (32, 2, 4), (64, 1, 8)),
    "middle": ((32, 1, 8), (32, 2, 4), (64, 1, 4), (64, 1, 8), (64, 2, 8), (64, 1, 16)),
    "long": ((64, 2, 8), (128, 1, 8), (128, 1, 16), (128, 4, 8), (256, 1, 16), (256, 2, 8)),
}


def _candidates(key: tuple[int, int, str]) -> list[Tile]:
    _, taps, batch = key
    return [_tile(*one) for one in dict.fromkeys((_USUAL[batch][taps], *_OTHERS[batch]))]


_TILES = TileTable(
    "depthwise_conv",
    "forward",
    {
        (chip, taps, batch): predicted(_tile(*one), "2026-11-27")
        for chip in ARCHITECTURES
        for batch, by_taps in _USUAL.items()
        for taps, one in by_taps.items()
    },
    candidates=_candidates,
)
# The most frames times channels, for each multiprocessor, of a short and a middle batch: with 2048 channels on an H200, 900 and 3,350
# frames. From there on, the next batch's tiles give every multiprocessor six programs.
_SHORT, _MIDDLE = 14_000, 52_000
# The backward's second walk also keeps a sum per tap: (channels per thread, frames per step). A batch is cut into about
# _GRADIENT_PARTS tiles, each of which writes kernel_size + 1 sums per channel.
_GRADIENT_TILES = TileTable(
    "depthwise_conv",
    "backward",
    {
        (chip, taps): predicted(Tile({"BLOCK_C": 32 * wide, "STEP": step}, 1), "2026-11-27")
        for chip in ARCHITECTURES
        for taps, (wide, step) in {7: (2, 4), 15: (2, 4), 31: (1, 2)}.items()
    },
    candidates=lambda key: [Tile({"BLOCK_C": 32 * wide, "STEP": step}, 1) for wide in (1, 2) for step in (2, 4)],
)
_GRADIENT_PARTS = 64


def _window(kernel_size: int) -> int:
    """The window length for a kernel of this size."""
    for taps in _WINDOWS:
        if kernel_size <= taps:
            return taps
    raise KernelError(
        got=f"depthwise_conv: weight has kernel_size {kernel_size}",
        expected=f"at most {_WINDOWS[-1]} with impl='triton'",
        remedy=f"Use impl='torch' or {CHOICE}=torch to run the PyTorch reference",
    )


def _batch(chip: int, size: int) -> str:
    """The class of a batch of `size` frames times channels. A frame's sum is the same in every class."""
    share = size // MULTIPROCESSORS[chip]
    return "short" if share <= _SHORT else "middle" if share <= _MIDDLE else "long"


def _complete(tile: Tile, taps: int, channels: int, stride: int) -> Tile:
    """The tile with the constants that are no choice."""
    return replace(tile, blocks={**tile.blocks, "TAPS": taps, "WHOLE": int(channels % tile.blocks["BLOCK_C"] == 0), "STRIDE": stride})


def _convolve(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
    stride: int,
    cu_seqlens_out: torch.Tensor | None,
    dout: torch.Tensor | None = None,
) -> torch.Tensor:
    """The result; or, given its gradient `dout`, the gradient of SiLU's input."""
    frames, (channels, kernel_size), clips = x.shape[0], weight.shape, cu_seqlens.shape[0] - 1
    taps, rows = _window(kernel_size), frames // stride
    # float32, because dz is summed over the whole batch for scale and shift, where rounding errors would show.
    out = x.new_empty(rows, channels, dtype=x.dtype if dout is None else torch.float32)
    if launching(x):
        chip = architecture(x.device)
        tile = _complete(_TILES[chip, taps, _batch(chip, frames * channels)], taps, channels, stride)
        blocks = dict(tile.blocks)
        tile_rows = blocks.pop("BLOCK_T") // stride  # no constant of the kernel, which is the same for tiles of any length
        if dout is not None:
            blocks["STEP"] = max(blocks["STEP"] // 2, 2)  # dout's rows need registers too
        grid = ((rows // tile_rows + clips + 1) * triton.cdiv(channels, blocks["BLOCK_C"]),)
        launch(
            _depthwise_conv_fwd_kernel, grid, replace(tile, blocks=blocks), x_ptr=x, weight_ptr=weight, scale_ptr=scale, shift_ptr=shift,
            cu_seqlens_ptr=cu_seqlens, cu_seqlens_out_ptr=cu_seqlens_out, dout_ptr=dout, out_ptr=out, num_clips=clips, total_rows=rows,
            channels=channels, kernel_size=kernel_size, tile_rows=tile_rows, stride_x=x.stride(0), stride_weight=weight.stride(0),
        )  # fmt: skip
    return out


def _depthwise_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
    stride: int = 1,
    cu_seqlens_out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`depthwise_conv` by the Triton kernels.

    Raises:
        KernelError: kernel_size is above 31.
    """
    return _convolve(x, weight, scale, shift, cu_seqlens, stride, _places(cu_seqlens, stride, cu_seqlens_out))


def _places(cu_seqlens: torch.Tensor, stride: int, cu_seqlens_out: torch.Tensor | None) -> torch.Tensor | None:
    """Where each clip begins in the result, on the device, unless that is where it begins in x."""
    if stride == 1 or cu_seqlens_out is not None:
        return cu_seqlens_out
    return F.pad((cu_seqlens.diff() // 2).cumsum(0), (1, 0)).to(torch.int32)


def _depthwise_conv_backward(
    dout: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
    cu_seqlens_out: torch.Tensor | None,
    stride: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, weight, scale and shift, the last two even if scale and shift are None."""
    frames, (channels, kernel_size), clips = x.shape[0], weight.shape, cu_seqlens.shape[0] - 1
    taps = _window(kernel_size)
    cu_seqlens_out = _places(cu_seqlens, stride, cu_seqlens_out)
    dz = dout if scale is None else _convolve(x, weight, scale, shift, cu_seqlens, stride, cu_seqlens_out, dout)
    scale = torch.ones(channels, dtype=torch.float32, device=x.device) if scale is None else scale
    tile_rows = max(32, 8 * triton.cdiv(frames, 8 * _GRADIENT_PARTS))  # a multiple of every STEP
    slots = frames // tile_rows + clips + 1
    dx = x.new_empty(frames, 2 * channels)
    partial = x.new_empty(slots, taps + 1, channels, dtype=torch.float32)
    if launching(x):
        tile = _complete(_GRADIENT_TILES[architecture(x.device), taps], taps, channels, stride)
        grid = (slots * triton.cdiv(channels, tile.blocks["BLOCK_C"]),)
        launch(
            _depthwise_conv_bwd_kernel, grid, tile, x_ptr=x, dz_ptr=dz, weight_ptr=weight, scale_ptr=scale, cu_seqlens_ptr=cu_seqlens,
            cu_seqlens_out_ptr=cu_seqlens_out, dx_ptr=dx, partial_ptr=partial, num_clips=clips, total_rows=frames, channels=channels,
            kernel_size=kernel_size, tile_rows=tile_rows, stride_x=x.stride(0), stride_weight=weight.stride(0),
        )  # fmt: skip
    sums = partial.sum(0)
    # Σ_t dz_t · h for each tap: times the scale it is the gradient of weight; times the tap, summed over taps, that of scale.
    products = sums[taps // 2 - kernel_size // 2 :][:kernel_size].t()
    dweight = (products * scale[:, None]).to(weight.dtype, memory_format=torch.contiguous_format)
    return dx, dweight, (products * weight).sum(1), sums[taps].clone()


depthwise_conv_triton = register(_depthwise_conv)
_backward_op = register(_depthwise_conv_backward)


def _save(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    *tensors, ctx.stride, cu_seqlens_out = inputs
    ctx.save_for_backward(*tensors, cu_seqlens_out)


def _backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    # Detached, so that asking for a second derivative, which does not exist, raises.
    saved = [None if tensor is None else tensor.detach() for tensor in ctx.saved_tensors]
    dx, dweight, *affine = _backward_op(dout.detach().contiguous(), *saved, ctx.stride)
    return (dx, dweight, *([None, None] if saved[2] is None else affine), None, None, None)


depthwise_conv_triton.register_autograd(_backward, setup_context=_save)
