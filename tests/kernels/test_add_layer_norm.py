"""The residual sum and its norms compared with the formula, and with the modules' calls."""

import pytest
import torch
from granite_kernels import KernelError, add_layer_norm
from granite_kernels.add_layer_norm import add_layer_norm_cost

OPTIONS = {"eps": 1e-5, "multiplier": 0.5}


def draw(rows: int = 5, width: int = 20, twice: bool = True, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    names = ("weight", "bias", "next_weight", "next_bias")[: 4 if twice else 2]
    rowwise = {name: torch.randn(rows, width, generator=rng).to(dtype) for name in ("x", "delta")}
    return rowwise | {name: torch.randn(width, generator=rng).to(dtype) for name in names}


def formula(x, delta, weight, bias, next_weight=None, next_bias=None, eps=1e-5, multiplier=0.5, next_eps=None):
    """The two results by plain arithmetic, which autograd can follow."""

    def norm(y, weight, bias, eps):
        mean = y.sum(1, keepdim=True) / y.shape[1]
        variance = ((y - mean) ** 2).sum(1, keepdim=True) / y.shape[1]
        return weight * (y - mean) / (variance + eps) ** 0.5 + bias

    total = x + multiplier * delta
    normed = norm(total, weight, bias, eps)
    return (total, normed) if next_weight is None else (normed, norm(normed, next_weight, next_bias, eps if next_eps is None else next_eps))


@pytest.mark.parametrize("next_eps", [None, 0.3])
def test_the_results_match_the_formula(next_eps: float | None):
    given = draw()
    results = add_layer_norm(**given, **OPTIONS, next_eps=next_eps)
    torch.testing.assert_close(results, formula(**given, next_eps=next_eps), rtol=1e-12, atol=1e-12)
    single = draw(twice=False)
    torch.testing.assert_close(add_layer_norm(**single, **OPTIONS), formula(**single), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_mean_of_a_pair_has_the_bits_of_the_pooling_of_transformers(dtype: torch.dtype, impl: str):
    given = draw(9, 20, twice=False, dtype=dtype)
    given["x"][8] = torch.nan  # the odd frame after four pairs
    pooled = given["x"][None].unfold(1, 2, 2).mean(-1)[0]
    given |= {"delta": torch.zeros_like(given["x"][:6]), "pairs": torch.tensor([0, 2, 4, 6, -1, -1], dtype=torch.int32)}
    total, normed = add_layer_norm(**given, **OPTIONS, impl=impl)
    assert torch.equal(total[:4], pooled)
    assert not total[4:].any()
    assert torch.equal(normed[4:], given["bias"].expand(2, 20))


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("twice", [False, True])
def test_with_pairs_it_is_the_sum_with_their_means(twice: bool, impl: str):
    given = draw(7, 20, twice, torch.float32)
    places = [5, 0, 3]  # in any order, and row 2 is in none
    given["delta"] = given["delta"][:3]
    means = torch.stack([(given["x"][one] + given["x"][one + 1]) / 2 for one in places])
    expected = add_layer_norm(**given | {"x": means}, **OPTIONS)
    results = add_layer_norm(**given, **OPTIONS, pairs=torch.tensor(places, dtype=torch.int32), impl=impl)
    torch.testing.assert_close(results, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_bits_are_those_of_eager_code(dtype: torch.dtype):
    given = draw(dtype=dtype)
    norms = [torch.nn.LayerNorm(20, eps=eps, dtype=dtype) for eps in (1e-5, 1e-3)]
    for norm, prefix in zip(norms, ("", "next_"), strict=True):
        norm.weight = torch.nn.Parameter(given[f"{prefix}weight"])
        norm.bias = torch.nn.Parameter(given[f"{prefix}bias"])
    expected = torch.add(given["x"], given["delta"], alpha=0.5)
    total, normed = add_layer_norm(**{**given, "next_weight": None, "next_bias": None}, **OPTIONS)
    assert torch.equal(total, expected)
    assert torch.equal(normed, norms[0](expected))
    first, second = add_layer_norm(**given, **OPTIONS, next_eps=1e-3)
    assert torch.equal(first, normed)
    assert torch.equal(second, norms[1](normed))


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"next_bias": None}, {}, "next_weight without next_bias; expected both or neither"),
        ({"next_weight": None}, {}, "next_bias without next_weight; expected both or neither"),
        ({"next_weight": None, "next_bias": None}, {"next_eps": 1e-3}, "next_eps without next_weight; expected a second norm for it"),
        ({"next_bias": torch.zeros(19).double()}, {}, r"next_bias has shape \(19,\); expected \(width\) with width = 20 as in x"),
        ({"next_weight": torch.zeros(20)}, {}, "next_weight has dtype torch.float32; expected torch.float64"),
        ({"delta": torch.zeros(5, 1).double()}, {}, r"delta has shape \(5, 1\); expected"),
        ({"pairs": torch.zeros(4, dtype=torch.int32)}, {}, r"pairs has shape \(4,\); expected \(rows\) with rows = 5 as in delta"),
        ({"pairs": torch.zeros(5, dtype=torch.int64)}, {}, "pairs has dtype torch.int64; expected torch.int32"),
        ({"pairs": torch.zeros(5, dtype=torch.int32), "x": torch.zeros(9, 3).double()}, {}, "delta has shape .* with width = 3 as in x"),
    ],
)
def test_wrong_arguments_are_refused(change: dict, options: dict, message: str):
    with pytest.raises(KernelError, match=f"^add_layer_norm: {message}"):
        add_layer_norm(**draw() | change, **OPTIONS, **options)


def test_the_cost_moves_every_tensor_once():
    cost = add_layer_norm_cost(**draw(dtype=torch.bfloat16), **OPTIONS)
    assert cost.bytes == 2 * (4 * 5 * 20 + 4 * 20)
    given = draw(dtype=torch.bfloat16)
    given |= {"delta": given["delta"][:2], "pairs": torch.tensor([0, 2], dtype=torch.int32)}
    assert add_layer_norm_cost(**given, **OPTIONS).bytes == 2 * ((4 + 3 * 2) * 20 + 4 * 20) + 2 * 4
