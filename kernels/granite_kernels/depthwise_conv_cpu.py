"""`depthwise_conv` on a CPU, for inference: GLU, convolution and SiLU of a few frames at a time, in the dtype of x.

The reference computes each step for a whole clip, in float32. Here a step's result is still in the cache when the next one reads it, and
in bfloat16 the gated frames, the taps and the sums are rounded as well.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from granite_kernels.cpu import has_bfloat16
from granite_kernels.depthwise_conv import LENGTHS, DepthwiseConvInputs, bounds_out, depthwise_conv_reference
from granite_kernels.op import accumulator, bounds, called_with

_FRAMES = 1024  # 4 MB of bfloat16 in the released width; half as many are as fast on a quiet machine, but are more operations


@called_with(DepthwiseConvInputs)
def depthwise_conv_cpu(inputs: DepthwiseConvInputs) -> Tensor:
    """`depthwise_conv` for CPU tensors that need no gradient. A clip's bits do not depend on its neighbours."""
    x, weight, scale, shift, cu_seqlens, stride, cu_seqlens_out = inputs
    if x.dtype != torch.float32 and not (x.dtype == torch.bfloat16 and has_bfloat16()):
        return depthwise_conv_reference(*inputs)
    channels, reach = weight.shape[0], weight.shape[1] // 2
    if scale is not None:  # BatchNorm is linear, so it is folded into the taps and a bias
        weight, shift = (weight.to(accumulator(x.dtype)) * scale[:, None]).to(x.dtype), shift.to(x.dtype)
    taps = weight[:, None, :, None]
    clips = bounds(cu_seqlens, x.shape[0])
    spans = bounds_out(cu_seqlens, x.shape[0], stride, cu_seqlens_out)
    out = x.new_empty(x.shape[0] // stride, channels)
    out[spans[-1][1] if spans else 0 :] = 0
    for (begin, end), (place, stop) in zip(clips, spans, strict=True):
        for first in range(begin, begin + stride * (stop - place), _FRAMES):
            results = min(_FRAMES // stride, stop - place)
            frames = min(_FRAMES, end - first)
            gated = _gated(x, first, frames + -frames % LENGTHS, reach, begin, end)
            # A channels-last image of width 1, as in the reference.
            image = F.conv2d(gated[None, :, None].permute(0, 3, 1, 2), taps, shift, stride=(stride, 1), groups=channels)
            convolved, written = image[0, :, :results, 0].T, out[place : place + results]
            written.copy_(convolved) if scale is None else torch.ops.aten.silu.out(convolved, out=written)
            place += results
    return out


def _gated(x: Tensor, first: int, frames: int, reach: int, begin: int, end: int) -> Tensor:
    """GLU of `frames` frames and of `reach` before and after them; zeros for those outside the clip from `begin` to `end`."""
    gated = x.new_empty(frames + 2 * reach, x.shape[1] // 2)
    start, stop = max(first - reach, begin), min(first + frames + reach, end)
    before = start - (first - reach)
    inside = slice(before, before + stop - start)
    gated[:before] = 0
    gated[inside.stop :] = 0
    torch.ops.aten.glu.out(x[start:stop], 1, out=gated[inside])
    return gated
