"""Paged attention compared with PyTorch's attention over the unpaged keys, one sequence at a time."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from granite_kernels import KernelError, paged_attention
from granite_kernels.paged_attention import _LAST_PLAN, paged_attention_cost

SCALE = 0.2


def draw(sequences, num_heads=4, num_kv_heads=2, head_dim=8, page_size=4, dtype=torch.float64, seed=0):
    """The arguments of a call, and each sequence's queries, keys and values. Unused rows of the cache are NaN."""
    rng = torch.Generator().manual_seed(seed)
    parts = [
        [torch.randn(n, heads, head_dim, generator=rng).to(dtype) for n, heads in ((n, num_heads), (kv, num_kv_heads), (kv, num_kv_heads))]
        for n, kv in sequences
    ]
    counts = [-(-kv // page_size) for _, kv in sequences]
    free = torch.randperm(sum(counts) + 3, generator=rng).tolist()
    k_cache, v_cache = torch.full((2, len(free), page_size, num_kv_heads, head_dim), torch.nan, dtype=dtype)
    table = torch.full((len(sequences), max(counts, default=0) + 1), free.pop(), dtype=torch.int32)
    for sequence, (_, keys, values) in enumerate(parts):
        for j in range(len(keys)):
            if j % page_size == 0:
                table[sequence, j // page_size] = free.pop()
            page = int(table[sequence, j // page_size])
            k_cache[page, j % page_size], v_cache[page, j % page_size] = keys[j], values[j]
    given = {
        "q": torch.cat([queries for queries, _, _ in parts]),
        "k_cache": k_cache,
        "v_cache": v_cache,
        "block_table": table,
        "kv_lens": torch.tensor([kv for _, kv in sequences], dtype=torch.int32),
        "cu_seqlens_q": torch.tensor([0, *(n for n, _ in sequences)]).cumsum(0).to(torch.int32),
        "max_query_len": max(n for n, _ in sequences),
        "scale": SCALE,
    }
    return given, parts


def unpaged(queries, keys, values, causal):
    group = queries.shape[1] // keys.shape[1]
    n, kv_len = len(queries), len(keys)
    keys, values = (tensor.repeat_interleave(group, dim=1).transpose(0, 1) for tensor in (keys, values))
    mask = torch.ones(n, kv_len, dtype=torch.bool).tril(kv_len - n) if causal else None
    return F.scaled_dot_product_attention(queries.transpose(0, 1), keys, values, attn_mask=mask, scale=SCALE).transpose(0, 1)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("page_size", [1, 4, 256])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (5, 1)], ids=str)
def test_the_result_is_attention_over_the_unpaged_keys(causal: bool, page_size: int, heads: tuple[int, int]):
    given, parts = draw([(1, 1), (1, 9), (3, 3), (2, 8), (5, 14)], *heads, page_size=page_size)
    out = paged_attention(**given, causal=causal)
    torch.testing.assert_close(out, torch.cat([unpaged(*part, causal) for part in parts]), rtol=1e-12, atol=1e-12)


def test_two_queries_match_a_loop_over_their_keys():
    given, [(queries, keys, values)] = draw([(2, 5)])
    out = paged_attention(**given)
    for t, last in ((0, 3), (1, 4)):
        for head in range(4):
            scores = torch.stack([queries[t, head] @ keys[j, head // 2] * SCALE for j in range(last + 1)])
            weights = scores.exp() / scores.exp().sum()
            expected = sum(weights[j] * values[j, head // 2] for j in range(last + 1))
            torch.testing.assert_close(out[t, head], expected, rtol=1e-12, atol=1e-12)


def test_several_queries_give_the_same_as_single_steps():
    given, [(queries, _, _)] = draw([(4, 11)])
    together = paged_attention(**given)
    for t in range(4):
        step = {**given, "q": queries[t : t + 1], "kv_lens": torch.tensor([8 + t], dtype=torch.int32), "max_query_len": 1}
        step["cu_seqlens_q"] = torch.tensor([0, 1], dtype=torch.int32)
        torch.testing.assert_close(paged_attention(**step)[0], together[t], rtol=1e-12, atol=1e-12)


def test_sequences_may_share_pages():
    given, [(queries, _, _)] = draw([(1, 7)])
    both = {**given, "q": queries.repeat(2, 1, 1), "block_table": given["block_table"].repeat(2, 1), "kv_lens": given["kv_lens"].repeat(2)}
    out = paged_attention(**{**both, "cu_seqlens_q": torch.tensor([0, 1, 2], dtype=torch.int32)})
    assert torch.equal(out[:1], out[1:])
    assert torch.equal(out[:1], paged_attention(**given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sequence_gets_the_same_bits_in_every_batch(dtype: torch.dtype):
    given, _ = draw([(1, 9), (2, 30), (1, 17)], dtype=dtype)
    together = paged_attention(**given)
    alone = paged_attention(
        given["q"][1:3],
        given["k_cache"],
        given["v_cache"],
        given["block_table"][1:2, :8],
        given["kv_lens"][1:2],
        torch.tensor([0, 2], dtype=torch.int32),
        max_query_len=2,
        scale=SCALE,
    )
    assert torch.equal(together[1:3], alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_many_rows_of_mixed_lengths_get_the_bits_of_each_row_alone(dtype: torch.dtype):
    """Decode steps, drafts and sequences without keys or queries, of one to nine pages; `draw` puts NaN in every unused row."""
    sequences = [(1, 1 + 5 * row % 36) for row in range(40)] + [(3, 9), (1, 0), (3, 11), (0, 7), (2, 1), (1, 36), (3, 30)]
    given, _ = draw(sequences, num_heads=6, num_kv_heads=2, head_dim=16, dtype=dtype)
    together = paged_attention(**given)
    assert together.isfinite().all()
    offsets = given["cu_seqlens_q"].tolist()
    for row, (n, _) in enumerate(sequences):
        span, one = slice(offsets[row], offsets[row + 1]), slice(row, row + 1)
        alone = {**given, "q": given["q"][span], "block_table": given["block_table"][one], "kv_lens": given["kv_lens"][one]}
        alone = paged_attention(**alone | {"cu_seqlens_q": torch.tensor([0, n], dtype=torch.int32)})
        assert torch.equal(together[span], alone), row


def test_block_table_entries_past_the_keys_are_not_read():
    given, _ = draw([(1, 5), (1, 0), (0, 3)])
    expected = paged_attention(**given)
    given["block_table"][0, 2:], given["block_table"][1] = 10**6, -5
    assert torch.equal(paged_attention(**given), expected)
    assert not expected[1].any()
    assert expected[0].isfinite().all()


@pytest.mark.parametrize("causal", [True, False])
def test_queries_that_see_no_key_give_zeros(causal: bool):
    given, [(queries, keys, values)] = draw([(4, 2)])
    out = paged_attention(**given, causal=causal)
    if causal:
        assert not out[:2].any()
        torch.testing.assert_close(out[2:], unpaged(queries[2:], keys, values, True), rtol=1e-12, atol=1e-12)
    else:
        torch.testing.assert_close(out, unpaged(queries, keys, values, False), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["q", "k_cache", "v_cache"])
def test_tensors_that_require_gradients_are_refused(name: str):
    given, _ = draw([(1, 5)])
    given[name].requires_grad_()
    with pytest.raises(KernelError, match="requires a gradient; expected inference"):
        paged_attention(**given)
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            assert paged_attention(**given).isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(3, 5, 8)}, r"q has 5 heads for 2 of k_cache; expected a multiple"),
        ({"q": torch.zeros(3, 4, 16)}, r"k_cache has shape .* with head_dim = 16 as in q"),
        ({"v_cache": torch.zeros(1, 4, 2, 8)}, r"v_cache has shape .* with num_pages = 6 as in k_cache"),
        ({"k_cache": torch.zeros(6, 0, 2, 8), "v_cache": torch.zeros(6, 0, 2, 8)}, r"k_cache has page_size 0; expected at least 1"),
        ({"kv_lens": torch.zeros(3, dtype=torch.int32)}, r"kv_lens has shape \(3,\); expected .* with sequences = 2 as in block_table"),
        ({"kv_lens": torch.tensor([5, 13], dtype=torch.int32)}, r"kv_lens\[1\] = 13; expected 0 to 12"),
        ({"cu_seqlens_q": torch.tensor([0, 3], dtype=torch.int32)}, r"cu_seqlens_q has 2 entries for 2 sequences"),
        ({"cu_seqlens_q": torch.tensor([0, 2, 1], dtype=torch.int32)}, r"cu_seqlens \[0, 2, 1\]"),
        ({"max_query_len": 1}, r"2 queries in sequence 1; expected at most max_query_len = 1"),
        ({"max_query_len": -1}, r"max_query_len=-1; expected 0 or more"),
    ],
)
def test_wrong_arguments_are_refused(change: dict, message: str):
    right, _ = draw([(1, 5), (2, 4)], dtype=torch.float32)
    paged_attention(**right)
    with pytest.raises(KernelError, match=message):
        paged_attention(**{**right, **change})


def test_layers_share_the_plan_of_a_step(monkeypatch: pytest.MonkeyPatch):
    given, _ = draw([(1, 5), (1, 8), (2, 4)])
    expected = paged_attention(**given)
    # The package's attribute of this name is the function. None would raise if it were called.
    monkeypatch.setattr(importlib.import_module("granite_kernels.paged_attention"), "_groups", None)
    given["k_cache"], given["v_cache"] = given["k_cache"].clone(), given["v_cache"].clone()
    assert torch.equal(paged_attention(**given), expected)


@pytest.mark.parametrize("name", ["block_table", "kv_lens", "cu_seqlens_q", "max_query_len", "causal"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_plan_is_not_used_after_a_change(name: str, mode):
    given, _ = draw([(2, 5), (2, 7), (1, 8)])
    changes = {
        "block_table": given["block_table"][[1, 0, 2]],
        "kv_lens": torch.tensor([4, 3, 5], dtype=torch.int32),
        "cu_seqlens_q": torch.tensor([0, 1, 3, 5], dtype=torch.int32),
    }
    with mode():
        before = paged_attention(**given)
        if name == "max_query_len":
            with pytest.raises(KernelError, match="2 queries in sequence 0"):
                paged_attention(**{**given, name: 1})
        elif name == "causal":
            given[name] = False
        else:
            given["kv_lens"][:2] = 5  # so that both tables have enough pages
            before = paged_attention(**given)
            given[name].copy_(changes[name])
        after = paged_attention(**given)
        fresh = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in given.items()}
        assert torch.equal(after, paged_attention(**fresh))
    assert torch.equal(before, after) == (name == "max_query_len")


def test_plans_are_dropped_with_their_index_tensors():
    given, _ = draw([(1, 5), (1, 8)])
    paged_attention(**given)
    assert _LAST_PLAN._plan
    del given["kv_lens"]
    assert not _LAST_PLAN._plan


def test_cost_matches_a_count_by_hand():
    given, _ = draw([(1, 5), (2, 4), (0, 7)], dtype=torch.bfloat16)
    cost = paged_attention_cost(**given)
    # 5 pairs in the first sequence, 3 + 4 in the second. Keys of a sequence without a query are not read.
    assert cost.flops == 4 * (5 + 7) * 4 * 8
    assert cost.bytes == 2 * (2 * 3 * 4 * 8 + 2 * 9 * 2 * 8) + 4 * (2 + 1 + 3 + 4)
    assert paged_attention_cost(**given, causal=False).flops == 4 * (5 + 8) * 4 * 8
