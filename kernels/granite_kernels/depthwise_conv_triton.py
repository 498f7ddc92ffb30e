"""The gated depthwise convolution in Triton: a walk over time with the last kernel_size gated frames in registers.

A program computes BLOCK_C channels of BLOCK_T frames of one clip. It loads one row at a time, gates it and appends it to a window
in registers, which is multiplied by the taps. So each element costs one sigmoid, where gathering the taps would cost kernel_size
reads of shared memory. Threads exchange nothing, and the frames of the next step are loaded while one step is computed. A frame's
sum is always in the order of the taps, whichever tile the frame is in.

The backward makes the same walk twice. First it recomputes the convolution, for the gradient dz at the input of SiLU. Then a
window over dz gives each frame's gradient (with the taps reversed) and, multiplied by its gated value, the gradients of the taps.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from granite_kernels.errors import KernelError
from granite_kernels.launch import Tile, architecture, launch, launching, register
from granite_kernels.op import CHOICE
from granite_kernels.primitives import INTERPRETED, locate, rounded

# The compiled window lengths. A kernel of another size uses the next longer one, with zero taps around its own. (So a frame that is
# not finite spoils all frames of its clip that the window reaches.)
_WINDOWS = (7, 15, 31)

# By architecture and window: (BLOCK_T, channels per thread, frames per step). Chosen 2026-11-22 from machine code and rooflines, not
# by measurement. BLOCK_T: the frames that a tile shares with its neighbours are read again from L2 and gated again, so a tile
# should be long, but one 10 s clip (500 × 2048) should still give each of 132 multiprocessors a program. The others: the next
# step is loaded while this one is computed, so wide and long steps hide latency and share the cost of addresses, but take
# registers and so leave fewer warps. For 15 taps, 2 × 8 allows 16 warps with 32 KiB in flight, and 4 × 4 only 8 warps.
_TILES = {
    80: {7: (32, 4, 4), 15: (64, 2, 8), 31: (64, 2, 2)},
    90: {7: (32, 4, 4), 15: (64, 2, 8), 31: (64, 2, 2)},
    100: {7: (32, 4, 4), 15: (64, 2, 8), 31: (64, 2, 2)},
}
# The backward's second walk also keeps a sum per tap: (channels per thread, frames per step). A batch is cut into about
# _GRADIENT_PARTS tiles, each of which writes kernel_size + 1 sums per channel.
_GRADIENT_TILES = {7: (2, 4), 15: (2, 4), 31: (1, 2)}
_GRADIENT_PARTS = 64


@triton.jit
def _divide(a, b):
    """a / b for b ≥ 1, within 2 ulp, in two instructions. The interpreter has no libdevice."""
    if INTERPRETED:
        return a / b
    else:
        return libdevice.fast_dividef(a, b)


@triton.jit
def _exp2(x):
    """2 ** x in one instruction, which flushes subnormal results to 0."""
    if INTERPRETED:
        return tl.exp2(x)
    else:
        return libdevice.exp2(x)


@triton.jit
def _gated(value, gate):
    """value · sigmoid(gate)"""
    return _divide(value, 1.0 + _exp2(gate * -1.4426950408889634))


@triton.jit
def _load_taps(weight_ptr, stride_weight, scale, cols, exists, kernel_size, TAPS: tl.constexpr, BLOCK_C: tl.constexpr):
    """The taps of BLOCK_C channels times their scale, as TAPS vectors. Tap kernel_size // 2 is vector TAPS // 2."""
    # Rows of weight are read and transposed on chip, because a column would touch one cache line per channel.
    tap = tl.arange(0, TAPS + 1) - (TAPS // 2 - kernel_size // 2)
    there = exists[:, None] & ((tap >= 0) & (tap < kernel_size))[None, :]
    columns = (tl.load(weight_ptr + cols.to(tl.int64)[:, None] * stride_weight + tap[None, :], mask=there, other=0.0),)
    for level in tl.static_range(5):
        if (TAPS + 1) >> level > 1:
            evens = ()
            odds = ()
            for part in tl.static_range(2**level):
                even, odd = tl.split(tl.reshape(columns[part], (BLOCK_C, (TAPS + 1) >> (level + 1), 2)))
                evens += (even,)
                odds += (odd,)
            columns = evens + odds
    taps = ()
    for i in tl.static_range(TAPS):
        taps += (tl.reshape(columns[i], (BLOCK_C,)).to(tl.float32) * scale,)
    return taps


@triton.jit
def _load_rows(ptr, stride, row, start, end, exists, ROWS: tl.constexpr):
    """ROWS frames from `row` on, to which `ptr` points; zeros for frames outside of [start, end)."""
    rows = ()
    for r in tl.static_range(ROWS):
        rows += (tl.load(ptr + r * stride, mask=exists & (row + r >= start) & (row + r < end), other=0.0),)
    return rows


@triton.jit
def _widen_rows(rows, ROWS: tl.constexpr):
    wide = ()
    for r in tl.static_range(ROWS):
        wide += (rows[r].to(tl.float32),)
    return wide


@triton.jit
def _gate_rows(values, gates, ROWS: tl.constexpr):
    rows = ()
    for r in tl.static_range(ROWS):
        rows += (_gated(values[r].to(tl.float32), gates[r].to(tl.float32)),)
    return rows


@triton.jit(do_not_specialize=["num_clips", "total_rows", "kernel_size"])
def _depthwise_conv_fwd_kernel(
    x_ptr, weight_ptr, scale_ptr, shift_ptr, cu_seqlens_ptr, dout_ptr, out_ptr, num_clips, total_rows, channels, kernel_size,
    stride_x, stride_weight,
    TAPS: tl.constexpr, STEP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """z = scale · conv + shift for BLOCK_C channels and BLOCK_T frames of one clip, or of the padding after the last clip.

    Writes SiLU(z); if scale is None, z; if dout is given, dout times the derivative of SiLU at z.
    Grid: ((total_rows // BLOCK_T + num_clips + 1) · (channels / BLOCK_C),), channels fastest, so that neighbours read whole rows.

    x: (total_rows, 2 · channels), stride (stride_x, 1). weight: (channels, kernel_size), stride (stride_weight, 1).
    scale, shift: (channels,) float32, or None. cu_seqlens: (num_clips + 1,) int32. dout (or None), out: (total_rows, channels).
    """
    groups = tl.cdiv(channels, BLOCK_C)
    clip, start, end, tile = locate(tl.program_id(0) // groups, cu_seqlens_ptr, num_clips, total_rows, BLOCK_T)
    first = start + tile * BLOCK_T
    last = tl.minimum(first + BLOCK_T, end)
    if first < last:
        # Padding is computed as a clip whose frames, taps and shift are all zero, and so is its result.
        live = clip < num_clips
        cols = tl.program_id(0) % groups * BLOCK_C + tl.arange(0, BLOCK_C)
        exists = cols < channels
        scale = 1.0
        shift = tl.zeros((BLOCK_C,), tl.float32)
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + cols, mask=exists & live, other=0.0)
            shift = tl.load(shift_ptr + cols, mask=exists & live, other=0.0)
        taps = _load_taps(weight_ptr, stride_weight, scale, cols, exists & live, kernel_size, TAPS, BLOCK_C)

        readable = tl.where(live, tl.minimum(end, last + TAPS // 2), start)
        stride = tl.cast(stride_x, tl.int64)
        row = first - TAPS // 2
        value_ptr = x_ptr + row * stride + cols
        values = _load_rows(value_ptr, stride, row, start, readable, exists, TAPS - 1)
        window = _gate_rows(values, _load_rows(value_ptr + channels, stride, row, start, readable, exists, TAPS - 1), TAPS - 1)
        row += TAPS - 1
        value_ptr += (TAPS - 1) * stride
        next_values = _load_rows(value_ptr, stride, row, start, readable, exists, STEP)
        next_gates = _load_rows(value_ptr + channels, stride, row, start, readable, exists, STEP)
        offset = first.to(tl.int64) * channels
        for t in range(first, last, STEP):
            window += _gate_rows(next_values, next_gates, STEP)
            row += STEP
            value_ptr += STEP * stride
            next_values = _load_rows(value_ptr, stride, row, start, readable, exists, STEP)
            next_gates = _load_rows(value_ptr + channels, stride, row, start, readable, exists, STEP)
            if dout_ptr is not None:
                douts = _load_rows(dout_ptr + offset + cols, channels, t, start, tl.minimum(last, readable), exists, STEP)
            for r in tl.static_range(STEP):
                z = shift
                for i in tl.static_range(TAPS):
                    z += taps[i] * window[r + i]
                if dout_ptr is not None:
                    sigmoid = _gated(1.0, z)
                    z = douts[r].to(tl.float32) * sigmoid * (1.0 + z * (1.0 - sigmoid))
                elif scale_ptr is not None:
                    z = _gated(z, z)
                tl.store(out_ptr + offset + r * channels + cols, rounded(z, out_ptr.dtype.element_ty), mask=exists & (t + r < last))
            window = window[STEP:]
            offset += STEP * channels


@triton.jit(do_not_specialize=["num_clips", "total_rows", "kernel_size", "tile_rows"])
def _depthwise_conv_bwd_kernel(
    x_ptr, dz_ptr, weight_ptr, scale_ptr, cu_seqlens_ptr, dx_ptr, partial_ptr, num_clips, total_rows, channels, kernel_size,
    tile_rows, stride_x, stride_weight,
    TAPS: tl.constexpr, STEP: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradients for BLOCK_C channels and tile_rows frames of one clip, or of the padding after the last clip.

    Writes dx, and this tile's part of Σ_t dz_t · h_{t + i − TAPS // 2} for each tap i, followed by its part of Σ_t dz_t.
    Grid: (slots · (channels / BLOCK_C),) with slots = total_rows // tile_rows + num_clips + 1; an idle slot's sums are zero.

    x: (total_rows, 2 · channels), stride (stride_x, 1). weight: (channels, kernel_size), stride (stride_weight, 1).
    scale: (channels,) float32. cu_seqlens: (num_clips + 1,) int32. dz: (total_rows, channels), dx: (total_rows, 2 · channels),
    partial: (slots, TAPS + 1, channels) float32, all contiguous.
    """
    groups = tl.cdiv(channels, BLOCK_C)
    slot = tl.program_id(0) // groups
    clip, start, end, tile = locate(slot, cu_seqlens_ptr, num_clips, total_rows, tile_rows)
    first = start + tile * tile_rows
    last = tl.minimum(first + tile_rows, end)
    live = clip < num_clips
    cols = tl.program_id(0) % groups * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = cols < channels
    scale = tl.load(scale_ptr + cols, mask=exists, other=0.0)
    taps = _load_taps(weight_ptr, stride_weight, scale, cols, exists & live, kernel_size, TAPS, BLOCK_C)
    sums = ()
    for _ in tl.static_range(TAPS + 1):
        sums += (tl.zeros((BLOCK_C,), tl.float32),)

    readable = tl.where(live, tl.minimum(end, last + TAPS // 2), start)
    stride = tl.cast(stride_x, tl.int64)
    value_ptr = x_ptr + first * stride + cols
    row = first - TAPS // 2
    ahead_ptr = dz_ptr + row.to(tl.int64) * channels + cols
    window = _widen_rows(_load_rows(ahead_ptr, channels, row, start, readable, exists, TAPS - 1), TAPS - 1)
    row += TAPS - 1
    ahead_ptr += (TAPS - 1) * channels
    next_dz = _load_rows(ahead_ptr, channels, row, start, readable, exists, STEP)
    own = tl.where(live, last, start)
    next_values = _load_rows(value_ptr, stride, first, start, own, exists, STEP)
    next_gates = _load_rows(value_ptr + channels, stride, first, start, own, exists, STEP)
    dvalue_ptr = dx_ptr + first.to(tl.int64) * 2 * channels + cols
    for t in range(first, last, STEP):
        window += _widen_rows(next_dz, STEP)
        values = next_values
        gates = next_gates
        row += STEP
        ahead_ptr += STEP * channels
        value_ptr += STEP * stride
        next_dz = _load_rows(ahead_ptr, channels, row, start, readable, exists, STEP)
        next_values = _load_rows(value_ptr, stride, t + STEP, start, own, exists, STEP)
        next_gates = _load_rows(value_ptr + channels, stride, t + STEP, start, own, exists, STEP)
        for r in tl.static_range(STEP):
            value = values[r].to(tl.float32)
            sigmoid = _gated(1.0, gates[r].to(tl.float32))
            h = value * sigmoid
            dh = tl.zeros((BLOCK_C,), tl.float32)
            products = ()
            for i in tl.static_range(TAPS):
                dz = window[r + TAPS - 1 - i]
                dh += taps[i] * dz
                products += (sums[i] + dz * h,)
            # STEP divides tile_rows, so frames after `last` are after the clip too, where dz and h are zero.
            products += (sums[TAPS] + window[r + TAPS // 2],)
            sums = products
            there = exists & (t + r < last)
            dvalue = dh * sigmoid
            dgate = dvalue * value * (1.0 - sigmoid)
            tl.store(dvalue_ptr + r * 2 * channels, rounded(dvalue, dx_ptr.dtype.element_ty), mask=there)
            tl.store(dvalue_ptr + r * 2 * channels + channels, rounded(dgate, dx_ptr.dtype.element_ty), mask=there)
        window = window[STEP:]
        dvalue_ptr += STEP * 2 * channels
    sum_ptr = partial_ptr + slot.to(tl.int64) * (TAPS + 1) * channels + cols
    for i in tl.static_range(TAPS + 1):
        tl.store(sum_ptr + i * channels, sums[i], mask=exists)


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


def _convolve(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
    dout: torch.Tensor | None = None,
) -> torch.Tensor:
    """The result; or, given its gradient `dout`, the gradient of SiLU's input."""
    frames, (channels, kernel_size), clips = x.shape[0], weight.shape, cu_seqlens.shape[0] - 1
    taps = _window(kernel_size)
    # float32, because dz is summed over the whole batch for scale and shift, where rounding errors would show.
    out = x.new_empty(frames, channels, dtype=x.dtype if dout is None else torch.float32)
    if launching(x):
        block_t, wide, step = _TILES[architecture(x.device)][taps]
        step = step if dout is None else max(step // 2, 2)  # dout's rows need registers too
        tile = Tile({"TAPS": taps, "STEP": step, "BLOCK_T": block_t, "BLOCK_C": 32 * wide}, num_warps=1)
        grid = ((frames // block_t + clips + 1) * triton.cdiv(channels, 32 * wide),)
        launch(
            _depthwise_conv_fwd_kernel, grid, tile, x_ptr=x, weight_ptr=weight, scale_ptr=scale, shift_ptr=shift,
            cu_seqlens_ptr=cu_seqlens, dout_ptr=dout, out_ptr=out, num_clips=clips, total_rows=frames, channels=channels,
            kernel_size=kernel_size, stride_x=x.stride(0), stride_weight=weight.stride(0),
        )  # fmt: skip
    return out


def _depthwise_conv(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None, shift: torch.Tensor | None, cu_seqlens: torch.Tensor
) -> torch.Tensor:
    """`depthwise_conv` by the Triton kernels.

    Raises:
        KernelError: kernel_size is above 31.
    """
    return _convolve(x, weight, scale, shift, cu_seqlens)


def _depthwise_conv_backward(
    dout: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, weight, scale and shift, the last two even if scale and shift are None."""
    frames, (channels, kernel_size), clips = x.shape[0], weight.shape, cu_seqlens.shape[0] - 1
    taps = _window(kernel_size)
    dz = dout if scale is None else _convolve(x, weight, scale, shift, cu_seqlens, dout)
    scale = torch.ones(channels, dtype=torch.float32, device=x.device) if scale is None else scale
    wide, step = _GRADIENT_TILES[taps]
    tile_rows = max(32, step * triton.cdiv(frames, step * _GRADIENT_PARTS))
    slots = frames // tile_rows + clips + 1
    dx = x.new_empty(frames, 2 * channels)
    partial = x.new_empty(slots, taps + 1, channels, dtype=torch.float32)
    if launching(x):
        tile = Tile({"TAPS": taps, "STEP": step, "BLOCK_C": 32 * wide}, num_warps=1)
        launch(
            _depthwise_conv_bwd_kernel, (slots * triton.cdiv(channels, 32 * wide),), tile, x_ptr=x, dz_ptr=dz, weight_ptr=weight,
            scale_ptr=scale, cu_seqlens_ptr=cu_seqlens, dx_ptr=dx, partial_ptr=partial, num_clips=clips, total_rows=frames,
            channels=channels, kernel_size=kernel_size, tile_rows=tile_rows, stride_x=x.stride(0), stride_weight=weight.stride(0),
        )  # fmt: skip
    sums = partial.sum(0)
    # Σ_t dz_t · h for each tap: times the scale it is the gradient of weight; times the tap, summed over taps, that of scale.
    products = sums[taps // 2 - kernel_size // 2 :][:kernel_size].t()
    dweight = (products * scale[:, None]).to(weight.dtype, memory_format=torch.contiguous_format)
    return dx, dweight, (products * weight).sum(1), sums[taps].clone()


depthwise_conv_triton = register(_depthwise_conv)
_backward_op = register(_depthwise_conv_backward)


def _save(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    # Detached, so that asking for a second derivative, which does not exist, raises.
    saved = [None if tensor is None else tensor.detach() for tensor in ctx.saved_tensors]
    dx, dweight, dscale, dshift = _backward_op(dout.detach().contiguous(), *saved)
    return (dx, dweight, None, None, None) if saved[2] is None else (dx, dweight, dscale, dshift, None)


depthwise_conv_triton.register_autograd(_backward, setup_context=_save)
