"""A step of one row on a CPU, whose keys and values are read where they lie."""

from typing import Any

import pytest
import torch
from granite_kernels import OPERATIONS
from granite_kernels import decode_attention_cpu as on_cpu
from granite_kernels.op import Case
from granite_kernels.testing import assert_accurate, in_float64, outcome_of, poisoned_allocations

OPERATION = OPERATIONS["decode_attention"]
ADAPTERS = {
    "none": {},
    "all": {"ranks": (5, 16, 3)},
    "on": {"ranks": (8, 0, 8), "adapters": (0,)},
    "off": {"ranks": (4, 4, 4), "adapters": (-1,)},
}


def step(kv_len: int, dtype: torch.dtype, heads: tuple[int, int] = (6, 2), first: int = 1, **adapter: Any) -> dict[str, Any]:
    """A row whose pages lie one after another from `first` on. Everything else in the cache is NaN."""
    make = next(iter(OPERATION.cases)).make
    inputs = Case("", make, {"kv_lens": (kv_len,), "heads": heads, "head_dim": 32, "page_size": 16, **adapter}).inputs(dtype)
    pages = -(-kv_len // 16)
    cache = torch.full((first + pages + 1, 16, 2, heads[1], 32), torch.nan, dtype=dtype)
    cache.flatten(0, 1)[16 * first : 16 * first + kv_len - 1].normal_()
    table = torch.arange(first, first + pages, dtype=torch.int32)[None]
    return inputs | {"k_cache": cache[:, :, 0], "v_cache": cache[:, :, 1], "block_table": table}


@pytest.fixture
def no_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_cpu, "decode_attention_reference", lambda *inputs: pytest.fail("the reference"))


@pytest.mark.usefixtures("no_reference")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("kv_len", [1, 2, 16, 17, 70])
def test_result_and_cache_are_accurate(kv_len: int, adapter: str, dtype: torch.dtype):
    inputs = step(kv_len, dtype, **ADAPTERS[adapter])
    with poisoned_allocations():
        ours = outcome_of(OPERATION, OPERATION.cpu, inputs)
    eager, truth = (outcome_of(OPERATION, OPERATION.reference, one) for one in (inputs, in_float64(inputs)))
    assert ours.keys() == eager.keys() == truth.keys()
    assert not ours.pop("after counters").any()
    for name, one in ours.items():
        assert_accurate(one, eager[name], truth[name], name)


def test_pages_anywhere_and_rows_without_keys_give_the_references_result():
    inputs = step(70, torch.float32, first=3)
    scattered = inputs | {"block_table": inputs["block_table"].flip(1)}
    pages = [*range(3), *reversed(range(3, 8)), 8]
    scattered |= {name: inputs[name][pages].clone() for name in ("k_cache", "v_cache")}
    expected = OPERATION.cpu(**inputs)
    torch.testing.assert_close(OPERATION.cpu(**scattered), expected)
    torch.testing.assert_close(scattered["k_cache"][3], inputs["k_cache"][7], equal_nan=True)
    inactive = step(16, torch.float32) | {"kv_lens": torch.tensor([0], dtype=torch.int32)}
    assert not OPERATION.cpu(**inactive).any()


def test_the_next_step_sees_its_own_length():
    """What one layer finds out about a step is kept for the others, and forgotten when the lengths change in place."""
    inputs = step(20, torch.float32)
    OPERATION.cpu(**inputs)
    inputs["kv_lens"].add_(1)
    for name in ("k_cache", "v_cache"):
        assert inputs[name].flatten(0, 1)[36].isnan().all()
    OPERATION.cpu(**inputs)
    for name in ("k_cache", "v_cache"):
        assert not inputs[name].flatten(0, 1)[36].isnan().any()
