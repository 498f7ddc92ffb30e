"""Gated depthwise convolution: the part of the conformer's convolution module between its two projections."""

from collections.abc import Callable
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from granite_kernels.errors import KernelError
from granite_kernels.op import Arguments, Case, Cost, Draw, Operation, accumulator, bounds, called_with, join, nbytes, triton_backend

# On a CPU, this many frames or a multiple of them are computed. oneDNN compiles, and keeps, a program for each length that it meets.
LENGTHS = 32


class DepthwiseConvInputs(NamedTuple):
    """The arguments of `depthwise_conv` except `impl`."""

    x: torch.Tensor
    weight: torch.Tensor
    scale: torch.Tensor | None
    shift: torch.Tensor | None
    cu_seqlens: torch.Tensor
    stride: int = 1
    cu_seqlens_out: torch.Tensor | None = None


def depthwise_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
    *,
    stride: int = 1,
    cu_seqlens_out: torch.Tensor | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """GLU, a convolution over time of each channel separately, folded BatchNorm, SiLU.

    ::

        h    = value · sigmoid(gate)                                       x = [value | gate]
        y_t  = Σ_i weight[:, i] · h_{stride · t + i − kernel_size // 2}    h is zero outside the clip
        out  = SiLU(scale · y + shift)                                     out = y if scale and shift are None

    | argument | shape | stride | dtype |
    |---|---|---|---|
    | x | (total_frames, 2 · channels) | last 1, first free | any float |
    | weight | (channels, kernel_size) | last 1, first free | as x |
    | scale, shift | (channels,), or both None | 1 | float32, or float64 with x in float64 |
    | cu_seqlens, cu_seqlens_out | (clips + 1,) | 1 | int32 |
    | returns | (total_frames // stride, channels) | contiguous | as x |

    A clip is padded with kernel_size // 2 zeros before and kernel_size // 2 − (kernel_size + 1) % 2 after it, so that with a stride
    of 1 its length does not change for odd and even kernels. With a stride of 2, a clip of L frames becomes one of L // 2 frames. It
    never reads a neighbour's frames. Rows from `cu_seqlens[-1]` on are padding and never read; in the result, rows after the last clip's
    are zero. Everything is computed in float32 (float64 for float64) and rounded once.

    Args:
        scale, shift: BatchNorm as one multiply-add, weight / √(var + eps) and bias − mean · scale. None for a BatchNorm in
            training mode, which needs y itself.
        stride: 1 or 2.
        cu_seqlens_out: with a stride of 2, where each clip begins in the result: the cumulative sum of the clips' L // 2. Computed on
            the device if omitted, which takes a few small launches.
        impl: "triton", "torch", or None for the fastest available.

    Raises:
        KernelError: wrong shapes, dtypes, devices or strides, scale without shift, or cu_seqlens_out with a stride of 1.

    The module is the Conformer's (Gulati et al., arXiv 2005.08100), the gate that of Dauphin et al. (arXiv 1612.08083), the
    padding that of `GraniteSpeechConformerDepthWiseConv1d` in transformers.
    """
    inputs = DepthwiseConvInputs(x, weight, scale, shift, cu_seqlens, stride, cu_seqlens_out)
    _check(inputs)
    return OPERATION.select(impl, x)(*inputs)


def _check(inputs: DepthwiseConvInputs) -> None:
    x, weight, scale, shift, cu_seqlens, stride, cu_seqlens_out = inputs
    arguments = Arguments("depthwise_conv")
    arguments.tensor("x", x, "total_frames 2·channels")
    arguments.tensor("weight", weight, "channels kernel_size")
    if x.shape[1] != 2 * weight.shape[0]:
        arguments.refuse(
            f"x has {x.shape[1]} columns for {weight.shape[0]} channels of weight",
            f"{2 * weight.shape[0]}, the value half and the gate half",
            "Pass the whole output of the up projection",
        )
    if weight.shape[1] == 0:
        arguments.refuse("weight has kernel_size 0", "at least 1", "Check how weight was made")
    if (scale is None) != (shift is None):
        given, absent = ("scale", "shift") if shift is None else ("shift", "scale")
        arguments.refuse(
            f"{given} without {absent}", "both or neither", f"Pass {absent} too, or None for both to skip normalisation and SiLU"
        )
    if scale is not None:
        dtypes = (torch.float32, torch.float64) if x.dtype == torch.float64 else (torch.float32,)
        arguments.tensor("scale", scale, "channels", dtypes)
        arguments.tensor("shift", shift, "channels", dtypes)
    arguments.index("cu_seqlens", cu_seqlens, "clips+1")
    if cu_seqlens.shape[0] == 0:
        arguments.refuse("cu_seqlens is empty", "clips + 1 offsets", "Pass [0] for a batch without clips")
    if isinstance(stride, bool) or stride not in (1, 2):
        arguments.refuse(f"stride {stride!r}", "1 or 2", "Convolve with a stride of 1 and take every n-th frame of each clip")
    if cu_seqlens_out is not None:
        if stride == 1:
            arguments.refuse("cu_seqlens_out with stride 1", "none, because no length changes", "Omit it, or pass stride=2")
        arguments.index("cu_seqlens_out", cu_seqlens_out, "clips+1")


def bounds_out(cu_seqlens: torch.Tensor, rows: int, stride: int, cu_seqlens_out: torch.Tensor | None) -> list[tuple[int, int]]:
    """`bounds` of the clips in the result. Waits for a CUDA tensor.

    Raises:
        KernelError: cu_seqlens is wrong, or cu_seqlens_out does not follow from it.
    """
    offsets = [0, *accumulate((end - first) // stride for first, end in bounds(cu_seqlens, rows))]
    if cu_seqlens_out is not None and (given := cu_seqlens_out.tolist()) != offsets:
        raise KernelError(
            got=f"depthwise_conv: cu_seqlens_out {given[:8]}",
            expected=f"{offsets[:8]}, the cumulative sum of half the clips' lengths, rounded down",
            remedy="Omit it to have it computed",
        )
    return list(pairwise(offsets))


@called_with(DepthwiseConvInputs)
def depthwise_conv_reference(inputs: DepthwiseConvInputs) -> torch.Tensor:
    """`depthwise_conv` in PyTorch, clip by clip: a clip's bits do not depend on its neighbours.

    With gradients, one convolution computes all clips, separated by the zeros that pad them.
    """
    x, weight, scale, shift, cu_seqlens, stride, cu_seqlens_out = inputs
    frames, (channels, kernel_size) = x.shape[0], weight.shape
    dtype = accumulator(x.dtype)
    # conv2d with a width of 1: a channels-last image is a view of (frames, channels), so nothing is transposed. The view is made
    # with permute, because conv2d takes an image for channels-last only if the strides of dimensions of size 1 fit too.
    # The normalisation is linear, so it is folded into the taps and a bias.
    taps, bias = weight.to(dtype), None
    if scale is not None:
        taps, bias = taps * scale.to(dtype)[:, None], shift.to(dtype)
    taps = taps[:, None, :, None]

    def convolved(gated: torch.Tensor) -> torch.Tensor:
        length = gated.shape[0]
        gated = F.pad(gated, (0, 0, 0, -length % LENGTHS))  # zeros after a clip change nothing in it
        image = gated[None, :, None].permute(0, 3, 1, 2)
        # Both sides have the same padding, which gives an even kernel one frame too many at the end.
        image = F.conv2d(image, taps, bias, stride=(stride, 1), padding=(kernel_size // 2, 0), groups=channels)
        return image[0, :, : length // stride, 0].T

    clips = bounds(cu_seqlens, frames)
    spans = bounds_out(cu_seqlens, frames, stride, cu_seqlens_out)
    total = spans[-1][1] if spans else 0
    clips = [(first, end) for first, end in clips if end > first]
    if torch.is_grad_enabled() and len(clips) > 1 and any(one is not None and one.requires_grad for one in (x, weight, scale, shift)):
        pieces = [_of_several(x, clips, channels, kernel_size // 2, stride, convolved)]
    else:
        pieces = [convolved(F.glu(x[first:end].to(dtype), dim=1)) for first, end in clips]
    if scale is not None:
        pieces = [F.silu(y, inplace=not y.requires_grad) for y in pieces]
    padding = frames // stride - total
    return join(pieces, x[frames - padding :, :channels].to(dtype)).to(x.dtype)


def _of_several(
    x: torch.Tensor, clips: list[tuple[int, int]], channels: int, gap: int, stride: int, convolved: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """The convolutions of several clips by one call, with zeros between them: at least `gap`, and so that each begins at a multiple of
    the stride."""
    places, results, begin = [], [], 0
    for first, end in clips:
        places.append(torch.arange(begin, begin + end - first))
        results.append(torch.arange(begin // stride, begin // stride + (end - first) // stride))
        begin += end - first + gap
        begin += -begin % stride
    places, results = (torch.cat(one).to(x.device) for one in (places, results))
    gated = F.glu(x[: clips[-1][1]].to(accumulator(x.dtype)), dim=1)
    return convolved(gated.new_zeros(begin, channels).index_copy(0, places, gated)).index_select(0, results)


@called_with(DepthwiseConvInputs)
def depthwise_conv_cost(inputs: DepthwiseConvInputs) -> Cost:
    """FLOPs: kernel_size multiply-adds per frame of the clips' results and channel (at edges too), without the gate, the normalisation and
    SiLU. Bytes: x of the clips' frames, the parameters, the offsets and the result."""
    x, weight, scale, shift, cu_seqlens, stride, cu_seqlens_out = inputs
    frames, (channels, kernel_size) = x.shape[0], weight.shape
    read = sum(end - first for first, end in bounds(cu_seqlens, frames))
    written = sum(end - first for first, end in bounds_out(cu_seqlens, frames, stride, cu_seqlens_out))
    moved = (2 * read + frames // stride) * channels * x.element_size()
    parameters = nbytes(weight, scale, shift, cu_seqlens, cu_seqlens_out)
    return Cost(flops=2 * written * channels * kernel_size, bytes=moved + parameters)


@called_with(DepthwiseConvInputs)
def depthwise_conv_library(inputs: DepthwiseConvInputs) -> Callable[[], torch.Tensor]:
    """The grouped convolution alone, on gated frames, channels first, over all clips as if they were one."""
    channels, kernel_size = inputs.weight.shape
    gated = F.glu(inputs.x, dim=1).T.contiguous()[None]
    options = {"stride": inputs.stride, "padding": kernel_size // 2, "groups": channels}
    return partial(F.conv1d, gated, inputs.weight[:, None].contiguous(), **options)


def _make(
    draw: Draw,
    *,
    clips: tuple[int, ...],
    channels: int,
    kernel_size: int,
    normalised: bool = True,
    padding: int = 0,
    stride: int = 1,
    places: bool = True,
) -> dict[str, Any]:
    """`places` gives cu_seqlens_out, if there is a stride."""
    total = sum(clips)
    x = draw.normal(total + padding, 2 * channels)
    x[total:] = torch.nan
    # float32, or float64 for a case in float64.
    wide = accumulator(draw.dtype)
    return {
        "x": x,
        "weight": draw.normal(channels, kernel_size, std=kernel_size**-0.5),
        "scale": draw.normal(channels, dtype=wide) if normalised else None,
        "shift": draw.normal(channels, dtype=wide) if normalised else None,
        "cu_seqlens": draw.cu_seqlens(clips),
        "stride": stride,
        "cu_seqlens_out": draw.cu_seqlens(tuple(length // 2 for length in clips)) if stride == 2 and places else None,
    }


def _case(name: str, clips: tuple[int, ...], channels: int, kernel_size: int, *, released: bool = False, **options) -> Case:
    return Case(name, _make, {"clips": clips, "channels": channels, "kernel_size": kernel_size, **options}, released)


_TO_30_S = (150, 330, 500, 720, 900, 1111, 1400, 1500)

CASES = (
    _case("encoder, 10 s", (500,), 2048, 15, released=True),
    _case("encoder, 30 s", (1500,), 2048, 15, released=True),
    _case("encoder, 8 clips to 30 s", _TO_30_S, 2048, 15, released=True),
    _case("encoder, 128 clips of 10 s", (500,) * 128, 2048, 15, released=True),
    _case("encoder training, 8 clips of 10 s", (500,) * 8, 2048, 15, normalised=False, released=True),
    _case("turboctc encoder, 128 clips of 10 s", (500,) * 128, 2048, 7, released=True),
    _case("turboctc encoder, 50 to 25 Hz", _TO_30_S, 2048, 7, stride=2, released=True),
    _case("turboctc encoder, 25 to 12.5 Hz", tuple(length // 2 for length in _TO_30_S), 2048, 7, stride=2, released=True),
    _case("turboctc encoder, 128 clips of 10 s, 50 to 25 Hz", (500,) * 128, 2048, 7, stride=2, released=True),
    _case("turboctc training, 8 clips of 10 s, 50 to 25 Hz", (500,) * 8, 2048, 7, normalised=False, stride=2, released=True),
    _case("released kernel, few channels", (37, 20), 64, 15),
    _case("kernel 7", (9, 30), 48, 7),
    _case("kernel 31 over shorter clips", (5, 20), 32, 31),
    _case("even kernel 4", (6, 17), 32, 4),
    _case("even kernel 2", (6, 1, 17), 16, 2),
    _case("kernel 1", (6, 3), 16, 1),
    _case("odd number of channels", (13, 4), 37, 5),
    _case("GLU and convolution alone", (21, 12), 32, 15, normalised=False),
    _case("one frame", (1,), 16, 15),
    _case("many one-frame clips", (1, 1, 1, 1), 16, 3),
    _case("empty clips", (0, 9, 0, 0, 20, 0), 16, 7),
    _case("padding rows", (11, 8), 32, 15, padding=5),
    _case("padding rows, GLU and convolution alone", (7,), 16, 4, normalised=False, padding=9),
    _case("only empty clips", (0, 0), 16, 7),
    _case("no clips, padding rows", (), 16, 7, padding=3),
    _case("no clips", (), 16, 7),
    _case("stride 2, odd and even lengths", (37, 20, 9), 64, 7, stride=2),
    _case("stride 2, kernel 15", (21, 40), 32, 15, stride=2),
    _case("stride 2, kernel 31 over shorter clips", (5, 20), 32, 31, stride=2),
    _case("stride 2, even kernel 4", (6, 17), 37, 4, stride=2),
    _case("stride 2, even kernel 2", (7, 2), 16, 2, stride=2),
    _case("stride 2, kernel 1", (6, 3), 16, 1, stride=2),
    _case("stride 2, GLU and convolution alone", (21, 12), 32, 7, normalised=False, stride=2),
    _case("stride 2, one-frame and empty clips", (1, 0, 9, 1, 1, 2, 0), 16, 7, stride=2),
    _case("stride 2, only one-frame clips", (1, 1, 1), 16, 7, stride=2),
    _case("stride 2, padding rows", (11, 8), 32, 7, padding=5, stride=2),
    _case("stride 2, places computed", (13, 1, 8), 16, 7, padding=2, stride=2, places=False),
    _case("stride 2, no clips", (), 16, 7, padding=3, stride=2),
    _case("stride 2, one frame", (1,), 16, 7, stride=2),
)

OPERATION = Operation(
    name="depthwise_conv",
    call=depthwise_conv,
    reference=depthwise_conv_reference,
    cost=depthwise_conv_cost,
    cases=CASES,
    library=depthwise_conv_library,
    differentiable=("x", "weight", "scale", "shift"),
    packed=("x",),
    wide=("scale", "shift"),
    triton=triton_backend("depthwise_conv"),
    has_cpu=True,
)
