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
def await_inputs(PDL: tl.constexpr):
    """Let the next launch begin, then wait until all earlier ones have ended (see `launch.early_launches`).

    Every kernel of a chain waits, since that an earlier launch has ended is known only of launches that waited themselves. Before
    this a kernel may load what no launch of the chain writes, and store nothing.
    """
    if PDL:
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
