"""The start of a decode step compared with Python's numbers, and with what the modules compute."""

import math

import pytest
import torch
import torch.nn.functional as F
from granite_kernels import begin_step
from granite_kernels.begin_step import OPERATION, begin_step_cost

from granite_speech.modules.rotary import rotary_embedding

NAMES = ("embedding", "tokens", "positions", "kv_lens", "active", "frequencies")


def draw(rows: int = 6, vocab: int = 11, hidden: int = 8, head_dim: int = 6, dtype: torch.dtype = torch.float64) -> dict:
    """Repeated tokens, positions up to 131071, and rows of which every third is not active."""
    rng = torch.Generator().manual_seed(0)
    frequencies = torch.rand(head_dim // 2, generator=rng).to(torch.promote_types(dtype, torch.float32))
    tensors = (
        torch.randn(vocab, hidden, generator=rng).to(dtype),
        torch.randint(0, 3, (rows,), generator=rng),
        torch.randint(0, 131072, (rows,), generator=rng),
        torch.arange(5, 5 + rows, dtype=torch.int32),
        (torch.arange(rows) % 3 != 2).int(),
        torch.cat((-frequencies, frequencies)),
    )
    return dict(zip(NAMES, tensors, strict=True))


def test_each_row_matches_the_formula():
    given = draw()
    before = {name: given[name].tolist() for name in ("positions", "kv_lens")}
    x, cos, sin, lens = begin_step(**given, multiplier=12.0)
    for row, active in enumerate(given["active"].tolist()):
        position = before["positions"][row] + active
        assert given["positions"][row] == position
        assert given["kv_lens"][row] == before["kv_lens"][row] + active
        assert lens[row] == (before["kv_lens"][row] + 1 if active else 0)
        assert x[row].tolist() == [12.0 * one for one in given["embedding"][given["tokens"][row]].tolist()]
        for d, frequency in enumerate(given["frequencies"].tolist()):
            assert math.isclose(cos[row, d], math.cos(position * frequency), abs_tol=1e-12)
            assert math.isclose(sin[row, d], math.sin(position * frequency), abs_tol=1e-12)
    assert (x.shape, cos.shape, sin.shape, lens.shape, lens.dtype) == ((6, 8), (6, 6), (6, 6), (6,), torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_bits_are_those_of_the_modules(dtype: torch.dtype):
    given = draw(dtype=dtype)
    x, cos, sin, _ = begin_step(**given, multiplier=12.0)
    expected = rotary_embedding(given["frequencies"], given["positions"], dtype)
    assert torch.equal(cos, expected[0][:, 0])
    assert torch.equal(sin, expected[1][:, 0])
    assert torch.equal(x, F.embedding(given["tokens"], given["embedding"]) * 12.0)


def test_only_positions_and_lengths_change():
    given = draw()
    before = {name: given[name].clone() for name in NAMES}
    begin_step(**given, multiplier=12.0)
    assert {name for name in NAMES if not torch.equal(given[name], before[name])} == set(OPERATION.mutates)


def test_the_cost_counts_one_row_of_the_embedding_per_token():
    given = draw(rows=3, vocab=1000, hidden=8, head_dim=6, dtype=torch.float32)
    moved = 2 * 3 * (8 + 6) * 4 + 6 * 4 + 3 * (8 + 4) + 2 * 3 * (8 + 4) + 3 * 4
    assert begin_step_cost(**given, multiplier=12.0).bytes == moved
