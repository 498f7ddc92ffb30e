"""The kernels of the gated depthwise convolution: tile edges, windows, strides, and independence of neighbours."""

import pytest
import torch
from granite_kernels import OPERATIONS, KernelError, depthwise_conv, depthwise_conv_triton
from granite_kernels.launch import launch
from granite_kernels.testing import assert_operation_accurate, outcome, poisoned_allocations

OPERATION = OPERATIONS["depthwise_conv"]


def draw(lengths: tuple[int, ...], channels: int, kernel_size: int, dtype=torch.float32, normalised: bool = True, padding: int = 0) -> dict:
    rng = torch.Generator().manual_seed(kernel_size)
    # The parameters first, so that they do not depend on the lengths.
    weight = (torch.randn(channels, kernel_size, generator=rng) * kernel_size**-0.5).to(dtype)
    scale, shift = torch.randn(2, channels, generator=rng)
    x = torch.randn(sum(lengths) + padding, 2 * channels, generator=rng).to(dtype)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    affine = {"scale": scale, "shift": shift} if normalised else {"scale": None, "shift": None}
    return {"x": x, "weight": weight, **affine, "cu_seqlens": cu_seqlens}


def triton(**inputs) -> torch.Tensor:
    return depthwise_conv(**inputs, impl="triton")


@pytest.mark.parametrize(
    ("lengths", "channels", "kernel_size"),
    [
        ((31, 33, 32, 36), 3, 7),  # around a tile of 32 of the shortest window: by one frame, and by more than half a window
        ((65, 63), 2, 15),  # one frame around a tile of 64 of the next window
        ((4,), 127, 1),  # one channel around the 128 of a program
        ((2,), 129, 2),
        ((3,), 65, 8),  # around 64
        ((2,), 33, 16),  # around 32
    ],
)
def test_lengths_and_channels_around_a_tile_edge(lengths: tuple[int, ...], channels: int, kernel_size: int):
    with poisoned_allocations():
        assert_operation_accurate(OPERATION, draw(lengths, channels, kernel_size), impl="triton")


@pytest.mark.parametrize("kernel_size", [3, 6, 7, 8, 14, 30])
def test_kernels_shorter_than_their_window(kernel_size: int):
    inputs = draw((kernel_size // 2 + 1, 2), 4, kernel_size, torch.float16, normalised=kernel_size % 4 != 2)
    with poisoned_allocations():
        assert_operation_accurate(OPERATION, inputs, impl="triton")


def test_a_kernel_size_above_31_needs_the_reference():
    inputs = draw((3,), 2, 32)
    with pytest.raises(KernelError, match=r"kernel_size 32; expected at most 31 with impl='triton'\. Use impl='torch'"):
        triton(**inputs)
    assert depthwise_conv(**inputs).shape == (3, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_clip_gets_the_same_bits_between_neighbours_of_nan(dtype: torch.dtype):
    inputs = draw((35,), 3, 5, dtype)
    alone = outcome(triton, inputs, ("x",))
    x = torch.full((33 + 35 + 3 + 2, 6), torch.nan, dtype=dtype)
    clip = slice(33, 33 + 35)
    x[clip] = inputs["x"]
    x.requires_grad_()
    with poisoned_allocations():
        together = triton(**{**inputs, "x": x, "cu_seqlens": torch.tensor([0, 33, 68, 68, 71], dtype=torch.int32)})
    assert torch.equal(together[clip], alone["out"])
    assert not together[-2:].any()
    # The same incoming gradient for the clip, and NaN for all others.
    incoming = torch.full_like(together, torch.nan)
    incoming[clip] = torch.randn(35, 3, generator=torch.Generator().manual_seed(1)).to(dtype)
    (gradient,) = torch.autograd.grad(together, x, incoming)
    assert torch.equal(gradient[clip], alone["grad x"])
    assert not gradient[-2:].any()


@pytest.mark.parametrize("normalised", [True, False])
def test_nan_in_padding_and_its_incoming_gradient_reaches_no_gradient(normalised: bool):
    inputs = draw((9, 6), 3, 4, normalised=normalised)
    expected = outcome(triton, inputs, OPERATION.differentiable)
    padded = draw((9, 6), 3, 4, normalised=normalised, padding=20)
    padded["x"][:15], padded["x"][15:] = inputs["x"], torch.nan
    names = [name for name in OPERATION.differentiable if padded[name] is not None]
    leaves = {name: padded[name].requires_grad_() for name in names}
    incoming = torch.full((35, 3), torch.nan)
    incoming[:15] = torch.randn(15, 3, generator=torch.Generator().manual_seed(1))
    gradients = dict(zip(names, torch.autograd.grad(triton(**padded), list(leaves.values()), incoming), strict=True))
    assert torch.equal(gradients["x"][:15], expected["grad x"])
    assert not gradients["x"][15:].any()
    for name in names[1:]:
        torch.testing.assert_close(gradients[name], expected[f"grad {name}"], rtol=1e-5, atol=1e-5)


def test_an_incoming_gradient_may_have_stride_0():
    inputs = draw((9,), 3, 3)
    leaves = [inputs[name].requires_grad_() for name in OPERATION.differentiable]
    dense, expanded = (torch.autograd.grad(triton(**inputs), leaves, one) for one in (torch.ones(9, 3), torch.ones(()).expand(9, 3)))
    assert all(torch.equal(*pair) for pair in zip(dense, expanded, strict=True))


def test_a_program_writes_only_to_its_own_clip(monkeypatch: pytest.MonkeyPatch):
    # Only one program runs: a later one would overwrite what this one wrote past its clip.
    monkeypatch.setattr(depthwise_conv_triton, "launch", lambda kernel, grid, *args, **named: launch(kernel, (1,), *args, **named))
    with poisoned_allocations():
        results = outcome(triton, draw((5, 9), 3, 3), ("x",))
    for tensor in results.values():
        assert tensor[:5].isfinite().all()
        assert tensor[5:].isnan().all()


def test_frames_may_share_memory():
    inputs = draw((6,), 3, 3)
    inputs["x"] = inputs["x"][:1].expand(6, 6)
    assert_operation_accurate(OPERATION, inputs, impl="triton")


def test_frames_may_be_more_than_2_to_the_31_elements_apart():
    inputs = draw((5,), 2, 3, torch.bfloat16)
    # Of these 4 GiB, only the memory pages of five frames are used.
    far = torch.empty(2**31 + 128, dtype=torch.bfloat16).as_strided((5, 4), (2**29 + 16, 1))
    far.copy_(inputs["x"])
    near = outcome(triton, inputs, ("x",))
    assert all(torch.equal(tensor, near[name]) for name, tensor in outcome(triton, {**inputs, "x": far}, ("x",)).items())
