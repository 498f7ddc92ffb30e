"""The kernel of decode_attention: the bits of paged_attention's, whatever shares the work and whatever else is in the batch."""

import pytest
import torch
from granite_kernels import KernelError, decode_attention, decode_attention_triton
from granite_kernels.decode_attention import OPERATION
from granite_kernels.launch import recorded_launches
from granite_kernels.testing import assert_operation_accurate, outcome_of, poisoned_allocations

from tests.kernels.test_decode_attention import copied, draw, separately
from tests.kernels.test_operations import same
from tests.kernels.test_paged_attention_triton import pieces_of_64

LENGTHS = (130, 0, 65)


def results(given, **changed):
    with poisoned_allocations():
        return outcome_of(OPERATION, lambda **inputs: decode_attention(**inputs, impl="triton"), {**given, **changed})


def share(monkeypatch: pytest.MonkeyPatch, slots: int) -> None:
    """Let this many programs share a row's pieces."""
    monkeypatch.setattr(decode_attention_triton, "_slots", lambda fill, programs, pieces: min(pieces, slots))


@pytest.mark.parametrize(
    ("dtype", "page_size", "slots"), [(torch.float32, 64, 2), (torch.bfloat16, 16, 1), (torch.bfloat16, 64, 9)], ids=str
)
def test_the_bits_are_those_of_paged_attention(dtype: torch.dtype, page_size: int, slots: int, monkeypatch: pytest.MonkeyPatch):
    share(monkeypatch, slots)
    given = draw(LENGTHS, (4, 2), dtype=dtype, page_size=page_size)
    apart = copied(given)
    with pieces_of_64(BLOCK_N=64):
        expected = separately(apart, "triton")
    assert torch.equal(decode_attention(**given, impl="triton"), expected)
    for name in ("k_cache", "v_cache"):
        torch.testing.assert_close(given[name][1:], apart[name][1:], equal_nan=True, rtol=0, atol=0)


def test_the_number_of_programs_per_row_changes_no_bits_and_leaves_the_counters_at_zero(monkeypatch: pytest.MonkeyPatch):
    given = draw(LENGTHS, (3, 1), dtype=torch.bfloat16, ranks=(3, 2, 1), adapters=(0, 0, -1))
    expected = results(given)
    assert not expected["after counters"].any()
    for slots in (1, 2, 9):
        share(monkeypatch, slots)
        assert same(results(given), expected), slots


def test_the_last_program_to_arrive_merges_and_the_first_does_not(monkeypatch: pytest.MonkeyPatch):
    # One arrival short of its number, a row's result is never written.
    share(monkeypatch, 2)
    given = draw((130, 64), (2, 1), dtype=torch.float32)
    given["counters"][0] = -1
    out = results(given)
    assert out["out"][0].isnan().all()
    assert out["out"][1].isfinite().all(), "a row with one piece waits for nobody"
    assert int(out["after counters"][0]) == 1


def test_a_row_gets_the_same_bits_alone_in_other_pages_and_in_a_wider_table():
    given = draw(LENGTHS, (2, 1), dtype=torch.bfloat16, ranks=(3, 0, 2), adapters=(0, -1, 0))
    expected = results(given)["out"]
    per_row = ("qkv", "cos", "sin", "low", "block_table", "kv_lens", "adapter_index")
    for row in (0, 2):
        alone = {name: given[name][row : row + 1] for name in per_row}
        table = torch.cat((alone["block_table"], torch.full((1, 9), -(2**31), dtype=torch.int32)), dim=1)
        assert torch.equal(results(given, **{**alone, "block_table": table})["out"][0], expected[row])
    order = torch.randperm(given["k_cache"].shape[0], generator=torch.Generator().manual_seed(0))
    moved = {name: given[name][order] for name in ("k_cache", "v_cache")}
    assert torch.equal(results(given, **moved, block_table=order.argsort().int()[given["block_table"].long()])["out"], expected)


def test_entries_of_the_block_table_past_the_keys_are_not_read():
    given = draw((9, 130, 0), (2, 1), dtype=torch.float32)
    table = given["block_table"].clone()
    table[0, 1:], table[1, 9:], table[2] = 2**30, -(2**31), 2**30
    assert same(results(given, block_table=table), results(given))


def test_the_block_table_is_not_read_past_the_end_of_a_row():
    given = draw((32, 40), (2, 1), dtype=torch.float32)
    narrow = given["block_table"][:, :2].contiguous()
    too_long = torch.tensor([40, 32], dtype=torch.int32)
    assert same(results(given, block_table=narrow, kv_lens=too_long), results(given, block_table=narrow, kv_lens=too_long.clamp(max=32)))


@pytest.mark.parametrize("heads", [(6, 2), (18, 1)], ids=str)
def test_groups_of_query_heads(heads: tuple[int, int]):
    given = draw((66, 3), heads, dtype=torch.float32, ranks=(2, 3, 4), adapters=(0, -1))
    assert_operation_accurate(OPERATION, given, impl="triton")


@pytest.mark.parametrize("page_size", [1, 7, 100, 128])
def test_page_sizes(page_size: int):
    assert_operation_accurate(OPERATION, draw((130, 65), (2, 1), page_size=page_size, dtype=torch.float32), impl="triton")


def test_rows_without_the_adapter_have_the_bits_of_a_call_without_one():
    given = draw((5, 66, 7), (2, 1), dtype=torch.float32, ranks=(3, 3, 3), adapters=(0, -1, -1))
    for name in ("lora_q", "lora_k", "lora_v"):
        given[name][:] = torch.nan
    plain = results(given, low=None, lora_q=None, lora_k=None, lora_v=None)
    assert torch.equal(results(given)["out"][1:], plain["out"][1:])


def test_ranks_of_several_tiles():
    given = draw((5, 66), (2, 1), 4, dtype=torch.float32, ranks=(70, 33, 32), adapters=(0,))
    assert_operation_accurate(OPERATION, given, impl="triton")


def test_a_call_is_one_launch_and_few_rows_are_shared_by_more_programs():
    for rows, slots in ((1, 21), (8, 16), (33, 4), (300, 1)):
        given = draw((1200,) * rows, (2, 2), 16, 64, dtype=torch.bfloat16)
        with recorded_launches(90) as recorded:
            OPERATION.triton(**{name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in given.items()})
        (launch,) = recorded
        assert launch.grid == (2 * rows, slots)
        assert launch.tile.blocks["PDL"]


def test_a_head_dim_above_128_is_refused():
    with pytest.raises(KernelError, match=r"^decode_attention: head_dim 130; expected at most 128\. Use impl='torch'"):
        decode_attention(**draw((5,), (1, 1), 130, dtype=torch.float32), impl="triton")
