"""Greedy CTC decoding compared with Python's groupby: runs, clips, ties, NaN, infinities, and edges of blocks of columns and frames."""

import importlib
from itertools import groupby

import pytest
import torch
from granite_kernels import KernelError, ctc_greedy
from granite_kernels.ctc_greedy import OPERATION, CtcGreedy, ctc_greedy_cost, ctc_greedy_library
from granite_kernels.launch import Tile, recorded_launches
from granite_kernels.op import Case
from granite_kernels.testing import poisoned_allocations
from hypothesis import given, settings
from hypothesis import strategies as st

both = pytest.mark.parametrize("impl", ["torch", "triton"])
triton_file = importlib.import_module("granite_kernels.ctc_greedy_triton")


def offsets(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def draw(clips: tuple[int, ...], vocab: int, dtype: torch.dtype = torch.float32, **options: int) -> dict:
    return Case("", OPERATION.cases[0].make, {"clips": clips, "vocab": vocab, **options}).inputs(dtype)


def decoded(**inputs) -> CtcGreedy:
    with poisoned_allocations():
        return ctc_greedy(**inputs)


def expected_tokens(result: CtcGreedy, lengths: tuple[int, ...], blank: int) -> CtcGreedy:
    """The tokens that follow from the ids and log-probabilities of `result`, by Python's groupby."""
    rows = len(result.ids)
    tokens, firsts, lasts, highest, counts = [-1] * rows, [-1] * rows, [-1] * rows, [0.0] * rows, []
    begin = 0
    for length in lengths:
        ids = result.ids[begin : begin + length].tolist()
        runs = [(token, [frame for frame, _ in run]) for token, run in groupby(enumerate(ids), key=lambda one: one[1]) if token != blank]
        for place, (token, frames) in enumerate(runs, begin):
            tokens[place], firsts[place], lasts[place] = token, frames[0], frames[-1]
            highest[place] = result.logprobs[begin + frames[0] : begin + frames[-1] + 1].max().item()  # NaN, if one is
        counts.append(len(runs))
        begin += length
    whole = [torch.tensor(one, dtype=torch.int32) for one in (tokens, firsts, lasts, counts)]
    return result._replace(
        tokens=whole[0], first_frames=whole[1], last_frames=whole[2], counts=whole[3], token_logprobs=torch.tensor(highest)
    )


def assert_same(result: CtcGreedy, expected: CtcGreedy) -> None:
    for name, one, other in zip(CtcGreedy._fields, result, expected, strict=True):
        assert one.dtype == other.dtype and torch.equal(one.nan_to_num(9.0), other.nan_to_num(9.0)), f"{name}: {one}, expected {other}"


def of_path(path: list[int], vocab: int) -> torch.Tensor:
    """Logits whose best ids are `path`, with other values in every row."""
    logits = torch.randn(len(path), vocab, generator=torch.Generator().manual_seed(0))
    return logits.scatter(1, torch.tensor(path, dtype=torch.int64)[:, None], 5 + torch.arange(float(len(path)))[:, None].sin())


@both
@settings(max_examples=40, deadline=None)
@given(clips=st.lists(st.lists(st.integers(0, 2), max_size=9), max_size=4), blank=st.integers(0, 2), padding=st.integers(0, 3))
def test_tokens_are_the_runs_that_are_not_blank(impl: str, clips: list[list[int]], blank: int, padding: int):
    path, lengths = [one for clip in clips for one in clip], tuple(map(len, clips))
    logits = torch.cat((of_path(path, 3), torch.full((padding, 3), torch.nan)))
    before, triton_file._CLIP_TILE = triton_file._CLIP_TILE, Tile({"BLOCK": 4}, 1)  # runs cross blocks of frames
    try:
        result = decoded(logits=logits, cu_seqlens=offsets(*lengths), blank=blank, impl=impl)
    finally:
        triton_file._CLIP_TILE = before
    assert result.ids.tolist() == path + [-1] * padding
    assert not result.logprobs[len(path) :].any() and not result.entropy[len(path) :].any()
    assert_same(result, expected_tokens(result, lengths, blank))


@both
def test_a_run_may_be_longer_than_a_block_of_frames(impl: str):
    block = triton_file._CLIP_TILE.blocks["BLOCK"]
    path = [1] * (2 * block + 3) + [0] * (block - 4) + [2] * 2 + [1] * (block - 1)
    result = decoded(logits=of_path(path, 3), cu_seqlens=offsets(len(path)), impl=impl)
    assert_same(result, expected_tokens(result, (len(path),), 0))
    assert result.counts.tolist() == [3] and result.first_frames[:3].tolist() == [0, 3 * block - 1, 3 * block + 1]


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab", [2, 15, 16, 17, 50])
def test_log_probability_and_entropy_are_those_of_the_distribution(vocab: int, dtype: torch.dtype, impl: str):
    inputs = draw((6, 3), vocab, dtype)
    with triton_file._TILES.using({(80,): Tile({"BLOCK": 16}, 1)}):
        result = decoded(**inputs, impl=impl)
    wide = torch.distributions.Categorical(logits=inputs["logits"].double())
    assert torch.equal(result.ids.long(), inputs["logits"].argmax(1))
    torch.testing.assert_close(result.logprobs.double(), wide.log_prob(result.ids.double()), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(result.entropy.double(), wide.entropy(), rtol=1e-6, atol=1e-6)


@both
@pytest.mark.parametrize("vocab", [16384, 16385, 40001])
def test_large_vocabularies(vocab: int, impl: str):
    inputs = draw((2,), vocab, torch.bfloat16)
    inputs["logits"][1, -1] = 40
    result = decoded(**inputs, impl=impl)
    wide = torch.distributions.Categorical(logits=inputs["logits"].double())
    assert result.ids.tolist() == [int(inputs["logits"][0].argmax()), vocab - 1]
    torch.testing.assert_close(result.logprobs.double(), wide.log_prob(result.ids.double()), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.entropy.double(), wide.entropy(), rtol=1e-5, atol=1e-5)


@both
def test_of_equal_logits_the_lowest_id_wins(impl: str):
    logits = torch.randint(-2, 3, (40, 23), generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    logits[0] = 0.25
    with triton_file._TILES.using({(80,): Tile({"BLOCK": 8}, 1)}):
        ids = decoded(logits=logits, cu_seqlens=offsets(40), impl=impl).ids
    assert ids.tolist() == [row.index(max(row)) for row in logits.tolist()]


@both
@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow", "ignore:divide by zero")
def test_nan_is_the_largest_and_makes_its_row_and_token_nan(impl: str):
    logits = of_path([1, 1, 0, 2, 3, 4], 20)
    logits[1, 3:5] = torch.nan  # in the first block of columns
    logits[3, 19] = torch.nan  # in the last, after the largest
    logits[4, 2], logits[4, 18] = torch.nan, torch.nan
    with triton_file._TILES.using({(80,): Tile({"BLOCK": 8}, 1)}):
        result = decoded(logits=logits, cu_seqlens=offsets(6), impl=impl)
    assert result.ids.tolist() == logits.argmax(1).tolist() == [1, 3, 0, 19, 2, 4]
    assert result.logprobs.isnan().tolist() == result.entropy.isnan().tolist() == [False, True, False, True, True, False]
    assert result.token_logprobs.isnan().tolist() == [False, True, True, True, False, False]
    assert_same(result, expected_tokens(result, (6,), 0))


@both
@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow", "ignore:divide by zero")
def test_nan_in_one_frame_of_a_run_is_the_runs(impl: str):
    for place in range(6):
        logits = of_path([1] * 6, 4)
        logits[place, 1] = torch.nan
        before, triton_file._CLIP_TILE = triton_file._CLIP_TILE, Tile({"BLOCK": 2}, 1)
        try:
            result = decoded(logits=logits, cu_seqlens=offsets(6), impl=impl)
        finally:
            triton_file._CLIP_TILE = before
        assert result.counts.tolist() == [1] and result.token_logprobs[0].isnan()


@both
@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow", "ignore:divide by zero")
def test_infinite_logits(impl: str):
    infinity = torch.inf
    rows = [
        [-infinity] * 8 + [-200.0, -infinity, -201.0],  # a block of columns without any probability, then small numbers
        [300.0] + [-infinity] * 10,
        [-infinity] * 11,
        [0.0] * 9 + [infinity, infinity],
    ]
    with triton_file._TILES.using({(80,): Tile({"BLOCK": 4}, 1)}):
        result = decoded(logits=torch.tensor(rows), cu_seqlens=offsets(4), impl=impl)
    assert result.ids.tolist() == [8, 0, 0, 9]
    p = torch.sigmoid(torch.tensor([1.0, -1.0]))
    expected = torch.tensor([p[0].log(), 0.0, torch.nan, torch.nan])
    torch.testing.assert_close(result.logprobs, expected, equal_nan=True, rtol=1e-5, atol=1e-6)
    expected[0] = -(p * p.log()).sum()
    torch.testing.assert_close(result.entropy, expected, equal_nan=True, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_clip_gets_the_same_bits_whatever_the_others_are(dtype: torch.dtype):
    inputs = draw((7, 12, 3), 90, dtype)
    together = decoded(**inputs, impl="triton")
    for number, clip in enumerate((slice(0, 7), slice(7, 19), slice(19, 22))):
        alone = decoded(logits=inputs["logits"][clip], cu_seqlens=offsets(clip.stop - clip.start), impl="triton")
        for name in CtcGreedy._fields[:-1]:
            assert torch.equal(getattr(alone, name), getattr(together, name)[clip]), name
        assert alone.counts == together.counts[number]


@both
def test_logits_are_not_copied_in_float32(impl: str, monkeypatch: pytest.MonkeyPatch):
    inputs = draw((300, 400), 1024, torch.bfloat16)
    if impl == "triton":
        given = {name: one.to("meta") if isinstance(one, torch.Tensor) else one for name, one in inputs.items()}
        with recorded_launches(90) as launches:
            ctc_greedy(**given, impl=impl)
        assert [one.grid for one in launches] == [(700,), (2,)]
        tensors = [one for launch in launches for one in launch.arguments.values() if isinstance(one, torch.Tensor)]
        assert {one.numel() for one in tensors if one is not given["logits"]} <= {700, 3, 2}
    else:
        widened, widen = [], torch.Tensor.log_softmax
        monkeypatch.setattr(torch.Tensor, "log_softmax", lambda one, **options: widened.append(len(one)) or widen(one, **options))
        ctc_greedy(**inputs, impl=impl)
        assert sum(widened) == 700 and max(widened) == 512


def test_a_short_row_has_a_small_tile():
    for vocab, block, warps in ((1, 1, 1), (256, 256, 1), (1025, 2048, 4), (16384, 4096, 8), (100353, 4096, 8)):
        tile = triton_file._tile(vocab, 90)
        assert (tile.blocks["BLOCK"], tile.num_warps) == (block, warps)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens": offsets(2, 3).long()}, r"cu_seqlens has dtype torch.int64; expected torch.int32"),
        ({"cu_seqlens": torch.zeros(0, dtype=torch.int32)}, r"cu_seqlens is empty; expected clips \+ 1 offsets"),
        ({"cu_seqlens": offsets(4, 3)}, r"cu_seqlens \[0, 4, 7\] for 5 rows; expected offsets"),
        ({"logits": torch.zeros(5, 0)}, r"logits has no columns; expected one for each token"),
        ({"blank": 4}, r"blank 4; expected an integer from 0 to 3, a column of logits\. Pass the model's pad_token_id"),
        ({"blank": -1}, r"blank -1; expected an integer from 0 to 3"),
        ({"blank": True}, r"blank True; expected an integer"),
        ({"logits": torch.zeros(5, 4, requires_grad=True)}, r"logits, a tensor that requires a gradient; expected inference"),
    ],
)
def test_wrong_arguments_are_refused(change: dict, message: str):
    with pytest.raises(KernelError, match=message):
        ctc_greedy(**{"logits": torch.zeros(5, 4), "cu_seqlens": offsets(2, 3), **change})


def test_cost_and_library_call_match_a_count_by_hand():
    inputs = draw((4, 2), 8, torch.bfloat16, padding=3)
    cost = ctc_greedy_cost(**inputs)
    assert (cost.flops, cost.bytes) == (5 * 6 * 8, 2 * 6 * 8 + 3 * 4 + 9 * 7 * 4 + 2 * 4)
    assert torch.equal(ctc_greedy_library(**inputs)(), inputs["logits"].argmax(1))
