"""The kernels of the gated depthwise convolution: a walk over time with the last kernel_size gated frames in registers.

A program computes BLOCK_C channels of some frames of one clip. It loads one row at a time, gates it and appends it to a window
in registers, which is multiplied by the taps. So each element costs one sigmoid, where gathering the taps would cost kernel_size
reads of shared memory. Threads exchange nothing, and the frames of the next step are loaded while one step is computed. A frame's
sum is always in the order of the taps, whichever tile the frame is in.

The backward makes the same walk twice. First it recomputes the convolution, for the gradient dz at the input of SiLU. Then a
window over dz gives each frame's gradient (with the taps reversed) and, multiplied by its gated value, the gradients of the taps.

With a stride of 2 the walks still take STEP frames of x at a time, of which every other one has a result. The gradient of a frame then
meets every other tap, and which ones they are is known when the kernel is compiled.

The sizes of x that a model fixes are constants of the kernels: then a row's address is part of the load, and takes no instruction and
no register.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

from granite_kernels.primitives import INTERPRETED, locate, rounded


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
def _channels(program, channels, BLOCK_C: tl.constexpr, WHOLE: tl.constexpr):
    """The program's channels, and whether each exists. If BLOCK_C divides their number (WHOLE), all do, and no mask is compiled."""
    cols = program % tl.cdiv(channels, BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = tl.full((BLOCK_C,), True, tl.int1) if WHOLE else cols < channels
    return cols, exists


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
def _load_rows(ptr, stride, row, start, end, exists, ROWS: tl.constexpr, EVERY: tl.constexpr = 1):
    """ROWS frames from `row` on, to which `ptr` points; zeros for frames before `start` and from `end` on, unless these are None. The
    frames are EVERY apart, and `stride` is the distance in memory from one to the next."""
    rows = ()
    for r in tl.static_range(ROWS):
        there = exists
        if start is not None:
            there = there & (row + r * EVERY >= start)
        if end is not None:
            there = there & (row + r * EVERY < end)
        rows += (tl.load(ptr + r * stride, mask=there, other=0.0),)
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


@triton.jit
def _walk(
    begin, stop, result, window, values, gates, x_ptr, dout_ptr, out_ptr, cols, exists, readable, last, taps, shift,
    has_scale: tl.constexpr, channels: tl.constexpr, stride_x: tl.constexpr, TAPS: tl.constexpr, STEP: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """Computes the frames from `begin` to `stop`, STEP at a time. The result of `begin` is row `result`, the next that of `begin` + STRIDE.

    `window` has the TAPS - STRIDE gated frames around `begin`, `values` and `gates` the STEP frames after them, and so have the three
    that are returned for `stop`. Frames are not read from `readable` on and not written from `last` on. None for both: all that the steps
    touch exists.
    """
    row = begin + (TAPS - STRIDE - TAPS // 2)
    value_ptr = x_ptr + tl.cast(row, tl.int64) * stride_x + cols
    offset = tl.cast(result, tl.int64) * channels
    for t in range(begin, stop, STEP):
        window += _gate_rows(values, gates, STEP)
        row += STEP
        value_ptr += STEP * stride_x
        values = _load_rows(value_ptr, stride_x, row, None, readable, exists, STEP)
        gates = _load_rows(value_ptr + channels, stride_x, row, None, readable, exists, STEP)
        if dout_ptr is not None:
            douts = _load_rows(dout_ptr + offset + cols, channels, t, None, last, exists, STEP // STRIDE, STRIDE)
        for r in tl.static_range(STEP // STRIDE):
            z = shift
            for i in tl.static_range(TAPS):
                z += taps[i] * window[r * STRIDE + i]
            if dout_ptr is not None:
                sigmoid = _gated(1.0, z)
                z = douts[r].to(tl.float32) * sigmoid * (1.0 + z * (1.0 - sigmoid))
            elif has_scale:
                z = _gated(z, z)
            there = exists
            if last is not None:
                there = there & (t + r * STRIDE < last)
            tl.store(out_ptr + offset + r * channels + cols, rounded(z, out_ptr.dtype.element_ty), mask=there)
        window = window[STEP:]
        offset += STEP // STRIDE * channels
    return window, values, gates


@triton.jit
def _input_of(clip, first, last, start, end, cu_seqlens_ptr, num_clips):
    """Rows `first` to `last` of the result of a clip that lies from `start` to `end` there, and the clip, all as frames of x."""
    begin = tl.load(cu_seqlens_ptr + clip)
    stop = tl.load(cu_seqlens_ptr + tl.minimum(clip + 1, num_clips))  # no frames for the padding after the last clip
    return begin + 2 * (first - start), begin + 2 * (last - start), begin, stop


@triton.jit(do_not_specialize=["num_clips", "total_rows", "kernel_size", "tile_rows"])
def _depthwise_conv_fwd_kernel(
    x_ptr, weight_ptr, scale_ptr, shift_ptr, cu_seqlens_ptr, cu_seqlens_out_ptr, dout_ptr, out_ptr, num_clips, total_rows, kernel_size,
    tile_rows, stride_weight, channels: tl.constexpr, stride_x: tl.constexpr,
    TAPS: tl.constexpr, STEP: tl.constexpr, BLOCK_C: tl.constexpr, WHOLE: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """z = scale · conv + shift for BLOCK_C channels and tile_rows rows of the result of one clip, or of the padding after the last clip.

    Writes SiLU(z); if scale is None, z; if dout is given, dout times the derivative of SiLU at z.
    Grid: ((total_rows // tile_rows + num_clips + 1) · (channels / BLOCK_C),), channels fastest, so that neighbours read whole rows.

    x: (frames, 2 · channels), stride (stride_x, 1). weight: (channels, kernel_size), stride (stride_weight, 1). scale, shift: (channels,)
    float32, or None. cu_seqlens: (num_clips + 1,) int32, and cu_seqlens_out too if STRIDE is 2, else None. dout (or None), out:
    (total_rows, channels).
    """
    slot = tl.program_id(0) // tl.cdiv(channels, BLOCK_C)
    clip, start, end, tile = locate(slot, cu_seqlens_ptr if STRIDE == 1 else cu_seqlens_out_ptr, num_clips, total_rows, tile_rows)
    first = start + tile * tile_rows
    last = tl.minimum(first + tile_rows, end)
    if first < last:
        # Padding is computed as a clip whose frames, taps and shift are all zero, and so is its result.
        live = clip < num_clips
        cols, exists = _channels(tl.program_id(0), channels, BLOCK_C, WHOLE)
        scale = 1.0
        shift = tl.zeros((BLOCK_C,), tl.float32)
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + cols, mask=exists & live, other=0.0)
            shift = tl.load(shift_ptr + cols, mask=exists & live, other=0.0)
        taps = _load_taps(weight_ptr, stride_weight, scale, cols, exists & live, kernel_size, TAPS, BLOCK_C)

        result = first
        if STRIDE == 2:
            first, last, start, end = _input_of(clip, first, last, start, end, cu_seqlens_ptr, num_clips)
        readable = tl.where(live, tl.minimum(end, last + (TAPS // 2 + 1 - STRIDE)), start)
        row = first - TAPS // 2
        value_ptr = x_ptr + row.to(tl.int64) * stride_x + cols
        values = _load_rows(value_ptr, stride_x, row, start, readable, exists, TAPS - STRIDE)
        gates = _load_rows(value_ptr + channels, stride_x, row, start, readable, exists, TAPS - STRIDE)
        window = _gate_rows(values, gates, TAPS - STRIDE)
        row += TAPS - STRIDE
        value_ptr += (TAPS - STRIDE) * stride_x
        values = _load_rows(value_ptr, stride_x, row, None, readable, exists, STEP)
        gates = _load_rows(value_ptr + channels, stride_x, row, None, readable, exists, STEP)
        # A step loads the frames of the next one. Where those are all in the clip, nothing is masked: in all steps of a tile but its
        # last, or in the last tile of a clip its last three or so.
        inner = tl.maximum((readable - row) // STEP - 1, 0)
        middle = first + inner * STEP
        window, values, gates = _walk(
            first, middle, result, window, values, gates, x_ptr, dout_ptr, out_ptr, cols, exists, None, None, taps, shift,
            scale_ptr is not None, channels, stride_x, TAPS, STEP, STRIDE,
        )  # fmt: skip
        _walk(
            middle, last, result + inner * (STEP // STRIDE), window, values, gates, x_ptr, dout_ptr, out_ptr, cols, exists, readable, last,
            taps, shift, scale_ptr is not None, channels, stride_x, TAPS, STEP, STRIDE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_clips", "total_rows", "kernel_size", "tile_rows"])
def _depthwise_conv_bwd_kernel(
    x_ptr, dz_ptr, weight_ptr, scale_ptr, cu_seqlens_ptr, cu_seqlens_out_ptr, dx_ptr, partial_ptr, num_clips, total_rows, kernel_size,
    tile_rows, stride_weight, channels: tl.constexpr, stride_x: tl.constexpr,
    TAPS: tl.constexpr, STEP: tl.constexpr, BLOCK_C: tl.constexpr, WHOLE: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """Gradients for BLOCK_C channels and tile_rows frames of one clip, or of the padding after the last clip.

    Writes dx, and this tile's part of Σ_t dz_t · h_{STRIDE · t + i − TAPS // 2} for each tap i, followed by its part of Σ_t dz_t.
    Grid: (slots · (channels / BLOCK_C),) with slots = total_rows // tile_rows + num_clips + 1; an idle slot's sums are zero.

    x: (total_rows, 2 · channels), stride (stride_x, 1). weight: (channels, kernel_size), stride (stride_weight, 1). scale: (channels,)
    float32. cu_seqlens: (num_clips + 1,) int32, and cu_seqlens_out too if STRIDE is 2, else None. dz: (rows of the result, channels), dx:
    (total_rows, 2 · channels), partial: (slots, TAPS + 1, channels) float32, all contiguous.
    """
    slot = tl.program_id(0) // tl.cdiv(channels, BLOCK_C)
    clip, start, end, tile = locate(slot, cu_seqlens_ptr, num_clips, total_rows, tile_rows)
    first = start + tile * tile_rows
    last = tl.minimum(first + tile_rows, end)
    live = clip < num_clips
    cols, exists = _channels(tl.program_id(0), channels, BLOCK_C, WHOLE)
    scale = tl.load(scale_ptr + cols, mask=exists, other=0.0)
    taps = _load_taps(weight_ptr, stride_weight, scale, cols, exists & live, kernel_size, TAPS, BLOCK_C)
    sums = ()
    for _ in tl.static_range(TAPS + 1):
        sums += (tl.zeros((BLOCK_C,), tl.float32),)

    # Of dz: the clip's first row and end, and the row of `first`. A frame meets the AROUND rows before and after its own.
    AROUND: tl.constexpr = TAPS // 2 // STRIDE
    dz_start = start
    dz_end = tl.minimum(end, last + AROUND)
    row = first
    if STRIDE == 2:
        dz_start = tl.load(cu_seqlens_out_ptr + clip)
        row = dz_start + (first - start) // 2
        dz_end = dz_start + tl.minimum(end - start, last - start + (TAPS // 2 + 1)) // 2
    readable = tl.where(live, dz_end, dz_start)
    value_ptr = x_ptr + first.to(tl.int64) * stride_x + cols
    row -= AROUND
    ahead_ptr = dz_ptr + row.to(tl.int64) * channels + cols
    window = _widen_rows(_load_rows(ahead_ptr, channels, row, dz_start, readable, exists, 2 * AROUND + STRIDE - 1), 2 * AROUND + STRIDE - 1)
    row += 2 * AROUND + STRIDE - 1
    ahead_ptr += (2 * AROUND + STRIDE - 1) * channels
    next_dz = _load_rows(ahead_ptr, channels, row, None, readable, exists, STEP // STRIDE)
    own = tl.where(live, last, start)
    next_values = _load_rows(value_ptr, stride_x, first, None, own, exists, STEP)
    next_gates = _load_rows(value_ptr + channels, stride_x, first, None, own, exists, STEP)
    dvalue_ptr = dx_ptr + first.to(tl.int64) * 2 * channels + cols
    for t in range(first, last, STEP):
        window += _widen_rows(next_dz, STEP // STRIDE)
        values = next_values
        gates = next_gates
        row += STEP // STRIDE
        ahead_ptr += STEP // STRIDE * channels
        value_ptr += STEP * stride_x
        next_dz = _load_rows(ahead_ptr, channels, row, None, readable, exists, STEP // STRIDE)
        next_values = _load_rows(value_ptr, stride_x, t + STEP, None, own, exists, STEP)
        next_gates = _load_rows(value_ptr + channels, stride_x, t + STEP, None, own, exists, STEP)
        for r in tl.static_range(STEP):
            value = values[r].to(tl.float32)
            sigmoid = _gated(1.0, gates[r].to(tl.float32))
            h = value * sigmoid
            dh = tl.zeros((BLOCK_C,), tl.float32)
            products = ()
            for i in tl.static_range(TAPS):
                if (r + TAPS // 2 - i) % STRIDE == 0:
                    # Tap i of the result (r + TAPS // 2 − i) / STRIDE rows after that of t. All are counted from AROUND before it.
                    dz = window[(r + TAPS // 2 - i + AROUND * STRIDE) // STRIDE]
                    dh += taps[i] * dz
                    products += (sums[i] + dz * h,)
                else:
                    products += (sums[i],)
            # STEP divides tile_rows, so frames after `last` are after the clip too, where dz and h are zero.
            if r % STRIDE == 0:
                products += (sums[TAPS] + window[r // STRIDE + AROUND],)
            else:
                products += (sums[TAPS],)
            sums = products
            there = exists & (t + r < last)
            dvalue = dh * sigmoid
            dgate = dvalue * value * (1.0 - sigmoid)
            tl.store(dvalue_ptr + r * 2 * channels, rounded(dvalue, dx_ptr.dtype.element_ty), mask=there)
            tl.store(dvalue_ptr + r * 2 * channels + channels, rounded(dgate, dx_ptr.dtype.element_ty), mask=there)
        window = window[STEP // STRIDE :]
        dvalue_ptr += STEP * 2 * channels
    sum_ptr = partial_ptr + slot.to(tl.int64) * (TAPS + 1) * channels + cols
    for i in tl.static_range(TAPS + 1):
        tl.store(sum_ptr + i * channels, sums[i], mask=exists)
