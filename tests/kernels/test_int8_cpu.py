"""8-bit products on a CPU: accurate, one row as in any batch, in both libraries."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from granite_kernels import cpu, int8_cpu
from granite_kernels.int8_cpu import PackedInt8, can_pack, round_rows

pytestmark = pytest.mark.skipif(not cpu.has_int8(), reason="a processor that is not fast at products of 8-bit integers")

SHAPES = [(1, 1), (1, 37), (21, 100), (64, 64), (96, 256), (33, 1)]  # of weights
ROWS = [0, 1, 2, 5, 40]


@pytest.fixture(params=["onednn", "fbgemm"], autouse=True)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both, whichever this processor prefers."""
    if request.param == "onednn" and not cpu.has_amx():
        pytest.skip("oneDNN is for AMX")
    monkeypatch.setattr(int8_cpu, "has_amx", lambda: request.param == "onednn")
    return request.param


def matrix(outputs: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(outputs * 1000 + inputs)
    weight = torch.randint(-127, 128, (outputs, inputs), generator=rng, dtype=torch.int8)
    return weight, torch.rand(outputs, generator=rng) / 50 + 1e-3


def rows_of(count: int, inputs: int, dtype: torch.dtype) -> torch.Tensor:
    """Of very different sizes."""
    rng = torch.Generator().manual_seed(count)
    return (torch.randn(count, inputs, generator=rng) * torch.logspace(-3, 3, max(count, 1))[:count, None]).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", ROWS)
def test_each_row_is_as_accurate_as_its_own_scale_allows(rows: int, shape: tuple[int, int], has_bias: bool, dtype: torch.dtype):
    (weight, scale), x = matrix(*shape), rows_of(rows, shape[1], dtype)
    bias = torch.randn(shape[0]).to(dtype) if has_bias else None
    y = PackedInt8(weight, scale).linear(x, bias)
    assert y.dtype == dtype
    wide = weight.double() * scale.double()[:, None]
    truth = F.linear(x.double(), wide, None if bias is None else bias.double())
    # Half a level of each activation, all of which may add up, and the roundings of the result.
    level = x.double().abs().amax(1, keepdim=True) / 127 * (1 + 2.0**-7) if rows else x.double()[:, :1]
    allowed = 0.55 * level * wide.abs().sum(1) + 3 * max(torch.finfo(dtype).eps, 1e-6) * (x.double().abs() @ wide.abs().T + 1)
    assert ((y - truth).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_has_the_same_bits_whatever_its_neighbours_are(dtype: torch.dtype):
    packed, x = PackedInt8(*matrix(96, 256)), rows_of(40, 256, dtype)
    together = packed.linear(x, torch.ones(96, dtype=dtype))
    for number in (0, 7, 39):
        assert torch.equal(packed.linear(x[number : number + 1], torch.ones(96, dtype=dtype))[0], together[number])
    x[:3] = torch.nan
    assert torch.equal(packed.linear(x, torch.ones(96, dtype=dtype))[3:], together[3:])


def test_many_rows_are_rounded_in_pieces(monkeypatch: pytest.MonkeyPatch):
    packed, x = PackedInt8(*matrix(64, 64)), rows_of(40, 64, torch.bfloat16)
    whole = packed.linear(x)
    monkeypatch.setattr(int8_cpu, "_ELEMENTS_AT_ONCE", 3 * 64)
    assert torch.equal(packed.linear(x), whole)


def test_leading_dimensions_and_views():
    packed, x = PackedInt8(*matrix(21, 100)), torch.randn(2, 3, 200)[..., ::2]
    assert packed.linear(x).shape == (2, 3, 21)
    assert torch.equal(packed.linear(x).flatten(0, 1), packed.linear(x.flatten(0, 1).contiguous()))
    before = x.clone()
    packed.linear(x)
    assert torch.equal(x, before)


def test_zeros_stay_zeros_and_nan_stays_nan():
    packed = PackedInt8(*matrix(21, 100))
    x = torch.zeros(3, 100)
    x[1] = torch.nan
    y = packed.linear(x)
    assert not y[[0, 2]].any()
    assert y[1].isnan().all()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_integers_come_back(shape: tuple[int, int]):
    weight, scale = matrix(*shape)
    packed = PackedInt8(weight, scale)
    assert packed.shape == shape
    for values, factors in (packed.unpack(), pickle.loads(pickle.dumps(packed)).unpack()):
        assert torch.equal(values, weight)
        assert torch.equal(factors, scale)
    assert copy.deepcopy(packed) is packed


def test_other_quantized_modules_keep_their_engine():
    before = torch.backends.quantized.engine
    PackedInt8(*matrix(8, 8))
    assert torch.backends.quantized.engine == before


def test_processors_without_such_products_pack_nothing(monkeypatch: pytest.MonkeyPatch):
    assert can_pack(64, 64)
    assert not can_pack(0, 64)
    monkeypatch.setattr(int8_cpu, "has_int8", lambda: False)
    assert not can_pack(64, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rounding_uses_the_whole_range(dtype: torch.dtype):
    x = torch.randn(5, 300).to(dtype)
    q, scale = round_rows(x)
    assert scale.dtype == dtype
    assert ((q.abs().amax(1) - 127).abs() < 0.5).all()
    torch.testing.assert_close(q * scale.float(), x.float(), rtol=1e-5, atol=1e-6)
