"""Block attention compared with loops over single frames, and with the attention module of transformers."""

import importlib

import pytest
import torch
from granite_kernels import KernelError, block_attention
from granite_kernels.block_attention import block_attention_cost


def draw(frames: int, heads: int = 2, dim: int = 8, max_pos: int = 8, dtype=torch.float64, seed: int = 0):
    rng = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, frames, heads, dim, generator=rng).to(dtype)
    return q, k, v, torch.randn(2 * max_pos + 1, dim, generator=rng).to(dtype)


def offsets(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def by_frames(q, k, v, rel_pos_emb, lengths, context_size, scale):
    """The formula, one frame and one head at a time."""
    max_pos, out, start = rel_pos_emb.shape[0] // 2, torch.zeros_like(q), 0
    for length in lengths:
        for i in range(length):
            block = i // context_size
            others = [j for j in range(length) if j // context_size == block]
            for head in range(q.shape[1]):
                query = q[start + i, head]
                scores = torch.stack([query @ k[start + j, head] + query @ rel_pos_emb[i - j + max_pos] for j in others]) * scale
                out[start + i, head] = torch.softmax(scores, 0) @ torch.stack([v[start + j, head] for j in others])
        start += length
    return out


@pytest.mark.parametrize(
    ("lengths", "context_size"), [((11,), 4), ((8,), 8), ((8,), 1), ((7, 0, 1, 4, 13), 5), ((3, 2), 8)], ids=lambda value: str(value)
)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_the_result_matches_the_formula(lengths: tuple[int, ...], context_size: int, scale: float | None):
    q, k, v, rel_pos_emb = draw(sum(lengths))
    out = block_attention(q, k, v, rel_pos_emb, offsets(*lengths), context_size=context_size, scale=scale)
    expected = by_frames(q, k, v, rel_pos_emb, lengths, context_size, 8**-0.5 if scale is None else scale)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frames", [1, 13, 16, 45])
def test_the_result_matches_the_module_of_transformers(frames: int):
    transformers = importlib.import_module("transformers.models.granite_speech.modeling_granite_speech")
    config = transformers.GraniteSpeechEncoderConfig(hidden_dim=32, num_heads=2, dim_head=16, context_size=16, max_pos_emb=24, dropout=0.0)
    torch.manual_seed(0)
    module = transformers.GraniteSpeechConformerAttention(config).double().eval()
    distances = torch.arange(16)[:, None] - torch.arange(16) + 24
    hidden = torch.randn(1, frames, 32, dtype=torch.float64)
    with torch.no_grad():
        expected = module(hidden, attention_dists=distances)[0]
        normed = module.pre_norm(hidden[0])
        q, k, v = (part.unflatten(1, (2, 16)) for part in (module.to_q(normed), *module.to_kv(normed).chunk(2, dim=1)))
        out = block_attention(q, k, v, module.rel_pos_emb.weight, offsets(frames), context_size=16)
        torch.testing.assert_close(module.to_out(out.flatten(1)), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_clip_gets_the_same_bits_in_every_batch(dtype: torch.dtype):
    q, k, v, rel_pos_emb = draw(60, dtype=dtype)
    q[:20], k[30:40], v[50:] = torch.nan, torch.inf, torch.nan
    together = block_attention(q, k, v, rel_pos_emb, offsets(20, 10, 10, 10, 10), context_size=4)
    for start in (20, 40):
        clip = slice(start, start + 10)
        alone = block_attention(q[clip], k[clip], v[clip], rel_pos_emb, offsets(10), context_size=4)
        assert alone.isfinite().all()
        assert torch.equal(together[clip], alone)


def test_gradients_match_finite_differences():
    inputs = [tensor.requires_grad_() for tensor in draw(9, heads=2, dim=3, max_pos=4)]
    assert torch.autograd.gradcheck(lambda *given: block_attention(*given, offsets(3, 0, 6), context_size=4), inputs)


def test_position_rows_for_absent_distances_are_not_read_and_get_no_gradient():
    q, k, v, rel_pos_emb = draw(9, max_pos=8)
    rel_pos_emb[:6], rel_pos_emb[11:] = torch.nan, torch.nan
    rel_pos_emb.requires_grad_()
    block_attention(q, k, v, rel_pos_emb, offsets(3, 6), context_size=3).sum().backward()
    assert not rel_pos_emb.grad[:6].any()
    assert not rel_pos_emb.grad[11:].any()
    assert rel_pos_emb.grad[6:11].abs().min() > 0


def test_a_batch_without_frames_has_a_backward():
    q, k, v, rel_pos_emb = (tensor.requires_grad_() for tensor in draw(3))
    block_attention(q, k, v, rel_pos_emb, offsets(0), context_size=4).sum().backward()
    assert not q.grad.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context_size": 0}, r"context_size=0; expected 1 to max_pos_emb = 8"),
        ({"context_size": 9}, r"context_size=9; expected 1 to max_pos_emb = 8"),
        ({"rel_pos_emb": torch.zeros(16, 8)}, r"rel_pos_emb has 16 rows; expected an odd number"),
        ({"rel_pos_emb": torch.zeros(17, 4)}, r"rel_pos_emb has shape \(17, 4\); expected .* with dim_head = 8 as in q"),
        ({"k": torch.zeros(6, 1, 8)}, r"k has shape \(6, 1, 8\); expected .* with num_heads = 2 as in q"),
        ({"v": torch.zeros(5, 2, 8)}, r"v has shape \(5, 2, 8\); expected .* with total_frames = 6 as in q"),
        ({"cu_seqlens": torch.zeros(0, dtype=torch.int32)}, r"cu_seqlens is empty"),
        ({"blocks": torch.zeros(2, 3, dtype=torch.int32)}, r"blocks has shape \(2, 3\) and strides \(3, 1\); expected \(3, 3\)"),
        ({"blocks": torch.zeros(3, 4, dtype=torch.int32)[:, :3]}, r"blocks has shape \(3, 3\) and strides \(4, 1\); .* contiguous"),
        ({"blocks": torch.zeros(3, 3)}, r"blocks has dtype torch.float32; expected torch.int32"),
        ({"cu_seqlens": offsets(4, 3)}, r"cu_seqlens \[0, 4, 7\] for 6 rows; expected offsets"),
        ({"cu_seqlens": torch.tensor([0, 4, 2], dtype=torch.int32)}, r"cu_seqlens \[0, 4, 2\]"),
        ({"cu_seqlens": torch.tensor([1, 4], dtype=torch.int32)}, r"cu_seqlens \[1, 4\]"),
    ],
)
def test_wrong_arguments_are_refused(change: dict, message: str):
    q, k, v, rel_pos_emb = draw(6, dtype=torch.float32)
    right = {"q": q, "k": k, "v": v, "rel_pos_emb": rel_pos_emb, "cu_seqlens": offsets(6), "context_size": 4}
    block_attention(**right, blocks=torch.zeros(3, 3, dtype=torch.int32))
    with pytest.raises(KernelError, match=message):
        block_attention(**{**right, **change})


def test_cost_matches_a_count_by_hand():
    q, k, v, rel_pos_emb = draw(8, heads=2, dim=8, dtype=torch.float32)
    # Blocks of 4, 1 and 2 frames: 16 + 1 + 4 pairs, three products for each of 2 · 8 features; one row of padding.
    cost = block_attention_cost(q, k, v, rel_pos_emb, offsets(5, 2), context_size=4)
    assert cost.flops == 21 * 3 * 2 * 2 * 8
    assert cost.bytes == 4 * (3 * 7 * 16 + 8 * 16 + 7 * 8) + 3 * 4
