"""The kernels of block attention: tile edges, bands of distances, batches, and the sums of the backward."""

import pytest
import torch
import triton
import triton.language as tl
from granite_kernels import KernelError, block_attention
from granite_kernels.block_attention import OPERATION, _make, block_attention_reference
from granite_kernels.block_attention_kernels import _swap_mirror
from granite_kernels.block_attention_triton import block_attention_triton
from granite_kernels.launch import recorded_launches
from granite_kernels.op import Draw
from granite_kernels.testing import assert_operation_accurate, outcome, poisoned_allocations, strided_inputs

WRT = OPERATION.differentiable


def draw(
    *clips: int, heads: int = 1, dim: int = 16, context: int = 20, max_pos: int = 24, padding: int = 0, dtype=torch.float32, seed: int = 0
):
    rng = torch.Generator().manual_seed(seed)
    shape = {"clips": clips, "num_heads": heads, "dim_head": dim, "context_size": context, "max_pos_emb": max_pos, "padding": padding}
    return _make(Draw(rng, dtype, torch.device("cpu")), **shape)


def run(inputs: dict, **more) -> dict[str, torch.Tensor]:
    return outcome(block_attention_triton, {**inputs, **more}, WRT)


def offsets(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


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
        (launch,) = launches
        saved = needs and not inference
        assert (launch.arguments["lse_ptr"] is not None) == (launch.arguments["rest_ptr"] is not None) == saved


def test_a_head_dim_above_128_is_refused():
    inputs = draw(4, dim=129)
    with pytest.raises(KernelError, match=r"^block_attention: dim_head = 129; expected at most 128\. Use impl='torch' or GRANITE_SPEECH"):
        block_attention(**inputs, impl="triton")
    assert block_attention(**inputs, impl="torch").shape == (4, 1, 129)
