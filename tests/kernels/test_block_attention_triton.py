"""The kernels of block attention: tile edges, bands of distances, batches, and the sums of the backward."""

import pytest
import torch
import triton
import triton.language as tl
from granite_kernels import KernelError, attention_blocks, block_attention
from granite_kernels.block_attention import OPERATION, _make, block_attention_reference
from granite_kernels.block_attention_kernels import JOINT, MIRROR, SLIDE, _barrel_slide, _swap_mirror
from granite_kernels.block_attention_triton import _TILES, _form, block_attention_triton
from granite_kernels.launch import recorded_launches
from granite_kernels.op import Draw
from granite_kernels.testing import (
    assert_accurate,
    assert_operation_accurate,
    assert_same_bits,
    in_float64,
    outcome,
    poisoned_allocations,
    strided_inputs,
)

WRT = OPERATION.differentiable
# Tiles that no row for 80, which the interpreter uses, has: every form with q read once, and slides with q read in steps.
FORMS = {
    "mirror": _form(MIRROR, 16, 16, 128, 2),
    "slide": _form(SLIDE, 16, 16, 128, 2),
    "slide, two halves": _form(SLIDE, 32, 16, 128, 2),
    "slide, in steps": _form(SLIDE, 32, 16, 16, 2),
    "joint": _form(JOINT, 16, 16, 128, 2),
    "joint, two halves": _form(JOINT, 32, 16, 128, 2),
}


def draw(
    *clips: int, heads: int = 1, dim: int = 16, context: int = 20, max_pos: int = 24, padding: int = 0, dtype=torch.float32, seed: int = 0
):
    rng = torch.Generator().manual_seed(seed)
    shape = {"clips": clips, "num_heads": heads, "dim_head": dim, "context_size": context, "max_pos_emb": max_pos, "padding": padding}
    return _make(Draw(rng, dtype, torch.device("cpu")), **shape)


def run(inputs: dict, **more) -> dict[str, torch.Tensor]:
    return outcome(block_attention_triton, {**inputs, **more}, WRT)


def using(form: str):
    return _TILES.using({(80, 2): FORMS[form], (80, 4): FORMS[form]})


@triton.jit
def _mirror_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """One program: x (BLOCK, BLOCK) float32 through `_swap_mirror` into out."""
    a = tl.arange(0, BLOCK)
    tile = a[:, None] * BLOCK + a[None, :]
    tl.store(out_ptr + tile, _swap_mirror(tl.load(x_ptr + tile)))


@pytest.mark.parametrize("block", [16, 32])
def test_swap_mirror_gives_the_same_as_gather(block: int):
    x, out = torch.randn(block, block), torch.empty(block, block)
    x[0, 1], x[2, 3] = torch.inf, -0.0
    _mirror_kernel[(1,)](x, out, BLOCK=block)
    place = torch.arange(block)
    assert torch.equal(out, x.gather(1, (place[:, None] - place) % block))
    assert torch.equal(out.gather(1, (place[:, None] - place) % block), x)


@triton.jit
def _slide_kernel(x_ptr, shift_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr):
    """One program: the halves of x (M, 2N) float32 through `_barrel_slide` with shift (M,) into out (M, N)."""
    a, b = tl.arange(0, M), tl.arange(0, N)
    x_ptr += a[:, None] * 2 * N + b[None, :]
    slid = _barrel_slide(tl.load(x_ptr), tl.load(x_ptr + N), tl.load(shift_ptr + a))
    tl.store(out_ptr + a[:, None] * N + b[None, :], slid)


@pytest.mark.parametrize("width", [16, 32])
def test_barrel_slide_gives_the_same_as_gather(width: int):
    x, out = torch.randn(32, 2 * width), torch.empty(32, width)
    x[0, 1], x[2, 3] = torch.inf, -0.0
    shift = torch.arange(32, dtype=torch.int32).flip(0) % width
    _slide_kernel[(1,)](x, shift, out, M=32, N=width)
    assert torch.equal(out, x.gather(1, shift[:, None] + torch.arange(width)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_accurate(form: str, dtype: torch.dtype):
    # Blocks of 41, 9 and 1 frames: several tiles, one that is not full, and bands with distances that do not occur.
    inputs = draw(50, 1, heads=2, dim=24, context=41, max_pos=41, padding=3, dtype=dtype)
    with using(form), poisoned_allocations(), torch.no_grad():
        out = block_attention(**strided_inputs(inputs), impl="triton")
    assert_accurate(out, block_attention_reference(**inputs), block_attention_reference(**in_float64(inputs)), form)


@pytest.mark.parametrize("form", ["mirror", "slide, in steps", "joint, two halves"])
def test_a_backward_follows_every_form(form: str):
    with using(form):
        assert_operation_accurate(OPERATION, draw(21, 3, dtype=torch.float16), impl="triton")


@pytest.mark.parametrize("form", ["mirror", "slide, two halves", "joint, two halves"])
def test_a_clip_gets_the_same_bits_in_every_batch_with_every_form(form: str):
    with using(form):
        assert_same_bits(OPERATION, draw(23, 0, 5, dtype=torch.bfloat16), impl="triton")


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_a_given_table_of_blocks_gives_the_same_bits(grad: bool):
    inputs = draw(45, 0, 13, padding=4)
    blocks = attention_blocks(inputs["cu_seqlens"], total_frames=62, context_size=20)
    wrt = WRT if grad else ()
    expected, given = (outcome(block_attention_triton, {**inputs, "blocks": some}, wrt) for some in (None, blocks))
    assert all(torch.equal(given[name], expected[name]) for name in expected)
    shorter = (blocks - torch.tensor([0, 0, 1], dtype=torch.int32)).clamp(min=0)
    assert not torch.equal(outcome(block_attention_triton, {**inputs, "blocks": shorter}, wrt)["out"], expected["out"])  # it is read


@pytest.mark.parametrize("length", [15, 16, 17, 33])
def test_lengths_around_a_tile_edge(length: int):
    with poisoned_allocations():
        assert_operation_accurate(OPERATION, draw(length, context=40, max_pos=40), impl="triton")


@pytest.mark.parametrize("context", [1, 31, 33])
def test_context_sizes_around_a_tile_edge(context: int):
    with poisoned_allocations():
        assert_operation_accurate(OPERATION, draw(2 * context + 1, context=context, max_pos=context, dtype=torch.bfloat16), impl="triton")


@pytest.mark.parametrize(
    ("dim", "dtype"), [(1, torch.float32), (17, torch.bfloat16), (63, torch.float16), (65, torch.float32), (127, torch.bfloat16)]
)
def test_head_dims_around_a_tile_width(dim: int, dtype: torch.dtype):
    assert_operation_accurate(OPERATION, strided_inputs(draw(11, 5, heads=2, dim=dim, context=18, dtype=dtype)), impl="triton")


def test_q_k_and_v_may_have_different_strides():
    inputs = draw(9, heads=2, dtype=torch.float16)
    own = {
        **inputs,
        "k": torch.nn.functional.pad(inputs["k"], (0, 4))[..., :16],
        "v": inputs["v"].transpose(0, 1).contiguous().transpose(0, 1),
    }
    assert all(len({own[name].stride(dim) for name in ("q", "k", "v")}) == 3 for dim in (0, 1))
    expected, results = run(inputs), run(own)
    assert all(torch.equal(results[name], expected[name]) for name in expected)


@pytest.mark.parametrize("scale", [0.0, -0.4, 3.0])
def test_any_scale(scale: float):
    assert_operation_accurate(OPERATION, {**draw(30), "scale": scale}, impl="triton")


def test_large_scores_do_not_overflow():
    inputs = draw(30, 7)
    inputs["q"] = inputs["q"] * 1000
    out = block_attention_triton(**inputs)
    assert out.isfinite().all()
    torch.testing.assert_close(out, block_attention_reference(**inputs), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_clip_gets_the_same_bits_in_every_batch(dtype: torch.dtype):
    clip = draw(45, dtype=dtype)
    batches = [((45, 13), 0), ((0, 3, 45), 2), ((41, 45, 20, 0), 1)]
    alone = run(clip)
    assert alone["out"].isfinite().all()
    for lengths, place in batches:
        batch = draw(*lengths, padding=3, dtype=dtype, seed=5)
        here = slice(sum(lengths[:place]), sum(lengths[:place]) + 45)
        for name in ("q", "k", "v"):
            # NaN in the neighbours.
            batch[name] = torch.full_like(batch[name].contiguous(), torch.nan)
            batch[name][here] = clip[name]
        together = outcome(block_attention_triton, {**batch, "rel_pos_emb": clip["rel_pos_emb"]})  # inference
        assert torch.equal(together["out"][here], alone["out"])


def test_gradients_of_a_clip_do_not_depend_on_its_neighbours():
    clip, batch = draw(33, dtype=torch.bfloat16), draw(3, 33, padding=4, seed=5, dtype=torch.bfloat16)
    here = slice(3, 36)
    incoming = torch.randn(40, 1, 16).bfloat16()
    for name in ("q", "k", "v"):
        batch[name] = batch[name].nan_to_num().contiguous()
        batch[name][here] = clip[name]
    wanted = gradients({**batch, "rel_pos_emb": clip["rel_pos_emb"]}, incoming)
    alone = gradients(clip, incoming[here])
    assert all(torch.equal(mine[here], theirs) for mine, theirs in zip(wanted[:3], alone[:3], strict=True))
    assert not any(gradient[36:].any() for gradient in wanted[:3])


def gradients(inputs: dict, incoming: torch.Tensor) -> list[torch.Tensor]:
    leaves = {name: inputs[name].detach().requires_grad_() for name in WRT}
    out = block_attention(**{**inputs, **leaves}, impl="triton")
    return list(torch.autograd.grad(out, list(leaves.values()), incoming))


def test_repeated_backwards_give_the_same_bits():
    inputs = draw(21, 8, 13, dtype=torch.bfloat16)  # more slots than one partial sum has
    once, again = run(inputs), run(inputs)
    assert all(torch.equal(once[name], again[name]) for name in once)
    assert_operation_accurate(OPERATION, inputs, impl="triton")


def test_incoming_gradients_may_have_any_strides():
    inputs = draw(12, heads=2)
    ones = torch.ones(12, 2, 16)
    expected = gradients(inputs, ones)
    for incoming in (torch.ones(()).expand(12, 2, 16), torch.ones(16, 2, 12).permute(2, 1, 0)):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(gradients(inputs, incoming), expected, strict=True))


def test_a_gradient_of_rel_pos_emb_alone():
    inputs = draw(25)
    leaf = inputs["rel_pos_emb"].detach().requires_grad_()
    block_attention(**{**inputs, "rel_pos_emb": leaf}, impl="triton").sum().backward()
    assert leaf.grad.isfinite().all()
    reach = inputs["context_size"] - 1
    assert not leaf.grad[: 24 - reach].any()
    assert not leaf.grad[24 + reach + 1 :].any()
    assert leaf.grad[24 - reach : 24 + reach + 1].any(1).all()


def test_position_rows_for_absent_distances_may_hold_nan():
    inputs = draw(5, 9, 3)
    inputs["rel_pos_emb"][: 24 - 8], inputs["rel_pos_emb"][24 + 9 :] = torch.nan, torch.nan
    assert all(result.isfinite().all() for result in run(inputs).values())


@pytest.mark.parametrize("needs", [False, True])
def test_lse_and_rest_are_written_only_if_a_backward_needs_them(needs: bool):
    inputs = {name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in draw(30, dtype=torch.float16).items()}
    inputs["v"].requires_grad_(needs)
    for inference in (True, False):
        with recorded_launches(90) as launches, torch.set_grad_enabled(not inference):
            block_attention_triton(**inputs)
        assert [launch.kernel.__name__ for launch in launches] == ["_attention_blocks_kernel", "_block_attention_fwd_kernel"]
        launch = launches[1]
        saved = needs and not inference
        assert (launch.arguments["lse_ptr"] is not None) == (launch.arguments["rest_ptr"] is not None) == saved


def test_a_head_dim_above_128_is_refused():
    inputs = draw(4, dim=129)
    with pytest.raises(KernelError, match=r"^block_attention: dim_head = 129; expected at most 128\. Use impl='torch' or GRANITE_SPEECH"):
        block_attention(**inputs, impl="triton")
    assert block_attention(**inputs, impl="torch").shape == (4, 1, 129)


def test_more_blocks_than_a_grid_are_refused():
    inputs = {name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in draw(65533, context=1).items()}
    with recorded_launches(90) as launches:
        block_attention(**inputs, impl="triton")
        with pytest.raises(KernelError, match=r"^block_attention: the number of slots for blocks = 65536; expected at most 65535\."):
            block_attention(**{**inputs, "cu_seqlens": torch.empty(3, dtype=torch.int32, device="meta")}, impl="triton")
    assert max(launch.grid[-1] for launch in launches) <= 65535
