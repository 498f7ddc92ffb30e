"""The kernels of paged attention: tile edges, and ways to share a sequence's keys between programs."""

import dataclasses

import pytest
import torch
from granite_kernels import KernelError, paged_attention, paged_attention_triton
from granite_kernels.launch import recorded_launches
from granite_kernels.paged_attention import OPERATION
from granite_kernels.testing import assert_operation_accurate, poisoned_allocations

# In most of these tests two query heads share a KV head, so that the decode kernel computes sequences of up to 8 queries.
MIXED = ((1, 290), (9, 40), (8, 130), (1, 1), (20, 70), (0, 5), (2, 0))


@pytest.fixture(autouse=True)
def short_pieces():
    """Pieces half as long, so that the slow interpreter needs half of the keys."""
    with pieces_of_64():
        yield


def pieces_of_64(**blocks: int):
    """Pieces of 64 keys in every batch, in this block; and other changes to the tiles of the decode kernel."""
    table = paged_attention_triton._DECODE
    rows = {key: row.tile for key, row in table.rows.items()}
    return table.using({key: dataclasses.replace(tile, blocks={**tile.blocks, "PIECE": 64, **blocks}) for key, tile in rows.items()})


def draw(sequences, heads=(2, 1), head_dim=16, page_size=8, dtype=torch.float32, **options):
    shape = {"sequences": sequences, "num_heads": heads[0], "num_kv_heads": heads[1], "head_dim": head_dim, "page_size": page_size}
    return dataclasses.replace(OPERATION.cases[0], shape={**shape, **options}).inputs(dtype)


def attend(given, **changed):
    with poisoned_allocations():
        return paged_attention(**{**given, **changed}, impl="triton")


def some(given, order):
    """The same call on the sequences in `order`, with the block table and max_query_len that these need."""
    offsets = given["cu_seqlens_q"].tolist()
    lengths = [offsets[sequence + 1] - offsets[sequence] for sequence in order]
    kv_lens = given["kv_lens"][order]
    width = -(-int(kv_lens.max()) // given["k_cache"].shape[1])
    return {
        **given,
        "q": torch.cat([given["q"][offsets[sequence] : offsets[sequence + 1]] for sequence in order]),
        "block_table": given["block_table"][order, :width].contiguous(),
        "kv_lens": kv_lens,
        "cu_seqlens_q": torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        "max_query_len": max(lengths),
    }


def pieces_of(out, given):
    return out.split(given["cu_seqlens_q"].diff().tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sequence_gets_the_same_bits_alone_and_in_different_batches(dtype: torch.dtype):
    given = draw(MIXED, dtype=dtype)
    whole = pieces_of(attend(given), given)
    for sequence, expected in enumerate(whole):
        assert torch.equal(attend(some(given, [sequence]), max_query_len=99), expected), sequence
    for order in ([1, 0, 0, 3], [6, 2, 5], [3, 2, 4]):
        batch = some(given, order)
        for sequence, rows in zip(order, pieces_of(attend(batch), batch), strict=True):
            assert torch.equal(rows, whole[sequence]), (order, sequence)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("slots", [1, 2])
def test_the_number_of_programs_per_sequence_changes_no_bits(slots: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    given = draw(((1, 330), (8, 129), (3, 64), (2, 1), (1, 0), (12, 80), (5, 3)), dtype=dtype, padding=11)
    monkeypatch.setattr(paged_attention_triton, "_slots", lambda fill, programs, pieces: pieces)
    expected = attend(given)
    monkeypatch.setattr(paged_attention_triton, "_slots", lambda fill, programs, pieces: slots)
    assert torch.equal(attend(given), expected)


@pytest.mark.parametrize(("dtype", "causal"), [(torch.float32, True), (torch.float16, False)], ids=str)
def test_lengths_around_every_tile_edge(dtype: torch.dtype, causal: bool):
    # Tiles of 32 keys (64 in the prefill kernel in half precision), pieces of 64; tiles of 8 queries, in the prefill kernel 16 or 32.
    keys = [one + more for one in (32, 64, 128) for more in (-1, 0, 1)]
    queries = [one + more for one in (8, 16, 32) for more in (-1, 0, 1)]
    sequences = [(1 + index % 4, kv_len) for index, kv_len in enumerate(keys)] + [(n, 66) for n in queries]
    assert_operation_accurate(OPERATION, draw(sequences, causal=causal, dtype=dtype), impl="triton")


@pytest.mark.parametrize("heads", [(5, 5), (9, 3), (17, 1), (20, 2), (64, 2)], ids=str)
def test_groups_of_query_heads(heads: tuple[int, int]):
    assert_operation_accurate(OPERATION, draw(((1, 37), (2, 20), (9, 35)), heads, padding=3), impl="triton")


@pytest.mark.parametrize(("head_dim", "page_size"), [(1, 3), (24, 7), (64, 100), (100, 1), (128, 48)])
def test_head_dims_and_page_sizes(head_dim: int, page_size: int):
    assert_operation_accurate(OPERATION, draw(((1, 150), (10, 33), (3, 70)), (2, 1), head_dim, page_size), impl="triton")


def test_sums_are_rescaled_when_every_tile_has_a_larger_score():
    # Scores rise by 4 per tile: a sum that is not rescaled is e^4 times too large.
    given = draw(((1, 300), (12, 100)), page_size=16)
    given["q"][..., 0] = 1.0
    rising = torch.zeros_like(given["k_cache"])
    for sequence, kv_len in enumerate(given["kv_lens"].tolist()):
        for j in range(kv_len):
            rising[given["block_table"][sequence, j // 16], j % 16, :, 0] = j
    given["k_cache"] = given["k_cache"] + rising / 2
    assert_operation_accurate(OPERATION, given, impl="triton")
    assert_operation_accurate(OPERATION, {**given, "scale": -0.3}, impl="triton")


def test_scale_0_gives_the_mean_of_the_values():
    given = draw(((1, 3),), (1, 1), page_size=4)
    mean = given["v_cache"][given["block_table"][0, 0], :3, 0].mean(0)
    torch.testing.assert_close(attend(given, scale=0.0)[0, 0], mean)


def test_sequences_may_share_pages():
    given = draw(((2, 100),))
    both = some(given, [0, 0])
    out = attend(both)
    assert torch.equal(out[:2], out[2:])


@pytest.mark.parametrize("n", [1, 12])
def test_the_block_table_is_not_read_past_the_end_of_a_row(n: int):
    # Otherwise the next row's pages would be used.
    given = draw(((n, 16), (n, 40)), page_size=8)
    narrow = {**given, "block_table": given["block_table"][:, :2].contiguous()}
    too_long = torch.tensor([32, 16], dtype=torch.int32)
    assert torch.equal(attend(narrow, kv_lens=too_long), attend(narrow, kv_lens=too_long.clamp(max=16)))


def test_block_table_entries_past_the_keys_are_not_read():
    given = draw(((1, 9), (12, 17), (1, 0)))
    expected = attend(given)
    table = given["block_table"].clone()
    table[0, 2:], table[1, 3:], table[2] = 2**30, -(2**31), 2**30
    assert torch.equal(attend(given, block_table=table), expected)


def recorded(sequences, **options):
    given = draw(sequences, **options)
    with recorded_launches(90) as launches:
        OPERATION.triton(**{name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in given.items()})
    return launches


def launches(sequences, **options):
    return [launch.kernel.__name__.removeprefix("_paged_attention_").removesuffix("_kernel") for launch in recorded(sequences, **options)]


def test_shapes_and_max_query_len_decide_which_kernels_are_launched():
    assert launches(((1, 90), (8, 90))) == ["decode"]
    assert launches(((1, 90), (9, 90))) == ["decode", "prefill"]
    assert launches(((1, 112),)) == ["decode"]
    assert launches(((1, 120),)) == ["decode", "merge"]
    assert launches(((9, 240),)) == ["decode", "prefill"]
    assert launches(((9, 2000),)) == ["decode", "merge", "prefill"]
    assert launches(((1, 20),) * 300 + ((1, 2000),)) == ["decode"]
    assert launches(()) == []
    assert launches((), padding=3) == ["decode"]


@pytest.mark.parametrize(("sequences", "batch", "slots"), [(264, "few", 2), (265, "many", 1)])
def test_few_sequences_share_their_pieces_in_tiles_of_their_own(sequences: int, batch: str, slots: int):
    # 264 programs are two per multiprocessor.
    decode = recorded(((1, 20),) * (sequences - 1) + ((1, 2000),), dtype=torch.bfloat16)[0]
    tile = paged_attention_triton._DECODE[90, 2, batch]
    assert decode.grid == (sequences + 1, slots)
    assert (decode.tile.num_warps, decode.tile.num_stages) == (tile.num_warps, tile.num_stages)
    assert decode.tile.blocks == {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_D": 16, "PIECE": 64}


def test_a_head_dim_above_128_is_refused():
    given = draw(((1, 5),), (1, 1), 129)
    with pytest.raises(
        KernelError, match=r"^paged_attention: head_dim 129; expected at most 128\. Use impl='torch' or GRANITE_SPEECH_KERNELS"
    ):
        attend(given)


def test_keys_and_values_may_have_different_strides():
    given = draw(((1, 100), (10, 33)), (4, 2))
    apart = given["v_cache"].permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    assert apart.stride() != given["k_cache"].stride()
    assert torch.equal(attend(given, v_cache=apart), attend(given))


def test_more_queries_than_max_query_len_do_not_change_other_sequences(monkeypatch: pytest.MonkeyPatch):
    # 6 queries with max_query_len 2: their own results are undefined, but their neighbours' are not.
    given = draw(((1, 200), (6, 200), (1, 250)))
    expected = attend(given)
    seen, launch = {}, paged_attention_triton.launch
    monkeypatch.setattr(paged_attention_triton, "launch", lambda *where, **arguments: (seen.update(arguments), launch(*where, **arguments)))
    out = attend(given, max_query_len=2)
    assert torch.equal(out[:1], expected[:1])
    assert torch.equal(out[7:], expected[7:])
    # Its keys make four pieces. Nothing is written after their states.
    assert (seen["pieces"], seen["rows"]) == (5, 4)
    assert seen["acc_ptr"].view(3, 5, 4, 16)[1, 4].isnan().all()
