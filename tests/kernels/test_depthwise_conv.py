"""The gated depthwise convolution compared with loops, PyTorch's layers and the padding of transformers."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from granite_kernels import KernelError, depthwise_conv
from granite_kernels.depthwise_conv import depthwise_conv_cost


def draw(frames: int, channels: int = 6, kernel_size: int = 5, dtype=torch.float64, seed: int = 0):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(frames, 2 * channels, generator=rng).to(dtype)
    weight = torch.randn(channels, kernel_size, generator=rng).to(dtype)
    scale, shift = torch.randn(2, channels, generator=rng).to(torch.promote_types(dtype, torch.float32))
    return x, weight, scale, shift


def offsets(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


@pytest.mark.parametrize("kernel_size", [1, 2, 3, 4, 15])
def test_the_result_matches_the_formula(kernel_size: int):
    x, weight, scale, shift = draw(7, 3, kernel_size)
    value, gate = x[:, :3], x[:, 3:]
    hidden = value / (1 + torch.exp(-gate))
    y = torch.zeros(7, 3, dtype=torch.float64)
    for t in range(7):
        for tap in range(kernel_size):
            source = t + tap - kernel_size // 2
            if 0 <= source < 7:
                y[t] += weight[:, tap] * hidden[source]
    torch.testing.assert_close(depthwise_conv(x, weight, None, None, offsets(7)), y, rtol=1e-12, atol=1e-12)
    z = scale * y + shift
    expected = z / (1 + torch.exp(-z))
    torch.testing.assert_close(depthwise_conv(x, weight, scale, shift, offsets(7)), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("kernel_size", [1, 2, 3, 4, 7, 15])
def test_a_stride_of_2_is_every_other_frame_of_each_clip_without_an_odd_last_one(kernel_size: int, normalised: bool):
    lengths = (7, 1, 0, 12, 1, 1, 2)
    x, weight, *affine = draw(sum(lengths) + 3, 3, kernel_size)
    x[sum(lengths) :] = torch.nan
    affine = affine if normalised else (None, None)
    every = depthwise_conv(x, weight, *affine, offsets(*lengths)).split([*lengths, 3])[:-1]
    expected = torch.cat([one[::2][: len(one) // 2] for one in every])
    for cu_seqlens_out in (None, offsets(*(length // 2 for length in lengths))):
        halved = depthwise_conv(x, weight, *affine, offsets(*lengths), stride=2, cu_seqlens_out=cu_seqlens_out)
        assert halved.shape == (len(x) // 2, 3)
        torch.testing.assert_close(halved[: len(expected)], expected, rtol=1e-12, atol=1e-12)
        assert not halved[len(expected) :].any()


@pytest.mark.parametrize("frames", [1, 6, 9])
def test_a_stride_of_2_matches_the_module_of_transformers(frames: int):
    transformers = importlib.import_module("transformers.models.granite_speech5.modeling_granite_speech5")
    config = importlib.import_module("transformers").GraniteSpeech5EncoderConfig(hidden_size=6, conv_kernel_size=7, conv_expansion_factor=1)
    module = transformers.GraniteSpeech5EncoderConvolutionModule(config, stride=2)
    x, weight, _, _ = draw(frames, 6, 7)
    module.double().depthwise_conv.weight.data.copy_(weight[:, None])
    expected = module.depthwise_conv(F.glu(x.T[None], dim=1))[0].T.detach()
    torch.testing.assert_close(depthwise_conv(x, weight, None, None, offsets(frames), stride=2), expected[: frames // 2])


@pytest.mark.parametrize("kernel_size", [4, 15, 31])
@pytest.mark.parametrize("frames", [1, 14, 40])
def test_one_clip_matches_the_layers_of_pytorch(frames: int, kernel_size: int):
    x, weight, _, _ = draw(frames, 6, kernel_size)
    norm = torch.nn.BatchNorm1d(6).double().eval()
    rng = torch.Generator().manual_seed(1)
    for tensor in (norm.weight.data, norm.bias.data, norm.running_mean):
        tensor.copy_(torch.randn(6, generator=rng))
    norm.running_var.copy_(torch.rand(6, generator=rng) + 0.5)
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    shift = norm.bias - norm.running_mean * scale
    channels_first = F.pad(F.glu(x.T[None], dim=1), (kernel_size // 2, kernel_size // 2 - (kernel_size + 1) % 2))
    expected = F.silu(norm(F.conv1d(channels_first, weight[:, None], groups=6)))[0].T
    torch.testing.assert_close(depthwise_conv(x, weight, scale, shift, offsets(frames)), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kernel_size", [4, 7])
def test_padding_matches_transformers(kernel_size: int):
    transformers = importlib.import_module("transformers.models.granite_speech.modeling_granite_speech")
    x, weight, _, _ = draw(12, 6, kernel_size)
    module = transformers.GraniteSpeechConformerDepthWiseConv1d(6, 6, kernel_size).double()
    with torch.no_grad():
        module.conv.weight.copy_(weight[:, None])
        expected = module(F.glu(x.T[None], dim=1))[0].T
    torch.testing.assert_close(depthwise_conv(x, weight, None, None, offsets(12)), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_clip_gets_the_same_bits_in_every_batch(dtype: torch.dtype, stride: int):
    x, weight, scale, shift = draw(53, 32, 15, dtype)
    x[:11], x[30:42] = torch.nan, torch.inf
    together = depthwise_conv(x, weight, scale, shift, offsets(11, 19, 12, 0, 11), stride=stride)
    for start, length, place in ((11, 19, 11 // stride), (42, 11, 11 // stride + 19 // stride + 12 // stride)):
        alone = depthwise_conv(x[start : start + length], weight, scale, shift, offsets(length), stride=stride)
        assert alone.isfinite().all()
        assert torch.equal(together[place : place + length // stride], alone)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel_size", [3, 4])
def test_gradients_match_finite_differences(kernel_size: int, stride: int):
    inputs = [tensor.requires_grad_() for tensor in draw(9, 3, kernel_size)]
    clips = offsets(3, 0, 1, 4)
    assert torch.autograd.gradcheck(lambda *given: depthwise_conv(*given, clips, stride=stride), inputs)
    assert torch.autograd.gradcheck(lambda x, weight: depthwise_conv(x, weight, None, None, clips, stride=stride), inputs[:2])


def test_nan_in_padding_reaches_no_gradient():
    x, weight, scale, shift = (tensor.requires_grad_() for tensor in draw(9))
    with torch.no_grad():
        x[5:] = torch.nan
    depthwise_conv(x, weight, scale, shift, offsets(5)).square().sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in (x, weight, scale, shift))
    assert not x.grad[5:].any()


@pytest.mark.parametrize("lengths", [(0,), (1,), (1, 1, 1)])
def test_a_batch_without_frames_has_a_backward(lengths: tuple[int, ...]):
    x, weight, scale, shift = (tensor.requires_grad_() for tensor in draw(3))
    depthwise_conv(x, weight, scale, shift, offsets(*lengths), stride=2).sum().backward()
    assert not x.grad.any()
    depthwise_conv(x, weight, scale, shift, offsets(0)).sum().backward()
    assert not x.grad.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(6, 13)}, r"x has 13 columns for 6 channels of weight; expected 12"),
        ({"weight": torch.zeros(6, 0)}, r"kernel_size 0; expected at least 1"),
        ({"shift": None}, r"scale without shift; expected both or neither"),
        ({"scale": None}, r"shift without scale; expected both or neither"),
        ({"scale": torch.zeros(5)}, r"scale has shape \(5,\); expected \(channels\) with channels = 6 as in weight"),
        ({"scale": torch.zeros(6).half()}, r"scale has dtype torch.float16; expected torch.float32"),
        ({"cu_seqlens": torch.zeros(0, dtype=torch.int32)}, r"cu_seqlens is empty"),
        ({"cu_seqlens": offsets(4, 3)}, r"cu_seqlens \[0, 4, 7\] for 6 rows; expected offsets"),
        ({"stride": 3}, r"stride 3; expected 1 or 2"),
        ({"stride": True}, r"stride True; expected 1 or 2"),
        ({"cu_seqlens_out": offsets(6)}, r"cu_seqlens_out with stride 1; expected none"),
        ({"stride": 2, "cu_seqlens_out": offsets(3, 0)}, r"cu_seqlens_out has shape \(3,\); expected \(clips\+1\) with clips\+1 = 2"),
        ({"stride": 2, "cu_seqlens_out": offsets(3).long()}, r"cu_seqlens_out has dtype torch.int64; expected torch.int32"),
        ({"stride": 2, "cu_seqlens_out": offsets(2)}, r"cu_seqlens_out \[0, 2\]; expected \[0, 3\], the cumulative sum of half"),
    ],
)
def test_wrong_arguments_are_refused(change: dict, message: str):
    right = {**dict(zip(("x", "weight", "scale", "shift"), draw(6, dtype=torch.float32), strict=True)), "cu_seqlens": offsets(6)}
    depthwise_conv(**right)
    with pytest.raises(KernelError, match=message):
        depthwise_conv(**{**right, **change})


def test_cost_matches_a_count_by_hand():
    x, weight, scale, shift = draw(8, 6, 5, torch.bfloat16)
    cost = depthwise_conv_cost(x, weight, scale, shift, offsets(3, 4))
    assert cost.flops == 7 * 6 * 5 * 2
    assert cost.bytes == 2 * (7 * 12 + 8 * 6 + 6 * 5) + 2 * 6 * 4 + 3 * 4
    cost = depthwise_conv_cost(x, weight, scale, shift, offsets(3, 4), 2)
    assert cost.flops == 3 * 6 * 5 * 2
    assert cost.bytes == 2 * (7 * 12 + 4 * 6 + 6 * 5) + 2 * 6 * 4 + 3 * 4
