"""Packing and padding of batches, positions over several calls, and the paged cache compared with plain Python lists."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from granite_speech.config import GraniteConfig
from granite_speech.errors import InputError
from granite_speech.modules.cache import PagedCache
from granite_speech.modules.packing import Segments, host_lengths, pack_clips
from granite_speech.modules.rows import pack_rows

CPU = torch.device("cpu")
LEFT = [[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1]]
RIGHT = [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
HOLES = [[0, 1, 0, 1], [1, 0, 0, 1], [1, 1, 0, 1]]
EMPTY = [[0, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]]


def new_cache(rows, page_size=64, layers=1, dtype=torch.float32):
    config = GraniteConfig(hidden_size=12, num_attention_heads=3, num_key_value_heads=1, num_hidden_layers=layers)
    return PagedCache(config, rows, dtype=dtype, device=CPU, page_size=page_size)


def run_call(shape, mask, cache):
    """The bookkeeping of one call of the model: its rows and the cache's counts."""
    rows = pack_rows(shape, CPU, mask, None, cache)
    rows.advance(cache)
    cache.begin(rows.segments)
    return rows


def pack(mask, *, width=None, cache=None, position_ids=None, batch=None):
    mask = None if mask is None else torch.tensor(mask)
    shape = (batch if mask is None else mask.shape[0], mask.shape[1] if width is None else width)
    return pack_rows(shape, CPU, mask, position_ids, cache)


def positions_by_row(rows):
    return [one.tolist() for one in rows.positions.split(rows.segments.lengths)]


# --- pack_rows -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mask, positions",
    [
        (LEFT, [[0, 1], [0, 1, 2, 3], [0]]),
        (RIGHT, [[0, 1], [0, 1, 2, 3], [0]]),
        (HOLES, [[0, 2], [0, 3], [0, 1, 3]]),
        (EMPTY, [[], [0, 1], []]),
        ([[1, 1]], [[0, 1]]),
        ([[0]], [[]]),
    ],
    ids=["left padding", "right padding", "holes", "empty rows", "full", "nothing"],
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_positions_count_from_the_first_kept_column(mask, positions, dtype):
    mask = torch.tensor(mask).to(dtype)
    rows = pack_rows(tuple(mask.shape), CPU, mask, None, None)
    assert positions_by_row(rows) == positions
    assert rows.segments.lengths == tuple(len(one) for one in positions)
    assert rows.kept.tolist() == mask.flatten().nonzero().flatten().tolist()


def test_without_a_mask_all_tokens_are_kept():
    rows = pack(None, batch=2, width=3)
    assert positions_by_row(rows) == [[0, 1, 2], [0, 1, 2]]
    assert rows.kept.tolist() == list(range(6))


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0)])
@pytest.mark.parametrize("cached", [False, True])
def test_no_rows_and_no_columns(shape, cached):
    rows = pack_rows(shape, CPU, torch.ones(shape), None, new_cache(shape[0]) if cached else None)
    assert rows.segments.lengths == (0,) * shape[0] and rows.positions.tolist() == []
    assert rows.pad(rows.pack(torch.ones(*shape, 5))).shape == (*shape, 5)


def test_position_ids_are_used_unchanged():
    given = torch.tensor([[9, 9, 4, 5], [7, 1, 2, 30], [0, 0, 0, 3]])
    assert positions_by_row(pack(LEFT, position_ids=given)) == [[4, 5], [7, 1, 2, 30], [3]]
    shared = torch.tensor([[10, 11, 12, 13]], dtype=torch.int32)
    assert positions_by_row(pack(LEFT, position_ids=shared)) == [[12, 13], [10, 11, 12, 13], [13]]


def test_position_ids_are_continued():
    cache = new_cache(2)
    positions = torch.tensor([[0, 1, 2], [5, 6, 9]])  # the 9 is padding: its column is masked
    rows = pack([[1, 1, 1], [1, 1, 0]], position_ids=positions, cache=cache)
    rows.advance(cache)
    cache.begin(rows.segments)
    assert positions_by_row(pack(None, batch=2, width=2, cache=cache)) == [[3, 4], [7, 8]]


@pytest.mark.parametrize("shape", [(3,), (2, 4), (3, 3), (3, 5), (1, 3, 4), (4, 4)])
def test_wrong_position_ids_are_refused(shape):
    with pytest.raises(InputError, match="position_ids of shape"):
        pack(LEFT, position_ids=torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(4),
        torch.ones(2, 4),
        torch.ones(3, 3),
        torch.ones(3, 5),  # wider than the tokens, with no earlier ones
        torch.ones(3, 1, 4, 4),
        torch.full((3, 4), 2),
        torch.full((3, 4), -1),
        torch.full((3, 4), 0.5),
        torch.full((3, 4), float("nan")),
        torch.tensor(LEFT).float().log(),  # an additive mask
    ],
    ids=["rank 1", "rows", "narrow", "wide", "rank 4", "two", "minus one", "half", "nan", "additive"],
)
def test_bad_masks_are_refused(mask):
    with pytest.raises(InputError, match="attention_mask of shape"):
        pack_rows((3, 4), CPU, mask, None, None)


# --- positions over several calls ------------------------------------------------------------------------------------------------


def test_decoding_continues_after_left_padding():
    cache = new_cache(3)
    mask = torch.tensor(LEFT)
    run_call((3, 4), mask, cache)
    assert (cache.lengths, cache.columns, cache.next_positions) == ([2, 4, 1], 4, [2, 4, 1])
    for step in range(3):
        mask = torch.cat([mask, torch.ones(3, 1)], 1)  # all columns so far, as in transformers' generate
        rows = run_call((3, 1), mask, cache)
        assert positions_by_row(rows) == [[2 + step], [4 + step], [1 + step]]
    assert (cache.lengths, cache.columns) == ([5, 7, 4], 7)


def test_a_mask_of_only_the_new_columns_gives_the_same_rows():
    whole, alone = new_cache(3), new_cache(3)
    first, second = torch.tensor(LEFT), torch.tensor([[1, 1], [0, 1], [1, 0]])
    for cache, later in ((whole, torch.cat([first, second], 1)), (alone, second)):
        run_call((3, 4), first, cache)
        rows = pack_rows((3, 2), CPU, later, None, cache)
        assert rows.segments.lengths == (2, 1, 1)
        assert positions_by_row(rows) == [[2, 3], [5], [1]]  # the second row's masked column counts


def test_a_mask_of_any_other_width_is_refused_after_a_prefill():
    cache = new_cache(3)
    run_call((3, 4), torch.tensor(LEFT), cache)
    for columns in (3, 4, 6):
        with pytest.raises(InputError, match=r"expected shape \(3, 1\) or \(3, 5\), with the columns already in past_key_values"):
            pack_rows((3, 1), CPU, torch.ones(3, columns), None, cache)
    assert cache.columns == 4, "a refused call must not be counted"


def test_a_row_that_was_empty_starts_at_zero():
    cache = new_cache(2)
    run_call((2, 3), torch.tensor([[0, 0, 0], [0, 1, 1]]), cache)
    assert cache.next_positions == [0, 2]
    rows = run_call((2, 2), torch.tensor([[0, 1], [1, 1]]), cache)
    assert positions_by_row(rows) == [[0], [2, 3]]
    assert positions_by_row(pack(None, batch=2, width=1, cache=cache)) == [[1], [4]]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_positions_do_not_depend_on_how_calls_are_split(data):
    """The distances between a row's tokens, which alone matter to rotary embeddings, do not depend on the split."""
    batch, width = data.draw(st.integers(1, 3)), data.draw(st.integers(2, 9))
    mask = torch.tensor(data.draw(st.lists(st.lists(st.integers(0, 1), min_size=width, max_size=width), min_size=batch, max_size=batch)))
    cut = data.draw(st.integers(1, width - 1))
    whole = positions_by_row(pack_rows((batch, width), CPU, mask, None, None))
    cache = new_cache(batch)
    first = run_call((batch, cut), mask[:, :cut], cache)
    second = pack_rows((batch, width - cut), CPU, mask, None, cache)
    assert [a + b for a, b in zip(positions_by_row(first), positions_by_row(second), strict=True)] == whole


# --- packing and padding ---------------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(batch=st.integers(1, 4), width=st.integers(1, 6), data=st.data())
def test_pack_and_pad_are_inverse(batch, width, data):
    mask = torch.tensor(data.draw(st.lists(st.lists(st.booleans(), min_size=width, max_size=width), min_size=batch, max_size=batch)))
    rows = pack_rows((batch, width), CPU, mask, None, None)
    padded = torch.arange(1.0, batch * width * 2 + 1).view(batch, width, 2)
    packed = rows.pack(padded)
    assert torch.equal(packed, padded[mask])
    assert torch.equal(rows.pad(packed), padded * mask[..., None])
    assert torch.equal(rows.pack(rows.pad(packed)), packed)
    ids = torch.arange(batch * width).view(batch, width)
    assert torch.equal(rows.pack(ids), ids[mask])


def test_gradients_flow_through_pad():
    rows = pack(HOLES)
    packed = torch.ones(rows.segments.total, 2, requires_grad=True)
    (rows.pad(packed) * torch.arange(12.0).view(3, 4, 1)).sum().backward()
    assert packed.grad[:, 0].tolist() == torch.arange(12.0)[torch.tensor(HOLES).flatten().bool()].tolist()


def test_attention_weights_are_padded_to_their_columns():
    rows = pack([[0, 1, 1], [1, 0, 1]])
    weights = [torch.arange(1.0, 9.0).view(2, 2, 2), torch.arange(11.0, 19.0).view(2, 2, 2)]
    padded = rows.pad_weights(weights)
    assert padded.shape == (2, 2, 3, 3)
    assert torch.equal(padded[0][:, 1:, 1:], weights[0]) and torch.equal(padded[1][:, ::2, ::2], weights[1])
    assert (
        padded[0, :, 0].abs().sum() == padded[0, :, :, 0].abs().sum() == padded[1, :, 1].abs().sum() == padded[1, :, :, 1].abs().sum() == 0
    )


@settings(max_examples=80, deadline=None)
@given(lengths=st.lists(st.integers(0, 7), max_size=5), width=st.integers(1, 4))
def test_segments(lengths, width):
    segments = Segments(tuple(lengths), CPU)
    assert segments.starts == tuple(sum(lengths[:i]) for i in range(len(lengths) + 1))
    assert segments.cu_seqlens.dtype == torch.int32 and segments.cu_seqlens.tolist() == list(segments.starts)
    assert (segments.total, segments.longest) == (sum(lengths), max(lengths, default=0))
    packed = torch.arange(1.0, segments.total * 3 + 1).view(-1, 3)
    padded = segments.pad(packed, 7)
    assert padded.shape == (len(lengths), 7, 3)
    for row, one in zip(padded, packed.split(lengths) if lengths else (), strict=True):
        assert torch.equal(row[: len(one)], one) and not row[len(one) :].any()
    windows = tuple(-(-length // width) for length in lengths)
    cut = segments.pad_to_multiple(packed, width, windows)
    assert cut.shape == (sum(windows), width, 3)
    for own, one in zip(cut.split(windows) if lengths else (), packed.split(lengths) if lengths else (), strict=True):
        assert torch.equal(own.flatten(0, 1)[: len(one)], one) and not own.flatten(0, 1)[len(one) :].any()


def test_pack_clips():
    padded = torch.arange(24.0).view(3, 4, 2)
    packed, clips = pack_clips(padded, [4, 0, 1])
    assert clips.lengths == (4, 0, 1)
    assert torch.equal(packed, torch.cat([padded[0], padded[2, :1]]))
    assert torch.equal(pack_clips(padded, torch.tensor([4, 0, 1]))[0], packed)
    everything, clips = pack_clips(padded, None)
    assert clips.lengths == (4, 4, 4) and torch.equal(everything, padded.flatten(0, 1))
    with pytest.raises(InputError, match=r"shape \(4, 2\)"):
        pack_clips(padded[0], None)


@pytest.mark.parametrize(
    "lengths", [[4, 0], [4, 0, 1, 2], [5, 0, 1], [-1, 0, 1], [True, 0, 1], [1.0, 0, 1], ["4", 0, 1], torch.tensor([4.0, 0, 1])]
)
def test_wrong_lengths_are_refused(lengths):
    with pytest.raises(InputError, match=r"clips' lengths = .*3 integers from 0 to 4"):
        host_lengths(lengths, 3, 4, "clips' lengths")


# --- the cache -------------------------------------------------------------------------------------------------------------------


def read(cache, step, layer, pools):
    """Every sequence's keys, found only through the block table, as attention reads them."""
    flat = pools[layer].flatten(0, 1)
    out = []
    for pages, count in zip(step.block_table.tolist(), step.kv_lens.tolist(), strict=True):
        slots = [pages[place // cache.page_size] * cache.page_size + place % cache.page_size for place in range(count)]
        out.append(flat[slots])
    return out


@pytest.mark.parametrize("page_size", [1, 3, 64])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_the_cache_returns_every_token(page_size, data):
    sequences = data.draw(st.integers(1, 3))
    counts = st.lists(st.integers(0, 8), min_size=sequences, max_size=sequences)
    cache = new_cache(sequences, page_size, layers=2)
    truth = {(kind, layer, row): [] for kind in "kv" for layer in range(2) for row in range(sequences)}
    number = 0.0
    for _ in range(data.draw(st.integers(1, 5))):
        if data.draw(st.booleans()):
            cache.reserve([length + more for length, more in zip(cache.lengths, data.draw(counts), strict=True)])
        new = data.draw(counts)
        had = any(cache.lengths)
        step = cache.begin(Segments(tuple(new), CPU))
        assert step.has_past == had
        for layer in range(2):
            keys = number + torch.arange(sum(new) * 4.0).view(-1, 1, 4)
            step.write(layer, keys, -keys)
            number += sum(new) * 4.0
            for row, own in enumerate(keys.split(new)):
                truth["k", layer, row] += own.tolist()
                truth["v", layer, row] += (-own).tolist()
        for layer in range(2):
            for kind, pools in (("k", cache.keys), ("v", cache.values)):
                found = read(cache, step, layer, pools)
                assert [one.tolist() for one in found] == [truth[kind, layer, row] for row in range(sequences)]
    assert cache.get_seq_length() == max(len(truth["k", 0, row]) for row in range(sequences))
    assert len(set(step.slots.tolist())) == len(step.slots), "two tokens in one slot"


@pytest.mark.parametrize("page_size", [1, 3, 64])
def test_pools_grow_rarely_and_keep_their_contents(page_size):
    cache = new_cache(2, page_size)
    pools, first = set(), None
    for token in range(200):
        step = cache.begin(Segments((1, 1), CPU))
        step.write(0, torch.full((2, 1, 4), float(token)), torch.full((2, 1, 4), float(-token)))
        pools.add(cache.keys[0].shape[0])
        first = step.slots.tolist() if first is None else first
    assert read(cache, step, 0, cache.keys)[1][:, 0, 0].tolist() == list(range(200))
    assert cache.keys[0].flatten(0, 1)[first][:, 0, 0].tolist() == [0.0, 0.0]
    assert len(pools) <= 10, "a pool that grew for every token would be copied for every token"


def test_reserved_pages_need_no_growth():
    cache = new_cache(2, page_size=3)
    cache.reserve([10, 4])
    pool = cache.keys[0]
    assert pool.shape == (1 + 4 + 2, 3, 1, 4)  # page 0 belongs to no sequence
    for new in ((7, 1), (3, 3)):
        cache.begin(Segments(new, CPU))
    cache.reserve([2, 2])  # less than is reserved already
    assert cache.keys[0] is pool
    cache.begin(Segments((0, 3), CPU))
    assert cache.keys[0] is not pool


def test_index_tensors_have_the_kernels_dtypes():
    step = new_cache(2, page_size=3).begin(Segments((5, 0), CPU))
    assert step.block_table.dtype == step.kv_lens.dtype == torch.int32 and step.slots.dtype == torch.int64
    assert step.block_table.shape == (2, 2) and step.kv_lens.tolist() == [5, 0]


def test_no_sequences():
    step = new_cache(0).begin(Segments((), CPU))
    assert step.block_table.shape == (0, 0) and step.slots.tolist() == [] and not step.has_past


def test_another_batch_size_is_refused():
    with pytest.raises(InputError, match="1 rows for past_key_values of 2"):
        new_cache(2).begin(Segments((3,), CPU))


def test_gradients_end_at_the_cache():
    cache = new_cache(1)
    keys = torch.ones(2, 1, 4, requires_grad=True)
    cache.begin(Segments((2,), CPU)).write(0, keys, keys)
    assert not cache.keys[0].requires_grad and not cache.values[0].requires_grad
