"""The reference of decode_attention, against a softmax written out, and against the operations that it replaces."""

import dataclasses
import importlib
from typing import Any

import pytest
import torch
from granite_kernels import KernelError, decode_attention, paged_attention, rotary_write
from granite_kernels.decode_attention import OPERATION

from tests.kernels.test_rotary_write import heads_of, turned

LENGTHS = (5, 1, 0, 70, 64)


def draw(kv_lens=LENGTHS, heads=(4, 2), head_dim=8, page_size=16, dtype=torch.float64, **options) -> dict[str, Any]:
    shape = {"kv_lens": kv_lens, "heads": heads, "head_dim": head_dim, "page_size": page_size, **options}
    given = dataclasses.replace(OPERATION.cases[0], shape=shape).inputs(dtype)
    # Copies, which a test can write to and compare without the neighbours that a view shares its memory with.
    return {**given, "k_cache": given["k_cache"].clone(), "v_cache": given["v_cache"].clone()}


def copied(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value.clone() if name in OPERATION.mutates else value for name, value in given.items()}


def separately(given: dict[str, Any], impl: str) -> torch.Tensor:
    """The same by rotary_write and paged_attention; writes to the caches. Rows without keys write to page 0."""
    last, page_size, names = given["kv_lens"].long() - 1, given["k_cache"].shape[1], OPERATION.mutates[:2]
    pages = given["block_table"].long().gather(1, (last.clamp(min=0) // page_size)[:, None])[:, 0]
    slots = torch.where(last < 0, 0, pages * page_size + last % page_size)
    left_out = ("block_table", "kv_lens", "counters", "scale")
    q = rotary_write(**{name: value for name, value in given.items() if name not in left_out}, slots=slots, impl=impl)
    caches, index = (given[name] for name in names), (given["block_table"], given["kv_lens"])
    one_each = torch.arange(len(last) + 1, dtype=torch.int32)
    return paged_attention(q, *caches, *index, one_each, max_query_len=1, scale=given["scale"], impl=impl)


@pytest.mark.parametrize("adapters", [None, (0, -1)])
@pytest.mark.parametrize("ranks", [(0, 0, 0), (3, 0, 2)])
def test_each_row_attends_to_its_keys_and_the_new_one(ranks, adapters):
    given = draw(ranks=ranks, adapters=adapters)
    before = copied(given)
    out = decode_attention(**given)
    for row, kv_len in enumerate(LENGTHS):
        if kv_len == 0:
            assert not out[row].any()
            continue
        parts, angle = heads_of(given, row), (given["cos"][row], given["sin"][row])
        places = [(int(given["block_table"][row, j // 16]), j % 16) for j in range(kv_len)]
        keys, values = (torch.stack([before[name][place] for place in places]) for name in ("k_cache", "v_cache"))
        keys[-1], values[-1] = turned(parts["k"], *angle), parts["v"]
        scores = torch.einsum("hd,jhd->hj", turned(parts["q"], *angle), keys.repeat_interleave(2, dim=1)) * given["scale"]
        torch.testing.assert_close(out[row], torch.einsum("hj,jhd->hd", scores.softmax(1), values.repeat_interleave(2, dim=1)))
        torch.testing.assert_close(given["k_cache"][places[-1]], keys[-1])
        torch.testing.assert_close(given["v_cache"][places[-1]], values[-1])
        for name, new in (("k_cache", keys[-1]), ("v_cache", values[-1])):
            before[name][places[-1]] = new
    for name in ("k_cache", "v_cache"):
        torch.testing.assert_close(given[name], before[name], equal_nan=True, msg="something else was written")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_bits_are_those_of_rotary_write_and_paged_attention(dtype: torch.dtype):
    given = draw(dtype=dtype, ranks=(3, 0, 2), adapters=(0, -1, 0))
    apart = copied(given)
    assert torch.equal(decode_attention(**given), separately(apart, "torch"))
    for name in ("k_cache", "v_cache"):
        torch.testing.assert_close(given[name][1:], apart[name][1:], equal_nan=True, rtol=0, atol=0)


def test_layers_share_the_places_of_a_step(monkeypatch: pytest.MonkeyPatch):
    operation = importlib.import_module("granite_kernels.decode_attention")
    given, made, make = draw(), [], operation._new_tokens
    monkeypatch.setattr(operation, "_new_tokens", lambda *index: made.append(1) or make(*index))
    for _ in range(3):
        decode_attention(**given)
    assert len(made) == 1
    given["kv_lens"][0] += 1
    again = decode_attention(**copied(given))
    assert len(made) == 2
    assert torch.equal(again, decode_attention(**{**copied(given), "kv_lens": given["kv_lens"].clone()}))


@pytest.mark.parametrize("kv_len", [-1, 97])
def test_a_length_beyond_the_pages_is_refused_before_anything_is_written(kv_len: int):
    given = draw((9, 60))  # six pages, two of them unused
    given["kv_lens"][1] = kv_len
    before = copied(given)
    with pytest.raises(KernelError, match=rf"^decode_attention: kv_lens\[1\] = {kv_len}; expected 0 to 96, the capacity of a row"):
        decode_attention(**given)
    for name in ("k_cache", "v_cache"):
        torch.testing.assert_close(given[name], before[name], equal_nan=True, rtol=0, atol=0)


def test_too_few_counters_are_refused():
    given = draw()
    with pytest.raises(KernelError, match=r"counters has 19 entries; expected at least rows \* num_heads = 20\. Allocate"):
        decode_attention(**{**given, "counters": given["counters"][:19]})
