"""Device functions that several kernels share."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# Whether kernels run under Triton's interpreter (TRITON_INTERPRET=1). Triton decides this when it decorates them.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, acc):
    """acc + a·b, summed in float32; if acc is None, from zero.

    float32 operands are multiplied as three TF32 products on tensor cores, which keeps float32's accuracy. The interpreter
    returns garbage for bfloat16 operands, so there they are first converted to float32, which is exact.
    """
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="tf32x3")


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 rounded to the nearest value of a narrower dtype. The interpreter truncates bfloat16, so there we round the bits."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def cos_sin(angle):
    """Cosine and sine of float32 angles below 2³¹, within 2e-7.

    tl.cos and tl.sin have a path for large angles that needs a stack. Here the distance from the nearest multiple of π/2 is computed in
    float64, which is exact enough and cheap for few angles, and then two series, which need few terms within π/4 of zero.
    """
    wide = angle.to(tl.float64)
    quarters = tl.floor(wide * 0.6366197723675814 + 0.5)
    x = (wide - quarters * 1.5707963267948966).to(tl.float32)
    square = x * x
    sin = x + x * square * (-1.0 / 6 + square * (1.0 / 120 + square * (-1.0 / 5040 + square * (1.0 / 362880))))
    cos = 1.0 + square * (-0.5 + square * (1.0 / 24 + square * (-1.0 / 720 + square * (1.0 / 40320 - square * (1.0 / 3628800)))))
    quadrant = quarters.to(tl.int32) & 3
    swapped = (quadrant & 1) > 0
    first, second = tl.where(swapped, sin, cos), tl.where(swapped, cos, sin)
    return tl.where((quadrant == 1) | (quadrant == 2), -first, first), tl.where(quadrant >= 2, -second, second)


@triton.jit
def await_inputs(PDL: tl.constexpr):
    """Let the next launch begin, then wait until all earlier ones have ended (see `launch.early_launches`).

    Every kernel of a chain waits, since that an earlier launch has ended is known only of launches that waited themselves. Before
    this a kernel may load what no launch of the chain writes, and store nothing.
    """
    if PDL and not INTERPRETED:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def locate(slot, cu_seqlens_ptr, num_segments, total_rows, tile, CHUNK: tl.constexpr = 128):
    """Find the tile of rows that program `slot` computes. Each segment is cut into tiles from its own first row.

    Segment s begins at slot cu_seqlens[s] // tile + s. That gives it as many slots as it has tiles, or one more, which stays
    idle. So a program finds its segment without counting the tiles before it, and `total_rows // tile + num_segments + 1`
    slots are always enough, a bound that the host knows. The padding after the last segment is segment `num_segments`.

    Returns (segment, its first row, its end, number of the tile in it). The slot is idle if start + number * tile >= end.
    """
    segment = -1
    for first in range(0, num_segments + 1, CHUNK):
        candidates = first + tl.arange(0, CHUNK)
        exists = candidates <= num_segments
        starts = tl.load(cu_seqlens_ptr + candidates, mask=exists, other=0)
        segment += tl.sum((exists & (starts // tile + candidates <= slot)).to(tl.int32), axis=0)
    start = tl.load(cu_seqlens_ptr + segment)
    end = total_rows
    if segment < num_segments:
        end = tl.load(cu_seqlens_ptr + segment + 1)
    return segment, start, end, slot - (start // tile + segment)
