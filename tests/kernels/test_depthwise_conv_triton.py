"""The kernels of the gated depthwise convolution: tile edges, windows, strides, and independence of neighbours."""

import inspect

import pytest
import torch
from granite_kernels import OPERATIONS, KernelError, depthwise_conv, depthwise_conv_kernels, depthwise_conv_triton
from granite_kernels.launch import launch, recorded_launches
from granite_kernels.op import Draw
from granite_kernels.testing import assert_operation_accurate, outcome, poisoned_allocations
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.runtime import interpreter

OPERATION = OPERATIONS["depthwise_conv"]


strides = pytest.mark.parametrize("stride", [1, 2])


def draw(
    lengths: tuple[int, ...],
    channels: int,
    kernel_size: int,
    dtype=torch.float32,
    normalised: bool = True,
    padding: int = 0,
    stride: int = 1,
) -> dict:
    rng = torch.Generator().manual_seed(kernel_size)
    # The parameters first, so that they do not depend on the lengths.
    weight = (torch.randn(channels, kernel_size, generator=rng) * kernel_size**-0.5).to(dtype)
    scale, shift = torch.randn(2, channels, generator=rng)
    x = torch.randn(sum(lengths) + padding, 2 * channels, generator=rng).to(dtype)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    affine = {"scale": scale, "shift": shift} if normalised else {"scale": None, "shift": None}
    return {"x": x, "weight": weight, **affine, "cu_seqlens": cu_seqlens, "stride": stride}


def triton(**inputs) -> torch.Tensor:
    return depthwise_conv(**inputs, impl="triton")


@pytest.mark.parametrize(
    ("lengths", "channels", "kernel_size"),
    [
        ((31, 33, 32, 36, 65), 3, 7),  # around a tile of 32 frames: by one frame, and by more than half a window
        ((33, 31), 2, 15),
        ((24, 23, 22), 2, 31),  # around the fewest frames that make a step without masks
        ((4,), 31, 1),  # one channel around the 32 of a program of the forward
        ((2,), 33, 16),
        ((3,), 65, 8),  # around the 64 of the backward
    ],
)
@strides
def test_lengths_and_channels_around_a_tile_edge(stride: int, lengths: tuple[int, ...], channels: int, kernel_size: int):
    with poisoned_allocations():
        assert_operation_accurate(OPERATION, draw(lengths, channels, kernel_size, stride=stride), impl="triton")


@pytest.mark.parametrize("frames", [88, 89, 90, 91])
@pytest.mark.parametrize("kernel_size", [7, 15])
def test_a_stride_of_2_gives_the_bits_of_every_other_frame(kernel_size: int, frames: int):
    inputs = draw((frames,), 3, kernel_size)
    every = triton(**inputs)[::2][: frames // 2]
    for block_t in (16, 32, 128):
        with depthwise_conv_triton._TILES.using({(80, kernel_size, "short"): depthwise_conv_triton._tile(block_t, 1, 8)}):
            assert torch.equal(triton(**{**inputs, "stride": 2}), every)


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), max_size=4), kernel_size=st.integers(1, 31), padding=st.integers(0, 3), normalised=st.booleans()
)
def test_any_batch_with_a_stride_of_2_is_every_other_frame_of_its_clips(
    lengths: list[int], kernel_size: int, padding: int, normalised: bool
):
    inputs = draw(tuple(lengths), 3, kernel_size, normalised=normalised, padding=padding)
    inputs["x"][sum(lengths) :] = torch.nan
    clips = triton(**inputs).split([*lengths, padding])[:-1]
    expected = torch.cat([*(clip[::2][: len(clip) // 2] for clip in clips), torch.empty(0, 3)])
    with poisoned_allocations():
        halved = triton(**{**inputs, "stride": 2})
    assert halved.shape == (len(inputs["x"]) // 2, 3)
    assert torch.equal(halved[: len(expected)], expected)
    assert not halved[len(expected) :].any()
    reference = depthwise_conv(**{**inputs, "stride": 2}, impl="torch")
    torch.testing.assert_close(halved, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("normalised", [True, False])
def test_a_stride_of_2_gives_the_gradients_of_every_other_frame(normalised: bool):
    lengths, names = (67, 1, 34, 9), OPERATION.differentiable if normalised else OPERATION.differentiable[:2]
    inputs = draw(lengths, 3, 7, normalised=normalised, padding=5)
    leaves = [inputs[name].requires_grad_() for name in names]
    kept = torch.cat([first + torch.arange(0, n - 1, 2) for first, n in zip((0, 67, 68, 102), lengths, strict=True)])
    incoming = torch.randn(len(inputs["x"]) // 2, 3, generator=torch.Generator().manual_seed(1))
    spread = torch.zeros(len(inputs["x"]), 3).index_copy(0, kept, incoming[: len(kept)])
    halved = torch.autograd.grad(triton(**{**inputs, "stride": 2}), leaves, incoming)
    torch.testing.assert_close(halved, torch.autograd.grad(triton(**inputs), leaves, spread), rtol=1e-5, atol=1e-5)


def test_where_clips_begin_in_the_result_is_computed_on_the_device():
    inputs = draw((9, 4, 1, 6), 3, 7, stride=2)
    places = torch.tensor([0, 4, 6, 6, 9], dtype=torch.int32)
    assert torch.equal(triton(**inputs), triton(**inputs, cu_seqlens_out=places))
    for cu_seqlens_out in (None, places):
        meta = {name: one.to("meta") if isinstance(one, torch.Tensor) else one for name, one in inputs.items()}
        meta["cu_seqlens_out"] = None if cu_seqlens_out is None else cu_seqlens_out.to("meta")  # a value that is read raises
        with recorded_launches(90) as recorded:
            triton(**meta)
        assert [one.tile.blocks["STRIDE"] for one in recorded] == [2]


def test_tiles_without_masks_and_with_give_the_same_bits(monkeypatch: pytest.MonkeyPatch):
    steps, walk = [], depthwise_conv_kernels._walk
    names = list(inspect.signature(walk.fn).parameters)

    def recorded(*given):
        begin, stop = (int(one.handle.data.item()) for one in given[:2])
        steps.extend((t, given[names.index("readable")] is None) for t in range(begin, stop, 8))
        return walk(*given)

    monkeypatch.setattr(depthwise_conv_kernels, "_walk", recorded)
    inputs, expected = draw((90,), 40, 15), None
    # Of 90 frames and tiles of 32: the last step of a tile has masks, and in the last tile every step whose next step ends after frame 82.
    for block_t, masked in ((32, {24, 56, 72, 80, 88}), (128, {72, 80, 88})):
        steps.clear()
        with depthwise_conv_triton._TILES.using({(80, 15, "short"): depthwise_conv_triton._tile(block_t, 1, 8)}):
            out = triton(**inputs)
        assert {t for t, free in steps if not free} == masked
        assert {t for t, free in steps if free} == {*range(0, 90, 8)} - masked
        expected = out if expected is None else expected
        assert torch.equal(out, expected)


def test_every_tile_gives_the_same_bits():
    inputs, table = draw((70, 5), 3, 15, torch.bfloat16), depthwise_conv_triton._TILES
    expected = triton(**inputs)
    for shape in ((16, 2, 8), (64, 1, 16), (128, 4, 8)):
        tile = depthwise_conv_triton._tile(*shape)
        assert any(tile in table.candidates(key) for key in table.rows if key[1] == 15)
        with table.using({(80, 15, "short"): tile}):
            assert torch.equal(triton(**inputs), expected), shape


@strides
def test_frames_outside_of_the_clip_are_not_read(stride: int, monkeypatch: pytest.MonkeyPatch):
    inputs = draw((41,), 3, 15, stride=stride)
    around = torch.zeros(100, 6)
    around[:41] = inputs["x"]
    inputs["x"] = around[:41]
    first, end, read = around.data_ptr(), around.data_ptr() + around.nbytes, []
    builder, load = interpreter.interpreter_builder, interpreter.interpreter_builder.create_masked_load

    def recorded(pointers, mask, *rest):
        read.extend(address for address in pointers.data[mask.data.astype(bool)] if first <= address < end)
        return load(pointers, mask, *rest)

    monkeypatch.setattr(builder, "create_masked_load", recorded)
    triton(**inputs)
    rows = {int(address - first) // 24 for address in read}
    assert rows == set(range(41))


def test_longer_batches_have_longer_tiles():
    shape = OPERATION.cases[0].shape
    for frames, rows, channels in ((902, 32, 32), (903, 32, 64), (3_351, 32, 64), (3_352, 128, 64)):
        inputs = OPERATION.cases[0].make(Draw(torch.Generator(), torch.bfloat16, torch.device("meta")), **{**shape, "clips": (frames,)})
        with recorded_launches(90) as recorded:
            triton(**inputs)
        (one,) = recorded
        assert (one.arguments["tile_rows"], one.tile.blocks["BLOCK_C"], one.tile.blocks["WHOLE"]) == (rows, channels, 1)


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


@strides
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_clip_gets_the_same_bits_between_neighbours_of_nan(dtype: torch.dtype, stride: int):
    inputs = draw((35,), 3, 5, dtype, stride=stride)
    alone = outcome(triton, inputs, ("x",))
    x = torch.full((33 + 35 + 3 + 2, 6), torch.nan, dtype=dtype)
    clip = slice(33, 33 + 35)
    x[clip] = inputs["x"]
    x.requires_grad_()
    with poisoned_allocations():
        together = triton(**{**inputs, "x": x, "cu_seqlens": torch.tensor([0, 33, 68, 68, 71], dtype=torch.int32)})
    own = slice(33 // stride, 33 // stride + 35 // stride)
    assert torch.equal(together[own], alone["out"])
    used = own.stop + 3 // stride
    assert together.shape[0] == 73 // stride and not together[used:].any()
    # The same incoming gradient for the clip, and NaN for all others.
    incoming = torch.full_like(together, torch.nan)
    incoming[own] = torch.randn(35 // stride, 3, generator=torch.Generator().manual_seed(1)).to(dtype)
    (gradient,) = torch.autograd.grad(together, x, incoming)
    assert torch.equal(gradient[clip], alone["grad x"])
    assert not gradient[-2:].any()


@strides
@pytest.mark.parametrize("normalised", [True, False])
def test_nan_in_padding_and_its_incoming_gradient_reaches_no_gradient(normalised: bool, stride: int):
    inputs = draw((9, 6), 3, 4, normalised=normalised, stride=stride)
    expected = outcome(triton, inputs, OPERATION.differentiable)
    padded = draw((9, 6), 3, 4, normalised=normalised, padding=20, stride=stride)
    padded["x"][:15], padded["x"][15:] = inputs["x"], torch.nan
    names = [name for name in OPERATION.differentiable if padded[name] is not None]
    leaves = {name: padded[name].requires_grad_() for name in names}
    incoming = torch.full((35 // stride, 3), torch.nan)
    incoming[: 15 // stride] = torch.randn(15 // stride, 3, generator=torch.Generator().manual_seed(1))
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


@strides
def test_a_program_writes_only_to_its_own_clip(stride: int, monkeypatch: pytest.MonkeyPatch):
    # Only one program runs: a later one would overwrite what this one wrote past its clip.
    monkeypatch.setattr(depthwise_conv_triton, "launch", lambda kernel, grid, *args, **named: launch(kernel, (1,), *args, **named))
    with poisoned_allocations():
        results = outcome(triton, draw((5, 9), 3, 3, stride=stride), ("x",))
    for name, tensor in results.items():
        own = 5 // stride if name == "out" else 5
        assert tensor[:own].isfinite().all()
        assert tensor[own:].isnan().all()


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
